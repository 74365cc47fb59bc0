"""Manifest bytes → dataclasses, checking everything before it is used.

The root and the tables that all objects share are checked when the manifest is opened; an object's own columns when
the object is first asked for, so that one that this reader does not understand leaves the others usable.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from obmlite import dims, dtypes
from obmlite import tree as trees
from obmlite.errors import CorruptPackageError, ExportError, ObmliteError, UnsupportedFormatError, context
from obmlite.schema import records as r
from obmlite.schema import trailer
from obmlite.schema._flat import Buffer, Table
from obmlite.specs import UNCONSTRAINED, AxisType, Dimension, MeshSpec, Partition, TensorSpec

_T = TypeVar("_T")
_Enum = TypeVar("_Enum", bound=int)
_Column = npt.NDArray[Any]

MAX_RANK = 64
"""Dimensions of a tensor: numpy's own limit."""

MAX_TENSOR_BYTES = 1 << 62
"""Bytes of one tensor: keeps every product of sizes and offsets inside a signed 64-bit integer."""

MAX_PIECE_CELLS = 1 << 20
"""Cells of the grid that the faces of a tensor's pieces make; as many as pieces where they are a grid themselves."""


def _corrupt(problem: str, field: str, found: Any = None, expected: Any = None) -> CorruptPackageError:
    return CorruptPackageError(problem, field=field, found=found, expected=expected)


def _member(kind: Callable[[int], _Enum], value: int, field: str) -> _Enum:
    try:
        return kind(value)
    except ValueError:
        raise _corrupt("An enumeration has a value that this obmlite does not know.", field, value) from None


def _starts(starts: _Column, count: int, length: int, field: str) -> list[int]:
    """Checks n + 1 offsets that cut `length` items into `count` runs."""
    if starts.size == 0 and count == 0 and length == 0:
        return [0]
    values = starts.astype(np.int64)
    if values.size != count + 1 or values[0] != 0 or values[-1] != length or (np.diff(values) < 0).any():
        raise _corrupt(
            "A column of offsets does not fit what it cuts.", field, f"{values.size} offsets, {length} items"
        )
    result: list[int] = values.tolist()
    return result


def _below(values: _Column, limit: int, field: str) -> _Column:
    if values.size and int(values.max()) >= limit:
        raise _corrupt("An index points past the end of its table.", field, int(values.max()), f"below {limit}")
    return values


def _ascending(values: _Column, field: str) -> None:
    if (np.diff(values.astype(np.int64)) <= 0).any():
        raise _corrupt("Arguments are not listed in ascending order.", field)


def _flags(values: _Column, field: str) -> list[bool]:
    _below(values, 2, field)
    return values.astype(bool).tolist()  # type: ignore[no-any-return]


def _same_length(field: str, count: int, **columns: _Column) -> None:
    for name, column in columns.items():
        if column.size != count:
            raise _corrupt(
                "Columns of one table have different lengths.", f"{field}.{name}", column.size, f"{count} items"
            )


def _disjoint(pieces: Sequence[r.Piece]) -> bool:
    """Whether no two pieces of a tensor overlap, by marking each one's cells on the grid of all their faces."""
    if len(pieces) < 2:
        return True
    spans = [[(b, b + e) for b, e in zip(p.begin, p.shape, strict=True)] for p in pieces]
    faces = [sorted(set(itertools.chain.from_iterable(along))) for along in zip(*spans, strict=True)]
    if math.prod(len(along) - 1 for along in faces) > MAX_PIECE_CELLS:
        return False
    numbers = [{face: n for n, face in enumerate(along)} for along in faces]
    taken = np.zeros([len(along) - 1 for along in faces], np.bool_)
    for span in spans:
        cells = taken[tuple(slice(of[a], of[b]) for of, (a, b) in zip(numbers, span, strict=True))]
        if cells.any():
            return False
        cells[...] = True
    return True


class _Pool:
    """Strings or blobs, cut from one vector when asked for."""

    def __init__(self, table: Table, field: str) -> None:
        self._bytes = table.vector("bytes", np.uint8).tobytes()
        starts = table.vector("starts", np.uint32)
        self._starts = _starts(starts, max(starts.size - 1, 0), len(self._bytes), f"{field}.starts")
        self._field = field

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> bytes:
        if not 0 <= number < len(self):
            raise _corrupt("An index points past the end of its table.", self._field, number, f"below {len(self)}")
        return self._bytes[self._starts[number] : self._starts[number + 1]]


