"""Manifest bytes → dataclasses, checking everything before it is used.

The root and the tables that all objects share are checked when the manifest is opened; an object's own columns when
the object is first asked for, so that one that this reader does not understand leaves the others usable.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from obmlite import dims
from obmlite import tree as trees
from obmlite.errors import ExportError, UnsupportedFormatError
from obmlite.schema import records as r
from obmlite.schema import trailer
from obmlite.schema._columns import LazyRows, ascending, below, corrupt, cuts_of, member, same_length, truths
from obmlite.schema._flat import Table
from obmlite.schema._shared import Shared
from obmlite.specs import TensorSpec

MAX_PIECE_CELLS = 1 << 20
"""Cells of the grid that the faces of a tensor's pieces make; as many as pieces where they are a grid themselves."""


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


class _Decoder(Shared):
    """Reads the objects."""

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
            raise corrupt(
                "The StableHLO is not inside its file.", "Module.stablehlo_length", f"{length} bytes at {offset}"
            )
        form = member(r.ModuleFormat, row.integer("format", "<B"), "Module.format")
        if form is r.ModuleFormat.PORTABLE_ARTIFACT and (offset, length) != (0, file.length):
            raise corrupt(
                "The StableHLO is not its whole file.",
                "Module.stablehlo_length",
                f"{length} bytes at {offset}",
                file.length,
            )
        arguments = self.specs(row.table("arguments", "Specs"), "Module.arguments")
        results = self.specs(row.table("results", "Specs"), "Module.results")
        kept = below(row.vector("kept", np.uint32), len(arguments), "Module.kept")
        donated = below(row.vector("donated", np.uint32), len(arguments), "Module.donated")
        ascending(kept, "Module.kept")
        ascending(donated, "Module.donated")
        captures: tuple[r.Capture, ...] = ()
        if row.has("captures"):
            table = row.table("captures", "Captures")
            weights, leaf = table.vector("weights", np.uint32), table.vector("leaf", np.uint32)
            flags, argument = table.vector("differentiable", np.uint8), table.vector("argument", np.uint32)
            same_length("Captures", weights.size, leaf=leaf, differentiable=flags, argument=argument)
            ascending(below(argument, len(arguments), "Captures.argument"), "Captures.argument")
            good = truths(flags, "Captures.differentiable")
            rows = zip(weights.tolist(), leaf.tolist(), good, argument.tolist(), strict=True)
            captures = tuple(r.Capture(self.string(w), n, d, a) for w, n, d, a in rows)
        traced = row.integer("traced")
        if not len(arguments) - len(captures) <= traced <= len(arguments):
            raise corrupt("A module was traced with an impossible number of arguments.", "Module.traced", traced)
        if not {c.argument for c in captures}.issuperset(range(traced, len(arguments))):
            raise corrupt("An argument was hoisted from a module's code and is no capture.", "Module.traced", traced)
        mesh = row.integer("mesh_plus1")
        if mesh > len(self._meshes):
            raise corrupt("An index points past the end of its table.", "Module.mesh_plus1", mesh)
        if row.integer("num_devices") < 1:
            raise corrupt("A module runs on no device.", "Module.num_devices", 0)
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
            member(r.FixedKind, row.integer("kind", "<B"), "FixedArgument.kind"),
            number > 0,
            self.static(number - 1) if number else None,
            row.string("text"),
        )

    def compile_options(self, row: Table) -> dict[str, dict[str, Any]]:
        options: dict[str, dict[str, Any]] = {}
        for table in row.tables("compile_options", "CompileOptions"):
            value = self.static(table.integer("options"))
            if not isinstance(value, dict) or table.string("platform") in options:
                raise corrupt("Compile options are no map, or given twice.", "CompileOptions.options")
            options[table.string("platform")] = dict(value)
        return options

    def function(self, row: Table, facts: dict[str, Any]) -> r.FunctionRecord:
        inputs = self.tree(row.table("inputs", "Tree"))
        outputs = self.tree(row.table("outputs", "Tree"))
        kinds = row.vector("argument_kinds", np.uint8).tolist()
        if inputs.kinds[0] != trees.Kind.ARGUMENTS or len(kinds) != inputs.arities[0]:
            raise corrupt("A function's inputs are no list of arguments.", "Function.inputs", len(kinds))
        if outputs.kinds[0] == trees.Kind.ARGUMENTS:
            raise corrupt("A function's outputs are a list of arguments.", "Function.outputs")
        primal = self.module(row.table("primal", "Module"))
        vjps = tuple(self.module(m) for m in row.tables("vjps", "Module"))
        leaves = inputs.num_leaves
        if [c.argument for c in primal.captures] != list(range(leaves, len(primal.arguments))):
            raise corrupt(
                "A module's arguments are not the leaves of its function's inputs and its captures.",
                "Module.arguments",
                len(primal.arguments),
                inputs.num_leaves + len(primal.captures),
            )
        if len(primal.results) != outputs.num_leaves:
            raise corrupt(
                "A module's results are not the leaves of its function's outputs.",
                "Module.results",
                len(primal.results),
                outputs.num_leaves,
            )
        before = primal
        for vjp in vjps:
            counts = vjp.traced, len(vjp.results)
            if counts != (before.traced + len(before.results), before.traced):
                raise corrupt(
                    "A VJP's arguments and results are not those of the module before it and their cotangents.",
                    "Function.vjps",
                    counts,
                    (before.traced + len(before.results), before.traced),
                )
            own = [c.argument for c in vjp.captures if c.argument < vjp.traced]
            if own != [c.argument for c in before.captures if c.argument < before.traced]:
                raise corrupt("A VJP's captures are not those of the module before it.", "Captures.argument", own)
            before = vjp
        constraints = row.strings("constraints")
        for text in constraints:
            try:
                dims.parse_constraint(text)
            except ExportError as error:
                raise corrupt("A constraint is malformed.", "Function.constraints", text[:80]) from error
        return r.FunctionRecord(
            **facts,
            metadata=self.metadata(row),
            visibility=member(r.Visibility, row.integer("visibility", "<B"), "Function.visibility"),
            inputs=inputs,
            outputs=outputs,
            argument_kinds=tuple(member(r.ArgumentKind, k, "Function.argument_kinds") for k in kinds),
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
            visibility=member(r.Visibility, row.integer("visibility", "<B"), "PolymorphicFunction.visibility"),
            functions=row.strings("functions"),
        )

    # --- weights

    def weights(self, row: Table, facts: dict[str, Any]) -> r.WeightsRecord:
        tree = self.tree(row.table("tree", "Tree"))
        specs = self.specs(row.table("specs", "Specs"), "Weights.specs", concrete=True)
        leaf_tensor = row.vector("leaf_tensor_plus1", np.uint32).astype(np.int64) - 1
        tensor_leaf = row.vector("tensor_leaf", np.uint32).astype(np.int64)
        same_length("Weights", tree.num_leaves, specs=np.empty(len(specs)), leaf_tensor_plus1=leaf_tensor)
        below(leaf_tensor, tensor_leaf.size, "Weights.leaf_tensor_plus1")
        below(tensor_leaf, tree.num_leaves, "Weights.tensor_leaf")
        if not np.array_equal(leaf_tensor[tensor_leaf], np.arange(tensor_leaf.size)):
            raise corrupt("A tensor is named after a leaf that is not its own.", "Weights.tensor_leaf")
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
                raise corrupt("A leaf has no tensor, or one that it can't have.", "Weights.leaf_tensor_plus1", leaf)
            first = specs[tensor_leaf[tensor]] if tensor >= 0 else specs[leaf]
            if (specs[leaf].shape, specs[leaf].kind) != (first.shape, first.kind):
                raise corrupt("Tied leaves differ in shape or dtype.", "Weights.leaf_tensor_plus1", tree.names[leaf])
        return r.WeightsRecord(
            **facts,
            metadata=self.metadata(row),
            visibility=member(r.Visibility, row.integer("visibility", "<B"), "Weights.visibility"),
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
        same_length("Weights", file.size, piece_name_plus1=name)
        cuts = cuts_of(row.vector("piece_start", np.uint32), len(tensor_leaf), file.size, "Weights.piece_start")
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
                raise corrupt("A tensor has no pieces.", "Weights.piece_start", names[leaf])
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
                        raise corrupt("A piece leaves its tensor.", "Weights.piece_begin", names[leaf])
                stop = at + 32 * -(-spec.kind.storage_nbytes(extent) // r.CHUNK_SIZE)
                if stop > len(digests):
                    raise corrupt("Chunk digests are missing.", "Weights.chunk_digest", names[leaf])
                own = self.string(given[n] - 1) if given[n] else names[leaf]
                if (files[n], own) in seen:
                    raise corrupt("Two pieces are one tensor of one file.", "Weights.piece_name_plus1", own)
                seen.add((files[n], own))
                parts.append(r.Piece(paths[files[n]], own, begin, extent, digests[at:stop]))
                at = stop
            if sum(math.prod(p.shape) for p in parts) != math.prod(shape) or not _disjoint(parts):
                raise corrupt("A tensor's pieces do not make up the tensor.", "Weights.piece_shape", names[leaf])
            pieces.append(tuple(parts))
        if at != len(digests) or corner != begins.size or corner != extents.size:
            raise corrupt("Pieces or chunk digests are left over.", "Weights.chunk_digest", len(digests), at)
        return tuple(pieces)

    # --- pipelines and supplementals

    def pipeline(self, row: Table, facts: dict[str, Any]) -> r.PipelineRecord:
        steps = tuple(
            r.StepRecord(
                member(r.StepRole, s.integer("role", "<B"), "Step.role"), s.string("function"), self.bindings(s)
            )
            for s in row.tables("steps", "Step")
        )
        roles = [s.role for s in steps]
        if roles != sorted(roles) or roles.count(r.StepRole.MODEL) > 1 or not roles:
            raise corrupt(
                "A pipeline's steps are in no order that one has.", "Step.role", [role.name for role in roles]
            )
        return r.PipelineRecord(
            **facts,
            metadata=self.metadata(row),
            visibility=member(r.Visibility, row.integer("visibility", "<B"), "Pipeline.visibility"),
            steps=steps,
            pass_through=row.boolean("pass_through"),
        )

    def supplemental(self, row: Table, facts: dict[str, Any]) -> r.SupplementalRecord:
        form = member(r.SupplementalForm, row.integer("form", "<B"), "Supplemental.form")
        paths, files = row.vector("entry_path", np.uint32), row.vector("entry_file_plus1", np.uint32)
        same_length("Supplemental", paths.size, entry_file_plus1=files)
        entries: dict[str, str | None] = {}
        for p, f in zip(paths.tolist(), files.tolist(), strict=True):
            path = self.string(p)
            if path in entries or path.endswith("/") != (f == 0):
                raise corrupt("A supplemental's path is given twice, or no file's.", "Supplemental.entry_path", path)
            record = self.file(f - 1, r.FileKind.SUPPLEMENTAL, "Supplemental.entry_file_plus1") if f else None
            entries[path] = record.path if record else None
        one_file = len(entries) == 1 and None not in entries.values()
        if (form is r.SupplementalForm.INLINE and entries) or (form is r.SupplementalForm.FILE and not one_file):
            raise corrupt("A supplemental's files do not fit its form.", "Supplemental.form", form.name)
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


def _device(row: Table) -> r.DeviceRecord:
    coords, core = row.vector("coords", np.int32).tolist(), row.integer("core_on_chip_plus1")
    if bool(coords) != bool(core):
        raise corrupt(
            "A device has coordinates without a core, or a core without coordinates.", "Device.coords", coords
        )
    return r.DeviceRecord(row.integer("id"), tuple(coords) or None, core - 1 if core else None)


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
        "functions": LazyRows("Function", root.tables("functions", "Function"), d.function),
        "polymorphic": LazyRows(
            "PolymorphicFunction", root.tables("polymorphic", "PolymorphicFunction"), d.polymorphic
        ),
        "weights": LazyRows("Weights", root.tables("weights", "Weights"), d.weights),
    }
    names = [name for mapping in mappings.values() for name in mapping]
    if len(names) != len(set(names)):
        raise corrupt("Two objects have one name.", "Function.name")
    return r.ManifestRecord(
        format=d.format,
        reader=d.reader,
        producer=root.string("producer"),
        files=d.files,
        **mappings,
        pipelines=LazyRows("Pipeline", root.tables("pipelines", "Pipeline"), d.pipeline),
        supplementals=LazyRows("Supplemental", root.tables("supplementals", "Supplemental"), d.supplemental),
        default_pipeline=root.string("default_pipeline"),
        device_assignment=tuple(_device(row) for row in root.tables("device_assignment", "Device")),
        metadata=d.metadata(root),
        digest=digest,
    )
