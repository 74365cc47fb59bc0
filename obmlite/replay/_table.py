"""The table of rules: what each operation becomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from obmlite.errors import ArgumentError, UnsupportedFormatError

if TYPE_CHECKING:
    from obmlite.replay._interpreter import Site
    from obmlite.replay._program import Operation

__all__ = [
    "COMPOSITES",
    "CUSTOM_CALLS",
    "REFUSED",
    "RULES",
    "Rule",
    "assertion_failed",
    "known_ints",
    "rule",
    "unsupported",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """How an operation is replayed.

    Attributes:
      group: under which the specification lists it.
      apply: gives its result or results for its operands, as arrays or tracers.
      fold: the same in numpy for known integers and booleans; None where nothing is gained by it.
      refuse: says which form of it is not replayed, None for those that are.
      meaning: what it becomes, for the documentation.
      moves: whether it only moves elements of its first operand, so that a splat stays one.
    """

    group: str
    apply: Callable[[Site, Operation, Sequence[Any]], Any]
    fold: Callable[..., Any] | None = None
    refuse: Callable[[Operation], str | None] | None = None
    meaning: str = ""
    moves: bool = False


RULES: dict[str, Rule] = {}
"""By the operation's name."""

CUSTOM_CALLS: dict[str, Rule] = {}
"""By the target of a ``stablehlo.custom_call``."""

COMPOSITES: dict[str, Rule] = {}
"""By the name of a ``stablehlo.composite``; the others are replayed as their decompositions."""


_COLLECTIVE = "a collective: it belongs to a program of several devices (`shard_map`, `pmap`)"
_TRANSFER = "a transfer from or to the host or another program"
_UNUSED = "JAX makes none, and has no primitive for it"
_QUANTIZED = "of quantized types, which JAX does not have"

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "stablehlo.all_gather",
            "stablehlo.all_reduce",
            "stablehlo.all_to_all",
            "stablehlo.collective_broadcast",
            "stablehlo.collective_permute",
            "stablehlo.collective_reduce",
            "stablehlo.cross-replica-sum",
            "stablehlo.partition_id",
            "stablehlo.reduce_scatter",
            "stablehlo.replica_id",
            "sdy.manual_computation",
        ),
        _COLLECTIVE,
    ),
    **dict.fromkeys(("stablehlo.infeed", "stablehlo.outfeed", "stablehlo.recv", "stablehlo.send"), _TRANSFER),
    **dict.fromkeys(
        (
            "stablehlo.async_done",
            "stablehlo.async_start",
            "stablehlo.batch_norm_grad",
            "stablehlo.batch_norm_inference",
            "stablehlo.batch_norm_training",
            "stablehlo.einsum",
            "stablehlo.set_dimension_size",
            "stablehlo.torch_index_select",
            "stablehlo.unary_einsum",
        ),
        _UNUSED,
    ),
    **dict.fromkeys(("stablehlo.uniform_dequantize", "stablehlo.uniform_quantize"), _QUANTIZED),
}
"""Operations of StableHLO that are not replayed, and why."""


def rule(
    *names: str,
    group: str,
    fold: Callable[..., Any] | None = None,
    refuse: Callable[[Operation], str | None] | None = None,
    meaning: str = "",
    moves: bool = False,
    table: dict[str, Rule] | None = None,
) -> Callable[[Any], Any]:
    """Enters a function into a table, by default :data:`RULES`, under each of the names."""

    def enter(apply: Any) -> Any:
        for name in names:
            (RULES if table is None else table)[name] = Rule(group, apply, fold, refuse, meaning, moves)
        return apply

    return enter


def unsupported(operation: Operation, reason: str) -> UnsupportedFormatError:
    """The error for an operation that cannot be replayed."""
    return UnsupportedFormatError(
        "The function holds an operation that is not replayed.",
        field="operation",
        expected="operations of docs/replay.md",
        found=f"{operation.title}: {reason}",
        fix='engine="export" or "rebuild"',
    )


def known_ints(operation: Operation, value: Any, what: str) -> tuple[int, ...]:
    """The numbers of an operand that has to be known while tracing, such as a shape."""
    if not isinstance(value, np.ndarray):
        raise unsupported(operation, f"its {what} depends on the content of an array")
    return tuple(int(number) for number in value.reshape(-1))


def assertion_failed(message: str, numbers: Mapping[int, Any]) -> ArgumentError:
    """The error for shapes that the module's own checks refuse."""
    for index, number in numbers.items():
        message = message.replace(f"{{{index}}}", str(number))
    return ArgumentError("The shapes of the arguments are not those of the function.", found=message[:1000])
