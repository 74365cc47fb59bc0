"""Supplementals: carried byte for byte, read, extracted; examples, devices, options; and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import obmlite
from obmlite import Supplemental, listing, spec
from obmlite.device_assignment import device
from obmlite.examples import MIME_TYPE, pack, unpack
from obmlite.io.commit import MANIFEST
from obmlite.io.store import LocalDirectory
from obmlite.loading import open_manifest
from obmlite.schema.decode import decode
from obmlite.schema.encode import encode
from obmlite.schema.records import SupplementalForm
from obmlite.verify import verify

LARGE = bytes(range(256)) * 64


def save(folder: pathlib.Path, supplementals: dict[str, Supplemental], **options: Any) -> pathlib.Path:
    path = folder / "model.obm"
    f = obmlite.export(lambda x: x + 1, spec("f32[n]"), name="f")
    obmlite.Model({"f": f}, supplementals=supplementals, **options).save(path, overwrite=True)
    return path


def refused(kind: type[BaseException], make: Any) -> Any:
    with pytest.raises(kind) as caught:
        make()
    return caught.value


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    root = tmp_path / "given"
    (root / "assets" / "deep").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "saved_model.pb").write_bytes(LARGE)
    (root / "assets" / "vocab größer.txt").write_bytes(b"a\nb\n")
    (root / "assets" / "deep" / "nothing").write_bytes(b"")
    return root


def content(root: str | os.PathLike[str]) -> dict[str, bytes | None]:
    root = pathlib.Path(root)
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


def test_directories_files_and_bytes(tree: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "large.bin").write_bytes(LARGE)
    path = save(
        tmp_path,
        {
            "tf": Supplemental.from_directory(tree, mime_type="application/x.tensorflow-saved-model", version="1.0"),
            "one file": Supplemental.from_file(tmp_path / "large.bin", function="f", metadata={"a": 1}),
            "small": Supplemental.from_bytes(b"hello", mime_type="text/plain"),
            "nothing": Supplemental.from_bytes(b""),
        },
    )
    found = obmlite.load(path).supplementals
    tf, one, small = found["tf"], found["one file"], found["small"]
    assert (tf.mime_type, tf.version, tf.function) == ("application/x.tensorflow-saved-model", "1.0", "")
    assert tf.files == ("assets/deep/nothing", "assets/vocab größer.txt", "saved_model.pb")
    assert tf.read("saved_model.pb") == LARGE
    with tf.open("assets/vocab größer.txt") as stream:
        assert io.TextIOWrapper(stream, encoding="utf-8").readlines() == ["a\n", "b\n"]
    assert (one.function, one.metadata, one.read()) == ("f", {"a": 1}, LARGE)
    assert (small.form, small.read()) == (SupplementalForm.INLINE, b"hello")
    assert found["nothing"].read() == b""
    assert content(tf.extract(tmp_path / "out" / "tf")) == content(tree)
    assert pathlib.Path(one.extract(tmp_path / "out" / "one")).read_bytes() == LARGE
    assert pathlib.Path(small.extract(tmp_path / "out" / "small")).read_bytes() == b"hello"
    assert verify(path).good
    assert not any("empty" in f for f in LocalDirectory(path).files())  # an empty folder is in the manifest alone


def test_saving_a_loaded_model_carries_them_on(tree: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = save(tmp_path, {"tf": Supplemental.from_directory(tree), "large": Supplemental.from_bytes(LARGE)})
    before = path.joinpath(MANIFEST).read_bytes()
    obmlite.load(path).save(path, overwrite=True)
    assert path.joinpath(MANIFEST).read_bytes() == before
    obmlite.load(path).save(tmp_path / "other.obm")
    found = obmlite.load(tmp_path / "other.obm").supplementals
    assert content(found["tf"].extract(tmp_path / "tf")) == content(tree)
    assert found["large"].read() == LARGE


def test_streams_can_be_sought(tmp_path: pathlib.Path) -> None:
    path = save(tmp_path, {"large": Supplemental.from_bytes(LARGE)})
    with obmlite.load(path).supplementals["large"].open() as stream:
        stream.seek(-3, os.SEEK_END)
        assert stream.read() == LARGE[-3:]
        stream.seek(100)
        assert (stream.read(5), stream.tell()) == (LARGE[100:105], 105)
        refused(ValueError, lambda: stream.seek(-1))


def test_changed_bytes_are_found(tmp_path: pathlib.Path) -> None:
    path = save(tmp_path, {"large": Supplemental.from_bytes(LARGE)})
    [file] = (path / "supplementals").iterdir()
    file.write_bytes(LARGE[:-1] + b"?")
    found = obmlite.load(path).supplementals["large"]
    assert refused(obmlite.CorruptPackageError, found.open).field == "digest"
    refused(obmlite.CorruptPackageError, lambda: found.extract(tmp_path / "out"))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")]  # neither it nor a part of it
    assert not verify(path).good
    file.write_bytes(LARGE + b"?")
    assert refused(obmlite.CorruptPackageError, found.open).field == "length"
    file.unlink()
    refused(obmlite.MissingFileError, found.open)


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        ("../outside", obmlite.UnsafePathError),
        ("a/../../outside", obmlite.UnsafePathError),
        ("/etc/passwd", obmlite.UnsafePathError),
        ("a\\b", obmlite.UnsafePathError),
        ("a//b", obmlite.UnsafePathError),
        ("a\nb", obmlite.UnsafePathError),
        ("saved_model.pb/b", obmlite.CorruptPackageError),
    ],
)
def test_paths_that_leave_the_supplemental(
    entry: str, kind: type[BaseException], tree: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path = save(tmp_path, {"tf": Supplemental.from_directory(tree), "good": Supplemental.from_bytes(b"x")})
    manifest = decode(open_manifest(LocalDirectory(path)))
    record = manifest.supplementals["tf"]
    entries = {**record.entries, entry: record.entries["saved_model.pb"]}
    changed = {**manifest.supplementals, "tf": dataclasses.replace(record, entries=entries)}
    path.joinpath(MANIFEST).write_bytes(encode(dataclasses.replace(manifest, supplementals=changed)))
    loaded = obmlite.load(path)
    assert refused(kind, lambda: loaded.supplementals["tf"]).object == "tf"
    assert loaded.supplementals["good"].read() == b"x"
    assert [type(p) for p in verify(path).problems] == [kind]
    assert not (tmp_path / "outside").exists()


def test_what_is_not_carried(tree: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tree / "link").symlink_to("/etc/passwd")
    assert "symbolic link" in str(refused(obmlite.ArgumentError, lambda: Supplemental.from_directory(tree)))
    (tree / "link").unlink()
    os.mkfifo(tree / "fifo")
    refused(obmlite.ArgumentError, lambda: Supplemental.from_directory(tree))
    refused(obmlite.ArgumentError, lambda: Supplemental.from_file(tree))
    (tree / "fifo").unlink()
    (tree / "a\\b").write_bytes(b"")
    refused(obmlite.UnsafePathError, lambda: Supplemental.from_directory(tree))
    refused(FileNotFoundError, lambda: Supplemental.from_file(tree / "absent"))
    refused(NotADirectoryError, lambda: Supplemental.from_directory(tree / "saved_model.pb"))
    wrong = refused(
        obmlite.ArgumentError, lambda: save(tmp_path, {"a": Supplemental.from_bytes(b"", function="nothing")})
    )
    assert (wrong.object, wrong.expected, wrong.found) == ("a", "f", "nothing")
    refused(obmlite.ArgumentError, lambda: save(tmp_path, {"a": b"bytes"}))  # type: ignore[dict-item]
    refused(obmlite.LeafError, lambda: Supplemental.from_bytes(b"", metadata={"a": object()}))


def test_extracting_never_writes_over_anything(tmp_path: pathlib.Path) -> None:
    (tmp_path / "there").write_bytes(b"mine")
    refused(obmlite.PackageExistsError, lambda: Supplemental.from_bytes(b"x").extract(tmp_path / "there"))
    assert (tmp_path / "there").read_bytes() == b"mine"


def test_paths_that_are_not_there(tree: pathlib.Path) -> None:
    found = Supplemental.from_directory(tree)
    for path in (None, "absent", "empty/", "assets"):
        refused(obmlite.UnknownNameError, lambda path=path: found.open(path))


def test_a_save_that_fails_leaves_nothing(tree: pathlib.Path, tmp_path: pathlib.Path) -> None:
    given = Supplemental.from_directory(tree)
    (tree / "saved_model.pb").unlink()
    refused(FileNotFoundError, lambda: save(tmp_path, {"tf": given}))
    assert not (tmp_path / "model.obm").exists()


# --- examples


def test_examples(tmp_path: pathlib.Path) -> None:
    model = obmlite.Model.from_function(
        lambda batch, *, key: batch["x"] + jax.random.normal(key),
        spec({"x": "f32[n]"}),
        kwargs={"key": jax.random.key(0)},
        weights=None,
        name="f",
    )
    x, key = np.arange(3, dtype="f4"), jax.random.key(7)
    given = model.with_examples({"batch": {"x": x}, "key": key}).with_examples({"batch": {"x": x[:1]}, "key": key})
    given.save(tmp_path / "model.obm")
    loaded = obmlite.load(tmp_path / "model.obm")
    assert loaded.supplementals["examples"].mime_type == MIME_TYPE
    [first, second] = loaded.examples["serving_default"]
    np.testing.assert_array_equal(first["batch"]["x"], x)
    assert second["batch"]["x"].shape == (1,)
    np.testing.assert_array_equal(loaded(**first), model({"x": x}, key=key))
    assert model.examples == {}
    refused(obmlite.ArgumentError, lambda: model.with_examples({"batch": {"x": x.astype("i4")}, "key": key}))
    refused(obmlite.ArgumentError, lambda: model.with_examples(x))


def test_examples_of_every_kind_come_back() -> None:
    call = {
        "a": [np.float32(1.5), (np.arange(3, dtype=ml_dtypes.bfloat16), None)],
        "b": {"int4": np.array([1, -2, 3], ml_dtypes.int4), "flag": np.array([True]), "c": np.array([1 + 2j])},
    }
    data = pack({"p": [call]})
    [found] = unpack(data)["p"]
    assert jax.tree.structure(found) == jax.tree.structure(call)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(call), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert pack({"p": [call]}) == data


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:100],
        lambda data: data.replace(b"arities", b"aritiez"),
        lambda data: data.replace(b"f32", b"f99"),
        lambda data: b"",
    ],
)
def test_damaged_examples(change: Any) -> None:
    refused(obmlite.CorruptPackageError, lambda: unpack(change(pack({"p": [{"x": np.zeros(2, "f4")}]}))))


# --- devices and options


def test_devices_are_kept_and_shown(tmp_path: pathlib.Path) -> None:
    made = (device(0, (0, 1, 2), 1), device(3))
    path = save(tmp_path, {}, device_assignment=made)
    assert obmlite.load(path).device_assignment == made
    assert listing.listing(path)["device_assignment"] == [{"id": 0, "coords": [0, 1, 2], "core_on_chip": 1}, {"id": 3}]
    assert "  device 0 at 0,1,2, core 1" in list(listing.text(listing.listing(path)))
    obmlite.load(path).save(tmp_path / "again.obm")
    assert obmlite.load(tmp_path / "again.obm").device_assignment == made
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    assert [d.id for d in obmlite.devices_of(mesh)] == [jax.devices()[0].id]
    refused(obmlite.ArgumentError, lambda: device(0, (1, 2, 3)))
    refused(obmlite.ArgumentError, lambda: device(0, None, 1))
    refused(obmlite.ArgumentError, lambda: device(-1))


OPTION = "xla_cpu_enable_fast_min_max"


def options_used(model: obmlite.Model, *args: Any) -> dict[str, Any]:
    """What the program of a call was compiled with: XLA's own dump names it."""
    call = model.pipeline._calls[0]
    return dict(call._function.compile_options.get("cpu", {})) if call._by_platform else {}


