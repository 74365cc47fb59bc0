"""Expressions over symbols: sums of products, their canonical text and their values."""

from __future__ import annotations

import dataclasses
import operator
from typing import TYPE_CHECKING, TypeVar

from obmlite import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


MAX_INTEGER = 2**63 - 1  # sizes are int64 in StableHLO, so no number on the way to one may be larger


MAX_EXPONENT = 62  # 2^62 is the largest power of a size above 1 that MAX_INTEGER holds


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One of ``floordiv``, ``mod``, ``max`` and ``min`` of two operands, at least one of them symbolic."""

    function: str
    left: int | Expression
    right: int | Expression

    @property
    def text(self) -> str:
        return f"{self.function}({self.left}, {self.right})"

    @property
    def symbols(self) -> frozenset[str]:
        return symbols_of(self.left) | symbols_of(self.right)


_T = TypeVar("_T")


Factor = str | Call  # a symbol or a call


Factors = tuple[tuple[Factor, int], ...]  # with their exponents, symbols first, each in the order of their text


@dataclasses.dataclass(frozen=True, slots=True)
class _Term:
    """A coefficient times a product of factors; the constant has none. ``text`` leaves the coefficient out."""

    coefficient: int
    factors: Factors
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Expression:
    """A symbolic dimension: a sum of products, in normal form. Made by :func:`parse`, compared by its text.

    Attributes:
      text: the canonical text: like terms collected, higher degrees first, then in the order of their text, the
        constant last. Expressions that differ only in the order or grouping of sums and products have one text.
      symbols: the symbols that it depends on.
    """

    text: str
    symbols: frozenset[str] = dataclasses.field(compare=False, repr=False)
    _terms: tuple[_Term, ...] = dataclasses.field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.text

    def evaluate(self, values: Mapping[str, int]) -> int:
        """Computes the dimension.

        Args:
          values: a value for each of :attr:`symbols`; others may be there.

        Raises:
          ArgumentError: a symbol has no value, a divisor is 0, or a number on the way exceeds :data:`MAX_INTEGER`.
        """
        if missing := sorted(self.symbols - values.keys()):
            raise errors.ArgumentError(
                f"the dimension {shorten(self.text)} can't be computed: no value for {', '.join(missing)}",
                field="dimension",
                expected=f"values for {', '.join(sorted(self.symbols))}",
                found=f"values for {', '.join(sorted(values)) or 'nothing'}",
            )
        return self._computed(lambda known: _value(self, known), values)

    def solve(self, size: int, values: Mapping[str, int]) -> tuple[str, int] | None:
        """Finds the one symbol that ``values`` lacks, such that the dimension is ``size``.

        Returns:
          The symbol and its value, or None where more than one symbol is unknown, or none is, or the dimension
          isn't linear in it.

        Raises:
          ArgumentError: no integer of at least 1 gives that size, or as in :meth:`evaluate`.
        """
        unknown = self.symbols - values.keys()
        if len(unknown) != 1:
            return None
        (symbol,) = unknown
        linear = self._computed(lambda known: linear_in(self, symbol, known), values)
        if linear is None:
            return None
        scale, offset = linear
        value, remainder = divmod(size - offset, scale)
        if remainder or value < 1:
            where = _where(self.symbols - unknown, values)
            raise errors.ArgumentError(
                "the size fits no value of a symbolic dimension",
                expected=f"{shorten(self.text)}{where}, for an integer {symbol} of at least 1",
                found=size,
            )
        return symbol, value

    def _computed(self, compute: Callable[[Mapping[str, int]], _T], values: Mapping[str, int]) -> _T:
        """Calls ``compute`` with the values as Python integers, and says what went wrong."""
        try:
            known = {symbol: _bounded(operator.index(values[symbol])) for symbol in self.symbols & values.keys()}
            return compute(known)
        except (OverflowError, ZeroDivisionError) as error:
            overflow = isinstance(error, OverflowError)
            raise errors.ArgumentError(
                f"the dimension {shorten(self.text)} can't be computed",
                field="dimension",
                expected=f"numbers up to {MAX_INTEGER}" if overflow else "divisors other than 0",
                found=f"{'a larger number' if overflow else 'a divisor of 0'}{_where(self.symbols, values)}",
            ) from None


def symbols_of(dimension: int | Expression) -> frozenset[str]:
    return dimension.symbols if isinstance(dimension, Expression) else frozenset()


def _where(symbols: Iterable[str], values: Mapping[str, int]) -> str:
    known = ((symbol, values[symbol]) for symbol in sorted(symbols) if symbol in values)
    facts = ", ".join(f"{symbol} = {value if abs(value) <= MAX_INTEGER else '…'}" for symbol, value in known)
    return shorten(f" where {facts}", limit=200) if facts else ""


def _bounded(value: int) -> int:
    if abs(value) > MAX_INTEGER:
        raise OverflowError
    return value


def product_of(powers: Sequence[tuple[int, int]]) -> int:
    """Multiplies powers, and stops as soon as the result is too large for a size.

    Raises:
      OverflowError: the product exceeds :data:`MAX_INTEGER`.
    """
    if any(base == 0 and exponent for base, exponent in powers):
        return 0
    result = 1
    for base, exponent in powers:  # at most 63 * 62 bits at a time; and the size never falls, since no base is 0
        result = _bounded(result * base**exponent)
    return result


def apply_call(function: str, left: int, right: int) -> int:
    if function == "floordiv":
        return left // right
    if function == "mod":
        return left % right
    return max(left, right) if function == "max" else min(left, right)


def _value(dimension: int | Expression, values: Mapping[str, int]) -> int:
    if isinstance(dimension, int):
        return dimension
    return _bounded(sum(_term_value(term.coefficient, term.factors, values) for term in dimension._terms))


def _term_value(coefficient: int, factors: Factors, values: Mapping[str, int]) -> int:
    return product_of([(coefficient, 1), *((_factor_value(factor, values), exponent) for factor, exponent in factors)])


def _factor_value(factor: Factor, values: Mapping[str, int]) -> int:
    if isinstance(factor, str):
        return values[factor]
    return apply_call(factor.function, _value(factor.left, values), _value(factor.right, values))


def linear_in(expression: Expression, symbol: str, values: Mapping[str, int]) -> tuple[int, int] | None:
    """Writes the expression as ``scale * symbol + offset``; None where it isn't that, or the scale is 0."""
    scale = offset = 0
    for term in expression._terms:
        others = tuple(power for power in term.factors if power != (symbol, 1))
        if any(factor == symbol or (isinstance(factor, Call) and symbol in factor.symbols) for factor, _ in others):
            return None
        value = _term_value(term.coefficient, others, values)
        if len(others) < len(term.factors):
            scale += value
        else:
            offset += value
    return (_bounded(scale), _bounded(offset)) if scale else None


