"""Lazy views of stored tensors: transposed, reshaped, sliced and split as numpy would, without reading a value."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

from obmlite import dtypes
from obmlite.errors import ArgumentError
from obmlite.plan import Layout, boxes
from obmlite.plan.layouts import row_major


@dataclasses.dataclass(frozen=True)
class View:
    """A stored tensor, or a part of one, with its dimensions in some order; as numpy's views, but with no values.

    Attributes:
      name: of the stored tensor.
      file: that it is in.
      kind: dtype of the elements.
      shape: size of each dimension.
      layout: where the elements are in the stored tensor, which may have been reshaped.
    """

    name: str
    file: str
    kind: dtypes.DType
    shape: tuple[int, ...]
    layout: Layout

    @staticmethod
    def of(name: str, file: str, kind: dtypes.DType, shape: tuple[int, ...]) -> View:
        """All of a stored tensor."""
        return View(name, file, kind, shape, row_major(shape))

    @property
    def dtype(self) -> Any:
        """The dtype, as numpy and JAX have it."""
        return self.kind.numpy

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_stored(self) -> bool:
        """Whether the view's bytes are all those of the stored tensor, in their order."""
        return math.prod(self.layout.shape) == self.size and self.layout.keeps_order(boxes.whole(self.shape))

    @property
    def T(self) -> View:  # noqa: N802 - numpy's name
        """The view with its dimensions in reverse."""
        return self.transpose()

    def __repr__(self) -> str:
        return f"View({self.name!r}, {self.kind.short}[{','.join(map(str, self.shape))}])"

    def transpose(self, *axes: Any) -> View:
        """The view with its dimensions in another order: that of ``axes``, or the reverse.

        Raises:
          ArgumentError: ``axes`` does not name each dimension once.
        """
        given = axes[0] if len(axes) == 1 and isinstance(axes[0], (tuple, list)) else axes
        order = [self._axis(axis) for axis in given] or list(range(self.ndim))[::-1]
        if sorted(order) != list(range(self.ndim)):
            raise self._error("A transposition must name each dimension once.", f"{self.ndim} axes", list(given))
        return self._with(tuple(self.shape[n] for n in order), axes=tuple(self.layout.axes[n] for n in order))

    def __getitem__(self, index: Any) -> View:
        """A part of the view.

        Raises:
          ArgumentError: the index is more than integers, slices with step 1 and one ``...``, or out of bounds.
        """
        items = list(index) if isinstance(index, tuple) else [index]
        dots = [n for n, item in enumerate(items) if item is Ellipsis]
        at = dots[0] if dots else len(items)
        missing = self.ndim - len(items) + len(dots)
        if missing < 0 or len(dots) > 1:
            raise self._error("An index does not fit a view.", f"at most {self.ndim} dimensions", repr(index))
        items[at : at + 1] = [slice(None)] * missing
        origin, shape, axes = list(self.layout.origin), [], []
        for item, size, axis in zip(items, self.shape, self.layout.axes, strict=True):
            start, stop = self._range(item, size, index)
            if axis >= 0:
                origin[axis] += start
            if isinstance(item, slice):
                shape.append(stop - start)
                axes.append(axis)
        return self._with(tuple(shape), origin=tuple(origin), axes=tuple(axes))

    def _range(self, item: Any, size: int, index: Any) -> tuple[int, int]:
        if isinstance(item, slice):
            start, stop, step = item.indices(size)
            if step == 1:
                return start, max(start, stop)
        elif not isinstance(item, bool) and hasattr(item, "__index__"):
            at = operator.index(item)
            if -size <= at < size:
                return at % size, at % size + 1
        raise self._error(
            "A view cannot be indexed so.",
            f"integers, slices with step 1 and ... within {list(self.shape)}",
            repr(index),
        )

    def split(self, sizes: int | Sequence[int], axis: int = 0) -> list[View]:
        """The view in parts along a dimension.

        Args:
          sizes: number of equal parts, or the size of each.
          axis: the dimension.

        Raises:
          ArgumentError: the parts don't add up to the dimension.
        """
        axis = self._axis(axis)
        whole = self.shape[axis]
        if isinstance(sizes, int):
            each = [whole // sizes] * sizes if sizes > 0 else []
        else:
            each = [operator.index(size) for size in sizes]
        if sum(each) != whole or min(each, default=0) < 0:
            raise self._error("The parts of a split don't add up to the dimension.", f"{whole} in all", repr(sizes))
        ends = [0, *itertools.accumulate(each)]
        before = (slice(None),) * axis
        return [self[(*before, slice(start, stop))] for start, stop in itertools.pairwise(ends)]

    def reshape(self, *shape: Any) -> View:
        """The view with another shape, of the same elements in the same order; one size may be -1.

        Dimensions can be divided however they lie. They can be joined where the elements of the outer one lie side by
        side: join before transposing and slicing.

        Raises:
          ArgumentError: the sizes are others, or joining these dimensions would need a copy.
        """
        given = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        sizes = [operator.index(size) for size in given]
        known = math.prod(size for size in sizes if size != -1)
        if sizes.count(-1) == 1 and known and self.size % known == 0:
            sizes[sizes.index(-1)] = self.size // known
        if min(sizes, default=0) < 0 or math.prod(sizes) != self.size:
            raise self._error("A view of so many elements does not have this shape.", f"{self.size} elements", sizes)
        if self.size == 0:
            return View(self.name, self.file, self.kind, tuple(sizes), row_major(tuple(sizes)))
        # Dimensions of size 1 run along nothing. The others are gone through in groups that have as many elements.
        found = dataclasses.replace(self, shape=(), layout=dataclasses.replace(self.layout, axes=()))
        dims = [(size, axis) for size, axis in zip(self.shape, self.layout.axes, strict=True) if size > 1]
        view = found._with(tuple(size for size, _ in dims), axes=tuple(axis for _, axis in dims))
        wanted = [size for size in sizes if size > 1]
        done = 0
        while done < len(wanted):
            new = 1
            while view.shape[done] != math.prod(wanted[done : done + new]):
                if view.shape[done] < math.prod(wanted[done : done + new]):
                    view = view._joined(done)
                else:
                    new += 1
            view = view._divided(done, wanted[done : done + new])
            done += new
        rest = iter(view.layout.axes)
        return view._with(tuple(sizes), axes=tuple(next(rest) if size > 1 else -1 for size in sizes))

    def _joined(self, n: int) -> View:
        """Dimensions n and n + 1 as one."""
        shape, origin, axes = list(self.layout.shape), list(self.layout.origin), list(self.layout.axes)
        outer, inner = axes[n], axes[n + 1]
        # Of what lies between, there may be no more than one index.
        if outer > inner or self.shape[n + 1] != shape[inner] or math.prod(shape[outer + 1 : inner]) != 1:
            raise self._error("Dimensions that are not side by side cannot be joined.", "a reshape first", None)
        size = shape[inner]
        shape[outer] *= size
        origin[outer] *= size
        del shape[outer + 1 : inner + 1], origin[outer + 1 : inner + 1], axes[n + 1]
        axes = [axis - (inner - outer) if axis > inner else axis for axis in axes]
        joined = (*self.shape[:n], self.shape[n] * size, *self.shape[n + 2 :])
        return self._with(joined, Layout(tuple(shape), tuple(origin), tuple(axes)))

    def _divided(self, n: int, sizes: Sequence[int]) -> View:
        """Dimension n as several."""
        if len(sizes) == 1:
            return self
        shape, origin, axes = list(self.layout.shape), list(self.layout.origin), list(self.layout.axes)
        axis, inner, more = axes[n], math.prod(sizes[1:]), len(sizes) - 1
        if shape[axis] % inner or origin[axis] % inner:
            raise self._error(
                "A dimension of a part of a tensor cannot be divided so.", f"a part that begins at {inner} × n", None
            )
        shape[axis : axis + 1] = [shape[axis] // inner, *sizes[1:]]
        origin[axis : axis + 1] = [origin[axis] // inner, *[0] * more]
        axes = [other + more if other > axis else other for other in axes]
        axes[n : n + 1] = range(axis, axis + len(sizes))
        divided = (*self.shape[:n], *sizes, *self.shape[n + 1 :])
        return self._with(divided, Layout(tuple(shape), tuple(origin), tuple(axes)))

    def _with(self, shape: tuple[int, ...], layout: Layout | None = None, **changes: Any) -> View:
        return dataclasses.replace(self, shape=shape, layout=dataclasses.replace(layout or self.layout, **changes))

    def _axis(self, axis: Any) -> int:
        at = operator.index(axis)
        if not -self.ndim <= at < self.ndim:
            raise self._error("A view has no such dimension.", f"one of {self.ndim}", axis)
        return at % self.ndim

    def _error(self, problem: str, expected: str, found: Any) -> ArgumentError:
        return ArgumentError(
            problem, leaf=self.name, expected=expected, found=f"{found} of {self!r}" if found else self
        )
