"""Ranges of bytes behind one protocol, so that nothing above knows where a file lies."""

from __future__ import annotations

import contextlib
import mmap as _mmap
import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Protocol

from obmlite.errors import CorruptPackageError

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["ByteSource", "LocalFile"]

# One system call moves at most 2 GiB - 4 KiB on Linux, and macOS refuses more than INT_MAX.
_MOST = 1 << 30

_PAGE = _mmap.PAGESIZE
# Linux reads at most this much ahead when advised to, unless the disk's setting was raised.
_AHEAD = 128 << 10


class ByteSource(Protocol):
    """One file of a package, opened once; every method may be called from several threads.

    Attributes:
      name: what the file is called in messages, usually its path in the package.
    """

    name: str

    @property
    def size(self) -> int:
        """Length in bytes, as it was when the file was opened."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset`` (bytes) on.

        Raises:
          CorruptPackageError: the range ends behind the file's end, or the file has shrunk since it was opened.
        """
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills a writable, contiguous buffer with the bytes from ``offset`` on.

        Raises:
          CorruptPackageError: as for :meth:`read`; the buffer's content is then undefined.
        """
        ...

    def map(self) -> memoryview | None:
        """The whole file as a read-only view, the same one at each call; None if it cannot be mapped.

        The view stays valid after :meth:`close`, for as long as anything refers to it.

        Raises:
          CorruptPackageError: the file has shrunk since it was opened.
        """
        ...

    def prefetch(self, offset: int, length: int) -> None:
        """Has a range read into the page cache at once, before the map is touched there; a hint, for mapped files."""
        ...

    def drop(self, offset: int, length: int) -> None:
        """Takes a range of the map out of this process' memory; what is touched again is read again."""
        ...

    def close(self) -> None:
        """Gives the handle back; may be called again, but not while another thread reads."""
        ...


class LocalFile:
    """A :class:`ByteSource` over a file descriptor.

    The descriptor is closed by :meth:`close` or when the object is collected. A file that is truncated while
    it is mapped kills the process that touches its lost pages (SIGBUS); obmlite itself never writes into a
    file that has its final name.
    """

    def __init__(self, descriptor: int, name: str, *, mmap: bool = True) -> None:
        """Takes over an open descriptor of a regular file.

        Args:
          descriptor: readable file descriptor, which from here on belongs to this object.
          name: what to call the file in messages.
          mmap: whether :meth:`map` may map it.

        Raises:
          OSError: the descriptor cannot be asked for its size; it then still belongs to the caller.
        """
        self.name = name
        self._size = os.fstat(descriptor).st_size
        self._descriptor = descriptor
        self._mmap = mmap
        self._view: memoryview | None = None
        self._mapping: _mmap.mmap | None = None
        self._lock = threading.Lock()
        self._closer = weakref.finalize(self, os.close, descriptor)

    def __repr__(self) -> str:
        return f"LocalFile({self.name!r}, size={self._size})"

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Length in bytes, as it was when the file was opened."""
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset`` (bytes) on.

        Raises:
          CorruptPackageError: the range ends behind the file's end, or the file has shrunk since it was opened.
          ValueError: offset or length is negative, or the file is closed.
        """
        self._check(offset, length)
        parts: list[bytes] = []
        got = 0
        while got < length:
            part = os.pread(self._descriptor, min(length - got, _MOST), offset + got)
            if not part:
                raise self._shrunk()
            parts.append(part)
            got += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills a writable, contiguous buffer with the bytes from ``offset`` on.

        Raises:
          CorruptPackageError: as for :meth:`read`; the buffer's content is then undefined.
          TypeError: the buffer is read-only or not contiguous.
          ValueError: the offset is negative, or the file is closed.
        """
        if buffer.readonly:
            raise TypeError("the buffer to read into is read-only")
        self._check(offset, buffer.nbytes)
        if buffer.nbytes == 0:  # cast refuses shapes that contain a zero
            return
        view = buffer.cast("B")
        got = 0
        while got < len(view):
            count = os.preadv(self._descriptor, [view[got : got + _MOST]], offset + got)
            if count == 0:
                raise self._shrunk()
            got += count

    def map(self) -> memoryview | None:
        """The whole file as a read-only, shared view, made at the first call; None if empty or mapping is off.

        The view stays valid after :meth:`close`, for as long as anything refers to it.

        Raises:
          CorruptPackageError: the file has shrunk since it was opened.
          OSError: the file system or the address space allows no mapping.
          ValueError: the file is closed.
        """
        self._check(0, 0)
        if not self._mmap or self._size == 0:
            return None
        with self._lock:
            if self._view is None:
                if os.fstat(self._descriptor).st_size < self._size:
                    raise self._shrunk()
                self._mapping = _map(self._descriptor, self._size)
                self._view = memoryview(self._mapping)
            return self._view

    def prefetch(self, offset: int, length: int) -> None:
        """Has a range read into the page cache at once, and nothing around it, as touching the map would."""
        mapping, end = self._mapping, offset + length
        if mapping is None:
            return
        offset -= offset % _PAGE
        for start in range(offset, end, _AHEAD):  # the kernel cuts off what is asked for beyond that
            mapping.madvise(_mmap.MADV_WILLNEED, start, min(_AHEAD, end - start))

    def drop(self, offset: int, length: int) -> None:
        """Takes the pages of a range out of this process' memory; they stay in the page cache."""
        if self._mapping is None or not length:
            return
        start = offset - offset % _PAGE
        self._mapping.madvise(_mmap.MADV_DONTNEED, start, offset + length - start)

    def close(self) -> None:
        """Closes the descriptor; views that were handed out stay valid. May be called again.

        Must not be called while another thread reads: the descriptor's number may be given to another file.
        """
        with self._lock:
            # Only our reference goes: arrays may still lie in the mapping, which ends with the last of them.
            self._view = self._mapping = None
            self._closer()

    def _check(self, offset: int, length: int) -> None:
        if not self._closer.alive:
            raise ValueError(f"{self.name} is closed")
        if offset < 0 or length < 0:
            raise ValueError(f"offset {offset} and length {length} must not be negative")
        if offset + length > self._size:
            raise CorruptPackageError(
                f"a range of bytes lies outside the file {self.name}",
                expected=f"bytes {offset} to {offset + length}",
                found=f"{self._size} bytes",
            )

    def _shrunk(self) -> CorruptPackageError:
        found = None
        with contextlib.suppress(OSError):
            found = f"{os.fstat(self._descriptor).st_size} bytes"
        return CorruptPackageError(
            f"the file {self.name} changed while it was open: it has become shorter",
            expected=f"{self._size} bytes",
            found=found,
            fix="load the package again; files of a package must not be written in place",
        )


def _map(descriptor: int, size: int) -> _mmap.mmap:
    if sys.version_info >= (3, 13):
        # Without this each mapping holds a duplicate of the descriptor, of which macOS gives a process only 256.
        return _mmap.mmap(descriptor, size, access=_mmap.ACCESS_READ, trackfd=False)
    return _mmap.mmap(descriptor, size, access=_mmap.ACCESS_READ)
