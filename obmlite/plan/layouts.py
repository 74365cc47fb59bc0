"""How a piece of a tensor lies in a stored array: as a part of it, and with its dimensions in another order."""

from __future__ import annotations

import dataclasses
import functools
import itertools

from obmlite.plan.boxes import Box


@dataclasses.dataclass(frozen=True)  # without slots: what it works out is kept
class Layout:
    """A box of a row-major array, and which of its axes each dimension of a piece runs along.

    Attributes:
      shape: of the stored array.
      origin: index in it of the piece's first element.
      axes: for each dimension of the piece the stored array's axis, no two the same; -1 for a dimension of size 1 that
        the array lacks. Along axes that are not named here, the piece takes one index.
    """

    shape: tuple[int, ...]
    origin: tuple[int, ...]
    axes: tuple[int, ...]

    @functools.cached_property
    def order(self) -> tuple[int, ...]:
        """The piece's dimensions that run along an axis, outermost axis first."""
        return tuple(sorted((n for n, axis in enumerate(self.axes) if axis >= 0), key=lambda n: self.axes[n]))

    @functools.cached_property
    def is_row_major(self) -> bool:
        """Whether the piece is the array, as it is."""
        return self.axes == tuple(range(len(self.shape))) and not any(self.origin)

    def stored(self, box: Box) -> Box:
        """A box of the piece in the coordinates of the array."""
        if self.is_row_major:
            return box
        found = [(first, first + 1) for first in self.origin]
        for axis, (start, stop) in zip(self.axes, box, strict=True):
            if axis >= 0:
                found[axis] = (self.origin[axis] + start, self.origin[axis] + stop)
        return tuple(found)

    def keeps_order(self, box: Box) -> bool:
        """Whether the elements of a box, in any coordinates, are stored in the piece's order."""
        if self.is_row_major:
            return True
        own = [axis for axis, (start, stop) in zip(self.axes, box, strict=True) if stop - start > 1]
        return all(a < b for a, b in itertools.pairwise(own))


@functools.lru_cache(maxsize=4096)  # most tensors are of few shapes
def row_major(shape: tuple[int, ...]) -> Layout:
    """The layout of a piece that is stored by itself."""
    return Layout(shape, (0,) * len(shape), tuple(range(len(shape))))
