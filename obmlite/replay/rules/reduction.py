"""Operations that combine elements by a body: reductions, windows, sorting, mapping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from obmlite.replay._bodies import combiner, comparator_keys, comparison, extremum
from obmlite.replay._interpreter import Site, is_known
from obmlite.replay._program import Block, Operation
from obmlite.replay._table import rule, unsupported
from obmlite.replay.rules.data_movement import traced

GROUP = "reduction"

_MONOIDS: dict[str, Callable[..., Any]] = {
    "add": lax.add,
    "multiply": lax.mul,
    "maximum": lax.max,
    "minimum": lax.min,
    "and": lax.bitwise_and,
    "or": lax.bitwise_or,
    "xor": lax.bitwise_xor,
}


def body(site: Site, block: Block) -> Callable[..., Any]:
    """A body as lax takes it: of a tuple of accumulators and one of elements."""
    run = site.region(block)
    return lambda accumulated, elements: run(*accumulated, *elements)


@rule("stablehlo.reduce", group=GROUP, meaning="`lax.reduce_sum`, `lax.reduce_max`, …; of other bodies `lax.reduce`")
def _reduce(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    count = len(operation.results)
    arrays, starts = operands[:count], operands[count:]
    dimensions = operation["dimensions"]
    block = operation.regions[0]
    known = _MONOIDS.get(combiner(block, site.value) or "") if count == 1 else None
    if known is not None:
        # lax makes reduce_sum of an addition that starts from 0, and so on; what starts elsewhere stays as it is.
        return lax.reduce(arrays[0], _scalar(starts[0]), known, dimensions)
    if count == 2 and (name := _extremum(site, operation, starts)) is not None:
        (dimension,) = dimensions
        index = getattr(lax, name)(arrays[0], dimension, operation.types[1].dtype)
        if operation.results[0] not in site.program.used:  # as in all that JAX makes
            return None, index
        place = lax.expand_dims(index, (dimension,))
        return lax.squeeze(jax.numpy.take_along_axis(arrays[0], place, dimension), (dimension,)), index
    return lax.reduce(tuple(arrays), tuple(map(_scalar, starts)), body(site, block), dimensions)


def _extremum(site: Site, operation: Operation, starts: Sequence[Any]) -> str | None:
    """``argmax`` or ``argmin`` for a reduction that is that: ``lax.reduce`` of it would have no derivative."""
    name = extremum(operation.regions[0], site.value)
    indices = site.program.definitions.get(operation.operands[1])
    dimensions = operation["dimensions"]
    if name is None or indices is None or indices.name not in ("stablehlo.iota", "stablehlo.dynamic_iota"):
        return None
    value, first = starts
    if (indices["iota_dimension"],) != dimensions or not (is_known(value) and is_known(first) and first == 0):
        return None
    return name if value == _identity("maximum" if name == "argmax" else "minimum", value.dtype) else None


def _scalar(value: Any) -> Any:
    return value[()] if is_known(value) else value


def reduce_window(
    site: Site,
    block: Block,
    arrays: Sequence[Any],
    starts: Sequence[Any],
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int],
    window_dilation: Sequence[int],
) -> Any:
    """``reduce_window`` with its window's geometry given."""
    geometry = (tuple(window), tuple(strides), [(int(a), int(b)) for a, b in padding])
    dilations = {"base_dilation": tuple(base_dilation), "window_dilation": tuple(window_dilation)}
    name = combiner(block, site.value) if len(arrays) == 1 else None
    known = _MONOIDS.get(name or "")
    if name in _CUMULATIVE and is_known(starts[0]) and starts[0] == _identity(name, starts[0].dtype):
        along = _cumulative(np.shape(arrays[0]), *geometry, tuple(base_dilation), tuple(window_dilation))
        if along is not None:
            return _CUMULATIVE[name](arrays[0], *along)
    if known in (lax.add, lax.max, lax.min):
        return lax.reduce_window(arrays[0], _scalar(starts[0]), known, *geometry, **dilations)
    return lax.reduce_window(tuple(arrays), tuple(map(_scalar, starts)), body(site, block), *geometry, **dilations)


_CUMULATIVE: dict[str | None, Callable[..., Any]] = {
    "add": lax.cumsum,
    "multiply": lax.cumprod,
    "maximum": lax.cummax,
    "minimum": lax.cummin,
}
"""What JAX writes as a window over all that is before an element: with a derivative, which a product's window lacks."""


def _cumulative(
    shape: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int],
    window_dilation: Sequence[int],
) -> tuple[int, bool] | None:
    """The dimension along which a window accumulates, and whether from its end; None if it does something else."""
    if {*strides, *base_dilation, *window_dilation} - {1}:
        return None
    wide = [n for n, size in enumerate(window) if size != 1]
    if len(wide) != 1 or window[wide[0]] != shape[wide[0]]:
        return None
    (along,) = wide
    if any(edges != (0, 0) for n, edges in enumerate(padding) if n != along):
        return None
    before = (shape[along] - 1, 0)
    return (along, padding[along] != before) if padding[along] in (before, before[::-1]) else None


