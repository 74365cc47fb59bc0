"""Pytrees as data: nodes in preorder, and a name for every leaf.

JAX's ``PyTreeDef`` can neither be stored nor looked into, so the format has a tree of its own: parallel
columns (kind, arity, key, class name, static data) in preorder. There is no recursion to exhaust, no shared
child to explode, and a subtree is a contiguous range of nodes and of leaves.

A class is rebuilt only if it was registered under the name that the tree holds (:func:`register_node`);
nothing is ever looked up by name in a module.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import itertools
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import msgpack
import numpy as np

from obmlite.errors import CorruptPackageError, LeafError, RestoreError

__all__ = ["Key", "KeyKind", "Kind", "Tree", "escape", "flatten", "flatten_arguments", "register_node", "split_name"]

MAX_DEPTH = 1000
"""Nodes from the root to a leaf. Far above any model; finds a container that holds itself."""

MAX_NODES = 1 << 24
"""Nodes of one tree. 16 million leaves are beyond what JAX itself can trace."""

MAX_KEY_NESTING = 8
"""Tuples within tuples in a dictionary key."""

MAX_STATIC_BYTES = 1 << 20
"""Static data of one node, packed. Configuration, never weights."""

MAX_STATIC_DEPTH = 64
"""Containers within containers in static data."""

MAX_NAME = 1 << 14
"""Characters of the name of a leaf, or of any node. Keys are shared in a manifest, names are not: without a limit a
small manifest could ask for any amount of memory."""

MAX_NAMES_FIXED, MAX_NAMES_EACH = 1 << 20, 1 << 10
"""Characters of all leaves' names together: so many, and so many more for each leaf."""

RESERVED = "__metadata__"  # safetensors' key for its own string map

Key: TypeAlias = "str | int | tuple[Any, ...]"


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


class KeyKind(enum.IntEnum):
    """How a parent refers to a child. Numbers are the format's; append only."""

    ROOT = 1
    STR = 2
    INT = 3
    TUPLE = 4
    INDEX = 5
    ATTRIBUTE = 6


_KEYED_BY = {
    Kind.LIST: KeyKind.INDEX,
    Kind.TUPLE: KeyKind.INDEX,
    Kind.NAMED_TUPLE: KeyKind.ATTRIBUTE,
    Kind.ARGUMENTS: KeyKind.ATTRIBUTE,
}

_DICTS = frozenset({Kind.DICT, Kind.ORDERED_DICT, Kind.DEFAULT_DICT})

# defaultdict's factory is static data by name; only these are ever restored.
_FACTORIES: dict[str, Callable[[], Any]] = {f.__name__: f for f in (dict, list, tuple, set, int, float, str, bool)}


# --- names -----------------------------------------------------------------------------------------------------------


def escape(component: str) -> str:
    r"""One component of a leaf's name: ``\`` before every ``.`` and ``\``."""
    return component.replace("\\", "\\\\").replace(".", "\\.")


def join(components: Sequence[str]) -> str:
    r"""Joins components by ``.``; a leading ``__metadata__``, which safetensors reserves, gets a ``\`` in front."""
    name = ".".join(map(escape, components))
    return f"\\{name}" if name.startswith(RESERVED) else name


def split_name(name: str) -> list[str]:
    r"""Undoes :func:`join`: the components of a leaf's name. ``""`` is the one component ``""``."""
    components = [""]
    characters = iter(name)
    for character in characters:
        if character == "\\":
            components[-1] += next(characters, "")
        elif character == ".":
            components.append("")
        else:
            components[-1] += character
    return components


def key_text(key: Key) -> str:
    """The component that a key gives to a name: itself, its decimal digits, or a tuple as compact JSON."""
    if isinstance(key, str):
        return key
    if isinstance(key, int):
        return str(key)
    return json.dumps(key, ensure_ascii=False, separators=(",", ":"))


