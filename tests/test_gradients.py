"""Derivatives through saved functions: of which order, with respect to what, inside of what, and what is refused."""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite

ROOT = pathlib.Path(__file__).parent.parent
ENGINES = ("export", "rebuild")
f32 = functools.partial(jax.ShapeDtypeStruct, dtype="float32")

PARAMS = {"w": np.linspace(-1, 1, 12, dtype="f4").reshape(4, 3), "b": np.arange(3, dtype="f4") / 4}
X = np.linspace(-0.7, 1.3, 20, dtype="f4").reshape(5, 4)


def mlp(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"] + params["b"]) ** 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("gradients")


def saved(folder: pathlib.Path, fn: Callable[..., Any], *args: Any, name: str = "f", **options: Any) -> pathlib.Path:
    path = folder / f"{len(list(folder.iterdir()))}.obm"
    obmlite.Model({name: obmlite.export(fn, *args, name=name, **options)}).save(path)
    return path


def loaded(path: pathlib.Path, engine: str = "auto") -> obmlite.Function:
    return next(iter(obmlite.load(path, engine=engine).functions.values()))


@pytest.fixture(scope="module")
def second(folder: pathlib.Path) -> pathlib.Path:
    """Of order 2, for every batch size and platform."""
    return saved(folder, mlp, PARAMS, obmlite.spec("f32[b,4]"), vjp_order=2)


@pytest.fixture(scope="module", params=ENGINES)
def function(request: pytest.FixtureRequest, second: pathlib.Path) -> obmlite.Function:
    return loaded(second, request.param)


def close(left: Any, right: Any, rtol: float = 2e-6, atol: float = 1e-6) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def both(function: Callable[..., Any], native: Callable[..., Any], transform: Callable[..., Any], *args: Any) -> None:
    """The same transformation of the saved function and of the native one gives the same."""
    close(transform(function)(*args), transform(native)(*args))


def total(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: fn(*args).sum()


# --- orders, and with respect to what


def test_first_order(function: obmlite.Function) -> None:
    assert function.vjp_order == 2
    for argnums in (0, 1, (0, 1)):
        both(function, mlp, lambda fn, n=argnums: jax.grad(total(fn), n), PARAMS, X)
        both(function, mlp, lambda fn, n=argnums: jax.jit(jax.value_and_grad(total(fn), n)), PARAMS, X)
    cotangent = np.arange(15, dtype="f4").reshape(5, 3)
    both(function, mlp, lambda fn: lambda *args: jax.vjp(fn, *args)[1](cotangent), PARAMS, X)
    _, pull = jax.vjp(function, PARAMS, X)
    close(pull(cotangent), pull(cotangent))  # more than once


def test_second_order(function: obmlite.Function) -> None:
    def squared(fn: Callable[..., Any]) -> Callable[..., Any]:
        def loss(params: Any, x: Any) -> Any:
            first = jax.grad(total(fn), (0, 1))(params, x)
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(first))

        return jax.grad(loss, (0, 1))

    both(function, mlp, squared, PARAMS, X)
    both(function, mlp, lambda fn: jax.jit(squared(fn)), PARAMS, X[:2])


def test_gradients_are_those_of_finite_differences(second: pathlib.Path) -> None:
    function = loaded(second)
    gradient = np.asarray(jax.grad(total(function), 1)(PARAMS, X))
    step = np.zeros_like(X)
    step[2, 1] = 1e-2
    slope = (total(function)(PARAMS, X + step) - total(function)(PARAMS, X - step)) / 2e-2
    np.testing.assert_allclose(gradient[2, 1], slope, rtol=1e-2)


def test_gradients_with_respect_to_bound_weights(folder: pathlib.Path) -> None:
    model = obmlite.Model.from_function(mlp, PARAMS, f32((5, 4)), vjp_order=1)
    model.save(folder / "bound.obm")
    model = obmlite.load(folder / "bound.obm")
    close(jax.grad(total(model))(X), jax.grad(total(mlp), 1)(PARAMS, X))
    params = model.weights["params"].restore()
    close(jax.grad(total(model.functions["mlp"]))(params, X), jax.grad(total(mlp))(PARAMS, X))


def mixed(x: Any, n: Any, mask: Any, key: Any, z: Any) -> Any:
    noise = jax.random.uniform(key, x.shape)
    y = jnp.where(mask, x * n, x**2) + noise
    return {"y": y, "n": n + 1, "mask": ~mask, "key": jax.random.fold_in(key, 1), "z": z * jnp.conj(z) * y.sum()}


MIXED = (
    jnp.arange(4.0),
    jnp.array([1, 2, 3, 4]),
    jnp.array([True, False, True, False]),
    jax.random.key(7),
    jnp.array([1 + 2j, 3 - 1j], "complex64"),
)


@pytest.mark.parametrize("engine", ENGINES)
def test_integers_booleans_keys_and_complex_numbers(engine: str, folder: pathlib.Path) -> None:
    function = loaded(saved(folder, mixed, *MIXED, vjp_order=2), engine)

    def loss(fn: Callable[..., Any]) -> Callable[..., Any]:
        def of(*args: Any) -> Any:
            result = fn(*args)
            return jnp.sum(result["y"] ** 2) + jnp.sum(jnp.real(result["z"])), {k: result[k] for k in ("n", "mask")}

        return of

    def flat(fn: Callable[..., Any]) -> Callable[..., Any]:
        return jax.value_and_grad(loss(fn), (0, 1, 2, 4), has_aux=True, allow_int=True)

    both(function, mixed, flat, *MIXED)
    both(function, mixed, lambda fn: jax.jit(jax.grad(loss(fn), (0, 4), has_aux=True)), *MIXED)
    gradient = jax.grad(loss(function), (1, 2), has_aux=True, allow_int=True)(*MIXED)[0]
    assert [g.dtype for g in gradient] == [jax.dtypes.float0] * 2

    def again(fn: Callable[..., Any]) -> Callable[..., Any]:
        first = jax.grad(lambda x, z: loss(fn)(x, *MIXED[1:4], z)[0], (0, 1))
        return jax.grad(lambda x, z: sum(jnp.sum(jnp.abs(g) ** 2) for g in first(x, z)), (0, 1))

    both(function, mixed, lambda fn: jax.jit(again(fn)), MIXED[0], MIXED[4])


def test_the_cotangents_of_integer_results_are_float0(folder: pathlib.Path) -> None:
    function = loaded(saved(folder, mixed, *MIXED, vjp_order=1))
    for fn in (function, mixed):
        results, pull = jax.vjp(fn, *MIXED)
        zeros = {k: np.zeros(results[k].shape, jax.dtypes.float0) for k in ("n", "mask", "key")}
        given = {"y": jnp.ones(4), "z": jnp.ones(2, "complex64"), **zeros}
        pulled = pull(given)
        assert pulled[1].dtype == pulled[2].dtype == jax.dtypes.float0
        close((pulled[0], pulled[4]), (pull(given)[0], pull(given)[4]))
    close(pulled[0], jax.vjp(function, *MIXED)[1](given)[0])


def test_float0_as_an_argument(folder: pathlib.Path) -> None:
    zero = np.zeros(3, jax.dtypes.float0)

    def fn(x: Any, nothing: Any) -> Any:
        return x * 2

    function = loaded(saved(folder, fn, f32((3,)), zero, vjp_order=1))
    x = jnp.arange(3.0)
    close(function(x, zero), x * 2)
    close(jax.grad(lambda x: function(x, zero).sum())(x), jnp.full(3, 2.0))


def test_arguments_that_are_not_used_and_results_that_are_constant(folder: pathlib.Path) -> None:
    def fn(a: Any, b: Any, c: Any) -> Any:
        return jnp.ones(3), b * 2, a

    args = (jnp.arange(2.0), jnp.arange(3.0), jnp.arange(4.0))
    function = loaded(saved(folder, fn, *args, vjp_order=2))

    def loss(fn: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(lambda *args: sum(jnp.sum(r**2) for r in fn(*args)), (0, 1, 2))

    both(function, fn, loss, *args)


def test_weakly_typed_and_python_arguments(folder: pathlib.Path) -> None:
    def fn(x: Any, scale: Any) -> Any:
        return x * scale

    function = loaded(saved(folder, fn, f32((3,)), 2.0, vjp_order=1))
    both(function, fn, lambda fn: jax.grad(total(fn), (0, 1)), jnp.arange(3.0), 2.0)


def test_low_precision(folder: pathlib.Path) -> None:
    def fn(w: Any, x: Any) -> Any:
        return jnp.tanh(x @ w)

    w, x = jnp.asarray(PARAMS["w"], "bfloat16"), jnp.asarray(X, "bfloat16")
    function = loaded(saved(folder, fn, w, x, vjp_order=1))
    both(function, fn, lambda fn: jax.jit(jax.grad(total(fn), (0, 1))), w, x)


# --- what was donated


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_through_a_function_that_donates(engine: str, folder: pathlib.Path) -> None:
    @functools.partial(jax.jit, donate_argnames="cache")
    def fn(w: Any, cache: Any) -> Any:
        return cache * cache * w, cache + w

    w, cache = jnp.arange(1.0, 4.0), jnp.arange(3.0)
    function = loaded(saved(folder, fn, w, cache, vjp_order=1), engine)

    def loss(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: sum(jnp.sum(r**2) for r in fn(*args))

    kept = cache.copy()
    close(jax.grad(loss(function), (0, 1))(w, kept), jax.grad(loss(fn.__wrapped__), (0, 1))(w, cache))
    assert not kept.is_deleted()  # JAX's own jit would have deleted what its gradient still needs
    both(function, fn.__wrapped__, lambda fn: jax.jit(jax.grad(loss(fn), (0, 1))), w, cache)
    function(w, kept)
    assert kept.is_deleted()
    assert obmlite.export(function, w, cache, platforms="cpu").module.donated == (1,)


# --- inside of other transformations


def test_inside_jit_scan_map_and_checkpoint(function: obmlite.Function) -> None:
    xs = np.stack([X, X[::-1], X / 2])

    def scanned(fn: Callable[..., Any]) -> Callable[..., Any]:
        def loss(params: Any, xs: Any) -> Any:
            def step(carry: Any, x: Any) -> Any:
                y = fn(params, x + carry[:, None])
                return carry + y.mean(-1), y

            last, ys = jax.lax.scan(step, jnp.zeros(5), xs)
            return last.sum() + (ys**2).sum()

        return jax.grad(loss, (0, 1))

    def mapped(fn: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(lambda params, xs: jax.lax.map(lambda x: fn(params, x), xs).sum(), (0, 1))

    def checkpointed(fn: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(lambda params, xs: jax.checkpoint(fn)(params, xs[0]).sum(), (0, 1))

    def offered(fn: Callable[..., Any]) -> Callable[..., Any]:
        policy = jax.checkpoint_policies.dots_saveable
        inner = jax.checkpoint(lambda params, x: fn(params, x) * 2, policy=policy)
        return jax.grad(lambda params, xs: inner(params, xs[1]).sum(), (0, 1))

    def branched(fn: Callable[..., Any]) -> Callable[..., Any]:
        def loss(params: Any, xs: Any) -> Any:
            return jax.lax.cond(xs[0, 0, 0] < 0, lambda: fn(params, xs[0]).sum(), lambda: 0.0)

        return jax.grad(loss, (0, 1))

    for transform in (scanned, mapped, checkpointed, offered, branched):
        both(function, mlp, lambda fn, t=transform: jax.jit(t(fn)), PARAMS, xs)
    both(function, mlp, checkpointed, PARAMS, xs)


@pytest.mark.parametrize("dtype", ["float32", "key"])
def test_first_used_inside_of_a_transformation(dtype: str, folder: pathlib.Path) -> None:
    """Weights and captures are restored while something is traced, and kept: they must not be part of it."""
    table = jnp.asarray(TABLE)

    def fn(params: Any, x: Any) -> Any:
        noise = jax.random.uniform(params["key"], x.shape) if dtype == "key" else params["scale"]
        return (x @ table.T @ table + noise) * params["w"]

    params = {"scale": 2.0, "w": np.asarray(TABLE[1], table.dtype)}
    if dtype == "key":
        params["key"] = jax.random.key(3)
    x = jnp.ones((2, 4))
    model = obmlite.Model.from_function(fn, params, x, vjp_order=1)
    path = folder / f"{dtype}.obm"
    model.save(path)
    wanted = jax.jit(fn)(params, x)
    for first in (jax.jit, jax.checkpoint, lambda fn: lambda x: jax.lax.map(fn, x[None])[0]):
        for made in (obmlite.load(path), obmlite.Model.from_function(fn, params, x)):
            close(first(made)(x), wanted, rtol=1e-5)
            close(made(x), wanted, rtol=1e-5)
        function = loaded(path)
        close(first(lambda x, f=function: f(params, x))(x), wanted, rtol=1e-5)
        close(function(params, x), wanted, rtol=1e-5)
        weights = obmlite.load(path).weights["params"]
        first(lambda x, w=weights: x * w.restore()["w"].astype(x.dtype))(x)
        close(weights.restore()["w"], jnp.asarray(params["w"]))
    model = obmlite.load(path)
    gradient = jax.grad(total(fn), 1)(params, x)
    close(jax.jit(jax.grad(total(model)))(x), gradient, rtol=1e-4)
    close(jax.grad(total(model))(x), gradient, rtol=1e-4)


def test_a_function_of_another_saved_one(second: pathlib.Path, folder: pathlib.Path) -> None:
    inner = loaded(second)

    def outer(params: Any, x: Any) -> Any:
        return jnp.sin(inner(params, x))

    again = loaded(saved(folder, outer, PARAMS, obmlite.spec("f32[n,4]"), vjp_order=1))
    native = lambda params, x: jnp.sin(mlp(params, x))  # noqa: E731
    both(again, native, lambda fn: jax.grad(total(fn), (0, 1)), PARAMS, X)


def test_training_with_a_loaded_function(second: pathlib.Path) -> None:
    function = loaded(second)
    target = mlp(jax.tree.map(lambda p: p + 0.3, PARAMS), X)

    @jax.jit
    def step(params: Any) -> Any:
        loss, gradient = jax.value_and_grad(lambda p: jnp.mean((function(p, X) - target) ** 2))(params)
        return loss, jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)

    params, losses = PARAMS, []
    for _ in range(30):
        loss, params = step(params)
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 4


# --- captured arrays

TABLE = np.linspace(-1, 1, 300 * 4, dtype="f4").reshape(300, 4)


def test_gradients_with_respect_to_captures(folder: pathlib.Path) -> None:
    table = jnp.asarray(TABLE)

    def fn(x: Any) -> Any:
        return jnp.tanh(jax.jit(lambda x: x @ table)(x)) @ table.T

    x = jnp.linspace(-1, 1, 600).reshape(2, 300)
    function = loaded(saved(folder, fn, x, vjp_order=1))
    assert [c.differentiable for c in function.module.captures] == [True]
    both(function, fn, lambda fn: jax.grad(total(fn)), x)
    native = jax.grad(lambda table: (jnp.tanh(x @ table) @ table.T).sum())(table)
    (found,) = jax.grad(lambda captures: function.trace({"x": x}, captures).sum())(function.captures)
    close(found, native, rtol=1e-4, atol=1e-3)


def test_a_custom_derivative_says_nothing_of_what_it_closed_over(folder: pathlib.Path) -> None:
    table = jnp.asarray(TABLE)

    @jax.custom_vjp
    def lookup(x: Any) -> Any:
        return x @ table

    lookup.defvjp(lambda x: (x @ table, None), lambda _, ct: (2 * ct @ table.T,))
    x = jnp.linspace(-1, 1, 600).reshape(2, 300)
    function = loaded(saved(folder, lookup, x, vjp_order=1))
    assert [c.differentiable for c in function.module.captures] == [False]
    both(function, lookup, lambda fn: jax.grad(total(fn)), x)
    (found,) = jax.grad(lambda captures: function.trace({"x": x}, captures).sum())(function.captures)
    assert not np.asarray(found).any()


def test_in_a_branch_captures_are_constant_or_exact(folder: pathlib.Path) -> None:
    table = jnp.asarray(TABLE)

    def fn(x: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            return jnp.tanh(carry @ table) @ table.T, carry.sum()

        return jax.lax.scan(jax.jit(step), x, length=2)[0]

    x = jnp.linspace(-1, 1, 600).reshape(2, 300)
    function = loaded(saved(folder, fn, x, vjp_order=2))
    both(function, fn, lambda fn: jax.jit(jax.grad(total(fn))), x)
    gradients = jax.grad(lambda captures: function.trace({"x": x}, captures).sum())(function.captures)
    flags = {c.leaf: c.differentiable for c in function.module.captures}
    for leaf, found in enumerate(gradients):
        assert np.asarray(found).any() == flags.get(leaf, False)


# --- on several devices

SHARDED = """
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import obmlite

path, engine = sys.argv[1:]
function = next(iter(obmlite.load(path, engine=engine).functions.values()))
assert jax.device_count() == 8 and function.engine == engine
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def native(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) ** 2


rng = np.random.default_rng(0)
params = {"w": rng.normal(size=(4, 3)).astype("f4"), "b": rng.normal(size=3).astype("f4")}
x = rng.normal(size=(16, 4)).astype("f4")


def close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), left, right)


def spread(fn, **how):
    return jax.jit(jax.shard_map(fn, mesh=mesh, **how))


for transform in (lambda fn: fn, jax.checkpoint):
    called = transform(function)

    # results
    close(spread(called, in_specs=(P(), P("data")), out_specs=P("data"))(params, x), native(params, x))

    # the whole gradient with respect to weights that every device has: JAX adds the psum
    def loss(params, x):
        return jax.lax.psum(called(params, x).sum(), "data")

    wanted = jax.value_and_grad(lambda p: native(p, x).sum())(params)
    inside = spread(jax.value_and_grad(loss), in_specs=(P(), P("data")), out_specs=(P(), P()))
    close(inside(params, x), wanted)
    outside = jax.value_and_grad(lambda p: spread(loss, in_specs=(P(), P("data")), out_specs=P())(p, x))
    close(outside(params), wanted)

    # by hand: weights that vary, each device's gradient its own, then the sum
    def by_hand(params, x):
        params = jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params)
        return jax.lax.psum(jax.grad(lambda p: called(p, x).sum())(params), "data")

    close(spread(by_hand, in_specs=(P(), P("data")), out_specs=P())(params, x), wanted[1])

    # with respect to the sharded input, and of second order
    close(
        spread(jax.grad(loss, 1), in_specs=(P(), P("data")), out_specs=P("data"))(params, x),
        jax.grad(lambda x: native(params, x).sum())(x),
    )

    def twice(params, x):
        return jax.grad(lambda p: sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss)(p, x))))(params)

    def twice_native(params):
        first = jax.grad(lambda p: native(p, x).sum())
        return jax.grad(lambda p: sum(jnp.sum(g**2) for g in jax.tree.leaves(first(p))))(params)

    close(spread(twice, in_specs=(P(), P("data")), out_specs=P())(params, x), twice_native(params))

# replicated arguments give replicated results
close(spread(function, in_specs=(P(), P()), out_specs=P())(params, x), native(params, x))

# a result that varies cannot be said to be replicated, as for native code
for fn in (native, function):
    try:
        spread(fn, in_specs=(P(), P("data")), out_specs=P())(params, x)
    except ValueError as error:
        assert "out_specs" in str(error), error
    else:
        raise AssertionError(f"{fn} was let through")

# without shard_map: arguments that are sharded
for axis in (P("data"), P()):
    placed = jax.device_put(x, NamedSharding(mesh, axis))
    replicated = jax.device_put(params, NamedSharding(mesh, P()))
    found = jax.jit(jax.grad(lambda p, x: function(p, x).sum(), (0, 1)))(replicated, placed)
    close(found, jax.grad(lambda p, x: native(p, x).sum(), (0, 1))(params, x))
    result = function(replicated, placed)
    close(result, native(params, x))
    assert len(result.sharding.device_set) == 8
print("fine")
"""


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
def test_on_eight_devices(engine: str, second: pathlib.Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, str(second), engine],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "fine"
