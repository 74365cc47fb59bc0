"""What keeps a function running as JAX moves: three engines, an old StableHLO, known custom calls."""

import dataclasses
import os
import struct
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from obmlite import CorruptPackageError, ExportError, UnsupportedFormatError, _rebuild
from obmlite._stablehlo import OLDEST_TARGET
from obmlite.io import digest
from obmlite.schema.decode import decode
from obmlite.schema.encode import encode
from obmlite.verify import verify

ENGINES = ("export", "rebuild", "replay", "auto")
PARAMS = {"w": np.linspace(-1, 1, 12, dtype="f4").reshape(4, 3), "b": np.arange(3, dtype="f4")}
TABLE = np.linspace(0, 1, 400, dtype="f4").reshape(4, 100)
X = np.linspace(-2, 2, 20, dtype="f4").reshape(5, 4)


def network(params, x):
    """With a captured array, and with integers among its results."""
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return {"hidden": hidden, "sum": (x @ TABLE).sum(1), "best": jnp.argmax(hidden, -1)}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    path = tmp_path_factory.mktemp("versions") / "m.obm"
    function = obmlite.export(network, PARAMS, obmlite.spec("f32[b,4]"), constraints="b <= 8", vjp_order=2)
    obmlite.Model({"network": function}).save(path)
    return path


@pytest.fixture
def copy(package, tmp_path):
    return changed(package, tmp_path / "m.obm")


def changed(package, path, record=lambda module: module, blob=lambda data: data):
    """A copy of a package with other modules, or another file of functions, and digests that agree with it."""
    old = decode((package / "manifest.obm").read_bytes())
    files = {}
    renamed = {}
    for name, file in old.files.items():
        data = (package / name).read_bytes()
        if name.startswith("functions/"):
            data = blob(data)
            renamed[name] = f"functions/other-{digest.sha256(data).hex()[:16]}.jaxexport"
            file = dataclasses.replace(file, path=renamed[name], length=len(data), digest=digest.sha256(data))
        files[file.path] = file
        (path / file.path).parent.mkdir(parents=True, exist_ok=True)
        (path / file.path).write_bytes(data)
    functions = {
        name: dataclasses.replace(
            function,
            primal=record(dataclasses.replace(function.primal, file=renamed[function.primal.file])),
            vjps=tuple(record(dataclasses.replace(vjp, file=renamed[vjp.file])) for vjp in function.vjps),
        )
        for name, function in old.functions.items()
    }
    (path / "manifest.obm").write_bytes(encode(dataclasses.replace(old, files=files, functions=functions)))
    assert verify(path).good
    return path


def expire(data):
    """jax.export's flatbuffer as of version 1, and without its tree: not all JAX look at the version."""
    data = bytearray(data)
    (root,) = struct.unpack_from("<I", data, 0)
    vtable = root - struct.unpack_from("<i", data, root)[0]
    version = root + struct.unpack_from("<H", data, vtable + 4)[0]
    assert struct.unpack_from("<H", data, version)[0] > 1
    struct.pack_into("<H", data, version, 1)
    assert struct.unpack_from("<H", data, vtable + 8)[0]
    struct.pack_into("<H", data, vtable + 8, 0)
    return bytes(data)


@pytest.fixture
def expired(package, tmp_path):
    """A package that jax.export refuses."""
    return changed(package, tmp_path / "m.obm", blob=expire)


def numbers(path, engine):
    """Results and gradients of two orders."""
    function = obmlite.load(path, engine=engine).functions["network"]

    def total(params, x):
        result = function(params, x)
        return (result["hidden"] ** 2).sum() + (result["sum"] * X[:, 0]).sum()

    def slope(params, x):
        return sum((g**2).sum() for g in jax.tree.leaves(jax.grad(total, argnums=(0, 1))(params, x)))

    found = function(PARAMS, X), jax.grad(total, argnums=(0, 1))(PARAMS, X), jax.grad(slope, argnums=(0, 1))(PARAMS, X)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]


def same(a, b):
    return len(a) == len(b) and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def close(a, b):
    return len(a) == len(b) and all(np.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(a, b, strict=True))


# --- engines


