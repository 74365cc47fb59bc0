"""``load(verify=…)``: which level finds a changed byte, and when.

A part runs as a program too, in a process that has eight devices.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import obmlite
from obmlite import ArgumentError, CorruptPackageError, MissingFileError, Model, Weights
from obmlite._placing import Placer
from obmlite.consolidate import consolidate
from obmlite.io.chunked import Chunks
from obmlite.io.digest import CHUNK
from obmlite.schema.decode import decode
from obmlite.schema.encode import encode
from tests import pieces
from tests.on_devices import on_devices
from tests.test_weights import file_of, offset_of

ROW = 5 << 20
TIED = np.arange(300, dtype=np.float32)
VALUES: dict[str, Any] = {
    "big": np.arange(3 * ROW, dtype=np.uint32).astype(np.uint8).reshape(3, ROW),  # a row and a half in its first chunk
    "w": np.arange(12, dtype=np.float32).reshape(4, 3),
    "odd": np.arange(7, dtype=np.uint16),
    "bf16": np.arange(640, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(64, 10),
    "int4": np.arange(33, dtype=np.int8).astype(ml_dtypes.int4),
    "bool": np.arange(100) % 3 == 0,
    "keys": jax.random.split(jax.random.key(1), 5),
    "tied": {"one": TIED, "two": TIED},
    "nothing": np.zeros((3,), jax.dtypes.float0),
    "empty": np.zeros((0, 4), np.float32),
}
LEAVES = ["big", "w", "odd", "bf16", "int4", "bool", "keys", "tied.one"]
"""One leaf of each tensor that has bytes."""


def apply(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["w"]) + params["odd"][:3]


X = np.ones((2, 4), np.float32)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("levels")
    extra = {"s": obmlite.Supplemental.from_bytes(b"supplemental" * 10_000)}
    small = {name: value for name, value in VALUES.items() if name not in ("nothing", "big")}
    Model(
        {
            "apply": obmlite.export(apply, small, obmlite.spec("f32[b,4]"), platforms=("cpu",)),
            "params": Weights(VALUES),
        },
        supplementals=extra,
    ).save(folder / "whole.obm", max_file_bytes=8 << 20)
    pieces.save({name: value for name, value in VALUES.items() if name != "nothing"}, folder / "pieces.obm")
    return folder


@pytest.fixture
def package(original: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(original / "whole.obm", tmp_path / "m.obm"))


def flip(file: pathlib.Path, at: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))


def harm(path: pathlib.Path, name: str, at: int = 3) -> None:
    """Changes a byte of a leaf."""
    weights = obmlite.load(path).weights["params"]
    flip(file_of(path, weights, name), offset_of(path, weights, name) + at)


def is_found(use: Callable[[], Any], path: pathlib.Path, leaf: str, chunk: int = 0) -> None:
    with pytest.raises(CorruptPackageError) as caught:
        use()
    error = caught.value
    assert (error.package, error.leaf, error.field) == (str(path), leaf, "chunk digest")
    assert f"chunk {chunk}: " in error.expected


def equal(found: Any, expected: Any) -> bool:
    if jax.dtypes.issubdtype(getattr(expected, "dtype", None), jax.dtypes.prng_key):
        found = jax.random.key_data(found) if isinstance(found, jax.Array) else found
        expected = jax.random.key_data(expected)
    return np.array_equal(np.asarray(found), np.asarray(expected))


def leaf_of(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree[part]
    return tree


# --- structure


def test_structure_is_the_default_and_does_not_look_at_tensors(package: pathlib.Path) -> None:
    harm(package, "w")
    for model in (obmlite.load(package), obmlite.load(package, verify="structure")):
        found = np.asarray(model.weights["params"]["w"])
        assert found[0, 0] != VALUES["w"][0, 0]
        assert np.array_equal(found[1:], VALUES["w"][1:])


def data_files(path: pathlib.Path) -> list[pathlib.Path]:
    own = [p for p in path.rglob("*") if p.is_file() and p.name != "manifest.obm" and not p.name.endswith(".json")]
    assert {p.parent.name for p in own} == {"functions", "weights", "supplementals"}
    assert len(own) >= 4
    return sorted(own)


@pytest.mark.parametrize("level", ["structure", "lazy", "all"])
def test_every_level_looks_at_the_length_of_every_file_at_load(package: pathlib.Path, level: str) -> None:
    for file in data_files(package):
        whole = file.read_bytes()
        name = str(file.relative_to(package))
        for changed in (whole[:-1], whole + b"\0", b""):
            file.write_bytes(changed)
            with pytest.raises(CorruptPackageError) as caught:
                obmlite.load(package, verify=level)
            assert caught.value.field == "length"
            assert caught.value.expected == f"{name}: {len(whole)} bytes"
            assert caught.value.found == f"{len(changed)} bytes"
            assert caught.value.package == str(package)
        file.unlink()
        with pytest.raises(MissingFileError) as missing:
            obmlite.load(package, verify=level)
        assert (missing.value.found, missing.value.package) == (name, str(package))
        file.write_bytes(whole)
    obmlite.load(package, verify=level)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux's /proc")
def test_structure_opens_no_file(package: pathlib.Path) -> None:
    model = obmlite.load(package)
    opened = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if n.isdigit() and _is_open(n)]
    assert not [name for name in opened if name.startswith(f"{package}/")]
    np.asarray(model.weights["params"]["w"])
    opened = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if n.isdigit() and _is_open(n)]
    assert len([name for name in opened if name.startswith(f"{package}/")]) >= 1


def _is_open(number: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")


@pytest.mark.parametrize("level", ["structure", "lazy"])
def test_headers_functions_and_supplementals_are_compared_when_they_are_used(package: pathlib.Path, level: str) -> None:
    weights = obmlite.load(package).weights["params"]
    flip(file_of(package, weights, "w"), 30)
    [function] = (package / "functions").iterdir()
    flip(function, function.stat().st_size // 2)
    [supplemental] = (package / "supplementals").iterdir()
    flip(supplemental, 7)
    model = obmlite.load(package, verify=level)  # nothing is wrong so far
    for use, facts in (
        (lambda: model.weights["params"]["w"][0], ("params", "w", "header digest")),
        (lambda: model.functions["apply"](VALUES, X), ("apply", None, "digest")),
        (lambda: model.supplementals["s"].open(), (None, None, "digest")),
    ):
        with pytest.raises(CorruptPackageError) as caught:
            use()
        error = caught.value
        assert (error.object, error.leaf, error.field) == facts
        assert error.package == str(package)


# --- lazy


WAYS: dict[str, Callable[[Weights, str], Any]] = {
    "numpy": lambda weights, name: np.asarray(weights.flat[name]),
    "slice": lambda weights, name: weights.flat[name][:2],
    "leaf": lambda weights, name: weights.flat[name].restore(),
    "one": lambda weights, name: leaf_of(weights.restore(select=name), name),
    "all": lambda weights, name: leaf_of(weights.restore(), name),
    "threads": lambda weights, name: leaf_of(weights.restore(threads=4, memory_budget=1 << 20), name),
}


@pytest.fixture(scope="module")
def harmed(original: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """For each leaf a package in which a byte of it is changed, the first of them."""
    found = {}
    for name in LEAVES:
        found[name] = tmp_path_factory.mktemp("harmed") / "m.obm"
        shutil.copytree(original / "whole.obm", found[name], copy_function=_link)
        harm_copy(found[name], name)
    return found


def _link(source: str, target: str) -> None:
    os.link(source, target)


def harm_copy(path: pathlib.Path, name: str) -> None:
    """Changes a byte in a file that is linked from elsewhere, here only."""
    weights = obmlite.load(path).weights["params"]
    file, at = file_of(path, weights, name), offset_of(path, weights, name)
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data)
    flip(file, at)


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LEAVES)
def test_lazy_compares_whatever_way_a_leaf_is_read(
    harmed: dict[str, pathlib.Path], name: str, way: str, mmap: bool
) -> None:
    weights = obmlite.load(harmed[name], verify="lazy", mmap=mmap).weights["params"]
    for _ in range(2):  # nor is it given out the second time
        is_found(lambda: WAYS[way](weights, name), harmed[name], name)
    if name.startswith("tied"):
        is_found(lambda: WAYS[way](weights, "tied.two"), harmed[name], name)
    others = [other for other in LEAVES if other != name]
    restored = weights.restore(select=others)  # what was not asked for does no harm, though it lies between
    for other in others:
        assert equal(leaf_of(restored, other), leaf_of(VALUES, other))
        assert equal(weights.flat[other], leaf_of(VALUES, other))
    assert weights["nothing"].restore().shape == (3,)
    assert weights["empty"].restore().shape == (0, 4)


@pytest.mark.parametrize("level", ["lazy", "all"])
@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
def test_a_good_package_is_restored_the_same(original: pathlib.Path, level: str, mmap: bool) -> None:
    for name, key in (("whole.obm", "params"), ("pieces.obm", "w")):
        weights = obmlite.load(original / name, verify=level, mmap=mmap).weights[key]
        restored = weights.restore()
        halved = weights.restore(dtype="bfloat16", threads=3)
        for leaf in LEAVES:
            expected = leaf_of(VALUES, leaf)
            assert equal(leaf_of(restored, leaf), expected)
            assert equal(weights.flat[leaf], expected)
            if leaf in ("w", "tied.one"):
                assert equal(leaf_of(halved, leaf), expected.astype(ml_dtypes.bfloat16))
        assert restored["tied"]["one"] is restored["tied"]["two"]


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
def test_only_the_chunks_that_are_read_are_compared(package: pathlib.Path, mmap: bool) -> None:
    harm(package, "big", CHUNK + 5)
    weights = obmlite.load(package, verify="lazy", mmap=mmap).weights["params"]
    assert np.array_equal(weights["big"][0], VALUES["big"][0])
    assert np.array_equal(weights["big"][0:1, :100], VALUES["big"][0:1, :100])
    assert np.array_equal(weights["big"][1, : CHUNK - ROW], VALUES["big"][1, : CHUNK - ROW])
    is_found(lambda: weights["big"][1, : CHUNK - ROW + 1], package, "big", 1)
    is_found(lambda: weights["big"][2], package, "big", 1)
    is_found(lambda: weights["big"][:, 0], package, "big", 1)  # rows are gathered one by one
    is_found(lambda: np.asarray(weights["big"]), package, "big", 1)
    is_found(lambda: weights["big"].restore(), package, "big", 1)
    assert np.array_equal(weights["big"][0], VALUES["big"][0])


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
def test_a_chunk_between_rows_is_not_compared(tmp_path: pathlib.Path, mmap: bool) -> None:
    row = 5 * CHUNK // 2
    Model({"params": Weights({"w": np.ones((2, row), np.uint8)})}).save(tmp_path / "m.obm")
    harm(tmp_path / "m.obm", "w", CHUNK + 1)
    weights = obmlite.load(tmp_path / "m.obm", verify="lazy", mmap=mmap).weights["params"]
    assert np.array_equal(weights["w"][:, :10], np.ones((2, 10), np.uint8))
    is_found(lambda: weights["w"][:, CHUNK - 5 : CHUNK + 1], tmp_path / "m.obm", "w", 1)


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
def test_pieces_are_compared_each_for_itself(original: pathlib.Path, tmp_path: pathlib.Path, mmap: bool) -> None:
    path = pathlib.Path(shutil.copytree(original / "pieces.obm", tmp_path / "m.obm"))
    # `big` is cut into (1 and 2) rows × 2 halves; a byte of the last piece, which holds [1:, half:]
    name = _last_piece(path, "big")
    weights = obmlite.load(path, verify="lazy", mmap=mmap).weights["w"]
    half = ROW // 2
    assert np.array_equal(weights["big"][0], VALUES["big"][0])
    assert np.array_equal(weights["big"][:, :half], VALUES["big"][:, :half])
    for use in (
        lambda: weights["big"][1:, half:],
        lambda: weights["big"][2],
        lambda: np.asarray(weights["big"]),
        lambda: weights.restore(),
        lambda: weights.restore(select="big", threads=4),
    ):
        is_found(use, path, name)
    assert equal(weights["w"].restore(), VALUES["w"])
    with pytest.raises(CorruptPackageError) as caught:
        obmlite.load(path, verify="all", mmap=mmap)
    assert caught.value.leaf == name
    assert caught.value.object == "w"


def _last_piece(path: pathlib.Path, name: str) -> str:
    """Changes a byte in the last piece of a tensor; the piece's name."""
    record = decode((path / "manifest.obm").read_bytes()).weights["w"]
    own = [pieces for pieces in record.pieces if pieces[0].name.startswith(f"{name}@")]
    piece = own[0][-1]
    with (path / piece.file).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        at = 8 + length + json.loads(file.read(length))[piece.name]["data_offsets"][0]
    flip(path / piece.file, at + 1)
    return piece.name


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
def test_what_uses_a_model_uses_what_was_compared(package: pathlib.Path, mmap: bool, tmp_path: pathlib.Path) -> None:
    harm(package, "odd")
    model = obmlite.load(package, verify="lazy", mmap=mmap)
    is_found(model.restore, package, "odd")
    with pytest.raises(CorruptPackageError) as caught:
        model.save(tmp_path / "copy.obm")
    assert (caught.value.leaf, caught.value.field) == ("odd", "chunk digest")
    assert not (tmp_path / "copy.obm" / "manifest.obm").exists()
    is_found(lambda: consolidate(package, tmp_path / "copy.obm"), package, "odd")
    harm(package, "odd")
    for again in (obmlite.load(package, verify="lazy", mmap=mmap), model):
        again.save(tmp_path / "copy.obm", overwrite=True)
        assert equal(obmlite.load(tmp_path / "copy.obm", verify="all").weights["params"]["odd"], VALUES["odd"])


