"""Functions and models for OpenVINO.

    model = obmlite.interop.openvino.convert(obmlite.load("mnist.obm"))
    compiled = openvino.Core().compile_model(model, "CPU", obmlite.interop.openvino.EXACT)

A package is replayed as ordinary JAX. OpenVINO's own frontend for jaxprs converts it where it covers the operations and
all sizes are known, and jax2onnx with OpenVINO's ONNX frontend otherwise; ``model.get_rt_info("obmlite")`` names which.
Both work in a child process. ``pip install 'obmlite[openvino]'``. ``docs/converters.md`` says more.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

from obmlite.errors import ArgumentError, ExportError
from obmlite.interop import _converting
from obmlite.interop._flattened import flatten
from obmlite.interop.onnx import OPSET

__all__ = ["EXACT", "convert", "save"]

EXACT: Mapping[str, str] = {"INFERENCE_PRECISION_HINT": "f32"}
"""For ``compile_model``: computes in float32. Left to itself OpenVINO takes bfloat16 or float16 where a device is
faster with it. A graph cannot say it; who compiles does."""

Frontend = Literal["auto", "jax", "onnx"]


def convert(
    function: Any,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
    frontend: Frontend = "auto",
) -> Any:
    """An ``openvino.Model`` of a function; weights are its constants, in the dtype that they have.

    Args:
      function: a :class:`obmlite.Model` (its default pipeline), a pipeline or a function of one, a live function of
        JAX's, or a Flax Linen module with its variables (``module.bind(variables)``).
      *args: examples of the arguments: arrays, ``jax.ShapeDtypeStruct`` or :func:`obmlite.spec`. Only what is live
        needs them; of what is exported they fix sizes that are open.
      kwargs: the same by keyword. Of what is live, those without arrays (``{"training": False}``) are fixed.
      weights: of an :class:`obmlite.Function`, argument → :class:`obmlite.Weights` or pytree of arrays.
      frontend: ``"jax"`` or ``"onnx"`` for that one alone.

    Returns:
      The model. Inputs and outputs have the signature's names; a single result without a name, and results by
      position, are ``output_0``, …. Symbols in shapes are open dimensions.

    Raises:
      ExportError: the function holds what cannot be converted.
      ArgumentError: the arguments do not fit, or there is no such frontend.
      ImportError: OpenVINO or jax2onnx is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="obmlite-") as folder:
        path = os.path.join(folder, "model.xml")
        report = _save(function, path, args, kwargs, weights, frontend, compress_to_fp16=False)
        with _no_telemetry():
            openvino = importlib.import_module("openvino")
        model = openvino.Core().read_model(path)  # maps the weights; they stay when the files go
    for name, value in report.items():
        model.set_rt_info(value, ["obmlite", name])
    return model


def save(
    function: Any,
    path: str | os.PathLike[str],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
    frontend: Frontend = "auto",
    compress_to_fp16: bool = False,
) -> None:
    """Writes a function as OpenVINO's ``.xml``, with its weights in a ``.bin`` beside it.

    Args:
      function: as for :func:`convert`.
      path: of the ``.xml``; files that are there are replaced.
      *args: as for :func:`convert`.
      kwargs: likewise.
      weights: likewise.
      frontend: likewise.
      compress_to_fp16: whether float32 weights are written as float16, as OpenVINO's own ``save_model`` does unless
        told otherwise: half the size, and 11 bits of each.

    Raises:
      ExportError: the function holds what cannot be converted, or the path is no ``.xml``.
      ArgumentError: the arguments do not fit, or there is no such frontend.
      ImportError: OpenVINO or jax2onnx is not installed.
    """
    _save(function, path, args, kwargs, weights, frontend, compress_to_fp16=compress_to_fp16)


def _save(
    function: Any,
    path: str | os.PathLike[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    weights: Mapping[str, Any] | None,
    frontend: str,
    *,
    compress_to_fp16: bool,
) -> Mapping[str, Any]:
    if frontend not in get_args(Frontend):
        raise ArgumentError(
            "There is no such frontend.", field="frontend", expected=", ".join(get_args(Frontend)), found=str(frontend)
        )
    if not os.fspath(path).endswith(".xml"):
        raise ExportError("OpenVINO's models are .xml files.", field="path", found=os.fspath(path))
    needed = ["openvino", *(["jax2onnx"] if frontend != "jax" else [])]
    _converting.require(needed, "Converting for OpenVINO", "openvino")
    options = {"opset": OPSET, "frontend": frontend, "compress_to_fp16": compress_to_fp16}
    return _converting.convert(flatten(function, args, kwargs, weights), "openvino", os.fspath(path), options)


@contextmanager
def _no_telemetry() -> Iterator[None]:
    """Keeps OpenVINO's first import from forking a process to send events, which beside JAX's threads may deadlock."""
    before = os.environ.get("CI")
    if "openvino" in sys.modules:
        yield
        return
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before
