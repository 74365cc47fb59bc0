"""A reader of packages written from docs/format.md alone, as a reference for readers in other languages.

It shares no code with obmlite and imports nothing but numpy and a little of the standard library. It is small rather
than fast: `read_package` checks every digest and brings every tensor into memory.

    python tests/independent_reader.py mnist.obm

The parts, in the order of the page: files and paths (§1), trailer and flatbuffer (§2, §2.1), msgpack and pools (§2.2),
trees and names (§3), dtypes and safetensors (§4), the tables of the manifest (§2.3), the whole package with its digests
(§6), and a listing. The grammar of symbolic dimensions (§5) is not parsed: a dimension is shown as the text that it is.
"""

import argparse
import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MANIFEST = "manifest.obm"
TRAILER = struct.Struct("<Q32sII16s")
TRAILER_MAGIC = b"obmlite manifest"
CHUNK = 8 << 20
DIGEST = 32
MLIR_MAGIC = b"ML\xefR"


class Refused(Exception):
    """The package, or one object of it, is not as the format says; or this reader does not know something it must."""


def check(condition: object, why: str) -> None:
    """Refuses the package unless the condition holds."""
    if not condition:
        raise Refused(why)


def product(numbers: Iterable[int]) -> int:
    """The product as an integer without a limit; numpy's would overflow."""
    result = 1
    for number in numbers:
        result *= number
    return result


def sha256(data: bytes) -> bytes:
    """The digest of some bytes."""
    return hashlib.sha256(data).digest()


# ---- §1: files -------------------------------------------------------------------------------------------------------


def check_path(path: str) -> list[str]:
    """The components of a path of the manifest, if it is one that a reader may open."""
    components = path.split("/")
    check(len(path.encode()) <= 1024 and len(components) <= 32, f"path too long: {path!r}")
    check(all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in components), f"bad path: {path!r}")
    control = any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in path)
    check("\\" not in path and not control, f"bad character in path: {path!r}")
    return components


def read_file(root: Path, path: str) -> bytes:
    """All bytes of a file inside the package, opened component by component so that no symbolic link is followed."""
    *folders, last = check_path(path)
    here = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in folders:
            deeper = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = deeper
        # Without O_NONBLOCK, opening a pipe would wait for its other end.
        with open(os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=here), "rb") as file:
            check(os.fstat(file.fileno()).st_mode & 0o170000 == 0o100000, f"{path}: not a regular file")
            return file.read()
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from error
    finally:
        os.close(here)


# ---- §2, §2.1: trailer and flatbuffer --------------------------------------------------------------------------------


def open_manifest(data: bytes) -> bytes:
    """The flatbuffer in the bytes of a manifest file, once the trailer agrees with it."""
    check(len(data) >= TRAILER.size, "manifest: too short for a trailer")
    length, digest, version, flags, magic = TRAILER.unpack(data[-TRAILER.size :])
    check(magic == TRAILER_MAGIC, "manifest: not obmlite's")
    check(version == 1 and flags == 0, f"manifest: trailer version {version}, flags {flags}")
    check(length + TRAILER.size == len(data) and length < 1 << 31, "manifest: its length is not what the trailer says")
    flatbuffer = data[: -TRAILER.size]
    check(sha256(flatbuffer) == digest, "manifest: its digest is not what the trailer says")
    return flatbuffer


def unpack(data: bytes, position: int, layout: str) -> tuple[int, ...]:
    """Little-endian numbers at a position of the flatbuffer."""
    check(0 <= position <= len(data) - struct.calcsize("<" + layout), "flatbuffer: position out of bounds")
    return struct.unpack_from("<" + layout, data, position)


class Table:
    """A table of a flatbuffer; fields are read by their ids, and one that is absent has its default."""

    def __init__(self, data: bytes, position: int) -> None:
        """Reads the vtable of the table at a position."""
        self.data, self.position = data, position
        vtable = position - unpack(data, position, "i")[0]
        vtable_size, self.size = unpack(data, vtable, "HH")
        check(vtable_size >= 4 and vtable_size % 2 == 0, "flatbuffer: bad vtable")
        check(self.size >= 4 and position + self.size <= len(data), "flatbuffer: table out of bounds")
        self.offsets = unpack(data, vtable + 4, f"{(vtable_size - 4) // 2}H")

    def at(self, number: int, size: int) -> int | None:
        """The position of a field's inline part; None if the field is absent."""
        offset = self.offsets[number] if number < len(self.offsets) else 0
        if offset == 0:
            return None
        check(4 <= offset <= self.size - size, "flatbuffer: field outside its table")
        return self.position + offset

    def scalar(self, number: int, layout: str) -> int:
        """A number; the layout is struct's letter."""
        position = self.at(number, struct.calcsize("<" + layout))
        return 0 if position is None else unpack(self.data, position, layout)[0]

    def boolean(self, number: int) -> bool:
        """A bool."""
        value = self.scalar(number, "B")
        check(value <= 1, "flatbuffer: a bool that is neither 0 nor 1")
        return bool(value)

    def follow(self, number: int) -> int | None:
        """The position of the string, vector or table to which a field refers."""
        position = self.at(number, 4)
        return None if position is None else position + unpack(self.data, position, "I")[0]

    def items(self, position: int | None, size: int) -> tuple[int, int]:
        """The position and number of the items, of some size each, of the vector at a position."""
        if position is None:
            return 0, 0
        (count,) = unpack(self.data, position, "I")
        check(position + 4 + count * size <= len(self.data), "flatbuffer: vector out of bounds")
        return position + 4, count

    def column(self, number: int, dtype: str) -> list[int]:
        """A vector of numbers, of a numpy dtype."""
        start, count = self.items(self.follow(number), np.dtype(dtype).itemsize)
        return np.frombuffer(self.data, np.dtype(dtype).newbyteorder("<"), count, start).tolist() if count else []

    def raw(self, number: int) -> bytes:
        """A vector of bytes."""
        start, count = self.items(self.follow(number), 1)
        return self.data[start : start + count]

    def text_at(self, position: int | None) -> str:
        """The string at a position."""
        start, count = self.items(position, 1)
        check(position is None or unpack(self.data, start + count, "B") == (0,), "flatbuffer: string without its zero")
        return decode(self.data[start : start + count])

    def text(self, number: int) -> str:
        """A string."""
        return self.text_at(self.follow(number))

    def referred(self, number: int) -> list[int]:
        """The positions to which the items of a vector of strings or tables refer."""
        start, count = self.items(self.follow(number), 4)
        offsets = unpack(self.data, start, f"{count}I") if count else ()
        return [start + 4 * i + offset for i, offset in enumerate(offsets)]

    def texts(self, number: int) -> list[str]:
        """A vector of strings."""
        return [self.text_at(position) for position in self.referred(number)]

    def optional(self, number: int) -> "Table | None":
        """A table that may be absent."""
        position = self.follow(number)
        return None if position is None else Table(self.data, position)

    def table(self, number: int) -> "Table":
        """A table; where it is absent, one without fields."""
        return self.optional(number) or Table(EMPTY_TABLE, 4)

    def tables(self, number: int) -> list["Table"]:
        """A vector of tables."""
        return [Table(self.data, position) for position in self.referred(number)]


