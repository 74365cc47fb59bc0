"""Functions of TensorFlow's as steps of pipelines: what a package says of one, and how it runs.

A SavedModel is carried as a directory and never looked into. A *handle*, a small supplemental beside it, names one of
its signatures, and says which leaf of which argument and result is which of that signature's tensors. All of this needs
no TensorFlow but :meth:`Step.run`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from obmlite import dims, dtypes
from obmlite import tree as trees
from obmlite.errors import ArgumentError, CorruptPackageError, ExportError, LeafError, ObmliteError, context
from obmlite.pipeline import HostStep
from obmlite.schema.records import ArgumentKind
from obmlite.signature import Signature
from obmlite.specs import TensorSpec, spec
from obmlite.supplemental import Supplemental

__all__ = ["HANDLE", "SAVED_MODEL", "SAVED_MODEL_NAME", "STRING", "Handle", "Step", "TextSignature", "parse"]

HANDLE = "application/x.obmlite-tensorflow-function"
"""MIME type of a handle."""

HANDLE_VERSION = "1"

SAVED_MODEL = "application/x.tensorflow-saved-model"
"""MIME type of a SavedModel's directory, as Orbax Model has it."""

SAVED_MODEL_VERSION = "1.0"

SAVED_MODEL_NAME = "tensorflow_saved_model"
"""The name of a package's SavedModel, if it is not given another."""

INSTALL = "pip install 'obmlite[tensorflow]'"


def import_tensorflow(what: str) -> Any:
    """TensorFlow.

    Raises:
      ImportError: it is not installed; the text says what needs it, and how to install it.
    """
    try:
        return importlib.import_module("tensorflow")
    except ImportError as error:
        raise ImportError(f"{what} needs TensorFlow: {INSTALL}") from error


# --- texts among the leaves


class _Text(dtypes.DType):
    """TensorFlow's strings: bytes of any length, which no array of JAX holds and no tensor of a package is."""

    __slots__ = ()

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(object)

    @property
    def jax(self) -> Any:
        return np.dtype(object)


STRING = _Text(0, "string", "string", 0, "")


def parse(text: Any) -> Any:
    """:func:`obmlite.spec` that knows ``"string[b]"`` too; maps over pytrees of text."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, str) and leaf.strip().startswith("string"):
            name, bracket, shape = leaf.strip().removesuffix("]").partition("[")
            if name == "string" and bool(bracket) == leaf.strip().endswith("]"):
                return TensorSpec(dims.parse_shape(shape), STRING)
        return spec(leaf)

    return jax.tree.map(one, text)


def _texts(name: str, value: Any) -> np.ndarray[Any, Any]:
    """Texts as TensorFlow takes them: an array of bytes, str as UTF-8.

    Raises:
      ArgumentError: something else is among them.
    """
    found = np.array(value, dtype=object)
    flat = [text.encode() if isinstance(text, str) else text for text in found.reshape(-1)]
    wrong = next((text for text in flat if not isinstance(text, bytes)), b"")
    if not isinstance(wrong, bytes):
        raise ArgumentError(
            "An argument is no text.",
            leaf=name,
            expected="str, bytes, or arrays of these",
            found=type(wrong).__qualname__,
        )
    out = np.empty(len(flat), object)
    out[:] = flat
    return out.reshape(found.shape)


class TextSignature(Signature):
    """A signature whose leaves may be texts; an argument that is one leaf of them may be given as a list."""

    def match(self, arguments: Mapping[str, Any]) -> list[Any]:
        """As :meth:`obmlite.Signature.match`; texts come back as arrays of bytes."""
        given = dict(arguments)
        for name in self.arguments:
            tree, specs = self.argument(name)
            if name in given and len(tree) == 1 and specs[0].kind == STRING:
                given[name] = _texts(name, given[name])
        leaves, tree = trees.flatten_arguments(given)
        wanted = dict(zip(self.inputs.names, self.input_specs, strict=True))
        found: dict[str, Any] = {}
        stand_ins = []
        for name, leaf in zip(tree.names, leaves, strict=True):
            own = wanted.get(name)
            if own is not None and own.kind == STRING:
                leaf = found[name] = _texts(name, leaf)
                leaf = _stand_in(leaf.shape, STRING, own)
            elif own is not None and own.symbols and _kind(leaf) == own.kind:
                found[name] = leaf
                leaf = _stand_in(leaf.shape, own.kind, own)
            stand_ins.append(leaf)
        matched = super().match(_arguments(tree, stand_ins))
        return [found.get(name, value) for name, value in zip(self.inputs.names, matched, strict=True)]


def _kind(leaf: Any) -> dtypes.DType | None:
    """An array's dtype; None for anything else, which :meth:`obmlite.Signature.match` will explain."""
    with contextlib.suppress(LeafError):
        return dtypes.of(leaf) if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else None
    return None


