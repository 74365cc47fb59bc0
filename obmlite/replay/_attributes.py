"""MLIR attributes and types as Python and numpy values.

MLIR's bindings, the same in JAX 0.9.2, 0.10.2 and 0.12, give a class of their own only
to builtin attributes; those of a dialect are told apart by how they are written.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from obmlite import _constants
from obmlite._mlir import ir, sdy, stablehlo
from obmlite.replay._program import TensorType

__all__ = [
    "Accuracy",
    "Algorithm",
    "Convolution",
    "Dot",
    "Gather",
    "Opaque",
    "Scatter",
    "Sharding",
    "decode",
    "read_type",
]

Ints = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Dot:
    """``#stablehlo.dot``: dimensions that are contracted, and those that are batched."""

    lhs_contracting: Ints
    rhs_contracting: Ints
    lhs_batching: Ints
    rhs_batching: Ints


@dataclasses.dataclass(frozen=True, slots=True)
class Algorithm:
    """``#stablehlo.dot_algorithm``, types as MLIR writes them."""

    lhs: str
    rhs: str
    accumulation: str
    lhs_components: int
    rhs_components: int
    operations: int
    imprecise: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Convolution:
    """``#stablehlo.conv``: for each operand and the result (batch or output features, features, *spatial)."""

    lhs: Ints
    rhs: Ints
    out: Ints


@dataclasses.dataclass(frozen=True, slots=True)
class Gather:
    """``#stablehlo.gather``."""

    offset: Ints
    collapsed: Ints
    operand_batching: Ints
    indices_batching: Ints
    start_index_map: Ints
    index_vector: int


@dataclasses.dataclass(frozen=True, slots=True)
class Scatter:
    """``#stablehlo.scatter``."""

    update_window: Ints
    inserted_window: Ints
    operand_batching: Ints
    indices_batching: Ints
    to_operand: Ints
    index_vector: int


@dataclasses.dataclass(frozen=True, slots=True)
class Accuracy:
    """``#stablehlo.result_accuracy``; mode is DEFAULT, HIGHEST or TOLERANCE."""

    atol: float
    rtol: float
    ulps: int
    mode: str


@dataclasses.dataclass(frozen=True, slots=True)
class Sharding:
    """``#sdy.sharding``.

    Attributes:
      mesh: name of the mesh, None where it stands in the attribute itself.
      dimensions: for each, names of the axes that split it; None if Shardy may add others.
      whole: whether each axis is used whole, as JAX's shardings have them.
    """

    mesh: str | None
    dimensions: tuple[tuple[tuple[str, ...], bool], ...]
    whole: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Opaque:
    """An attribute that no rule needs, as MLIR writes it."""

    text: str


def decode(attribute: Any) -> Any:
    """The value of an attribute: Python's own types, numpy arrays, or a class of this module."""
    reader = _BUILTIN.get(type(attribute))
    if reader is not None:
        return reader(attribute)
    text = str(attribute)
    if enumeration := re.fullmatch(r"#\w+<\w+ (\w+)>", text):
        return enumeration[1]
    prefix = text.partition("<")[0]
    return _DIALECT[prefix](attribute) if prefix in _DIALECT else Opaque(text)


def read_type(kind: Any) -> TensorType:
    """The type of a value."""
    text = str(kind)
    return _tensor_type(text) or _read_tensor_type(text, kind)


@functools.lru_cache(maxsize=4096)
def _tensor_type(text: str) -> TensorType | None:
    found = re.fullmatch(r"tensor<((?:\d+x)*)(\w+|complex<f\d+>)>", text)
    if found is None:
        return None
    return TensorType(text, _constants.parse_dtype(found[2]), tuple(map(int, found[1].split("x")[:-1])))


def _read_tensor_type(text: str, kind: Any) -> TensorType:
    if not isinstance(kind, ir.RankedTensorType):
        return TensorType(text, None, ())
    shape = tuple(None if kind.is_dynamic_dim(n) else kind.get_dim_size(n) for n in range(kind.rank))
    return TensorType(text, _constants.parse_dtype(str(kind.element_type)), shape)


def read_constant(op: Any) -> Any:
    """The elements of a ``stablehlo.constant``; those of a splat share one, with strides of zero."""
    kind = ir.RankedTensorType(op.results[0].type)
    dtype, shape = _constants.parse_dtype(str(kind.element_type)), tuple(kind.shape)
    assert dtype is not None
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    element = _single(op, kind)
    if element is None:
        return _constants.value_of(op).view(dtype)
    # MLIR's buffers are of C's types, and numpy has two that are the same to all but JAX 0.9: the view settles it.
    return np.broadcast_to(np.asarray(element).view(dtype), shape)


def _single(op: Any, kind: Any) -> Any:
    """The element of a splat or a scalar; None for what has several."""
    elements, name = _constants.elements_of(op), str(kind.element_type)
    if elements is None:  # complex, which the bindings cannot hold
        found = re.search(rb"dense<(\([^()]*\))>", _constants.text_of(op, large_elements_limit=1))
        return None if found is None else _parsed(op, found[1].decode(), name)
    if not isinstance(elements, ir.DenseElementsAttr) or not elements.is_splat:
        return None
    dtype = _constants.parse_dtype(name)
    if dtype is not None and dtype.isbuiltin == 1:
        return np.asarray(memoryview(elements)).reshape(-1)[0]
    return _parsed(op, str(elements.get_splat_value()).partition(" : ")[0], name)