def test_every_engine_gives_the_same_numbers(package):
    expected = numbers(package, "export")
    assert same(numbers(package, "rebuild"), expected)
    assert same(numbers(package, "auto"), expected)
    replayed = numbers(package, "replay")  # with derivatives that JAX makes of the operations
    assert same(replayed[:3], expected[:3])
    assert close(replayed, expected)
    function = obmlite.export(network, PARAMS, obmlite.spec("f32[b,4]"))
    assert same([np.asarray(leaf) for leaf in jax.tree.leaves(function(PARAMS, X))], expected[:3])


def test_auto_takes_the_first(package):
    assert obmlite.load(package).functions["network"].engine == "export"
    for engine in ("export", "rebuild", "replay"):
        assert obmlite.load(package, engine=engine).functions["network"].engine == engine


def test_a_package_that_jax_export_refuses(package, expired):
    refused = obmlite.load(expired, engine="export").functions["network"]
    with pytest.raises(UnsupportedFormatError) as caught:
        refused(PARAMS, X)
    assert (caught.value.field, caught.value.object) == ("engine", "network")
    assert caught.value.found.startswith(f"saved with jax {jax.__version__}: ")
    assert "rebuild" in caught.value.fix
    assert obmlite.load(expired).functions["network"].engine == "rebuild"
    expected = numbers(package, "export")
    assert same(numbers(expired, "rebuild"), expected)
    assert same(numbers(expired, "auto"), expected)


@pytest.mark.parametrize("engine", ["rebuild", "auto"])
def test_constraints_hold_without_jax_export(expired, engine):
    function = obmlite.load(expired, engine=engine).functions["network"]
    with pytest.raises(obmlite.ArgumentError) as caught:
        function(PARAMS, np.zeros((9, 4), "f4"))
    assert caught.value.expected == "b <= 8"
    assert function(PARAMS, np.zeros((8, 4), "f4"))["best"].shape == (8,)
    # Also where JAX checks them: with the sizes of symbols of another function.
    with pytest.raises(Exception, match=r"b <= 8|onstraint"):
        obmlite.export(lambda x: function(PARAMS, x), obmlite.spec("f32[c,4]"), constraints="c >= 9", name="outer")


def test_a_jax_whose_deserialization_raises(package, monkeypatch):
    def raises(data):
        raise ValueError("older than the 6-month backward-compatibility window")

    monkeypatch.setattr(jax.export, "deserialize", raises)
    function = obmlite.load(package).functions["network"]
    assert function(PARAMS, X)["hidden"].shape == (5, 3)
    assert function.engine == "rebuild"


def test_replay_when_nothing_of_jax_export_is_left(package, expired, monkeypatch):
    expected = numbers(package, "export")
    monkeypatch.setattr(_rebuild, "_FIELDS", frozenset({"fun_name"}))
    with pytest.raises(UnsupportedFormatError, match="of other parts"):
        obmlite.load(expired, engine="rebuild").functions["network"].load()
    assert obmlite.load(expired).functions["network"].engine == "replay"
    for found in (numbers(expired, "auto"), numbers(expired, "replay")):
        assert same(found[:3], expected[:3])
        assert close(found, expected)


def test_when_no_engine_is_left_each_says_why(package, tmp_path):
    path = changed(package, tmp_path / "m.obm", lambda module: dataclasses.replace(module, calling_convention=99))
    function = obmlite.load(path).functions["network"]
    with pytest.raises(UnsupportedFormatError) as caught:
        function(PARAMS, X)
    found = caught.value.found
    assert "export: " in found
    assert "rebuild: " in found
    assert "replay: 99" in found
    assert f"jax {jax.__version__}" in found
    assert (caught.value.object, caught.value.package) == ("network", str(path))
    assert f"jax {jax.__version__}" in caught.value.fix


def test_there_is_no_other_engine(package):
    with pytest.raises(obmlite.ArgumentError) as caught:
        obmlite.load(package, engine="none")
    assert caught.value.expected == "auto, export, rebuild, replay"


@pytest.mark.parametrize("engine", ENGINES)
def test_another_calling_convention(package, tmp_path, engine):
    path = changed(package, tmp_path / "m.obm", lambda module: dataclasses.replace(module, calling_convention=99))
    with pytest.raises(UnsupportedFormatError, match="99"):
        obmlite.load(path, engine=engine).functions["network"](PARAMS, X)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_newer_stablehlo(package, tmp_path, engine):
    """Bytecode of a version that MLIR does not know, which it refuses as it does operations that it does not know."""

    def newer(data):
        return data.replace(b"ML\xefR\r", b"ML\xefR\x7f")

    path = changed(package, tmp_path / "m.obm", lambda m: dataclasses.replace(m, stablehlo_version="9.14.0"), newer)
    with pytest.raises(UnsupportedFormatError) as caught:
        obmlite.load(path, engine=engine).functions["network"](PARAMS, X)
    assert "StableHLO 9.14.0" in caught.value.found
    assert f"saved with jax {jax.__version__}" in caught.value.found
    assert f"jax {jax.__version__}" in caught.value.fix


