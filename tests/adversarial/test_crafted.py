"""Every crafted safetensors file, wherever one is read: the refusal is of its class and names its field."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest

from obmlite import dtypes, examples, foreign, loading
from obmlite import tree as trees
from obmlite.errors import CorruptPackageError
from obmlite.io import digest
from obmlite.schema import records as r
from obmlite.specs import TensorSpec
from tests.adversarial import peers
from tests.adversarial.crafted import FORBIDDEN, ODD
from tests.adversarial.memory import MemoryStore

PATH = "weights/w.safetensors"


def package_of(file: bytes) -> tuple[MemoryStore, r.ManifestRecord]:
    """A package whose manifest has the digests of a file, and says that it holds the tensor ``a``, f32[4]."""
    header = file[: 8 + min(int.from_bytes(file[:8], "little"), len(file))]
    record = r.FileRecord(PATH, len(file), r.FileKind.WEIGHTS, digest.sha256(header))
    spec = TensorSpec((4,), dtypes.parse("f32"))
    piece = r.Piece(PATH, "a", (0,), (4,), digest.sha256(file[-16:]))
    weights = r.WeightsRecord(
        name="w",
        tree=trees.flatten({"a": 0})[1],
        specs=(spec,),
        leaf_tensor=np.array([0]),
        tensor_leaf=np.array([0]),
        pieces=((piece,),),
    )
    return MemoryStore({PATH: file}), r.ManifestRecord(producer="", files={PATH: record}, weights={"w": weights})


@pytest.mark.parametrize("verify", ["structure", "lazy"])
def test_in_a_package_whose_digests_were_made_again(verify: str) -> None:
    for name, (file, field, leaf) in FORBIDDEN.items():
        model = loading.open_model(*package_of(file), verify=verify)
        with pytest.raises(CorruptPackageError) as caught:
            np.asarray(model.weights["w"]["a"])
        assert type(caught.value) is CorruptPackageError, name
        assert caught.value.field == field, name
        assert leaf is None or caught.value.leaf == leaf, name
        assert caught.value.object == "w", name


def test_what_is_in_order_and_other_than_the_manifest_says() -> None:
    seen = set()
    for name, file in ODD.items():
        model = loading.open_model(*package_of(file))
        try:
            assert np.asarray(model.weights["w"]["a"]).tobytes() == bytes(range(16)), name
            seen.add("read")
        except CorruptPackageError as error:
            assert error.field in ("name", "dtype", "shape"), name
            seen.add(error.field)
    assert seen == {"read", "name", "dtype", "shape"}


def test_as_anothers_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.safetensors"
    for name, (file, field, leaf) in FORBIDDEN.items():
        path.write_bytes(file)
        with pytest.raises(CorruptPackageError) as caught:
            foreign.open_weights(path)
        assert type(caught.value) is CorruptPackageError, name
        assert (caught.value.field, caught.value.leaf) == (field, leaf), name


def test_as_example_inputs() -> None:
    for name, (file, field, leaf) in FORBIDDEN.items():
        with pytest.raises(CorruptPackageError) as caught:
            examples.unpack(file)
        assert type(caught.value) is CorruptPackageError, name
        assert (caught.value.field, caught.value.leaf) == (field, leaf), name


def test_shorter_than_the_manifest_says() -> None:
    good = ODD["plain"]
    store, manifest = package_of(good)
    for size in (0, 7, 8, 20, len(good) - 1, len(good) + 1):
        changed = MemoryStore({PATH: (good + b"\0")[:size]})
        with pytest.raises(CorruptPackageError) as caught:
            np.asarray(loading.open_model(changed, manifest).weights["w"]["a"])
        assert caught.value.field == "length"
    longer = dataclasses.replace(manifest.files[PATH], length=len(good) + 1)
    with pytest.raises(CorruptPackageError) as caught:
        np.asarray(loading.open_model(store, dataclasses.replace(manifest, files={PATH: longer})).weights["w"]["a"])
    assert caught.value.field == "length"


def test_the_readers_are_compared_by_what_they_do() -> None:
    some = [FORBIDDEN[name][0] for name in ("data: one byte more", "offsets: overlap", "shape: 60 of 4", "BOM")]
    assert {peers.outcome("obmlite", file) for file in some} == {"refused"}
    assert {peers.outcome("safetensors", file) for file in some} == {"refused"}
    assert {peers.outcome("safetensors", FORBIDDEN[name][0]) for name in ("tensor twice", "unknown key")} == {
        "forbidden"
    }
    assert {peers.outcome(reader, ODD["plain"]) for reader in ("obmlite", "safetensors")} == {"right"}
