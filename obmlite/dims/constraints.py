"""Relations between dimensions, and the sizes of symbols that a call gives."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from obmlite import errors
from obmlite.dims.expressions import MAX_INTEGER, Expression, linear_in, shorten, symbols_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True, slots=True)
class Constraint:
    """A relation between two dimensions that a function's symbols keep.

    Attributes:
      left: a size or an expression.
      relation: ``<=``, ``>=`` or ``==``.
      right: a size or an expression.
    """

    left: int | Expression
    relation: str
    right: int | Expression

    @property
    def text(self) -> str:
        """The canonical text, which :func:`parse_constraint` reads back."""
        return f"{self.left} {self.relation} {self.right}"

    def __str__(self) -> str:
        return self.text

    @property
    def symbols(self) -> frozenset[str]:
        """The symbols of both sides."""
        return symbols_of(self.left) | symbols_of(self.right)

    def holds(self, values: Mapping[str, int]) -> bool | None:
        """Says whether the values keep the constraint; None where one of its symbols has no value.

        Raises:
          ArgumentError: a side can't be computed, as in :meth:`Expression.evaluate`.
        """
        if not self.symbols <= values.keys():
            return None
        left, right = (
            side.evaluate(values) if isinstance(side, Expression) else side for side in (self.left, self.right)
        )
        if self.relation == "==":
            return left == right
        return left <= right if self.relation == "<=" else left >= right


def bind(pairs: Iterable[tuple[str, int | Expression, int]]) -> dict[str, int]:
    """Finds the symbols' values from actual sizes, and checks every size against them.

    Plain symbols give their values first, then, one symbol after the other, expressions that are linear in the one
    symbol that is still unknown. An expression whose symbols can't be found so is left unchecked.

    Args:
      pairs: for each dimension where it is, as errors say it (``x, dimension 0``), what it should be, and what it is.

    Raises:
      ArgumentError: a size isn't what it should be; ``leaf`` is where, and ``expected`` says from where the symbols'
        values come.
    """
    values: dict[str, int] = {}
    sources: dict[str, str] = {}
    dimensions: list[tuple[str, Expression, int]] = []
    for where, expected, actual in pairs:
        if isinstance(expected, Expression):
            dimensions.append((where, expected, actual))
        elif expected != actual:
            raise errors.ArgumentError(
                "a size differs from the one that the function was exported for",
                leaf=where,
                expected=expected,
                found=actual,
            )

    unknown = [len(expected.symbols) for _, expected, _ in dimensions]
    uses: dict[str, list[int]] = {}
    for index, (_, expected, _) in enumerate(dimensions):
        for symbol in expected.symbols:
            uses.setdefault(symbol, []).append(index)
    plain = [index for index, (_, expected, _) in enumerate(dimensions) if expected.text in expected.symbols]
    others = [
        index
        for index, (_, expected, _) in enumerate(dimensions)
        if len(expected.symbols) == 1 and expected.text not in expected.symbols
    ]
    queue = plain + others  # grows as symbols become known
    for index in queue:
        where, expected, actual = dimensions[index]
        with errors.context(leaf=where):
            solution = expected.solve(actual, values)
        if solution is None:
            continue
        symbol, values[solution[0]] = solution
        sources[symbol] = where
        for use in uses[symbol]:
            unknown[use] -= 1
            if unknown[use] == 1:
                queue.append(use)

    for where, expected, actual in dimensions:
        if not expected.symbols <= values.keys():
            continue
        with errors.context(leaf=where):
            size = expected.evaluate(values)
        if size != actual:
            facts = [f"{symbol} = {values[symbol]} (from {sources[symbol]})" for symbol in sorted(expected.symbols)]
            text = "" if expected.text in expected.symbols else f"{shorten(expected.text)} = {size}, where "
            raise errors.ArgumentError(
                "a size differs from what the function's symbolic dimensions say",
                leaf=where,
                expected=text + ", ".join(facts),
                found=actual,
            )
    return values


def check_together(constraints: Iterable[Constraint]) -> None:
    """Refuses constraints that leave a symbol no size, as far as each is linear in one symbol; JAX accepts them.

    Raises:
      ExportError: a symbol, which is at least 1, is to be at least one number and at most a smaller one.
    """
    bounds: dict[str, tuple[int, int]] = {}
    texts: dict[str, list[str]] = {}
    for constraint in constraints:
        if len(constraint.symbols) != 1:
            continue
        [symbol] = constraint.symbols
        sides = [
            linear_in(side, symbol, {}) if isinstance(side, Expression) else (0, side)
            for side in (constraint.left, constraint.right)
        ]
        if sides[0] is None or sides[1] is None or sides[0][0] == sides[1][0]:
            continue
        factor, rest = sides[0][0] - sides[1][0], sides[1][1] - sides[0][1]  # factor * symbol, relation, rest
        low, high = bounds.get(symbol, (1, MAX_INTEGER))
        at_most = (constraint.relation == "<=") == (factor > 0)
        if constraint.relation == "==" or at_most:
            high = min(high, rest // factor)
        if constraint.relation == "==" or not at_most:
            low = max(low, -(-rest // factor))
        bounds[symbol] = low, high
        texts.setdefault(symbol, []).append(constraint.text)
        if low > high:
            raise errors.ExportError(
                f"the constraints leave the symbol {symbol} no size",
                field="constraint",
                expected=f"a size of at least 1 that all of them allow for {symbol}",
                found=shorten(", ".join(texts[symbol])),
            )