def key_from_text(kind: KeyKind, text: str) -> Key | None:
    """Undoes :func:`key_text` for a key of a known kind.

    Raises:
      CorruptPackageError: the text is no key of that kind.
    """
    try:
        if kind is KeyKind.ROOT:
            if text:
                raise ValueError(text)
            return None
        if kind in (KeyKind.STR, KeyKind.ATTRIBUTE):
            return text
        key = int(text) if kind in (KeyKind.INT, KeyKind.INDEX) else _tuple_from_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise CorruptPackageError("A key of a tree is malformed.", field="tree.key", found=text[:80]) from error
    if _check_key(key) or key_text(key) != text:
        raise CorruptPackageError("A key of a tree is not in its canonical form.", field="tree.key", found=text[:80])
    return key


def _tuple_from_json(value: Any, depth: int = 0) -> tuple[Any, ...]:
    if not isinstance(value, list) or depth >= MAX_KEY_NESTING:
        raise ValueError(value)
    return tuple(_tuple_from_json(v, depth + 1) if isinstance(v, list) else _atom(v) for v in value)


def _atom(value: Any) -> str | int:
    if isinstance(value, str) or type(value) is int:
        return value
    raise ValueError(value)


def _check_key(key: Any, depth: int = 0) -> str | None:
    """Says why a dictionary's key cannot be stored, or None."""
    if isinstance(key, str):
        try:
            key.encode()
        except UnicodeEncodeError:
            return "a string that is not valid Unicode (a lone surrogate)"
        return None if type(key) is str else f"a {type(key).__name__}, a subclass of str"
    if type(key) is int:
        return None if abs(key) < 1 << 63 else "an integer of more than 63 bits"
    if type(key) is tuple:
        if depth >= MAX_KEY_NESTING:
            return f"a tuple nested more than {MAX_KEY_NESTING} deep"
        return next((why for part in key if (why := _check_key(part, depth + 1))), None)
    return f"a key of type {type(key).__qualname__}"


# --- classes ---------------------------------------------------------------------------------------------------------

Flatten: TypeAlias = "Callable[[Any], tuple[Mapping[Any, Any] | Sequence[Any], Any]]"
Unflatten: TypeAlias = "Callable[[Any, dict[Any, Any] | tuple[Any, ...]], Any]"


@dataclasses.dataclass(frozen=True, slots=True)
class _Registration:
    cls: type
    name: str
    flatten: Flatten | None
    unflatten: Unflatten | None


_by_class: dict[type, _Registration] = {}
_by_name: dict[str, _Registration] = {}


def register_node(
    cls: type,
    name: str | None = None,
    *,
    flatten: Flatten | None = None,
    unflatten: Unflatten | None = None,
) -> type:
    """Lets trees hold instances of a class and rebuild them when loading.

    A namedtuple needs nothing but its name. A class that JAX knows as a pytree node may leave out ``flatten``;
    it is then taken apart by JAX. May be used as a decorator.

    Args:
      cls: the class.
      name: the name under which packages hold it, ``module.qualname`` if not given. Packages are opened by this
        name for years: choose one that stays.
      flatten: instance → (children, static). Children are a mapping from keys
        (attribute names, say), or a sequence. Static
        data must be what msgpack can hold (None, bool, int, float, str, bytes, and lists, tuples and dicts of them).
      unflatten: (static, children as dict or tuple) → instance.

    Raises:
      ValueError: the class or the name is registered already, for something else.
    """
    if unflatten is None and not _is_namedtuple_type(cls):
        raise ValueError(f"register_node({cls.__name__}) needs unflatten=: only a namedtuple is rebuilt without it")
    entry = _Registration(cls, name or f"{cls.__module__}.{cls.__qualname__}", flatten, unflatten)
    for taken in (_by_class.get(cls), _by_name.get(entry.name)):
        if taken is not None and taken != entry:
            raise ValueError(f"{cls.__name__} as {entry.name!r} clashes with {taken.cls} registered as {taken.name!r}")
    _by_class[cls] = _by_name[entry.name] = entry
    return cls


def _is_namedtuple_type(cls: type) -> bool:
    return issubclass(cls, tuple) and hasattr(cls, "_fields")


def _class_name(cls: type) -> str:
    entry = _by_class.get(cls)
    return entry.name if entry else f"{cls.__module__}.{cls.__qualname__}"


