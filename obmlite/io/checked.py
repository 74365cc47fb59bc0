"""Files whose length and digest are known: compared before, or while, they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from obmlite.errors import CorruptPackageError
from obmlite.io.digest import CHUNK
from obmlite.io.source import ByteSource

__all__ = ["check_length", "check_size", "chunks", "read"]


def check_length(source: ByteSource, path: str, length: int) -> None:
    """Compares a file's length.

    Args:
      source: the file.
      path: what it is called in the package.
      length: bytes that it is to have.

    Raises:
      CorruptPackageError: it has another one.
    """
    check_size(source.size, path, length)


def check_size(size: int, path: str, length: int) -> None:
    """As :func:`check_length`, of a file that is not open: ``size`` bytes are there."""
    if size != length:
        raise CorruptPackageError(
            "A file has another length than the manifest says.",
            field="length",
            expected=f"{path}: {length} bytes",
            found=f"{size} bytes",
        )


def chunks(source: ByteSource, path: str, length: int, digest: bytes) -> Iterator[bytes]:
    """A file's bytes in order, read once. What was given out is only as good as the last step, which may raise.

    Args:
      source: the file.
      path: what it is called in the package.
      length: bytes that it is to have.
      digest: SHA-256 that they are to have.

    Raises:
      CorruptPackageError: it has another length, before anything is given out, or another digest, at the end.
    """
    check_length(source, path, length)
    whole = hashlib.sha256()
    for start in range(0, length, CHUNK):
        data = source.read(start, min(CHUNK, length - start))
        whole.update(data)
        yield data
    if whole.digest() != digest:
        raise CorruptPackageError(
            "A file's digest does not match: its bytes were changed.",
            field="digest",
            expected=f"{path}: {digest.hex()}",
            found=whole.hexdigest(),
        )


def read(source: ByteSource, path: str, length: int, digest: bytes) -> bytes:
    """All bytes of a file, as :func:`chunks` checks them."""
    parts = list(chunks(source, path, length, digest))
    return parts[0] if len(parts) == 1 else b"".join(parts)
