"""Orbax Model's documented usage, with changed imports, and what its defects have become."""

from __future__ import annotations

import enum
import importlib.util
import os
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from obmlite import cli as command_line
from obmlite import spec
from obmlite.interop import orbax_model as oex
from obmlite.interop.orbax_model import _carried, jax2obm, tf2obm
from obmlite.interop.orbax_model import core as obm

ROOT = pathlib.Path(__file__).parent.parent.parent
PARAMS = {"w": np.arange(12, dtype="f4").reshape(4, 3) / 7, "b": np.ones(3, "f4")}
X = np.arange(8, dtype="f4").reshape(2, 4)

pytestmark = [
    # Of TensorFlow, of Orbax, and of what they import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
needs_orbax = pytest.mark.skipif(
    importlib.util.find_spec("orbax") is None, reason="runs where orbax-checkpoint is installed"
)


def apply(params: Any, x: Any) -> Any:
    return x @ params["w"] + params["b"]


def prepare(image: Any) -> Any:
    return image.astype(jnp.float32)


def label(logits: Any) -> Any:
    return jnp.argmax(logits, -1)


def refused(kind: type[obmlite.ObmliteError], make: Any) -> obmlite.ObmliteError:
    with pytest.raises(kind) as caught:
        make()
    return caught.value


def arguments(batch: Any = 2) -> tuple[Any, ...]:
    return (jax2obm.get_shape_dtype_struct(PARAMS), spec(f"f32[{batch},4]"))


def converted(**others: Any) -> dict[str, Any]:
    return {"fn": jax2obm.convert(apply, arguments()), "params": obmlite.Weights(PARAMS), **others}


def orchestrated(**names: Any) -> dict[str, Any]:
    return {"orchestration": obm.GlobalSupplemental(oex.orchestration(**names), "orchestration.pb")}


BOUND = {"model_function_name": "fn", "weights_name": "params"}


def save(module: dict[str, Any], path: pathlib.Path, **options: Any) -> obmlite.Model:
    obm.save(module, path, obm.SaveOptions(**options))
    return obm.load(path)


# --- the README


@pytest.fixture
def processors(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Any]:
    """Functions of TensorFlow's before and behind the model, and what they use."""
    monkeypatch.chdir(tmp_path)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    tf = pytest.importorskip("tensorflow", reason="runs in TensorFlow's own environment")
    words = tf.lookup.KeyValueTensorInitializer(["hello", "world"], [1.0, 2.0])
    table = tf.lookup.StaticHashTable(words, 0.0)

    @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.string)])
    def pre(texts: Any) -> Any:
        return {"x": table.lookup(texts)}

    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32)])
    def post(logits: Any) -> Any:
        return {"label": tf.strings.as_string(tf.argmax(logits, -1))}

    return pre.get_concrete_function(), post.get_concrete_function(), (table,)


TEXTS = np.array([["hello", "world", "?", "hello"], ["?", "?", "?", "world"]])
COUNTS = np.array([[1, 2, 0, 1], [0, 0, 0, 2]], "f4")


def labels() -> list[bytes]:
    return [str(n).encode() for n in np.asarray(apply(PARAMS, COUNTS)).argmax(-1)]


@needs_orbax
def test_the_documents_usage(processors: Any) -> None:
    text = (ROOT / "docs" / "orbax_model.md").read_text(encoding="utf-8")
    names = ("pre_processor", "post_processor", "trackable_resources")
    jax2obm.save_checkpoint(PARAMS, "my_checkpoint/")
    namespace = {**dict(zip(names, processors, strict=True)), "apply_fn": apply, "texts": TEXTS}
    exec(text.partition("```python\n")[2].partition("```")[0], namespace)
    model = obmlite.load("my_model")
    assert model(TEXTS)["label"].tolist() == labels()
    assert set(model.objects) | set(model.supplementals) == {*namespace["objects"], "tensorflow_saved_model"}


