"""The safetensors file format: what its header says, and the header of a file to be written.

A file is ``N`` as an unsigned 64-bit little-endian integer, ``N`` bytes of JSON, and the tensors' bytes
(C order, little endian) without holes to the end of the file. This module turns the first two into
checked facts and back. It opens nothing, reads no tensor's bytes and knows no array library.

Source: https://github.com/huggingface/safetensors (README "Format", ``docs/safetensors.schema.json``, and
``safetensors/src/tensor.rs`` as of 0.8.0, the reference reader). :func:`parse_header` refuses everything
that the reference reader refuses, and also what the format forbids and that reader lets through, because
two readers that see different tensors in one file are how a scan is evaded: repeated names, keys that the
schema doesn't know, entries written as arrays, padding other than spaces, shapes that no array library
can hold.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import re
import reprlib
import types
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

from obmlite.errors import CorruptPackageError, LeafError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "BITS",
    "DATA_ALIGNMENT",
    "MAX_HEADER_SIZE",
    "MAX_RANK",
    "Entry",
    "Header",
    "encode_header",
    "header_size",
    "layout",
    "parse_header",
]

MAX_HEADER_SIZE: Final = 100_000_000
"""Most bytes of JSON in a header. The reference reader's limit: it bounds what is read and allocated on
the word of 8 bytes that nobody has checked, and a file above it opens nowhere else."""

DATA_ALIGNMENT: Final = 4096
"""Where tensors' bytes start in the files that we write is a multiple of this, in bytes: a page, so that
a tensor's alignment in the file is its alignment in a memory map."""

MAX_RANK: Final = 64
"""Most dimensions of a tensor. numpy's NPY_MAXDIMS since 2.0: no array could show a tensor above it."""

BITS: Final[Mapping[str, int]] = types.MappingProxyType(
    {
        "BOOL": 8,
        "U8": 8,
        "I8": 8,
        "U16": 16,
        "I16": 16,
        "U32": 32,
        "I32": 32,
        "U64": 64,
        "I64": 64,
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "F8_E4M3": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2": 8,
        "F8_E5M2FNUZ": 8,
        "F8_E8M0": 8,
        "F16": 16,
        "BF16": 16,
        "F32": 32,
        "F64": 64,
        "C64": 64,
    }
)
"""Every dtype code of the format, and its bits per element."""

_LENGTH_SIZE: Final = 8
_METADATA: Final = "__metadata__"
_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})
# The reference reader computes sizes in bits, in 64 of them. Keeping below that also keeps every size in
# bytes below numpy's limit of 2**63 - 1.
_MAX_BITS: Final = 2**64 - 1
# Digits of 2**64 - 1. Longer numbers are never converted: int() is quadratic in them and, above
# sys.get_int_max_str_digits(), raises.
_MAX_DIGITS: Final = 20


