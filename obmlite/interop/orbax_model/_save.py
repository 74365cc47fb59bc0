"""Saving a dict of objects, as Orbax Model does, as a package of obmlite's."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from obmlite.errors import ArgumentError, ExportError, PackageExistsError, context
from obmlite.function import Function
from obmlite.interop.orbax_model import _carried, _checkpoints
from obmlite.interop.orbax_model._objects import (
    ORBAX_CHECKPOINT,
    ExternalValue,
    GlobalSupplemental,
    Orchestration,
    PendingFunction,
    SaveOptions,
    UnstructuredData,
)
from obmlite.interop.tensorflow import from_saved_model, function_names
from obmlite.interop.tensorflow_steps import HANDLE, SAVED_MODEL, Handle
from obmlite.io.commit import MANIFEST
from obmlite.io.staging import sync_folder
from obmlite.model import Model
from obmlite.pipeline import Pipeline
from obmlite.polymorphic import Polymorphic
from obmlite.schema.records import Visibility
from obmlite.supplemental import Supplemental
from obmlite.weights import Weights

_CHECKPOINTS = ("orbax_checkpoint", ORBAX_CHECKPOINT)
_SAVED_MODELS = ("tensorflow_saved_model", SAVED_MODEL)


def save(module: Mapping[str, Any], target_dir: str | os.PathLike[str], options: SaveOptions | None = None) -> None:
    """Saves objects and what belongs to them as a package.

    An orchestration among the supplementals becomes a pipeline of its name; the only one is what calling the model
    runs. Checkpoints are read into weights. Without orbax-checkpoint they are carried as they are, and so is the
    orchestration that needs them.

    Args:
      module: name → what ``jax2obm.convert`` or ``tf2obm.convert_function`` returned; a sequence of functions, of which
        the arguments choose one; what ``convert_path_to_value`` returned; or :class:`obmlite.Weights`.
      target_dir: where. It may hold the checkpoints and SavedModels that are named, and nothing else; these stay there.
      options: supplementals and the like.

    Warns:
      UserWarning: checkpoints were carried as they are; it says what to install.

    Raises:
      ArgumentError: a name, path or object is not there, or does not fit.
      ExportError: a function cannot be exported for the weights that it is bound to.
      PackageExistsError: there is a package, or something else, at the path.
    """
    options = options or SaveOptions()
    target = os.path.abspath(target_dir)
    parts = _Parts(target)
    for name, value in module.items():
        with context(object=name):
            parts.add(name, value)
    for name, supplemental in options.all_supplementals().items():
        with context(object=name):
            parts.attach(name, supplemental)
    parts.check_handles()
    pipelines = parts.pipelines()
    model = Model(
        parts.objects,
        pipelines=pipelines,
        default_pipeline=next(iter(pipelines)) if len(pipelines) == 1 else None,
        supplementals=parts.supplementals,
        private=[name for name, seen in (options.visibility or {}).items() if _is_private(name, seen)],
        device_assignment=options.device_assignment_by_coords or (),
    )
    _write(model, target, parts.paths, options.overwrite)
    if parts.carried:
        warnings.warn(
            f"Carried as they are, since orbax-checkpoint is not installed, and therefore in no pipeline: "
            f"{', '.join(parts.carried)}. Where it is installed ({_checkpoints.INSTALL}), "
            "orbax_model.read_checkpoints(obmlite.load(…)) has weights of them.",
            UserWarning,
            stacklevel=2,
        )


def _is_private(name: str, seen: Any) -> bool:
    text = str(getattr(seen, "name", seen)).lower()
    if text not in (v.name.lower() for v in Visibility):
        raise ArgumentError(
            "There is no such visibility.",
            object=name,
            field="visibility",
            expected="PUBLIC, PRIVATE",
            found=repr(seen),
        )
    return text == "private"


class _Parts:
    """A model's parts, as they are found in Orbax Model's dicts."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.objects: dict[str, Any] = {}
        self.supplementals: dict[str, Supplemental] = {}
        self.paths: list[str] = []  # that were named
        self.carried: list[str] = []  # checkpoints that could not be read
        self._pending: dict[str, PendingFunction] = {}
        self._orchestrations: dict[str, Orchestration] = {}
        self._saved_models: dict[str, str] = {}

    def add(self, name: str, value: Any) -> None:
        """An object.

        Raises:
          ArgumentError: it is none, or its path is not there.
        """
        if isinstance(value, PendingFunction):
            self._pending[name] = value
        elif isinstance(value, (Function, Weights)):
            self.objects[name] = value
        elif isinstance(value, Supplemental) and value.mime_type == HANDLE:
            self.supplementals[name] = value
        elif isinstance(value, ExternalValue):
            self._add_value(name, value.data)
        elif isinstance(value, Sequence) and value and all(isinstance(f, Function) for f in value):
            self.objects[name] = Polymorphic(list(value))
        else:
            raise ArgumentError(
                "An object of a model is of another kind.",
                expected="a converted function or a list of them, a converted path, or obmlite.Weights",
                found=type(value).__qualname__,
            )

    def _add_value(self, name: str, data: UnstructuredData) -> None:
        path = self._find(data.file_system_location or "")
        if data.mime_type not in _CHECKPOINTS:
            self.supplementals[name] = _as_it_is(path, data)
        elif _checkpoints.installed():
            self.objects[name] = Weights(_checkpoints.read(path))
        else:
            self.supplementals[name] = _carried.checkpoint(path, data.version or "")
            self.carried.append(name)

    def attach(self, name: str, given: GlobalSupplemental) -> None:
        """A supplemental.

        Raises:
          ArgumentError: it is none, its path is not there, or its name is taken.
        """
        if not isinstance(given, GlobalSupplemental):
            raise ArgumentError(
                "A supplemental is of another kind.", expected="GlobalSupplemental(…)", found=type(given).__qualname__
            )
        if name in self.supplementals:
            raise ArgumentError("A supplemental has the name of an object.", fix="rename one of them")
        data = given.data
        metadata = {"save_as": given.save_as} if given.save_as else {}
        if isinstance(data, Orchestration):
            self._orchestrations[name] = data
        elif isinstance(data, Supplemental):
            self.supplementals[name] = data
        elif isinstance(data, (bytes, str)):
            raw = data.encode() if isinstance(data, str) else data
            self.supplementals[name] = Supplemental.from_bytes(raw, metadata=metadata)
        elif isinstance(data, UnstructuredData):
            self.supplementals[name] = self._unstructured(name, data, metadata)
        else:
            raise ArgumentError(
                "A supplemental's data are of another kind.",
                expected="an orchestration, UnstructuredData, obmlite.Supplemental, bytes or text",
                found=type(data).__qualname__,
            )

    def _unstructured(self, name: str, data: UnstructuredData, metadata: Mapping[str, Any]) -> Supplemental:
        given = [v for v in (data.file_system_location, data.inlined_string, data.inlined_bytes) if v is not None]
        if len(given) != 1:
            raise ArgumentError(
                "Unstructured data are one of three things.",
                expected="one of file_system_location, inlined_string and inlined_bytes",
                found=f"{len(given)} of them",
            )
        if data.mime_type in _SAVED_MODELS:
            path = self._find_saved_model(data.file_system_location or "")
            self._saved_models[name] = path
            return from_saved_model(path)
        if data.file_system_location is not None:
            return _as_it_is(self._find(data.file_system_location), data, metadata)
        raw = data.inlined_bytes if data.inlined_string is None else data.inlined_string.encode()
        kind = data.mime_type or "application/octet-stream"
        return Supplemental.from_bytes(raw or b"", mime_type=kind, version=data.version or "", metadata=metadata)

    def _find(self, given: str) -> str:
        """What a path names: below the model's directory, or as it stands.

        Raises:
          ArgumentError: there is nothing.
        """
        for path in (os.path.join(self.target, given), os.path.abspath(given)):
            if given and os.path.exists(path):
                self.paths.append(os.path.normpath(path))
                return os.path.normpath(path)
        raise ArgumentError(
            "A path is not there.",
            expected=f"something at {os.path.join(self.target, given)} or {os.path.abspath(given)}",
            found=repr(given),
        )

    def _find_saved_model(self, given: str) -> str:
        """A SavedModel's directory.

        Orbax Model's README saves it below one name and gives another: the only one in the model's directory will do.
        """
        if not os.path.exists(os.path.join(self.target, given)) and os.path.isdir(self.target):
            found = [n for n in os.listdir(self.target) if os.path.isfile(f"{self.target}/{n}/saved_model.pb")]
            given = found[0] if len(found) == 1 and not os.path.exists(given) else given
        return self._find(given)

    def check_handles(self) -> None:
        """Compares handles of TensorFlow's functions with the SavedModel.

        Raises:
          ArgumentError: the SavedModel is not there, or lacks a function.
        """
        for name, own in self.supplementals.items():
            if own.mime_type != HANDLE:
                continue
            handle = Handle.of(own)
            if handle.saved_model not in self._saved_models and len(self._saved_models) == 1:
                handle = dataclasses.replace(handle, saved_model=next(iter(self._saved_models)))
                self.supplementals[name] = handle.supplemental()
            if handle.saved_model not in self._saved_models:
                raise ArgumentError(
                    "The SavedModel of a TensorFlow function is not among the supplementals.",
                    object=name,
                    expected=", ".join(self._saved_models) or "tf2obm.tf_saved_model_as_obm_supplemental(…)",
                    found=handle.saved_model,
                )
            there = function_names(self._saved_models[handle.saved_model])
            if handle.function not in there:
                raise ArgumentError(
                    "The SavedModel has no such function.",
                    object=name,
                    expected=", ".join(there) or "a function; it has none",
                    found=handle.function,
                    fix="give it to tf2obm.save_tf_functions under this name",
                )

    def pipelines(self) -> dict[str, Pipeline]:
        """The orchestrations as pipelines; functions that waited for their weights are exported.

        Raises:
          ArgumentError: one names what is not there.
          ExportError: a function cannot be exported for its weights, or has none.
        """
        found = {}
        for name, own in self._orchestrations.items():
            if own.weights_name in self.carried:
                self.supplementals[name] = _carried.orchestration(own)
                continue
            with context(object=name):
                found[name] = self._pipeline(own)
        for name in self._pending:
            why = f"{_checkpoints.INSTALL}, or give " if self.carried else "give "
            raise ExportError(
                "A function takes one argument more than was given, and no orchestration names weights for it.",
                object=name,
                fix=f"{why}jax2obm.convert the weights' specs as its first argument",
            )
        return found

    def _pipeline(self, own: Orchestration) -> Pipeline:
        function = own.model_function_name
        if own.weights_name is not None:
            bound = self.objects.get(own.weights_name)
            if not isinstance(bound, Weights):
                there = [n for n, v in self.objects.items() if isinstance(v, Weights)]
                raise ArgumentError(
                    "An orchestration names weights that are not there.",
                    expected=", ".join(there) or "weights",
                    found=own.weights_name,
                )
            if function in self._pending:
                specs = bound.tree.unflatten(list(bound.specs))
                self.objects[function] = self._pending.pop(function).export(specs)
        return own.pipeline(self.objects.get(function or ""))


