"""What of a package is not weights: functions, the manifest, index files for other tools."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tqdm

from obmlite._version import __version__
from obmlite._writing import index, slug
from obmlite.errors import ExportError, context
from obmlite.io import digest
from obmlite.io.commit import Transaction
from obmlite.io.staging import signature_name
from obmlite.schema import records as r
from obmlite.schema.decode import decode
from obmlite.schema.encode import encode

if TYPE_CHECKING:
    from obmlite.function import Function
    from obmlite.io.staging import StagedFile
    from obmlite.model import Model
    from obmlite.supplemental import Supplemental

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


def named(manifest: bytes) -> list[str]:
    """The files that belong to a manifest: those that it names, and its signatures.

    Raises:
      ObmliteError: it cannot be read.
    """
    record = decode(manifest)
    return [*record.files, signature_name(record.digest)]


@contextlib.contextmanager
def begin(path: str | os.PathLike[str], overwrite: bool) -> Iterator[tuple[Transaction, list[str]]]:
    """A transaction, and the names of the weights objects of the package that it replaces."""
    previous: list[str] = []

    def named_before(manifest: bytes) -> list[str]:
        previous.extend(decode(manifest).weights)
        return named(manifest)

    with Transaction(path, overwrite=overwrite, named=named_before) as transaction:
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
        if len(blob) > r.MAX_FUNCTION_BYTES:
            raise ExportError(
                "A function is too large to be saved.",
                object=name,
                field="Files.length",
                expected=f"at most {r.MAX_FUNCTION_BYTES} bytes",
                found=len(blob),
                fix="give large arrays as arguments",
            )
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
        compile_options=function.compile_options,
    )


def supplementals(
    transaction: Transaction, model: Model, files: dict[str, r.FileRecord], advance: Callable[[int], object]
) -> dict[str, r.SupplementalRecord]:
    """Writes the supplementals, and adds their files' records."""
    written = {}
    for name, supplemental in model.supplementals.items():
        with context(object=name):
            written[name] = _supplemental(transaction, name, supplemental, files, advance)
    return written


def _supplemental(
    transaction: Transaction,
    name: str,
    supplemental: Supplemental,
    files: dict[str, r.FileRecord],
    advance: Callable[[int], object],
) -> r.SupplementalRecord:
    """One supplemental; a directory's files get their names when the digests of all of them are known."""
    record = r.SupplementalRecord(
        name=name,
        metadata=supplemental.metadata,
        form=supplemental.form,
        mime_type=supplemental.mime_type,
        version=supplemental.version,
        function=supplemental.function,
    )
    if supplemental.form is r.SupplementalForm.INLINE:
        return dataclasses.replace(record, inline=supplemental.read())
    entries: dict[str, str | None] = {}
    with contextlib.ExitStack() as stack:
        staged: dict[str, tuple[StagedFile, bytes]] = {}
        for path in supplemental.entries:
            entries[path] = None
            if not path.endswith("/"):
                own = stack.enter_context(transaction.create("supplementals"))
                staged[path] = own, _copied(supplemental, path, own, advance)
        # A name for all of a folder's files, as a file's name has the digest of its bytes.
        listed = [f"{path}\0{staged[path][1].hex() if path in staged else ''}\n" for path in entries]
        whole = digest.sha256("".join(listed).encode())
        for path, (own, found) in staged.items():
            if supplemental.is_directory:
                final = own.finish(f"{slug(name)}-{whole.hex()[:16]}/{path}")
            else:
                final = own.finish(f"{slug(name)}-{found.hex()[:16]}")
            files[final] = r.FileRecord(final, own.size, r.FileKind.SUPPLEMENTAL, found)
            entries[path] = final
    return dataclasses.replace(record, entries=entries)


def _copied(supplemental: Supplemental, path: str, staged: StagedFile, advance: Callable[[int], object]) -> bytes:
    """Copies a file, and gives its digest."""
    found = hashlib.sha256()
    with supplemental.open(path) as stream:
        while data := stream.read(digest.CHUNK):
            found.update(data)
            staged.write(data)
            advance(len(data))
    staged.seal()
    return found.digest()


def manifest(
    model: Model,
    files: Mapping[str, r.FileRecord],
    functions: Mapping[str, r.FunctionRecord],
    weights: Mapping[str, r.WeightsRecord],
    supplementals: Mapping[str, r.SupplementalRecord],
) -> bytes:
    """The manifest, whose replacement is the commit."""

    def shown(records: Mapping[str, Any]) -> dict[str, Any]:
        return {name: dataclasses.replace(own, visibility=model.visibility[name]) for name, own in records.items()}

    record = r.ManifestRecord(
        producer=f"obmlite {__version__}",
        files=dict(sorted(files.items())),
        functions=shown(functions),
        polymorphic={
            name: r.PolymorphicRecord(
                name=name,
                metadata=several.metadata,
                functions=tuple(function.name for function in several.functions),
                visibility=model.visibility[name],
            )
            for name, several in model.polymorphic.items()
        },
        weights=shown(weights),
        pipelines={
            name: r.PipelineRecord(
                name=name,
                metadata=pipeline.metadata,
                steps=pipeline.steps,
                pass_through=pipeline.pass_through,
                visibility=pipeline.visibility,
            )
            for name, pipeline in model.pipelines.items()
        },
        supplementals=supplementals,
        device_assignment=model.device_assignment,
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
