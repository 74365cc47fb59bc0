"""The demo, as ``make demo`` runs it but with less training, and the examples of models that are served and reused."""

import pathlib
import re
import struct
import subprocess
import sys

import jax
import numpy as np
import pytest

import obmlite

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(*arguments, cwd):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What the demo printed, and the directory that it wrote; run twice, as a user would."""
    directory = tmp_path_factory.mktemp("demo")
    for steps in (1, 200):
        # One step trains nothing: the demo must say so by its exit status.
        done = run("-W", "error", EXAMPLES / "digits.py", "--out", "out", "--steps", steps, cwd=directory)
        assert done.returncode == (steps == 1), done.stdout + done.stderr
        assert "bitwise equal to the trained model: yes\n" in done.stdout
    assert done.stderr == ""
    return done.stdout, directory / "out"


def test_accuracy(demo):
    text, _ = demo
    found = re.search(r"^accuracy on 360 held-out digits: (\d\.\d+)$", text, re.MULTILINE)
    assert 0.95 <= float(found[1]) <= 1


def test_every_batch_size_is_equal(demo):
    text, _ = demo
    assert re.findall(r"batch of +(\d+): logits equal\n", text) == ["1", "7", "64", "360"]
    assert "digits_model cannot be imported here" in text


def test_listing(demo):
    text, _ = demo
    assert "obmlite show out/digits.obm" in text
    assert "images: f32[b,8,8,1]) -> f32[b,10]" in text
    assert "cpu, cuda, tpu" in text


def test_picture(demo):
    _, directory = demo
    data = (directory / "digits.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert 800 <= width <= 2000
    assert 400 <= height <= 2000
    assert len(data) > 10_000


def test_package(demo):
    _, directory = demo
    model = obmlite.load(directory / "digits.obm")
    assert model.metadata["classes"] == [str(n) for n in range(10)]
    assert model(np.zeros((3, 8, 8, 1), np.float32)).shape == (3, 10)


def test_different_logits_are_noticed(demo, tmp_path):
    _, directory = demo
    with np.load(directory / "digits.npz") as file:
        arrays = dict(file)
    arrays["logits_7"] = np.nextafter(arrays["logits_7"], np.float32(np.inf))
    np.savez(tmp_path / "changed.npz", **arrays)
    use = EXAMPLES / "digits_use.py"
    done = run("-I", use, directory / "digits.obm", "changed.npz", "digits.png", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "batch of   7: logits DIFFERENT" in done.stdout
    assert "bitwise equal to the trained model: no\n" in done.stdout


def test_training_code_must_not_be_importable(demo, tmp_path):
    _, directory = demo
    # Without -I the script's own directory, and with it the training module, is on the path.
    use = EXAMPLES / "digits_use.py"
    done = run(use, directory / "digits.obm", directory / "digits.npz", tmp_path / "digits.png", cwd=tmp_path)
    assert done.returncode != 0
    assert "the training code can be imported here" in done.stderr


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """What mnist.py printed for two versions, and for the highest again, and the directory that it wrote."""
    directory = tmp_path_factory.mktemp("mnist")
    calls = {
        "symbolic": ["--num_epochs", 1, "--serving_batch_size=-1", "--model", "flax", "--model_version", 9],
        "fixed": ["--num_epochs", 4, "--serving_batch_size", "1,16"],
        "again": ["--nogenerate_model"],
    }
    texts = {}
    for name, arguments in calls.items():
        done = run("-W", "error", EXAMPLES / "mnist.py", "--model_path", "out", *arguments, cwd=directory)
        assert done.returncode == 0, done.stdout + done.stderr
        texts[name] = done.stdout
    return texts, directory / "out"


def accuracy(text):
    return float(re.search(r"^accuracy on \d+ held-out digits: (\d\.\d+)$", text, re.MULTILINE)[1])


@pytest.mark.long
def test_mnist_saves_batches_of_fixed_sizes(mnist):
    texts, directory = mnist
    assert "saved out/mnist/10\n" in texts["fixed"]  # the next number
    model = obmlite.load(directory / "mnist")
    assert [str(s.input_specs[0]) for s in model.pipeline.signatures] == ["f32[1,8,8,1]", "f32[16,8,8,1]"]
    assert "0 of 170 " in texts["fixed"]  # 17 rows of ten numbers were compared
    assert accuracy(texts["fixed"]) > 0.9


@pytest.mark.long
def test_mnist_saves_one_function_for_every_batch_size(mnist):
    texts, directory = mnist
    assert "saved out/mnist/9\n" in texts["symbolic"]
    model = obmlite.load(directory / "mnist", version=9)
    assert str(model.signature.input_specs[0]) == "f32[b,8,8,1]"
    assert model(np.zeros((3, 8, 8, 1), np.float32)).shape == (3, 10)


@pytest.mark.long
def test_mnist_without_training_uses_the_highest_version(mnist):
    texts, directory = mnist
    assert "epoch" in texts["fixed"]
    assert "epoch" not in texts["again"]
    assert "Model at out/mnist/10\n" in texts["again"]
    assert accuracy(texts["again"]) == accuracy(texts["fixed"])
    assert (directory / "mnist.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.long
def test_reuse(tmp_path):
    texts, trained = {}, {}
    for name, arguments in {"frozen": ["--model", "flax"], "finetuned": ["--finetune"]}.items():
        small = ["--model_path", "out", "--num_epochs", 2, "--steps", 60]
        done = run("-W", "error", EXAMPLES / "reuse.py", *small, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        texts[name] = done.stdout
        trained[name] = obmlite.load(tmp_path / "out" / "odd.obm").weights["params"]
    assert "saved out/mnist_features/1\n" in texts["frozen"]
    assert "saved out/mnist_features" not in texts["finetuned"]  # it is there
    changes = {
        name: dict(re.findall(r"^largest change of the (\w+)'s parameters: (\S+)$", text, re.MULTILINE))
        for name, text in texts.items()
    }
    assert float(changes["frozen"]["extractor"]) == 0 < float(changes["frozen"]["head"])
    assert float(changes["finetuned"]["extractor"]) > 0 < float(changes["finetuned"]["head"])
    assert all(accuracy(text) > 0.85 for text in texts.values())
    extractor = obmlite.load(tmp_path / "out" / "mnist_features").weights["variables"]
    assert not any("classifier" in name for name in extractor.names)
    loaded = jax.tree.leaves(extractor.restore())
    for name, weights in trained.items():
        found = jax.tree.leaves(weights.at("extractor").restore())
        equal = [bool((a == b).all()) for a, b in zip(found, loaded, strict=True)]
        assert equal == [name == "frozen"] * len(equal)


@pytest.mark.long
def test_serving_pipeline(tmp_path):
    done = run("-W", "error", EXAMPLES / "serving_pipeline.py", "--out", "out", "--steps", 30, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bitwise equal to the three parts in one jax.jit: yes\n" in done.stdout
    assert "the empty image: no digit\n" in done.stdout
    assert accuracy(done.stdout) > 0.5
    model = obmlite.load(tmp_path / "out" / "serving.obm")
    answer = model(**model.examples["serving_default"][0])
    assert (int(answer["digit"][0]), float(answer["probability"][0])) == (-1, 1.0)
