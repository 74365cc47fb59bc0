"""Haiku: its immutable dicts, its states, and transformed functions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from obmlite.errors import ExportError
from obmlite.frameworks._calls import ModuleCall, method_of, module_call
from obmlite.frameworks._static import making
from obmlite.tree import Registration


class _Haiku:
    def of_class(self, cls: type) -> Registration | None:
        import haiku

        if cls is type(haiku.data_structures.to_immutable_dict({})):
            # Packages hold the name under which Haiku's users know it.
            return Registration(cls, "haiku.FlatMapping", _mapping_out, _mapping_in)
        return Registration(cls, "haiku.LSTMState") if cls is haiku.LSTMState else None

    def of_name(self, name: str) -> Registration | None:
        if name not in ("haiku.FlatMapping", "haiku.LSTMState"):
            return None
        import haiku

        if name == "haiku.LSTMState":
            return self.of_class(haiku.LSTMState)
        return self.of_class(type(haiku.data_structures.to_immutable_dict({})))


ADAPTER = _Haiku()


def _mapping_out(mapping: Any) -> tuple[dict[Any, Any], None]:
    return {key: mapping[key] for key in sorted(mapping)}, None  # as JAX orders them


def _mapping_in(_: Any, children: Any) -> Any:
    import haiku

    with making("FlatMapping"):
        return haiku.data_structures.to_immutable_dict(children)


def call(
    transformed: Any,
    params: Any,
    args: Sequence[Any],
    keywords: Mapping[str, Any],
    *,
    state: Any,
    rng: Any,
    mutable: bool,
) -> ModuleCall:
    """``transformed.apply(params, [state,] [rng,] *args, **keywords)``; the new state is kept if ``mutable``.

    Raises:
      ArgumentError: it is no transformed function.
      ExportError: a state is given to a function that has none, or the other way round; or it takes no ``rng``.
    """
    import haiku

    method_of(transformed, "apply", "what hk.transform or hk.transform_with_state returned,")
    with_state = isinstance(transformed, haiku.TransformedWithState)
    if with_state == (state is None):
        raise ExportError(
            "The transformed function and its state do not fit each other.",
            field="state",
            expected="state= for what hk.transform_with_state made" if with_state else "no state= for hk.transform",
            found=type(transformed).__qualname__,
        )
    takes_rng = "rng" in inspect.signature(transformed.apply).parameters
    if rng is not None and not takes_rng:
        raise ExportError("The transformed function takes no rng.", field="rng", fix="leave it out")
    weights = {"params": params, **({"state": state} if with_state else {})}

    def apply(*given: Any, rng: Any = None, **keywords: Any) -> Any:
        own, rest = given[: len(weights)], given[len(weights) :]
        result = transformed.apply(*own, *([rng] if takes_rng else []), *rest, **keywords)
        return result if mutable or not with_state else result[0]

    if rng is not None:
        keywords = {**keywords, "rng": rng}
    return module_call(apply, weights, args, keywords)
