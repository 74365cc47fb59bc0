"""The values of constants in an MLIR module, which its bindings give for some dtypes only.

The same in JAX 0.9.2, 0.10.2 and 0.12.
"""

from __future__ import annotations

import binascii
import functools
import math
import re
import types
from typing import Any

import numpy as np

from obmlite import dtypes
from obmlite._mlir import ir
from obmlite.errors import ExportError

__all__ = ["dtype_of", "elements_of", "kind_of", "parse_dtype", "text_of", "value_of"]


def kind_of(op: Any) -> Any:
    """The tensor type of a constant."""
    return ir.RankedTensorType(op.results[0].type)


def dtype_of(op: Any) -> np.dtype[Any] | None:
    """The numpy dtype of a constant; None if obmlite has none."""
    return parse_dtype(str(kind_of(op).element_type))


def value_of(op: Any) -> np.ndarray[Any, Any]:
    """The value of a constant: a held array (see :mod:`obmlite.dtypes`), read-only.

    Raises:
      ExportError: MLIR does not give it as it should.
    """
    dtype, shape = dtype_of(op), tuple(kind_of(op).shape)
    assert dtype is not None
    # MLIR's buffers have what numpy has, but for complex numbers. Without one, np.array makes an object array of the
    # attribute and raises nothing, hence memoryview.
    if dtype.isbuiltin == 1 and dtype.kind != "c":
        value = np.array(memoryview(elements_of(op)))
    else:
        value = np.frombuffer(_bytes(op), dtype).reshape(shape)
    if (value.dtype, value.shape) != (dtype, shape):
        raise ExportError(
            "MLIR does not give a constant's value as it should.",
            expected=f"{dtype}{list(shape)}",
            found=f"{value.dtype}{list(value.shape)}",
        )
    value.flags.writeable = False
    return value


def _bytes(op: Any) -> bytes:
    """The bytes of a constant's elements, which are those that numpy and ml_dtypes hold.

    The way is the text that MLIR prints for it, in hexadecimal. Of 100 elements and fewer it prints each by itself;
    then what is printed is parsed again as many times over as it takes, and not the numbers by us.
    """
    kind = kind_of(op)
    count = math.prod(kind.shape)
    if count > _PRINTED_SINGLY:
        return _hexadecimal(text_of(op))
    text = text_of(op).decode()
    elements = text[text.index("dense<") + 6 : text.rindex("> : tensor<")]
    copies = _PRINTED_SINGLY // count + 1
    shape = "x".join(map(str, (copies, *kind.shape, kind.element_type)))
    repeated = ir.Operation.parse(
        f"stablehlo.constant dense<[{', '.join([elements] * copies)}]> : tensor<{shape}>", context=op.context
    )
    data = _hexadecimal(text_of(repeated))
    return data[: len(data) // copies]


_PRINTED_SINGLY = 100


def text_of(op: Any, **options: Any) -> bytes:
    """An operation as MLIR prints it, with options of its ``print``."""
    parts: list[bytes] = []
    # Operation.get_asm would hold the text one time more.
    op.print(file=types.SimpleNamespace(write=parts.append), binary=True, **options)
    return b"".join(parts)


def _hexadecimal(text: bytes) -> bytes:
    start = text.index(b'dense<"0x') + 9
    with memoryview(text) as view:
        return binascii.unhexlify(view[start : text.index(b'"', start)])


def elements_of(op: Any) -> Any:
    """The attribute with a constant's elements; None for complex ones.

    The bindings have no class for those, and raise an error whose text has all the elements.
    """
    return None if str(kind_of(op).element_type).startswith("complex") else op.attributes["value"]


@functools.lru_cache(maxsize=64)
def parse_dtype(element: str) -> np.dtype[Any] | None:
    """The numpy dtype of an MLIR element type, ``f32``, ``ui4``, ``f8E4M3FN``, ``complex<f64>``; None for others."""
    if element == "i1":
        return np.dtype(np.bool_)
    if element in ("complex<f32>", "complex<f64>"):
        return np.dtype(np.complex64 if element == "complex<f32>" else np.complex128)
    found = re.fullmatch(r"(i|ui|f|bf)(\d+)(E\w+)?", element)
    if found is None:
        return None
    words = {"i": "int", "ui": "uint", "f": "float", "bf": "bfloat"}
    name = f"{words[found[1]]}{found[2]}" + (f"_{found[3].lower()}" if found[3] else "")
    try:
        return dtypes.parse(name).numpy
    except ExportError:
        return None
