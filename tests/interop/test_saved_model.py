"""Packages as SavedModels: TensorFlow serves them with JAX's numbers; it has an environment of its own."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from obmlite import Pipeline, Weights, spec
from obmlite.interop.tensorflow import to_saved_model

HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None

PARAMS = {"w": np.random.default_rng(0).normal(size=(600, 3)).astype("f4"), "b": np.arange(3, dtype="f4")}
X = np.random.default_rng(1).normal(size=(5, 600)).astype("f4")


def apply(params: Any, x: Any) -> Any:
    y = jnp.tanh(x @ params["w"]) + params["b"]
    return {"logits": y, "best": jnp.argmax(y, -1)}


def scale(x: Any) -> Any:
    return (x.astype("f4") / 255).mean(0)


SERVE = """
import sys, numpy as np, tensorflow as tf
loaded = tf.saved_model.load(sys.argv[1])
given = np.load(sys.argv[2])
found = {}
for name, function in loaded.signatures.items():
    names = sorted(function.structured_input_signature[1])
    arrays = {n: tf.constant(given[f"{name}/{n}"]) for n in names}
    for own, value in function(**arrays).items():
        found[f"{name}/{own}"] = value.numpy()
variables = {name: len(own) for name, own in loaded.variables_of.items()}
np.savez(sys.argv[3], variables=variables == {"predict": 1, "scale": 0}, **found)
"""


@pytest.mark.skipif(HAS_TENSORFLOW, reason="TensorFlow is installed here")
def test_without_tensorflow_it_says_what_to_install(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ImportError, match=r"obmlite\[tensorflow\]"):
        to_saved_model(obmlite.export(scale, spec("u8[b,4]")), tmp_path / "saved")


@pytest.mark.skipif(not HAS_TENSORFLOW, reason="TensorFlow is not installed here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
class TestWithTensorFlow:
    def serve(self, path: pathlib.Path, **given: Any) -> dict[str, Any]:
        """What TensorFlow gives in a process without JAX's model; ``signature/input`` → array."""
        arrays, results = path.parent / "given.npz", path.parent / "found.npz"
        np.savez(arrays, **given)
        done = subprocess.run(
            [sys.executable, "-c", SERVE, str(path), str(arrays), str(results)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        with np.load(results) as found:
            return dict(found)

    def test_every_pipeline_of_a_package_is_a_signature(self, tmp_path: pathlib.Path) -> None:
        objects = {
            "apply": obmlite.export(apply, PARAMS, spec("f32[b,600]")),
            "scale": obmlite.export(scale, spec("u8[c,d]")),
            "params": Weights(PARAMS),
        }
        bound = Pipeline(function="apply", weights={"params": "params"})
        pipelines = {"predict": bound, "scale": Pipeline(pre=["scale"])}
        obmlite.Model(objects, pipelines=pipelines, default_pipeline="predict").save(tmp_path / "m.obm")
        model = obmlite.load(tmp_path / "m.obm")
        texts = to_saved_model(model, tmp_path / "saved")
        assert texts["predict"] == texts["serving_default"] == "(x: f32[b,600]) -> {best: i32[b], logits: f32[b,3]}"
        pixels = np.arange(12, dtype="u1").reshape(3, 4)
        given = {"predict/x": X, "serving_default/x": X[:2], "scale/x": pixels}
        found = self.serve(tmp_path / "saved", **given)
        np.testing.assert_allclose(found["predict/logits"], model(X)["logits"], atol=1e-5)
        np.testing.assert_array_equal(found["predict/best"], model(X)["best"])
        assert found["serving_default/logits"].shape == (2, 3)  # the size is open
        np.testing.assert_allclose(found["scale/output_0"], scale(pixels), atol=1e-6)
        assert found["variables"]  # weights are variables, once, and no part of the graph

    def test_a_function_with_inputs_that_have_no_name_of_tensorflows(self, tmp_path: pathlib.Path) -> None:
        function = obmlite.export(lambda batch: (batch["an image"] * 2, batch["n"] + 1), {
            "an image": jax.ShapeDtypeStruct((2,), "f4"), "n": jax.ShapeDtypeStruct((), "i4")
        })  # fmt: skip
        texts = to_saved_model(function, tmp_path / "saved")
        assert list(texts) == ["serving_default"]
        given = {
            "serving_default/batch_an_image": np.ones(2, "f4"),
            "serving_default/batch_n": np.asarray(3, "i4"),
        }
        found = self.serve(tmp_path / "saved", **given)
        np.testing.assert_array_equal(found["serving_default/output_0"], [2, 2])
        assert found["serving_default/output_1"] == 4

    def test_what_is_there_is_kept(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "notes").write_text("mine")
        with pytest.raises(obmlite.errors.PackageExistsError):
            to_saved_model(obmlite.export(scale, spec("u8[2,4]")), tmp_path, overwrite=True)

    def test_two_leaves_of_one_name(self, tmp_path: pathlib.Path) -> None:
        function = obmlite.export(lambda x: x["a b"] + x["a_b"], {"a b": spec("f32[]"), "a_b": spec("f32[]")})
        with pytest.raises(obmlite.errors.ExportError, match="one name"):
            to_saved_model(function, tmp_path / "saved")
