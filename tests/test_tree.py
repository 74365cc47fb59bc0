"""Trees against JAX's own flattening, names and their undoing, and hostile static data."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
import typing

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from obmlite import tree as trees
from obmlite.errors import CorruptPackageError, LeafError, RestoreError
from obmlite.tree import (
    KeyKind,
    Kind,
    Tree,
    flatten,
    flatten_arguments,
    register_node,
    split_name,
)
from obmlite.tree import flattening as tree_flattening
from obmlite.tree import nodes as tree_nodes
from obmlite.tree import structure as tree_structure

try:
    import flax.core
    import flax.struct
except ImportError:  # an extra
    flax = None

Registered = collections.namedtuple("Registered", "x y")
Plain = collections.namedtuple("Plain", "first second")


class Typed(typing.NamedTuple):
    a: object
    b: object = 0


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(eq=False)
class Keyed:
    """A class that JAX knows with keys, and obmlite by registration."""

    left: object
    right: object
    note: object = None

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return ((key("left"), self.left), (key("right"), self.right)), self.note

    @classmethod
    def tree_unflatten(cls, note, children):
        return cls(*children, note)

    def __eq__(self, other):
        return type(other) is Keyed and vars(self) == vars(other)

    __hash__ = None


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class Positional:
    """A class that JAX knows without keys."""

    parts: tuple

    def tree_flatten(self):
        return self.parts, ("aux", len(self.parts))

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(tuple(children))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    weights: object
    bias: object
    size: int = dataclasses.field(default=3, metadata={"static": True})


if flax:

    @flax.struct.dataclass
    class State:
        step: object
        params: object
        name: str = flax.struct.field(pytree_node=False, default="adam")

    FLAX = [
        (State(1, {"w": 2}), ["step", "params.w"]),
        (flax.core.FrozenDict(b=1, a=2), ["a", "b"]),
    ]
else:
    State, FLAX = Data, []


class Own:
    """A class that only obmlite knows."""

    def __init__(self, items, static):
        self.items, self.static = items, static

    def __eq__(self, other):
        return type(other) is Own and (self.items, self.static) == (other.items, other.static)

    __hash__ = None


register_node(Registered)
register_node(Typed, "tests.Typed")
register_node(Keyed, "tests.Keyed", unflatten=lambda static, view: Keyed(**view, note=static))
register_node(Own, "tests.Own", flatten=lambda o: (o.items, o.static), unflatten=lambda static, view: Own(view, static))

KEYS = st.text(max_size=6) | st.sampled_from(
    [
        "",
        ".",
        "..",
        "a.b",
        "\\",
        "\\.",
        "a\\",
        "__metadata__",
        "__metadata__.x",
        "\\__metadata__",
        "ключ",
        "0",
        "[1]",
        "\0",
    ]
)
INTS = st.integers(-3, 12) | st.sampled_from([2**63 - 1, 1 - 2**63])
TUPLES = st.tuples(KEYS, INTS) | st.tuples(KEYS, INTS, st.tuples(KEYS))


def dicts(inner):
    return st.one_of(
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(INTS, inner, max_size=4),
        st.dictionaries(TUPLES, inner, max_size=3),
    )


def nodes(inner):
    """Containers that JAX flattens too."""
    return st.one_of(
        dicts(inner),
        dicts(inner),
        dicts(inner).map(lambda d: collections.OrderedDict(reversed(d.items()))),
        dicts(inner).map(lambda d: collections.defaultdict(list, d)),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.builds(Registered, inner, inner),
        st.builds(Plain, inner, inner),
        st.builds(Typed, inner),
        st.builds(Keyed, inner, inner, st.none() | st.integers(-9, 9)),
        st.lists(inner, max_size=3).map(lambda parts: Positional(tuple(parts))),
        st.builds(Data, inner, inner),
        st.dictionaries(KEYS, inner, max_size=3).map(flax.core.FrozenDict if flax else dict),
        st.builds(State, inner, inner),
    )


PYTREES = st.recursive(st.integers(0, 99) | st.none() | st.just(np.float32(1)), nodes, max_leaves=12)


def flat(value):
    """:func:`flatten`, or None where two leaves get one name, which is refused on purpose."""
    try:
        return flatten(value)
    except LeafError as error:
        assert error.problem == "Two leaves of the pytree have one name."
        return None


def plain_view(value):
    """What a tree builds of a value without the classes that were not registered."""
    if isinstance(value, (Registered, Typed)):
        return type(value)(*map(plain_view, value))
    if isinstance(value, Keyed):
        return Keyed(plain_view(value.left), plain_view(value.right), value.note)
    if isinstance(value, Positional):
        return tuple(map(plain_view, value.parts)) if value.parts else {}
    if isinstance(value, Plain):
        return {name: plain_view(getattr(value, name)) for name in value._fields}
    if isinstance(value, (Data, State)):
        children = [f.name for f in dataclasses.fields(value)][:2]
        return {name: plain_view(getattr(value, name)) for name in children}
    if flax and isinstance(value, flax.core.FrozenDict):
        return flax.core.FrozenDict({key: plain_view(value[key]) for key in sorted(value)})
    if isinstance(value, collections.OrderedDict):
        return collections.OrderedDict((key, plain_view(item)) for key, item in value.items())
    if isinstance(value, collections.defaultdict):
        return collections.defaultdict(value.default_factory, {key: plain_view(item) for key, item in value.items()})
    if isinstance(value, dict):
        return {key: plain_view(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain_view, value))
    return value


def typed(value):
    """A value with the types of its containers, and of dicts the order where it counts."""
    if isinstance(value, collections.OrderedDict):
        return "OrderedDict", [(k, typed(v)) for k, v in value.items()]
    if isinstance(value, dict):
        factory = getattr(value, "default_factory", None)
        return type(value).__name__, factory, {k: typed(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [typed(v) for v in value]
    if isinstance(value, Keyed):
        return "Keyed", typed(value.left), typed(value.right), value.note
    if flax and isinstance(value, flax.core.FrozenDict):
        return "FrozenDict", {k: typed(value[k]) for k in value}
    return value


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(PYTREES)
@example({"b": 1, "a": {"": 2, "c.d": None}, "__metadata__": 3})
@example(())
@example(None)
@example(7)
def test_leaves_are_jaxs_in_jaxs_order(value):
    found = flat(value)
    if found is None:
        return
    leaves, tree = found
    expected = jax.tree.leaves(value)
    assert len(leaves) == len(expected) == tree.num_leaves
    assert all(a is b for a, b in zip(leaves, expected, strict=True))
    assert len(tree.names) == len(set(tree.names)) == len(leaves)
    assert typed(tree.unflatten(leaves)) == typed(plain_view(value))
    tree.check()


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(PYTREES)
def test_a_tree_is_a_function_of_its_parts(value):
    found = flat(value)
    if found is None:
        return
    _, tree = found
    assert flatten(value)[1] == tree
    numbered = tree.unflatten(range(tree.num_leaves))
    paths = paths_of(tree)
    assert [split_name(name) for name in tree.names] == [p or [""] for p in paths.values()]
    assert [trees.join(p) for p in paths.values()] == list(tree.names)
    for node in range(len(tree)):
        part = tree.subtree(node)
        part.check()
        first, last = tree.first_leaf[node], tree.first_leaf[tree.ends[node]]
        assert part.num_leaves == last - first
        for child in tree.children(node):
            assert tree.child(node, tree.keys[child]) == child
    assert tree.subtree(0) == tree
    assert typed(tree.unflatten(range(tree.num_leaves))) == typed(numbered)


def paths_of(tree):
    """Leaf's node → the texts of the keys that lead to it, found by going down from the root."""
    found = {}
    pending = [(0, [])]
    while pending:
        node, path = pending.pop()
        if tree.kinds[node] == Kind.LEAF:
            found[node] = path
        pending += [(child, [*path, trees.key_text(tree.keys[child])]) for child in tree.children(node)]
    return dict(sorted(found.items()))