# --- the tree --------------------------------------------------------------------------------------------------------


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
        if kind in _DICTS:
            plain = dict(zip(keys, children, strict=True))
            if kind is Kind.ORDERED_DICT:
                return collections.OrderedDict(plain)
            if kind is Kind.DEFAULT_DICT:
                return collections.defaultdict(_FACTORIES.get(self.static.get(node, "")), plain)
            return plain
        by_index = bool(keys) and self.key_kinds[node + 1] == KeyKind.INDEX
        view: Any = tuple(children) if by_index else dict(zip(keys, children, strict=True))
        entry = _by_name.get(self.classes.get(node, ""))
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
            if self.kinds[node] == Kind.DEFAULT_DICT and not (isinstance(data, str) and data in _FACTORIES):
                raise CorruptPackageError(
                    "A defaultdict's factory is not one that is known.", field="tree.static", found=f"{data!r:.80}"
                )
        self._check_keys()
        try:
            names = self.names
        except ValueError as error:
            raise CorruptPackageError("A tree's names are too long.", field="tree.key", found=str(error)) from error
        if len(set(names)) != self.num_leaves:
            raise CorruptPackageError("Two leaves of a tree have one name.", field="tree.key", found=_twice(names))

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
                if parent in _DICTS:
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


def _twice(names: Sequence[str]) -> str:
    return next(repr(name) for name, count in collections.Counter(names).items() if count > 1)


# --- taking a pytree apart -------------------------------------------------------------------------------------------

_Child: TypeAlias = "tuple[KeyKind, Key, Any]"


def flatten(value: Any) -> tuple[list[Any], Tree]:
    """Takes a pytree apart as JAX does (a dict's keys sorted), keeping keys and classes.

    Leaves are whatever is no container; whether they can be saved is not looked at here.

    Returns:
      The leaves, and the tree that puts them together again.

    Raises:
      LeafError: a key, class or nesting that the format does not hold, or two leaves of one name; ``leaf`` is the
        path.
    """
    return _flatten(value, _node)


def flatten_arguments(arguments: Mapping[str, Any]) -> tuple[list[Any], Tree]:
    """:func:`flatten` for a call's arguments by name; the root is an ARGUMENTS node and keeps their order."""
    root = object()

    def node(value: Any) -> tuple[Kind, list[_Child], str | None, Any] | None:
        if value is root:
            return Kind.ARGUMENTS, [(KeyKind.ATTRIBUTE, k, v) for k, v in arguments.items()], None, None
        return _node(value)

    return _flatten(root, node)


def _flatten(
    value: Any, node_of: Callable[[Any], tuple[Kind, list[_Child], str | None, Any] | None]
) -> tuple[list[Any], Tree]:
    kinds: list[int] = []
    arities: list[int] = []
    key_kinds: list[int] = []
    keys: list[Key | None] = []
    classes: dict[int, str] = {}
    static: dict[int, Any] = {}
    parents: list[int] = []
    leaves: list[Any] = []
    stack: list[tuple[Any, KeyKind, Key | None, int, int]] = [(value, KeyKind.ROOT, None, -1, 0)]

    def path(node: int, *last: str) -> str:
        components = list(last)
        while node > 0:
            components.append(key_text(keys[node]))  # type: ignore[arg-type]
            node = parents[node]
        return join(components[::-1])

    while stack:
        value, key_kind, key, parent, depth = stack.pop()
        node = len(kinds)
        key_kinds.append(key_kind)
        keys.append(key)
        parents.append(parent)
        try:
            taken = node_of(value)
        except (TypeError, ValueError) as error:  # a class's own flatten, or keys that don't compare
            if isinstance(error, LeafError):
                error.leaf = error.leaf or path(node)
                raise
            raise LeafError(
                "A node of the pytree cannot be taken apart.", leaf=path(node), found=f"{type(value).__name__}: {error}"
            ) from error
        if taken is None:
            kinds.append(Kind.LEAF)
            arities.append(0)
            leaves.append(value)
            continue
        kind, children, name, data = taken
        kinds.append(kind)
        arities.append(len(children))
        if name is not None:
            classes[node] = name
        if data is not None:
            static[node] = data
        for child_kind, child_key, _ in children:
            why = _check_key(child_key) if child_kind is not KeyKind.INDEX else None
            if why:
                raise LeafError(
                    "A key of the pytree cannot be stored.",
                    leaf=path(node, str(child_key)),
                    expected="keys of type str or int, or tuples of them",
                    found=why,
                    fix="convert the keys before saving",
                )
        if children and depth >= MAX_DEPTH:
            raise LeafError(
                "The pytree is too deep; does a container hold itself?",
                leaf=path(node)[:200],
                expected=f"at most {MAX_DEPTH} levels",
            )
        if len(kinds) + len(stack) + len(children) > MAX_NODES:
            raise LeafError("The pytree is too large.", expected=f"at most {MAX_NODES} nodes")
        stack.extend((child, k, key, node, depth + 1) for k, key, child in reversed(children))
    tree = Tree(kinds, arities, key_kinds, keys, classes, static)
    try:
        names = tree.names
    except ValueError as error:
        raise LeafError("The pytree's names are too long.", found=str(error), fix="use shorter keys") from error
    if len(set(names)) != len(leaves):
        raise LeafError(
            "Two leaves of the pytree have one name.", leaf=_twice(names), fix="rename a key, such as 1 beside '1'"
        )
    return leaves, tree


