"""Manifest records for the tests: one of everything, and strategies for any."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from obmlite import dims, dtypes, specs
from obmlite import tree as trees
from obmlite.schema import records
from obmlite.specs import UNCONSTRAINED, AxisType, MeshSpec, Partition, TensorSpec

Point = collections.namedtuple("Point", "x y")


@dataclasses.dataclass
class Box:
    """A node with children by key and static data; rebuilds from whatever it is given."""

    children: Any
    static: Any = None


trees.register_node(Point, "samples.Point")
trees.register_node(
    Box, "samples.Box", flatten=lambda b: (b.children, b.static), unflatten=lambda data, view: Box(view, data)
)


# --- comparing and touching


def plain(value: Any) -> Any:
    """Records as plain data that can be compared: mappings decoded, arrays as lists, types of containers kept."""
    if isinstance(value, np.ndarray):
        return "array", value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, dtypes.DType, dims.Expression)):
        fields = ((f.name, plain(getattr(value, f.name))) for f in dataclasses.fields(value))
        return type(value).__name__, dict(fields)
    if isinstance(value, Mapping):
        return "map", [(key, plain(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [plain(item) for item in value]
    if isinstance(value, (int, float)):
        return (int if isinstance(value, int) else float).__name__, value
    return value


def undigested(manifest: records.ManifestRecord) -> Any:
    """:func:`plain` without the digest, which only a manifest that was read has."""
    return plain(dataclasses.replace(manifest, digest=b""))


def touch(manifest: records.ManifestRecord) -> None:
    """Uses everything that a manifest says."""
    plain(manifest)
    for function in manifest.functions.values():
        touch_tree(function.inputs)
        touch_tree(function.outputs)
        for module in (function.primal, *function.vjps):
            touch_specs((*module.arguments, *module.results))
    for weights in manifest.weights.values():
        touch_tree(weights.tree)
        touch_specs(weights.specs)
        assert len(weights.pieces) == len(weights.tensor_leaf)
        assert sum(len(p.digests) for parts in weights.pieces for p in parts) % 32 == 0


def touch_tree(tree: trees.Tree) -> None:
    assert len(tree.names) == tree.num_leaves
    tree.unflatten(range(tree.num_leaves))
    tree.unflatten_some({n: n for n in range(0, tree.num_leaves, 2)})
    for node in range(min(len(tree), 20)):
        tree.subtree(node)


def touch_specs(rows: tuple[TensorSpec, ...]) -> None:
    for spec in rows:
        assert str(spec)
        assert all(isinstance(d, dims.Expression) or d >= 0 for d in spec.shape)
        str(spec.partition), spec.symbols, spec.ndim


# --- one of everything


def digests(seed: str, chunks: int) -> bytes:
    return b"".join(hashlib.sha256(f"{seed} {n}".encode()).digest() for n in range(chunks))


def spec(text: str, **more: Any) -> TensorSpec:
    return dataclasses.replace(specs.spec(text), **more)


MESH = MeshSpec(("data", "modèle"), (4, 2), (AxisType.AUTO, AxisType.EXPLICIT))
SPLIT = Partition((("data", "modèle"), None, UNCONSTRAINED), MESH, ("modèle",), ("data",))
ROWS = Partition((("data",),), MESH)
LOGICAL = Partition((("batch",),))


def sample() -> records.ManifestRecord:
    """A manifest in which every field of the schema is there."""
    files = {
        path: records.FileRecord(path, length, kind, digests(path, 1))
        for path, length, kind in [
            ("attached/a.pb", 7, records.FileKind.SUPPLEMENTAL),
            ("functions/apply.jaxexport", 5000, records.FileKind.FUNCTION),
            ("weights/params-1.safetensors", 1 << 33, records.FileKind.WEIGHTS),
            ("weights/params-2.safetensors", 99, records.FileKind.WEIGHTS),
        ]
    }
    arguments = {
        "params": {"a.b": 0, "__metadata__": [1, (2, None)], "tail": collections.OrderedDict([(3, 3), (-4, 4)])},
        "x": Point(5, Box({"é": 6}, {"rate": 0.5, "shape": (1, (2,))})),
        "mode": 7,
    }
    leaves, inputs = trees.flatten_arguments(arguments)
    outputs = trees.flatten([0, {("k", (1,)): collections.defaultdict(int, z=1)}])[1]
    symbolic = spec("f32[b, 2*b + 1, 3]", partition=SPLIT)
    key = spec("key<threefry2x32>[2]", logical_axes=LOGICAL)
    primal = records.ModuleRecord(
        file="functions/apply.jaxexport",
        format=records.ModuleFormat.JAX_EXPORT,
        offset=1000,
        length=4000,
        stablehlo_version="1.9.0",
        calling_convention=10,
        platforms=("cpu", "tpu"),
        num_devices=1,
        arguments=(symbolic, key, *(spec("~bf16[]") for _ in leaves)),
        results=(symbolic, spec("float0[3]", memory_kind="pinned_host")),
        traced=len(leaves) + 1,
        mesh=MESH,
        kept=(0, 2, 5),
        donated=(1, 2),
        captures=(
            records.Capture("params", 1, True, len(leaves)),
            records.Capture("params", 0, False, len(leaves) + 1),  # hoisted from the code
        ),
        ordered_effects=("io",),
        unordered_effects=("debug", ""),
        disabled_checks=("custom_call:f",),
        uses_global_constants=True,
        custom_calls=("f", "g"),
        dialects=("builtin", "func"),
        jax_version="0.10.2",
        jaxlib_version="0.10.1",
        name="apply",
    )
    vjp = dataclasses.replace(
        primal,
        format=records.ModuleFormat.PORTABLE_ARTIFACT,
        offset=0,
        length=5000,
        arguments=(*primal.arguments[: primal.traced], *primal.results, key),
        results=primal.arguments[: primal.traced],
        traced=primal.traced + len(primal.results),
        mesh=None,
        kept=None,
        captures=(
            primal.captures[0],
            records.Capture("params", 3, True, primal.traced + len(primal.results)),
        ),
    )
    apply = records.FunctionRecord(
        name="apply",
        metadata={"made": "by hand"},
        inputs=inputs,
        outputs=outputs,
        argument_kinds=(
            records.ArgumentKind.POSITIONAL_ONLY,
            records.ArgumentKind.POSITIONAL_OR_KEYWORD,
            records.ArgumentKind.KEYWORD_ONLY,
        ),
        primal=primal,
        fixed=(
            records.FixedArgument("train", records.FixedKind.STATIC, True, (1, [2]), "(1, [2])"),
            records.FixedArgument("act", records.FixedKind.DEFAULT, False, None, "a function"),
        ),
        constraints=("b <= 16",),
        bindings=(records.Binding("params", "params", "x.y"), records.Binding("x", "params")),
        vjps=(vjp,),
        compile_options={"tpu": {"xla_flag": True}, "cpu": {}},
        visibility=records.Visibility.PRIVATE,
    )
    big = spec("f32[3000,1000]")  # two chunks
    pieces = (
        (_piece("w", (0, 0), big.shape, 2),),
        (_piece("v#0", (0, 0), (1, 6)), _piece("v#1", (1, 0), (2, 6), file=2)),
        (_piece("k", (0,), (2,)),),
        (_piece("empty", (0,), (0,), 0),),
    )
    weights = records.WeightsRecord(
        name="params",
        metadata={"step": 7},
        tree=trees.flatten({"w": 0, "tied": 1, "v": 2, "none": 3, "k": 4, "empty": 5})[1],
        # dict keys sort: empty, k, none, tied, v, w
        specs=(
            spec("i8[0]"),
            spec("key<rbg>[2]"),
            spec("float0[4]"),
            dataclasses.replace(big, weak_type=True),
            spec("int4[3,6]"),
            dataclasses.replace(big, partition=ROWS),
        ),
        leaf_tensor=np.array([3, 2, -1, 0, 1, 0]),
        tensor_leaf=np.array([5, 4, 1, 0]),
        pieces=pieces,
    )
    return records.ManifestRecord(
        producer="obmlite test",
        files=files,
        functions={"apply": apply, "b": dataclasses.replace(apply, name="b", metadata={}, vjps=())},
        polymorphic={"any": records.PolymorphicRecord(name="any", functions=("apply", "b"), metadata={"n": 1})},
        weights={"params": weights},
        pipelines={
            "default": records.PipelineRecord(
                name="default",
                metadata={"m": None},
                steps=(
                    records.StepRecord(records.StepRole.PRE_PROCESSOR, "b"),
                    records.StepRecord(records.StepRole.MODEL, "apply", (records.Binding("params", "params", "sub"),)),
                    records.StepRecord(records.StepRole.POST_PROCESSOR, "any"),
                ),
                pass_through=True,
                visibility=records.Visibility.PRIVATE,
            )
        },
        supplementals={
            "tf": records.SupplementalRecord(
                name="tf",
                metadata={"a": [1]},
                form=records.SupplementalForm.DIRECTORY,
                mime_type="application/x-tf",
                version="2",
                function="apply",
                entries={"sub/": None, "sub/a.pb": "attached/a.pb"},
            ),
            "note": records.SupplementalRecord(
                name="note", form=records.SupplementalForm.INLINE, mime_type="text/plain", inline=b"hello"
            ),
            "one": records.SupplementalRecord(
                name="one", form=records.SupplementalForm.FILE, entries={"a.pb": "attached/a.pb"}
            ),
        },
        default_pipeline="default",
        device_assignment=(records.DeviceRecord(0, (0, 1, -1), 1), records.DeviceRecord(7)),
        metadata={"license": "none", "list": [1, 2.5, b"x", None, (True,)]},
    )


def _piece(name: str, begin: Any, shape: Any, chunks: int = 1, file: int = 1) -> records.Piece:
    return records.Piece(f"weights/params-{file}.safetensors", name, begin, shape, digests(name, chunks))


# --- any

devices = st.builds(records.DeviceRecord, st.integers(0, 2**32 - 1)) | st.builds(
    records.DeviceRecord,
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=4).map(tuple),
    st.integers(0, 2**32 - 2),
)


texts = st.text(max_size=8)
odd_names = texts | st.sampled_from(["__metadata__", "a.b", "\\", "", "a/b", "..", "\n", "名", "x" * 300])
small_ints = st.integers(-5, 5) | st.sampled_from([2**63 - 1, 1 - 2**63])
statics = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | texts
    | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(texts | small_ints, inner, max_size=3)
    ),
    max_leaves=6,
)
metadata = st.dictionaries(texts, statics, max_size=3)


def _distinct_names(value: Any) -> bool:
    try:
        trees.flatten(value)
    except trees.LeafError:
        return False
    return True


def _nodes(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.one_of(
        st.dictionaries(odd_names, inner, max_size=4),
        st.dictionaries(small_ints, inner, max_size=4),
        st.dictionaries(st.tuples(texts, small_ints), inner, max_size=3),
        st.dictionaries(st.tuples(st.tuples(texts), small_ints), inner, max_size=2),
    )
    return st.one_of(
        keys,
        keys.map(collections.OrderedDict),
        keys.map(lambda d: collections.defaultdict(list, d)),
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.builds(Point, inner, inner),
        st.builds(Box, keys, statics),
        st.builds(Box, st.lists(inner, max_size=3).map(tuple), statics),
    )


pytrees = st.recursive(st.integers(0, 9) | st.none(), _nodes, max_leaves=8).filter(_distinct_names)

meshes = st.integers(0, 3).flatmap(
    lambda n: st.builds(
        MeshSpec,
        st.lists(texts, min_size=n, max_size=n, unique=True).map(tuple),
        st.tuples(*[st.integers(1, 2**31 - 1)] * n),
        st.tuples(*[st.sampled_from(AxisType).map(int)] * n),
    )
)
entries = st.none() | st.just(UNCONSTRAINED) | st.lists(texts, min_size=1, max_size=3).map(tuple)
axes = st.lists(texts, max_size=2).map(lambda a: tuple(sorted(a)))


def partitions(mesh: Any, rank: int) -> st.SearchStrategy[Partition]:
    return st.builds(Partition, st.lists(entries, max_size=rank).map(tuple), mesh, axes, axes)


symbolic = st.sampled_from(["b", "2*b + 1", "max(b, c) - 1", "floordiv(é, 2)", "b^2"]).map(dims.parse)
kinds = st.sampled_from(dtypes.ALL) | st.sampled_from(["threefry2x32", "rbg", "unsafe_rbg"]).map(
    lambda name: dtypes.by_code(dtypes.KEY, name)
)
strange_kinds = kinds | st.just(dtypes.by_code(dtypes.KEY, "a-prng.of-its-own"))


def tensor_specs(dim: Any, kind: Any = kinds) -> st.SearchStrategy[TensorSpec]:
    return st.lists(dim, max_size=4).flatmap(
        lambda shape: st.builds(
            TensorSpec,
            st.just(tuple(shape)),
            kind,
            st.booleans(),
            st.none() | partitions(st.none() | meshes, min(len(shape), 3)),
            st.none() | texts,
            st.none() | partitions(st.none(), min(len(shape), 3)),
        )
    )


sizes = st.integers(0, 5)
any_dim = sizes | st.integers(0, 2**12) | symbolic


def indices(count: int) -> st.SearchStrategy[tuple[int, ...]]:
    if not count:
        return st.just(())
    return st.lists(st.integers(0, count - 1), unique=True).map(lambda found: tuple(sorted(found)))


strings = st.lists(texts, max_size=3).map(tuple)
u64 = st.integers(0, 2**62 - 1)

FUNCTION_BYTES = 1 << 20


@st.composite
def modules(draw: Any, file: str, traced: int, results: int, captured: list[int], hoisted: int) -> records.ModuleRecord:
    """A module of `traced` arguments, of which some are captured, and of `hoisted` more."""
    arguments = traced + hoisted
    captured = [*captured, *range(traced, arguments)]
    rows = st.lists(tensor_specs(any_dim, strange_kinds), min_size=arguments, max_size=arguments)
    form = draw(st.sampled_from(records.ModuleFormat))
    whole = form is records.ModuleFormat.PORTABLE_ARTIFACT
    length = FUNCTION_BYTES if whole else draw(st.integers(1, FUNCTION_BYTES))
    return records.ModuleRecord(
        file=file,
        format=form,
        offset=draw(st.integers(0, FUNCTION_BYTES - length)),
        length=length,
        stablehlo_version=draw(texts),
        calling_convention=draw(st.integers(0, 2**32 - 1)),
        platforms=draw(strings),
        num_devices=draw(st.integers(1, 2**32 - 1)),
        arguments=tuple(draw(rows)),
        results=tuple(draw(tensor_specs(any_dim)) for _ in range(results)),
        kept=draw(st.none() | indices(arguments)),
        donated=draw(indices(arguments)),
        captures=tuple(
            draw(st.builds(records.Capture, texts, st.integers(0, 2**32 - 1), st.booleans(), st.just(n)))
            for n in captured
        ),
        traced=traced,
        mesh=draw(st.none() | meshes),
        **{n: draw(strings) for n in ("ordered_effects", "unordered_effects", "disabled_checks", "custom_calls")},
        uses_global_constants=draw(st.booleans()),
        dialects=draw(strings),
        jax_version=draw(texts),
        jaxlib_version=draw(texts),
        name=draw(texts),
    )


bindings = st.lists(st.builds(records.Binding, odd_names, odd_names, odd_names), max_size=2).map(tuple)


@st.composite
def functions(draw: Any, name: str, file: str) -> records.FunctionRecord:
    arguments = draw(st.dictionaries(odd_names, pytrees, max_size=3))
    try:
        _, inputs = trees.flatten_arguments(arguments)
    except trees.LeafError:  # an argument's name may clash with another's leaf
        arguments, inputs = {}, trees.flatten_arguments({})[1]
    outputs = trees.flatten(draw(pytrees))[1]
    captured = list(range(inputs.num_leaves, inputs.num_leaves + draw(st.integers(0, 2))))
    traced, results = inputs.num_leaves + len(captured), outputs.num_leaves
    chain = []
    for _ in range(draw(st.integers(1, 3))):
        chain.append(draw(modules(file, traced, results, captured, draw(st.integers(0, 2)))))
        traced, results = traced + results, traced
    fixed = st.builds(records.FixedArgument, texts, st.sampled_from(records.FixedKind), st.just(True), statics, texts)
    unheld = st.builds(
        records.FixedArgument, texts, st.sampled_from(records.FixedKind), st.just(False), st.none(), texts
    )
    return records.FunctionRecord(
        name=name,
        metadata=draw(metadata),
        visibility=draw(st.sampled_from(records.Visibility)),
        inputs=inputs,
        outputs=outputs,
        argument_kinds=tuple(draw(st.sampled_from(records.ArgumentKind)) for _ in arguments),
        primal=chain[0],
        fixed=tuple(draw(st.lists(fixed | unheld, max_size=2))),
        constraints=draw(st.sampled_from([(), ("b <= 16",), ("2*b >= c", "mod(c, 2) == 0")])),
        bindings=draw(bindings),
        vjps=tuple(chain[1:]),
        compile_options=draw(st.dictionaries(texts, metadata, max_size=2)),
    )


@st.composite
def weights(draw: Any, name: str, files: list[str]) -> records.WeightsRecord:
    tree = trees.flatten(draw(pytrees))[1]
    rows: list[TensorSpec] = []
    leaf_tensor: list[int] = []
    tensor_leaf: list[int] = []
    pieces = []
    fresh = itertools.count()
    for leaf in range(tree.num_leaves):
        row = draw(tensor_specs(sizes))
        if row.kind.storage and tensor_leaf and draw(st.booleans()):
            tensor = draw(st.integers(0, len(tensor_leaf) - 1))
            first = rows[tensor_leaf[tensor]]
            bare = dataclasses.replace(row, partition=None, logical_axes=None)  # which may not fit the other shape
            rows.append(dataclasses.replace(bare, shape=first.shape, kind=first.kind))
            leaf_tensor.append(tensor)
            continue
        rows.append(row)
        if not row.kind.storage:
            leaf_tensor.append(-1)
            continue
        if draw(st.integers(0, 9)) == 0:  # several chunks
            rows[-1] = row = dataclasses.replace(row, shape=(*row.shape, 3 << 20))
        leaf_tensor.append(len(tensor_leaf))
        tensor_leaf.append(leaf)
        parts = []
        for begin, shape in draw(divisions(row.shape)):
            chunks = -(-row.kind.storage_nbytes(shape) // records.CHUNK_SIZE)
            parts.append(
                records.Piece(draw(st.sampled_from(files)), tree.names[leaf], begin, shape, b"\7" * 32 * chunks)
            )
        if len(parts) > 1 or draw(st.integers(0, 4)) == 0:
            parts = [dataclasses.replace(p, name=f"{p.name}/{name}/{leaf}/{next(fresh)}") for p in parts]
        pieces.append(tuple(parts))
    return records.WeightsRecord(
        name=name,
        metadata=draw(metadata),
        visibility=draw(st.sampled_from(records.Visibility)),
        tree=tree,
        specs=tuple(rows),
        leaf_tensor=np.array(leaf_tensor, np.int64),
        tensor_leaf=np.array(tensor_leaf, np.int64),
        pieces=tuple(pieces),
    )


@st.composite
def divisions(draw: Any, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A grid over a shape: (first index, extent) of each piece."""
    ranges = []
    for size in shape:
        cuts = draw(st.lists(st.integers(1, size - 1), max_size=1)) if size > 1 else []
        ranges.append(list(itertools.pairwise([0, *cuts, size])))
    return [(tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in itertools.product(*ranges)]


@st.composite
def supplementals(draw: Any, name: str, file: str) -> records.SupplementalRecord:
    form = draw(st.sampled_from(records.SupplementalForm))
    own: dict[str, str | None] = {}
    if form is not records.SupplementalForm.INLINE:
        own = {"a": file}
    if form is records.SupplementalForm.DIRECTORY:
        own = draw(st.dictionaries(texts.map(lambda t: f"{t}/"), st.none(), max_size=2)) | draw(
            st.dictionaries(texts.map(lambda t: f"{t}."), st.just(file), max_size=2)
        )
    return records.SupplementalRecord(
        name=name,
        metadata=draw(metadata),
        form=form,
        mime_type=draw(texts),
        version=draw(texts),
        function=draw(texts),
        inline=draw(st.binary(max_size=9)) if form is records.SupplementalForm.INLINE else b"",
        entries=own,
    )


@st.composite
def pipelines(draw: Any, name: str) -> records.PipelineRecord:
    roles = records.StepRole
    steps = [roles.PRE_PROCESSOR] * draw(st.integers(0, 2)) + [roles.MODEL] * draw(st.integers(0, 1))
    steps += [roles.POST_PROCESSOR] * draw(st.integers(0 if steps else 1, 2))
    return records.PipelineRecord(
        name=name,
        metadata=draw(metadata),
        visibility=draw(st.sampled_from(records.Visibility)),
        steps=tuple(records.StepRecord(role, draw(odd_names), draw(bindings)) for role in steps),
        pass_through=draw(st.booleans()),
    )


@st.composite
def manifests(draw: Any) -> records.ManifestRecord:
    """Any whole manifest."""
    names = draw(st.lists(odd_names.filter(bool), unique=True, max_size=4))
    kinds_of = {name: draw(st.sampled_from(["function", "polymorphic", "weights"])) for name in names}
    files = {
        path: records.FileRecord(path, length, kind, draw(st.binary(min_size=32, max_size=32)))
        for path, length, kind in sorted(
            [
                (draw(odd_names) + "/f", FUNCTION_BYTES, records.FileKind.FUNCTION),
                (draw(odd_names) + "/s", draw(u64), records.FileKind.SUPPLEMENTAL),
                (draw(odd_names) + "/w", draw(u64), records.FileKind.WEIGHTS),
                (draw(odd_names) + "/w2", draw(u64), records.FileKind.WEIGHTS),
            ]
        )
    }
    paths = {kind: [f.path for f in files.values() if f.kind is kind] for kind in records.FileKind}
    (function_file,), (supplemental_file,) = paths[records.FileKind.FUNCTION], paths[records.FileKind.SUPPLEMENTAL]
    weights_files = paths[records.FileKind.WEIGHTS]

    def of(kind: str, make: Any) -> dict[str, Any]:
        return {name: draw(make(name)) for name, found in kinds_of.items() if found == kind}

    return records.ManifestRecord(
        producer=draw(texts),
        files=files,
        functions=of("function", lambda name: functions(name, function_file)),
        polymorphic=of(
            "polymorphic",
            lambda name: st.builds(
                records.PolymorphicRecord,
                name=st.just(name),
                metadata=metadata,
                functions=strings,
                visibility=st.sampled_from(records.Visibility),
            ),
        ),
        weights=of("weights", lambda name: weights(name, weights_files)),
        pipelines={name: draw(pipelines(name)) for name in names[:1]},
        supplementals={name: draw(supplementals(name, supplemental_file)) for name in names[:2]},
        default_pipeline=draw(texts),
        device_assignment=tuple(draw(st.lists(devices, max_size=3))),
        metadata=draw(metadata),
        format=(1, draw(st.integers(0, 2**16 - 1))),
        reader=draw(texts),
    )
