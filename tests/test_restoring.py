"""Restoring: what is refused, and how; progress; templates."""

from __future__ import annotations

import os
import pathlib
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import obmlite
from obmlite import ArgumentError, CorruptPackageError, Model, ObmliteError, RestoreError, Weights, dtypes
from tests import pieces
from tests.test_weights import FLOAT0, bits, filled


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("restoring")
    value = {
        "a": {"w": np.arange(4096, dtype=np.float32).reshape(64, 64), "b": np.arange(64, dtype=np.float16)},
        "c": [np.arange(3, dtype=np.int32), jax.random.key(1)],
        "z": np.zeros(2, FLOAT0.numpy),
    }
    Model({"w": Weights(value)}).save(folder / "m.obm")
    pieces.save(value, folder / "p.obm")
    return folder


@pytest.mark.parametrize("name", ["m.obm", "p.obm"])
@pytest.mark.parametrize("mmap", [True, False])
def test_whole_and_below_the_top(saved: pathlib.Path, name: str, mmap: bool) -> None:
    weights = obmlite.load(saved / name, mmap=mmap).weights["w"]
    restored = weights.restore()
    assert jax.tree.structure(restored) == jax.tree.structure({"a": {"b": 0, "w": 0}, "c": [0, 0], "z": 0})
    assert bits(restored["a"]["w"]) == bits(np.arange(4096, dtype=np.float32).reshape(64, 64))
    assert restored["z"].dtype == FLOAT0.numpy
    below = weights["a"].restore()
    assert list(below) == ["b", "w"]
    assert bits(below["b"]) == bits(np.arange(64, dtype=np.float16))
    leaf = weights["a"]["w"].restore(dtype="bfloat16", sharding=jax.devices()[0])
    assert (leaf.dtype, leaf.committed) == (jnp.bfloat16, True)
    assert np.array_equal(jax.random.key_data(restored["c"][1]), jax.random.key_data(jax.random.key(1)))
    whole = {name_: np.asarray(leaf_) for name_, leaf_ in weights.flat.items()}
    assert bits(whole["c.0"]) == bits(np.arange(3, dtype=np.int32))


@pytest.mark.parametrize("mmap", [True, False])
def test_boxes_of_packed_leaves_that_begin_within_a_byte(tmp_path: pathlib.Path, mmap: bool) -> None:
    value = {d.name: filled(d, (7, 9, 3), n) for n, d in enumerate(dtypes.ALL) if d.is_packed}
    pieces.save(value, tmp_path / "m.obm")
    weights = obmlite.load(tmp_path / "m.obm", mmap=mmap).weights["w"]
    random = np.random.default_rng(0)
    for name, leaf in weights.flat.items():
        for _ in range(40):
            ends = [sorted(random.integers(0, size + 1, 2)) for size in leaf.shape]
            index = tuple(slice(int(a), int(b)) for a, b in ends)
            assert bits(leaf[index]) == bits(value[name][index]), (name, index)


def refused(kind: type[ObmliteError], weights: Any, *parts: str, **options: Any) -> ObmliteError:
    with pytest.raises(kind) as caught:
        weights.restore(**options)
    for part in parts:
        assert part in str(caught.value), caught.value
    return caught.value


def test_what_is_refused(saved: pathlib.Path) -> None:
    weights = obmlite.load(saved / "m.obm").weights["w"]
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    refused(RestoreError, weights, "'nothing'", "a.w", select="nothing")
    refused(RestoreError, weights, "'nothing'", select=["a", "nothing"])
    refused(ArgumentError, weights, "select=", select="a", like={})
    for bad in (0, -1, 1.5, True, "8"):
        for name in ("memory_budget", "threads"):
            error = refused(ArgumentError, weights, repr(bad), "positive", **{name: bad})
            assert (error.field, error.found) == (name, repr(bad))
    refused(RestoreError, weights, "family", "complex64", dtype="complex64")
    refused(RestoreError, weights, "bool", dtype="bool")
    refused(RestoreError, weights["a"]["w"], "a.w", dtype="int32")
    refused(RestoreError, weights, "no such", dtype=lambda name, spec: "no such" if name == "a.b" else None)
    refused(ArgumentError, weights, "mesh", shardings=mesh)
    refused(ArgumentError, weights, "mesh", mesh=3)
    refused(ArgumentError, weights, "abstract", mesh=mesh.abstract_mesh)
    refused(ArgumentError, weights, "mesh=", rules={"x": "x"})
    refused(ArgumentError, weights, "rules", mesh=mesh, rules={"x": 3})
    many = refused(RestoreError, weights, shardings={"a": {"w": None, "nope": None}, "d": None})
    for line in ("a.nope", "a.b", "d:", "c:"):
        assert line in many.found, many
    wrong = refused(RestoreError, weights, shardings={"a": {"w": "x", "b": 1.0}, "c": None, "z": None})
    assert "a.w" in wrong.found
    assert "a.b" in wrong.found
    lazily = refused(RestoreError, weights, shardings=lambda name, spec: "x" if name != "z" else None)
    assert all(name in lazily.found for name in ("a.w", "a.b", "c.0", "c.1"))


