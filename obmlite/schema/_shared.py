"""What all objects of a manifest share: pools, files, meshes, partitions, and how trees and specs are kept."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np

from obmlite import dims, dtypes
from obmlite import tree as trees
from obmlite.errors import ExportError, UnsupportedFormatError
from obmlite.schema import records as r
from obmlite.schema._columns import (
    MAX_AXIS_SIZE,
    MAX_RANK,
    MAX_TENSOR_BYTES,
    Pool,
    below,
    check_required,
    corrupt,
    cuts_of,
    member,
    same_length,
    truths,
)
from obmlite.schema._flat import Buffer, Table
from obmlite.specs import UNCONSTRAINED, AxisType, Dimension, MeshSpec, Partition, TensorSpec


class Shared:
    """The tables that all objects share, checked, and what reads trees and specs with them."""

    def __init__(self, flatbuffer: bytes) -> None:
        self.root = Buffer(flatbuffer).root("Manifest")
        root = self.root
        # The frozen fields first: what they say decides whether the rest may be read at all.
        self.format = (root.integer("format_major", "<H"), root.integer("format_minor", "<H"))
        self.reader = root.string("reader")
        if self.format[0] != r.FORMAT_MAJOR:
            raise UnsupportedFormatError(
                "The package is of a format that this obmlite does not read.",
                field="format_major",
                expected=f"format {r.FORMAT_MAJOR}",
                found=f"format {self.format[0]}.{self.format[1]}",
                fix=f"it says that it is read by {self.reader or 'another version'}",
            )
        check_required(root.strings("required"))
        if root.integer("digest_algorithm", "<B") != 1:
            raise corrupt(
                "The manifest names a digest that this obmlite does not know.",
                "Manifest.digest_algorithm",
                root.integer("digest_algorithm", "<B"),
                "1 (SHA-256)",
            )
        if root.integer("chunk_size", "<Q") != r.CHUNK_SIZE:
            raise corrupt(
                "The chunks that digests cover are of another size.",
                "Manifest.chunk_size",
                root.integer("chunk_size", "<Q"),
                r.CHUNK_SIZE,
            )
        self._strings = Pool(root.table("strings", "StringPool"), "Manifest.strings")
        self._blobs = Pool(root.table("blobs", "BlobPool"), "Manifest.blobs")
        self.files = self._files(root.table("files", "Files"))
        self._paths = list(self.files)
        self._meshes = self._mesh_table(root.table("meshes", "Meshes"))
        self._partitions = self._partition_table(root.table("partitions", "Partitions"))
        symbolic = root.vector("symbolic_dims", np.uint32).tolist()
        if len(symbolic) != len(set(symbolic)):
            raise corrupt("A symbolic dimension is listed twice.", "Manifest.symbolic_dims", len(symbolic))
        self._dims = [self._dimension(self.string(n)) for n in symbolic]

    # --- pools and shared tables

    @functools.cache  # noqa: B019 - lives as long as the decoder, one entry for each string
    def string(self, number: int) -> str:
        try:
            return self._strings[number].decode()
        except UnicodeDecodeError as error:
            raise corrupt("A string is not UTF-8.", "Manifest.strings", str(error)) from None

    def string_plus1(self, number: int) -> str | None:
        return self.string(number - 1) if number else None

    @functools.cache  # noqa: B019 - likewise; many nodes may name one blob
    def static(self, number: int) -> Any:
        return trees.unpack_static(self._blobs[number])

    def metadata(self, row: Table) -> dict[str, Any]:
        number = row.integer("metadata_plus1")
        value = self.static(number - 1) if number else {}
        if not isinstance(value, dict):
            raise corrupt("Metadata is no map.", "metadata", type(value).__name__)
        return dict(value)

    def _files(self, row: Table) -> dict[str, r.FileRecord]:
        path, length = row.vector("path", np.uint32), row.vector("length", np.uint64)
        kind, digest = row.vector("kind", np.uint8), row.vector("digest", np.uint8)
        same_length("Files", path.size, length=length, kind=kind)
        if digest.size != 32 * path.size:
            raise corrupt("The files' digests are too many or too few.", "Files.digest", digest.size, 32 * path.size)
        digests = digest.tobytes()
        files: dict[str, r.FileRecord] = {}
        last: str | None = None
        for n, (p, size, k) in enumerate(zip(path.tolist(), length.tolist(), kind.tolist(), strict=True)):
            name = self.string(p)
            if last is not None and name <= last:
                raise corrupt(
                    "The files are not in the order of their paths, or one is named twice.", "Files.path", name
                )
            last = name
            if size >= MAX_TENSOR_BYTES:
                raise corrupt("A file's length is impossible.", "Files.length", size)
            if k == r.FileKind.FUNCTION and size > r.MAX_FUNCTION_BYTES:
                raise corrupt("A function's file is too large.", "Files.length", size, f"up to {r.MAX_FUNCTION_BYTES}")
            files[name] = r.FileRecord(name, size, member(r.FileKind, k, "Files.kind"), digests[32 * n : 32 * (n + 1)])
        return files

    def file(self, number: int, kind: r.FileKind, field: str) -> r.FileRecord:
        if number >= len(self._paths):
            raise corrupt("An index points past the end of its table.", field, number, f"below {len(self._paths)}")
        record = self.files[self._paths[number]]
        if record.kind is not kind:
            raise corrupt("A file is of another kind than its use.", field, record.kind.name, kind.name)
        return record

    def _mesh_table(self, row: Table) -> list[MeshSpec]:
        starts = row.vector("axis_start", np.uint32)
        names, sizes = row.vector("axis_name", np.uint32), row.vector("axis_size", np.uint64)
        kinds = row.vector("axis_type", np.uint8)
        same_length("Meshes", names.size, axis_size=sizes, axis_type=kinds)
        cuts = cuts_of(starts, max(starts.size - 1, 0), names.size, "Meshes.axis_start")
        texts = [self.string(n) for n in names.tolist()]
        types = [int(member(AxisType, k, "Meshes.axis_type")) for k in kinds.tolist()]
        if sizes.size and not 0 < int(sizes.min()) <= int(sizes.max()) <= MAX_AXIS_SIZE:
            raise corrupt("A mesh axis has an impossible size.", "Meshes.axis_size", sizes.tolist()[:8])
        return [
            MeshSpec(tuple(texts[a:b]), tuple(sizes[a:b].tolist()), tuple(types[a:b]))
            for a, b in itertools.pairwise(cuts)
        ]

    def _partition_table(self, row: Table) -> list[Partition]:
        mesh = below(row.vector("mesh_plus1", np.uint32), len(self._meshes) + 1, "Partitions.mesh_plus1").tolist()
        kinds = row.vector("entry_kind", np.uint8)
        axes = [self.string(n) for n in row.vector("axis", np.uint32).tolist()]

        def cuts(name: str, count: int, length: int) -> list[int]:
            return cuts_of(row.vector(name, np.uint32), count, length, f"Partitions.{name}")

        def texts(name: str) -> list[str]:
            return [self.string(n) for n in row.vector(name, np.uint32).tolist()]

        entry_cuts = cuts("entry_start", len(mesh), kinds.size)
        axis_cuts = cuts("axis_start", kinds.size, len(axes))
        unreduced, reduced = texts("unreduced"), texts("reduced")
        unreduced_cuts = cuts("unreduced_start", len(mesh), len(unreduced))
        reduced_cuts = cuts("reduced_start", len(mesh), len(reduced))
        entries: list[str | tuple[str, ...] | None] = []
        for n, kind in enumerate(kinds.tolist()):
            group = tuple(axes[axis_cuts[n] : axis_cuts[n + 1]])
            if not 1 <= kind <= 3 or (kind == 2) != bool(group):
                raise corrupt("An entry of a partition spec is of unknown kind.", "Partitions.entry_kind", kind)
            entries.append((None, group, UNCONSTRAINED)[kind - 1])
        return [
            Partition(
                tuple(entries[entry_cuts[n] : entry_cuts[n + 1]]),
                self._meshes[m - 1] if m else None,
                tuple(unreduced[unreduced_cuts[n] : unreduced_cuts[n + 1]]),
                tuple(reduced[reduced_cuts[n] : reduced_cuts[n + 1]]),
            )
            for n, m in enumerate(mesh)
        ]

    def _dimension(self, text: str) -> Dimension:
        try:
            dimension = dims.parse(text)
        except ExportError as error:
            raise corrupt("A symbolic dimension is malformed.", "Manifest.symbolic_dims", text[:80]) from error
        if isinstance(dimension, int) or dimension.text != text:
            raise corrupt(
                "A symbolic dimension has no symbols, or is not in its canonical form.",
                "Manifest.symbolic_dims",
                text[:80],
                str(dimension)[:80],
            )
        return dimension

    # --- trees and specs

    def tree(self, row: Table) -> trees.Tree:
        kinds, arities = row.vector("kind", np.uint8), row.vector("arity", np.uint32)
        key_kinds, keys = row.vector("key_kind", np.uint8), row.vector("key", np.uint32)
        classes, static = row.vector("class_plus1", np.uint32), row.vector("static_plus1", np.uint32)
        same_length("Tree", kinds.size, arity=arities, key_kind=key_kinds, key=keys)
        same_length("Tree", kinds.size, class_plus1=classes, static_plus1=static)
        below(static, len(self._blobs) + 1, "Tree.static_plus1")
        pairs = list(zip(key_kinds.tolist(), keys.tolist(), strict=True))
        # Each distinct key once: there are few, and many nodes may name one long text.
        known = {
            (kind, key): trees.key_from_text(member(trees.KeyKind, kind, "Tree.key_kind"), self.string(key))
            for kind, key in dict.fromkeys(pairs)
        }
        tree = trees.Tree(
            kinds.tolist(),
            arities.tolist(),
            key_kinds.tolist(),
            [known[pair] for pair in pairs],
            {n: self.string(int(classes[n]) - 1) for n in np.flatnonzero(classes).tolist()},
            {n: self.static(int(static[n]) - 1) for n in np.flatnonzero(static).tolist()},
        )
        tree.check()
        return tree

    def specs(self, row: Table, field: str, *, concrete: bool = False) -> tuple[TensorSpec, ...]:
        """The rows of a Specs table; with `concrete`, symbolic dimensions are refused."""
        dtype, rank, dim = row.vector("dtype", np.uint8), row.vector("rank", np.uint8), row.vector("dim", np.int64)
        impl, weak = row.vector("key_impl_plus1", np.uint32), row.vector("weak_type", np.uint8)
        partition, memory = row.vector("partition_plus1", np.uint32), row.vector("memory_kind_plus1", np.uint32)
        logical = row.vector("logical_axes_plus1", np.uint32)
        same_length(field, dtype.size, rank=rank, key_impl_plus1=impl, weak_type=weak, partition_plus1=partition)
        same_length(field, dtype.size, memory_kind_plus1=memory, logical_axes_plus1=logical)
        below(rank, MAX_RANK + 1, f"{field}.rank")
        below(partition, len(self._partitions) + 1, f"{field}.partition_plus1")
        below(logical, len(self._partitions) + 1, f"{field}.logical_axes_plus1")
        if dim.size != int(rank.sum(dtype=np.int64)):
            raise corrupt("Dimensions are too many or too few for the ranks.", f"{field}.dim", dim.size)
        lowest = int(dim.min()) if dim.size else 0
        if lowest < (0 if concrete else -len(self._dims)):
            raise corrupt("A dimension is symbolic where none may be, or unknown.", f"{field}.dim", lowest)
        sizes: list[Dimension] = dim.tolist()
        if lowest < 0:
            sizes = [self._dims[-1 - d] if isinstance(d, int) and d < 0 else d for d in sizes]
        flags = truths(weak, f"{field}.weak_type")
        seen: dict[Any, TensorSpec] = {}
        specs = []
        at = 0
        # Leaves of a model come in few kinds: each is made, and its size checked, once.
        for row_key in zip(
            dtype.tolist(), impl.tolist(), rank.tolist(), flags, partition.tolist(), memory.tolist(), logical.tolist(),
            strict=True,
        ):  # fmt: skip
            shape = tuple(sizes[at : at + row_key[2]])
            at += row_key[2]
            made = seen.get((row_key, shape))
            if made is None:
                made = seen[row_key, shape] = self._spec(shape, *row_key, field=field)
            specs.append(made)
        return tuple(specs)

    def _spec(
        self,
        shape: tuple[Dimension, ...],
        dtype: int,
        impl: int,
        _rank: int,
        weak: bool,
        partition: int,
        memory: int,
        logical: int,
        *,
        field: str,
    ) -> TensorSpec:
        kind = dtypes.by_code(dtype, self.string_plus1(impl))
        # A 0 does not hide what stands beside it: numpy refuses such shapes too.
        if math.prod(d or 1 for d in shape if isinstance(d, int)) * max(kind.bits, 8) > 8 * MAX_TENSOR_BYTES:
            raise corrupt("A tensor's size is impossible.", f"{field}.dim", shape)
        split = self._partitions[partition - 1] if partition else None
        axes = self._partitions[logical - 1] if logical else None
        for found, name in ((split, "partition_plus1"), (axes, "logical_axes_plus1")):
            if found is not None and len(found.entries) > len(shape):
                raise corrupt(
                    "A partition spec has more entries than dimensions.", f"{field}.{name}", found.entries, len(shape)
                )
        if axes is not None and axes.mesh is not None:
            raise corrupt("Logical axes are those of a mesh.", f"{field}.logical_axes_plus1", axes.mesh)
        return TensorSpec(shape, kind, weak, split, self.string_plus1(memory), axes)
