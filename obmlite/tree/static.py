"""Static data of nodes, and metadata: what msgpack can hold, with tuples as an extension type."""

from __future__ import annotations

from typing import Any

import msgpack

from obmlite.errors import CorruptPackageError, LeafError

MAX_STATIC_BYTES = 1 << 20
"""Static data of one node, packed. Configuration, never weights."""

MAX_STATIC_DEPTH = 64
"""Containers within containers in static data."""

_EXT_TUPLE = 1


def pack_static(data: Any) -> bytes:
    """Static data as msgpack, with tuples as extension type 1.

    Raises:
      LeafError: msgpack cannot hold it, or it is over :data:`MAX_STATIC_BYTES`.
    """
    try:
        packed: bytes = msgpack.packb(_tuples_out(data), strict_types=True)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise LeafError(
            "Static data cannot be stored.",
            expected="None, bool, int, float, str, bytes, and lists, tuples and dicts of them",
            found=str(error),
        ) from error
    if len(packed) > MAX_STATIC_BYTES:
        raise LeafError("Static data is too large.", expected=f"at most {MAX_STATIC_BYTES} bytes", found=len(packed))
    return packed


def _tuples_out(data: Any, depth: int = 0) -> Any:
    if depth > MAX_STATIC_DEPTH:
        raise ValueError(f"nested more than {MAX_STATIC_DEPTH} deep")
    if type(data) is tuple:
        return msgpack.ExtType(_EXT_TUPLE, msgpack.packb([_tuples_out(v, depth + 1) for v in data], strict_types=True))
    if type(data) is list:
        return [_tuples_out(v, depth + 1) for v in data]
    if type(data) is dict:
        return {_tuples_out(k, depth + 1): _tuples_out(v, depth + 1) for k, v in data.items()}
    if data is None or type(data) in (bool, int, float, str, bytes):
        return data
    raise TypeError(f"a {type(data).__qualname__}")  # msgpack would take some more: bytearray, its own ExtType


def unpack_static(packed: bytes) -> Any:
    """Undoes :func:`pack_static`.

    Raises:
      CorruptPackageError: the bytes are not such data.
    """
    if len(packed) > MAX_STATIC_BYTES:
        raise CorruptPackageError("Static data is too large.", field="static", found=f"{len(packed)} bytes")
    return _unpack(packed, 0)


def _unpack(packed: bytes, depth: int) -> Any:
    def extension(code: int, data: bytes) -> Any:
        if code != _EXT_TUPLE or depth > MAX_STATIC_DEPTH:
            raise ValueError(f"extension type {code}")
        items = _unpack(data, depth + 1)
        if type(items) is not list:
            raise ValueError("a tuple that is no array")
        return tuple(items)

    try:
        data = msgpack.unpackb(packed, ext_hook=extension, strict_map_key=False)
        if depth == 0:
            _check_static(data)
        return data
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        if isinstance(error, CorruptPackageError):
            raise
        raise CorruptPackageError("Static data is malformed.", field="static", found=str(error)) from error


def _check_static(data: Any) -> None:
    """Refuses what msgpack itself lets through: deep nesting, and time stamps, an extension that no hook sees."""
    level, depth = [data], 0
    while level:
        if depth > MAX_STATIC_DEPTH:
            raise ValueError(f"nested more than {MAX_STATIC_DEPTH} deep")
        if any(type(part) is msgpack.Timestamp for part in level):
            raise ValueError("extension type -1")
        lists = [part for part in level if type(part) in (list, tuple)]
        maps = [part for part in level if type(part) is dict]
        level = [item for part in lists for item in part]
        level += [item for part in maps for pair in part.items() for item in pair]
        depth += 1


def storable(data: Any, *, strict: bool = True) -> Any:
    """Static data that can be stored; what JAX's own registry calls static often can't be, and is left out."""
    try:
        pack_static(data)
    except LeafError:
        if strict:
            raise
        return None
    return data
