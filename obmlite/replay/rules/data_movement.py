"""Operations that move elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from obmlite.replay._attributes import Gather, Scatter
from obmlite.replay._bodies import combiner
from obmlite.replay._interpreter import Site
from obmlite.replay._program import Block, Operation
from obmlite.replay._table import rule

GROUP = "data movement"


def _fold_broadcast(operation: Operation, x: Any) -> Any:
    return spread(x, operation.types[0].sizes, operation["broadcast_dimensions"])


def spread(x: Any, sizes: Sequence[int], dimensions: Sequence[int]) -> Any:
    """``broadcast_in_dim`` in numpy."""
    shape = [1] * len(sizes)
    for n, dimension in enumerate(dimensions):
        shape[dimension] = x.shape[n]
    return np.broadcast_to(np.transpose(x, np.argsort(dimensions)).reshape(shape), tuple(sizes))


@rule("stablehlo.broadcast_in_dim", group=GROUP, fold=_fold_broadcast, moves=True, meaning="`lax.broadcast_in_dim`")
def _broadcast_in_dim(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return lax.broadcast_in_dim(operands[0], operation.types[0].sizes, operation["broadcast_dimensions"])


@rule("stablehlo.broadcast", group=GROUP, meaning="`lax.broadcast`")
def _broadcast(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return lax.broadcast(operands[0], operation["broadcast_sizes"])


@rule(
    "stablehlo.reshape",
    group=GROUP,
    fold=lambda operation, x: x.reshape(operation.types[0].sizes),
    moves=True,
    meaning="`lax.reshape`",
)
def _reshape(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return lax.reshape(operands[0], operation.types[0].sizes)


@rule(
    "stablehlo.transpose",
    group=GROUP,
    fold=lambda operation, x: x.transpose(operation["permutation"]),
    moves=True,
    meaning="`lax.transpose`",
)
def _transpose(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return lax.transpose(operands[0], operation["permutation"])


@rule(
    "stablehlo.concatenate",
    group=GROUP,
    fold=lambda operation, *parts: np.concatenate(parts, operation["dimension"]),
    meaning="`lax.concatenate`",
)
def _concatenate(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return lax.concatenate(operands, operation["dimension"])


def _fold_slice(operation: Operation, x: Any) -> Any:
    bounds = zip(operation["start_indices"], operation["limit_indices"], operation["strides"], strict=True)
    return x[tuple(slice(*bound) for bound in bounds)]


@rule("stablehlo.slice", group=GROUP, fold=_fold_slice, moves=True, meaning="`lax.slice`")
def _slice(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    strides = operation["strides"]
    steps = None if set(strides) <= {1} else strides
    return lax.slice(operands[0], operation["start_indices"], operation["limit_indices"], steps)


@rule("stablehlo.dynamic_slice", group=GROUP, meaning="`lax.dynamic_slice`")
def _dynamic_slice(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    x, *starts = operands
    # StableHLO moves a negative start to 0; to lax it would count from the end.
    return lax.dynamic_slice(x, starts, operation["slice_sizes"], allow_negative_indices=False) if starts else x


@rule("stablehlo.dynamic_update_slice", group=GROUP, meaning="`lax.dynamic_update_slice`")
def _dynamic_update_slice(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    x, update, *starts = operands
    return lax.dynamic_update_slice(x, update, starts, allow_negative_indices=False) if starts else update


@rule("stablehlo.pad", group=GROUP, meaning="`lax.pad`")
def _pad(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    edges = zip(
        operation["edge_padding_low"], operation["edge_padding_high"], operation["interior_padding"], strict=True
    )
    return lax.pad(*operands, list(edges))


@rule("stablehlo.reverse", group=GROUP, meaning="`lax.rev`")
def _reverse(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return lax.rev(operands[0], operation["dimensions"])


@rule(
    "stablehlo.constant",
    group=GROUP,
    refuse=lambda operation: f"of type {operation.types[0].text}" if operation["value"] is None else None,
    meaning="a numpy array; `lax.full` where all its elements are one",
)
def _constant(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return operation["value"]


@rule("stablehlo.iota", group=GROUP, meaning="`lax.broadcasted_iota`")
def _iota(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    kind = operation.types[0]
    return lax.broadcasted_iota(kind.dtype, kind.sizes, operation["iota_dimension"])


def _vectors_last(indices: Any, dimension: int) -> Any:
    """Indices with their vectors along the last dimension, as lax has them."""
    if dimension == indices.ndim:
        return lax.expand_dims(indices, (dimension,))
    return jax.numpy.moveaxis(indices, dimension, -1)


def gather(operation: Operation, x: Any, indices: Any, sizes: Sequence[int]) -> Any:
    """``gather`` with slices of given sizes. StableHLO moves slices that would leave the operand into it: mode clip."""
    numbers: Gather = operation["dimension_numbers"]
    return lax.gather(
        x,
        _vectors_last(indices, numbers.index_vector),
        lax.GatherDimensionNumbers(
            offset_dims=numbers.offset,
            collapsed_slice_dims=numbers.collapsed,
            start_index_map=numbers.start_index_map,
            operand_batching_dims=numbers.operand_batching,
            start_indices_batching_dims=numbers.indices_batching,
        ),
        slice_sizes=tuple(sizes),
        indices_are_sorted=operation.get("indices_are_sorted", False),
        mode=lax.GatherScatterMode.CLIP,
    )


@rule("stablehlo.gather", group=GROUP, meaning="`lax.gather`, mode clip")
def _gather(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    x, indices = operands
    return gather(operation, x, indices, operation["slice_sizes"])


_SCATTERS: dict[str, Callable[..., Any]] = {
    "second": lax.scatter,
    "add": lax.scatter_add,
    "multiply": lax.scatter_mul,
    "minimum": lax.scatter_min,
    "maximum": lax.scatter_max,
}


@rule(
    "stablehlo.scatter",
    group=GROUP,
    refuse=lambda operation: "of several operands" if len(operation.results) > 1 else None,
    meaning="`lax.scatter`, `lax.scatter_add`, …, mode drop; of other bodies `lax.scatter_p`",
)
def _scatter(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    x, indices, updates = operands
    numbers: Scatter = operation["scatter_dimension_numbers"]
    # Windows that would leave the operand are dropped, as in StableHLO.
    options = {
        "dimension_numbers": lax.ScatterDimensionNumbers(
            update_window_dims=numbers.update_window,
            inserted_window_dims=numbers.inserted_window,
            scatter_dims_to_operand_dims=numbers.to_operand,
            operand_batching_dims=numbers.operand_batching,
            scatter_indices_batching_dims=numbers.indices_batching,
        ),
        "indices_are_sorted": operation.get("indices_are_sorted", False),
        "unique_indices": operation.get("unique_indices", False),
        "mode": lax.GatherScatterMode.FILL_OR_DROP,
    }
    indices = _vectors_last(indices, numbers.index_vector)
    known = _SCATTERS.get(combiner(operation.regions[0], site.value) or "")
    if known is not None:
        return known(x, indices, updates, **options)
    jaxpr, consts = traced(site, operation.regions[0], x.dtype)
    return lax.scatter_p.bind(x, indices, updates, update_jaxpr=jaxpr, update_consts=consts, **options)


def traced(site: Site, block: Block, dtype: Any) -> tuple[Any, tuple[Any, ...]]:
    """A body of two scalars as a jaxpr and its constants, as those primitives take them that lax has no function for.

    In JAX 0.12 a closed jaxpr is what an open one was before.
    """
    scalar = jax.ShapeDtypeStruct((), dtype)
    body = site.region(block)
    closed = jax.make_jaxpr(lambda a, b: body(a, b)[0])(scalar, scalar)
    return getattr(closed, "jaxpr", closed), tuple(closed.consts)


@rule("stablehlo.tuple", group=GROUP, meaning="a tuple")
def _tuple(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return (tuple(operands),)


@rule("stablehlo.get_tuple_element", group=GROUP, meaning="an element of it")
def _get_tuple_element(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return (operands[0][operation["index"]],)
