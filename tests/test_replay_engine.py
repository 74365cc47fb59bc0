"""The replay engine: the same numbers, shown as operations, on other devices, and refused where it has to be."""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo

import obmlite
from obmlite import _engine, cli, replay
from obmlite.errors import UnsupportedFormatError
from tests import networks
from tests.test_networks import gradient

ROOT = pathlib.Path(__file__).parent.parent
f32 = functools.partial(jax.ShapeDtypeStruct, dtype="float32")
PARAMS = {"w": np.linspace(-1, 1, 12, dtype="f4").reshape(4, 3), "b": np.arange(3, dtype="f4") / 4}
X = np.linspace(-0.7, 1.3, 8, dtype="f4").reshape(2, 4)


def mlp(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"] + params["b"])


def reloaded(function: obmlite.Function, folder: pathlib.Path, engine: str = "replay") -> obmlite.Function:
    obmlite.Model({"f": function}).save(folder / "f.obm")
    return obmlite.load(folder / "f.obm", engine=engine).functions["f"]


@pytest.fixture(scope="module")
def function(tmp_path_factory: pytest.TempPathFactory) -> obmlite.Function:
    exported = obmlite.export(mlp, PARAMS, obmlite.spec("f32[b,4]"), constraints="b <= 8")
    return reloaded(exported, tmp_path_factory.mktemp("replay"))


# --- networks


@pytest.mark.parametrize(
    "name", ["cnn", "closure", *(pytest.param(n, marks=pytest.mark.long) for n in ("transformer", "dropout", "lstm"))]
)
def test_networks(name: str, tmp_path: pathlib.Path) -> None:
    """Without its source and its saved VJP: results to the bit, gradients, and no more work than the original's."""
    network = networks.ALL[name]()
    network.model(vjp_order=0).save(tmp_path / "m.obm")
    (function,) = obmlite.load(tmp_path / "m.obm", engine="replay").functions.values()
    own = getattr(network.fn, "__wrapped__", network.fn)  # without its jit, which donates

    def native(*args: Any) -> Any:
        return own(*args, **network.static)

    arguments = [*network.weights.values(), *network.inputs.values()]
    compiled = [jax.jit(lambda *args, f=f: f(*args)).lower(*arguments).compile() for f in (function, native)]
    found, wanted = (c(*arguments) for c in compiled)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(gradient(lambda *args: function(*args), arguments), gradient(native, arguments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * np.abs(b).max(initial=0))
    costs = [c.cost_analysis() for c in compiled]
    for key in ("flops", "bytes accessed"):
        assert costs[0][key] <= 1.01 * costs[1][key], key


# --- what it says of itself


def test_jaxpr_is_of_ordinary_primitives(function: obmlite.Function, tmp_path: pathlib.Path) -> None:
    assert function.engine == "replay"
    for closed in (function.jaxpr(PARAMS, X), function.jaxpr(PARAMS, x=obmlite.spec("f32[2,4]"))):
        primitives = {eqn.primitive.name for eqn in closed.eqns}
        assert {"dot_general", "add", "tanh"} <= primitives <= {"dot_general", "add", "tanh", "broadcast_in_dim"}
        assert [v.aval.shape for v in closed.jaxpr.outvars] == [(2, 3)]
    static = obmlite.export(mlp, PARAMS, f32((2, 4)))
    assert len(static.jaxpr().jaxpr.invars) == 3
    with pytest.raises(obmlite.ArgumentError, match="sizes that are known"):
        function.jaxpr()
    with pytest.raises(obmlite.ArgumentError, match="another shape"):
        function.jaxpr(PARAMS, f32((2, 5)))


def test_operations_are_listed(function: obmlite.Function, capsys: pytest.CaptureFixture[str]) -> None:
    assert function.replayable
    assert str(function.replayable) == "yes"
    assert function.operations["stablehlo.dot_general"] >= 1  # one for each way that platforms have
    assert function.operations["stablehlo.custom_call shape_assertion"] >= 1
    assert cli.main(["show", str(function.package), "f", "--ops"]) == 0
    text = capsys.readouterr().out
    assert "stablehlo.dot_general" in text
    assert "replayable" in text
    assert cli.main(["show", str(function.package), "--ops", "--json"]) == 0
    assert '"not_replayed": []' in capsys.readouterr().out
    cli.main(["show", str(function.package)])
    assert "stablehlo.dot_general" not in capsys.readouterr().out


# --- called as by the other engines


def test_wrong_calls(function: obmlite.Function) -> None:
    with pytest.raises(obmlite.ArgumentError, match="constraint"):
        function(PARAMS, np.zeros((9, 4), "f4"))
    with pytest.raises(obmlite.ArgumentError) as caught:
        function(PARAMS, np.zeros((2, 5), "f4"))
    assert (caught.value.leaf, caught.value.expected) == ("x", "f32[b,4]")


def test_a_platform_that_it_was_not_exported_for(tmp_path: pathlib.Path) -> None:
    for platforms in ("tpu", ("tpu", "cuda")):
        function = reloaded(obmlite.export(mlp, PARAMS, f32((2, 4)), platforms=platforms), tmp_path / str(platforms))
        with pytest.raises(obmlite.PlatformError) as caught:
            function(PARAMS, X)
        assert caught.value.found == "cpu"
        # One that it was exported for is lowered, wherever it is traced.
        lowered = jax.jit(lambda x, f=function: f(PARAMS, x)).trace(X).lower(lowering_platforms=("tpu",))
        assert "dot_general" in lowered.as_text()


def test_donated_arguments(tmp_path: pathlib.Path) -> None:
    step = functools.partial(jax.jit, donate_argnames="cache")(lambda cache, x: (cache + x, x.sum()))
    function = reloaded(obmlite.export(step, f32((4,)), f32((4,)), name="f"), tmp_path)
    cache = jnp.ones(4)
    np.testing.assert_array_equal(function(cache, X[0])[0], 1 + X[0])
    assert cache.is_deleted()
    kept = jnp.ones(4)
    jax.jvp(function, (kept, X[0]), (kept, X[0]))
    assert not kept.is_deleted()


def test_weak_types_keys_and_dtypes(tmp_path: pathlib.Path) -> None:
    def fn(key: Any, x: Any, scale: Any, flags: Any) -> Any:
        noise = jax.random.normal(key, x.shape, x.dtype)
        return {"y": (x + noise) * scale, "key": jax.random.split(key, 2), "flags": ~flags, "unused": x}

    arguments = jax.random.key(3), jnp.ones(4, "bfloat16"), 2.0, np.array([True, False])
    function = reloaded(obmlite.export(fn, *arguments, name="f"), tmp_path)
    found, wanted = function(*arguments), jax.jit(fn)(*arguments)
    for tree in (found, wanted):
        tree["key"] = jax.random.key_data(tree["key"])
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value))