@settings(max_examples=300, deadline=None)
@given(st.lists(KEYS, min_size=1, max_size=4))
def test_names_are_undone(path):
    name = trees.join(path)
    assert split_name(name) == path
    assert not name.startswith("__metadata__")
    value = 1
    for key in reversed(path):
        value = {key: value}
    assert flatten(value)[1].names == (name,)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(KEYS, min_size=1, max_size=3).map(tuple), min_size=2, max_size=2, unique=True))
def test_names_differ_where_paths_do(paths):
    assert trees.join(paths[0]) != trees.join(paths[1])


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (1, [""]),
        ({"": 1}, [""]),
        ({"": {"": 1}}, ["."]),
        ({"a": {"b": 1}, "a.b": 2}, ["a.b", "a\\.b"]),
        ({"a\\": {"b": 1}, "a": {"b": 2}}, ["a.b", "a\\\\.b"]),
        ({"__metadata__": 1}, ["\\__metadata__"]),
        ({"__metadata__x": {"y": 1}}, ["\\__metadata__x.y"]),
        ({"x": {"__metadata__": 1}}, ["x.__metadata__"]),
        ({"\\__metadata__": 1}, ["\\\\__metadata__"]),
        ({-1: [1, (2,)]}, ["-1.0", "-1.1.0"]),
        ({("a", 1): 1, ("é", 2, ("b",)): 2}, ['["a",1]', '["é",2,["b"]]']),
        ({(): 1}, ["[]"]),
        (Registered(1, Plain(2, None)), ["x", "y.first"]),
        (Positional((1, 2)), ["0", "1"]),
        (Data(1, 2), ["weights", "bias"]),
        *FLAX,
        (collections.OrderedDict(b=1, a=2), ["b", "a"]),
        ({"a": {}, "b": [], "c": None, "d": ()}, []),
    ],
)
def test_names(value, names):
    assert list(flatten(value)[1].names) == names


