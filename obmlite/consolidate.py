"""Rewriting a package that several processes saved in pieces, so that each tensor lies whole in one file."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from obmlite import _packaging
from obmlite._files import WeightsFiles
from obmlite._tensors import StoredSource
from obmlite._version import __version__
from obmlite._writing import FILE_BYTES, Content, Part, Progress, Tensors, Writer, groups, numbered, record, slug
from obmlite.errors import UnsupportedFormatError, context
from obmlite.io import checked, digest
from obmlite.io.chunked import Recent
from obmlite.io.commit import Transaction
from obmlite.io.store import LocalDirectory, Store
from obmlite.loading import open_manifest
from obmlite.plan import Box
from obmlite.schema import records as r
from obmlite.schema.decode import decode
from obmlite.schema.encode import encode
from obmlite.weights import Weights

__all__ = ["consolidate"]

_SLAB = 4 << 20  # bytes of a tensor that are read at one time


def consolidate(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_file_bytes: int | None = None,
    progress: bool | None = None,
) -> None:
    """Copies a package, with every tensor whole and aligned in one file, as one process would have saved it.

    Everything else is copied as it is. What is read is compared with its digests. Memory does not grow with the
    tensors: they go through it in slabs of some MiB. The copy has a manifest of its own, and so no signature.

    Args:
      path: the package; it is left as it is.
      out: the new package's directory, which is not there yet, or a package that is to be replaced; also ``path``.
      overwrite: whether a package that is at ``out`` may be replaced. Those who have it open go on reading it.
      max_file_bytes: bytes of tensors in one weights file before the next is begun; 5 GB if not given.
      progress: whether to show a progress bar; left out, only on a terminal.

    Raises:
      PackageNotFoundError: there is no package at the path.
      PackageExistsError: there is a package at ``out``, or something that is no package.
      CorruptPackageError: a file is not what the manifest says.
      UnsupportedFormatError: a newer obmlite wrote the package, and there may be more in it than this one knows.
      OSError: the disk is full, say.
    """
    store = LocalDirectory(path, mmap=False)  # mapped, the pages that were read would count as this process's memory
    with context(package=store.name):
        manifest = decode(open_manifest(store))
        if manifest.format > (r.FORMAT_MAJOR, r.FORMAT_MINOR):
            raise UnsupportedFormatError(
                "The package may hold more than this obmlite knows, and a copy would lose that.",
                field="format_minor",
                expected=f"format {r.FORMAT_MAJOR}.{r.FORMAT_MINOR} or before",
                found=f"format {manifest.format[0]}.{manifest.format[1]}",
                fix="use a newer obmlite",
            )
        total = sum(file.length for file in manifest.files.values())
        with (
            Transaction(out, overwrite=overwrite, named=_packaging.named) as transaction,
            _packaging.bar(out, total, progress) as advance,
        ):
            others = [file for file in manifest.files.values() if file.kind is not r.FileKind.WEIGHTS]
            files = {file.path: file for file in others}
            for file in others:
                _copy(transaction, store, file, advance)
            weights: dict[str, r.WeightsRecord] = {}
            with Writer(transaction, advance) as writer:
                for name, before in manifest.weights.items():
                    source = WeightsFiles(store, manifest.files, before)
                    compared = WeightsFiles(store, manifest.files, before, Recent())
                    with context(object=name):
                        weights[name] = _rewrite(writer, before, source, compared, max_file_bytes or FILE_BYTES, files)
            after = dataclasses.replace(
                manifest, producer=f"obmlite {__version__}", files=dict(sorted(files.items())), weights=weights
            )
            transaction.commit(encode(after))
            _packaging.publish(transaction, weights, ())


def _copy(transaction: Transaction, store: Store, file: r.FileRecord, advance: Progress) -> None:
    """Copies a file under its name, which holds the digest of its content."""
    folder, _, name = file.path.partition("/")
    source = store.open(file.path)
    try:
        with transaction.create(folder) as staged:
            for data in checked.chunks(source, file.path, file.length, file.digest):
                staged.write(data)
                advance(len(data))
            staged.finish(name)
    finally:
        source.close()


def _rewrite(
    writer: Writer,
    before: r.WeightsRecord,
    source: WeightsFiles,
    compared: WeightsFiles,
    file_bytes: int,
    files: dict[str, r.FileRecord],
) -> r.WeightsRecord:
    """Writes the tensors of a weights object, and adds their files' records."""
    weights = Weights.from_source(before.tree, before.specs, StoredSource(source), before.metadata)
    tensors = Tensors(before.leaf_tensor, before.tensor_leaf)
    parts = list(groups(tensors.parts(weights), file_bytes))
    content = _in_slabs(before, source, compared)
    made = [
        writer.write(slug(before.name) + numbered(n, len(parts)), weights.tree.names, group, content)
        for n, group in enumerate(parts)
    ]
    files.update({file.record.path: file.record for file in made})
    written = record(before.name, weights, tensors, zip(parts, made, strict=True))
    return dataclasses.replace(before, pieces=written.pieces)


def _in_slabs(before: r.WeightsRecord, source: WeightsFiles, compared: WeightsFiles) -> Content:
    """The content of tensors, a little at a time.

    A tensor is compared with its digests before, since new ones would vouch for whatever it is now. Not as it is read:
    a slab may touch chunks of very many pieces, which would be hashed again for each slab.
    """
    stored = StoredSource(source)

    def content(part: Part) -> Iterable[memoryview]:
        for piece in before.pieces[part.number]:
            file = compared(piece.file)
            file.check([(file.offset(piece.name), part.spec.kind.storage_nbytes(piece.shape))])
        kind, tensor = part.spec.kind, stored.tensor(part.leaf)
        group = 8 // math.gcd(kind.bits, 8)  # elements after which a byte ends
        left: list[np.ndarray] = []
        for box in _slabs(part.shape, max(1, _SLAB * 8 // kind.bits)):
            held = tensor.read(box)
            if kind.is_packed:
                held = np.concatenate([*left, held.reshape(-1)])
                whole = len(held) - len(held) % group
                held, left = held[:whole], [held[whole:]]
            yield digest.flat(kind.to_storage(held))
        if left:
            yield digest.flat(kind.to_storage(left[0]))

    return content


def _slabs(shape: Sequence[int], most: int) -> Iterator[Box]:
    """Boxes that follow on each other in row-major order, of at most so many elements each."""
    if 0 in shape:
        return
    axis = next((n for n in range(len(shape)) if math.prod(shape[n + 1 :]) <= most), None)
    if axis is None:
        yield ()
        return
    rows = max(1, most // math.prod(shape[axis + 1 :]))
    behind = tuple((0, size) for size in shape[axis + 1 :])
    for before in itertools.product(*map(range, shape[:axis])):
        for start in range(0, shape[axis], rows):
            yield (*((n, n + 1) for n in before), (start, min(start + rows, shape[axis])), *behind)
