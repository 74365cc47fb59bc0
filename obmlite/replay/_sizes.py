"""Which operations need numbers while tracing, a shape say, that are in the content of an array.

What is computed from an array's content is content, but for what hands on what it is given (calls, loops, branches,
custom calls): of that nothing is said here, and tracing it finds out.
"""

from __future__ import annotations

from collections.abc import Mapping

from obmlite.replay import _slices
from obmlite.replay._program import Operation, Program

__all__ = ["of_content"]

_NUMBERS: Mapping[str, tuple[int, ...]] = {
    "stablehlo.dynamic_broadcast_in_dim": (1,),
    "stablehlo.dynamic_conv": (2,),
    "stablehlo.dynamic_gather": (2,),
    "stablehlo.dynamic_iota": (0,),
    "stablehlo.dynamic_pad": (2, 3, 4),
    "stablehlo.dynamic_reshape": (1,),
    "stablehlo.real_dynamic_slice": (3,),
}
"""Operands that have to be known while tracing, of operations that have some."""

_HANDS_ON = frozenset(
    {
        "func.call",
        "stablehlo.after_all",
        "stablehlo.case",
        "stablehlo.composite",
        "stablehlo.create_token",
        "stablehlo.custom_call",
        "stablehlo.get_tuple_element",
        "stablehlo.if",
        "stablehlo.optimization_barrier",
        "stablehlo.tuple",
        "stablehlo.while",
    }
)


def of_content(program: Program, function: str) -> frozenset[Operation]:
    """Operations that a function reaches, and that need numbers which are in the content of its arguments."""
    main = program.functions.get(function)
    if main is None:
        return frozenset()
    found: set[Operation] = set()
    given = {function: {n for n, name in enumerate(main.constants) if name is None}}
    pending = [function]
    while pending:
        name = pending.pop()
        body = program.functions[name].body
        content = {body.arguments[n] for n in given[name]}
        for operation in body.walk():
            if _needs(program, operation, content):
                found.add(operation)
            taken = {n for n, operand in enumerate(operation.operands) if operand in content}
            callee = operation.get("callee", None) or operation.get("decomposition", None)
            if callee in program.functions and len(program.functions[callee].constants) == len(operation.operands):
                known = given.setdefault(callee, set())
                if not taken <= known:
                    known |= taken
                    pending.append(callee)
            elif taken and operation.name not in _HANDS_ON and operation.name != "stablehlo.get_dimension_size":
                content.update(operation.results)
    return frozenset(found)


def _needs(program: Program, operation: Operation, content: set[int]) -> bool:
    if operation.name not in _NUMBERS:
        return False
    needed = [operation.operands[n] for n in _NUMBERS[operation.name]]
    if operation.name == "stablehlo.real_dynamic_slice" and None in operation.types[0].shape:
        # Where it starts may be anything, if how large it is does not depend on that.
        cut = _slices.look(program, operation)
        needed += operation.operands[1:3] if cut is None else (cut.low, cut.shape, cut.sizes)
    return any(value in content for value in needed)
