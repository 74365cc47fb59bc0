"""A jaxpr whose sizes are open, of jaxprs at several sizes.

Replay traces at sizes that are known. A graph for any batch is made of a few such traces: they differ in numbers among
the operations' parameters and literals alone. Each of these is ``constant + Σ factor × symbol``, found from a first
trace and one more for each symbol, and compared with a last one. What differs otherwise is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.extend import core

from obmlite.errors import ExportError

__all__ = ["MAX_SYMBOLS", "Fitted", "Linear", "generalise", "inlined", "run", "sizes"]

Revise = Callable[[Any, list[Any], dict[str, Any]], Any]
"""(primitive, operands, parameters) → results, or None for the primitive's own."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """A number that depends on sizes: ``constant + Σ factors[symbol] × symbol``."""

    constant: int
    factors: tuple[tuple[str, int], ...]

    def at(self, dimensions: Mapping[str, Any]) -> Any:
        """The number, for symbols that are numbers or JAX's symbolic dimensions."""
        return sum((factor * dimensions[symbol] for symbol, factor in self.factors), self.constant)


def sizes(symbols: Sequence[str]) -> list[dict[str, int]]:
    """The sizes to trace at: a first, one with each symbol changed, and one with all changed, to compare with.

    They are odd and even and leave other remainders, so that what rounds or divides does not pass for linear.
    """
    start = {symbol: _STARTS[n] for n, symbol in enumerate(symbols)}
    changed = [{**start, symbol: size + 3} for symbol, size in start.items()]
    return [start, *changed, {symbol: size + 7 + n for n, (symbol, size) in enumerate(start.items())}]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """An operation at any size.

    Attributes:
      params: its parameters, with :class:`Linear` for numbers that depend on sizes.
      literals: for each operand the same, if it is a literal that does.
    """

    params: Mapping[str, Any]
    literals: tuple[Linear | None, ...]


_STARTS = (11, 23, 41, 59, 83, 101)

MAX_SYMBOLS = len(_STARTS)


def generalise(traces: Sequence[Any], values: Sequence[Mapping[str, int]]) -> list[Fitted]:
    """The operations of a jaxpr at any size.

    Args:
      traces: closed jaxprs without calls, at the sizes of :func:`sizes`.
      values: those sizes.

    Raises:
      ExportError: the traces differ in more than numbers that depend linearly on sizes.
    """
    first = traces[0]
    for other in traces[1:]:
        if len(other.jaxpr.eqns) != len(first.jaxpr.eqns) or len(other.consts) != len(first.consts):
            raise _differs("how many operations there are")
        if not all(map(_same, first.consts, other.consts)):
            raise _differs("a constant array")
    numbered = [{variable: n for n, variable in enumerate(_variables(trace.jaxpr))} for trace in traces]
    fitted = []
    for eqns in zip(*(trace.jaxpr.eqns for trace in traces), strict=True):
        name = str(eqns[0].primitive)
        if any(eqn.primitive is not eqns[0].primitive for eqn in eqns):
            raise _differs(name)
        operands = zip(*(eqn.invars for eqn in eqns), strict=True)
        params = {key: _fit([eqn.params[key] for eqn in eqns], values, f"{name}, {key}") for key in eqns[0].params}
        fitted.append(Fitted(params, tuple(_literal(own, numbered, values, name) for own in operands)))
    return fitted


def _literal(
    operands: Sequence[Any], numbered: Sequence[Mapping[Any, int]], values: Sequence[Mapping[str, int]], name: str
) -> Linear | None:
    """An operand that is a literal and depends on sizes; None for every other."""
    literal = isinstance(operands[0], core.Literal)
    if any(isinstance(operand, core.Literal) != literal for operand in operands):
        raise _differs(f"an operand of {name}")
    if not literal:
        if len({own[operand] for own, operand in zip(numbered, operands, strict=True)}) > 1:
            raise _differs(f"an operand of {name}")
        return None
    found = [operand.val for operand in operands]
    if all(_same(value, found[0]) for value in found):
        return None
    if any(np.ndim(value) or not np.isfinite(value) or value != int(value) for value in found):
        raise _differs(f"an operand of {name}")
    return cast("Linear", _fit([int(value) for value in found], values, f"an operand of {name}"))


