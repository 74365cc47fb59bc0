"""Calls of a pipeline before it is shown: its functions and weights are read and checked, its programs compiled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from obmlite.serving.interface import Array, Interface, filled
from obmlite.serving.status import Code, ServingError

__all__ = ["warm_up"]


def warm_up(interface: Interface, examples: Sequence[Mapping[str, Any]], sizes: Sequence[int] = ()) -> int:
    """Calls a pipeline with its examples, each as a batch of each size that will come; with zeros if it has none.

    Args:
      interface: the pipeline.
      examples: for each its arguments by name, as :attr:`obmlite.Model.examples` has them.
      sizes: of batches that will come where any size goes; examples as they are if empty.

    Returns:
      How many calls it were.

    Raises:
      ServingError: a call failed. That a pipeline does not take the zeros that were tried is no failure.
    """
    calls = 0
    for arguments in examples:
        for inputs in _sized(interface, interface.named(arguments), interface.batch_sizes or sizes):
            interface.run(inputs)
            calls += 1
    if examples:
        return calls
    for zeros in interface.zeros():  # they have each fixed size
        for inputs in _sized(interface, zeros, () if interface.batch_sizes else sizes):
            try:
                interface.run(inputs)
            except ServingError as error:
                if error.code is not Code.INVALID_ARGUMENT:
                    raise
            else:
                calls += 1
    return calls


def _sized(interface: Interface, inputs: Mapping[str, Array], sizes: Sequence[int]) -> Iterator[Mapping[str, Array]]:
    if not interface.divisible or not sizes:
        yield inputs
        return
    for size in sizes:
        yield {n: filled(a[:size], size) if n in interface.rows else a for n, a in inputs.items()}
