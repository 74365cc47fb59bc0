"""Packages from strangers: read in a child process, and replayed only."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import obmlite
from obmlite import _compile_options, _isolation, _saving, cli, listing
from obmlite._isolation import Limits, read_apart
from obmlite._mlir import in_context, stablehlo
from obmlite._stablehlo import normalise
from obmlite.interop._flattened import flatten
from obmlite.pipeline import HOST_STEPS, HostStep
from obmlite.replay import _interpreter, _reading, _survey
from obmlite.schema.records import ModuleFormat

F32 = jax.ShapeDtypeStruct((4,), "float32")
X = np.arange(4, dtype=np.float32)
HEAD = "func.func public @main(%a: tensor<4xf32>) -> tensor<4xf32>"


def artifact(function: Callable[..., Any], *specs: Any) -> bytes:
    return bytes(export.export(jax.jit(function), platforms=("cpu",))(*(specs or (F32,))).mlir_module_serialized)


def assembled(body: str, others: str = "") -> bytes:
    """A module of f32[4] → f32[4] from MLIR's text."""
    with in_context() as context:  # into which reading an artifact brings what text needs
        stablehlo.deserialize_portable_artifact(context, artifact(jnp.sin))
        text = f"module {{ {HEAD} {{ {body} }} {others} }}"
        return bytes(stablehlo.serialize_portable_artifact_str(text, stablehlo.get_current_version()))


def forged(path: pathlib.Path, modules: Mapping[str, bytes], custom_calls: tuple[str, ...] = ()) -> pathlib.Path:
    """A package with all digests right, whose functions, of f32[4] → f32[4], have these modules."""
    functions = {}
    for name, module in modules.items():
        own = obmlite.export(jnp.sin, F32, name=name, platforms="cpu")
        record = dataclasses.replace(
            own.module,
            file=name,
            format=ModuleFormat.PORTABLE_ARTIFACT,
            offset=0,
            length=len(module),
            custom_calls=custom_calls,
        )
        program = dataclasses.replace(own.program, modules=(record,), blobs=lambda _, module=module: module)
        functions[name] = own._with(program=program)
    default = next(iter(modules))
    model = obmlite.Model(functions, pipelines={"serving_default": obmlite.Pipeline(function=default)}).with_examples(X)
    # Not Model.save, which looks whether functions are replayable, and would not survive these.
    _saving.save(model, path, overwrite=False, file_bytes=1 << 30, progress=False, timeout=60, local=True)
    return path


@pytest.fixture(scope="module")
def crasher() -> bytes:
    """A module that crashes MLIR's reader, found by changing bytes of a good one."""
    good = normalise(artifact(lambda x: jnp.linalg.svd(x.reshape(2, 2) @ x.reshape(2, 2))[0].reshape(4))).artifact
    chance = random.Random(0)
    for _ in range(10):
        changed = [bytearray(good) for _ in range(40)]
        for module in changed:
            for _ in range(chance.choice((1, 2, 5))):
                module[chance.randrange(40, len(module))] = chance.randrange(256)
        found = read_apart([bytes(module) for module in changed], Limits(seconds=2))
        for module, outcome in zip(changed, found, strict=True):
            if isinstance(outcome, obmlite.CorruptPackageError):
                return bytes(module)
    raise AssertionError("many damaged modules, and none crashes its reader")


# --- what is good


def test_a_good_package_gives_the_same_and_is_replayed(tmp_path: pathlib.Path) -> None:
    made = obmlite.Model.from_function(
        lambda w, x: jnp.tanh(x @ w), np.ones((4, 4), np.float32), obmlite.spec("f32[b,4]"), name="f", vjp_order=1
    )
    made.save(tmp_path / "m.obm")
    x = np.ones((3, 4), np.float32)
    loaded = obmlite.load(tmp_path / "m.obm", untrusted=True)
    np.testing.assert_allclose(loaded(x), obmlite.load(tmp_path / "m.obm")(x), rtol=1e-6)
    assert loaded.functions["f"].engine == "replay"
    assert obmlite.load(tmp_path / "m.obm").functions["f"].engine != "replay"
    restored = loaded.restore()
    assert restored.functions["f"].engine == "replay"
    with pytest.raises(obmlite.ArgumentError, match="replayed only"):
        restored.functions["f"]._with(engine="export").load()


