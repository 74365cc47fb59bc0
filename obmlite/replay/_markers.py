"""Values in the body of a counted loop that stand for more than an array: the counter, and arrays that are read or
written one row a step.

They let a loop become ``lax.scan`` as JAX wrote it, with rows scanned over and stacked, and not a loop that carries
whole arrays: that is what makes a gradient of it cost what it should.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from obmlite.replay._program import Operation

__all__ = ["Counter", "Escaped", "Marker", "Rows", "Stacked", "Written", "arithmetic", "plain", "step"]


class Escaped(Exception):  # noqa: N818 - it is caught by the loop that asked for it
    """An array that was to be written one row a step is used in another way."""


class Marker:
    """Base of what stands for more than an array."""


@dataclasses.dataclass(frozen=True, slots=True)
class Counter(Marker):
    """``scale * counter + offset``, the counter of one loop; ``value`` is the number itself."""

    loop: object
    scale: int
    offset: int
    value: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Rows(Marker):
    """An array of which a step reads the row at ``index``, which is ``row``."""

    index: Counter
    array: Any
    row: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Stacked(Marker):
    """An array of which a step writes the row at ``index``, and nothing else is done."""

    index: Counter
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Written(Marker):
    """A :class:`Stacked` whose row is written."""

    stacked: Stacked
    row: Any


def plain(value: Any) -> Any:
    """The array that a marker stands for; any other value as it is."""
    if isinstance(value, Counter):
        return value.value
    if isinstance(value, Rows):
        return value.array
    if isinstance(value, Marker):
        raise Escaped
    return value


def step(operation: Operation, operands: Sequence[Any], cut: tuple[tuple[int, ...], Sequence[Any]] | None) -> Any:
    """The result of reading or writing the row of a step; None if the operation does something else.

    Args:
      operation: what is done.
      operands: to what.
      cut: sizes and starts of the slice that the operation takes of its first operand; None if it takes none.
    """
    first = operands[0]
    if isinstance(first, Rows) and cut is not None:
        sizes, starts = cut
        if sizes == (1, *np.shape(first.array)[1:]) and _at(first.index, starts):
            return lax.reshape(first.row, sizes)
    if isinstance(first, Stacked) and operation.name == "stablehlo.dynamic_update_slice":
        update = plain(operands[1])
        if np.shape(update) == (1, *first.shape[1:]) and _at(first.index, operands[2:]):
            return Written(first, lax.reshape(update, first.shape[1:]))
    return None


def _at(index: Counter, starts: Sequence[Any]) -> bool:
    first, *others = starts
    same = isinstance(first, Counter) and (first.loop, first.scale, first.offset) == (
        index.loop,
        index.scale,
        index.offset,
    )
    return same and all(isinstance(n, np.ndarray) and n == 0 for n in others)


def arithmetic(operation: Operation, operands: Sequence[Any], value: Any) -> Any:
    """A result as a counter, where it is one; else as it is."""
    found = affine(operation, [_affine(operand) for operand in operands])
    loops = [operand.loop for operand in operands if isinstance(operand, Counter)]
    if found is None or not loops or any(loop is not loops[0] for loop in loops):
        return value
    return Counter(loops[0], *found, value)


def _affine(operand: Any) -> tuple[int, int] | None:
    if isinstance(operand, Counter):
        return operand.scale, operand.offset
    if isinstance(operand, np.ndarray) and operand.ndim == 0 and operand.dtype.kind in "iu":
        return 0, int(operand)
    return None


def affine(operation: Operation, operands: Sequence[tuple[int, int] | None]) -> tuple[int, int] | None:
    """Scale and offset of a result, for those of its operands; None if it is not of that form."""
    if operation.types[0].shape or None in operands:
        return None
    known = [operand for operand in operands if operand is not None]
    if operation.name == "stablehlo.add":
        (a, b), (c, d) = known
        return a + c, b + d
    if operation.name == "stablehlo.subtract":
        (a, b), (c, d) = known
        return a - c, b - d
    if operation.name == "stablehlo.convert" and str(operation.types[0].dtype) in ("int32", "int64"):
        return known[0]
    return None