EMPTY_TABLE = struct.pack("<HHi", 4, 4, 4)


def decode(data: bytes) -> str:
    """Text from UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Refused(f"not UTF-8: {data[:40]!r}") from error


# ---- §2.2: columns, pools, msgpack -----------------------------------------------------------------------------------


def rows(what: str, *columns: Sequence[int]) -> int:
    """The number of rows of columns, which must agree."""
    check(len({len(column) for column in columns}) == 1, f"{what}: columns of different lengths")
    return len(columns[0])


def cut(what: str, starts: list[int], count: int | None, total: int) -> list[slice]:
    """The runs into which a column `…_start` cuts another one of `total` items; `count` where their number is known."""
    if not starts and not count and total == 0:
        return []
    check(starts and starts[0] == 0 and starts[-1] == total and starts == sorted(starts), f"{what}: bad offsets")
    check(count is None or len(starts) == count + 1, f"{what}: wrong number of offsets")
    return [slice(starts[i], starts[i + 1]) for i in range(len(starts) - 1)]


def known(what: str, value: int, names: Sequence[str]) -> str:
    """The name of an enumeration's value; enumerations start at 1."""
    check(1 <= value <= len(names), f"{what}: unknown value {value}")
    return names[value - 1]


def flags(what: str, column: list[int]) -> list[bool]:
    """A column of zeros and ones."""
    check(all(value <= 1 for value in column), f"{what}: neither 0 nor 1")
    return [bool(value) for value in column]


class Pools:
    """The string pool and the blob pool, to which rows everywhere refer by number."""

    def __init__(self, root: Table) -> None:
        """Reads the pools; everything in them must be valid, used or not."""
        strings, blobs = (self._pool(root.table(number)) for number in (6, 7))
        self.strings = [decode(item) for item in strings]
        self.blobs = blobs

    @staticmethod
    def _pool(table: Table) -> list[bytes]:
        data = table.raw(0)
        return [data[run] for run in cut("pool", table.column(1, "u4"), None, len(data))]

    def string(self, index: int) -> str:
        """The string of a number."""
        check(index < len(self.strings), "no such string")
        return self.strings[index]

    def string_or_none(self, plus1: int) -> str | None:
        """The string of a number plus one."""
        return self.string(plus1 - 1) if plus1 else None

    def blob(self, index: int) -> bytes:
        """The blob of a number."""
        check(index < len(self.blobs), "no such blob")
        return self.blobs[index]

    def msgpack(self, index: int) -> object:
        """What a blob of msgpack holds."""
        data = self.blob(index)
        check(len(data) <= 1 << 20, "msgpack: too long")
        value, end = msgpack(data)
        check(end == len(data), "msgpack: bytes left over")
        return value

    def mapping(self, plus1: int) -> dict[object, object]:
        """The map that a blob of msgpack holds; an empty one where there is no blob."""
        value = self.msgpack(plus1 - 1) if plus1 else {}
        check(isinstance(value, dict), "msgpack: not a map")
        return value


MSGPACK_NUMBERS = {0xCA: "f", 0xCB: "d", 0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q"} | {
    0xD0: "b", 0xD1: "h", 0xD2: "i", 0xD3: "q",
}  # fmt: skip
MSGPACK_LENGTHS = {
    0xD9: ("str", "B"), 0xDA: ("str", "H"), 0xDB: ("str", "I"),
    0xC4: ("bin", "B"), 0xC5: ("bin", "H"), 0xC6: ("bin", "I"),
    0xDC: ("array", "H"), 0xDD: ("array", "I"), 0xDE: ("map", "H"), 0xDF: ("map", "I"),
    0xC7: ("ext", "B"), 0xC8: ("ext", "H"), 0xC9: ("ext", "I"),
}  # fmt: skip


def msgpack(data: bytes, at: int = 0, depth: int = 0) -> tuple[object, int]:
    """The msgpack value at a position, and the position behind it."""

    def number(layout: str) -> int | float:
        nonlocal at
        try:
            (value,) = struct.unpack_from(">" + layout, data, at)
        except struct.error:
            raise Refused("msgpack: too short") from None
        at += struct.calcsize(layout)
        return value

    check(depth <= 128, "msgpack: nested too deep")
    first = int(number("B"))
    if first < 0x80 or first >= 0xE0:
        return (first if first < 0x80 else first - 256), at
    if first in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[first], at
    if first in MSGPACK_NUMBERS:
        return number(MSGPACK_NUMBERS[first]), at
    if first < 0xC0:
        kind, length = ("map", "array", "str", "str")[(first - 0x80) >> 4], first & (0x1F if first >= 0xA0 else 0x0F)
    elif 0xD4 <= first <= 0xD8:
        kind, length = "ext", 1 << (first - 0xD4)
    else:
        check(first in MSGPACK_LENGTHS, "msgpack: unknown byte")
        kind, layout = MSGPACK_LENGTHS[first]
        length = int(number(layout))
    if kind in ("array", "map"):
        items = []
        for _ in range(length * (2 if kind == "map" else 1)):
            item, at = msgpack(data, at, depth + 1)
            items.append(item)
        if kind == "array":
            return items, at
        try:
            pairs = dict(zip(items[::2], items[1::2], strict=True))
        except TypeError:
            raise Refused("msgpack: a list or map as a key") from None
        return pairs, at
    extension = int(number("b")) if kind == "ext" else 0
    content, at = data[at : at + length], at + length
    check(at <= len(data), "msgpack: too short")
    if kind == "ext":
        check(extension == 1, f"msgpack: unknown extension {extension}")
        inner, end = msgpack(content, 0, depth + 1)
        check(isinstance(inner, list) and end == len(content), "msgpack: not a tuple")
        return tuple(inner), at
    return (content if kind == "bin" else decode(content)), at


# ---- §3: trees and names ---------------------------------------------------------------------------------------------

LEAF, NONE, DICT, ORDERED, DEFAULT, LIST, TUPLE, NAMED, OTHER, CALL = range(1, 11)
ROOT, STR, INT, TUPLE_KEY, POSITION, ATTRIBUTE = range(1, 7)
MAPPING_KEYS = frozenset({STR, INT, TUPLE_KEY})
FACTORIES = ("dict", "list", "tuple", "set", "int", "float", "str", "bool")
KEYS_OF = {
    DICT: MAPPING_KEYS, ORDERED: MAPPING_KEYS, DEFAULT: MAPPING_KEYS, LIST: {POSITION}, TUPLE: {POSITION},
    NAMED: {ATTRIBUTE}, OTHER: MAPPING_KEYS | {POSITION}, CALL: {ATTRIBUTE},
}  # fmt: skip


@dataclass
class Node:
    """A node of a tree, with its subtree's name (§3) and, as Python objects, its key and the nodes below it."""

    kind: int
    key_kind: int
    key: object
    name: str
    class_name: str | None
    static: object
    children: list["Node"] = field(default_factory=list)

    def leaves(self) -> list[str]:
        """Names of the leaves in this subtree, in order."""
        names, stack = [], [self]
        while stack:
            node = stack.pop()
            if node.kind == LEAF:
                names.append(node.name)
            stack.extend(reversed(node.children))
        return names

    def find(self, name: str) -> "Node | None":
        """The node with some name in this subtree."""
        stack = [self]
        while stack:
            node = stack.pop()
            if node.name == name:
                return node
            stack.extend(node.children)
        return None