DEVICES = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import obmlite

path = sys.argv[1]
auto = (AxisType.Auto,)
mesh = jax.make_mesh((8,), ("d",), axis_types=auto)
x = np.arange(32, dtype="f4").reshape(16, 2)


def fixed(x):
    return jnp.sin(jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("d")))) * 2


import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    obmlite.Model({"f": obmlite.export(fixed, x, name="f")}).save(path)
assert ["not durable" in str(w.message) for w in caught] == [True], [str(w.message) for w in caught]
function = obmlite.load(path).functions["f"]
assert function.module.num_devices == 8 and function.replayable
wanted = np.sin(x) * 2
try:
    function(x)
except obmlite.ArgumentError as error:
    assert 'engine="replay"' in error.fix, error
else:
    raise AssertionError("called on one device")
function = obmlite.load(path, engine="replay").functions["f"]
one = function(x)
assert len(one.sharding.device_set) == 1
np.testing.assert_allclose(one, wanted, rtol=1e-6)
for size in (2, 8):
    other = jax.sharding.Mesh(np.array(jax.devices()[:size]), ("d",), axis_types=auto)
    result = function.on(other)(x)
    assert len(result.sharding.device_set) == size, result.sharding
    np.testing.assert_allclose(result, wanted, rtol=1e-6)
    placed = function(jax.device_put(x, NamedSharding(other, P("d"))))
    np.testing.assert_allclose(placed, wanted, rtol=1e-6)