def _stand_in(shape: Sequence[int], kind: dtypes.DType, wanted: TensorSpec) -> TensorSpec:
    """What is compared in place of a leaf. Whether two open dimensions are to be the same, TensorFlow knows best."""
    fits = kind == wanted.kind and len(shape) == wanted.ndim
    if fits and all(own == size or not isinstance(own, int) for size, own in zip(shape, wanted.shape, strict=True)):
        return TensorSpec(wanted.shape, kind)
    return TensorSpec(tuple(shape), kind)


def _arguments(tree: trees.Tree, leaves: Sequence[Any]) -> dict[str, Any]:
    """Arguments by name, of the leaves of all of them."""
    value = {}
    for node in tree.children(0):
        own = leaves[tree.first_leaf[node] : tree.first_leaf[tree.ends[node]]]
        value[str(tree.keys[node])] = tree.subtree(node).unflatten(own)
    return value


# --- handles


@dataclasses.dataclass(frozen=True)
class Handle:
    """A function of a SavedModel.

    Attributes:
      function: the name of its signature in the SavedModel.
      saved_model: name of the supplemental that holds the SavedModel.
      arguments: name → pytree of specs as text, ``"string[b]"`` among them.
      result: such a pytree.
      inputs: the tensor's name in the SavedModel's signature for each leaf of the arguments.
      outputs: the same for each leaf of the result.
    """

    function: str
    saved_model: str
    arguments: Mapping[str, Any]
    result: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def signature(self) -> TextSignature:
        """The signature of the step.

        Raises:
          ExportError: a spec is malformed, or the names are not those of the leaves.
          LeafError: a leaf is no spec.
        """
        leaves, inputs = trees.flatten_arguments({name: parse(value) for name, value in self.arguments.items()})
        results, outputs = trees.flatten(parse(self.result))
        wrong = next((leaf for leaf in (*leaves, *results) if not isinstance(leaf, TensorSpec)), None)
        if wrong is not None:
            raise LeafError(
                "A leaf is no spec.", expected='text such as "f32[b,4]" or "string[b]"', found=repr(wrong)[:80]
            )
        for given, found in ((self.inputs, leaves), (self.outputs, results)):
            if len(given) != len(found) or len(set(given)) != len(given):
                raise ExportError(
                    "A TensorFlow function needs one name for each tensor.",
                    expected=f"{len(found)} different names",
                    found=", ".join(given) or "none",
                )
        return TextSignature(
            inputs,
            tuple(leaves),
            outputs,
            tuple(results),
            (ArgumentKind.POSITIONAL_OR_KEYWORD,) * len(self.arguments),
        )

    def supplemental(self) -> Supplemental:
        """The handle as a package carries it.

        Raises:
          ExportError: a spec is malformed, or the names are not those of the leaves.
          LeafError: a container is no dict, list or tuple, or a leaf is no spec.
        """
        self.signature()
        data = trees.pack_static({**dataclasses.asdict(self), "arguments": dict(self.arguments)})
        return Supplemental.from_bytes(data, mime_type=HANDLE, version=HANDLE_VERSION)

    @classmethod
    def of(cls, supplemental: Supplemental) -> Handle:
        """Undoes :meth:`supplemental`.

        Raises:
          CorruptPackageError: it is no handle, or one of another version.
        """
        try:
            if supplemental.version != HANDLE_VERSION:
                raise ValueError(f"version {supplemental.version!r}")
            self = cls(**trees.unpack_static(supplemental.read()))
            texts = (self.function, self.saved_model, *self.inputs, *self.outputs, *self.arguments)
            if not all(type(text) is str for text in texts):
                raise ValueError("a name that is no text")
            self.signature()
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, CorruptPackageError):
                raise
            found = error.problem if isinstance(error, ObmliteError) else str(error)
            raise CorruptPackageError("The handle of a TensorFlow function is malformed.", found=found[:300]) from error
        return self