def test_compile_options(tmp_path: pathlib.Path) -> None:
    options = {"cpu": {OPTION: True}, "tpu": {"xla_tpu_something": 3}}
    model = obmlite.Model.from_function(
        lambda x: jnp.maximum(x, 0), spec("f32[n]"), weights=None, name="f", compile_options=options
    )
    model.save(tmp_path / "model.obm")
    loaded = obmlite.load(tmp_path / "model.obm")
    assert loaded.functions["f"].compile_options == options
    assert listing.listing(tmp_path / "model.obm")["functions"]["f"]["compile_options"] == options
    assert json.dumps(options)  # what was read is plain
    x = np.array([-1, 2], "f4")
    np.testing.assert_array_equal(loaded(x), [0, 2])
    np.testing.assert_array_equal(loaded.functions["f"](x), [0, 2])
    # Within another program, and where nothing but that program is traced, that one's options hold.
    np.testing.assert_array_equal(jax.jit(lambda x: loaded(x))(x), [0, 2])
    np.testing.assert_array_equal(jax.jit(lambda: loaded(x))(), [0, 2])


def test_other_compile_options() -> None:
    plain = obmlite.export(lambda x: x, spec("f32[n]"), name="f")
    options = {"cpu": {"xla_cpu_enable_fast_min_max": True}}
    assert plain.compiled_with(options).compile_options == options
    assert plain.compile_options == {}
    for option in ({"xla_dump_to": "/tmp"}, {"xla_backend_extra_options": "a"}, {"xla_cpu_max_isa": "/etc"}):
        assert refused(obmlite.ExportError, lambda option=option: plain.compiled_with({"cpu": option})).fix
    with pytest.raises(obmlite.ExportError, match="abacus"):
        plain.compiled_with({"abacus": {"beads": True}})


