"""Each limit of docs/trust.md: what is at it is read, what is one beyond is refused, by name."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest

import obmlite
from obmlite import dims, dtypes, errors, examples
from obmlite import tree as trees
from obmlite.errors import ArgumentError, CorruptPackageError, ExportError, ObmliteError, UnsafePathError
from obmlite.foreign import files as foreign_files
from obmlite.foreign import flax_msgpack
from obmlite.io import safetensors
from obmlite.io.store import LocalDirectory, check_path
from obmlite.schema import _flat, decode, records, trailer
from obmlite.schema.encode import encode
from obmlite.specs import TensorSpec
from obmlite.tree import structure
from tests.schema import flat, samples

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "obmlite"

Patch = pytest.MonkeyPatch


@dataclasses.dataclass(frozen=True)
class Limit:
    """A limit of docs/trust.md.

    Attributes:
      name: of the constant, below ``obmlite``.
      read: reads what is ``over`` (0 or 1) more than the limit.
      error: the class of the refusal.
      field: what it names.
    """

    name: str
    read: Callable[[int, Patch], Any]
    error: type[ObmliteError]
    field: str


LIMITS: list[Limit] = []


def limit(name: str, field: str, error: type[ObmliteError] = CorruptPackageError) -> Any:
    def add(read: Callable[[int, Patch], Any]) -> Callable[[int, Patch], Any]:
        LIMITS.append(Limit(name, read, error, field))
        return read

    return add


def constant(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"obmlite.{module}"), attribute)


# --- the manifest


@limit("schema.trailer.MAX_MANIFEST_BYTES", "length")
def _(over: int, patch: Patch) -> Any:
    trailer.check_size(trailer.SIZE + trailer.MAX_MANIFEST_BYTES + over)


@limit("schema._flat.MAX_STRING_BYTES", "Manifest.producer")
def _(over: int, patch: Patch) -> Any:
    manifest = flat.changed(
        encode(samples.sample()), lambda d: d.update(producer=b"a" * (_flat.MAX_STRING_BYTES + over))
    )
    return decode.decode(manifest)


@limit("schema._flat.MAX_VISITS", "Files")
def _(over: int, patch: Patch) -> Any:
    buffer = _flat.Buffer(bytes(1000))
    for _ in range(_flat.MAX_VISITS):
        buffer.spend(1000, "Files")
    buffer.spend(4096 + over, "Files")


def one_tensor(shape: tuple[int, ...], dtype: str = "u8", **more: Any) -> bytes:
    """A manifest of one tensor."""
    spec = TensorSpec(shape, dtypes.parse(dtype))
    path = "weights/w.safetensors"
    chunks = -(-spec.kind.storage_nbytes(shape) // records.CHUNK_SIZE)
    piece = records.Piece(path, "w", (0,) * len(shape), shape, bytes(32 * chunks))
    weights = records.WeightsRecord(
        name="w",
        tree=trees.flatten({"w": 0})[1],
        specs=(spec,),
        leaf_tensor=np.array([0]),
        tensor_leaf=np.array([0]),
        pieces=((piece,),),
    )
    file = records.FileRecord(path, 100, records.FileKind.WEIGHTS, bytes(32))
    return encode(records.ManifestRecord(producer="", files={path: file}, weights={"w": weights}, **more))


@limit("schema._columns.MAX_RANK", "Weights.specs.rank")
def _(over: int, patch: Patch) -> Any:
    def change(d: dict[str, Any]) -> None:
        specs = d["weights"][0]["specs"]
        specs["rank"][0] += over
        specs["dim"] += [1] * over

    return decode.decode(flat.changed(one_tensor((1,) * 64), change)).weights["w"]


@limit("schema._columns.MAX_TENSOR_BYTES", "Function.primal")
def _(over: int, patch: Patch) -> Any:
    sample = samples.sample()
    manifest = flat.to_dict(encode(sample))
    specs = manifest["functions"][0]["primal"]["results"]
    at = specs["rank"][0]  # of the second result, a float0: its shape is one number
    assert specs["rank"][1] == 1
    code = dtypes.parse("u8").code
    specs["dtype"][1], specs["dim"][at] = code, constant("schema._columns.MAX_TENSOR_BYTES") + over
    try:
        decode.decode(flat.from_dict(manifest)).functions["apply"]
    except CorruptPackageError as error:
        if error.field == "Module.results.dim":
            error.field = "Function.primal"
            raise
        assert not over


@limit("schema._columns.MAX_AXIS_SIZE", "Meshes.axis_size")
def _(over: int, patch: Patch) -> Any:
    size = constant("schema._columns.MAX_AXIS_SIZE") + over
    return decode.decode(
        flat.changed(encode(samples.sample()), lambda d: d["meshes"]["axis_size"].__setitem__(0, size))
    )


@limit("schema.records.MAX_FUNCTION_BYTES", "Files.length")
def _(over: int, patch: Patch) -> Any:
    size = constant("schema.records.MAX_FUNCTION_BYTES") + over
    return decode.decode(flat.changed(encode(samples.sample()), lambda d: d["files"]["length"].__setitem__(1, size)))


@limit("schema.decode.MAX_PIECE_CELLS", "Weights.piece_shape")
def _(over: int, patch: Patch) -> Any:
    patch.setattr(decode, "MAX_PIECE_CELLS", 2 - over)  # the sample's one tensor in pieces has two
    return decode.decode(encode(samples.sample())).weights["params"]


# --- trees and static data


@limit("tree.structure.MAX_DEPTH", "tree.arity")
def _(over: int, patch: Patch) -> Any:
    depth = structure.MAX_DEPTH + over
    kinds = [structure.Kind.LIST] * depth + [structure.Kind.LEAF]
    keys = [None] + [0] * depth
    key_kinds = [trees.KeyKind.ROOT] + [trees.KeyKind.INDEX] * depth
    trees.Tree(kinds, [1] * depth + [0], key_kinds, keys).check()


@limit("tree.structure.MAX_NODES", "tree.kind")
def _(over: int, patch: Patch) -> Any:
    patch.setattr(structure, "MAX_NODES", 4 - over)
    trees.flatten({"a": 1, "b": 2, "c": 3})[1].check()


@limit("tree.names.MAX_NAME", "tree.key")
def _(over: int, patch: Patch) -> Any:
    name = "a" * (trees.MAX_NAME + over)
    key_kinds = [trees.KeyKind.ROOT, trees.KeyKind.STR]
    trees.Tree([structure.Kind.DICT, structure.Kind.LEAF], [1, 0], key_kinds, [None, name]).check()


def _names(over: int, patch: Patch) -> Any:
    patch.setattr(structure, "MAX_NAMES_FIXED", 10 - over)
    patch.setattr(structure, "MAX_NAMES_EACH", 1)
    key_kinds = [trees.KeyKind.ROOT] + [trees.KeyKind.STR] * 2
    kinds = [structure.Kind.DICT, structure.Kind.LEAF, structure.Kind.LEAF]
    trees.Tree(kinds, [2, 0, 0], key_kinds, [None, "a" * 6, "b" * 6]).check()


limit("tree.structure.MAX_NAMES_FIXED", "tree.key")(_names)
limit("tree.structure.MAX_NAMES_EACH", "tree.key")(_names)


@limit("tree.names.MAX_KEY_NESTING", "tree.key")
def _(over: int, patch: Patch) -> Any:
    depth = constant("tree.names.MAX_KEY_NESTING") + over
    return trees.key_from_text(trees.KeyKind.TUPLE, "[" * depth + "1" + "]" * depth)


def test_a_key_is_refused_before_it_is_compared() -> None:
    for kind in (trees.KeyKind.STR, trees.KeyKind.ATTRIBUTE):
        assert trees.key_from_text(kind, "a" * trees.MAX_NAME)
        with pytest.raises(CorruptPackageError) as caught:
            trees.key_from_text(kind, "a" * (trees.MAX_NAME + 1))
        assert caught.value.field == "tree.key"


def test_a_name_with_many_dots_is_refused_before_it_is_nested(tmp_path: pathlib.Path) -> None:
    for name, good in [
        ("a" + ".a" * 998, True),
        ("a" + ".a" * 1000, False),
        ("a" * 16385, False),
        ("a." * 10**6, False),
    ]:
        raw = json.dumps({name: {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}).encode()
        (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"a")
        if good:
            assert obmlite.open_weights(tmp_path / "x.safetensors").names == (name,)
            continue
        with pytest.raises(ArgumentError) as caught:
            obmlite.open_weights(tmp_path / "x.safetensors")
        assert caught.value.field == "names"


@limit("tree.static.MAX_STATIC_BYTES", "static")
def _(over: int, patch: Patch) -> Any:
    size = trees.MAX_STATIC_BYTES - 5 + over
    return trees.unpack_static(b"\xc6" + size.to_bytes(4, "big") + bytes(size))


@limit("tree.static.MAX_STATIC_DEPTH", "static")
def _(over: int, patch: Patch) -> Any:
    return trees.unpack_static(b"\x91" * (constant("tree.static.MAX_STATIC_DEPTH") + over) + b"\x01")


# --- symbolic dimensions


@limit("dims.parsing.MAX_TEXT", "dimension", ExportError)
def _(over: int, patch: Patch) -> Any:
    return dims.parse("b" * (constant("dims.parsing.MAX_TEXT") + over))


@limit("dims.parsing.MAX_TOKENS", "dimension", ExportError)
def _(over: int, patch: Patch) -> Any:
    count = constant("dims.parsing.MAX_TOKENS")
    return dims.parse("-" * (1 - over) + "+".join(["b"] * (count // 2)) + "+1" * over)


@limit("dims.parsing.MAX_NESTING", "dimension", ExportError)
def _(over: int, patch: Patch) -> Any:
    depth = constant("dims.parsing.MAX_NESTING") + over
    return dims.parse("max(" * depth + "b" + ", 2)" * depth)


@limit("dims.expressions.MAX_INTEGER", "dimension", ExportError)
def _(over: int, patch: Patch) -> Any:
    return dims.parse(f"b + {constant('dims.expressions.MAX_INTEGER') + over}")


@limit("dims.expressions.MAX_EXPONENT", "dimension", ExportError)
def _(over: int, patch: Patch) -> Any:
    return dims.parse(f"b^{constant('dims.expressions.MAX_EXPONENT') + over}")


@limit("dims.substitution.MAX_TERMS", "dimension", ArgumentError)
def _(over: int, patch: Patch) -> Any:
    from obmlite.dims import substitution

    patch.setattr(substitution, "MAX_TERMS", 4 - over)
    dims.substitute(dims.parse("b^2"), {"b": dims.parse("s + 1")})


# --- weights files


@limit("io.safetensors.MAX_HEADER_SIZE", "header length")
def _(over: int, patch: Patch) -> Any:
    return safetensors.header_size((safetensors.MAX_HEADER_SIZE + over).to_bytes(8, "little"), 1 << 40)


def header_of(dtype: str, shape: list[int], nbytes: int) -> Any:
    raw = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}}).encode()
    return safetensors.parse_header(len(raw).to_bytes(8, "little") + raw, 8 + len(raw) + nbytes)


@limit("io.safetensors.MAX_RANK", "shape")
def _(over: int, patch: Patch) -> Any:
    return header_of("U8", [1] * (safetensors.MAX_RANK + over), 1)


@limit("io.safetensors._MAX_BITS", "shape")
def _(over: int, patch: Patch) -> Any:
    bits = constant("io.safetensors._MAX_BITS") + 1
    return header_of("U8", [bits // 8 - 1 + over], bits // 8 - 1 + over)


@limit("foreign.files.MAX_INDEX_BYTES", "index")
def _(over: int, patch: Patch) -> Any:
    folder = os.environ["LIMITS_FOLDER"]
    text = '{"weight_map": {}}'
    pathlib.Path(folder, "x.safetensors.index.json").write_text(text)
    patch.setattr(foreign_files, "MAX_INDEX_BYTES", len(text) - over)
    return foreign_files._read_index(LocalDirectory(folder), "x.safetensors.index.json")


# --- paths


@limit("io.store.MAX_PATH_BYTES", "path", UnsafePathError)
def _(over: int, patch: Patch) -> Any:
    return check_path("/".join(["a" * 127] * 8) + "a" * (1 + over))


@limit("io.store.MAX_COMPONENT_BYTES", "path", UnsafePathError)
def _(over: int, patch: Patch) -> Any:
    return check_path("a/" + "é" * 127 + "a" * (1 + over))


@limit("io.store.MAX_PATH_DEPTH", "path", UnsafePathError)
def _(over: int, patch: Patch) -> Any:
    return check_path("/".join("a" * (constant("io.store.MAX_PATH_DEPTH") + over)))


# --- what else is read


@limit("foreign.flax_msgpack.MAX_DEPTH", "byte 201")
def _(over: int, patch: Patch) -> Any:
    return flax_msgpack.read(b"\x91" * (flax_msgpack.MAX_DEPTH + over) + b"\x01")


@limit("foreign.flax_msgpack.MAX_TEXT", "byte 5")
def _(over: int, patch: Patch) -> Any:
    size = flax_msgpack.MAX_TEXT + over
    try:
        flax_msgpack.read(b"\xdb" + size.to_bytes(4, "big") + b"a" * size)
    except errors.LeafError as error:  # it was read: text is no leaf
        assert "neither an array nor a number" in error.problem


@limit("foreign.flax_msgpack.MAX_RANK", "byte 75")
def _(over: int, patch: Patch) -> Any:
    array = msgpack.packb(((1,) * (flax_msgpack.MAX_RANK + over), "int8", b"\0"), use_bin_type=True)
    return flax_msgpack.read(msgpack.packb({"a": msgpack.ExtType(1, array)}))


@limit("examples.MAX_BYTES", "Files.length")
def _(over: int, patch: Patch) -> Any:
    packed = examples.pack({"main": [{"x": np.ones(3, "f4")}]})
    patch.setattr(examples, "MAX_BYTES", len(packed) - over)
    return examples.examples_of({"examples": obmlite.Supplemental.from_bytes(packed, mime_type=examples.MIME_TYPE)})


def _signatures(count: int) -> Any:
    from obmlite import _signatures as own

    return own.unpack(own.pack(bytes(32), [own.Signature(bytes([n]) * 32, bytes(64)) for n in range(count)]))


@limit("_signatures.MAX_SIGNATURES", "signature file", errors.SignatureError)
def _(over: int, patch: Patch) -> Any:
    return _signatures(constant("_signatures.MAX_SIGNATURES") + over)


@limit("replay._program.MAX_TENSOR_BYTES", "bytes of one tensor", errors.UnsupportedFormatError)
def _(over: int, patch: Patch) -> Any:
    from obmlite.replay import _reading

    kind = f"tensor<{constant('replay._program.MAX_TENSOR_BYTES') + over}xi8>"
    return _reading.read(f"module {{ func.func @main(%x: {kind}) -> {kind} {{ return %x : {kind} }} }}")


TESTED_ELSEWHERE = {
    "replay._reading.MAX_DEPTH": "tests/replay/test_replay.py",
    "replay._reading.MAX_OPERATIONS": "tests/replay/test_replay.py",
    "replay._reading.MAX_CONSTANT_BYTES": "tests/replay/test_replay.py",
    "replay._interpreter.MAX_CALL_DEPTH": "tests/replay/test_replay.py",
    "replay._interpreter.MAX_STEPS": "tests/replay/test_replay.py",
}

NOT_OF_PACKAGES = (
    "schema._generated",
    "serving",  # of requests
    *(f"replay.{name}" for name in ("_bodies", "_loops", "_special")),  # how far forms are looked for; no refusal
)

OTHER = {
    "_lowering.MAX_CONSTANT_BYTES": "what saving hoists",
    "dims.export.MAX_JAX_COMPARED": "what exporting compares with JAX",
    "errors.MAX_FACT": "of errors' texts",
    "examples._MAX_ELEMENTS": "numpy's limit, within a file that is there",
    "interop._generalise.MAX_SYMBOLS": "of what is converted, not read",
    "io.safetensors._MAX_DIGITS": "longer numbers are refused by any limit",
    "pipeline.MAX_COMBINATIONS": "of a model's signatures, in memory",
    "replay._interpreter.MAX_FOLDED": "of what is computed while tracing; beyond, it is run as it is",
    "replay.rules.reduction.MAX_PAIRS": "which way is taken",
    "_signatures._MAX_BYTES": "MAX_SIGNATURES signatures, at their longest",
}


@pytest.mark.parametrize("found", LIMITS, ids=lambda found: found.name)
def test_a_limit(found: Limit, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("LIMITS_FOLDER", str(tmp_path))
    with monkeypatch.context() as patch:
        found.read(0, patch)
    with monkeypatch.context() as patch, pytest.raises(found.error) as caught:
        found.read(1, patch)
    assert type(caught.value) is found.error
    assert caught.value.field == found.field


def rows() -> dict[str, int]:
    """The table in docs/trust.md: constant → number."""
    text = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
    section = text.split("\n## Limits\n")[1].split("\n## ")[0]
    table = re.findall(r"^\|.*\| ([\d,]+)[^|]*\| `([\w.]+)` \|$", section, re.MULTILINE)
    return {name: int(number.replace(",", "")) for number, name in table}


def test_the_document_has_every_limit_with_its_number() -> None:
    found = rows()
    assert found.keys() == {own.name for own in LIMITS} | TESTED_ELSEWHERE.keys()
    for name, number in found.items():
        assert constant(name) == number, name
    for name, file in TESTED_ELSEWHERE.items():
        assert name.rpartition(".")[2] in (ROOT / file).read_text(encoding="utf-8"), name


def test_no_limit_is_left_out() -> None:
    known = rows().keys() | OTHER.keys()
    there = set()
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if module.startswith(NOT_OF_PACKAGES):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [
                n.id for target in targets if target is not None for n in ast.walk(target) if isinstance(n, ast.Name)
            ]
            there |= {f"{module}.{name}" for name in names if re.match("_?MAX_", name)}
    assert there == known


def test_a_tensor_has_no_hole_no_overlap_and_stays_within_its_bounds() -> None:
    good = flat.to_dict(encode(samples.sample()))
    for name, change, field in [
        ("hole", lambda w: w["piece_shape"].__setitem__(1, 5), "Weights.piece_shape"),
        ("overlap", lambda w: w["piece_begin"].__setitem__(2, 0), "Weights.piece_shape"),
        ("bounds", lambda w: w["piece_begin"].__setitem__(3, 1), "Weights.piece_begin"),
        ("far", lambda w: w["piece_begin"].__setitem__(3, 2**64 - 1), "Weights.piece_begin"),
    ]:
        changed = flat.to_dict(flat.from_dict(good))
        change(changed["weights"][0])
        with pytest.raises(CorruptPackageError) as caught:
            decode.decode(flat.from_dict(changed)).weights["params"]
        assert caught.value.field == field, name


def test_errors_stay_short_however_long_their_facts_are() -> None:
    error = CorruptPackageError("What is wrong.", field="f", found="x" * 10**6, leaf="y" * 10**6)
    assert len(str(error)) < 3 * errors.MAX_FACT
    assert len(error.found) == 10**6
    assert str(CorruptPackageError("p", found="x" * errors.MAX_FACT)).count("x") == errors.MAX_FACT


def test_a_function_that_could_not_be_read_is_not_saved(tmp_path: pathlib.Path, monkeypatch: Patch) -> None:
    function = obmlite.export(lambda x: x + 1, obmlite.spec("f32[3]"), name="add")
    monkeypatch.setattr(records, "MAX_FUNCTION_BYTES", 100)
    with pytest.raises(ExportError) as caught:
        obmlite.Model({"add": function}).save(tmp_path / "m.obm")
    assert (caught.value.field, caught.value.object) == ("Files.length", "add")
    assert not (tmp_path / "m.obm").exists()


def test_sparse_files_are_refused_before_they_are_read(tmp_path: pathlib.Path) -> None:
    obmlite.Model({"w": obmlite.Weights({"a": np.ones(3, "f4")})}).save(tmp_path / "m.obm")
    os.truncate(tmp_path / "m.obm" / "manifest.obm", trailer.SIZE + trailer.MAX_MANIFEST_BYTES + 1)
    with pytest.raises(CorruptPackageError) as caught:
        obmlite.load(tmp_path / "m.obm")
    assert caught.value.field == "length"
    index = tmp_path / "x.safetensors.index.json"
    index.touch()
    os.truncate(index, foreign_files.MAX_INDEX_BYTES + 1)
    with pytest.raises(CorruptPackageError) as caught:
        foreign_files.open_files(index)
    assert caught.value.field == "index"
