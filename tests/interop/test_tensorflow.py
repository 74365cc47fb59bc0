"""TensorFlow's functions as steps of pipelines: with TensorFlow in its own environment, without it everywhere."""

from __future__ import annotations

import collections
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

import obmlite
from obmlite import Pipeline, Supplemental, Weights, spec
from obmlite import cli as command_line
from obmlite.interop import tensorflow as interop
from obmlite.interop import tensorflow_steps as steps

pytestmark = [
    # Of TensorFlow and of what it imports.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PARAMS = {"w": np.arange(12, dtype="f4").reshape(4, 3) % 5}


def apply(params: Any, x: Any) -> Any:
    return jax.nn.one_hot(x, 4) @ params["w"]


def objects() -> dict[str, Any]:
    return {"apply": obmlite.export(apply, PARAMS, spec("i32[b]")), "params": Weights(PARAMS)}


def pipelines(**options: Any) -> dict[str, Pipeline]:
    bound = {"params": "params"}
    return {
        "texts": Pipeline(pre=["look up"], function="apply", post=["label"], weights=bound, **options),
        "numbers": Pipeline(function="apply", weights=bound),
    }


def refused(kind: type[obmlite.ObmliteError], make: Callable[[], Any]) -> obmlite.ObmliteError:
    with pytest.raises(kind) as caught:
        make()
    return caught.value


# --- without TensorFlow


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # so that importing it fails


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> Supplemental:
    (tmp_path / "tf" / "assets").mkdir(parents=True)
    (tmp_path / "tf" / "saved_model.pb").write_bytes(b"of TensorFlow")
    (tmp_path / "tf" / "assets" / "words.txt").write_text("hello\n")
    return interop.from_saved_model(tmp_path / "tf")


def by_hand(folder: Supplemental) -> dict[str, Supplemental]:
    return {
        "look up": interop.handle("look_up", {"texts": "string[n]"}, "i32[n]", saved_model="tf"),
        "label": interop.handle("label", {"logits": "f32[m,3]"}, {"label": "string[m]"}, saved_model="tf"),
        "tf": folder,
    }


def test_without_tensorflow_all_but_its_steps_works(
    absent: None, folder: Supplemental, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    obmlite.Model(objects(), pipelines=pipelines(), supplementals=by_hand(folder)).save(tmp_path / "m.obm")
    model = obmlite.load(tmp_path / "m.obm")
    x = np.array([1, 3], "i4")
    np.testing.assert_allclose(model.pipelines["numbers"](x), apply(PARAMS, x))
    texts = model.pipelines["texts"]
    assert str(texts.signature) == "(texts: string[n]) -> {label: string[n]}"
    with pytest.raises(ImportError, match=r"'look up'.* pip install 'obmlite\[tensorflow\]'"):
        texts(["hello"])
    np.save(tmp_path / "texts.npy", np.array(["hello"]))
    assert command_line.main(["run", str(tmp_path / "m.obm"), "texts", "--input", f"{tmp_path}/texts.npy"]) == 1
    assert "pip install 'obmlite[tensorflow]'" in capsys.readouterr().err
    assert command_line.main(["show", str(tmp_path / "m.obm")]) == 0
    shown = capsys.readouterr().out
    assert "texts: look up → apply, params = params → label" in shown
    assert "tf: directory of 2 files" in shown
    assert model.supplementals["tf"].read("assets/words.txt") == b"hello\n"


@pytest.mark.parametrize(
    "call",
    [
        lambda: interop.save_functions("nowhere", {}),
        lambda: interop.convert_function("f", None),
        lambda: interop.tf_specs_to_jax({}),
    ],
    ids=["save_functions", "convert_function", "tf_specs_to_jax"],
)
def test_what_needs_tensorflow_says_so(absent: None, call: Callable[[], Any]) -> None:
    with pytest.raises(ImportError, match="needs TensorFlow: pip install"):
        call()


def test_a_handle_comes_back() -> None:
    arguments = {"z": ("string[b,2*b]", [None, "bf16[]"]), "a": {3: "f32[7]", 5: "i64[b]"}}
    inputs = ("one", "two", "three", "four")
    made = interop.handle("f", arguments, ("string[]", {"o": "u8[b]"}), inputs=inputs, outputs=("p", "q"))
    handle = steps.Handle.of(made)
    assert handle == steps.Handle(
        "f", "tensorflow_saved_model", arguments, ("string[]", {"o": "u8[b]"}), inputs, ("p", "q")
    )
    assert handle.signature().arguments == ("z", "a")  # in the order in which they were given
    assert [str(s) for s in handle.signature().input_specs] == ["string[b,2*b]", "bf16[]", "f32[7]", "i64[b]"]
    assert made.form.name == "INLINE"


@pytest.mark.parametrize(
    ("arguments", "result", "options"),
    [
        ({"x": "string[b"}, "f32[b]", {}),
        ({"x": "stringy[b]"}, "f32[b]", {}),
        ({"x": "f32[b]"}, "f32[b]", {"inputs": ["a", "b"]}),
        ({"x": "f32[b]", "y": "f32[b]"}, "f32[b]", {"inputs": ["a", "a"]}),
        ({"x": "f32[b]"}, ["f32[b]", "f32[]"], {"outputs": ["one"]}),
        ({"x": "f32[b]"}, 7j, {}),
    ],
)
def test_handles_that_say_nothing(arguments: Any, result: Any, options: Any) -> None:
    refused(obmlite.ObmliteError, lambda: interop.handle("f", arguments, result, **options))


def changed(**changes: Any) -> bytes:
    good = {"function": "f", "saved_model": "tf", "arguments": {"x": "string[]"}, "result": "f32[]"}
    return msgpack.packb({**good, "inputs": ["x"], "outputs": ["y"], **changes})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        changed()[:-3],
        changed(more=1),
        changed(function=3),
        changed(inputs=[None]),
        changed(inputs=7),
        changed(outputs=[]),
        changed(arguments=["x"]),
        changed(arguments={"x": 5.0}),
        changed(arguments={3: "f32[]"}),
        changed(result="f32[!]"),
        changed(result=b"f32[]"),
    ],
)
def test_damaged_handles(data: bytes) -> None:
    assert steps.Handle.of(Supplemental.from_bytes(changed(), mime_type=steps.HANDLE, version="1")).function == "f"
    damaged = Supplemental.from_bytes(data, mime_type=steps.HANDLE, version="1")
    refused(obmlite.CorruptPackageError, lambda: steps.Handle.of(damaged))


