"""A kind of input with everything that the harness is there to notice."""

from __future__ import annotations

import os
import random
import signal

from obmlite.errors import CorruptPackageError
from tests.adversarial.kinds import Kind
from tests.adversarial.memory import Finding

ILLS = ("crash", "hang", "memory", "exception", "wrong")


def _read(data: bytes) -> str:
    ill = ILLS[data[0]] if data[0] < len(ILLS) else ""
    if ill == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    while ill == "hang":
        pass
    if ill == "memory":
        bytes(1 << 34)
    if ill == "exception":
        raise KeyError("unexpected")
    if ill == "wrong":
        raise Finding("wrong data")
    if data[0] % 2:
        raise CorruptPackageError("As it should be.", field="f")
    return "same"


def _make(rng: random.Random) -> bytes:
    return bytes([rng.randrange(40)])


BROKEN = Kind("broken", "what the harness is there to notice", _make, _read, seconds=0.3)