@needs_orbax
def test_the_readmes_usage(processors: Any) -> None:
    pre_processor, post_processor, trackable_resources = processors
    apply_fn = apply
    jax2obm.save_checkpoint(PARAMS, "path/to/my_orbax_model/my_checkpoint/")

    # From here on the README's text, but for its imports.
    args_spec, kwargs_spec = tf2obm.tf_specs_to_jax(pre_processor.structured_outputs)
    obm_apply_fn = jax2obm.convert(apply_fn, args_spec, kwargs_spec)
    obm_pre_processor = tf2obm.convert_function("my_tf_pre_processor", pre_processor)
    obm_post_processor = tf2obm.convert_function("my_tf_post_processor", post_processor)

    tf2obm.save_tf_functions(
        "path/to/my_orbax_model",
        {"my_tf_pre_processor": pre_processor, "my_tf_post_processor": post_processor},
        trackable_resources,
    )
    obm_weights = obm.convert_path_to_value("path/to/my_orbax_model/my_checkpoint/", mime_type="orbax_checkpoint")
    obm_dict = {
        "my_model_fn": obm_apply_fn,
        "my_weights": obm_weights,
        "my_pre_processor": obm_pre_processor,
        "my_post_processor": obm_post_processor,
    }
    orchestration = oex.orchestration(
        model_function_name="my_model_fn",
        weights_name="my_weights",
        pre_processor_name="my_pre_processor",
        post_processor_name="my_post_processor",
    )
    obm.save(
        obm_dict,
        "path/to/my_orbax_model/",
        obm.SaveOptions(
            version=2,
            supplemental_info={
                "orchestration": obm.GlobalSupplemental(orchestration, "my_orchestration.pb"),
                "tensorflow_saved_model": obm.GlobalSupplemental(
                    tf2obm.tf_saved_model_as_obm_supplemental("tf_stuff/"), None
                ),
            },
        ),
    )
    # To here.

    model = obmlite.load("path/to/my_orbax_model")
    parts = [*model.objects, *model.supplementals, *model.pipelines]
    assert set(parts) == {*obm_dict, "orchestration", "tensorflow_saved_model"}
    assert model(TEXTS)["label"].tolist() == labels()
    assert obmlite.load("path/to/my_orbax_model").weights["my_weights"].names == ("b", "w")

    # What it cannot be: a function that is not in the SavedModel, and a SavedModel that is not there.
    again = dict(obm_dict, my_pre_processor=tf2obm.convert_function("pre", pre_processor))
    saved_model = tf2obm.tf_saved_model_as_obm_supplemental("path/to/my_orbax_model/tf_saved_model")
    options = obm.SaveOptions(supplementals={"tf": obm.GlobalSupplemental(saved_model)})
    error = refused(obmlite.ArgumentError, lambda: obm.save(again, "other", options))
    assert (error.object, error.found) == ("my_pre_processor", "pre")
    assert error.expected == "my_tf_post_processor, my_tf_pre_processor"
    processors = {"my_pre_processor": obm_pre_processor}
    assert "not among" in str(refused(obmlite.ArgumentError, lambda: obm.save(processors, "other")))
    obm.save(processors, "other", options)  # a SavedModel under another name will do
    assert list(obmlite.load("other").supplementals) == ["my_pre_processor", "tf"]


@needs_orbax
def test_the_same_without_tensorflow(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "model"
    jax2obm.save_checkpoint(PARAMS, target / "my_checkpoint")
    module = {
        "fn": oex.convert(apply, (spec("f32[b,4]"),), {}),  # the weights' specs come from the checkpoint
        "weights": oex.convert_path_to_value("my_checkpoint/", mime_type="application/x.orbax-checkpoint"),
        "pre": oex.convert(prepare, (spec("u8[n,4]"),)),
        "post": oex.convert(label, (spec("f32[n,3]"),)),
    }
    names = {"model_function_name": "fn", "weights_name": "weights"}
    plan = oex.orchestration(**names, pre_processor_name="pre", post_processor_name=["post"])
    supplementals = {"orchestration": oex.GlobalSupplemental(plan, "orchestration.pb")}
    oex.save(module, target, oex.SaveOptions(version=2, supplementals=supplementals))
    model = oex.load(target)
    np.testing.assert_array_equal(model(X.astype("u1")), np.asarray(apply(PARAMS, X)).argmax(-1))
    assert str(model.signature) == "(image: u8[n,4]) -> i32[n]"
    assert (target / "my_checkpoint" / "_METADATA").exists()  # it stays, and the package does not need it
    (target / "my_checkpoint").rename(tmp_path / "elsewhere")
    np.testing.assert_array_equal(oex.load(target)(X.astype("u1")), model(X.astype("u1")))
    assert command_line.main(["verify", str(target)]) == 0


# --- checkpoints


@needs_orbax
def test_checkpoints_of_every_kind(tmp_path: pathlib.Path) -> None:
    import orbax.checkpoint as ocp

    tree = {"a": {"half": jnp.arange(4, dtype=jnp.bfloat16)}, "l": [np.int32(3), np.ones((2, 3), "f4")]}
    jax2obm.save_checkpoint(tree, tmp_path / "standard")
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "pytree", tree)
    with ocp.Checkpointer(ocp.ArrayCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "array", jnp.arange(5.0))
    with ocp.CheckpointManager(tmp_path / "manager") as manager:
        manager.save(7, args=ocp.args.StandardSave(tree))
    given = {"standard": "standard", "pytree": "pytree", "array": "array", "manager": "manager/7"}
    module = {n: oex.convert_path_to_value(str(tmp_path / p), "orbax_checkpoint") for n, p in given.items()}
    model = save(module, tmp_path / "model")
    for name in ("standard", "pytree", "manager"):
        own = model.weights[name]
        assert own.names == ("a.half", "l.0", "l.1")
        found, structure = jax.tree.flatten(own.restore())
        assert structure == jax.tree.structure(tree)
        for a, b in zip(found, jax.tree.leaves(tree), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a, "f4"), np.asarray(b, "f4"))
    np.testing.assert_array_equal(np.asarray(model.weights["array"].restore()), np.arange(5.0))