def test_split_name_takes_any_text():
    assert split_name("") == [""]
    assert split_name("a..b") == ["a", "", "b"]
    assert split_name("a\\") == ["a"]
    assert split_name("\\a\\b.c") == ["ab", "c"]


# --- parts of trees


VALUE = {"a": [1, (2, None), {"x": 3}], "b": Registered(4, 5), "c": {}, 'd"': collections.OrderedDict([(2, 6), (1, 7)])}


def test_children_and_subtrees():
    leaves, tree = flatten(VALUE)
    a = tree.child(0, "a")
    assert tree.names == ("a.0", "a.1.0", "a.2.x", "b.x", "b.y", 'd".2', 'd".1')
    assert [tree.keys[c] for c in tree.children(0)] == ["a", "b", "c", 'd"']
    assert tree.child(0, "z") is None
    assert tree.child(a, -1) == tree.child(a, 2)
    assert tree.child(a, 3) is None
    assert tree.child(a, -4) is None
    assert tree.child(a, "0") is None
    d = tree.child(0, 'd"')
    assert tree.child(d, -1) is None
    assert tree.kinds[tree.child(d, 1)] == Kind.LEAF
    assert tree.first_leaf[a] == 0
    assert tree.first_leaf[tree.child(0, "b")] == 3
    part = tree.subtree(tree.child(0, "b"))
    assert part.names == ("x", "y")
    assert part.unflatten([8, 9]) == Registered(8, 9)
    assert part == flatten(VALUE["b"])[1]
    leaf = tree.subtree(tree.child(a, 0))
    assert (leaf.names, leaf.unflatten([1])) == (("",), 1)
    with pytest.raises(ValueError, match="7 leaves, 6 were given"):
        tree.unflatten(leaves[1:])


def test_without():
    _, tree = flatten_arguments({"p": {"w": 1, "v": [2]}, "x": Own({"k": 3}, {"s": 1}), "y": 4})
    rest = tree.without([tree.child(0, "p")])
    rest.check()
    assert rest == flatten_arguments({"x": Own({"k": 3}, {"s": 1}), "y": 4})[1]
    assert rest.names == ("x.k", "y")
    assert tree.without([]) == tree
    nothing = tree.without(list(tree.children(0)))
    nothing.check()
    assert (nothing.num_leaves, nothing.unflatten([])) == (0, {})