def parts_of(dimension: int | Expression) -> list[tuple[int, Factors]]:
    if isinstance(dimension, int):
        return [(dimension, ())]
    return [(term.coefficient, term.factors) for term in dimension._terms]


def factor_text(factor: Factor) -> str:
    return factor if isinstance(factor, str) else factor.text


def sum_of(parts: Iterable[tuple[int, Factors]]) -> int | Expression:
    """Collects like terms and puts them in order.

    Raises:
      OverflowError: a coefficient exceeds :data:`MAX_INTEGER`.
    """
    collected: dict[str, tuple[int, Factors]] = {}
    for coefficient, factors in parts:
        text = "*".join(factor_text(factor) + (f"^{exponent}" if exponent > 1 else "") for factor, exponent in factors)
        before, _ = collected.get(text, (0, ()))
        collected[text] = (before + coefficient, factors)
    terms = [_Term(_bounded(number), factors, text) for text, (number, factors) in collected.items() if number]
    if not any(term.factors for term in terms):
        return terms[0].coefficient if terms else 0
    terms.sort(key=lambda term: (-sum(exponent for _, exponent in term.factors), term.text))
    symbols: set[str] = set()
    text = ""
    for term in terms:
        sign = (" - " if text else "-") if term.coefficient < 0 else (" + " if text else "")
        number = abs(term.coefficient)
        text += sign + ("*".join(([str(number)] if number != 1 else []) + [term.text]) if term.text else str(number))
        for factor, _ in term.factors:
            symbols |= {factor} if isinstance(factor, str) else factor.symbols
    return Expression(text, frozenset(symbols), tuple(terms))


def shorten(text: str, span: tuple[int, int] | None = None, limit: int = 80) -> str:
    """Cuts the text to the characters around a place, marks the place as ``>>…<<``, and escapes what doesn't print."""
    start, stop = span or (0, 0)
    first = max(0, min(start - limit // 2, len(text) - limit))
    last = min(len(text), first + limit)
    pieces = [text[first:start], text[start : min(stop, last)], text[min(stop, last) : last]]
    shown = ["".join(char if char.isprintable() else ascii(char)[1:-1] for char in piece) for piece in pieces]
    marks = (">>", "<<") if span else ("", "")
    before, after = "…" if first else "", "…" if last < len(text) else ""
    return f"{before}{shown[0]}{marks[0]}{shown[1]}{marks[1]}{shown[2]}{after}"
