"""What a replayed function can be put through, and what replay refuses."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.extend.mlir.dialects import stablehlo

from obmlite import replay
from obmlite.errors import ArgumentError, UnknownNameError, UnsupportedFormatError
from obmlite.replay import _interpreter, _reading
from obmlite.replay._table import COMPOSITES, REFUSED, RULES

DOCUMENT = pathlib.Path(__file__).parent.parent.parent / "docs" / "replay.md"


def exported(fn: Any, *arguments: Any, **options: Any) -> export.Exported:
    structs = [jax.ShapeDtypeStruct(np.shape(a), np.asarray(a).dtype) for a in arguments]
    return export.export(jax.jit(fn), **options)(*structs)


def replayed(fn: Any, *arguments: Any, **options: Any) -> Any:
    return replay.to_jax(exported(fn, *arguments).mlir_module_serialized, **options)


def primitives(jaxpr: Any) -> set[str]:
    found = set()
    for eqn in jaxpr.eqns:
        found.add(eqn.primitive.name)
        for value in eqn.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    found |= primitives(inner)
    return found


X = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
W = np.random.default_rng(1).normal(size=(4, 5)).astype("float32")


def mlp(w: Any, x: Any) -> Any:
    return jnp.tanh(x @ w) ** 2


# --- sizes that are open


def test_a_scan_over_an_open_batch_is_a_scan_of_rows() -> None:
    dims = export.symbolic_shape("b, 4")
    fn = jax.jit(lambda x: lax.scan(lambda c, row: (c + row, c * row), x[:, 0], x.T))
    module = export.export(fn)(jax.ShapeDtypeStruct(dims, "float32")).mlir_module_serialized
    (scan,) = [e for e in jax.make_jaxpr(replay.to_jax(module))(X).eqns if e.primitive.name == "scan"]
    body = scan.params["jaxpr"].jaxpr
    assert "dynamic_slice" not in primitives(body)
    assert "dynamic_update_slice" not in primitives(body)
    assert [v.aval.shape for v in body.invars][-1] == (3,)


CARRIED = """
func.func @main(%x: tensor<?xf32>) -> tensor<?xf32> {
  %zero = stablehlo.constant dense<0> : tensor<i32>
  %one = stablehlo.constant dense<1.0> : tensor<f32>
  %size = stablehlo.get_dimension_size %x, dim = 0 : (tensor<?xf32>) -> tensor<i32>
  %out:3 = stablehlo.while(%i = %zero, %n = %size, %y = %x) : tensor<i32>, tensor<i32>, tensor<?xf32>
  cond {
    %three = stablehlo.constant dense<3> : tensor<i32>
    %more = stablehlo.compare LT, %i, %three : (tensor<i32>, tensor<i32>) -> tensor<i1>
    stablehlo.return %more : tensor<i1>
  } do {
    %step = stablehlo.constant dense<STEP> : tensor<i32>
    %next = stablehlo.add %i, %step : tensor<i32>
    %shape = stablehlo.reshape %n : (tensor<i32>) -> tensor<1xi32>
    %ones = stablehlo.dynamic_broadcast_in_dim %one, %shape, dims = [] : (tensor<f32>, tensor<1xi32>) -> tensor<?xf32>
    %z = stablehlo.add %y, %ones : tensor<?xf32>
    stablehlo.return %next, %n, %z : tensor<i32>, tensor<i32>, tensor<?xf32>
  }
  %shape = stablehlo.reshape %out#1 : (tensor<i32>) -> tensor<1xi32>
  %ones = stablehlo.dynamic_broadcast_in_dim %one, %shape, dims = [] : (tensor<f32>, tensor<1xi32>) -> tensor<?xf32>
  %r = stablehlo.add %out#2, %ones : tensor<?xf32>
  return %r : tensor<?xf32>
}
"""


@pytest.mark.parametrize(("step", "loop", "added"), [(1, "scan", 4), (2, "while", 3)])
def test_a_size_that_a_loop_carries_stays_known(step: int, loop: str, added: int) -> None:
    fn = replay.to_jax(CARRIED.replace("STEP", str(step)))
    assert loop in primitives(jax.make_jaxpr(fn)(X[0]))
    np.testing.assert_allclose(fn(X[0])[0], X[0] + added, rtol=1e-6)


# --- transformations


def test_vmap_of_a_batch_that_was_not_exported() -> None:
    fn = replayed(mlp, W, X[0])
    many = jax.vmap(lambda x: fn(W, x)[0])(X)
    np.testing.assert_allclose(many, mlp(W, X), rtol=1e-6)


def test_derivatives_of_every_order_without_a_saved_vjp() -> None:
    fn = replayed(mlp, W, X)

    def loss(call: Any) -> Any:
        return lambda w: jnp.sum(call(w, X))

    first, second = (loss(c) for c in (mlp, lambda w, x: fn(w, x)[0]))
    np.testing.assert_allclose(jax.grad(second)(W), jax.grad(first)(W), rtol=1e-6)
    np.testing.assert_allclose(jax.hessian(second)(W), jax.hessian(first)(W), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jvp(second, (W,), (W,))[1], jax.jvp(first, (W,), (W,))[1], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(jax.checkpoint(second))(W), jax.grad(first)(W), rtol=1e-6)


def test_gradients_per_example() -> None:
    fn = replayed(mlp, W, X[0])
    each = jax.vmap(jax.grad(lambda w, x: jnp.sum(fn(w, x)[0])), (None, 0))(W, X)
    for n, x in enumerate(X):
        np.testing.assert_allclose(each[n], jax.grad(lambda w, x=x: jnp.sum(mlp(w, x)))(W), rtol=1e-5)


def test_it_runs_without_jit_and_again_exports() -> None:
    fn = replayed(mlp, W, X)
    np.testing.assert_allclose(fn(W, X)[0], mlp(W, X), rtol=1e-6)
    again = exported(fn, W, X).call(W, X)
    np.testing.assert_allclose(again[0], mlp(W, X), rtol=1e-6)


def test_a_random_key_that_is_vmapped() -> None:
    keys = np.arange(6, dtype="uint32").reshape(3, 2)

    def draw(key: Any) -> Any:
        return jax.random.normal(jax.random.wrap_key_data(key), (5,))

    fn = replayed(draw, keys[0])
    np.testing.assert_array_equal(jax.jit(jax.vmap(fn))(keys)[0], jax.jit(jax.vmap(draw))(keys))


# --- loops


def test_a_scan_is_a_scan_over_rows() -> None:
    def fn(c: Any, xs: Any) -> Any:
        return lax.scan(lambda c, x: (jnp.tanh(c * x), c), c, xs)

    jaxpr = jax.make_jaxpr(replayed(fn, X[0], X))(X[0], X)
    (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    inside = primitives(jaxpr)
    assert "while" not in inside
    assert not inside & {"dynamic_slice", "dynamic_update_slice"}
    shapes = [var.aval.shape for var in scan.outvars]
    assert (shapes.count((3, 4)), shapes.count((4,))) == (1, 1)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_through_a_scan(reverse: bool) -> None:
    def fn(c: Any, xs: Any) -> Any:
        last, ys = lax.scan(lambda c, x: (jnp.tanh(c * x), c), c, xs, reverse=reverse)
        return last.sum() + (ys**2).sum()

    again = replayed(fn, X[0], X)
    for argument in (0, 1):
        want = jax.grad(fn, argument)(X[0], X)
        np.testing.assert_allclose(jax.grad(lambda *a: again(*a)[0], argument)(X[0], X), want, rtol=1e-5, atol=1e-6)


def test_an_array_that_a_loop_reads_and_writes_stays_whole() -> None:
    def fn(x: Any) -> Any:
        return lax.scan(lambda c, i: (c.at[i].set(c.sum()), c[i]), x, jnp.arange(3))

    again = replayed(fn, X)
    for want, have in zip(fn(X), again(X), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-6)


def test_a_loop_of_unknown_length_is_a_while() -> None:
    def fn(x: Any) -> Any:
        return lax.while_loop(lambda c: c.sum() < 100, lambda c: jnp.abs(c) * 2 + 1, x)

    again = replayed(fn, X)
    assert "while" in primitives(jax.make_jaxpr(again)(X))
    np.testing.assert_array_equal(again(X)[0], fn(X))
    np.testing.assert_allclose(jax.jvp(again, (X,), (X,))[1][0], jax.jvp(fn, (X,), (X,))[1], rtol=1e-6)


def test_an_argmax_has_a_derivative() -> None:
    def fn(x: Any) -> Any:
        return jnp.take_along_axis(x, jnp.argmax(x, 1)[:, None], 1).sum()

    again = replayed(fn, X)
    np.testing.assert_array_equal(jax.grad(lambda x: again(x)[0])(X), jax.grad(fn)(X))


@pytest.mark.parametrize("reverse", [False, True])
def test_cumulative_products_have_a_derivative(reverse: bool) -> None:
    def fn(x: Any) -> Any:
        return lax.cumprod(x, 1, reverse).sum() + lax.cummax(x, 0, reverse).sum()

    again = replayed(fn, X)
    assert "reduce_window" not in primitives(jax.make_jaxpr(again)(X))
    np.testing.assert_allclose(jax.grad(lambda x: again(x)[0])(X), jax.grad(fn)(X), rtol=1e-5)


# --- modules as text


def text(body: str) -> str:
    return f"module {{ {body} }}"


def test_generic_bodies() -> None:
    module = text("""
      func.func @main(%x: tensor<6xf32>, %i: tensor<3x1xi32>, %u: tensor<3xf32>) -> (tensor<6xf32>, tensor<6xf32>, tensor<f32>, tensor<6xf32>) {
        %zero = stablehlo.constant dense<0.0> : tensor<f32>
        %sorted = "stablehlo.sort"(%x) <{dimension = 0 : i64, is_stable = true}> ({
        ^bb0(%a: tensor<f32>, %b: tensor<f32>):
          %aa = stablehlo.abs %a : tensor<f32>
          %ab = stablehlo.abs %b : tensor<f32>
          %c = stablehlo.compare GT, %aa, %ab : (tensor<f32>, tensor<f32>) -> tensor<i1>
          stablehlo.return %c : tensor<i1>
        }) : (tensor<6xf32>) -> tensor<6xf32>
        %scattered = "stablehlo.scatter"(%x, %i, %u) <{indices_are_sorted = false, unique_indices = false,
          scatter_dimension_numbers = #stablehlo.scatter<inserted_window_dims = [0], scatter_dims_to_operand_dims = [0], index_vector_dim = 1>}> ({
        ^bb0(%a: tensor<f32>, %b: tensor<f32>):
          %d = stablehlo.subtract %a, %b : tensor<f32>
          %e = stablehlo.multiply %d, %d : tensor<f32>
          stablehlo.return %e : tensor<f32>
        }) : (tensor<6xf32>, tensor<3x1xi32>, tensor<3xf32>) -> tensor<6xf32>
        %reduced = "stablehlo.reduce"(%x, %zero) <{dimensions = array<i64: 0>}> ({
        ^bb0(%a: tensor<f32>, %b: tensor<f32>):
          %aa = stablehlo.abs %a : tensor<f32>
          %ab = stablehlo.abs %b : tensor<f32>
          %c = stablehlo.maximum %aa, %ab : tensor<f32>
          stablehlo.return %c : tensor<f32>
        }) : (tensor<6xf32>, tensor<f32>) -> tensor<f32>
        %mapped = "stablehlo.map"(%x, %x) <{dimensions = array<i64: 0>}> ({
        ^bb0(%a: tensor<f32>, %b: tensor<f32>):
          %c = stablehlo.multiply %a, %b : tensor<f32>
          stablehlo.return %c : tensor<f32>
        }) : (tensor<6xf32>, tensor<6xf32>) -> tensor<6xf32>
        return %sorted, %scattered, %reduced, %mapped : tensor<6xf32>, tensor<6xf32>, tensor<f32>, tensor<6xf32>
      }""")  # noqa: E501
    x = np.float32([1, -3, 2, 0.5, -2, 3])
    indices, updates = np.int32([[0], [4], [9]]), np.float32([5, 1, 7])
    ordered, scattered, reduced, mapped = jax.jit(replay.to_jax(module))(x, indices, updates)
    np.testing.assert_array_equal(ordered, [-3, 3, 2, -2, 1, 0.5])  # by magnitude, equal ones as they were
    np.testing.assert_array_equal(scattered, [16, -3, 2, 0.5, 9, 3])  # the index 9 is dropped
    assert reduced == 3
    np.testing.assert_array_equal(mapped, x * x)


def test_case_takes_its_last_branch_for_an_index_out_of_range() -> None:
    module = text("""
      func.func @main(%i: tensor<i32>, %x: tensor<f32>) -> tensor<f32> {
        %0 = "stablehlo.case"(%i) ({ stablehlo.return %x : tensor<f32> }, {
          %1 = stablehlo.negate %x : tensor<f32>
          stablehlo.return %1 : tensor<f32>
        }) : (tensor<i32>) -> tensor<f32>
        return %0 : tensor<f32>
      }""")
    fn = jax.jit(replay.to_jax(module))
    assert [float(fn(np.int32(i), np.float32(2))[0]) for i in (0, 1, 2, -1)] == [2, -2, -2, -2]


def test_known_shapes_are_computed_while_tracing() -> None:
    module = text("""
      func.func @main(%x: tensor<?x2xf32>) -> tensor<?xf32> {
        %two = stablehlo.constant dense<-2> : tensor<i32>
        %n = stablehlo.get_dimension_size %x, dim = 0 : (tensor<?x2xf32>) -> tensor<i32>
        %m = stablehlo.multiply %n, %two : tensor<i32>
        %k = stablehlo.abs %m : tensor<i32>
        %s = stablehlo.reshape %k : (tensor<i32>) -> tensor<1xi32>
        %y = stablehlo.dynamic_reshape %x, %s : (tensor<?x2xf32>, tensor<1xi32>) -> tensor<?xf32>
        return %y : tensor<?xf32>
      }""")
    jaxpr = jax.make_jaxpr(replay.to_jax(module))(np.zeros((3, 2), "float32"))
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["reshape"]


@pytest.mark.parametrize(
    ("element", "values"),
    [
        ("f32", ["1.5", "-0.0"]),
        ("f32", ["0x7FC00000", "0xFF800000"]),
        ("bf16", ["1.5", "2.0"]),
        ("f8E4M3FN", ["1.5", "2.0"]),
        ("i4", ["-3", "7"]),
        ("ui8", ["200", "3"]),
        ("i1", ["true", "false"]),
        ("complex<f32>", ["(1.5,2.0)", "(0.0,-1.0)"]),
    ],
)
def test_constants(element: str, values: list[str]) -> None:
    module = text(f"""
      func.func @main() -> (tensor<{element}>, tensor<2x{element}>, tensor<3x{element}>, tensor<0x{element}>) {{
        %0 = stablehlo.constant dense<{values[0]}> : tensor<{element}>
        %1 = stablehlo.constant dense<[{", ".join(values)}]> : tensor<2x{element}>
        %2 = stablehlo.constant dense<{values[1]}> : tensor<3x{element}>
        %3 = stablehlo.constant dense<> : tensor<0x{element}>
        return %0, %1, %2, %3 : tensor<{element}>, tensor<2x{element}>, tensor<3x{element}>, tensor<0x{element}>
      }}""")
    one, two, three, none = map(np.asarray, replay.to_jax(module)())
    assert one.tobytes() + three[:1].tobytes() == two.tobytes()
    assert three.tobytes() == 3 * three[:1].tobytes()
    assert (none.shape, none.dtype) == ((0,), one.dtype)
    numbers = {"true": 1, "false": 0, "0x7FC00000": np.nan, "(1.5,2.0)": 1.5 + 2j}
    number = numbers[values[0]] if values[0] in numbers else float(values[0])
    np.testing.assert_array_equal(one.astype("complex64"), np.complex64(number))


def test_a_splat_is_no_large_array() -> None:
    fn = replayed(lambda x: x + jnp.full((1 << 20,), 3.0), np.zeros(1 << 20, "float32"))
    jaxpr = jax.make_jaxpr(fn)(np.zeros(1 << 20, "float32"))
    assert all(np.size(const) <= 1 for const in jaxpr.consts)
    assert all(np.size(getattr(v, "val", 0)) <= 1 for eqn in jaxpr.eqns for v in eqn.invars)


# --- custom calls, platforms, shardings

UNKNOWN = text("""
  func.func @main(%x: tensor<2xf32>) -> tensor<2xf32> {
    %0 = stablehlo.custom_call @mine(%x) {mhlo.backend_config = {factor = 3 : i64}} : (tensor<2xf32>) -> tensor<2xf32>
    %1 = stablehlo.custom_call @mine(%0) {mhlo.backend_config = {factor = 2 : i64}} : (tensor<2xf32>) -> tensor<2xf32>
    return %1 : tensor<2xf32>
  }""")


def test_unknown_custom_calls_are_the_users() -> None:
    assert [str(r) for r in replay.check(UNKNOWN)] == ["stablehlo.custom_call mine (2 times): there is no rule for it"]
    with pytest.raises(UnsupportedFormatError, match=r"stablehlo\.custom_call mine"):
        replay.to_jax(UNKNOWN)
    calls = {"mine": lambda x, factor: x * factor}
    assert replay.check(UNKNOWN, custom_calls=calls) == []
    np.testing.assert_array_equal(replay.to_jax(UNKNOWN, custom_calls=calls)(np.float32([1, 2]))[0], [6, 12])


def test_only_the_platform_that_it_runs_on_is_looked_at() -> None:
    many = exported(jnp.linalg.cholesky, np.eye(3, dtype="float32"), platforms=("tpu", "cpu"))
    every, cpu = (replay.operations(many.mlir_module_serialized, platform_index=index) for index in (None, 1))
    assert {"stablehlo.cholesky", "stablehlo.custom_call lapack_spotrf_ffi"} <= set(every)
    assert "stablehlo.cholesky" not in cpu
    assert "stablehlo.custom_call lapack_spotrf_ffi" in cpu
    with pytest.raises(ArgumentError, match="platform_index"):
        replay.to_jax(many.mlir_module_serialized)
    fn = replay.to_jax(many.mlir_module_serialized, platform_index=1)
    assert "cond" not in primitives(jax.make_jaxpr(fn)(X[:3, :3]))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from obmlite import replay

mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
sharding = NamedSharding(mesh, P("data", "model"))

def fn(x):
    return jax.lax.with_sharding_constraint(x * 2, sharding) + 1

x = np.arange(32, dtype="float32").reshape(8, 4)
exported = jax.export.export(jax.jit(fn, in_shardings=sharding))(jax.ShapeDtypeStruct(x.shape, x.dtype))
assert exported.nr_devices == 8
replayed = jax.jit(replay.to_jax(exported.mlir_module_serialized))
alone = replayed(x)[0]
assert len(alone.devices()) == 1
np.testing.assert_array_equal(alone, x * 2 + 1)
with jax.set_mesh(mesh):
    assert "sharding_constraint" in str(jax.make_jaxpr(replayed)(x))
    together = replayed(jax.device_put(x, sharding))[0]
assert together.sharding.is_equivalent_to(sharding, 2), together.sharding
np.testing.assert_array_equal(together, x * 2 + 1)
other = jax.make_mesh((2,), ("other",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
with jax.set_mesh(other):
    assert "sharding_constraint" not in str(jax.make_jaxpr(replayed)(x))

# --- inside shard_map, loops and branches whose carries start from constants
def looped(x):
    total, _ = jax.lax.scan(lambda c, r: (c + r, None), jnp.zeros(4), x)
    return jax.lax.cond(total[0] > 0, lambda: total, lambda: jnp.zeros(4))

one = jax.export.export(jax.jit(looped))(jax.ShapeDtypeStruct((2, 4), "float32"))
inside = replay.to_jax(one.mlir_module_serialized)
spread = jax.shard_map(lambda x: inside(x)[0][None], mesh=mesh, in_specs=P("data"), out_specs=P("data"))
wanted = jnp.stack([looped(part) for part in x.reshape(4, 2, 4)])
np.testing.assert_array_equal(jax.jit(spread)(x), wanted)
gradient = jax.jit(jax.grad(lambda x: spread(x).sum()))(x)
np.testing.assert_array_equal(gradient, (wanted[:, :1].repeat(2, 0) > 0) * jnp.ones((8, 4)))
print("right")
"""


