"""To and from JAX's symbolic dimensions."""

from __future__ import annotations

import contextlib
import operator
from typing import TYPE_CHECKING, Any

from obmlite import errors
from obmlite.dims.constraints import Constraint
from obmlite.dims.expressions import Expression, parts_of, shorten, sum_of
from obmlite.dims.parsing import parse

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


# What the operands of one max or min hold, for handing it to JAX: floordiv and mod count 1, max and min 2, each factor
# of a product 1. JAX compares the operands as it reads them, in time that multiplies with each (0.10.2: a max of 4, 5,
# 6, 7, 8 summed maxes takes 0.02, 0.1, 0.6, 3.2 and over 15 s), so that a short text could hang it.
MAX_JAX_COMPARED = 12


_COMPARED_PARTS = "calls (max and min count twice) and factors of products"


def to_jax(shapes: Sequence[Sequence[int | Expression]], constraints: Sequence[Constraint]) -> list[tuple[Any, ...]]:
    """Makes JAX's dimensions of shapes, all in one new ``jax.export.SymbolicScope`` with the constraints.

    JAX simplifies as it reads: under ``b == 4`` the dimension ``b + 1`` becomes the integer 5.

    Returns:
      For each shape its dimensions: integers as they are, symbolic dimensions of JAX for expressions.

    Raises:
      ExportError: JAX refuses the constraints (they can't be kept together, or two say what one term equals) or a
        dimension (it may divide by 0), or a ``max`` or ``min`` is larger than JAX can read in reasonable time
        (:data:`MAX_JAX_COMPARED`). ``field`` is ``constraint`` or ``dimension``.
    """
    from jax import export

    with _jax_refusals("constraint", "; ".join(constraint.text for constraint in constraints)):
        scope = export.SymbolicScope([_jax_constraint(constraint) for constraint in constraints])
    made: dict[str, Any] = {}
    for shape in shapes:
        for dimension in shape:
            if isinstance(dimension, Expression) and dimension.text not in made:
                _check_compared(dimension, "dimension")
                with _jax_refusals("dimension", dimension.text):
                    (made[dimension.text],) = export.symbolic_shape(dimension.text, scope=scope)
    return [tuple(made[dim.text] if isinstance(dim, Expression) else dim for dim in shape) for shape in shapes]


def from_jax(dim: Any) -> int | Expression:
    """Reads a dimension of a JAX shape: an integer, or a symbolic dimension by what JAX prints for it.

    Raises:
      ExportError: the text that JAX prints isn't in the grammar, or exceeds a limit.
    """
    from jax import export

    return parse(str(dim)) if export.is_symbolic_dim(dim) else operator.index(dim)


@contextlib.contextmanager
def _jax_refusals(field: str, text: str) -> Iterator[None]:
    """Says in our terms what JAX refuses to read."""
    import jax

    # Where it is public: jax.core in JAX 0.9, where jax.errors lacks it; jax.errors in 0.10 to 0.12.
    inconclusive = getattr(jax.errors, "InconclusiveDimensionOperation", None)
    inconclusive = inconclusive or jax.core.InconclusiveDimensionOperation
    try:
        yield
    except errors.ObmliteError:
        raise
    # AssertionError: JAX 0.10.2 meets one (shape_poly_decision.py) in bounds of products of calls without bounds.
    except (ValueError, NotImplementedError, OverflowError, AssertionError, inconclusive) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise errors.ExportError(
            f"JAX refuses the {field}{'s' if field == 'constraint' else ''}: {shorten(reason, limit=200)}",
            field=field,
            expected="constraints that can be kept together, with one == for each term"
            if field == "constraint"
            else "a dimension that JAX can compare, with divisors that it knows not to be 0",
            found=shorten(text),
        ) from error


def _jax_constraint(constraint: Constraint) -> str:
    """Gives the text that JAX takes: the left side of an ``==`` must be one term that isn't a constant."""
    for side in (constraint.left, constraint.right):
        _check_compared(side, "constraint")
    left, right = constraint.left, constraint.right
    if constraint.relation != "==" or (isinstance(left, int) and isinstance(right, int)):
        return constraint.text
    for first, second in ((left, right), (right, left)):
        if isinstance(first, Expression) and len(first._terms) == 1:
            return f"{first} == {second}"
    difference = sum_of([*parts_of(left), *((-coefficient, factors) for coefficient, factors in parts_of(right))])
    if isinstance(difference, int):
        return constraint.text
    parts = [part for part in parts_of(difference) if part[1]]
    lead = next((part for part in parts if abs(part[0]) == 1), parts[0])
    sign = 1 if lead[0] > 0 else -1
    rest = [(-sign * coefficient, factors) for coefficient, factors in parts_of(difference) if factors != lead[1]]
    return f"{sum_of([(sign * lead[0], lead[1])])} == {sum_of(rest)}"


def _check_compared(dimension: int | Expression, field: str) -> int:
    """Refuses a ``max`` or ``min`` whose operands are too large for JAX to compare.

    Returns:
      The dimension's own size, as :data:`MAX_JAX_COMPARED` counts it.
    """
    size = 0
    for term in dimension._terms if isinstance(dimension, Expression) else ():
        size += len(term.factors) if len(term.factors) > 1 else 0
        for factor, _ in term.factors:
            if isinstance(factor, str):
                continue
            operands = _check_compared(factor.left, field) + _check_compared(factor.right, field)
            compares = factor.function in ("max", "min")
            if compares and operands > MAX_JAX_COMPARED:
                raise errors.ExportError(
                    f"JAX would take very long to read a {factor.function} of operands this large",
                    field=field,
                    expected=f"{_COMPARED_PARTS} within a {factor.function}: at most {MAX_JAX_COMPARED}",
                    found=f"{operands} in {shorten(factor.text)}",
                )
            size += operands + (2 if compares else 1)
    return size
