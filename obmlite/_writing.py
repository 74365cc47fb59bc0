"""Tensors, or pieces of them, → safetensors files."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from obmlite import _arrays
from obmlite.errors import context
from obmlite.io import digest, safetensors
from obmlite.io.staging import StagedFile, Staging
from obmlite.plan import Box, boxes
from obmlite.schema import records as r
from obmlite.specs import TensorSpec
from obmlite.weights import Weights

FILE_BYTES = 5_000_000_000
"""Tensors' bytes in one weights file before the next is begun, unless told otherwise; the hubs' usual limit."""

LEAVES_KEY = "obmlite.leaves"
"""Key in a weights file's ``__metadata__``: JSON of name → dtype and shape where they differ from the stored ones."""

PIECES_KEY = "obmlite.pieces"
"""Key in a weights file's ``__metadata__``: JSON of a piece's name → its tensor, that one's shape, and its place."""

_QUEUED = 8  # chunks that are being hashed at one time; bounds what is kept of leaves that came from a device
_FLUSHED = 64 << 20  # bytes after which the disk is made to begin

Progress = Callable[[int], Any]
Content = Callable[["Part"], Iterable[memoryview]]


@dataclasses.dataclass(frozen=True)
class Part:
    """What of a tensor is written in one place: all of it, or a piece.

    Attributes:
      number: of the tensor.
      leaf: that the tensor is named after.
      name: what it is called in the file.
      box: where it lies in the tensor.
      spec: the tensor's.
    """

    number: int
    leaf: int
    name: str
    box: Box
    spec: TensorSpec

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """Its extent."""
        return boxes.shape_of(self.box)

    @property
    def begin(self) -> tuple[int, ...]:
        """Its first index along each dimension."""
        return tuple(start for start, _ in self.box)

    @property
    def whole(self) -> bool:
        """Whether it is the whole tensor."""
        return self.shape == self.spec.shape

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes that it takes in a file."""
        return self.spec.kind.storage_nbytes(self.shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Tensors:
    """The distinct tensors of a weights object.

    Attributes:
      leaf_tensor: for each leaf its tensor, -1 for float0, which has none.
      tensor_leaf: for each tensor the first of its leaves, after which it is named.
    """

    leaf_tensor: np.ndarray[Any, np.dtype[np.int64]]
    tensor_leaf: np.ndarray[Any, np.dtype[np.int64]]

    @staticmethod
    def of(weights: Weights) -> Tensors:
        """Numbers the tensors in the order of the leaves."""
        numbers: dict[Any, int] = {}
        leaf_tensor = np.full(len(weights.specs), -1, np.int64)
        tensor_leaf: list[int] = []
        for leaf, spec in enumerate(weights.specs):
            if not spec.kind.storage:
                continue
            number = leaf_tensor[leaf] = numbers.setdefault(weights.source.number(leaf), len(tensor_leaf))
            if number == len(tensor_leaf):
                tensor_leaf.append(leaf)
        return Tensors(leaf_tensor, np.array(tensor_leaf, np.int64))

    def parts(self, weights: Weights) -> list[Part]:
        """All tensors, whole."""
        names, specs = weights.tree.names, weights.specs
        return [
            Part(number, leaf, names[leaf], boxes.whole(specs[leaf].shape), specs[leaf])
            for number, leaf in enumerate(self.tensor_leaf.tolist())
        ]


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """A weights file that is there.

    Attributes:
      record: what the manifest says of it.
      digests: for each of its parts, in the order in which they were given, SHA-256 of each chunk, one after the other.
    """

    record: r.FileRecord
    digests: tuple[bytes, ...]


def slug(name: str) -> str:
    """What of an object's name may stand in a file's; the manifest holds the name itself."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:80].lstrip(".") or "object"


def numbered(number: int, count: int) -> str:
    """What stands in a file's name to tell it from the others of its object; nothing if there are none."""
    return f"-{number + 1:05d}-of-{count:05d}" if count > 1 else ""


def groups(parts: Iterable[Part], file_bytes: int) -> Iterator[list[Part]]:
    """The parts of each file, in their order; a part is never divided."""
    group: list[Part] = []
    total = 0
    for part in parts:
        if group and total + part.nbytes > file_bytes:
            yield group
            group, total = [], 0
        group.append(part)
        total += part.nbytes
    if group:
        yield group


def record(
    name: str, weights: Weights, tensors: Tensors, files: Iterable[tuple[Sequence[Part], Written]]
) -> r.WeightsRecord:
    """What the manifest says of a weights object whose files are there."""
    pieces: list[list[r.Piece]] = [[] for _ in tensors.tensor_leaf]
    for parts, written in files:
        for part, digests in zip(parts, written.digests, strict=True):
            pieces[part.number].append(r.Piece(written.record.path, part.name, part.begin, part.shape, digests))
    for group in pieces:
        if len(group) > 1:
            group.sort(key=lambda piece: piece.begin)
    return r.WeightsRecord(
        name=name,
        metadata=weights.metadata,
        tree=weights.tree,
        specs=tuple(weights.specs),
        leaf_tensor=tensors.leaf_tensor,
        tensor_leaf=tensors.tensor_leaf,
        pieces=tuple(map(tuple, pieces)),
    )


