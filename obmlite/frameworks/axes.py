"""The axes that frameworks' containers name for their leaves, as hints of where these go."""

from __future__ import annotations

from typing import Any

from obmlite.specs import Partition
from obmlite.tree import Tree

_BOXES = ("flax.linen.Partitioned", "flax.linen.LogicallyPartitioned")
_METADATA = ("out_sharding", "sharding_names", "sharding")
"""What Flax NNX has called a variable's axes, the newest first."""


def logical_axes(tree: Tree) -> dict[int, Partition]:
    """Leaf → its logical axes, for the leaves of a pytree that have any."""
    found = {}
    for node, name in tree.classes.items():
        first = tree.first_leaf[node]
        static: Any = tree.static.get(node)
        if name in _BOXES and tree.first_leaf[tree.ends[node]] == first + 1:
            found[first] = _partition(static["names"])
        elif name == "flax.nnx.Variable":
            found[first] = _partition(_names(static[1]))
        elif name == "flax.nnx.State":
            for n, number in enumerate(static["variables"]):
                found[first + n] = _partition(_names(static["kinds"][number][1]))
    return {leaf: partition for leaf, partition in found.items() if partition is not None}


def _names(metadata: Any) -> Any:
    return next((metadata[key] for key in _METADATA if key in metadata), None)


def _partition(names: Any) -> Partition | None:
    if not isinstance(names, (tuple, list)) or not any(names):
        return None
    return Partition(tuple((name,) if isinstance(name, str) else tuple(name) if name else None for name in names))
