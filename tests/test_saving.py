import dataclasses
import errno
import json
import os
import shutil
import tempfile
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from obmlite import (
    ArgumentError,
    CorruptPackageError,
    LeafError,
    MissingFileError,
    Model,
    PackageExistsError,
    PackageNotFoundError,
    Pipeline,
    UnsafePathError,
    UnsupportedFormatError,
    Weights,
)
from obmlite.schema.decode import decode
from obmlite.schema.encode import encode
from obmlite.verify import verify
from tests import crash

PARAMS = {"w": np.arange(6, dtype=np.float32).reshape(3, 2), "b": np.ones(2, np.float32)}
X = np.array([[1, 2, 3], [0, -1, 1]], np.float32)


def apply(params, x):
    return x @ params["w"] + params["b"]


def scale(params, x):
    return {"scaled": x * params["b"][0]}


ARRAY = jax.ShapeDtypeStruct((2, 3), "float32")
# Exported once: exporting is what takes time.
APPLY = obmlite.export(apply, PARAMS, ARRAY, platforms="cpu", metadata={"what": "affine"})
SCALE = obmlite.export(scale, PARAMS, ARRAY, platforms="cpu")


def model(params=PARAMS, function=APPLY, **options):
    return Model(
        {"apply": function, "params": Weights(params)},
        pipelines={"serving_default": Pipeline(function="apply", weights={"params": "params"})},
        **options,
    )


def tree(path):
    """Every file of a directory and its bytes, index files and all."""
    return {
        os.path.relpath(os.path.join(folder, name), path): open(os.path.join(folder, name), "rb").read()
        for folder, _, names in os.walk(path)
        for name in names
    }


@pytest.fixture(autouse=True)
def _files_are_closed():
    # `tree` leaves that to the garbage collector.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield


def data_file(path, prefix):
    """The one data file of a package whose path begins so."""
    found = [name for name in tree(path) if name.startswith(prefix) and not name.endswith(".json")]
    assert len(found) == 1, found
    return path / found[0]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.obm"


# --- where to ---------------------------------------------------------------------------------------------------------


def test_a_package_is_replaced_only_when_asked(path):
    model().save(path)
    before = tree(path)
    with pytest.raises(PackageExistsError, match="overwrite=True") as caught:
        model({**PARAMS, "b": np.zeros(2, np.float32)}).save(path)
    assert caught.value.package == str(path)
    assert isinstance(caught.value, FileExistsError)
    assert tree(path) == before
    model({**PARAMS, "b": np.zeros(2, np.float32)}).save(path, overwrite=True)
    assert np.array_equal(obmlite.load(path)(X), X @ PARAMS["w"])


