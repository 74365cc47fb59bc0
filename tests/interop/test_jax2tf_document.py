"""What docs/jax2tf.md says of SavedModels: its code runs, Keras, TensorFlow Lite and gradients give what JAX gives.

Needs TensorFlow, which has an environment of its own.
"""

from __future__ import annotations

import importlib.util
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed here"
)

DOCUMENT = pathlib.Path(__file__).parent.parent.parent / "docs" / "jax2tf.md"


def block(name: str) -> str:
    [found] = re.findall(rf"<!-- {name} -->\n```python\n(.*?)```\n", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


def apply(params: Any, images: Any) -> Any:
    x = jnp.tanh(jax.lax.conv_general_dilated(images, params["kernel"], (2, 2), "SAME", dimension_numbers=NHWC))
    return x.reshape(x.shape[0], -1) + params["bias"]


NHWC = ("NHWC", "HWIO", "NHWC")
PARAMS = {
    "kernel": np.random.default_rng(0).normal(size=(3, 3, 1, 4)).astype(np.float32),
    "bias": np.arange(64, dtype=np.float32) / 64,
}
IMAGES = np.random.default_rng(1).random((6, 8, 8, 1), np.float32)

KERAS = """
layer = larger.layers[1]
found["weights"] = np.concatenate([w.numpy().ravel() for w in layer.weights])
found["trainable"] = len(larger.trainable_weights)
x, y = np.tile(x, (8, 1, 1, 1)), np.tile([0, 1, 0, 1, 0, 1], 8)
found["keras"] = keras.Model(images, extracted)(x[:6]).numpy()
found["losses"] = larger.fit(x, y, epochs=8, verbose=0).history["loss"]
found["weights_after"] = np.concatenate([w.numpy().ravel() for w in layer.weights])
"""

TAPE = """
loaded = tf.saved_model.load("saved_model")
with tf.GradientTape() as tape:
    loss = tf.reduce_sum(loaded.predict(tf.constant(x)) ** 2)
for name, gradient in zip(weights.names, tape.gradient(loss, list(loaded.leaves))):
    found[name] = gradient.numpy()
"""

LITE = """
content = tf.lite.TFLiteConverter.from_saved_model("saved_model").convert()
interpreter = tf.lite.Interpreter(model_content=content)
interpreter.allocate_tensors()
interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x[:4])
interpreter.invoke()
found["lite"] = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("jax2tf")
    model = obmlite.Model.from_function(
        apply, PARAMS, obmlite.spec("f32[b,8,8,1]"), name="predict", vjp_order=1, platforms="cpu"
    )
    model.save(folder / "demo" / "mnist_features" / "1")
    np.save(folder / "x.npy", IMAGES)
    return folder


def run(folder: pathlib.Path, *parts: str) -> dict[str, Any]:
    code = ["import numpy as np", "found, x = {}, np.load('x.npy')", *parts, "np.savez('found.npz', **found)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / "found.npz") as file:
        return dict(file)


def replaced(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_a_keras_layer(folder: pathlib.Path) -> None:
    found = run(folder, block("savedmodel"), block("keras"), KERAS)
    np.testing.assert_allclose(found["keras"], apply(PARAMS, IMAGES), rtol=1e-5, atol=1e-5)
    assert found["losses"][-1] < found["losses"][0]
    assert found["trainable"] == 2  # the new layer's
    assert sorted(found["weights"]) == sorted(np.concatenate([p.ravel() for p in PARAMS.values()]))
    assert (found["weights"] == found["weights_after"]).all()


def test_gradients_through_a_savedmodel(folder: pathlib.Path) -> None:
    changes = {
        "trainable=False": "trainable=True",
        "with_gradient=False": "with_gradient=True",
        "module.predict})\n": "module.predict}, options=OPTIONS)\n",
    }
    code = replaced(block("savedmodel"), changes)
    options = "import tensorflow as tf\nOPTIONS = tf.saved_model.SaveOptions(experimental_custom_gradients=True)"
    found = run(folder, options, code, TAPE)
    expected = jax.grad(lambda params: (apply(params, IMAGES) ** 2).sum())(PARAMS)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, rtol=1e-4, atol=1e-4)


def test_tensorflow_lite(folder: pathlib.Path) -> None:
    code = replaced(block("savedmodel"), {'"b, 8, 8, 1"': '"4, 8, 8, 1"', "[None, 8, 8, 1]": "[4, 8, 8, 1]"})
    found = run(folder, code, LITE)
    np.testing.assert_allclose(found["lite"], apply(PARAMS, IMAGES[:4]), rtol=1e-4, atol=1e-4)
