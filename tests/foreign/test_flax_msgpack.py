"""Checkpoints that Flax itself wrote, read without it; and what is no such file."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any

import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import obmlite
from obmlite import CorruptPackageError, LeafError, PackageNotFoundError
from obmlite.foreign import flax_msgpack


@pytest.fixture
def serialization(monkeypatch: pytest.MonkeyPatch) -> Any:
    return pytest.importorskip("flax.serialization")


def expect(expected: Any, weights: obmlite.Weights) -> None:
    found = weights.lazy()
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert (np.shape(a), np.asarray(a).dtype) == (b.shape, np.asarray(b).dtype)
        np.testing.assert_array_equal(np.asarray(b), np.asarray(a))


TREE = {
    "params": {
        "Dense_0": {"kernel": np.arange(24, dtype=np.float32).reshape(4, 6), "bias": np.zeros(6, np.float32)},
        "half": np.arange(10).astype(ml_dtypes.bfloat16),
        "eight": np.arange(10).astype(ml_dtypes.float8_e4m3fn),
        "four": np.arange(-8, 8).astype(ml_dtypes.int4),
        "none": np.zeros((0, 3), np.int16),
        "truth": np.array([True, False]),
        "complex": np.array([1 + 2j], np.complex64),
    },
    "step": np.array(7, np.int32),
    "long": {f"key number {n}": np.full(n, n, np.uint16) for n in range(40)},
}


@pytest.mark.parametrize("chunk", [1 << 30, 64, 24, 10, 3])
def test_what_flax_wrote(serialization: Any, tmp_path: pathlib.Path, monkeypatch: Any, chunk: int) -> None:
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
    data = serialization.to_bytes(TREE)
    assert (b"__msgpack_chunked_array__" in data) == (chunk < 1000)
    path = tmp_path / "x.msgpack"
    path.write_bytes(data)
    for weights in (
        flax_msgpack.read(data),
        flax_msgpack.read(path),
        flax_msgpack.read(path, mmap=False),
        obmlite.open_weights(path),
    ):
        expect(TREE, weights)
        kernel = weights["params"]["Dense_0"]["kernel"]
        np.testing.assert_array_equal(kernel[1:3, 2:5], TREE["params"]["Dense_0"]["kernel"][1:3, 2:5])
        restored = weights.restore(select="params.Dense_0")
        np.testing.assert_array_equal(restored["params"]["Dense_0"]["kernel"], TREE["params"]["Dense_0"]["kernel"])
        assert set(weights["params"].restore()) == set(TREE["params"])


def test_numbers_and_containers(serialization: Any) -> None:
    """Flax writes lists as dicts in state dicts, and as they are without."""
    value = {"a": [1, -2, 300, -70000, 1 << 30, 2.5, True, None, 1 + 2j], "b": np.float32(3.5), "c": np.int8(-4)}
    weights = flax_msgpack.read(serialization.msgpack_serialize(value))
    assert weights.lazy()["a"][7] is None
    assert [np.asarray(x).item() for x in weights["a"].flat.values()] == [
        1,
        -2,
        300,
        -70000,
        1 << 30,
        2.5,
        True,
        1 + 2j,
    ]
    assert [leaf.spec.weak_type for leaf in weights["a"].flat.values()] == [True] * 6 + [False, True]
    assert (weights["b"].dtype, np.asarray(weights["b"]).item()) == (np.float32, 3.5)
    assert (weights["c"].dtype, np.asarray(weights["c"]).item()) == (np.int8, -4)
    found = flax_msgpack.read(serialization.to_bytes({"a": [np.ones(2), (np.zeros(1),)]}))
    assert found.names == ("a.0", "a.1.0")


def test_saved_in_a_package(serialization: Any, tmp_path: pathlib.Path) -> None:
    weights = flax_msgpack.read(serialization.to_bytes({"a": {"b": np.arange(5)}, "n": 3}))
    obmlite.Model({"w": weights}).save(tmp_path / "m.obm")
    loaded = obmlite.load(tmp_path / "m.obm").weights["w"]
    assert np.asarray(loaded["a"]["b"]).tolist() == [0, 1, 2, 3, 4]
    assert loaded["n"].restore() == 3


def test_values_are_not_read(serialization: Any, tmp_path: pathlib.Path) -> None:
    """A file of 2 GiB, which is one hole."""
    shape = (1 << 19, 1 << 10)
    body = b"\x93" + msgpack.packb((shape, "float32"))[1:] + b"\xc6" + (1 << 31).to_bytes(4, "big")
    size = len(body) + (1 << 31)
    raw = b"\x81\xa1a\xc9" + size.to_bytes(4, "big") + b"\x01" + body
    path = tmp_path / "x.msgpack"
    with open(path, "wb") as file:
        file.write(raw)
        file.truncate(len(raw) + (1 << 31))
    assert flax_msgpack.read(path)["a"].shape == shape
    assert flax_msgpack.read(path, mmap=False)["a"][-1, -3:].tolist() == [0, 0, 0]


def test_flax_is_not_needed(serialization: Any, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.msgpack"
    path.write_bytes(serialization.to_bytes({"a": np.ones(3)}))
    code = (
        "import sys, obmlite; w = obmlite.open_weights('x.msgpack'); w['a'][:]\n"
        "print([m for m in sys.modules if m.split('.')[0] == 'flax'])"
    )
    root = str(pathlib.Path(__file__).parent.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r}); {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


# --- what is refused


def array(shape: Any, dtype: Any, data: bytes, code: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, data)))


def chunked(**parts: Any) -> dict[str, Any]:
    return {"a": {"__msgpack_chunked_array__": True, **parts}}


CHUNK = array((4,), "int8", b"1234")
NESTED: Any = 1
for _ in range(300):
    NESTED = {"a": NESTED}


@pytest.mark.parametrize(
    ("value", "error", "problem"),
    [
        ({"a": array((3,), "int8", b"1234")}, CorruptPackageError, "are not those of its shape"),
        ({"a": array((3,), "int16", b"12345")}, CorruptPackageError, "are not those of its shape"),
        ({"a": array((-3,), "int8", b"123")}, CorruptPackageError, "a shape of"),
        ({"a": array((1,) * 65, "int8", b"1")}, CorruptPackageError, "a shape of"),
        ({"a": array((1 << 40, 1 << 40, 0), "int8", b"")}, CorruptPackageError, "can be addressed"),
        ({"a": array(3, "int8", b"123")}, CorruptPackageError, "a shape of"),
        ({"a": array((3,), 8, b"123")}, CorruptPackageError, "the name of a dtype"),
        ({"a": array((3,), "int8", 3)}, CorruptPackageError, "an array's bytes"),
        ({"a": array((1,), "object", b"12345678")}, LeafError, "dtype that JAX does not have"),
        ({"a": array((1,), "datetime64[ns]", b"12345678")}, LeafError, "dtype that JAX does not have"),
        ({"a": array((1,), "float0", b"1")}, LeafError, "dtype that JAX does not have"),
        ({"a": msgpack.ExtType(1, b"\xc0")}, CorruptPackageError, "shape, dtype and bytes"),
        ({"a": msgpack.ExtType(1, b"")}, CorruptPackageError, "bytes or more"),
        ({"a": msgpack.ExtType(1, msgpack.packb(((3,), "int8", b"123")) + b"x")}, CorruptPackageError, "1 bytes more"),
        ({"a": msgpack.ExtType(2, msgpack.packb((1.0, 2.0, 3.0)))}, CorruptPackageError, "two numbers"),
        ({"a": msgpack.ExtType(4, b"x")}, CorruptPackageError, "extension types"),
        ({"a": msgpack.Timestamp(3)}, CorruptPackageError, "extension types"),
        ({"a": "text"}, LeafError, "neither an array nor a number"),
        ({"a": b"bytes"}, LeafError, "neither an array nor a number"),
        ({"a": b"\xff"}, CorruptPackageError, "UTF-8"),
        (chunked(), CorruptPackageError, "shape and chunks"),
        (chunked(shape={"0": 4}, chunks={}), CorruptPackageError, "shape and chunks"),
        (chunked(shape={"1": 4}, chunks={"0": CHUNK}), CorruptPackageError, "shape and chunks"),
        (chunked(shape={"0": 4}, chunks={"0": 3}), CorruptPackageError, "shape and chunks"),
        (chunked(shape={"0": 4}, chunks={"0": CHUNK}, more=1), CorruptPackageError, "shape and chunks"),
        (chunked(shape={"0": 5}, chunks={"0": CHUNK}), CorruptPackageError, "are not those of its shape"),
        (chunked(shape={"0": 4}, chunks={"0": array((2, 2), "int8", b"1234")}), CorruptPackageError, "flat chunks"),
        (
            chunked(shape={"0": 4}, chunks={"0": array((2,), "int8", b"12"), "1": array((2,), "uint8", b"34")}),
            CorruptPackageError,
            "flat chunks",
        ),
        (NESTED, CorruptPackageError, "at most 200 levels"),
        ({1.5: 3}, CorruptPackageError, "keys of text"),
    ],
)
def test_what_is_refused(value: Any, error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=problem):
        flax_msgpack.read(msgpack.packb(value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x82\xa1a\x01\xa1a\x02",
        b"\x81\xa1\xff\x01",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x01\x01",
    ],
)
def test_what_is_no_msgpack(data: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.msgpack").write_bytes(data)
    with pytest.raises(CorruptPackageError, match="no msgpack that Flax writes") as caught:
        obmlite.open_weights(tmp_path / "x.msgpack")
    assert caught.value.package == str(tmp_path / "x.msgpack")


def test_a_long_text_is_refused() -> None:
    with pytest.raises(CorruptPackageError, match="text of at most"):
        flax_msgpack.read(msgpack.packb({"a" * 70_000: 1}))


def test_no_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(PackageNotFoundError):
        flax_msgpack.read(tmp_path / "x.msgpack")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_changed_bytes_give_errors_of_ours(data: Any) -> None:
    """Any byte changed, any byte cut: other values, or an error that says what is wrong."""
    raw = bytearray(
        msgpack.packb({"a": array((2, 3), "int16", bytes(12)), **chunked(shape={"0": 4}, chunks={"0": CHUNK})})
    )
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([0, 0, 1, 5]))
    try:
        weights = flax_msgpack.read(bytes(raw[: len(raw) - cut]))
    except (CorruptPackageError, LeafError):
        return
    for leaf in weights.flat.values():
        np.asarray(leaf)
