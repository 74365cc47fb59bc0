"""Functions and models as SavedModels of TensorFlow, by ``jax2tf``.

    obmlite.interop.tensorflow.to_saved_model(obmlite.load("mnist.obm"), "saved_model")

The graph is one operation, ``XlaCallModule``, which holds StableHLO: TensorFlow runs it where it has XLA, and tools
that read TensorFlow's own operations do not. ``docs/jax2tf.md`` lists them.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from obmlite.errors import ExportError, PackageExistsError, context
from obmlite.interop._flattened import Flattened, flatten
from obmlite.interop.tensorflow_steps import import_tensorflow
from obmlite.model import Model

__all__ = ["to_saved_model"]

DEFAULT_SIGNATURE = "serving_default"


def to_saved_model(
    function: Any,
    path: str | os.PathLike[str],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, str]:
    """Writes a function, or the pipelines of a model, as a SavedModel with serving signatures.

    A signature takes and returns tensors by name. Names are those of obmlite's signature, with ``_`` for what
    TensorFlow does not allow in them; a single result without a name, and results by position, are ``output_0``, ….
    Symbols in shapes are open dimensions. Arrays that belong to the function are ``tf.Variable``, not trainable.

    Args:
      function: a :class:`obmlite.Model`, of which each public pipeline becomes a signature of its name, the default
        one ``serving_default`` too; or a pipeline, a function, a live function of JAX's, or a Flax Linen module with
        its variables, which is ``serving_default``.
      path: the directory.
      *args: examples of the arguments of what is live, or, for one function or pipeline, known sizes.
      kwargs: the same by keyword; of what is live, those without arrays are fixed.
      weights: of an :class:`obmlite.Function`, argument → :class:`obmlite.Weights` or pytree of arrays.
      overwrite: whether a SavedModel that is there may be replaced.

    Returns:
      The signatures: name → as obmlite writes it, with TensorFlow's names.

    Raises:
      ExportError: a function cannot be converted, or two names become one.
      ArgumentError: the arguments do not fit.
      PackageExistsError: there is something at the path.
      ImportError: TensorFlow is not installed.
    """
    tf = import_tensorflow("Writing a SavedModel")
    jax2tf = importlib.import_module("jax.experimental.jax2tf")
    module = tf.Module()
    module.variables_of = {}  # a SavedModel finds variables through the module's attributes
    signatures: dict[str, Any] = {}
    texts: dict[str, str] = {}
    subjects = _subjects(function, bool(args or kwargs or weights))
    for name, own in subjects.items():
        same = next((other for other in texts if subjects[other] is own), None)
        if same is not None:
            signatures[name], texts[name] = signatures[same], texts[same]
            continue
        with context(object=name):
            flat = flatten(own, args, kwargs, weights)
            signatures[name], module.variables_of[name] = _signature(tf, jax2tf, flat)
            texts[name] = _text(flat)
    make_room(path, overwrite)
    tf.saved_model.save(module, os.fspath(path), signatures=signatures)
    return texts


def _subjects(function: Any, single: bool) -> dict[str, Any]:
    if not isinstance(function, Model) or single:
        return {DEFAULT_SIGNATURE: function}
    public = {name: own for name, own in function.pipelines.items() if own.visibility.name == "PUBLIC"}
    if function.default_pipeline:
        public = {**public, DEFAULT_SIGNATURE: function.pipeline}
    if not public:
        raise ExportError(
            "The model has no public pipeline.", expected="one for each signature", fix="give one of its functions"
        )
    return public


def _signature(tf: Any, jax2tf: Any, flat: Flattened) -> tuple[Any, list[Any]]:
    """A concrete function from tensors by name to tensors by name, and its variables."""
    function, specs = flat.function, flat.specs
    inputs, outputs = _names(flat.inputs), _names(flat.outputs)
    variables = [tf.Variable(np.asarray(value), trainable=False) for value in function.captures]

    def call(captures: Sequence[Any], *leaves: Any) -> Any:
        arguments = function.signature.bind(leaves, {})
        return tuple(function.trace(arguments, captures))

    shapes = [", ".join(map(str, spec.shape)) if spec.symbols else None for spec in specs]
    converted = jax2tf.convert(
        call,
        polymorphic_shapes=[None, *shapes],
        polymorphic_constraints=tuple(function.signature.constraints),
        with_gradient=False,
        native_serialization_platforms=("cpu",),
    )
    tensors = {
        name: tf.TensorSpec([n if isinstance(n, int) else None for n in spec.shape], spec.dtype, name)
        for name, spec in zip(inputs, specs, strict=True)
    }

    def by_name(**given: Any) -> Any:
        results = converted(list(variables), *(given[name] for name in inputs))
        return dict(zip(outputs, results, strict=True))

    return tf.function(by_name, autograph=False).get_concrete_function(**tensors), variables


def _names(names: Sequence[str]) -> list[str]:
    """Names as TensorFlow's signatures may have them."""
    found = [re.sub(r"\W", "_", name, flags=re.ASCII) for name in names]
    found = [f"_{name}" if name[:1].isdigit() else name for name in found]
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise ExportError(
            "Two leaves would have one name in TensorFlow.", leaf=", ".join(twice), found=", ".join(names)
        )
    return found


def _text(flat: Flattened) -> str:
    signature = flat.function.signature
    sides = ((flat.inputs, signature.input_specs), (flat.outputs, signature.output_specs))
    given, found = (", ".join(f"{n}: {s}" for n, s in zip(_names(names), specs, strict=True)) for names, specs in sides)
    return f"({given}) -> {{{found}}}"


def make_room(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Makes way for a SavedModel.

    Raises:
      PackageExistsError: there is something at the path.
    """
    if not os.path.lexists(path) or (os.path.isdir(path) and not os.listdir(path)):
        return
    if not overwrite or not os.path.isfile(os.path.join(path, "saved_model.pb")):
        raise PackageExistsError(
            "There is something where a SavedModel is to be written.",
            found=os.fspath(path),
            fix="overwrite=True replaces a SavedModel" if not overwrite else "choose another path",
        )
    shutil.rmtree(path)