# --- what is saved


def test_the_oldest_target_is_recorded(package):
    function = decode((package / "manifest.obm").read_bytes()).functions["network"]
    for module in (function.primal, *function.vjps):
        assert module.stablehlo_version == OLDEST_TARGET == "1.14.0"
        data = (package / module.file).read_bytes()[module.offset : module.offset + module.length]
        assert data.startswith(b"ML\xefR\rStableHLO_v1.14.0\0")
        assert module.jax_version == jax.__version__


def test_what_an_older_target_lacks_takes_a_newer_one():
    """A collective over the axes of a mesh is newer than the oldest target, in JAX that makes one."""
    code = """
        functions = [obmlite.export(fixed(), np.ones((8, 2), "f4"), name="fixed")]
        print(functions[0].module.stablehlo_version)
    """
    found = child(code, devices=8)
    target = tuple(map(int, found.split(".")))
    assert target >= (1, 14, 0)
    assert (target == (1, 14, 0)) or jax.__version_info__ >= (0, 11)


def test_a_function_that_fixes_its_mesh_is_not_durable(tmp_path):
    code = f"""
        import warnings
        function = obmlite.export(fixed(), np.ones((8, 2), "f4"), name="fixed")
        free = obmlite.export(lambda x: x + 1, np.ones(2, "f4"), name="free")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            obmlite.Model({{"fixed": function, "free": free}}).save({str(tmp_path / "m.obm")!r})
        for warning in caught:
            print(warning.category.__name__, warning.message, __file__ == warning.filename)
    """
    lines = child(code, devices=8).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("UserWarning The function 'fixed' is not durable")
    assert "(sdy)" in lines[0]
    assert lines[0].endswith("True")
    functions = obmlite.load(tmp_path / "m.obm").functions
    assert not functions["fixed"].durable
    assert functions["free"].durable


# --- custom calls


def lapack(a):
    return jnp.linalg.cholesky(a), jnp.linalg.svd(a, compute_uv=False)


@pytest.fixture(scope="module")
def with_lapack(tmp_path_factory):
    path = tmp_path_factory.mktemp("lapack") / "m.obm"
    functions = {"lapack": obmlite.export(lapack, np.eye(3, dtype="f4"), name="lapack", vjp_order=1)}
    with warnings.catch_warnings():  # that there are platforms on which it is not replayable
        warnings.filterwarnings("ignore", message=".*is not replayable on")
        obmlite.Model(functions).save(path)
    return path


@pytest.mark.parametrize("listed", [(), ("Sharding",), ("lapack_sgesdd_ffi",)])
@pytest.mark.parametrize("engine", ENGINES)
def test_another_list_of_custom_calls_than_the_modules(with_lapack, tmp_path, engine, listed):
    path = changed(with_lapack, tmp_path / "m.obm", lambda module: dataclasses.replace(module, custom_calls=listed))
    with pytest.raises(CorruptPackageError) as caught:
        obmlite.load(path, engine=engine).functions["lapack"](np.eye(3, dtype="f4"))
    error = caught.value
    assert (error.field, error.object, error.package) == ("Module.custom_calls", "lapack", str(path))
    assert error.expected == (", ".join(listed) or "none")
    assert "lapack_spotrf_ffi" in error.found


def test_a_custom_call_that_is_not_there(package, tmp_path):
    path = changed(package, tmp_path / "m.obm", lambda module: dataclasses.replace(module, custom_calls=("Sharding",)))
    with pytest.raises(CorruptPackageError) as caught:
        obmlite.load(path).functions["network"].load()
    assert (caught.value.field, caught.value.found) == ("Module.custom_calls", "shape_assertion")


def native(x):
    return jax.ffi.ffi_call("obmlite_made_up", jax.ShapeDtypeStruct((2,), "f4"))(x) + 1


