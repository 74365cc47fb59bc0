"""The child process of :mod:`obmlite.interop._converting`: reads a task from its input, and writes a graph.

A function comes as a package and is replayed, so that it is a jaxpr of ordinary primitives whatever it was written in.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from obmlite import loading
from obmlite.errors import ExportError, ObmliteError
from obmlite.function import Function
from obmlite.interop import _generalise
from obmlite.specs import TensorSpec, to_jax

DIRECT_DTYPES = ("bool", "int32", "int64", "float32")
"""What OpenVINO's JAX frontend gives as it is; of bfloat16 it makes float16."""

TOLERANCE = 1e-3
"""By how much, relative to the largest number, OpenVINO's frontend may differ from JAX; it is far less or nonsense."""


def main() -> None:
    """Carries out one task."""
    task = json.load(sys.stdin)
    try:
        report = convert(task)
    except ObmliteError as error:
        report = {"error": error.found or error.problem, "field": error.field, "fix": None}
        if isinstance(error, ExportError):  # others advise how to load the function
            report["fix"] = error.fix
        if error.found and error.problem:
            report["error"] = f"{error.problem.rstrip('.')}: {error.found}"
    except Exception as error:  # noqa: BLE001 - converters raise whatever they meet; the parent makes one error of it
        lines = [line for line in str(error).splitlines() if line.strip()]
        report = {"error": f"{type(error).__name__}: {' '.join(lines)[:1500]}"}
    with open(task["report"], "w", encoding="utf-8") as stream:
        json.dump(report, stream)


