"""Which operations a function reaches, and which of them cannot be replayed, without tracing anything.

Only known values are followed: those on the platform, which decide what branches of a module for several platforms
are ever run.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from obmlite.errors import UnsupportedFormatError
from obmlite.replay import _sizes
from obmlite.replay._interpreter import MAX_STEPS, PLATFORM_INDEX
from obmlite.replay._program import Block, Operation, Program, over
from obmlite.replay._table import COMPOSITES, CUSTOM_CALLS, REFUSED, RULES

__all__ = ["Reason", "reached", "reasons", "refusal"]


@dataclasses.dataclass(frozen=True, slots=True)
class Reason:
    """Why a function is not replayable.

    Attributes:
      operation: its name, with the target of a custom call.
      count: how often it stands in the module.
      reason: why it is not replayed.
    """

    operation: str
    count: int
    reason: str

    def __str__(self) -> str:
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{self.operation}{times}: {self.reason}"


def refusal(found: Sequence[Reason]) -> UnsupportedFormatError:
    """The error for a function that is not replayable."""
    shown = "; ".join(map(str, found[:5]))
    return UnsupportedFormatError(
        "The function holds operations that are not replayed.",
        field="operations",
        expected="those of docs/replay.md",
        found=shown + (f"; … ({len(found)} in all)" if len(found) > 5 else ""),
        fix='engine="export" or "rebuild"; custom_calls= for the target of a custom call',
    )


def reasons(program: Program, function: str, given: Collection[str], platform_index: int | None) -> list[Reason]:
    """What keeps a function from being replayed."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    of_content = _sizes.of_content(program, function)
    for operation in reached(program, function, platform_index, given):
        reason = _reason(operation, program, given)
        if reason is None and operation in of_content:
            reason = "a size depends on the content of an array"
        if reason is not None:
            counts[operation.title, reason] += 1
    return [Reason(name, count, reason) for (name, reason), count in sorted(counts.items())]


def reached(
    program: Program, function: str, platform_index: int | None, given: Collection[str] = ()
) -> Iterator[Operation]:
    """Each operation that a function reaches, once.

    Raises:
      UnsupportedFormatError: there is too much to look at.
    """
    if function in program.functions:
        yield from _Walk(program, platform_index, given).run(function)


class _Walk:
    def __init__(self, program: Program, platform_index: int | None, given: Collection[str]) -> None:
        self.program = program
        self.index = platform_index
        self.given = given

    def run(self, function: str) -> Iterator[Operation]:
        main = self.program.functions[function]
        start = tuple(self.index if name == PLATFORM_INDEX else None for name in main.constants)
        pending = [(function, start)]
        met, told = set(pending), set()
        steps = 0
        while pending:
            name, known = pending.pop()
            body = self.program.functions[name].body
            values = {n: v for n, v in zip(body.arguments, known, strict=True) if v is not None}
            for operation, callee in self.block(body, values):
                steps += 1
                if steps > MAX_STEPS:  # functions that count, by what they know when they call themselves
                    raise over("operations to look at", MAX_STEPS)
                if operation not in told:
                    told.add(operation)
                    yield operation
                if callee is not None and callee not in met and callee[0] in self.program.functions:
                    met.add(callee)
                    pending.append(callee)

    def block(self, block: Block, values: dict[int, int]) -> Iterator[tuple[Operation, Any]]:
        """Operations of a block and of its regions, with the function that each calls and what it knows."""
        blocks = [iter(block.operations)]
        while blocks:
            operation = next(blocks[-1], None)
            if operation is None:
                blocks.pop()
                continue
            yield operation, self.callee(operation, values)
            if operation.name in _SAME and operation.operands[0] in values:
                values[operation.results[0]] = values[operation.operands[0]]
            chosen = _branch(operation, values)
            if chosen is not None:
                # JAX looks a branch up by the platform's index: a case of constants.
                for result, returned in zip(operation.results, operation.regions[chosen].returns, strict=True):
                    if (number := self.number(returned)) is not None:
                        values[result] = number
            regions = operation.regions if chosen is None else (operation.regions[chosen],)
            blocks.extend(iter(region.operations) for region in reversed(regions))

    def number(self, value: int) -> int | None:
        operation = self.program.definitions.get(value)
        if operation is None or operation.name != "stablehlo.constant":
            return None
        found = operation["value"]
        return int(found) if isinstance(found, np.ndarray) and found.ndim == 0 and found.dtype.kind in "iu" else None

    def callee(self, operation: Operation, values: dict[int, int]) -> tuple[str, tuple[int | None, ...]] | None:
        if operation.name == "func.call":
            name = operation["callee"]
        elif operation.name == "stablehlo.composite" and operation["name"] not in COMPOSITES:
            name = operation["decomposition"]
        elif operation.name == "stablehlo.custom_call" and operation.get("called_computations", ()):
            name = operation["called_computations"][0]
        else:
            return None
        function = self.program.functions.get(name)
        if function is None or len(function.body.arguments) != len(operation.operands):
            return name, (None,) * (0 if function is None else len(function.body.arguments))
        return name, tuple(map(values.get, operation.operands))


_SAME = frozenset({"stablehlo.convert", "stablehlo.reshape"})


def _branch(operation: Operation, values: dict[int, int]) -> int | None:
    if operation.name != "stablehlo.case" or operation.operands[0] not in values:
        return None
    index, count = values[operation.operands[0]], len(operation.regions)
    return index if 0 <= index < count else count - 1


def _reason(operation: Operation, program: Program, given: Collection[str]) -> str | None:
    if operation.name == "stablehlo.custom_call":
        target = operation["call_target_name"]
        if target in given:
            return None
        rule = CUSTOM_CALLS.get(target)
    elif operation.name == "stablehlo.composite":
        rule = COMPOSITES.get(operation["name"])
        if rule is None:
            found = operation["decomposition"] in program.functions
            return None if found else "its decomposition is not in the module"
    else:
        rule = RULES.get(operation.name)
    for kind in (*operation.operand_types, *operation.types) if rule is not None else ():
        if kind.dtype is None and not kind.text.startswith(("!stablehlo.token", "tuple<")):
            return f"of type {kind.text}"
    if rule is None:
        return REFUSED.get(operation.name, "there is no rule for it")
    return rule.refuse(operation) if rule.refuse is not None else None