def _identity(name: str | None, dtype: Any) -> Any:
    """What a combination starts from without a trace."""
    if name in ("add", "multiply"):
        return 0 if name == "add" else 1
    least = name == "maximum"
    if jax.numpy.issubdtype(dtype, np.floating):
        return -np.inf if least else np.inf
    if dtype.kind in "iu":
        return np.iinfo(dtype).min if least else np.iinfo(dtype).max
    return not least


@rule(
    "stablehlo.reduce_window",
    group=GROUP,
    meaning="`lax.reduce_window`, as its sum, max or min where the body is that; `lax.cumsum`, `lax.cumprod`, …",
)
def _reduce_window(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    count, rank = len(operation.results), len(operation.operand_types[0].shape)
    ones = (1,) * rank
    return reduce_window(
        site,
        operation.regions[0],
        operands[:count],
        operands[count:],
        operation["window_dimensions"],
        operation.get("window_strides", ones),
        operation.get("padding", np.zeros((rank, 2), np.int64)).tolist(),
        operation.get("base_dilations", ones),
        operation.get("window_dilations", ones),
    )


_SELECTS = {"GE": lax.ge_p, "GT": lax.gt_p, "LE": lax.le_p, "LT": lax.lt_p}


@rule("stablehlo.select_and_scatter", group=GROUP, meaning="`lax.select_and_scatter_add_p`, `lax.select_and_scatter_p`")
def _select_and_scatter(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    x, source, start = operands
    rank = x.ndim
    padding = operation.get("padding", np.zeros((rank, 2), np.int64)).tolist()
    geometry = {
        "window_dimensions": tuple(operation.get("window_dimensions", (1,) * rank)),
        "window_strides": tuple(operation.get("window_strides", (1,) * rank)),
        "padding": tuple((low, high) for low, high in padding),
    }
    select, scatter = operation.regions
    direction = comparison(select, site.value)
    from_zero = is_known(start) and start == 0
    if direction in ("GE", "LE") and from_zero and combiner(scatter, site.value) == "add":
        return lax.select_and_scatter_add_p.bind(source, x, select_prim=_SELECTS[direction], **geometry)
    bodies: dict[str, Any] = {}
    for name, block in (("select", select), ("scatter", scatter)):
        jaxpr, consts = traced(site, block, x.dtype)
        bodies |= {f"{name}_jaxpr": jaxpr, f"{name}_consts": consts}
    return lax.select_and_scatter_p.bind(x, source, start, **bodies, **geometry)


@rule("stablehlo.map", group=GROUP, meaning="`jax.vmap` of its body")
def _map(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    shape = np.shape(operands[0])
    if not shape:
        return site.region(operation.regions[0])(*operands)[0]
    flat = [lax.reshape(value, (value.size,)) for value in operands]
    return lax.reshape(jax.vmap(site.region(operation.regions[0]))(*flat)[0], shape)


MAX_PAIRS = 1 << 24
"""Pairs of elements that a sort by a comparator that lax does not have may compare."""


@rule("stablehlo.sort", group=GROUP, meaning="`lax.sort`; by another comparator, every pair is compared")
def _sort(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    rank = np.ndim(operands[0])
    dimension = operation.get("dimension", -1) % max(rank, 1)
    if not rank:
        return list(operands)
    stable = operation.get("is_stable", False)
    block = operation.regions[0]
    keys = comparator_keys(block, site.value)
    if keys is not None:
        return list(lax.sort(tuple(operands), dimension=dimension, is_stable=stable, num_keys=keys))
    return _sort_by_pairs(site, operation, [jax.numpy.asarray(value) for value in operands], dimension)


def _sort_by_pairs(site: Site, operation: Operation, operands: Sequence[Any], dimension: int) -> Any:
    """A stable sort: an element's place is the number of those that come before it."""
    length = operands[0].shape[dimension]
    if operands[0].size * length > MAX_PAIRS:
        raise unsupported(operation, f"a comparator that lax.sort does not have, over {length} elements")
    before = jax.vmap(jax.vmap(site.region(operation.regions[0])))

    def places(*lines: Any) -> Any:
        pairs = [p for line in lines for p in (_square(line, 1), _square(line, 0))]
        (less,) = before(*pairs)  # less[i, j]: i comes before j
        first = lax.broadcasted_iota(np.dtype(np.int32), (length, length), 0)
        second = lax.broadcasted_iota(np.dtype(np.int32), (length, length), 1)
        tie = lax.bitwise_and(lax.bitwise_not(lax.bitwise_or(less, lax.transpose(less, (1, 0)))), lax.lt(first, second))
        counts = lax.convert_element_type(lax.bitwise_or(less, tie), np.dtype(np.int32))
        return lax.reduce_sum(counts, (0,))

    def sort(*lines: Any) -> Any:
        place = places(*lines)
        return tuple(jax.numpy.zeros_like(line).at[place].set(line, unique_indices=True) for line in lines)

    def _square(line: Any, dim: int) -> Any:
        return lax.broadcast_in_dim(line, (length, length), (1 - dim,))

    moved = [jax.numpy.moveaxis(value, dimension, -1) for value in operands]
    each = sort
    for _ in range(operands[0].ndim - 1):
        each = jax.vmap(each)
    return [jax.numpy.moveaxis(value, -1, dimension) for value in each(*moved)]
