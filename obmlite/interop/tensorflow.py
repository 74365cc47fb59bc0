"""TensorFlow's functions beside JAX's: tokenizers, look-ups and the like as pre- and post-processors of a pipeline.

    supplementals = save_functions("build/saved_model", {"tokenize": tokenize, "label": label}, resources=(table,))
    obmlite.Model(
        objects,
        pipelines={"serving_default": obmlite.Pipeline(pre=["tokenize"], function="apply", post=["label"])},
        supplementals=supplementals,
    ).save("model.obm")

The SavedModel is carried as it is. Who loads the package needs TensorFlow only to run these steps. For a SavedModel
that is there already, from Keras say, :func:`handle` describes a function without TensorFlow.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from obmlite import dims, dtypes, specs
from obmlite import tree as trees
from obmlite.errors import ExportError, LeafError, context
from obmlite.interop._saved_model import make_room, to_saved_model
from obmlite.interop.tensorflow_steps import (
    SAVED_MODEL,
    SAVED_MODEL_NAME,
    SAVED_MODEL_VERSION,
    STRING,
    Handle,
    import_tensorflow,
)
from obmlite.specs import TensorSpec
from obmlite.supplemental import Supplemental

__all__ = [
    "convert_function",
    "from_saved_model",
    "function_names",
    "handle",
    "save_functions",
    "tf_specs_to_jax",
    "to_saved_model",
]

Concrete = Any
"""A ``tf.types.experimental.ConcreteFunction``."""

_NARROWER = {"int64": "int32", "uint64": "uint32", "float64": "float32", "complex128": "complex64"}


def from_saved_model(path: str | os.PathLike[str]) -> Supplemental:
    """A SavedModel as a package carries it: its directory, byte for byte.

    Args:
      path: the directory.

    Raises:
      ExportError: it holds no SavedModel.
    """
    if not os.path.isfile(os.path.join(path, "saved_model.pb")):
        raise ExportError("The directory is no SavedModel.", expected="a file saved_model.pb", found=os.fspath(path))
    return Supplemental.from_directory(path, mime_type=SAVED_MODEL, version=SAVED_MODEL_VERSION)


def handle(
    function: str,
    arguments: Mapping[str, Any],
    result: Any,
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    saved_model: str = SAVED_MODEL_NAME,
) -> Supplemental:
    """Describes a function of a SavedModel, so that pipelines can name it. Needs no TensorFlow.

    ``handle("serving_default", {"image": "f32[b,28,28]"}, {"output_0": "f32[b,10]"}, saved_model="keras")``

    Args:
      function: the name of its signature in the SavedModel.
      arguments: name → pytree of specs as text: ``"f32[b,4]"``, and ``"string[b]"`` for TensorFlow's strings.
      result: such a pytree; dicts, lists, tuples and None.
      inputs: for each leaf of the arguments the tensor's name in that signature; left out, the leaf's own name.
      outputs: the same for each leaf of the result; left out, the leaf's own name, or ``output_0`` for a single one.
      saved_model: name of the supplemental that holds the SavedModel.

    Returns:
      A supplemental, to be given to the model under the name that pipelines will use.

    Raises:
      ExportError: a spec is malformed, or there is not one name for each leaf.
      LeafError: a container is no dict, list or tuple.
    """
    _, given = trees.flatten_arguments(dict(arguments))
    _, found = trees.flatten(result)
    names = tuple(found.names) if outputs is None else tuple(outputs)
    names = ("output_0",) if outputs is None and names == ("",) else names
    own = tuple(given.names) if inputs is None else tuple(inputs)
    return Handle(function, saved_model, arguments, result, own, names).supplemental()


def convert_function(
    name: str, function: Concrete, *, saved_model: str = SAVED_MODEL_NAME, narrow: bool = False
) -> Supplemental:
    """Describes a concrete function that :func:`save_functions` saves, or has saved, under a name.

    Dimensions that the function leaves open become symbols: ``b`` where they lead, ``d_0``, ``d_1``, … elsewhere.
    Arguments that are no tensors are fixed in the function, so they are not the handle's.

    Args:
      name: under which it is saved.
      function: a concrete function, or a ``tf.function`` with an ``input_signature``.
      saved_model: name of the supplemental that holds the SavedModel.
      narrow: as for :func:`save_functions`.

    Raises:
      ExportError: it has no single signature, or a tensor has neither rank nor a dtype that can be said.
      LeafError: a container is no dict, list or tuple.
      ImportError: TensorFlow is not installed.
    """
    tf = import_tensorflow("Converting a function of TensorFlow's")
    with context(object=name):
        function = _concrete(tf, function)
        texts = _Texts(tf)
        arguments = {own: texts.tree(value) for own, value, _ in _arguments(tf, function)}
        texts.narrower = _NARROWER if narrow else {}
        result = texts.tree(function.structured_outputs)
        count = [len(trees.flatten(tree)[0]) for tree in (arguments, result)]
        inputs, outputs = (tuple(f"{k}_{n}" for n in range(m)) for k, m in zip(("input", "output"), count, strict=True))
        return handle(name, arguments, result, inputs=inputs, outputs=outputs, saved_model=saved_model)


def save_functions(
    path: str | os.PathLike[str],
    functions: Mapping[str, Concrete],
    *,
    resources: Any = None,
    saved_model: str = SAVED_MODEL_NAME,
    narrow: bool = False,
    overwrite: bool = False,
) -> dict[str, Supplemental]:
    """Writes functions of TensorFlow's as one SavedModel, and describes them for pipelines.

    Args:
      path: the SavedModel's directory, which has to stay until the model is saved.
      functions: name → a concrete function, or a ``tf.function`` with an ``input_signature``. Their arguments may be
        pytrees and given by position.
      resources: variables, look-up tables and assets that the functions use: a ``tf.Module``, or a pytree of them.
      saved_model: name of the supplemental that holds the SavedModel.
      narrow: whether results of 64 bits are made 32-bit ones, which JAX takes without ``jax_enable_x64``.
      overwrite: whether a SavedModel that is there may be replaced.

    Returns:
      Supplementals of a model: a handle for each function under its name, and the SavedModel.

    Raises:
      ExportError: a function has no single signature, uses what is not among the resources, or takes or returns what
        cannot be said.
      LeafError: a container is no dict, list or tuple.
      PackageExistsError: there is something at the path.
      ImportError: TensorFlow is not installed.
    """
    tf = import_tensorflow("Saving functions of TensorFlow's")
    if saved_model in functions:
        raise ExportError(
            "A function has the name of its SavedModel.", object=saved_model, fix="rename it, or give saved_model="
        )
    concrete = {}
    for name, function in functions.items():
        with context(object=name):
            concrete[name] = _concrete(tf, function)
    handles = {n: convert_function(n, own, saved_model=saved_model, narrow=narrow) for n, own in concrete.items()}
    make_room(path, overwrite)
    module = tf.Module()
    module.resources = resources
    signatures = {name: _keyword_only(tf, function, narrow) for name, function in concrete.items()}
    try:
        tf.saved_model.save(module, os.fspath(path), signatures=signatures)
    except (AssertionError, ValueError) as error:  # which of them it is depends on the version
        raise ExportError(
            "TensorFlow cannot save the functions.",
            expected="resources= with all variables, tables and assets that they use",
            found=str(error).partition("\n")[0][:300],
        ) from error
    return {**handles, saved_model: from_saved_model(path)}


def function_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of a SavedModel's signatures; nothing of it is loaded.

    Args:
      path: its directory.

    Raises:
      ExportError: it holds no SavedModel.
      ImportError: TensorFlow is not installed.
    """
    import_tensorflow("Reading a SavedModel")
    saved_model_pb2 = importlib.import_module("tensorflow.core.protobuf.saved_model_pb2")
    with from_saved_model(path).open("saved_model.pb") as stream:
        found = saved_model_pb2.SavedModel.FromString(stream.read())
    names = {name for graph in found.meta_graphs for name in graph.signature_def}
    return tuple(sorted(names - {"__saved_model_init_op"}))


