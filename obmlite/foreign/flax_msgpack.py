"""Flax' msgpack checkpoints (``flax.serialization.to_bytes``) as lazy weights, without Flax.

Such a file is one msgpack value: maps, arrays, numbers, and extension types 1 (an array), 2 (a complex number) and 3 (a
numpy scalar). An array is the msgpack of (shape, name of the dtype, C-ordered bytes); one above a size is a map of
``__msgpack_chunked_array__``, its ``shape``, and the ``chunks`` of its flattened elements. The msgpack library would
copy every array; here only what lies around them is read.

Formats: https://github.com/msgpack/msgpack/blob/master/spec.md and ``flax/serialization.py``, as of Flax 0.12.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from obmlite import dtypes
from obmlite import tree as trees
from obmlite._files import TensorFile
from obmlite._tensors import ListedSource, MemorySource, StoredTensor, Tensor
from obmlite.errors import CorruptPackageError, LeafError, PackageNotFoundError, context
from obmlite.io.source import ByteSource
from obmlite.io.store import LocalDirectory
from obmlite.plan import Box, boxes
from obmlite.schema.records import Piece
from obmlite.specs import TensorSpec
from obmlite.weights import Weights

MAX_DEPTH = 200
"""Containers within containers: Python's own stack is gone through."""

MAX_TEXT = 1 << 16
"""Bytes of a key, or of a dtype's name."""

MAX_RANK = 64
"""Dimensions of an array: numpy's limit."""

_KINDS = {kind.name: kind for kind in dtypes.ALL if kind.storage}
_CHUNKED = "__msgpack_chunked_array__"
_NDARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_WINDOW = 64 << 10  # bytes that are read at one time


def read(path_or_bytes: str | os.PathLike[str] | bytes, *, mmap: bool | None = None) -> Weights:
    """Opens a checkpoint that ``flax.serialization`` wrote; the arrays' values are not read.

    Args:
      path_or_bytes: the file's path, or its content.
      mmap: whether the file is mapped, as for :func:`obmlite.load`.

    Returns:
      Nested dicts, as in Flax' state dicts: sequences and dataclasses are dicts there, too.

    Raises:
      PackageNotFoundError: there is nothing at the path.
      CorruptPackageError: the file is not such msgpack.
      LeafError: a leaf is neither an array nor a number.
    """
    if isinstance(path_or_bytes, bytes):
        return _weights(_InMemory(path_or_bytes))
    path = os.fspath(path_or_bytes)
    if not os.path.lexists(path):
        raise PackageNotFoundError("There is nothing at the path.", package=path)
    folder, base = os.path.split(path)
    with context(package=path):
        return _weights(LocalDirectory(folder or os.curdir, mmap=mmap, follow_links=True).open(base))


def _weights(source: ByteSource) -> Weights:
    reader = _Reader(source)
    value = reader.value()
    if reader.position != source.size:
        raise _malformed(source.size, "the end of the file", f"{source.size - reader.position} bytes more")
    leaves, tree = trees.flatten(value)
    found = [
        _leaf(number, name, leaf, source) for number, (name, leaf) in enumerate(zip(tree.names, leaves, strict=True))
    ]
    return Weights.from_source(tree, tuple(s for s, _ in found), ListedSource([t for _, t in found]), {})


def _leaf(number: int, name: str, leaf: Any, source: ByteSource) -> tuple[TensorSpec, Tensor]:
    with context(leaf=name):
        if not isinstance(leaf, _Stored):
            spec = TensorSpec.of(leaf)
            return spec, _in_memory(number, leaf, spec)
        kind = _KINDS.get(leaf.dtype)
        if kind is None:
            raise LeafError("An array is of a dtype that JAX does not have.", field="dtype", found=leaf.dtype[:80])
        dtype = kind.numpy
        _check_size(leaf, dtype)
        spec = TensorSpec(leaf.shape, kind)
        if kind.is_packed:  # Flax gives each element a byte, as numpy does
            return spec, _in_memory(number, _unpacked(leaf, kind, source), spec)
        # A chunk is a range of the flattened array, so a few boxes.
        pieces, offsets = [], {}
        element = 0
        for chunk, (offset, nbytes) in enumerate(leaf.chunks):
            last = element + nbytes // dtype.itemsize
            for n, (box, first) in enumerate(_boxes(leaf.shape, element, last)):
                key = f"{chunk}/{n}"
                offsets[key] = offset + (first - element) * dtype.itemsize
                pieces.append(Piece("", key, tuple(a for a, _ in box), boxes.shape_of(box), b""))
            element = last
        file = TensorFile(source, offsets)
        return spec, StoredTensor(spec, pieces, lambda _: file, number)


def _in_memory(number: int, leaf: Any, spec: TensorSpec) -> Tensor:
    tensor = MemorySource([leaf], [spec]).tensor(0)
    tensor.key = number, "in memory"
    return tensor


