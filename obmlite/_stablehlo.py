"""StableHLO modules as they are saved: without source locations, at an old target, and looked through once.

Uses ``jax.extend.mlir`` (public; the same from JAX 0.9.2 to 0.12). Only modules that this process made are parsed
here: MLIR's reader does not survive hostile bytes.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from jax.extend.mlir import ir, passmanager
from jax.extend.mlir.dialects import chlo, sdy, stablehlo

OLDEST_TARGET = "1.14.0"
"""StableHLO of the oldest JAX that obmlite supports (0.9.2), so that it can run what newer ones save."""


@dataclasses.dataclass(frozen=True, slots=True)
class Constant:
    """A constant in a module that is no splat."""

    type: str
    nbytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Module:
    """A module, ready to be saved.

    Attributes:
      artifact: StableHLO portable artifact.
      version: the StableHLO version that it was serialized for.
      custom_calls: targets of its custom calls, sorted.
      dialects: dialects of its operations, sorted.
      constants: its constants that are no splats, largest first.
    """

    artifact: bytes
    version: str
    custom_calls: tuple[str, ...]
    dialects: tuple[str, ...]
    constants: tuple[Constant, ...]


def normalise(artifact: bytes) -> Module:
    """Removes source locations from a module and serializes it at the oldest target that takes it.

    Args:
      artifact: a portable artifact, as ``jax.export`` makes them.
    """
    context = ir.Context()
    for dialect in (stablehlo, chlo, sdy):
        dialect.register_dialect(context)
    with context, ir.Location.unknown():
        module = stablehlo.deserialize_portable_artifact(context, artifact)
        passmanager.PassManager.parse("builtin.module(strip-debuginfo)").run(module.operation)
        custom_calls: set[str] = set()
        dialects: set[str] = set()
        constants: list[Constant] = []

        def look(op: Any) -> Any:
            name = op.name
            dialects.add(name.partition(".")[0])
            if name == "stablehlo.custom_call":
                custom_calls.add(ir.StringAttr(op.attributes["call_target_name"]).value)
            elif name == "stablehlo.constant" and not _is_splat(op):
                kind = ir.RankedTensorType(op.results[0].type)
                constants.append(Constant(_short(kind), _nbytes(kind)))
            return ir.WalkResult.ADVANCE

        module.operation.walk(look)
        version, out = _serialize(module)
    return Module(
        out,
        version,
        tuple(sorted(custom_calls)),
        tuple(sorted(dialects)),
        tuple(sorted(constants, key=lambda c: (-c.nbytes, c.type))),
    )


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


def _is_splat(op: Any) -> bool:
    value = op.attributes["value"]
    try:
        return bool(ir.DenseElementsAttr(value).is_splat)
    except (ValueError, TypeError):
        return False


def _nbytes(kind: Any) -> int:
    count = 1
    for size in kind.shape:
        count *= size
    return -(-count * _bits(str(kind.element_type)) // 8)


def _bits(element: str) -> int:
    if element.startswith("complex"):
        return 2 * _bits(element[8:-1])
    digits = re.search(r"\d+", element)
    return int(digits.group()) if digits else 8


def _short(kind: Any) -> str:
    return f"{kind.element_type}[{','.join(map(str, kind.shape))}]"
