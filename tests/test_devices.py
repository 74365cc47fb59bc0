"""Functions on one device and on several: for any number of them, and for a mesh that they fix.

How many devices there are is settled when JAX starts, so the checks run in a process of their own that has eight: this
file, as a program.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pathlib
import sys
import tempfile
import traceback
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import obmlite
from obmlite import cli
from obmlite.specs import MeshSpec, Partition
from tests.on_devices import on_devices

ENGINES = ("export", "rebuild")


def test_on_eight_devices() -> None:
    assert on_devices(__file__).split() == CHECKS, "each has run and printed its name"


# --- what the checks share

X = np.linspace(-1, 1, 64, dtype="f4").reshape(8, 8)
W = np.cos(np.arange(64, dtype="f4")).reshape(8, 8)
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
struct = jax.ShapeDtypeStruct((8, 8), "float32")


def mesh(*sizes: int, names: str = "abc", kind: Any = AUTO, first: int = 0) -> Mesh:
    """A mesh of the given sizes, from some device on."""
    count = int(np.prod(sizes))
    devices = np.array(jax.devices()[first : first + count]).reshape(sizes)
    return Mesh(devices, tuple(names[: len(sizes)]), axis_types=(kind,) * len(sizes))


def put(value: Any, on: Mesh, *entries: Any, **options: Any) -> jax.Array:
    return jax.device_put(value, NamedSharding(on, P(*entries), **options))


def saved(function: obmlite.Function) -> pathlib.Path:
    path = pathlib.Path(tempfile.mkdtemp(dir=os.environ["TMPDIR"])) / "m.obm"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is not durable")
        obmlite.Model({function.name: function}).save(path)
    return path


def reload(function: obmlite.Function, **options: Any) -> obmlite.Function:
    return obmlite.load(saved(function), **options).functions[function.name]


def shown(path: pathlib.Path, name: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert cli.main(["show", str(path), name]) == 0
    return text.getvalue()


def close(found: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, expected)


def layer(w: Any, x: Any) -> Any:
    return jnp.tanh(x @ w)


def loss(f: Any) -> Any:
    return lambda *args: (f(*args) ** 2).sum()


def constrained(on: Any) -> Any:
    """A function that fixes its mesh by a constraint."""
    return lambda w, x: jax.lax.with_sharding_constraint(layer(w, x), NamedSharding(on, P("a", "b")))


def mapped(on: Mesh) -> Any:
    """One that does by shard_map, with a collective in it."""

    def local(w: Any, x: Any) -> Any:
        return jnp.tanh(jax.lax.psum(x @ w, "b"))

    return jax.shard_map(local, mesh=on, in_specs=(P("b"), P("a", "b")), out_specs=P("a"))


def refused(call: Any, **facts: str) -> obmlite.ArgumentError:
    with pytest.raises(obmlite.ArgumentError) as caught:
        call()
    for name, value in facts.items():
        assert getattr(caught.value, name) == value, (name, getattr(caught.value, name))
    return caught.value


# --- functions for any number of devices


def check_any_number_of_devices() -> None:
    expected = jax.jit(layer)(W, X), jax.jit(jax.grad(loss(layer), (0, 1)))(W, X)
    for engine, x in zip(ENGINES, (struct, obmlite.spec("f32[b,8]")), strict=True):
        path = saved(obmlite.export(layer, struct, x, vjp_order=1))
        function = obmlite.load(path, engine=engine).functions["layer"]
        assert (function.engine, function.module.num_devices, function.module.mesh) == (engine, 1, None)
        assert function.durable
        assert "devices: any number" in shown(path, "layer")
        for count in (1, 2, 4, 8):
            on = mesh(count)
            x_split = put(X, on, "a")
            for w in (W, put(W, on), put(W, on, None, "a")):
                result = function(w, x_split)
                assert result.sharding.device_set == x_split.sharding.device_set
                close(result, expected[0])
            assert function(put(W, on), x_split).addressable_shards[0].data.shape == (8 // count, 8), "not gathered"
            close(jax.grad(loss(function), (0, 1))(W, x_split), expected[1])
            close(jax.jit(jax.grad(loss(function), (0, 1)))(put(W, on, None, "a"), x_split), expected[1])


def check_numpy_on_a_mesh() -> None:
    function = reload(obmlite.export(layer, struct, struct, vjp_order=1))
    for on in (mesh(4), mesh(2, 2), mesh(2, kind=EXPLICIT), mesh(2, first=6)):
        result = function.on(on)(W, X)
        assert result.sharding.device_set == set(on.devices.flat)
        close(result, layer(W, X))
        close(jax.grad(loss(function.on(on)))(W, X), jax.grad(loss(layer))(W, X))


def check_a_device_of_many() -> None:
    function = reload(obmlite.export(layer, struct, struct))
    seventh = jax.devices()[7]
    assert function(W, jax.device_put(X, seventh)).devices() == {seventh}
    with jax.default_device(jax.devices()[3]):
        assert function(W, X).devices() == {jax.devices()[3]}


def check_bound_weights_mix_with_sharded_arguments() -> None:
    path = pathlib.Path(os.environ["TMPDIR"]) / "bound.obm"
    obmlite.Model.from_function(layer, W, X).save(path)
    model = obmlite.load(path)
    for count in (1, 8):
        result = model(put(X, mesh(count), "a"))
        assert len(result.sharding.device_set) == count
        close(result, layer(W, X))
    model = obmlite.load(path, mesh=mesh(8))
    assert len(model(X).sharding.device_set) == 8


def check_donation_of_sharded_arguments() -> None:
    step = jax.jit(lambda state, x: state + x, donate_argnames="state")
    function = reload(obmlite.export(step, struct, struct, name="step"))
    state = put(X, mesh(8), "a")
    result = function(state, X)
    assert state.is_deleted()
    np.testing.assert_array_equal(result, X + X)


# --- functions that fix their devices


def check_a_fixed_mesh() -> None:
    on = mesh(4, 2)
    expected = layer(W, X), jax.grad(loss(layer), (0, 1))(W, X)
    for make in (constrained, mapped):
        function = obmlite.export(make(on), struct, struct, name="fixed", vjp_order=1)
        assert not function.durable
        with pytest.warns(UserWarning, match="'fixed' is not durable"):
            obmlite.Model({"fixed": function}).save(pathlib.Path(tempfile.mkdtemp(dir=os.environ["TMPDIR"])) / "m.obm")
        path = saved(function)
        assert "devices: 8, of a mesh a=4, b=2" in shown(path, "fixed")
        for engine in ENGINES:
            function = obmlite.load(path, engine=engine).functions["fixed"]
            assert function.module.num_devices == 8
            assert function.module.mesh == MeshSpec(("a", "b"), (4, 2), (1, 1))
            wrong = refused(lambda f=function: f(W, X), field="devices", expected="a mesh of a=4, b=2")
            assert wrong.found == "1 device"
            assert ".on(mesh)" in str(wrong.fix)
            four = put(X, mesh(4), "a")
            refused(lambda f=function, v=four: f(W, v), field="devices", found="4 devices")
            for size in (mesh(4), mesh(1), mesh(2, 2)):
                refused(
                    lambda f=function, m=size: f.on(m), field="mesh", expected="8 devices, as of a mesh of a=4, b=2"
                )
            loaded = obmlite.load(path, engine=engine, mesh=on).functions["fixed"]
            for call in (loaded, function.on(on), lambda w, x, f=function: f(w, put(x, on, "a"))):
                result = call(W, X)
                assert len(result.sharding.device_set) == 8
                close(result, expected[0])
            for gradient in (
                jax.grad(loss(loaded), (0, 1)),
                jax.jit(jax.grad(loss(loaded), (0, 1))),
                lambda w, x, f=function: jax.grad(loss(f), (0, 1))(w, put(x, on, "a")),
            ):
                close(gradient(W, X), expected[1])
            with jax.set_mesh(on):
                close(jax.jit(jax.grad(loss(function), (0, 1)))(W, X), expected[1])
        with pytest.raises(obmlite.ArgumentError) as caught:
            obmlite.load(path, mesh=mesh(2)).functions["fixed"]
        assert (caught.value.field, caught.value.object, caught.value.package) == ("mesh", "fixed", str(path))


def check_a_fixed_mesh_with_weights_bound() -> None:
    on = mesh(4, 2)
    path = pathlib.Path(os.environ["TMPDIR"]) / "fixed.obm"
    with pytest.warns(UserWarning, match="durable"):
        obmlite.Model.from_function(constrained(on), W, X, name="fixed", vjp_order=1).save(path)
    model = obmlite.load(path, mesh=on)
    close(model(X), layer(W, X))
    close(jax.jit(lambda x: model(x) + 1)(X), layer(W, X) + 1)
    close(jax.grad(lambda x: model(x).sum())(X), jax.grad(lambda x: layer(W, x).sum())(X))
    refused(lambda: obmlite.load(path)(X), field="devices", expected="a mesh of a=4, b=2")


def check_other_meshes_of_the_same_size() -> None:
    on = mesh(4, 2)
    backwards = Mesh(np.array(jax.devices()[::-1]).reshape(4, 2), ("a", "b"), axis_types=(AUTO, AUTO))
    for engine in ENGINES:
        function = reload(obmlite.export(constrained(on), struct, struct, name="fixed"), engine=engine)
        for other in (mesh(2, 4), mesh(8), mesh(4, 2, names="xy"), backwards, mesh(4, 2, kind=EXPLICIT)):
            result = function.on(other)(W, X)
            close(result, layer(W, X))
            assert [s.device for s in result.addressable_shards] == list(other.devices.flat)


def check_several_meshes_in_one_function() -> None:
    one, other = mesh(4, 2), mesh(8, names="c")

    def two(x: Any) -> Any:
        y = jax.lax.with_sharding_constraint(jnp.sin(x), NamedSharding(one, P("a", "b")))
        return jax.lax.with_sharding_constraint(y + 1, NamedSharding(other, P("c")))

    for engine in ENGINES:
        function = reload(obmlite.export(two, struct, vjp_order=1), engine=engine)
        assert function.module.num_devices == 8
        for on in (one, other):
            there = function.on(on)
            close(there(X), np.sin(X) + 1)
            close(jax.grad(lambda x, f=there: f(x).sum())(X), np.cos(X))


def check_shardings_of_the_users_jit() -> None:
    on, less = mesh(2), mesh(4)
    double = jax.jit(lambda x: x * 2, in_shardings=NamedSharding(on, P("a")), out_shardings=NamedSharding(on, P("a")))
    for engine in ENGINES:
        function = reload(obmlite.export(double, struct, name="double"), engine=engine)
        wrong = refused(lambda f=function: f(X), field="devices", found="1 device")
        assert wrong.expected == "a mesh of a=2"
        refused(lambda f=function: f(put(X, mesh(8), "a")), field="devices", found="8 devices")
        result = function.on(on)(X)
        assert result.sharding.spec == P("a")
        np.testing.assert_array_equal(result, X * 2)
    other = jax.jit(lambda x: x + 1, in_shardings=NamedSharding(less, P("a")))
    with pytest.raises(obmlite.ExportError) as caught:
        obmlite.export(lambda x, y: (double(x), other(y)), struct, struct, name="both")
    assert "incompatible devices" in str(caught.value.found)


def check_an_unused_argument_with_a_sharding() -> None:
    on = mesh(4, 2)
    split = jax.ShapeDtypeStruct((8, 8), "float32", sharding=NamedSharding(on, P("b", "a")))
    for engine in ENGINES:
        function = reload(
            obmlite.export(lambda unused, w, x: constrained(on)(w, x), split, struct, struct, name="f", vjp_order=1),
            engine=engine,
        )
        assert function.module.kept == (1, 2)
        for unused in (X, put(X, on, "b", "a"), put(X, on)):
            there = function.on(on)
            close(there(unused, W, X), layer(W, X))
        gradient = jax.grad(lambda u, f=there: f(u, W, X).sum())(X)
        np.testing.assert_array_equal(gradient, np.zeros_like(X))


def check_gradients_keep_the_shardings_of_arguments() -> None:
    on = mesh(4, 2)
    w, x = put(W, on, None, "b"), put(X, on, "a")
    for engine in ENGINES:
        function = reload(obmlite.export(constrained(on), w, x, name="fixed", vjp_order=1), engine=engine)
        gradients = jax.jit(jax.grad(loss(function), (0, 1)))(w, x)
        close(gradients, jax.grad(loss(layer), (0, 1))(W, X))
        assert gradients[0].sharding.is_equivalent_to(w.sharding, 2)
        assert gradients[1].sharding.is_equivalent_to(x.sharding, 2)


def check_several_platforms_and_a_sharding() -> None:
    on = mesh(4, 2)

    def by_platform(x: Any) -> Any:
        y = jax.lax.platform_dependent(x, cpu=lambda v: v + 1, tpu=lambda v: v + 2, default=lambda v: v + 3)
        return jax.lax.with_sharding_constraint(y, NamedSharding(on, P("a", "b")))

    for engine in ENGINES:
        function = reload(obmlite.export(by_platform, put(X, on, "b")), engine=engine)
        assert function.platforms == ("cpu", "cuda", "rocm", "tpu")
        np.testing.assert_array_equal(function.on(on)(X), X + 1)


def check_a_symbolic_batch_and_a_fixed_mesh() -> None:
    on = mesh(4, 2)
    function = obmlite.export(constrained(on), struct, obmlite.spec("f32[4*b,8]"), name="fixed", vjp_order=1)
    for engine in ENGINES:
        loaded = reload(function, engine=engine).on(on)
        for rows in (4, 8):
            close(loaded(W, X[:rows]), layer(W, X[:rows]))
        close(jax.grad(loss(loaded))(W, X), jax.grad(loss(layer))(W, X))
        refused(lambda f=loaded: f(W, X[:3]), leaf="x, dimension 0")


def check_abstract_meshes() -> None:
    abstract = AbstractMesh((4, 2), ("a", "b"), axis_types=(AUTO, AUTO))
    example = jax.ShapeDtypeStruct((8, 8), "float32", sharding=NamedSharding(abstract, P("a")))
    hinted = reload(obmlite.export(layer, struct, example))
    assert hinted.signature.input_specs[1].partition == Partition((("a",),), MeshSpec(("a", "b"), (4, 2), (1, 1)))
    close(hinted(W, X), layer(W, X))
    inner = jax.jit(constrained(abstract))
    for engine in ENGINES:
        function = reload(obmlite.export(inner, struct, struct, name="inner"), engine=engine)
        for on in (mesh(4, 2), mesh(1)):  # its constraints are for eight devices, and idle on one
            close(function.on(on)(W, X), layer(W, X))
        for on in (mesh(4), mesh(8)):
            refused(functools.partial(function.on(on), W, X), field="devices")
        placed = reload(obmlite.export(inner, struct, example, name="inner"), engine=engine)
        close(placed.on(mesh(4, 2))(W, X), layer(W, X))


def check_explicit_axes() -> None:
    on = mesh(4, kind=EXPLICIT)
    with jax.set_mesh(on):
        function = obmlite.export(lambda x: jax.sharding.reshard(jnp.sin(x), P("a")), struct, name="f")
    assert function.module.mesh == MeshSpec(("a",), (4,), (2,))
    for engine in ENGINES:
        loaded = reload(function, engine=engine)
        for other in (on, mesh(4)):
            close(loaded.on(other)(X), np.sin(X))
    # a function for any number of devices takes arguments on such a mesh
    hinted = reload(obmlite.export(layer, struct, put(X, on, "a"), vjp_order=1))
    assert hinted.signature.input_specs[1].partition == Partition((("a",),), MeshSpec(("a",), (4,), (2,)))
    w, x = put(W, on), put(X, on, "a")
    with jax.set_mesh(on):
        close(hinted(w, x), layer(W, X))
        close(jax.jit(jax.grad(loss(hinted)))(w, x), jax.grad(loss(layer))(W, X))


# --- what the signature says


def check_saved_specs() -> None:
    on = mesh(4, 2)
    names = MeshSpec(("a", "b"), (4, 2), (1, 1))
    params = {"both": put(W, on, ("a", "b")), "plain": jnp.asarray(W), "split": put(W, on, None, "b")}

    def apply(params: Any, x: Any) -> Any:
        return x @ params["split"] + params["both"] + params["plain"]

    def fixed(params: Any, x: Any) -> Any:
        return constrained(on)(apply(params, x), x)

    expected = {
        "params.both": Partition((("a", "b"),), names),
        "params.plain": None,
        "params.split": Partition((None, ("b",)), names),
        "x": Partition((("a",),), names),
    }
    for fn in (apply, fixed):
        path = pathlib.Path(tempfile.mkdtemp(dir=os.environ["TMPDIR"])) / "m.obm"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is not durable")
            obmlite.Model.from_function(fn, params, put(X, on, "a"), vjp_order=1).save(path)
        model = obmlite.load(path)
        signature = model.functions[fn.__name__].signature
        found = {n: s.partition for n, s in zip(signature.inputs.names, signature.input_specs, strict=True)}
        assert found == expected
        assert all(s.memory_kind is None for s in signature.input_specs)
        weights = model.weights["params"]
        found = {f"params.{n}": s.partition for n, s in zip(weights.tree.names, weights.specs, strict=True)}
        assert found == {n: p for n, p in expected.items() if n != "x"}
        assert "P(a+b) on a=4, b=2" in shown(path, fn.__name__)
        assert "P(None, b) on a=4, b=2" in shown(path, "params")


def check_memory_kinds() -> None:
    if "pinned_host" not in {m.kind for m in jax.devices()[0].addressable_memories()}:
        return
    on = mesh(4)
    for engine in ENGINES:
        function = reload(
            obmlite.export(lambda x: x + 1, put(X, on, "a", memory_kind="pinned_host"), name="f", platforms="cpu"),
            engine=engine,
        )
        [spec] = function.signature.input_specs
        assert spec.memory_kind == "pinned_host"
        assert spec.partition == Partition((("a",),), MeshSpec(("a",), (4,), (1,)))
        np.testing.assert_array_equal(function(X), X + 1)


# --- arguments in the wrong places


def check_arguments_in_different_places() -> None:
    function = reload(obmlite.export(layer, struct, struct, vjp_order=1))
    first, second = (jax.device_put(X, d) for d in jax.devices()[1:3])
    for w, x in (
        (first, second),
        (first, put(X, mesh(4, 2), "a")),
        (put(W, mesh(2)), put(X, mesh(4), "a")),
        (put(W, mesh(2)), put(X, mesh(2, first=4), "a")),
    ):
        wrong = refused(lambda w=w, x=x: function(w, x), field="devices", object="layer")
        assert wrong.problem == "Arguments are committed to different devices."
        assert "device_put" in str(wrong.fix)
    refused(lambda: function.on(mesh(8))(W, first), field="devices")
    np.testing.assert_array_equal(function(W, second), function(jax.device_put(W, jax.devices()[2]), second))


# --- inside what the user writes


def check_it_composes() -> None:
    on = mesh(8)
    x = put(X, on, "a")

    def step(f: Any) -> Any:
        def scanned(w: Any, x: Any) -> Any:
            return jax.lax.scan(lambda c, _: (jax.checkpoint(f)(w, c), None), x, None, length=3)[0]

        return jax.jit(scanned)

    for engine in ENGINES:
        function = reload(obmlite.export(layer, struct, obmlite.spec("f32[b,8]"), vjp_order=1), engine=engine)
        close(jax.jit(lambda w, x, f=function: f(w, f(w, x)))(W, x), layer(W, layer(W, X)))
        close(step(function)(W, x), step(layer)(W, X))
        close(jax.grad(loss(step(function)), (0, 1))(W, x), jax.grad(loss(step(layer)), (0, 1))(W, X))
        close(jax.lax.map(lambda row, f=function: f(W, row[None])[0], x), layer(W, X))

        def local(w: Any, x: Any, f: Any = function) -> Any:
            value, gradient = jax.value_and_grad(loss(f))(w, x)
            return jax.lax.psum(value, "a"), gradient  # w is one for all, so its gradient is summed

        value, gradient = jax.jit(jax.shard_map(local, mesh=on, in_specs=(P(), P("a")), out_specs=(P(), P())))(W, X)
        close((value, gradient), jax.value_and_grad(loss(layer))(W, X))


CHECKS = [name for name in list(globals()) if name.startswith("check_")]


def main() -> int:
    warnings.simplefilter("error")
    assert jax.device_count() == 8
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder
        for name in sys.argv[1:] or CHECKS:
            try:
                globals()[name]()
                print(name, flush=True)
            except Exception:  # noqa: BLE001 - reported, all of them
                failed += 1
                print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
