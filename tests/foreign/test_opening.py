"""What another library saved, opened: names, dtypes, metadata, and all that weights can do."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

import obmlite
from obmlite import (
    ArgumentError,
    CorruptPackageError,
    MissingFileError,
    PackageNotFoundError,
    RestoreError,
    UnsafePathError,
    dtypes,
)
from obmlite.foreign import Part
from obmlite.io import safetensors
from tests import llama


def saved(path: pathlib.Path, metadata: dict[str, str] | None = None, **values: Any) -> pathlib.Path:
    arrays = {name.replace("__", "."): np.asarray(value) for name, value in values.items()}
    save_file(arrays, path, metadata)
    return path


def expect(expected: Any, found: Any) -> None:
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("mmap", [True, False])
def test_a_llama(tmp_path: pathlib.Path, mmap: bool) -> None:
    found = llama.tensors(3, 64, 96)
    llama.save(tmp_path / "hub", found)
    expected = llama.converted(found, 3)
    for path in (tmp_path / "hub", tmp_path / "hub" / "model.safetensors.index.json"):
        weights = obmlite.open_weights(path, names=llama.NAMES, transform=llama.TRANSFORM, mmap=mmap)
        expect(expected, weights.restore())
    assert dict(weights.metadata) == {"format": "pt"}
    query = weights["layers"]["attention"]["q"]["kernel"]
    assert query.shape == (3, 64, 64)
    np.testing.assert_array_equal(query[1:, 5:9, -3:], expected["layers"]["attention"]["q"]["kernel"][1:, 5:9, -3:])
    cast = weights.restore(select="layers.mlp.*", dtype="float32")
    expect(jax.tree.map(lambda x: x.astype(np.float32), {"mlp": expected["layers"]["mlp"]}), cast["layers"])


def test_all_that_weights_do(tmp_path: pathlib.Path) -> None:
    """Saved in a package, by it restored into a template and onto a mesh."""
    found = llama.tensors(2, 32, 64)
    llama.save(tmp_path / "hub", found)
    expected = llama.converted(found, 2)
    weights = obmlite.open_weights(tmp_path / "hub", names=llama.NAMES, transform=llama.TRANSFORM)
    obmlite.Model({"llama": weights}).save(tmp_path / "llama.obm")
    loaded = obmlite.load(tmp_path / "llama.obm").weights["llama"]
    expect(expected, loaded.restore())
    assert dict(loaded.metadata) == {"format": "pt"}
    assert weights.nbytes == loaded.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(expected))
    place = NamedSharding(Mesh(np.array(jax.devices()[:1]), "x"), PartitionSpec())
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=place), expected)
    restored = weights.restore(like=template)
    expect(jax.tree.map(lambda x: x.astype(np.float32), expected), restored)
    assert restored["head"]["kernel"].sharding == place


def test_names_by_default(tmp_path: pathlib.Path) -> None:
    path = saved(tmp_path / "x.safetensors", {"who": "me"}, a__0__w=np.ones(2, np.int8), a__b=np.zeros((2, 3)), c=3.5)
    weights = obmlite.open_weights(path)
    assert weights.names == ("a.0.w", "a.b", "c")
    assert weights.metadata == {"who": "me"}
    assert float(np.asarray(weights["c"])) == 3.5
    assert np.asarray(weights["a"]["b"]).shape == (2, 3)


def test_names_by_a_function(tmp_path: pathlib.Path) -> None:
    values = {f"e{n}": np.full((2, 3), n, np.int16) for n in range(6)}
    path = saved(tmp_path / "x.safetensors", **values, other=np.zeros(1, np.int8), skipped=np.zeros(1, np.int8))

    def names(name: str) -> Any:
        if name.startswith("e"):
            return Part(("experts", "w"), divmod(int(name[1:]), 2))
        return None if name == "skipped" else ("list", 0)

    weights = obmlite.open_weights(path, names=names, transform={"e*": "transpose"})
    stack = np.stack(list(values.values())).reshape(3, 2, 2, 3).transpose(0, 1, 3, 2)
    expect({"experts": {"w": stack}, "list": {0: np.zeros(1, np.int8)}}, weights.restore())
    single = obmlite.open_weights(path, names=lambda name: () if name == "e4" else None)
    np.testing.assert_array_equal(np.asarray(single.leaf(0)), values["e4"])
    row = obmlite.open_weights(path, names=lambda name: Part("row", int(name[1:])) if name[0] == "e" else None)
    assert row["row"].shape == (6, 2, 3)


def test_names_by_a_table(tmp_path: pathlib.Path) -> None:
    values = {f"h.{n}.x{m}.{w}": np.full(2, n + 10 * m, np.int8) for n in range(2) for m in range(3) for w in "ab"}
    save_file(values, tmp_path / "x.safetensors")
    weights = obmlite.open_weights(
        tmp_path / "x.safetensors",
        names={"h.{layer}.x2.b": ("odd", "{layer}"), "h.{layer}.{x}.{w}": "{w}.{x}", "*": None},
    )
    assert weights.names == ("a.x0", "a.x1", "a.x2", "b.x0", "b.x1", "odd.0", "odd.1")
    np.testing.assert_array_equal(np.asarray(weights["b"]["x1"]), [[10, 10], [11, 11]])
    left_out = obmlite.open_weights(tmp_path / "x.safetensors", names={"*.b": None, "h.{n}.x{m}.{w}": "{w}"})
    assert (left_out.names, left_out["a"].shape) == (("a",), (2, 3, 2))


def test_transforms(tmp_path: pathlib.Path) -> None:
    fused = np.arange(3 * 4 * 5, dtype=np.int32).reshape(12, 5)
    path = saved(tmp_path / "x.safetensors", qkv=fused, bias=np.arange(6.0).astype(np.float32), mask=np.ones(3))

    def transform(name: str, x: Any) -> Any:
        if name == "qkv":
            return {key: part.reshape(2, 2, 5).transpose(2, 0, 1) for key, part in zip("qkv", x.split(3), strict=True)}
        return None if name == "mask" else x[2:]

    weights = obmlite.open_weights(path, transform=transform)
    q, k, v = (part.reshape(2, 2, 5).transpose(2, 0, 1) for part in np.split(fused, 3))
    expect({"bias": np.arange(2, 6).astype(np.float32), "qkv": {"q": q, "k": k, "v": v}}, weights.restore())
    table = {"qkv": lambda name, x: {name: x[:1].reshape(5)}, "mask": lambda name, x: None, "*": "transpose"}
    assert obmlite.open_weights(path, transform=table).names == ("bias", "qkv.qkv")


def test_every_dtype(tmp_path: pathlib.Path) -> None:
    """Each code of the format that has one meaning, as bits; those of six bits have none."""
    shapes = {"F4": (6,), "F6_E2M3": (8,), "F6_E3M2": (8,)}
    entries = safetensors.layout([(code, code, shapes.get(code, (4,))) for code in safetensors.BITS])

    def content(entry: safetensors.Entry) -> bytes:
        return b"\0\1\1\0" if entry.dtype == "BOOL" else bytes(range(entry.end - entry.start))

    data = b"".join(map(content, entries))
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.encode_header(entries, {}) + data)
    with pytest.raises(RestoreError, match="how its elements are packed") as caught:
        obmlite.open_weights(path)
    assert caught.value.found == "F6_E2M3 (F6_E2M3), F6_E3M2 (F6_E3M2)"
    weights = obmlite.open_weights(path, names={"F6*": None, "{code}": "{code}"})
    assert set(weights) == {code for code in safetensors.BITS if not code.startswith("F6")}
    for entry in entries:
        if entry.dtype in weights:
            leaf = np.asarray(weights[entry.dtype])
            assert dtypes.of(leaf).to_storage(leaf).tobytes() == content(entry), entry
    assert weights["BF16"].dtype == ml_dtypes.bfloat16
    assert weights["F4"].dtype == ml_dtypes.float4_e2m1fn
    np.testing.assert_array_equal(np.asarray(weights["F4"]).view(np.uint8), [0, 0, 1, 0, 2, 0])


@pytest.mark.parametrize("transform", [None, {"*": "transpose"}])
def test_truth_values_are_looked_at(tmp_path: pathlib.Path, transform: Any) -> None:
    path = tmp_path / "x.safetensors"
    header = safetensors.encode_header([safetensors.Entry("mask", "BOOL", (2, 2), 0, 4)], {})
    path.write_bytes(header + b"\0\1\1\0")
    assert obmlite.open_weights(path, transform=transform).restore()["mask"].tolist() == [[False, True], [True, False]]
    path.write_bytes(header + b"\0\1\1\2")
    weights = obmlite.open_weights(path, transform=transform)
    for use in (weights.restore, lambda: np.asarray(weights["mask"])):
        with pytest.raises(CorruptPackageError, match="neither 0 nor 1") as caught:
            use()
        assert caught.value.leaf == "mask"


def test_links_are_followed(tmp_path: pathlib.Path) -> None:
    """As in the cache of the Hugging Face hub: a snapshot is links to blobs elsewhere."""
    llama.save(tmp_path / "blobs", llama.tensors(1, 32, 32))
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{file.name}")
    weights = obmlite.open_weights(tmp_path / "snapshot")
    assert len(weights.specs) == 13
    (tmp_path / "one.safetensors").symlink_to(tmp_path / "blobs" / "model-00001-of-00002.safetensors")
    assert obmlite.open_weights(tmp_path / "one.safetensors").restore()


# --- what is refused


X = {"a.0": np.zeros(2, np.int8), "a.1": np.zeros(2, np.int8), "b.1": np.zeros(3, np.int8), "b.x": np.zeros(3, np.int8)}


@pytest.mark.parametrize(
    ("names", "problem", "facts"),
    [
        ({"a.{n}": "a"}, "No pattern matches", "'b.1', 'b.x'"),
        ({"b.{n}": "b", "*": None}, "which is no number", "x"),
        ({"b.1": Part("b", 3), "*": None}, "malformed", "Part"),
        ({"a.{n}": "{m}"}, "pattern of names is malformed", "{m}"),
        ({"{n}.{n}": "{n}"}, "pattern of names is malformed", "{n}"),
        ({"{n m}": "a"}, "pattern of names is malformed", "{n m}"),
        (lambda name: Part("a", int(name == "b.x") + 1), "Two tensors are to be one leaf", "'a.0' and 'a.1'"),
        (lambda name: Part(name[0], int(name[2] != "1") * 2) if name[0] == "a" else None, "are missing", "none at 1"),
        (lambda name: Part("x", list(X).index(name)), "differ in shape or dtype", "i8[2]: 'a.0', 'a.1'; i8[3]: "),
        (lambda name: Part("x", (0,) * (1 + list(X).index(name))), "different numbers of dimensions", "'a.0'"),
        (lambda name: "x" if name == "a.0" else f"x.{name[0]}{name[2]}", "beginning of another", "'a.0' and 'a.1'"),
        (lambda name: 3, "new name is malformed", "3"),
        (lambda name: Part("x", -1), "new name is malformed", "-1"),
        (lambda name: Part("x", True), "new name is malformed", "True"),
    ],
)
def test_names_that_are_refused(tmp_path: pathlib.Path, names: Any, problem: str, facts: str) -> None:
    save_file(X, tmp_path / "x.safetensors")
    with pytest.raises(ArgumentError, match=problem) as caught:
        obmlite.open_weights(tmp_path / "x.safetensors", names=names)
    assert facts in str(caught.value)
    assert caught.value.package == str(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("transform", "problem"),
    [
        (lambda name, x: 3, "something else than a view"),
        (lambda name, x: {"a": np.zeros(3)}, "something else than a view"),
        ({"*": "turn"}, "table of transforms"),
        (lambda name, x: x.reshape(7), "does not have this shape"),
    ],
)
def test_transforms_that_are_refused(tmp_path: pathlib.Path, transform: Any, problem: str) -> None:
    save_file(X, tmp_path / "x.safetensors")
    with pytest.raises(ArgumentError, match=problem):
        obmlite.open_weights(tmp_path / "x.safetensors", transform=transform)


def test_a_name_that_is_also_a_prefix(tmp_path: pathlib.Path) -> None:
    save_file({"a": np.zeros(1), "a.b": np.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ArgumentError, match="beginning of another") as caught:
        obmlite.open_weights(tmp_path / "x.safetensors")
    assert "names=" in str(caught.value.fix)


def index(folder: pathlib.Path, weight_map: Any, **more: Any) -> pathlib.Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map, **more}))
    return path


@pytest.fixture
def two(tmp_path: pathlib.Path) -> pathlib.Path:
    """A directory with the files one and two, which have the tensors a and b."""
    for file, name in (("one", "a"), ("two", "b")):
        save_file({name: np.zeros(2, np.int8)}, tmp_path / f"{file}.safetensors")
    return tmp_path


ONE, TWO = "one.safetensors", "two.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "error", "problem", "facts"),
    [
        ({"a": ONE, "b": f"../{TWO}"}, UnsafePathError, "component", f"../{TWO}"),
        ({"a": ONE, "b": f"/tmp/{TWO}"}, UnsafePathError, "absolute", TWO),
        ({"a": ONE, "b": f"below/{TWO}"}, UnsafePathError, "another directory", f"below/{TWO}"),
        ({"a": ONE, "b": ""}, UnsafePathError, "empty", ""),
        ({"a": ONE, "b": f"x\\{TWO}"}, UnsafePathError, "backslash", TWO),
        ({"a": ONE, "b": "three.safetensors"}, MissingFileError, "missing", "three"),
        ({"a": TWO, "b": TWO}, CorruptPackageError, "does not have the tensor", "in no file"),
        ({"a": ONE, "b": ONE, "c": TWO}, CorruptPackageError, "does not have the tensor", f"in {TWO}"),
        ({"a": ONE, "c": TWO}, CorruptPackageError, "does not have the tensor", f"in {TWO}"),
        ({"a": 3}, CorruptPackageError, "index is malformed", "another weight_map"),
        ([], CorruptPackageError, "index is malformed", "another weight_map"),
        (None, CorruptPackageError, "index is malformed", "no weight_map"),
    ],
)
def test_indices_that_are_refused(
    two: pathlib.Path, weight_map: Any, error: type[Exception], problem: str, facts: str
) -> None:
    path = index(two, weight_map)
    for given in (path, two):
        with pytest.raises(error, match=problem) as caught:
            obmlite.open_weights(given)
        assert facts in str(caught.value)


def test_a_tensor_that_the_index_lacks(two: pathlib.Path) -> None:
    save_file({"b": np.zeros(2, np.int8), "c": np.zeros(2, np.int8)}, two / TWO)
    path = index(two, {"a": ONE, "b": TWO})
    with pytest.raises(CorruptPackageError, match="does not name") as caught:
        obmlite.open_weights(path)
    assert (caught.value.leaf, caught.value.found) == ("c", TWO)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tensor_in_two_files(two: pathlib.Path, indexed: bool) -> None:
    save_file({"a": np.zeros(2, np.int8), "b": np.zeros(2, np.int8)}, two / TWO)
    if indexed:
        index(two, {"a": ONE, "b": TWO})
    with pytest.raises(CorruptPackageError, match="in two files") as caught:
        obmlite.open_weights(two)
    assert (caught.value.leaf, caught.value.found) == ("a", f"{ONE} and {TWO}")


@pytest.mark.parametrize(
    "text", ["", "[", "[]", '{"weight_map": {}, "weight_map": {}}', '{"weight_map": {"a": "x", "a": "y"}}']
)
def test_an_index_that_is_malformed(two: pathlib.Path, text: str) -> None:
    (two / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptPackageError, match="index is malformed"):
        obmlite.open_weights(two)


def test_files_beside_an_index_are_no_part_of_it(two: pathlib.Path) -> None:
    index(two, {"a": ONE})
    (two / "consolidated.safetensors").write_bytes(b"something else")
    assert obmlite.open_weights(two).names == ("a",)


def test_a_directory_without_an_index(two: pathlib.Path) -> None:
    assert obmlite.open_weights(two).names == ("a", "b")
    (two / TWO).write_bytes(b"12345678")
    with pytest.raises(CorruptPackageError) as caught:
        obmlite.open_weights(two)
    assert (caught.value.package, caught.value.object) == (str(two), TWO)


def test_places_where_there_is_nothing(tmp_path: pathlib.Path) -> None:
    for name in ("x.safetensors", "x.safetensors.index.json", "x.msgpack", "x"):
        with pytest.raises(PackageNotFoundError, match="nothing at the path"):
            obmlite.open_weights(tmp_path / name)
    with pytest.raises(PackageNotFoundError, match="no safetensors files"):
        obmlite.open_weights(tmp_path)
    obmlite.Model({"w": obmlite.Weights({"a": np.zeros(2)})}).save(tmp_path / "m.obm")
    with pytest.raises(PackageNotFoundError, match="no safetensors files") as caught:
        obmlite.open_weights(tmp_path / "m.obm")
    assert "obmlite.load" in str(caught.value)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(ArgumentError, match="several indices"):
        obmlite.open_weights(tmp_path)


def test_a_name_without_a_directory(two: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(two)
    assert obmlite.open_weights(ONE).names == ("a",)
