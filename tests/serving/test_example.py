"""examples/serving: its requests, and the whole walk-through with less training."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import obmlite
from obmlite.serving import ModelConfig, Repository
from obmlite.serving.server import Server

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "serving"


@pytest.fixture
def request_script(monkeypatch):
    """The script as a module."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("request_script", EXAMPLE / "request.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def served(tmp_path):
    """A server of a model that takes 16 images and always reads a one."""
    one = np.log(np.eye(10, dtype=np.float32)[1] + 1e-6)
    model = obmlite.Model.from_function(
        lambda w, images: images.sum((1, 2)) * 0 + w, one, obmlite.spec("f32[16,8,8,1]")
    )
    model.save(tmp_path / "ones" / "1")
    repository = Repository([ModelConfig("ones", tmp_path / "ones")])
    repository.scan()
    with Server(repository, port=0, grpc_port=0) as server:
        yield server


@pytest.mark.parametrize("by_grpc", [True, False], ids=["grpc", "rest"])
def test_requests(request_script, served, monkeypatch, capsys, by_grpc):
    address = served.grpc_address if by_grpc else served.url.removeprefix("http://")
    options = ["--model_spec_name=ones", f"--prediction_service_addr={address}"] + ["--nouse_grpc"] * (not by_grpc)

    def ask(*more):
        monkeypatch.setattr(sys, "argv", ["request.py", *options, *more])
        status = request_script.main()
        return status, capsys.readouterr().out

    labels = request_script.digits_model.load_data()[1].labels[:64]
    share = f"{(labels == 1).mean():.4f}"
    assert ask("--serving_batch_size=16", "--count_images=64") == (0, f"accuracy on 64 images: {share}\n")
    status, text = ask("--serving_batch_size=4")
    refusal = (
        "Input 'images': batch 4 does not match this model's fixed batch sizes [16]: "
        "expected f32[16,8,8,1], found f32[4,8,8,1]."
    )
    assert (status, text) == (1, f"the server refuses: {'INVALID_ARGUMENT' if by_grpc else 400}: {refusal}\n")
    with pytest.raises(SystemExit):
        ask("--serving_batch_size=16", "--count_images=20")
    assert "--count_images has to be a multiple of --serving_batch_size" in capsys.readouterr().err


@pytest.mark.long
def test_walk_through(tmp_path):
    command = ["-W", "error", EXAMPLE / "walk_through.py", "--out", "out", "--model", "jax", "--num_epochs", 4]
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = re.split(r"^\$ python ", done.stdout, flags=re.MULTILINE)[1:]
    script = [re.match(r"\S*?(\w+\.py|-m obmlite serve)", step)[1] for step in steps]
    train, ask = "mnist.py", "request.py"
    assert script == [train, "-m obmlite serve", ask, ask, train, ask, ask, ask, ask]
    assert "version 1 is served\n" in steps[1]
    assert "version 2 is served\n" in steps[4]
    answers = [step for step, name in zip(steps, script, strict=True) if name == ask]
    accurate = [re.findall(r"^accuracy on (\d+) images: (\d\.\d+)$", answer, re.MULTILINE) for answer in answers[:4]]
    assert [counts for [(counts, _)] in accurate] == ["128", "12", "128", "128"]
    assert all(float(share) > 0.7 for [(_, share)] in accurate)
    refusal = (
        "Input 'images': batch 1 does not match this model's fixed batch sizes [16]: "
        "expected f32[16,8,8,1], found f32[1,8,8,1]."
    )
    assert f"the server refuses: INVALID_ARGUMENT: {refusal}\n" in answers[4]
    assert f"the server refuses: 400: {refusal}\n" in answers[5]