def _node(value: Any) -> tuple[Kind, list[_Child], str | None, Any] | None:
    """(kind, children, class name, static data) of a container; None for a leaf."""
    cls = type(value)
    if value is None:
        return Kind.NONE, [], None, None
    if cls is dict:
        return Kind.DICT, _items((k, value[k]) for k in _sorted(value)), None, None
    if cls is list or cls is tuple:
        kind = Kind.LIST if cls is list else Kind.TUPLE
        return kind, [(KeyKind.INDEX, i, v) for i, v in enumerate(value)], None, None
    if cls is collections.OrderedDict:
        return Kind.ORDERED_DICT, _items(value.items()), None, None
    if cls is collections.defaultdict:
        factory = getattr(value.default_factory, "__name__", None)
        known = factory if _FACTORIES.get(factory or "") is value.default_factory else None
        return Kind.DEFAULT_DICT, _items((k, value[k]) for k in _sorted(value)), None, known
    entry = _by_class.get(cls)
    if entry is not None and entry.flatten is not None:
        children, data = entry.flatten(value)
        return Kind.CUSTOM, _children(children), entry.name, _static(data)
    if _is_namedtuple_type(cls):
        fields = zip(cls._fields, value, strict=True)
        return Kind.NAMED_TUPLE, [(KeyKind.ATTRIBUTE, k, v) for k, v in fields], _class_name(cls), None
    return _jax_node(value)


def _sorted(keys: Mapping[Any, Any]) -> list[Any]:
    try:
        return sorted(keys)
    except TypeError as error:
        raise LeafError(
            "The keys of a dict cannot be sorted, which JAX needs.",
            expected="keys of one type",
            found=", ".join(sorted({type(k).__name__ for k in keys})),
            fix="use keys of one type, or an OrderedDict",
        ) from error


def _items(items: Any) -> list[_Child]:
    return [(_key_kind(key), key, value) for key, value in items]


def _key_kind(key: Hashable) -> KeyKind:
    return KeyKind.STR if isinstance(key, str) else KeyKind.TUPLE if isinstance(key, tuple) else KeyKind.INT


def _children(children: Mapping[Any, Any] | Sequence[Any]) -> list[_Child]:
    if isinstance(children, Mapping):
        return _items(children.items())
    return [(KeyKind.INDEX, i, v) for i, v in enumerate(children)]