def convert(task: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a function to ONNX or for OpenVINO.

    Returns:
      ``route``: by which converter, and ``why`` it was not the other.
    """
    function = loading.load(task["package"], engine="replay").functions["function"]
    specs = function.signature.input_specs
    if task["target"] == "onnx":
        to_onnx(function, specs, task["output"], task)
        return {"route": "jax2onnx", "why": ""}
    openvino = importlib.import_module("openvino")
    why = _direct_refusal(function)
    if not why and task["frontend"] != "onnx":
        try:
            model = _direct(openvino, function)
            _save_openvino(openvino, model, task)
            return {"route": "jax", "why": ""}
        except Exception as error:  # noqa: BLE001 - of whatever kind: the frontend raises all sorts, and there is another way
            why = " ".join(str(error).split())[-300:] or type(error).__name__
    if task["frontend"] == "jax":
        raise ExportError("OpenVINO's JAX frontend does not take the function.", found=why, fix='frontend="auto"')
    path = os.path.join(os.path.dirname(task["package"]), "model.onnx")
    to_onnx(function, specs, path, task)
    _save_openvino(openvino, openvino.Core().read_model(path), task)
    return {"route": "onnx", "why": why}


# --- by OpenVINO's own frontend


def _direct_refusal(function: Function) -> str:
    """Why OpenVINO's frontend is not to be asked; empty if it is."""
    if function.signature.symbols:
        return "open sizes"
    specs = [*function.signature.input_specs, *function.signature.output_specs]
    others = sorted({str(s.dtype) for s in specs if str(s.dtype) not in DIRECT_DTYPES})
    return ", ".join(others)


def _direct(openvino: Any, function: Function) -> Any:
    jaxpr = _generalise.inlined(function.jaxpr())
    model = openvino.convert_model(jaxpr)
    # The frontend is experimental: a graph that it makes is run once.
    random = np.random.default_rng(0)
    given = [_example(random, spec) for spec in function.signature.input_specs]
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    found = openvino.Core().compile_model(model, "CPU", config)(given)
    for n, value in enumerate(jax.tree.leaves(function(*given))):
        wanted, own = np.asarray(value), np.asarray(found[n])
        scale = np.abs(wanted[np.isfinite(wanted)]).max(initial=1) if wanted.dtype.kind == "f" else 1
        if own.shape != wanted.shape or own.dtype != wanted.dtype or not np.allclose(
            own, wanted, rtol=0, atol=TOLERANCE * scale, equal_nan=True
        ):  # fmt: skip
            raise ExportError("OpenVINO's JAX frontend gives other numbers than JAX.", found=f"output {n}")
    return model


def _example(random: np.random.Generator, spec: TensorSpec) -> Any:
    shape = [int(size) for size in spec.shape]  # type: ignore[arg-type]
    if np.dtype(spec.dtype).kind == "f":
        return random.standard_normal(shape).astype(spec.dtype)
    return random.integers(0, 2, shape).astype(spec.dtype)


def _save_openvino(openvino: Any, model: Any, task: Mapping[str, Any]) -> None:
    ours = {*task["inputs"], *task["outputs"]}
    for ports, names in ((model.inputs, task["inputs"]), (model.outputs, task["outputs"])):
        for port, name in zip(ports, names, strict=True):
            tensor = port.get_tensor()
            tensor.set_names({name, *(tensor.get_names() & ours)})  # one tensor may be several results, or an argument
            node = port.get_node()
            node.set_friendly_name(name if node.get_type_name() == "Parameter" else f"{name}/result")
    openvino.save_model(model, task["output"], compress_to_fp16=task["compress_to_fp16"])


# --- by jax2onnx


def to_onnx(function: Function, specs: Sequence[TensorSpec], path: str, task: Mapping[str, Any]) -> None:
    """Writes a function as ONNX; large weights go to a file beside it."""
    symbols = function.signature.symbols
    places = _places(specs, symbols)
    fitted = None
    if symbols:
        values = _generalise.sizes(symbols)
        traces = [_generalise.inlined(_at_sizes(function, specs, value)) for value in values]
        closed, fitted = traces[0], _generalise.generalise(traces, values)
    else:
        closed = _generalise.inlined(function.jaxpr())

    def traced(*arguments: Any) -> Any:
        dimensions = {symbol: arguments[n].shape[axis] for symbol, (n, axis) in places.items()}
        results = _generalise.run(closed, arguments, fitted=fitted, dimensions=dimensions, revise=_revise)
        taken = set(map(id, arguments))
        for n, result in enumerate(results):
            if id(result) in taken or not isinstance(result, jax.core.Tracer):
                results[n] = jax.numpy.array(result, copy=True)  # one value has one name in a graph
            taken.add(id(result))
        return results[0] if len(results) == 1 else tuple(results)

    jax2onnx = importlib.import_module("jax2onnx")
    wide = any(np.dtype(s.dtype).itemsize == 8 and np.dtype(s.dtype).kind == "f" for s in specs)
    jax2onnx.to_onnx(
        traced,
        to_jax(specs),
        model_name=function.name,
        opset=task["opset"],
        enable_double_precision=wide,
        input_names=list(task["inputs"]),
        output_names=list(task["outputs"]),
        return_mode="file",
        output_path=path,
    )


def _places(specs: Sequence[TensorSpec], symbols: Sequence[str]) -> dict[str, tuple[int, int]]:
    """For each symbol the argument and axis whose size it is."""
    found: dict[str, tuple[int, int]] = {}
    for n, spec in enumerate(specs):
        for axis, size in enumerate(spec.shape):
            if str(size) in symbols:
                found.setdefault(str(size), (n, axis))
    missing = [symbol for symbol in symbols if symbol not in found]
    if missing or len(symbols) > _generalise.MAX_SYMBOLS:
        raise ExportError(
            "Open sizes of an ONNX graph are each a whole dimension.",
            field="shape",
            expected=f"at most {_generalise.MAX_SYMBOLS} symbols, each a dimension of an argument",
            found=", ".join(map(str, specs)),
            fix="give arguments of known sizes",
        )
    return found


def _at_sizes(function: Function, specs: Sequence[TensorSpec], values: Mapping[str, int]) -> Any:
    shapes = [[s if isinstance(s, int) else s.evaluate(values) for s in spec.shape] for spec in specs]
    return function.jaxpr(*(jax.ShapeDtypeStruct(shape, spec.dtype) for shape, spec in zip(shapes, specs, strict=True)))


def _revise(primitive: Any, operands: Sequence[Any], params: dict[str, Any]) -> Any:
    """What ONNX runtimes run, in place of operations that they lack in one form."""
    if primitive.name in ("reduce_window_max", "reduce_window_sum"):
        return _pooling(primitive, operands[0], params)
    if primitive.name == "select_n" and len(operands) == 3 and all(x.dtype == np.bool_ for x in operands):
        which, no, yes = operands  # ONNX Runtime has no Where of bool
        which = lax.broadcast(which, np.shape(no)) if np.shape(which) != np.shape(no) else which
        return lax.bitwise_or(lax.bitwise_and(which, yes), lax.bitwise_and(lax.bitwise_not(which), no))
    return None


def _pooling(primitive: Any, x: Any, params: Mapping[str, Any]) -> Any:
    """A pooling over some axes with the others merged into one: ONNX runtimes pool over three at most."""
    columns = [params[key] for key in _WINDOW]
    idle = [n for n, column in enumerate(zip(*columns, strict=True)) if column == (1, 1, (0, 0), 1, 1)]
    if len(x.shape) <= 3 or not 1 < len(idle) < len(x.shape):
        return None
    busy = [n for n in range(len(x.shape)) if n not in idle]
    order = [*idle, *busy]
    merged = lax.transpose(x, order)
    merged = lax.reshape(merged, (math.prod(x.shape[n] for n in idle), *(x.shape[n] for n in busy)))
    own = {key: (column[idle[0]], *(column[n] for n in busy)) for key, column in zip(_WINDOW, columns, strict=True)}
    pooled = primitive.bind(merged, **{**params, **own})
    spread = lax.reshape(pooled, (*(x.shape[n] for n in idle), *pooled.shape[1:]))
    return lax.transpose(spread, [order.index(n) for n in range(len(order))])


_WINDOW = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")


if __name__ == "__main__":
    main()
