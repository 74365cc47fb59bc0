"""Symbolic dimensions: expressions such as ``2*b + 1`` and constraints such as ``b <= 16``, as text of our own.

JAX prints a symbolic dimension and reads one back (``jax.export.symbolic_shape``), but has no grammar that it
promises, no limits, and loses constraints when it serializes. A package holds the text that this module writes,
and reads it without evaluating it as code. The grammar is what JAX 0.9 to 0.12 prints and accepts
(``jax/_src/export/shape_poly.py``, ``_Parser`` and ``_DimExpr.__str__``); it is written out in ``docs/format.md``.

Symbols stand for integers of at least 1, and ``floordiv`` and ``mod`` are Python's ``//`` and ``%``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
import re
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from obmlite import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

__all__ = [
    "MAX_EXPONENT",
    "MAX_INTEGER",
    "MAX_JAX_COMPARED",
    "MAX_NESTING",
    "MAX_TEXT",
    "MAX_TOKENS",
    "Constraint",
    "Expression",
    "bind",
    "from_jax",
    "parse",
    "parse_constraint",
    "parse_shape",
    "to_jax",
]

MAX_TEXT = (
    16384  # characters; a deep network's printed output dimension has hundreds, and reading stays in milliseconds
)
MAX_TOKENS = 4096  # numbers, names and signs in one text, for the same reason where they are one character each
MAX_NESTING = 32  # calls within calls: JAX prints about one per strided layer, and each costs us four Python frames
MAX_INTEGER = 2**63 - 1  # sizes are int64 in StableHLO, so no number on the way to one may be larger
MAX_EXPONENT = 62  # 2^62 is the largest power of a size above 1 that MAX_INTEGER holds
# What the operands of one max or min hold, for handing it to JAX: floordiv and mod count 1, max and min 2, each factor
# of a product 1. JAX compares the operands as it reads them, in time that multiplies with each (0.10.2: a max of 4, 5,
# 6, 7, 8 summed maxes takes 0.02, 0.1, 0.6, 3.2 and over 15 s), so that a short text could hang it.
MAX_JAX_COMPARED = 12
_COMPARED_PARTS = "calls (max and min count twice) and factors of products"

_FUNCTIONS = ("floordiv", "max", "min", "mod")
_RELATIONS = ("<=", ">=", "==", "<", ">")
_TOKEN = re.compile(r"[ \t]*(?:(?P<number>[0-9]+)|(?P<name>[^\W\d]\w*)|(?P<sign>[<>=]=|[-+*^(),<>]))")
_OPERAND = "a number, a symbol, or one of " + ", ".join(f"{name}(…, …)" for name in _FUNCTIONS)
_FIXES = {
    "/": "write floordiv(a, b) for a // b",
    "%": "write mod(a, b) for a % b",
    "(": "multiply the parentheses out: 2*b + 2 for 2*(b + 1)",
    ".": "write every dimension out",
    "_": "give the dimension a name, such as b",
    "?": "give the dimension a name, such as b",
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """One of ``floordiv``, ``mod``, ``max`` and ``min`` of two operands, at least one of them symbolic."""

    function: str
    left: int | Expression
    right: int | Expression

    @property
    def text(self) -> str:
        return f"{self.function}({self.left}, {self.right})"

    @property
    def symbols(self) -> frozenset[str]:
        return _symbols(self.left) | _symbols(self.right)


_T = TypeVar("_T")
_Factor = str | _Call  # a symbol or a call
_Factors = tuple[tuple[_Factor, int], ...]  # with their exponents, symbols first, each in the order of their text


@dataclasses.dataclass(frozen=True, slots=True)
class _Term:
    """A coefficient times a product of factors; the constant has none. ``text`` leaves the coefficient out."""

    coefficient: int
    factors: _Factors
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
                f"the dimension {_shorten(self.text)} can't be computed: no value for {', '.join(missing)}",
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
        linear = self._computed(lambda known: _linear(self, symbol, known), values)
        if linear is None:
            return None
        scale, offset = linear
        value, remainder = divmod(size - offset, scale)
        if remainder or value < 1:
            where = _where(self.symbols - unknown, values)
            raise errors.ArgumentError(
                "the size fits no value of a symbolic dimension",
                expected=f"{_shorten(self.text)}{where}, for an integer {symbol} of at least 1",
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
                f"the dimension {_shorten(self.text)} can't be computed",
                field="dimension",
                expected=f"numbers up to {MAX_INTEGER}" if overflow else "divisors other than 0",
                found=f"{'a larger number' if overflow else 'a divisor of 0'}{_where(self.symbols, values)}",
            ) from None


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
        return _symbols(self.left) | _symbols(self.right)

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


def parse(text: str) -> int | Expression:
    """Reads one dimension. One that doesn't depend on any symbol becomes an integer, which may be negative.

    Raises:
      ExportError: the text isn't a dimension, or exceeds a limit. ``field`` is ``dimension``, and ``found`` holds the
        text with the place marked.
    """
    parser = _Parser(text, "dimension")
    dimension = parser.sum(0)
    parser.end("+, -, *, ^ or the end")
    return dimension


def parse_shape(text: str) -> tuple[int | Expression, ...]:
    """Reads dimensions with commas between them, as in ``b, 28, 2*b + 1``; nothing at all is the shape of a scalar.

    A comma after the last dimension and parentheses around them all are allowed, as Python and JAX print shapes.

    Raises:
      ExportError: as in :func:`parse`; and a dimension without symbols is negative.
    """
    parser = _Parser(text, "dimension")
    dimensions: list[int | Expression] = []
    closing = ")" if parser.take("(") else ""
    while parser.ahead not in (closing, ""):
        start = parser.position
        dimension = parser.sum(0)
        if isinstance(dimension, int) and dimension < 0:
            parser.position = start
            parser.refuse("a size is negative", expected="a size of at least 0, or a symbol such as b")
        dimensions.append(dimension)
        if not parser.take(","):
            break
    if closing:
        parser.expect(closing, "a comma or )")
    parser.end("the end" if closing else "+, -, *, ^, a comma or the end")
    return tuple(dimensions)


def parse_constraint(text: str) -> Constraint:
    """Reads a constraint: two dimensions with ``<=``, ``>=``, ``==``, ``<`` or ``>`` between them.

    JAX has no strict relations, and sizes are integers, so ``b < 16`` becomes ``b <= 15``.

    Raises:
      ExportError: the text isn't a constraint, or exceeds a limit. ``field`` is ``constraint``, and ``found`` holds
        the text with the place marked.
    """
    parser = _Parser(text, "constraint")
    left = parser.sum(0)
    relation = parser.ahead
    if relation not in _RELATIONS:
        parser.refuse("a constraint needs a relation", expected=f"one of {', '.join(_RELATIONS)}")
    parser.position += 1
    place = parser.position
    right = parser.sum(0)
    parser.end("+, -, *, ^ or the end")
    if relation in ("<", ">"):
        right = parser.collect([*_parts(right), (-1 if relation == "<" else 1, ())], place)
        relation += "="
    constraint = Constraint(left, relation, right)
    parser.limit(constraint.text)
    return constraint


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
            text = "" if expected.text in expected.symbols else f"{_shorten(expected.text)} = {size}, where "
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
            _linear(side, symbol, {}) if isinstance(side, Expression) else (0, side)
            for side in (constraint.left, constraint.right)
        ]
        if sides[0] is None or sides[1] is None or sides[0][0] == sides[1][0]:
            continue
        factor, rest = sides[0][0] - sides[1][0], sides[1][1] - sides[0][1]  # factor * symbol, relation, rest
        low, high = bounds.get(symbol, (1, MAX_INTEGER))
        at_most = (constraint.relation == "<=") == (factor > 0)
        if constraint.relation == "==" or at_most:
            high = min(high, math.floor(Fraction(rest, factor)))
        if constraint.relation == "==" or not at_most:
            low = max(low, math.ceil(Fraction(rest, factor)))
        bounds[symbol] = low, high
        texts.setdefault(symbol, []).append(constraint.text)
        if low > high:
            raise errors.ExportError(
                f"the constraints leave the symbol {symbol} no size",
                field="constraint",
                expected=f"a size of at least 1 that all of them allow for {symbol}",
                found=_shorten(", ".join(texts[symbol])),
            )


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


# --------------------------------------------------------------------------------------------------------- values


def _symbols(dimension: int | Expression) -> frozenset[str]:
    return dimension.symbols if isinstance(dimension, Expression) else frozenset()


def _where(symbols: Iterable[str], values: Mapping[str, int]) -> str:
    known = ((symbol, values[symbol]) for symbol in sorted(symbols) if symbol in values)
    facts = ", ".join(f"{symbol} = {value if abs(value) <= MAX_INTEGER else '…'}" for symbol, value in known)
    return _shorten(f" where {facts}", limit=200) if facts else ""


def _bounded(value: int) -> int:
    if abs(value) > MAX_INTEGER:
        raise OverflowError
    return value


def _product(powers: Sequence[tuple[int, int]]) -> int:
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


def _apply(function: str, left: int, right: int) -> int:
    if function == "floordiv":
        return left // right
    if function == "mod":
        return left % right
    return max(left, right) if function == "max" else min(left, right)


def _value(dimension: int | Expression, values: Mapping[str, int]) -> int:
    if isinstance(dimension, int):
        return dimension
    return _bounded(sum(_term_value(term.coefficient, term.factors, values) for term in dimension._terms))


def _term_value(coefficient: int, factors: _Factors, values: Mapping[str, int]) -> int:
    return _product([(coefficient, 1), *((_factor_value(factor, values), exponent) for factor, exponent in factors)])


def _factor_value(factor: _Factor, values: Mapping[str, int]) -> int:
    if isinstance(factor, str):
        return values[factor]
    return _apply(factor.function, _value(factor.left, values), _value(factor.right, values))


def _linear(expression: Expression, symbol: str, values: Mapping[str, int]) -> tuple[int, int] | None:
    """Writes the expression as ``scale * symbol + offset``; None where it isn't that, or the scale is 0."""
    scale = offset = 0
    for term in expression._terms:
        others = tuple(power for power in term.factors if power != (symbol, 1))
        if any(factor == symbol or (isinstance(factor, _Call) and symbol in factor.symbols) for factor, _ in others):
            return None
        value = _term_value(term.coefficient, others, values)
        if len(others) < len(term.factors):
            scale += value
        else:
            offset += value
    return (_bounded(scale), _bounded(offset)) if scale else None


