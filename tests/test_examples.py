"""The demo, as ``make demo`` runs it but with less training."""

import pathlib
import re
import struct
import subprocess
import sys

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