def test_options_reach_the_compiler(tmp_path: pathlib.Path) -> None:
    def model(options: Any) -> obmlite.Model:
        return obmlite.Model.from_function(lambda x: x, spec("f32[n]"), weights=None, name="f", compile_options=options)

    x = np.zeros(2, "f4")
    unknown = model({"cpu": {"xla_no_such_option": True}})
    wrong = refused(obmlite.UnsupportedFormatError, lambda: unknown(x))
    assert (wrong.field, wrong.object) == ("compile_options", "serving_default")
    assert "xla_no_such_option" in str(wrong.found)
    unknown.save(tmp_path / "model.obm")
    obmlite.load(tmp_path / "model.obm", compile_options=False)(x)
    model({"tpu": {"xla_no_such_option": True}})(x)  # for another platform than this one
    for bad in ({"gpu": {}}, {"cpu": {3: True}}, {"cpu": {"a": [1]}}):
        assert refused(obmlite.ExportError, lambda bad=bad: model(bad)).field == "compile_options"


def test_options_of_a_pipelines_steps_are_put_together() -> None:
    def step(value: bool | None) -> obmlite.Function:
        options = {} if value is None else {"cpu": {OPTION: value}}
        return obmlite.export(lambda x: x + 1, spec("f32[n]"), compile_options=options)

    def model(*values: bool | None) -> obmlite.Model:
        names = [f"f{n}" for n in range(len(values))]
        return obmlite.Model(
            {name: step(value) for name, value in zip(names, values, strict=True)},
            pipelines={"p": obmlite.Pipeline(pre=names)},
        )

    mixed = model(None, True)
    np.testing.assert_array_equal(mixed(np.zeros(1, "f4")), [2])
    assert options_used(mixed) == {OPTION: True}
    wrong = refused(obmlite.ArgumentError, lambda: model(True, False))
    assert OPTION in str(wrong.field)
    assert wrong.object == "p"