def _parsed(op: Any, text: str, element: str) -> Any:
    # By itself it would be a splat again, and two values more keep it from being one whatever it is.
    fillers = {"c": ["(1.0,0.0)", "(2.0,0.0)"], "i": ["0", "1"], "u": ["0", "1"]}.get(element[0], ["1.0", "2.0"])
    array = ir.Operation.parse(
        f"stablehlo.constant dense<[{', '.join([text, *fillers])}]> : tensor<3x{element}>", context=op.context
    )
    return _constants.value_of(array)[0]


def _ints(values: Any) -> Ints:
    return tuple(int(value) for value in values)


def _elements(attribute: Any) -> Any:
    kind = ir.RankedTensorType(attribute.type)
    if str(kind.element_type) == "index":
        return Opaque("layout")
    return np.array([int(value) for value in attribute], np.int64).reshape(tuple(kind.shape))


def _sharding(attribute: Any) -> Sharding:
    attribute = sdy.TensorShardingAttr(attribute)
    mesh, whole, dimensions = attribute.mesh_or_ref, True, []
    for each in attribute.dimension_shardings:
        dimension = sdy.DimensionShardingAttr(each)
        axes = [sdy.AxisRefAttr(axis) for axis in dimension.axes]
        whole = whole and all(axis.sub_axis_info is None for axis in axes)
        dimensions.append((tuple(axis.name for axis in axes), bool(dimension.is_closed)))
    name = mesh.value if isinstance(mesh, ir.FlatSymbolRefAttr) else None
    return Sharding(name, tuple(dimensions), whole and not list(attribute.unreduced_axes))


def _dot(attribute: Any) -> Dot:
    a = stablehlo.DotDimensionNumbers(attribute)
    return Dot(
        _ints(a.lhs_contracting_dimensions),
        _ints(a.rhs_contracting_dimensions),
        _ints(a.lhs_batching_dimensions),
        _ints(a.rhs_batching_dimensions),
    )


def _algorithm(attribute: Any) -> Algorithm:
    a = stablehlo.DotAlgorithm(attribute)
    return Algorithm(
        str(a.lhs_precision_type),
        str(a.rhs_precision_type),
        str(a.accumulation_type),
        a.lhs_component_count,
        a.rhs_component_count,
        a.num_primitive_operations,
        bool(a.allow_imprecise_accumulation),
    )


def _convolution(attribute: Any) -> Convolution:
    a = stablehlo.ConvDimensionNumbers(attribute)
    return Convolution(
        (a.input_batch_dimension, a.input_feature_dimension, *a.input_spatial_dimensions),
        (a.kernel_output_feature_dimension, a.kernel_input_feature_dimension, *a.kernel_spatial_dimensions),
        (a.output_batch_dimension, a.output_feature_dimension, *a.output_spatial_dimensions),
    )


def _gather(attribute: Any) -> Gather:
    a = stablehlo.GatherDimensionNumbers(attribute)
    return Gather(
        _ints(a.offset_dims),
        _ints(a.collapsed_slice_dims),
        _ints(a.operand_batching_dims),
        _ints(a.start_indices_batching_dims),
        _ints(a.start_index_map),
        a.index_vector_dim,
    )


def _scatter(attribute: Any) -> Scatter:
    a = stablehlo.ScatterDimensionNumbers(attribute)
    return Scatter(
        _ints(a.update_window_dims),
        _ints(a.inserted_window_dims),
        _ints(a.input_batching_dims),
        _ints(a.scatter_indices_batching_dims),
        _ints(a.scattered_dims_to_operand_dims),
        a.index_vector_dim,
    )


def _accuracy(attribute: Any) -> Accuracy:
    a = stablehlo.ResultAccuracyAttr(attribute)
    return Accuracy(a.atol, a.rtol, a.ulps, str(decode(a.mode) if isinstance(a.mode, ir.Attribute) else a.mode))


def _string(attribute: Any) -> str | bytes:
    """Text; bytes where it is none, as some calls have their options."""
    raw: bytes = attribute.value_bytes
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


_BUILTIN: dict[type, Callable[[Any], Any]] = {
    ir.BoolAttr: lambda a: bool(a.value),
    ir.IntegerAttr: lambda a: int(a.value),
    ir.FloatAttr: lambda a: float(a.value),
    ir.StringAttr: _string,
    ir.FlatSymbolRefAttr: lambda a: a.value,
    ir.UnitAttr: lambda _: True,
    ir.TypeAttr: lambda a: Opaque(str(a)),
    ir.ArrayAttr: lambda a: tuple(map(decode, a)),
    ir.DictAttr: lambda a: {entry.name: decode(entry.attr) for entry in a},
    ir.DenseI64ArrayAttr: _ints,
    ir.DenseI32ArrayAttr: _ints,
    ir.DenseBoolArrayAttr: lambda a: tuple(map(bool, a)),
    ir.DenseIntElementsAttr: _elements,
}

_DIALECT: dict[str, Callable[[Any], Any]] = {
    "#stablehlo.dot": _dot,
    "#stablehlo.dot_algorithm": _algorithm,
    "#stablehlo.conv": _convolution,
    "#stablehlo.gather": _gather,
    "#stablehlo.scatter": _scatter,
    "#stablehlo.result_accuracy": _accuracy,
    "#sdy.sharding": _sharding,
}
