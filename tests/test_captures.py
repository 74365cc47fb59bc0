"""Arrays that functions close over: taken out of the code, saved with the weights, bound again."""

from __future__ import annotations

import pathlib
import resource
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import obmlite
from obmlite import listing
from obmlite.verify import verify

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 16)).astype("f4")


def values(dtype: str, shape: tuple[int, ...]) -> Any:
    if dtype == "key":
        return jax.random.split(jax.random.key(3), shape)
    if dtype == "bool":
        return jnp.asarray(RNG.integers(0, 2, shape).astype(bool))
    if dtype == "complex64":
        return jnp.asarray((RNG.normal(size=shape) + 1j * RNG.normal(size=shape)).astype(dtype))
    if dtype.startswith("int"):
        return jnp.asarray(RNG.integers(-8, 8, shape), dtype)
    return jnp.asarray(RNG.normal(size=shape).astype("f4")).astype(dtype)


DTYPES = ["float32", "bfloat16", "float8_e4m3fn", "int4", "int32", "complex64", "bool", "key"]


def as_floats(table: Any) -> Any:
    if jax.dtypes.issubdtype(table.dtype, jax.dtypes.prng_key):
        table = jax.random.key_data(table)
    if jnp.issubdtype(table.dtype, jnp.complexfloating):
        table = table.real + table.imag
    return table.astype("float32")


def places(table: Any, custom: Any) -> dict[str, Any]:
    """The same lookup, with the table closed over in different places."""

    def row(x: Any) -> Any:
        return jnp.tanh(x + as_floats(table)[:16, 1].reshape(16, -1)[:, 2])  # nothing whose order folding could change

    def loop(x: Any) -> Any:
        return jax.lax.while_loop(
            lambda c: (c[0] < 2) & (as_floats(table).reshape(-1)[0] < 1e9), lambda c: (c[0] + 1, row(c[1])), (0, x)
        )[1]

    return {
        "top level": row,
        "inner jit": jax.jit(row),
        "jit in jit": jax.jit(lambda x: jax.jit(row)(x) + 1),
        "scan": lambda x: jax.lax.scan(lambda c, _: (row(c), None), x, None, length=3)[0],
        "scan of jit": lambda x: jax.lax.scan(lambda c, _: (jax.jit(row)(c), None), x, None, length=3)[0],
        "while": loop,
        "cond": lambda x: jax.lax.cond(x.sum() > 0, row, lambda v: jax.jit(row)(-v), x),
        "remat": lambda x: jax.checkpoint(row)(x),
        "custom_vjp": lambda x: custom(row)(x),
    }


def custom_vjp(row: Any) -> Any:
    f = jax.custom_vjp(row)
    f.defvjp(lambda x: (row(x), x), lambda x, g: (g * row(x),))
    return f


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_in_every_place(dtype: str, tmp_path: pathlib.Path) -> None:
    table = values(dtype, (16, 9, 16) if dtype in ("int4", "bool", "float8_e4m3fn") else (16, 5, 16))
    functions = places(table, custom_vjp)
    loop = functions.pop("while")

    def every(x: Any) -> Any:
        return {name: fn(x) for name, fn in functions.items()}

    number = DTYPES.index(dtype)
    spec = obmlite.spec("f32[b,16]") if number % 2 else jax.ShapeDtypeStruct((3, 16), "float32")
    platforms = ("cpu",) if number % 3 else ("cpu", "cuda", "rocm", "tpu")
    exported = {
        "every": obmlite.export(every, spec, vjp_order=1, platforms=platforms),
        "loop": obmlite.export(loop, spec, platforms=platforms),
    }
    path = tmp_path / "m.obm"
    obmlite.Model(exported).save(path)
    loaded = obmlite.load(path)
    assert list(loaded.weights) == ["every.captures"], "one array, captured nine times, is saved once"
    # What is found in code has no key type any more: it is the key's data.
    assert len(loaded.weights["every.captures"]) == (2 if dtype == "key" else 1)
    only = loaded.weights["every.captures"].leaf(0)
    assert only.dtype == table.dtype
    assert only.nbytes > 1024
    for file in (path / "functions").iterdir():
        assert file.stat().st_size < 40_000
    ours = loaded.functions["every"]
    expected = jax.jit(every)(X)
    for name, result in ours(X).items():
        np.testing.assert_array_equal(result, expected[name], err_msg=name)
    np.testing.assert_array_equal(loaded.functions["loop"](X), jax.jit(loop)(X))
    grads = [jax.jit(jax.grad(lambda v, f=f: sum((r**2).sum() for r in f(v).values())))(X) for f in (ours, every)]
    np.testing.assert_allclose(*grads, rtol=2e-5, atol=1e-6)


