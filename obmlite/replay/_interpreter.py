"""Runs a program's operations by their rules, on arrays or tracers.

Values that are known while tracing (constants, dimensions, the platform) are numpy arrays, everything else is JAX's.
Integers that are computed from known ones stay known, so that shapes that a module computes are shapes to JAX.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from obmlite.errors import ArgumentError, UnsupportedFormatError
from obmlite.replay import _slices
from obmlite.replay._markers import Marker, arithmetic, plain, step
from obmlite.replay._program import MAX_TENSOR_BYTES, Block, Operation, Program, TensorType, over
from obmlite.replay._special import Special, Specials, derived
from obmlite.replay._table import RULES, Rule, unsupported

__all__ = ["MAX_CALL_DEPTH", "MAX_FOLDED", "MAX_STEPS", "Replay", "Site", "is_known"]

MAX_CALL_DEPTH = 64
"""Calls and regions within each other."""

MAX_STEPS = 2_000_000
"""Operations that one trace runs: a function that is called often counts each time."""

MAX_FOLDED = 4096
"""Elements of a known value that is computed from others."""

PLATFORM_INDEX = "_platform_index"

Environment = dict[int, Any]


def is_known(value: Any) -> bool:
    """Whether a value is known while tracing."""
    return isinstance(value, np.ndarray)


class Replay:
    """One run of a program.

    Args:
      program: what to run.
      custom_calls: functions of the user by target: ``call(*operands, **attributes)``.
      special: its special functions.
      axes: mesh axes over which its arguments vary, inside ``shard_map``.
    """

    def __init__(
        self,
        program: Program,
        custom_calls: Mapping[str, Callable[..., Any]],
        special: Specials,
        axes: frozenset[str] = frozenset(),
    ) -> None:
        self.program = program
        self.custom_calls = custom_calls
        self.special = special
        self.axes = axes
        self._depth = 0
        self._steps = 0

    def call(self, name: str, arguments: Sequence[Any]) -> list[Any]:
        """Runs a function of the module."""
        if name not in self.program.functions:
            raise UnsupportedFormatError("The module calls a function that it does not hold.", found=name)
        return self.block(self.program.functions[name].body, arguments, {})

    def block(self, block: Block, arguments: Sequence[Any], around: Environment) -> list[Any]:
        """Runs a block's operations, and gives what it returns."""
        if self._depth >= MAX_CALL_DEPTH:
            raise over("calls within calls", MAX_CALL_DEPTH)
        self._depth += 1
        try:
            values = dict(around)
            values.update(zip(block.arguments, arguments, strict=True))
            spread: Environment = {}
            for operation in block.operations:
                self._steps += 1
                if self._steps > MAX_STEPS:
                    raise over("operations to run", MAX_STEPS)
                first = operation.results[0] if operation.results else -1
                if first in self.special.within:
                    continue
                special = self.special.values.get(first)
                results = self.operation(operation, values, spread) if special is None else self._run(special, values)
                values.update(zip(operation.results, results, strict=True))
            return [values[value] for value in block.returns]
        finally:
            self._depth -= 1

    def operation(self, operation: Operation, values: Environment, spread: Environment) -> Sequence[Any]:
        """Runs one operation.

        Args:
          operation: to run.
          values: those that it may take.
          spread: splats that became arrays in this block, added to.
        """
        name = operation.name
        rule = RULES.get(name)
        if rule is None:
            raise unsupported(operation, "there is no rule for it")
        operands = [values[operand] for operand in operation.operands]
        if rule.fold is not None:
            result = _fold(rule, operation, operands)
            if result is not None:
                return (result,)
        marked = any(isinstance(operand, Marker) for operand in operands)
        if marked and (row := step(operation, operands, Site(self, values).cut(operation))) is not None:
            return (row,)
        with self._width(operation):
            given = operands
            if name not in _WITH_KNOWN:
                given = [self._ready(n, plain(v), spread) for n, v in zip(operation.operands, operands, strict=True)]
            found = rule.apply(Site(self, values), operation, given)
        results = found if isinstance(found, (list, tuple)) else (found,)
        if name in _WITH_MARKERS:
            return results
        for result, kind in zip(results, operation.types, strict=True):
            _check(operation, result, kind)
        if marked and len(results) == 1:
            return (arithmetic(operation, operands, results[0]),)
        return results

    def _run(self, special: Special, around: Environment) -> Sequence[Any]:
        """A special function, by its operations, with its own derivative."""
        argument = plain(around[special.argument])
        last = special.operations[-1]

        def run(argument: Any) -> Any:
            values: Environment = {**around, special.argument: argument}
            spread: Environment = {}
            for operation in special.operations:
                values.update(zip(operation.results, self.operation(operation, values, spread), strict=True))
            return traceable(values[last.results[0]])

        if is_known(argument):  # nothing to derive by
            return (run(argument),)
        with self._width(last):
            return (derived(special.function, run)(argument),)

    def _ready(self, number: int, value: Any, spread: Environment) -> Any:
        if not isinstance(value, np.ndarray) or value.size <= 1 or any(value.strides):
            return value
        if number not in spread:
            spread[number] = traceable(value)
        return spread[number]

    def _width(self, operation: Operation) -> contextlib.AbstractContextManager[Any]:
        """JAX's 64-bit mode where an operation needs it, as a module of the 32-bit mode has some inside (threefry)."""
        if jax.config.jax_enable_x64 or not any(t.wide for t in (*operation.types, *operation.operand_types)):
            return contextlib.nullcontext()
        wide: contextlib.AbstractContextManager[Any] = jax.enable_x64(True)
        return wide


