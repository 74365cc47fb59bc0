"""Trees as JSON, for files that have no manifest: the columns of their nodes in preorder, keys as their texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from obmlite.errors import CorruptPackageError
from obmlite.tree.names import KeyKind, key_from_text, key_text
from obmlite.tree.structure import Tree

COLUMNS = {"kinds": "tree.kind", "arities": "tree.arity", "key_kinds": "tree.key_kind", "keys": "tree.key"}
"""Each column's key in the JSON object, and what errors call it."""

_MOST = 1 << 31


def to_columns(tree: Tree) -> dict[str, list[Any]]:
    """A tree's columns; its classes and static data are left out."""
    return {
        "kinds": [int(kind) for kind in tree.kinds],
        "arities": [int(arity) for arity in tree.arities],
        "key_kinds": [int(kind) for kind in tree.key_kinds],
        "keys": ["" if key is None else key_text(key) for key in tree.keys],
    }


def from_columns(found: Any, classes: Mapping[int, str] | None = None, static: Mapping[int, Any] | None = None) -> Tree:
    """Undoes :func:`to_columns`, and checks everything.

    Args:
      found: a JSON object that nobody has checked; what it has beside the columns is left alone.
      classes: node → registered name.
      static: node → static data.

    Raises:
      CorruptPackageError: it describes no tree; ``field`` names the column.
    """
    if not isinstance(found, dict) or not found.keys() >= COLUMNS.keys():
        raise _corrupt("lacks a column", "tree", found)
    for name, field in COLUMNS.items():
        kind = str if name == "keys" else int
        if not isinstance(found[name], list) or any(type(item) is not kind for item in found[name]):
            raise _corrupt("has another column than it should", field, found[name])
        if kind is int and any(not 0 <= item < _MOST for item in found[name]):
            raise _corrupt("has numbers out of range", field, found[name])
        if len(found[name]) != len(found["kinds"]):
            raise _corrupt("has columns of different lengths", field, len(found[name]), len(found["kinds"]))
    unknown = set(found["key_kinds"]) - set(KeyKind)
    if unknown:
        raise _corrupt("has a key of unknown kind", "tree.key_kind", min(unknown))
    keys = [key_from_text(KeyKind(k), text) for k, text in zip(found["key_kinds"], found["keys"], strict=True)]
    tree = Tree(found["kinds"], found["arities"], found["key_kinds"], keys, classes or {}, static or {})
    tree.check()
    return tree


def _corrupt(what: str, field: str, found: Any, expected: Any = None) -> CorruptPackageError:
    return CorruptPackageError(f"A described tree {what}.", field=field, expected=expected, found=f"{found!r:.80}")
