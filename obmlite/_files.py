"""The safetensors files of a package: each opened once, compared with the manifest, and read in ranges."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from obmlite import _arrays
from obmlite._arrays import Array
from obmlite._collector import paused
from obmlite.errors import CorruptPackageError, context
from obmlite.io import checked, digest, safetensors
from obmlite.io.chunked import Chunks, Part, Range, Recent
from obmlite.io.source import ByteSource
from obmlite.io.store import Store
from obmlite.schema.records import FileRecord, Piece, WeightsRecord


class TensorFile:
    """A file that tensors lie in, opened. All that is used of its bytes comes from here, compared if it has chunks.

    Args:
      source: the file's bytes.
      offsets: where each tensor's bytes begin in the file, by name.
      chunks: what its bytes are compared with before they are given out; None for nothing.
      **facts: what errors about its bytes are to say: ``package``, ``object``.
    """

    def __init__(
        self, source: ByteSource, offsets: Mapping[str, int], chunks: Chunks | None = None, **facts: str
    ) -> None:
        self._source = source
        self._offsets = offsets
        self._chunks = chunks
        self._facts = facts

    def offset(self, name: str) -> int:
        """Where a tensor's bytes begin in the file."""
        return self._offsets[name]

    @property
    def is_mapped(self) -> bool:
        """Whether it is mapped."""
        return self._source.map() is not None

    @property
    def is_checked(self) -> bool:
        """Whether what is given out is compared first."""
        return self._chunks is not None

    @property
    def ranges(self) -> list[Range]:
        """All that can be compared."""
        return [] if self._chunks is None else self._chunks.ranges

    def pending(self, ranges: Iterable[Range]) -> list[list[Range]]:
        """What of some ranges is still to be compared, in groups of as much as one thread should do at a time."""
        return [] if self._chunks is None else self._chunks.pending(ranges)

    def check(self, ranges: Iterable[Range]) -> None:
        """Compares what lies in some ranges; nothing without chunks.

        Raises:
          CorruptPackageError: a chunk has another digest than it should.
        """
        if self._chunks is not None:
            with context(**self._facts):
                self._chunks.check(ranges)

    def map(self, ranges: Iterable[Range]) -> memoryview | None:
        """The whole file as a read-only view, of which nothing may be looked at but ranges that were compared.

        Args:
          ranges: what will be looked at: (bytes from the file's beginning, number of bytes). It is compared now;
            what else is looked at has to go through :meth:`check` before.

        Returns:
          None if the file is not mapped.
        """
        view = self._source.map()
        if view is not None:
            self.check(ranges)
        return view

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills a writable, contiguous buffer of bytes with those from ``offset`` on."""
        if self._chunks is None:
            self._source.read_into(offset, buffer)
        else:
            with context(**self._facts):
                self._chunks.read_into(offset, buffer)

    def read(self, offset: int, nbytes: int) -> Array:
        """Bytes of the file as a read-only uint8 array: a view of the map, or an aligned buffer that was read into."""
        mapped = self.map([(offset, nbytes)])
        if mapped is not None:
            return np.frombuffer(mapped, np.uint8, nbytes, offset)
        buffer = _arrays.aligned_empty((nbytes,), np.dtype(np.uint8))
        if nbytes:
            self.read_into(offset, buffer.data)
        buffer.flags.writeable = False
        return buffer

    def prefetch(self, offset: int, nbytes: int) -> None:
        """Has a range of a mapped file read into the kernel's cache at once."""
        self._source.prefetch(offset, nbytes)

    def drop(self, offset: int, nbytes: int) -> None:
        """Takes a range of a mapped file out of this process' memory."""
        self._source.drop(offset, nbytes)


class _Stored(NamedTuple):
    """What the manifest says of a tensor in a file."""

    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    digests: bytes


