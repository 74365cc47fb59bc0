"""Large constants of a StableHLO module become trailing arguments of its ``main``.

JAX writes what a function captures into its module as constants, in each of the module's functions that uses them.
Here they leave it, and come in through ``main`` and every call on the way. This reaches what hoisting in the jaxpr
does not: captures of nested jits, and what only the lowering makes.

Not every place can be reached:

* A region of ``stablehlo.while``, ``case`` or ``if`` sees the values around it. The others (``reduce``, ``sort``,
  ``scatter``, ``map``, …) would be valid with such a capture, but XLA does not compile them with one unless it is a
  constant, so what they hold stays. (JAX refuses to lower reducers that capture arrays, so this is rare.)
* ``sdy.manual_computation`` sees nothing from outside. It is given another operand, replicated, as JAX itself
  passes to it what a ``shard_map`` captures.
* A function that another operation than a call refers to (the decomposition of a composite, a computation of a
  custom call) keeps its arguments, and so its constants and those of what it calls.

The same in JAX 0.9.2, 0.10.2 and 0.12.
"""

# Cost of normalising a module with 256 MiB of constants in nested jits, and the peak above the artifact (2 busy cores,
# JAX 0.10 and 0.12; 0.9 has one copy more): float32 0.4 to 0.7 s, 512 MiB, of which the values are 256. bfloat16, which
# goes through text, 1.7 to 3.9 s, 1,280 MiB. complex64, the same once for each function that has it, 2 to 2.5 s each,
# 1,530 MiB. An operation costs 3 microseconds.

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from obmlite import dtypes
from obmlite._constants import dtype_of, elements_of, kind_of, text_of, value_of
from obmlite._mlir import ir, sdy

_CAPTURING = frozenset({"stablehlo.while", "stablehlo.case", "stablehlo.if"})
_MANUAL = "sdy.manual_computation"

_Key = tuple[str, bytes]  # type and digest of a value: equal constants become one argument


@dataclasses.dataclass(frozen=True, slots=True)
class Constant:
    """A constant over the limit that stays in its module.

    Attributes:
      type: dtype and shape, ``f32[4,3]``.
      nbytes: bytes of its value.
      held_by: the operation or function that does not let it go.
    """

    type: str
    nbytes: int
    held_by: str


@dataclasses.dataclass(eq=False, slots=True)
class _Item:
    """A constant, a call or a manual computation.

    Attributes:
      op: the operation.
      target: what it leads into: a function's name for a call, None for a constant.
      key: a constant's value, once it was read.
    """

    op: Any
    target: _Scope | str | None = None
    key: _Key | None = None


@dataclasses.dataclass(eq=False, slots=True)
class _Scope:
    """What no value comes into but by its arguments: the body of a function or of a manual computation.

    Attributes:
      op: the operation whose body it is.
      items: what is in it, in program order, with what is in regions that see its values.
      needs: the values that it and the scopes below use, in order of first use; None until they are known.
    """

    op: Any
    items: list[_Item] = dataclasses.field(default_factory=list)
    needs: dict[_Key, None] | None = None

    def flat(self) -> Iterator[_Item]:
        """Its items, and those of the manual computations in it."""
        for item in self.items:
            yield item
            if isinstance(item.target, _Scope):
                yield from item.target.flat()

    def callees(self) -> Iterator[str]:
        return (item.target for item in self.flat() if isinstance(item.target, str))


def hoist(module: Any, limit: int) -> tuple[tuple[np.ndarray[Any, Any], ...], tuple[Constant, ...]]:
    """Turns a module's constants of more than ``limit`` bytes that are no splats into arguments of ``main``.

    Args:
      module: a parsed module; changed in place. Its context has to be the current one.
      limit: bytes, with one for each element of less than one, as MLIR and numpy hold them.

    Returns:
      The values of the new arguments, which follow ``main``'s own, in order of first use: held arrays (see
      :mod:`obmlite.dtypes`), read-only. And the constants that stay although they are over the limit, largest first.
    """
    return _Hoisting(module, limit).run()


