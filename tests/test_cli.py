"""The command line: what it prints and how it exits."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from obmlite import cli
from obmlite.io.source import LocalFile


def apply(params: Any, x: Any, scale: float = 2.0) -> Any:
    return jnp.tanh(x @ params["w"]) * scale


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("cli") / "model.obm"
    shared = np.ones((4, 3), "f4")
    params = {"w": shared, "tied": shared, "half": jnp.zeros(5, "bfloat16"), "steps": 3}
    obmlite.Model.from_function(
        apply, params, obmlite.spec("f32[b,4]"), constraints="b <= 16", metadata={"license": "MIT"}
    ).save(path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_show(package: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "show", package)
    assert (code, err) == (0, "")
    for text in (
        "apply(params: {half: bf16[5], steps: ~i32[], tied: f32[4,3], w: f32[4,3]}, x: f32[b,4]) -> f32[b,3]",
        "cpu, cuda, rocm, tpu · jax ",
        "where b <= 16",
        "fixed scale = 2.0 (default)",
        "params: 4 leaves, 18 parameters, 62 B, f32, bf16, i32",
        "serving_default: apply, params = params (default)",
        "license: MIT",
    ):
        assert text in out


def test_show_one_object(package: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "show", package, "params")
    assert "  w      f32[4,3]              tied to tied" in out.splitlines()
    _, out, _ = run(capsys, "show", package, "apply")
    assert "inputs" in out
    assert "  x             f32[b,4]" in out.splitlines()


def test_show_json(package: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "show", package, "--json")[1])
    assert found["functions"]["apply"]["inputs"][-1] == {"name": "x", "dtype": "f32", "shape": ["b", 4]}
    assert found["weights"]["params"]["dtypes"] == {"f32": 12, "bf16": 5, "i32": 1}
    assert found["weights"]["params"]["nbytes"] == 62
    one = json.loads(run(capsys, "show", package, "params", "--json")[1])
    assert one == {"weights": {"params": found["weights"]["params"]}}


def test_show_reads_no_weights(package: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = LocalFile.__init__
    monkeypatch.setattr(
        LocalFile, "__init__", lambda self, fd, name, **kw: (opened.append(name), original(self, fd, name, **kw))[1]
    )
    assert cli.main(["show", str(package), "--json"]) == 0
    assert opened == ["manifest.obm"]


def test_ten_thousand_leaves_stay_readable(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "many.obm"
    obmlite.Model({"w": obmlite.Weights({f"layer_{n}": np.ones(2, "f4") for n in range(10_000)})}).save(path)
    _, out, _ = run(capsys, "show", path)
    assert "w: 10,000 leaves, 20,000 parameters" in out
    assert len(out.splitlines()) < 10
    _, out, _ = run(capsys, "show", path, "w")
    assert len(out.splitlines()) < 60
    assert "… 9,960 more leaves" in out
    assert len(run(capsys, "show", path, "w", "--all")[1].splitlines()) > 10_000
    assert "… 9,997 more leaves" in run(capsys, "show", path, "w", "--leaves", 3)[1]


def test_names_cannot_move_the_cursor(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "odd.obm"
    obmlite.Model({"w": obmlite.Weights({"\x1b[2Jevil\n": np.ones(2, "f4")})}).save(path)
    out = run(capsys, "show", path, "w")[1]
    assert "\x1b" not in out
    assert "\\x1b[2Jevil\\n" in out


@pytest.mark.parametrize(
    "arguments", [[], ["show"], ["show", "PACKAGE", "nothing"], ["dance"], ["show", "PACKAGE", "--leaves", "-1"]]
)
def test_usage(arguments: list[str], package: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *(str(package) if a == "PACKAGE" else a for a in arguments))
    assert code == 2
    assert "usage: obmlite" in err


@pytest.mark.parametrize("command", ["show", "verify"])
def test_no_package(command: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, command, tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("PackageNotFoundError: ")
    assert str(tmp_path) in err


def test_verify(package: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "verify", package)
    assert (code, err) == (0, "")
    assert out.startswith(f"{package}: good, 2 files, ")


def test_verify_a_bad_package(
    package: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    path = tmp_path / "bad.obm"
    shutil.copytree(package, path)
    (path / "notes.txt").write_text("hello")
    [weights] = (path / "weights").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    code, out, _ = run(capsys, "verify", path)
    assert code == 1
    assert "A tensor's bytes were changed." in out
    assert "not part of the package: notes.txt" in out
    assert f"{path}: BAD" in out
    code, out, _ = run(capsys, "verify", path, "--json")
    found = json.loads(out)
    assert (code, found["good"], found["extra"]) == (1, False, ["notes.txt"])
    assert found["problems"][0]["kind"] == "CorruptPackageError"
    assert found["problems"][0]["object"] == "params"
    assert found["problems"][0]["field"] == "chunk digest"


def test_as_a_module_and_into_a_closed_pipe(package: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "obmlite", "show", str(package)], capture_output=True, text=True, check=True
    )
    assert "serving_default" in done.stdout
    assert done.stderr == ""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        piped = subprocess.run(
            [sys.executable, "-m", "obmlite", "show", str(package)], stdout=closed, stderr=subprocess.PIPE, check=False
        )
    assert piped.stderr == b""


# --- run, extract, diff


@pytest.fixture
def served(tmp_path: pathlib.Path) -> pathlib.Path:
    """A package with an example, a supplemental, a private pipeline and fixed batch sizes."""
    model = obmlite.Model.from_function(
        lambda params, x, /, *, scale: {"y": (x @ params["w"]) * scale["by"], "rows": x[:, 0]},
        {"w": np.eye(4, dtype="f4")},
        obmlite.spec("f32[b,4]"),
        kwargs={"scale": obmlite.spec({"by": "f32[]"})},
        name="apply",
        symbol_values={"b": (2, 8)},
        compile_options={"cpu": {"xla_cpu_enable_fast_min_max": True}},
    )
    made = obmlite.Model(
        {"apply": model.polymorphic["apply"], "params": model.weights["params"]},
        pipelines={
            "serving_default": obmlite.Pipeline(function="apply", weights={"params": "params"}),
            "inner": obmlite.Pipeline(function="apply", weights={"params": "params"}, visibility="private"),
        },
        supplementals={"notes": obmlite.Supplemental.from_bytes(b"hello", mime_type="text/plain", function="apply")},
    )
    made.save(tmp_path / "served.obm")
    return tmp_path / "served.obm"


def test_show_pipelines_and_what_else_there_is(served: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "show", served)
    for text in (
        "apply: apply.0, apply.1",
        "apply.0(params: {w: f32[4,4]}, x: f32[2,4], *, scale: {by: f32[]}) -> {rows: f32[2], y: f32[2,4]} (private)",
        "inner: apply, params = params (private)",
        "notes: inline, 5 B, text/plain, of apply",
    ):
        assert text in out
    _, out, _ = run(capsys, "show", served, "apply.0")
    assert "compiled for cpu with: xla_cpu_enable_fast_min_max=True" in out


def test_run(served: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, by = np.arange(8, dtype="f4").reshape(2, 4), np.float32(3)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "by.npy", by)
    inputs = ["--input", f"x={tmp_path / 'x.npy'}", "--input", f"scale.by={tmp_path / 'by.npy'}"]
    code, out, err = run(capsys, "run", served, *inputs, "--output", f"y={tmp_path / 'y.npy'}")
    assert (code, err) == (0, "")
    assert "y.npy" in out
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), x * 3)
    assert run(capsys, "run", served, "inner", *inputs, "--output", tmp_path / "all.npz")[0] == 0
    with np.load(tmp_path / "all.npz") as found:
        assert sorted(found) == ["rows", "y"]
    code, out, _ = run(capsys, "run", served, *inputs)
    assert out.splitlines() == ["rows: f32[2]  [0., 4.]", "y: f32[2,4]  [[ 0.,  3.,  6.,  9.], [12., 15., 18., 21.]]"]
    np.savez(tmp_path / "in.npz", **{"x": x[:1].repeat(3, 0), "scale.by": by})
    code, _, err = run(capsys, "run", served, "--input", tmp_path / "in.npz")
    assert code == 1
    assert "No concrete function takes these arguments." in err
    code, out, _ = run(capsys, "run", served, "--input", tmp_path / "in.npz", "--pad-batch")
    assert out.startswith("rows: f32[3]")


def test_run_examples(served: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "run", served)
    assert code == 2
    assert "no examples" in err
    example = {"x": np.ones((2, 4), "f4"), "scale": {"by": np.float32(2)}}
    model = obmlite.load(served)
    model.with_examples(example).save(tmp_path / "examples.obm")
    code, out, err = run(capsys, "run", tmp_path / "examples.obm")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "rows: f32[2]  [1., 1.]"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--input", "x=absent.npy"], 1),
        (["--input", "x=x.txt"], 1),
        (["--input", "z=x.npy"], 1),
        (["nothing"], 2),
    ],
)
def test_run_with_wrong_inputs(
    arguments: list[str], code: int, served: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(served.parent)
    np.save("x.npy", np.ones((2, 4), "f4"))
    found, _, err = run(capsys, "run", served, *arguments)
    assert found == code
    assert err


def test_run_reads_no_pickles(served: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", np.array([{}], object), allow_pickle=True)
    code, _, err = run(capsys, "run", served, "--input", f"x={tmp_path / 'x.npy'}")
    assert code == 1
    assert "cannot be read" in err


def test_extract(
    served: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "extract", served, "notes")[0] == 0
    assert (tmp_path / "notes").read_bytes() == b"hello"
    assert run(capsys, "extract", served, "notes")[0] == 1  # there is something now
    assert run(capsys, "extract", served, "notes", "--to", tmp_path / "there" / "n.txt")[0] == 0
    assert (tmp_path / "there" / "n.txt").read_bytes() == b"hello"
    assert run(capsys, "extract", served, "nothing")[0] == 2


def test_diff(package: pathlib.Path, served: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "diff", package, package)
    assert (code, out.strip()) == (0, f"{package} and {package} hold the same")
    code, out, _ = run(capsys, "diff", package, served)
    assert code == 1
    assert "+ apply.0" in out
    code, out, _ = run(capsys, "diff", package, served, "--json")
    assert json.loads(out)["pipelines"]["only_b"] == ["inner"]
    assert run(capsys, "diff", package, served.parent / "absent")[0] == 1
