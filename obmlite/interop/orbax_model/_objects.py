"""What Orbax Model's functions take and return, as far as it is not obmlite's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from obmlite.errors import ArgumentError
from obmlite.function import Function, export
from obmlite.pipeline import Pipeline
from obmlite.polymorphic import Polymorphic, PolymorphicFunction
from obmlite.schema.records import DeviceRecord, Visibility

ORBAX_CHECKPOINT = "application/x.orbax-checkpoint"
"""MIME type of an Orbax checkpoint's directory; Orbax Model's README calls it ``orbax_checkpoint``."""


@dataclasses.dataclass(frozen=True)
class UnstructuredData:
    """Bytes, a text, or a file or directory.

    Attributes:
      file_system_location: a path, absolute or below the model's directory or the working directory.
      inlined_string: a text.
      inlined_bytes: bytes.
      mime_type: what it is.
      version: of what it is.
    """

    file_system_location: str | None = None
    inlined_string: str | None = None
    inlined_bytes: bytes | None = None
    mime_type: str | None = None
    version: str | None = None


@dataclasses.dataclass(frozen=True)
class ExternalValue:
    """Weights that lie in a checkpoint.

    Attributes:
      data: where it is, and of which kind.
    """

    data: UnstructuredData


def convert_path_to_value(path: str, mime_type: str | None = None, version: str | None = None) -> ExternalValue:
    """A checkpoint's directory as a value of a model, read when the model is saved.

    Args:
      path: absolute, or below the model's directory or the working directory.
      mime_type: ``"orbax_checkpoint"`` or ``"application/x.orbax-checkpoint"``; other kinds are carried as they are.
      version: of that kind.
    """
    return ExternalValue(UnstructuredData(str(path), mime_type=mime_type, version=version))


@dataclasses.dataclass(frozen=True)
class Orchestration:
    """Which objects of a model run one after the other; :func:`save` makes a pipeline of it."""

    model_function_name: str | None = None
    weights_name: str | None = None
    pre_processor_names: tuple[str, ...] = ()
    post_processor_names: tuple[str, ...] = ()

    def pipeline(self, function: Any) -> Pipeline:
        """The pipeline that it stands for.

        Args:
          function: the model function, of which the weights are the first argument; None if there is none.
        """
        if isinstance(function, (Polymorphic, PolymorphicFunction)):
            function = next(iter(function.functions))
        weights = None
        if self.weights_name is not None and isinstance(function, Function):
            weights = {function.signature.arguments[0]: self.weights_name}
        pre, post = list(self.pre_processor_names), list(self.post_processor_names)
        return Pipeline(pre=pre, function=self.model_function_name, post=post, weights=weights)


def orchestration(
    *,
    model_function_name: str | None = None,
    weights_name: str | None = None,
    pre_processor_name: str | Sequence[str] | None = None,
    post_processor_name: str | Sequence[str] | None = None,
) -> Orchestration:
    """Says which objects of a model run one after the other.

    Args:
      model_function_name: the model function; may be left out where there are processors.
      weights_name: the weights, which become its first argument.
      pre_processor_name: what runs before it; a list runs in order.
      post_processor_name: what runs behind it.
    """

    def names(given: str | Sequence[str] | None) -> tuple[str, ...]:
        return (given,) if isinstance(given, str) else tuple(given or ())

    return Orchestration(model_function_name, weights_name, names(pre_processor_name), names(post_processor_name))


@dataclasses.dataclass(frozen=True)
class GlobalSupplemental:
    """What a model carries beside its objects.

    Attributes:
      data: an :class:`Orchestration`, :class:`UnstructuredData`, :class:`obmlite.Supplemental`, bytes or text.
      save_as: the name of a file in Orbax Model's directory; here it is kept as the supplemental's metadata.
    """

    data: Any
    save_as: str | None = None


@dataclasses.dataclass(frozen=True)
class SaveOptions:
    """How to save a model.

    Attributes:
      version: of Orbax Model's format, at least 2; obmlite has its own.
      supplementals: by name.
      supplemental_info: the same, under the name that it had first.
      visibility: ``PRIVATE`` or ``PUBLIC`` by name of an object.
      device_assignment_by_coords: the devices that the model was made for, as :func:`obmlite.devices_of` lists them.
      save_shlo_to_file: code lies in files of its own either way.
      overwrite: whether a package that is at the path may be replaced.
    """

    version: int | None = None
    supplementals: Mapping[str, GlobalSupplemental] | None = None
    supplemental_info: Mapping[str, GlobalSupplemental] | None = None
    visibility: Mapping[str, str | Visibility] | None = None
    device_assignment_by_coords: Sequence[DeviceRecord] | None = None
    save_shlo_to_file: bool = False
    overwrite: bool = False

    def all_supplementals(self) -> dict[str, GlobalSupplemental]:
        """Those under either name.

        Raises:
          ArgumentError: one is given twice, or the version is one that never was written this way.
        """
        if self.version is not None and (type(self.version) is not int or self.version < 2):
            raise ArgumentError(
                "There is no such version of Orbax Model's format.",
                field="version",
                expected="2 or more",
                found=repr(self.version),
            )
        first, second = dict(self.supplementals or {}), dict(self.supplemental_info or {})
        for name in first.keys() & second.keys():
            raise ArgumentError(
                "A supplemental is given twice.", object=name, field="supplementals and supplemental_info"
            )
        return {**first, **second}


@dataclasses.dataclass(frozen=True)
class PendingFunction:
    """A function whose first argument will be weights that are not known yet; :func:`save` exports it."""

    fn: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    options: Mapping[str, Any]

    def export(self, weights: Any) -> Function:
        """Exports it.

        Args:
          weights: pytree of the weights' specs.

        Raises:
          ExportError: it cannot be exported as it is.
        """
        return export(self.fn, weights, *self.args, kwargs=self.kwargs, **self.options)
