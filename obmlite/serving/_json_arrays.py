"""JSON's values as arrays, by TensorFlow Serving's rules for numbers.

Numbers become arrays in a few passes that run in C. Only a value that is refused is looked through element by element,
to name the one at fault. The rules and their wording are those of TensorFlow Serving's ``json_tensor.cc``: the dtype is
the signature's, an integer never takes ``1.0``, nothing takes strings or booleans for numbers, and an integer that a
float or double does not hold exactly is an error.
"""

from __future__ import annotations

import base64
import binascii
import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

from obmlite.serving._json import Array, invalid, is_float, is_numpys, is_text, kind_of, shown
from obmlite.serving.status import ServingError

__all__ = ["explain", "first_fault", "is_base64", "parse_array", "parse_tensor"]

_MAX_RANK = 32  # dimensions of an array: numpy has 64, XLA fewer
_CHUNK = 1024  # elements that are found to be good at once, when one is looked for that is not

_EXACT = {np.dtype("f4"): (1 << 24) - 1, np.dtype("f8"): (1 << 53) - 1}
"""Floats → the largest integer token that they take; smaller floats round what is in their range."""

_TYPES = {type(None): "Null", dict: "Object", list: "Array", str: "String", int: "Number", float: "Number"}
_NAMES = {"float16": "half", "float32": "float", "float64": "double", "object": "string"}


def parse_array(value: Any, dtype: np.dtype[Any], *, booleans: bool = True) -> Array:
    """The array of a value, a list, or lists in lists of one length at each level.

    Args:
      value: as :func:`obmlite.serving._json.parse_text` gives it.
      dtype: of the array; object for texts, which become ``bytes``, as ``{"b64": …}`` does.
      booleans: whether there may be booleans in it; :attr:`obmlite.serving._json.Document.booleans`.

    Raises:
      ServingError: it is none of these, or holds what the dtype does not.
    """
    if type(value) is not list:
        return parse_array([value], dtype, booleans=booleans).reshape(())
    found = _texts(value) if is_text(dtype) else _numbers(value, dtype, booleans)
    if found is None:
        explain(value, dtype)
        raise invalid(f"JSON Value: {shown(value)} is not of expected type: {_name(dtype)}")
    return found


def parse_tensor(value: Any, dtype: np.dtype[Any], shape: tuple[int, ...], *, booleans: bool = True) -> Array:
    """The array of nested or flat lists in row-major order, where the shape stands beside them.

    Raises:
      ServingError: as for :func:`parse_array`, or there are more or fewer elements than the shape has.
    """
    found = parse_array(value, dtype, booleans=booleans)
    if found.size != math.prod(shape):
        raise invalid(f"Expecting {math.prod(shape)} elements of shape {list(shape)} but got: {found.size}")
    return found.reshape(shape)


def _name(dtype: np.dtype[Any]) -> str:
    """TensorFlow's name of a dtype."""
    return _NAMES.get(dtype.name, dtype.name)


def _numbers(value: list[Any], dtype: np.dtype[Any], booleans: bool) -> Array | None:
    """None where something is at fault."""
    try:
        rows = _rows(value)
        if rows is None:
            return None
        if dtype.kind == "b":
            if not set(map(type, _flat(rows))) <= {bool}:
                return None
            return np.array(value, dtype)
        # A sum runs in C, fails for whatever is no number, and is an int only of ints (and of booleans).
        total = sum(_flat(rows))
        if booleans and bool in set(map(type, _flat(rows))):
            return None
        if is_float(dtype):
            return _floats(value, rows, dtype)
        if type(total) is not int or kind_of(dtype) != "integer":
            return None
        if is_numpys(dtype):
            return np.array(value, dtype)  # raises for what is out of range
        wide, limits = np.array(value, np.int64), ml_dtypes.iinfo(dtype)
        if wide.size and (wide.min() < limits.min or wide.max() > limits.max):
            return None
        return wide.astype(dtype)
    except (TypeError, ValueError, OverflowError):
        return None


def _floats(value: list[Any], rows: list[Any], dtype: np.dtype[Any]) -> Array | None:
    with np.errstate(over="ignore"):
        found = np.array(value, dtype) if is_numpys(dtype) else np.array(value, np.float64).astype(dtype)
    largest = _largest(dtype)
    # The ufuncs' reductions, for the arrays' methods are Python around them.
    if not found.size or -largest <= np.minimum.reduce(found, None) <= np.maximum.reduce(found, None) <= largest:
        return found
    finite = np.isfinite(found)
    if not finite.all() and np.isfinite(np.array(value, np.float64)[~finite]).any():
        return None  # a finite number that is out of range
    if dtype not in _EXACT or not (abs(found[finite]) > largest).any():
        return found
    return None if any(type(item) is int and abs(item) > largest for item in _flat(rows)) else found


@functools.cache
def _largest(dtype: np.dtype[Any]) -> float:
    """The largest number that a float takes, whichever token it is written as."""
    return _EXACT.get(dtype) or float(ml_dtypes.finfo(dtype).max)


