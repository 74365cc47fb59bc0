"""A function over flat leaves → StableHLO modules: of itself and of its VJPs, without what it closed over."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jaxlib
import numpy as np
from jax import export as jax_export

from obmlite import _arrays, _capturing, _promises, _rebuild
from obmlite.errors import ExportError
from obmlite.schema.records import Capture, ModuleFormat, ModuleRecord
from obmlite.specs import MeshSpec, Partition, TensorSpec

if TYPE_CHECKING:
    from obmlite import _stablehlo
    from obmlite._exporting import Options

MAX_CONSTANT_BYTES = 1024
"""Largest array, in bytes, that may stay in StableHLO; weights belong into safetensors."""


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A lowered function: see :class:`obmlite._exporting.Exported`."""

    modules: tuple[ModuleRecord, ...]
    blobs: Mapping[str, bytes]
    captures: tuple[Any, ...]


class _Captures:
    """Arrays that were closed over, each once; those that come from code are told apart by their bytes."""

    def __init__(self, lifted: Sequence[Any]) -> None:
        self.values: list[Any] = list(lifted)
        self._by_digest: dict[bytes, int] | None = None

    def number(self, value: np.ndarray[Any, Any]) -> int:
        if self._by_digest is None:
            self._by_digest = {}
            for n, lifted in enumerate(self.values):
                self._by_digest.setdefault(_arrays.content_digest(lifted), n)
        key = _arrays.content_digest(value)
        if key not in self._by_digest:
            self._by_digest[key] = len(self.values)
            self.values.append(value)
        return self._by_digest[key]


def lower(
    flat: Callable[..., tuple[Any, ...]],
    structs: Sequence[Any],
    specs: Sequence[TensorSpec],
    name: str,
    options: Options,
) -> Lowered:
    """Lowers a function and its VJPs.

    Args:
      flat: the function over flat leaves.
      structs: shape and dtype of each leaf.
      specs: what else is known of each.
      name: what to call it.
      options: platforms, order of VJPs, custom calls.

    Raises:
      ExportError: it cannot be lowered.
    """
    flat.__name__ = flat.__qualname__ = identifier(name)
    closed = _trace(flat, structs)
    _refuse_callbacks(closed)
    structs = _placed(structs, specs, closed)
    lifted = _capturing.lift(closed, MAX_CONSTANT_BYTES)
    differentiable = True
    try:
        levels = _levels(lifted, structs, name, options)
    except Exception as error:
        if type(error).__name__ != "CustomVJPException" or not lifted.captures:  # JAX has no public name for it
            raise
        # A custom derivative closed over an array: its rule says nothing about it, so its gradient is 0.
        differentiable = False
        held = dataclasses.replace(lifted, call=_constant(lifted, len(structs)))
        levels = _levels(held, structs, name, options)
    return _records(levels, lifted, len(structs), differentiable, options, _mesh(closed, levels[0].nr_devices))


def identifier(name: str) -> str:
    """A name that a StableHLO module may have."""
    return re.sub(r"\W", "_", name) or "function"


def _trace(flat: Callable[..., Any], structs: Sequence[Any]) -> Any:
    try:
        return jax.jit(flat).trace(*structs).jaxpr  # the user's own errors pass through from here
    except jax.errors.ConcretizationTypeError as error:
        error.add_note('obmlite: an argument that decides what is computed must be static, as in static=("train",)')
        raise


def _placed(structs: Sequence[Any], specs: Sequence[TensorSpec], closed: Any) -> list[Any]:
    """The leaves with their shardings, where the function fixes a mesh of as many devices; elsewhere they are hints."""
    fixed = functools.cache(lambda devices: _mesh(closed, devices))

    def place(struct: Any, spec: TensorSpec) -> Any:
        sharding = _rebuild.named_sharding(spec)
        if sharding is None or not fixed(sharding.mesh.size):
            return struct
        if set(sharding.mesh.axis_types) != {jax.sharding.AxisType.Auto}:  # others would be part of the value's type
            return struct
        return struct.update(sharding=sharding)

    return list(map(place, structs, specs))


def _constant(lifted: _capturing.Traced, count: int) -> _capturing.FlatFunction:
    def call(*arguments: Any) -> tuple[Any, ...]:
        return lifted.call(*arguments[:count], *map(jax.lax.stop_gradient, arguments[count:]))

    return call


