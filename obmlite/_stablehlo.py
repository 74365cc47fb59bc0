"""StableHLO modules as they are saved: without large constants, source locations and empty meshes, at an old target.

Only modules that this process made are parsed here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax.extend.mlir import passmanager

from obmlite import _hoisting
from obmlite._hoisting import Constant
from obmlite._mlir import ir, look_into, parsed, sdy, stablehlo

__all__ = ["OLDEST_TARGET", "Constant", "Module", "normalise"]

OLDEST_TARGET = "1.14.0"
"""StableHLO of the oldest JAX that obmlite supports (0.9.2), so that it can run what newer ones save."""


@dataclasses.dataclass(frozen=True, slots=True)
class Module:
    """A module, ready to be saved.

    Attributes:
      artifact: StableHLO portable artifact.
      version: the StableHLO version that it was serialized for.
      custom_calls: targets of its custom calls, sorted.
      dialects: dialects of its operations, sorted.
      hoisted: values of the arguments that ``main`` takes after its own; held arrays (see :mod:`obmlite.dtypes`),
        read-only.
      constants: constants that are no splats and over the limit, and could not be hoisted, largest first.
    """

    artifact: bytes
    version: str
    custom_calls: tuple[str, ...]
    dialects: tuple[str, ...]
    hoisted: tuple[np.ndarray[Any, Any], ...]
    constants: tuple[Constant, ...]


def normalise(artifact: bytes, *, limit: int = 1024) -> Module:
    """Removes large constants and source locations, and serializes at the oldest target that takes the module.

    Args:
      artifact: a portable artifact, as ``jax.export`` makes them.
      limit: bytes that a constant may have and stay.
    """
    with parsed(artifact) as module:
        _drop_empty_meshes(module)
        hoisted, constants = _hoisting.hoist(module, limit)
        passmanager.PassManager.parse("builtin.module(strip-debuginfo)").run(module.operation)
        module.operation.verify()
        custom_calls, dialects = look_into(module)
        version, out = _serialize(module)
    return Module(out, version, custom_calls, dialects, hoisted, constants)


def _drop_empty_meshes(module: Any) -> None:
    """Removes sharding constraints on a mesh without axes, which say nothing, and then the mesh.

    JAX makes one wherever a PRNG key becomes numbers. It is of another dialect than StableHLO, whose promise of
    compatibility would not cover the module.
    """
    meshes = {
        ir.StringAttr(op.attributes["sym_name"]).value: op
        for op in module.body.operations
        if op.operation.name == "sdy.mesh" and not list(sdy.MeshAttr(op.attributes["mesh"]).axes)
    }
    if not meshes:
        return
    constraints: list[Any] = []
    others: set[str] = set()

    def visit(op: Any) -> Any:
        if op.name == "sdy.sharding_constraint":
            mesh = sdy.TensorShardingAttr(op.attributes["sharding"]).mesh_or_ref
            if isinstance(mesh, ir.FlatSymbolRefAttr) and mesh.value in meshes:
                constraints.append(op)
                return ir.WalkResult.ADVANCE
        if op.name.startswith("sdy.") or op.name == "func.func":
            others.update(str(op.attributes[name]) for name in op.attributes)
        elif "sdy.sharding" in op.attributes:
            others.add(str(op.attributes["sdy.sharding"]))
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for op in constraints:
        op.results[0].replace_all_uses_with(op.operands[0])
        op.erase()
    for name, op in meshes.items():
        if not any(f"@{name}" in text for text in others):
            op.erase()


def _targets() -> list[str]:
    requirement = stablehlo.StablehloCompatibilityRequirement
    versions = [
        stablehlo.get_version_from_compatibility_requirement(r) for r in (requirement.WEEK_12, requirement.WEEK_4)
    ]
    current = stablehlo.get_current_version()
    usable = {v for v in (OLDEST_TARGET, *versions, current) if _key(OLDEST_TARGET) <= _key(v) <= _key(current)}
    return sorted(usable, key=_key)


def _key(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _serialize(module: Any) -> tuple[str, bytes]:
    *older, newest = _targets()
    for version in older:
        try:
            return version, bytes(stablehlo.serialize_portable_artifact(module, version, True))
        except ValueError:  # an operation, or an attribute of one, that this version does not have
            continue
    return newest, bytes(stablehlo.serialize_portable_artifact(module, newest, True))
