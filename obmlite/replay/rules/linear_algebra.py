"""Products, convolutions, solves and transforms, with their precision, algorithm and accumulation type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from obmlite import _constants
from obmlite.replay._attributes import Algorithm, Convolution, Dot
from obmlite.replay._interpreter import Site
from obmlite.replay._program import Operation
from obmlite.replay._table import rule

GROUP = "linear algebra"


def precision(operation: Operation) -> Any:
    """What an operation asks for; said outright, so that no default of the caller's decides it."""
    asked = operation.get("precision_config", ()) or ("DEFAULT", "DEFAULT")
    return tuple(getattr(lax.Precision, name) for name in asked)


_PRESETS = {
    ("f16", "f16", "f16", 1): "F16_F16_F16",
    ("f16", "f16", "f32", 1): "F16_F16_F32",
    ("bf16", "bf16", "bf16", 1): "BF16_BF16_BF16",
    ("bf16", "bf16", "f32", 1): "BF16_BF16_F32",
    ("bf16", "bf16", "f32", 3): "BF16_BF16_F32_X3",
    ("bf16", "bf16", "f32", 6): "BF16_BF16_F32_X6",
    ("bf16", "bf16", "f32", 9): "BF16_BF16_F32_X9",
    ("tf32", "tf32", "f32", 1): "TF32_TF32_F32",
    ("tf32", "tf32", "f32", 3): "TF32_TF32_F32_X3",
    ("f32", "f32", "f32", 1): "F32_F32_F32",
    ("f64", "f64", "f64", 1): "F64_F64_F64",
}


def _algorithm(asked: Algorithm) -> Any:
    """A dot algorithm as lax has it; None if it has none."""
    types = (asked.lhs, asked.rhs, asked.accumulation)
    plain = (asked.lhs_components, asked.rhs_components, asked.imprecise) == (1, 1, False)
    name = _PRESETS.get((*types, asked.operations)) if plain else None
    if name is not None:
        return getattr(lax.DotAlgorithmPreset, name)
    dtypes = [_constants.parse_dtype(text) for text in types]
    if None in dtypes:
        return None
    return lax.DotAlgorithm(*dtypes, asked.lhs_components, asked.rhs_components, asked.operations, asked.imprecise)


def _unknown_algorithm(operation: Operation) -> str | None:
    asked = operation.get("algorithm", None)
    known = not isinstance(asked, Algorithm) or _algorithm(asked) is not None
    return None if known else "by an algorithm that lax does not have"


@rule(
    "stablehlo.dot_general",
    group=GROUP,
    refuse=_unknown_algorithm,
    meaning="`lax.dot_general`, with its precision or algorithm and the result's dtype",
)
def _dot_general(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    numbers: Dot = operation["dot_dimension_numbers"]
    algorithm = operation.get("algorithm", None)
    return lax.dot_general(
        *operands,
        (
            (numbers.lhs_contracting, numbers.rhs_contracting),
            (numbers.lhs_batching, numbers.rhs_batching),
        ),
        precision=_algorithm(algorithm) if isinstance(algorithm, Algorithm) else precision(operation),
        preferred_element_type=operation.types[0].dtype,
    )


@rule("stablehlo.dot", group=GROUP, meaning="`lax.dot_general`")
def _dot(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    lhs, rhs = operands
    return lax.dot_general(
        lhs,
        rhs,
        (((np.ndim(lhs) - 1,), (0,)), ((), ())),
        precision=precision(operation),
        preferred_element_type=operation.types[0].dtype,
    )


def convolution(operation: Operation, lhs: Any, rhs: Any, padding: Any) -> Any:
    """``convolution`` with given padding."""
    numbers: Convolution = operation["dimension_numbers"]
    ones = (1,) * (len(numbers.lhs) - 2)
    reversal = operation.get("window_reversal", ())
    if any(reversal):
        rhs = lax.rev(rhs, [d for d, flip in zip(numbers.rhs[2:], reversal, strict=True) if flip])
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides=operation.get("window_strides", ones),
        padding=[(int(low), int(high)) for low, high in padding],
        lhs_dilation=operation.get("lhs_dilation", ones),
        rhs_dilation=operation.get("rhs_dilation", ones),
        dimension_numbers=lax.ConvDimensionNumbers(numbers.lhs, numbers.rhs, numbers.out),
        feature_group_count=operation["feature_group_count"],
        batch_group_count=operation["batch_group_count"],
        precision=precision(operation),
        preferred_element_type=operation.types[0].dtype,
    )


@rule(
    "stablehlo.convolution",
    group=GROUP,
    meaning="`lax.conv_general_dilated`, with its precision and the result's dtype",
)
def _convolution(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    count = len(operation["dimension_numbers"].lhs) - 2
    lhs, rhs = operands
    return convolution(operation, lhs, rhs, operation.get("padding", np.zeros((count, 2), np.int64)))


@rule("stablehlo.cholesky", group=GROUP, meaning="`lax.linalg.cholesky`")
def _cholesky(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    (x,) = operands
    if operation.get("lower", False):
        return lax.linalg.cholesky_p.bind(x)
    return _adjoint(lax.linalg.cholesky_p.bind(_adjoint(x)))


def _adjoint(x: Any) -> Any:
    rank = np.ndim(x)
    turned = lax.transpose(x, (*range(rank - 2), rank - 1, rank - 2))
    return lax.conj(turned) if turned.dtype.kind == "c" else turned


@rule("stablehlo.triangular_solve", group=GROUP, meaning="`lax.linalg.triangular_solve`")
def _triangular_solve(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    transpose = operation["transpose_a"]
    return lax.linalg.triangular_solve(
        *operands,
        left_side=operation["left_side"],
        lower=operation["lower"],
        transpose_a=transpose in ("TRANSPOSE", "ADJOINT"),
        conjugate_a=transpose == "ADJOINT",
        unit_diagonal=operation["unit_diagonal"],
    )


@rule("stablehlo.fft", group=GROUP, meaning="`lax.fft`")
def _fft(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return lax.fft(operands[0], operation["fft_type"], operation["fft_length"])
