"""Where the tensors of weights are: in memory, or in the safetensors files of a package.

A *held* array is what numpy holds for a leaf: its values, or for PRNG keys their key data with trailing dimensions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np

from obmlite import _arrays, _gather
from obmlite import plan as planning
from obmlite._arrays import Array
from obmlite._files import TensorFile, WeightsFiles
from obmlite.io.chunked import Range, processors
from obmlite.plan import Box, Layout, boxes
from obmlite.schema.records import Piece
from obmlite.specs import TensorSpec


class Tensor(Protocol):
    """One tensor.

    Attributes:
      key: equal for tied leaves.
      where: for people.
      sharding: of an array on devices; None for one that is elsewhere.
    """

    key: Any
    where: str
    sharding: Any

    def whole(self) -> Array:
        """The held array, read-only; without a copy where possible."""
        ...

    def read(self, box: Box) -> Array:
        """A box of the held array, read-only."""
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
        self.sharding = leaf.sharding if isinstance(leaf, jax.Array) else None

    def whole(self) -> Array:
        return self.read(boxes.whole(self._spec.shape))  # type: ignore[arg-type]

    def read(self, box: Box) -> Array:
        _arrays.check_leaf(self._leaf)  # it may have been donated since
        view = _arrays.read_box(self._leaf, self._spec, box).view()
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
        if len(leaf.sharding.device_set) > 1 or not leaf.is_fully_addressable:
            return id(leaf), "object"
        return leaf.unsafe_buffer_pointer(), spec.shape, spec.kind, None
    if not isinstance(leaf, np.ndarray):  # its buffer may be made for each look at it, and then the next one's too
        return id(leaf), "object"
    strides = None if leaf.flags.c_contiguous and leaf.dtype.isnative else (leaf.strides, leaf.dtype.str)
    return leaf.__array_interface__["data"][0], spec.shape, spec.kind, strides


class ListedSource:
    """Leaves whose tensors are known one by one."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors

    def tensor(self, leaf: int) -> Tensor:
        return self._tensors[leaf]

    def number(self, leaf: int) -> Any:
        return self._tensors[leaf].key

    def narrow(self, first: int, last: int) -> ListedSource:
        return ListedSource(self._tensors[first:last])

    def open(self) -> None:
        """Their files are open."""


# --- in files


class StoredTensor:
    """A tensor in files.

    Args:
      spec: its spec.
      pieces: where it is.
      files: opens a file by the name that pieces give it.
      key: equal for tied leaves.
      layouts: how each piece lies in what its file holds under its name; empty where each is stored as it is.
    """

    sharding = None

    def __init__(
        self,
        spec: TensorSpec,
        pieces: Sequence[Piece],
        files: Callable[[str], TensorFile],
        key: Any,
        layouts: tuple[Layout | None, ...] = (),
    ) -> None:
        self._spec = spec
        self._pieces = pieces
        self._files = files
        self.key = key
        self.layouts = layouts
        self.where = f"in {pieces[0].file}"

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The boxes that it is stored in."""
        return tuple([_box(piece.begin, piece.shape) for piece in self._pieces])

    @property
    def is_whole(self) -> bool:
        """Whether it is stored in one piece, as it is."""
        return len(self._pieces) == 1 and not self.layouts

    @property
    def is_mapped(self) -> bool:
        """Whether the file of its first piece is mapped."""
        return self._files(self._pieces[0].file).is_mapped

    def place(self, piece: int) -> tuple[TensorFile, int]:
        """The file that a piece is in, opened, and bytes from its beginning to what holds the piece."""
        stored = self._pieces[piece]
        file = self._files(stored.file)
        return file, file.offset(stored.name)

    def read(self, box: Box) -> Array:
        """A box of it as a held array, read-only; only what overlaps it is read, and nothing where it can be mapped.

        Args:
          box: ``((start, stop), …)`` for each dimension.
        """
        kind = self._spec.kind
        shape: tuple[int, ...] = self._spec.shape  # type: ignore[assignment]
        [tensor] = planning.plan([planning.Request(shape, kind.bits, self.boxes, (box,), self.layouts)]).tensors
        run = tensor.buffers[0].run
        if run is not None:
            file, base = self.place(run[0])
            ranges = [(base + run[1], boxes.size_of(box) * kind.bits // 8)]
            if kind.is_direct and file.is_mapped:
                _compare(file, ranges)
            held = _gather.mapped(file, kind, base + run[1], boxes.shape_of(box), ranges)
            if held is not None:
                return held
        [held] = _gather.fill(tensor, kind, [self.place(n) for n in range(len(self._pieces))])
        return held

    def whole(self) -> Array:
        return self.read(boxes.whole(self._spec.shape))  # type: ignore[arg-type]

    for_device = whole

    def same(self, other: Tensor) -> bool:
        """Whether another one is the same tensor of the same files."""
        return isinstance(other, StoredTensor) and self._files is other._files and self.key == other.key

    def part(self, index: Any) -> Any:
        axes = _basic(index, len(self._spec.shape))
        if axes is None:
            return self.whole()[index]
        box, after = _covering(axes, self._spec.shape)  # type: ignore[arg-type]
        if index is Ellipsis or (isinstance(index, tuple) and Ellipsis in index):
            after = (*after, ...)  # numpy then gives an array and no scalar
        return self.read(box)[after]


def _compare(file: TensorFile, ranges: Sequence[Range]) -> None:
    """Compares what of a mapped file is not yet compared, by threads if it is much."""
    groups = file.pending(ranges)
    if len(groups) > 1:
        with ThreadPoolExecutor(min(len(groups), processors()), "obmlite-check") as pool:
            list(pool.map(file.check, groups))


_box = functools.lru_cache(maxsize=4096)(boxes.of_piece)  # most tensors are whole, and of few shapes


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


def _covering(axes: Sequence[Any], shape: Sequence[int]) -> tuple[Box, tuple[Any, ...]]:
    """The box that an index lies in, and the index in it."""
    box: list[tuple[int, int]] = []
    after: list[Any] = []
    for axis, (item, size) in enumerate(zip(axes, shape, strict=True)):
        if not isinstance(item, slice):
            at = int(item)
            if not -size <= at < size:
                raise IndexError(f"index {at} is out of bounds for axis {axis} with size {size}")
            box.append((at % size, at % size + 1))
            after.append(0)
            continue
        wanted = range(*item.indices(size))
        first, last = (min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1])) if wanted else (0, -1)
        box.append((first, last + 1))
        after.append(slice(None, None, wanted.step) if wanted else slice(None))
    return tuple(box), tuple(after)


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
    sharding = None

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
