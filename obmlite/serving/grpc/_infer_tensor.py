"""The tensors of the Open Inference Protocol's gRPC form to arrays and back.

A tensor's elements are either in ``raw_input_contents`` (little-endian, row-major; a text behind its length in four
bytes) or in the field of ``contents`` that is its datatype's. FP16, BF16 and the dtypes that the protocol does not name
have no field. Source: Open Inference Protocol, "Tensor Data".
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from obmlite.serving._elements import checked_shape, encoded, filled, from_bytes, invalid, narrowed, texts
from obmlite.serving._inference import datatype
from obmlite.serving.grpc.messages import inference
from obmlite.serving.interface import Array, TensorInfo
from obmlite.serving.status import Code, ServingError

__all__ = ["array", "contents", "field"]

_FIELDS: Final = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
_HELD: Final = {"uint_contents": np.uint32, "int_contents": np.int32}


def field(dtype: np.dtype[Any]) -> str:
    """The field of ``contents`` for a dtype; empty if there is none."""
    return _FIELDS.get(datatype(dtype), "")


def array(tensor: Any, content: bytes | None, info: TensorInfo, limit: int) -> Array:
    """The array of an input; BYTES are an array of ``bytes`` objects.

    Args:
      tensor: an InferInputTensor.
      content: its element of ``raw_input_contents``; None if the request has none.
      info: what the input should be.
      limit: bytes that it may take.

    Raises:
      ServingError: INVALID_ARGUMENT, its datatype is another, or its elements do not make up its shape.
    """
    name, dtype = info.name, info.dtype
    if tensor.datatype != datatype(dtype):
        expected = f"datatype {datatype(dtype)} ({info.text})"
        raise ServingError(
            Code.INVALID_ARGUMENT, f'input {name!r}: expected {expected}, got "{tensor.datatype[:40]}"', leaf=name
        )
    shape = checked_shape(name, tensor.shape, dtype.itemsize, limit)
    given = [kind.name for kind, values in tensor.contents.ListFields() if len(values)]
    if content is not None:
        if given:
            raise invalid(name, f"both raw_input_contents and {', '.join(given)} are given", "one of them")
        return from_bytes(name, content, dtype, shape)
    own = field(dtype)
    if not own:
        raise invalid(name, f"{tensor.datatype} is given as raw_input_contents only")
    if any(other != own for other in given):
        raise invalid(name, "its values are in a field of another datatype", own, ", ".join(given))
    values = getattr(tensor.contents, own)
    if dtype.hasobject:
        return filled(name, texts(values), shape)
    held = np.array(values, _HELD.get(own, dtype))
    return filled(name, held if held.dtype == dtype else narrowed(name, held, dtype), shape)


def contents(values: Array) -> Any:
    """An output that has a field, as InferTensorContents."""
    flat = encoded(values) if datatype(values.dtype) == "BYTES" else values.ravel().tolist()
    return inference.InferTensorContents(**{field(values.dtype): flat})
