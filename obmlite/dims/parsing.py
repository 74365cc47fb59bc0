"""Reading dimensions, shapes and constraints from text, within limits."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NoReturn

from obmlite import errors
from obmlite.dims.constraints import Constraint
from obmlite.dims.expressions import (
    MAX_EXPONENT,
    MAX_INTEGER,
    Call,
    Expression,
    Factor,
    Factors,
    apply_call,
    factor_text,
    parts_of,
    product_of,
    shorten,
    sum_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable


MAX_TEXT = (
    16384  # characters; a deep network's printed output dimension has hundreds, and reading stays in milliseconds
)


MAX_TOKENS = 4096  # numbers, names and signs in one text, for the same reason where they are one character each


MAX_NESTING = 32  # calls within calls: JAX prints about one per strided layer, and each costs us four Python frames


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
        right = parser.collect([*parts_of(right), (-1 if relation == "<" else 1, ())], place)
        relation += "="
    constraint = Constraint(left, relation, right)
    parser.limit(constraint.text)
    return constraint


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
            found=f"{shorten(self.text, span)} (column {span[0] + 1})",
            fix=fix,
        )

    def limit(self, text: str, start: int = 0) -> None:
        """Refuses a canonical text that this parser would not read back."""
        long = len(text) > MAX_TEXT
        if long or (len(text) > MAX_TOKENS and sum(1 for _ in _TOKEN.finditer(text)) > MAX_TOKENS):
            limit = f"at most {MAX_TEXT} characters" if long else f"at most {MAX_TOKENS} numbers, names and signs"
            self._fail("written out in full the text is too long", limit, self.tokens[start][1:])

    def collect(self, parts: Iterable[tuple[int, Factors]], start: int) -> int | Expression:
        """Makes the sum's normal form, within the limits."""
        try:
            dimension = sum_of(parts)
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

    def term(self, negative: bool, depth: int) -> tuple[int, Factors]:
        """``factor ["^" integer] {"*" factor ["^" integer]}``; a power is of the factor with its sign, as in JAX."""
        start = self.position
        numbers: list[tuple[int, int]] = []
        powers: dict[str, tuple[Factor, int]] = {}
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
                text = factor_text(factor)
                exponent += powers.get(text, (factor, 0))[1]
                powers[text] = (factor, exponent)
            if exponent > MAX_EXPONENT:
                self.position = place
                self.refuse("an exponent is too large", f"exponents up to {MAX_EXPONENT}")
            if not self.take("*"):
                break
        try:
            coefficient = product_of(numbers)
        except OverflowError:
            self.position = start
            self.refuse("a number is too large", f"numbers up to {MAX_INTEGER}")
        ordered = sorted(powers.items(), key=lambda item: (isinstance(item[1][0], Call), item[0]))
        return (-coefficient if negative else coefficient), tuple(power for _, power in ordered if power[1])

    def factor(self, depth: int) -> int | Factor:
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

    def call(self, depth: int) -> int | Call:
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
            return apply_call(function, left, right)
        return Call(function, left, right)