def tf_specs_to_jax(tree: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a function of TensorFlow's returns, as the arguments of the function of JAX's that takes it.

    Args:
      tree: pytree of ``tf.TensorSpec`` or symbolic tensors, such as ``function.structured_outputs``.

    Returns:
      Positional and keyword arguments, of ``jax.ShapeDtypeStruct`` whose open dimensions are symbols of one scope: a
      dict at the top is all keywords, a tuple or list all positional, a pair of such as it is, anything else one
      argument.

    Raises:
      LeafError: a leaf is a string, which JAX does not have.
      ExportError: a tensor has neither rank nor a dtype that JAX has.
      ImportError: TensorFlow is not installed.
    """
    texts = _Texts(import_tensorflow("Converting specs of TensorFlow's"))
    leaves, found = trees.flatten(texts.tree(tree, parse=True))
    for name, leaf in zip(found.names, leaves, strict=True):
        if leaf.kind == STRING:
            raise LeafError(
                "JAX has no strings.",
                leaf=name,
                expected="numbers",
                found=str(leaf),
                fix="pass them by the model function: Pipeline(pass_through=True)",
            )
    value = found.unflatten(specs.to_jax(leaves))
    if isinstance(value, (tuple, list)) and len(value) == 2:
        args, kwargs = value
        if isinstance(args, (tuple, list)) and isinstance(kwargs, dict):
            return tuple(args), kwargs
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return (), value
    return (tuple(value), {}) if isinstance(value, (tuple, list)) else ((value,), {})


# --- what TensorFlow says of its functions


def _concrete(tf: Any, function: Any) -> Concrete:
    if isinstance(function, tf.types.experimental.ConcreteFunction):
        return function
    if not hasattr(function, "get_concrete_function") or getattr(function, "input_signature", None) is None:
        raise ExportError(
            "A function of TensorFlow's has no single signature.",
            expected="a concrete function, or a tf.function with input_signature=",
            found=type(function).__qualname__,
            fix="give function.get_concrete_function(tf.TensorSpec(…))",
        )
    return function.get_concrete_function()


def _is_tensor(tf: Any, value: Any) -> bool:
    return isinstance(value, (tf.TensorSpec, tf.Tensor))


def _arguments(tf: Any, function: Concrete) -> list[tuple[str, Any, int | None]]:
    """The arguments that hold tensors: name, pytree of specs, and the position of one that is given by position.

    Raises:
      ExportError: an argument holds tensors and other things.
    """
    args, kwargs = function.structured_input_signature
    names = list(function.function_type.parameters)
    found = []
    for own, value, position in [
        *((names[n], value, n) for n, value in enumerate(args)),
        *((own, value, None) for own, value in kwargs.items()),
    ]:
        leaves = [_is_tensor(tf, leaf) for leaf in tf.nest.flatten(value)]
        if any(leaves):
            if not all(leaves):
                raise ExportError("An argument holds tensors and other things.", leaf=own, found=str(value)[:200])
            found.append((own, value, position))
    return found


class _Texts:
    """Specs of TensorFlow's as text; open dimensions become symbols, which are the same for all that are converted."""

    def __init__(self, tf: Any) -> None:
        self._tf = tf
        self._count = 0
        self.narrower: Mapping[str, str] = {}

    def tree(self, value: Any, *, parse: bool = False) -> Any:
        """A pytree of them: as text, or as specs.

        Raises:
          LeafError: a container is no dict, list or tuple.
          ExportError: a tensor has neither rank nor a dtype that can be said.
        """
        if _is_tensor(self._tf, value):
            spec = self._spec(value)
            return spec if parse else str(spec)
        if value is None:
            return None
        if isinstance(value, Mapping):
            return {key: self.tree(item, parse=parse) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            items = [self.tree(item, parse=parse) for item in value]
            return tuple(items) if isinstance(value, tuple) else items
        raise LeafError(
            "A result or argument of a TensorFlow function cannot be described.",
            expected="tensors, and dicts, lists and tuples of them",
            found=type(value).__qualname__,
        )

    def _spec(self, spec: Any) -> TensorSpec:
        name = self.narrower.get(spec.dtype.name, spec.dtype.name)
        if spec.shape.rank is None:
            raise ExportError(
                "A tensor's rank is not known.",
                expected="a shape",
                found=str(spec),
                fix="give it a shape: tf.ensure_shape",
            )
        sizes = []
        for axis, size in enumerate(spec.shape.as_list()):
            if size is None:
                size = dims.parse_shape("b" if axis == 0 else f"d_{self._count}")[0]
                self._count += axis > 0
            sizes.append(size)
        return TensorSpec(tuple(sizes), STRING if name == "string" else dtypes.parse(name))


def _keyword_only(tf: Any, function: Concrete, narrow: bool) -> Concrete:
    """The function as a SavedModel's signature has it: from a dict of tensors to a dict of tensors."""
    narrower = {own: getattr(tf, to) for own, to in _NARROWER.items()} if narrow else {}
    arguments = _arguments(tf, function)
    args, kwargs = function.structured_input_signature
    specs = [tf.TensorSpec(leaf.shape, leaf.dtype) for _, value, _ in arguments for leaf in tf.nest.flatten(value)]
    flat = {f"input_{n}": spec for n, spec in enumerate(specs)}

    def keyword_only(**tensors: Any) -> Any:
        remaining = iter([tensors[name] for name in flat])
        positional, keywords = list(args), dict(kwargs)
        for own, value, position in arguments:  # tf.nest has the order of our trees: keys are sorted
            given = tf.nest.map_structure(lambda _: next(remaining), value)
            if position is None:
                keywords[own] = given
            else:
                positional[position] = given
        results = [r for r in tf.nest.flatten(function(*positional, **keywords)) if r is not None]
        return {f"output_{n}": tf.cast(r, narrower.get(r.dtype.name, r.dtype)) for n, r in enumerate(results)}

    return tf.function(keyword_only, autograph=False).get_concrete_function(**flat)
