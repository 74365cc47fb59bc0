"""What other readers of safetensors files make of the same files, counted as the reference reader sees them.

Of each file, that is read twice:

* ``refused``: with whatever exception;
* ``right``: read as the safetensors package reads it;
* ``forbidden``: read, though it breaks a rule of the format;
* ``uninitialised``: read, and the values were others the second time: memory that nobody had written;
* ``wrong``: a file in order was read as something else.
"""

from __future__ import annotations

import asyncio
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy

from obmlite.errors import CorruptPackageError, ObmliteError
from tests.adversarial import packages
from tests.adversarial.kinds import Kind

Values = dict[str, bytes]


@functools.cache
def _place() -> pathlib.Path:
    folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    _KEEP.append(folder)
    return pathlib.Path(folder.name) / "x.safetensors"


_KEEP: list[Any] = []


def _poison(byte: int) -> None:
    """Leaves something in memory that is given back: what nobody writes then differs from time to time."""
    for size in (16, 64, 240, 1024, 4096, 65536):
        for block in [np.full(size, byte, np.uint8) for _ in range(20)]:
            del block


def by_obmlite(path: pathlib.Path) -> Values:
    data = path.read_bytes()
    return {name: tensor for name, (_, _, tensor) in packages.tensors(data).items()}


def by_safetensors(path: pathlib.Path) -> Values:
    return {name: bytes(entry["data"]) for name, entry in safetensors.deserialize(path.read_bytes())}


def by_orbax(path: pathlib.Path) -> Values:
    from etils import epath
    from orbax.checkpoint.experimental.v1._src.layout.safetensors_layout import SafetensorsLayout

    async def load() -> Any:
        return await (await SafetensorsLayout().load(epath.Path(path)))

    return {name: np.asarray(value).tobytes() for name, value in asyncio.run(load()).items()}


READERS: dict[str, Callable[[pathlib.Path], Values]] = {
    "obmlite": by_obmlite,
    "safetensors": by_safetensors,
    "orbax": by_orbax,
}


def outcome(reader: str, data: bytes) -> str:
    """What a reader makes of a file."""
    path = _place()
    path.write_bytes(data)
    try:
        in_order: Values | None = by_obmlite(path)
    except CorruptPackageError:
        in_order = None
    read = []
    for byte in (0x5A, 0xA5):
        _poison(byte)
        try:
            read.append(READERS[reader](path))
        except (ObmliteError, safetensors.SafetensorError):
            return "refused"
        except Exception:  # noqa: BLE001 - whatever others raise
            return "refused"
    if read[0] != read[1]:
        return "uninitialised"
    if in_order is None:
        return "forbidden"
    return "right" if read[0] == by_safetensors(path) else "wrong"


def _kind(reader: str) -> Kind:
    def read(data: bytes) -> str:
        return outcome(reader, data)

    about = f"the files of the kind 'header', read by {reader}"
    return Kind(f"peer-{reader}", about, packages.HEADER.make, read, seconds=10.0, stream="header")


PEERS: dict[str, Kind] = {f"peer-{reader}": _kind(reader) for reader in READERS}
