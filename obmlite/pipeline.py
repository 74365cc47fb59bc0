"""Pipelines: a function with weights bound to its arguments, to be called with the rest."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from obmlite._calling import Call
from obmlite._once import once
from obmlite.errors import ArgumentError, context
from obmlite.schema.records import Binding

if TYPE_CHECKING:
    from obmlite.function import Function
    from obmlite.signature import Signature
    from obmlite.weights import Weights

__all__ = ["BoundPipeline", "Pipeline"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Which function of a model to run, with which of its weights.

    Attributes:
      function: name of a function of the model.
      weights: argument of the function → name of a weights object of the model. Left out, the bindings that the
        function was exported with.
      metadata: what else to keep with it.
    """

    function: str
    weights: Mapping[str, str] | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def bindings(self, function: Function) -> tuple[Binding, ...]:
        """What is bound to the function's arguments."""
        if self.weights is None:
            return function.bindings
        return tuple(Binding(argument, weights) for argument, weights in self.weights.items())


class BoundPipeline:
    """A pipeline of a model, called with the arguments that are not bound.

    Weights are restored at the first call, once, and never donated.

    Attributes:
      name: its name in the model.
      function: the function that it runs.
      bindings: which weights its arguments take.
      signature: its arguments, those that are bound left out, and its results.
      metadata: what the user attached.
    """

    def __init__(
        self,
        name: str,
        function: Function,
        bindings: Sequence[Binding],
        weights: Mapping[str, Weights],
        metadata: Mapping[str, Any],
    ) -> None:
        self.name = name
        self.function = function
        self.bindings = tuple(bindings)
        self.metadata = dict(metadata)
        self._weights = {b.argument: _subtree(weights[b.weights], b) for b in self.bindings}
        with context(object=name):
            for argument, bound in self._weights.items():
                _check_binding(function, argument, bound)
        self.signature: Signature = function.signature.without(tuple(self._weights))
        self._lock = threading.RLock()

    @once
    def _call(self) -> Call:
        weights = [w.restore_leaves() for w in self._weights.values()]
        trees = {argument: w.tree for argument, w in self._weights.items()}
        return Call(self.name, self.function, self.signature, trees, weights)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the function on the bound weights and the given arguments.

        Raises:
          ArgumentError: the arguments do not match the signature; it names the leaf, what was expected and what came.
          PlatformError: the function was not exported for the platform that it would run on.
        """
        return self._call(args, kwargs)

    def __repr__(self) -> str:
        bound = "".join(f", {b.argument} = {b.weights!r}" for b in self.bindings)
        return f"Pipeline {self.name}{self.signature}: {self.function.name}{bound}"


def _subtree(weights: Weights, binding: Binding) -> Weights:
    return weights.at(binding.subtree) if binding.subtree else weights


def _check_binding(function: Function, argument: str, weights: Weights) -> None:
    """Compares the leaves of weights with those of the argument that they are bound to.

    Raises:
      ArgumentError: they differ.
    """
    if argument not in function.signature.arguments:
        raise ArgumentError(
            "Weights are bound to an argument that the function does not have.",
            leaf=argument,
            expected=", ".join(function.signature.arguments),
        )
    tree, specs = function.signature.argument(argument)
    wanted = dict(zip(tree.names, specs, strict=True))
    found = dict(zip(weights.tree.names, weights.specs, strict=True))
    for name in [*wanted, *(n for n in found if n not in wanted)]:
        left, right = wanted.get(name), found.get(name)
        if left is None or right is None or (left.shape, left.kind) != (right.shape, right.kind):
            raise ArgumentError(
                "Weights do not fit the argument that they are bound to.",
                leaf=f"{argument}.{name}" if name else argument,
                expected=str(left or "no such leaf"),
                found=str(right or "no such leaf"),
            )
