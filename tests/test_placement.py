"""Who goes where: what a caller may ask for, and one error for all leaves that do not fit."""

from __future__ import annotations

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import obmlite
from obmlite import placement
from obmlite import tree as trees
from obmlite.errors import ArgumentError, RestoreError
from obmlite.specs import UNCONSTRAINED, MeshSpec, Partition, TensorSpec
from tests.on_devices import on_devices


def test_on_eight_devices() -> None:
    assert on_devices(__file__).split() == CHECKS, "each has run and printed its name"


# --- what the checks share

Layer = collections.namedtuple("Layer", ["kernel", "bias"])


def mesh(**axes: int) -> Mesh:
    count = int(np.prod(list(axes.values())))
    kinds = (AxisType.Auto,) * len(axes)
    return Mesh(np.array(jax.devices()[:count]).reshape(*axes.values()), tuple(axes), axis_types=kinds)


def partition(*entries: Any, **axes: int) -> Partition:
    entries = tuple((e,) if isinstance(e, str) and e != UNCONSTRAINED else e for e in entries)
    on = MeshSpec(tuple(axes), tuple(axes.values()), (1,) * len(axes)) if axes else None
    return Partition(entries, on)


def leaf(text: str, *, saved: Partition | None = None, logical: tuple[Any, ...] = (), memory: str | None = None) -> Any:
    known = obmlite.spec(text)
    return TensorSpec(known.shape, known.kind, known.weak_type, saved, memory, partition(*logical) if logical else None)


def place(specs: Any, **asked: Any) -> dict[str, Any]:
    leaves, tree = trees.flatten(specs)
    return dict(zip(tree.names, placement.shardings_of(tree, tree.names, leaves, **asked), strict=True))


def refused(specs: Any, kind: type[Exception] = RestoreError, **asked: Any) -> str:
    with pytest.raises(kind) as raised:
        place(specs, **asked)
    return str(raised.value)


PLAIN = {"b": leaf("f32[8]"), "w": leaf("f32[8,4]")}


# --- one device


def test_nothing_asked_is_the_default_device() -> None:
    assert place(PLAIN) == {"b": None, "w": None}


def test_one_sharding_or_device_is_for_all() -> None:
    device = jax.devices()[0]
    single = SingleDeviceSharding(device)
    assert place(PLAIN, shardings=single) == {"b": single, "w": single}
    assert place(PLAIN, shardings=device) == {"b": single, "w": single}


def test_a_prefix_matches_by_keys_and_not_by_class() -> None:
    one, two = mesh(x=1), mesh(y=1)
    first, second = NamedSharding(one, P()), NamedSharding(two, P())
    specs = {"top": {"kernel": leaf("f32[8]"), "bias": leaf("f32[1]")}, "list": [leaf("f32[2]")] * 2, "none": None}
    # The weights' plain views, and the classes that a caller has in hand.
    found = place(specs, shardings={"top": Layer(first, None), "list": (second, first), "none": None})
    assert found == {"list.0": second, "list.1": first, "top.bias": None, "top.kernel": first}
    found = place(specs, shardings=collections.OrderedDict(top=second, list=first))
    assert found == {"list.0": first, "list.1": first, "top.bias": second, "top.kernel": second}
    assert place({"a": {"b": leaf("f32[]")}, "c": ()}, shardings={"a": first}) == {"a.b": first}


def test_a_prefix_that_does_not_match_lists_all_places() -> None:
    one = NamedSharding(mesh(x=1), P())
    text = refused({"a": {"b": leaf("f32[8]"), "c": leaf("f32[8]")}}, shardings={"a": {"b": {"x": one}}, "z": one})
    assert "a.b: the weights have a leaf here, and no container" in text
    assert "a.c: the weights have this, and the shardings do not" in text
    assert "z: the weights have nothing here" in text
    assert "1: the weights have nothing here" in refused({"1": leaf("f32[8]")}, shardings={1: one})
    with pytest.raises(ArgumentError, match="no pytree"):
        place(PLAIN, shardings={"b": one, 2: one})


