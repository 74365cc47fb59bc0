"""Every digest, header and name of a package, checked; and a second opinion on its weights files."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor

import safetensors

from obmlite import _signatures, _verifying
from obmlite._files import WeightsFiles
from obmlite._packaging import index_path
from obmlite._writing import index
from obmlite.errors import CorruptPackageError, ObmliteError, context
from obmlite.io import digest
from obmlite.io.chunked import processors
from obmlite.io.commit import MANIFEST
from obmlite.io.staging import signature_name
from obmlite.io.store import LocalDirectory
from obmlite.loading import files_of, open_manifest, open_model, read_file
from obmlite.schema import records as r
from obmlite.schema.decode import decode

__all__ = ["Report", "verify"]

_ARTIFACT_MAGIC = b"ML\xefR"  # of MLIR bytecode, which portable artifacts are


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`verify` found.

    Attributes:
      package: the path.
      problems: what is wrong; empty for a good package.
      extra: files in the directory that no digest covers, but the manifest's signatures. They do no harm to obmlite;
        an index for other tools is among them if it says anything else than the manifest.
      files: data files that were checked.
      nbytes: bytes that were read.
      signer: fingerprint, in hexadecimal digits, of the given key that has signed the package; empty if none was given.
    """

    package: str
    problems: tuple[ObmliteError, ...]
    extra: tuple[str, ...]
    files: int
    nbytes: int
    signer: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(
    path: str | os.PathLike[str],
    *,
    public_key: _signatures.PublicKeys | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> Report:
    """Reads all of a package and compares it with its digests.

    Args:
      path: the package's directory.
      public_key: of whom the package is to be signed by, as for :func:`obmlite.load`.
      progress: called with numbers of bytes that were checked, from several threads.

    Raises:
      PackageNotFoundError: there is no package at the path.
      ArgumentError: ``public_key`` is no such key.
      ImportError: ``public_key`` is given, and ``cryptography`` is not installed.
    """
    keys = {} if public_key is None else _signatures.public_keys(public_key)
    store = LocalDirectory(path)
    problems: list[ObmliteError] = []
    signers: list[bytes] = []

    def attempt(check: Callable[[], object]) -> None:
        try:
            with context(package=store.name):
                check()
        except ObmliteError as error:
            problems.append(error)

    data = open_manifest(store)
    if keys:
        attempt(lambda: signers.append(_signatures.check(store, data, keys)))
    try:
        with context(package=store.name):
            manifest = decode(data)
    except ObmliteError as error:
        return Report(store.name, (error,), (), 0, len(data))
    for mapping in _verifying.objects_of(manifest):
        for name in mapping:
            attempt(lambda mapping=mapping, name=name: mapping[name])  # type: ignore[misc]
    model = open_model(store, manifest, verify="lazy")
    made: tuple[Mapping[str, object], ...] = (model.polymorphic, model.pipelines, model.supplementals)
    for mapping in made:
        for name in mapping:
            if not any(problem.object == name for problem in problems):  # once is enough
                attempt(lambda mapping=mapping, name=name: mapping[name])  # type: ignore[misc]
    for record in manifest.files.values():
        if record.kind is not r.FileKind.WEIGHTS:
            attempt(lambda record=record: _check_file(store, record, manifest))  # type: ignore[misc]
            progress(record.length)
    with ThreadPoolExecutor(processors(), "obmlite-verify") as pool:
        for name in manifest.weights:
            if any(problem.object == name for problem in problems):
                continue
            files = files_of(model.weights[name])
            for file in files.paths:
                attempt(lambda files=files, file=file: _check_weights(store, files, file, pool, progress))  # type: ignore[misc]
    known = {MANIFEST, signature_name(manifest.digest), *manifest.files, *_indices(store, manifest)}
    extra = [file for file in store.files() if file not in known]
    total = len(data) + sum(record.length for record in manifest.files.values())
    signer = "".join(key.hex() for key in signers)
    return Report(store.name, tuple(problems), tuple(extra), len(manifest.files), total, signer)


def _indices(store: LocalDirectory, manifest: r.ManifestRecord) -> Iterator[str]:
    """The indices for other tools that say what the manifest says."""
    for name in manifest.weights:
        path = index_path(name)
        with contextlib.suppress(ObmliteError), contextlib.closing(store.open(path)) as source:
            expected = index(manifest.weights[name])
            if expected is not None and source.size == len(expected) and source.read(0, source.size) == expected:
                yield path


def _check_file(store: LocalDirectory, record: r.FileRecord, manifest: r.ManifestRecord) -> None:
    data = read_file(store, record)
    for function in _readable(manifest.functions):
        for module in (function.primal, *function.vjps):
            if module.file == record.path and not data.startswith(_ARTIFACT_MAGIC, module.offset):
                raise CorruptPackageError(
                    "A function's file has no StableHLO where the manifest says.",
                    object=function.name,
                    field="Module.stablehlo_offset",
                    expected=f"{_ARTIFACT_MAGIC!r} at {module.offset} in {record.path}",
                    found=repr(data[module.offset : module.offset + 4]),
                )


def _readable(functions: Mapping[str, r.FunctionRecord]) -> Iterator[r.FunctionRecord]:
    for name in functions:
        try:
            yield functions[name]
        except ObmliteError:  # has been reported
            continue


def _check_weights(
    store: LocalDirectory, files: WeightsFiles, path: str, pool: Executor, progress: Callable[[int], object]
) -> None:
    with context(object=files.weights.name):
        file = files(path)
        _verifying.run(pool, _verifying.comparing(file, progress))
        digests = {piece.name: piece.digests for own in files.weights.pieces for piece in own if piece.file == path}
        in_order = [digest.piece_digest(digests[name]) for name in file.header.entries]
        whole = digest.file_digest(files.record(path).digest, in_order).hex()
        if whole[:16] not in path:
            raise CorruptPackageError(
                "A weights file's name does not hold its digest.", field="path", expected=whole[:16], found=path
            )
        _second_opinion(store.local_path(path), list(file.header.entries))


def _second_opinion(path: str, names: list[str]) -> None:
    """What the safetensors package says of a file."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            found = sorted(file.keys())
    except (safetensors.SafetensorError, OSError) as error:
        raise CorruptPackageError(
            "The safetensors package refuses a weights file.", field="safetensors", found=str(error)
        ) from error
    if found != sorted(names):
        raise CorruptPackageError(
            "The safetensors package finds other tensors in a weights file.",
            field="safetensors",
            expected=f"{len(names)} tensors",
            found=f"{len(found)} tensors",
        )
