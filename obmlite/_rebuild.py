"""``jax.export.Exported`` put together from its parts: the one place that knows its private fields.

``jax.export`` refuses what it serialized itself after six months, loses constraints, and cannot hold more than 65,535
arguments; the object that it would make can be made without it. The fields are those of JAX 0.9.2 to 0.12, of which
each release has most: ``_has_named_shardings`` (until 0.11), ``_in_named_shardings``, ``_out_named_shardings``,
``_get_vjp``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import export as jax_export
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from obmlite import dims
from obmlite.errors import UnsupportedFormatError
from obmlite.schema.records import ModuleRecord
from obmlite.specs import UNCONSTRAINED, MeshSpec, Partition, TensorSpec

_FIELDS = frozenset(field.name for field in dataclasses.fields(jax_export.Exported))

Vjp = Callable[[Any], jax_export.Exported]


def rebuild(module: ModuleRecord, artifact: bytes, constraints: Sequence[str]) -> jax_export.Exported:
    """An ``Exported`` from what a manifest says of a module; its ``vjp`` is not set.

    Raises:
      UnsupportedFormatError: the module has effects, or this JAX makes such objects of other parts.
    """
    if module.ordered_effects or module.unordered_effects:
        raise UnsupportedFormatError(
            "A function with effects cannot be rebuilt.",
            found=", ".join((*module.ordered_effects, *module.unordered_effects)),
        )
    every = [*module.arguments, *module.results]
    shapes = dims.to_jax([s.shape for s in every], [dims.parse_constraint(c) for c in constraints])
    shardings = [named_sharding(s) if module.num_devices > 1 else None for s in every]
    avals = [_aval(s, shape, sharding) for s, shape, sharding in zip(every, shapes, shardings, strict=True)]
    count = len(module.arguments)
    return _make(
        fun_name=module.name,
        in_tree=_arguments_tree(count),
        in_avals=tuple(avals[:count]),
        out_tree=_results_tree(len(module.results)),
        out_avals=tuple(avals[count:]),
        _has_named_shardings=True,
        _in_named_shardings=tuple(shardings[:count]),
        _out_named_shardings=tuple(shardings[count:]),
        in_shardings_hlo=(None,) * count,
        out_shardings_hlo=(None,) * len(module.results),
        nr_devices=module.num_devices,
        platforms=module.platforms,
        ordered_effects=(),
        unordered_effects=(),
        disabled_safety_checks=tuple(jax_export.DisabledSafetyCheck(text) for text in module.disabled_checks),
        mlir_module_serialized=artifact,
        calling_convention_version=module.calling_convention,
        module_kept_var_idx=_Kept(range(count) if module.kept is None else module.kept),
        uses_global_constants=module.uses_global_constants,
        _get_vjp=None,
    )


class _Kept(tuple[int, ...]):
    """Numbers of arguments. JAX looks for each argument in them: a plain tuple answers after a walk."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._set = frozenset(numbers)

    def __contains__(self, number: object) -> bool:
        return number in self._set


def _make(**parts: Any) -> jax_export.Exported:
    try:
        return jax_export.Exported(**{name: part for name, part in parts.items() if name in _FIELDS})
    except TypeError as error:
        raise UnsupportedFormatError(
            "This JAX makes exported functions of other parts than obmlite knows.",
            expected="jax 0.9.2 to 0.12",
            found=f"jax {jax.__version__}: {error}",
        ) from error


def _arguments_tree(count: int) -> Any:
    return jax.tree.structure(((0,) * count, {}))


def _results_tree(count: int) -> Any:
    return jax.tree.structure((0,) * count)


def _aval(spec: TensorSpec, shape: tuple[Any, ...], sharding: Any) -> Any:
    extra: dict[str, Any] = {} if sharding is None else {"sharding": sharding}
    if spec.memory_kind == "pinned_host":
        extra["memory_space"] = jax.memory.Space.Host
    return jax.core.ShapedArray(shape, spec.dtype, weak_type=spec.weak_type, **extra)


def mesh_of(mesh: MeshSpec) -> AbstractMesh:
    """The mesh, without devices, that a manifest describes."""
    types = tuple((AxisType.Auto, AxisType.Explicit, AxisType.Manual)[kind - 1] for kind in mesh.types)
    return AbstractMesh(mesh.sizes, mesh.names, axis_types=types)