def parse_key(kind: int, text: str) -> object:
    """The key that a text means: an int, a tuple or the text itself."""
    if kind in (INT, POSITION):
        digits = text.removeprefix("-")
        check(digits.isascii() and digits.isdigit() and len(digits) <= 19, f"bad key {text!r}")
        number = int(text)
        check(str(number) == text and abs(number) < 1 << 63, f"bad key {text!r}")
        return number
    if kind == TUPLE_KEY:
        value = parse_json(text, "key")
        check(json.dumps(value, ensure_ascii=False, separators=(",", ":")) == text, f"bad key {text!r}")
        return tuple_key(value, 1)
    return text


def tuple_key(value: object, depth: int) -> tuple[object, ...]:
    """A tuple of str, int and such tuples from JSON's lists."""
    check(isinstance(value, list) and depth <= 8, "bad key: not a tuple, or nested too deep")
    items = [tuple_key(item, depth + 1) if isinstance(item, list) else item for item in value]
    check(all(type(item) in (str, int, tuple) for item in items), "bad key: neither str nor int")
    return tuple(items)


def full_name(texts: Iterable[str]) -> str:
    """The name of the leaf or subtree to which keys lead from the root."""
    name = ".".join(text.replace("\\", "\\\\").replace(".", "\\.") for text in texts)
    return "\\" + name if name.startswith("__metadata__") else name


def read_tree(table: Table, pools: Pools, what: str) -> Node:
    """The tree of a table."""
    kinds, key_kinds = table.column(0, "u1"), table.column(2, "u1")
    arities, keys, classes, statics = (table.column(number, "u4") for number in (1, 3, 4, 5))
    count = rows(what, kinds, arities, key_kinds, keys, classes, statics)
    check(1 <= count <= 1 << 24, f"{what}: no root, or too many nodes")
    root: Node | None = None
    above: list[tuple[Node, int]] = []  # the nodes that still lack children, and how many each has in all
    texts: list[str] = []  # keys of these nodes but the root
    for kind, arity, key_kind, key, class_name, static in zip(
        kinds, arities, key_kinds, keys, classes, statics, strict=True
    ):
        check(LEAF <= kind <= CALL and ROOT <= key_kind <= ATTRIBUTE, f"{what}: unknown kind of node or key")
        check(kind > NONE or arity == 0, f"{what}: a leaf or None with children")
        text = pools.string(key)
        path = [*texts, text] if above else []
        node = Node(kind, key_kind, parse_key(key_kind, text), full_name(path), pools.string_or_none(class_name), None)
        node.static = pools.msgpack(static - 1) if static else None
        check(kind in (NAMED, OTHER) or node.class_name is None, f"{what}: a class name where none belongs")
        check(kind != DEFAULT or node.static in (None, *FACTORIES), f"{what}: unknown factory")
        if root is None:
            check(key_kind == ROOT and text == "", f"{what}: a root with a key")
            root = node
        else:
            check(above, f"{what}: several roots")
            parent, _ = above[-1]
            check(key_kind in KEYS_OF[parent.kind] and kind != CALL, f"{what}: a key or node where none belongs")
            check(key_kind != POSITION or node.key == len(parent.children), f"{what}: positions out of order")
            parent.children.append(node)
        if arity:
            check(len(above) < 999, f"{what}: too deep")
            above.append((node, arity))
            texts = path
        while above and len(above[-1][0].children) == above[-1][1]:
            check_children(above.pop()[0], what)
            texts = texts[:-1]
    check(root is not None and not above, f"{what}: children are missing")
    names = root.leaves()
    check(len(set(names)) == len(names), f"{what}: two leaves of one name")
    return root


def check_children(node: Node, what: str) -> None:
    """Refuses keys that do not go together."""
    kinds = {child.key_kind for child in node.children}
    check(POSITION not in kinds or len(kinds) == 1, f"{what}: positions and other keys in one node")
    if node.kind in (DICT, DEFAULT):
        keys = [child.key for child in node.children]
        try:
            check(keys == sorted(keys), f"{what}: keys of a dict out of order")
        except TypeError:
            raise Refused(f"{what}: keys of a dict that have no order") from None


# ---- §4: dtypes and safetensors --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dtype:
    """A logical dtype: how safetensors calls what is stored, and the numpy dtype that this reader gives."""

    name: str
    stored: str
    bits: int  # of one element as it is stored; of a key, of one number of it
    numpy: str

    @property
    def packed(self) -> bool:
        """Whether several elements share a byte."""
        return 0 < self.bits < 8


def _dtypes() -> dict[int, Dtype]:
    direct = {
        1: ("bool", "BOOL", "?"), 4: ("int8", "I8", "i1"), 5: ("int16", "I16", "i2"), 6: ("int32", "I32", "i4"),
        7: ("int64", "I64", "i8"), 10: ("uint8", "U8", "u1"), 11: ("uint16", "U16", "u2"), 12: ("uint32", "U32", "u4"),
        13: ("uint64", "U64", "u8"), 15: ("float8_e3m4", "U8", "u1"), 16: ("float8_e4m3", "U8", "u1"),
        17: ("float8_e4m3b11fnuz", "U8", "u1"), 18: ("float8_e4m3fn", "F8_E4M3", "u1"),
        19: ("float8_e4m3fnuz", "F8_E4M3FNUZ", "u1"), 20: ("float8_e5m2", "F8_E5M2", "u1"),
        21: ("float8_e5m2fnuz", "F8_E5M2FNUZ", "u1"), 22: ("float8_e8m0fnu", "F8_E8M0", "u1"),
        23: ("float16", "F16", "f2"), 24: ("bfloat16", "BF16", "u2"), 25: ("float32", "F32", "f4"),
        26: ("float64", "F64", "f8"), 27: ("complex64", "C64", "c8"), 28: ("complex128", "F64", "c16"),
        30: ("key", "U32", "u4"),
    }  # fmt: skip
    packed = {2: ("int2", 2), 3: ("int4", 4), 8: ("uint2", 2), 9: ("uint4", 4), 14: ("float4_e2m1fn", 4)}
    packed |= {31: ("float6_e2m3fn", 6), 32: ("float6_e3m2fn", 6)}
    table = {code: Dtype(name, "U8", bits, "u1") for code, (name, bits) in packed.items()}
    table |= {code: Dtype(name, stored, 8 * np.dtype(t).itemsize, t) for code, (name, stored, t) in direct.items()}
    return table | {29: Dtype("float0", "", 0, "")}


