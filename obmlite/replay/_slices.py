"""``lax.dynamic_slice`` whose sizes are open.

Sizes of StableHLO's ``dynamic_slice`` stand in an attribute, so JAX writes open ones as arithmetic on vectors::

    start = clamp(zeros, concatenate(reshape(i), reshape(j), …), subtract(shape, sizes))
    real_dynamic_slice(x, start, add(start, sizes), ones)

Nothing but this form tells that the size of the result does not depend on where it starts. The same in JAX 0.9.2,
0.10.2 and 0.12.
"""

from __future__ import annotations

import dataclasses

from obmlite.replay._program import Operation, Program

__all__ = ["Slice", "look"]


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """The values that a slice is made of.

    Attributes:
      starts: scalars, one for each dimension.
      low: vector that they are not less than.
      shape: vector of the array's sizes.
      sizes: vector of the result's.
    """

    starts: tuple[int, ...]
    low: int
    shape: int
    sizes: int


def look(program: Program, operation: Operation) -> Slice | None:
    """The slice that a ``real_dynamic_slice`` is; None if it is another operation, or not of that form."""
    if operation.name != "stablehlo.real_dynamic_slice":
        return None
    _, start, limit, _ = operation.operands
    end = _operands(program, limit, "add")
    clamped = _operands(program, start, "clamp")
    if start not in end or not clamped:
        return None
    low, indices, high = clamped
    sizes = end[1] if end[0] == start else end[0]
    bound = _operands(program, high, "subtract")
    parts = _operands(program, indices, "concatenate") or (indices,)
    scalars = tuple(scalar for part in parts for scalar in _operands(program, part, "reshape"))
    if bound[1:] != (sizes,) or len(scalars) != len(operation.types[0].shape):
        return None
    return Slice(scalars, low, bound[0], sizes)


def _operands(program: Program, value: int, name: str) -> tuple[int, ...]:
    """The operands of the operation of a name that gives a value; none if another does."""
    operation = program.definitions.get(value)
    return operation.operands if operation is not None and operation.name == f"stablehlo.{name}" else ()