@pytest.mark.parametrize(
    ("some", "expected"),
    [
        ({}, None),
        ({0: "l"}, {"a": ["l", None, None]}),
        ({1: "l"}, {"a": [None, ("l", None), None]}),
        ({2: "l"}, {"a": [None, None, {"x": "l"}]}),
        ({4: "l", 6: "m"}, {"b": {"y": "l"}, 'd"': {1: "m"}}),
    ],
)
def test_unflatten_some(some, expected):
    assert flatten(VALUE)[1].unflatten_some(some) == expected


def test_arguments_keep_their_order():
    leaves, tree = flatten_arguments({"z": [1], "a.b": 2, "none": None})
    assert (leaves, tree.names) == ([1, 2], ("z.0", "a\\.b"))
    assert tree.kinds[0] == Kind.ARGUMENTS
    assert tree.key_kinds[1] == KeyKind.ATTRIBUTE
    assert tree.unflatten([5, 6]) == {"z": [5], "a.b": 6, "none": None}
    tree.check()
    assert flatten_arguments({})[1].names == ()


def test_a_hundred_thousand_leaves_are_not_too_many():
    start = time.process_time()
    leaves, tree = flatten([0] * 100_000)
    tree.check()
    assert tree.names[-1] == "99999"
    assert tree.unflatten(leaves) == leaves
    assert time.process_time() - start < 5


# --- refusals


class Text(str):
    """A subclass of str."""


def nested(depth, leaf=1):
    value = leaf
    for _ in range(depth):
        value = [value]
    return value


def deep_key(depth):
    key = ()
    for _ in range(depth - 1):
        key = (key,)
    return key


def itself():
    value = [1]
    value.append(value)
    return value


def itself_in_a_dict():
    value = {"a": {}}
    value["a"]["b"] = value
    return value


@pytest.mark.parametrize(
    ("value", "problem", "leaf"),
    [
        ({"a": {1: 0, "1": 0}}, "cannot be sorted", "a"),
        ({"a": [{(1, "b"): 0, ("b", 1): 0}]}, "cannot be sorted", "a.0"),
        (collections.defaultdict(int, {1: 0, "1": 0}), "cannot be sorted", ""),
        (collections.OrderedDict([(1, 0), ("1", 0)]), "one name", "'1'"),
        ({"a": {1.5: 0}}, "key", "a.1\\.5"),
        ({True: 0}, "key", "True"),
        ({None: 0}, "key", "None"),
        ({b"x": 0}, "key", "b'x'"),
        ({np.int64(3): 0}, "key", "3"),
        ({KeyKind.ROOT: 0}, "key", "1"),
        ({Text("t"): 0}, "key", "t"),
        ({"\ud800": 0}, "key", "\ud800"),
        ({("\udfff", 1): 0}, "key", "('\\udfff', 1)".replace("\\", "\\\\")),
        ({2**63: 0}, "key", str(2**63)),
        ({-(2**63): 0}, "key", str(-(2**63))),
        ({(2**63,): 0}, "key", f"({2**63},)"),
        ({(1, 2.5): 0}, "key", "(1, 2\\.5)"),
        ({(True,): 0}, "key", "(True,)"),
        ({frozenset([1]): 0}, "key", "frozenset({1})"),
        ({Registered(1, 2): 0}, "key", "Registered(x=1, y=2)"),
        ({deep_key(9): 0}, "key", str(deep_key(9))),
        (nested(1001), "too deep", None),
        (itself(), "too deep", None),
        (itself_in_a_dict(), "too deep", None),
        ({"a" * (tree_structure.MAX_NAME + 1): 0}, "names are too long", None),
    ],
)
def test_what_the_format_does_not_hold_is_refused(value, problem, leaf):
    with pytest.raises(LeafError) as caught:
        flatten(value)
    assert problem in caught.value.problem
    if leaf is not None:
        assert caught.value.leaf == leaf
    assert len(str(caught.value).encode(errors="replace")) < 1500


def test_limits_are_reached():
    for value in (nested(900), {deep_key(8): 1}, {"a" * tree_structure.MAX_NAME: 1}, {2**63 - 1: 1, 1 - 2**63: 2}):
        leaves, tree = flatten(value)
        tree.check()
        assert tree.unflatten(leaves) == value


