"""Boxes: hyper-rectangles of an array, such as a shard or a saved piece."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

Box: TypeAlias = tuple[tuple[int, int], ...]
"""For each dimension the first index and the one behind the last."""


def whole(shape: Sequence[int]) -> Box:
    """The box of all of an array."""
    return tuple((0, size) for size in shape)


def of_index(index: Sequence[slice], shape: Sequence[int]) -> Box:
    """The box of an index of slices with step 1, as ``Sharding.devices_indices_map`` gives it."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def of_piece(begin: Sequence[int], shape: Sequence[int]) -> Box:
    """The box that begins somewhere and has a shape."""
    return tuple((b, b + size) for b, size in zip(begin, shape, strict=True))


def shape_of(box: Box) -> tuple[int, ...]:
    """Size of each dimension."""
    return tuple([stop - start for start, stop in box])


def size_of(box: Box) -> int:
    """Number of elements."""
    return math.prod([stop - start for start, stop in box])


def intersect(one: Box, other: Box) -> Box | None:
    """What two boxes have in common; None where that is nothing. Boxes without dimensions are one element."""
    common = []
    for (a, b), (c, d) in zip(one, other, strict=True):
        start, stop = a if a > c else c, b if b < d else d
        if start >= stop:
            return None
        common.append((start, stop))
    return tuple(common)


def hull(one: Box, other: Box) -> Box:
    """The smallest box around two."""
    return tuple([(min(a, c), max(b, d)) for (a, b), (c, d) in zip(one, other, strict=True)])


def relative(box: Box, origin: Box) -> Box:
    """A box in the coordinates of one that it lies in."""
    return tuple([(start - o, stop - o) for (start, stop), (o, _) in zip(box, origin, strict=True)])


def slices(box: Box) -> tuple[slice, ...]:
    """The index of a box, as numpy takes it."""
    return tuple([slice(start, stop) for start, stop in box])


def merge(boxes: Iterable[Box]) -> list[Box]:
    """Disjoint boxes, joined where they share a whole face: fewer boxes of the same elements.

    The last dimension comes first, since what is joined there makes longer runs of bytes.
    """
    merged = sorted(set(boxes))
    for axis in reversed(range(len(merged[0]) if merged else 0)):
        columns: dict[Box, list[tuple[int, int]]] = {}
        for box in merged:
            columns.setdefault(box[:axis] + box[axis + 1 :], []).append(box[axis])
        merged = []
        for rest, intervals in columns.items():
            intervals.sort()
            start, stop = intervals[0]
            for a, b in intervals[1:]:
                if a == stop:
                    stop = b
                    continue
                merged.append((*rest[:axis], (start, stop), *rest[axis:]))
                start, stop = a, b
            merged.append((*rest[:axis], (start, stop), *rest[axis:]))
    return sorted(merged)