# ------------------------------------------------------------------------------------------------------------ JAX


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
            f"JAX refuses the {field}{'s' if field == 'constraint' else ''}: {_shorten(reason, limit=200)}",
            field=field,
            expected="constraints that can be kept together, with one == for each term"
            if field == "constraint"
            else "a dimension that JAX can compare, with divisors that it knows not to be 0",
            found=_shorten(text),
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
    difference = _sum([*_parts(left), *((-coefficient, factors) for coefficient, factors in _parts(right))])
    if isinstance(difference, int):
        return constraint.text
    parts = [part for part in _parts(difference) if part[1]]
    lead = next((part for part in parts if abs(part[0]) == 1), parts[0])
    sign = 1 if lead[0] > 0 else -1
    rest = [(-sign * coefficient, factors) for coefficient, factors in _parts(difference) if factors != lead[1]]
    return f"{_sum([(sign * lead[0], lead[1])])} == {_sum(rest)}"


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
                    found=f"{operands} in {_shorten(factor.text)}",
                )
            size += operands + (2 if compares else 1)
    return size


# ---------------------------------------------------------------------------------------------------- normal form


def _parts(dimension: int | Expression) -> list[tuple[int, _Factors]]:
    if isinstance(dimension, int):
        return [(dimension, ())]
    return [(term.coefficient, term.factors) for term in dimension._terms]


