"""Packages, live functions and Flax modules for OpenVINO: it gives JAX's numbers. Needs an environment of its own."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from obmlite import Weights, spec
from obmlite.errors import ArgumentError, ExportError
from obmlite.interop import openvino

HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not HAS_OPENVINO, reason="OpenVINO is not installed here")

PARAMS = {"w": np.random.default_rng(0).normal(size=(600, 3)).astype("f4"), "b": np.arange(3, dtype="f4")}
X = np.random.default_rng(1).normal(size=(4, 600)).astype("f4")


FORKS = """
import os, sys, jax
os.register_at_fork(before=lambda: print("forked"))
jax.devices()
from obmlite.interop import openvino
with openvino._no_telemetry():
    import openvino
print("CI" in os.environ)
"""


@pytest.fixture(autouse=True)
def _no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")  # for the tests' own import


def dense(params: Any, x: Any) -> Any:
    return {"y": jax.nn.relu(jnp.tanh(x @ params["w"] / 25) + params["b"] - 1), "best": x.max(-1)}


def run(model: Any, *arrays: Any) -> dict[str, Any]:
    import openvino as ov

    compiled = ov.Core().compile_model(model, "CPU", dict(openvino.EXACT))
    found = compiled(arrays)
    return {port.get_any_name(): found[port] for port in compiled.outputs}


def routes(model: Any) -> Any:
    return model.get_rt_info(["obmlite", "route"]).astype(str)


@pytest.mark.skipif(HAS_OPENVINO, reason="OpenVINO is installed here")
def test_without_openvino_it_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"obmlite\[openvino\]"):
        openvino.convert(obmlite.export(dense, PARAMS, X))


def test_other_frontends_and_files_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ArgumentError, match="auto, jax, onnx"):
        openvino.convert(jnp.sort, X, frontend="torch")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="xml"):
        openvino.save(jnp.sort, tmp_path / "m.onnx", X)


@needs_openvino
def test_openvino_forks_nothing_when_it_is_imported_here() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    done = subprocess.run([sys.executable, "-c", FORKS], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


@needs_openvino
def test_a_package_by_openvinos_own_frontend(tmp_path: pathlib.Path) -> None:
    obmlite.Model.from_function(dense, PARAMS, X).save(tmp_path / "m.obm")
    model = obmlite.load(tmp_path / "m.obm")
    converted = openvino.convert(model)
    assert routes(converted) == "jax"
    assert [given.get_any_name() for given in converted.inputs] == ["x"]
    found = run(converted, X)
    for name, wanted in model(X).items():
        np.testing.assert_allclose(found[name], wanted, atol=1e-5)


@needs_openvino
def test_a_function_of_an_open_batch_goes_by_onnx() -> None:
    function = obmlite.export(dense, PARAMS, spec("f32[b,600]"))
    converted = openvino.convert(function, weights={"params": Weights(PARAMS)})
    assert routes(converted) == "onnx"
    assert "open sizes" in converted.get_rt_info(["obmlite", "why"]).astype(str)
    for b in (4, 1):
        np.testing.assert_allclose(run(converted, X[:b])["y"], dense(PARAMS, X[:b])["y"], atol=1e-5)


@needs_openvino
def test_a_linen_module_with_a_flag_and_an_example() -> None:
    from flax import linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, images: Any, training: bool = True) -> Any:
            x = nn.Conv(4, (3, 3))(images)
            x = nn.BatchNorm(use_running_average=not training)(x)
            x = nn.avg_pool(nn.relu(x), (2, 2), strides=(2, 2))
            x = nn.Dropout(0.5, deterministic=not training)(x)
            return nn.log_softmax(nn.Dense(3)(x.reshape(x.shape[0], -1)))

    module = Network()
    images = np.random.default_rng(2).normal(size=(2, 8, 8, 1)).astype("f4")
    variables = module.init(jax.random.key(0), images, training=False)
    converted = openvino.convert(module.bind(variables), images, kwargs={"training": False})
    assert [given.get_any_name() for given in converted.inputs] == ["images"]
    assert "log" in converted.get_rt_info(["obmlite", "why"]).astype(str)  # which the frontend lacks
    wanted = module.apply(variables, images, training=False)
    np.testing.assert_allclose(run(converted, images)["output_0"], wanted, atol=1e-5)
    with pytest.raises(ArgumentError, match=r"module.bind\(variables\)"):
        openvino.convert(module, images)


@needs_openvino
@pytest.mark.parametrize("half", [False, True])
def test_the_precision_of_a_file_is_as_asked_for(tmp_path: pathlib.Path, half: bool) -> None:
    path = tmp_path / "m.xml"
    openvino.save(lambda x: dense(PARAMS, x), path, X, frontend="jax", compress_to_fp16=half)
    error = np.abs(run(str(path), X)["y"] - dense(PARAMS, X)["y"]).max()
    assert (1e-5 < error < 1e-2) if half else error < 1e-5
    size = PARAMS["w"].nbytes
    assert abs((tmp_path / "m.bin").stat().st_size - (size // 2 if half else size)) < 2000


@needs_openvino
def test_a_frontend_that_does_not_cover_a_function_says_what_it_lacks() -> None:
    with pytest.raises(ExportError, match=r"(?s)sort.*frontend=\"auto\""):
        openvino.convert(jnp.sort, X, frontend="jax")


@needs_openvino
@pytest.mark.parametrize("frontend", ["auto", "onnx"])
def test_functions_that_stablehlo_writes_out(tmp_path: pathlib.Path, frontend: str) -> None:
    """Replay gives them their derivatives again, which no frontend knows."""

    def apply(params: Any, x: Any) -> Any:
        return {"y": jax.nn.gelu(x @ params["w"], approximate=False) + jax.nn.sigmoid(x @ params["w"])}

    obmlite.Model.from_function(apply, PARAMS, X).save(tmp_path / "m.obm")
    model = obmlite.load(tmp_path / "m.obm")
    converted = openvino.convert(model, frontend=frontend)
    np.testing.assert_allclose(run(converted, X)["y"], model(X)["y"], atol=1e-4)
