"""A package → a model: the manifest is read, everything else when it is first used."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection
from typing import Any

import jax

from obmlite import _engine
from obmlite._collector import paused
from obmlite._files import WeightsFiles
from obmlite._names import Names
from obmlite._tensors import StoredSource
from obmlite.errors import (
    ArgumentError,
    CorruptPackageError,
    MissingFileError,
    PackageNotFoundError,
    UnsupportedFormatError,
    context,
)
from obmlite.function import Function
from obmlite.io import digest
from obmlite.io.commit import MANIFEST
from obmlite.io.store import LocalDirectory, Store
from obmlite.model import Model
from obmlite.pipeline import BoundPipeline
from obmlite.schema import records
from obmlite.schema.decode import decode
from obmlite.signature import Signature
from obmlite.weights import Weights

__all__ = ["load"]


def load(
    path: str | os.PathLike[str],
    *,
    mmap: bool | None = None,
    engine: str = "auto",
    allow_custom_calls: Collection[str] = (),
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """Opens a package. Only its manifest is read; everything else when it is first used.

    Args:
      path: the package's directory.
      mmap: whether weights are mapped, so that nothing of them is read before it is used, or read piece by piece. Left
        out, they are mapped unless they lie on a network or FUSE file system, where a fault in a mapped page is slow,
        and one that fails kills the process.
      engine: how functions are read: ``"export"`` by ``jax.export``, ``"rebuild"`` from what the manifest says,
        ``"auto"`` by the first of these that this JAX accepts.
      allow_custom_calls: targets of custom calls that functions may make beyond those that JAX promises to keep.
      mesh: the mesh that functions are called on, as by :meth:`obmlite.Function.on`; those that fix theirs need it.

    Raises:
      PackageNotFoundError: there is no package at the path.
      CorruptPackageError: the manifest is not what was saved.
      UnsupportedFormatError: the package needs a newer obmlite.
    """
    if engine not in ("auto", *_engine.ENGINES):
        raise ArgumentError(
            "There is no such engine.", field="engine", expected=", ".join(("auto", *_engine.ENGINES)), found=engine
        )
    if "://" in os.fspath(path):
        raise PackageNotFoundError("Only local directories can be loaded.", package=path)
    store = LocalDirectory(path, mmap=mmap)
    with context(package=store.name):
        return open_model(store, decode(open_manifest(store)), engine, allow_custom_calls, mesh)


def open_manifest(store: Store) -> bytes:
    """The manifest's bytes.

    Raises:
      PackageNotFoundError: there is none, so this is no package.
    """
    try:
        source = store.open(MANIFEST)
    except MissingFileError as error:
        raise PackageNotFoundError(
            "The directory is no package: it has no manifest.", package=store.name, expected=MANIFEST
        ) from error
    try:
        return source.read(0, source.size)
    finally:
        source.close()


def function_signature(record: records.FunctionRecord) -> Signature:
    """The signature that a manifest holds in parts: trees, and the specs of the module's arguments and results."""
    return Signature(
        record.inputs,
        record.primal.arguments[: record.inputs.num_leaves],
        record.outputs,
        record.primal.results,
        record.argument_kinds,
        record.constraints,
        record.fixed,
    )


def open_model(
    store: Store,
    manifest: records.ManifestRecord,
    engine: str = "auto",
    allow_custom_calls: Collection[str] = (),
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """The model that a manifest describes, whose files are in a store."""

    def function(name: str) -> Function:
        record = manifest.functions[name]
        modules = (record.primal, *record.vjps)
        program = _engine.Program(
            modules=modules,
            constraints=record.constraints,
            blobs=functools.lru_cache(lambda module: read_file(store, manifest.files[module.file])),
            allow_custom_calls=allow_custom_calls,
        )
        made = Function(
            name,
            function_signature(record),
            program,
            lambda: [_capture(*key) for key in _engine.captured(modules)],
            metadata=record.metadata,
            bindings=record.bindings,
            package=store.name,
            engine=engine,
        )
        return made if mesh is None else made.on(mesh)

    def _capture(own: str, leaf: int) -> Any:
        if own not in manifest.weights or leaf >= manifest.weights[own].tree.num_leaves:
            raise CorruptPackageError(
                "A function captures what is not there.", field="Captures.leaf", found=f"leaf {leaf} of {own!r}"
            )
        return all_weights[own].leaf(leaf).restore()

    def weights(name: str) -> Weights:
        with paused():
            record = manifest.weights[name]
        source = StoredSource(WeightsFiles(store, manifest.files, record))
        return Weights.from_source(record.tree, record.specs, source, record.metadata)

    def pipeline(name: str) -> BoundPipeline:
        record = manifest.pipelines[name]
        with context(object=name):
            if len(record.steps) != 1 or record.steps[0].role is not records.StepRole.MODEL or record.pass_through:
                raise UnsupportedFormatError("The pipeline has processors, which this obmlite does not run.")
            step = record.steps[0]
            if step.function not in manifest.functions:
                raise CorruptPackageError(
                    "A pipeline names a function that is not there.", field="Step.function", found=step.function
                )
            for binding in step.bindings:
                if binding.weights not in manifest.weights:
                    raise CorruptPackageError(
                        "A pipeline names weights that are not there.", field="Binding.weights", found=binding.weights
                    )
        return BoundPipeline(name, functions[step.function], step.bindings, all_weights, record.metadata)

    functions = Names(list(manifest.functions), function)
    all_weights = Names(list(manifest.weights), weights)
    pipelines = Names(list(manifest.pipelines), pipeline)
    return Model.of_parts(functions, all_weights, pipelines, manifest.default_pipeline, manifest.metadata, store.name)


def read_file(store: Store, record: records.FileRecord) -> bytes:
    """All bytes of a file that is no weights file.

    Raises:
      CorruptPackageError: they are not those that were saved.
    """
    source = store.open(record.path)
    try:
        if source.size != record.length:
            raise CorruptPackageError(
                "A file has another length than the manifest says.",
                field="length",
                expected=f"{record.path}: {record.length} bytes",
                found=f"{source.size} bytes",
            )
        data = source.read(0, source.size)
    finally:
        source.close()
    found = digest.sha256(data)
    if found != record.digest:
        raise CorruptPackageError(
            "A file's digest does not match: its bytes were changed.",
            field="digest",
            expected=f"{record.path}: {record.digest.hex()}",
            found=found.hex(),
        )
    return data
