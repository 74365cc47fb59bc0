"""``stablehlo.while`` as the loop that it was: one with a known number of steps is a ``lax.scan``.

JAX lowers ``scan`` to a while that carries whole arrays: those that are scanned over unchanged, those that are stacked
with a row updated in each step. What a body does with each of its arguments tells them apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from obmlite.replay import _slices
from obmlite.replay._markers import affine
from obmlite.replay._program import Block, Operation, Program

__all__ = ["Loop", "look"]

FORWARD, BACKWARD = 1, -1

_MAX_OPERATIONS = 20_000
"""Operations of a body that are looked at, with what it calls; a longer one is carried as it is."""


@dataclasses.dataclass(frozen=True, slots=True)
class Loop:
    """What a while is.

    Attributes:
      invariant: positions of arguments that no step changes.
      counter: position of the counter, and the numbers from which and up to which it counts; None if it does not.
      rows: for each position of an array that is read one row a step, the direction.
      stacked: the same for those that are written so.
    """

    invariant: frozenset[int]
    counter: tuple[int, int, int] | None = None
    rows: dict[int, int] = dataclasses.field(default_factory=dict)
    stacked: dict[int, int] = dataclasses.field(default_factory=dict)


def look(program: Program, operation: Operation, starts: Sequence[Any], around: Callable[[int], Any]) -> Loop:
    """What a while is.

    Args:
      program: that it is of.
      operation: the while.
      starts: its operands.
      around: gives values around it.
    """
    condition, body = operation.regions
    invariant = frozenset(n for n, value in enumerate(body.arguments) if body.returns[n] == value)
    counted = _counter(condition, starts, around, invariant)
    if counted is None:
        return Loop(invariant)
    position, start, stop = counted
    seen = _Body(program, body, starts, around, position)
    try:
        returned = seen.run(body, [seen.argument(n) for n in range(len(body.arguments))])
    except _TooLong:
        returned = [None] * len(body.returns)
    if returned[position] != ("affine", 1, 1):
        return Loop(invariant)
    length = stop - start
    offsets = {(1, -start): FORWARD, (-1, stop - 1): BACKWARD}
    rows: dict[int, int] = {}
    stacked: dict[int, int] = {}
    for n, value in enumerate(starts):
        shape = np.shape(value) if isinstance(value, np.ndarray) or hasattr(value, "shape") else ()
        if not shape or shape[0] != length or n in seen.escaped:
            continue
        read, written = seen.read.get(n, set()), seen.written.get(n, set())
        (direction, *others) = {offsets.get(index) for index in read | written} or {None}
        if direction is None or others:
            continue
        if n in invariant and not written:
            rows[n] = direction
        elif not read and returned[n] == ("written", n):
            stacked[n] = direction
    # A scan goes one way: a loop that reads one array forward and another backward keeps the latter whole.
    backward = BACKWARD in {**rows, **stacked}.values() and FORWARD not in {**rows, **stacked}.values()
    way = BACKWARD if backward else FORWARD
    return Loop(
        invariant,
        counted,
        {n: d for n, d in rows.items() if d == way},
        {n: d for n, d in stacked.items() if d == way},
    )


def _counter(
    condition: Block, starts: Sequence[Any], around: Callable[[int], Any], invariant: frozenset[int]
) -> tuple[int, int, int] | None:
    """Position, start and end of a condition ``counter < end``."""
    *others, last = condition.operations or (None,)
    if last is None or last.name != "stablehlo.compare" or condition.returns != last.results:
        return None
    if last["comparison_direction"] != "LT" or any(o.name != "stablehlo.constant" for o in others):
        return None
    constants = {o.results[0]: o["value"] for o in others}
    counter, end = last.operands
    if counter not in condition.arguments:
        return None
    position = condition.arguments.index(counter)
    if end in condition.arguments:
        index = condition.arguments.index(end)
        stop = starts[index] if index in invariant else None
    else:
        stop = constants.get(end, around(end))
    first, last_number = _number(starts[position]), _number(stop)
    if first is None or last_number is None:
        return None
    return position, first[2], max(first[2], last_number[2])


class _TooLong(Exception):  # noqa: N818
    pass


_Value = tuple[Any, ...] | None
"""``("array", n)``, ``("written", n)``: the argument n, as it was given or with a row written; ``("affine", a, b)``: a
times the counter, and b; None: anything else."""


class _Body:
    """What a body does with its arguments, through the functions that it calls."""

    def __init__(
        self, program: Program, body: Block, starts: Sequence[Any], around: Callable[[int], Any], counter: int
    ) -> None:
        self.program = program
        self.starts = starts
        self.around = around
        self.counter = counter
        self.escaped: set[int] = set()
        self.read: dict[int, set[tuple[int, int]]] = {}
        self.written: dict[int, set[tuple[int, int]]] = {}
        self.count = 0
        self.invariant = frozenset(n for n, value in enumerate(body.arguments) if body.returns[n] == value)

    def argument(self, n: int) -> _Value:
        if n == self.counter:
            return ("affine", 1, 0)
        number = _number(self.starts[n]) if n in self.invariant else None
        return ("array", n) if number is None else number

    def run(self, block: Block, arguments: Sequence[_Value]) -> list[_Value]:
        values: dict[int, _Value] = dict(zip(block.arguments, arguments, strict=True))

        def find(number: int) -> _Value:
            return values[number] if number in values else _number(self.around(number))

        for operation in block.operations:
            self.count += 1
            if self.count > _MAX_OPERATIONS:
                raise _TooLong
            operands = [find(number) for number in operation.operands]
            cut = _slices.look(self.program, operation)
            if operation.name == "func.call":
                results = self.run(self.program.functions[operation["callee"]].body, operands)
            else:
                starts = None if cut is None else [find(number) for number in cut.starts]
                results = [self.operation(operation, operands, starts)] + [None] * (len(operation.results) - 1)
                for region in operation.regions:
                    self.capture(region, values)
            values.update(zip(operation.results, results, strict=False))
        return [find(number) for number in block.returns]

    def operation(self, operation: Operation, operands: Sequence[_Value], starts: Sequence[_Value] | None) -> _Value:
        if operation.name == "stablehlo.constant":
            return _number(operation["value"])
        first = operands[0] if operands else None
        if first is not None and first[0] == "array":
            index = _row(operation, operands, starts)
            if index is not None and operation.name != "stablehlo.dynamic_update_slice":
                self.read.setdefault(first[1], set()).add(index)
                return None
            if index is not None and (operands[1] is None or operands[1][0] == "affine"):
                self.written.setdefault(first[1], set()).add(index)
                return ("written", first[1])
        for operand in operands:
            self.escape(operand)
        if len(operation.results) != 1:
            return None
        scales = [(o[1], o[2]) if o is not None and o[0] == "affine" else None for o in operands]
        found = affine(operation, scales) if scales else None
        return None if found is None else ("affine", *found)

    def escape(self, value: _Value) -> None:
        if value is not None and value[0] in ("array", "written"):
            self.escaped.add(value[1])

    def capture(self, region: Block, values: dict[int, _Value]) -> None:
        for operation in region.walk():
            for number in operation.operands:
                self.escape(values.get(number))
        for number in region.returns:
            self.escape(values.get(number))


def _number(value: Any) -> _Value:
    small = isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "iu"
    return ("affine", 0, int(value)) if small else None


def _row(operation: Operation, operands: Sequence[_Value], starts: Sequence[_Value] | None) -> tuple[int, int] | None:
    """The index of the one row along the first dimension that a dynamic (update) slice is of.

    Open sizes are taken for equal ones: the run, which knows them, takes the whole array where they are not.
    """
    if starts is not None:
        sizes = operation.types[0].shape
    elif operation.name == "stablehlo.dynamic_slice":
        sizes, starts = operation["slice_sizes"], operands[1:]
    elif operation.name == "stablehlo.dynamic_update_slice":
        sizes, starts = operation.operand_types[1].shape, operands[2:]
    else:
        return None
    shape = operation.operand_types[0].shape
    if not starts or sizes[0] != 1 or sizes[1:] != shape[1:] or any(s != ("affine", 0, 0) for s in starts[1:]):
        return None
    index = starts[0]
    return (index[1], index[2]) if index is not None and index[0] == "affine" and index[1] else None
