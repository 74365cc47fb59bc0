"""A framework's module as a function to be exported."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from obmlite.errors import ArgumentError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleCall:
    """What ``Model.from_function`` is to be given for a call of a module.

    Attributes:
      fn: a function of the weights and the module's own arguments, under the names that they have there.
      args: its positional arguments.
      kwargs: those given by keyword.
      static: the names of keyword arguments whose values are fixed.
      weights: the names of the arguments that are weights.
      name: of the function in a package.
    """

    fn: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    static: Sequence[str]
    weights: Sequence[str]
    name: str = "apply"


def module_call(
    fn: Callable[..., Any],
    weights: Mapping[str, Any],
    args: Sequence[Any],
    keywords: Mapping[str, Any],
    called: Callable[..., Any] | None = None,
    name: str = "apply",
) -> ModuleCall:
    r"""Describes a call of a module.

    Args:
      fn: (\*weights, \*args, \*\*keywords) → result.
      weights: name → weights.
      args: positional arguments of the module.
      keywords: keyword arguments of it. Those without arrays (``train=False``) are fixed.
      called: the method of the module that is called, bound to it, whose names for its arguments are kept.
      name: of the function.
    """

    def call(*given: Any, **flags: Any) -> Any:
        return fn(*given, **flags)

    own = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in weights]
    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    call.__signature__ = inspect.Signature([*own, *_named(called, len(args), {*weights, *keywords}), rest])  # type: ignore[attr-defined]
    call.__name__ = name
    return ModuleCall(
        fn=call,
        args=[*weights.values(), *args],
        kwargs=dict(keywords),
        static=[key for key, value in keywords.items() if not _has_arrays(value)],
        weights=tuple(weights),
        name=name,
    )


def method_of(module: Any, name: str, kind: str) -> Callable[..., Any]:
    """A method of a module, bound to it.

    Args:
      module: what the user gave as one.
      name: of the method.
      kind: of module, for people: ``"a Flax Linen module"``.

    Raises:
      ArgumentError: it has no such method, so that it is perhaps no such module.
    """
    found = getattr(module, name, None)
    if isinstance(module, type):
        raise ArgumentError(
            "A class is given where a module is wanted.", expected=kind, found=module.__qualname__, fix="make one of it"
        )
    if not callable(found):
        raise ArgumentError(
            f"A module without a method {name!r} is given.",
            expected=f"{kind} with a method {name!r}",
            found=type(module).__qualname__,
        )
    method: Callable[..., Any] = found
    return method


def _named(called: Callable[..., Any] | None, count: int, taken: set[str]) -> list[inspect.Parameter]:
    """Parameters for positional arguments, with a method's own names where it has them."""
    try:
        parameters = list(inspect.signature(called).parameters.values()) if called is not None else []
    except (TypeError, ValueError):  # some callables tell nothing of themselves
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
    if len(set(names) - taken) < count:
        return [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]
    return [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]


def _has_arrays(value: Any) -> bool:
    return any(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in jax.tree.leaves(value))
