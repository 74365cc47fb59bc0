"""Checks of columns before they are used, and tables of which each row is read when it is asked for."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from obmlite.errors import CorruptPackageError, ObmliteError, UnsupportedFormatError, context
from obmlite.schema import records as r
from obmlite.schema._flat import Table

_T = TypeVar("_T")
_Enum = TypeVar("_Enum", bound=int)
Column = np.ndarray[Any, np.dtype[Any]]

MAX_RANK = 64
"""Dimensions of a tensor: numpy's own limit."""

MAX_TENSOR_BYTES = 1 << 62
"""Bytes of one tensor: keeps every product of sizes and offsets inside a signed 64-bit integer."""


MAX_AXIS_SIZE = (1 << 31) - 1
"""Devices along one axis of a mesh."""


def corrupt(problem: str, field: str, found: Any = None, expected: Any = None) -> CorruptPackageError:
    return CorruptPackageError(problem, field=field, found=found, expected=expected)


def member(kind: Callable[[int], _Enum], value: int, field: str) -> _Enum:
    try:
        return kind(value)
    except ValueError:
        raise corrupt("An enumeration has a value that this obmlite does not know.", field, value) from None


def cuts_of(starts: Column, count: int, length: int, field: str) -> list[int]:
    """Checks n + 1 offsets that cut `length` items into `count` runs."""
    if starts.size == 0 and count == 0 and length == 0:
        return [0]
    values = starts.astype(np.int64)
    if values.size != count + 1 or values[0] != 0 or values[-1] != length or (np.diff(values) < 0).any():
        raise corrupt("A column of offsets does not fit what it cuts.", field, f"{values.size} offsets, {length} items")
    result: list[int] = values.tolist()
    return result


def below(values: Column, limit: int, field: str) -> Column:
    if values.size and int(values.max()) >= limit:
        raise corrupt("An index points past the end of its table.", field, int(values.max()), f"below {limit}")
    return values


def ascending(values: Column, field: str) -> None:
    if (np.diff(values.astype(np.int64)) <= 0).any():
        raise corrupt("Arguments are not listed in ascending order.", field)


def truths(values: Column, field: str) -> list[bool]:
    below(values, 2, field)
    return values.astype(bool).tolist()  # type: ignore[no-any-return]


def same_length(field: str, count: int, **columns: Column) -> None:
    for name, column in columns.items():
        if column.size != count:
            raise corrupt(
                "Columns of one table have different lengths.", f"{field}.{name}", column.size, f"{count} items"
            )


class Pool:
    """Strings or blobs, cut from one vector when asked for."""

    def __init__(self, table: Table, field: str) -> None:
        self._bytes = table.vector("bytes", np.uint8).tobytes()
        starts = table.vector("starts", np.uint32)
        self._starts = cuts_of(starts, max(starts.size - 1, 0), len(self._bytes), f"{field}.starts")
        self._field = field

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> bytes:
        if not 0 <= number < len(self):
            raise corrupt("An index points past the end of its table.", self._field, number, f"below {len(self)}")
        return self._bytes[self._starts[number] : self._starts[number + 1]]


class LazyRows(Mapping[str, _T]):
    """Records by name; each is decoded, and its features are checked, when it is first asked for."""

    def __init__(self, kind: str, rows: list[Table], decode: Callable[[Table, dict[str, Any]], _T]) -> None:
        self._rows: dict[str, Table] = {}
        for row in rows:
            name = row.string("name")
            if not name or name in self._rows:
                raise corrupt("Objects of one kind have no name or the same name.", f"{kind}.name", repr(name))
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
                        check_required(required)
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


def check_required(required: Sequence[str]) -> None:
    unknown = sorted(set(required) - r.KNOWN_FEATURES)
    if unknown:
        raise UnsupportedFormatError(
            "This needs features that this obmlite does not know.",
            field="required",
            found=", ".join(unknown),
            fix="install a newer obmlite",
        )
