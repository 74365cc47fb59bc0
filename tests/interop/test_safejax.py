"""safejax's interface: its results on its documented uses, and what it lost."""

from __future__ import annotations

import collections
import inspect
import json
import pathlib
import sys
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import obmlite
from obmlite import dtypes
from obmlite.interop import safejax
from obmlite.interop.safejax import deserialize, serialize
from obmlite.io import safetensors as headers

PARAMS = {
    "params": {
        "Dense_0": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.ones(4, jnp.bfloat16)},
        "Dense_1": {"kernel": np.arange(8, dtype=np.int32).reshape(4, 2)},
    },
    "batch_stats": {"norm": {"mean": jnp.zeros(4)}},
}
NAMES = {"params.Dense_0.kernel", "params.Dense_0.bias", "params.Dense_1.kernel", "batch_stats.norm.mean"}


class Point(NamedTuple):
    x: Any
    y: Any


obmlite.register_node(Point, "tests.interop.Point")


def header_of(data: bytes) -> headers.Header:
    return headers.parse_header(data[: headers.header_size(data[:8], len(data))], len(data))


def same(found: Any, wanted: Any) -> None:
    """Equal containers, classes, dtypes and bits; arrays are JAX's, Python's numbers Python's."""
    assert type(found) is type(wanted) or isinstance(wanted, (np.ndarray, jax.Array))
    if isinstance(wanted, dict):
        assert list(found) == sorted(wanted) if type(wanted) is dict else list(found) == list(wanted)
        for key in wanted:
            same(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            same(a, b)
    elif isinstance(wanted, (np.ndarray, jax.Array)):
        assert isinstance(found, jax.Array)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()
    else:
        assert found == wanted or found != found


# --- the interface, and its documented uses


@pytest.mark.parametrize("module", ["flax", "haiku", "objax", None])
def test_parameters_are_safejaxs(module: str | None) -> None:
    """Names, order and defaults as in safejax 0.5.0, where ``.flax`` and ``.objax`` set other defaults."""
    place = safejax if module is None else __import__(f"obmlite.interop.safejax.{module}", fromlist=["serialize"])
    write = {
        "params": ...,
        "metadata": None,
        "include_objax_variables": module == "objax",
        "filename": None,
        "fs": None,
    }
    read = {
        "path_or_buf": ...,
        "fs": None,
        "freeze_dict": module == "flax",
        "requires_unflattening": module != "objax",
        "to_var_collection": module == "objax",
    }
    for function, wanted in ((place.serialize, write), (place.deserialize, read)):
        found = inspect.signature(function).parameters.values()
        assert {p.name: ... if p.default is p.empty else p.default for p in found} == wanted
        assert list(wanted) == [p.name for p in found]


def test_bytes() -> None:
    data = serialize(PARAMS)
    assert type(data) is bytes
    assert header_of(data).entries.keys() == NAMES
    assert header_of(data).metadata == {}  # nothing that safejax would not have written
    same(deserialize(data), PARAMS)


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_file(kind: Any, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "params.safetensors"
    assert serialize(PARAMS, filename=kind(path)) == path
    assert path.read_bytes() == serialize(PARAMS)
    same(deserialize(kind(path)), PARAMS)
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == NAMES


def test_files_that_safejax_wrote(tmp_path: pathlib.Path) -> None:
    """safejax installs nowhere today, so its layout is made by hand: keys joined by dots, and nothing else."""
    arrays = {"a.w": np.ones(2, np.float32), "a.b.c": np.zeros((), np.int32), "res/~/conv.w": np.ones(3, np.float16)}
    wanted = {"a": {"w": arrays["a.w"], "b": {"c": arrays["a.b.c"]}}, "res/~/conv": {"w": arrays["res/~/conv.w"]}}
    data = safetensors.numpy.save(arrays)
    same(deserialize(data), wanted)
    same(deserialize(data, requires_unflattening=False), arrays)
    path = tmp_path / "old.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"epoch": "3"})
    params, metadata = deserialize(path)
    same(params, wanted)
    assert metadata == {"epoch": "3"}


def test_typed_names_of_safejax_lose_their_types_with_a_warning() -> None:
    data = safetensors.numpy.save({"(Linear).b::TrainVar": np.ones(2, np.float32)})
    with pytest.warns(UserWarning, match="types") as caught:
        same(deserialize(data), {"(Linear)": {"b": np.ones(2, np.float32)}})
    assert caught[0].filename == __file__
    same(deserialize(data, requires_unflattening=False), {"(Linear).b::TrainVar": np.ones(2, np.float32)})


def test_without_types_there_is_no_collection() -> None:
    with pytest.warns(UserWarning, match="VarCollection") as caught:
        same(
            deserialize(serialize({"a": {"b": np.ones(2)[:0].astype("f4")}}), to_var_collection=True),
            {"a.b": jnp.ones(0)},
        )
    assert caught[0].filename == __file__


# --- metadata


def test_metadata_is_never_lost(tmp_path: pathlib.Path) -> None:
    wanted = {"note": "ein Gruß", "epoch": "3"}
    data = serialize({"a": [PARAMS]}, wanted)
    path = serialize({"a": [PARAMS]}, metadata=wanted, filename=tmp_path / "a")
    with safetensors.safe_open(path, "np") as file:
        assert wanted.items() <= file.metadata().items()
    for given in (data, path):
        params, metadata = deserialize(given)
        same(params, {"a": [PARAMS]})
        assert metadata == wanted
        assert deserialize(given, requires_unflattening=False)[1] == wanted


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}, {"obmlite.tree": "{}"}])
def test_wrong_metadata(metadata: Any) -> None:
    with pytest.raises(ValueError) as caught:  # as safejax
        serialize(PARAMS, metadata=metadata)
    assert isinstance(caught.value, obmlite.ArgumentError)