def test_one_child_reads_all_functions_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forged(tmp_path / "m.obm", {"sin": artifact(jnp.sin), "cos": artifact(jnp.cos)})
    started: list[int] = []
    child = _isolation._child
    monkeypatch.setattr(
        _isolation, "_child", lambda modules, limits: started.append(len(modules)) or child(modules, limits)
    )
    loaded = obmlite.load(tmp_path / "m.obm", untrusted=True)
    assert started == []
    np.testing.assert_allclose(loaded.functions["sin"](X), np.sin(X), rtol=1e-6)
    np.testing.assert_allclose(loaded.functions["cos"](X), np.cos(X), rtol=1e-6)
    again = obmlite.load(tmp_path / "m.obm", untrusted=True)  # while the first one lives
    np.testing.assert_allclose(again.functions["sin"](X), np.sin(X), rtol=1e-6)
    assert started == [2]


def test_what_is_read_here_is_what_the_child_wrote(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte behind the module is not read: what comes from the package is never given to MLIR in this process."""
    module = artifact(jnp.sin)
    seen: list[bytes] = []
    read = _reading.read
    monkeypatch.setattr("obmlite.replay.read", lambda given: seen.append(given) or read(given))
    loaded = obmlite.load(forged(tmp_path / "m.obm", {"f": module}), untrusted=True)
    loaded(X)
    [written] = read_apart([module])
    assert seen == [written]
    assert read(written).functions.keys() == read(module).functions.keys()


def test_writing_anew_keeps_the_meaning() -> None:
    def several(x: Any) -> Any:
        y = jax.lax.fori_loop(0, 3, lambda i, c: jnp.where(c > i, c * 2, c), x)
        key = jax.random.key(0)
        return jnp.sort(y) + jax.random.normal(key, (4,)) + jax.lax.cumsum(jnp.linalg.qr(x.reshape(2, 2))[0].reshape(4))

    module = artifact(several)
    [written] = read_apart([module])
    assert isinstance(written, bytes)
    from obmlite import replay

    np.testing.assert_array_equal(replay.to_jax(written)(X)[0], replay.to_jax(module)(X)[0])


# --- what crashes, or takes too much


def test_a_crash_is_an_error_that_names_the_function(tmp_path: pathlib.Path, crasher: bytes) -> None:
    """The functions beside it still run."""
    path = forged(tmp_path / "m.obm", {"bad": crasher, "good": artifact(jnp.sin), "worse": crasher[::-1]})
    loaded = obmlite.load(path, untrusted=True)
    with pytest.raises(obmlite.CorruptPackageError, match="crashed the process") as error:
        loaded(X)
    assert (error.value.object, error.value.package, error.value.field) == ("bad", str(path), "code")
    assert "SIG" in str(error.value.found)
    np.testing.assert_allclose(loaded.functions["good"](X), np.sin(X), rtol=1e-6)
    with pytest.raises(obmlite.UnsupportedFormatError) as refused:
        loaded.functions["worse"](X)
    assert refused.value.object == "worse"


@pytest.fixture(scope="module")
def crashing(crasher: bytes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """A package of one function whose module crashes its reader; what came of it is known as long as this lasts."""
    path = forged(tmp_path_factory.mktemp("crashing") / "m.obm", {"bad": crasher})
    first = obmlite.load(path, untrusted=True)
    with pytest.raises(obmlite.CorruptPackageError, match="crashed the process"):
        first(X)
    yield path
    assert first.functions


ENTRIES: dict[str, Callable[[obmlite.Model], Any]] = {
    "call": lambda model: model(X),
    "function": lambda model: model.functions["bad"](X),
    "load": lambda model: model.functions["bad"].load(),
    "engine": lambda model: model.functions["bad"].engine,
    "jaxpr": lambda model: model.functions["bad"].jaxpr(),
    "replayable": lambda model: model.functions["bad"].replayable,
    "operations": lambda model: model.functions["bad"].operations,
    "validate": lambda model: model.validate([X], lambda x: x),
    "examples": lambda model: model(*model.examples["serving_default"][0].values()),
    "restore": lambda model: model.restore()(X),
    "export": lambda model: obmlite.export(model.functions["bad"], F32),
    "jit": lambda model: jax.jit(model)(X),
    "grad": lambda model: jax.grad(lambda x: model(x).sum())(X),
    "convert": flatten,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_way_to_a_function_goes_through_the_child(crashing: pathlib.Path, entry: str) -> None:
    loaded = obmlite.load(crashing, untrusted=True)
    with pytest.raises(obmlite.CorruptPackageError, match="crashed the process"):
        ENTRIES[entry](loaded)


def test_show_reads_operations_in_the_child(
    tmp_path: pathlib.Path, crasher: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = forged(tmp_path / "m.obm", {"bad": crasher, "good": artifact(jnp.sin)})
    found = listing.listing(path, operations=True)["functions"]
    assert "crashed" in found["bad"]["error"]
    assert found["good"]["operations"] == {"stablehlo.sine": 1}
    assert cli.main(["show", str(path), "--ops"]) == cli.GOOD
    assert "crashed" in capsys.readouterr().out
    assert cli.main(["run", str(path), "--untrusted"]) == cli.BAD
    assert "crashed" in capsys.readouterr().err


def chain(count: int) -> bytes:
    """A module of many operations."""
    body = "".join(f"%{n + 1} = stablehlo.sine %{n} : tensor<4xf32>\n" for n in range(count))
    return assembled(f"%0 = stablehlo.sine %a : tensor<4xf32>\n{body} return %{count} : tensor<4xf32>")


def test_what_takes_too_long() -> None:
    many = chain(80_000)
    good = artifact(jnp.sin)
    late, after = read_apart([many, good], Limits(seconds=0))
    assert isinstance(late, obmlite.UnsupportedFormatError)
    assert (late.field, "too long" in late.problem) == ("seconds", True)
    assert isinstance(after, bytes)


def test_one_package_does_not_take_the_time_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that has worked for long begins nothing new: the rest is read when it is asked for."""
    modules = [chain(n) for n in range(2)]
    started: list[int] = []
    child = _isolation._child

    def count(given: Any, limits: Limits) -> Any:
        started.append(len(given))
        return child(given, limits)

    monkeypatch.setattr(_isolation, "_child", count)
    apart = _isolation.Apart(lambda: modules, Limits(together=0))
    for module in modules:
        assert apart(module).startswith(b"ML")
    assert started == [2, 1]


def test_what_takes_too_much_memory() -> None:
    values = np.random.default_rng(0).normal(size=1 << 22).astype(np.float32)
    large, good = artifact(lambda x: x + values[:4] + values.sum() + values[-4:], F32), artifact(jnp.sin)
    large = artifact(lambda x: x + jnp.asarray(values)[jnp.int32(x[0]) + jnp.arange(4)])
    assert len(large) > 1 << 24
    refused, after = read_apart([large, good], Limits(memory=32 << 20))
    assert isinstance(refused, obmlite.UnsupportedFormatError)
    assert (refused.field, "too much memory" in refused.problem) == ("memory", True)
    assert isinstance(after, bytes)
    [fine] = read_apart([large])
    assert isinstance(fine, bytes)


def nested(depth: int) -> str:
    body = "%z = stablehlo.sine %a : tensor<4xf32> stablehlo.return %z : tensor<4xf32>"
    for n in range(depth):
        end = "stablehlo.return" if n < depth - 1 else "return"
        body = (
            f'%c{n} = "stablehlo.case"(%i) ({{ {body} }}) : (tensor<i32>) -> tensor<4xf32> {end} %c{n} : tensor<4xf32>'
        )
    return f"%i = stablehlo.constant dense<0> : tensor<i32> {body}"


def test_regions_within_regions() -> None:
    deep, deeper = read_apart([assembled(nested(60)), assembled(nested(70))])
    assert isinstance(deep, bytes)
    assert isinstance(deeper, obmlite.UnsupportedFormatError)
    assert deeper.field == "regions within regions"


def test_bytes_that_are_no_module() -> None:
    text = b"module { func.func public @main(%a: tensor<4xf32>) -> tensor<4xf32> { return %a : tensor<4xf32> } }"
    whole = artifact(jnp.sin)
    for module, field in (
        (b"", "code"),
        (text, "code"),
        (b"ML\xefR", "stablehlo"),
        (whole[: len(whole) // 2], "stablehlo"),
    ):
        [found] = read_apart([module])
        assert isinstance(found, obmlite.UnsupportedFormatError)
        assert found.field == field


def test_nothing_to_read_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    assert read_apart([]) == []


@pytest.mark.parametrize("python", ["", "/bin/false"])
def test_a_child_that_does_not_start(monkeypatch: pytest.MonkeyPatch, python: str) -> None:
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(obmlite.UnsupportedFormatError, match="does not start"):
        read_apart([b""])


# --- what modules say


def loaded(tmp_path: pathlib.Path, module: bytes, custom_calls: tuple[str, ...] = ()) -> obmlite.Model:
    return obmlite.load(forged(tmp_path / "m.obm", {"f": module}, custom_calls), untrusted=True)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("nothing_there", "not replayed"),
        ("xla_python_cpu_callback", "not replayed"),
        ("cu_lu_pivots_to_permutation", "not of a form that is known"),  # of floats, which has no meaning
    ],
)
def test_no_custom_call_is_made(tmp_path: pathlib.Path, target: str, text: str) -> None:
    """Outside of replay, these abort the process."""
    call = f"%0 = stablehlo.custom_call @{target}(%a) {{api_version = 4 : i32}} : (tensor<4xf32>) -> tensor<4xf32>"
    model = loaded(tmp_path, assembled(f"{call} return %0 : tensor<4xf32>"), (target,))
    with pytest.raises(obmlite.UnsupportedFormatError, match=text) as error:
        model(X)
    assert error.value.field in ("operations", "operation")
    assert "engine=" not in str(error.value)  # no other one would take it


def test_a_custom_call_that_the_manifest_hides(tmp_path: pathlib.Path) -> None:
    call = "%0 = stablehlo.custom_call @hidden(%a) {api_version = 4 : i32} : (tensor<4xf32>) -> tensor<4xf32>"
    model = loaded(tmp_path, assembled(f"{call} return %0 : tensor<4xf32>"))
    with pytest.raises(obmlite.CorruptPackageError, match="other targets than the manifest"):
        model(X)


def test_results_that_the_manifest_does_not_have(tmp_path: pathlib.Path) -> None:
    model = loaded(tmp_path, artifact(lambda x: (x, x)))
    with pytest.raises(obmlite.UnsupportedFormatError, match="not of a form that is known") as error:
        model(X)
    assert error.value.object is not None


def test_functions_that_call_each_other_in_a_circle(tmp_path: pathlib.Path) -> None:
    call = "%0 = func.call @{}(%a) : (tensor<4xf32>) -> tensor<4xf32> return %0 : tensor<4xf32>"
    other = f"func.func private @g(%a: tensor<4xf32>) -> tensor<4xf32> {{ {call.format('main')} }}"
    with pytest.raises(obmlite.UnsupportedFormatError, match="calls within calls"):
        loaded(tmp_path, assembled(call.format("g"), other))(X)


def test_functions_that_double_their_work(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_interpreter, "MAX_STEPS", 2000)
    call = "%0 = func.call @{0}(%a) : {1} %1 = func.call @{0}(%0) : {1}".replace(
        "{1}", "(tensor<4xf32>) -> tensor<4xf32>"
    )
    kind = "(%a: tensor<4xf32>) -> tensor<4xf32>"
    others = "".join(
        f"func.func private @f{n}{kind} {{ {call.format(f'f{n + 1}')} return %1 : tensor<4xf32> }}" for n in range(30)
    )
    last = f"func.func private @f30{kind} {{ %0 = stablehlo.sine %a : tensor<4xf32> return %0 : tensor<4xf32> }}"
    module = assembled(f"{call.format('f0')} return %1 : tensor<4xf32>", others + last)
    with pytest.raises(obmlite.UnsupportedFormatError, match="operations to run"):
        loaded(tmp_path, module)(X)


@pytest.mark.parametrize(
    "shape", ["4611686018427387904x4611686018427387904", "4611686018427387904x4611686018427387904x0"]
)
def test_shapes_that_overflow(tmp_path: pathlib.Path, shape: str) -> None:
    """XLA crashes when it compiles the first."""
    body = f"%i = stablehlo.iota dim = 0 : tensor<{shape}xf32> return %a : tensor<4xf32>"
    with pytest.raises(obmlite.UnsupportedFormatError, match="bytes of one tensor"):
        loaded(tmp_path, assembled(body))(X)


def test_more_than_there_is_memory_for(tmp_path: pathlib.Path) -> None:
    def large(x: Any) -> Any:
        start = jax.lax.broadcast_in_dim(x, (1 << 42, 4), (1,))
        return jax.lax.fori_loop(0, 3, lambda i, c: jax.lax.dynamic_update_slice(c * 1.5, x[None], (i, 0)), start)[0]

    model = loaded(tmp_path, artifact(large))
    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED"):
        np.asarray(model(X))


def test_looking_at_a_module_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches that a platform decides make a function that counts in what it calls itself with."""
    digits = 12
    table = "{{ %k = stablehlo.constant dense<{}> : tensor<i32> stablehlo.return %k : tensor<i32> }}"
    swap = ", ".join(f"({table.format(n)})".strip("()") for n in (1, 0))
    names = [f"%d{n}" for n in range(digits)]
    body = ""
    for n in range(digits):  # flips digit n if all below are 1, as far as one table can say
        body += f'%n{n} = "stablehlo.case"(%d{n}) ({swap}) : (tensor<i32>) -> tensor<i32>\n'
    calls = ""
    for n in range(digits):
        given = ", ".join(f"%n{m}" if m == n else f"%d{m}" for m in range(digits))
        kinds = ", ".join(["tensor<i32>"] * digits)
        calls += f"%c{n} = func.call @count({given}) : ({kinds}) -> tensor<i32>\n"
    arguments, scalar = ", ".join(f"{name}: tensor<i32>" for name in names), "tensor<i32>"
    count = f"func.func private @count({arguments}) -> tensor<i32> {{ {body} {calls} return %c0 : tensor<i32> }}"
    start = "".join(
        f'%s{n} = "stablehlo.case"(%p) ({table.format(0)}, {table.format(0)}) : (tensor<i32>) -> tensor<i32>\n'
        for n in range(digits)
    )
    given, kinds = ", ".join(f"%s{n}" for n in range(digits)), ", ".join(["tensor<i32>"] * digits)
    main = (
        'func.func public @main(%p: tensor<i32> {jax.global_constant = "_platform_index"}, %a: tensor<4xf32>) '
        f"-> {scalar} {{ {start} %c = func.call @count({given}) : ({kinds}) -> {scalar} return %c : {scalar} }}"
    )
    program = _reading.read(f"module {{ {main} {count} }}")
    assert _survey.reasons(program, "main", (), 0) == []  # 2 ** 12 states, and then it ends
    monkeypatch.setattr(_survey, "MAX_STEPS", 20_000)
    with pytest.raises(obmlite.UnsupportedFormatError, match="operations to look at"):
        _survey.reasons(program, "main", (), 0)


# --- what else of a package could reach native code, or write


def test_what_excludes_it(tmp_path: pathlib.Path) -> None:
    path = forged(tmp_path / "m.obm", {"f": artifact(jnp.sin)})
    for options in ({"engine": "export"}, {"engine": "rebuild"}, {"allow_custom_calls": {"mine"}}):
        with pytest.raises(obmlite.ArgumentError, match="stranger") as error:
            obmlite.load(path, untrusted=True, **options)
        assert error.value.field == "untrusted"
    obmlite.load(path, untrusted=True, engine="replay")


def test_options_for_xla_are_dropped(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them writes files, and is no option of a package that obmlite has saved."""
    dump = tmp_path / "dump"
    options = {"cpu": {"xla_dump_to": str(dump)}}
    with monkeypatch.context() as forger:
        forger.setattr(_compile_options, "check", lambda options, _: options)
        function = obmlite.export(jnp.sin, F32, name="f", compile_options=options)
    obmlite.Model({"f": function}).save(tmp_path / "m.obm")
    for trust in ({"untrusted": True, "compile_options": True}, {"compile_options": False}):
        loaded = obmlite.load(tmp_path / "m.obm", **trust).functions["f"]
        loaded(X)
        assert loaded.compile_options == {}
    with pytest.raises(obmlite.UnsupportedFormatError) as caught:
        obmlite.load(tmp_path / "m.obm").functions["f"](X)
    assert (caught.value.field, caught.value.object) == ("compile_options", "f")
    assert not dump.exists()
    function(X)
    assert dump.exists()  # so that the test would notice


def test_steps_that_jax_does_not_run_are_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Step(HostStep):
        name = "step"
        signature = obmlite.export(jnp.sin, F32).signature

        def run(self, arguments: Mapping[str, Any]) -> Any:
            made.append("run")
            return arguments["x"]

    def make(name: str, supplementals: Any) -> Any:
        made.append(name)
        return Step()

    monkeypatch.setitem(HOST_STEPS, "application/x.test-step", make)
    sin = obmlite.export(jnp.sin, F32, name="sin")
    obmlite.Model(
        {"sin": sin},
        pipelines={
            "serving_default": obmlite.Pipeline(pre=["step"], function="sin"),
            "plain": obmlite.Pipeline(function="sin"),
        },
        supplementals={"step": obmlite.Supplemental.from_bytes(b"", mime_type="application/x.test-step")},
    ).save(tmp_path / "m.obm")
    made.clear()
    loaded = obmlite.load(tmp_path / "m.obm", untrusted=True)
    with pytest.raises(obmlite.UnsupportedFormatError, match="stranger's is not run") as error:
        loaded(X)
    assert (error.value.field, error.value.object) == ("Step.function", "serving_default")
    np.testing.assert_allclose(loaded.pipelines["plain"](X), np.sin(X), rtol=1e-6)
    assert loaded.supplementals["step"].read() == b""
    assert made == []


def test_the_child_is_isolated(tmp_path: pathlib.Path) -> None:
    """Neither the working directory nor PYTHONPATH say what it imports."""
    mark = tmp_path / "mark"
    for name in ("obmlite", "jax", "json", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')", encoding="utf-8")
    root = pathlib.Path(obmlite.__file__).parents[1]
    code = (
        f"import sys; sys.path[:0] = [{str(root)!r}]\n"
        "from obmlite import _isolation\n"
        f"[found] = _isolation.read_apart([bytes.fromhex({artifact(jnp.sin).hex()!r})])\n"
        "assert isinstance(found, bytes), found\n"
    )
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", "import os; os.chdir(sys.argv[1]) if False else None\n" + code],
        cwd=tmp_path / "work",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not mark.exists()


def test_the_document_says_what_the_limits_are() -> None:
    text = (pathlib.Path(__file__).parents[1] / "docs" / "trust.md").read_text(encoding="utf-8")
    limits = _isolation.LIMITS
    for said in (f"{limits.seconds} s of CPU", f"{limits.memory >> 30} GiB", f"{limits.stack >> 20} MiB of stack"):
        assert said in text.replace("\n", " ")