class WeightsFile(TensorFile):
    """A safetensors file of a package, opened and compared with the manifest."""

    def __init__(
        self,
        source: ByteSource,
        record: FileRecord,
        pieces: Mapping[str, _Stored],
        recent: Recent | None = None,
        **facts: str,
    ) -> None:
        """Opens it.

        Args:
          source: the file's bytes.
          record: what the manifest says of the file.
          pieces: what the manifest says of its tensors, by name.
          recent: where chunks of it are kept once they were compared; None if they are not compared.
          **facts: as of any file.

        Raises:
          CorruptPackageError: the file's length or header differ from the manifest.
        """
        checked.check_length(source, record.path, record.length)
        prefix = source.read(0, min(8, source.size))
        raw = source.read(0, safetensors.header_size(prefix, source.size))
        found = digest.sha256(raw)
        if found != record.digest:
            raise CorruptPackageError(
                "A weights file's header was changed.",
                field="header digest",
                expected=f"{record.path}: {record.digest.hex()}",
                found=found.hex(),
            )
        with paused():
            header = safetensors.parse_header(raw, source.size)
        for name in sorted(pieces.keys() ^ header.entries.keys()):
            raise CorruptPackageError(
                "A weights file and the manifest name different tensors.",
                leaf=name,
                field="name",
                found=f"only in {'the manifest' if name in pieces else record.path}",
            )
        for name, entry in header.entries.items():
            stored = pieces[name]
            if (entry.dtype, entry.shape) != stored[:2]:
                raise CorruptPackageError(
                    "A weights file and the manifest disagree about a tensor.",
                    leaf=name,
                    field="dtype" if entry.dtype != stored.dtype else "shape",
                    expected=f"{stored.dtype}{list(stored.shape)}",
                    found=f"{entry.dtype}{list(entry.shape)} in {record.path}",
                )
        chunks = None
        if recent is not None:
            parts = [
                Part(name, header.size + entry.start, entry.end - entry.start, pieces[name].digests)
                for name, entry in header.entries.items()
            ]
            chunks = Chunks(source, record.path, parts, recent)
        offsets = {name: header.size + entry.start for name, entry in header.entries.items()}
        super().__init__(source, offsets, chunks, **facts)
        self.header = header


class WeightsFiles:
    """The weights files of one weights object; each is opened once, when first needed.

    Args:
      store: where they are.
      records: what the manifest says of all files.
      weights: what it says of the object.
      recent: where chunks are kept that were compared; None if tensors are not compared with their digests.
    """

    def __init__(
        self, store: Store, records: Mapping[str, FileRecord], weights: WeightsRecord, recent: Recent | None = None
    ) -> None:
        self._store = store
        self._recent = recent
        self._records = records
        self._weights = weights
        self._open: dict[str, WeightsFile] = {}
        self._lock = threading.Lock()

    @property
    def weights(self) -> WeightsRecord:
        """What the manifest says."""
        return self._weights

    @property
    def paths(self) -> list[str]:
        """Of all of them, sorted."""
        return sorted({piece.file for pieces in self._weights.pieces for piece in pieces})

    def record(self, path: str) -> FileRecord:
        """What the manifest says of a file."""
        return self._records[path]

    def __call__(self, path: str) -> WeightsFile:
        file = self._open.get(path)
        if file is None:
            with self._lock:
                file = self._open.get(path)
                if file is None:
                    facts = {"package": self._store.name, "object": self._weights.name}
                    with context(**facts):
                        source = self._store.open(path)
                        file = WeightsFile(source, self._records[path], self._pieces(path), self._recent, **facts)
                    self._open[path] = file
        return file

    def _pieces(self, path: str) -> dict[str, _Stored]:
        specs = self._weights.specs
        return {
            piece.name: _Stored(spec.kind.storage, spec.kind.storage_shape(piece.shape), piece.digests)
            for leaf, piece in self._by_path[path]
            for spec in (specs[leaf],)
        }

    @functools.cached_property
    def _by_path(self) -> dict[str, list[tuple[int, Piece]]]:
        """The pieces of each file with their tensors' leaves; at one time, since files may be as many as pieces."""
        found: dict[str, list[tuple[int, Piece]]] = {}
        for leaf, pieces in zip(self._weights.tensor_leaf.tolist(), self._weights.pieces, strict=True):
            for piece in pieces:
                found.setdefault(piece.file, []).append((leaf, piece))
        return found
