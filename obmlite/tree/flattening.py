"""Pytrees taken apart: into their leaves, and the tree that puts them together again."""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import jax

from obmlite.errors import LeafError
from obmlite.tree import nodes
from obmlite.tree.names import Key, KeyKind, check_key, join, key_text, split_name
from obmlite.tree.nodes import class_name, is_namedtuple_type
from obmlite.tree.static import storable
from obmlite.tree.structure import FACTORIES, MAX_DEPTH, MAX_NODES, Kind, Tree, twice

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
                error.leaf = path(node, *split_name(error.leaf)[::-1]) if error.leaf else path(node)
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
            why = check_key(child_key) if child_kind is not KeyKind.INDEX else None
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
            "Two leaves of the pytree have one name.", leaf=twice(names), fix="rename a key, such as 1 beside '1'"
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
        known = factory if FACTORIES.get(factory or "") is value.default_factory else None
        return Kind.DEFAULT_DICT, _items((k, value[k]) for k in _sorted(value)), None, known
    entry = nodes.of_class(cls)
    if entry is not None and entry.flatten is not None:
        children, data = entry.flatten(value)
        return Kind.CUSTOM, _children(children), entry.name, storable(data)
    if is_namedtuple_type(cls):
        fields = zip(cls._fields, value, strict=True)
        return Kind.NAMED_TUPLE, [(KeyKind.ATTRIBUTE, k, v) for k, v in fields], class_name(cls), None
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
    named = len(by_key) == len(pairs) > 0 and not any(check_key(key) for key in by_key)
    children: Mapping[Any, Any] | Sequence[Any] = by_key if named else [child for _, child in pairs]
    return Kind.CUSTOM, _children(children), class_name(type(value)), storable(data[1], strict=False)


def _jax_key(key: Any) -> Any:
    if isinstance(key, jax.tree_util.DictKey):
        return key.key
    return getattr(key, "name", None)  # GetAttrKey has one; SequenceKey and FlattenedIndexKey are positions
