"""Where the bytes of a box lie in a row-major array: runs of one length at regular distances."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from obmlite.plan.boxes import Box, shape_of


@dataclasses.dataclass(frozen=True, slots=True)
class Runs:
    """Runs of bytes in an array.

    Attributes:
      offset: bytes from the array's first byte to the first run.
      nbytes: bytes of each run; what lies between a box's rows is part of them where it is small.
      loops: for each of the leading dimensions that are gone through run by run, outermost first: how often, and
        bytes from one to the next. Behind them, elements lie in a run as they do in the array.
    """

    offset: int
    nbytes: int
    loops: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """Number of runs; 0 where there is nothing to read."""
        return math.prod([count for count, _ in self.loops]) if self.nbytes else 0

    @property
    def total(self) -> int:
        """Bytes of all runs."""
        return self.count * self.nbytes

    @property
    def span(self) -> tuple[int, int]:
        """The first byte, and the one behind the last."""
        last = self.offset + sum((count - 1) * stride for count, stride in self.loops)
        return self.offset, last + self.nbytes

    def offsets(self) -> Iterator[int]:
        """Where each run begins, in the array's order."""
        steps = ([n * stride for n in range(count)] for count, stride in self.loops)
        return (self.offset + sum(step) for step in itertools.product(*steps))


def runs_of(box: Box, shape: Sequence[int], bits: int, gap: int = 0) -> Runs:
    """The runs of a box.

    Args:
      box: the box, in the array's coordinates.
      shape: the array's shape; it is row-major.
      bits: bits of an element. Below 8 elements are packed without padding, and a box whose rows do not all begin and
        end on bytes is one run from its first byte to its last.
      gap: bytes; rows no further apart than this become one run, with what lies between.
    """
    extents = shape_of(box)
    if 0 in extents:
        return Runs(0, 0, ())
    # Elements behind the last dimension that is not taken whole are contiguous, and so is that one's range of them.
    inner = len(shape)
    while inner and extents[inner - 1] == shape[inner - 1]:
        inner -= 1
    inner = max(inner - 1, 0)
    strides = [0] * len(shape)
    step = 1
    for axis in reversed(range(len(shape))):
        strides[axis] = step
        step *= shape[axis]
    offset = sum([start * stride for (start, _), stride in zip(box, strides, strict=True)]) * bits
    run = extents[inner] * strides[inner] * bits if shape else bits
    while inner and (extents[inner - 1] == 1 or strides[inner - 1] * bits - run <= gap * 8):
        inner -= 1
        run += (extents[inner] - 1) * strides[inner] * bits
    loops = [(extents[axis], strides[axis] * bits) for axis in range(inner)]
    if any(number % 8 for number in (offset, run, *(stride for _, stride in loops))):
        run += sum([(count - 1) * stride for count, stride in loops])
        first = offset // 8
        return Runs(first, -(-(offset + run) // 8) - first, ())
    return Runs(offset // 8, run // 8, tuple([(count, stride // 8) for count, stride in loops]))
