"""A module of StableHLO, as artifact or text, read into a :class:`~obmlite.replay._program.Program`.

Only what is trusted may be read: MLIR's reader does not survive hostile bytes. Whoever reads a package compares
digests first.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from obmlite._mlir import in_context, ir, sdy, stablehlo
from obmlite.errors import UnsupportedFormatError
from obmlite.replay._attributes import decode, read_constant, read_type
from obmlite.replay._program import MAX_TENSOR_BYTES, Block, Function, Operation, Program, TensorType, over

__all__ = ["MAX_CONSTANT_BYTES", "MAX_DEPTH", "MAX_OPERATIONS", "read", "rewrite"]

MAX_DEPTH = 64
"""Regions within regions."""

MAX_OPERATIONS = 1_000_000
"""Operations of a module."""

MAX_CONSTANT_BYTES = 1 << 30
"""Bytes of all constants of a module that are no splats: as hoisting leaves them, a module has next to none."""

_MAGIC = b"ML\xefR"  # of MLIR bytecode

_TERMINATORS = frozenset({"func.return", "stablehlo.return", "sdy.return"})


def read(module: bytes | str) -> Program:
    """Reads a module.

    Args:
      module: a portable artifact, or MLIR text; trusted.

    Raises:
      UnsupportedFormatError: this JAX's StableHLO does not read it, or it is over a limit.
    """
    with _opened(module) as parsed:
        return _Reader().program(parsed)


def rewrite(module: bytes) -> bytes:
    """A portable artifact, written anew by MLIR, at this JAX's version of StableHLO; reads it before and after.

    Args:
      module: a portable artifact, from anywhere: it may crash the process.

    Raises:
      UnsupportedFormatError: this JAX's StableHLO does not read it, or it is over a limit.
    """
    if not module.startswith(_MAGIC):  # MLIR would take it for text, of any dialect
        raise UnsupportedFormatError(
            "The module is no portable artifact.", field="code", expected=f"{_MAGIC!r} first", found=repr(module[:4])
        )
    with _opened(module) as parsed:
        parsed.operation.verify()
        anew = bytes(stablehlo.serialize_portable_artifact(parsed, stablehlo.get_current_version(), True))
    read(anew)
    return anew


@contextlib.contextmanager
def _opened(module: bytes | str) -> Iterator[Any]:
    messages: list[str] = []
    with in_context(messages.append) as context:
        try:
            parsed = _parse(context, module)
        except (ValueError, ir.MLIRError) as error:
            current = stablehlo.get_current_version()
            raise UnsupportedFormatError(
                "This JAX does not read the module.",
                field="stablehlo",
                expected=f"StableHLO up to {current}",
                found="; ".join(messages)[:300] or str(error)[:300],
                fix="a later JAX, if a later one wrote it",
            ) from error
        yield parsed


def _parse(context: Any, module: bytes | str) -> Any:
    if isinstance(module, str):
        # The bindings register no `func`, which text needs; reading an artifact brings it into the context.
        stablehlo.deserialize_portable_artifact(context, _with_a_function())
        return ir.Module.parse(module, context)
    return stablehlo.deserialize_portable_artifact(context, bytes(module))


@functools.cache
def _with_a_function() -> bytes:
    text = "module { func.func @main() { return } }"
    return bytes(stablehlo.serialize_portable_artifact_str(text, stablehlo.get_current_version()))


class _Reader:
    def __init__(self) -> None:
        self.values: dict[Any, int] = {}
        self.definitions: dict[int, Operation] = {}
        self.used: set[int] = set()
        self.count = 0
        self.constant_bytes = 0

    def program(self, module: Any) -> Program:
        functions, meshes = {}, {}
        for view in module.body.operations:
            op = view.operation
            if op.name == "func.func":
                function = self.function(op)
                functions[function.name] = function
            elif op.name == "sdy.mesh":
                axes = [sdy.MeshAxisAttr(axis) for axis in sdy.MeshAttr(op.attributes["mesh"]).axes]
                meshes[ir.StringAttr(op.attributes["sym_name"]).value] = {axis.name: axis.size for axis in axes}
        return Program(functions, meshes, self.definitions, frozenset(self.used), self.count)

    def function(self, op: Any) -> Function:
        name = ir.StringAttr(op.attributes["sym_name"]).value
        kind = ir.FunctionType(ir.TypeAttr(op.attributes["function_type"]).value)
        facts = decode(op.attributes["arg_attrs"]) if "arg_attrs" in op.attributes else ({},) * len(kind.inputs)
        if not op.regions[0].blocks:
            raise UnsupportedFormatError("A function of the module has no body.", field="function", found=name)
        return Function(
            name,
            self.block(op.regions[0], 0),
            tuple(fact.get("jax.global_constant") for fact in facts),
            tuple(map(self.kind, kind.results)),
        )

    def block(self, region: Any, depth: int) -> Block:
        if depth > MAX_DEPTH:
            raise over("regions within regions", MAX_DEPTH)
        blocks = list(region.blocks)
        if not blocks:
            return Block((), (), (), ())
        if len(blocks) > 1:
            raise UnsupportedFormatError(
                "A region of the module has several blocks.", expected="one", found=len(blocks)
            )
        (block,) = blocks
        arguments = tuple(map(self.number, block.arguments))
        types = tuple(self.kind(argument.type) for argument in block.arguments)
        operations: list[Operation] = []
        returns: tuple[int, ...] = ()
        for view in block.operations:
            op = view.operation
            if op.name in _TERMINATORS:
                returns = tuple(self.values[operand] for operand in op.operands)
                self.used.update(returns)
            else:
                operations.append(self.operation(op, depth))
        return Block(arguments, types, tuple(operations), returns)

    def operation(self, op: Any, depth: int) -> Operation:
        self.count += 1
        if self.count > MAX_OPERATIONS:
            raise over("operations", MAX_OPERATIONS)
        operands = tuple(op.operands)
        types = tuple(self.kind(result.type) for result in op.results)
        if op.name == "stablehlo.constant":
            attributes = {"value": self.constant(op, types[0])}
        else:
            attributes = {name: decode(op.attributes[name]) for name in op.attributes}
        result = Operation(
            op.name,
            tuple(self.values[operand] for operand in operands),
            tuple(read_type(operand.type) for operand in operands),
            tuple(map(self.number, op.results)),
            types,
            attributes,
            tuple(self.block(region, depth + 1) for region in op.regions),
        )
        self.used.update(result.operands)
        self.definitions.update(dict.fromkeys(result.results, result))
        return result

    def constant(self, op: Any, kind: TensorType) -> Any:
        if kind.dtype is None:
            return None
        value = read_constant(op)
        if any(value.strides):
            self.constant_bytes += value.nbytes
        if self.constant_bytes > MAX_CONSTANT_BYTES:
            raise over("bytes of constants", MAX_CONSTANT_BYTES)
        return value

    def kind(self, kind: Any) -> TensorType:
        found = read_type(kind)
        if found.nbytes > MAX_TENSOR_BYTES:
            raise over("bytes of one tensor", MAX_TENSOR_BYTES)
        return found

    def number(self, value: Any) -> int:
        return self.values.setdefault(value, len(self.values))