def test_they_are_listed_bound_and_verified(tmp_path: pathlib.Path) -> None:
    table = values("float32", (40, 16))
    params = {"w": values("float32", (16, 4))}
    model = obmlite.Model.from_function(
        lambda params, i: table[i] @ params["w"], params, obmlite.spec("i32[b]"), name="f"
    )
    assert set(model.objects) == {"f", "params", "f.captures"}
    path = tmp_path / "m.obm"
    model.save(path)
    loaded = obmlite.load(path)
    index = np.array([3, 1, 4], "i4")
    expected = jax.jit(lambda p, i: table[i] @ p["w"])(params, index)
    for call in (model, loaded):
        np.testing.assert_array_equal(call(index), expected)
    assert "f.captures: 1 leaf, 640 parameters, 2.5 KiB, f32" in "\n".join(listing.text(listing.listing(path)))
    assert listing.listing(path)["functions"]["f"]["captures"] == [
        {"weights": "f.captures", "leaf": 0, "differentiable": True}
    ]
    assert verify(path).good
    loaded.save(tmp_path / "again.obm")
    np.testing.assert_array_equal(obmlite.load(tmp_path / "again.obm")(index), expected)


def test_they_follow_a_function_into_another_model(tmp_path: pathlib.Path) -> None:
    table = values("float32", (40, 16))
    obmlite.Model({"f": obmlite.export(lambda i: table[i], obmlite.spec("i32[b]"), name="f")}).save(tmp_path / "a.obm")
    function = obmlite.load(tmp_path / "a.obm").functions["f"]
    other = obmlite.Model({"g": function, "f.captures": obmlite.Weights({"other": np.ones(3, "f4")})})
    other.save(tmp_path / "b.obm")
    loaded = obmlite.load(tmp_path / "b.obm")
    assert set(loaded.weights) == {"f.captures", "g.captures"}
    np.testing.assert_array_equal(loaded.functions["g"](np.array([5], "i4")), table[5:6])


def test_a_name_that_is_taken() -> None:
    table = values("float32", (40, 16))
    function = obmlite.export(lambda i: table[i], obmlite.spec("i32[b]"), name="f", platforms="cpu")
    with pytest.raises(obmlite.ArgumentError) as caught:
        obmlite.Model({"f": function, "f.captures": obmlite.Weights({"w": np.ones(3, "f4")})})
    assert caught.value.object == "f.captures"


def test_small_arrays_and_splats_stay_in_the_code() -> None:
    small, splat = jnp.arange(256, dtype="float32"), jnp.full((64, 64), 2.0)
    function = obmlite.export(lambda x: x @ splat + small[:64], jax.ShapeDtypeStruct((2, 64), "float32"), name="f")
    assert [c.leaf for c in function.module.captures] in ([], [0])  # a lifted splat is as good as one in the code
    assert sum(c.nbytes for c in function.captures) in (0, splat.nbytes)


def test_a_custom_derivative_that_closes_over_an_array_gives_it_none(tmp_path: pathlib.Path) -> None:
    table = values("float32", (16, 20))

    def make() -> Any:
        f = jax.custom_vjp(lambda x: x @ table)
        f.defvjp(lambda x: (x @ table, None), lambda _, g: (g @ table.T,))
        return f

    custom = make()
    function = obmlite.export(lambda x: custom(x) + (x @ table), X, name="f", vjp_order=1, platforms="cpu")
    assert [c.differentiable for c in function.module.captures] == [False]
    obmlite.Model({"f": function}).save(tmp_path / "m.obm")
    loaded = obmlite.load(tmp_path / "m.obm").functions["f"]
    assert [c.differentiable for c in loaded.module.captures] == [False]
    np.testing.assert_array_equal(loaded(X), jax.jit(lambda x: custom(x) + (x @ table))(X))
    expected = jax.grad(lambda x: (custom(x) + (x @ table)).sum())(X)
    np.testing.assert_allclose(jax.grad(lambda x: loaded(x).sum())(X), expected, rtol=1e-5)


def test_large_captures_are_not_copied() -> None:
    table = jax.device_put(np.ones((64 << 20,), "f4"))  # 256 MiB
    jax.block_until_ready(table)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function = obmlite.export(lambda i: table[i], obmlite.spec("i32[b]"), name="f", platforms="cpu")
    model = obmlite.Model({"f": function})
    assert model.weights["f.captures"].nbytes == table.nbytes
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < table.nbytes // 2, f"{grown >> 20} MiB"


def test_bfloat16_bits_survive(tmp_path: pathlib.Path) -> None:
    bits = np.arange(2048, dtype="u2").view(ml_dtypes.bfloat16)
    function = obmlite.export(lambda i: jnp.asarray(bits)[i], obmlite.spec("i32[b]"), name="f", platforms="cpu")
    obmlite.Model({"f": function}).save(tmp_path / "m.obm")
    [leaf] = obmlite.load(tmp_path / "m.obm").weights["f.captures"].flat.values()
    np.testing.assert_array_equal(np.asarray(leaf).view("u2"), np.arange(2048))