def _jax_node(value: Any) -> tuple[Kind, list[_Child], str | None, Any] | None:
    """A class that JAX knows as a pytree node, taken apart by JAX; None where JAX sees a leaf."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda x: x is not value)
    data = treedef.node_data()
    if data is None:
        return None
    by_key = {_jax_key(path[0]): child for path, child in pairs}
    named = len(by_key) == len(pairs) > 0 and not any(_check_key(key) for key in by_key)
    children: Mapping[Any, Any] | Sequence[Any] = by_key if named else [child for _, child in pairs]
    return Kind.CUSTOM, _children(children), _class_name(type(value)), _static(data[1], strict=False)


def _jax_key(key: Any) -> Any:
    if isinstance(key, jax.tree_util.DictKey):
        return key.key
    return getattr(key, "name", None)  # GetAttrKey has one; SequenceKey and FlattenedIndexKey are positions


# --- static data -----------------------------------------------------------------------------------------------------

_EXT_TUPLE = 1


def pack_static(data: Any) -> bytes:
    """Static data as msgpack, with tuples as extension type 1.

    Raises:
      LeafError: msgpack cannot hold it, or it is over :data:`MAX_STATIC_BYTES`.
    """
    try:
        packed: bytes = msgpack.packb(_tuples_out(data), strict_types=True)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise LeafError(
            "Static data cannot be stored.",
            expected="None, bool, int, float, str, bytes, and lists, tuples and dicts of them",
            found=str(error),
        ) from error
    if len(packed) > MAX_STATIC_BYTES:
        raise LeafError("Static data is too large.", expected=f"at most {MAX_STATIC_BYTES} bytes", found=len(packed))
    return packed


def _tuples_out(data: Any, depth: int = 0) -> Any:
    if depth > MAX_STATIC_DEPTH:
        raise ValueError(f"nested more than {MAX_STATIC_DEPTH} deep")
    if type(data) is tuple:
        return msgpack.ExtType(_EXT_TUPLE, msgpack.packb([_tuples_out(v, depth + 1) for v in data], strict_types=True))
    if type(data) is list:
        return [_tuples_out(v, depth + 1) for v in data]
    if type(data) is dict:
        return {_tuples_out(k, depth + 1): _tuples_out(v, depth + 1) for k, v in data.items()}
    if data is None or type(data) in (bool, int, float, str, bytes):
        return data
    raise TypeError(f"a {type(data).__qualname__}")  # msgpack would take some more: bytearray, its own ExtType


def unpack_static(packed: bytes) -> Any:
    """Undoes :func:`pack_static`.

    Raises:
      CorruptPackageError: the bytes are not such data.
    """
    if len(packed) > MAX_STATIC_BYTES:
        raise CorruptPackageError("Static data is too large.", field="static", found=f"{len(packed)} bytes")
    return _unpack(packed, 0)


def _unpack(packed: bytes, depth: int) -> Any:
    def extension(code: int, data: bytes) -> Any:
        if code != _EXT_TUPLE or depth > MAX_STATIC_DEPTH:
            raise ValueError(f"extension type {code}")
        items = _unpack(data, depth + 1)
        if type(items) is not list:
            raise ValueError("a tuple that is no array")
        return tuple(items)

    try:
        data = msgpack.unpackb(packed, ext_hook=extension, strict_map_key=False)
        if depth == 0:
            _check_static(data)
        return data
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        if isinstance(error, CorruptPackageError):
            raise
        raise CorruptPackageError("Static data is malformed.", field="static", found=str(error)) from error


def _check_static(data: Any) -> None:
    """Refuses what msgpack itself lets through: deep nesting, and time stamps, an extension that no hook sees."""
    level, depth = [data], 0
    while level:
        if depth > MAX_STATIC_DEPTH:
            raise ValueError(f"nested more than {MAX_STATIC_DEPTH} deep")
        if any(type(part) is msgpack.Timestamp for part in level):
            raise ValueError("extension type -1")
        lists = [part for part in level if type(part) in (list, tuple)]
        maps = [part for part in level if type(part) is dict]
        level = [item for part in lists for item in part]
        level += [item for part in maps for pair in part.items() for item in pair]
        depth += 1


def _static(data: Any, *, strict: bool = True) -> Any:
    """Static data that can be stored; what JAX's own registry calls static often can't be, and is left out."""
    try:
        pack_static(data)
    except LeafError:
        if strict:
            raise
        return None
    return data
