"""Where the bytes of a supplemental's files are: in memory, in a file, or in a package."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from obmlite.errors import context
from obmlite.io import checked

if TYPE_CHECKING:
    from obmlite.io.source import ByteSource
    from obmlite.io.store import Store
    from obmlite.schema.records import FileRecord


class Content(Protocol):
    """The bytes of one file."""

    @property
    def size(self) -> int:
        """Number of bytes."""
        ...

    def open(self) -> BinaryIO:
        """A stream over them, which can be sought."""
        ...


class BytesContent:
    """Bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        return len(self._data)

    def open(self) -> BinaryIO:
        return io.BytesIO(self._data)


class FileContent:
    """A file outside of any package, by its path."""

    def __init__(self, path: str) -> None:
        self._path = path

    @property
    def size(self) -> int:
        return os.stat(self._path).st_size

    def open(self) -> BinaryIO:
        return open(self._path, "rb")


class StoredContent:
    """A file of a package. All of it is hashed before any of it is given out."""

    def __init__(self, store: Store, record: FileRecord) -> None:
        self._store = store
        self._record = record

    @property
    def size(self) -> int:
        return self._record.length

    def open(self) -> BinaryIO:
        source = self._store.open(self._record.path)
        try:
            with context(package=self._store.name):
                record = self._record
                for _ in checked.chunks(source, record.path, record.length, record.digest):
                    pass
        except BaseException:
            source.close()
            raise
        return io.BufferedReader(_Reader(source), 1 << 16)


class _Reader(io.RawIOBase):
    """A source of bytes as a stream."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        if start + offset < 0:
            raise ValueError("a negative position")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._source.size - self._at))
        if count:
            buffer[:count] = self._source.read(self._at, count)
        self._at += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()