def test_what_is_not_chosen_need_not_fit() -> None:
    one = NamedSharding(mesh(x=1), P("x"))
    leaves, tree = trees.flatten({"a": leaf("f32[]"), "b": [leaf("f32[8]")] * 3, "c": leaf("f32[8]")})

    def chosen(*numbers: int, **asked: Any) -> list[Any]:
        return placement.shardings_of(tree, tree.names, leaves, chosen=numbers, **asked)

    assert chosen(3, 1, shardings=one) == [one, one]
    assert chosen(1, 4, shardings={"b": None, "c": one}) == [None, one]
    assert chosen(4, shardings={"c": one}) == [one]
    assert chosen(2, shardings=lambda name, _: {"b.1": one}[name]) == [one]
    assert chosen(shardings={"a": one}) == []
    with pytest.raises(RestoreError, match="b: the weights have this"):
        chosen(1, shardings={"c": one})


def test_a_function_chooses_for_each() -> None:
    one = NamedSharding(mesh(x=1), P())
    seen = []

    def choose(name: str, spec: TensorSpec) -> Any:
        seen.append((name, str(spec)))
        return one if name == "w" else None

    assert place(PLAIN, shardings=choose) == {"b": None, "w": one}
    assert seen == [("b", "f32[8]"), ("w", "f32[8,4]")]


def test_what_is_no_sharding_is_named() -> None:
    text = refused(PLAIN, shardings={"b": "data", "w": P("x")})
    assert "b: 'data' (str) is no sharding, no device and not None" in text
    assert "w: " in text
    assert "says nothing without a mesh" in text
    assert "no sharding" in refused(PLAIN, shardings=lambda name, spec: [name])
    assert "restore(mesh=" in refused(PLAIN, ArgumentError, shardings=mesh(x=1))
    abstract = AbstractMesh((1,), ("x",))
    assert "abstract mesh" in refused(PLAIN, shardings=NamedSharding(abstract, P()))
    assert "no devices to restore to" in refused(PLAIN, ArgumentError, mesh=abstract)
    assert "This is no mesh" in refused(PLAIN, ArgumentError, mesh=jax.devices())
    assert "give mesh=" in refused(PLAIN, ArgumentError, rules={"a": "b"})
    for rules in (3, {"a": 3}, [("a", "b", "c")], {1: "x"}):
        assert "rules" in refused(PLAIN, ArgumentError, mesh=mesh(x=1), rules=rules)


def test_saved_memory_is_kept_where_there_is_such() -> None:
    specs = {"known": leaf("f32[8]", memory="pinned_host"), "unknown": leaf("f32[8]", memory="tape")}
    found = place(specs, mesh=mesh(x=1))
    assert (found["known"].memory_kind, found["unknown"].memory_kind) == ("pinned_host", "device")


# --- templates


def match(weights: Any, like: Any) -> placement.Like:
    leaves, tree = trees.flatten(weights)
    return placement.match_like(tree, tree.names, leaves, like)


def unmatched(weights: Any, like: Any) -> str:
    with pytest.raises(RestoreError) as raised:
        match(weights, like)
    return str(raised.value)


def test_a_template_gives_containers_dtypes_and_places() -> None:
    weights = {"layers": [{"bias": leaf("f32[4]"), "kernel": leaf("f32[4,4]")}], "step": leaf("i32[]")}
    sharding = NamedSharding(mesh(x=1), P("x"))
    kernel = jax.ShapeDtypeStruct((4, 4), jnp.bfloat16, sharding=sharding)
    like = {"step": 0, "layers": (Layer(kernel, np.zeros(4, "f4")),)}
    found = match(weights, like)
    # A namedtuple's leaves are in its fields' order, not in a dict's.
    assert found.leaves == (1, 0, 2)
    assert found.targets == ((jnp.dtype("bfloat16"), sharding), (None, None), (None, None))
    assert found.build(["k", "b", "s"]) == {"step": "s", "layers": (Layer("k", "b"),)}


@jax.tree_util.register_pytree_with_keys_class
class Box:
    def __init__(self, value: Any) -> None:
        self.value = value

    def tree_flatten_with_keys(self) -> Any:
        return [(jax.tree_util.GetAttrKey("value"), self.value)], None

    @classmethod
    def tree_unflatten(cls, _: Any, children: Any) -> Any:
        return cls(*children)


def test_a_class_that_jax_knows_comes_back() -> None:
    found = match({"value": leaf("f32[2]")}, Box(obmlite.spec("f16[2]")))
    built = found.build(["v"])
    assert (type(built), built.value) == (Box, "v")
    assert found.targets == ((np.dtype("float16"), None),)