@pytest.mark.parametrize("entry", ["notes.txt", "weights/model.safetensors", "functions/sub/x"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_directory_of_something_else_is_never_written_over(path, entry, overwrite):
    (path / entry).parent.mkdir(parents=True)
    (path / entry).write_text("mine")
    with pytest.raises(PackageExistsError) as caught:
        model().save(path, overwrite=overwrite)
    assert caught.value.package == str(path)
    assert entry.split("/")[0] in caught.value.found
    assert tree(path) == {entry: b"mine"}


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_at_the_path_stays(path, overwrite):
    path.write_text("mine")
    with pytest.raises(PackageExistsError):
        model().save(path, overwrite=overwrite)
    assert path.read_text() == "mine"
    with pytest.raises(PackageNotFoundError):
        obmlite.load(path)


def test_directories_above_are_made_and_a_text_is_a_path_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model().save("a/b/../b/m.obm/")
    assert np.array_equal(obmlite.load("a/b/m.obm")(X), apply(PARAMS, X))


def test_a_refused_save_leaves_nothing(path):
    array = jnp.ones(3)
    weights = Weights({"a": np.zeros(5), "b": array})
    array.delete()
    with pytest.raises(LeafError) as caught:
        Model({"w": weights}).save(path / "deep" / "m.obm")
    assert (caught.value.object, caught.value.leaf, caught.value.package) == ("w", "b", str(path / "deep" / "m.obm"))
    assert tree(path) == {}


def test_onto_the_path_that_it_was_loaded_from(path):
    model().save(path)
    first = tree(path)
    loaded = obmlite.load(path)
    for _ in range(3):  # with lazy weights, whose files the second save would remove if it could not know better
        loaded.save(path, overwrite=True)
        assert tree(path) == first
        assert np.array_equal(obmlite.load(path)(X), apply(PARAMS, X))
    # And so when the path has become another model, twice.
    for n in range(2):
        model({**PARAMS, "b": np.full(2, n, np.float32)}, SCALE).save(path, overwrite=True)
    assert np.array_equal(np.asarray(loaded.weights["params"]["w"]), PARAMS["w"])
    # Its function's file is gone by now: it is kept since the first save, or the package stays as it is.
    before = tree(path)
    try:
        loaded.save(path, overwrite=True)
    except MissingFileError as error:
        facts = error.object, tree(path)
        assert facts == ("apply", before)
    else:
        assert np.array_equal(obmlite.load(path)(X), apply(PARAMS, X))
    Model({"params": loaded.weights["params"]}).save(path, overwrite=True)
    assert np.array_equal(obmlite.load(path).weights["params"].restore()["w"], PARAMS["w"])
    assert verify(path).good


def test_files_that_this_very_save_removes_are_read_before(path):
    model().save(path)
    loaded = obmlite.load(path)
    model({k: v + 1 for k, v in PARAMS.items()}, SCALE).save(path, overwrite=True)
    # The next save removes the files that the loaded model has not touched so far.
    loaded.save(path, overwrite=True)
    assert np.array_equal(obmlite.load(path)(X), apply(PARAMS, X))
    assert verify(path).good


def test_a_part_of_a_loaded_model_saved_onto_its_own_path(path):
    model().save(path)
    loaded = obmlite.load(path)
    changed = Model(
        {
            "apply": loaded.functions["apply"],
            "params": Weights({**loaded.weights["params"].lazy(), "b": np.zeros(2, "f4")}),
        },
        pipelines={"p": Pipeline(function="apply", weights={"params": "params"})},
    )
    changed.save(path, overwrite=True)
    assert np.array_equal(obmlite.load(path)(X), X @ PARAMS["w"])


@pytest.mark.parametrize("mmap", [True, False])
def test_saving_what_was_loaded_gives_the_same_files(tmp_path, mmap):
    value = {
        **PARAMS,
        "tied": PARAMS["w"],
        "numbers": [1, 2.0, True],
        "key": jax.random.key(0),
        "i4": jnp.arange(5).astype(jnp.int4),
        "z": np.zeros(3, jax.dtypes.float0),
        "big": np.arange(3, dtype=">f8"),
    }
    whole = Model(
        {"apply": APPLY, "scale": SCALE, "params": Weights(PARAMS), "other": Weights(value, metadata={"a": 1})},
        pipelines={
            "p": Pipeline(function="apply", weights={"params": "params"}, metadata={"q": (1, 2)}),
            "serving_default": Pipeline(function="scale", weights={"params": "params"}),
        },
        metadata={"license": "x"},
    )
    whole.save(tmp_path / "a", max_file_bytes=30)
    obmlite.load(tmp_path / "a", mmap=mmap).save(tmp_path / "b", max_file_bytes=30)
    files = tree(tmp_path / "a")
    assert tree(tmp_path / "b") == files
    assert len(files) > 8
    assert "weights/other.safetensors.index.json" in files
    assert verify(tmp_path / "b").good


def test_old_files_stay_for_one_generation(path):
    def files():
        return {name for name in tree(path) if name != "manifest.obm"}

    def saved(n):
        model({**PARAMS, "b": np.full(2, n, np.float32)}, [APPLY, SCALE][n % 2]).save(path, overwrite=True)
        return set(decode((path / "manifest.obm").read_bytes()).files)

    generations = [saved(0)]
    assert files() == generations[0]
    for n in range(1, 4):
        generations.append(saved(n))
        assert files() == generations[-1] | generations[-2]
        assert verify(path).good
        assert set(verify(path).extra) == generations[-2] - generations[-1]


def test_the_index_of_several_files_goes_when_it_is_stale(path):
    index = path / "weights" / "params.safetensors.index.json"
    model().save(path, max_file_bytes=8)
    assert set(json.loads(index.read_text())["weight_map"]) == {"w", "b"}
    model({**PARAMS, "w": PARAMS["w"] + 1}).save(path, overwrite=True, max_file_bytes=8)
    files = json.loads(index.read_text())["weight_map"].values()
    assert all(f"weights/{file}" in decode((path / "manifest.obm").read_bytes()).files for file in files)
    model().save(path, overwrite=True)
    assert not index.exists()
    # Also when the weights have another name now.
    model().save(path, overwrite=True, max_file_bytes=8)
    assert index.exists()
    Model({"other": Weights(PARAMS)}).save(path, overwrite=True, max_file_bytes=8)
    assert [name for name in tree(path) if name.endswith(".json")] == ["weights/other.safetensors.index.json"]
    assert verify(path).good


def test_progress(path, capfd):
    model().save(path, progress=True)
    model().save(path, overwrite=True, progress=False)
    capfd.readouterr()
    model().save(path, overwrite=True)  # not a terminal
    assert capfd.readouterr() == ("", "")


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_metadata_everywhere(path):
    data = {
        "none": None,
        "bool": True,
        "int": -(2**40),
        "float": 0.1,
        "text": "ü\0",
        "bytes": b"\0\xff",
        "list": [1, [2, {}]],
        "tuple": (1, ("a",)),
        "dict": {"a": {1: "int key"}},
    }
    function = obmlite.export(apply, PARAMS, ARRAY, platforms="cpu", metadata={"function": data})
    Model(
        {"apply": function, "params": Weights(PARAMS, metadata={"weights": data})},
        pipelines={"p": Pipeline(function="apply", weights={"params": "params"}, metadata={"pipeline": data})},
        metadata={"package": data},
    ).save(path)
    loaded = obmlite.load(path)
    assert loaded.metadata == {"package": data}
    assert loaded.functions["apply"].metadata == {"function": data}
    assert loaded.weights["params"].metadata == {"weights": data}
    assert loaded.pipelines["p"].metadata == {"pipeline": data}
    assert type(loaded.metadata["package"]["tuple"]) is tuple
    for bad in ({"x": object()}, {"x": np.float32(1)}, {"x": {1, 2}}):
        with pytest.raises(LeafError):
            model(metadata=bad)


def test_no_time_in_it(tmp_path, monkeypatch):
    model().save(tmp_path / "a")
    monkeypatch.setattr("time.time", lambda: 12345.0)
    os.utime(tmp_path / "a" / "manifest.obm", (1, 1))
    model().save(tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


NAMES = [
    "..", ".", ".hidden", "a/b", "a_b", "a b", "/etc/passwd", "../../x", "ü", "ö", "日本", "a\\b", "a\0b", "a\nb",
    "-0123456789abcdef", "x-0123456789abcdef.safetensors", "manifest.obm", "w.safetensors.index.json", "~", " ",
    "long" * 100, "long" * 101, "params.captures", "__metadata__", "%2e%2e", "con", "a.b.c.d.e.f.g",
]  # fmt: skip


def test_objects_of_any_name(path):
    """Names whose slugs are equal, and that would leave the package if they were paths."""
    (path.parent / "x").mkdir()
    weights = {name: Weights({"n": np.full(4, n, np.float32), "m": np.ones(4)}) for n, name in enumerate(NAMES)}
    functions = {f"{name}!": [APPLY, SCALE][n % 2] for n, name in enumerate(NAMES)}
    whole = Model(
        {**weights, **functions, "params": Weights(PARAMS)},
        pipelines={name: Pipeline(function=f"{name}!", weights={"params": "params"}) for name in NAMES},
    )
    for options in ({}, {"max_file_bytes": 16, "overwrite": True}):
        whole.save(path, **options)
        loaded = obmlite.load(path)
        assert list(loaded.weights) == [*NAMES, "params"]
        assert list(loaded.functions) == [f"{name}!" for name in NAMES]
        for n, name in enumerate(NAMES):
            assert np.asarray(loaded.weights[name]["n"]).tolist() == [n] * 4
            assert loaded.functions[f"{name}!"].signature == functions[f"{name}!"].signature
        assert verify(path).good
        assert os.listdir(path.parent / "x") == []
        for name in tree(path):
            assert len(os.path.basename(name)) < 200
            assert name.isascii()
            assert name.count("/") < 2
    assert np.array_equal(loaded.pipelines["../../x"](X)["scaled"], X)
    assert np.array_equal(loaded.pipelines["a_b"](X), apply(PARAMS, X))
    # Each weights object has an index of its own, that names files of its own.
    indices = [name for name in tree(path) if name.endswith(".json")]
    assert len(indices) == len(NAMES) + 1
    seen = [file for name in indices for file in set(json.loads(tree(path)[name])["weight_map"].values())]
    assert all(f"weights/{file}" in tree(path) for file in seen)


def test_two_objects_of_one_slug_and_one_content(path):
    same = {"a/b": Weights(PARAMS), "a_b": Weights(PARAMS), "a b": Weights({"w": PARAMS["w"], "b": PARAMS["b"] + 1})}
    Model({**same, "f/": APPLY, "f_": APPLY}).save(path)
    loaded = obmlite.load(path)
    for name in ("a/b", "a_b"):
        assert np.array_equal(loaded.weights[name].restore()["b"], PARAMS["b"])
    assert np.array_equal(loaded.weights["a b"].restore()["b"], PARAMS["b"] + 1)
    assert len(loaded.functions) == 2
    assert verify(path).good


@pytest.mark.parametrize("name", ["", 3, None, "\ud800"])
def test_names_that_are_none(name):
    with pytest.raises(ArgumentError):
        Model({name: Weights(PARAMS)})
    with pytest.raises(ArgumentError):
        Model({"apply": APPLY}, pipelines={name: Pipeline(function="apply")})


def test_a_function_under_another_name_than_its_own(path):
    assert APPLY.name == "apply"
    whole = Model(
        {"encode": APPLY, "again": APPLY, "params": Weights(PARAMS)},
        pipelines={"p": Pipeline(function="encode", weights={"params": "params"})},
    )
    whole.save(path)
    for one in (whole, obmlite.load(path)):
        assert np.array_equal(one(X), apply(PARAMS, X))
        assert one.functions["encode"].name == "encode"
        assert one.functions["again"].metadata == {"what": "affine"}
        assert one.pipelines["p"].function.name == "encode"
    assert APPLY.name == "apply"


def test_several_functions_over_the_same_weights(path):
    whole = Model(
        {"apply": APPLY, "scale": SCALE, "params": Weights(PARAMS)},
        pipelines={
            "a": Pipeline(function="apply", weights={"params": "params"}),
            "s": Pipeline(function="scale", weights={"params": "params"}),
        },
    )
    whole.save(path)
    assert len([name for name in tree(path) if name.startswith("weights/")]) == 1
    loaded = obmlite.load(path)
    assert np.array_equal(loaded.pipelines["a"](X), apply(PARAMS, X))
    assert np.array_equal(loaded.pipelines["s"](X)["scaled"], X)
    assert "a(x: f32[2,3])" in repr(loaded)


def test_a_model_of_nothing(path):
    Model({}).save(path)
    loaded = obmlite.load(path)
    assert (dict(loaded.functions), dict(loaded.weights), dict(loaded.pipelines)) == ({}, {}, {})
    assert verify(path).good
    Model({"none": Weights({})}).save(path, overwrite=True)
    assert obmlite.load(path).weights["none"].restore() == {}
    assert list(tree(path)) == ["manifest.obm"]


# --- damage -----------------------------------------------------------------------------------------------------------


def fails(error, path, use, loaded=None, **facts):
    """What is wrong is found when the package is loaded, or when one that was ``loaded`` before is used."""
    with pytest.raises(error) as caught:
        use(obmlite.load(path) if loaded is None else loaded)
    assert caught.value.package == str(path)
    assert {name: getattr(caught.value, name) for name in facts} == facts
    for value in facts.values():
        assert value in str(caught.value)
    return caught.value


def call(loaded):
    loaded(X)


def restore(loaded):
    loaded.weights["params"].restore()


def test_a_missing_function_is_named(path):
    model().save(path)
    loaded = obmlite.load(path)
    data_file(path, "functions/").unlink()
    error = fails(MissingFileError, path, call, field="path")
    assert isinstance(error, FileNotFoundError)
    assert error.found.startswith("functions/apply-")
    fails(MissingFileError, path, call, loaded, object="apply", field="path")
    assert np.array_equal(loaded.weights["params"].restore()["b"], PARAMS["b"])
    assert "apply(params" in repr(loaded)


def test_missing_weights_are_named(path):
    model().save(path)
    loaded = obmlite.load(path)
    data_file(path, "weights/").unlink()
    for use in (call, restore, lambda m: np.asarray(m.weights["params"]["w"]), lambda m: m.save(path, overwrite=True)):
        fails(MissingFileError, path, use, loaded, object="params", field="path")
    assert fails(MissingFileError, path, restore, field="path").found.startswith("weights/params-")
    assert loaded.functions["apply"](PARAMS, X).shape == (2, 2)


def test_a_missing_folder(path):
    model().save(path)
    loaded = obmlite.load(path)
    shutil.rmtree(path / "weights")
    fails(MissingFileError, path, restore, loaded, object="params", field="path")
    fails(MissingFileError, path, restore, field="path")


@pytest.mark.parametrize("at", [0, 100, -1])
def test_a_changed_function_never_reaches_jax(path, at, monkeypatch):
    model().save(path)
    file = data_file(path, "functions/")
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    monkeypatch.setattr("jax.export.deserialize", lambda *_: pytest.fail("reached"))
    monkeypatch.setattr("obmlite._mlir.look", lambda *_: pytest.fail("reached"))
    for use in (call, lambda m: m.functions["apply"](PARAMS, X), lambda m: m.save(path, overwrite=True)):
        error = fails(CorruptPackageError, path, use, object="apply", field="digest")
        assert isinstance(error, ValueError)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
@pytest.mark.parametrize(("prefix", "name", "use"), [("functions/", "apply", call), ("weights/", "params", restore)])
def test_files_of_another_length(path, change, prefix, name, use):
    model().save(path)
    loaded = obmlite.load(path)
    file = data_file(path, prefix)
    length = len(file.read_bytes())
    file.write_bytes(change(file.read_bytes()))
    for error in (
        fails(CorruptPackageError, path, use, loaded, object=name, field="length"),
        fails(CorruptPackageError, path, use, field="length"),
    ):
        assert f"{length} bytes" in error.expected


def test_a_changed_header(path):
    model().save(path)
    file = data_file(path, "weights/")
    data = file.read_bytes()
    for old, new in ((b'"w"', b'"v"'), (b"[3,2]", b"[2,3]"), (b"  ", b" \t"), (b'"F32"', b'"I32"')):
        file.write_bytes(data.replace(old, new, 1))
        error = fails(CorruptPackageError, path, restore, object="params", field="header digest")
        assert error.expected.startswith("weights/params-")


def test_swapped_files(path):
    other = {"w": PARAMS["w"], "c": PARAMS["b"]}
    Model({"params": Weights(PARAMS), "others": Weights(other), "f": APPLY, "g": SCALE}).save(path)
    loaded = obmlite.load(path)
    for first, second in (("weights/params", "weights/others"), ("functions/f", "functions/g")):
        a, b = data_file(path, first), data_file(path, second)
        content = a.read_bytes(), b.read_bytes()
        a.write_bytes(content[1])
        b.write_bytes(content[0])
    fails(CorruptPackageError, path, restore, loaded, object="params", field="header digest")
    use = lambda m: m.weights["others"].restore()  # noqa: E731
    fails(CorruptPackageError, path, use, loaded, object="others", field="header digest")
    fails(CorruptPackageError, path, lambda m: m.functions["f"](PARAMS, X), loaded, object="f")
    fails(CorruptPackageError, path, lambda m: m.functions["g"](PARAMS, X), loaded, object="g")


def test_a_changed_manifest(path):
    model().save(path)
    data = (path / "manifest.obm").read_bytes()
    for changed in (data[:-1], data + b"\0", b"", data[:100], b"\0" * len(data), data[:200] + b"?" + data[201:]):
        (path / "manifest.obm").write_bytes(changed)
        with pytest.raises(CorruptPackageError) as caught:
            obmlite.load(path)
        assert caught.value.package == str(path)
        assert not isinstance(caught.value, FileNotFoundError)


def test_data_file_of_another_kind(path, tmp_path):
    model().save(path)
    for prefix, name, use in (("functions/", "apply", call), ("weights/", "params", restore)):
        loaded = obmlite.load(path)
        file = data_file(path, prefix)
        aside = tmp_path / "aside"
        file.rename(aside)
        for make in (
            lambda file, aside=aside: file.symlink_to(aside),
            lambda file: os.mkfifo(file),
            lambda file: file.mkdir(),
            lambda file: file.symlink_to("nowhere"),
        ):
            make(file)
            fails(UnsafePathError, path, use, loaded, object=name, field="path")
            error = fails(UnsafePathError, path, use, field="path")
            assert error.found == str(file.relative_to(path))
            file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
        aside.rename(file)
    folder = path / "weights"
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    fails(UnsafePathError, path, restore, field="path")


def test_the_manifest_itself_as_a_link_or_fifo(path, tmp_path):
    model().save(path)
    (path / "manifest.obm").rename(tmp_path / "aside")
    (path / "manifest.obm").symlink_to(tmp_path / "aside")
    with pytest.raises(UnsafePathError):
        obmlite.load(path)
    (path / "manifest.obm").unlink()
    os.mkfifo(path / "manifest.obm")
    with pytest.raises(UnsafePathError):
        obmlite.load(path)


def rewrite(path, change):
    file = path / "manifest.obm"
    file.write_bytes(encode(change(decode(file.read_bytes()))))


@pytest.mark.parametrize(
    "evil",
    [
        "../{name}",
        "/{outside}/{name}",
        "weights/../../{name}",
        "weights/./{name}",
        "weights\\{name}",
        "weights//{name}",
    ],
)
def test_paths_that_leave_the_package(path, tmp_path, evil):
    model().save(path)
    for prefix in ("weights/", "functions/"):
        shutil.copy(data_file(path, prefix), tmp_path)

    def change(manifest):
        def moved(old):
            return evil.format(name=os.path.basename(old), outside=str(tmp_path).lstrip("/"))

        weights = manifest.weights["params"]
        function = manifest.functions["apply"]
        return dataclasses.replace(
            manifest,
            files={moved(n): dataclasses.replace(f, path=moved(n)) for n, f in manifest.files.items()},
            weights={
                "params": dataclasses.replace(
                    weights,
                    pieces=tuple(
                        tuple(dataclasses.replace(p, file=moved(p.file)) for p in ps) for ps in weights.pieces
                    ),
                )
            },
            functions={
                "apply": dataclasses.replace(
                    function, primal=dataclasses.replace(function.primal, file=moved(function.primal.file))
                )
            },
        )

    rewrite(path, change)
    for use in (call, restore, lambda m: m.functions["apply"](PARAMS, X)):
        with pytest.raises(UnsafePathError) as caught:
            use(obmlite.load(path))
        assert caught.value.package == str(path)
        assert caught.value.field


# --- other versions ---------------------------------------------------------------------------------------------------


def test_one_object_that_this_obmlite_does_not_know(path):
    model().save(path)

    def change(manifest):
        return dataclasses.replace(
            manifest,
            functions={
                **manifest.functions,
                "new": dataclasses.replace(manifest.functions["apply"], name="new", required=("quantum",)),
            },
            pipelines={
                **manifest.pipelines,
                "later": dataclasses.replace(
                    manifest.pipelines["serving_default"], name="later", required=("teleport",)
                ),
            },
        )

    rewrite(path, change)
    loaded = obmlite.load(path)
    assert np.array_equal(loaded(X), apply(PARAMS, X))
    for mapping, name, feature in ((loaded.functions, "new", "quantum"), (loaded.pipelines, "later", "teleport")):
        assert name in mapping
        assert name in list(mapping)
        with pytest.raises(UnsupportedFormatError) as caught:
            mapping[name]
        assert (caught.value.object, caught.value.found) == (name, feature)
        assert f"{name}: " in repr(loaded)
        assert feature in repr(loaded)
    assert "nothing" not in loaded.functions
    # What it cannot read it cannot write either, and the package is still there.
    with pytest.raises(UnsupportedFormatError):
        loaded.save(path, overwrite=True)
    assert np.array_equal(obmlite.load(path)(X), apply(PARAMS, X))


def test_a_later_format_is_replaced_without_loss(path):
    model().save(path)
    rewrite(path, lambda manifest: dataclasses.replace(manifest, format=(2, 0), reader="obmlite 9"))
    with pytest.raises(UnsupportedFormatError, match="obmlite 9") as caught:
        obmlite.load(path)
    assert (caught.value.package, caught.value.field) == (str(path), "format_major")
    with pytest.raises(PackageExistsError):
        model().save(path)
    model(function=SCALE).save(path, overwrite=True)
    assert np.array_equal(obmlite.load(path)(X)["scaled"], X)


# --- while others look ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [True, False])
def test_a_reader_keeps_what_it_opened(path, mmap):
    model().save(path)
    opened, untouched, called = (obmlite.load(path, mmap=mmap) for _ in range(3))
    np.asarray(opened.weights["params"]["b"])
    opened.functions["apply"].load()
    called(X)
    new = {k: v + 10 for k, v in PARAMS.items()}
    model(new, SCALE).save(path, overwrite=True)
    # Within one generation nothing is lost, touched or not.
    assert np.array_equal(untouched(X), apply(PARAMS, X))
    assert np.array_equal(np.asarray(untouched.weights["params"]["w"]), PARAMS["w"])
    late = obmlite.load(path, mmap=mmap)
    assert np.array_equal(late.weights["params"].restore()["b"], new["b"])
    model(PARAMS | {"b": np.zeros(2, np.float32)}, SCALE).save(path, overwrite=True)
    # Later only what is open.
    assert np.array_equal(np.asarray(opened.weights["params"]["w"]), PARAMS["w"])
    assert np.array_equal(opened(X), apply(PARAMS, X))
    assert np.array_equal(called(X), apply(PARAMS, X))
    assert np.array_equal(untouched(X), apply(PARAMS, X))


def test_a_reader_of_two_generations_ago_is_told(path):
    model().save(path)
    reader = obmlite.load(path)
    for n in range(2):
        model({k: v + n + 1 for k, v in PARAMS.items()}, SCALE).save(path, overwrite=True)
    with pytest.raises(MissingFileError) as caught:
        reader(X)
    assert caught.value.package == str(path)
    assert caught.value.object in ("params", "apply")
    shutil.rmtree(path)
    with pytest.raises((MissingFileError, PackageNotFoundError)):
        reader.weights["params"].restore()


# --- where it cannot be written ---------------------------------------------------------------------------------------


def test_a_directory_that_cannot_be_written():
    """In a child, because root may write anywhere, and a process cannot become root again."""
    # Not in pytest's own directory, which nobody but its owner may enter.
    folder = tempfile.mkdtemp()
    try:
        model().save(os.path.join(folder, "m.obm"))
        before = tree(folder)
        for name in ("", "m.obm", "m.obm/weights", "m.obm/functions"):
            os.chmod(os.path.join(folder, name), 0o555)
        other = model({k: v + 1 for k, v in PARAMS.items()})

        def child():
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            found = []
            for name in ("m.obm", "new.obm", "new/m.obm"):
                try:
                    other.save(os.path.join(folder, name), overwrite=True)
                except OSError as error:
                    found.append([type(error).__name__, error.errno])
            return found

        assert crash.fork(child).wait() == [["PermissionError", errno.EACCES]] * 3
        assert tree(folder) == before
        assert np.array_equal(obmlite.load(os.path.join(folder, "m.obm"))(X), apply(PARAMS, X))
    finally:
        for name in ("", "m.obm", "m.obm/weights", "m.obm/functions"):
            os.chmod(os.path.join(folder, name), 0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize(("number", "after"), [(errno.ENOSPC, False), (errno.EIO, True)])
def test_any_call_may_fail(path, tmp_path, number, after):
    """A full disk at each write, fsync, replace, mkdir, unlink in turn: the old package whole, or the new one."""
    new = {k: v + 1 for k, v in PARAMS.items()}
    model().save(tmp_path / "counted")
    calls = crash.run(lambda: model(new, SCALE).save(tmp_path / "counted", overwrite=True, max_file_bytes=8)).calls
    outcomes = set()
    for at in range(len(calls)):
        shutil.rmtree(path, ignore_errors=True)
        model().save(path)
        failed = False
        with crash.fail(at, OSError(number, os.strerror(number)), after=after):
            try:
                model(new, SCALE).save(path, overwrite=True, max_file_bytes=8)
            except OSError as error:
                failed = True
                if error.errno != number:
                    raise
        loaded = obmlite.load(path)
        kept = "scaled" not in loaded.functions["apply"].signature.outputs.names
        expected = PARAMS if kept else new
        for name, value in expected.items():
            assert np.array_equal(np.asarray(loaded.weights["params"][name]), value)
        assert loaded.functions["apply"].metadata == [SCALE, APPLY][kept].metadata
        assert failed or not kept
        report = verify(path)
        assert report.good
        assert not kept or report.extra == ()
        outcomes.add((calls[at], kept))
        model(new, SCALE).save(path, overwrite=True)
        assert verify(path).good
        assert ".tmp" not in str(list(tree(path)))
    assert {("write", True), ("fsync", True), ("write", False), ("fsync", False)} <= outcomes


def test_a_full_disk_on_the_first_save_leaves_nothing(path, tmp_path):
    calls = crash.run(lambda: model().save(tmp_path / "counted")).calls
    for at, name in enumerate(calls):
        with crash.fail(at, OSError(errno.ENOSPC, "full")):
            try:
                model().save(path)
            except OSError as error:
                assert error.errno == errno.ENOSPC
        if os.path.lexists(path / "manifest.obm"):
            assert verify(path).good
            assert name in ("fsync", "unlink")  # of what follows the commit
            shutil.rmtree(path)
        else:
            assert tree(path) == {}