@needs_orbax
def test_what_is_no_checkpoint(tmp_path: pathlib.Path) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "letter.txt").write_text("dear")
    module = {"params": oex.convert_path_to_value(str(tmp_path / "nothing"), "orbax_checkpoint")}
    error = refused(obmlite.ArgumentError, lambda: save(module, tmp_path / "model"))
    assert error.object == "params"
    assert "no Orbax checkpoint" in error.problem
    module = {"params": oex.convert_path_to_value("not/here", "orbax_checkpoint")}
    assert "A path is not there." in str(refused(obmlite.ArgumentError, lambda: save(module, tmp_path / "model")))


def test_a_checkpoint_without_orbax_is_carried(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "orbax", None)
    monkeypatch.delitem(sys.modules, "orbax.checkpoint", raising=False)
    (tmp_path / "model" / "my_checkpoint" / "d").mkdir(parents=True)
    (tmp_path / "model" / "my_checkpoint" / "d" / "data").write_bytes(b"\x00\x01")
    module = {**converted(), "params": oex.convert_path_to_value("my_checkpoint", "orbax_checkpoint")}
    with pytest.warns(UserWarning, match=r"params\..*pip install orbax-checkpoint"):
        model = save(module, tmp_path / "model", supplementals=orchestrated(**BOUND))
    assert list(model.supplementals) == ["params", "orchestration"]
    assert model.supplementals["params"].read("d/data") == b"\x00\x01"
    assert b'"weights_name": "params"' in model.supplementals["orchestration"].read()
    np.testing.assert_allclose(model.functions["fn"](PARAMS, X), apply(PARAMS, X), rtol=1e-6)
    assert command_line.main(["show", str(tmp_path / "model"), "params"]) == 0
    assert "install: pip install orbax-checkpoint" in capsys.readouterr().out
    module["fn"] = jax2obm.convert(apply, arguments()[1:])
    error = refused(
        obmlite.ExportError,
        lambda: save(module, tmp_path / "model", supplementals=orchestrated(**BOUND), overwrite=True),
    )
    assert "pip install orbax-checkpoint" in str(error)
    with pytest.raises(ImportError, match="pip install orbax-checkpoint"):
        jax2obm.save_checkpoint(PARAMS, tmp_path / "c")


