"""Parts of a file whose chunks have digests: each is compared before a byte of it is given out.

In a mapped file a chunk is hashed once, and used where it lies from then on. Of a file that is not mapped, what was
read into memory is hashed and then used, so that what the file holds by then does not matter.
"""

from __future__ import annotations

import bisect
import collections
import hashlib
import itertools
import os
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

from obmlite.errors import CorruptPackageError
from obmlite.io.digest import CHUNK, DIGEST_SIZE, sha256
from obmlite.io.source import ByteSource

__all__ = ["Chunks", "Part", "Range", "Recent", "processors"]

Range: TypeAlias = tuple[int, int]
"""Bytes from the file's beginning, and number of bytes."""

_BLOCK = 512 << 10  # of what is read only to be hashed: stays in a core's cache
_local = threading.local()
_LOCKS = 64
_ids = itertools.count()


def processors() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Part(NamedTuple):
    """A part of a file.

    Attributes:
      name: what it is called in messages.
      offset: bytes from the file's beginning.
      nbytes: its length.
      digests: the SHA-256 of each 8 MiB of it, one after the other.
    """

    name: str
    offset: int
    nbytes: int
    digests: bytes


class _Chunk(NamedTuple):
    number: int  # in the file
    part: Part
    place: int  # in the part, in chunks
    start: int  # in the file
    end: int


class Recent:
    """Chunks of files that are not mapped, compared and kept until all of their bytes were taken.

    What is wanted seldom begins and ends where chunks do; without this, neighbours would read and hash a chunk again.
    One is shared by the files of a package.

    Args:
      most: chunks that are kept; if there are more, the one goes that was not taken from for the longest time.
    """

    def __init__(self, most: int = min(8, os.cpu_count() or 1) + 2) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[tuple[int, int], tuple[bytes, int]] = collections.OrderedDict()

    def take(self, key: tuple[int, int], nbytes: int) -> bytes | None:
        """A chunk, of which so many bytes are used up by that; None if it is not here."""
        with self._lock:
            data, left = self._kept.pop(key, (None, 0))
            if data is not None and left > nbytes:
                self._kept[key] = (data, left - nbytes)
            return data

    def keep(self, key: tuple[int, int], data: bytes, left: int) -> None:
        """Keeps a chunk, of which so many bytes were not taken yet."""
        with self._lock:
            self._kept[key] = (data, left)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)


