"""Functions and models as ONNX graphs, for ONNX Runtime and whatever else reads them.

    onnx_model = obmlite.interop.onnx.convert(obmlite.load("mnist.obm"))
    obmlite.interop.onnx.save(obmlite.load("mnist.obm"), "mnist.onnx")

A package is replayed as ordinary JAX, and jax2onnx converts that, in a child process. ``pip install 'obmlite[onnx]'``.
``docs/converters.md`` says what converts and how close the numbers are.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Mapping
from typing import Any

from obmlite.interop import _converting
from obmlite.interop._flattened import flatten

__all__ = ["convert", "save"]

OPSET = 21
"""ONNX's operator set unless told otherwise: what runtimes of 2024 and later read."""


def convert(
    function: Any,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
    opset: int = OPSET,
) -> Any:
    """An ONNX graph of a function; weights are its initializers, in the dtype that they have.

    Args:
      function: a :class:`obmlite.Model` (its default pipeline), a pipeline or a function of one, a live function of
        JAX's, or a Flax Linen module with its variables (``module.bind(variables)``).
      *args: examples of the arguments: arrays, ``jax.ShapeDtypeStruct`` or :func:`obmlite.spec`. Only what is live
        needs them; of what is exported they fix sizes that are open.
      kwargs: the same by keyword. Of what is live, those without arrays (``{"training": False}``) are fixed.
      weights: of an :class:`obmlite.Function`, argument → :class:`obmlite.Weights` or pytree of arrays.
      opset: ONNX's operator set.

    Returns:
      An ``onnx.ModelProto``. Inputs and outputs have the signature's names; a single result without a name, and
      results by position, are ``output_0``, …. Symbols in shapes are open dimensions of the same name.

    Raises:
      ExportError: the function holds what cannot be converted.
      ArgumentError: the arguments do not fit.
      ImportError: jax2onnx is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="obmlite-") as folder:
        path = os.path.join(folder, "model.onnx")
        save(function, path, *args, kwargs=kwargs, weights=weights, opset=opset)
        return importlib.import_module("onnx").load(path)


def save(
    function: Any,
    path: str | os.PathLike[str],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
    opset: int = OPSET,
) -> None:
    """Writes a function as an ONNX file; large weights go to ``<path>.data`` beside it, as ONNX has it.

    Args:
      function: as for :func:`convert`.
      path: the file; one that is there is replaced.
      *args: as for :func:`convert`.
      kwargs: likewise.
      weights: likewise.
      opset: likewise.

    Raises:
      ExportError: the function holds what cannot be converted.
      ArgumentError: the arguments do not fit.
      ImportError: jax2onnx is not installed.
    """
    _converting.require(["jax2onnx", "onnx"], "Converting to ONNX", "onnx")
    _converting.convert(flatten(function, args, kwargs, weights), "onnx", os.fspath(path), {"opset": opset})
