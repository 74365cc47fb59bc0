"""Kinds of input, and what must come of any of it: a refusal that says what is wrong, or what is in order."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from obmlite.errors import MAX_FACT, CorruptPackageError, ObmliteError, UnsupportedFormatError
from tests.adversarial.memory import Finding

MAX_MESSAGE = 8 * MAX_FACT
"""Characters of an error, however large the input is."""

SECONDS = 2.0
"""Processor time that one input may take."""

MEMORY = 512 << 20
"""Bytes of address space that a child may take beyond what it has when it starts."""

REFUSALS: tuple[type[ObmliteError], ...] = (CorruptPackageError, UnsupportedFormatError)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
      name: of the kind.
      about: what is changed, for people.
      make: an input.
      read: reads it as the library does; returns "same" (as before the change) or "other" (something else that holds
        together, which only a reader of the right bytes can get: :class:`Finding` otherwise). Where one input is
        several, as one process reads them, how many of each.
      refusals: classes of the errors that it may raise.
      unnamed: whether an error may name no field; each use says why.
      seconds: of processor time that one input may take.
      stream: kinds of one stream are given the same inputs.
    """

    name: str
    about: str
    make: Callable[[random.Random], bytes]
    read: Callable[[bytes], str | dict[str, int]]
    refusals: tuple[type[ObmliteError], ...] = REFUSALS
    unnamed: Callable[[ObmliteError], bool] = lambda _: False
    seconds: float = SECONDS
    stream: str = ""


def judge(kind: Kind, data: bytes) -> dict[str, int]:
    """What comes of an input: how many are "refused", "same" and "other".

    Raises:
      Exception: anything else that comes of it.
    """
    try:
        found = kind.read(data)
    except kind.refusals as error:
        if not error.field and not kind.unnamed(error):
            raise Finding("an error names no field") from error
        if len(str(error)) > MAX_MESSAGE:
            raise Finding("an error is too long") from error
        return {"refused": 1}
    return {found: 1} if isinstance(found, str) else found
