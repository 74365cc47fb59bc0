"""Checked reading of a flatbuffer.

Python's flatbuffers follows any offset that it finds. Here every offset, length and scalar is checked against the
buffer and the table before it is used, vectors come back as numpy views, and the bytes visited are counted, so that
many offsets to one child cannot make small input expensive.

Format: https://flatbuffers.dev/internals/ ("FlatBuffers binary format").
"""

from __future__ import annotations

import struct
from typing import Any, NoReturn, TypeVar

import numpy as np

from obmlite.errors import CorruptPackageError
from obmlite.schema._fields import FIELDS

MAX_VISITS = 8
"""Bytes visited, as a multiple of the buffer's size. Honest manifests visit each byte about once."""

MAX_STRING_BYTES = 1 << 20
"""Bytes of one string outside the pool: names, versions, expressions."""

_Scalar = TypeVar("_Scalar", bound=np.generic)


class Buffer:
    """The bytes of a flatbuffer, with a budget of visits."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._budget = MAX_VISITS * len(data) + 4096

    def spend(self, nbytes: int, field: str) -> None:
        self._budget -= nbytes
        if self._budget < 0:
            raise CorruptPackageError("The manifest refers to the same bytes too often.", field=field)

    def unpack(self, form: str, position: int, field: str) -> int:
        """One little-endian scalar at a position."""
        size = struct.calcsize(form)
        if not 0 <= position <= len(self.data) - size:
            self.fail(field, position)
        value: int = struct.unpack_from(form, self.data, position)[0]
        return value

    def fail(self, field: str, found: Any) -> NoReturn:
        raise CorruptPackageError("An offset in the manifest points outside it.", field=field, found=found)

    def root(self, table: str) -> Table:
        """The root table."""
        return Table(self, self.unpack("<I", 0, table), table)


class Table:
    """One table; fields are read by their names in the schema, and are absent or checked."""

    def __init__(self, buffer: Buffer, position: int, name: str) -> None:
        self._buffer = buffer
        self._position = position
        self._name = name
        self._vtable = position - buffer.unpack("<i", position, name)
        self._slots_size = buffer.unpack("<H", self._vtable, name)
        self._size = buffer.unpack("<H", self._vtable + 2, name)
        if self._slots_size < 4 or self._slots_size % 2 or position + self._size > len(buffer.data):
            buffer.fail(name, position)
        if self._vtable + self._slots_size > len(buffer.data):
            buffer.fail(name, self._vtable)
        buffer.spend(self._size + self._slots_size, name)

    def _at(self, field: str, size: int) -> int:
        """Where a field's `size` bytes are; 0 if it is absent."""
        slot = 4 + 2 * FIELDS[self._name].index(field)
        if slot + 2 > self._slots_size:
            return 0
        offset = self._buffer.unpack("<H", self._vtable + slot, self._label(field))
        if offset == 0:
            return 0
        if offset < 4 or offset + size > self._size:
            self._buffer.fail(self._label(field), offset)
        return self._position + offset

    def _label(self, field: str) -> str:
        return f"{self._name}.{field}"

    def _target(self, field: str) -> int:
        """Where a field's offset leads; 0 if it is absent."""
        at = self._at(field, 4)
        return at + self._buffer.unpack("<I", at, self._label(field)) if at else 0

    def integer(self, field: str, form: str = "<I") -> int:
        """A scalar; 0 if absent."""
        at = self._at(field, struct.calcsize(form))
        return self._buffer.unpack(form, at, self._label(field)) if at else 0

    def has(self, field: str) -> bool:
        """Whether a field is there."""
        return self._at(field, 1) > 0

    def boolean(self, field: str) -> bool:
        """A bool; False if absent."""
        value = self.integer(field, "<B")
        if value > 1:
            raise CorruptPackageError("A truth value is neither 0 nor 1.", field=self._label(field), found=value)
        return bool(value)

    def _span(self, field: str, itemsize: int, position: int = 0) -> tuple[int, int]:
        """(first byte, number of items) of a vector or string."""
        label = self._label(field)
        position = position or self._target(field)
        if not position:
            return 0, 0
        count = self._buffer.unpack("<I", position, label)
        if position + 4 + count * itemsize > len(self._buffer.data):
            self._buffer.fail(label, f"{count} items of {itemsize} bytes at {position}")
        self._buffer.spend(4 + count * itemsize, label)
        return position + 4, count

    def vector(self, field: str, dtype: type[_Scalar]) -> np.ndarray[Any, np.dtype[_Scalar]]:
        """A vector of scalars, as a read-only view; empty if absent."""
        form = np.dtype(dtype).newbyteorder("<")
        first, count = self._span(field, form.itemsize)
        return np.frombuffer(self._buffer.data, form, count, first)

    def string(self, field: str) -> str:
        """A string; empty if absent."""
        return self._text(field, *self._span(field, 1))

    def _text(self, field: str, first: int, count: int) -> str:
        if count > MAX_STRING_BYTES:
            raise CorruptPackageError("A string is too long.", field=self._label(field), found=f"{count} bytes")
        try:
            return self._buffer.data[first : first + count].decode()
        except UnicodeDecodeError as error:
            raise CorruptPackageError("A string is not UTF-8.", field=self._label(field), found=str(error)) from None

    def _targets(self, field: str) -> list[int]:
        first, count = self._span(field, 4)
        offsets = np.frombuffer(self._buffer.data, "<u4", count, first).astype(np.int64)
        positions: list[int] = (first + 4 * np.arange(count) + offsets).tolist()
        return positions

    def strings(self, field: str) -> tuple[str, ...]:
        """A vector of strings; empty if absent."""
        return tuple(self._text(field, *self._span(field, 1, position)) for position in self._targets(field))

    def tables(self, field: str, table: str) -> list[Table]:
        """A vector of tables; empty if absent."""
        return [Table(self._buffer, position, table) for position in self._targets(field)]

    def table(self, field: str, table: str) -> Table:
        """A table that must be there.

        Raises:
          CorruptPackageError: it is absent.
        """
        position = self._target(field)
        if not position:
            raise CorruptPackageError("A part of the manifest is missing.", field=self._label(field))
        return Table(self._buffer, position, table)
