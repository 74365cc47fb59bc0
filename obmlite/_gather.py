"""Bytes of pieces → boxes of tensors in host memory: carries out what :mod:`obmlite.plan` planned.

A *held* array is what numpy holds for a leaf: its values, or for PRNG keys their key data with trailing dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from obmlite import _arrays, dtypes
from obmlite._arrays import Array
from obmlite._files import TensorFile
from obmlite.plan import Box, Layout, Read, TensorPlan, boxes

Buffers: TypeAlias = Mapping[int, tuple[Array, Box]]


def mapped(
    file: TensorFile, kind: dtypes.DType, offset: int, shape: Sequence[int], ranges: Iterable[tuple[int, int]]
) -> Array | None:
    """The file's bytes as a held array in place, read-only; None where that needs a copy.

    Args:
      file: the file.
      kind: dtype of the elements.
      offset: bytes from the file's beginning.
      shape: logical shape.
      ranges: what of the file will be looked at, as for :meth:`obmlite._files.TensorFile.map`.
    """
    view = file.map(ranges) if kind.is_direct else None
    if view is None:
        return None
    held = (*shape, *_tail(kind))
    return np.frombuffer(view, _element(kind), math.prod(held), offset).reshape(held)


def gather(read: Read, kind: dtypes.DType, file: TensorFile, base: int, into: Buffers) -> None:
    """Fills what a read fills; may be called from several threads, for reads that don't overlap.

    Args:
      read: the part of a piece.
      kind: dtype of the tensor.
      file: the file that the piece is in.
      base: bytes from the file's beginning to what holds the piece.
      into: number of a buffer → held array, and the box of the tensor that it holds. If its dtype is not ``kind``'s,
        values are cast on the way.
    """
    runs = read.runs
    ranges = [(base + start, runs.nbytes) for start in runs.offsets()]
    source = mapped(file, kind, base, read.layout.shape, ranges)
    if source is not None:
        for start, nbytes in ranges:
            file.prefetch(start, nbytes)
        source = source[boxes.slices(read.stored)]
    else:
        if kind.is_direct and len(ranges) == len(read.fills) == 1 and read.keeps_order:
            [(number, part)] = read.fills
            target = _target(into[number], part)
            if target.flags.c_contiguous and target.dtype == _element(kind) and target.nbytes == runs.nbytes:
                file.read_into(ranges[0][0], target.reshape(-1).view(np.uint8).data)
                return
        source = _staged(read, kind, file, ranges)
    source = _turned(source, read.layout)
    for number, part in read.fills:
        _copy(_target(into[number], part), source[boxes.slices(boxes.relative(part, read.box))])
    first, last = runs.span
    file.drop(base + first, last - first)


def _target(into: tuple[Array, Box], part: Box) -> Array:
    array, box = into
    index: tuple[Any, ...] = (*boxes.slices(boxes.relative(part, box)), ...)  # `...` keeps a scalar an array
    target: Array = array[index]
    return target


def _turned(stored: Array, layout: Layout) -> Array:
    """A part of what is stored, with the dimensions that the piece has, in their order."""
    if layout.is_row_major:
        return stored
    used = set(layout.axes)
    # The axes along which there is one index go to the front, where that index takes them away.
    single = [axis for axis in range(len(layout.shape)) if axis not in used]
    tail = range(len(layout.shape), stored.ndim)
    axes = [axis for axis in layout.axes if axis >= 0]
    first: tuple[Any, ...] = (*(0,) * len(single), ...)
    new: tuple[Any, ...] = (*(None if axis < 0 else slice(None) for axis in layout.axes), ...)
    turned: Array = stored.transpose(*single, *axes, *tail)[first][new]
    return turned


_TILE = 64  # elements


def _copy(target: Array, source: Array) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # what is out of range becomes infinite, as in JAX; NaNs stay
        if target.dtype != source.dtype and not np.can_cast(source.dtype, target.dtype, "unsafe"):
            source = _arrays.cast(source, target.dtype)
        for tile in _tiles(source):
            np.copyto(target[tile], source[tile], casting="unsafe")


def _tiles(source: Array) -> Iterator[Any]:
    """Indices of parts to copy one by one, where the source's dimensions are in another order than the target's.

    A copy that goes along the target's rows takes one element of each cache line of the source. Small tiles stay in the
    cache until all of their lines were used: three to four times faster.
    """
    fast = min(range(source.ndim), key=lambda n: (source.shape[n] < 2, source.strides[n]), default=0)
    if source.ndim < 2 or fast == source.ndim - 1 or min(source.shape[fast], source.shape[-1]) < _TILE:
        yield ...
        return
    for row in range(0, source.shape[fast], _TILE):
        index = [slice(None)] * source.ndim
        index[fast] = slice(row, row + _TILE)
        for column in range(0, source.shape[-1], _TILE):
            index[-1] = slice(column, column + _TILE)
            yield tuple(index)


def _staged(read: Read, kind: dtypes.DType, file: TensorFile, ranges: Sequence[tuple[int, int]]) -> Array:
    """The elements of a part, read into memory of their own, as they are stored."""
    runs, shape, box = read.runs, read.layout.shape, read.stored
    data = np.empty(runs.total, np.uint8)
    for n, (start, _) in enumerate(ranges):
        file.read_into(start, data[n * runs.nbytes : (n + 1) * runs.nbytes].data)
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if kind.is_packed:
        begin = sum(start * step for (start, _), step in zip(box, steps, strict=True))
        first = begin % (8 // math.gcd(kind.bits, 8))  # in the first byte group; runs of several begin on one
        last = sum((stop - 1) * step for (_, stop), step in zip(box, steps, strict=True)) - begin
        count = runs.total * 8 // kind.bits if runs.loops else last + 1
        elements = kind.unpack(data, first, count)
        per_run = runs.nbytes * 8 // kind.bits
    else:
        elements = data.view(_element(kind)).reshape(-1, *_tail(kind))
        per_run = runs.nbytes // (elements.itemsize * math.prod(_tail(kind)))
    for axis in reversed(range(len(runs.loops))):
        steps[axis] = per_run
        per_run *= runs.loops[axis][0]
    strides = [step * elements.strides[0] for step in steps]
    extents = boxes.shape_of(box)
    # Not as_strided, which refuses some of ml_dtypes' dtypes.
    raw = elements.reshape(-1).view(np.uint8)
    return np.ndarray((*extents, *elements.shape[1:]), elements.dtype, raw, 0, (*strides, *elements.strides[1:]))


def fill(plan: TensorPlan, kind: dtypes.DType, pieces: Sequence[tuple[TensorFile, int]]) -> list[Array]:
    """The buffers of a plan, filled by this thread; read-only.

    Args:
      plan: the plan.
      kind: dtype of the tensor.
      pieces: for each piece the file that it is in, and bytes from that one's beginning.
    """
    arrays = [_arrays.aligned_empty(held_shape(kind, b.box), _element(kind)) for b in plan.buffers]
    into = {n: (array, buffer.box) for n, (array, buffer) in enumerate(zip(arrays, plan.buffers, strict=True))}
    for read in plan.reads():
        gather(read, kind, *pieces[read.piece], into)
    for array in arrays:
        array.flags.writeable = False
    return arrays


def held_shape(kind: dtypes.DType, box: Box) -> tuple[int, ...]:
    """Shape of the held array of a box."""
    return (*boxes.shape_of(box), *_tail(kind))


def _tail(kind: dtypes.DType) -> tuple[int, ...]:
    return kind.key_data_shape if kind.is_key else ()


def _element(kind: dtypes.DType) -> np.dtype[Any]:
    return kind.storage_numpy if kind.is_key else kind.numpy