def test_templates_that_do_not_match(saved: pathlib.Path) -> None:
    weights = obmlite.load(saved / "m.obm").weights["w"]
    good = jax.tree.map(lambda x: x, weights.restore())
    found = weights.restore(like=good)
    assert jax.tree.structure(found) == jax.tree.structure(good)
    bad = {"a": {"w": jnp.zeros((64, 63)), "b": jnp.zeros(64, bool), "more": 1}, "c": [good["c"][0]], "z": good["z"]}
    error = refused(RestoreError, weights, "like", like=bad)
    for line in ("a.w:", "a.b:", "a.more:", "c.1:"):
        assert line in error.found, error
    assert error.leaf is None
    one = refused(RestoreError, weights, like={**good, "c": good["c"][:1]})
    assert one.leaf == "c.1"


def test_which_leaves_a_function_of_dtypes_sees(saved: pathlib.Path) -> None:
    weights = obmlite.load(saved / "m.obm").weights["w"]
    asked = []

    def choose(name: str, spec: Any) -> Any:
        asked.append((name, spec.shape))
        return {"a.w": np.float16, "a.b": "float32", "c.0": jnp.int8}.get(name)

    restored = weights.restore(dtype=choose)
    assert asked == [("a.b", (64,)), ("a.w", (64, 64)), ("c.0", (3,)), ("c.1", ()), ("z", (2,))]
    assert [str(leaf.dtype) for leaf in jax.tree.leaves(restored)][:3] == ["float32", "float16", "int8"]
    assert np.array_equal(np.asarray(restored["a"]["w"], np.float32), np.asarray(restored["a"]["w"]).astype(np.float32))


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", ["m.obm", "p.obm"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_progress_adds_up(saved: pathlib.Path, mmap: bool, name: str, dtype: Any) -> None:
    weights = obmlite.load(saved / name, mmap=mmap).weights["w"]
    told: list[int] = []
    weights.restore(progress=told.append, dtype=dtype, threads=2)
    assert sum(told) == weights.nbytes


@pytest.mark.parametrize("mmap", [True, False])
def test_an_error_of_progress_comes_out_as_it_is(saved: pathlib.Path, mmap: bool) -> None:
    class Stop(Exception):
        pass

    def stop(nbytes: int) -> None:
        if nbytes:
            raise Stop

    weights = obmlite.load(saved / "p.obm", mmap=mmap).weights["w"]
    before = threading.active_count()
    with pytest.raises(Stop):
        weights.restore(progress=stop, threads=2)
    assert threading.active_count() == before
    assert bits(weights.restore()["a"]["b"]) == bits(np.arange(64, dtype=np.float16)), "and can be called again"


@pytest.mark.parametrize("save", [pieces.save, lambda value, path: Model({"w": Weights(value)}).save(path)])
@pytest.mark.parametrize("harm", ["missing", "short", "header", "shrunk"])
@pytest.mark.parametrize("rows", [16, 1024])
def test_a_bad_file_is_found_in_threads(tmp_path: pathlib.Path, harm: str, save: Any, rows: int) -> None:
    save({f"leaf {n}": np.full((rows, 256), n, np.float32) for n in range(4)}, tmp_path / "m.obm")
    weights = obmlite.load(tmp_path / "m.obm", mmap=False).weights["w"]
    file = max((tmp_path / "m.obm/weights").glob("*.safetensors"))
    if harm == "missing":
        file.unlink()
    elif harm == "short":
        os.truncate(file, file.stat().st_size - 1)
    elif harm == "header":
        data = bytearray(file.read_bytes())
        data[20] ^= 1
        file.write_bytes(data)
    else:
        np.asarray(weights["leaf 0"])  # opens the files
        os.truncate(file, 8192)
    before = threading.active_count()
    with pytest.raises(CorruptPackageError) as caught:
        weights.restore(threads=3)
    assert caught.value.leaf is not None
    assert caught.value.leaf.startswith("leaf ")
    assert file.name in str(caught.value)
    assert threading.active_count() == before


def test_restored_under_jit(saved: pathlib.Path) -> None:
    weights = obmlite.load(saved / "p.obm", mmap=False).weights["w"]
    kept: list[Any] = []

    @jax.jit
    def first(x: Any) -> Any:
        kept.append(weights.restore(dtype="bfloat16"))
        return x

    first(1)
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(kept[0]))
    assert float(kept[0]["a"]["w"][0, 5]) == 5


def test_memory_that_was_given_is_not_kept_in_use() -> None:
    array = np.arange(1 << 16, dtype=np.float32)
    restored = Weights({"a": array}).restore(shardings=jax.devices()[0])["a"]
    array[:] = 0
    assert float(restored[5]) == 5
