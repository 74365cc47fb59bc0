"""What protocols ask of a tensor in bytes: a shape that its elements fill, and elements that the dtype holds.

A request may claim any shape. No array is made before its bytes were counted against the limit on a message.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

from obmlite.serving.status import Code, ServingError

__all__ = [
    "MAX_RANK",
    "bits",
    "checked_shape",
    "encoded",
    "filled",
    "from_bytes",
    "invalid",
    "narrowed",
    "texts",
    "to_bytes",
]

MAX_RANK = 64
"""Dimensions of an array in numpy."""

_LENGTH = struct.Struct("<I")
_NAME = 200
"""Characters of a name that are repeated to the one who sent it."""


def invalid(name: str, problem: str, expected: Any = None, found: Any = None) -> ServingError:
    """The error for a tensor that is not what it says."""
    facts = [f"{word} {fact}" for word, fact in (("expected", expected), ("found", found)) if fact is not None]
    text = f"Input '{name[:_NAME]}': {problem}{': ' if facts else ''}{', '.join(facts)}."
    return ServingError(Code.INVALID_ARGUMENT, text, leaf=name[:_NAME], expected=expected, found=found)


def bits(dtype: np.dtype[Any]) -> int:
    """Bits of an element that is an integer below a byte in width, as in ``int4``; 0 for all others."""
    return int(ml_dtypes.iinfo(dtype).bits) if dtype.kind == "V" and "int" in dtype.name else 0


def checked_shape(name: str, sizes: Iterable[int], itemsize: int, limit: int) -> tuple[int, ...]:
    """A shape of at most ``limit`` bytes; an empty dimension counts as one, for numpy multiplies the others."""
    shape = tuple(sizes)
    if len(shape) > MAX_RANK:
        raise invalid(name, "too many dimensions", f"at most {MAX_RANK}", len(shape))
    if any(size < 0 for size in shape):
        raise invalid(name, "a dimension of a request has to be known", "sizes from 0", list(shape))
    if math.prod(max(size, 1) for size in shape) * itemsize > limit:
        raise invalid(name, "the shape needs more than a message may hold", f"at most {limit} bytes", list(shape))
    return shape


def from_bytes(
    name: str, data: bytes | memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """The array whose little-endian, row-major elements are ``data``; a read-only view where that is safe.

    Of texts, each is behind its length in four bytes.
    """
    if dtype.hasobject:
        return filled(name, texts(_split(name, data, math.prod(shape))), shape)
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise invalid(name, f"{dtype.name}{list(shape)} has other bytes", f"{expected} bytes", len(data))
    if dtype == np.bool_:
        return np.not_equal(np.frombuffer(data, np.uint8), 0).reshape(shape)  # other bytes are no bool of numpy's
    if bits(dtype):
        held = np.frombuffer(data, np.uint8 if dtype.name.startswith("u") else np.int8)
        return narrowed(name, held, dtype).reshape(shape)
    return np.frombuffer(data, dtype).reshape(shape)


def narrowed(name: str, values: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Integers of a wide field as the dtype that they stand for."""
    info = ml_dtypes.iinfo(dtype)
    if values.size and not info.min <= values.min() <= values.max() <= info.max:
        raise invalid(
            name, f"a value is no {dtype.name}", f"{info.min} to {info.max}", f"{values.min()} to {values.max()}"
        )
    return values.astype(dtype)


def filled(name: str, values: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """As many values as the shape has elements, in that shape."""
    if len(values) != math.prod(shape):
        raise invalid(name, f"the shape {list(shape)} has other values", math.prod(shape), len(values))
    return values.reshape(shape)


def texts(values: Iterable[bytes]) -> np.ndarray[Any, Any]:
    """Texts as a flat array of ``bytes`` objects."""
    return np.fromiter(values, object)


def encoded(values: np.ndarray[Any, Any]) -> list[bytes]:
    """The texts of an array, ``str`` or ``bytes``, in row-major order."""
    return [value.encode() if isinstance(value, str) else bytes(value) for value in values.ravel().tolist()]


def to_bytes(values: np.ndarray[Any, Any]) -> bytes:
    """Undoes :func:`from_bytes`."""
    if values.dtype.kind not in "OSUT":
        return values.tobytes()
    return b"".join([part for text in encoded(values) for part in (_LENGTH.pack(len(text)), text)])


def _split(name: str, data: bytes | memoryview, count: int) -> list[bytes]:
    """Texts one behind the other, each behind its length; at most one more than ``count``."""
    found: list[bytes] = []
    at = 0
    while at < len(data) and len(found) <= count:
        start = at + _LENGTH.size
        end = start + _LENGTH.unpack_from(data, at)[0] if start <= len(data) else start
        if end > len(data):
            raise invalid(name, f"its bytes end inside of text {len(found)}")
        found.append(bytes(data[start:end]))
        at = end
    return found