def test_a_tree_of_too_many_nodes(monkeypatch):
    monkeypatch.setattr(tree_flattening, "MAX_NODES", 10)
    flatten([0] * 9)
    with pytest.raises(LeafError, match="too large"):
        flatten([0] * 10)


def test_names_that_are_too_long_together(monkeypatch):
    monkeypatch.setattr(tree_structure, "MAX_NAMES_FIXED", 10)
    monkeypatch.setattr(tree_structure, "MAX_NAMES_EACH", 2)
    flatten({"a" * 12: 1})
    with pytest.raises(LeafError, match="more than 12 characters together"):
        flatten({"a" * 13: 1})


def test_no_recursion_is_needed():
    leaves, tree = flatten(nested(1000))
    tree.check()
    assert tree.names == (".".join(["0"] * 1000),)
    for value in (tree.unflatten(leaves), tree.unflatten_some({0: 1})):
        depth = 0
        while value != 1:  # comparing the lists would recurse
            (value,) = value
            depth += 1
        assert depth == 1000


# --- classes


def test_a_namedtuple_needs_only_its_name():
    _, tree = flatten(Registered(1, [2]))
    assert tree.classes == {0: f"{__name__}.Registered"}
    assert tree.unflatten([1, 2]) == Registered(1, [2])
    assert flatten(Plain(1, 2))[1].unflatten([1, 2]) == {"first": 1, "second": 2}
    assert type(flatten(Typed(1))[1].unflatten([1, 2])) is Typed


def test_a_namedtuple_is_rebuilt_by_its_fields_names():
    before = collections.namedtuple("Moved", "x y")
    after = collections.namedtuple("Moved", "y x z", defaults=(0,))
    other = collections.namedtuple("Moved", "y x")
    register_node(other, "tests.moved")
    _, tree = flatten(before(1, 2))
    moved = dataclasses.replace(tree, classes={0: "tests.moved"})
    assert moved.unflatten([1, 2]) == other(x=1, y=2)
    register_node(after, "tests.grown")
    with pytest.raises(RestoreError, match="fields") as caught:
        dataclasses.replace(tree, classes={0: "tests.grown"}).unflatten([1, 2])
    assert (caught.value.expected, caught.value.found) == ("x, y", "Moved(y, x, z)")
    custom = dataclasses.replace(flatten(Positional((1, 2)))[1], classes={0: "tests.moved"}, static={})
    with pytest.raises(RestoreError, match="fields"):
        custom.unflatten([1, 2])


STATIC = [
    True,
    0,
    -(2**63),
    2**64 - 1,
    0.5,
    math.inf,
    "é",
    "",
    b"\0\xff",
    [],
    (),
    {},
    [1, [2, (3, [4, ()])]],
    ((1, 2), (3,)),
    {"a": (1,), (1, ("b",)): [{2: None}], 5: {}, b"x": 1.5},
    (None, True),
]


@pytest.mark.parametrize("static", STATIC, ids=repr)
def test_static_data_of_each_kind(static):
    value = Own({"a": 1}, static)
    leaves, tree = flatten(value)
    assert tree.static == {0: static}
    back = trees.unpack_static(trees.pack_static(tree.static[0]))
    assert (back, repr(back)) == (static, repr(static))  # types too
    assert tree.unflatten(leaves) == value


def test_static_none_is_none():
    leaves, tree = flatten(Own((1,), None))
    assert tree.static == {}
    assert tree.unflatten(leaves) == Own((1,), None)


class Grown(dict):
    pass


@pytest.mark.parametrize(
    "static",
    [
        {1, 2},
        object(),
        len,
        np.float32(1),
        np.zeros(2),
        1j,
        2**64,
        -(2**63) - 1,
        "\ud800",
        Text("x"),
        Grown(),
        Registered(1, 2),
        KeyKind.ROOT,
        bytearray(b"x"),
        memoryview(b"x"),
        msgpack.ExtType(5, b""),
        msgpack.Timestamp(0),
        {"a": [({"b": {1}},)]},
        {(1, {2}.__class__): 1},
        nested(65),
        b"x" * (1 << 20),
    ],
    ids=lambda value: type(value).__name__,  # no repr: those of some hold addresses
)
def test_static_data_that_cannot_be_held_is_refused(static):
    with pytest.raises(LeafError, match="Static data"):
        trees.pack_static(static)
    with pytest.raises(LeafError) as caught:
        flatten({"a.b": [Own({}, static)]})
    assert caught.value.leaf == "a\\.b.0"


