"""Dataclasses → manifest bytes. The same records give the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import flatbuffers
import numpy as np

from obmlite import tree as trees
from obmlite.schema import records as r
from obmlite.schema import trailer
from obmlite.schema._fields import FIELDS
from obmlite.schema._generated import manifest_generated as generated
from obmlite.specs import UNCONSTRAINED, MeshSpec, Partition, TensorSpec

_T = TypeVar("_T")

ENTRY_NOT_SPLIT, ENTRY_AXES, ENTRY_UNCONSTRAINED = 1, 2, 3


class _Pool:
    """Distinct values, numbered in the order in which they were first seen."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}

    def __call__(self, value: Any) -> int:
        return self.numbers.setdefault(value, len(self.numbers))

    def plus1(self, value: Any) -> int:
        return 0 if value is None else self(value) + 1


def _starts(lengths: Iterable[int]) -> np.ndarray[Any, Any]:
    return np.cumsum([0, *lengths])


class _Encoder:
    def __init__(self, manifest: r.ManifestRecord) -> None:
        self.builder = flatbuffers.Builder(1 << 16)
        self.strings = _Pool()
        self.blobs = _Pool()
        self.partitions = _Pool()
        self.meshes = _Pool()
        self.dims = _Pool()
        self.files = {path: number for number, path in enumerate(manifest.files)}

    # The builder wants children finished before their parent starts: every method returns an offset or a scalar.

    def table(self, name: str, /, **fields: Any) -> int:
        """One table; zeros and absent children are left out."""
        builder = self.builder
        getattr(generated, f"{name}Start")(builder)
        for field in FIELDS[name]:
            value = fields.pop(field)
            if value:
                camel = "".join(part.capitalize() for part in field.split("_"))
                getattr(generated, f"{name}Add{camel}")(builder, value)
        assert not fields, fields
        offset: int = getattr(generated, f"{name}End")(builder)
        return offset

    def column(self, values: Any, dtype: str) -> int:
        array = np.ascontiguousarray(values, np.dtype(dtype))
        offset: int = self.builder.CreateNumpyVector(array) if array.size else 0
        return offset

    def octets(self, data: bytes) -> int:
        return self.column(np.frombuffer(data, np.uint8), "u1")

    def text(self, text: str) -> int:
        offset: int = self.builder.CreateString(text) if text else 0
        return offset

    def offsets(self, offsets: Sequence[int]) -> int:
        if not offsets:
            return 0
        self.builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self.builder.PrependUOffsetTRelative(offset)
        vector: int = self.builder.EndVector()
        return vector

    def texts(self, texts: Sequence[str]) -> int:
        return self.offsets([self.builder.CreateString(text) for text in texts])

    def pool(self, name: str, values: Sequence[bytes]) -> int:
        starts = self.column(_starts(map(len, values)), "<u4")
        return self.table(name, bytes=self.octets(b"".join(values)), starts=starts)

    def static(self, data: Any) -> int:
        """A blob's number, plus one; 0 for nothing."""
        return self.blobs(trees.pack_static(data)) + 1 if data else 0

    # --- columns

    def file_table(self, files: Sequence[r.FileRecord]) -> int:
        return self.table(
            "Files",
            path=self.column([self.strings(f.path) for f in files], "<u4"),
            length=self.column([f.length for f in files], "<u8"),
            kind=self.column([f.kind for f in files], "u1"),
            digest=self.octets(b"".join(f.digest for f in files)),
        )

    def tree(self, tree: trees.Tree) -> int:
        nodes = range(len(tree))
        texts = [trees.key_text(k) if k is not None else "" for k in tree.keys]
        static = (trees.pack_static(tree.static[n]) if n in tree.static else None for n in nodes)
        return self.table(
            "Tree",
            kind=self.column(tree.kinds, "u1"),
            arity=self.column(tree.arities, "<u4"),
            key_kind=self.column(tree.key_kinds, "u1"),
            key=self.column([self.strings(text) for text in texts], "<u4"),
            class_plus1=self.column([self.strings.plus1(tree.classes.get(n)) for n in nodes], "<u4"),
            static_plus1=self.column([self.blobs.plus1(data) for data in static], "<u4"),
        )

    def specs(self, specs: Sequence[TensorSpec]) -> int:
        dims = [d if isinstance(d, int) else -1 - self.dims(str(d)) for s in specs for d in s.shape]
        return self.table(
            "Specs",
            dtype=self.column([s.kind.code for s in specs], "u1"),
            key_impl_plus1=self.column([self.strings.plus1(s.kind.impl) for s in specs], "<u4"),
            rank=self.column([len(s.shape) for s in specs], "u1"),
            dim=self.column(dims, "<i8"),
            weak_type=self.column([s.weak_type for s in specs], "u1"),
            partition_plus1=self.column([self.partitions.plus1(s.partition) for s in specs], "<u4"),
            memory_kind_plus1=self.column([self.strings.plus1(s.memory_kind) for s in specs], "<u4"),
            logical_axes_plus1=self.column([self.partitions.plus1(s.logical_axes) for s in specs], "<u4"),
        )

    def partition_table(self, partitions: Sequence[Partition]) -> int:
        entries = [entry for p in partitions for entry in p.entries]
        axes = [() if e is None or isinstance(e, str) else e for e in entries]
        kinds = [
            ENTRY_NOT_SPLIT if e is None else ENTRY_UNCONSTRAINED if e == UNCONSTRAINED else ENTRY_AXES for e in entries
        ]
        return self.table(
            "Partitions",
            mesh_plus1=self.column([self.meshes.plus1(p.mesh) for p in partitions], "<u4"),
            entry_start=self.column(_starts(len(p.entries) for p in partitions), "<u4"),
            entry_kind=self.column(kinds, "u1"),
            axis_start=self.column(_starts(map(len, axes)), "<u4"),
            axis=self.column([self.strings(axis) for group in axes for axis in group], "<u4"),
            unreduced_start=self.column(_starts(len(p.unreduced) for p in partitions), "<u4"),
            unreduced=self.column([self.strings(axis) for p in partitions for axis in p.unreduced], "<u4"),
            reduced_start=self.column(_starts(len(p.reduced) for p in partitions), "<u4"),
            reduced=self.column([self.strings(axis) for p in partitions for axis in p.reduced], "<u4"),
        )

    def mesh_table(self, meshes: Sequence[MeshSpec]) -> int:
        return self.table(
            "Meshes",
            axis_start=self.column(_starts(len(m.names) for m in meshes), "<u4"),
            axis_name=self.column([self.strings(name) for m in meshes for name in m.names], "<u4"),
            axis_size=self.column([size for m in meshes for size in m.sizes], "<u8"),
            axis_type=self.column([kind for m in meshes for kind in m.types], "u1"),
        )

    # --- objects

    def bindings(self, bindings: Sequence[r.Binding]) -> int:
        return self.offsets(
            [
                self.table(
                    "Binding",
                    argument=self.text(b.argument),
                    weights=self.text(b.weights),
                    subtree=self.text(b.subtree),
                )
                for b in bindings
            ]
        )

    def module(self, m: r.ModuleRecord) -> int:
        captures = 0
        if m.captures:
            captures = self.table(
                "Captures",
                weights=self.column([self.strings(c.weights) for c in m.captures], "<u4"),
                leaf=self.column([c.leaf for c in m.captures], "<u4"),
                differentiable=self.column([c.differentiable for c in m.captures], "u1"),
                argument=self.column([c.argument for c in m.captures], "<u4"),
            )
        return self.table(
            "Module",
            file=self.files[m.file],
            format=int(m.format),
            stablehlo_offset=m.offset,
            stablehlo_length=m.length,
            stablehlo_version=self.text(m.stablehlo_version),
            calling_convention=m.calling_convention,
            platforms=self.texts(m.platforms),
            num_devices=m.num_devices,
            arguments=self.specs(m.arguments),
            results=self.specs(m.results),
            all_kept=m.kept is None,
            kept=self.column(m.kept or (), "<u4"),
            donated=self.column(m.donated, "<u4"),
            captures=captures,
            ordered_effects=self.texts(m.ordered_effects),
            unordered_effects=self.texts(m.unordered_effects),
            disabled_checks=self.texts(m.disabled_checks),
            uses_global_constants=m.uses_global_constants,
            custom_calls=self.texts(m.custom_calls),
            dialects=self.texts(m.dialects),
            jax_version=self.text(m.jax_version),
            jaxlib_version=self.text(m.jaxlib_version),
            name=self.text(m.name),
            traced=m.traced,
            mesh_plus1=self.meshes.plus1(m.mesh),
        )

    def fixed(self, f: r.FixedArgument) -> int:
        return self.table(
            "FixedArgument",
            name=self.text(f.name),
            kind=int(f.kind),
            value_plus1=self.blobs(trees.pack_static(f.value)) + 1 if f.held else 0,
            text=self.text(f.text),
        )

    def function(self, f: r.FunctionRecord) -> int:
        options = [
            self.table("CompileOptions", platform=self.text(p), options=self.blobs(trees.pack_static(dict(o))))
            for p, o in f.compile_options.items()
        ]
        return self.table(
            "Function",
            name=self.text(f.name),
            required=self.texts(f.required),
            visibility=int(f.visibility),
            metadata_plus1=self.static(dict(f.metadata)),
            inputs=self.tree(f.inputs),
            outputs=self.tree(f.outputs),
            argument_kinds=self.column(f.argument_kinds, "u1"),
            fixed=self.offsets([self.fixed(a) for a in f.fixed]),
            constraints=self.texts(f.constraints),
            bindings=self.bindings(f.bindings),
            primal=self.module(f.primal),
            vjps=self.offsets([self.module(m) for m in f.vjps]),
            compile_options=self.offsets(options),
        )

    def polymorphic(self, p: r.PolymorphicRecord) -> int:
        return self.table(
            "PolymorphicFunction",
            name=self.text(p.name),
            required=self.texts(p.required),
            visibility=int(p.visibility),
            metadata_plus1=self.static(dict(p.metadata)),
            functions=self.texts(p.functions),
        )

    def weights(self, w: r.WeightsRecord) -> int:
        pieces = [(tensor, piece) for tensor, parts in enumerate(w.pieces) for piece in parts]
        several = [piece for tensor, piece in pieces if len(w.pieces[tensor]) > 1]
        names = [w.tree.names[leaf] for leaf in w.tensor_leaf]
        return self.table(
            "Weights",
            name=self.text(w.name),
            required=self.texts(w.required),
            visibility=int(w.visibility),
            metadata_plus1=self.static(dict(w.metadata)),
            tree=self.tree(w.tree),
            specs=self.specs(w.specs),
            leaf_tensor_plus1=self.column(w.leaf_tensor + 1, "<u4"),
            tensor_leaf=self.column(w.tensor_leaf, "<u4"),
            piece_start=self.column(_starts(map(len, w.pieces)), "<u4"),
            piece_file=self.column([self.files[p.file] for _, p in pieces], "<u4"),
            piece_name_plus1=self.column(
                [self.strings.plus1(None if p.name == names[t] else p.name) for t, p in pieces], "<u4"
            ),
            piece_begin=self.column([i for p in several for i in p.begin], "<u8"),
            piece_shape=self.column([i for p in several for i in p.shape], "<u8"),
            chunk_digest=self.octets(b"".join(p.digests for _, p in pieces)),
        )

    def pipeline(self, p: r.PipelineRecord) -> int:
        steps = [
            self.table("Step", role=int(s.role), function=self.text(s.function), bindings=self.bindings(s.bindings))
            for s in p.steps
        ]
        return self.table(
            "Pipeline",
            name=self.text(p.name),
            required=self.texts(p.required),
            visibility=int(p.visibility),
            metadata_plus1=self.static(dict(p.metadata)),
            steps=self.offsets(steps),
            pass_through=p.pass_through,
        )

    def supplemental(self, s: r.SupplementalRecord) -> int:
        files = [0 if path is None else self.files[path] + 1 for path in s.entries.values()]
        return self.table(
            "Supplemental",
            name=self.text(s.name),
            required=self.texts(s.required),
            metadata_plus1=self.static(dict(s.metadata)),
            mime_type=self.text(s.mime_type),
            version=self.text(s.version),
            function=self.text(s.function),
            form=int(s.form),
            inline=self.blobs(s.inline) if s.form is r.SupplementalForm.INLINE else 0,
            entry_path=self.column([self.strings(path) for path in s.entries], "<u4"),
            entry_file_plus1=self.column(files, "<u4"),
        )

    def device(self, d: r.DeviceRecord) -> int:
        return self.table(
            "Device",
            id=d.id,
            coords=self.column(d.coords or (), "<i4"),
            core_on_chip_plus1=0 if d.core_on_chip is None else d.core_on_chip + 1,
        )

    def objects(self, encode: Callable[[_T], int], objects: Mapping[str, _T]) -> int:
        return self.offsets([encode(o) for o in objects.values()])