@needs_orbax
def test_a_carried_checkpoint_is_read_later(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jax2obm.save_checkpoint(PARAMS, tmp_path / "checkpoint")
    value = oex.convert_path_to_value(str(tmp_path / "checkpoint"), "orbax_checkpoint")
    module = {**converted(pre=jax2obm.convert(prepare, (spec("u8[2,4]"),))), "params": value}
    options = obm.SaveOptions(
        supplementals=orchestrated(**BOUND, pre_processor_name="pre"), visibility={"pre": "PRIVATE"}
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "orbax", None)
        patch.delitem(sys.modules, "orbax.checkpoint", raising=False)
        with pytest.warns(UserWarning, match="read_checkpoints"):
            obm.save(module, tmp_path / "model", options)
    carried = obm.load(tmp_path / "model")
    assert not carried.weights
    model = oex.read_checkpoints(carried)
    model.save(tmp_path / "again")
    for own in (model, obm.load(tmp_path / "again")):
        np.testing.assert_allclose(own(X.astype("u1")), apply(PARAMS, X), rtol=1e-6)
        assert list(own.weights) == ["params"]
        assert not own.supplementals
        assert own.visibility["pre"] is obm.Visibility.PRIVATE
    damaged = obmlite.Model(
        {}, supplementals={"o": obmlite.Supplemental.from_bytes(b"{}", mime_type=_carried.ORCHESTRATION)}
    )
    refused(obmlite.CorruptPackageError, lambda: oex.read_checkpoints(damaged))


# --- objects and options


def test_both_names_of_the_supplementals(tmp_path: pathlib.Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    data = obm.UnstructuredData
    model = save(
        converted(),
        tmp_path / "model",
        supplementals={
            "text": obm.GlobalSupplemental(data(inlined_string="ä", mime_type="text/plain", version="3"), "text.txt"),
            "bytes": obm.GlobalSupplemental(data(inlined_bytes=b"\xff")),
            "folder": obm.GlobalSupplemental(data(file_system_location=str(tmp_path / "notes"))),
            **orchestrated(**BOUND),
        },
        supplemental_info={
            "plain": obm.GlobalSupplemental(b"1"),
            "own": obm.GlobalSupplemental(obmlite.Supplemental.from_bytes(b"2", function="fn")),
        },
    )
    found = model.supplementals
    assert set(found) == {"text", "bytes", "folder", "plain", "own"}
    text = found["text"]
    assert (text.read(), text.mime_type, text.version) == ("ä".encode(), "text/plain", "3")
    assert text.metadata == {"save_as": "text.txt"}
    assert [found["bytes"].read(), found["plain"].read(), found["own"].read()] == [b"\xff", b"1", b"2"]
    assert found["folder"].read("a.txt") == b"a"
    assert found["own"].function == "fn"
    np.testing.assert_allclose(model(X), apply(PARAMS, X), rtol=1e-6)


def test_a_list_of_functions_is_a_polymorphic_one(tmp_path: pathlib.Path) -> None:
    several = [jax2obm.convert(apply, arguments(batch)) for batch in (1, 2, "b")]
    model = save(converted(fn=several), tmp_path / "model", supplementals=orchestrated(**BOUND))
    assert [str(s) for s in model.pipeline.signatures][:2] == ["(x: f32[1,4]) -> f32[1,3]", "(x: f32[2,4]) -> f32[2,3]"]
    for batch in (1, 2, 5):
        x = np.ones((batch, 4), "f4")
        np.testing.assert_allclose(model(x), apply(PARAMS, x), rtol=1e-6)


class Visibility(enum.Enum):
    PRIVATE = 1


def test_visibility_and_devices(tmp_path: pathlib.Path) -> None:
    devices = [obm.DeviceAssignment(0, (0, 0, 1), 0), obm.DeviceAssignment(1, (0, 1, 1), 1)]
    module = converted(pre=jax2obm.convert(prepare, (spec("u8[2,4]"),)))
    visible = {"fn": "PRIVATE", "pre": Visibility.PRIVATE, "params": obm.Visibility.PUBLIC}
    model = save(
        module, tmp_path / "model", visibility=visible, device_assignment_by_coords=devices, save_shlo_to_file=True
    )
    assert [n for n, v in model.visibility.items() if v is obm.Visibility.PRIVATE] == ["fn", "pre"]
    assert [(d.id, d.coords, d.core_on_chip) for d in model.device_assignment] == [(0, (0, 0, 1), 0), (1, (0, 1, 1), 1)]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    assert [d.id for d in obm.mesh_to_device_assignment(mesh)] == [0]
    refused(obmlite.ArgumentError, lambda: obm.DeviceAssignment(0, (0, 0, 1)))  # both or neither
    refused(obmlite.ArgumentError, lambda: save(module, tmp_path / "b", visibility={"fn": "SECRET"}))


def test_what_is_converted() -> None:
    class Platform(enum.Enum):
        CPU = 1

    function = jax2obm.convert(jax.jit(apply), arguments("b"), {}, platforms=[Platform.CPU])
    assert isinstance(function, obmlite.Function)
    assert str(function.signature) == "(params: {b: f32[3], w: f32[4,3]}, x: f32[b,4]) -> f32[b,3]"
    assert list(function.module.platforms) == ["cpu"]
    keywords = jax2obm.convert(lambda x, *, y: x + y, (spec("f32[2]"),), {"y": spec("f32[2]")})
    assert str(keywords.signature) == "(x: f32[2], *, y: f32[2]) -> f32[2]"
    check = jax.export.DisabledSafetyCheck
    jax2obm.convert(apply, arguments(), native_serialization_disabled_checks=[check.custom_call("mine")])
    refused(
        obmlite.ExportError,
        lambda: jax2obm.convert(apply, arguments(), native_serialization_disabled_checks=[check.platform()]),
    )
    refused(obmlite.ExportError, lambda: jax2obm.convert(apply, arguments(), platforms=["abacus"]))


@pytest.mark.parametrize(
    ("module", "options", "problem"),
    [
        ({"fn": 3}, {}, "another kind"),
        ({"fn": []}, {}, "another kind"),
        ({"fn": jax2obm.convert(apply, (spec("f32[2,4]"),))}, {}, "one argument more"),
        ({}, {"version": 1}, "no such version"),
        ({}, {"supplementals": {"a": b""}}, "another kind"),
        ({}, {"supplementals": {"a": obm.GlobalSupplemental(3)}}, "another kind"),
        ({}, {"supplementals": {"a": obm.GlobalSupplemental(obm.UnstructuredData())}}, "one of three"),
        (
            {},
            {"supplementals": {"a": obm.GlobalSupplemental(obm.UnstructuredData("b", inlined_bytes=b""))}},
            "one of three",
        ),
        ({}, {"supplementals": {"a": obm.GlobalSupplemental(obm.UnstructuredData("../no/where"))}}, "not there"),
        (
            {},
            {
                "supplementals": {"a": obm.GlobalSupplemental(b"")},
                "supplemental_info": {"a": obm.GlobalSupplemental(b"")},
            },
            "given twice",
        ),
        ({}, {"supplementals": orchestrated(model_function_name="fn", weights_name="w")}, "weights that are not there"),
        ({}, {"supplementals": orchestrated(model_function_name="fn")}, "function that is not there"),
        ({}, {"supplementals": orchestrated()}, "no steps"),
        ({}, {"visibility": {"a": "PRIVATE"}}, "private is not there"),
    ],
)
def test_what_is_refused(module: dict[str, Any], options: dict[str, Any], problem: str, tmp_path: pathlib.Path) -> None:
    error = refused(obmlite.ObmliteError, lambda: save(module, tmp_path / "model", **options))
    assert problem in error.problem
    assert not (tmp_path / "model").exists()


def test_neighbours_that_do_not_fit(tmp_path: pathlib.Path) -> None:
    module = converted(pre=jax2obm.convert(lambda image: image, (spec("u8[2,4]"),)))
    plan = orchestrated(**BOUND, pre_processor_name="pre")
    error = refused(obmlite.ArgumentError, lambda: save(module, tmp_path / "model", supplementals=plan))
    assert "u8[2,4], as pre" in str(error)
    assert error.object == "orchestration"


# --- where it is saved


def test_a_directory_that_holds_something_else(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "letter.txt").write_text("dear")
    refused(obmlite.PackageExistsError, lambda: save(converted(), target))
    assert os.listdir(target) == ["letter.txt"]
    (target / "weights").mkdir()
    named = obm.GlobalSupplemental(obm.UnstructuredData("letter.txt"))
    folder = obm.GlobalSupplemental(obm.UnstructuredData("weights"))
    error = refused(
        obmlite.PackageExistsError, lambda: save(converted(), target, supplementals={"a": named, "b": folder})
    )
    assert error.found == "weights"
    assert sorted(os.listdir(tmp_path)) == ["model"]
    (target / "weights").rmdir()
    model = save(converted(), target, supplementals={"a": named})
    assert model.supplementals["a"].read() == b"dear"


def test_a_package_is_replaced_only_if_asked(tmp_path: pathlib.Path) -> None:
    save(converted(), tmp_path / "model")
    refused(obmlite.PackageExistsError, lambda: save(converted(), tmp_path / "model"))
    model = save(converted(), tmp_path / "model", supplementals=orchestrated(**BOUND), overwrite=True)
    np.testing.assert_allclose(model(X), apply(PARAMS, X), rtol=1e-6)


# --- the document


def test_the_document_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "orbax_model.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests/)?[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 30
    for file, name in named:
        path = ROOT / "tests" / file
        assert path.exists(), file
        assert re.search(rf"^(    )?def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE), (file, name)
