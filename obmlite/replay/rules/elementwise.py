"""Elementwise operations: each is one ``jax.lax`` operation.

Those on integers fold in numpy where all operands are known, as dimensions are, with division as StableHLO has it,
toward zero; what divides by zero is left to XLA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import lax

from obmlite.replay._attributes import Accuracy
from obmlite.replay._interpreter import Site
from obmlite.replay._program import Operation
from obmlite.replay._table import rule

GROUP = "elementwise"

Apply = Callable[[Site, Operation, Sequence[Any]], Any]
Fold = Callable[..., Any]


def _numpy(function: Callable[..., Any]) -> Fold:
    return lambda operation, *operands: function(*operands)


def _divide(operation: Operation, x: Any, y: Any) -> Any:
    quotient = (
        np.abs(x) // np.where(y == 0, 1, np.abs(y)) * (np.sign(x) * np.sign(y)) if x.dtype.kind == "i" else x // y
    )
    return None if np.any(y == 0) else quotient


def _remainder(operation: Operation, x: Any, y: Any) -> Any:
    return None if np.any(y == 0) else np.fmod(x, y)


def _plain(function: Callable[..., Any]) -> Apply:
    return lambda site, operation, operands: function(*operands)


_PLAIN: dict[str, tuple[str, Fold | None]] = {
    "abs": ("abs", _numpy(np.abs)),
    "add": ("add", _numpy(lambda x, y: x | y if x.dtype == bool else x + y)),
    "and": ("bitwise_and", _numpy(np.bitwise_and)),
    "atan2": ("atan2", None),
    "ceil": ("ceil", None),
    "complex": ("complex", None),
    "count_leading_zeros": ("clz", None),
    "divide": ("div", _divide),
    "floor": ("floor", None),
    "imag": ("imag", None),
    "is_finite": ("is_finite", None),
    "maximum": ("max", _numpy(np.maximum)),
    "minimum": ("min", _numpy(np.minimum)),
    "multiply": ("mul", _numpy(np.multiply)),
    "negate": ("neg", _numpy(np.negative)),
    "not": ("bitwise_not", _numpy(np.invert)),
    "or": ("bitwise_or", _numpy(np.bitwise_or)),
    "popcnt": ("population_count", None),
    "power": ("pow", None),
    "real": ("real", None),
    "remainder": ("rem", _remainder),
    "select": ("select", _numpy(np.where)),
    "shift_left": ("shift_left", None),
    "shift_right_arithmetic": ("shift_right_arithmetic", None),
    "shift_right_logical": ("shift_right_logical", None),
    "sign": ("sign", _numpy(np.sign)),
    "subtract": ("sub", _numpy(lambda x, y: x - y)),
    "xor": ("bitwise_xor", _numpy(np.bitwise_xor)),
}

for _name, (_function, _fold) in _PLAIN.items():
    rule(f"stablehlo.{_name}", group=GROUP, fold=_fold, meaning="one `lax` operation")(_plain(getattr(lax, _function)))


def accuracy(operation: Operation) -> Any:
    """The accuracy that an operation asks for, as ``lax`` takes it."""
    asked = operation.get("result_accuracy", None)
    if not isinstance(asked, Accuracy) or asked.mode == "DEFAULT":
        return None
    if asked.mode == "HIGHEST":
        return lax.AccuracyMode.HIGHEST
    return lax.Tolerance(atol=asked.atol, rtol=asked.rtol, ulps=asked.ulps)


def _accurate(function: Callable[..., Any]) -> Apply:
    def apply(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
        asked = accuracy(operation)
        return function(*operands) if asked is None else function(*operands, accuracy=asked)

    return apply


for _name, _function in {
    "cbrt": "cbrt",
    "cosine": "cos",
    "exponential": "exp",
    "exponential_minus_one": "expm1",
    "log": "log",
    "log_plus_one": "log1p",
    "logistic": "logistic",
    "rsqrt": "rsqrt",
    "sine": "sin",
    "sqrt": "sqrt",
    "tan": "tan",
    "tanh": "tanh",
}.items():
    rule(f"stablehlo.{_name}", group=GROUP, meaning="one `lax` operation, with its accuracy")(
        _accurate(getattr(lax, _function))
    )

rule("stablehlo.round_nearest_even", group=GROUP, meaning="`lax.round`")(
    lambda site, operation, operands: lax.round(operands[0], lax.RoundingMethod.TO_NEAREST_EVEN)
)
rule("stablehlo.round_nearest_afz", group=GROUP, meaning="`lax.round`")(
    lambda site, operation, operands: lax.round(operands[0], lax.RoundingMethod.AWAY_FROM_ZERO)
)


_COMPARISONS = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}


@rule(
    "stablehlo.compare",
    group=GROUP,
    fold=lambda operation, x, y: _COMPARISONS[operation["comparison_direction"]](x, y),
    meaning="`lax.eq`, `lax.lt`, …; of a total order `lax.lt_to_p`, …",
)
def _compare(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    x, y = operands
    direction = operation["comparison_direction"]
    if operation.get("compare_type", None) != "TOTALORDER":
        return getattr(lax, direction.lower())(x, y)
    if direction in ("GT", "GE"):
        x, y = y, x
    if direction in ("EQ", "NE"):
        same = lax.eq_to_p.bind(x, y)
        return lax.bitwise_not(same) if direction == "NE" else same
    return (lax.lt_to_p if direction in ("LT", "GT") else lax.le_to_p).bind(x, y)


@rule(
    "stablehlo.clamp",
    group=GROUP,
    meaning="`lax.clamp`",
    fold=lambda _, low, x, high: np.minimum(np.maximum(low, x), high),
)
def _clamp(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return lax.clamp(*operands)


@rule(
    "stablehlo.convert",
    group=GROUP,
    fold=lambda operation, x: x.astype(operation.types[0].dtype),
    meaning="`lax.convert_element_type`",
)
def _convert(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return lax.convert_element_type(operands[0], operation.types[0].dtype)


@rule("stablehlo.bitcast_convert", group=GROUP, meaning="`lax.bitcast_convert_type`")
def _bitcast_convert(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return lax.bitcast_convert_type(operands[0], operation.types[0].dtype)


@rule("stablehlo.reduce_precision", group=GROUP, meaning="`lax.reduce_precision`")
def _reduce_precision(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return lax.reduce_precision(operands[0], operation["exponent_bits"], operation["mantissa_bits"])
