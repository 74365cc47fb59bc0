"""Pytrees as data: nodes in preorder, and a name for every leaf.

JAX's ``PyTreeDef`` can neither be stored nor looked into, so the format has a tree of its own: parallel
columns (kind, arity, key, class name, static data) in preorder. There is no recursion to exhaust, no shared
child to explode, and a subtree is a contiguous range of nodes and of leaves.

A class is rebuilt only if it was registered under the name that the tree holds (:func:`register_node`), or if an
adapter has that name on its own list; nothing is ever looked up by name in a module.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from obmlite.errors import CorruptPackageError, RestoreError
from obmlite.tree import nodes
from obmlite.tree.names import MAX_NAME, RESERVED, Key, KeyKind, escape, key_text

MAX_DEPTH = 1000
"""Nodes from the root to a leaf. Far above any model; finds a container that holds itself."""

MAX_NODES = 1 << 24
"""Nodes of one tree. 16 million leaves are beyond what JAX itself can trace."""

MAX_NAMES_FIXED, MAX_NAMES_EACH = 1 << 20, 1 << 10
"""Characters of all leaves' names together: so many, and so many more for each leaf."""


class Kind(enum.IntEnum):
    """What a node is. Numbers are the format's; append only."""

    LEAF = 1
    NONE = 2
    DICT = 3
    ORDERED_DICT = 4
    DEFAULT_DICT = 5
    LIST = 6
    TUPLE = 7
    NAMED_TUPLE = 8
    CUSTOM = 9
    ARGUMENTS = 10


_KEYED_BY = {
    Kind.LIST: KeyKind.INDEX,
    Kind.TUPLE: KeyKind.INDEX,
    Kind.NAMED_TUPLE: KeyKind.ATTRIBUTE,
    Kind.ARGUMENTS: KeyKind.ATTRIBUTE,
}

DICTS = frozenset({Kind.DICT, Kind.ORDERED_DICT, Kind.DEFAULT_DICT})

# defaultdict's factory is static data by name; only these are ever restored.
FACTORIES: dict[str, Callable[[], Any]] = {f.__name__: f for f in (dict, list, tuple, set, int, float, str, bool)}