def partition_spec(partition: Partition) -> PartitionSpec:
    """The JAX form of a partition."""
    entries = [PartitionSpec.UNCONSTRAINED if e == UNCONSTRAINED else e for e in partition.entries]
    extra = {
        name: frozenset(axes)
        for name, axes in (("unreduced", partition.unreduced), ("reduced", partition.reduced))
        if axes
    }
    return PartitionSpec(*entries, **extra)


def named_sharding(spec: TensorSpec) -> NamedSharding | None:
    """The JAX form of a spec's partition; None where it has none that names a mesh."""
    if spec.partition is None or spec.partition.mesh is None:
        return None
    return NamedSharding(mesh_of(spec.partition.mesh), partition_spec(spec.partition))


# --- what was read


def without_vjp(exported: jax_export.Exported) -> jax_export.Exported:
    """The same without a derivative of its own."""
    return dataclasses.replace(exported, _get_vjp=None, module_kept_var_idx=_Kept(exported.module_kept_var_idx))


def completed(exported: jax_export.Exported, module: ModuleRecord, constraints: Sequence[str]) -> jax_export.Exported:
    """The same with what jax.export's serialization does not hold: weak types, and constraints on symbols."""
    avals = [*exported.in_avals, *exported.out_avals]
    specs = [*module.arguments, *module.results]
    changed = [
        aval if aval.weak_type == spec.weak_type else aval.update(weak_type=spec.weak_type)
        for aval, spec in zip(avals, specs, strict=True)
    ]
    if constraints:
        shapes = dims.to_jax([s.shape for s in specs], [dims.parse_constraint(c) for c in constraints])
        changed = [aval.update(shape=shape) for aval, shape in zip(changed, shapes, strict=True)]
    count = len(exported.in_avals)
    return dataclasses.replace(exported, in_avals=tuple(changed[:count]), out_avals=tuple(changed[count:]))


def without_lapack(exported: jax_export.Exported, artifact: bytes) -> jax_export.Exported:
    """The same, for a call that does not set LAPACK up, where that is safe; it takes as long as a small import.

    Calling an exported function sets LAPACK up whenever ``"cpu"`` is among its platforms. Under another name, with the
    check of platforms off, the first platform's code is run on whatever is no platform of the function: so the backend
    must be CPU, its code must be the first, there must be no LAPACK call in it, and the function must have all other
    platforms, or exporting one that calls it would give them CPU's code.
    """
    every = {"cpu", "cuda", "rocm", "tpu"}
    if exported.platforms[:1] != ("cpu",) or not every <= set(exported.platforms):
        return exported
    if b"lapack_" in artifact or jax.default_backend() != "cpu":
        return exported
    checks = (*exported.disabled_safety_checks, jax_export.DisabledSafetyCheck.platform())
    platforms = ("host", *exported.platforms[1:])
    return dataclasses.replace(exported, platforms=platforms, disabled_safety_checks=checks)


# --- while exporting


def shardings(exported: jax_export.Exported) -> tuple[Sequence[Any], Sequence[Any]]:
    """The named shardings of an exported function's arguments and of its results; None for each that has none."""
    return exported._in_named_shardings, exported._out_named_shardings


def with_module(
    exported: jax_export.Exported,
    artifact: bytes,
    captures: Sequence[TensorSpec],
    vjp: jax_export.Exported | None,
) -> jax_export.Exported:
    """An exported function with another module, which takes more arguments behind those it had, and another VJP."""
    count = len(exported.in_avals)
    avals = tuple(_aval(spec, spec.shape, None) for spec in captures)
    none = (None,) * len(captures)
    changes: dict[str, Any] = {
        "mlir_module_serialized": artifact,
        "in_tree": _arguments_tree(count + len(captures)),
        "in_avals": (*exported.in_avals, *avals),
        "_in_named_shardings": (*exported._in_named_shardings, *none),
        "in_shardings_hlo": (*exported.in_shardings_hlo, *none),
        "module_kept_var_idx": (*exported.module_kept_var_idx, *range(count, count + len(captures))),
        "_get_vjp": None if vjp is None else lambda _: vjp,
    }
    return dataclasses.replace(exported, **{name: part for name, part in changes.items() if name in _FIELDS})
