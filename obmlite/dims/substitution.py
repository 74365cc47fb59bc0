"""Putting dimensions in the place of symbols."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obmlite import errors
from obmlite.dims.expressions import (
    MAX_EXPONENT,
    Call,
    Expression,
    Factor,
    Factors,
    apply_call,
    factor_text,
    parts_of,
    shorten,
    sum_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_TERMS = 256  # of a product that is multiplied out; far above what shapes have

Parts = list[tuple[int, Factors]]


def substitute(dimension: int | Expression, values: Mapping[str, int | Expression]) -> int | Expression:
    """A dimension with others in the place of some of its symbols, all at once.

    Args:
      dimension: what to put them into.
      values: symbol → what takes its place; symbols that it lacks stay.

    Raises:
      ArgumentError: the result is too large, or a divisor is 0.
    """
    if isinstance(dimension, int) or not dimension.symbols & values.keys():
        return dimension
    try:
        total: Parts = []
        for coefficient, factors in parts_of(dimension):
            product: Parts = [(coefficient, ())]
            for factor, exponent in factors:
                own = _factor(factor, values)
                for _ in range(exponent):
                    product = _multiplied(product, own)
            total += product
        return sum_of(total)
    except (OverflowError, ZeroDivisionError) as error:
        raise errors.ArgumentError(
            "a symbolic dimension can't be computed", field="dimension", found=shorten(dimension.text)
        ) from error


def _factor(factor: Factor, values: Mapping[str, int | Expression]) -> Parts:
    if isinstance(factor, str):
        return parts_of(values[factor]) if factor in values else [(1, ((factor, 1),))]
    left, right = substitute(factor.left, values), substitute(factor.right, values)
    if isinstance(left, int) and isinstance(right, int):
        return [(apply_call(factor.function, left, right), ())]
    return [(1, ((Call(factor.function, left, right), 1),))]


def _multiplied(one: Sequence[tuple[int, Factors]], other: Sequence[tuple[int, Factors]]) -> Parts:
    if len(one) * len(other) > MAX_TERMS:
        raise OverflowError
    return [(a * b, _together(left, right)) for a, left in one for b, right in other]


def _together(one: Factors, other: Factors) -> Factors:
    powers: dict[str, tuple[Factor, int]] = {}
    for factor, exponent in (*one, *other):
        text = factor_text(factor)
        exponent += powers.get(text, (factor, 0))[1]
        if exponent > MAX_EXPONENT:
            raise OverflowError
        powers[text] = (factor, exponent)
    ordered = sorted(powers.items(), key=lambda item: (isinstance(item[1][0], Call), item[0]))
    return tuple(power for _, power in ordered)
