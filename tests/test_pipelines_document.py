"""docs/pipelines.md says what is so: its code runs, and does what the text says."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from obmlite import cli

DOCUMENT = (pathlib.Path(__file__).parent.parent / "docs" / "pipelines.md").read_text()


def block(having, language="python"):
    """The one block of code that has a text in it."""
    found = [b for b in re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE) if having in b]
    assert len(found) == 1
    return found[0]


def normalise(stats, image):
    return (image / 255.0 - stats["mean"])[..., None]


def apply(params, x):
    return x.reshape(x.shape[0], -1) @ params["kernel"]


def label(logits):
    return jnp.argmax(logits, -1)


@pytest.fixture
def names():
    """What the document's names stand for."""
    draw = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(draw.normal(size=(784, 10)), jnp.float32)}
    return {
        "obmlite": obmlite,
        "normalise": normalise,
        "apply": apply,
        "label": label,
        "params": params,
        "stats": {"mean": jnp.float32(0.25)},
        "images": draw.integers(0, 256, (5, 28, 28)).astype(np.uint8),
    }


@pytest.fixture
def digits(names, tmp_path, monkeypatch):
    """The document's first model, saved."""
    monkeypatch.chdir(tmp_path)
    exec(block('model.save("digits.obm")'), names)
    return names


def test_a_pipeline(digits):
    expected = label(apply(digits["params"], normalise(digits["stats"], digits["images"])))
    np.testing.assert_array_equal(obmlite.load("digits.obm")(digits["images"]), expected)
    np.testing.assert_array_equal(obmlite.load("digits.obm").pipelines["serving_default"](digits["images"]), expected)


def test_the_error_of_steps_that_do_not_fit(names):
    code = block('model.save("digits.obm")').partition("model.save")[0]
    names["normalise"] = lambda stats, image: normalise(stats, image)[..., 0]
    with pytest.raises(obmlite.ArgumentError) as caught:
        exec(code, names)
    assert f"ArgumentError: {caught.value}\n" == block("ArgumentError", "text")


def test_a_polymorphic_function(names):
    exec(block("symbol_values="), names)
    sizes = [str(s.input_specs[0]) for s in names["model"].pipeline.signatures]
    assert sizes == ["f32[1,28,28,1]", "f32[16,28,28,1]", "f32[128,28,28,1]", "f32[b,28,28,1]"]


def test_padding_to_the_next_size(names):
    exec(block("symbol_values=").replace("128, None", "128"), names)
    x = np.ones((17, 28, 28, 1), np.float32)
    np.testing.assert_array_equal(names["model"].pipeline.padded()(x), apply(names["params"], x))


def test_supplementals(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved_model" / "variables").mkdir(parents=True)
    (tmp_path / "saved_model" / "saved_model.pb").write_bytes(b"graph")
    (tmp_path / "saved_model" / "variables" / "data").write_bytes(b"values")
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    given = eval(f"dict({block('from_bytes')})".replace('b"…"', 'b"# card"'), names)["supplementals"]
    objects = {"apply": obmlite.export(apply, names["params"], obmlite.spec("f32[b,784]"))}
    obmlite.Model(objects, supplementals=given).save("m.obm")
    loaded = obmlite.load("m.obm").supplementals
    assert loaded["tf"].read("variables/data") == b"values"
    with loaded["tf"].open("saved_model.pb") as stream:
        assert stream.read() == b"graph"
    assert (loaded["vocabulary"].read(), loaded["card"].read()) == (b"a\nb\n", b"# card")
    loaded["tf"].extract("copy")
    assert (tmp_path / "copy" / "variables" / "data").read_bytes() == b"values"


def test_validation_and_the_command_line(digits, capsys):
    model, images = digits["model"], digits["images"]
    same = {"model": model, "x": images, "y": images[:2]}
    same["apply_with_params"] = lambda image: label(apply(digits["params"], normalise(digits["stats"], image)))
    exec(block("report = model.validate"), same)
    assert same["report"].passed
    np.save("images.npy", images)
    for line in block("obmlite run", "console").splitlines():
        if line.startswith("$ obmlite ") and "extract" not in line and "diff" not in line:
            words = line.split()[2:]
            if "--output" in words:
                words[words.index("--output") + 1] = "labels.npy"  # the one result of this pipeline has no name
            assert cli.main(words) == 0, capsys.readouterr()
    np.testing.assert_array_equal(np.load("labels.npy"), model(images))
