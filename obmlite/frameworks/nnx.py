"""Flax NNX: states as the nested dicts of arrays that they are, with the variables' kinds as static data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from obmlite.errors import LeafError
from obmlite.frameworks._calls import ModuleCall, method_of, module_call
from obmlite.frameworks._static import making
from obmlite.tree import Registration, join, key_text, pack_static

_KINDS = (
    "BatchStat", "Cache", "Intermediate", "LoRAParam", "OptArray", "OptState", "OptVariable", "Param",
    "Perturbation", "RngCount", "RngKey", "RngState", "Variable",
)  # fmt: skip

_VARIABLE = "value"
"""The key of a variable that stands alone."""


class _Nnx:
    def of_class(self, cls: type) -> Registration | None:
        from flax import nnx

        if issubclass(cls, nnx.State):
            return Registration(cls, "flax.nnx.State", _state_out, _state_in)
        if issubclass(cls, nnx.Variable):
            return Registration(cls, "flax.nnx.Variable", _variable_out, _variable_in)
        if cls is nnx.GraphDef:
            return Registration(cls, "flax.nnx.GraphDef", lambda _: ({}, None))  # it is code: nothing to keep
        if issubclass(cls, nnx.Pytree):
            # As its state, in which shared variables are there once. Only a template has the code to rebuild it with.
            return Registration(cls, "flax.nnx.State", lambda module: _state_out(nnx.state(module)), _state_in, _fill)
        return None

    def of_name(self, name: str) -> Registration | None:
        if name not in ("flax.nnx.State", "flax.nnx.Variable"):
            return None
        from flax import nnx

        return self.of_class(nnx.State if name == "flax.nnx.State" else nnx.Variable)


ADAPTER = _Nnx()


def _state_out(state: Any) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Nested dicts of arrays; ``kinds`` has each distinct kind with its metadata, ``variables`` the kind of each."""
    from flax import nnx

    arrays: dict[Any, Any] = {}
    kinds: dict[bytes, tuple[int, Any]] = {}
    kind: tuple[str | None, dict[str, Any]]
    numbers: list[int] = []
    flat: list[tuple[tuple[Any, ...], Any]] = list(nnx.to_flat_state(state))
    for path, value in flat:
        if isinstance(value, nnx.Variable):
            kind, value = _kind(value), value.get_raw_value()
            if not jax.tree_util.all_leaves([value]):
                raise LeafError(
                    "A variable holds a container.",
                    leaf=join([key_text(key) for key in path]),
                    expected="an array",
                    found=type(value).__qualname__,
                    fix="keep its parts in variables of their own",
                )
        else:
            kind = (None, {})
        numbers.append(kinds.setdefault(pack_static(kind), (len(kinds), kind))[0])
        place = arrays
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return arrays, {"kinds": [kind for _, kind in kinds.values()], "variables": numbers}


def _state_in(static: Any, arrays: Any) -> Any:
    from flax import nnx

    with making("State"):
        kinds, numbers = static["kinds"], static["variables"]
        flat = []
        for (path, value), number in zip(_leaves(arrays, ()), numbers, strict=True):
            kind, metadata = kinds[number]
            flat.append((path, _variable(kind, metadata, value)))
        return nnx.from_flat_state(flat)


def _leaves(arrays: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for key, value in arrays.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _variable_out(variable: Any) -> tuple[dict[str, Any], Any]:
    return {_VARIABLE: variable.get_raw_value()}, _kind(variable)


def _variable_in(static: Any, children: Any) -> Any:
    with making("Variable"):
        kind, metadata = static
        return _variable(kind, metadata, children[_VARIABLE])


def _kind(variable: Any) -> tuple[str, dict[str, Any]]:
    """A variable's kind and what can be kept of its metadata: no functions, no meshes."""
    from flax import nnx

    cls = type(variable)
    if any(cls is getattr(nnx, name, None) for name in _KINDS):
        name = cls.__name__
    else:
        try:
            name = nnx.variable_name_from_type(cls)  # of those that the user registered
        except ValueError:
            name = f"{cls.__module__}.{cls.__qualname__}"
    return name, {key: value for key, value in variable.get_metadata().items() if _storable(value)}


def _storable(value: Any) -> bool:
    try:
        pack_static(value)
    except LeafError:
        return False
    return True


def _variable(kind: str | None, metadata: Mapping[str, Any], value: Any) -> Any:
    from flax import nnx

    if kind is None:
        return value
    if kind in _KINDS:
        cls = getattr(nnx, kind, nnx.Variable)
    else:
        try:
            cls = nnx.variable_type_from_name(kind)
        except ValueError:  # the user's own, and not registered here
            cls = nnx.Variable
    return cls.from_metadata(value, {"hijax": False, "ref": False, **metadata})


def _fill(module: Any, leaves: Sequence[Any]) -> Any:
    from flax import nnx

    graphdef, state = nnx.split(module)
    flat = nnx.to_flat_state(state)
    filled = [(p, jax.tree.unflatten(jax.tree.structure(v), [leaf])) for (p, v), leaf in zip(flat, leaves, strict=True)]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def call(
    module: Any, args: Sequence[Any], keywords: Mapping[str, Any], *, method: str | None, mutable: bool
) -> ModuleCall:
    """``module(*args, **keywords)``, or a method of it; with the new state if ``mutable``.

    Raises:
      ArgumentError: it is no module, or has no such method.
    """
    from flax import nnx

    called = method_of(module, method or "__call__", "a Flax NNX module")
    graphdef, state = nnx.split(module)

    def apply(state: Any, *args: Any, **keywords: Any) -> Any:
        own = nnx.merge(graphdef, state)
        result = getattr(own, method or "__call__")(*args, **keywords)
        return (result, nnx.state(own)) if mutable else result

    return module_call(apply, {"state": state}, args, keywords, called, method or "apply")
