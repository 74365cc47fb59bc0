"""Well-known region bodies, recognised by what they compute.

A region's result is written as an expression over its arguments, ``("add", 0, 1)``, in which numbers are arguments and
constants are numpy scalars. Only what is recognised for sure is; any other body is replayed as it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from obmlite.replay._program import Block, Operation

__all__ = ["combiner", "comparator_keys", "comparison", "expressions", "extremum"]

Around = Callable[[int], Any]

_MAX_NODES = 200

_COMMUTATIVE = frozenset({"add", "multiply", "minimum", "maximum", "and", "or", "xor"})


def expressions(block: Block, around: Around) -> tuple[Any, ...] | None:
    """What a region returns, as expressions; None for one that holds regions, or takes more than constants from around.

    Args:
      block: the region's.
      around: gives the values around it.
    """
    found: dict[int, Any] = dict(zip(block.arguments, range(len(block.arguments)), strict=True))

    def look(number: int) -> Any:
        return found[number] if number in found else _constant(around(number))

    if len(block.operations) > _MAX_NODES:
        return None
    for operation in block.operations:
        operands = [look(n) for n in operation.operands]
        if operation.regions or len(operation.results) != 1 or None in operands:
            return None
        found[operation.results[0]] = _expression(operation, operands)
    returned = tuple(look(n) for n in block.returns)
    return None if None in returned else returned


def _constant(value: Any) -> Any:
    return ("constant", value.tobytes()) if isinstance(value, np.ndarray) and value.ndim == 0 else None


def _expression(operation: Operation, operands: list[Any]) -> Any:
    name = operation.name.removeprefix("stablehlo.")
    if name == "constant":
        return _constant(operation["value"]) or ("constant", None)
    if name == "compare":
        order = "TOTALORDER" if operation.get("compare_type", None) == "TOTALORDER" else ""
        return (name, operation["comparison_direction"], order, *operands)
    if name == "convert" and operation.operand_types == operation.types:
        return operands[0]
    if operation.attributes and name not in _COMMUTATIVE:
        return (name, object(), *operands)  # equal to nothing else
    return (name, *operands)


def combiner(block: Block, around: Around) -> str | None:
    """The operation that a body of two arguments is: ``add``, ``maximum``, …; ``second`` if it returns that."""
    found = expressions(block, around)
    if found is None or len(found) != 1 or len(block.arguments) != 2:
        return None
    (result,) = found
    if result == 1:
        return "second"
    if isinstance(result, tuple) and len(result) == 3 and result[0] in _COMMUTATIVE and set(result[1:]) == {0, 1}:
        return str(result[0])
    return None


def comparison(block: Block, around: Around) -> str | None:
    """The direction of a body that compares its first argument with its second, and does no more."""
    found = expressions(block, around)
    if found is None or len(found) != 1 or len(block.arguments) != 2:
        return None
    (result,) = found
    plain = isinstance(result, tuple) and result[0] == "compare" and result[2:] == ("", 0, 1)
    return str(result[1]) if plain else None


def extremum(block: Block, around: Around) -> str | None:
    """``argmax`` or ``argmin`` for a body that keeps the greater or lesser of two values with its index.

    Its arguments are a value and its index, and another two; NaNs win, and of equal values the first index.
    """
    found = expressions(block, around)
    for direction, name in (("GT", "argmax"), ("LT", "argmin")):
        better = ("or", ("compare", direction, "", 0, 2), ("compare", "NE", "", 0, 0))
        first = ("and", ("compare", "EQ", "", 0, 2), ("compare", "LT", "", 1, 3))
        if found == (("select", better, 0, 2), ("select", ("or", better, first), 1, 3)):
            return name
    return None


def comparator_keys(block: Block, around: Around) -> int | None:
    """How many operands ``lax.sort`` has for keys to compare as a body does; None if none has.

    Arguments come in pairs, those of the first operand first. ``lax.sort`` compares numbers by less-than; floats by the
    total order, zeros being equal and likewise NaNs; complex ones by their parts; one key after the other.
    """
    found = expressions(block, around)
    if found is None or len(found) != 1:
        return None
    kinds = block.types[::2]
    for count in range(1, len(kinds) + 1):
        wanted = _less(block, count)
        if wanted is not None and found[0] in wanted:
            return count
    return None


def _less(block: Block, count: int) -> list[Any] | None:
    """How comparators of so many keys are written."""
    pairs: list[tuple[Any, Any, str]] = []
    for key in range(count):
        dtype = block.types[2 * key].dtype
        if dtype is None:
            return None
        left, right = 2 * key, 2 * key + 1
        if dtype.kind == "c":
            part = np.dtype(np.float32 if dtype.itemsize == 8 else np.float64)
            for name in ("real", "imag"):
                pairs.append((_canonical((name, left), part), _canonical((name, right), part), "TOTALORDER"))
        elif dtype.kind in "iub" or dtype.name in ("int2", "int4", "uint2", "uint4"):
            pairs.append((left, right, ""))
        else:
            pairs.append((_canonical(left, dtype), _canonical(right, dtype), "TOTALORDER"))
    forms: list[Any] = [None]
    for x, y, order in reversed(pairs):
        less, equal = ("compare", "LT", order, x, y), ("compare", "EQ", order, x, y)
        if order and isinstance(x, tuple):
            equals = [equal, ("compare", "EQ", "", x, y)]
        else:
            equals = [equal]
        forms = [less if rest is None else ("or", less, ("and", same, rest)) for rest in forms for same in equals]
    return forms


def _canonical(x: Any, dtype: np.dtype[Any]) -> Any:
    zero, nan = (("constant", np.asarray(value, dtype).tobytes()) for value in (0, np.nan))
    flat = ("select", ("compare", "EQ", "", x, zero), zero, x)
    return ("select", ("compare", "NE", "", x, x), nan, flat)
