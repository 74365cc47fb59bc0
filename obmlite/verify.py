"""Every digest, header and name of a package, checked; and a second opinion on its weights files."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping

import safetensors

from obmlite._files import WeightsFiles
from obmlite._packaging import index_path
from obmlite._tensors import StoredTensor
from obmlite.errors import CorruptPackageError, ObmliteError, context
from obmlite.io import digest
from obmlite.io.commit import MANIFEST
from obmlite.io.store import LocalDirectory
from obmlite.loading import open_manifest, open_model, read_file
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
      extra: files in the directory that no manifest names. They do no harm.
      files: data files that were checked.
      nbytes: bytes that were read.
    """

    package: str
    problems: tuple[ObmliteError, ...]
    extra: tuple[str, ...]
    files: int
    nbytes: int

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(path: str | os.PathLike[str], *, progress: Callable[[int], object] = lambda _: None) -> Report:
    """Reads all of a package and compares it with its digests.

    Args:
      path: the package's directory.
      progress: called with numbers of bytes that were checked.

    Raises:
      PackageNotFoundError: there is no package at the path.
    """
    store = LocalDirectory(path)
    problems: list[ObmliteError] = []

    def attempt(check: Callable[[], object]) -> None:
        try:
            with context(package=store.name):
                check()
        except ObmliteError as error:
            problems.append(error)

    data = open_manifest(store)
    try:
        with context(package=store.name):
            manifest = decode(data)
    except ObmliteError as error:
        return Report(store.name, (error,), (), 0, len(data))
    objects: tuple[Mapping[str, object], ...] = (
        manifest.functions,
        manifest.polymorphic,
        manifest.weights,
        manifest.pipelines,
        manifest.supplementals,
    )
    for mapping in objects:
        for name in mapping:
            attempt(lambda mapping=mapping, name=name: mapping[name])  # type: ignore[misc]
    model = open_model(store, manifest)
    made: tuple[Mapping[str, object], ...] = (model.polymorphic, model.pipelines, model.supplementals)
    for mapping in made:
        for name in mapping:
            if not any(problem.object == name for problem in problems):  # once is enough
                attempt(lambda mapping=mapping, name=name: mapping[name])  # type: ignore[misc]
    for record in manifest.files.values():
        if record.kind is not r.FileKind.WEIGHTS:
            attempt(lambda record=record: _check_file(store, record, manifest))  # type: ignore[misc]
            progress(record.length)
    used: set[str] = set()
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name in manifest.weights:
            if any(problem.object == name for problem in problems):
                continue
            weights = manifest.weights[name]
            paths = sorted({piece.file for pieces in weights.pieces for piece in pieces})
            used.update(paths)
            files = WeightsFiles(store, manifest.files, weights)
            for file in paths:
                attempt(lambda files=files, file=file: _check_weights(store, files, file, pool, progress))  # type: ignore[misc]
    indices = {index_path(name) for name in manifest.weights}
    extra = [f for f in store.files() if f != MANIFEST and f not in manifest.files and f not in indices]
    total = len(data) + sum(record.length for record in manifest.files.values())
    return Report(store.name, tuple(problems), tuple(extra), len(manifest.files), total)


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
    store: LocalDirectory,
    files: WeightsFiles,
    path: str,
    pool: concurrent.futures.Executor,
    progress: Callable[[int], object],
) -> None:
    weights = files.weights
    with context(object=weights.name):
        file = files(path)
        digests: dict[str, bytes] = {}
        for leaf, pieces in zip(weights.tensor_leaf.tolist(), weights.pieces, strict=True):
            for piece in pieces:
                if piece.file != path:
                    continue
                stored = StoredTensor(weights.specs[leaf], pieces, files, None).storage(piece)
                found = digest.chunk_digests(stored, pool)
                progress(stored.nbytes)
                if found != piece.digests:
                    chunk = next(n for n in range(0, len(found), 32) if found[n : n + 32] != piece.digests[n : n + 32])
                    raise CorruptPackageError(
                        "A tensor's bytes were changed.",
                        leaf=piece.name,
                        field="chunk digest",
                        expected=f"{path}, chunk {chunk // 32}: {piece.digests[chunk : chunk + 32].hex()}",
                        found=found[chunk : chunk + 32].hex(),
                    )
                digests[piece.name] = digest.piece_digest(found)
        in_order = [digests[name] for name in file.header.entries]
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
