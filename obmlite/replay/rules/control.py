"""Control flow and calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from obmlite.replay import _loops
from obmlite.replay._interpreter import Site, is_known, traceable
from obmlite.replay._markers import Counter, Escaped, Rows, Stacked, Written
from obmlite.replay._program import Operation
from obmlite.replay._table import COMPOSITES, rule
from obmlite.replay._varying import vary

GROUP = "control flow"


@rule("func.call", group=GROUP, meaning="what the function does")
def _call(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return site.call(operation["callee"], operands)


@rule("stablehlo.composite", group=GROUP, meaning="by a rule of its own (below), else what its decomposition does")
def _composite(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    known = COMPOSITES.get(operation["name"])
    if known is not None:
        return known.apply(site, operation, [traceable(value) for value in operands])
    return site.call(operation["decomposition"], operands)


@rule(
    "stablehlo.while", group=GROUP, meaning="`lax.scan` where it counts a known number of steps, else `lax.while_loop`"
)
def _while(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    loop = _loops.look(site.program, operation, operands, site.value)
    if loop.counter is None:
        return _while_loop(site, operation, operands, loop)
    try:
        return _scan(site, operation, operands, loop)
    except Escaped:
        return _scan(site, operation, operands, _loops.Loop(loop.invariant, loop.counter, loop.rows))


def _while_loop(site: Site, operation: Operation, operands: Sequence[Any], loop: _loops.Loop) -> Any:
    carried = [n for n in range(len(operands)) if n not in loop.invariant]
    condition, body = operation.regions

    def whole(carry: Sequence[Any]) -> list[Any]:
        values = list(operands)
        for n, value in zip(carried, carry, strict=True):
            values[n] = value
        return values

    def proceed(carry: Sequence[Any]) -> Any:
        return site.region(condition)(*whole(carry))[0]

    def step(carry: Sequence[Any]) -> Any:
        results = site.region(body)(*whole(carry))
        return tuple(_carried(site, results[n]) for n in carried)

    return whole(lax.while_loop(proceed, step, tuple(_carried(site, operands[n]) for n in carried)))


def _scan(site: Site, operation: Operation, operands: Sequence[Any], loop: _loops.Loop) -> Any:
    assert loop.counter is not None
    position, start, stop = loop.counter
    if stop == start:
        return list(operands)
    body = operation.regions[1]
    carried = [
        n for n in range(len(operands)) if n not in loop.invariant and n not in loop.stacked
    ]  # the counter too: what the body makes of it is traced
    backward = _loops.BACKWARD in {**loop.rows, **loop.stacked}.values()
    name = object()

    def step(carry: Sequence[Any], rows: Sequence[Any]) -> Any:
        values = list(operands)
        for n, value in zip(carried, carry, strict=True):
            values[n] = value
        values[position] = Counter(name, 1, 0, values[position])
        index = Counter(name, -1, stop - 1, None) if backward else Counter(name, 1, -start, None)
        for n, row in zip(loop.rows, rows, strict=True):
            values[n] = Rows(index, traceable(operands[n]), row)
        for n in loop.stacked:
            values[n] = Stacked(index, np.shape(operands[n]))
        results = site.run(body, values)
        stacked = []
        for n in loop.stacked:
            result = results[n]
            if not isinstance(result, Written) or result.stacked is not values[n]:
                raise Escaped
            stacked.append(_carried(site, result.row))
        return tuple(_carried(site, results[n]) for n in carried), tuple(stacked)

    carry, stacked = lax.scan(
        step,
        tuple(_carried(site, operands[n]) for n in carried),
        tuple(_carried(site, operands[n]) for n in loop.rows),
        length=stop - start,
        reverse=backward,
    )
    results = list(operands)
    for n, value in (*zip(carried, carry, strict=True), *zip(loop.stacked, stacked, strict=True)):
        results[n] = value
    results[position] = np.asarray(stop, operation.types[position].dtype)
    return results


def _carried(site: Site, value: Any) -> Any:
    """A value as a carry or a branch holds it: an array, with the axes of ``shard_map`` that all have."""
    value = traceable(value)
    array = lax.convert_element_type(value, value.dtype) if is_known(value) else value
    return vary(array, site.axes)


@rule("stablehlo.case", group=GROUP, meaning="the branch, where the index is known; else `lax.switch`")
def _case(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    (index,) = operands
    last = len(operation.regions) - 1
    if is_known(index):
        chosen = int(index)
        return site.run(operation.regions[chosen if 0 <= chosen <= last else last], ())
    if last == 0:
        return site.run(operation.regions[0], ())
    # An index that is out of range, below 0 too, is the last; lax.switch would take the first for those below.
    index = lax.select(lax.lt(index, np.int32(0)), np.int32(last), index)
    return list(lax.switch(index, [_branch(site, region) for region in operation.regions]))


@rule("stablehlo.if", group=GROUP, meaning="the branch, where the predicate is known; else `lax.cond`")
def _if(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    (predicate,) = operands
    if is_known(predicate):
        return site.run(operation.regions[0 if predicate else 1], ())
    return list(lax.cond(predicate, *[_branch(site, region) for region in operation.regions]))


def _branch(site: Site, region: Any) -> Any:
    return lambda: tuple(_carried(site, value) for value in site.region(region)())


@rule("stablehlo.optimization_barrier", group=GROUP, meaning="`lax.optimization_barrier`")
def _barrier(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return list(lax.optimization_barrier(tuple(operands)))


@rule("stablehlo.create_token", "stablehlo.after_all", group=GROUP, meaning="nothing: nothing here has effects")
def _token(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return (None,)
