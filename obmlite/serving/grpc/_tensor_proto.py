"""``tensorflow.TensorProto`` to arrays and back.

Elements come either as ``tensor_content`` or in the field of their dtype, where fewer values than the shape has stand
for that many of the last one, and none for zeros. What goes out is ``tensor_content``, and ``string_val`` for texts.
Source: tensorflow/core/framework/{types,tensor}.proto, and ``Tensor::FromProto`` in tensor.cc.
"""

from __future__ import annotations

import math
import sys
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np

from obmlite.serving._elements import checked_shape, encoded, from_bytes, invalid, narrowed, texts
from obmlite.serving.grpc.messages import tensorflow_serving as tfs
from obmlite.serving.status import Code, ServingError

__all__ = ["STRING", "array", "data_type", "fill", "tensor_proto"]


class _Row(NamedTuple):
    """A dtype of TensorFlow's.

    Attributes:
      dtype: numpy's.
      field: where its values are.
      held: dtype of one value there; of bits, where it is another kind than ``dtype``.
    """

    dtype: np.dtype[Any]
    field: str
    held: np.dtype[Any]


def _row(dtype: Any, field: str, held: Any = None) -> _Row:
    return _Row(np.dtype(dtype), field, np.dtype(dtype if held is None else held))


STRING: Final = 7
"""``DT_STRING``."""

_ROWS: Final = {
    1: _row(np.float32, "float_val"),
    2: _row(np.float64, "double_val"),
    3: _row(np.int32, "int_val"),
    4: _row(np.uint8, "int_val", np.int32),
    5: _row(np.int16, "int_val", np.int32),
    6: _row(np.int8, "int_val", np.int32),
    8: _row(np.complex64, "scomplex_val", np.float32),
    9: _row(np.int64, "int64_val"),
    10: _row(np.bool_, "bool_val"),
    14: _row(ml_dtypes.bfloat16, "half_val", np.uint16),
    17: _row(np.uint16, "int_val", np.int32),
    18: _row(np.complex128, "dcomplex_val", np.float64),
    19: _row(np.float16, "half_val", np.uint16),
    22: _row(np.uint32, "uint32_val"),
    23: _row(np.uint64, "uint64_val"),
    24: _row(ml_dtypes.float8_e5m2, "float8_val", np.uint8),
    25: _row(ml_dtypes.float8_e4m3fn, "float8_val", np.uint8),
    26: _row(ml_dtypes.float8_e4m3fnuz, "float8_val", np.uint8),
    27: _row(ml_dtypes.float8_e4m3b11fnuz, "float8_val", np.uint8),
    28: _row(ml_dtypes.float8_e5m2fnuz, "float8_val", np.uint8),
    29: _row(ml_dtypes.int4, "int_val", np.int32),
    30: _row(ml_dtypes.uint4, "int_val", np.int32),
    31: _row(ml_dtypes.int2, "int_val", np.int32),
    32: _row(ml_dtypes.uint2, "int_val", np.int32),
}
_NUMBERS: Final = {row.dtype: number for number, row in _ROWS.items()}
_FIELDS: Final = {row.field for row in _ROWS.values()} | {"string_val"}


def data_type(dtype: np.dtype[Any]) -> int:
    """``tensorflow.DataType`` of a dtype; texts are ``DT_STRING``. 0, ``DT_INVALID``, for one that TensorFlow lacks."""
    return STRING if dtype.kind in "OSUT" else _NUMBERS.get(dtype, 0)


