"""Arrays that a function closed over, taken out of its jaxpr and made arguments of it.

What a function closes over are constants of the jaxpr that tracing it gives; those of loops, branches and custom
derivatives all surface at the top level, and only the body of a nested ``jit`` keeps its own, which are lifted here. As
arguments they cost neither time nor a copy, and gradients with respect to them are right. (What is inside a nested jit
inside a loop or branch stays, and is found in the StableHLO module by :mod:`obmlite._hoisting`.)

Uses what jaxprs show of themselves: ``eqns``, ``invars``, ``constvars``, ``consts``, ``params``, ``ctx`` and
``get_bind_params``; seen alike in JAX 0.9.2, 0.10.2 and 0.12.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

FlatFunction = Callable[..., "tuple[Any, ...]"]


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced function.

    Attributes:
      call: the function over its flat arguments followed by :attr:`captures`.
      captures: arrays of more than the limit that it closed over, each once.
      donated: numbers of the flat arguments that a ``jit`` of the user's, around all of it, donates.
    """

    call: FlatFunction
    captures: tuple[Any, ...]
    donated: tuple[int, ...]


def lift(closed: Any, limit: int) -> Traced:
    """Makes arguments of the arrays that a traced function closed over.

    Args:
      closed: the closed jaxpr of the function.
      limit: bytes up to which an array may stay.
    """
    captures: dict[int, Any] = {}
    _collect(closed, limit, captures)
    values = tuple(captures.values())
    places = {key: n for n, key in enumerate(captures)}
    count = len(_open(closed).invars)

    def call(*arguments: Any) -> tuple[Any, ...]:
        lifted = {key: arguments[count + n] for key, n in places.items()}
        return tuple(_evaluate(closed, lifted, arguments[:count]))

    return Traced(call, values, _donated(closed))


def _open(closed: Any) -> Any:
    return getattr(closed, "jaxpr", closed)  # from JAX 0.11 on they are one


def _large(value: Any, limit: int) -> bool:
    if jax.dtypes.issubdtype(getattr(value, "dtype", None), jax.dtypes.extended):
        return bool(jax.random.key_data(value).nbytes > limit)
    return getattr(value, "nbytes", 0) > limit


def _is_jit(eqn: Any) -> bool:
    return eqn.primitive.name in ("jit", "pjit") and "jaxpr" in eqn.params


def _collect(closed: Any, limit: int, captures: dict[int, Any]) -> bool:
    """Collects the large constants by identity; whether there were any."""
    found = False
    for value in closed.consts:
        if _large(value, limit):
            captures.setdefault(id(value), value)
            found = True
    for eqn in _open(closed).eqns:
        if _is_jit(eqn) and _collect(eqn.params["jaxpr"], limit, captures):
            found = True
    return found


def _has(closed: Any, lifted: dict[int, Any]) -> bool:
    return any(id(value) in lifted for value in closed.consts) or any(
        _has(eqn.params["jaxpr"], lifted) for eqn in _open(closed).eqns if _is_jit(eqn)
    )


def _evaluate(closed: Any, lifted: dict[int, Any], arguments: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr with other values in place of some of its constants."""
    jaxpr = _open(closed)
    consts = [lifted.get(id(value), value) for value in closed.consts]
    if not any(_is_jit(eqn) and _has(eqn.params["jaxpr"], lifted) for eqn in jaxpr.eqns):
        return list(jax.core.eval_jaxpr(jaxpr, consts, *arguments))
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        inner = eqn.params.get("jaxpr")
        if _is_jit(eqn) and _has(inner, lifted):
            results = _call_inner(inner, eqn.params["name"], lifted, inputs)
        else:
            with eqn.ctx.manager:
                results = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            if not eqn.primitive.multiple_results:
                results = [results]
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _call_inner(inner: Any, name: str, lifted: dict[int, Any], inputs: Sequence[Any]) -> Sequence[Any]:
    """A nested jit, called with what it closed over as arguments; it stays a function of its own in the module."""
    keys = list(lifted)

    def call(captures: Sequence[Any], *arguments: Any) -> list[Any]:
        return _evaluate(inner, dict(zip(keys, captures, strict=True)), arguments)

    call.__name__ = name
    results: Sequence[Any] = jax.jit(call)([lifted[key] for key in keys], *inputs)
    return results


def _donated(closed: Any) -> tuple[int, ...]:
    """Which of the function's own arguments a jit that makes up all of it donates."""
    jaxpr = _open(closed)
    places = {variable: n for n, variable in enumerate(jaxpr.invars)}
    donated = [
        places[variable]
        for eqn in jaxpr.eqns
        if _is_jit(eqn)
        for variable, gone in zip(eqn.invars, eqn.params.get("donated_invars", ()), strict=False)
        if gone and not hasattr(variable, "val") and variable in places
    ]
    return tuple(sorted(set(donated)))