class _Hoisting:
    def __init__(self, module: Any, limit: int) -> None:
        self.limit = limit
        self.module = module
        self.functions: dict[str, _Scope] = {}
        self.pinned: dict[str, str] = {}  # functions that cannot take further arguments, and what holds them
        self.held: list[Constant] = []
        self.values: dict[_Key, np.ndarray[Any, Any]] = {}
        self.types: dict[_Key, Any] = {}
        self.read_before: dict[Any, _Key] = {}
        self.axes: dict[str, int] = {}  # how many each mesh has

    def run(self) -> tuple[tuple[np.ndarray[Any, Any], ...], tuple[Constant, ...]]:
        for view in self.module.body.operations:
            op = view.operation
            if op.name == "func.func":
                scope = self.functions[ir.StringAttr(op.attributes["sym_name"]).value] = _Scope(op)
                self.read(scope, op, None)
            elif op.name == "sdy.mesh":
                self.axes[ir.StringAttr(op.attributes["sym_name"]).value] = len(
                    sdy.MeshAttr(op.attributes["mesh"]).axes
                )
        self.pin()
        order = self.needs("main")
        for name, scope in self.functions.items():
            if self.needs(name):
                self.rewrite(scope)
                _extend_signature(scope.op, [self.types[key] for key in self.needs(name)])
        held = sorted(self.held, key=lambda c: (-c.nbytes, c.type, c.held_by))
        return tuple(self.values[key] for key in order), tuple(held)

    # ---- what is where

    def read(self, scope: _Scope, parent: Any, holder: str | None) -> None:
        """Lists what is in ``parent``'s regions.

        Args:
          scope: the scope that they are in.
          parent: the operation that has them.
          holder: what keeps the scope's values from them, None if they see them.
        """
        for op in _inside(parent):
            name = op.name
            if name.endswith(".constant"):
                if _is_large(op, self.limit):
                    reason = holder or _obstacle(op)
                    if reason is None:
                        scope.items.append(_Item(op))
                    else:
                        self.held.append(_describe(op, reason))
            elif name == "func.call":
                callee = ir.FlatSymbolRefAttr(op.attributes["callee"]).value
                if holder is None:
                    scope.items.append(_Item(op, callee))
                else:
                    self.pinned.setdefault(callee, holder)
            else:
                for function in _references(op):
                    self.pinned.setdefault(function, _title(op))
                if name == _MANUAL and holder is None and _mesh(op) is not None:
                    inner = _Scope(op)
                    scope.items.append(_Item(op, inner))
                    self.read(inner, op, None)
                elif len(op.regions):
                    self.read(scope, op, holder if holder or name in _CAPTURING else _title(op))

    def pin(self) -> None:
        """Completes ``pinned``: with what ``main`` does not call, and with all that a pinned function calls."""
        # The references are to whatever has a name, so to meshes too.
        self.pinned = {name: holder for name, holder in self.pinned.items() if name in self.functions}
        self.pin_callees()
        reached, pending = {"main"}, ["main"]
        while pending:
            for callee in self.functions[pending.pop()].callees():
                if callee not in reached:
                    reached.add(callee)
                    pending.append(callee)
        for name in self.functions:
            if name not in reached:
                self.pinned.setdefault(name, f"func.func {name}, which main does not call")
        self.pin_callees()
        for name, holder in self.pinned.items():
            scope = self.functions[name]
            scope.needs = {}
            self.held.extend(_describe(item.op, holder) for item in scope.flat() if item.target is None)

    def pin_callees(self) -> None:
        pending = list(self.pinned)
        while pending:
            name = pending.pop()
            for callee in self.functions[name].callees():
                if callee not in self.pinned:
                    self.pinned[callee] = self.pinned[name]
                    pending.append(callee)

    def needs(self, target: _Scope | str) -> dict[_Key, None]:
        scope = self.functions[target] if isinstance(target, str) else target
        if scope.needs is None:
            found: dict[_Key, None] = {}
            for item in scope.items:
                found.update({self.key(item): None} if item.target is None else self.needs(item.target))
            scope.needs = found
        return scope.needs

    def key(self, item: _Item) -> _Key:
        if item.key is None:
            elements = elements_of(item.op)  # equal ones are one in a context, so it tells what was read before
            item.key = None if elements is None else self.read_before.get(elements)
        if item.key is None:
            kind = item.op.results[0].type
            value = value_of(item.op)
            item.key = (str(kind), hashlib.sha256(value.reshape(-1).view(np.uint8).data).digest())
            self.types.setdefault(item.key, kind)
            self.values.setdefault(item.key, value)
            if elements is not None:
                self.read_before[elements] = item.key
        return item.key

    # ---- the change

    def rewrite(self, scope: _Scope) -> None:
        """Gives a scope its arguments, puts them where its constants were, and hands them on to the scopes below."""
        block = scope.op.regions[0].blocks[0]
        arguments = {key: block.add_argument(self.types[key], ir.Location.unknown()) for key in self.needs(scope)}
        for item in scope.items:
            if item.target is None:
                item.op.results[0].replace_all_uses_with(arguments[self.key(item)])
                item.op.erase()
            elif needs := self.needs(item.target):
                changed: dict[str, Any] = {}
                if isinstance(item.target, _Scope):
                    # First what is below: the block moves to another operation then.
                    self.rewrite(item.target)
                    changed["in_shardings"] = self.shardings(item.op, [self.types[key] for key in needs])
                elif "arg_attrs" in item.op.attributes:
                    changed["arg_attrs"] = _extend_attributes(item.op, len(needs))
                _replace(item.op, [arguments[key] for key in needs], changed)

    def shardings(self, op: Any, kinds: Iterable[Any]) -> Any:
        """A manual computation's shardings, with those of further operands that every device has whole.

        A dimension is open where the mesh has an axis that is not manual, as JAX has it, so that the partitioner may
        choose how the value is divided along that.
        """
        mesh = _mesh(op)
        axes = self.axes[mesh.value] if isinstance(mesh, ir.FlatSymbolRefAttr) else len(sdy.MeshAttr(mesh).axes)
        closed = len(list(sdy.ManualAxesAttr(op.attributes["manual_axes"]))) >= axes
        whole = sdy.DimensionShardingAttr.get([], is_closed=closed)
        further = [sdy.TensorShardingAttr.get(mesh, [whole] * ir.RankedTensorType(kind).rank) for kind in kinds]
        return sdy.TensorShardingPerValueAttr.get([*_shardings(op, "in_shardings"), *further])


