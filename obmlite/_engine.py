"""How a saved function runs: its modules, read by one of several engines, under one derivative rule of ours.

============  ==========================================================================================
engine        how a module is read
============  ==========================================================================================
``export``    ``jax.export.deserialize``: public, refused by JAX six months after the package was made
``rebuild``   put together from what the manifest says (:mod:`obmlite._rebuild`)
``replay``    operation by operation, as ordinary JAX (:mod:`obmlite.replay`)
============  ==========================================================================================

The first two run a module as one opaque operation, for which there is no ``vmap`` and no derivative but those saved:
there they replay it too, where its operations can be.

This is the boundary at which JAX's errors become ours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax import export as jax_export

from obmlite import _promises, _rebuild, _replaying
from obmlite.errors import (
    ArgumentError,
    CorruptPackageError,
    ObmliteError,
    PlatformError,
    UnsupportedFormatError,
)
from obmlite.schema.records import ModuleFormat, ModuleRecord

ENGINES = ("export", "rebuild", "replay")
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
      apart: where the program is a stranger's: gives a module as another process has written it anew. Only the
        ``replay`` engine reads such.
    """

    modules: tuple[ModuleRecord, ...]
    constraints: tuple[str, ...]
    blobs: Blobs
    allow_custom_calls: Collection[str] = ()
    apart: Callable[[bytes], bytes] | None = None

    def artifact(self, module: ModuleRecord) -> bytes:
        """A module's portable artifact, a part of its file."""
        return self.blobs(module)[module.offset : module.offset + module.length]

    @functools.cached_property
    def replays(self) -> _replaying.Replays:
        """Its modules, re-traced as ordinary JAX."""
        return _replaying.Replays(self)


class Engine(Protocol):
    """A program, read by one engine and ready to be traced."""

    name: str

    def __call__(self, leaves: Sequence[Any], captures: Sequence[Any]) -> Sequence[Any]:
        """Calls the function, to be traced under ``jax.jit``.

        Args:
          leaves: of the arguments.
          captures: as :func:`captured` lists them.
        """
        ...


class _Replaying:
    """The ``replay`` engine: every transformation is JAX's own, and nothing of the saved VJPs is used."""

    name = "replay"

    def __init__(self, program: Program) -> None:
        self._program = program
        program.replays.check(0, _here())

    def __call__(self, leaves: Sequence[Any], captures: Sequence[Any]) -> Sequence[Any]:
        return _replay(self._program, 0, *_arranged(self._program, leaves, captures))


