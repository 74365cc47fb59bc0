"""A model → the files of a package."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np

from obmlite import _arrays
from obmlite._version import __version__
from obmlite.errors import context
from obmlite.io import digest, safetensors
from obmlite.io.commit import StagedFile, Transaction
from obmlite.schema import records as r
from obmlite.schema.decode import decode
from obmlite.schema.encode import encode
from obmlite.weights import Weights

if TYPE_CHECKING:
    from obmlite.function import Function
    from obmlite.model import Model

FILE_BYTES = 5_000_000_000
"""Tensors' bytes in one weights file before the next is begun, unless told otherwise; the hubs' usual limit."""

LEAVES_KEY = "obmlite.leaves"
"""Key in a weights file's ``__metadata__``: JSON of name → dtype and shape where they differ from the stored ones."""

_QUEUED = 8  # chunks that are being hashed at one time; bounds what is kept of leaves that came from a device
_FLUSHED = 64 << 20  # bytes after which the disk is made to begin

Progress = Callable[[int], Any]


def save(model: Model, path: str | os.PathLike[str], *, overwrite: bool, file_bytes: int, progress: Progress) -> None:
    """Writes a package; the path holds the old package, or nothing, until all of it is there."""
    # Opened before anything is removed: the model may have been loaded from this very path, some saves ago.
    blobs = {name: _blobs(function) for name, function in model.functions.items()}
    for weights in model.weights.values():
        weights.source.open()
    previous: list[str] = []

    def named(manifest: bytes) -> list[str]:
        before = decode(manifest)
        previous.extend(before.weights)
        return list(before.files)

    with context(package=os.fspath(path)), Transaction(path, overwrite=overwrite, named=named) as transaction:
        files: dict[str, r.FileRecord] = {}
        functions = {
            name: _function(transaction, name, function, blobs[name], files)
            for name, function in model.functions.items()
        }
        weights_records: dict[str, r.WeightsRecord] = {}
        indices: dict[str, bytes | None] = {index_path(name): None for name in previous}
        # One thread more than hash at a time, for what waits for the disk.
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1) + 1) as pool:
            for name, weights in model.weights.items():
                with context(object=name):
                    writer = _WeightsWriter(transaction, name, weights, file_bytes, pool, progress)
                    weights_records[name] = writer.write(files)
                    indices[index_path(name)] = writer.index()
        manifest = r.ManifestRecord(
            producer=f"obmlite {__version__}",
            files=dict(sorted(files.items())),
            functions=functions,
            weights=weights_records,
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
        transaction.commit(encode(manifest))
        for index, content in indices.items():
            if content is not None:
                transaction.publish(index, content)
            else:
                transaction.withdraw(index)


def slug(name: str) -> str:
    """What of an object's name may stand in a file's; the manifest holds the name itself."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:80].lstrip(".") or "object"


def index_path(name: str) -> str:
    """Where a weights object's index for other tools is."""
    own = slug(name)
    if own != name:  # another object's name may have the same slug
        own += f"-{digest.sha256(name.encode()).hex()[:8]}"
    return f"weights/{own}.safetensors.index.json"


def _blobs(function: Function) -> dict[str, bytes]:
    """The bytes of each file of a function."""
    with context(object=function.name, package=function.package):
        return {module.file: function.program.blobs(module) for module in function.program.modules}


_SUFFIXES = {r.ModuleFormat.JAX_EXPORT: "jaxexport", r.ModuleFormat.PORTABLE_ARTIFACT: "stablehlo"}


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


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A tensor that is to be written."""

    number: int  # of the tensor
    leaf: int  # that it is named after
    name: str
    nbytes: int


class _WeightsWriter:
    """Writes one weights object."""

    def __init__(
        self,
        transaction: Transaction,
        name: str,
        weights: Weights,
        file_bytes: int,
        pool: ThreadPoolExecutor,
        progress: Progress,
    ) -> None:
        self._transaction = transaction
        self._name = name
        self._weights = weights
        self._file_bytes = file_bytes
        self._pool = pool
        self._progress = progress
        self._where: dict[str, str] = {}

    def write(self, files: dict[str, r.FileRecord]) -> r.WeightsRecord:
        """Writes the files and adds their records."""
        weights = self._weights
        tensors: list[_Planned] = []
        numbers: dict[Any, int] = {}
        leaf_tensor = np.full(len(weights.specs), -1, np.int64)
        for leaf, (name, spec) in enumerate(zip(weights.tree.names, weights.specs, strict=True)):
            if not spec.kind.storage:
                continue
            number = numbers.setdefault(weights.source.number(leaf), len(tensors))
            leaf_tensor[leaf] = number
            if number == len(tensors):
                tensors.append(_Planned(number, leaf, name, _arrays.nbytes(spec)))
        pieces: list[tuple[r.Piece, ...]] = [()] * len(tensors)
        groups = list(self._groups(tensors))
        for n, group in enumerate(groups):
            part = f"-{n + 1:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
            record, digests = self._write_file(group, part)
            files[record.path] = record
            for tensor in group:
                shape: tuple[int, ...] = weights.specs[tensor.leaf].shape  # type: ignore[assignment]
                pieces[tensor.number] = (
                    r.Piece(record.path, tensor.name, (0,) * len(shape), shape, digests[tensor.name]),
                )
                self._where[tensor.name] = record.path.rpartition("/")[2]
        return r.WeightsRecord(
            name=self._name,
            metadata=weights.metadata,
            tree=weights.tree,
            specs=tuple(weights.specs),
            leaf_tensor=leaf_tensor,
            tensor_leaf=np.array([t.leaf for t in tensors], np.int64),
            pieces=tuple(pieces),
        )

    def index(self) -> bytes | None:
        """The index file that other tools expect beside several files."""
        if len(set(self._where.values())) < 2:
            return None
        content = {"metadata": {"total_size": self._weights.nbytes}, "weight_map": dict(sorted(self._where.items()))}
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

    def _groups(self, tensors: Sequence[_Planned]) -> Iterator[list[_Planned]]:
        """The tensors of each file, in the pytree's order; a tensor is never divided."""
        group: list[_Planned] = []
        total = 0
        for tensor in tensors:
            if group and total + tensor.nbytes > self._file_bytes:
                yield group
                group, total = [], 0
            group.append(tensor)
            total += tensor.nbytes
        if group:
            yield group

    def _write_file(self, group: Sequence[_Planned], part: str) -> tuple[r.FileRecord, dict[str, bytes]]:
        specs = {t.name: self._weights.specs[t.leaf] for t in group}
        leaves = {t.name: t.leaf for t in group}
        entries = safetensors.layout(
            [(name, s.kind.storage, s.kind.storage_shape(s.shape)) for name, s in specs.items()]  # type: ignore[arg-type]
        )
        header = safetensors.encode_header(entries, _metadata(specs))
        with self._transaction.create("weights") as staged, _Flusher(staged, self._pool) as flusher:
            staged.write(header)
            hashing: collections.deque[tuple[str, Future[bytes]]] = collections.deque()
            digests: dict[str, list[bytes]] = {name: [] for name in specs}

            def collect(most: int) -> None:
                while len(hashing) > most:
                    name, future = hashing.popleft()
                    digests[name].append(future.result())

            for entry in entries:
                with context(leaf=entry.name):
                    held = self._weights.source.tensor(leaves[entry.name]).whole()
                    storage = digest.flat(specs[entry.name].kind.to_storage(held))
                for start in range(0, len(storage), digest.CHUNK):
                    chunk = storage[start : start + digest.CHUNK]
                    hashing.append((entry.name, self._pool.submit(digest.sha256, chunk)))
                    staged.write(chunk)
                    flusher.go_on()
                    collect(_QUEUED)
                    self._progress(len(chunk))
            collect(0)
            flusher.finish()
            joined = {name: b"".join(parts) for name, parts in digests.items()}
            own = digest.sha256(header)
            whole = digest.file_digest(own, [digest.piece_digest(joined[e.name]) for e in entries])
            path = staged.finish(f"{slug(self._name)}{part}-{whole.hex()[:16]}.safetensors")
            record = r.FileRecord(path, staged.size, r.FileKind.WEIGHTS, own)
        return record, joined


class _Flusher:
    """Has a file written out to the disk while it still grows, which the kernel would put off."""

    def __init__(self, staged: StagedFile, pool: ThreadPoolExecutor) -> None:
        self._staged = staged
        self._pool = pool
        self._flushing: Future[None] | None = None
        self._begun = 0  # bytes

    def __enter__(self) -> _Flusher:
        return self

    def __exit__(self, *_: object) -> None:
        if self._flushing is not None:
            wait([self._flushing])  # before the file is closed

    def go_on(self) -> None:
        """Begins, if there is enough to be written and the disk is idle."""
        if self._staged.size - self._begun < _FLUSHED or (self._flushing is not None and not self._flushing.done()):
            return
        self.finish()
        self._begun = self._staged.size
        self._flushing = self._pool.submit(self._staged.flush)

    def finish(self) -> None:
        """Waits for what was begun, and says so if it failed: the kernel tells that once only."""
        if self._flushing is not None:
            self._flushing.result()


def _metadata(specs: Mapping[str, Any]) -> dict[str, str]:
    """For who holds the file alone: what tensors are that safetensors has no dtype for."""
    logical = {
        name: {"dtype": spec.kind.short if spec.kind.is_key else spec.kind.name, "shape": list(spec.shape)}
        for name, spec in sorted(specs.items())
        if (spec.kind.is_packed or spec.kind.storage_shape(spec.shape) != spec.shape)
        or spec.kind.storage_numpy != spec.kind.numpy
    }
    return {LEAVES_KEY: json.dumps(logical, ensure_ascii=False, separators=(",", ":"))} if logical else {}
