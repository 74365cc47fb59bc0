"""Where a file lies: on this machine, on an fsspec filesystem, or in memory."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import Any

import numpy as np

from obmlite import _arrays
from obmlite._arrays import Array
from obmlite.errors import ArgumentError, CorruptPackageError
from obmlite.io import safetensors
from obmlite.io.filesystem import is_remote
from obmlite.io.source import LocalFile


def filesystem(fs: Any) -> Any:
    """The fsspec filesystem that was given.

    Raises:
      ArgumentError: it is none.
      ImportError: fsspec is not installed.
    """
    try:
        import fsspec
    except ImportError as error:
        raise ImportError("fs= needs fsspec: pip install 'obmlite[fs]'") from error
    if not isinstance(fs, fsspec.AbstractFileSystem):
        raise ArgumentError(
            "fs must be an fsspec filesystem, or None.",
            field="fs",
            expected="fsspec.AbstractFileSystem",
            found=type(fs).__qualname__,
            fix='fsspec.filesystem("s3"), for example',
        )
    return fs


def local_path(filename: str | os.PathLike[str], fs: Any) -> str | None:
    """The path of a file on this machine; None if it is elsewhere.

    Raises:
      ArgumentError, ImportError: as of :func:`filesystem`.
    """
    if fs is None:
        return os.fspath(filename)
    protocol = filesystem(fs).protocol
    if "file" not in ([protocol] if isinstance(protocol, str) else protocol):
        return None
    from fsspec.core import strip_protocol

    path: str = strip_protocol(os.fspath(filename))
    return path


class File:
    """A safetensors file that is read.

    Attributes:
      header: what it says of itself, checked.
    """

    def __init__(self, source: LocalFile | bytes) -> None:
        """Reads the header.

        Raises:
          CorruptPackageError: the file breaks a rule of the format.
        """
        self._source = source
        size = len(source) if isinstance(source, bytes) else source.size
        self.header = safetensors.parse_header(
            self._read(0, safetensors.header_size(self._read(0, min(8, size)), size)), size
        )

    def tensor(self, entry: safetensors.Entry, dtype: np.dtype[Any]) -> Array:
        """A tensor's storage array, read-only; a view of the file where it can be mapped.

        Raises:
          CorruptPackageError: the file has shrunk since it was opened.
        """
        offset, nbytes = self.header.size + entry.start, entry.end - entry.start
        view = self._source if isinstance(self._source, bytes) else self._source.map()
        if view is not None:
            flat = np.frombuffer(view, np.uint8, nbytes, offset)
        else:
            assert isinstance(self._source, LocalFile)
            flat = _arrays.aligned_empty((nbytes,), np.dtype(np.uint8))
            if nbytes:
                self._source.read_into(offset, flat.data)
            flat.flags.writeable = False
        if entry.dtype == "BOOL" and (flat > 1).any():  # which XLA would take for neither
            raise CorruptPackageError("A truth value is neither 0 nor 1.", leaf=entry.name, found=int(flat.max()))
        try:
            return flat.view(dtype).reshape(entry.shape)
        except ValueError as error:  # without elements, and too large nevertheless
            raise CorruptPackageError("A tensor's shape is too large.", leaf=entry.name, field="shape") from error

    def _read(self, offset: int, length: int) -> bytes:
        if isinstance(self._source, bytes):
            return self._source[offset : offset + length]
        return self._source.read(offset, length)


@contextlib.contextmanager
def opened(path_or_buf: str | os.PathLike[str] | bytes, fs: Any) -> Iterator[File]:
    """The file at a path, or in bytes.

    Raises:
      ArgumentError: what was given is neither, or there is no regular file at the path.
      OSError: the file cannot be opened.
    """
    if isinstance(path_or_buf, bytes):
        yield File(path_or_buf)
        return
    if not isinstance(path_or_buf, (str, os.PathLike)):
        raise ArgumentError(
            "What is deserialized must be a path or bytes.", field="path_or_buf", found=type(path_or_buf).__qualname__
        )
    path = local_path(path_or_buf, fs)
    if path is None:
        yield File(bytes(fs.cat_file(os.fspath(path_or_buf))))
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would wait for its writer
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ArgumentError("What is at the path is no regular file.", field="path_or_buf", found=path)
        source = LocalFile(descriptor, path, mmap=not is_remote(descriptor))
    except BaseException:  # whatever ends it, nobody else closes the file
        os.close(descriptor)
        raise
    with source:
        yield File(source)