DTYPES = _dtypes()
KEY, FLOAT0, COMPLEX128 = DTYPES[30], DTYPES[29], DTYPES[28]
KEY_DATA = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4, "philox2x32": 1, "philox4x32": 2, "threefry4x32": 4}


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a leaf, argument or result; a symbolic dimension is its text."""

    dtype: Dtype
    key_impl: str | None
    shape: tuple[int | str, ...]
    weak_type: bool
    partition: "Partition | None"
    memory_kind: str | None
    logical_axes: "Partition | None"

    def __str__(self) -> str:
        """Such as `float32[b, 64]`."""
        name = f"key<{self.key_impl}>" if self.dtype is KEY else self.dtype.name
        return f"{name}[{', '.join(str(size) for size in self.shape)}]" + (" weak" if self.weak_type else "")

    def value_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the numpy array for a piece of some logical shape."""
        if self.dtype is not KEY:
            return tuple(shape)
        check(self.key_impl in KEY_DATA, f"unknown PRNG implementation {self.key_impl!r}")
        return (*shape, KEY_DATA[self.key_impl])

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that safetensors gives to a piece of some logical shape."""
        if self.dtype.packed:
            return (-(-product(shape) * self.dtype.bits // 8),)
        return (*shape, 2) if self.dtype is COMPLEX128 else self.value_shape(shape)

    def stored_size(self, shape: Sequence[int]) -> int:
        """How many bytes a piece of some logical shape has."""
        return -(-product(self.value_shape(shape)) * self.dtype.bits // 8)

    def decode(self, data: bytes, shape: Sequence[int]) -> np.ndarray:
        """The numpy array for the bytes of a piece of some logical shape."""
        shape = self.value_shape(shape)
        if 0 in shape:
            check(not data and product(size or 1 for size in shape) < 1 << 56, "a shape too large for numpy")
        if self.dtype.packed:
            width, count = self.dtype.bits, product(shape)
            bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
            check(not bits[count * width :].any(), "padding bits that are not zero")
            elements = bits[: count * width].reshape(count, width)
            return np.packbits(elements, axis=1, bitorder="little").reshape(shape)
        check(self.dtype.stored != "BOOL" or max(data, default=0) <= 1, "a bool that is neither 0 nor 1")
        return np.frombuffer(data, np.dtype(self.dtype.numpy).newbyteorder("<")).reshape(shape)


def parse_json(text: str | bytes, what: str) -> object:
    """JSON without duplicate keys and without NaN."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        check(len({key for key, _ in pairs}) == len(pairs), f"{what}: a key twice in JSON")
        return dict(pairs)

    def constant(name: str) -> object:
        raise Refused(f"{what}: {name} in JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{what}: bad JSON ({error})") from error