def test_arrays_on_the_default_device_say_nothing_of_places() -> None:
    array = jnp.zeros(4)
    there = jax.device_put(array, jax.devices()[0])
    assert match([leaf("f32[4]")] * 2, [array, there]).targets == ((None, None), (None, None))


def test_a_template_that_does_not_match_lists_all_leaves() -> None:
    weights = {
        "dtype": leaf("f32[2]"),
        "extra": leaf("f32[2]"),
        "key": leaf("key<threefry2x32>[]"),
        "mask": leaf("bool[2]"),
        "shape": leaf("f32[2]"),
        "text": leaf("f32[2]"),
    }
    like = {
        "dtype": jax.ShapeDtypeStruct((2,), "int32"),
        "key": jax.random.key(0, impl="rbg"),
        "mask": np.zeros(2, "f4"),
        "missing": 1,
        "shape": np.zeros((2, 1), "f4"),
        "text": "abc",
    }
    text = unmatched(weights, like)
    for line in (
        "dtype: the template has i32[2], the weights f32[2], which is not cast to it",
        "extra: the weights have it, and the template does not",
        "key: the template has key<rbg>[], the weights key<threefry2x32>[], which is not cast to it",
        "mask: the template has f32[2], the weights bool[2]",
        "missing: the template has it, and the weights do not",
        "shape: the template has f32[2,1], the weights f32[2]",
        "text: the template's leaf is no array: builtins.str",
    ):
        assert line in text
    assert "abstract mesh" in unmatched(
        [leaf("f32[2]")],
        [jax.ShapeDtypeStruct((2,), "float32", sharding=NamedSharding(AbstractMesh((1,), ("x",)), P("x")))],
    )
    assert "0: the template has ~f32[]" in unmatched([leaf("i32[]")], [1.0])


def test_a_long_list_is_cut() -> None:
    text = unmatched([leaf("f32[2]")] * 50, [])
    assert text.count("the template does not") == placement.SHOWN
    assert "… and 30 more" in text


# --- eight devices


def check_saved_partitions_are_applied() -> None:
    on = mesh(data=4, model=2)
    specs = {
        "both": leaf("f32[8,4]", saved=partition("model", "data", data=2, model=2)),
        "one": leaf("f32[8,4]", saved=partition(("data", "model"), None, data=2, model=4)),
        "free": leaf("f32[8,4]", saved=partition(UNCONSTRAINED, "model", data=2, model=4)),
        "none": leaf("f32[3]"),
        "key": leaf("key<threefry2x32>[8]", saved=partition("data", data=2)),
    }
    found = place(specs, mesh=on)
    assert found["both"] == NamedSharding(on, P("model", "data"))
    assert found["one"] == NamedSharding(on, P(("data", "model"), None))
    assert found["free"] == NamedSharding(on, P(None, "model"))
    assert found["none"].is_fully_replicated
    assert found["key"].shard_shape((8,)) == (2,)
    for name, spec in specs.items():
        found[name].shard_shape(spec.shape)


def check_rules_map_logical_axes() -> None:
    on = mesh(data=4, model=2)
    specs = {"w": leaf("f32[8,4]", logical=("embed", "mlp")), "model": leaf("f32[4]", logical=("model",))}
    found = place(specs, mesh=on, rules={"embed": None, "mlp": ["model"]})
    assert found == {"w": NamedSharding(on, P(None, ("model",))), "model": NamedSharding(on, P(("model",)))}
    found = place(specs, mesh=on, rules={"embed": ("data", "model"), "mlp": None})
    assert found["w"] == NamedSharding(on, P(("data", "model"), None))
    # As in Flax: in the rules' order, each takes what is free.
    pairs = [("mlp", "model"), ("embed", "model"), ("embed", "data")]
    assert place(specs, mesh=on, rules=pairs)["w"] == NamedSharding(on, P(("data",), ("model",)))
    assert place(specs, mesh=on, rules=pairs[:2])["w"] == NamedSharding(on, P(None, ("model",)))
    pairs = [("embed", None), ("embed", "data"), ("mlp", "model")]
    assert place(specs, mesh=on, rules=pairs)["w"] == NamedSharding(on, P(None, ("model",)))
    # A saved partition comes before logical axes, and its axes are mapped where the mesh lacks them.
    saved = leaf("f32[8,4]", saved=partition("fsdp", "model", fsdp=4, model=2), logical=("embed", "mlp"))
    found = place([saved], mesh=on, rules={"fsdp": "data", "model": None, "embed": "model"})
    assert found["0"] == NamedSharding(on, P(("data",), ("model",)))
    assert place([saved], mesh=on, rules=[("fsdp", "model"), ("fsdp", "data")])["0"].spec == P(("data",), ("model",))


