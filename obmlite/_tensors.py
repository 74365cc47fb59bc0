"""Where the tensors of weights are: in memory, or in the safetensors files of a package.

A *held* array is what numpy holds for a leaf: its values, or for PRNG keys their key data with trailing dimensions.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from obmlite import _arrays
from obmlite._arrays import Array
from obmlite.errors import CorruptPackageError, context
from obmlite.io import digest, safetensors
from obmlite.io.source import ByteSource
from obmlite.io.store import Store
from obmlite.schema.records import FileRecord, Piece, WeightsRecord
from obmlite.specs import TensorSpec


class Tensor(Protocol):
    """One tensor.

    Attributes:
      key: equal for tied leaves.
      where: for people.
    """

    key: Any
    where: str

    def whole(self) -> Array:
        """The held array, read-only; without a copy where possible."""
        ...

    def part(self, index: Any) -> Any:
        """The held array at an index, reading little more than that."""
        ...

    def for_device(self) -> Any:
        """What is best given to ``jax.device_put``."""
        ...

    def same(self, other: Tensor) -> bool:
        """Whether another one is the same array, as far as can be told without reading."""
        ...


class TensorSource(Protocol):
    """The tensors of a pytree's leaves."""

    def tensor(self, leaf: int) -> Tensor:
        """The tensor of a leaf."""
        ...

    def number(self, leaf: int) -> Any:
        """Equal for tied leaves."""
        ...

    def narrow(self, first: int, last: int) -> TensorSource:
        """The same for a range of leaves."""
        ...

    def open(self) -> None:
        """Opens every file that the tensors are in."""
        ...


# --- in memory


class _MemoryTensor:
    where = "in memory"

    def __init__(self, leaf: Any, spec: TensorSpec, key: Any) -> None:
        self._leaf = leaf
        self._spec = spec
        self.key = key

    def whole(self) -> Array:
        _arrays.check_leaf(self._leaf)  # it may have been donated since
        view = _arrays.to_host(self._leaf, self._spec).view()
        view.flags.writeable = False
        return view

    def part(self, index: Any) -> Any:
        return self.whole()[index]

    def same(self, other: Tensor) -> bool:
        if not isinstance(other, _MemoryTensor):
            return False
        number = isinstance(self._leaf, (bool, int, float, complex))
        return self._leaf is other._leaf or self.key == other.key or (number and bool(self._leaf == other._leaf))

    def for_device(self) -> Any:
        if isinstance(self._leaf, jax.Array):
            _arrays.check_leaf(self._leaf)
            return self._leaf
        return self.whole()