class _Exported:
    """The ``export`` and ``rebuild`` engines."""

    def __init__(self, program: Program, name: str) -> None:
        self.name = name
        self._program = program
        self._levels: dict[int, jax_export.Exported] = {}
        self.level(0)

    def level(self, order: int) -> jax_export.Exported:
        """The module of the primal (0) or of a VJP, read when first needed."""
        if order not in self._levels:
            module = self._program.modules[order]
            blob = self._program.blobs(module)
            artifact = self._program.artifact(module)
            _check_artifact(module, artifact, self._program.allow_custom_calls)
            exported = _READERS[self.name](self._program, order, blob, artifact)
            self._levels[order] = _rebuild.without_lapack(exported, artifact)
        return self._levels[order]

    def __call__(self, leaves: Sequence[Any], captures: Sequence[Any]) -> Sequence[Any]:
        arguments, hoisted = _arranged(self._program, leaves, captures)
        if _replaying.is_forced():
            if reasons := replayability(self._program, 0, _here()).reasons:
                raise _reverse_only(self._program, f"not replayable: {'; '.join(map(str, reasons))}")
            return _replay(self._program, 0, arguments, hoisted)
        result: Sequence[Any] = self._derived(0)(arguments, hoisted)
        return result

    def _derived(self, order: int) -> Callable[..., Sequence[Any]]:
        """The call of one module, with the next one as its derivative.

        ``Exported.call`` has a derivative of its own, which is wrong inside ``shard_map`` and knows no captures.
        """
        if order + 1 == len(self._program.modules):
            return self._last(order)
        call: Any = jax.custom_vjp(self._vectorised(order))

        def forward(arguments: Any, hoisted: Any) -> Any:
            return call(arguments, hoisted), (arguments, hoisted)

        def backward(kept: Any, cotangents: Any) -> Any:
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

    def _last(self, order: int) -> Callable[..., Sequence[Any]]:
        """The call of a module without a saved derivative: its own is that of its operations, if they are replayable.

        In forward mode, so that JAX gets both modes from it; the hoisted arrays are constants, as in a saved VJP.
        """
        call: Any = jax.custom_jvp(self._vectorised(order))

        def rule(primals: Any, tangents: Any) -> Any:
            arguments, hoisted = primals
            moving = [
                n
                for n, tangent in enumerate(tangents[0])
                if not isinstance(tangent, jax.custom_derivatives.SymbolicZero) and tangent.dtype != jax.dtypes.float0
            ]
            if replayability(self._program, order, _here()):
                run: Callable[..., Any] = functools.partial(_replay, self._program, order)
            else:
                run = self._underived(order)

            def along(*values: Any) -> Any:
                given = dict(zip(moving, values, strict=True))
                return run(tuple(given.get(n, value) for n, value in enumerate(arguments)), hoisted)

            return jax.jvp(along, [arguments[n] for n in moving], [tangents[0][n] for n in moving])

        call.defjvp(rule, symbolic_zeros=True)
        derived: Callable[..., Sequence[Any]] = call
        return derived

    def _underived(self, order: int) -> Callable[..., Any]:
        """The call of a module that has no derivative."""
        call: Any = jax.custom_vjp(self._vectorised(order))

        def backward(*_: Any) -> Any:  # not before a gradient is needed: there may be a stop_gradient behind the call
            raise _underived(self._program, order)

        call.defvjp(lambda *primals: (call(*primals), ()), backward)
        derived: Callable[..., Any] = call
        return derived

    def _vectorised(self, order: int) -> Callable[..., Any]:
        """The call of a module; under ``jax.vmap``, its operations."""
        call: Any = jax.custom_batching.custom_vmap(functools.partial(self._raw, order))

        @call.def_vmap  # type: ignore[untyped-decorator]
        def vectorise(size: int, batched: Any, arguments: Any, hoisted: Any) -> Any:
            if reasons := replayability(self._program, order, _here()).reasons:
                raise _not_vectorised(self._program, "; ".join(map(str, reasons)))
            run = functools.partial(_replay, self._program, order)
            axes = jax.tree.map(lambda mapped: 0 if mapped else None, batched)
            results = jax.vmap(run, in_axes=tuple(axes), axis_size=size)(arguments, hoisted)
            return results, jax.tree.map(lambda _: True, results)

        vectorised: Callable[..., Any] = call
        return vectorised

    def _raw(self, order: int, arguments: Sequence[Any], hoisted: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
        given = (*arguments, *hoisted[order])
        axes = frozenset().union(*map(_varying, given))
        return _vary(jax.tree.leaves(self.level(order).call(*given)), axes)


def _arranged(program: Program, leaves: Sequence[Any], captures: Sequence[Any]) -> tuple[tuple[Any, ...], Any]:
    """Arguments and captures as modules take them: those of the traced function, and those hoisted out of each."""
    modules = program.modules
    by_key = dict(zip(captured(modules), captures, strict=True))
    primal = modules[0]
    own = [by_key[c.weights, c.leaf] for c in primal.captures if c.argument < primal.traced]
    hoisted = tuple(
        tuple(by_key[c.weights, c.leaf] for c in module.captures if c.argument >= module.traced) for module in modules
    )
    arguments = (*leaves, *own)
    axes = frozenset().union(*map(_varying, arguments), *map(_varying, captures))
    return _vary(arguments, axes), tuple(_vary(values, axes) for values in hoisted)


def _replay(
    program: Program, order: int, arguments: Sequence[Any], hoisted: Sequence[Sequence[Any]]
) -> tuple[Any, ...]:
    given = (*arguments, *hoisted[order])
    axes = frozenset().union(*map(_varying, given))
    return _vary(program.replays.call(order, given), axes)


def replayability(program: Program, order: int = 0, platform: str | None = None) -> _replaying.Replayability:
    """Whether a module can be replayed; one that is not read at all cannot be.

    Args:
      program: that it is of.
      order: 0 for the primal, 1, 2, … for its VJPs.
      platform: where; None for wherever it runs.

    Raises:
      CorruptPackageError: its file is not what was saved.
    """
    try:
        return program.replays.replayable(order, platform)
    except UnsupportedFormatError as error:  # the module as a whole
        return _replaying.Replayability((_replaying.unread(error),), program.modules[order].platforms)


_here = _replaying.platform_at_hand


def _underived(program: Program, order: int) -> ArgumentError:
    stops = replayability(program, order, _here())
    return ArgumentError(
        "The gradient of a function is asked for that was saved without it, and its operations do not give it."
        if order == 0
        else "A derivative of a function is asked for of a higher order than was saved, and its operations do not give "
        "it.",
        object=program.modules[0].name,
        field="vjp_order",
        expected=f"at least {order + 1}",
        found=f"{order}; replayable: {stops}",
        fix=f"vjp_order={order + 1} when exporting it, or jax.lax.stop_gradient where no gradient is wanted",
    )


def _reverse_only(program: Program, why: str) -> ArgumentError:
    return ArgumentError(
        "A saved function has derivatives in forward mode only where it is replayed.",
        object=program.modules[0].name,
        expected="jax.grad, jax.vjp or jax.value_and_grad",
        found=f"jax.jvp, or what uses it: jax.jacfwd, jax.hessian, jax.linearize; {why}",
        fix='engine="replay" when loading it, if it is replayable; jax.vjp instead; for products with the Hessian, '
        "jax.grad of jax.vjp with vjp_order=2 when exporting",
    )


def _not_vectorised(program: Program, reasons: str) -> ArgumentError:
    return ArgumentError(
        "A saved function whose operations cannot be replayed runs for the shapes that it was exported for: jax.vmap "
        "cannot give it others.",
        object=program.modules[0].name,
        expected="a call without jax.vmap, and without what uses it: jax.jacrev, jax.hessian",
        found=f"not replayable: {reasons}",
        fix='export it for any batch size, as in obmlite.spec("f32[b,4]"), and call it once for the whole batch, '
        "or use jax.lax.map, without batch_size=",
    )


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
        return _engine(program, engine)
    reasons = []
    for name in ENGINES:
        try:
            return _engine(program, name)
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


def _engine(program: Program, name: str) -> Engine:
    if program.apart is not None and name != _Replaying.name:
        raise ArgumentError(
            "A stranger's functions are replayed only.", field="engine", expected=_Replaying.name, found=name
        )
    return _Replaying(program) if name == _Replaying.name else _Exported(program, name)


def _check_artifact(module: ModuleRecord, artifact: bytes, allowed: Collection[str]) -> None:
    """Compares a module with what the manifest says of it, and refuses native code that nobody allowed."""
    from obmlite import _mlir  # which takes long to import

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
        custom_calls, _ = _mlir.look(artifact)
    except ValueError as error:  # a newer StableHLO than this JAX has
        raise _replaying.too_new(module) from error
    if custom_calls != module.custom_calls:
        raise CorruptPackageError(
            "A function's code calls other targets than the manifest says.",
            field="Module.custom_calls",
            expected=", ".join(module.custom_calls) or "none",
            found=", ".join(custom_calls) or "none",
        )
    _promises.check_custom_calls(custom_calls, allowed, loading=True)
    _promises.prepare(artifact)


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
            fix='call .on(mesh) of the function with such a mesh, or place the arguments on one; engine="replay" when '
            "loading it takes any number of devices, if it is replayable",
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
        stops = replayability(program, 0, _here()).reasons
        why = f"not replayable: {'; '.join(map(str, stops))}" if stops else 'found out too late for engine="auto"'
        return _reverse_only(program, why)
    if "deserialize StableHLO" in text:
        return _replaying.too_new(module)
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
