"""Weights bound to arguments: whether they fit, and their arrays, which all pipelines over them share."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from obmlite.errors import ArgumentError
from obmlite.schema.records import Binding
from obmlite.signature import Signature

if TYPE_CHECKING:
    from obmlite.weights import Weights


class _Held:
    """The arrays of one weights object: subtree → leaves."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.leaves: dict[str, list[Any]] = {}


_HELD: weakref.WeakKeyDictionary[Weights, _Held] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def held_leaves(weights: Weights, binding: Binding) -> list[Any]:
    """The leaves of weights as arrays, restored once; functions and pipelines over one weights object share them."""
    with _LOCK:
        held = _HELD.setdefault(weights, _Held())
    with held.lock:
        if binding.subtree not in held.leaves:
            held.leaves[binding.subtree] = subtree(weights, binding).restore_leaves()
        return held.leaves[binding.subtree]


def subtree(weights: Weights, binding: Binding) -> Weights:
    """What of a weights object a binding takes."""
    return weights.at(binding.subtree) if binding.subtree else weights


def check_binding(signature: Signature, argument: str, weights: Weights) -> None:
    """Compares the leaves of weights with those of the argument that they are bound to.

    Raises:
      ArgumentError: they differ.
    """
    if argument not in signature.arguments:
        raise ArgumentError(
            "Weights are bound to an argument that the function does not have.",
            leaf=argument,
            expected=", ".join(signature.arguments),
        )
    tree, specs = signature.argument(argument)
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