def _factor_text(factor: _Factor) -> str:
    return factor if isinstance(factor, str) else factor.text


def _sum(parts: Iterable[tuple[int, _Factors]]) -> int | Expression:
    """Collects like terms and puts them in order.

    Raises:
      OverflowError: a coefficient exceeds :data:`MAX_INTEGER`.
    """
    collected: dict[str, tuple[int, _Factors]] = {}
    for coefficient, factors in parts:
        text = "*".join(_factor_text(factor) + (f"^{exponent}" if exponent > 1 else "") for factor, exponent in factors)
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


def _shorten(text: str, span: tuple[int, int] | None = None, limit: int = 80) -> str:
    """Cuts the text to the characters around a place, marks the place as ``>>…<<``, and escapes what doesn't print."""
    start, stop = span or (0, 0)
    first = max(0, min(start - limit // 2, len(text) - limit))
    last = min(len(text), first + limit)
    pieces = [text[first:start], text[start : min(stop, last)], text[min(stop, last) : last]]
    shown = ["".join(char if char.isprintable() else ascii(char)[1:-1] for char in piece) for piece in pieces]
    marks = (">>", "<<") if span else ("", "")
    before, after = "…" if first else "", "…" if last < len(text) else ""
    return f"{before}{shown[0]}{marks[0]}{shown[1]}{marks[1]}{shown[2]}{after}"


# --------------------------------------------------------------------------------------------------------- parser


class _Parser:
    """Recursive descent over tokens, no deeper than :data:`MAX_NESTING`; one dimension after the other."""

    def __init__(self, text: str, field: str) -> None:
        self.text = text
        self.field = field
        self.position = 0
        self.tokens: list[tuple[str, int, int]] = []  # text, start and end; the last one is empty
        if not isinstance(text, str):
            kind = type(text).__name__
            raise errors.ExportError(f"a {field} is given as text", field=field, expected="a str", found=f"a {kind}")
        if len(text) > MAX_TEXT:
            self._fail("the text is too long", f"at most {MAX_TEXT} characters", (MAX_TEXT, MAX_TEXT + 1))
        end = len(text.rstrip(" \t"))
        place = 0
        while place < end:
            match = _TOKEN.match(text, place)
            if match is None:
                place += len(text[place:]) - len(text[place:].lstrip(" \t"))
                self._fail(
                    "a character has no meaning here",
                    f"{_OPERAND}, or a sign",
                    (place, place + 1),
                    fix=_FIXES.get(text[place]),
                )
            if len(self.tokens) == MAX_TOKENS:
                self._fail(
                    "the text has too many parts",
                    f"at most {MAX_TOKENS} numbers, names and signs",
                    (place, match.end()),
                )
            self.tokens.append((match[match.lastgroup or 0], match.start(match.lastgroup or 0), match.end()))
            place = match.end()
        self.tokens.append(("", len(text), len(text)))

    @property
    def ahead(self) -> str:
        return self.tokens[self.position][0]

    def take(self, token: str) -> bool:
        """Passes the token if it is the next one."""
        if self.ahead != token:
            return False
        self.position += 1
        return True

    def expect(self, token: str, expected: str) -> None:
        """Passes the token, or refuses what is there."""
        if not self.take(token):
            self.refuse("the text doesn't go on as it should", expected)

    def end(self, expected: str) -> None:
        """Refuses anything that is left."""
        if self.ahead:
            self.refuse("the text doesn't go on as it should", expected)

    def refuse(self, problem: str, expected: str) -> NoReturn:
        """Raises at the next token."""
        token, start, stop = self.tokens[self.position]
        fix = _FIXES.get(token)
        self._fail(problem if token else f"{problem}: it ends too early", expected, (start, stop), fix)

    def _fail(self, problem: str, expected: str, span: tuple[int, int], fix: str | None = None) -> NoReturn:
        raise errors.ExportError(
            f"malformed {self.field}: {problem}",
            field=self.field,
            expected=expected,
            found=f"{_shorten(self.text, span)} (column {span[0] + 1})",
            fix=fix,
        )

    def limit(self, text: str, start: int = 0) -> None:
        """Refuses a canonical text that this parser would not read back."""
        long = len(text) > MAX_TEXT
        if long or (len(text) > MAX_TOKENS and sum(1 for _ in _TOKEN.finditer(text)) > MAX_TOKENS):
            limit = f"at most {MAX_TEXT} characters" if long else f"at most {MAX_TOKENS} numbers, names and signs"
            self._fail("written out in full the text is too long", limit, self.tokens[start][1:])

    def collect(self, parts: Iterable[tuple[int, _Factors]], start: int) -> int | Expression:
        """Makes the sum's normal form, within the limits."""
        try:
            dimension = _sum(parts)
        except OverflowError:
            self._fail("a number is too large", f"numbers up to {MAX_INTEGER}", self.tokens[start][1:])
        if isinstance(dimension, Expression):
            self.limit(dimension.text, start)
        return dimension

    def sum(self, depth: int) -> int | Expression:
        """``["+" | "-"] term {("+" | "-") term}``."""
        start = self.position
        negative = self.take("-")
        if not negative:
            self.take("+")
        parts = [self.term(negative, depth)]
        while self.ahead in ("+", "-"):
            negative = self.ahead == "-"
            self.position += 1
            parts.append(self.term(negative, depth))
        return self.collect(parts, start)

    def term(self, negative: bool, depth: int) -> tuple[int, _Factors]:
        """``factor ["^" integer] {"*" factor ["^" integer]}``; a power is of the factor with its sign, as in JAX."""
        start = self.position
        numbers: list[tuple[int, int]] = []
        powers: dict[str, tuple[_Factor, int]] = {}
        while True:
            place = self.position
            factor = self.factor(depth)
            exponent = 1
            if self.take("^"):
                place = self.position
                exponent = self.integer("an exponent")
            if isinstance(factor, int):
                numbers.append((factor, exponent))
            else:
                text = _factor_text(factor)
                exponent += powers.get(text, (factor, 0))[1]
                powers[text] = (factor, exponent)
            if exponent > MAX_EXPONENT:
                self.position = place
                self.refuse("an exponent is too large", f"exponents up to {MAX_EXPONENT}")
            if not self.take("*"):
                break
        try:
            coefficient = _product(numbers)
        except OverflowError:
            self.position = start
            self.refuse("a number is too large", f"numbers up to {MAX_INTEGER}")
        ordered = sorted(powers.items(), key=lambda item: (isinstance(item[1][0], _Call), item[0]))
        return (-coefficient if negative else coefficient), tuple(power for _, power in ordered if power[1])

    def factor(self, depth: int) -> int | _Factor:
        """``symbol | ["-"] integer | function "(" sum "," sum ")"``."""
        name = self.ahead
        if name in _FUNCTIONS:
            return self.call(depth + 1)
        if name[:1].isidentifier() and name != "_":
            if not name.isidentifier():
                self.refuse("a symbol's name is an identifier", expected="letters, digits and _, no digit first")
            self.position += 1
            if self.ahead == "(":
                self.position -= 1
                self.refuse("there is no such function", expected=f"one of {', '.join(_FUNCTIONS)}, or a symbol")
            return name
        if self.take("-"):
            return -self.integer("a number after the sign")
        return self.integer(_OPERAND)

    def integer(self, expected: str) -> int:
        """A decimal number without a sign, up to :data:`MAX_INTEGER`."""
        token = self.ahead
        if not token.isdecimal():
            self.refuse("the text doesn't go on as it should", expected=expected)
        if len(token) > 1 and token[0] == "0":
            self.refuse("a number starts with 0", expected="a decimal number without leading zeros")
        if len(token) > len(str(MAX_INTEGER)) or int(token) > MAX_INTEGER:
            self.refuse("a number is too large", expected=f"numbers up to {MAX_INTEGER}")
        self.position += 1
        return int(token)

    def call(self, depth: int) -> int | _Call:
        """A call; of numbers alone it is computed at once."""
        start = self.position
        function = self.ahead
        if depth > MAX_NESTING:
            self.refuse("calls are nested too deeply", f"at most {MAX_NESTING} calls within each other")
        self.position += 1
        if not self.take("("):
            self.position = start
            self.refuse(f"{function} is a function and can't be a symbol", f"{function}(…, …)")
        left = self.sum(depth)
        self.expect(",", "+, -, *, ^ or a comma")
        place = self.position
        right = self.sum(depth)
        self.expect(")", "+, -, *, ^ or )")
        if right == 0 and function in ("floordiv", "mod"):
            self.position = place
            self.refuse("the divisor is 0", "a divisor other than 0")
        if isinstance(left, int) and isinstance(right, int):
            return _apply(function, left, right)
        return _Call(function, left, right)
