"""How a saved function runs: its modules, read by one of several engines, under one derivative rule of ours.

============  ==========================================================================================
engine        how a module is read
============  ==========================================================================================
``export``    ``jax.export.deserialize``: public, refused by JAX six months after the package was made
``rebuild``   put together from what the manifest says (:mod:`obmlite._rebuild`)
============  ==========================================================================================

This is the boundary at which JAX's errors become ours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from obmlite import _promises, _rebuild
from obmlite.errors import (
    ArgumentError,
    CorruptPackageError,
    ObmliteError,
    PlatformError,
    UnsupportedFormatError,
)
from obmlite.schema.records import ModuleFormat, ModuleRecord

ENGINES = ("export", "rebuild")
"""The order in which ``auto`` tries them."""

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""Platforms that a function is exported for unless told otherwise."""

Blobs = Callable[[ModuleRecord], bytes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What a function runs: its module and those of its VJPs, and where their bytes are.

    Attributes:
      modules: the primal, and its VJPs of order 1, 2, ….
      constraints: on the symbols.
      blobs: gives the bytes of a module's file, once their digest matches.
      allow_custom_calls: targets beyond the stable ones that may be called.
    """

    modules: tuple[ModuleRecord, ...]
    constraints: tuple[str, ...]
    blobs: Blobs
    allow_custom_calls: Collection[str] = ()


class Engine:
    """A program, read by one engine and ready to be traced."""

    def __init__(self, program: Program, name: str) -> None:
        self.name = name
        self._program = program
        self._levels: dict[int, jax_export.Exported] = {}
        self._chain: Any = None
        self.level(0)

    def level(self, order: int) -> jax_export.Exported:
        """The module of the primal (0) or of a VJP, read when first needed."""
        if order not in self._levels:
            module = self._program.modules[order]
            blob = self._program.blobs(module)
            artifact = blob[module.offset : module.offset + module.length]
            _check_artifact(module, artifact, self._program.allow_custom_calls)
            exported = _READERS[self.name](self._program, order, blob, artifact)
            self._levels[order] = _rebuild.without_lapack(exported, artifact)
        return self._levels[order]

    def __call__(self, leaves: Sequence[Any], captures: Sequence[Any]) -> Sequence[Any]:
        """Calls the function, to be traced under ``jax.jit``.

        Args:
          leaves: of the arguments.
          captures: as :func:`captured` lists them.
        """
        modules = self._program.modules
        by_key = dict(zip(captured(modules), captures, strict=True))
        primal = modules[0]
        own = [by_key[c.weights, c.leaf] for c in primal.captures if c.argument < primal.traced]
        hoisted = tuple(
            tuple(by_key[c.weights, c.leaf] for c in module.captures if c.argument >= module.traced)
            for module in modules
        )
        arguments = (*leaves, *own)
        axes = frozenset().union(*map(_varying, arguments), *map(_varying, captures))
        result: Sequence[Any] = self._derived(0)(
            _vary(arguments, axes), tuple(_vary(values, axes) for values in hoisted)
        )
        return result

    def _derived(self, order: int) -> Callable[..., Sequence[Any]]:
        """The call of one module, with the next one as its derivative.

        ``Exported.call`` has a derivative of its own, which is wrong inside ``shard_map`` and knows no captures.
        """
        name, last = self._program.modules[0].name, order + 1 == len(self._program.modules)
        call: Any = jax.custom_vjp(_not_vectorised(functools.partial(self._raw, order), name))

        def forward(arguments: Any, hoisted: Any) -> Any:
            return call(arguments, hoisted), () if last else (arguments, hoisted)

        def backward(kept: Any, cotangents: Any) -> Any:
            if last:  # not before a gradient is needed: there may be a stop_gradient behind the call
                raise _underived(name, order)
            arguments, hoisted = kept
            wanted = self.level(order + 1).in_avals[len(arguments) :]
            given = [
                np.zeros(np.shape(c), jax.dtypes.float0) if aval.dtype == jax.dtypes.float0 else c
                for c, aval in zip(cotangents, wanted, strict=False)
            ]
            return tuple(self._derived(order + 1)((*arguments, *given), hoisted)), None

        call.defvjp(forward, backward)
        derived: Callable[..., Sequence[Any]] = call
        return derived

    def _raw(self, order: int, arguments: Sequence[Any], hoisted: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
        given = (*arguments, *hoisted[order])
        axes = frozenset().union(*map(_varying, given))
        return _vary(jax.tree.leaves(self.level(order).call(*given)), axes)


def _underived(name: str, order: int) -> ArgumentError:
    return ArgumentError(
        "The gradient of a function is asked for that was saved without it."
        if order == 0
        else "A derivative of a function is asked for of a higher order than was saved.",
        object=name,
        field="vjp_order",
        expected=f"at least {order + 1}",
        found=str(order),
        fix=f"vjp_order={order + 1} when exporting it, or jax.lax.stop_gradient where no gradient is wanted",
    )


def _not_vectorised(raw: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same, for a clear error under ``jax.vmap``."""
    call: Any = jax.custom_batching.custom_vmap(raw)

    @call.def_vmap  # type: ignore[untyped-decorator]
    def refuse(*_: Any) -> Any:
        raise ArgumentError(
            "A saved function runs for the shapes that it was exported for: jax.vmap cannot give it others.",
            object=name,
            expected="a call without jax.vmap, and without what uses it: jax.jacrev, jax.hessian",
            fix='export it for any batch size, as in obmlite.spec("f32[b,4]"), and call it once for the whole batch, '
            "or use jax.lax.map, without batch_size=",
        )

    named: Callable[..., Any] = call
    return named


def captured(modules: Sequence[ModuleRecord]) -> list[tuple[str, int]]:
    """(weights, leaf) of each array that the modules of a program take besides arguments and cotangents, once."""
    return list(dict.fromkeys((c.weights, c.leaf) for module in modules for c in module.captures))


# --- inside shard_map, JAX types values by the mesh axes over which they vary; an exported call forgets them


def _varying(value: Any) -> frozenset[str]:
    aval = jax.typeof(value)
    manual = getattr(aval, "manual_axis_type", None)  # from JAX 0.10 on; before it, `vma`
    varying = manual.varying if manual is not None else getattr(aval, "vma", ())
    return frozenset(varying)


def _vary(values: Sequence[Any], axes: frozenset[str]) -> tuple[Any, ...]:
    if not axes:
        return tuple(values)
    return tuple(
        jax.lax.pcast(value, missing, to="varying")
        if (missing := tuple(sorted(axes - _varying(value)))) and value.dtype != jax.dtypes.float0
        else value
        for value in values
    )


# --- reading modules


def load(program: Program, engine: str = "auto") -> Engine:
    """Reads a program.

    Args:
      program: what to run.
      engine: one of :data:`ENGINES`, or ``"auto"`` for the first that this JAX accepts.

    Raises:
      UnsupportedFormatError: none does; the text has each one's reason.
      CorruptPackageError: a module is not what the manifest says.
    """
    if engine != "auto":
        return Engine(program, engine)
    reasons = []
    for name in ENGINES:
        try:
            return Engine(program, name)
        except UnsupportedFormatError as error:
            if error.field == "custom calls":
                raise
            reasons.append(f"{name}: {error.found or error.problem}")
    raise UnsupportedFormatError(
        "This JAX does not read the function.",
        field="engine",
        expected=f"jax {jax.__version__}",
        found=f"saved with jax {program.modules[0].jax_version}; " + "; ".join(reasons),
        fix=f"load it with jax {program.modules[0].jax_version}",
    )


def _check_artifact(module: ModuleRecord, artifact: bytes, allowed: Collection[str]) -> None:
    """Compares a module with what the manifest says of it, and refuses native code that nobody allowed."""
    from obmlite import _stablehlo  # MLIR's bindings take long to import

    lowest = jax_export.minimum_supported_calling_convention_version
    highest = jax_export.maximum_supported_calling_convention_version
    if not lowest <= module.calling_convention <= highest:  # JAX itself looks at it only when it exports
        raise UnsupportedFormatError(
            "This JAX does not call functions of this calling convention.",
            field="Module.calling_convention",
            expected=f"{lowest} to {highest}, as jax {jax.__version__} does",
            found=f"{module.calling_convention}, saved with jax {module.jax_version}",
            fix=f"load it with jax {module.jax_version}",
        )

    try:
        custom_calls, _ = _stablehlo.look(artifact)
    except ValueError as error:  # a newer StableHLO than this JAX has
        raise _too_new(module) from error
    if custom_calls != module.custom_calls:
        raise CorruptPackageError(
            "A function's code calls other targets than the manifest says.",
            field="Module.custom_calls",
            expected=", ".join(module.custom_calls) or "none",
            found=", ".join(custom_calls) or "none",
        )
    _promises.check_custom_calls(custom_calls, allowed, loading=True)
    _promises.prepare(artifact)


def _too_new(module: ModuleRecord) -> UnsupportedFormatError:
    return UnsupportedFormatError(
        "This JAX does not run the function.",
        field="stablehlo",
        expected=f"StableHLO that jax {jax.__version__} reads",
        found=f"StableHLO {module.stablehlo_version}, saved with jax {module.jax_version}",
        fix=f"load it with jax {module.jax_version} or later",
    )


def _read_export(program: Program, order: int, blob: bytes, artifact: bytes) -> jax_export.Exported:
    module = program.modules[order]
    if module.format is not ModuleFormat.JAX_EXPORT:
        raise _not_exported(module, "a bare artifact, as jax.export could not serialize the function")
    try:
        exported = jax_export.deserialize(bytearray(blob))
        for _ in range(order):
            exported = exported.vjp()
    except Exception as error:
        raise _not_exported(module, str(error)[:300]) from error
    counts = len(exported.in_avals), len(exported.out_avals)
    if exported.mlir_module_serialized != artifact or counts != (len(module.arguments), len(module.results)):
        raise CorruptPackageError(
            "A function's file holds another module than the manifest says.", field="Module.stablehlo_offset"
        )
    return _rebuild.completed(_rebuild.without_vjp(exported), module, program.constraints)


def _not_exported(module: ModuleRecord, reason: str) -> UnsupportedFormatError:
    return UnsupportedFormatError(
        "jax.export does not read the function.",
        field="engine",
        expected=f"what jax.export of jax {jax.__version__} reads",
        found=f"saved with jax {module.jax_version}: {reason}",
        fix=f'load it with engine="rebuild", or with jax {module.jax_version}',
    )


def _read_rebuild(program: Program, order: int, blob: bytes, artifact: bytes) -> jax_export.Exported:
    del blob
    return _rebuild.rebuild(program.modules[order], artifact, program.constraints)


_READERS = {"export": _read_export, "rebuild": _read_rebuild}


# --- errors


def explain(error: Exception, program: Program, leaves: Sequence[Any]) -> ObmliteError | None:
    """What lies behind an error that JAX raised when a function with good arguments ran; None if not known."""
    module = program.modules[0]
    platform = _platform(leaves)
    names = {"gpu": {"cuda", "rocm"}}.get(platform, {platform})
    if not names & set(module.platforms):
        return PlatformError(
            "The function was not exported for the platform that it is to run on.",
            field="platforms",
            expected=", ".join(module.platforms),
            found=platform,
            fix=f"export it with platforms= that include {platform}, or move its arguments",
        )
    text = str(error)
    if "incompatible devices" in text:
        return ArgumentError(
            "Arguments are committed to different devices.",
            field="devices",
            expected="arguments on the same devices, or not committed to any",
            found=text[:500],
            fix="jax.device_put them all with shardings of one mesh",
        )
    devices = len(frozenset().union(*(leaf.sharding.device_set for leaf in leaves if _is_array(leaf)), ()))
    if module.num_devices > 1 and "devices" in text:
        mesh = f"a mesh of {module.mesh}" if module.mesh else f"{module.num_devices} devices"
        return ArgumentError(
            "The function fixes the devices that it runs on, and was called with others.",
            field="devices",
            expected=mesh,
            found=f"{devices or 1} {'device' if devices < 2 else 'devices'}",
            fix="call .on(mesh) of the function with such a mesh, or place the arguments on one",
        )
    if "Invalid sharding for instruction" in text:
        return ArgumentError(
            "The function holds shardings for another number of devices than it was called on.",
            field="devices",
            expected="one device, or as many as the abstract mesh has that it was exported with",
            found=text.partition("\n")[0].rpartition(": ")[2][:300],
        )
    if "incompatible with mesh_shape" in text:
        return ArgumentError(
            "A result is split as the axes of the mesh cannot express.",
            field="devices",
            found=text[:300],
            fix="call the function on a mesh with the axes that it was exported with",
        )
    if "forward-mode autodiff" in text:
        return ArgumentError(
            "A saved function has derivatives in reverse mode only.",
            expected="jax.grad, jax.vjp or jax.value_and_grad",
            found="jax.jvp, or what uses it: jax.jacfwd, jax.hessian, jax.linearize",
            fix="jax.vjp instead; for products with the Hessian, jax.grad of jax.vjp with vjp_order=2 when exporting",
        )
    if "deserialize StableHLO" in text:
        return _too_new(module)
    if "Error refining shapes" in text or "refinement" in text:
        return ArgumentError("The shapes of the arguments do not fit the function.", found=text[:300])
    return None


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)


def _platform(leaves: Sequence[Any]) -> str:
    for leaf in leaves:
        if _is_array(leaf) and leaf.committed:
            return str(next(iter(leaf.sharding.device_set)).platform)
    device = jax.config.jax_default_device
    return str(getattr(device, "platform", device) or jax.default_backend())
