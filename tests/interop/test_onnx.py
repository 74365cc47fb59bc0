"""Packages and live functions as ONNX: ONNX Runtime gives JAX's numbers. Needs an environment of its own."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import obmlite
from obmlite import Weights, spec
from obmlite.errors import ArgumentError, ExportError, LeafError
from obmlite.interop import onnx
from obmlite.interop._flattened import flatten

HAS_CONVERTER = importlib.util.find_spec("jax2onnx") is not None
needs_converter = pytest.mark.skipif(not HAS_CONVERTER, reason="jax2onnx is not installed here")

RANDOM = np.random.default_rng(0)
PARAMS = {
    "kernel": RANDOM.normal(size=(3, 3, 1, 4)).astype("f4"),
    "q": RANDOM.normal(size=(4, 4)).astype("f4"),
    "w": RANDOM.normal(size=(4, 3)).astype("f4"),
}
X = RANDOM.normal(size=(5, 8, 8, 1)).astype("f4")


def network(params: Any, x: Any) -> Any:
    """Convolution, poolings, masked attention, and the nested calls and comparisons of jax.nn."""
    x = lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = lax.reduce_window(jax.nn.relu(x), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = lax.reduce_window(jax.nn.silu(x), 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
    x = x.reshape(x.shape[0], 4, 4)
    scores = jnp.einsum("btd,bsd->bts", x @ params["q"], x)
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[1:], bool)), scores, -1e9)
    x = (jax.nn.softmax(scores) @ x).mean(1)
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return jax.nn.log_softmax((jax.nn.gelu(x) + jax.nn.gelu(x, approximate=False)) @ params["w"])


def run(model: Any, *arrays: Any) -> list[Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model if isinstance(model, str) else model.SerializeToString())
    names = [given.name for given in session.get_inputs()]
    return list(session.run(None, dict(zip(names, arrays, strict=True))))


@pytest.mark.skipif(HAS_CONVERTER, reason="jax2onnx is installed here")
def test_without_the_converter_it_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"obmlite\[onnx\]"):
        onnx.convert(obmlite.export(network, PARAMS, X))


@needs_converter
def test_a_package_of_an_open_batch(tmp_path: pathlib.Path) -> None:
    obmlite.Model.from_function(network, PARAMS, spec("f32[b,8,8,1]")).save(tmp_path / "m.obm")
    model = obmlite.load(tmp_path / "m.obm")
    converted = onnx.convert(model)
    assert [given.name for given in converted.graph.input] == ["x"]
    assert converted.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "b"
    assert [found.name for found in converted.graph.output] == ["output_0"]
    for b in (5, 1):
        [found] = run(converted, X[:b])
        np.testing.assert_allclose(found, model(X[:b]), atol=2e-5)


@needs_converter
def test_a_live_function_to_a_file(tmp_path: pathlib.Path) -> None:
    def fn(batch: Any, scale: Any, *, double: bool) -> Any:
        factor = 2 if double else 1
        centred = batch["x"] - batch["x"].mean(0)
        return {"n": batch["n"], "rest": (centred * factor, centred * scale, batch["n"] + 1)}

    batch = {"x": spec("f32[b,3]"), "n": spec("i32[2]")}
    path = tmp_path / "fn.onnx"
    onnx.save(fn, path, batch, spec("f32[]"), kwargs={"double": True})
    x, n = RANDOM.normal(size=(4, 3)).astype("f4"), np.array([3, 4], "i4")
    found = run(str(path), n, x, np.array(3, "f4"))
    wanted = jax.tree.leaves(fn({"x": x, "n": n}, np.float32(3), double=True))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@needs_converter
def test_what_has_no_conversion_is_named() -> None:
    def pool(x: Any) -> Any:
        return lax.reduce_window(x, -jnp.inf, lax.max, (2,), (2,), "VALID").sum()

    with pytest.raises(ExportError, match="select_and_scatter"):
        onnx.convert(jax.grad(pool), spec("f32[6]"))


# --- what is converted, as a flat function; needs no converter


def test_weights_of_a_function_are_constants_and_its_inputs_keep_their_names() -> None:
    function = obmlite.export(network, PARAMS, spec("f32[b,8,8,1]"))
    flat = flatten(function, weights={"params": Weights(PARAMS)})
    assert (flat.inputs, flat.outputs) == (("x",), ("output_0",))
    np.testing.assert_allclose(flat.function(X)[0], network(PARAMS, X), atol=1e-5)
    assert flatten(function).inputs == ("params.kernel", "params.q", "params.w", "x")
    fixed = flatten(function, [PARAMS, X])
    assert not fixed.function.signature.symbols


def test_a_pipelines_processors_are_part_of_it() -> None:
    objects = {
        "pre": obmlite.export(lambda image: image.astype("f4") / 255, spec("u8[b,8,8,1]")),
        "network": obmlite.export(network, PARAMS, spec("f32[b,8,8,1]")),
        "params": Weights(PARAMS),
    }
    pipeline = obmlite.Pipeline(pre=["pre"], function="network", weights={"params": "params"})
    model = obmlite.Model(objects, pipelines={"serving_default": pipeline})
    flat = flatten(model)
    assert flat.inputs == ("image",)
    image = RANDOM.integers(0, 256, (2, 8, 8, 1)).astype("u1")
    np.testing.assert_allclose(flat.function(image)[0], model(image), atol=1e-5)


def test_outputs_have_names_that_no_input_has() -> None:
    assert flatten(lambda x: {"x": x, "y": x + 1}, [X]).outputs == ("x_out", "y")


@pytest.mark.parametrize(
    ("kind", "make", "says"),
    [
        (ArgumentError, lambda: flatten(network), "example of each argument"),
        (ArgumentError, lambda: flatten(3, [X]), "nothing to be converted"),
        (ArgumentError, lambda: flatten(network, [PARAMS, X], weights={"params": PARAMS}), "functools.partial"),
        (ArgumentError, lambda: flatten(obmlite.export(network, PARAMS, X), weights={"p": PARAMS}), "params, x"),
        (LeafError, lambda: flatten(jax.random.normal, [jax.random.key(0)]), "key_data"),
    ],
)
def test_what_cannot_be_converted_says_why(kind: type[Exception], make: Any, says: str) -> None:
    with pytest.raises(kind, match=says):
        make()