# A list of empty lists takes 28 times the memory of its text. A header that is large enough for that to count is first
# compared with what its tensors can need at most: one object and two lists for each, and so many characters.
_LARGE: Final = 16 << 20
_ENTRY_SIZE: Final = len('"":{"dtype":"U8","shape":[],"data_offsets":[0,0]}')
_TEXTS: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file.

    Attributes:
      name: its name; any text, so never to be used as a path.
      dtype: its dtype's code, a key of :data:`BITS`.
      shape: its dimensions in elements, also where an element is less than a byte.
      start: offset of its first byte, in bytes from where data start (``Header.size`` in the file).
      end: offset after its last byte, counted likewise.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """What a file's header says, checked.

    Attributes:
      entries: the tensors by name, in the order of their bytes; together they are all of the data.
      metadata: the file's ``__metadata__``; empty where there is none.
      size: bytes before the data: the 8 length bytes and the JSON with its padding.
      data_size: bytes of data.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]
    size: int
    data_size: int


def header_size(prefix: bytes, file_size: int) -> int:
    """Returns the bytes before the data, that is how much to read for :func:`parse_header`.

    Args:
      prefix: the file's first 8 bytes, or more; all of a shorter file.
      file_size: the file's length in bytes.

    Raises:
      CorruptPackageError: the file is too short, or the length is above :data:`MAX_HEADER_SIZE` or leads
        past the end of the file (``field="header length"``).
    """
    if len(prefix) < _LENGTH_SIZE or file_size < _LENGTH_SIZE:
        raise CorruptPackageError(
            "A safetensors file is too short to hold the length of its header.",
            field="header length",
            expected=f"at least {_LENGTH_SIZE} bytes",
            found=f"{min(len(prefix), file_size)} bytes",
        )
    length = int.from_bytes(prefix[:_LENGTH_SIZE], "little")
    if length > MAX_HEADER_SIZE:
        raise CorruptPackageError(
            "A safetensors header is larger than the format allows.",
            field="header length",
            expected=f"at most {MAX_HEADER_SIZE} bytes",
            found=f"{length} bytes",
        )
    if _LENGTH_SIZE + length > file_size:
        raise CorruptPackageError(
            "A safetensors header leads past the end of its file.",
            field="header length",
            expected=f"at most {file_size - _LENGTH_SIZE} bytes, the rest of the file",
            found=f"{length} bytes",
        )
    return _LENGTH_SIZE + length


def parse_header(raw: bytes, file_size: int) -> Header:
    """Reads a header and checks that its tensors are exactly the rest of the file.

    Args:
      raw: the 8 length bytes and the JSON, exactly :func:`header_size` bytes.
      file_size: the file's length in bytes.

    Raises:
      CorruptPackageError: with ``field`` one of "header length", "JSON" (not JSON, not an object, a name
        twice), "__metadata__", "name", "dtype", "shape", "data_offsets" (also holes and overlaps), "file
        length" (bytes missing at the end or left over) or the key that the schema doesn't know; and with
        ``leaf`` where one tensor is at fault.
    """
    size = header_size(raw, file_size)
    if len(raw) != size:
        raise CorruptPackageError(
            "A safetensors header was not read whole.",
            field="header length",
            expected=f"{size} bytes",
            found=f"{len(raw)} bytes",
        )
    root, escapes = _decode(raw[_LENGTH_SIZE:])
    metadata = _check_metadata(root.pop(_METADATA, None))
    entries = sorted((_check_entry(name, value) for name, value in root.items()), key=_OFFSETS)
    if escapes:
        # Text decoded from UTF-8 has no surrogates, so only an escape can have put one there.
        for name in root:
            _check_text(CorruptPackageError, name, "name", name)
        for key, text in metadata.items():
            _check_text(CorruptPackageError, key, _METADATA)
            _check_text(CorruptPackageError, text, _METADATA)
    data_size = _check_contiguous(CorruptPackageError, entries)
    if size + data_size != file_size:
        # Bytes that no tensor owns could be a second file of another format.
        raise CorruptPackageError(
            "A safetensors file is " + ("truncated." if file_size < size + data_size else "longer than its tensors."),
            field="file length",
            expected=f"{size + data_size} bytes",
            found=f"{file_size} bytes",
        )
    return Header({entry.name: entry for entry in entries}, metadata, size, data_size)


def layout(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> list[Entry]:
    """Places tensors in a file so that they can be mapped, without padding between them.

    The format forbids holes, so order has to do it: by descending power of two that divides the size in
    bytes. Each offset is then a sum of sizes that the tensor's own power divides, and, as data start at a
    multiple of :data:`DATA_ALIGNMENT`, a tensor whose size is a multiple of 64 (or 4096) starts at one.
    Tensors without bytes come first, where they move nothing; names decide among equals.

    Args:
      tensors: name, dtype code and shape (in elements) of each.

    Returns:
      The entries in the order in which their bytes are to be written.

    Raises:
      LeafError: a name comes twice, is ``__metadata__`` or cannot be written as UTF-8 (``field="name"``),
        a dtype is unknown, or a shape is none, too large, or does not end on a byte.
    """
    _check_names(name for name, _, _ in tensors)
    sized = []
    for name, dtype, shape in tensors:
        nbytes = _nbytes(LeafError, name, dtype, shape)
        power = nbytes & -nbytes or _MAX_BITS + 1  # every power of two divides 0
        sized.append((-power, name, dtype, tuple(shape), nbytes))
    sized.sort()
    entries, position = [], 0
    for _, name, dtype, shape, nbytes in sized:
        entries.append(Entry(name, dtype, shape, position, position + nbytes))
        position += nbytes
    return entries


def encode_header(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """Returns the header of a file: the 8 length bytes, compact JSON, and spaces up to the alignment.

    The bytes depend on nothing but the entries and the metadata as sets: metadata come first, sorted by
    key, then the tensors in the order of their bytes. Text beyond ASCII is written as UTF-8, not escaped
    (``ensure_ascii=False``): so does the safetensors package, it is shorter, and names stay searchable.

    Args:
      entries: the tensors, without holes from offset 0, as :func:`layout` returns them.
      metadata: the file's ``__metadata__``; empty for none.

    Returns:
      A multiple of :data:`DATA_ALIGNMENT` bytes; the tensors' bytes follow them.

    Raises:
      LeafError: a name or an entry is one that :func:`layout` refuses, offsets leave holes, metadata are
        not text (``field="__metadata__"``), or the header would be above :data:`MAX_HEADER_SIZE`
        (``field="header length"``).
    """
    ordered = sorted(entries, key=operator.attrgetter("start", "end", "name"))
    _check_names(entry.name for entry in ordered)
    for entry in ordered:
        _check_size(LeafError, entry)
    _check_contiguous(LeafError, ordered)
    root: dict[str, Any] = {}
    if metadata:
        for pair in metadata.items():
            for text in pair:
                _check_text(LeafError, text, _METADATA)
        root[_METADATA] = dict(sorted(metadata.items()))
    for entry in ordered:
        root[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": (entry.start, entry.end),
        }
    encoded = json.dumps(root, ensure_ascii=False, separators=(",", ":")).encode()
    length = len(encoded) + -(_LENGTH_SIZE + len(encoded)) % DATA_ALIGNMENT
    if length > MAX_HEADER_SIZE:
        raise LeafError(
            "A safetensors header would be larger than the format allows.",
            field="header length",
            expected=f"at most {MAX_HEADER_SIZE} bytes",
            found=f"{length} bytes for {len(ordered)} tensors",
            fix="Write the tensors to several files, or shorten their names or the metadata.",
        )
    return length.to_bytes(_LENGTH_SIZE, "little") + encoded.ljust(length)


_Error = type[CorruptPackageError] | type[LeafError]  # the same rules hold on both sides; who broke them differs
_OFFSETS = operator.attrgetter("start", "end")


@dataclasses.dataclass(frozen=True, slots=True)
class _Number:
    """A JSON number that the format has no use for. It stays text until the field that it stands in is known."""

    text: str

    def __repr__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True, slots=True)
class _Repeated:
    """A JSON object with a key twice. It is refused where it stands, where its place is known."""

    key: str


def _decode(raw: bytes) -> tuple[dict[str, Any], bool]:
    """Returns the JSON object in a header, and whether its text may hold escaped characters."""
    text, root, reason = "", None, None
    if len(raw) > _LARGE:
        _check_structure(raw)
    try:
        text = raw.decode()
        # Writers pad with spaces, also in front: the format's maintainers allow it since safetensors#686.
        # Other white space around the object is no padding; within the object it is ordinary JSON.
        text = text.strip(" ")
        if not (text.startswith("{") and text.endswith("}")):
            _refuse_json(f"text that does not begin with '{{' and end with '}}', {reprlib.repr(text)}")
        root = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_Number,
            parse_constant=_constant,
        )
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start}: {error.reason}"
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos}"
    except RecursionError:
        reason = "objects or arrays nested without end"
    if reason is not None:
        _refuse_json(reason)  # not in the handlers: as its context, their errors would keep the whole text alive
    if isinstance(root, _Repeated):
        name = _printable(root.key)
        raise CorruptPackageError(
            "A name comes twice in a safetensors header; readers disagree which one counts.",
            leaf=None if name == _METADATA else name,
            field=_METADATA if name == _METADATA else "JSON",
            expected="each name once",
            found=f"{reprlib.repr(name)} twice",
        )
    return cast("dict[str, Any]", root), "\\u" in text


def _check_structure(raw: bytes) -> None:
    plain = _TEXTS.sub(b"", raw)
    objects, lists = plain.count(b"{"), plain.count(b"[")
    # Two more: the outermost object, and the metadata.
    if (objects - 2) * _ENTRY_SIZE > len(raw) or lists > 2 * objects:
        _refuse_json(f"{objects} objects and {lists} lists in {len(raw)} bytes")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Repeated:
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    seen: set[str] = set()
    return _Repeated(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]


def _integer(text: str) -> int | _Number:
    # "-0" too is no unsigned integer.
    return int(text) if len(text) <= _MAX_DIGITS and text[0] != "-" else _Number(text)


def _constant(text: str) -> NoReturn:
    _refuse_json(f"{text}, which is not JSON")


def _refuse_json(found: str) -> NoReturn:
    raise CorruptPackageError(
        "A safetensors header is not a JSON object.", field="JSON", expected="a JSON object in UTF-8", found=found
    )


def _check_metadata(value: Any) -> dict[str, str]:
    if value is None:  # the reference reader takes null for none
        return {}
    if type(value) is _Repeated:
        found = f"the key {reprlib.repr(value.key)} twice"
    elif type(value) is not dict:
        found = reprlib.repr(value)
    else:
        wrong = next((key for key, text in value.items() if type(text) is not str), None)
        if wrong is None:
            return value
        found = f"{reprlib.repr(value[wrong])} for {reprlib.repr(wrong)}"
    raise CorruptPackageError(
        "The metadata of a safetensors file are not a map from text to text.",
        field=_METADATA,
        expected="an object of strings, each key once",
        found=found,
    )


def _check_entry(name: str, value: Any) -> Entry:
    """Checks one tensor's entry on its own: types, shape, and that offsets span its size."""
    if type(value) is not dict or value.keys() != _FIELDS:
        _refuse_entry(name, value)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if type(shape) is not list:
        _refuse_shape(CorruptPackageError, name, shape)
    if type(offsets) is not list or len(offsets) != 2 or not (type(offsets[0]) is type(offsets[1]) is int):
        raise CorruptPackageError(
            "A tensor's offsets in a safetensors header are not two unsigned integers.",
            leaf=_printable(name),
            field="data_offsets",
            expected="[start, end]",
            found=reprlib.repr(offsets),
        )
    entry = Entry(name, dtype, tuple(shape), offsets[0], offsets[1])
    _check_size(CorruptPackageError, entry)
    return entry