def test_a_handle_of_another_version() -> None:
    later = Supplemental.from_bytes(changed(), mime_type=steps.HANDLE, version="2")
    assert "version '2'" in str(refused(obmlite.CorruptPackageError, lambda: steps.Handle.of(later)))


def test_its_saved_model_must_be_there(folder: Supplemental) -> None:
    own = by_hand(folder)
    others = {"look up": own["look up"], "label": own["label"]}
    error = refused(
        obmlite.ArgumentError,
        lambda: obmlite.Model(objects(), pipelines=pipelines(), supplementals={**others, "TF": folder}),
    )
    assert (error.expected, error.found) == ("TF", "tf")
    file = Supplemental.from_bytes(b"", mime_type=steps.SAVED_MODEL)
    refused(
        obmlite.ArgumentError,
        lambda: obmlite.Model(objects(), pipelines=pipelines(), supplementals={**others, "tf": file}),
    )


def test_neighbours_that_do_not_fit_show_both_sides(folder: Supplemental) -> None:
    own = {**by_hand(folder), "look up": interop.handle("f", {"texts": "string[n]"}, "string[n]", saved_model="tf")}
    error = refused(obmlite.ArgumentError, lambda: obmlite.Model(objects(), pipelines=pipelines(), supplementals=own))
    assert "i32[b], as apply(x: i32[b]) -> f32[b,3] takes it" in str(error)
    assert "string[n], as look up -> string[n] gives it" in str(error)


def test_a_directory_without_a_saved_model(tmp_path: pathlib.Path) -> None:
    assert "no SavedModel" in str(refused(obmlite.ExportError, lambda: interop.from_saved_model(tmp_path)))


def signature(**arguments: Any) -> steps.TextSignature:
    return steps.Handle.of(interop.handle("f", arguments, "f32[]")).signature()


@pytest.mark.parametrize(
    "given",
    [
        ["ä", b"\x00b\x00"],
        ("ä", "\x00b\x00"),
        np.array(["ä".encode(), b"\x00b\x00"], object),
        np.array(["ä", "\x00b\x00"], object),
    ],
)
def test_texts_are_bytes_of_any_length(given: Any) -> None:
    [found] = signature(texts="string[n]").match({"texts": given})
    assert found.dtype == object
    assert found.tolist() == ["ä".encode(), b"\x00b\x00"]


