"""A StableHLO module as plain Python values, which rules work on; nothing of MLIR is in here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from obmlite.errors import UnsupportedFormatError

__all__ = ["MAX_TENSOR_BYTES", "Block", "Function", "Operation", "Program", "TensorType", "over"]

MAX_TENSOR_BYTES = 1 << 48
"""Bytes of one tensor: far beyond any memory, and far below what overflows in XLA, which crashes."""


@dataclasses.dataclass(frozen=True, slots=True)
class TensorType:
    """The type of a value.

    Attributes:
      text: as MLIR writes it.
      dtype: of its elements; None for tokens, tuples, quantized and other types that JAX has no array of.
      shape: sizes, None where a dimension is dynamic.
    """

    text: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | None, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of a static type."""
        assert None not in self.shape, self.text
        return tuple(size for size in self.shape if size is not None)

    @property
    def wide(self) -> bool:
        """Whether JAX has such arrays only in its 64-bit mode."""
        return self.dtype is not None and self.dtype.itemsize // (2 if self.dtype.kind == "c" else 1) > 4

    @property
    def nbytes(self) -> int:
        """How many bytes; with dynamic dimensions, at least."""
        return 0 if self.dtype is None else math.prod(size or 1 for size in self.shape) * self.dtype.itemsize

    @property
    def elements(self) -> int | None:
        """How many elements; None if that is not static."""
        return None if None in self.shape else math.prod(self.sizes)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One operation. Values are numbers, each given once in a program.

    Attributes:
      name: with the dialect, ``stablehlo.add``.
      operands: values that it takes.
      operand_types: their types.
      results: values that it gives.
      types: their types.
      attributes: decoded (see :mod:`obmlite.replay._attributes`).
      regions: each with its one block.
    """

    name: str
    operands: tuple[int, ...]
    operand_types: tuple[TensorType, ...]
    results: tuple[int, ...]
    types: tuple[TensorType, ...]
    attributes: Mapping[str, Any]
    regions: tuple[Block, ...]

    @property
    def title(self) -> str:
        """The name, with that of what it calls where that decides what it does."""
        key = {"stablehlo.custom_call": "call_target_name", "stablehlo.composite": "name"}.get(self.name)
        return f"{self.name} {self.attributes[key]}" if key else self.name

    def get(self, name: str, default: Any) -> Any:
        """An optional attribute."""
        return self.attributes.get(name, default)

    def __getitem__(self, name: str) -> Any:
        return self.attributes[name]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Block:
    """What a function or a region runs.

    Attributes:
      arguments: values that it is given.
      types: their types.
      operations: in order, without the terminator.
      returns: values that the terminator hands back.
    """

    arguments: tuple[int, ...]
    types: tuple[TensorType, ...]
    operations: tuple[Operation, ...]
    returns: tuple[int, ...]

    def walk(self) -> Iterator[Operation]:
        """All operations, those of regions after the operation that has them."""
        pending = [iter(self.operations)]
        while pending:
            for operation in pending[-1]:
                yield operation
                if operation.regions:
                    pending.append(o for region in operation.regions for o in region.operations)
                    break
            else:
                pending.pop()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Function:
    """A function of a module.

    Attributes:
      name: its symbol.
      body: what it runs.
      constants: for each argument the name that JAX gives it where it holds a fact about the call
        (``_platform_index``, a dimension); else None.
      results: types of what it returns.
    """

    name: str
    body: Block
    constants: tuple[str | None, ...]
    results: tuple[TensorType, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A module.

    Attributes:
      functions: by name.
      meshes: Shardy's meshes by name: names of axes and their sizes.
      definitions: the operation that gives each value; arguments have none.
      used: values that something takes.
      count: operations in it.
    """

    functions: Mapping[str, Function]
    meshes: Mapping[str, Mapping[str, int]]
    definitions: Mapping[int, Operation]
    used: frozenset[int]
    count: int


def over(what: str, limit: int) -> UnsupportedFormatError:
    """The error for a module that is over a limit."""
    return UnsupportedFormatError(
        f"The module has too many {what} to be replayed.", field=what, expected=f"at most {limit}", found="more"
    )