class Chunks:
    """The chunks of a file.

    Every method may be called from several threads; no two hash the same chunk of a mapped file.

    Args:
      source: the file.
      path: what it is called in messages.
      parts: what of it has digests, each part with as many as it has chunks; they don't overlap.
      recent: where chunks that were read are kept.
    """

    def __init__(self, source: ByteSource, path: str, parts: Iterable[Part], recent: Recent) -> None:
        self._source = source
        self._path = path
        self._recent = recent
        self._id = next(_ids)
        self._parts = sorted((part for part in parts if part.nbytes), key=lambda part: part.offset)
        self._offsets = [part.offset for part in self._parts]
        self._first = [0]
        for part in self._parts:
            self._first.append(self._first[-1] + len(part.digests) // DIGEST_SIZE)
        self._compared = bytearray(self._first[-1])
        self._locks = [threading.Lock() for _ in range(_LOCKS)]

    @property
    def ranges(self) -> list[Range]:
        """Of all parts."""
        return [(part.offset, part.nbytes) for part in self._parts]

    def pending(self, ranges: Iterable[Range]) -> list[list[Range]]:
        """What of some ranges is still to be compared, in groups of about a chunk: as much as a thread should do."""
        groups: list[list[Range]] = []
        seen: set[int] = set()
        room = 0
        for chunk in self._covering(ranges):
            if chunk.number in seen or self._compared[chunk.number]:
                continue
            seen.add(chunk.number)
            nbytes = chunk.end - chunk.start
            if nbytes > room:
                groups.append([])
                room = CHUNK
            groups[-1].append((chunk.start, nbytes))
            room -= nbytes
        return groups

    def check(self, ranges: Iterable[Range]) -> None:
        """Compares the chunks that some ranges touch. A file that is not mapped is read for that, each time.

        Raises:
          CorruptPackageError: one has another digest than it should.
        """
        view = self._source.map()
        for chunk in self._covering(ranges):
            if view is None:
                self._compare(chunk, self._hash(chunk))
            elif not self._compared[chunk.number]:
                with self._lock(chunk):
                    if not self._compared[chunk.number]:
                        self._compare(chunk, sha256(view[chunk.start : chunk.end]))
                        # The pages stay in the kernel's cache. In this process they come back where they are used.
                        self._source.drop(chunk.start, chunk.end - chunk.start)
                        self._compared[chunk.number] = True

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills a writable, contiguous buffer of bytes; where the file is not mapped, with just what was compared.

        Raises:
          CorruptPackageError: a chunk has another digest than it should; the buffer's content is then undefined.
        """
        wanted = (offset, len(buffer))
        if self._source.map() is not None:
            self.check([wanted])
            self._source.read_into(offset, buffer)
            return
        chunks = list(self._covering([wanted]))
        end = offset + len(buffer)
        inside = [chunk for chunk in chunks if offset <= chunk.start and chunk.end <= end]
        if inside:  # in one go: many small tensors may lie here
            self._source.read_into(inside[0].start, buffer[inside[0].start - offset : inside[-1].end - offset])
        for chunk in chunks:
            start, stop = max(chunk.start, offset), min(chunk.end, end)
            into = buffer[start - offset : stop - offset]
            if len(into) == chunk.end - chunk.start:
                self._compare(chunk, sha256(into))
            else:
                into[:] = self._read(chunk, len(into))[start - chunk.start : stop - chunk.start]

    def _covering(self, ranges: Iterable[Range]) -> Iterator[_Chunk]:
        """The chunks that ranges touch, in each range's order."""
        for offset, nbytes in ranges:
            at, end = offset, offset + nbytes
            number = bisect.bisect_right(self._offsets, offset) - 1
            while at < end:
                part = self._parts[number] if 0 <= number < len(self._parts) else None
                if part is None or not part.offset <= at < part.offset + part.nbytes:
                    raise ValueError(f"bytes {at} to {end} of {self._path} have no digests")
                last = min(end, part.offset + part.nbytes)
                for index in range((at - part.offset) // CHUNK, -(-(last - part.offset) // CHUNK)):
                    start = part.offset + index * CHUNK
                    stop = min(start + CHUNK, part.offset + part.nbytes)
                    yield _Chunk(self._first[number] + index, part, index, start, stop)
                at, number = last, number + 1

    def _lock(self, chunk: _Chunk) -> threading.Lock:
        return self._locks[chunk.number % _LOCKS]

    def _read(self, chunk: _Chunk, nbytes: int) -> bytes:
        """A chunk that was compared, of which so many bytes are wanted."""
        key = (self._id, chunk.number)
        with self._lock(chunk):
            data = self._recent.take(key, nbytes)
            if data is None:
                data = self._source.read(chunk.start, chunk.end - chunk.start)
                self._compare(chunk, sha256(data))
                self._recent.keep(key, data, len(data) - nbytes)
            return data

    def _hash(self, chunk: _Chunk) -> bytes:
        """The digest of a chunk that is read only for that."""
        state = hashlib.sha256()
        buffer = _buffer()
        for start in range(chunk.start, chunk.end, _BLOCK):
            block = buffer if chunk.end - start >= _BLOCK else buffer[: chunk.end - start]
            self._source.read_into(start, block)
            state.update(block)
        return state.digest()

    def _compare(self, chunk: _Chunk, found: bytes) -> None:
        expected = chunk.part.digests[chunk.place * DIGEST_SIZE : (chunk.place + 1) * DIGEST_SIZE]
        if found != expected:
            raise CorruptPackageError(
                "A tensor's bytes were changed.",
                leaf=chunk.part.name,
                field="chunk digest",
                expected=f"{self._path}, chunk {chunk.place}: {expected.hex()}",
                found=found.hex(),
            )


def _buffer() -> memoryview:
    """A block of memory of this thread's own."""
    found: memoryview | None = getattr(_local, "buffer", None)
    if found is None:
        found = _local.buffer = memoryview(bytearray(_BLOCK))
    return found