def _unpacked(leaf: _Stored, kind: dtypes.DType, source: ByteSource) -> Any:
    data = b"".join(source.read(offset, nbytes) for offset, nbytes in leaf.chunks)
    mask = np.uint8((1 << kind.bits) - 1)  # bits above an element's own are zero, as ml_dtypes keeps them
    return (np.frombuffer(data, np.uint8) & mask).view(kind.numpy).reshape(leaf.shape)


def _check_size(leaf: _Stored, dtype: np.dtype[Any]) -> None:
    expected = boxes.size_of(boxes.whole(leaf.shape)) * dtype.itemsize
    found = sum(nbytes for _, nbytes in leaf.chunks)
    if expected != found or any(nbytes % dtype.itemsize for _, nbytes in leaf.chunks):
        raise CorruptPackageError(
            "An array's bytes are not those of its shape and dtype.",
            field="shape",
            expected=f"{expected} bytes, {dtype}{list(leaf.shape)}",
            found=f"{found} bytes",
        )


def _boxes(shape: tuple[int, ...], first: int, last: int) -> Iterator[tuple[Box, int]]:
    """The boxes that a range of elements, in row-major order, consists of, and the first element of each.

    Each is a range along one dimension, of which all behind it are whole.
    """
    size = boxes.size_of(boxes.whole(shape))
    if first == last and size:
        return
    if not shape or first == last or (first, last) == (0, size):
        yield boxes.whole(shape), first
        return
    row = size // shape[0]
    start, stop = -(-first // row), last // row
    ends = [(first, min(start * row, last))] if first % row else []
    ends += [(stop * row, last)] if last % row and stop >= start else []
    if start < stop:
        yield ((start, stop), *boxes.whole(shape[1:])), start * row
    for a, b in ends:
        n = a // row
        for box, at in _boxes(shape[1:], a - n * row, b - n * row):
            yield ((n, n + 1), *box), at + n * row


@dataclasses.dataclass(frozen=True, slots=True)
class _Stored:
    """An array in the file.

    Attributes:
      shape: of the array.
      dtype: its name.
      chunks: where the bytes are: offset in the file, and how many.
    """

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[tuple[int, int], ...]


class _Reader:
    """Goes through msgpack without reading the bytes of arrays."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._window = b""
        self._start = 0
        self._end = source.size  # of what is being read: the file, or an extension in it
        self._nodes = 0
        self.position = 0

    def value(self, depth: int = 0) -> Any:
        """The next value; an array as what is known of it."""
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > trees.MAX_NODES:
            raise _malformed(self.position, f"at most {MAX_DEPTH} levels and {trees.MAX_NODES} values", "more")
        at = self.position
        [code] = self._take(1)
        if code <= 0x7F:
            return code
        if code >= 0xE0:
            return code - 0x100
        if code <= 0x8F:
            return self._map(code & 0x0F, depth)
        if code <= 0x9F:
            return [self.value(depth + 1) for _ in range(code & 0x0F)]
        if code <= 0xBF:
            return self._text(code & 0x1F)
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBERS:
            return self._number(_NUMBERS[code])
        if code in _SIZES:
            kind, form = _SIZES[code]
            size = self._number(form) if isinstance(form, str) else form
            if kind == "ext":
                return self._extension(size)
            if kind in ("map", "array"):
                self._check(size)  # each element takes a byte at least
                return self._map(size, depth) if kind == "map" else [self.value(depth + 1) for _ in range(size)]
            return self._text(size)
        raise _malformed(at, "msgpack", f"the byte {code:#x}")

    def _map(self, size: int, depth: int) -> Any:
        found: dict[Any, Any] = {}
        for _ in range(size):
            at = self.position
            key = self.value(depth + 1)
            if type(key) not in (str, int) or key in found:
                raise _malformed(at, "keys of text or numbers, each once", repr(key)[:80])
            found[key] = self.value(depth + 1)
        return self._unchunked(found) if _CHUNKED in found else found

    def _unchunked(self, found: dict[Any, Any]) -> _Stored:
        """An array in chunks as one."""
        shape, chunks = (_sequence(found.get(key)) for key in ("shape", "chunks"))
        stored = all(isinstance(chunk, _Stored) for chunk in chunks or ())
        if found.keys() != {_CHUNKED, "shape", "chunks"} or shape is None or not chunks or not stored:
            raise _malformed(self.position, "shape and chunks of an array", repr(sorted(map(str, found)))[:80])
        if len({chunk.dtype for chunk in chunks}) > 1 or any(len(chunk.shape) != 1 for chunk in chunks):
            raise _malformed(self.position, "flat chunks of one dtype", repr(chunks[:2])[:200])
        return _Stored(self._shape(shape), chunks[0].dtype, tuple(itertools.chain(*(chunk.chunks for chunk in chunks))))

    def _extension(self, size: int) -> Any:
        at = self.position
        [code] = self._take(1)
        self._check(size)
        outer, self._end = self._end, self.position + size
        try:
            if code == _COMPLEX:
                parts = self.value(MAX_DEPTH - 1)
                if not isinstance(parts, list) or len(parts) != 2 or any(type(p) not in (int, float) for p in parts):
                    raise _malformed(at, "two numbers", repr(parts)[:80])
                found: Any = complex(*parts)
            elif code in (_NDARRAY, _SCALAR):
                found = self._array()
            else:
                raise _malformed(at, "the extension types 1, 2 and 3", f"type {code}")
            if self.position != self._end:
                raise _malformed(at, "the extension's end", f"{self._end - self.position} bytes more")
        finally:
            self._end = outer
        return found

    def _array(self) -> _Stored:
        at = self.position
        if self._take(1) != b"\x93":
            raise _malformed(at, "an array's shape, dtype and bytes", "something else")
        shape, name = self._shape(self.value(MAX_DEPTH - 1)), self.value(MAX_DEPTH)
        if not isinstance(name, str):
            raise _malformed(at, "the name of a dtype", repr(name)[:80])
        [code] = self._take(1)
        kind, form = _SIZES.get(code, ("str", code & 0x1F) if 0xA0 <= code <= 0xBF else ("", 0))
        if kind not in ("bin", "str"):  # text in old files
            raise _malformed(at, "an array's bytes", f"the byte {code:#x}")
        size = self._number(form) if isinstance(form, str) else form
        self._check(size)
        offset, self.position = self.position, self.position + size
        return _Stored(shape, name, ((offset, size),))

    def _shape(self, shape: Any) -> tuple[int, ...]:
        sizes = shape if isinstance(shape, list) else None
        if sizes is None or len(sizes) > MAX_RANK or any(type(n) is not int or n < 0 for n in sizes):
            raise _malformed(self.position, f"a shape of at most {MAX_RANK} sizes", repr(shape)[:80])
        if math.prod(max(size, 1) for size in sizes) >= 1 << 63:
            raise _malformed(self.position, "an array that can be addressed", repr(shape)[:80])
        return tuple(sizes)

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _text(self, size: int) -> str:
        at = self.position
        if size > MAX_TEXT:
            raise _malformed(at, f"text of at most {MAX_TEXT} bytes", f"{size} bytes")
        try:
            return self._take(size).decode()
        except UnicodeDecodeError as error:
            raise _malformed(at, "UTF-8", str(error)) from error

    def _check(self, size: int) -> None:
        if size > self._end - self.position:
            raise _malformed(self.position, f"{size} bytes or more", f"{self._end - self.position} bytes")

    def _take(self, size: int) -> bytes:
        self._check(size)
        first = self.position - self._start
        if first < 0 or first + size > len(self._window):
            length = min(max(size, _WINDOW), self._source.size - self.position)
            self._window, self._start, first = self._source.read(self.position, length), self.position, 0
        self.position += size
        return self._window[first : first + size]


_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
# Of other codes, one by one: how a number is written; or what begins, and its size, or how that is written.
_NUMBERS = dict(zip(range(0xCA, 0xD4), (">f", ">d", ">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), strict=True))
_SIZES: dict[int, tuple[str, str | int]] = {
    **{0xC4 + n: ("bin", form) for n, form in enumerate((">B", ">H", ">I"))},
    **{0xC7 + n: ("ext", form) for n, form in enumerate((">B", ">H", ">I"))},
    **{0xD4 + n: ("ext", 1 << n) for n in range(5)},
    **{0xD9 + n: ("str", form) for n, form in enumerate((">B", ">H", ">I"))},
    **{0xDC + n: ("array", form) for n, form in enumerate((">H", ">I"))},
    **{0xDE + n: ("map", form) for n, form in enumerate((">H", ">I"))},
}


def _sequence(value: Any) -> list[Any] | None:
    """A sequence, which Flax writes as a dict of numbers as text; None for anything else."""
    if not isinstance(value, dict) or list(value) != [str(n) for n in range(len(value))]:
        return None
    return list(value.values())


def _malformed(position: int, expected: str, found: str) -> CorruptPackageError:
    return CorruptPackageError(
        "The file is no msgpack that Flax writes.", field=f"byte {position}", expected=expected, found=found
    )


class _InMemory:
    """A :class:`ByteSource` of bytes."""

    name = "bytes"

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        return len(self._data)

    def read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._data[offset : offset + len(buffer)]

    def map(self) -> memoryview:
        return memoryview(self._data)

    def prefetch(self, offset: int, length: int) -> None:
        """It is in memory."""

    def drop(self, offset: int, length: int) -> None:
        """It stays there."""

    def close(self) -> None:
        """Nothing is open."""
