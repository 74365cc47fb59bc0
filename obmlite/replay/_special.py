"""Special functions that JAX wrote into a module as their many operations, and the derivatives that they have in JAX.

The derivative of the operations is not always the function's: where a branch that is not taken is infinite, reverse
mode multiplies it by 0 (``logistic`` below -88, ``erfc`` at 0, ``erf_inv`` everywhere), and what is looked up in tables
has none (``lgamma``). So values stay what the operations give, and derivatives are those of the function.

A function is recognised for sure or not at all: by a digest of all of its operations and constants, whatever the shape.
:data:`FORMS` has those of JAX 0.9.2, 0.10.2 and 0.12; ``python -m tests.replay.special`` prints those of another.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from obmlite.replay._program import Function, Operation, Program
from obmlite.replay._table import RULES

__all__ = ["FORMS", "FUNCTIONS", "Form", "Special", "Specials", "derived", "forms", "look"]

FUNCTIONS = ("asin", "bessel_i0e", "bessel_i1e", "digamma", "erf_inv", "erfc", "lgamma", "logistic")
"""Functions of ``jax.lax`` that some JAX writes as several operations."""


class Special(NamedTuple):
    """A value that is a special function of another.

    Attributes:
      function: its name in ``jax.lax``.
      argument: the value that it is a function of.
      operations: those that compute it, in order; the last one gives the value.
    """

    function: str
    argument: int
    operations: tuple[Operation, ...]


class Form(NamedTuple):
    """How a function is written: its last operation, how many there are, and a digest of them all."""

    last: str
    operations: int
    digest: str


FORMS: Mapping[Form, str] = {
    Form("atan2(_, sqrt)", 5, "11c65aac671719cc"): "asin",  # bfloat16
    Form("atan2(_, sqrt)", 5, "775ba2f7dc99afe3"): "asin",  # float16
    Form("atan2(_, sqrt)", 5, "840a4216cef5c863"): "asin",  # float32
    Form("atan2(_, sqrt)", 5, "9cc4bec2385ec7ba"): "asin",  # float64
    Form("select(_, _, divide)", 178, "b428c0a2e6ce750b"): "bessel_i0e",  # float64
    Form("select(_, _, divide)", 88, "b83b9f68dbfea59e"): "bessel_i0e",  # float32
    Form("multiply(_, select)", 178, "25a39c144f7d49a9"): "bessel_i1e",  # float64
    Form("multiply(_, select)", 88, "67907142a5fd1525"): "bessel_i1e",  # float32
    Form("select(_, constant, select)", 76, "39eb0b4a983d8d3c"): "digamma",  # float32
    Form("select(_, constant, select)", 76, "eaf6fbd8d910d685"): "digamma",  # float64
    Form("select(_, constant, select)", 78, "89d296b6d350f702"): "digamma",  # float64
    Form("select(_, constant, select)", 78, "acbbaf77fc7b894f"): "digamma",  # float32
    Form("select(_, _, multiply)", 102, "ca2038a599c1a46a"): "erf_inv",  # float64
    Form("select(_, _, multiply)", 39, "dad61017ac1ddcfa"): "erf_inv",  # float32
    Form("select(_, _, select)", 63, "2e3d33ab96b5d91f"): "erfc",  # float32
    Form("select(_, _, select)", 94, "f0dde12e3fccbfa3"): "erfc",  # float64
    Form("func.call(_)", 1, "1328da32005b16f6"): "lgamma",  # float32
    Form("func.call(_)", 1, "7438f092fc7cc61f"): "lgamma",  # float32
    Form("select(_, constant, select)", 57, "77b4e371792838fd"): "lgamma",  # float32
    Form("select(_, constant, select)", 57, "a30035c60b37c3f6"): "lgamma",  # float64
    Form("divide(constant, add)", 4, "40a7465e249350ad"): "logistic",  # float16
    Form("divide(constant, add)", 4, "520f3144e2eb8401"): "logistic",  # float64
    Form("divide(constant, add)", 4, "b4ec4fb857a9fb6f"): "logistic",  # bfloat16
    Form("divide(constant, add)", 4, "cf3d9863f1ff0391"): "logistic",  # float32
}

_COUNTS: dict[str, set[int]] = {}
for _form in FORMS:
    _COUNTS.setdefault(_form.last, set()).add(_form.operations)

_FACTS = frozenset({"compare_type", "comparison_direction", "exponent_bits", "mantissa_bits"})
"""Attributes that tell what an elementwise operation computes."""

_SPREADS = frozenset(
    f"stablehlo.{name}" for name in ("broadcast_in_dim", "dynamic_broadcast_in_dim", "reshape", "dynamic_reshape")
)
"""What gives the elements of its first operand another shape."""

_GATHERS = frozenset({"stablehlo.gather", "stablehlo.dynamic_gather"})

_TABLE_BYTES = 1 << 12
_CALLS = 8  # within each other


class Specials(NamedTuple):
    """Those of a program.

    Attributes:
      values: by the value.
      within: what their operations give that nothing else takes.
    """

    values: Mapping[int, Special]
    within: frozenset[int]


def look(program: Program) -> Specials:
    """Values of a program that are special functions of others."""
    seen = _Seen(program)
    values = {value: found for value in program.definitions if (found := seen.special(value)) is not None}
    within: set[int] = set()
    for special in values.values():
        own: set[Operation | None] = {special.operations[-1]}
        for operation in reversed(special.operations[:-1]):
            if all(user in own for value in operation.results for user in seen.users(value)):
                own.add(operation)
                within.update(operation.results)
    return Specials(values, frozenset(within))


def forms(program: Program, value: int, argument: int) -> list[Form]:
    """The form of a value as a function of another; none if it takes others too, or is not made of known operations."""
    seen = _Seen(program)
    return [seen.form(value, inside) for cut, inside in seen.cuts(value, 1 << 16) if cut == argument]


class _Seen:
    def __init__(self, program: Program) -> None:
        self._program = program
        self._functions: dict[str, bytes | None] = {}

    @functools.cached_property
    def _users(self) -> Mapping[int, Sequence[Operation | None]]:
        users: dict[int, list[Operation | None]] = {}
        for function in self._program.functions.values():
            for value in function.body.returns:
                users.setdefault(value, []).append(None)
            for operation in function.body.walk():
                for value in operation.operands:
                    users.setdefault(value, []).append(operation)
                for value in (value for region in operation.regions for value in region.returns):
                    users.setdefault(value, []).append(None)
        return users

    def users(self, value: int) -> Sequence[Operation | None]:
        """Operations that take a value; None for a block that returns it."""
        return self._users.get(value, ())

    def special(self, value: int) -> Special | None:
        counts = _COUNTS.get(self._last(value))
        if counts is None:
            return None
        for argument, inside in self.cuts(value, max(counts)):
            if len(inside) in counts and (name := FORMS.get(self.form(value, inside))) is not None:
                return Special(name, argument, tuple(reversed(inside)))
        return None

    def form(self, value: int, inside: Sequence[Operation]) -> Form:
        (digest,) = self._digests([value], inside)
        return Form(self._last(value), len(inside), digest.hex()[:16])

    def cuts(self, value: int, most: int) -> Iterator[tuple[int, list[Operation]]]:
        """Each value of which the one given is a function, and the operations between, last first."""
        ahead, inside = {value}, list[Operation]()
        while ahead and len(inside) <= most:
            latest = max(ahead)  # values are numbered in the order of their operations
            if inside and len(ahead) == 1:
                yield latest, inside
            operation = self._program.definitions.get(latest)
            if operation is None or not self._is_known(operation):
                return
            self._pass(operation, ahead, inside)

    def _pass(self, operation: Operation, ahead: set[int], inside: list[Operation]) -> None:
        inside.append(operation)
        ahead.difference_update(operation.results)
        ahead.update(n for n in self._operands(operation) if self._constant(n) is None)

    def _last(self, value: int) -> str:
        """The name of the operation, which of its operands are constants, and what gives the last one."""
        operation = self._program.definitions[value]
        operands = self._operands(operation) if self._is_known(operation) else operation.operands
        kinds = ["constant" if self._constant(n) is not None else "_" for n in operands]
        if kinds[-1:] == ["_"] and operation.name != "func.call":  # that may be the argument
            source = self._program.definitions.get(operation.operands[-1])
            kinds[-1] = "_" if source is None else source.name.removeprefix("stablehlo.")
        return f"{operation.name.removeprefix('stablehlo.')}({', '.join(kinds)})"

    def _is_known(self, operation: Operation, depth: int = 0) -> bool:
        if operation.name == "func.call":
            return self._function(operation["callee"], depth + 1) is not None
        rule = RULES.get(operation.name)
        moves = operation.name in _SPREADS or operation.name in _GATHERS
        return moves or (rule is not None and rule.group == "elementwise")

    def _operands(self, operation: Operation) -> tuple[int, ...]:
        if operation.name == "func.call":
            return self._given(self._program.functions[operation["callee"]], operation.operands)
        if operation.name in _SPREADS:
            return operation.operands[:1]
        return operation.operands[:2] if operation.name in _GATHERS else operation.operands

    def _given(self, function: Function, values: Sequence[int]) -> tuple[int, ...]:
        """Of a function's arguments, or of what they are, those that are no dimensions of the call."""
        return tuple(value for value, name in zip(values, function.constants, strict=True) if name is None)

    def _constant(self, value: int) -> bytes | None:
        """Dtype and elements of a small constant; of a splat just one, in whatever way it is spread over a shape."""
        operation = self._program.definitions.get(value)
        while operation is not None and operation.name in _SPREADS:
            operation = self._program.definitions.get(operation.operands[0])
        if operation is None or operation.name != "stablehlo.constant" or operation["value"] is None:
            return None
        found = operation["value"]
        if found.size and not any(found.strides):
            found = found.reshape(-1)[:1]
        return f"{found.dtype} ".encode() + found.tobytes() if found.nbytes <= _TABLE_BYTES else None

    def _function(self, name: str, depth: int) -> bytes | None:
        """A digest of all that a function of the module does; None if it is not made of known operations."""
        function = self._program.functions.get(name)
        if name in self._functions or function is None or depth > _CALLS:
            return self._functions.get(name)
        self._functions[name] = None  # while it is looked at, should it call itself
        arguments = self._given(function, function.body.arguments)
        ahead, inside = {n for n in function.body.returns if self._constant(n) is None}, list[Operation]()
        while rest := ahead.difference(arguments):
            operation = self._program.definitions.get(max(rest))
            if operation is None or not self._is_known(operation, depth):
                return None
            self._pass(operation, ahead, inside)
        self._functions[name] = b"".join(self._digests(function.body.returns, inside, arguments))
        return self._functions[name]

    def _digests(
        self, values: Sequence[int], inside: Sequence[Operation], arguments: Sequence[int] = ()
    ) -> list[bytes]:
        digests = {argument: f"argument {n}".encode() for n, argument in enumerate(arguments)}

        def digest(value: int) -> bytes:
            constant = self._constant(value)
            return digests.get(value, b"argument 0") if constant is None else constant

        for operation in reversed(inside):
            if operation.name in _SPREADS:
                digests[operation.results[0]] = digest(operation.operands[0])
                continue
            parts = b"\0".join([self._facts(operation), *map(digest, self._operands(operation))])
            for n, result in enumerate(operation.results):
                digests[result] = hashlib.sha256(b"%d %b" % (n, parts)).digest()
        return [digest(value) for value in values]

    def _facts(self, operation: Operation) -> bytes:
        if operation.name == "func.call":
            return self._functions[operation["callee"]] or b""
        facts = sorted(f"{name}={operation[name]}" for name in operation.attributes if name in _FACTS)
        name = "gather" if operation.name in _GATHERS else operation.name
        return " ".join((name, str(operation.types[0].dtype), *facts)).encode()


def derived(function: str, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What computes a function of ``jax.lax`` in another way, with the function's own derivative."""
    call: Any = jax.custom_jvp(run)

    def rule(primals: Any, tangents: Any) -> Any:
        return call(*primals), jax.jvp(getattr(lax, function), primals, tangents)[1]

    call.defjvp(rule)
    wrapped: Callable[[Any], Any] = call
    return wrapped