print("fine")
"""


def test_another_number_of_devices(tmp_path: pathlib.Path) -> None:
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", DEVICES, str(tmp_path / "f.obm")],
        capture_output=True,
        text=True,
        env={**environment, "JAX_PLATFORMS": "cpu"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "fine"


# --- modules of other times, and other bytes


def test_calling_convention_9(tmp_path: pathlib.Path) -> None:
    before = jax.config.jax_export_calling_convention_version
    jax.config.update("jax_export_calling_convention_version", 9)
    try:
        exported = obmlite.export(mlp, PARAMS, obmlite.spec("f32[b,4]"))
    finally:
        jax.config.update("jax_export_calling_convention_version", before)
    assert exported.module.calling_convention == 9
    np.testing.assert_array_equal(reloaded(exported, tmp_path)(PARAMS, X), jax.jit(mlp)(PARAMS, X))


def test_as_old_a_stablehlo_as_this_jax_writes() -> None:
    artifact = jax.export.export(jax.jit(mlp))(PARAMS, X).mlir_module_serialized
    context = ir.Context()
    stablehlo.register_dialect(context)
    with context:
        module = stablehlo.deserialize_portable_artifact(context, artifact)
        old = stablehlo.serialize_portable_artifact(module, stablehlo.get_minimum_version(), True)
    assert f"StableHLO_v{stablehlo.get_minimum_version()}".encode() in old
    (found,) = replay.to_jax(bytes(old))(*jax.tree.leaves(PARAMS), X)
    np.testing.assert_allclose(found, jax.jit(mlp)(PARAMS, X), rtol=1e-6)


def test_changed_bytes_are_never_parsed(tmp_path: pathlib.Path) -> None:
    reloaded(obmlite.export(mlp, PARAMS, f32((2, 4)), platforms="cpu"), tmp_path)
    (file,) = (tmp_path / "f.obm" / "functions").iterdir()
    data = bytearray(file.read_bytes())
    for position in range(0, len(data), len(data) // 8):
        changed = bytearray(data)
        changed[position] ^= 0x40
        file.write_bytes(changed)
        function = obmlite.load(tmp_path / "f.obm").functions["f"]
        for ask in (lambda f: f.replayable, lambda f: f.operations, lambda f: f.jaxpr()):
            with pytest.raises(obmlite.CorruptPackageError):
                ask(function)


def test_a_thousand_operations_trace_fast() -> None:
    import time

    def deep(x: jax.Array) -> jax.Array:
        for _ in range(500):
            x = jnp.sin(x) * 1.5
        return x

    function = obmlite.export(deep, f32((4,)), name="f", platforms="cpu")
    begin = time.perf_counter()
    closed = function.jaxpr()
    assert len(closed.eqns) >= 1000
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize("engine", ["auto", "replay"])
def test_where_nothing_else_reads_the_function(
    engine: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in years: ``jax.export`` refuses its serialization, and what rebuilding needs is gone from JAX."""

    def gone(*_: Any, **__: Any) -> Any:
        raise UnsupportedFormatError("It cannot be read any more.")

    exported = obmlite.export(mlp, PARAMS, obmlite.spec("f32[b,4]"))
    expected = reloaded(exported, tmp_path, "export")(PARAMS, X)
    monkeypatch.setattr(_engine, "_READERS", {"export": gone, "rebuild": gone})
    again = obmlite.load(tmp_path / "f.obm", engine=engine).functions["f"]
    np.testing.assert_array_equal(again(PARAMS, X), expected)
    assert again.engine == "replay"
    for other in ("export", "rebuild"):
        with pytest.raises(UnsupportedFormatError):
            obmlite.load(tmp_path / "f.obm", engine=other).functions["f"](PARAMS, X)
