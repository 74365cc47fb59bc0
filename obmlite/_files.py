"""The safetensors files of a package: each opened once, compared with the manifest, and read in ranges."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np

from obmlite import _arrays
from obmlite._arrays import Array
from obmlite._collector import paused
from obmlite.errors import CorruptPackageError, context
from obmlite.io import checked, digest, safetensors
from obmlite.io.source import ByteSource
from obmlite.io.store import Store
from obmlite.schema.records import FileRecord, WeightsRecord


class TensorFile:
    """A file that tensors lie in, opened.

    Attributes:
      source: the file's bytes.
      offsets: where each tensor's bytes begin in the file, by name.
    """

    def __init__(self, source: ByteSource, offsets: Mapping[str, int]) -> None:
        self.source = source
        self.offsets = offsets

    def offset(self, name: str) -> int:
        """Where a tensor's bytes begin in the file."""
        return self.offsets[name]

    def read(self, offset: int, nbytes: int) -> Array:
        """Bytes of the file as a read-only uint8 array: a view of the map, or an aligned buffer that was read into."""
        mapped = self.source.map()
        if mapped is not None:
            return np.frombuffer(mapped, np.uint8, nbytes, offset)
        buffer = _arrays.aligned_empty((nbytes,), np.dtype(np.uint8))
        if nbytes:
            self.source.read_into(offset, buffer.data)
        buffer.flags.writeable = False
        return buffer


class WeightsFile(TensorFile):
    """A safetensors file of a package, opened and compared with the manifest."""

    def __init__(
        self, source: ByteSource, record: FileRecord, pieces: Mapping[str, tuple[str, tuple[int, ...]]]
    ) -> None:
        """Opens it.

        Args:
          source: the file's bytes.
          record: what the manifest says of the file.
          pieces: what the manifest says of its tensors: name → (safetensors dtype, shape).

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
            if (entry.dtype, entry.shape) != pieces[name]:
                raise CorruptPackageError(
                    "A weights file and the manifest disagree about a tensor.",
                    leaf=name,
                    field="dtype" if entry.dtype != pieces[name][0] else "shape",
                    expected=f"{pieces[name][0]}{list(pieces[name][1])}",
                    found=f"{entry.dtype}{list(entry.shape)} in {record.path}",
                )
        super().__init__(source, {name: header.size + entry.start for name, entry in header.entries.items()})
        self.header = header


class WeightsFiles:
    """The weights files of one weights object; each is opened once, when first needed."""

    def __init__(self, store: Store, records: Mapping[str, FileRecord], weights: WeightsRecord) -> None:
        self._store = store
        self._records = records
        self._weights = weights
        self._open: dict[str, WeightsFile] = {}
        self._lock = threading.Lock()

    @property
    def weights(self) -> WeightsRecord:
        """What the manifest says."""
        return self._weights

    def record(self, path: str) -> FileRecord:
        """What the manifest says of a file."""
        return self._records[path]

    def __call__(self, path: str) -> WeightsFile:
        file = self._open.get(path)
        if file is None:
            with self._lock:
                file = self._open.get(path)
                if file is None:
                    with context(package=self._store.name, object=self._weights.name):
                        file = WeightsFile(self._store.open(path), self._records[path], self._pieces(path))
                    self._open[path] = file
        return file

    def _pieces(self, path: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        weights = self._weights
        return {
            piece.name: (spec.kind.storage, spec.kind.storage_shape(piece.shape))
            for leaf, pieces in zip(weights.tensor_leaf.tolist(), weights.pieces, strict=True)
            for piece in pieces
            if piece.file == path
            for spec in (weights.specs[leaf],)
        }