# --- what safejax lost

ONE = np.float32([1, 2])
LOST = {
    "list": [ONE, [ONE, []]],
    "tuple": {"a": (ONE, ())},
    "namedtuple": {"a": Point(ONE, [Point(None, ONE)])},
    "none": {"a": None, "b": ONE},
    "empty": {"a": {}, "b": {"c": {}}},
    "nothing": {},
    "integer keys": {"a": {1: ONE, 20: ONE, 3: ONE}},
    "tuple keys": {(1, "a"): ONE},
    "dots": {"a.b": {"c": ONE}, "a": {"b.c": ONE * 2}},
    "backslashes": {"a\\": {"b": ONE}, "a\\.b": ONE},
    "separators": {"a::TrainVar": ONE, "a::b": ONE},
    "reserved": {"__metadata__": {"a": ONE}},
    "no text": {"": {"a": ONE}, "a": ONE},
    "numbers": {"a": 0.1, "b": True, "c": -(1 << 62), "d": 1 + 2j, "e": float("nan")},
    "ordered": collections.OrderedDict(b=ONE, a=ONE),
    "a leaf": jnp.float32(3),
    "a number": 7,
}


@pytest.mark.parametrize("name", LOST)
def test_nothing_is_dropped(name: str, tmp_path: pathlib.Path) -> None:
    data = serialize(LOST[name])
    safetensors.numpy.load(data)  # is an ordinary file
    same(deserialize(data), LOST[name])
    same(deserialize(serialize(LOST[name], filename=tmp_path / "a")), LOST[name])


def test_names_of_separators_are_kept_in_files_of_others() -> None:
    arrays = {"a::1": ONE, "a::2": ONE * 2}
    same(deserialize(safetensors.numpy.save(arrays)), arrays)


def test_weak_types() -> None:
    found = deserialize(serialize({"step": jnp.asarray(1.0), "x": jnp.ones(2)}))
    assert found["step"].weak_type
    assert not found["x"].weak_type


