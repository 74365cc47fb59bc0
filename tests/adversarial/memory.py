"""A package in memory, which counts as a finding what would be read outside of a file."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from obmlite.errors import CorruptPackageError, MissingFileError
from obmlite.io.store import check_path


class Finding(Exception):
    """What must not happen."""


class MemoryFile:
    """A :class:`obmlite.io.source.ByteSource` of bytes."""

    def __init__(self, name: str, data: bytes, *, mapped: bool = True) -> None:
        self.name = name
        self.data = data
        self._view: memoryview | None = None
        if mapped and data:
            # Aligned as a map is: a view of bytes begins anywhere.
            room = np.empty(len(data) + 4096, np.uint8)
            start = -room.ctypes.data % 4096
            room[start : start + len(data)] = np.frombuffer(data, np.uint8)
            room.flags.writeable = False
            self._view = room[start : start + len(data)].data

    @property
    def size(self) -> int:
        return len(self.data)

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0:
            raise Finding(f"{length} bytes at {offset} of {self.name} were asked for")
        if offset + length > len(self.data):  # as obmlite.io.source.LocalFile refuses it: nobody should have asked
            raise CorruptPackageError(f"{length} bytes at {offset} of {self.name}", found=f"{len(self.data)} bytes")

    def read(self, offset: int, length: int) -> bytes:
        self._check(offset, length)
        return self.data[offset : offset + length]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._check(offset, buffer.nbytes)
        if buffer.nbytes:
            buffer.cast("B")[:] = self.data[offset : offset + buffer.nbytes]

    def map(self) -> memoryview | None:
        return self._view

    def prefetch(self, offset: int, length: int) -> None:
        self._check(offset, length)

    def drop(self, offset: int, length: int) -> None:
        self._check(offset, length)

    def close(self) -> None:
        """Nothing is open."""


class MemoryStore:
    """A :class:`obmlite.io.store.Store` of such files."""

    name = "memory"

    def __init__(self, contents: Mapping[str, bytes], *, mapped: bool = True) -> None:
        self.contents = contents
        self._mapped = mapped

    def open(self, path: str) -> MemoryFile:
        if check_path(path) not in self.contents:
            raise MissingFileError("a file of the package is missing", package=self.name, field="path", found=path)
        return MemoryFile(path, self.contents[path], mapped=self._mapped)

    def files(self) -> list[str]:
        return sorted(self.contents)

    def close(self) -> None:
        """Nothing is open."""
