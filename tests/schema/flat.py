"""A second, naive reader and writer of manifests for the tests, driven by manifest.fbs alone.

It trusts what it reads: it is only given manifests that obmlite wrote. What it gives away is every position at which
a flatbuffer holds something (:func:`walk`), and the whole as nested dicts that can be changed at will and written
again (:func:`to_dict`, :func:`from_dict`).
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import flatbuffers

import obmlite.schema
from obmlite.schema import trailer
from obmlite.schema._generated import manifest_generated as generated

SCHEMA = pathlib.Path(obmlite.schema.__file__).parent / "manifest.fbs"

FORMS = {"bool": "<B", "ubyte": "<B", "uint16": "<H", "uint32": "<I", "int32": "<i", "uint64": "<Q", "int64": "<q"}


@dataclasses.dataclass(frozen=True)
class Field:
    name: str
    number: int
    type: str  # as in the schema, an enum's name replaced by its underlying type
    enum: str = ""


def _parse() -> tuple[dict[str, dict[str, int]], dict[str, list[Field]]]:
    text = re.sub(r"//.*", "", SCHEMA.read_text())
    enums: dict[str, dict[str, int]] = {}
    under: dict[str, str] = {}
    for name, base, body in re.findall(r"enum (\w+) : (\w+) \{(.*?)\}", text, re.S):
        under[name] = base
        enums[name] = {member: int(value) for member, value in re.findall(r"(\w+) = (\d+)", body)}
    tables: dict[str, list[Field]] = {}
    for name, body in re.findall(r"table (\w+) \{(.*?)\}", text, re.S):
        fields = re.findall(r"(\w+): (\[?\w+\]?) \(id: (\d+)\);", body)
        assert len(fields) == body.count(";"), name
        tables[name] = [Field(f, int(n), under.get(kind, kind), kind if kind in under else "") for f, kind, n in fields]
    return enums, tables


ENUMS, TABLES = _parse()

# Enums whose values stand in columns, which the schema can only call [ubyte].
COLUMN_ENUMS = {
    "Files.kind": "FileKind",
    "Meshes.axis_type": "AxisType",
    "Partitions.entry_kind": "PartitionEntry",
    "Tree.kind": "NodeKind",
    "Tree.key_kind": "KeyKind",
    "Specs.dtype": "DType",
    "Function.argument_kinds": "ArgumentKind",
}


# --- positions


@dataclasses.dataclass(frozen=True)
class Place:
    """A number in a flatbuffer. ``what``: root, soffset, slots, size, slot, scalar, offset, count, item or byte."""

    path: str  # such as weights[0].tree.kind
    label: str  # such as Tree.kind
    what: str
    position: int
    form: str


def _read(data: bytes, form: str, position: int) -> int:
    value: int = struct.unpack_from(form, data, position)[0]
    return value


def walk(data: bytes) -> Iterator[Place]:
    """Every number in a flatbuffer that says something, first what holds it."""
    yield Place("", "Manifest", "root", 0, "<I")
    yield from _walk_table(data, "Manifest", _read(data, "<I", 0), "")


def _walk_table(data: bytes, table: str, at: int, path: str) -> Iterator[Place]:
    slots = at - _read(data, "<i", at)
    slots_size = _read(data, "<H", slots)
    yield Place(path, table, "soffset", at, "<i")
    yield Place(path, table, "slots", slots, "<H")
    yield Place(path, table, "size", slots + 2, "<H")
    for field in TABLES[table]:
        slot = 4 + 2 * field.number
        if slot >= slots_size:
            continue
        label, inner = f"{table}.{field.name}", f"{path}.{field.name}".lstrip(".")
        yield Place(inner, label, "slot", slots + slot, "<H")
        offset = _read(data, "<H", slots + slot)
        if not offset:
            continue
        position = at + offset
        if field.type in FORMS:
            yield Place(inner, label, "scalar", position, FORMS[field.type])
            continue
        yield Place(inner, label, "offset", position, "<I")
        yield from _walk_child(data, field.type, position + _read(data, "<I", position), inner, label)


def _walk_child(data: bytes, kind: str, at: int, path: str, label: str) -> Iterator[Place]:
    if kind in TABLES:
        yield from _walk_table(data, kind, at, path)
        return
    item = "ubyte" if kind == "string" else kind[1:-1]
    yield Place(path, label, "count", at, "<I")
    for n in range(_read(data, "<I", at)):
        inner = f"{path}[{n}]"
        if item in FORMS:
            size = struct.calcsize(FORMS[item])
            yield Place(inner, label, "byte" if kind == "string" else "item", at + 4 + n * size, FORMS[item])
        else:
            position = at + 4 + 4 * n
            yield Place(inner, label, "offset", position, "<I")
            yield from _walk_child(data, item, position + _read(data, "<I", position), inner, label)


def patch(manifest: bytes, path: str, what: str, value: int) -> bytes:
    """A manifest with one number changed, sealed again."""
    data = bytearray(manifest[: -trailer.SIZE])
    (place,) = [p for p in walk(bytes(data)) if (p.path, p.what) == (path, what)]
    struct.pack_into(place.form, data, place.position, value)
    return trailer.seal(bytes(data))


# --- nested dicts


def to_dict(manifest: bytes) -> dict[str, Any]:
    """Table → dict of the fields that are there; vectors are lists, strings bytes."""
    data = manifest[: -trailer.SIZE]
    return _table(data, "Manifest", _read(data, "<I", 0))


def _table(data: bytes, table: str, at: int) -> dict[str, Any]:
    slots = at - _read(data, "<i", at)
    found: dict[str, Any] = {}
    for field in TABLES[table]:
        slot = 4 + 2 * field.number
        offset = _read(data, "<H", slots + slot) if slot < _read(data, "<H", slots) else 0
        if offset:
            position = at + offset
            if field.type in FORMS:
                found[field.name] = _read(data, FORMS[field.type], position)
            else:
                found[field.name] = _child(data, field.type, position + _read(data, "<I", position))
    return found


def _child(data: bytes, kind: str, at: int) -> Any:
    if kind in TABLES:
        return _table(data, kind, at)
    count = _read(data, "<I", at)
    if kind == "string":
        return data[at + 4 : at + 4 + count]
    item = kind[1:-1]
    if item in FORMS:
        return list(struct.unpack_from(f"<{count}{FORMS[item][1]}", data, at + 4))
    places = range(at + 4, at + 4 + 4 * count, 4)
    return [_child(data, item, place + _read(data, "<I", place)) for place in places]


def camel(field: str) -> str:
    return "".join(part.capitalize() for part in field.split("_"))


def from_dict(manifest: dict[str, Any]) -> bytes:
    """The manifest file's bytes. Unlike the library's writer it also writes fields that are 0 or empty."""
    builder = flatbuffers.Builder(0)
    builder.ForceDefaults(True)
    builder.Finish(_write(builder, "Manifest", manifest), file_identifier=trailer.IDENTIFIER)
    return trailer.seal(bytes(builder.Output()))


def _write(builder: flatbuffers.Builder, kind: str, value: Any) -> int:
    if kind == "string":
        return builder.CreateString(value)
    if kind not in TABLES:
        item = kind[1:-1]
        if item in FORMS:
            raw = struct.pack(f"<{len(value)}{FORMS[item][1]}", *value)
            size = struct.calcsize(FORMS[item])
            builder.StartVector(size, len(value), size)
            builder.head -= len(raw)
            builder.Bytes[builder.head : builder.head + len(raw)] = raw
            return builder.EndVector()
        children = [_write(builder, item, child) for child in value]
        builder.StartVector(4, len(children), 4)
        for child in reversed(children):
            builder.PrependUOffsetTRelative(child)
        return builder.EndVector()
    fields = {f.name: f for f in TABLES[kind]}
    done = {n: v if fields[n].type in FORMS else _write(builder, fields[n].type, v) for n, v in value.items()}
    getattr(generated, f"{kind}Start")(builder)
    for name, child in done.items():
        getattr(generated, f"{kind}Add{camel(name)}")(builder, child)
    return getattr(generated, f"{kind}End")(builder)


def changed(manifest: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """A manifest with its dict changed."""
    found = to_dict(manifest)
    change(found)
    return from_dict(found)