def _refuse_entry(name: str, value: Any) -> NoReturn:
    if type(value) is _Repeated:
        field, found = value.key, f"{reprlib.repr(value.key)} twice"
    elif type(value) is not dict:
        field, found = "JSON", reprlib.repr(value)
    else:
        missing, unknown = sorted(_FIELDS - value.keys()), [key for key in value if key not in _FIELDS]
        field = (missing or unknown)[0]
        found = f"no {field!r}" if missing else f"also {reprlib.repr(field)}"
    raise CorruptPackageError(
        "A tensor's entry in a safetensors header is not what the format says.",
        leaf=_printable(name),
        field=_printable(field) or "JSON",  # a key may be empty
        expected="an object of dtype, shape and data_offsets, each once",
        found=_printable(found),
    )


def _refuse_shape(error: _Error, name: str, shape: object) -> NoReturn:
    raise error(
        "A tensor's shape is not a list of unsigned integers.",
        leaf=_printable(name),
        field="shape",
        expected="integers of at least 0",
        found=reprlib.repr(shape),
    )


def _nbytes(error: _Error, name: str, dtype: str, shape: Sequence[int]) -> int:
    """Returns the size in bytes of a tensor whose dtype and shape nobody has checked."""
    bits = BITS.get(dtype) if type(dtype) is str else None
    if bits is None:
        raise error(
            "A tensor's dtype is none that safetensors has.",
            leaf=_printable(name),
            field="dtype",
            expected=", ".join(BITS),
            found=reprlib.repr(dtype),
        )
    if len(shape) > MAX_RANK:
        raise error(
            "A tensor has more dimensions than an array can have.",
            leaf=_printable(name),
            field="shape",
            expected=f"at most {MAX_RANK} dimensions",
            found=f"{len(shape)} dimensions",
        )
    empty = False
    for dim in shape:
        if type(dim) is not int or dim < 0:  # not isinstance: true is no dimension
            _refuse_shape(error, name, shape)
        if dim:
            bits *= dim
        else:
            empty = True
    # Without the zeros: numpy refuses [2**40, 2**40, 0] in any order, and the reference reader in some.
    if bits > _MAX_BITS:
        raise error(
            "A tensor is larger than can be addressed.",
            leaf=_printable(name),
            field="shape",
            expected="a size in bits that fits 64 bits",
            found=reprlib.repr(shape),
        )
    if empty:
        return 0
    if bits % 8:
        raise error(
            "A tensor of elements below a byte does not end on a byte.",
            leaf=_printable(name),
            field="shape",
            expected="a multiple of 8 bits",
            found=f"{bits} bits, {dtype} {reprlib.repr(shape)}",
        )
    return bits // 8