def _as_it_is(path: str, data: UnstructuredData, metadata: Mapping[str, Any] | None = None) -> Supplemental:
    make = Supplemental.from_directory if os.path.isdir(path) else Supplemental.from_file
    kind = data.mime_type or "application/octet-stream"
    return make(path, mime_type=kind, version=data.version or "", metadata=metadata)


def _write(model: Model, target: str, named: Sequence[str], overwrite: bool) -> None:
    """Saves a model, also into a directory that holds what the model was made of.

    Raises:
      PackageExistsError: the directory holds something else.
    """
    inside = {os.path.relpath(path, target).split(os.sep)[0] for path in named}
    there = set(os.listdir(target)) if os.path.isdir(target) else set()
    if not there or MANIFEST in there or there - inside:  # the last one is an error, which obmlite's own save finds
        model.save(target, overwrite=overwrite)
        return
    beside = f"{target}.{secrets.token_hex(4)}.tmp"
    try:
        model.save(beside)
        made = os.listdir(beside)
        if taken := there.intersection(made):
            raise PackageExistsError(
                "What the model is made of has the name of a part of a package.",
                package=target,
                found=", ".join(sorted(taken)),
                fix="give that directory another name",
            )
        for names in (set(made) - {MANIFEST}, {MANIFEST}):  # the manifest, which makes it a package, last
            for name in names:
                os.rename(os.path.join(beside, name), os.path.join(target, name))
            _sync(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _sync(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync_folder(descriptor)
    finally:
        os.close(descriptor)
