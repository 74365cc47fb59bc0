"""What of a package is not weights: functions, the manifest, index files for other tools."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import tqdm

from obmlite._version import __version__
from obmlite._writing import index, slug
from obmlite.errors import context
from obmlite.io import digest
from obmlite.io.commit import Transaction
from obmlite.schema import records as r
from obmlite.schema.decode import decode
from obmlite.schema.encode import encode

if TYPE_CHECKING:
    from obmlite.function import Function
    from obmlite.model import Model

Blobs = Mapping[str, Mapping[str, bytes]]
"""Function → file → bytes."""


def opened(model: Model) -> Blobs:
    """The functions' files; opens the weights', before anything is removed: the model may be from this very path."""
    blobs = {name: _blobs(function) for name, function in model.functions.items()}
    for weights in model.weights.values():
        weights.source.open()
    return blobs


def _blobs(function: Function) -> dict[str, bytes]:
    """The bytes of each file of a function."""
    with context(object=function.name, package=function.package):
        return {module.file: function.program.blobs(module) for module in function.program.modules}


@contextlib.contextmanager
def begin(path: str | os.PathLike[str], overwrite: bool) -> Iterator[tuple[Transaction, list[str]]]:
    """A transaction, and the names of the weights objects of the package that it replaces."""
    previous: list[str] = []

    def named(manifest: bytes) -> list[str]:
        before = decode(manifest)
        previous.extend(before.weights)
        return list(before.files)

    with Transaction(path, overwrite=overwrite, named=named) as transaction:
        yield transaction, previous


@contextlib.contextmanager
def bar(path: str | os.PathLike[str], total: int, progress: bool | None) -> Iterator[Callable[[int], object]]:
    """A progress bar: what counts its bytes."""
    disable = None if progress is None else not progress
    label = f"saving {os.path.basename(os.path.normpath(os.fspath(path)))}"
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=disable, delay=1) as bar:
        yield bar.update


_SUFFIXES = {r.ModuleFormat.JAX_EXPORT: "jaxexport", r.ModuleFormat.PORTABLE_ARTIFACT: "stablehlo"}


def functions(
    transaction: Transaction, model: Model, blobs: Blobs, files: dict[str, r.FileRecord]
) -> dict[str, r.FunctionRecord]:
    """Writes the functions, and adds their files' records."""
    return {
        name: _function(transaction, name, function, blobs[name], files) for name, function in model.functions.items()
    }


def _function(
    transaction: Transaction,
    name: str,
    function: Function,
    blobs: Mapping[str, bytes],
    files: dict[str, r.FileRecord],
) -> r.FunctionRecord:
    paths: dict[str, str] = {}
    modules = function.program.modules
    for module in modules:
        if module.file in paths:
            continue
        blob = blobs[module.file]
        found = digest.sha256(blob)
        with transaction.create("functions") as staged:
            staged.write(blob)
            path = staged.finish(f"{slug(name)}-{found.hex()[:16]}.{_SUFFIXES[module.format]}")
        files[path] = r.FileRecord(path, len(blob), r.FileKind.FUNCTION, found)
        paths[module.file] = path
    primal, *vjps = [dataclasses.replace(module, file=paths[module.file]) for module in modules]
    signature = function.signature
    return r.FunctionRecord(
        name=name,
        metadata=function.metadata,
        inputs=signature.inputs,
        outputs=signature.outputs,
        argument_kinds=tuple(signature.argument_kinds),
        fixed=tuple(signature.fixed),
        constraints=tuple(signature.constraints),
        bindings=function.bindings,
        primal=primal,
        vjps=tuple(vjps),
    )


def manifest(
    model: Model,
    files: Mapping[str, r.FileRecord],
    functions: Mapping[str, r.FunctionRecord],
    weights: Mapping[str, r.WeightsRecord],
) -> bytes:
    """The manifest, whose replacement is the commit."""
    record = r.ManifestRecord(
        producer=f"obmlite {__version__}",
        files=dict(sorted(files.items())),
        functions=functions,
        weights=weights,
        pipelines={
            name: r.PipelineRecord(
                name=name,
                metadata=pipeline.metadata,
                steps=(r.StepRecord(r.StepRole.MODEL, pipeline.function.name, pipeline.bindings),),
            )
            for name, pipeline in model.pipelines.items()
        },
        default_pipeline=model.default_pipeline,
        metadata=model.metadata,
    )
    return encode(record)


def publish(transaction: Transaction, written: Mapping[str, r.WeightsRecord], previous: Sequence[str]) -> None:
    """Writes the index files for other tools, and removes those of the package before."""
    indices: dict[str, bytes | None] = {index_path(name): None for name in previous}
    for name, weights in written.items():
        indices[index_path(name)] = index(weights)
    for path, content in indices.items():
        if content is not None:
            transaction.publish(path, content)
        else:
            transaction.withdraw(path)


def index_path(name: str) -> str:
    """Where a weights object's index for other tools is."""
    own = slug(name)
    if own != name:  # another object's name may have the same slug
        own += f"-{digest.sha256(name.encode()).hex()[:8]}"
    return f"weights/{own}.safetensors.index.json"