@dataclass(frozen=True)
class Stored:
    """A tensor as a safetensors header describes it; `begin` and `end` count from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: str, data: bytes, digest: bytes) -> dict[str, Stored]:
    """The tensors of a safetensors file whose header must have a digest."""
    check(len(data) >= 8, f"{path}: too short for safetensors")
    start = 8 + struct.unpack_from("<Q", data)[0]
    check(start <= len(data), f"{path}: header out of bounds")
    check(sha256(data[:start]) == digest, f"{path}: the header's digest is not the manifest's")
    text = decode(data[8:start]).rstrip(" ")
    check(text.startswith("{") and text.endswith("}"), f"{path}: header is not an object, padded with spaces")
    entries = parse_json(text, path)
    check(isinstance(entries, dict), f"{path}: header is not an object")
    for_others = entries.pop("__metadata__", {})
    check(isinstance(for_others, dict), f"{path}: bad __metadata__")
    check(all(isinstance(value, str) for value in for_others.values()), f"{path}: bad __metadata__")

    def sizes(value: object) -> tuple[int, ...]:
        check(isinstance(value, list) and len(value) <= 64, f"{path}: bad entry")
        check(all(type(size) is int and 0 <= size < 1 << 64 for size in value), f"{path}: bad entry")
        return tuple(value)

    tensors = {}
    for name, entry in entries.items():
        check(isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}, f"{path}: bad entry")
        check(isinstance(entry["dtype"], str), f"{path}: bad entry")
        shape, offsets = sizes(entry["shape"]), sizes(entry["data_offsets"])
        check(len(offsets) == 2, f"{path}: bad entry")
        tensors[name] = Stored(entry["dtype"], shape, start + offsets[0], start + offsets[1])
    position = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        check(tensor.begin == position <= tensor.end, f"{path}: gaps or overlaps")
        position = tensor.end
    check(position == len(data), f"{path}: not as long as its header says")
    return tensors


# ---- §2.3: the tables of the manifest --------------------------------------------------------------------------------


@dataclass
class File:
    """A data file."""

    path: str
    length: int
    kind: str  # "function", "weights" or "supplemental"
    digest: bytes  # of a weights file, of its header


@dataclass(frozen=True)
class Partition:
    """For each dimension the axes over which it is split, None where not split, `...` where left to the compiler."""

    mesh: int | None
    entries: tuple[object, ...]
    unreduced: tuple[str, ...]
    reduced: tuple[str, ...]


@dataclass(frozen=True)
class Axis:
    """An axis of a device mesh."""

    name: str
    size: int
    type: str  # "auto", "explicit" or "manual"


@dataclass
class Object:
    """What all named objects have."""

    name: str
    metadata: dict[object, object]


@dataclass
class Binding:
    """An argument, or subtree of one, that takes weights, or a subtree of them."""

    argument: str
    weights: str
    subtree: str


@dataclass
class Capture:
    """A leaf of weights that a module takes as one of its last arguments."""

    weights: str
    leaf: int
    differentiable: bool


@dataclass
class Module:
    """A StableHLO module, a range of bytes in a file."""

    file: File
    format: str  # "jax.export" or "stablehlo"
    offset: int
    length: int
    stablehlo_version: str
    calling_convention: int
    platforms: list[str]
    num_devices: int
    arguments: list[Spec]
    results: list[Spec]
    kept: list[int]
    donated: list[int]
    captures: list[Capture]
    ordered_effects: list[str]
    unordered_effects: list[str]
    disabled_checks: list[str]
    uses_global_constants: bool
    custom_calls: list[str]
    dialects: list[str]
    jax_version: str
    jaxlib_version: str
    name: str
    artifact: bytes = b""


@dataclass
class Argument:
    """An argument of a function: a tree whose leaves are flat arguments of the module."""

    name: str
    kind: str  # "positional only", "positional or keyword" or "keyword only"
    tree: Node
    leaves: dict[str, Spec]


@dataclass
class FixedArgument:
    """An argument of the Python function that is none of the exported one; `value` is None, too, if it is not held."""

    name: str
    kind: str  # "static" or "default"
    value: object
    text: str


@dataclass
class Function(Object):
    """A function."""

    public: bool
    arguments: list[Argument]
    outputs: Node
    results: dict[str, Spec]
    fixed: list[FixedArgument]
    constraints: list[str]
    bindings: list[Binding]
    primal: Module
    vjps: list[Module]
    compile_options: dict[str, dict[object, object]]


@dataclass
class Piece:
    """A hyper-rectangle of a tensor, one tensor of a weights file."""

    file: File
    name: str
    begin: tuple[int, ...]
    shape: tuple[int, ...]
    spec: Spec
    chunks: list[bytes]


@dataclass
class Leaf:
    """A leaf of weights; tied leaves have the same tensor, and those of dtype float0 none."""

    name: str
    spec: Spec
    tensor: int | None
    tied: list[str]
    pieces: list[Piece]
    value: np.ndarray | None = None


@dataclass
class Weights(Object):
    """A tree of tensors, its leaves in order."""

    public: bool
    tree: Node
    leaves: dict[str, Leaf]


@dataclass
class Polymorphic(Object):
    """Several functions under one name."""

    public: bool
    functions: list[str]


@dataclass
class Step:
    """A step of a pipeline."""

    role: str  # "pre-processor", "model" or "post-processor"
    function: str
    bindings: list[Binding]


@dataclass
class Pipeline(Object):
    """Functions that run one after the other."""

    public: bool
    steps: list[Step]
    pass_through: bool


@dataclass
class Supplemental(Object):
    """An attachment: bytes by their path, None for a folder; inline bytes have the empty path."""

    mime_type: str
    version: str
    function: str
    form: str  # "inline", "file" or "directory"
    content: dict[str, bytes | None]
    files: dict[str, File]


@dataclass
class Device:
    """A device that a package was made for."""

    number: int
    coords: tuple[int, ...]  # of its chip; empty where they are not known
    core: int | None


@dataclass
class Package:
    """All that a package holds."""

    path: Path
    digest: str  # of the flatbuffer, which identifies the package
    format: tuple[int, int]
    reader: str
    producer: str
    metadata: dict[object, object]
    default_pipeline: str
    files: list[File]
    meshes: list[tuple[Axis, ...]]
    partitions: list[Partition]
    symbolic_dims: list[str]
    functions: dict[str, Function]
    polymorphic: dict[str, Polymorphic]
    weights: dict[str, Weights]
    pipelines: dict[str, Pipeline]
    supplementals: dict[str, Supplemental]
    devices: list[Device]  # that it was made for
    refused: dict[str, list[str]]  # objects that need features which this reader does not know, and these features


class Manifest:
    """Reads the tables of a flatbuffer; nothing here opens another file."""

    def __init__(self, flatbuffer: bytes) -> None:
        """Reads what the objects refer to; refuses a format that this reader does not know."""
        (position,) = unpack(flatbuffer, 0, "I")
        check(flatbuffer[4:8] == b"OBML", "flatbuffer: not obmlite's")
        self.root = root = Table(flatbuffer, position)
        major, minor = root.scalar(0, "H"), root.scalar(1, "H")
        check(major == 1, f"format {major}.{minor}; {root.text(2)!r} reads it" if major else "no format version")
        self.format = (major, minor)
        check(not root.texts(3), f"the package requires {root.texts(3)}; {root.text(2)!r} reads it")
        known("digest algorithm", root.scalar(5, "B"), ["SHA-256"])
        check(root.scalar(19, "Q") == CHUNK, "chunks of another size")
        self.pools = pools = Pools(root)
        self.files = self._files(root.table(8))
        self.meshes = self._meshes(root.table(9))
        self.partitions = self._partitions(root.table(10))
        self.symbolic_dims = [pools.string(index) for index in root.column(11, "u4")]
        check(len(set(self.symbolic_dims)) == len(self.symbolic_dims), "a symbolic dimension twice")
        self.refused: dict[str, list[str]] = {}

    def _files(self, table: Table) -> list[File]:
        paths = [self.pools.string(index) for index in table.column(0, "u4")]
        lengths, kinds, digests = table.column(1, "u8"), table.column(2, "u1"), table.raw(3)
        check(len(digests) == DIGEST * rows("files", paths, lengths, kinds), "files: wrong number of digests")
        check(paths == sorted(set(paths)), "files: not in the order of their paths, or one twice")
        names = ("function", "weights", "supplemental")
        files = []
        for i, (path, length, kind) in enumerate(zip(paths, lengths, kinds, strict=True)):
            check_path(path)
            files.append(File(path, length, known("file", kind, names), digests[DIGEST * i : DIGEST * (i + 1)]))
        return files

    def _meshes(self, table: Table) -> list[tuple[Axis, ...]]:
        names, sizes, types = table.column(1, "u4"), table.column(2, "u8"), table.column(3, "u1")
        runs = cut("meshes", table.column(0, "u4"), None, rows("meshes", names, sizes, types))
        check(all(sizes), "meshes: an axis without devices")
        kinds = ("auto", "explicit", "manual")
        axes = [
            Axis(self.pools.string(name), size, known("mesh axis", kind, kinds))
            for name, size, kind in zip(names, sizes, types, strict=True)
        ]
        return [tuple(axes[run]) for run in runs]

    def _partitions(self, table: Table) -> list[Partition]:
        meshes, kinds = table.column(0, "u4"), table.column(2, "u1")
        axes, unreduced, reduced = (
            [self.pools.string(index) for index in table.column(number, "u4")] for number in (4, 6, 8)
        )
        entries: list[object] = []
        for kind, run in zip(kinds, cut("axes", table.column(3, "u4"), len(kinds), len(axes)), strict=True):
            name = known("partition entry", kind, ("whole", "split", "free"))
            check((name == "split") == bool(axes[run]), "partitions: axes of an entry that is not split, or none")
            entries.append({"whole": None, "split": tuple(axes[run]), "free": ...}[name])
        check(all(plus1 <= len(self.meshes) for plus1 in meshes), "partitions: no such mesh")
        count = len(meshes)
        columns = [
            cut("partitions", table.column(number, "u4"), count, len(column))
            for number, column in ((1, entries), (5, unreduced), (7, reduced))
        ]
        return [
            Partition(plus1 - 1 if plus1 else None, tuple(entries[a]), tuple(unreduced[b]), tuple(reduced[c]))
            for plus1, a, b, c in zip(meshes, *columns, strict=True)
        ]

    def file(self, index: int, kind: str) -> File:
        """The file of a number, which must be of a kind."""
        check(index < len(self.files) and self.files[index].kind == kind, f"no such file of kind {kind}")
        return self.files[index]

    def specs(self, table: Table, what: str, symbolic: bool = True) -> list[Spec]:
        """The rows of a table of specs."""
        codes, ranks, weak = (table.column(number, "u1") for number in (0, 2, 4))
        impls, partitions, memory, logical = (table.column(number, "u4") for number in (1, 5, 6, 7))
        rows(what, codes, impls, ranks, weak, partitions, memory, logical)
        dims = table.column(3, "i8")
        check(sum(ranks) == len(dims) and max(ranks, default=0) <= 64, f"{what}: bad ranks")
        check(max([*partitions, *logical], default=0) <= len(self.partitions), f"{what}: no such partition")
        shape = []
        for size in dims:
            check(size >= 0 or (symbolic and -1 - size < len(self.symbolic_dims)), f"{what}: no such dimension")
            shape.append(size if size >= 0 else self.symbolic_dims[-1 - size])
        specs, start = [], 0
        for code, impl, rank, is_weak, partition, kind, axes in zip(
            codes, impls, ranks, flags(what, weak), partitions, memory, logical, strict=True
        ):
            check(code in DTYPES, f"{what}: unknown dtype {code}")
            dtype = DTYPES[code]
            check((dtype is KEY) == bool(impl), f"{what}: a PRNG implementation is missing, or where none belongs")
            split, named = (self.partitions[plus1 - 1] if plus1 else None for plus1 in (partition, axes))
            check(named is None or named.mesh is None, f"{what}: logical axes with a mesh")
            kept = tuple(shape[start : start + rank])
            text = self.pools.string_or_none
            specs.append(Spec(dtype, text(impl), kept, is_weak, split, text(kind), named))
            start += rank
        return specs

    def objects(self, number: int, what: str, read: Callable[[Table, str], Object]) -> dict[str, object]:
        """The objects of a vector of tables by name; those that require features are refused, and not read."""
        result = {}
        for table in self.root.tables(number):
            name, required = table.text(0), table.texts(1)
            check(name not in result and f"{what} {name}" not in self.refused, f"two {what} objects named {name!r}")
            if required:
                self.refused[f"{what} {name}"] = required
            else:
                result[name] = read(table, name)
        return result

    def base(self, table: Table, name: str, metadata: int = 3) -> dict[str, object]:
        """The fields that objects have in common."""
        return {"name": name, "metadata": self.pools.mapping(table.scalar(metadata, "I"))}

    def head(self, table: Table, name: str) -> dict[str, object]:
        """The fields that objects with a visibility have in common."""
        visibility = known(f"visibility of {name!r}", table.scalar(2, "B"), ("public", "private"))
        return {**self.base(table, name), "public": visibility == "public"}

    def bindings(self, table: Table, number: int) -> list[Binding]:
        """A vector of bindings."""
        return [Binding(item.text(0), item.text(1), item.text(2)) for item in table.tables(number)]

    def weights(self, table: Table, name: str) -> Weights:
        """A weights object; its leaves do not have values yet."""
        what = f"weights {name!r}"
        tree = read_tree(table.table(4), self.pools, what)
        names, specs = tree.leaves(), self.specs(table.table(5), what, symbolic=False)
        leaf_tensor, tensor_leaf = table.column(6, "u4"), table.column(7, "u4")
        rows(what, names, specs, leaf_tensor)
        leaves = [Leaf(n, s, t - 1 if t else None, [], []) for n, s, t in zip(names, specs, leaf_tensor, strict=True)]
        for tensor, leaf in enumerate(tensor_leaf):
            check(leaf < len(leaves) and leaves[leaf].tensor == tensor, f"{what}: a tensor named after another's leaf")
        named = [leaves[leaf] for leaf in tensor_leaf]
        pieces = self.pieces(table, what, named)
        same: list[list[str]] = [[] for _ in named]  # names of each tensor's leaves
        for leaf in leaves:
            has = leaf.tensor is not None
            check((leaf.spec.dtype is FLOAT0) != has, f"{what}: float0 with a tensor, or another leaf without")
            if has:
                check(leaf.tensor < len(named), f"{what}: no such tensor")
                ours, theirs = ((s.dtype, s.key_impl, s.shape) for s in (leaf.spec, named[leaf.tensor].spec))
                check(ours == theirs, f"{what}: tied leaves differ")
                leaf.pieces = pieces[leaf.tensor]
                same[leaf.tensor].append(leaf.name)
        for leaf in leaves:
            leaf.tied = [other for other in same[leaf.tensor] if other != leaf.name] if leaf.pieces else []
        return Weights(**self.head(table, name), tree=tree, leaves={leaf.name: leaf for leaf in leaves})

    def pieces(self, table: Table, what: str, tensors: list[Leaf]) -> list[list[Piece]]:
        """The pieces of each tensor, of which the leaf is given after which it is named."""
        files, renamed = table.column(9, "u4"), table.column(10, "u4")
        runs = cut(what, table.column(8, "u4"), len(tensors), rows(what, files, renamed))
        begins, extents, digests = table.column(11, "u8"), table.column(12, "u8"), table.raw(13)
        rows(what, begins, extents)
        result: list[list[Piece]] = []
        used = chunk = 0
        for leaf, run in zip(tensors, runs, strict=True):
            count = run.stop - run.start
            check(count, f"{what}: a tensor without pieces")
            result.append([])
            for index, plus1 in zip(files[run], renamed[run], strict=True):
                begin, shape = (0,) * len(leaf.spec.shape), leaf.spec.shape
                if count > 1:
                    here = slice(used, used + len(shape))
                    begin, extent, used = tuple(begins[here]), tuple(extents[here]), here.stop
                    check(len(extent) == len(shape), f"{what}: pieces without an extent")
                    inside = all(b + e <= size for b, e, size in zip(begin, extent, shape, strict=True))
                    check(inside, f"{what}: a piece outside its tensor")
                    shape = extent
                name = leaf.name if plus1 == 0 else self.pools.string(plus1 - 1)
                chunks = -(-leaf.spec.stored_size(shape) // CHUNK)
                check(chunks <= len(digests) // DIGEST - chunk, f"{what}: chunk digests are missing")
                own = [digests[DIGEST * i : DIGEST * (i + 1)] for i in range(chunk, chunk + chunks)]
                chunk += chunks
                result[-1].append(Piece(self.file(index, "weights"), name, begin, shape, leaf.spec, own))
        check(used == len(begins), f"{what}: extents left over")
        check(chunk * DIGEST == len(digests), f"{what}: chunk digests left over")
        return result

    def module(self, table: Table | None, what: str) -> Module:
        """A module; its artifact is not read yet."""
        check(table is not None, f"{what}: no module")
        arguments, results = self.specs(table.table(8), what), self.specs(table.table(9), what)
        every, kept = table.boolean(10), table.column(11, "u4")
        check(not every or not kept, f"{what}: all arguments are kept, or some")
        donated = table.column(12, "u4")
        for numbers in (kept, donated):
            check(numbers == sorted(set(numbers)), f"{what}: numbers of arguments out of order")
            check(all(number < len(arguments) for number in numbers), f"{what}: no such argument")
        caught = table.table(13)
        names, leaves, exact = caught.column(0, "u4"), caught.column(1, "u4"), flags(what, caught.column(2, "u1"))
        check(rows(what, names, leaves, exact) <= len(arguments), f"{what}: more captures than arguments")
        check(table.scalar(7, "I") >= 1, f"{what}: for no device")
        check(table.texts(6), f"{what}: for no platform")
        return Module(
            file=self.file(table.scalar(0, "I"), "function"),
            format=known(what, table.scalar(1, "B"), ("jax.export", "stablehlo")),
            offset=table.scalar(2, "Q"),
            length=table.scalar(3, "Q"),
            stablehlo_version=table.text(4),
            calling_convention=table.scalar(5, "I"),
            platforms=table.texts(6),
            num_devices=table.scalar(7, "I"),
            arguments=arguments,
            results=results,
            kept=list(range(len(arguments))) if every else kept,
            donated=donated,
            captures=[Capture(self.pools.string(n), i, d) for n, i, d in zip(names, leaves, exact, strict=True)],
            ordered_effects=table.texts(14),
            unordered_effects=table.texts(15),
            disabled_checks=table.texts(16),
            uses_global_constants=table.boolean(17),
            custom_calls=table.texts(18),
            dialects=table.texts(19),
            jax_version=table.text(20),
            jaxlib_version=table.text(21),
            name=table.text(22),
        )

    def function(self, table: Table, name: str) -> Function:
        """A function."""
        what = f"function {name!r}"
        inputs, outputs = (read_tree(table.table(number), self.pools, what) for number in (4, 5))
        check(inputs.kind == CALL and outputs.kind != CALL, f"{what}: not the arguments of a call")
        primal = self.module(table.optional(10), what)
        specs = dict(zip(inputs.leaves(), primal.arguments, strict=False))
        check(len(specs) + len(primal.captures) == len(primal.arguments), f"{what}: wrong number of arguments")
        names = outputs.leaves()
        kinds = table.column(6, "u1")
        rows(what, kinds, inputs.children)
        rows(what, names, primal.results)
        kind_names = ("positional only", "positional or keyword", "keyword only")
        arguments = [
            Argument(str(node.key), known(what, kind, kind_names), node, {n: specs[n] for n in node.leaves()})
            for kind, node in zip(kinds, inputs.children, strict=True)
        ]
        fixed = [
            FixedArgument(
                name=item.text(0),
                kind=known(what, item.scalar(1, "B"), ("static", "default")),
                value=self.pools.msgpack(item.scalar(2, "I") - 1) if item.scalar(2, "I") else None,
                text=item.text(3),
            )
            for item in table.tables(7)
        ]
        return Function(
            **self.head(table, name),
            arguments=arguments,
            outputs=outputs,
            results=dict(zip(names, primal.results, strict=True)),
            fixed=fixed,
            constraints=table.texts(8),
            bindings=self.bindings(table, 9),
            primal=primal,
            vjps=[self.module(item, what) for item in table.tables(11)],
            compile_options={i.text(0): self.pools.mapping(i.scalar(1, "I") + 1) for i in table.tables(12)},
        )

    def poly(self, table: Table, name: str) -> Polymorphic:
        """A polymorphic function."""
        return Polymorphic(**self.head(table, name), functions=table.texts(4))

    def device(self, table: Table) -> Device:
        """A device of the device assignment."""
        coords, core = tuple(table.column(1, "i4")), table.scalar(2, "I")
        check(bool(coords) == bool(core), "a device with coordinates or a core alone")
        return Device(table.scalar(0, "I"), coords, core - 1 if core else None)

    def pipeline(self, table: Table, name: str) -> Pipeline:
        """A pipeline."""
        roles = ("pre-processor", "model", "post-processor")
        numbers = [item.scalar(0, "B") for item in table.tables(4)]
        steps = [
            Step(known(f"pipeline {name!r}", number, roles), item.text(1), self.bindings(item, 2))
            for number, item in zip(numbers, table.tables(4), strict=True)
        ]
        check(numbers == sorted(numbers) and numbers.count(2) <= 1, f"pipeline {name!r}: steps out of order")
        return Pipeline(**self.head(table, name), steps=steps, pass_through=table.boolean(5))

    def supplemental(self, table: Table, name: str) -> Supplemental:
        """A supplemental; its files are not read yet."""
        what = f"supplemental {name!r}"
        form = known(what, table.scalar(6, "B"), ("inline", "file", "directory"))
        paths, numbers = [self.pools.string(index) for index in table.column(8, "u4")], table.column(9, "u4")
        count = rows(what, paths, numbers)
        check(count == {"inline": 0, "file": 1}.get(form, count), f"{what}: wrong number of files")
        check(len(set(paths)) == count, f"{what}: a path twice")
        files = {}
        for path, plus1 in zip(paths, numbers, strict=True):
            check_path(path.removesuffix("/"))
            check(path.endswith("/") == (plus1 == 0), f"{what}: a folder with a file, or a file without")
            if plus1:
                files[path] = self.file(plus1 - 1, "supplemental")
        content = {"": self.pools.blob(table.scalar(7, "I"))} if form == "inline" else dict.fromkeys(paths)
        return Supplemental(
            **self.base(table, name, 2),
            mime_type=table.text(3),
            version=table.text(4),
            function=table.text(5),
            form=form,
            content=content,
            files=files,
        )


def check_names(package: Package) -> None:
    """Refuses names that are taken twice, and references to objects that are not there."""
    kinds = {
        "function": package.functions, "polymorphic": package.polymorphic, "weights": package.weights,
        "pipeline": package.pipelines, "supplemental": package.supplementals,
    }  # fmt: skip
    names = {kind: set(objects) for kind, objects in kinds.items()}
    for refused in package.refused:
        kind, _, name = refused.partition(" ")
        names[kind].add(name)
    functions, callables = names["function"], names["function"] | names["polymorphic"]
    total = len(functions) + len(names["polymorphic"]) + len(names["weights"])
    check(len(callables | names["weights"]) == total, "two objects of one name")

    def bound(bindings: list[Binding]) -> None:
        for binding in bindings:
            check(binding.weights in names["weights"], f"no weights {binding.weights!r}")
            weights = package.weights.get(binding.weights)
            check(weights is None or weights.tree.find(binding.subtree), f"no subtree {binding.subtree!r}")

    for function in package.functions.values():
        bound(function.bindings)
        for module in (function.primal, *function.vjps):
            for capture in module.captures:
                check(capture.weights in names["weights"], f"no weights {capture.weights!r}")
                weights = package.weights.get(capture.weights)
                check(weights is None or capture.leaf < len(weights.leaves), "a capture of a leaf that is not there")
    for several in package.polymorphic.values():
        check(functions.issuperset(several.functions), f"{several.name}: no such function")
    for pipeline in package.pipelines.values():
        for step in pipeline.steps:
            known_here = callables | set(package.supplementals)  # some supplementals describe steps
            check(step.function in known_here, f"{pipeline.name}: no function {step.function!r}")
            bound(step.bindings)
    for attached in package.supplementals.values():
        check(attached.function in callables | {""}, f"{attached.name}: no function {attached.function!r}")
    check(package.default_pipeline in names["pipeline"] | {""}, "no such default pipeline")


# ---- §6: the package and its digests ---------------------------------------------------------------------------------


def read_whole(package: Package, file: File) -> bytes:
    """The bytes of a data file, of the length that the manifest says and, but for weights files, the digest."""
    data = read_file(package.path, file.path)
    check(len(data) == file.length, f"{file.path}: not as long as the manifest says")
    if file.kind != "weights":
        check(sha256(data) == file.digest, f"{file.path}: its digest is not the manifest's")
        check_file_name(file, file.digest)
    return data


def check_file_name(file: File, digest: bytes) -> None:
    """Refuses a file whose name does not hold the first 16 hex digits of its digest."""
    name = file.path.rpartition("/")[2]
    check(f"-{digest.hex()[:16]}." in name + ".", f"{file.path}: its digest is not the one in its name")


def read_weights_file(package: Package, file: File, pieces: dict[str, Piece]) -> dict[str, np.ndarray]:
    """The pieces that the manifest places in a weights file, by their names in it; all its digests are checked."""
    data = read_whole(package, file)
    tensors = read_header(file.path, data, file.digest)
    check(tensors.keys() == pieces.keys(), f"{file.path}: holds other tensors than the manifest says")
    values, digests = {}, [file.digest]
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        piece = pieces[name]
        check(stored.dtype == piece.spec.dtype.stored, f"{file.path}: {name!r} has another dtype")
        check(stored.shape == piece.spec.stored_shape(piece.shape), f"{file.path}: {name!r} has another shape")
        content = data[stored.begin : stored.end]
        check(len(content) == piece.spec.stored_size(piece.shape), f"{file.path}: {name!r} has another size")
        chunks = [sha256(content[start : start + CHUNK]) for start in range(0, len(content), CHUNK)]
        check(chunks == piece.chunks, f"{file.path}: the digest of {name!r} is not the manifest's")
        digests.append(sha256(b"".join(chunks)))
        values[name] = piece.spec.decode(content, piece.shape)
    check_file_name(file, sha256(b"".join(digests)))
    return values


def assemble(leaf: Leaf, values: dict[tuple[str, str], np.ndarray]) -> np.ndarray:
    """A tensor from its pieces, which must cover it without overlap."""
    first = values[leaf.pieces[0].file.path, leaf.pieces[0].name]
    if len(leaf.pieces) == 1:
        return first
    volumes = sum(product(piece.shape) for piece in leaf.pieces)
    check(volumes == product(leaf.spec.shape), f"{leaf.name!r}: pieces overlap or leave a gap")
    whole = np.zeros(leaf.spec.value_shape(leaf.spec.shape), first.dtype)
    covered = np.zeros(leaf.spec.shape, bool)
    for piece in leaf.pieces:
        where = tuple(slice(b, b + e) for b, e in zip(piece.begin, piece.shape, strict=True))
        check(not covered[where].any(), f"{leaf.name!r}: pieces overlap")
        covered[where] = True
        whole[where] = values[piece.file.path, piece.name]
    check(covered.all(), f"{leaf.name!r}: pieces leave a gap")
    return whole


def read_values(package: Package) -> None:
    """Reads and checks all weights files, and gives each leaf its value; tied leaves have the same array."""
    owners: dict[str, str] = {}
    for weights in package.weights.values():
        placed: dict[str, tuple[File, dict[str, Piece]]] = {}
        tensors = {leaf.tensor: leaf for leaf in weights.leaves.values() if leaf.tensor is not None}
        for piece in (piece for leaf in tensors.values() for piece in leaf.pieces):
            path = piece.file.path
            check(owners.setdefault(path, weights.name) == weights.name, f"{path}: of several weights objects")
            pieces = placed.setdefault(path, (piece.file, {}))[1]
            check(piece.name not in pieces, f"{path}: two pieces named {piece.name!r}")
            pieces[piece.name] = piece
        values = {
            (path, name): value
            for path, (file, pieces) in placed.items()
            for name, value in read_weights_file(package, file, pieces).items()
        }
        arrays = {number: assemble(leaf, values) for number, leaf in tensors.items()}
        for leaf in weights.leaves.values():
            leaf.value = arrays.get(leaf.tensor)


def read_package(path: str | os.PathLike[str]) -> Package:
    """Everything in a package, all digests checked.

    Raises:
        Refused: if the package is damaged, or not one of a format that this reader knows.
    """
    path = Path(path)
    flatbuffer = open_manifest(read_file(path, MANIFEST))
    manifest = Manifest(flatbuffer)
    root = manifest.root
    package = Package(
        path=path,
        digest=sha256(flatbuffer).hex(),
        format=manifest.format,
        reader=root.text(2),
        producer=root.text(4),
        metadata=manifest.pools.mapping(root.scalar(18, "I")),
        default_pipeline=root.text(17),
        files=manifest.files,
        meshes=manifest.meshes,
        partitions=manifest.partitions,
        symbolic_dims=manifest.symbolic_dims,
        functions=manifest.objects(12, "function", manifest.function),
        polymorphic=manifest.objects(13, "polymorphic", manifest.poly),
        weights=manifest.objects(14, "weights", manifest.weights),
        pipelines=manifest.objects(15, "pipeline", manifest.pipeline),
        supplementals=manifest.objects(16, "supplemental", manifest.supplemental),
        devices=[manifest.device(item) for item in root.tables(20)],
        refused=manifest.refused,
    )
    check_names(package)
    contents = {file.path: read_whole(package, file) for file in package.files if file.kind != "weights"}
    for function in package.functions.values():
        for module in (function.primal, *function.vjps):
            data = contents[module.file.path]
            check(module.offset + module.length <= len(data), f"{function.name}: StableHLO out of bounds")
            whole = module.offset == 0 and module.length == len(data)
            check(module.format != "stablehlo" or whole, f"{function.name}: the file is not the artifact alone")
            module.artifact = data[module.offset : module.offset + module.length]
            check(module.artifact.startswith(MLIR_MAGIC), f"{function.name}: not MLIR bytecode")
    for attached in package.supplementals.values():
        attached.content |= {name: contents[file.path] for name, file in attached.files.items()}
    read_values(package)
    return package


# ---- listing ---------------------------------------------------------------------------------------------------------


def listing(package: Package) -> Iterable[str]:
    """The lines of a listing for people."""
    major, minor = package.format
    yield f"format {major}.{minor}, written by {package.producer}, read by {package.reader}"
    yield f"identity {package.digest}"
    if package.metadata:
        yield f"metadata {package.metadata}"
    for function in package.functions.values():
        yield f"{'' if function.public else 'private '}function {function.name}"
        for argument in function.arguments:
            yield f"  argument {argument.name} ({argument.kind})"
            yield from (f"    {name!r}: {spec}" for name, spec in argument.leaves.items())
        yield from (f"  fixed {fixed.name} ({fixed.kind}): {fixed.text}" for fixed in function.fixed)
        yield from (f"  result {name!r}: {spec}" for name, spec in function.results.items())
        yield from (f"  constraint {constraint}" for constraint in function.constraints)
        yield from (f"  binding {b.argument!r} <- {b.weights} {b.subtree!r}" for b in function.bindings)
        for order, module in enumerate((function.primal, *function.vjps)):
            what = f"VJP of order {order}" if order else "module"
            yield f"  {what} {module.name} for {', '.join(module.platforms)}; {module.num_devices} device(s)"
            end = module.offset + module.length
            yield f"    StableHLO {module.stablehlo_version}: bytes {module.offset} to {end} of {module.file.path}"
            yield from (f"    capture of {c.weights}, leaf {c.leaf}" for c in module.captures)
    for several in package.polymorphic.values():
        yield f"{'' if several.public else 'private '}polymorphic function {several.name}: {several.functions}"
    for weights in package.weights.values():
        yield f"{'' if weights.public else 'private '}weights {weights.name}"
        for leaf in weights.leaves.values():
            where = ", ".join(dict.fromkeys(piece.file.path for piece in leaf.pieces)) or "no tensor"
            tied = f", tied to {leaf.tied}" if leaf.tied else ""
            yield f"  {leaf.name!r}: {leaf.spec} in {where}{tied}"
    for pipeline in package.pipelines.values():
        default = " (default)" if pipeline.name == package.default_pipeline else ""
        yield f"pipeline {pipeline.name}{default}"
        yield from (f"  {step.role} {step.function}" for step in pipeline.steps)
    for attached in package.supplementals.values():
        owner = f" of {attached.function}" if attached.function else ""
        yield f"supplemental {attached.name}{owner}: {attached.form} {attached.mime_type}".rstrip()
        for name, content in attached.content.items():
            yield f"  {name!r}: {'folder' if content is None else f'{len(content)} bytes'}"
    yield from (f"refused {name}: requires {features}" for name, features in package.refused.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Lists a package and checks all its digests."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("package", help="directory of the package")
    try:
        package = read_package(parser.parse_args(arguments).package)
    except (Refused, OSError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    for line in listing(package):
        print(line)
    print("all digests agree")
    return 0


if __name__ == "__main__":
    sys.exit(main())