class Step(HostStep):
    """A step that TensorFlow runs."""

    def __init__(self, name: str, supplementals: Mapping[str, Supplemental]) -> None:
        """Reads the handle; of the SavedModel nothing.

        Args:
          name: of the handle among them.
          supplementals: a model's.

        Raises:
          CorruptPackageError: it is no handle.
          ArgumentError: the SavedModel that it names is not there.
        """
        self.name = name
        with context(object=name):
            self.handle = Handle.of(supplementals[name])
            self.signature = self.handle.signature()
            own = supplementals.get(self.handle.saved_model)
            if own is None or own.mime_type != SAVED_MODEL or not own.is_directory:
                there = [n for n, s in supplementals.items() if s.mime_type == SAVED_MODEL]
                raise ArgumentError(
                    "A TensorFlow function is of a SavedModel that is not there.",
                    expected=", ".join(there) or f"a supplemental, a directory of type {SAVED_MODEL}",
                    found=self.handle.saved_model,
                )
        self._saved_model = own

    def run(self, arguments: Mapping[str, Any]) -> Any:
        """The results for arguments by name: numpy arrays, of bytes where they are texts.

        Raises:
          ArgumentError: the arguments do not match the signature, the SavedModel has no such function, or the call is
            traced by JAX.
          ImportError: TensorFlow is not installed.
        """
        leaves = self.signature.match(arguments)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            raise ArgumentError(
                "A step that TensorFlow runs cannot be traced by JAX.",
                fix="call the pipeline outside of jax.jit and the like",
            )
        tf = import_tensorflow(f"The pipeline's step {self.name!r}, a function of TensorFlow's,")
        signatures = _loaded(self._saved_model, tf).signatures
        if self.handle.function not in signatures:
            raise ArgumentError(
                "The SavedModel has no such function.",
                expected=", ".join(sorted(signatures)) or "a function; it has none",
                found=self.handle.function,
            )
        kinds = [s.kind for s in self.signature.input_specs]
        tensors = {
            name: tf.constant(np.asarray(leaf, kind.numpy), tf.string if kind == STRING else None)
            for name, leaf, kind in zip(self.handle.inputs, leaves, kinds, strict=True)
        }
        results = signatures[self.handle.function](**tensors)
        missing = [name for name in self.handle.outputs if name not in results]
        if missing:
            raise ArgumentError(
                "The SavedModel's function gives no such result.",
                expected=", ".join(sorted(results)),
                found=", ".join(missing),
            )
        found = [results[name] for name in self.handle.outputs]
        # A scalar comes as no array.
        leaves = [np.asarray(r.numpy(), object if r.dtype == tf.string else None) for r in found]
        return self.signature.outputs.unflatten(leaves)


class _Loaded:
    """A SavedModel in memory, and the directory that it came from: it may read its assets when it is called."""

    def __init__(self, supplemental: Supplemental, tf: Any) -> None:
        folder = tempfile.mkdtemp(prefix="obmlite-")
        weakref.finalize(self, shutil.rmtree, folder, True)
        self._module = tf.saved_model.load(supplemental.extract(f"{folder}/saved_model"))
        self.signatures = self._module.signatures


_LOADED: weakref.WeakKeyDictionary[Supplemental, _Loaded] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def _loaded(supplemental: Supplemental, tf: Any) -> _Loaded:
    """A SavedModel, loaded once for all steps that are of it; each of its bytes is compared with its digest first."""
    with _LOCK:
        if supplemental not in _LOADED:
            _LOADED[supplemental] = _Loaded(supplemental, tf)
        return _LOADED[supplemental]
