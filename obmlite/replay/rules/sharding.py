"""Shardings: constraints on the mesh of the caller where it has the axes that they name, else nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from obmlite.replay._attributes import Sharding
from obmlite.replay._interpreter import Site
from obmlite.replay._program import Operation
from obmlite.replay._table import CUSTOM_CALLS, rule

GROUP = "sharding"


def constrain(value: Any, sharding: Any) -> Any:
    """A value, with a sharding's constraint where the mesh that is set (``jax.set_mesh``) has its axes.

    Only axes that the partitioner handles can be constrained; a dimension that does not divide stays as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not isinstance(sharding, Sharding) or not sharding.whole or mesh.empty:
        return value
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    named = {axis for axes, _ in sharding.dimensions for axis in axes}
    if not named or any(types.get(axis) is not AxisType.Auto for axis in named):
        return value
    entries: list[Any] = []
    for (axes, closed), size in zip(sharding.dimensions, value.shape, strict=True):
        parts = 1
        for axis in axes:
            parts *= mesh.shape[axis]
        if size % parts:
            return value
        entries.append(axes or (None if closed else PartitionSpec.UNCONSTRAINED))
    return jax.lax.with_sharding_constraint(value, PartitionSpec(*entries))


@rule(
    "sdy.sharding_constraint",
    "sdy.reshard",
    group=GROUP,
    meaning="`lax.with_sharding_constraint` where `jax.set_mesh` has set a mesh with those axes, else nothing",
)
def _constraint(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return constrain(operands[0], operation["sharding"])


@rule("sdy.propagation_barrier", group=GROUP, meaning="nothing")
def _barrier(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return operands[0]


@rule("sdy.sharding_group", group=GROUP, meaning="nothing")
def _group(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return ()


@rule("Sharding", group=GROUP, table=CUSTOM_CALLS, meaning="its Shardy sharding as a constraint; one of XLA's, nothing")
def _sharding(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    annotation = operation.get("sdy.sharding", None)
    return constrain(operands[0], annotation[0] if isinstance(annotation, tuple) else annotation)


@rule("annotate_device_placement", "xla.sdy.FuncResultSharding", group=GROUP, table=CUSTOM_CALLS, meaning="nothing")
def _placement(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return operands[0]
