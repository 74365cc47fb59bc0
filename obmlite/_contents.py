"""Where the bytes of a supplemental's files are: in memory, in a file, or in a package."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from obmlite.errors import CorruptPackageError, context
from obmlite.io import checked
from obmlite.io.digest import CHUNK, sha256

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
    """A file of a package. All of it is compared before any of it is given out, and each part of it again then."""

    def __init__(self, store: Store, record: FileRecord) -> None:
        self._store = store
        self._record = record

    @property
    def size(self) -> int:
        return self._record.length

    def open(self) -> BinaryIO:
        source, record = self._store.open(self._record.path), self._record
        digests, data = [], b""
        try:
            with context(package=self._store.name):
                for data in checked.chunks(source, record.path, record.length, record.digest):
                    digests.append(sha256(data))
        except BaseException:  # whatever ends it, nobody else closes the file
            source.close()
            raise
        return io.BufferedReader(_Reader(source, record.path, digests, data), 1 << 16)


class _Reader(io.RawIOBase):
    """A source of bytes as a stream: those that were compared, even if the file changes meanwhile.

    Args:
      source: the file.
      path: what it is called in the package.
      digests: of each :data:`~obmlite.io.digest.CHUNK` bytes of it.
      last: the last of these chunks; of a small file, all of it.
    """

    def __init__(self, source: ByteSource, path: str, digests: Sequence[bytes], last: bytes) -> None:
        self._source = source
        self._path = path
        self._digests = digests
        self._at = 0
        self._held = len(digests) - 1, last

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
        number, begin = divmod(self._at, CHUNK)
        if number >= len(self._digests):
            return 0
        data = self._chunk(number)[begin : begin + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _chunk(self, number: int) -> bytes:
        if self._held[0] != number:
            start = number * CHUNK
            data = bytes(self._source.read(start, min(CHUNK, self._source.size - start)))
            if (found := sha256(data)) != self._digests[number]:
                raise CorruptPackageError(
                    "A file was changed while it was read.",
                    field="digest",
                    expected=f"{self._path}, chunk {number}: {self._digests[number].hex()}",
                    found=found.hex(),
                )
            self._held = number, data
        return self._held[1]

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()