@dataclasses.dataclass(frozen=True)
class Tree:
    """A pytree without its leaves, in preorder.

    Attributes:
      kinds: :class:`Kind` of each node.
      arities: number of children of each node.
      key_kinds: :class:`KeyKind` of each node's key in its parent.
      keys: that key: str, int or tuple; None for the root.
      classes: node → registered name, for NAMED_TUPLE and CUSTOM nodes.
      static: node → static data, for the nodes that have any.
    """

    kinds: Sequence[int]
    arities: Sequence[int]
    key_kinds: Sequence[int]
    keys: Sequence[Key | None]
    classes: Mapping[int, str] = dataclasses.field(default_factory=dict)
    static: Mapping[int, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.kinds)

    @functools.cached_property
    def num_leaves(self) -> int:
        """Number of leaves."""
        return self.first_leaf[len(self)]

    @functools.cached_property
    def first_leaf(self) -> Sequence[int]:
        """For each node the number of leaves before it, and at the end the number of all leaves."""
        return [0, *itertools.accumulate(int(kind == Kind.LEAF) for kind in self.kinds)]

    @functools.cached_property
    def ends(self) -> Sequence[int]:
        """For each node the node after its subtree."""
        ends = [0] * len(self)
        stack: list[int] = []
        for node in range(len(self) - 1, -1, -1):
            end = node + 1
            for _ in range(self.arities[node]):
                end = stack.pop()
            ends[node] = end
            stack.append(end)
        return ends

    def children(self, node: int) -> Iterator[int]:
        """The children of a node, in order."""
        child, end = node + 1, self.ends[node]
        while child < end:
            yield child
            child = self.ends[child]

    def child(self, node: int, key: Key) -> int | None:
        """The child under a key (a sequence's index may be negative), or None."""
        if self.kinds[node] in (Kind.LIST, Kind.TUPLE) and type(key) is int and key < 0:
            key += self.arities[node]
        return next((c for c in self.children(node) if self.keys[c] == key and type(self.keys[c]) is type(key)), None)

    def subtree(self, node: int) -> Tree:
        """The tree below (and with) a node."""
        end = self.ends[node]
        inside = range(node, end)
        return Tree(
            self.kinds[node:end],
            self.arities[node:end],
            [KeyKind.ROOT, *self.key_kinds[node + 1 : end]],
            [None, *self.keys[node + 1 : end]],
            {n - node: name for n, name in self.classes.items() if n in inside},
            {n - node: data for n, data in self.static.items() if n in inside},
        )

    def without(self, children: Sequence[int]) -> Tree:
        """The tree without some children of its root."""
        gone = set(itertools.chain.from_iterable(range(c, self.ends[c]) for c in children))
        kept = [n for n in range(len(self)) if n not in gone]
        place = {n: i for i, n in enumerate(kept)}
        return Tree(
            [self.kinds[n] for n in kept],
            [self.arities[0] - len(children), *(self.arities[n] for n in kept[1:])],
            [self.key_kinds[n] for n in kept],
            [self.keys[n] for n in kept],
            {place[n]: name for n, name in self.classes.items() if n in place},
            {place[n]: data for n, data in self.static.items() if n in place},
        )

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The name of each leaf: its path joined by ``.``. The root, when it is a leaf, is ``""``.

        Raises:
          ValueError: the names are longer than the format allows.
        """
        names: list[str] = []
        size, limit = 0, MAX_NAMES_FIXED + MAX_NAMES_EACH * self.num_leaves
        stack: list[tuple[str | None, int]] = []  # (prefix, children to come)
        for kind, arity, key in zip(self.kinds, self.arities, self.keys, strict=True):
            prefix: str | None = None
            if stack:
                above, left = stack[-1]
                stack[-1] = (above, left - 1)
                component = escape(key_text(key))  # type: ignore[arg-type]
                prefix = component if above is None else f"{above}.{component}"
                if len(prefix) > MAX_NAME:
                    raise ValueError(f"a name of more than {MAX_NAME} characters: {prefix[:80]}…")
            if kind == Kind.LEAF:
                name = prefix or ""
                names.append(f"\\{name}" if name.startswith(RESERVED) else name)
                size += len(name)
                if size > limit:
                    raise ValueError(f"names of more than {limit} characters together")
            if arity:
                stack.append((prefix, arity))
            while stack and stack[-1][1] == 0:
                stack.pop()
        return tuple(names)

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """Builds the pytree. A node whose class is not registered becomes its plain view: a dict or a tuple.

        Args:
          leaves: :attr:`num_leaves` leaves, in order.
        """
        if len(leaves) != self.num_leaves:
            raise ValueError(f"the tree has {self.num_leaves} leaves, {len(leaves)} were given")
        built: list[Any] = []
        position = len(leaves)
        for node in range(len(self) - 1, -1, -1):
            if self.kinds[node] == Kind.LEAF:
                position -= 1
                built.append(leaves[position])
                continue
            children = [built.pop() for _ in range(self.arities[node])]
            built.append(self._build(node, children))
        return built[0]

    def unflatten_some(self, leaves: Mapping[int, Any]) -> Any:
        """Builds the pytree from some of its leaves, by number.

        What has no leaves is left out of dicts, and is None in lists and tuples; other containers are built as dicts.
        """
        absent = object()
        built: list[Any] = []
        position = self.num_leaves
        for node in range(len(self) - 1, -1, -1):
            kind = self.kinds[node]
            if kind == Kind.LEAF:
                position -= 1
                built.append(leaves.get(position, absent))
                continue
            children = [built.pop() for _ in range(self.arities[node])]
            if all(child is absent for child in children):
                built.append(absent)
            elif kind in (Kind.LIST, Kind.TUPLE):
                filled = [None if child is absent else child for child in children]
                built.append(filled if kind == Kind.LIST else tuple(filled))
            else:
                keys = [self.keys[c] for c in self.children(node)]
                built.append({k: c for k, c in zip(keys, children, strict=True) if c is not absent})
        return None if built[0] is absent else built[0]

    def _build(self, node: int, children: list[Any]) -> Any:
        kind = Kind(self.kinds[node])
        if kind is Kind.NONE:
            return None
        if kind is Kind.LIST:
            return children
        if kind is Kind.TUPLE:
            return tuple(children)
        keys = [self.keys[c] for c in self.children(node)]
        if kind in DICTS:
            plain = dict(zip(keys, children, strict=True))
            if kind is Kind.ORDERED_DICT:
                return collections.OrderedDict(plain)
            if kind is Kind.DEFAULT_DICT:
                return collections.defaultdict(FACTORIES.get(self.static.get(node, "")), plain)
            return plain
        by_index = bool(keys) and self.key_kinds[node + 1] == KeyKind.INDEX
        view: Any = tuple(children) if by_index else dict(zip(keys, children, strict=True))
        entry = nodes.of_name(self.classes.get(node, ""))
        if entry is None:
            return view
        if entry.unflatten is not None:
            return entry.unflatten(self.static.get(node), view)
        # By name: the class may have come to list its fields in another order.
        if kind is not Kind.NAMED_TUPLE or set(view) != set(entry.cls._fields):  # type: ignore[attr-defined]
            raise RestoreError(
                "A namedtuple's fields are not those that were saved.",
                field="tree.key",
                expected=", ".join(map(str, keys)),
                found=f"{entry.cls.__qualname__}({', '.join(entry.cls._fields)})",  # type: ignore[attr-defined]
            )
        return entry.cls(**view)

    def check(self) -> None:
        """Checks the columns of a tree that was read: one root, arities that add up, kinds, keys, unique names, depth.

        Raises:
          CorruptPackageError: naming the column.
        """
        kinds, arities = np.asarray(self.kinds), np.asarray(self.arities, np.int64)
        if not 0 < kinds.size <= MAX_NODES:
            raise CorruptPackageError("A tree is empty or too large.", field="tree.kind", found=f"{kinds.size} nodes")
        if not np.isin(kinds, list(Kind)).all():
            raise CorruptPackageError(
                "A tree has a node of unknown kind.", field="tree.kind", found=_strange(kinds, Kind)
            )
        open_nodes = np.cumsum(arities - 1) + 1
        if open_nodes[-1] != 0 or not (open_nodes[:-1] > 0).all():
            raise CorruptPackageError("A tree's arities do not add up to one tree.", field="tree.arity")
        if arities[(kinds == Kind.LEAF) | (kinds == Kind.NONE)].any():
            raise CorruptPackageError("A leaf or None of a tree has children.", field="tree.arity")
        for node in self.classes:
            if self.kinds[node] not in (Kind.NAMED_TUPLE, Kind.CUSTOM):
                raise CorruptPackageError(
                    "A node of a tree has a class that its kind does not have.",
                    field="tree.class",
                    found=f"node {node}",
                )
        for node, data in self.static.items():
            if self.kinds[node] not in (Kind.DEFAULT_DICT, Kind.NAMED_TUPLE, Kind.CUSTOM):
                raise CorruptPackageError(
                    "A node of a tree has static data that its kind does not have.",
                    field="tree.static",
                    found=f"node {node}",
                )
            if self.kinds[node] == Kind.DEFAULT_DICT and not (isinstance(data, str) and data in FACTORIES):
                raise CorruptPackageError(
                    "A defaultdict's factory is not one that is known.", field="tree.static", found=f"{data!r:.80}"
                )
        self._check_keys()
        try:
            names = self.names
        except ValueError as error:
            raise CorruptPackageError("A tree's names are too long.", field="tree.key", found=str(error)) from error
        if len(set(names)) != self.num_leaves:
            raise CorruptPackageError("Two leaves of a tree have one name.", field="tree.key", found=twice(names))

    def _check_keys(self) -> None:
        stack: list[list[int]] = []  # [node, children to come, children so far]
        # Children without leaves have no names to differ in, so keys are compared too.
        last: dict[int, Key | None] = {}  # node → the key of its last child so far, where keys are sorted
        seen: set[tuple[int, Key | None]] = set()  # (node, key of a child), where they are not
        for node, (kind, arity, key_kind, key) in enumerate(
            zip(self.kinds, self.arities, self.key_kinds, self.keys, strict=True)
        ):
            if not stack:
                good = key_kind == KeyKind.ROOT
            else:
                above = stack[-1]
                parent = Kind(self.kinds[above[0]])
                if parent in DICTS:
                    good = key_kind in (KeyKind.STR, KeyKind.INT, KeyKind.TUPLE)
                elif parent is Kind.CUSTOM:
                    by_index = self.key_kinds[above[0] + 1] == KeyKind.INDEX
                    good = key_kind in ((KeyKind.INDEX,) if by_index else (KeyKind.STR, KeyKind.INT, KeyKind.TUPLE))
                else:
                    good = key_kind == _KEYED_BY.get(parent)
                wrong = False
                if key_kind == KeyKind.INDEX:
                    good = good and key == above[2]
                elif parent in (Kind.DICT, Kind.DEFAULT_DICT):
                    wrong = above[2] > 0 and good and not _less(last[above[0]], key)
                    last[above[0]] = key
                else:
                    wrong = good and (above[0], key) in seen
                    seen.add((above[0], key))
                if wrong:
                    raise CorruptPackageError(
                        "A node of a tree has one key twice, or a dict's keys are not sorted.",
                        field="tree.key",
                        found=f"node {node}, {key!r:.80}",
                    )
                above[1] -= 1
                above[2] += 1
            if not good:
                raise CorruptPackageError(
                    "A key of a tree is of a kind that its parent does not have.",
                    field="tree.key_kind",
                    found=f"node {node}, key kind {key_kind}",
                )
            if kind == Kind.ARGUMENTS and node != 0:
                raise CorruptPackageError("Only a tree's root may be a list of arguments.", field="tree.kind")
            if arity:
                stack.append([node, arity, 0])
                if len(stack) > MAX_DEPTH:
                    raise CorruptPackageError(
                        "A tree is too deep.", field="tree.arity", expected=f"at most {MAX_DEPTH} levels"
                    )
            while stack and stack[-1][1] == 0:
                stack.pop()


def _less(left: Any, right: Any) -> bool:
    try:
        return bool(left < right)
    except TypeError:  # of different types, which no dict that JAX sorted has
        return False


def _strange(values: Any, known: type[enum.IntEnum]) -> str:
    return str(next(int(v) for v in values if int(v) not in set(known)))


def twice(names: Sequence[str]) -> str:
    return next(repr(name) for name, count in collections.Counter(names).items() if count > 1)