class MemorySource:
    """Leaves as the user gave them."""

    def __init__(self, leaves: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
        self._leaves = leaves
        self._specs = specs
        self._keys = [_identity(leaf, spec, n) for n, (leaf, spec) in enumerate(zip(leaves, specs, strict=True))]

    def tensor(self, leaf: int) -> _MemoryTensor:
        return _MemoryTensor(self._leaves[leaf], self._specs[leaf], self._keys[leaf])

    def number(self, leaf: int) -> Any:
        return self._keys[leaf]

    def narrow(self, first: int, last: int) -> MemorySource:
        part = object.__new__(MemorySource)
        part._leaves, part._specs, part._keys = (
            self._leaves[first:last],
            self._specs[first:last],
            self._keys[first:last],
        )
        return part

    def open(self) -> None:
        """Nothing is to be opened."""


def _identity(leaf: Any, spec: TensorSpec, number: int) -> Any:
    """Equal for leaves that are one object or one buffer, which are tied; that numbers are one object says nothing."""
    if isinstance(leaf, (bool, int, float, complex, np.generic)):
        return number, None
    if spec.kind.is_key or not _arrays.nbytes(spec):
        return id(leaf), "object"
    if isinstance(leaf, jax.Array):
        if len(leaf.sharding.device_set) > 1:
            return id(leaf), "object"
        return leaf.unsafe_buffer_pointer(), spec.shape, spec.kind, None
    if not isinstance(leaf, np.ndarray):  # its buffer may be made for each look at it, and then the next one's too
        return id(leaf), "object"
    strides = None if leaf.flags.c_contiguous and leaf.dtype.isnative else (leaf.strides, leaf.dtype.str)
    return leaf.__array_interface__["data"][0], spec.shape, spec.kind, strides


# --- in a package


class WeightsFile:
    """A safetensors file, opened and compared with the manifest."""

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
        if source.size != record.length:
            raise CorruptPackageError(
                "A weights file has another length than the manifest says.",
                field="length",
                expected=f"{record.path}: {record.length} bytes",
                found=f"{source.size} bytes",
            )
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
        self.source = source
        self.header = header

    def offset(self, name: str) -> int:
        """Where a tensor's bytes begin in the file."""
        return self.header.size + self.header.entries[name].start

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


class StoredTensor:
    """A tensor in safetensors files."""

    def __init__(self, spec: TensorSpec, pieces: Sequence[Piece], files: WeightsFiles, key: Any) -> None:
        self._spec = spec
        self._pieces = pieces
        self._files = files
        self.key = key
        self.where = f"in {pieces[0].file}"

    def storage(self, piece: Piece) -> Array:
        """A piece's bytes as the array that safetensors says it is, read-only."""
        kind, file = self._spec.kind, self._files(piece.file)
        flat = file.read(file.offset(piece.name), kind.storage_nbytes(piece.shape))
        return flat.view(kind.storage_numpy).reshape(kind.storage_shape(piece.shape))

    def _held(self, piece: Piece) -> Array:
        return self._spec.kind.from_storage(self.storage(piece), piece.shape)

    def whole(self) -> Array:
        if len(self._pieces) == 1:
            return self._held(self._pieces[0])
        parts = [self._held(piece) for piece in self._pieces]
        shape: tuple[int, ...] = self._spec.shape  # type: ignore[assignment]
        held = _arrays.aligned_empty(shape + parts[0].shape[len(shape) :], parts[0].dtype)
        for piece, part in zip(self._pieces, parts, strict=True):
            held[tuple(slice(b, b + e) for b, e in zip(piece.begin, piece.shape, strict=True))] = part
        held.flags.writeable = False
        return held

    for_device = whole

    def same(self, other: Tensor) -> bool:
        """Whether another one is the same tensor of the same files."""
        return isinstance(other, StoredTensor) and self._files is other._files and self.key == other.key

    def part(self, index: Any) -> Any:
        kind = self._spec.kind
        axes = _basic(index, len(self._spec.shape))
        piece = self._pieces[0]
        file = self._files(piece.file)
        if axes is None or len(self._pieces) > 1 or (kind.is_direct and file.source.map() is not None):
            return self.whole()[index]
        shape = piece.shape
        ranges, after = _ranges(axes, shape)
        bits, tail = kind.bits, kind.key_data_shape if kind.is_key else ()
        starts, run, block = _runs(ranges, shape)
        base = file.offset(piece.name)
        rows = []
        for start in starts:
            if kind.is_packed:
                first, last = kind.packed_range(start, run)
                rows.append(kind.unpack(file.read(base + first, last - first), start, run))
            else:
                nbytes = run * bits // 8
                rows.append(file.read(base + start * (bits // 8), nbytes))
        if kind.is_packed:
            held = np.concatenate(rows) if rows else np.empty(0, kind.numpy)
        else:
            held = (np.concatenate(rows) if rows else np.empty(0, np.uint8)).view(
                np.uint32 if kind.is_key else kind.numpy
            )
        result = held.reshape(block + tail)[after]
        if isinstance(result, np.ndarray):
            result.flags.writeable = False
        return result


def _basic(index: Any, rank: int) -> list[Any] | None:
    """One int or slice for each dimension; None where the index is anything more than that."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(item is not Ellipsis and not isinstance(item, (int, np.integer, slice)) for item in items):
        return None
    if any(isinstance(item, bool) for item in items) or items.count(Ellipsis) > 1:
        return None
    if Ellipsis not in items:
        items.append(Ellipsis)
    at = items.index(Ellipsis)
    missing = rank - (len(items) - 1)
    if missing < 0:
        return None  # numpy's own error says it best
    return [*items[:at], *[slice(None)] * missing, *items[at + 1 :]]


def _ranges(axes: Sequence[Any], shape: Sequence[int]) -> tuple[list[range], tuple[Any, ...]]:
    """For each dimension the indices wanted, in order, and the index that a block of just those still needs."""
    ranges, after = [], []
    for axis, (item, size) in enumerate(zip(axes, shape, strict=True)):
        if isinstance(item, slice):
            ranges.append(range(*item.indices(size)))
            after.append(slice(None))
            continue
        at = int(item)
        if not -size <= at < size:
            raise IndexError(f"index {at} is out of bounds for axis {axis} with size {size}")
        ranges.append(range(at % size, at % size + 1))
        after.append(0)  # type: ignore[arg-type]
    return ranges, tuple(after)


def _runs(ranges: Sequence[range], shape: Sequence[int]) -> tuple[list[int], int, tuple[int, ...]]:
    """(first element of each run, elements in a run, shape of the block that the runs make up)."""
    block = tuple(map(len, ranges))
    if math.prod(block) == 0:
        return [], 0, block
    strides = [math.prod(shape[n + 1 :]) for n in range(len(shape))]
    # Behind the last dimension that is not taken whole, elements are contiguous; that one is too if its step is 1.
    inner = len(shape)
    while inner and ranges[inner - 1] == range(shape[inner - 1]):
        inner -= 1
    run = math.prod(shape[inner:])
    begin = 0
    if inner and ranges[inner - 1].step == 1:
        inner -= 1
        run *= len(ranges[inner])
        begin = ranges[inner].start * strides[inner]
    outer = ([i * strides[n] for i in ranges[n]] for n in range(inner))
    return [begin + sum(offsets) for offsets in itertools.product(*outer)], run, block


class StoredSource:
    """Leaves in a package."""

    def __init__(self, files: WeightsFiles, first: int = 0) -> None:
        self._files = files
        self._first = first

    @property
    def files(self) -> WeightsFiles:
        """The files that the tensors are in."""
        return self._files

    def tensor(self, leaf: int) -> Any:
        weights = self._files.weights
        number = self.number(leaf)
        spec = weights.specs[self._first + leaf]
        if not spec.kind.storage:
            return _Nothing(spec, number)
        return StoredTensor(spec, weights.pieces[number], self._files, number)

    def number(self, leaf: int) -> Any:
        leaf += self._first
        tensor = int(self._files.weights.leaf_tensor[leaf])
        return tensor if tensor >= 0 else ("float0", leaf)

    def narrow(self, first: int, last: int) -> StoredSource:
        del last  # the files stay the same
        return StoredSource(self._files, self._first + first)

    def open(self) -> None:
        for path in {piece.file for pieces in self._files.weights.pieces for piece in pieces}:
            self._files(path)


class _Nothing:
    """A float0 leaf, which has a shape and no bits."""

    where = "nowhere: it has no bits"

    def __init__(self, spec: TensorSpec, key: Any) -> None:
        self._spec = spec
        self.key = key

    def whole(self) -> Array:
        shape: tuple[int, ...] = self._spec.shape  # type: ignore[assignment]
        zeros = np.zeros(shape, self._spec.kind.numpy)
        zeros.flags.writeable = False
        return zeros

    for_device = whole

    def same(self, other: Tensor) -> bool:
        """Whether another one has no bits either."""
        return isinstance(other, _Nothing)

    def part(self, index: Any) -> Any:
        return self.whole()[index]