def encode(manifest: r.ManifestRecord) -> bytes:
    """The manifest file's bytes, trailer included.

    Raises:
      LeafError: metadata or static data cannot be held.
      UnsupportedFormatError: the manifest would be too large.
    """
    e = _Encoder(manifest)
    fields: dict[str, Any] = {
        "format_major": manifest.format[0],
        "format_minor": manifest.format[1],
        "reader": e.text(manifest.reader),
        "required": e.texts(manifest.required),
        "producer": e.text(manifest.producer),
        "digest_algorithm": generated.DigestAlgorithm.SHA256,
        "files": e.file_table(list(manifest.files.values())),
        "functions": e.objects(e.function, manifest.functions),
        "polymorphic": e.objects(e.polymorphic, manifest.polymorphic),
        "weights": e.objects(e.weights, manifest.weights),
        "pipelines": e.objects(e.pipeline, manifest.pipelines),
        "supplementals": e.objects(e.supplemental, manifest.supplementals),
        "default_pipeline": e.text(manifest.default_pipeline),
        "metadata_plus1": e.static(dict(manifest.metadata)),
        "chunk_size": r.CHUNK_SIZE,
        "device_assignment": e.offsets([e.device(d) for d in manifest.device_assignment]),
    }
    # The pools come last: everything above adds to them, partitions to meshes, and all to strings.
    fields["partitions"] = e.partition_table(list(e.partitions.numbers))
    fields["meshes"] = e.mesh_table(list(e.meshes.numbers))
    fields["symbolic_dims"] = e.column([e.strings(text) for text in e.dims.numbers], "<u4")
    fields["blobs"] = e.pool("BlobPool", list(e.blobs.numbers))
    fields["strings"] = e.pool("StringPool", [text.encode() for text in e.strings.numbers])
    e.builder.Finish(e.table("Manifest", **fields), file_identifier=trailer.IDENTIFIER)
    return trailer.seal(bytes(e.builder.Output()))
