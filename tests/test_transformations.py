"""What JAX's transformations do to saved functions, by each engine and whatever derivatives were saved."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import obmlite

f32 = functools.partial(jax.ShapeDtypeStruct, dtype="float32")
PARAMS = {"w": np.linspace(-1, 1, 12, dtype="f4").reshape(4, 3), "b": np.arange(3, dtype="f4") / 4}
X = np.linspace(-0.7, 1.3, 8, dtype="f4").reshape(2, 4)
XS = np.stack([X, X / 2, -X])


def mlp(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"] + params["b"]) ** 2


def total(fn: Callable[..., Any], params: Any = None) -> Callable[..., Any]:
    """The sum of the results; of the inputs alone if parameters are given."""
    return (lambda x: fn(params, x).sum()) if params else lambda *args: fn(*args).sum()


TRANSFORMATIONS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "vmap": lambda fn: jax.vmap(fn, (None, 0))(PARAMS, XS),
    "jit of vmap": lambda fn: jax.jit(jax.vmap(lambda x: fn(PARAMS, x), out_axes=1))(XS),
    "vmap of jit": lambda fn: jax.vmap(jax.jit(lambda x: fn(PARAMS, x)))(XS),
    "per-example gradients": lambda fn: jax.vmap(jax.grad(total(fn)), (None, 0))(PARAMS, XS),
    "gradient of vmap": lambda fn: jax.grad(lambda p: jax.vmap(fn, (None, 0))(p, XS).sum())(PARAMS),
    "vmap over weights": lambda fn: jax.vmap(fn, ({"w": 0, "b": None}, None))(
        {**PARAMS, "w": np.stack([PARAMS["w"]] * 2)}, X
    ),
    "jvp": lambda fn: jax.jvp(fn, (PARAMS, X), (PARAMS, X)),
    "jit of jvp": lambda fn: jax.jit(lambda x: jax.jvp(lambda x: fn(PARAMS, x), (x,), (x,)))(X),
    "jacfwd": lambda fn: jax.jacfwd(lambda x: fn(PARAMS, x))(X),
    "jacrev": lambda fn: jax.jacrev(lambda x: fn(PARAMS, x))(X),
    "hessian": lambda fn: jax.hessian(total(fn, PARAMS))(X),
    "jit of hessian": lambda fn: jax.jit(jax.hessian(total(fn, PARAMS)))(X),
    "Hessian times vector": lambda fn: jax.jvp(jax.grad(total(fn, PARAMS)), (X,), (X,)),
    "gradient": lambda fn: jax.jit(jax.grad(total(fn), (0, 1)))(PARAMS, X),
    "second gradient": lambda fn: jax.grad(lambda x: (jax.grad(total(fn, PARAMS))(x) ** 2).sum())(X),
    "third gradient": lambda fn: jax.grad(
        lambda x: jax.grad(lambda x: (jax.grad(total(fn, PARAMS))(x) ** 2).sum())(x).sum()
    )(X),
    "checkpoint": lambda fn: jax.jit(jax.grad(lambda x: jax.checkpoint(fn)(PARAMS, x).sum()))(X),
    "jvp of scan": lambda fn: jax.jvp(lambda xs: jax.lax.map(lambda x: fn(PARAMS, x), xs), (XS,), (XS,)),
    "gradient of jvp": lambda fn: jax.grad(lambda x: jax.jvp(lambda x: fn(PARAMS, x), (x,), (X,))[1].sum())(X),
}


def close(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def reloaded(folder: pathlib.Path, engine: str, fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
    path = folder / "f.obm"
    obmlite.Model({"f": obmlite.export(fn, *args, name="f", **options)}).save(path, overwrite=True)
    return obmlite.load(path, engine=engine).functions["f"]


@pytest.fixture(scope="module", params=[("auto", 0), ("rebuild", 1), ("replay", 0)], ids=str)
def function(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> obmlite.Function:
    """By each engine, for every batch size and platform, with derivatives of several orders saved."""
    engine, order = request.param
    folder = tmp_path_factory.mktemp("transformations")
    return reloaded(folder, engine, mlp, PARAMS, obmlite.spec("f32[b,4]"), vjp_order=order)


@functools.cache
def native(name: str) -> Any:
    return TRANSFORMATIONS[name](mlp)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_as_of_the_function_itself(name: str, function: obmlite.Function) -> None:
    close(TRANSFORMATIONS[name](function), native(name))


def test_a_model_of_bound_weights(tmp_path: pathlib.Path) -> None:
    obmlite.Model.from_function(mlp, PARAMS, f32((2, 4))).save(tmp_path / "m.obm")
    model = obmlite.load(tmp_path / "m.obm")
    close(jax.vmap(model)(XS), native("vmap"))
    close(jax.hessian(lambda x: model(x).sum())(X), native("hessian"))
    assert model.functions["mlp"].engine == "export"
    np.testing.assert_array_equal(model(X), jax.jit(mlp)(PARAMS, X))


def test_another_batch_size_of_a_fixed_one_and_a_symbolic_one(tmp_path: pathlib.Path) -> None:
    function = reloaded(tmp_path, "auto", lambda x: mlp(PARAMS, x), f32((4,)))
    again = obmlite.export(jax.vmap(function), obmlite.spec("f32[n,4]"), name="again", platforms="cpu")
    for n in (1, 5):
        x = np.ones((n, 4), "f4")
        close(again(x), jnp.asarray(mlp(PARAMS, x)))


def test_integers_keys_and_nested_containers(tmp_path: pathlib.Path) -> None:
    def fn(tree: Any, key: Any) -> Any:
        noise = jax.random.uniform(key, tree["x"].shape)
        return {"y": tree["x"] ** 2 * tree["n"] + noise, "n": tree["n"] + 1, "key": jax.random.fold_in(key, 1)}

    tree, key = {"x": jnp.arange(3.0), "n": jnp.array([1, 2, 3])}, jax.random.key(7)
    for order in (0, 1):
        function = reloaded(tmp_path, "auto", fn, tree, key, vjp_order=order)

        def loss(fn: Any, x: Any, n: Any, key: Any) -> Any:
            result = fn({"x": x, "n": n}, key)
            return (result["y"] ** 2).sum(), result["n"]

        for transform in (
            lambda fn: jax.vmap(lambda k: jax.random.key_data(fn(tree, k)["key"]))(jax.random.split(key, 4)),
            lambda fn: jax.grad(functools.partial(loss, fn), has_aux=True)(tree["x"], tree["n"], key),
            lambda fn: jax.vmap(jax.grad(functools.partial(loss, fn), has_aux=True), (None, None, 0))(
                tree["x"], tree["n"], jax.random.split(key, 2)
            ),
            lambda fn: jax.jvp(lambda x: loss(fn, x, tree["n"], key)[0], (tree["x"],), (tree["x"],)),
            lambda fn: jax.hessian(lambda x: loss(fn, x, tree["n"], key)[0])(tree["x"]),
        ):
            close(transform(function), transform(fn))


def test_captured_arrays(tmp_path: pathlib.Path) -> None:
    table = jnp.linspace(-1, 1, 1200).reshape(300, 4)
    inner = jax.jit(lambda carry, _: (jnp.tanh(carry @ table) @ table.T, carry.sum()))

    def fn(x: Any) -> Any:
        return jax.lax.scan(inner, x, length=2)[0]

    x = jnp.linspace(-1, 1, 600).reshape(2, 300)
    for order in (0, 1):
        function = reloaded(tmp_path, "auto", fn, x, vjp_order=order)
        for transform in (
            lambda fn: jax.vmap(fn)(x[None]),
            lambda fn: jax.jvp(fn, (x,), (x,)),
            lambda fn: jax.grad(lambda x: fn(x).sum())(x),
        ):
            left, right = transform(function), transform(fn)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2), left, right)


def test_a_saved_derivative_comes_before_that_of_the_operations(tmp_path: pathlib.Path) -> None:
    @jax.custom_vjp
    def straight_through(x: Any) -> Any:
        return jnp.round(x)

    straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, ct: (ct,))
    x = jnp.linspace(-2, 2, 5)
    saved = reloaded(tmp_path, "auto", straight_through, x, vjp_order=1)
    gradient = jax.grad(lambda x: saved(x).sum())
    close(gradient(x), jnp.ones(5))
    close(jax.vmap(gradient)(x[None]), jnp.ones((1, 5)))
    left_out = reloaded(tmp_path, "auto", straight_through, x)
    close(jax.grad(lambda x: left_out(x).sum())(x), jnp.zeros(5))


# --- of functions that are not replayable


@pytest.fixture(scope="module")
def collective() -> Callable[..., Any]:
    """A function with a collective, which is not replayed, on one device."""
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))

    def summed(x: jax.Array) -> jax.Array:
        return jax.lax.psum(jnp.sin(x), "i")

    return jax.shard_map(summed, mesh=mesh, in_specs=P("i"), out_specs=P())


def test_refused_with_the_operation_that_stops_it(collective: Callable[..., Any]) -> None:
    for order in (0, 1):
        function = obmlite.export(collective, f32((4,)), name="f", platforms="cpu", vjp_order=order)
        assert not function.replayable
        assert "stablehlo.all_reduce" in str(function.replayable)
        np.testing.assert_allclose(function(X[0]), np.sin(X[0]), rtol=1e-6)
        for transform in (jax.vmap, lambda fn: jax.jit(jax.vmap(fn))):
            with pytest.raises(obmlite.ArgumentError, match=r"jax\.vmap") as caught:
                transform(function)(X)
            assert caught.value.object == "f"
            assert "stablehlo.all_reduce" in str(caught.value.found)
            assert "jax.lax.map" in str(caught.value.fix)
        with pytest.raises(obmlite.ArgumentError, match="forward mode") as caught:
            jax.jvp(function, (X[0],), (X[0],))
        assert "stablehlo.all_reduce" in str(caught.value.found)
        gradient = jax.grad(lambda x, f=function: f(x).sum())
        if order:
            np.testing.assert_allclose(gradient(X[0]), np.cos(X[0]), rtol=1e-6)
            continue
        with pytest.raises(obmlite.ArgumentError, match="vjp_order=1") as caught:
            gradient(X[0])
        assert "stablehlo.all_reduce" in str(caught.value.found)
        # A value that no gradient flows back to may be taken.
        assert np.asarray(jax.grad(lambda x, f=function: (x * jax.lax.stop_gradient(f(x))).sum())(X[0])).any()


def test_the_replay_engine_refuses_it(collective: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    with pytest.warns(UserWarning, match=r"'f' is not replayable: stablehlo\.all_reduce"):
        obmlite.Model({"f": obmlite.export(collective, f32((4,)), name="f")}).save(tmp_path / "f.obm")
    function = obmlite.load(tmp_path / "f.obm", engine="replay").functions["f"]
    for use in (lambda: function(X[0]), function.jaxpr):
        with pytest.raises(obmlite.UnsupportedFormatError, match=r"stablehlo\.all_reduce") as caught:
            use()
        assert caught.value.object == "f"