def _replace(op: Any, operands: Iterable[Any], changed: dict[str, Any]) -> None:
    """Replaces an operation by itself with further operands, which MLIR's bindings cannot give to one that is there."""
    new = ir.Operation.create(
        op.name,
        results=[result.type for result in op.results],
        operands=[*op.operands, *operands],
        attributes={name: op.attributes[name] for name in op.attributes} | changed,
        regions=len(op.regions),
        loc=op.location,
        ip=ir.InsertionPoint(op),
    )
    for old, region in zip(op.regions, new.regions, strict=True):
        for block in list(old.blocks):
            block.append_to(region)
    for old, result in zip(op.results, new.results, strict=True):
        old.replace_all_uses_with(result)
    op.erase()


def _extend_signature(op: Any, kinds: list[Any]) -> None:
    before = ir.FunctionType(ir.TypeAttr(op.attributes["function_type"]).value)
    after = ir.FunctionType.get([*before.inputs, *kinds], list(before.results))
    op.attributes["function_type"] = ir.TypeAttr.get(after)
    if "arg_attrs" in op.attributes:
        op.attributes["arg_attrs"] = _extend_attributes(op, len(kinds))


def _extend_attributes(op: Any, count: int) -> Any:
    return ir.ArrayAttr.get([*ir.ArrayAttr(op.attributes["arg_attrs"]), *[ir.DictAttr.get({})] * count])


# ---- operations


def _inside(op: Any) -> Iterator[Any]:
    for region in op.regions:
        for block in region.blocks:
            for view in block.operations:
                yield view.operation


def _title(op: Any) -> str:
    attribute = {"stablehlo.custom_call": "call_target_name", "stablehlo.composite": "name"}.get(op.name)
    return f"{op.name} {ir.StringAttr(op.attributes[attribute]).value}" if attribute else str(op.name)


def _references(op: Any) -> Iterator[str]:
    """Names of functions, and of other symbols, in an operation's attributes."""
    names = list(op.attributes)
    pending = []
    for name in names:
        try:
            pending.append(op.attributes[name])
        except TypeError:  # complex elements, which the bindings have no class for
            continue
    while pending:
        attribute = pending.pop()
        if isinstance(attribute, ir.FlatSymbolRefAttr):
            yield attribute.value
        elif isinstance(attribute, ir.ArrayAttr):
            pending.extend(attribute)
        elif isinstance(attribute, ir.DictAttr):
            pending.extend(entry.attr for entry in attribute)


def _shardings(op: Any, attribute: str) -> list[Any]:
    return list(sdy.TensorShardingPerValueAttr(op.attributes[attribute]).shardings)


def _mesh(op: Any) -> Any:
    """The mesh of a manual computation, None if it has neither operands nor results to tell it by."""
    for sharding in (*_shardings(op, "in_shardings"), *_shardings(op, "out_shardings")):
        return sdy.TensorShardingAttr(sharding).mesh_or_ref
    return None


# ---- constants


def _is_large(op: Any, limit: int) -> bool:
    """Whether it is over the limit and no splat, of which only the one element is held."""
    if _nbytes(op) <= limit:
        return False
    elements = elements_of(op)
    if elements is None:
        return b"dense<(" not in text_of(op, large_elements_limit=1)  # this leaves only a splat's element in the text
    return not (isinstance(elements, ir.DenseElementsAttr) and elements.is_splat)


def _obstacle(op: Any) -> str | None:
    """Why the value of a constant cannot be read; JAX makes no such constants."""
    if dtype_of(op) is None:
        return f"element type {kind_of(op).element_type}"
    elements = elements_of(op)
    return None if elements is None or isinstance(elements, ir.DenseElementsAttr) else "dense_resource"


def _nbytes(op: Any) -> int:
    dtype = dtype_of(op)
    count: int = math.prod(kind_of(op).shape)
    return count * (1 if dtype is None else dtype.itemsize)


def _describe(op: Any, holder: str) -> Constant:
    kind = kind_of(op)
    dtype = dtype_of(op)
    name = str(kind.element_type) if dtype is None else dtypes.of(dtype).short
    return Constant(f"{name}[{','.join(map(str, kind.shape))}]", _nbytes(op), holder)
