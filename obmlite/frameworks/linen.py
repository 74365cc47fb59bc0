"""Flax Linen: ``FrozenDict``, boxes that hold a leaf's axes, and modules."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from obmlite.frameworks._calls import ModuleCall, method_of, module_call
from obmlite.frameworks._static import making
from obmlite.tree import Registration

_BOXES = ("Partitioned", "LogicallyPartitioned")


class _Linen:
    def of_class(self, cls: type) -> Registration | None:
        import flax.core

        if cls is flax.core.FrozenDict:
            return Registration(cls, "flax.core.FrozenDict", _frozen_dict_out, _frozen_dict_in)
        from flax import linen

        name = next((n for n in _BOXES if cls is getattr(linen, n)), None)
        if name is None:
            return None
        return Registration(
            cls, f"flax.linen.{name}", _box_out, lambda static, children: _box_in(cls, static, children)
        )

    def of_name(self, name: str) -> Registration | None:
        if name == "flax.core.FrozenDict":
            import flax.core

            return self.of_class(flax.core.FrozenDict)
        if name in [f"flax.linen.{box}" for box in _BOXES]:
            from flax import linen

            return self.of_class(getattr(linen, name.rpartition(".")[2]))
        return None


ADAPTER = _Linen()


def _frozen_dict_out(value: Any) -> tuple[dict[Any, Any], None]:
    # In JAX's order, and with the plain dicts inside that the class has, and not those that it shows.
    return {key.key: child for key, child in value.tree_flatten_with_keys()[0]}, None


def _frozen_dict_in(_: Any, children: Any) -> Any:
    import flax.core

    with making("FrozenDict"):
        return flax.core.freeze(children)


def _box_out(box: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The mesh of a box is this process' and stays here; its axes' names are kept."""
    static: dict[str, Any] = {"names": box.names}
    if getattr(box, "rules", None) is not None:
        static["rules"] = box.rules
    return {"value": box.value}, static


def _box_in(cls: Any, static: Any, children: Any) -> Any:
    with making(f"{cls.__name__} box"):
        names, rules = static["names"], static.get("rules")
        return cls(children["value"], names, **({} if rules is None else {"rules": rules}))


def call(
    module: Any,
    variables: Any,
    args: Sequence[Any],
    keywords: Mapping[str, Any],
    *,
    method: Any,
    mutable: Any,
) -> ModuleCall:
    """``module.apply(variables, *args, method=…, mutable=…, **keywords)``.

    Raises:
      ArgumentError: it is no module, or has no such method.
    """
    method_of(module, "apply", "a Flax Linen module")

    def apply(variables: Any, *args: Any, **keywords: Any) -> Any:
        return module.apply(variables, *args, method=method, mutable=mutable, **keywords)

    called = (
        functools.partial(method, module)
        if callable(method)
        else method_of(module, method or "__call__", "a Flax Linen module")
    )
    name = getattr(method, "__name__", "apply") if callable(method) else method or "apply"
    name = "apply" if name == "<lambda>" else name
    return module_call(apply, {"variables": variables}, args, keywords, called, name)
