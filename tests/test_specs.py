"""Specs: their text, what they are of, and what JAX is given."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import obmlite
from obmlite import dims, dtypes, specs
from obmlite.errors import ExportError, LeafError, RestoreError
from obmlite.specs import UNCONSTRAINED, MeshSpec, Partition, TensorSpec, spec, to_jax

P = PartitionSpec


def kind(name):
    return dtypes.parse(name)


# --- text


@pytest.mark.parametrize(
    ("text", "shape", "name", "weak"),
    [
        ("f32[2,3]", (2, 3), "float32", False),
        ("f32[]", (), "float32", False),
        ("f32", (), "float32", False),
        ("~f32[1]", (1,), "float32", True),
        (" ~ bf16 [ 2 , 3 ] ", (2, 3), "bfloat16", True),
        ("float8_e4m3fn[0]", (0,), "float8_e4m3fn", False),
        ("bool[2,]", (2,), "bool", False),
        ("i4[7]", (7,), "int4", False),
        ("c64[1]", (1,), "complex64", False),
        ("key<threefry2x32>[4]", (4,), "key<threefry2x32>", False),
        ("key<fry>[4]", (4,), "key<threefry2x32>", False),
        ("float0[3]", (3,), "float0", False),
    ],
)
def test_text(text, shape, name, weak):
    assert spec(text) == TensorSpec(shape, kind(name), weak)


def test_symbolic_text():
    found = spec("u8[b, 2*b+1, floordiv(h, 2), 3]")
    assert found.symbols == {"b", "h"}
    assert found.shape == (dims.parse("b"), dims.parse("2*b + 1"), dims.parse("floordiv(h, 2)"), 3)
    assert str(found) == "u8[b,2*b + 1,floordiv(h, 2),3]"
    assert found.ndim == 4
    assert spec("f32[2]").symbols == frozenset()


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "dtype"),
        ("[2]", "dtype"),
        ("f33[2]", "dtype"),
        ("F32[2]", "dtype"),
        ("~~f32[2]", "dtype"),
        ("f32 f32[2]", "dtype"),
        ("key<>[2]", "dtype"),
        ("key<nothing>[2]", "dtype"),
        ("object[2]", "dtype"),
        ("f32[2", "spec"),
        ("f32]", "spec"),
        ("f32[2][3]", "dimension"),
        ("f32[[2]]", "dimension"),
        ("f32[2;3]", "dimension"),
        ("f32[-1]", "dimension"),
        ("f32[b+]", "dimension"),
        ("f32[,]", "dimension"),
        ("f32[1.5]", "dimension"),
        (f"f32[{2**63}]", "dimension"),
        ("f32[" + "(" * 1000 + "]", "dimension"),
    ],
)
def test_malformed_text_is_refused(text, field):
    with pytest.raises(ExportError) as caught:
        spec(text)
    assert caught.value.field == field
    assert len(str(caught.value)) < 1000


def test_text_is_mapped_over_pytrees():
    array = np.zeros(2)
    assert obmlite.spec is spec
    found = spec({"a": ["f32[b]", None], "b": (array, "i8[2]"), "c": 3})
    assert found == {"a": [spec("f32[b]"), None], "b": (array, spec("i8[2]")), "c": 3}
    assert spec(found) == found


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 9) | st.sampled_from(["b", "2*b + 1", "max(b, c)"]).map(dims.parse), max_size=4),
    st.sampled_from(dtypes.ALL),
    st.booleans(),
)
def test_the_text_of_a_spec_is_read_back(shape, dtype, weak):
    found = TensorSpec(tuple(shape), dtype, weak)
    assert spec(str(found)) == found


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=12) | st.text(alphabet="~fiu32[]b*+, <>key", max_size=16))
def test_any_text_is_a_spec_or_is_refused(text):
    try:
        found = spec(text)
    except ExportError:
        return
    assert spec(str(found)) == found


# --- of values


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.zeros((2, 3), np.float32), "f32[2,3]"),
        (np.zeros((), ">i2"), "i16[]"),
        (np.float64(1), "f64[]"),
        (np.zeros((0, 4), ml_dtypes.int4), "i4[0,4]"),
        (np.zeros(3, jax.dtypes.float0), "float0[3]"),
        (jnp.ones((2,), jnp.bfloat16), "bf16[2]"),
        (jnp.asarray(1.0), "f32[]"),
        (jnp.asarray(1.0) * 2, "f32[]"),
        (True, "bool[]"),
        (1, "~i32[]"),
        (1.5, "~f32[]"),
        (1j, "~c64[]"),
        (jax.ShapeDtypeStruct((2,), jnp.int8), "i8[2]"),
        (jax.ShapeDtypeStruct((), jnp.float32, weak_type=True), "~f32[]"),
        (jax.random.key(0), "key<threefry2x32>[]"),
        (jax.random.split(jax.random.key(0, impl="rbg"), 3), "key<rbg>[3]"),
        (jax.random.PRNGKey(0), "u32[2]"),
        (jax.eval_shape(lambda: jnp.zeros((4, 1))), "f32[4,1]"),
    ],
    ids=lambda value: f"{value!r:.40}",
)
def test_of(value, expected):
    found = TensorSpec.of(value)
    if getattr(value, "weak_type", False) and not expected.startswith("~"):
        expected = f"~{expected}"
    assert str(found) == expected
    assert (found.partition, found.memory_kind, found.logical_axes) == (None, None, None)
    assert TensorSpec.of(found) is found
    assert all(type(d) is int for d in found.shape)


def test_weak_types_are_jaxs():
    assert TensorSpec.of(jnp.asarray(1.0)).weak_type == jnp.asarray(1.0).weak_type
    weak = jax.eval_shape(lambda: jnp.asarray(2.0) * 2)
    assert TensorSpec.of(weak).weak_type == weak.weak_type


def test_symbolic_shapes_of_jax():
    b, twice = jax.export.symbolic_shape("b, 2*b + 1")
    found = TensorSpec.of(jax.ShapeDtypeStruct((b, twice, 3), jnp.float32))
    assert str(found) == "f32[b,2*b + 1,3]"
    assert found == spec("f32[b,2*b+1,3]")


@pytest.mark.parametrize("value", ["f32[2]", "text", None, object(), [1], {"a": 1}, b"x", len])
def test_what_is_no_leaf_is_refused(value):
    with pytest.raises(LeafError, match="neither an array nor a number") as caught:
        TensorSpec.of(value)
    assert caught.value.found.endswith(type(value).__qualname__)


@pytest.mark.parametrize(
    "value",
    [
        np.array(["a"]),
        np.array([object()]),
        np.zeros(2, "M8[s]"),
        np.zeros(2, [("a", "f4")]),
        np.ma.zeros(2),
        2**40,
        -(2**31) - 1,
    ],
)
def test_dtypes_that_the_format_does_not_hold_are_refused(value):
    with pytest.raises(LeafError):
        TensorSpec.of(value)


# --- partitions


def concrete(*types):
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    return Mesh(devices, ("data", "model"), axis_types=types or (AxisType.Auto, AxisType.Auto))


ABSTRACT = AbstractMesh((4, 2, 1), ("data", "model", "x"), (AxisType.Auto, AxisType.Explicit, AxisType.Manual))


def test_a_partition_on_an_abstract_mesh():
    sharding = NamedSharding(ABSTRACT, P("data", None, ("model", "x"), P.UNCONSTRAINED, ()))
    found = Partition.of(sharding)
    mesh = MeshSpec(("data", "model", "x"), (4, 2, 1), (1, 2, 3))
    assert found == Partition((("data",), None, ("model", "x"), UNCONSTRAINED, None), mesh)
    assert str(found) == "P(data, None, model+x, ?, None)"
    assert str(found.mesh) == "data=4, model=2, x=1"


def test_a_partition_on_devices():
    found = Partition.of(NamedSharding(concrete(AxisType.Explicit, AxisType.Auto), P(("data", "model"))))
    assert found == Partition((("data", "model"),), MeshSpec(("data", "model"), (1, 1), (2, 1)))
    assert Partition.of(NamedSharding(concrete(), P())) == Partition((), MeshSpec(("data", "model"), (1, 1), (1, 1)))


def test_unreduced_and_reduced_axes():
    mesh = AbstractMesh((4, 2), ("data", "model"), (AxisType.Explicit, AxisType.Explicit))
    assert Partition.of(NamedSharding(mesh, P(None, unreduced={"model", "data"}))).unreduced == ("data", "model")
    assert Partition.of(NamedSharding(mesh, P(None, reduced={"model"}))).reduced == ("model",)


@pytest.mark.parametrize("value", [None, "P(x)", SingleDeviceSharding(jax.devices()[0]), P("data")])
def test_what_names_no_axes_has_no_partition(value):
    assert Partition.of(value) is None


def test_a_mesh_without_axes_is_none():
    sharding = NamedSharding(AbstractMesh((), ()), P())
    assert Partition.of(sharding) is None
    assert TensorSpec.of(jax.ShapeDtypeStruct((2,), jnp.float32, sharding=sharding)).partition is None


@pytest.mark.parametrize("mesh", [concrete(), ABSTRACT], ids=["devices", "abstract"])
def test_shardings_of_structs(mesh):
    struct = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, P("data", "model")))
    found = TensorSpec.of(struct)
    assert found.partition == Partition.of(struct.sharding)
    assert found.memory_kind is None
    assert str(found) == "f32[8,8]"


def test_shardings_of_arrays():
    array = jax.device_put(np.zeros((4, 2), np.float32), NamedSharding(concrete(), P("data")))
    found = TensorSpec.of(array)
    assert found.partition.entries == (("data",),)
    assert found.memory_kind is None  # the default memory, whatever the platform calls it
    assert TensorSpec.of(jnp.zeros(3)).memory_kind is None


@pytest.mark.parametrize("mesh", [concrete(), ABSTRACT], ids=["devices", "abstract"])
def test_memory_kinds(mesh):
    default = jax.devices()[0].default_memory().kind
    names = {m.kind for m in jax.devices()[0].addressable_memories()} | {"pinned_host"}
    for name in names if mesh is not ABSTRACT else ("pinned_host", "device"):
        sharding = NamedSharding(mesh, P("data"), memory_kind=name)
        found = TensorSpec.of(jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding))
        usual = "device" if mesh is ABSTRACT else default
        assert found.memory_kind == (None if name == usual else name)


# --- what JAX is given


def test_to_jax():
    first, second, third = to_jax([spec("~f32[b,2*b,3]"), spec("key<rbg>[b]"), spec("i4[7]")], ["b <= 16", "b >= 2"])
    assert (first.shape, second.shape) == ((second.shape[0], 2 * second.shape[0], 3), (first.shape[0],))
    assert (first.dtype, first.weak_type, third.dtype, third.shape) == (jnp.float32, True, jnp.int4, (7,))
    assert jnp.issubdtype(second.dtype, jax.dtypes.prng_key)
    assert first.shape[0].scope is second.shape[0].scope
    assert first.shape[0] >= 2
    assert first.shape[0] <= 16
    assert to_jax([]) == []
    assert [TensorSpec.of(s) for s in (first, second, third)] == [
        spec("~f32[b,2*b,3]"),
        spec("key<rbg>[b]"),
        spec("i4[7]"),
    ]


@pytest.mark.parametrize(
    ("constraint", "field"), [("b", "constraint"), ("b <= ", "constraint"), ("b <> 2", "constraint")]
)
def test_malformed_constraints_are_refused(constraint, field):
    with pytest.raises(ExportError) as caught:
        to_jax([spec("f32[b]")], [constraint])
    assert caught.value.field == "constraint"


def test_constraints_that_jax_refuses_are_refused():
    with pytest.raises(ExportError) as caught:
        to_jax([spec("f32[b]")], ["b == 4", "b == 5"])
    assert caught.value.field == "constraint"


def test_the_dtype_of_a_spec_is_jaxs():
    assert spec("bf16[2]").dtype == jnp.bfloat16
    assert spec("key<rbg>[]").dtype == jax.random.key(0, impl="rbg").dtype
    unknown = TensorSpec((), dtypes.by_code(dtypes.KEY, "an-unknown-one"))
    assert str(unknown) == "key<an-unknown-one>[]"
    with pytest.raises(RestoreError, match="no PRNG implementation"):
        _ = unknown.dtype


def test_specs_are_values():
    left, right = spec("f32[b, 2]"), spec("float32[b,2]")
    assert left == right
    assert hash(left) == hash(right)
    assert left != dataclasses.replace(left, memory_kind="pinned_host")
    with pytest.raises(dataclasses.FrozenInstanceError):
        left.weak_type = True
    assert specs.AxisType(2) is specs.AxisType.EXPLICIT