def _rows(value: list[Any]) -> list[Any] | None:
    """The innermost lists; None where the nesting is too deep. Whether it is even numpy finds out."""
    rows = [value]
    for _ in range(_MAX_RANK):
        first = next((row[0] for row in rows if type(row) is list and row), None)
        if type(first) is not list:
            return rows
        rows = list(itertools.chain.from_iterable(rows))
    return None


def _flat(rows: list[Any]) -> Iterable[Any]:
    return rows[0] if len(rows) == 1 else itertools.chain.from_iterable(rows)


def _texts(value: list[Any]) -> Array | None:
    """Texts are few: they are walked through in Python."""
    shape = _shape(value)
    flat: list[bytes] = []
    try:
        _explain(value, shape, 0, np.dtype(object), flat)
    except ServingError:
        return None
    found = np.empty(len(flat), object)
    found[:] = flat
    return found.reshape(shape)


# --- what is wrong


def explain(value: Any, dtype: np.dtype[Any]) -> tuple[int, ...]:
    """Looks for the element that is at fault.

    Returns:
      The shape, if there is none.

    Raises:
      ServingError: what is wrong with it, in TensorFlow Serving's words.
    """
    shape = _shape(value)
    _explain(value, shape, 0, dtype, [])
    return shape


def first_fault(values: list[Any], dtype: np.dtype[Any]) -> tuple[int, str]:
    """The first of several values that is no array of the dtype, or has another shape than the first, and why.

    Returns:
      Its position; all of them, and no reason, if there is none.
    """
    expected: tuple[int, ...] | None = None
    for start in range(0, len(values), _CHUNK):
        chunk = values[start : start + _CHUNK]
        found = _numbers(chunk, dtype, True)
        if found is not None and expected in (None, found.shape[1:]):
            expected = found.shape[1:]
            continue
        for number, value in enumerate(chunk, start):
            try:
                shape = explain(value, dtype)
            except ServingError as error:
                return number, str(error)
            expected = shape if expected is None else expected
            if shape != expected:
                return number, f"Expecting shape {_listed(expected)} but got: {_listed(shape)}"
    return len(values), ""


def _listed(shape: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _shape(value: Any) -> tuple[int, ...]:
    shape = []
    while type(value) is list:
        shape.append(len(value))
        if len(shape) > _MAX_RANK:
            raise invalid(f"Encountered list at unexpected level: {_MAX_RANK} expected < {_MAX_RANK}")
        value = value[0] if value else None
    return tuple(shape)


def _explain(value: Any, shape: tuple[int, ...], level: int, dtype: np.dtype[Any], texts: list[bytes]) -> None:
    if type(value) is not list:
        if level != len(shape):
            raise invalid(
                f"JSON Value: {shown(value)} found at incorrect level: {level + 1} in the JSON DOM. "
                f"Expected at level: {len(shape)}"
            )
        texts.append(_check(value, dtype))
        return
    if level >= len(shape):
        raise invalid(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
    if len(value) != shape[level]:
        raise invalid(
            f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: {shape[level]}"
        )
    for start in range(0, len(value), _CHUNK):
        chunk = value[start : start + _CHUNK]
        if level + 1 == len(shape) and not is_text(dtype):
            found = _numbers(chunk, dtype, True)
            if found is not None and found.ndim == 1:
                continue
        for item in chunk:
            _explain(item, shape, level + 1, dtype, texts)


def _check(value: Any, dtype: np.dtype[Any]) -> Any:
    """An element, if the dtype holds it."""
    kind = type(value)
    if is_text(dtype):
        if kind is dict:
            return _base64(value)
        if kind is str:
            return value.encode("utf-8", "surrogatepass")
    elif dtype.kind == "b":
        if kind is bool:
            return value
    elif is_float(dtype):
        if kind in (int, float):
            _check_range(value, dtype)
            return value
    elif kind is int:
        limits = ml_dtypes.iinfo(dtype)
        if limits.min <= value <= limits.max:
            return value
    name = str(value) if kind is bool else _TYPES[kind]
    raise invalid(f"JSON Value: {shown(value)} Type: {name} is not of expected type: {_name(dtype)}")


def _check_range(value: float, dtype: np.dtype[Any]) -> None:
    if not math.isfinite(value):
        return
    exact = _EXACT.get(dtype)
    if abs(value) > float(ml_dtypes.finfo(dtype).max) or (
        type(value) is int and exact is not None and abs(value) > exact
    ):
        raise invalid(f"Cannot convert JSON value: {shown(value)} to {_name(dtype)} without loss of precision.")


def is_base64(value: Any) -> bool:
    """Whether a value is ``{"b64": "…"}``."""
    return type(value) is dict and len(value) == 1 and type(value.get("b64")) is str


def _base64(value: dict[str, Any]) -> bytes:
    if not is_base64(value):
        raise invalid(f"JSON Value: {shown(value)} not formatted correctly for base64 data")
    try:
        text = value["b64"].encode()
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise invalid("Unable to base64 decode") from None
