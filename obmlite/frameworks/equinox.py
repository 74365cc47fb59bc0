"""Equinox: a module's arrays are kept, its static parts come from the module that is at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from obmlite.frameworks._calls import ModuleCall, method_of, module_call
from obmlite.tree import Registration


class _Equinox:
    def of_class(self, cls: type) -> Registration | None:
        import equinox

        name = f"{cls.__module__}.{cls.__qualname__}"
        if issubclass(cls, equinox.Module):
            return Registration(cls, name, _module_out, fill=_fill)
        if cls is equinox.nn.State:
            return Registration(cls, "equinox.nn.State", _state_out)
        return None

    def of_name(self, name: str) -> Registration | None:  # noqa: ARG002 - every adapter has it
        return None  # a module's class is the user's: it comes back as a dict, or into a template


ADAPTER = _Equinox()


def _is_array(leaf: Any) -> bool:
    """As ``equinox.is_array``, and for the specs and lazy leaves that may stand for arrays."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type)


def _module_out(module: Any) -> tuple[dict[str, Any], None]:
    """Fields with arrays; what else is in them becomes None."""
    arrays = jax.tree.map(lambda leaf: leaf if _is_array(leaf) else None, module)
    pairs, _ = jax.tree_util.tree_flatten_with_path(arrays, is_leaf=lambda part: part is not arrays)
    return {path[0].name: child for path, child in pairs if jax.tree.leaves(child)}, None


def _fill(module: Any, leaves: Sequence[Any]) -> Any:
    rest = iter(leaves)
    return jax.tree.map(lambda leaf: next(rest) if _is_array(leaf) else leaf, module)


def _state_out(state: Any) -> tuple[dict[str, Any], None]:
    pairs, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda part: part is not state)
    markers = treedef.node_data()[1]
    return {str(marker): value for marker, (_, value) in zip(markers, pairs, strict=True)}, None


def call(module: Any, args: Sequence[Any], keywords: Mapping[str, Any], *, state: Any, mutable: bool) -> ModuleCall:
    """``module(*args, [state,] **keywords)``; the new state is kept if ``mutable``.

    Raises:
      ArgumentError: it is no module, or cannot be called.
    """
    method_of(module, "__call__", "an Equinox module")
    weights = {"module": module, **({} if state is None else {"state": state})}

    def apply(*given: Any, **keywords: Any) -> Any:
        (own, *states), rest = given[: len(weights)], given[len(weights) :]
        result = own(*rest, *states, **keywords)
        return result[0] if states and not mutable else result

    return module_call(apply, weights, args, keywords, module)