def test_a_custom_call_that_jax_does_not_promise(tmp_path):
    x = np.ones(2, "f4")
    with pytest.raises(ExportError) as caught:
        obmlite.export(native, x, platforms="cpu")
    assert (caught.value.field, caught.value.found) == ("custom calls", "obmlite_made_up")
    assert "allow_custom_calls={'obmlite_made_up'}" in caught.value.fix
    with pytest.raises(ExportError):
        obmlite.export(native, x, platforms="cpu", allow_custom_calls={"another"})
    function = obmlite.export(native, x, platforms="cpu", allow_custom_calls={"obmlite_made_up"})
    with pytest.warns(UserWarning, match=r"'native' is not replayable: stablehlo\.custom_call obmlite_made_up"):
        obmlite.Model({"native": function}).save(tmp_path / "m.obm")
    for engine in ("export", "rebuild", "auto"):
        with pytest.raises(UnsupportedFormatError) as refused:
            obmlite.load(tmp_path / "m.obm", engine=engine).functions["native"](x)
        assert (refused.value.field, refused.value.found) == ("custom calls", "obmlite_made_up")
        assert refused.value.object == "native"
        assert "allow_custom_calls={'obmlite_made_up'}" in refused.value.fix
        allowed = obmlite.load(tmp_path / "m.obm", engine=engine, allow_custom_calls={"obmlite_made_up"})
        allowed.functions["native"].load()
        with pytest.raises(jax.errors.JaxRuntimeError, match="obmlite_made_up"):  # nothing here provides it
            allowed.functions["native"](x)
    replayed = obmlite.load(tmp_path / "m.obm", engine="replay", allow_custom_calls={"obmlite_made_up"})
    with pytest.raises(UnsupportedFormatError, match="obmlite_made_up"):  # it calls no native code by name
        replayed.functions["native"].load()
    assert verify(tmp_path / "m.obm").good


@pytest.mark.parametrize("engine", ENGINES)
def test_lapack_in_a_fresh_process(with_lapack, engine):
    code = f"""
        function = obmlite.load({str(with_lapack)!r}, engine={engine!r}).functions["lapack"]
        a = np.array([[4, 1, 0], [1, 3, 0], [0, 0, 2]], "f4")
        half, values = function(a)
        gradient = jax.grad(lambda a: function(a)[0].sum() + function(a)[1].sum())(a)
        print(np.asarray([*half.ravel(), *values, *gradient.ravel()]).tolist())
    """
    a = np.array([[4, 1, 0], [1, 3, 0], [0, 0, 2]], "f4")
    half, values = lapack(a)
    gradient = jax.grad(lambda a: lapack(a)[0].sum() + lapack(a)[1].sum())(a)
    expected = np.asarray([*half.ravel(), *values, *gradient.ravel()])
    np.testing.assert_allclose(eval(child(code)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_without_linear_algebra_nothing_is_set_up_for_it(package, with_lapack, engine):
    """Setting LAPACK up imports SciPy, which takes as long as opening, loading and compiling a small function."""
    code = """
        import sys
        model = obmlite.load({!r}, engine={!r})
        (function,) = model.functions.values()
        function.load()
        print({})
        print("scipy.linalg" in sys.modules)
    """
    call = 'function({"w": np.ones((4, 3), "f4"), "b": np.ones(3, "f4")}, np.ones((5, 4), "f4"))["best"].sum()'
    assert child(code.format(str(package), engine, call)).split() == ["0", "False"]
    call = 'function(np.eye(3, dtype="f4"))[1].sum()'
    assert child(code.format(str(with_lapack), engine, call)).split() == ["3.0", "True"]


# --- other processes

PROLOGUE = """\
import functools, jax, jax.numpy as jnp, numpy as np, obmlite
from jax.sharding import PartitionSpec as P


def fixed():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return jax.jit(
        jax.shard_map(lambda x: jax.lax.psum(jnp.sin(x), "y"), mesh=mesh, in_specs=P("x", "y"), out_specs=P("x"))
    )
"""


def child(code, devices=1):
    """What a fresh process prints."""
    lines = code.strip("\n").split("\n")
    margin = len(lines[0]) - len(lines[0].lstrip())
    program = PROLOGUE + "".join(f"\n{line[margin:]}" for line in lines)
    script = "import sys; __file__ = 'child.py'; exec(compile(sys.stdin.read(), __file__, 'exec'))"
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    done = subprocess.run(
        [sys.executable, "-c", script], input=program, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if line.startswith("error:")], done.stderr
    return done.stdout.strip()
