"""Objax' variables as leaves, and names and values → a ``VarCollection``. Objax is imported where it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from obmlite import tree as trees
from obmlite.interop.safejax._names import TYPES, typed

_COLLECTION = "objax.VarCollection"


def imported() -> Any:
    """Objax.

    Raises:
      ImportError: it is not installed, or not for this JAX.
    """
    try:
        import objax
    except (ImportError, AttributeError) as error:  # the latter where JAX no longer has what Objax uses
        raise ImportError("This needs Objax, and a JAX before 0.10: pip install 'obmlite[objax]'") from error
    return objax


def _objax() -> Any:
    """Objax' module of variables if something has imported it, as whoever has a variable must have."""
    return sys.modules.get("objax.variable")


def _is_variable(value: Any) -> bool:
    objax = _objax()
    return objax is not None and isinstance(value, objax.BaseVar)


def _type(variable: Any) -> str:
    """A variable's type, or of a class of the user's the nearest that Objax has."""
    return next(cls.__name__ for cls in type(variable).__mro__ if cls.__name__ in TYPES)


def collected(params: Any) -> Any:
    """A ``VarCollection`` in place of a dict of variables, which safejax took for one."""
    if type(params) is dict and params and all(_is_variable(value) for value in params.values()):
        return _objax().VarCollection(params)
    return params


def is_collection(tree: trees.Tree) -> bool:
    """Whether a tree is a ``VarCollection`` of arrays."""
    return tree.classes.get(0) == _COLLECTION and tree.num_leaves == len(tree) - 1


def types(leaves: Sequence[Any], tree: trees.Tree) -> list[str | None]:
    """For each leaf the type of the variable that it is, or that a ``VarCollection`` had it in; None for others."""
    found = [_type(leaf) if _is_variable(leaf) else None for leaf in leaves]
    for node, name in tree.classes.items():
        if name == _COLLECTION:
            static = tree.static[node]
            for child, number in zip(tree.children(node), static["names"], strict=True):
                for leaf in range(tree.first_leaf[child], tree.first_leaf[tree.ends[child]]):
                    found[leaf] = static["variables"][number][0]
    return found


def values(leaves: Sequence[Any]) -> list[Any]:
    """Leaves with the values of variables in their place."""
    return [leaf.value if _is_variable(leaf) else leaf for leaf in leaves]


def collection(arrays: Mapping[str, Any]) -> Any:
    """Variables of the types that names tell; None if a name tells none."""
    found = typed(arrays)
    if any(kind is None for kind, _ in found.values()):
        return None
    objax = imported()
    return objax.VarCollection({name: _variable(objax, kind or "", value) for name, (kind, value) in found.items()})


def _variable(objax: Any, kind: str, value: Any) -> Any:
    if kind == "RandomState":
        state = objax.RandomState(0)
        state.value = value
        return state
    if kind == "TrainRef":  # whose referent no name tells
        return objax.TrainRef(objax.TrainVar(value))
    return objax.TrainVar(value) if kind == "TrainVar" else objax.StateVar(value)
