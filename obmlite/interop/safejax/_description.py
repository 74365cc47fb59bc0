"""What the names of tensors do not tell of a pytree, as JSON in a file's ``__metadata__``.

safejax knew nested dicts with keys of text, and dropped or confused the rest. Where a pytree is more than that, its
tree is written beside the tensors; where it is not, the file is what safejax would have written.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from obmlite import tree as trees
from obmlite.errors import CorruptPackageError
from obmlite.tree.described import COLUMNS

_T = TypeVar("_T")

TREE_KEY = "obmlite.tree"
"""Key in a file's ``__metadata__``."""

_FIELDS = frozenset((*COLUMNS, "classes", "static", "names", "numbers", "weak"))


@dataclasses.dataclass(frozen=True)
class Description:
    """A pytree without its arrays.

    Attributes:
      tree: its containers.
      names: of the tensors, for each leaf.
      numbers: the leaves that are Python's numbers.
      weak: the leaves that are weakly typed arrays.
    """

    tree: trees.Tree
    names: tuple[str, ...]
    numbers: frozenset[int] = frozenset()
    weak: frozenset[int] = frozenset()


def encode(description: Description) -> str:
    """Compact JSON; the tree's columns as ``docs/format.md`` has them, keys as their texts, static data as base64."""
    tree = description.tree
    static = {str(n): base64.b64encode(trees.pack_static(data)).decode() for n, data in sorted(tree.static.items())}
    fields: dict[str, Any] = {
        **trees.to_columns(tree),
        "classes": {str(n): name for n, name in sorted(tree.classes.items())},
        "static": static,
        "names": [] if description.names == tree.names else list(description.names),
        "numbers": sorted(description.numbers),
        "weak": sorted(description.weak),
    }
    present = {name: value for name, value in fields.items() if value or name in COLUMNS}
    return json.dumps(present, ensure_ascii=False, separators=(",", ":"))


def decode(text: str) -> Description:
    """Undoes :func:`encode`, and checks everything.

    Raises:
      CorruptPackageError: the text is no such JSON, or describes no tree.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _corrupt("is no JSON", text) from error
    if not isinstance(raw, dict) or not raw.keys() <= _FIELDS or not raw.keys() >= COLUMNS.keys():
        raise _corrupt("has other fields than it should", text)
    nodes = len(raw["kinds"]) if isinstance(raw["kinds"], list) else 0
    classes = _by_node(raw, "classes", nodes, lambda name: name)
    static = _by_node(raw, "static", nodes, _unpack)
    tree = trees.from_columns(raw, classes, static)
    names = _list(raw, "names", str) or tree.names
    if len(names) != tree.num_leaves or len(set(names)) != len(names):
        raise _corrupt("has not one name for each leaf", f"{len(names)} names, {tree.num_leaves} leaves")
    numbers, weak = (frozenset(_list(raw, name, int)) for name in ("numbers", "weak"))
    if any(not 0 <= n < tree.num_leaves for n in numbers | weak):
        raise _corrupt("names leaves that it does not have", sorted(numbers | weak)[-1])
    return Description(tree, tuple(names), numbers, weak)


def _list(raw: dict[str, Any], field: str, cls: type[_T]) -> list[_T]:
    found = raw.get(field, [])
    if not isinstance(found, list) or any(type(item) is not cls for item in found):
        raise _corrupt(f"has other {field} than it should", found)
    return found


def _by_node(raw: dict[str, Any], field: str, nodes: int, read: Callable[[str], Any]) -> dict[int, Any]:
    found = raw.get(field, {})
    if not isinstance(found, dict) or any(type(value) is not str for value in found.values()):
        raise _corrupt(f"has other {field} than it should", found)
    numbers = {str(n): n for n in range(nodes)} if found else {}
    if not found.keys() <= numbers.keys():
        raise _corrupt(f"has {field} of nodes that it does not have", sorted(found.keys() - numbers.keys())[0])
    return {numbers[node]: read(value) for node, value in found.items()}


def _unpack(text: str) -> Any:
    try:
        packed = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise _corrupt("has static data that are no base64", text) from error
    return trees.unpack_static(packed)


def _corrupt(what: str, found: Sequence[Any] | object) -> CorruptPackageError:
    return CorruptPackageError(
        f"The description of a file's pytree {what}.", field=f"__metadata__.{TREE_KEY}", found=f"{found!r:.80}"
    )