def test_static_data_of_jaxs_own_registry_is_left_out_where_it_must_be():
    assert flatten(Keyed(1, 2, note=len))[1].static == {}
    assert flatten(Keyed(1, 2, note=(1, "a")))[1].static == {0: (1, "a")}


def test_a_class_of_jaxs_keeps_its_keys():
    _, tree = flatten(Keyed(1, {"a": 2}, note=5))
    assert tree.names == ("left", "right.a")
    assert tree.unflatten([1, 2]) == Keyed(1, {"a": 2}, 5)
    _, tree = flatten(Positional((1,)))
    assert (tree.names, tree.unflatten([7])) == (("0",), (7,))
    assert flatten(jax.tree_util.Partial(len, 1, k=2))[1].num_leaves == 2
    assert flatten(jnp.zeros(3))[1].num_leaves == 1


def test_registering():
    class Once:
        pass

    class Twice:
        pass

    def build(static, view):
        return Once()

    assert register_node(Once, "tests.once", unflatten=build) is Once
    register_node(Once, "tests.once", unflatten=build)  # the same again
    for cls, name, unflatten in [
        (Once, "tests.other", build),
        (Once, "tests.once", lambda static, view: None),
        (Twice, "tests.once", build),
    ]:
        with pytest.raises(ValueError, match="clashes"):
            register_node(cls, name, unflatten=unflatten)
    with pytest.raises(ValueError, match="needs unflatten="):
        register_node(Twice)
    assert register_node(Twice, unflatten=build) is Twice
    assert tree_nodes.by_class[Twice].name.endswith("test_registering.<locals>.Twice")


def test_a_class_that_cannot_be_taken_apart():
    class Bad:
        pass

    def refuse(value):
        raise ValueError("not now")

    register_node(Bad, "tests.bad", flatten=refuse, unflatten=lambda static, view: Bad())
    with pytest.raises(LeafError, match="taken apart") as caught:
        flatten([{"x": Bad()}])
    assert (caught.value.leaf, caught.value.found) == ("0.x", "Bad: not now")


def test_an_unknown_class_is_its_plain_view():
    _, tree = flatten(Own({"b": 1, "a": 2}, "s"))
    unknown = dataclasses.replace(tree, classes={0: "somewhere.Else"})
    assert unknown.unflatten([1, 2]) == {"b": 1, "a": 2}
    assert list(unknown.unflatten([1, 2])) == ["b", "a"]
    _, tree = flatten(Own([1, 2], "s"))
    assert dataclasses.replace(tree, classes={}).unflatten([1, 2]) == (1, 2)
    # A module is never looked into.
    assert dataclasses.replace(tree, classes={0: "collections.Counter"}).unflatten([1, 2]) == (1, 2)


@pytest.mark.parametrize("factory", [dict, list, tuple, set, int, float, str, bool, None])
def test_factories_of_defaultdicts(factory):
    leaves, tree = flatten(collections.defaultdict(factory, b=1, a=2))
    tree.check()
    back = tree.unflatten(leaves)
    assert (back.default_factory, dict(back)) == (factory, {"a": 2, "b": 1})


def test_other_factories_are_forgotten():
    def list():  # noqa: A001 - of a name that is known
        return 1

    for factory in (lambda: 0, list, np.zeros):
        leaves, tree = flatten(collections.defaultdict(factory, a=1))
        assert tree.static == {}
        assert tree.unflatten(leaves).default_factory is None


# --- what is read


def test_a_tree_that_was_read_is_checked_for_its_limits(monkeypatch):
    tree = flatten({"a": [1]})[1]
    monkeypatch.setattr(tree_structure, "MAX_NODES", 2)
    with pytest.raises(CorruptPackageError, match="too large") as caught:
        tree.check()
    assert caught.value.field == "tree.kind"