def test_texts_and_numbers_together() -> None:
    own = signature(q={"texts": "string[n,2]", "scale": "f32[]"}, title="string[]")
    arguments = {"q": {"texts": np.array([["a", "b"]]), "scale": 2.0}, "title": "c"}
    scale, texts, title = own.match(arguments)
    assert (float(scale), texts.tolist(), title.shape, title.item()) == (2.0, [[b"a", b"b"]], (), b"c")


@pytest.mark.parametrize("given", [[1], [None], 3.0, [["a"]], "a", ["a", ["b"]], {"texts": ["a"]}, np.zeros(3)])
def test_what_is_no_texts(given: Any) -> None:
    error = refused(obmlite.ArgumentError, lambda: signature(texts="string[n]").match({"texts": given}))
    assert error.leaf
    assert error.leaf.startswith("texts")


def test_numbers_match_as_in_any_signature() -> None:
    own = signature(x="i32[b]", y="i32[b]")
    x, y = own.match(
        {"x": np.arange(3), "y": jnp.arange(4)}
    )  # numpy's 64 bits as under jit; b is TensorFlow's to check
    assert (x.shape, y.shape) == ((3,), (4,))
    for wrong in (np.array(["1"]), np.array([object()]), np.zeros(3, "f4"), "text", [1, 2], np.zeros((2, 2), "i4")):
        error = refused(obmlite.ArgumentError, lambda wrong=wrong: own.match({"x": wrong, "y": np.zeros(1, "i4")}))
        assert error.leaf
        assert error.leaf.startswith("x")


# --- with TensorFlow


@pytest.fixture(scope="module")
def tf() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return pytest.importorskip("tensorflow", reason="runs in TensorFlow's own environment")


WORDS = ["hello", "world", "ä"]
LABELS = ["bad", "good", "neutral"]


@pytest.fixture
def functions(tf: Any, tmp_path: pathlib.Path) -> dict[str, Any]:
    """Functions over a table from a file, and what they use."""
    words = tmp_path / "words.txt"
    words.write_text("\n".join(WORDS), encoding="utf-8")
    line, number = tf.lookup.TextFileIndex.WHOLE_LINE, tf.lookup.TextFileIndex.LINE_NUMBER
    table = tf.lookup.StaticHashTable(
        tf.lookup.TextFileInitializer(str(words), tf.string, line, tf.int64, number), default_value=3
    )
    labels = tf.Variable(LABELS)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def look_up(texts: Any) -> Any:
        return table.lookup(texts), texts

    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32), tf.TensorSpec([None], tf.string)])
    def label(logits: Any, texts: Any) -> Any:
        return {"label": tf.gather(labels, tf.argmax(logits, -1)), "text": tf.strings.upper(texts, encoding="utf-8")}

    return {"look up": look_up, "label": label, "resources": (table, {"labels": labels}), "words": words}


def save(functions: dict[str, Any], folder: pathlib.Path, **options: Any) -> dict[str, Supplemental]:
    given = {"look up": functions["look up"], "label": functions["label"].get_concrete_function()}
    given = {"resources": functions["resources"], "narrow": True, **options, "functions": given}
    return interop.save_functions(folder / "saved_model", **given)


def expected(texts: list[str]) -> dict[str, list[bytes]]:
    ids = np.array([WORDS.index(t) if t in WORDS else 3 for t in texts])
    best = np.argmax(np.asarray(apply(PARAMS, ids)), -1)
    return {"label": [LABELS[n].encode() for n in best], "text": [t.upper().encode() for t in texts]}