def index(written: r.WeightsRecord) -> bytes | None:
    """The index file that other tools expect beside several files; None where tensors lie in pieces, or in one file."""
    names = written.tree.names
    where = {
        names[leaf]: pieces[0].file.rpartition("/")[2]
        for leaf, pieces in zip(written.tensor_leaf.tolist(), written.pieces, strict=True)
        if len(pieces) == 1
    }
    if len(set(where.values())) < 2 or len(where) < len(written.pieces):
        return None
    total = sum(_arrays.nbytes(written.specs[leaf]) for leaf in written.tensor_leaf.tolist())
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


class Writer:
    """Writes weights files."""

    def __init__(self, staging: Staging, progress: Progress) -> None:
        """Begins threads, which end with the block.

        Args:
          staging: where the files go.
          progress: called with the bytes that were written since the last call.
        """
        self._staging = staging
        self._progress = progress
        # One thread more than hash at a time, for what waits for the disk.
        self._pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1) + 1)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def write(self, stem: str, names: Sequence[str], parts: Sequence[Part], content: Content) -> Written:
        """Writes a file.

        Args:
          stem: its name up to the digest.
          names: of the object's leaves.
          parts: what is to be in it.
          content: gives a part's stored bytes, in buffers that stay as they are.

        Raises:
          LeafError: a leaf cannot be read, or its name cannot stand in the file.
          OSError: the file cannot be written.
        """
        by_name = {part.name: part for part in parts}
        entries = safetensors.layout([(p.name, p.spec.kind.storage, p.spec.kind.storage_shape(p.shape)) for p in parts])
        header = safetensors.encode_header(entries, _metadata(parts, names))
        with self._staging.create("weights") as staged, _Flusher(staged, self._pool) as flusher:
            staged.write(header)
            hashing: collections.deque[tuple[str, Future[bytes]]] = collections.deque()
            digests: dict[str, list[bytes]] = {part.name: [] for part in parts}

            def collect(most: int) -> None:
                while len(hashing) > most:
                    name, future = hashing.popleft()
                    digests[name].append(future.result())

            for entry in entries:
                with context(leaf=names[by_name[entry.name].leaf]):
                    for chunk in _chunks(content(by_name[entry.name])):
                        hashing.append((entry.name, self._pool.submit(digest.sha256, chunk)))
                        staged.write(chunk)
                        flusher.go_on()
                        collect(_QUEUED)
                        self._progress(len(chunk))
            collect(0)
            flusher.finish()
            joined = {name: b"".join(chunks) for name, chunks in digests.items()}
            own = digest.sha256(header)
            whole = digest.file_digest(own, [digest.piece_digest(joined[e.name]) for e in entries])
            path = staged.finish(f"{stem}-{whole.hex()[:16]}.safetensors")
            found = r.FileRecord(path, staged.size, r.FileKind.WEIGHTS, own)
        return Written(found, tuple(joined[part.name] for part in parts))


def at_once(weights: Weights) -> Content:
    """The content of parts, each read whole: without a copy where the bytes are in memory already."""

    def content(part: Part) -> Iterable[memoryview]:
        held = weights.source.tensor(part.leaf).read(part.box)
        yield digest.flat(part.spec.kind.to_storage(held))

    return content


def _chunks(buffers: Iterable[memoryview]) -> Iterator[memoryview]:
    """Buffers' bytes cut as digests are; copied only where a chunk lies in several."""
    rest: memoryview | None = None
    for buffer in buffers:
        at = 0
        if rest is not None:
            at = min(digest.CHUNK - len(rest), len(buffer))
            rest = memoryview(b"".join((rest, buffer[:at])))
            if len(rest) < digest.CHUNK:
                continue
            yield rest
            rest = None
        for start in range(at, len(buffer), digest.CHUNK):
            chunk = buffer[start : start + digest.CHUNK]
            if len(chunk) == digest.CHUNK:
                yield chunk
            else:
                rest = chunk
    if rest is not None:
        yield rest


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


def _metadata(parts: Sequence[Part], names: Sequence[str]) -> dict[str, str]:
    """For who holds the file alone: dtypes that safetensors does not have, and of which tensors pieces are."""
    logical: dict[str, Any] = {}
    pieces: dict[str, Any] = {}
    for part in sorted(parts, key=lambda p: p.name):
        kind = part.spec.kind
        if kind.is_packed or kind.storage_shape(part.shape) != part.shape or kind.storage_numpy != kind.numpy:
            logical[part.name] = {"dtype": kind.short if kind.is_key else kind.name, "shape": list(part.shape)}
        if not part.whole:
            tensor = {"tensor": names[part.leaf], "shape": list(part.spec.shape)}
            pieces[part.name] = {**tensor, "begin": list(part.begin)}
    found: Mapping[str, Any] = {LEAVES_KEY: logical, PIECES_KEY: pieces}
    return {key: json.dumps(value, ensure_ascii=False, separators=(",", ":")) for key, value in found.items() if value}
