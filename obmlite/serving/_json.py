"""JSON as serving protocols have it: documents to Python, and arrays to documents.

Documents are parsed and written by orjson. It refuses ``NaN``, ``Infinity`` and ``-Infinity``, which TensorFlow Serving
takes: a document that has them is parsed by the standard library. Arrays with such values are written by orjson as
``null``, and these are replaced in the text. :mod:`obmlite.serving._json_arrays` makes arrays of what is parsed.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import orjson

from obmlite.serving.status import Code, ServingError

__all__ = [
    "Array",
    "Document",
    "dumps",
    "invalid",
    "is_float",
    "is_numpys",
    "is_text",
    "kind_of",
    "parse_text",
    "rows_of",
    "shown",
    "writable",
]

Array = np.ndarray[Any, np.dtype[Any]]

_PLACES = 64
_SMALL = 4096  # bytes that are looked through at once
_OTHERS = 256  # numbers of dtypes from here on are given to other packages, as ml_dtypes is
_SHOWN = 120  # characters of a value that an error quotes

_CONSTANTS = re.compile(rb"NaN|Infinity")
_SURROGATES = re.compile(rb"\\u[dD][89a-fA-F]")


class Document(NamedTuple):
    """A parsed document.

    Attributes:
      value: in plain Python.
      booleans: whether there may be booleans among the numbers.
    """

    value: Any
    booleans: bool


def invalid(problem: str) -> ServingError:
    """What is wrong with a request."""
    return ServingError(Code.INVALID_ARGUMENT, problem)


def parse_text(body: bytes) -> Document:
    """Parses a document.

    Raises:
      ServingError: it is no JSON.
    """
    if not body:
        raise invalid("JSON Parse error: The document is empty")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if not _CONSTANTS.search(body):
            raise invalid(f"JSON Parse error: {error.msg} at offset: {error.pos}") from None
        value = _parse_with_constants(body)
    return Document(value, _may_hold(body, b"true") or _may_hold(body, b"false"))


def _may_hold(body: bytes, token: bytes) -> bool:
    """Whether a token is in a text that has its first letter in few places, as a list of numbers does.

    To look for one byte is fifty times faster than to look for four.
    """
    if len(body) < _SMALL:
        return token in body
    at = -1
    for _ in range(_PLACES):
        at = body.find(token[:1], at + 1)
        if at < 0:
            return False
        if body.startswith(token, at):
            return True
    return True


def _parse_with_constants(body: bytes) -> Any:
    try:
        value = json.loads(body.decode("utf-8"))
        if _SURROGATES.search(body):  # half of a character is no text that could be sent back
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        raise invalid(f"JSON Parse error: {error.msg} at offset: {error.pos}") from None
    except RecursionError:
        raise invalid("JSON Parse error: depth limit exceeded") from None
    except ValueError as error:  # no UTF-8, half a character, or a number of thousands of digits
        raise invalid(f"JSON Parse error: {str(error)[:_SHOWN]}") from None


def dumps(value: Any) -> bytes:
    """A document of plain Python, numpy scalars and what :func:`writable` gives."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def shown(value: Any) -> str:
    """A value in an error: the beginning of its text, of which no more is made."""
    text = ""
    for part in json.JSONEncoder().iterencode(value):
        text += part
        if len(text) > _SHOWN:
            return f"{text[:_SHOWN]}…"
    return text


# --- dtypes


def is_text(dtype: np.dtype[Any]) -> bool:
    """Whether the elements are texts."""
    return dtype.kind in "OSU"


def is_numpys(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is one of numpy's own, in any byte order, whatever kind it says it is."""
    return dtype.num < _OTHERS


@functools.cache
def kind_of(dtype: np.dtype[Any]) -> str:
    """What the elements are, whichever package's dtype it is: ml_dtypes' say different things in ``dtype.kind``."""
    for name, info in (("float", ml_dtypes.finfo), ("integer", ml_dtypes.iinfo)):
        with contextlib.suppress(ValueError):
            info(dtype)
            return name if dtype.kind != "c" else "complex"
    return "other"


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether the elements are real and floating, of any width."""
    return kind_of(dtype) == "float"


# --- arrays to JSON


def writable(array: Array, *, binary: bool = False) -> Any:
    """An array as :func:`dumps` takes it.

    Args:
      array: numbers, booleans or texts; floats and integers that numpy lacks are widened.
      binary: whether texts are written as base64 in any case, rather than only those that are no UTF-8.

    Raises:
      ServingError: JSON has nothing for the dtype.
    """
    if is_text(array.dtype):
        return _texts_out(array.tolist(), binary=binary)
    if not is_numpys(array.dtype):
        if is_float(array.dtype):
            array = array.astype(np.float32)
        elif kind_of(array.dtype) == "integer":
            array = array.astype(np.int16)
    if array.dtype.kind not in "biuf":
        raise ServingError(Code.UNIMPLEMENTED, f"JSON has no numbers of type {array.dtype}.")
    if not array.flags.c_contiguous or not array.dtype.isnative:
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)
    if array.dtype.kind == "f" and not np.logical_and.reduce(np.isfinite(array), None):
        return _with_constants(array)
    return array if array.ndim else array[()]


def _with_constants(array: Array) -> orjson.Fragment:
    """The text of an array that has values that JSON lacks, each of which orjson writes as null."""
    parts = dumps(array if array.ndim else array.reshape(1)).split(b"null")
    odd = array[~np.isfinite(array)]
    tokens = np.where(np.isnan(odd), b"NaN", np.where(odd > 0, b"Infinity", b"-Infinity")).tolist()
    text = b"".join(itertools.chain.from_iterable(zip(parts, tokens, strict=False))) + parts[-1]
    return orjson.Fragment(text if array.ndim else text[1:-1])


def rows_of(array: Array, *, binary: bool = False) -> Iterator[Any]:
    """For each element of the first dimension what :func:`dumps` takes."""
    return (writable(np.asarray(row, array.dtype), binary=binary) for row in array)


def _texts_out(value: Any, *, binary: bool) -> Any:
    if isinstance(value, list):
        return [_texts_out(item, binary=binary) for item in value]
    data = value if isinstance(value, bytes) else str(value).encode()
    if not binary:
        try:
            return data.decode()
        except UnicodeDecodeError:
            pass
    return {"b64": base64.b64encode(data).decode()}