@pytest.mark.parametrize("kind", list(KeyKind))
@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=8) | st.sampled_from(["", "0", "-0", "01", "[]", "[1,2]", "[ 1]", "1e3", "0x1", "１"]))
def test_any_text_is_a_key_or_is_refused(kind, text):
    try:
        key = trees.key_from_text(kind, text)
    except CorruptPackageError as error:
        assert error.field == "tree.key"
    else:
        assert key is None if kind is KeyKind.ROOT else trees.key_text(key) == text


HOSTILE = {
    "nothing": b"",
    "no type": b"\xc1",
    "cut off": b"\x92\x01",
    "bytes left over": b"\x01\x01",
    "deep lists": b"\x91" * 100_000 + b"\xc0",
    "lists of 65": b"\x91" * 65 + b"\xc0",
    "deep maps": b"\x81\xc0" * 100_000,
    "deep tuples": None,
    "a list of 4 G": b"\xdd\xff\xff\xff\xff",
    "a map of 4 G": b"\xdf\xff\xff\xff\xff",
    "text of 4 G": b"\xdb\xff\xff\xff\xff",
    "bytes of 4 G": b"\xc6\xff\xff\xff\xff",
    "an extension of 4 G": b"\xc9\xff\xff\xff\xff\x01",
    "large lists in large lists": b"\xdd\x00\x0f\x00\x00" * 1000 + bytes(1_000_000),
    "bad text": b"\xa1\xff",
    "a surrogate": b"\xa3\xed\xa0\x80",
    "extension 0": b"\xd4\x00\x00",
    "extension 2": b"\xd4\x02\x90",
    "a time": b"\xd6\xff\0\0\0\0",
    "a time in a tuple in a map": b"\x81\x01\xc7\x07\x01\x91\xd6\xff\0\0\0\0",
    "a time as a key": b"\x81\xd6\xff\0\0\0\0\x01",
    "a bad time": b"\xd7\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    "a time of another length": b"\xd4\xff\x00",
    "a tuple of text": b"\xc7\x02\x01\xa1a",
    "a tuple of a number": b"\xd4\x01\x05",
    "a tuple of a map": b"\xc7\x03\x01\x81\x01\x02",
    "a tuple of a tuple": b"\xc7\x03\x01\xd4\x01\x90",
    "an empty tuple": b"\xc7\x00\x01",
    "a tuple with bytes left over": b"\xd5\x01\x90\x90",
    "a list as a key": b"\x81\x90\x01",
    "a map as a key": b"\x81\x80\x01",
    "a tuple of a list as a key": b"\x81\xd5\x01\x91\x90\x01",
    "too much": b"\xc6\x00\x10\x00\x00" + bytes(1 << 20),
}


def tuples(depth):
    packed = b"\x90"
    for _ in range(depth):
        packed = b"\x91" + b"\xc8" + len(packed).to_bytes(2, "big") + b"\x01" + packed
    return packed


HOSTILE["deep tuples"] = tuples(100)
HOSTILE["very deep tuples"] = tuples(5000)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_static_data_is_refused(name):
    start = time.process_time()
    with pytest.raises(CorruptPackageError) as caught:
        trees.unpack_static(HOSTILE[name])
    assert caught.value.field == "static"
    assert time.process_time() - start < 2


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_are_static_data_or_refused(packed):
    try:
        data = trees.unpack_static(packed)
    except CorruptPackageError:
        return
    assert isinstance(trees.pack_static(data), bytes)


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(allow_nan=False)
        | st.text()
        | st.binary(),
        lambda inner: (
            st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(-9, 9), inner)
        ),
        max_leaves=20,
    )
)
def test_static_data_comes_back(data):
    back = trees.unpack_static(trees.pack_static(data))
    assert (back, repr(back)) == (data, repr(data))


def test_a_tree_may_be_empty_of_classes():
    tree = Tree([1], [0], [1], [None])
    tree.check()
    assert tree.unflatten(["x"]) == "x"
