"""Checkpoints that a package carries because nobody could read them when it was saved."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile

from obmlite import _assembling
from obmlite.errors import ArgumentError, CorruptPackageError, context
from obmlite.interop.orbax_model import _checkpoints
from obmlite.interop.orbax_model._objects import ORBAX_CHECKPOINT, Orchestration
from obmlite.model import Model
from obmlite.pipeline import BoundPipeline
from obmlite.schema.records import Visibility
from obmlite.supplemental import Supplemental
from obmlite.weights import Weights

ORCHESTRATION = "application/x.obmlite-orbax-orchestration+json"
"""MIME type of an orchestration whose weights could not be read."""


def checkpoint(path: str, version: str) -> Supplemental:
    """A checkpoint's directory as it is."""
    hint = f"{_checkpoints.INSTALL}; obmlite.interop.orbax_model.read_checkpoints then makes weights of it"
    return Supplemental.from_directory(path, mime_type=ORBAX_CHECKPOINT, version=version, metadata={"install": hint})


def orchestration(given: Orchestration) -> Supplemental:
    """An orchestration as it is."""
    return Supplemental.from_bytes(json.dumps(dataclasses.asdict(given)).encode(), mime_type=ORCHESTRATION)


def read_checkpoints(model: Model) -> Model:
    """A model in which the Orbax checkpoints that a package carries are weights.

    Orchestrations that waited for them are pipelines; ``save`` writes it as a package that carries them no more.

    Args:
      model: one that was saved where orbax-checkpoint was not installed.

    Raises:
      ArgumentError: Orbax cannot read a checkpoint, or it does not fit the function that it is bound to.
      CorruptPackageError: what is carried is not what was saved.
      ImportError: orbax-checkpoint is not installed.
    """
    found: dict[str, Weights] = {}
    waiting: dict[str, Orchestration] = {}
    for name, own in model.supplementals.items():
        with context(object=name, package=model.path):
            if own.mime_type == ORBAX_CHECKPOINT:
                with tempfile.TemporaryDirectory(prefix="obmlite-") as folder:
                    found[name] = Weights(_checkpoints.read(own.extract(os.path.join(folder, "checkpoint"))))
            elif own.mime_type == ORCHESTRATION:
                waiting[name] = _decoded(own)
    weights = {**model.weights, **found}
    left = {n: s for n, s in model.supplementals.items() if n not in found and n not in waiting}

    def missing(name: str) -> Exception:
        return ArgumentError("An orchestration names a function that is not there.", found=name)

    find = _assembling.finder(model.functions, model.polymorphic, left, missing)
    pipelines = dict(model.pipelines)
    for name, given in waiting.items():
        with context(object=name, package=model.path):
            steps = given.pipeline(find(given.model_function_name) if given.model_function_name else None).records(find)
            pipelines[name] = BoundPipeline(name, steps, find, weights, {})
    visibility = {name: model.visibility.get(name, Visibility.PUBLIC) for name in [*model.objects, *found]}
    return Model.of_parts(
        model.functions,
        weights,
        pipelines,
        model.default_pipeline or (next(iter(pipelines)) if len(pipelines) == 1 else ""),
        model.metadata,
        model.path,
        polymorphic=model.polymorphic,
        supplementals=left,
        visibility=visibility,
        device_assignment=model.device_assignment,
    )


def _decoded(given: Supplemental) -> Orchestration:
    try:
        fields = json.loads(given.read())
        for field in ("pre_processor_names", "post_processor_names"):
            fields[field] = tuple(map(str, fields[field]))
        return Orchestration(**fields)
    except (TypeError, KeyError, ValueError) as error:
        if isinstance(error, CorruptPackageError):
            raise
        raise CorruptPackageError("An orchestration is malformed.", found=str(error)[:300]) from error
