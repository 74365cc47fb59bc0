"""SHA-256 over buffers, and the rules by which a package's digests are put together.

A piece (one tensor's bytes in one file) has a digest for each 8 MiB of it, so that a part can be checked
without reading the whole and so that hashing spreads over threads. Everything else is derived from those:

* a piece's digest is that of its chunk digests, one after the other;
* a weights file's digest is that of its header's digest followed by its pieces' digests, in file order.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable
    from concurrent.futures import Executor

    import numpy.typing as npt
    from typing_extensions import Buffer

    # Before Python 3.12 numpy's stubs don't say that an array is a buffer.
    Bytes: TypeAlias = Buffer | npt.NDArray[Any]

__all__ = ["CHUNK", "DIGEST_SIZE", "chunk_digests", "file_digest", "flat", "piece_digest", "sha256"]

CHUNK = 8 << 20
"""Bytes under one digest; a piece's last chunk may be shorter."""

DIGEST_SIZE = 32
"""Bytes of a SHA-256."""


def flat(buffer: Bytes) -> memoryview:
    """A view of a buffer as plain bytes, whatever its item type and shape; nothing is copied.

    Args:
      buffer: anything with a C-contiguous buffer; or a C-contiguous numpy array of any dtype but object, also of
        those for which numpy gives no buffer (bfloat16, float8, dates).

    Returns:
      A one-dimensional memoryview of format ``B``.

    Raises:
      TypeError: the object has no buffer, or is an array of objects.
      ValueError: the buffer is not C-contiguous.
    """
    if isinstance(buffer, np.ndarray):
        if not buffer.flags.c_contiguous:
            raise ValueError("the array is not C-contiguous")
        return buffer.reshape(-1).view(np.uint8).data
    # memoryview.cast knows only the item types of `struct`, so not complex, and no shape that contains a zero.
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise ValueError("the buffer is not C-contiguous")
    return np.frombuffer(view, dtype=np.uint8).data if view.nbytes else memoryview(b"")


def sha256(*buffers: Bytes) -> bytes:
    """The SHA-256 of the buffers' bytes, one after the other.

    Returns:
      32 bytes.
    """
    state = hashlib.sha256()
    for buffer in buffers:
        state.update(flat(buffer))
    return state.digest()


def chunk_digests(buffer: Bytes, pool: Executor | None = None) -> bytes:
    """The SHA-256 of each 8 MiB of a buffer.

    Args:
      buffer: the bytes of one piece, C-contiguous.
      pool: threads to hash on (hashing releases the GIL); None hashes on the calling one. It must not be
        the pool that the caller itself runs on, which would wait for itself when all its threads do so.

    Returns:
      32 bytes for each chunk, in order; nothing for an empty buffer.
    """
    view = flat(buffer)
    chunks = [view[start : start + CHUNK] for start in range(0, len(view), CHUNK)]
    return b"".join(map(sha256, chunks) if pool is None or len(chunks) < 2 else pool.map(sha256, chunks))


def piece_digest(chunks: bytes) -> bytes:
    """A piece's digest, from its chunk digests one after the other.

    Returns:
      32 bytes; for an empty piece, which has no chunks, the SHA-256 of nothing.

    Raises:
      ValueError: ``chunks`` is not a whole number of digests.
    """
    if len(chunks) % DIGEST_SIZE:
        raise ValueError(f"chunk digests are {DIGEST_SIZE} bytes each, and {len(chunks)} is no multiple of that")
    return sha256(chunks)


def file_digest(header_digest: bytes, pieces: Iterable[bytes]) -> bytes:
    """A weights file's digest, from its header's digest and its pieces' digests in file order.

    Returns:
      32 bytes.

    Raises:
      ValueError: one of the digests is not 32 bytes long.
    """
    parts = [header_digest, *pieces]
    if any(len(part) != DIGEST_SIZE for part in parts):
        raise ValueError(f"a digest is {DIGEST_SIZE} bytes long")
    return sha256(*parts)
