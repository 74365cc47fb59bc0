"""Objax: collections of variables, whose kinds and sharing are kept, and modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from obmlite.frameworks._calls import ModuleCall, method_of, module_call
from obmlite.frameworks._static import making
from obmlite.tree import Registration

_KINDS = ("TrainVar", "TrainRef", "RandomState", "StateVar")


class _Objax:
    def of_class(self, cls: type) -> Registration | None:
        import objax

        if issubclass(cls, objax.VarCollection):
            return Registration(cls, "objax.VarCollection", _collection_out, _collection_in, _fill)
        return None

    def of_name(self, name: str) -> Registration | None:
        if name != "objax.VarCollection":
            return None
        import objax

        return self.of_class(objax.VarCollection)


ADAPTER = _Objax()


def _collection_out(collection: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values by name; ``variables`` has kind, reduction and referent of each distinct one, ``names`` whose is whose."""
    from objax.variable import TrainRef, reduce_mean

    distinct: dict[int, int] = {}
    variables: list[Any] = []

    def number(variable: Any) -> int:
        if id(variable) not in distinct:
            referent = number(variable.ref) if isinstance(variable, TrainRef) else None
            # Other reductions are functions of the user's, which a package does not hold.
            reduction = "mean" if getattr(variable, "_reduce", None) is reduce_mean else None
            distinct[id(variable)] = len(variables)
            variables.append((_kind(variable), reduction, referent))
        return distinct[id(variable)]

    names = [number(variable) for variable in collection.values()]
    return {name: variable.value for name, variable in collection.items()}, {"variables": variables, "names": names}


def _kind(variable: Any) -> str:
    import objax

    return next((kind for kind in _KINDS if isinstance(variable, getattr(objax, kind))), "StateVar")


def _collection_in(static: Any, values: Any) -> Any:
    import objax

    with making("VarCollection"):
        variables, numbers = static["variables"], static["names"]
        made: dict[int, Any] = {}
        for value, number in zip(values.values(), numbers, strict=True):
            _make(number, value, variables, made)
        return objax.VarCollection({name: made[n] for name, n in zip(values, numbers, strict=True)})


def _make(number: int, value: Any, variables: Sequence[Any], made: dict[int, Any]) -> Any:
    import objax
    from objax.variable import reduce_mean

    if number in made:
        return made[number]
    kind, reduction, referent = variables[number]
    reduce = reduce_mean if reduction == "mean" else None
    if kind == "TrainRef":
        if variables[referent][0] == "TrainRef":
            raise ValueError("a reference to a reference")
        variable = objax.TrainRef(_make(referent, value, variables, made))
    elif kind == "RandomState":
        variable = objax.RandomState(0)
        variable.value = value
    else:
        variable = (objax.TrainVar if kind == "TrainVar" else objax.StateVar)(value, reduce)
    made[number] = variable
    return variable


def _fill(collection: Any, leaves: Sequence[Any]) -> Any:
    values, static = _collection_out(collection)
    return _collection_in(static, dict(zip(values, leaves, strict=True)))


@contextlib.contextmanager
def _values(variables: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Variables with other values meanwhile."""
    before = variables.tensors()
    try:
        for name, variable in variables.items():
            variable.assign(values[name].value, check=False)
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value, check=False)


def call(module: Any, args: Sequence[Any], keywords: Mapping[str, Any], *, mutable: bool) -> ModuleCall:
    """``module(*args, **keywords)``; with the new values of its variables if ``mutable``.

    Raises:
      ArgumentError: it is no module, or cannot be called.
    """
    method_of(module, "vars", "an Objax module")
    method_of(module, "__call__", "an Objax module")
    variables = module.vars()

    def apply(variables_: Any, *args: Any, **keywords: Any) -> Any:
        with _values(variables, variables_):
            result = module(*args, **keywords)
            return (result, {name: v.value for name, v in variables.items()}) if mutable else result

    return module_call(apply, {"variables": variables}, args, keywords, module)