def _check_size(error: _Error, entry: Entry) -> None:
    nbytes = _nbytes(error, entry.name, entry.dtype, entry.shape)
    if entry.end - entry.start != nbytes:
        raise error(
            "A tensor's offsets do not span the size that its dtype and shape have.",
            leaf=_printable(entry.name),
            field="data_offsets",
            expected=f"{nbytes} bytes, {entry.dtype} {reprlib.repr(list(entry.shape))}",
            found=f"{entry.end - entry.start} bytes, [{entry.start}, {entry.end}]",
        )


def _check_contiguous(error: _Error, entries: Iterable[Entry]) -> int:
    """Checks that entries, in the order of their offsets, follow on each other from 0; returns where they end."""
    position = 0
    for entry in entries:
        if entry.start != position:
            raise error(
                "A tensor overlaps the one before it."
                if entry.start < position
                else "There is a hole before a tensor, which the format forbids.",
                leaf=_printable(entry.name),
                field="data_offsets",
                expected=f"start {position}",
                found=f"start {entry.start}",
            )
        position = entry.end
    return position


def _check_names(names: Iterable[str]) -> None:
    """Checks that names to be written are texts, each once, and none of them the format's own."""
    seen: set[str] = set()
    for name in names:
        _check_text(LeafError, name, "name", name)
        if name == _METADATA or name in seen:
            raise LeafError(
                "A tensor's name is taken.",
                leaf=name,
                field="name",
                expected=f"each name once, and none {_METADATA!r}, which the format keeps for itself",
                found=reprlib.repr(name),
            )
        seen.add(name)


def _check_text(error: _Error, text: object, field: str, leaf: str | None = None) -> None:
    """Checks that a text is one, without surrogates, which UTF-8 cannot hold."""
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError:
            pass
        else:
            return
    raise error(
        "A name or text for a safetensors header is not Unicode text.",
        leaf=None if leaf is None else _printable(leaf),
        field=field,
        expected="a string without surrogates",
        found=reprlib.repr(text),
    )


def _printable(name: object) -> str:
    # An error about a name must not itself fail to be written.
    return str(name).encode(errors="backslashreplace").decode()