def check_all_that_does_not_fit_is_in_one_error() -> None:
    on = mesh(data=4, model=2)
    specs = {
        "fine": leaf("f32[8,4]", saved=partition("data", "model", data=2, model=2)),
        "missing": leaf("f32[8]", saved=partition("fsdp", fsdp=8)),
        "odd": leaf("bf16[8,6]", saved=partition(None, "data", data=2)),
        "product": leaf("f32[4]", saved=partition(("data", "model"), data=2, model=2)),
        "scalar": leaf("f32[]", saved=partition(None, data=2)),
        "twice": leaf("f32[4,4]", logical=("a", "b")),
        "unmapped": leaf("f32[4]", logical=("embed",)),
    }
    text = refused(specs, mesh=on, rules={"a": "model", "b": "model"})
    for line in (
        "missing: f32[8] as P(fsdp): the axis 'fsdp' is not on the mesh, and no rule maps it",
        "odd: bf16[8,6] as P(None, data): dimension 1 has 6 elements, which do not divide over data=4",
        "product: f32[4] as P(data+model): dimension 0 has 4 elements, which do not divide over data=4 x model=2",
        "scalar: f32[] as P(None): the partition has 1 entries, for 0 dimensions",
        "twice: f32[4,4] as P(a, b), here P(model, model): the axis 'model' is used twice",
        "unmapped: f32[4] as P(embed): the logical axis 'embed' is not on the mesh, and no rule maps it",
        "data=4, model=2",
        "rules=",
    ):
        assert line in text, line
    assert "fine" not in text
    assert "the mesh has no axis 'tensor'" in refused([specs["unmapped"]], mesh=on, rules={"embed": "tensor"})


def check_shardings_that_do_not_divide() -> None:
    on = mesh(data=4, model=2)
    text = refused(PLAIN | {"odd": leaf("f32[6]")}, shardings=NamedSharding(on, P("data")))
    assert "leaf: odd" in text
    assert "[6] as P" in text
    assert "dimension 0 has 6 elements, which do not divide over data=4" in text
    text = refused(PLAIN, shardings=NamedSharding(on, P(None, "data")))
    assert "b: [8] as P" in text
    assert "the partition has 2 entries, for 1 dimensions" in text
    # With a mesh a partition spec will do, and None leaves a leaf to what was saved.
    specs = {"a": leaf("f32[8]"), "b": leaf("f32[8]", saved=partition("model", model=2))}
    found = place(specs, mesh=on, shardings={"a": P("data"), "b": None})
    assert found == {"a": NamedSharding(on, P("data")), "b": NamedSharding(on, P(("model",)))}
    assert "the mesh has no axis 'x'" in refused(specs, mesh=on, shardings=P("x"))
    free = place(specs, mesh=on, shardings=P(P.UNCONSTRAINED))
    assert free["a"] == NamedSharding(on, P(P.UNCONSTRAINED))


def check_a_template_of_sharded_arrays() -> None:
    on = mesh(data=4, model=2)
    sharding = NamedSharding(on, P("data"))
    other = SingleDeviceSharding(jax.devices()[3])
    like = [jax.device_put(jnp.zeros(8), sharding), jax.device_put(jnp.zeros(8), jax.devices()[3]), jnp.zeros(8)]
    assert match([leaf("f32[8]")] * 3, like).targets == ((None, sharding), (None, other), (None, None))
    with jax.default_device(jax.devices()[3]):
        assert match([leaf("f32[8]")] * 3, like).targets[1:] == ((None, None), (None, None))


CHECKS = [name for name in list(globals()) if name.startswith("check_")]

if __name__ == "__main__":
    for check in CHECKS:
        globals()[check]()
        print(check)
