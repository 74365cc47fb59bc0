"""Rewritten files hold the same, and can be used where they are mapped."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import obmlite
from obmlite import ArgumentError, CorruptPackageError, PackageExistsError, PackageNotFoundError, cli
from obmlite.foreign import realign
from obmlite.io import safetensors
from tests import llama

VALUES = {
    "odd": np.arange(7, dtype=np.int8),
    "large": np.arange(1 << 12, dtype=np.float32).reshape(64, 64),
    "b": np.arange(96, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(3, 32),
    "none": np.zeros((0, 3), np.float64),
    "scalar": np.array(2.5),
}


def header(path: pathlib.Path) -> safetensors.Header:
    raw = path.read_bytes()
    return safetensors.parse_header(raw[: safetensors.header_size(raw[:8], len(raw))], len(raw))


def crooked(path: pathlib.Path, **values: Any) -> pathlib.Path:
    """A file whose tensors begin at odd places."""
    save_file(values or VALUES, path, {"format": "pt", "who": "me"})
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    extra = 1 + size % 2
    path.write_bytes((size + extra).to_bytes(8, "little") + raw[8 : 8 + size] + b" " * extra + raw[8 + size :])
    assert header(path).size % 2
    return path


def check_same(old: pathlib.Path, new: pathlib.Path) -> None:
    before, after = header(old), header(new)
    assert before.metadata == after.metadata
    assert {n: (e.dtype, e.shape) for n, e in before.entries.items()} == {
        n: (e.dtype, e.shape) for n, e in after.entries.items()
    }
    a, b = old.read_bytes(), new.read_bytes()
    for name, entry in before.entries.items():
        own = after.entries[name]
        assert a[before.size :][entry.start : entry.end] == b[after.size :][own.start : own.end]
        if (own.end - own.start) % 64 == 0:
            assert (after.size + own.start) % 64 == 0


def test_a_file(tmp_path: pathlib.Path) -> None:
    old = crooked(tmp_path / "old.safetensors")
    restored = obmlite.open_weights(old).restore(select=["large", "odd", "b"])
    np.testing.assert_array_equal(np.asarray(restored["large"]), VALUES["large"])
    assert np.asarray(obmlite.open_weights(old)["large"]).ctypes.data % 2, "it is no array that can be used in place"
    new = tmp_path / "new.safetensors"
    told: list[int] = []
    realign(old, new, progress=told.append)
    assert sum(told) == sum(value.nbytes for value in VALUES.values())
    check_same(old, new)
    with safe_open(new, "numpy") as file:  # what the format's own library says
        assert file.metadata() == {"format": "pt", "who": "me"}
    for name, value in load_file(new).items():
        np.testing.assert_array_equal(value, VALUES[name])
    assert np.asarray(obmlite.open_weights(new)["large"]).ctypes.data % 64 == 0
    assert sorted(os.listdir(tmp_path)) == ["new.safetensors", "old.safetensors"]


def test_a_directory(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = llama.tensors(2, 32, 32)
    llama.save(tmp_path / "old", found)
    (tmp_path / "old" / "config.json").write_text("{}")
    assert cli.main(["realign", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    index = "model.safetensors.index.json"
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert sorted(os.listdir(tmp_path / "new")) == [*names, index], "no more than the weights"
    for name in names:
        check_same(tmp_path / "old" / name, tmp_path / "new" / name)
    assert json.loads((tmp_path / "new" / index).read_text()) == json.loads((tmp_path / "old" / index).read_text())
    weights = obmlite.open_weights(tmp_path / "new", names=llama.NAMES)
    assert weights["layers"]["mlp"]["up"]["kernel"].shape == (2, 64, 32)

    assert cli.main(["realign", str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    assert "PackageExistsError" in capsys.readouterr().err


def test_in_place(tmp_path: pathlib.Path) -> None:
    """Who has the old file open keeps it; links to it stay what they are."""
    old = crooked(tmp_path / "x.safetensors")
    opened = obmlite.open_weights(old)["large"]
    with pytest.raises(PackageExistsError) as caught:
        realign(old, old)
    assert caught.value.found == "x.safetensors"
    content = old.read_bytes()
    realign(old, old, overwrite=True)
    assert old.read_bytes() != content
    np.testing.assert_array_equal(np.asarray(opened), VALUES["large"])
    np.testing.assert_array_equal(np.asarray(obmlite.open_weights(old)["large"]), VALUES["large"])
    assert header(old).size % 64 == 0


def test_files_without_an_index(tmp_path: pathlib.Path) -> None:
    (tmp_path / "old").mkdir()
    crooked(tmp_path / "old" / "a.safetensors", x=VALUES["large"])
    crooked(tmp_path / "old" / "b.safetensors", y=VALUES["odd"])
    realign(tmp_path / "old", tmp_path / "new")
    for name in ("a", "b"):
        check_same(tmp_path / "old" / f"{name}.safetensors", tmp_path / "new" / f"{name}.safetensors")
    with pytest.raises(ArgumentError, match="path of a file"):
        realign(tmp_path / "old" / "a.safetensors", tmp_path / "new")
    with pytest.raises(ArgumentError, match="need a directory"):
        realign(tmp_path / "old", tmp_path / "old" / "a.safetensors")


def test_what_fails_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PackageNotFoundError):
        realign(tmp_path / "x", tmp_path / "y")
    llama.save(tmp_path / "old", llama.tensors(1, 32, 32))
    (tmp_path / "old" / "model-00002-of-00002.safetensors").write_bytes(b"12345678")
    with pytest.raises(CorruptPackageError):
        realign(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    # A disk that is full: files may not grow beyond some size.
    crooked(tmp_path / "x.safetensors", x=np.zeros(1 << 20, np.int8))
    crooked(tmp_path / "y.safetensors", x=np.ones(9, np.int8))
    content = (tmp_path / "y.safetensors").read_bytes()
    code = (
        "import resource, signal; from obmlite.foreign import realign\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))\n"
        "realign('x.safetensors', 'y.safetensors', overwrite=True)"
    )
    root = str(pathlib.Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "File too large" in done.stderr
    assert (tmp_path / "y.safetensors").read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["old", "x.safetensors", "y.safetensors"]


def test_memory_does_not_grow_with_the_file(tmp_path: pathlib.Path) -> None:
    crooked(tmp_path / "x.safetensors", **{f"x{n}": np.zeros((8 << 20) + n, np.int8) for n in range(16)})
    code = (
        "import resource, sys; from obmlite.foreign import realign\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; realign('x.safetensors', 'y.safetensors')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    root = str(pathlib.Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    unit = 1 if sys.platform == "darwin" else 1 << 10
    assert int(done.stdout) * unit < 32 << 20
    assert (tmp_path / "y.safetensors").stat().st_size > 128 << 20