@pytest.mark.parametrize("names", [["a", "a.b"], ["a.b.c", "a.b"], ["a.b::TrainVar", "a.b"]])
def test_ambiguous_names_of_safejax(names: list[str]) -> None:
    data = safetensors.numpy.save(dict.fromkeys(names, ONE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(obmlite.RestoreError) as caught:
            deserialize(data)
    assert caught.value.leaf in names
    assert "requires_unflattening=False" in str(caught.value)
    assert set(deserialize(data, requires_unflattening=False)) == set(names)


@pytest.mark.parametrize("place", ["bytes", "file"])
@pytest.mark.parametrize("kind", [kind for kind in dtypes.ALL if kind.storage and kind.bits < 64], ids=str)
def test_dtypes(kind: dtypes.DType, place: str, tmp_path: pathlib.Path) -> None:
    held = np.arange(7).astype(np.float32).astype(kind.numpy).reshape(7, 1)
    given = serialize({"a": held, "b": held[:0]}, filename=tmp_path / "a" if place == "file" else None)
    try:
        jax.device_put(held)
    except (TypeError, RuntimeError):  # floats of 6 bits, before JAX 0.12
        with pytest.raises(obmlite.RestoreError) as caught:
            deserialize(given)
        assert caught.value.leaf == "a"
        return
    same(deserialize(given), {"a": held, "b": held[:0]})


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys(impl: str) -> None:
    keys = jax.random.split(jax.random.key(3, impl=impl), 3)
    found = deserialize(serialize({"a": keys}))["a"]
    assert found.dtype == keys.dtype
    assert (jax.random.key_data(found) == jax.random.key_data(keys)).all()


def test_64_bits_are_not_narrowed() -> None:
    data = safetensors.numpy.save({"a.b": np.float64([0.1])})
    with pytest.raises(obmlite.RestoreError) as caught:
        deserialize(data)
    assert caught.value.leaf == "a.b"
    assert "jax_enable_x64" in str(caught.value.fix)
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        same(deserialize(data), {"a": {"b": np.float64([0.1])}})
        same(deserialize(serialize({"c": np.complex128([0.1j])})), {"c": np.complex128([0.1j])})
    finally:
        jax.config.update("jax_enable_x64", before)


def test_strided_arrays() -> None:
    wanted = np.arange(12, dtype=np.float32).reshape(3, 4)
    same(deserialize(serialize({"a": np.asfortranarray(wanted), "b": wanted[::2, ::-1], "c": wanted.astype(">f4")})),
         {"a": wanted, "b": wanted[::2, ::-1], "c": wanted})  # fmt: skip


@pytest.mark.parametrize(
    "leaf",
    ["text", object(), np.array(["a"]), jax.ShapeDtypeStruct((2,), "float32"), 1 << 70, np.zeros(2, jax.dtypes.float0)],
)
def test_an_unsupported_leaf_is_named(leaf: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(obmlite.LeafError) as caught:
        serialize({"a": {"b.c": [ONE, leaf]}}, filename=tmp_path / "a")
    assert caught.value.leaf == r"a.b\.c.1"
    assert list(tmp_path.iterdir()) == []


# --- files


def test_a_file_holds_the_old_or_the_new(tmp_path: pathlib.Path) -> None:
    path, link = tmp_path / "a", tmp_path / "link"
    link.symlink_to(path)
    assert serialize({"a": ONE}, filename=link) == link
    before = path.read_bytes()

    class Failing:
        shape, dtype = (2,), np.dtype(np.float32)

        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        serialize({"a": ONE, "b": Failing()}, filename=path)
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [path, link]
    assert link.is_symlink()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_arrays_lie_in_the_file_and_outlive_it(tmp_path: pathlib.Path) -> None:
    values = np.arange(1 << 16, dtype=np.float32)
    path = serialize({"a": values, "odd": values[:3]}, filename=tmp_path / "a")
    found = deserialize(path)
    if jax.default_backend() == "cpu":
        pointer = found["a"].unsafe_buffer_pointer()
        maps = [line.split() for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
        assert any(int(a, 16) <= pointer < int(b, 16) for a, b in (line[0].split("-") for line in maps))
    serialize({"a": values * 2}, filename=path)
    same(found, {"a": values, "odd": values[:3]})
    same(deserialize(path), {"a": values * 2})


def test_files_that_are_not_mapped(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr("obmlite.interop.safejax._places.is_remote", lambda descriptor: True)
    path = serialize({"a": PARAMS["params"], "empty": ONE[:0]}, filename=tmp_path / "a")
    found = deserialize(path)
    with open(path, "r+b") as file:  # in place, which mapped arrays would show
        file.seek(-64, 2)
        file.write(bytes(64))
    same(found, {"a": PARAMS["params"], "empty": ONE[:0]})


@pytest.mark.parametrize("given", [3, None, bytearray(8)])
def test_neither_path_nor_bytes(given: Any) -> None:
    with pytest.raises(obmlite.ArgumentError, match="path or bytes"):
        deserialize(given)


def test_no_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        deserialize(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        serialize(PARAMS, filename=tmp_path / "a" / "b")
    with pytest.raises(obmlite.ArgumentError, match="regular"):
        deserialize(tmp_path)
    with pytest.raises(obmlite.ArgumentError):
        serialize(PARAMS, filename=3)  # type: ignore[arg-type]


# --- files that lie

TREE = {"kinds": [3, 1], "arities": [1, 0], "key_kinds": [1, 2], "keys": ["", "a"]}


def described(description: Any, **more: str) -> bytes:
    text = description if isinstance(description, str) else json.dumps(description)
    return safetensors.numpy.save({"a": ONE}, {"obmlite.tree": text, **more})


def test_a_description_made_by_hand() -> None:
    same(deserialize(described(TREE)), {"a": ONE})


@pytest.mark.parametrize(
    "wrong",
    [
        "[" * 100_000,
        "null",
        {},
        {**TREE, "more": 1},
        {**TREE, "kinds": [3, 77]},
        {**TREE, "kinds": [3, True]},
        {**TREE, "kinds": [3]},
        {**TREE, "arities": [2, 0]},
        {**TREE, "arities": [1, -1]},
        {**TREE, "arities": [1, 1 << 70]},
        {**TREE, "key_kinds": [1, 99]},
        {**TREE, "keys": ["", 1]},
        {**TREE, "keys": ["", "b"]},
        {**TREE, "names": ["b"]},
        {**TREE, "names": ["a", "a"]},
        {**TREE, "numbers": [1]},
        {**TREE, "numbers": [0]},
        {**TREE, "weak": "0"},
        {**TREE, "classes": {"9": "a"}},
        {**TREE, "classes": {"0": 1}},
        {**TREE, "static": {"0": "%"}},
        {**TREE, "static": {"0": "wQ=="}},
    ],
    ids=lambda wrong: str(wrong)[:60],
)
def test_malformed_descriptions(wrong: Any) -> None:
    with pytest.raises(obmlite.CorruptPackageError):
        deserialize(described(wrong))


@pytest.mark.parametrize(
    "wrong",
    [
        "1",
        "[" * 100_000,
        '{"b":{"dtype":"float32","shape":[2]}}',
        '{"a":{"dtype":"float32"}}',
        '{"a":{"dtype":"int4","shape":[2]}}',
        '{"a":{"dtype":"float0","shape":[2]}}',
        '{"a":{"dtype":"none","shape":[2]}}',
        '{"a":{"dtype":"float32","shape":[-2]}}',
        '{"a":{"dtype":"float32","shape":[3]}}',
        '{"a":{"dtype":["float32"],"shape":[2]}}',
    ],
    ids=lambda wrong: wrong[:40],
)
def test_malformed_dtypes(wrong: str) -> None:
    with pytest.raises(obmlite.CorruptPackageError):
        deserialize(described(TREE, **{"obmlite.leaves": wrong}))


def test_a_truth_value_of_2(tmp_path: pathlib.Path) -> None:
    data = serialize({"a": np.array([True, False])})
    path = tmp_path / "a"
    path.write_bytes(data.replace(b"\x01\x00", b"\x02\x00") if data.endswith(b"\x01\x00") else b"")
    with pytest.raises(obmlite.CorruptPackageError) as caught:
        deserialize(path)
    assert (caught.value.leaf, caught.value.package) == ("a", str(path))


def test_a_truncated_file() -> None:
    with pytest.raises(obmlite.CorruptPackageError):
        deserialize(serialize(PARAMS)[:-1])


def test_a_dtype_that_jax_lacks() -> None:
    entry = headers.layout([("a", "F6_E2M3", (4,))])
    with pytest.raises(obmlite.RestoreError) as caught:
        deserialize(headers.encode_header(entry, {}) + bytes(3))
    assert caught.value.leaf == "a"


# --- fsspec


def test_a_remote_filesystem() -> None:
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    fs.makedirs("/bucket", exist_ok=True)
    assert serialize(PARAMS, filename="/bucket/a.safetensors", fs=fs) == "/bucket/a.safetensors"
    assert fs.cat_file("/bucket/a.safetensors") == serialize(PARAMS)
    same(deserialize("/bucket/a.safetensors", fs=fs), PARAMS)
    serialize(PARAMS, {"a": "b"}, filename=pathlib.PurePosixPath("/bucket/b"), fs=fs)
    assert deserialize(pathlib.PurePosixPath("/bucket/b"), fs)[1] == {"a": "b"}  # safejax lost it
    with pytest.raises(FileNotFoundError):
        deserialize("/bucket/c", fs=fs)


def test_the_local_filesystem(tmp_path: pathlib.Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("file")
    path = serialize(PARAMS, filename=f"file://{tmp_path}/a", fs=fs)
    assert path == tmp_path / "a"
    same(deserialize(f"file://{tmp_path}/a", fs=fs), PARAMS)


def test_no_filesystem(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("fsspec")
    for call in (lambda: serialize(PARAMS, filename="a", fs="s3"), lambda: deserialize("a", fs="s3")):  # type: ignore[arg-type]
        with pytest.raises(obmlite.ArgumentError) as caught:
            call()
        assert caught.value.field == "fs"
    monkeypatch.setitem(sys.modules, "fsspec", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"obmlite\[fs\]"):
        serialize(PARAMS, filename=tmp_path / "a", fs=object())
    serialize(PARAMS, filename=tmp_path / "a")


# --- Flax, Haiku and Objax


@pytest.mark.parametrize(("module", "extra"), [("flax", "flax"), ("objax", "objax")])
def test_a_missing_framework(module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = __import__(f"obmlite.interop.safejax.{module}", fromlist=["deserialize"])
    data = safetensors.numpy.save({"a::TrainVar": ONE})
    for name in ("flax", "flax.core", "objax"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ImportError, match=rf"obmlite\[{extra}\]"):
            place.deserialize(data)
        same(deserialize(data), {"a": ONE})


def test_flax(tmp_path: pathlib.Path) -> None:
    core = pytest.importorskip("flax.core")
    from flax import linen as nn

    from obmlite.interop.safejax import flax

    model = nn.Sequential([nn.Dense(3), nn.relu, nn.BatchNorm(use_running_average=True)])
    x = np.ones((2, 4), np.float32)
    variables = model.init(jax.random.key(0), x)
    for params in (variables, core.freeze(variables)):
        frozen = flax.deserialize(flax.serialize(params))
        assert type(frozen) is core.FrozenDict
        assert (model.apply(frozen, x) == model.apply(variables, x)).all()
        assert type(deserialize(serialize(params), freeze_dict=True)) is core.FrozenDict
        same(deserialize(serialize(params)), variables)  # dicts, unless frozen ones are asked for
    assert header_of(serialize(core.freeze(variables))).metadata == {}
    params, metadata = flax.deserialize(serialize(variables, {"a": "b"}, filename=tmp_path / "a"))
    assert type(params) is core.FrozenDict
    assert metadata == {"a": "b"}  # safejax lost it


def test_frozen_dicts_within_other_containers() -> None:
    core = pytest.importorskip("flax.core")
    data = serialize([core.freeze({"a": ONE}), {"b": ONE}])
    same(deserialize(data), [{"a": ONE}, {"b": ONE}])
    with pytest.raises(obmlite.RestoreError, match="mapping"):
        deserialize(data, freeze_dict=True)
    found = deserialize(serialize({"c": [core.freeze({"a": ONE})]}), freeze_dict=True)
    assert type(found) is core.FrozenDict
    assert type(found["c"][0]) is core.FrozenDict


def test_haiku() -> None:
    hk = pytest.importorskip("haiku")
    from obmlite.interop.safejax import haiku

    def call(x: Any) -> Any:
        return hk.BatchNorm(True, True, 0.9)(hk.nets.MLP([3, 2])(x), is_training=True)

    model = hk.without_apply_rng(hk.transform_with_state(call))
    x = np.ones((2, 4), np.float32)
    params, state = model.init(jax.random.key(0), x)
    data = haiku.serialize({"params": params, "state": state})
    assert "params.mlp/~/linear_0.w" in header_of(data).entries
    found = haiku.deserialize(data)
    assert (model.apply(found["params"], found["state"], x)[0] == model.apply(params, state, x)[0]).all()
    same(found["params"], params)


def test_bfloat16_from_bytes_of_safejax() -> None:
    wanted = np.arange(3).astype(ml_dtypes.bfloat16)
    same(deserialize(safetensors.numpy.save({"a": wanted})), {"a": wanted})
