"""What differs between packages, and what is read to find it."""

from __future__ import annotations

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from obmlite import Supplemental, spec
from obmlite.diff import diff, text
from obmlite.io.source import LocalFile
from tests import pieces

PARAMS = {"b": np.arange(3, dtype="f4"), "w": np.linspace(-1, 1, 12, dtype="f4").reshape(4, 3)}


def apply(params: Any, x: Any) -> Any:
    return x @ params["w"] + params["b"]


def save(path: pathlib.Path, params: Any = PARAMS, fn: Any = apply, *others: Any, **options: Any) -> pathlib.Path:
    obmlite.Model.from_function(fn, params, spec("f32[n,4]"), name="apply", **options).save(path)
    return path


@pytest.fixture
def a(tmp_path: pathlib.Path) -> pathlib.Path:
    return save(tmp_path / "a.obm")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Weights files that are opened."""
    names: list[str] = []
    original = LocalFile.__init__

    def init(self: LocalFile, descriptor: int, name: str, *args: Any, **kwargs: Any) -> None:
        names.extend([name] if "weights/" in name else [])
        original(self, descriptor, name, *args, **kwargs)

    monkeypatch.setattr(LocalFile, "__init__", init)
    return names


def test_the_same(a: pathlib.Path, tmp_path: pathlib.Path, opened: list[str]) -> None:
    found = diff(a, save(tmp_path / "b.obm"))
    assert found["same"]
    assert found["read"] == 0
    assert "hold the same" in "\n".join(text(found))
    assert diff(a, a, values=True)["same"]
    assert [name for name in opened if name.endswith(".safetensors")] == []


def test_values_by_digest_and_by_value(a: pathlib.Path, tmp_path: pathlib.Path, opened: list[str]) -> None:
    b = save(tmp_path / "b.obm", {**PARAMS, "w": PARAMS["w"] + np.float32(0.25) * np.eye(4, 3, dtype="f4")})
    opened.clear()
    found = diff(a, b)
    assert found["weights"]["changed"] == {"params": {"leaves": {"w": {"values": "differ"}}}}
    assert (found["same"], found["read"], opened) == (False, 0, [])
    assert "    w: other values" in list(text(found))
    found = diff(a, b, values=True)
    by = found["weights"]["changed"]["params"]["leaves"]["w"]["values"]
    assert (by["mismatches"], by["of"], found["read"]) == (3, 12, 1)
    assert by["max_abs"] == pytest.approx(0.25)
    assert "    w: 3 of 12 elements differ, by up to 0.25" in list(text(found))


def test_signatures_code_and_metadata(a: pathlib.Path, tmp_path: pathlib.Path) -> None:
    b = save(tmp_path / "b.obm", {**PARAMS, "c": np.zeros(2, "i4")}, lambda p, x: 2 * apply(p, x), metadata={"v": 2})
    found = diff(a, b)
    assert found["functions"]["changed"]["apply"]["signature"] == [
        "(params: {b: f32[3], w: f32[4,3]}, x: f32[n,4]) -> f32[n,3]",
        "(p: {b: f32[3], c: i32[2], w: f32[4,3]}, x: f32[n,4]) -> f32[n,3]",
    ]
    assert found["weights"]["only_a"] == ["params"]
    assert found["weights"]["only_b"] == ["p"]
    assert found["metadata"] == [{}, {"v": 2}]
    lines = list(text(found))
    assert "+ p" in lines
    assert "    other code" in lines


def test_code_alone(a: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def other(params: Any, x: Any) -> Any:
        return jnp.tanh(apply(params, x))

    changed = diff(a, save(tmp_path / "b.obm", fn=other))["functions"]["changed"]["apply"]
    assert set(changed) == {"digests"}


def test_leaves_that_only_one_has(a: pathlib.Path, tmp_path: pathlib.Path) -> None:
    b = save(tmp_path / "b.obm", {"b": np.arange(3, dtype="f2"), "w": PARAMS["w"], "z": np.zeros(0, "i4")})
    leaves = diff(a, b)["weights"]["changed"]["params"]["leaves"]
    assert leaves == {"b": {"spec": ["f32[3]", "f16[3]"]}, "z": {"spec": [None, "i32[0]"]}}


def test_pieces_of_other_shapes_are_read(tmp_path: pathlib.Path) -> None:
    value = np.arange(24, dtype="f4").reshape(6, 4)
    pieces.save({"w": value}, tmp_path / "a.obm")
    obmlite.Model({"w": obmlite.Weights({"w": value})}).save(tmp_path / "b.obm")
    found = diff(tmp_path / "a.obm", tmp_path / "b.obm")
    assert (found["same"], found["read"]) == (True, 1)
    changed = value.copy()
    changed[5, 3] = -1
    obmlite.Model({"w": obmlite.Weights({"w": changed})}).save(tmp_path / "c.obm")
    by = diff(tmp_path / "a.obm", tmp_path / "c.obm")["weights"]["changed"]["w"]["leaves"]["w"]["values"]
    assert (by["mismatches"], by["max_abs"]) == (1, 24.0)


def test_supplementals(a: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def package(name: str, data: bytes) -> pathlib.Path:
        folder = tmp_path / f"{name}.given"
        folder.mkdir()
        (folder / "x").write_bytes(data)
        (folder / "y").write_bytes(b"y")
        supplementals = {"d": Supplemental.from_directory(folder), "s": Supplemental.from_bytes(data)}
        obmlite.Model({}, supplementals=supplementals).save(tmp_path / name)
        return tmp_path / name

    found = diff(package("c.obm", b"1"), package("d.obm", b"2"))
    assert found["supplementals"]["changed"] == {"d": {"contents": ["x"]}, "s": {"contents": [""]}}
    assert diff(tmp_path / "c.obm", a)["supplementals"]["only_a"] == ["d", "s"]
    assert list(text(found))[-3:] == ["    x: other bytes", "  s", "    content: other bytes"]