class _Lazy(Mapping[str, _T]):
    """Records by name; each is decoded, and its features are checked, when it is first asked for."""

    def __init__(self, kind: str, rows: list[Table], decode: Callable[[Table, dict[str, Any]], _T]) -> None:
        self._rows: dict[str, Table] = {}
        for row in rows:
            name = row.string("name")
            if not name or name in self._rows:
                raise _corrupt("Objects of one kind have no name or the same name.", f"{kind}.name", repr(name))
            self._rows[name] = row
        self._decode = decode
        self._done: dict[str, _T] = {}
        self._failed: dict[str, ObmliteError] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> _T:
        row = self._rows[name]
        # Once each, whatever comes of it: what is visited counts against a budget that all objects share.
        with self._lock:
            if name in self._failed:
                raise copy.copy(self._failed[name])
            if name not in self._done:
                try:
                    with context(object=name):
                        required = row.strings("required")
                        _check_required(required)
                        self._done[name] = self._decode(row, {"name": name, "required": required})
                except ObmliteError as error:
                    self._failed[name] = copy.copy(error)  # a copy holds no traceback
                    raise
        return self._done[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows


def _check_required(required: Sequence[str]) -> None:
    unknown = sorted(set(required) - r.KNOWN_FEATURES)
    if unknown:
        raise UnsupportedFormatError(
            "This needs features that this obmlite does not know.",
            field="required",
            found=", ".join(unknown),
            fix="install a newer obmlite",
        )


class _Decoder:
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
        _check_required(root.strings("required"))
        if root.integer("digest_algorithm", "<B") != 1:
            raise _corrupt(
                "The manifest names a digest that this obmlite does not know.",
                "Manifest.digest_algorithm",
                root.integer("digest_algorithm", "<B"),
                "1 (SHA-256)",
            )
        if root.integer("chunk_size", "<Q") != r.CHUNK_SIZE:
            raise _corrupt(
                "The chunks that digests cover are of another size.",
                "Manifest.chunk_size",
                root.integer("chunk_size", "<Q"),
                r.CHUNK_SIZE,
            )
        self._strings = _Pool(root.table("strings", "StringPool"), "Manifest.strings")
        self._blobs = _Pool(root.table("blobs", "BlobPool"), "Manifest.blobs")
        self.files = self._files(root.table("files", "Files"))
        self._paths = list(self.files)
        self._meshes = self._mesh_table(root.table("meshes", "Meshes"))
        self._partitions = self._partition_table(root.table("partitions", "Partitions"))
        symbolic = root.vector("symbolic_dims", np.uint32).tolist()
        if len(symbolic) != len(set(symbolic)):
            raise _corrupt("A symbolic dimension is listed twice.", "Manifest.symbolic_dims", len(symbolic))
        self._dims = [self._dimension(self.string(n)) for n in symbolic]

    # --- pools and shared tables

    @functools.cache  # noqa: B019 - lives as long as the decoder, one entry for each string
    def string(self, number: int) -> str:
        try:
            return self._strings[number].decode()
        except UnicodeDecodeError as error:
            raise _corrupt("A string is not UTF-8.", "Manifest.strings", str(error)) from None

    def string_plus1(self, number: int) -> str | None:
        return self.string(number - 1) if number else None

    @functools.cache  # noqa: B019 - likewise; many nodes may name one blob
    def static(self, number: int) -> Any:
        return trees.unpack_static(self._blobs[number])

    def metadata(self, row: Table) -> dict[str, Any]:
        number = row.integer("metadata_plus1")
        value = self.static(number - 1) if number else {}
        if not isinstance(value, dict):
            raise _corrupt("Metadata is no map.", "metadata", type(value).__name__)
        return dict(value)

    def _files(self, row: Table) -> dict[str, r.FileRecord]:
        path, length = row.vector("path", np.uint32), row.vector("length", np.uint64)
        kind, digest = row.vector("kind", np.uint8), row.vector("digest", np.uint8)
        _same_length("Files", path.size, length=length, kind=kind)
        if digest.size != 32 * path.size:
            raise _corrupt("The files' digests are too many or too few.", "Files.digest", digest.size, 32 * path.size)
        digests = digest.tobytes()
        files: dict[str, r.FileRecord] = {}
        last: str | None = None
        for n, (p, size, k) in enumerate(zip(path.tolist(), length.tolist(), kind.tolist(), strict=True)):
            name = self.string(p)
            if last is not None and name <= last:
                raise _corrupt(
                    "The files are not in the order of their paths, or one is named twice.", "Files.path", name
                )
            last = name
            if size >= MAX_TENSOR_BYTES:
                raise _corrupt("A file's length is impossible.", "Files.length", size)
            files[name] = r.FileRecord(name, size, _member(r.FileKind, k, "Files.kind"), digests[32 * n : 32 * (n + 1)])
        return files

    def file(self, number: int, kind: r.FileKind, field: str) -> r.FileRecord:
        if number >= len(self._paths):
            raise _corrupt("An index points past the end of its table.", field, number, f"below {len(self._paths)}")
        record = self.files[self._paths[number]]
        if record.kind is not kind:
            raise _corrupt("A file is of another kind than its use.", field, record.kind.name, kind.name)
        return record

    def _mesh_table(self, row: Table) -> list[MeshSpec]:
        starts = row.vector("axis_start", np.uint32)
        names, sizes = row.vector("axis_name", np.uint32), row.vector("axis_size", np.uint64)
        kinds = row.vector("axis_type", np.uint8)
        _same_length("Meshes", names.size, axis_size=sizes, axis_type=kinds)
        cuts = _starts(starts, max(starts.size - 1, 0), names.size, "Meshes.axis_start")
        texts = [self.string(n) for n in names.tolist()]
        types = [int(_member(AxisType, k, "Meshes.axis_type")) for k in kinds.tolist()]
        if sizes.size and not 0 < int(sizes.min()) <= int(sizes.max()) < 1 << 31:
            raise _corrupt("A mesh axis has an impossible size.", "Meshes.axis_size", sizes.tolist()[:8])
        return [
            MeshSpec(tuple(texts[a:b]), tuple(sizes[a:b].tolist()), tuple(types[a:b]))
            for a, b in itertools.pairwise(cuts)
        ]

    def _partition_table(self, row: Table) -> list[Partition]:
        mesh = _below(row.vector("mesh_plus1", np.uint32), len(self._meshes) + 1, "Partitions.mesh_plus1").tolist()
        kinds = row.vector("entry_kind", np.uint8)
        axes = [self.string(n) for n in row.vector("axis", np.uint32).tolist()]

        def cuts(name: str, count: int, length: int) -> list[int]:
            return _starts(row.vector(name, np.uint32), count, length, f"Partitions.{name}")

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
                raise _corrupt("An entry of a partition spec is of unknown kind.", "Partitions.entry_kind", kind)
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
            raise _corrupt("A symbolic dimension is malformed.", "Manifest.symbolic_dims", text[:80]) from error
        if isinstance(dimension, int) or dimension.text != text:
            raise _corrupt(
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
        _same_length("Tree", kinds.size, arity=arities, key_kind=key_kinds, key=keys)
        _same_length("Tree", kinds.size, class_plus1=classes, static_plus1=static)
        _below(static, len(self._blobs) + 1, "Tree.static_plus1")
        pairs = list(zip(key_kinds.tolist(), keys.tolist(), strict=True))
        # Each distinct key once: there are few, and many nodes may name one long text.
        known = {
            (kind, key): trees.key_from_text(_member(trees.KeyKind, kind, "Tree.key_kind"), self.string(key))
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
        _same_length(field, dtype.size, rank=rank, key_impl_plus1=impl, weak_type=weak, partition_plus1=partition)
        _same_length(field, dtype.size, memory_kind_plus1=memory, logical_axes_plus1=logical)
        _below(rank, MAX_RANK + 1, f"{field}.rank")
        _below(partition, len(self._partitions) + 1, f"{field}.partition_plus1")
        _below(logical, len(self._partitions) + 1, f"{field}.logical_axes_plus1")
        if dim.size != int(rank.sum(dtype=np.int64)):
            raise _corrupt("Dimensions are too many or too few for the ranks.", f"{field}.dim", dim.size)
        lowest = int(dim.min()) if dim.size else 0
        if lowest < (0 if concrete else -len(self._dims)):
            raise _corrupt("A dimension is symbolic where none may be, or unknown.", f"{field}.dim", lowest)
        sizes: list[Dimension] = dim.tolist()
        if lowest < 0:
            sizes = [self._dims[-1 - d] if isinstance(d, int) and d < 0 else d for d in sizes]
        flags = _flags(weak, f"{field}.weak_type")
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
            raise _corrupt("A tensor's size is impossible.", f"{field}.dim", shape)
        split = self._partitions[partition - 1] if partition else None
        axes = self._partitions[logical - 1] if logical else None
        for found, name in ((split, "partition_plus1"), (axes, "logical_axes_plus1")):
            if found is not None and len(found.entries) > len(shape):
                raise _corrupt(
                    "A partition spec has more entries than dimensions.", f"{field}.{name}", found.entries, len(shape)
                )
        if axes is not None and axes.mesh is not None:
            raise _corrupt("Logical axes are those of a mesh.", f"{field}.logical_axes_plus1", axes.mesh)
        return TensorSpec(shape, kind, weak, split, self.string_plus1(memory), axes)

    # --- functions

    def bindings(self, row: Table) -> tuple[r.Binding, ...]:
        return tuple(
            r.Binding(b.string("argument"), b.string("weights"), b.string("subtree"))
            for b in row.tables("bindings", "Binding")
        )

    def module(self, row: Table) -> r.ModuleRecord:
        file = self.file(row.integer("file"), r.FileKind.FUNCTION, "Module.file")
        offset, length = row.integer("stablehlo_offset", "<Q"), row.integer("stablehlo_length", "<Q")
        if offset + length > file.length or not length:
            raise _corrupt(
                "The StableHLO is not inside its file.", "Module.stablehlo_length", f"{length} bytes at {offset}"
            )
        form = _member(r.ModuleFormat, row.integer("format", "<B"), "Module.format")
        if form is r.ModuleFormat.PORTABLE_ARTIFACT and (offset, length) != (0, file.length):
            raise _corrupt(
                "The StableHLO is not its whole file.",
                "Module.stablehlo_length",
                f"{length} bytes at {offset}",
                file.length,
            )
        arguments = self.specs(row.table("arguments", "Specs"), "Module.arguments")
        results = self.specs(row.table("results", "Specs"), "Module.results")
        kept = _below(row.vector("kept", np.uint32), len(arguments), "Module.kept")
        donated = _below(row.vector("donated", np.uint32), len(arguments), "Module.donated")
        _ascending(kept, "Module.kept")
        _ascending(donated, "Module.donated")
        captures: tuple[r.Capture, ...] = ()
        if row.has("captures"):
            table = row.table("captures", "Captures")
            weights, leaf = table.vector("weights", np.uint32), table.vector("leaf", np.uint32)
            flags, argument = table.vector("differentiable", np.uint8), table.vector("argument", np.uint32)
            _same_length("Captures", weights.size, leaf=leaf, differentiable=flags, argument=argument)
            _ascending(_below(argument, len(arguments), "Captures.argument"), "Captures.argument")
            good = _flags(flags, "Captures.differentiable")
            rows = zip(weights.tolist(), leaf.tolist(), good, argument.tolist(), strict=True)
            captures = tuple(r.Capture(self.string(w), n, d, a) for w, n, d, a in rows)
        traced = row.integer("traced")
        if not len(arguments) - len(captures) <= traced <= len(arguments):
            raise _corrupt("A module was traced with an impossible number of arguments.", "Module.traced", traced)
        if not {c.argument for c in captures}.issuperset(range(traced, len(arguments))):
            raise _corrupt("An argument was hoisted from a module's code and is no capture.", "Module.traced", traced)
        mesh = row.integer("mesh_plus1")
        if mesh > len(self._meshes):
            raise _corrupt("An index points past the end of its table.", "Module.mesh_plus1", mesh)
        if row.integer("num_devices") < 1:
            raise _corrupt("A module runs on no device.", "Module.num_devices", 0)
        return r.ModuleRecord(
            file=file.path,
            format=form,
            offset=offset,
            length=length,
            stablehlo_version=row.string("stablehlo_version"),
            calling_convention=row.integer("calling_convention"),
            platforms=row.strings("platforms"),
            num_devices=row.integer("num_devices"),
            arguments=arguments,
            results=results,
            traced=traced,
            mesh=self._meshes[mesh - 1] if mesh else None,
            kept=None if row.boolean("all_kept") else tuple(kept.tolist()),
            donated=tuple(donated.tolist()),
            captures=captures,
            ordered_effects=row.strings("ordered_effects"),
            unordered_effects=row.strings("unordered_effects"),
            disabled_checks=row.strings("disabled_checks"),
            uses_global_constants=row.boolean("uses_global_constants"),
            custom_calls=row.strings("custom_calls"),
            dialects=row.strings("dialects"),
            jax_version=row.string("jax_version"),
            jaxlib_version=row.string("jaxlib_version"),
            name=row.string("name"),
        )

    def fixed(self, row: Table) -> r.FixedArgument:
        number = row.integer("value_plus1")
        return r.FixedArgument(
            row.string("name"),
            _member(r.FixedKind, row.integer("kind", "<B"), "FixedArgument.kind"),
            number > 0,
            self.static(number - 1) if number else None,
            row.string("text"),
        )

    def compile_options(self, row: Table) -> dict[str, dict[str, Any]]:
        options: dict[str, dict[str, Any]] = {}
        for table in row.tables("compile_options", "CompileOptions"):
            value = self.static(table.integer("options"))
            if not isinstance(value, dict) or table.string("platform") in options:
                raise _corrupt("Compile options are no map, or given twice.", "CompileOptions.options")
            options[table.string("platform")] = dict(value)
        return options

    def function(self, row: Table, facts: dict[str, Any]) -> r.FunctionRecord:
        inputs = self.tree(row.table("inputs", "Tree"))
        outputs = self.tree(row.table("outputs", "Tree"))
        kinds = row.vector("argument_kinds", np.uint8).tolist()
        if inputs.kinds[0] != trees.Kind.ARGUMENTS or len(kinds) != inputs.arities[0]:
            raise _corrupt("A function's inputs are no list of arguments.", "Function.inputs", len(kinds))
        if outputs.kinds[0] == trees.Kind.ARGUMENTS:
            raise _corrupt("A function's outputs are a list of arguments.", "Function.outputs")
        primal = self.module(row.table("primal", "Module"))
        vjps = tuple(self.module(m) for m in row.tables("vjps", "Module"))
        leaves = inputs.num_leaves
        if [c.argument for c in primal.captures] != list(range(leaves, len(primal.arguments))):
            raise _corrupt(
                "A module's arguments are not the leaves of its function's inputs and its captures.",
                "Module.arguments",
                len(primal.arguments),
                inputs.num_leaves + len(primal.captures),
            )
        if len(primal.results) != outputs.num_leaves:
            raise _corrupt(
                "A module's results are not the leaves of its function's outputs.",
                "Module.results",
                len(primal.results),
                outputs.num_leaves,
            )
        before = primal
        for vjp in vjps:
            counts = vjp.traced, len(vjp.results)
            if counts != (before.traced + len(before.results), before.traced):
                raise _corrupt(
                    "A VJP's arguments and results are not those of the module before it and their cotangents.",
                    "Function.vjps",
                    counts,
                    (before.traced + len(before.results), before.traced),
                )
            own = [c.argument for c in vjp.captures if c.argument < vjp.traced]
            if own != [c.argument for c in before.captures if c.argument < before.traced]:
                raise _corrupt("A VJP's captures are not those of the module before it.", "Captures.argument", own)
            before = vjp
        constraints = row.strings("constraints")
        for text in constraints:
            try:
                dims.parse_constraint(text)
            except ExportError as error:
                raise _corrupt("A constraint is malformed.", "Function.constraints", text[:80]) from error
        return r.FunctionRecord(
            **facts,
            metadata=self.metadata(row),
            visibility=_member(r.Visibility, row.integer("visibility", "<B"), "Function.visibility"),
            inputs=inputs,
            outputs=outputs,
            argument_kinds=tuple(_member(r.ArgumentKind, k, "Function.argument_kinds") for k in kinds),
            fixed=tuple(self.fixed(a) for a in row.tables("fixed", "FixedArgument")),
            constraints=constraints,
            bindings=self.bindings(row),
            primal=primal,
            vjps=vjps,
            compile_options=self.compile_options(row),
        )

    def polymorphic(self, row: Table, facts: dict[str, Any]) -> r.PolymorphicRecord:
        return r.PolymorphicRecord(
            **facts,
            metadata=self.metadata(row),
            visibility=_member(r.Visibility, row.integer("visibility", "<B"), "PolymorphicFunction.visibility"),
            functions=row.strings("functions"),
        )

    # --- weights

    def weights(self, row: Table, facts: dict[str, Any]) -> r.WeightsRecord:
        tree = self.tree(row.table("tree", "Tree"))
        specs = self.specs(row.table("specs", "Specs"), "Weights.specs", concrete=True)
        leaf_tensor = row.vector("leaf_tensor_plus1", np.uint32).astype(np.int64) - 1
        tensor_leaf = row.vector("tensor_leaf", np.uint32).astype(np.int64)
        _same_length("Weights", tree.num_leaves, specs=np.empty(len(specs)), leaf_tensor_plus1=leaf_tensor)
        _below(leaf_tensor, tensor_leaf.size, "Weights.leaf_tensor_plus1")
        _below(tensor_leaf, tree.num_leaves, "Weights.tensor_leaf")
        if not np.array_equal(leaf_tensor[tensor_leaf], np.arange(tensor_leaf.size)):
            raise _corrupt("A tensor is named after a leaf that is not its own.", "Weights.tensor_leaf")
        for leaf, tensor in enumerate(leaf_tensor.tolist()):
            if specs[leaf].kind.tail is None:
                raise UnsupportedFormatError(
                    "The weights hold PRNG keys of an implementation that this JAX does not know.",
                    leaf=tree.names[leaf],
                    field="Weights.specs",
                    found=specs[leaf].kind.impl,
                    fix="use a JAX that has it",
                )
            if (tensor < 0) != (not specs[leaf].kind.storage):
                raise _corrupt("A leaf has no tensor, or one that it can't have.", "Weights.leaf_tensor_plus1", leaf)
            first = specs[tensor_leaf[tensor]] if tensor >= 0 else specs[leaf]
            if (specs[leaf].shape, specs[leaf].kind) != (first.shape, first.kind):
                raise _corrupt("Tied leaves differ in shape or dtype.", "Weights.leaf_tensor_plus1", tree.names[leaf])
        return r.WeightsRecord(
            **facts,
            metadata=self.metadata(row),
            visibility=_member(r.Visibility, row.integer("visibility", "<B"), "Weights.visibility"),
            tree=tree,
            specs=specs,
            leaf_tensor=leaf_tensor,
            tensor_leaf=tensor_leaf,
            pieces=self._pieces(row, tree.names, specs, tensor_leaf.tolist()),
        )

    def _pieces(
        self, row: Table, names: Sequence[str], specs: Sequence[TensorSpec], tensor_leaf: Sequence[int]
    ) -> tuple[tuple[r.Piece, ...], ...]:
        file, name = row.vector("piece_file", np.uint32), row.vector("piece_name_plus1", np.uint32)
        begins, extents = row.vector("piece_begin", np.uint64), row.vector("piece_shape", np.uint64)
        digests = row.vector("chunk_digest", np.uint8).tobytes()
        _same_length("Weights", file.size, piece_name_plus1=name)
        cuts = _starts(row.vector("piece_start", np.uint32), len(tensor_leaf), file.size, "Weights.piece_start")
        paths = {n: self.file(n, r.FileKind.WEIGHTS, "Weights.piece_file").path for n in np.unique(file).tolist()}
        files, given = file.tolist(), name.tolist()
        pieces: list[tuple[r.Piece, ...]] = []
        at = corner = 0
        seen: set[tuple[int, str]] = set()
        for tensor, leaf in enumerate(tensor_leaf):
            spec = specs[leaf]
            shape: tuple[int, ...] = spec.shape  # type: ignore[assignment]
            first, last = cuts[tensor], cuts[tensor + 1]
            if first == last:
                raise _corrupt("A tensor has no pieces.", "Weights.piece_start", names[leaf])
            parts = []
            for n in range(first, last):
                begin, extent = (0,) * len(shape), shape
                if last - first > 1:
                    stop = corner + len(shape)
                    begin, extent = tuple(begins[corner:stop].tolist()), tuple(extents[corner:stop].tolist())
                    corner = stop
                    if not len(begin) == len(extent) == len(shape) or any(
                        b + e > s for b, e, s in zip(begin, extent, shape, strict=True)
                    ):
                        raise _corrupt("A piece leaves its tensor.", "Weights.piece_begin", names[leaf])
                stop = at + 32 * -(-spec.kind.storage_nbytes(extent) // r.CHUNK_SIZE)
                if stop > len(digests):
                    raise _corrupt("Chunk digests are missing.", "Weights.chunk_digest", names[leaf])
                own = self.string(given[n] - 1) if given[n] else names[leaf]
                if (files[n], own) in seen:
                    raise _corrupt("Two pieces are one tensor of one file.", "Weights.piece_name_plus1", own)
                seen.add((files[n], own))
                parts.append(r.Piece(paths[files[n]], own, begin, extent, digests[at:stop]))
                at = stop
            if sum(math.prod(p.shape) for p in parts) != math.prod(shape) or not _disjoint(parts):
                raise _corrupt("A tensor's pieces do not make up the tensor.", "Weights.piece_shape", names[leaf])
            pieces.append(tuple(parts))
        if at != len(digests) or corner != begins.size or corner != extents.size:
            raise _corrupt("Pieces or chunk digests are left over.", "Weights.chunk_digest", len(digests), at)
        return tuple(pieces)

    # --- pipelines and supplementals

    def pipeline(self, row: Table, facts: dict[str, Any]) -> r.PipelineRecord:
        steps = tuple(
            r.StepRecord(
                _member(r.StepRole, s.integer("role", "<B"), "Step.role"), s.string("function"), self.bindings(s)
            )
            for s in row.tables("steps", "Step")
        )
        roles = [s.role for s in steps]
        if roles != sorted(roles) or roles.count(r.StepRole.MODEL) > 1 or not roles:
            raise _corrupt(
                "A pipeline's steps are in no order that one has.", "Step.role", [role.name for role in roles]
            )
        return r.PipelineRecord(
            **facts,
            metadata=self.metadata(row),
            visibility=_member(r.Visibility, row.integer("visibility", "<B"), "Pipeline.visibility"),
            steps=steps,
            pass_through=row.boolean("pass_through"),
        )

    def supplemental(self, row: Table, facts: dict[str, Any]) -> r.SupplementalRecord:
        form = _member(r.SupplementalForm, row.integer("form", "<B"), "Supplemental.form")
        paths, files = row.vector("entry_path", np.uint32), row.vector("entry_file_plus1", np.uint32)
        _same_length("Supplemental", paths.size, entry_file_plus1=files)
        entries: dict[str, str | None] = {}
        for p, f in zip(paths.tolist(), files.tolist(), strict=True):
            path = self.string(p)
            if path in entries or path.endswith("/") != (f == 0):
                raise _corrupt("A supplemental's path is given twice, or no file's.", "Supplemental.entry_path", path)
            record = self.file(f - 1, r.FileKind.SUPPLEMENTAL, "Supplemental.entry_file_plus1") if f else None
            entries[path] = record.path if record else None
        one_file = len(entries) == 1 and None not in entries.values()
        if (form is r.SupplementalForm.INLINE and entries) or (form is r.SupplementalForm.FILE and not one_file):
            raise _corrupt("A supplemental's files do not fit its form.", "Supplemental.form", form.name)
        return r.SupplementalRecord(
            **facts,
            metadata=self.metadata(row),
            form=form,
            mime_type=row.string("mime_type"),
            version=row.string("version"),
            function=row.string("function"),
            inline=self._blobs[row.integer("inline")] if form is r.SupplementalForm.INLINE else b"",
            entries=entries,
        )


def decode(manifest: bytes) -> r.ManifestRecord:
    """Reads a manifest file's bytes.

    Raises:
      CorruptPackageError: the trailer does not match, or a field is not what the format allows; ``field`` names it.
      UnsupportedFormatError: the package is of another major format, or requires an unknown feature.
    """
    flatbuffer, digest = trailer.unseal(manifest)
    d = _Decoder(flatbuffer)
    root = d.root
    mappings: dict[str, Any] = {
        "functions": _Lazy("Function", root.tables("functions", "Function"), d.function),
        "polymorphic": _Lazy("PolymorphicFunction", root.tables("polymorphic", "PolymorphicFunction"), d.polymorphic),
        "weights": _Lazy("Weights", root.tables("weights", "Weights"), d.weights),
    }
    names = [name for mapping in mappings.values() for name in mapping]
    if len(names) != len(set(names)):
        raise _corrupt("Two objects have one name.", "Function.name")
    return r.ManifestRecord(
        format=d.format,
        reader=d.reader,
        producer=root.string("producer"),
        files=d.files,
        **mappings,
        pipelines=_Lazy("Pipeline", root.tables("pipelines", "Pipeline"), d.pipeline),
        supplementals=_Lazy("Supplemental", root.tables("supplementals", "Supplemental"), d.supplemental),
        default_pipeline=root.string("default_pipeline"),
        metadata=d.metadata(root),
        digest=digest,
    )