def array(name: str, proto: Any, limit: int = sys.maxsize) -> np.ndarray[Any, Any]:
    """The array of a tensor; texts are an array of ``bytes`` objects.

    Args:
      name: of the input, for errors.
      proto: a TensorProto.
      limit: bytes that it may take; any number unless it comes from a stranger.

    Raises:
      ServingError: INVALID_ARGUMENT, a dtype that is none here, or elements that do not make up the shape.
    """
    if proto.tensor_shape.unknown_rank:
        raise invalid(name, "a shape of unknown rank")
    row = _ROWS.get(proto.dtype)
    if row is None and proto.dtype != STRING:
        raise invalid(name, f"its dtype, {proto.dtype} of tensorflow.DataType, is not served")
    field = row.field if row else "string_val"
    given = {kind.name: value for kind, value in proto.ListFields()}  # once: each look at bytes copies them
    content, values = given.get("tensor_content", b""), given.get(field, ())
    itemsize = row.dtype.itemsize if row else np.dtype(object).itemsize
    shape = checked_shape(name, (dim.size for dim in proto.tensor_shape.dim), itemsize, limit)
    elsewhere = [other for other in given if other in _FIELDS and other != field]
    if elsewhere:
        raise invalid(name, "its values are in a field of another dtype", field, ", ".join(elsewhere))
    if content and row is None:
        raise invalid(name, "texts are given as string_val, not as tensor_content")
    if content and len(values):
        raise invalid(name, f"both tensor_content and {field} are given", "one of them")
    if row is None:
        return _texts(name, list(values), shape, limit)
    if content:
        return from_bytes(name, content, row.dtype, shape)
    return _repeated(name, _typed(name, values, row), shape)


def tensor_proto(values: Any) -> Any:
    """The TensorProto of an array.

    Args:
      values: what ``numpy.asarray`` takes: numbers, or texts as ``str`` or ``bytes``.

    Raises:
      ServingError: UNIMPLEMENTED, TensorFlow has no such dtype.
    """
    proto = tfs.TensorProto()
    fill(proto, np.asarray(values))
    return proto


def fill(proto: Any, values: np.ndarray[Any, Any]) -> None:
    """Makes an empty TensorProto that of an array; in place, since a message that is put into another is copied.

    Raises:
      ServingError: UNIMPLEMENTED, TensorFlow has no such dtype.
    """
    proto.dtype = data_type(values.dtype)
    if not proto.dtype:
        raise ServingError(Code.UNIMPLEMENTED, f"TensorFlow has no dtype for {values.dtype.name}.")
    for size in values.shape:
        proto.tensor_shape.dim.add(size=size)
    if not values.shape:
        proto.tensor_shape.SetInParent()
    if proto.dtype == STRING:
        proto.string_val.extend(encoded(values))
    else:
        proto.tensor_content = values.tobytes()


def _typed(name: str, values: Any, row: _Row) -> np.ndarray[Any, Any]:
    """The values of a field, flat, in the dtype that they stand for."""
    if row.field == "float8_val":
        return np.frombuffer(values or b"", row.dtype)
    if row.field == "half_val":
        return narrowed(name, np.array(values, np.int32), row.held).view(row.dtype)
    held = np.array(values, row.held)
    if row.dtype.kind == "c":
        if len(held) % 2:
            raise invalid(name, f"{row.field} has a real part without its imaginary one")
        return held.view(row.dtype)
    return held if row.held == row.dtype else narrowed(name, held, row.dtype)


def _repeated(name: str, values: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Values in a shape, the last one repeated as often as it has to be."""
    count = math.prod(shape)
    if len(values) > count:
        raise invalid(name, f"more values than the shape {list(shape)} has", count, len(values))
    if len(values) == count:
        return values.reshape(shape)
    whole = np.zeros(count, values.dtype)
    if len(values):
        whole[: len(values)] = values
        whole[len(values) :] = values[-1]
    return whole.reshape(shape)


def _texts(name: str, values: list[bytes], shape: tuple[int, ...], limit: int) -> np.ndarray[Any, Any]:
    """Texts, repeated in the same way."""
    count = math.prod(shape)
    if len(values) > count:
        raise invalid(name, f"more values than the shape {list(shape)} has", count, len(values))
    last = values[-1] if values else b""
    if len(last) * (count - len(values)) > limit:
        raise invalid(name, "the repeated text needs more than a message may hold", f"at most {limit} bytes")
    return texts([*values, *[last] * (count - len(values))]).reshape(shape)