def _levels(
    lifted: _capturing.Traced, structs: Sequence[Any], name: str, options: Options
) -> list[jax_export.Exported]:
    """The function and its VJPs, as JAX exports them."""

    def call(*arguments: Any) -> tuple[Any, ...]:
        return lifted.call(*arguments)

    # A fresh function: JAX keeps lowerings, with the locations that they had, by the function that was traced.
    call.__name__ = call.__qualname__ = identifier(name)
    more = [jax.ShapeDtypeStruct(c.shape, c.dtype) for c in lifted.captures]
    checks = [jax_export.DisabledSafetyCheck.custom_call(target) for target in options.allow_custom_calls]
    with _explained(options.platforms):
        exported = jax_export.export(jax.jit(call), platforms=list(options.platforms), disabled_checks=checks)
        levels = [exported(*structs, *more)]
    for _ in range(options.vjp_order):
        levels.append(levels[-1].vjp())
    return levels


def _records(
    levels: Sequence[jax_export.Exported],
    lifted: _capturing.Traced,
    count: int,
    differentiable: bool,
    options: Options,
    mesh: MeshSpec | None,
) -> Lowered:
    from obmlite import _stablehlo  # MLIR's bindings take long to import, and loading has no use for them

    captures = _Captures(lifted.captures)
    own = [Capture("", n, differentiable, count + n) for n in range(len(lifted.captures))]
    modules: list[ModuleRecord] = []
    artifacts: list[_stablehlo.Module] = []
    hoisted: list[list[TensorSpec]] = []
    for order, exported in enumerate(levels):
        module = _stablehlo.normalise(exported.mlir_module_serialized, limit=MAX_CONSTANT_BYTES)
        _check_constants(module)
        _promises.check_custom_calls(module.custom_calls, options.allow_custom_calls, loading=False)
        traced = len(exported.in_avals)
        ins, outs = _rebuild.shardings(exported)
        more = [TensorSpec.of(value) for value in module.hoisted]
        places = [captures.number(value) for value in module.hoisted]
        kept = (*exported.module_kept_var_idx, *range(traced, traced + len(more)))
        modules.append(
            ModuleRecord(
                file="",
                format=ModuleFormat.JAX_EXPORT,
                offset=0,
                length=len(module.artifact),
                stablehlo_version=module.version,
                calling_convention=exported.calling_convention_version,
                platforms=tuple(exported.platforms),
                num_devices=exported.nr_devices,
                arguments=(*map(_spec, exported.in_avals, ins), *more),
                results=tuple(map(_spec, exported.out_avals, outs)),
                traced=traced,
                mesh=mesh,
                kept=None if len(kept) == traced + len(more) else tuple(kept),
                donated=lifted.donated if order == 0 else (),
                captures=(*own, *(Capture("", leaf, False, traced + n) for n, leaf in enumerate(places))),
                ordered_effects=tuple(type(e).__name__ for e in exported.ordered_effects),
                unordered_effects=tuple(type(e).__name__ for e in exported.unordered_effects),
                disabled_checks=tuple(str(c) for c in exported.disabled_safety_checks),
                uses_global_constants=exported.uses_global_constants,
                custom_calls=module.custom_calls,
                dialects=module.dialects,
                jax_version=jax.__version__,
                jaxlib_version=jaxlib.__version__,
                name=exported.fun_name,
            )
        )
        artifacts.append(module)
        hoisted.append(more)
    records, blobs = _files(levels, modules, [m.artifact for m in artifacts], hoisted)
    return Lowered(tuple(records), blobs, tuple(captures.values))


def _spec(aval: Any, sharding: Any) -> TensorSpec:
    # Not the aval's own sharding: on a mesh of automatic axes it says nothing, and would type results by that mesh.
    return dataclasses.replace(TensorSpec.of(aval), partition=Partition.of(sharding))


def _files(
    levels: Sequence[jax_export.Exported],
    modules: Sequence[ModuleRecord],
    artifacts: Sequence[bytes],
    hoisted: Sequence[Sequence[TensorSpec]],
) -> tuple[list[ModuleRecord], dict[str, bytes]]:
    """jax.export's own serialization with our modules in it; where it has none, each artifact in a file of its own."""
    whole: jax_export.Exported | None = None
    for exported, artifact, more in reversed(list(zip(levels, artifacts, hoisted, strict=True))):
        whole = _rebuild.with_module(exported, artifact, more, whole)
    assert whole is not None
    try:
        blob = bytes(whole.serialize(vjp_order=len(levels) - 1))
    except (KeyError, OverflowError, TypeError, ValueError):  # int2; more than 65,535 arguments; whatever it lacks
        blob = b""
    offsets = [blob.find(artifact) for artifact in artifacts]
    if all(offset >= 0 for offset in offsets):
        return [dataclasses.replace(m, file="0", offset=o) for m, o in zip(modules, offsets, strict=True)], {"0": blob}
    bare = [dataclasses.replace(m, file=str(n), format=ModuleFormat.PORTABLE_ARTIFACT) for n, m in enumerate(modules)]
    return bare, {str(n): artifact for n, artifact in enumerate(artifacts)}


