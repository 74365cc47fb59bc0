"""A package → a model: the manifest is read, everything else when it is first used."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection
from typing import Any

import jax

from obmlite import _engine
from obmlite._assembling import finder
from obmlite._collector import paused
from obmlite._files import WeightsFiles
from obmlite._names import Names
from obmlite._tensors import StoredSource
from obmlite.errors import (
    ArgumentError,
    CorruptPackageError,
    MissingFileError,
    PackageNotFoundError,
    context,
)
from obmlite.function import Function
from obmlite.io import checked, versions
from obmlite.io.commit import MANIFEST
from obmlite.io.store import LocalDirectory, Store
from obmlite.model import Model
from obmlite.pipeline import BoundPipeline
from obmlite.polymorphic import PolymorphicFunction
from obmlite.schema import records
from obmlite.schema.decode import decode
from obmlite.signature import Signature
from obmlite.supplemental import Supplemental
from obmlite.weights import Weights

__all__ = ["load"]


def load(
    path: str | os.PathLike[str],
    *,
    version: int | None = None,
    mmap: bool | None = None,
    engine: str = "auto",
    allow_custom_calls: Collection[str] = (),
    mesh: jax.sharding.Mesh | None = None,
    compile_options: bool = True,
    pad_batch: bool = False,
) -> Model:
    """Opens a package. Only its manifest is read; everything else when it is first used.

    Args:
      path: the package's directory; or a directory of numbered versions of it, such as ``mnist`` with ``mnist/1`` and
        ``mnist/2``, of which the highest that is complete is opened: its manifest opens, and the files that it names
        are there in their lengths.
      version: the number of the version to open instead.
      mmap: whether weights are mapped, so that nothing of them is read before it is used, or read piece by piece. Left
        out, they are mapped unless they lie on a network or FUSE file system, where a fault in a mapped page is slow,
        and one that fails kills the process.
      engine: how functions are read: ``"export"`` by ``jax.export``, ``"rebuild"`` from what the manifest says,
        ``"replay"`` operation by operation, as ordinary JAX, ``"auto"`` by the first of these that this JAX accepts.
      allow_custom_calls: targets of custom calls that functions may make beyond those that JAX promises to keep.
      mesh: the mesh that functions are called on, as by :meth:`obmlite.Function.on`; those that fix theirs need it.
      compile_options: whether functions are compiled with the options for XLA that they were saved with.
      pad_batch: whether pipelines run an odd batch on the next larger size that they have, as their ``padded()`` does.

    Raises:
      PackageNotFoundError: there is no package at the path, or no complete version, or not the one asked for.
      CorruptPackageError: the manifest is not what was saved.
      UnsupportedFormatError: the package needs a newer obmlite.
      ArgumentError: ``version`` is given for a package, or there is no such engine.
    """
    if engine not in ("auto", *_engine.ENGINES):
        raise ArgumentError(
            "There is no such engine.", field="engine", expected=", ".join(("auto", *_engine.ENGINES)), found=engine
        )
    if "://" in os.fspath(path):
        raise PackageNotFoundError("Only local directories can be loaded.", package=path)
    store, manifest = _open(path, version, mmap)
    with context(package=store.name):
        return open_model(store, manifest, engine, allow_custom_calls, mesh, compile_options, pad_batch)


def _open(path: str | os.PathLike[str], version: int | None, mmap: bool | None) -> tuple[Store, records.ManifestRecord]:
    """The package at a path, or one of the versions in the directory there."""

    def complete(place: str) -> tuple[Store, records.ManifestRecord]:
        store = LocalDirectory(place, mmap=mmap)
        with context(package=store.name):
            manifest = decode(open_manifest(store))
            for file in manifest.files.values():
                _check_there(store, file)
        return store, manifest

    store = LocalDirectory(path, mmap=mmap)
    with context(package=store.name):
        try:
            manifest = decode(open_manifest(store))
        except PackageNotFoundError:
            if version is None and not versions.numbered(path):
                raise
        else:
            if version is not None:
                raise ArgumentError(
                    "A version is given for what is a package itself.",
                    expected="a directory of numbered versions",
                    found=f"version={version} of a package",
                    fix="leave version= out",
                )
            return store, manifest
        return versions.open_version(path, version, complete)


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
    compile_options: bool = True,
    pad_batch: bool = False,
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
            compile_options=record.compile_options if compile_options else None,
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

    def concrete(name: str) -> PolymorphicFunction:
        record = manifest.polymorphic[name]
        with context(object=name):
            for member in record.functions:
                if member not in manifest.functions:
                    raise CorruptPackageError(
                        "A polymorphic function names what is no function of the package.",
                        field="PolymorphicFunction.functions",
                        found=member,
                    )
        try:
            return PolymorphicFunction(name, [functions[member] for member in record.functions], record.metadata)
        except ArgumentError as error:
            raise CorruptPackageError(
                error.problem,
                object=name,
                field="PolymorphicFunction.functions",
                expected=error.expected,
                found=error.found,
            ) from error

    def missing(name: str) -> Exception:
        return CorruptPackageError("A pipeline names a function that is not there.", field="Step.function", found=name)

    def pipeline(name: str) -> BoundPipeline:
        record = manifest.pipelines[name]
        with context(object=name):
            for step in record.steps:
                for binding in step.bindings:
                    if binding.weights not in manifest.weights:
                        raise CorruptPackageError(
                            "A pipeline names weights that are not there.",
                            field="Binding.weights",
                            found=binding.weights,
                        )
            return BoundPipeline(
                name,
                record.steps,
                find,
                all_weights,
                record.metadata,
                pass_through=record.pass_through,
                visibility=record.visibility,
                pad_batch=pad_batch,
            )

    def visibility(name: str) -> records.Visibility:
        groups: tuple[Any, ...] = (manifest.functions, manifest.polymorphic, manifest.weights)
        found: records.Visibility = next(group[name] for group in groups if name in group).visibility
        return found

    def supplemental(name: str) -> Supplemental:
        return Supplemental.from_record(store, manifest.files, manifest.supplementals[name])

    functions = Names(list(manifest.functions), function)
    polymorphic = Names(list(manifest.polymorphic), concrete)
    all_weights = Names(list(manifest.weights), weights)
    supplementals = Names(list(manifest.supplementals), supplemental)
    find = finder(functions, polymorphic, supplementals, missing)
    pipelines = Names(list(manifest.pipelines), pipeline)
    return Model.of_parts(
        functions,
        all_weights,
        pipelines,
        manifest.default_pipeline,
        manifest.metadata,
        store.name,
        polymorphic=polymorphic,
        supplementals=supplementals,
        visibility=Names([*functions, *polymorphic, *all_weights], visibility),
        device_assignment=manifest.device_assignment,
    )


def read_file(store: Store, record: records.FileRecord) -> bytes:
    """All bytes of a file that is no weights file.

    Raises:
      CorruptPackageError: they are not those that were saved.
    """
    source = store.open(record.path)
    try:
        return checked.read(source, record.path, record.length, record.digest)
    finally:
        source.close()


def _check_there(store: Store, record: records.FileRecord) -> None:
    """Looks whether a file has as many bytes as were saved.

    Raises:
      CorruptPackageError: it is not there, or has another length.
    """
    source = store.open(record.path)
    try:
        checked.check_length(source, record.path, record.length)
    finally:
        source.close()