def _same(one: Any, other: Any) -> bool:
    """Whether two arrays are the same bits."""
    if one is other:
        return True
    one, other = np.asarray(one), np.asarray(other)
    return (one.shape, one.dtype) == (other.shape, other.dtype) and one.tobytes() == other.tobytes()


def _variables(jaxpr: Any) -> list[Any]:
    return [*jaxpr.constvars, *jaxpr.invars, *(variable for eqn in jaxpr.eqns for variable in eqn.outvars)]


def _fit(found: Sequence[Any], values: Sequence[Mapping[str, int]], where: str) -> Any:
    first = found[0]
    if type(first) is int and all(type(value) is int for value in found):
        if all(value == first for value in found):
            return first
        factors = []
        for (symbol, size), changed, value in zip(values[0].items(), values[1:], found[1:], strict=False):
            factor, rest = divmod(value - first, changed[symbol] - size)
            if rest:
                raise _differs(where)
            factors.append((symbol, factor))
        linear = Linear(first - sum(f * values[0][s] for s, f in factors), tuple((s, f) for s, f in factors if f))
        if linear.at(values[-1]) != found[-1]:
            raise _differs(where)
        return linear
    if isinstance(first, (tuple, list)):
        if any(len(value) != len(first) for value in found):
            raise _differs(where)
        items = [_fit(item, values, where) for item in zip(*found, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if any(isinstance(value, (core.ClosedJaxpr, core.Jaxpr)) for value in found):
        if any(str(value) != str(first) for value in found):
            raise _differs(f"the body of {where.partition(',')[0]}")
        return first
    if isinstance(first, np.ndarray):
        if not all(np.array_equal(first, value) for value in found):
            raise _differs(where)
        return first
    if not callable(first) and any(value != first for value in found):
        raise _differs(where)
    return first


def _differs(what: str) -> ExportError:
    return ExportError(
        "The graph depends on sizes that are open in another way than linearly.",
        field="shape",
        found=what,
        fix="give arguments of known sizes",
    )


# --- running a jaxpr operation by operation


def run(
    closed: Any,
    arguments: Sequence[Any],
    *,
    fitted: Sequence[Fitted] | None = None,
    dimensions: Mapping[str, Any] | None = None,
    revise: Revise | None = None,
) -> list[Any]:
    """Runs a jaxpr, calls within it inlined.

    Args:
      closed: the jaxpr.
      arguments: one for each of its variables.
      fitted: of :func:`generalise`, for sizes other than the jaxpr's.
      dimensions: symbol → number or JAX's symbolic dimension, for these.
      revise: what else to do in place of an operation.
    """
    values: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(closed.jaxpr.invars, arguments, strict=True))
    for n, eqn in enumerate(closed.jaxpr.eqns):
        given = [v.val if isinstance(v, core.Literal) else values[v] for v in eqn.invars]
        own = dict(eqn.params)
        if fitted is not None:
            own = {key: _at(value, dimensions or {}) for key, value in fitted[n].params.items()}
            for m, linear in enumerate(fitted[n].literals):
                if linear is not None:
                    given[m] = jax.numpy.asarray(linear.at(dimensions or {})).astype(eqn.invars[m].aval.dtype)
        if eqn.primitive.name in _CALLS:
            results: Any = run(own[_CALLS[eqn.primitive.name]], given, revise=revise)
        else:
            results = revise(eqn.primitive, given, own) if revise is not None else None
            if results is None:
                results = eqn.primitive.bind(*given, **own)
        values.update(zip(eqn.outvars, results if eqn.primitive.multiple_results else [results], strict=True))
    return [v.val if isinstance(v, core.Literal) else values[v] for v in closed.jaxpr.outvars]


_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}
"""Calls and what is called, by name, as JAX 0.9 to 0.12 has them. Derivatives are nothing to a converter."""


def inlined(closed: Any) -> Any:
    """The same jaxpr without calls."""
    return jax.make_jaxpr(lambda *given: tuple(run(closed, given)))(*closed.in_avals)


def _at(value: Any, dimensions: Mapping[str, Any]) -> Any:
    if isinstance(value, Linear):
        return value.at(dimensions)
    if isinstance(value, (tuple, list)):
        items = [_at(item, dimensions) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