def test_captures_are_compared(tmp_path: pathlib.Path) -> None:
    held = np.arange(5000, dtype=np.float32)
    Model.from_function(lambda x: x + jnp.asarray(held), obmlite.spec("f32[5000]"), weights=None).save(tmp_path / "m")
    [file] = (tmp_path / "m" / "weights").glob("*.safetensors")
    flip(file, file.stat().st_size - 5)
    x = np.zeros(5000, np.float32)
    assert obmlite.load(tmp_path / "m")(x).shape == (5000,)
    with pytest.raises(CorruptPackageError) as caught:
        obmlite.load(tmp_path / "m", verify="lazy")(x)
    assert caught.value.field == "chunk digest"


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
def test_what_is_sent_to_an_accelerator_is_compared(
    package: pathlib.Path, mmap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers are then handed over as they are mapped, and their pages dropped behind them."""
    monkeypatch.setattr(Placer, "on_cpu", False)
    weights = obmlite.load(package, verify="lazy", mmap=mmap).weights["params"]
    restored = weights.restore(memory_budget=1 << 20)
    assert all(equal(leaf_of(restored, name), leaf_of(VALUES, name)) for name in LEAVES)
    for name, at, chunk in (("big", CHUNK + 5, 1), ("w", 3, 0), ("int4", 3, 0), ("keys", 3, 0)):
        harm(package, name, at)
        weights = obmlite.load(package, verify="lazy", mmap=mmap).weights["params"]
        is_found(weights.restore, package, name, chunk)
        is_found(weights.flat[name].restore, package, name, chunk)
        harm(package, name, at)


# --- how much is hashed


def test_a_mapped_chunk_is_hashed_once(original: pathlib.Path, hashed: list[int]) -> None:
    weights = obmlite.load(original / "whole.obm", verify="lazy", mmap=True).weights["params"]
    assert hashed == []
    weights["big"][0, :10]
    assert hashed == [CHUNK]
    weights["big"][1, :10]
    np.asarray(weights["w"])
    assert hashed == [CHUNK, VALUES["w"].nbytes]
    barrier = threading.Barrier(6)

    def work() -> None:
        barrier.wait()
        weights.restore()
        for leaf in weights.flat.values():
            np.asarray(leaf)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(hashed) == weights.nbytes
    assert weights["big"].restore() is not None
    assert sum(hashed) == weights.nbytes


def test_a_restore_that_reads_hashes_each_chunk_once(original: pathlib.Path, hashed: list[int]) -> None:
    """Its parts begin and end elsewhere than chunks."""
    for name, key in (("whole.obm", "params"), ("pieces.obm", "w")):
        weights = obmlite.load(original / name, verify="lazy", mmap=False).weights[key]
        for options in ({}, {"threads": 2, "memory_budget": 1 << 20}, {"dtype": "bfloat16"}):
            hashed.clear()
            weights.restore(**options)
            assert sum(hashed) == weights.nbytes, (name, options)


def test_all_compares_once(original: pathlib.Path, hashed: list[int]) -> None:
    weights = obmlite.load(original / "whole.obm", verify="all", mmap=True).weights["params"]
    assert sum(hashed) == weights.nbytes
    weights.restore()
    np.asarray(weights["big"])
    assert sum(hashed) == weights.nbytes


# --- all


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
@pytest.mark.parametrize("name", LEAVES)
def test_all_finds_every_tensor_at_load(harmed: dict[str, pathlib.Path], name: str, mmap: bool) -> None:
    with pytest.raises(CorruptPackageError) as caught:
        obmlite.load(harmed[name], verify="all", mmap=mmap)
    error = caught.value
    assert (error.package, error.object, error.leaf) == (str(harmed[name]), "params", name)
    assert error.field == "chunk digest"
    assert "weights/params-" in error.expected
    assert ", chunk 0: " in error.expected


def test_all_finds_every_byte_at_load(package: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    before = threading.active_count()
    for file in [package / "manifest.obm", *data_files(package)]:
        size = file.stat().st_size
        for at in {0, size - 1, *rng.integers(0, size, 6).tolist()}:
            flip(file, at)
            with pytest.raises(CorruptPackageError) as caught:
                obmlite.load(package, verify="all")
            assert caught.value.package == str(package)
            assert caught.value.field
            flip(file, at)
    assert threading.active_count() == before
    assert equal(obmlite.load(package, verify="all").weights["params"]["w"], VALUES["w"])


def test_all_of_a_numbered_version(original: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for number in (1, 2):
        shutil.copytree(original / "whole.obm", tmp_path / "m" / str(number))
    harm(tmp_path / "m" / "2", "odd")
    obmlite.load(tmp_path / "m")
    lazy = obmlite.load(tmp_path / "m", verify="lazy").weights["params"]
    is_found(lambda: lazy["odd"][:1], tmp_path / "m" / "2", "odd")
    is_found(lambda: obmlite.load(tmp_path / "m", verify="all"), tmp_path / "m" / "2", "odd")
    assert equal(obmlite.load(tmp_path / "m", version=1, verify="all").weights["params"]["odd"], VALUES["odd"])


def test_all_says_what_it_cannot_compare(package: pathlib.Path) -> None:
    file = package / "manifest.obm"
    manifest = decode(file.read_bytes())
    newer = dataclasses.replace(manifest.functions["apply"], required=("later",))
    file.write_bytes(encode(dataclasses.replace(manifest, functions={"apply": newer})))
    for level in ("structure", "lazy"):
        obmlite.load(package, verify=level)
    with pytest.raises(obmlite.UnsupportedFormatError) as caught:
        obmlite.load(package, verify="all")
    assert caught.value.object == "apply"


@pytest.mark.parametrize("level", ["", "full", "ALL", None, True, 3])
def test_there_are_three_levels(package: pathlib.Path, level: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        obmlite.load(package, verify=level)
    assert caught.value.field == "verify"
    assert caught.value.expected == "structure, lazy, all"
    assert caught.value.found == repr(level)


# --- several devices


def test_on_eight_devices() -> None:
    assert on_devices(__file__, timeout=300).split() == ["good", "harmed"]


def check_on_devices(folder: pathlib.Path) -> None:
    draw = np.random.default_rng(0)
    values = {
        "large": draw.integers(0, 255, (16, 3 << 20)).astype(np.uint8),  # two and two thirds rows in a chunk
        "rows": draw.normal(size=(64, 16)).astype(np.float32),
        "int4": draw.integers(0, 7, (16, 32)).astype(ml_dtypes.int4),
        "keys": jax.random.split(jax.random.key(0), 16),
        "odd": draw.normal(size=(5, 3)).astype(np.float32),
    }
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))

    def leading(name: str, _: Any) -> Any:
        return NamedSharding(mesh, P() if name == "odd" else P(("x", "y")))

    def last(name: str, spec: Any) -> Any:
        return NamedSharding(mesh, P() if name == "odd" else P(*[None] * (spec.ndim - 1), ("x", "y")))

    wholes: dict[str, Any] = {"leading": leading, "last": last, "replicated": NamedSharding(mesh, P())}
    Model({"params": Weights(values)}).save(folder / "whole")
    pieces.save(values, folder / "pieces")
    hashed: list[int] = []
    real = Chunks._compare

    def spy(self: Chunks, chunk: Any, found: bytes) -> None:
        hashed.append(chunk.end - chunk.start)
        real(self, chunk, found)

    Chunks._compare = spy  # type: ignore[method-assign]
    for package, key in (("whole", "params"), ("pieces", "w")):
        for mmap in (True, False):
            for name, shardings in wholes.items():
                for broadcast in (False, True):
                    weights = obmlite.load(folder / package, verify="lazy", mmap=mmap).weights[key]
                    hashed.clear()
                    restored = weights.restore(shardings=shardings, broadcast=broadcast)
                    wrong = [leaf for leaf, value in values.items() if not equal(restored[leaf], value)]
                    assert not wrong, (package, mmap, name, wrong)
                    assert sum(hashed) == weights.nbytes, (package, mmap, name, sum(hashed), weights.nbytes)
    print("good")

    for leaf, at, chunk in (
        ("large", 5 * CHUNK + 9, 5),
        ("rows", 500, 0),
        ("int4", 40, 0),
        ("keys", 9, 0),
        ("odd", 8, 0),
    ):
        copy = folder / leaf
        shutil.copytree(folder / "whole", copy)
        harm(copy, leaf, at)
        for mmap in (True, False):
            weights = obmlite.load(copy, verify="lazy", mmap=mmap).weights["params"]
            for shardings in wholes.values():
                for broadcast in (False, True):
                    is_found(lambda: weights.restore(shardings=shardings, broadcast=broadcast), copy, leaf, chunk)  # noqa: B023
            others = [name for name in values if name != leaf]
            restored = weights.restore(shardings=wholes["leading"], select=others)
            assert all(equal(restored[name], values[name]) for name in others)
    print("harmed")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        check_on_devices(pathlib.Path(directory))
    sys.stdout.flush()