class Site:
    """Where in a run an operation stands: what its rule may ask for."""

    __slots__ = ("_replay", "_values")

    def __init__(self, replay: Replay, values: Environment) -> None:
        self._replay = replay
        self._values = values

    @property
    def custom_calls(self) -> Mapping[str, Callable[..., Any]]:
        """Functions of the user by target."""
        return self._replay.custom_calls

    @property
    def program(self) -> Program:
        """What is run."""
        return self._replay.program

    @property
    def axes(self) -> frozenset[str]:
        """Mesh axes over which the arguments vary, inside ``shard_map``."""
        return self._replay.axes

    def value(self, number: int) -> Any:
        """A value around the operation; None if it is not one of those."""
        return self._values.get(number)

    def cut(self, operation: Operation) -> tuple[tuple[int, ...], list[Any]] | None:
        """Sizes and starts of a slice as ``lax.dynamic_slice`` takes it; None for other operations."""
        if operation.name == "stablehlo.dynamic_slice":
            return operation["slice_sizes"], [self._values[number] for number in operation.operands[1:]]
        found = _slices.look(self.program, operation)
        if found is None:
            return None
        low, shape, sizes = (self._values[number] for number in (found.low, found.shape, found.sizes))
        if not (is_known(low) and is_known(shape) and is_known(sizes)):
            return None
        if low.any() or tuple(shape) != np.shape(plain(self._values[operation.operands[0]])):
            return None
        return tuple(map(int, sizes)), [self._values[number] for number in found.starts]

    def call(self, name: str, arguments: Sequence[Any]) -> list[Any]:
        """Runs a function of the module."""
        return self._replay.call(name, arguments)

    def run(self, block: Block, arguments: Sequence[Any]) -> list[Any]:
        """Runs a region now: what is known stays known."""
        return self._replay.block(block, arguments, self._values)

    def region(self, block: Block) -> Callable[..., tuple[Any, ...]]:
        """A region as a function that JAX can trace, of its arguments; it sees the values around it."""
        return lambda *arguments: tuple(map(traceable, self.run(block, arguments)))


_WITH_MARKERS = frozenset({"func.call", "stablehlo.composite"})
"""What hands operands and results on as they are."""

_WITH_KNOWN = _WITH_MARKERS | {"stablehlo.while", "stablehlo.custom_call"}
"""What takes operands as they are, so that what is known stays known, and makes arrays of them by itself."""


def traceable(value: Any) -> Any:
    """A value as JAX may have it: a splat is a broadcast, not as many elements."""
    value = plain(value)
    if not isinstance(value, np.ndarray) or value.size <= 1 or any(value.strides):
        return value
    return lax.full(value.shape, value.reshape(-1)[0], value.dtype)


def _foldable(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "iub" and value.size <= MAX_FOLDED


def _fold(rule: Rule, operation: Operation, operands: Sequence[Any]) -> Any:
    (kind,) = operation.types
    assert rule.fold is not None
    if kind.dtype is None:
        return None
    if rule.moves and _is_splat(operands[0]) and all(map(is_known, operands)):
        # Known whatever its dtype, as the start of a reduction has to be; and as small as ever.
        shape = rule.fold(operation, *(np.broadcast_to(_NOTHING, operands[0].shape), *operands[1:]))
        return None if shape is None else np.broadcast_to(operands[0].reshape(-1)[0], shape.shape)
    if not all(map(_foldable, operands)) or kind.dtype.kind not in "iub" or (kind.elements or 0) > MAX_FOLDED:
        return None
    with np.errstate(all="ignore"):
        result = rule.fold(operation, *operands)
    if result is None or np.size(result) > MAX_FOLDED:
        return None
    return np.asarray(result, kind.dtype)


_NOTHING = np.zeros((), np.bool_)


def _is_splat(value: Any) -> bool:
    return isinstance(value, np.ndarray) and bool(value.size) and (value.size == 1 or not any(value.strides))


def _check(operation: Operation, result: Any, kind: TensorType) -> None:
    """Compares a result with what the module says of it: no rule may change a dtype or a shape."""
    if kind.dtype is None or result is None:  # a token; what nothing takes
        return
    shape = np.shape(result)
    if math.prod(shape) * result.dtype.itemsize > MAX_TENSOR_BYTES:  # of a dimension that was not known before
        raise over("bytes of one tensor", MAX_TENSOR_BYTES)
    if (
        result.dtype != kind.dtype
        or len(shape) != len(kind.shape)
        or any(n not in (None, m) for n, m in zip(kind.shape, shape, strict=True))
    ):
        raise UnsupportedFormatError(
            "Replay does not give what the module says.",
            field=operation.title,
            expected=kind.text,
            found=f"{result.dtype}{list(shape)}",
        )


def check_argument(index: int, value: Any, kind: TensorType) -> None:
    """Compares an argument with the parameter of ``main`` that it is for."""
    shape, dtype = np.shape(value), value.dtype
    fits = len(shape) == len(kind.shape) and all(n in (None, m) for n, m in zip(kind.shape, shape, strict=True))
    if dtype != kind.dtype or not fits:
        raise ArgumentError(
            "An argument is not what the module takes.",
            leaf=f"argument {index}",
            expected=kind.text,
            found=f"{dtype}{list(shape)}",
            fix="jax_enable_x64" if kind.wide and not jax.config.jax_enable_x64 else None,
        )
