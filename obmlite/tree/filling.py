"""Other leaves for a pytree that is at hand, in its own containers, whatever their classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from obmlite.tree import nodes
from obmlite.tree.flattening import flatten


def filler(
    value: Any, leaves: Sequence[Any], otherwise: Callable[[Sequence[Any]], Any]
) -> Callable[[Sequence[Any]], Any]:
    """What puts other leaves into a pytree's containers.

    JAX has the classes at hand, so it rebuilds what it takes apart as :func:`flatten` does; a framework's own classes
    among them are filled by their adapter.

    Args:
      value: the pytree.
      leaves: its leaves, as :func:`flatten` has them.
      otherwise: does it where neither is possible.

    Returns:
      A function from as many leaves.
    """
    parts, treedef = jax.tree.flatten(value, is_leaf=lambda part: nodes.is_foreign(type(part)))
    owned = [flatten(part)[0] if nodes.is_foreign(type(part)) else [part] for part in parts]
    found = [leaf for own in owned for leaf in own]
    if len(found) != len(leaves) or any(a is not b for a, b in zip(found, leaves, strict=True)):
        return otherwise

    def fill(others: Sequence[Any]) -> Any:
        rest = iter(others)
        filled = []
        for part, own in zip(parts, owned, strict=True):
            values = [next(rest) for _ in own]
            entry = nodes.of_class(type(part))
            filled.append(entry.fill(part, values) if entry is not None and entry.fill is not None else values[0])
        return jax.tree.unflatten(treedef, filled)

    return fill


def plain(value: Any) -> Any:
    """A pytree with dicts and tuples in place of all classes that are registered, and with all of its leaves."""
    leaves, tree = flatten(value)
    return dataclasses.replace(tree, classes={}).unflatten(leaves)