def test_a_function_exported_on_eight_devices_runs_on_one_and_on_a_mesh() -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    root = pathlib.Path(__file__).parent.parent.parent
    found = subprocess.run(
        [sys.executable, "-c", "import jax.export\n" + SHARDED],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert found.stdout == "right\n", found.stderr[-3000:]


# --- what is refused


def test_operations_are_refused_before_anything_runs() -> None:
    module = text("""
      func.func @main(%x: tensor<2xf32>) -> tensor<2xf32> {
        %0 = "stablehlo.all_reduce"(%x) <{replica_groups = dense<[[0]]> : tensor<1x1xi64>}> ({
        ^bb0(%a: tensor<f32>, %b: tensor<f32>):
          %1 = stablehlo.add %a, %b : tensor<f32>
          stablehlo.return %1 : tensor<f32>
        }) : (tensor<2xf32>) -> tensor<2xf32>
        return %0 : tensor<2xf32>
      }""")
    (reason,) = replay.check(module)
    assert (reason.operation, reason.count) == ("stablehlo.all_reduce", 1)
    with pytest.raises(UnsupportedFormatError, match=r"stablehlo\.all_reduce: a collective"):
        replay.to_jax(module)


def test_quantized_types_are_refused() -> None:
    module = text("""
      func.func @main(%x: tensor<2x!quant.uniform<i8:f32, 0.5:0>>) -> tensor<2x!quant.uniform<i8:f32, 0.5:0>> {
        %0 = stablehlo.add %x, %x : tensor<2x!quant.uniform<i8:f32, 0.5:0>>
        return %0 : tensor<2x!quant.uniform<i8:f32, 0.5:0>>
      }""")
    with pytest.raises(UnsupportedFormatError, match="quant"):
        replay.to_jax(module)


def test_arguments_are_checked() -> None:
    fn = replayed(mlp, W, X)
    with pytest.raises(ArgumentError, match="expected: 2\n  found: 1"):
        fn(W)
    with pytest.raises(ArgumentError, match=r"argument 1\n  expected: tensor<3x4xf32>\n  found: int32\[3, 4\]"):
        fn(W, X.astype("int32"))
    with pytest.raises(UnknownNameError, match="no such function"):
        replay.to_jax(exported(mlp, W, X).mlir_module_serialized, function="other")


def test_a_module_that_this_jax_does_not_read() -> None:
    with pytest.raises(UnsupportedFormatError, match="This JAX does not read the module"):
        replay.check(text("func.func @main() { %0 = stablehlo.unheard_of : tensor<f32> return }"))


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = exported(lambda x: lax.scan(lambda c, r: (c + r, c), x[0], x), X).mlir_module_serialized
    for name, what in (("MAX_OPERATIONS", "operations"), ("MAX_DEPTH", "regions"), ("MAX_CONSTANT_BYTES", "bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(_reading, name, 0 if name != "MAX_CONSTANT_BYTES" else -1)
            with pytest.raises(UnsupportedFormatError, match=f"too many {what}"):
                replay.read(artifact)
    fn = replay.to_jax(artifact)
    for name, what in (("MAX_STEPS", "operations to run"), ("MAX_CALL_DEPTH", "calls within calls")):
        with monkeypatch.context() as patch:
            patch.setattr(_interpreter, name, 1)
            with pytest.raises(UnsupportedFormatError, match=f"too many {what}"):
                jax.make_jaxpr(fn)(X)


def test_recursion_ends() -> None:
    module = text("""
      func.func @main(%x: tensor<f32>) -> tensor<f32> {
        %0 = func.call @main(%x) : (tensor<f32>) -> tensor<f32>
        return %0 : tensor<f32>
      }""")
    assert replay.check(module) == []
    with pytest.raises(UnsupportedFormatError, match="calls within calls"):
        replay.to_jax(module)(np.float32(1))


def test_64_bits_need_the_mode_as_arguments_only() -> None:
    module = text("""
      func.func @main(%x: tensor<2xf64>) -> tensor<2xf64> { return %x : tensor<2xf64> }""")
    with pytest.raises(ArgumentError, match=r"64-bit numbers[^$]*jax_enable_x64"):
        replay.to_jax(module)(np.zeros(2, "float32"))
    inside = text("""
      func.func @main(%x: tensor<2xui32>) -> tensor<2xui32> {
        %c = stablehlo.constant dense<4294967296> : tensor<2xui64>
        %0 = stablehlo.convert %x : (tensor<2xui32>) -> tensor<2xui64>
        %1 = stablehlo.multiply %0, %c : tensor<2xui64>
        %s = stablehlo.constant dense<31> : tensor<2xui64>
        %2 = stablehlo.shift_right_logical %1, %s : tensor<2xui64>
        %3 = stablehlo.convert %2 : (tensor<2xui64>) -> tensor<2xui32>
        return %3 : tensor<2xui32>
      }""")
    np.testing.assert_array_equal(jax.jit(replay.to_jax(inside))(np.uint32([1, 5]))[0], [2, 10])


# --- numerics


def test_no_default_of_the_callers_changes_a_precision() -> None:
    fn = replayed(lambda a, b: a @ b, X, W)
    with jax.default_matmul_precision("highest"):
        (dot,) = jax.make_jaxpr(fn)(X, W).eqns
    assert dot.params["precision"] == (lax.Precision.DEFAULT, lax.Precision.DEFAULT)


def test_a_thousand_operations_are_traced_within_two_seconds() -> None:
    def fn(x: Any) -> Any:
        for _ in range(334):
            x = jnp.sin(x) * 2 + 1
        return x

    artifact = exported(fn, X).mlir_module_serialized
    start = time.perf_counter()
    jaxpr = jax.make_jaxpr(replay.to_jax(artifact))(X)
    assert time.perf_counter() - start < 2
    assert len(jaxpr.eqns) >= 1000


# --- the document


def test_every_operation_of_stablehlo_has_a_rule_or_a_reason() -> None:
    names = {
        cls.OPERATION_NAME
        for cls in vars(stablehlo).values()
        if isinstance(getattr(cls, "OPERATION_NAME", None), str) and cls.OPERATION_NAME.startswith("stablehlo.")
    }
    assert len(names) > 100
    assert names - {"stablehlo.return"} <= set(RULES) | set(REFUSED)
    assert not set(RULES) & set(REFUSED)


@pytest.mark.skipif("chlo.mulhi" not in COMPOSITES, reason="JAX 0.9 lacks a primitive")
def test_the_document_has_the_table() -> None:
    written = DOCUMENT.read_text().partition("<!-- generated: python -m obmlite.replay -->\n")[2]
    assert written.partition("<!-- end -->")[0].strip() == replay.table().strip()


SLICE = """
func.func @main(%x: tensor<8xf32>, %n: tensor<1xi32>) -> tensor<?xf32> {{
  %zero = stablehlo.constant dense<0> : tensor<1xi32>
  %one = stablehlo.constant dense<1> : tensor<1xi32>
  %0 = func.call @cut(%x, {start}, {limit}, %one)
    : (tensor<8xf32>, tensor<1xi32>, tensor<1xi32>, tensor<1xi32>) -> tensor<?xf32>
  return %0 : tensor<?xf32>
}}
func.func private @cut(%x: tensor<8xf32>, %a: tensor<1xi32>, %b: tensor<1xi32>, %s: tensor<1xi32>) -> tensor<?xf32> {{
  %b2 = stablehlo.add %b, %b : tensor<1xi32>
  %0 = stablehlo.real_dynamic_slice %x, %a, %b2, %s
    : (tensor<8xf32>, tensor<1xi32>, tensor<1xi32>, tensor<1xi32>) -> tensor<?xf32>
  return %0 : tensor<?xf32>
}}
"""


@pytest.mark.parametrize(("start", "limit"), [("%n", "%one"), ("%zero", "%n")])
def test_a_size_in_the_content_of_an_array_is_refused_before_anything_runs(start: str, limit: str) -> None:
    module = SLICE.format(start=start, limit=limit)
    (reason,) = replay.check(module)
    assert reason.operation == "stablehlo.real_dynamic_slice"
    assert "content of an array" in reason.reason
    with pytest.raises(UnsupportedFormatError, match="content of an array"):
        replay.to_jax(module)


def test_a_size_that_is_known_is_replayed() -> None:
    module = SLICE.format(start="%one", limit="%one")
    assert not replay.check(module)
    x = np.arange(8, dtype="float32")
    np.testing.assert_array_equal(replay.to_jax(module)(x, np.array([3], "int32"))[0], x[1:2])


@pytest.mark.parametrize(
    ("operation", "result"),
    [
        ("stablehlo.dynamic_iota %n, dim = 0 : (tensor<1xi32>)", "tensor<?xf32>"),
        ("stablehlo.dynamic_broadcast_in_dim %y, %n, dims = [] : (tensor<f32>, tensor<1xi32>)", "tensor<?xf32>"),
        ("stablehlo.dynamic_reshape %x, %n : (tensor<8xf32>, tensor<1xi32>)", "tensor<?xf32>"),
    ],
)
def test_a_shape_in_the_content_of_an_array_is_refused(operation: str, result: str) -> None:
    module = f"""
    func.func @main(%x: tensor<8xf32>, %y: tensor<f32>, %n: tensor<1xi32>) -> {result} {{
      %0 = {operation} -> {result}
      return %0 : {result}
    }}
    """
    (reason,) = replay.check(module)
    assert "content of an array" in reason.reason