def test_texts_in_labels_out(functions: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    supplementals = save(functions, tmp_path)
    assert list(supplementals) == ["look up", "label", "tensorflow_saved_model"]
    assert interop.function_names(tmp_path / "saved_model") == ("label", "look up")
    model = obmlite.Model(objects(), pipelines=pipelines(pass_through=True), supplementals=supplementals)
    model.save(tmp_path / "m.obm")
    texts = ["world", "hello", "?", "ä"]
    loaded = obmlite.load(tmp_path / "m.obm")
    for own in (model, loaded):
        pipeline = own.pipelines["texts"]
        assert str(pipeline.signature) == "(texts: string[b]) -> {label: string[b], text: string[b]}"
        found = pipeline(texts)
        assert {name: value.tolist() for name, value in found.items()} == expected(texts)

    np.save(tmp_path / "texts.npy", np.array(texts))
    output = f"label={tmp_path}/label.npy"
    arguments = [str(tmp_path / "m.obm"), "texts", "--input", f"texts={tmp_path}/texts.npy"]
    assert command_line.main(["run", *arguments, "--output", output]) == 0
    assert np.load(tmp_path / "label.npy").tolist() == [b.decode() for b in expected(texts)["label"]]
    assert command_line.main(["run", *arguments]) == 0
    assert "label: string[4]" in capsys.readouterr().out


CHILD = """
import json, sys
import obmlite
found = obmlite.load(sys.argv[1]).pipelines["texts"](json.loads(sys.argv[2]))
print(json.dumps({name: [text.decode() for text in value] for name, value in found.items()}))
"""


def test_another_process_needs_only_the_package(functions: Any, tmp_path: pathlib.Path) -> None:
    import json
    import shutil

    model = obmlite.Model(objects(), pipelines=pipelines(pass_through=True), supplementals=save(functions, tmp_path))
    model.save(tmp_path / "m.obm")
    functions["words"].unlink()
    shutil.rmtree(tmp_path / "saved_model")
    texts = ["ä", "no", "world"]
    command = [sys.executable, "-c", CHILD, str(tmp_path / "m.obm"), json.dumps(texts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: [t.encode() for t in value] for name, value in found.items()} == expected(texts)


def test_changed_bytes_never_reach_tensorflow(functions: Any, tmp_path: pathlib.Path) -> None:
    model = obmlite.Model(objects(), pipelines=pipelines(pass_through=True), supplementals=save(functions, tmp_path))
    model.save(tmp_path / "m.obm")
    [words] = [p for p in (tmp_path / "m.obm").rglob("*") if "words" in p.name]
    words.write_bytes(words.read_bytes().replace(b"hello", b"jello"))
    pipeline = obmlite.load(tmp_path / "m.obm").pipelines["texts"]
    assert "digest" in str(refused(obmlite.CorruptPackageError, lambda: pipeline(["hello"])))


def test_a_missing_function_names_those_that_are_there(functions: Any, tmp_path: pathlib.Path) -> None:
    own = {
        **save(functions, tmp_path),
        "look up": interop.handle("lookup", {"texts": "string[n]"}, ("i32[n]", "string[n]")),
    }
    model = obmlite.Model(objects(), pipelines=pipelines(pass_through=True), supplementals=own)
    error = refused(obmlite.ArgumentError, lambda: model.pipelines["texts"](["hello"]))
    assert (error.expected, error.found) == ("label, look up", "lookup")
    own["look up"] = interop.handle(
        "look up", {"texts": "string[n]"}, ("i32[n]", "string[n]"), inputs=["input_0"], outputs=["output_0", "ids"]
    )
    model = obmlite.Model(objects(), pipelines=pipelines(pass_through=True), supplementals=own)
    error = refused(obmlite.ArgumentError, lambda: model.pipelines["texts"](["hello"]))
    assert (error.expected, error.found) == ("output_0, output_1", "ids")


def test_resources_that_were_not_given(functions: Any, tmp_path: pathlib.Path) -> None:
    error = refused(obmlite.ExportError, lambda: save(functions, tmp_path, resources=()))
    assert "resources=" in str(error)


def test_a_saved_model_is_not_written_over(functions: Any, tmp_path: pathlib.Path) -> None:
    save(functions, tmp_path)
    refused(obmlite.PackageExistsError, lambda: save(functions, tmp_path))
    save(functions, tmp_path, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    refused(obmlite.PackageExistsError, lambda: interop.save_functions(tmp_path / "other", {}, overwrite=True))
    assert (tmp_path / "other" / "letter.txt").exists()


def test_results_of_64_bits(functions: Any, tmp_path: pathlib.Path) -> None:
    own = save(functions, tmp_path, narrow=False)
    assert [str(s) for s in steps.Handle.of(own["look up"]).signature().output_specs] == ["i64[b]", "string[b]"]
    error = refused(
        obmlite.ArgumentError,
        lambda: obmlite.Model(objects(), pipelines=pipelines(pass_through=True), supplementals=own),
    )
    assert "i64[b], as look up" in str(error)


Point = collections.namedtuple("Point", "x y")


def test_any_arguments_and_results(tf: Any, tmp_path: pathlib.Path) -> None:
    @tf.function
    def f(a: Any, many: Any, times: Any, *, scale: Any, power: Any = 2) -> Any:
        point = Point(a * scale, tf.cast(many["k"][0], tf.float32) ** power)
        return {"z": point, "list": [many["k"][1], None], "all": (a + float(times),)}

    number = tf.TensorSpec([], tf.float32)
    many = {"k": [tf.TensorSpec([None, 2], tf.int32), tf.TensorSpec([2, None], tf.bfloat16)]}
    concrete = f.get_concrete_function(number, many, 3, scale=tf.TensorSpec([None], tf.float32))
    own = interop.save_functions(tmp_path / "tf", {"f": concrete})
    assert "power" not in str(steps.Handle.of(own["f"]))
    model = obmlite.Model({}, pipelines={"p": Pipeline(pre=["f"])}, supplementals=own)
    text = str(model.signature)
    assert text.startswith("(a: f32[], many: {…2 leaves}, scale: f32[b]) -> {…4 leaves}"), text
    half = jnp.ones((2, 5), jnp.bfloat16)
    found = model(2.0, {"k": [np.array([[1, 2]], "i4"), half]}, scale=jnp.array([1.0, 3.0]))
    np.testing.assert_array_equal(found["z"][0], [2, 6])
    np.testing.assert_array_equal(found["z"][1], [[1, 4]])
    assert found["list"][0].dtype == jnp.bfloat16
    assert found["list"][1] is None
    np.testing.assert_array_equal(found["all"][0], 5)
    error = refused(obmlite.ArgumentError, lambda: model(2.0, {"k": [half, half]}, scale=jnp.ones(1)))
    assert (error.leaf, error.found) == ("many.k.0", "bf16[2,5]")


def test_what_cannot_be_described(tf: Any, tmp_path: pathlib.Path) -> None:
    def save_one(function: Any) -> Any:
        return interop.save_functions(tmp_path / "tf", {"f": function})

    no_rank = tf.function(lambda x: x, input_signature=[tf.TensorSpec(None, tf.float32)])
    ragged = tf.function(lambda x: tf.RaggedTensor.from_tensor(x), input_signature=[tf.TensorSpec([2, 2], tf.float32)])
    mixed = tf.function(lambda x: x[0]).get_concrete_function([tf.TensorSpec([], tf.float32), 3])
    for function, kind, problem in (
        (tf.function(lambda x: x), obmlite.ExportError, "no single signature"),
        (lambda x: x, obmlite.ExportError, "no single signature"),
        (no_rank, obmlite.ExportError, "rank is not known"),
        (ragged, obmlite.LeafError, "RaggedTensor"),
        (mixed, obmlite.ExportError, "tensors and other things"),
    ):
        error = refused(kind, lambda function=function: save_one(function))
        assert problem in str(error)
        assert error.object == "f"
    assert not (tmp_path / "tf").exists()
    taken = {"tensorflow_saved_model": no_rank}
    refused(obmlite.ExportError, lambda: interop.save_functions(tmp_path / "tf", taken))


def test_specs_become_jaxs(tf: Any) -> None:
    a, b = tf.TensorSpec([None, 28, None], tf.float32), tf.TensorSpec([None], tf.bfloat16)
    args, kwargs = interop.tf_specs_to_jax({"x": a, "y": [b]})
    assert (args, list(kwargs)) == ((), ["x", "y"])
    assert [str(x) for x in (kwargs["x"].shape, kwargs["x"].dtype)] == ["(b, 28, d_0)", "float32"]
    assert kwargs["x"].shape[0] == kwargs["y"][0].shape[0]  # one scope
    assert kwargs["y"][0].dtype == jnp.bfloat16
    for tree, shape in (((a, b), (2, 0)), ([a, {"k": b}], (1, 1)), (a, (1, 0)), (((a,), {"k": b}), (1, 1))):
        found = interop.tf_specs_to_jax(tree)
        if tree == [a, {"k": b}]:
            assert (len(found[0]), found[1]) == (2, {})  # its first is no list of arguments
            continue
        assert (len(found[0]), len(found[1])) == shape
    error = refused(
        obmlite.LeafError, lambda: interop.tf_specs_to_jax({"x": a, "id": tf.TensorSpec([None], tf.string)})
    )
    assert (error.leaf, error.found) == ("id", "string[b]")
    assert "pass_through" in str(error)


def test_a_step_is_not_traced(functions: Any, tmp_path: pathlib.Path) -> None:
    model = obmlite.Model({}, pipelines={"p": Pipeline(pre=["label"])}, supplementals=save(functions, tmp_path))
    error = refused(obmlite.ArgumentError, lambda: jax.jit(lambda x: model(x, ["a", "b"]))(jnp.ones((2, 3))))
    assert "jax.jit" in str(error)
