"""A model → the files of a package."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from obmlite import _packaging, _together
from obmlite._coordination import Session
from obmlite._writing import Tensors, Writer, at_once, groups, numbered, record, slug
from obmlite.errors import LeafError, context
from obmlite.schema import records as r

if TYPE_CHECKING:
    from obmlite.model import Model


def save(
    model: Model,
    path: str | os.PathLike[str],
    *,
    overwrite: bool,
    file_bytes: int,
    progress: bool | None,
    timeout: float,
    local: bool,
) -> None:
    """Writes a package; the path holds the old package, or nothing, until all of it is there."""
    with context(package=os.fspath(path)):
        if local:
            _check_addressable(model)
            _save_alone(model, path, overwrite, file_bytes, progress)
            return
        with Session("save a package", timeout=timeout) as session:
            if session.count == 1:
                _save_alone(model, path, overwrite, file_bytes, progress)
            else:
                _together.save(model, path, overwrite, file_bytes, progress, session)


def _save_alone(
    model: Model, path: str | os.PathLike[str], overwrite: bool, file_bytes: int, progress: bool | None
) -> None:
    blobs = _packaging.opened(model)
    total = sum(weights.nbytes for weights in model.weights.values())
    total += sum(supplemental.nbytes for supplemental in model.supplementals.values())
    with _packaging.begin(path, overwrite) as (transaction, previous), _packaging.bar(path, total, progress) as update:
        files: dict[str, r.FileRecord] = {}
        functions = _packaging.functions(transaction, model, blobs, files)
        supplementals = _packaging.supplementals(transaction, model, files, update)
        written: dict[str, r.WeightsRecord] = {}
        with Writer(transaction, update) as writer:
            for name, weights in model.weights.items():
                tensors = Tensors.of(weights)
                parts = list(groups(tensors.parts(weights), file_bytes))
                with context(object=name):
                    stems = [slug(name) + numbered(n, len(parts)) for n in range(len(parts))]
                    made = [
                        writer.write(stem, weights.tree.names, group, at_once(weights))
                        for stem, group in zip(stems, parts, strict=True)
                    ]
                files.update({file.record.path: file.record for file in made})
                written[name] = record(name, weights, tensors, zip(parts, made, strict=True))
        transaction.commit(_packaging.manifest(model, files, functions, written, supplementals))
        _packaging.publish(transaction, written, previous)


def _check_addressable(model: Model) -> None:
    """Refuses arrays of which this process has not all.

    Raises:
      LeafError: there is one.
    """
    for name, weights in model.weights.items():
        for part in Tensors.of(weights).parts(weights):
            sharding = weights.source.tensor(part.leaf).sharding
            if sharding is not None and not sharding.is_fully_addressable and not sharding.is_fully_replicated:
                raise LeafError(
                    "A leaf lies partly on other processes' devices, so that this process cannot save it alone.",
                    object=name,
                    leaf=part.name,
                    expected="arrays on this process's devices",
                    found=str(sharding),
                    fix="call save from all processes, without local=True",
                )
