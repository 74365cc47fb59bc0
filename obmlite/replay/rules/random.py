"""Random bits and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax import lax

from obmlite.replay._interpreter import Site
from obmlite.replay._program import Operation
from obmlite.replay._table import known_ints, rule

GROUP = "random"

_ALGORITHMS = {
    "DEFAULT": lax.RandomAlgorithm.RNG_DEFAULT,
    "THREE_FRY": lax.RandomAlgorithm.RNG_THREE_FRY,
    "PHILOX": lax.RandomAlgorithm.RNG_PHILOX,
}


def bits(operation: Operation, state: Any, shape: Sequence[int], algorithm: str) -> Any:
    """New state and random bits of ``rng_bit_generator``."""
    return lax.rng_bit_generator(state, tuple(shape), operation.types[1].dtype, _ALGORITHMS[algorithm])


def _other_state(operation: Operation) -> str | None:
    kind = operation.operand_types[0]
    return None if kind.shape in ((2,), (4,)) else f"with a state of type {kind.text}"


@rule("stablehlo.rng_bit_generator", group=GROUP, refuse=_other_state, meaning="`lax.rng_bit_generator`")
def _rng_bit_generator(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return bits(operation, operands[0], operation.types[1].sizes, operation["rng_algorithm"])


@rule(
    "stablehlo.rng",
    group=GROUP,
    refuse=lambda operation: None if operation["rng_distribution"] == "UNIFORM" else "of a normal distribution",
    meaning="`lax.rng_uniform`",
)
def _rng(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    low, high, shape = operands
    return lax.rng_uniform(low, high, known_ints(operation, shape, "shape"))