def _check_constants(module: _stablehlo.Module) -> None:
    if module.constants:
        shown = ", ".join(f"{c.type} ({c.nbytes} bytes)" for c in module.constants[:5])
        count = len(module.constants)
        raise ExportError(
            "The function captures arrays in places that they cannot be taken out of.",
            field="captured arrays",
            expected=f"at most {MAX_CONSTANT_BYTES} bytes each",
            found=shown + (f", … ({count} in all)" if count > 5 else ""),
            fix="pass them as arguments, and so as weights, instead of closing over them",
        )


# --- what a jaxpr tells


def _eqns(closed: Any) -> Any:
    """All equations of a jaxpr, those of inner ones too."""
    pending, seen = [closed], set()
    while pending:
        current = pending.pop()
        current = getattr(current, "jaxpr", current)
        if id(current) in seen or not hasattr(current, "eqns"):
            continue
        seen.add(id(current))
        for eqn in current.eqns:
            yield eqn
            for value in eqn.params.values():
                parts = value if isinstance(value, (tuple, list)) else (value,)
                pending.extend(p for p in parts if hasattr(p, "eqns") or hasattr(p, "jaxpr"))


def _refuse_callbacks(closed: Any) -> None:
    """Refuses calls back into Python, wherever in the function they are; JAX's own message depends on the platforms."""
    for eqn in _eqns(closed):
        name = eqn.primitive.name
        if "callback" in name or name.startswith("debug_print"):
            raise ExportError(
                "The function calls back into Python, which no other process can do.",
                found=name,
                fix="remove callbacks and debug prints (jax.debug, pure_callback, io_callback) before exporting",
            )


def _mesh(closed: Any, devices: int) -> MeshSpec | None:
    """The mesh of so many devices that a function fixes, by shard_map, a constraint, or in_shardings of a jit."""
    for eqn in _eqns(closed):
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple) else (value,):
                mesh = getattr(part, "mesh", part)
                if isinstance(mesh, (jax.sharding.Mesh, jax.sharding.AbstractMesh)) and mesh.size == devices > 1:
                    return MeshSpec.of(mesh)
    return None


# --- JAX's errors when lowering


class _explained:  # noqa: N801 - reads as a statement
    def __init__(self, platforms: Sequence[str]) -> None:
        self._platforms = platforms

    def __enter__(self) -> None:
        """Nothing is to be set up."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        # Tracing is over, so these come from JAX's lowering rules, not from the user's function.
        if not isinstance(error, (NotImplementedError, ValueError, TypeError, RuntimeError)):
            return
        text = str(error)
        found = re.search(r"primitive '?([\w.-]+)'? not found for platforms? \[?'?(\w+)", text)
        if found:
            raise ExportError(
                "The function uses a primitive that one of the platforms does not have.",
                field="platforms",
                expected=f"{found[1]} on {', '.join(self._platforms)}",
                found=f"no {found[1]} on {found[2]}",
                fix=f"platforms={tuple(p for p in self._platforms if p != found[2])!r}",
            ) from error
        if "no compatibility guarantees" in text:
            targets = sorted(set(re.findall(r"custom_call @([\w.$]+)", text)))
            raise ExportError(
                "The function makes custom calls that JAX does not promise to keep.",
                field="custom calls",
                expected="those of JAX's list of stable targets",
                found=", ".join(targets) or text[:300],
                fix=f"allow_custom_calls={set(targets) or '{…}'!r}, here and when loading",
            ) from error
        if "Cannot solve for values of dimension variables" in text:
            raise ExportError(
                "The symbols cannot be found from the shapes of the arguments.",
                field="dimension",
                expected="for each symbol a dimension that is linear in it and has no other that is unknown",
                found=text.partition("polymorphic shapes specifications: ")[2][:300] or text[:300],
            ) from error
        raise ExportError(
            "JAX cannot lower the function.",
            field="platforms",
            expected=f"code for {', '.join(self._platforms)}",
            found=text[:300],
            fix="if one platform is at fault, leave it out of platforms=",
        ) from error
