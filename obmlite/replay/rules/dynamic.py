"""Operations on dynamic shapes. The caller's arrays have shapes, so what a module computes from them is known while
tracing, and each of these becomes the operation with the numbers in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from obmlite.replay._interpreter import Site, traceable
from obmlite.replay._program import Operation
from obmlite.replay._table import known_ints, rule, unsupported
from obmlite.replay.rules import data_movement, linear_algebra

GROUP = "dynamism"


def _size(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return np.asarray(np.shape(operands[0])[operation["dimension"]], np.int32)


rule("stablehlo.get_dimension_size", group=GROUP, meaning="a number")(_size)


@rule(
    "stablehlo.dynamic_reshape",
    group=GROUP,
    fold=lambda operation, x, shape: x.reshape(shape),
    moves=True,
    meaning="`lax.reshape`",
)
def _dynamic_reshape(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return lax.reshape(operands[0], known_ints(operation, operands[1], "shape"))


@rule(
    "stablehlo.dynamic_broadcast_in_dim",
    group=GROUP,
    fold=lambda operation, x, shape: data_movement.spread(x, shape.tolist(), operation["broadcast_dimensions"]),
    moves=True,
    meaning="`lax.broadcast_in_dim`",
)
def _dynamic_broadcast_in_dim(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    shape = known_ints(operation, operands[1], "shape")
    return lax.broadcast_in_dim(operands[0], shape, operation["broadcast_dimensions"])


@rule("stablehlo.dynamic_iota", group=GROUP, meaning="`lax.broadcasted_iota`")
def _dynamic_iota(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    shape = known_ints(operation, operands[0], "shape")
    return lax.broadcasted_iota(operation.types[0].dtype, shape, operation["iota_dimension"])


@rule("stablehlo.dynamic_pad", group=GROUP, meaning="`lax.pad`")
def _dynamic_pad(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    x, value, *edges = operands
    numbers = (known_ints(operation, edge, "padding") for edge in edges)
    return lax.pad(x, value, list(zip(*numbers, strict=True)))


@rule("stablehlo.dynamic_gather", group=GROUP, meaning="`lax.gather`, mode clip")
def _dynamic_gather(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    x, indices, sizes = operands
    return data_movement.gather(operation, x, indices, known_ints(operation, sizes, "slice sizes"))


@rule("stablehlo.dynamic_conv", group=GROUP, meaning="`lax.conv_general_dilated`")
def _dynamic_conv(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    lhs, rhs, padding = operands
    numbers = np.reshape(known_ints(operation, padding, "padding"), (-1, 2))
    return linear_algebra.convolution(operation, lhs, rhs, numbers)


@rule(
    "stablehlo.real_dynamic_slice",
    group=GROUP,
    fold=lambda operation, x, *bounds: x[tuple(slice(*bound) for bound in zip(*bounds, strict=True))],
    meaning="`lax.slice`, `lax.dynamic_slice`",
)
def _real_dynamic_slice(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    x, start, limit, stride = operands
    strides = known_ints(operation, stride, "strides")
    if isinstance(start, np.ndarray) and isinstance(limit, np.ndarray):
        steps = None if set(strides) <= {1} else strides
        return lax.slice(x, known_ints(operation, start, "start"), known_ints(operation, limit, "limit"), steps)
    sizes = operation.types[0].shape
    cut = site.cut(operation)
    if cut is not None and set(strides) <= {1}:
        return lax.dynamic_slice(x, [traceable(n) for n in cut[1]], cut[0], allow_negative_indices=False)
    if None in sizes or set(strides) - {1}:
        raise unsupported(operation, "the size of its result depends on the content of an array")
    starts = [lax.squeeze(lax.slice(start, (n,), (n + 1,)), (0,)) for n in range(np.ndim(x))]
    return lax.dynamic_slice(x, starts, operation.types[0].sizes, allow_negative_indices=False)
