"""Functions: exported, saved, loaded, called."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from obmlite import _arrays, _compile_options, _engine
from obmlite import tree as trees
from obmlite._calling import Call
from obmlite._compile_options import CompileOptions
from obmlite._once import once
from obmlite._processes import OfOneProcess
from obmlite._promises import beyond_promise
from obmlite._replaying import Replayability
from obmlite.errors import ArgumentError, ExportError, LeafError, context
from obmlite.schema.records import Binding, Capture, ModuleRecord
from obmlite.signature import Signature
from obmlite.specs import MeshSpec, TensorSpec, to_jax
from obmlite.weights import Weights, check_not_lazy

__all__ = ["Function", "export"]


class Function(OfOneProcess):
    """A function that runs without its source.

    Called like the function that was exported; arguments may be in any containers with the same keys. A call runs
    under one ``jax.jit``, made at the first call.

    Attributes:
      name: its name in the package.
      signature: pytrees of its arguments and results.
      metadata: what the user attached.
      bindings: the weights objects that it was saved with.
      package: the path of the package that it was loaded from.
      mesh: the mesh that it is called on, if one was given.
      compile_options: XLA's options for compiling it, by platform.
    """

    def __init__(
        self,
        name: str,
        signature: Signature,
        program: _engine.Program,
        captures: Callable[[], Sequence[Any]],
        *,
        metadata: Mapping[str, Any] | None = None,
        bindings: Sequence[Binding] = (),
        package: str | None = None,
        engine: str = "auto",
        mesh: jax.sharding.Mesh | None = None,
        compile_options: CompileOptions | None = None,
    ) -> None:
        self.name = name
        self.signature = signature
        self.metadata = dict(metadata or {})
        self.bindings = tuple(bindings)
        self.package = package
        self.mesh = mesh
        self.compile_options: CompileOptions = {p: dict(o) for p, o in (compile_options or {}).items()}
        self._program = program
        self._captures = captures
        self._engine_name = engine
        self._lock = threading.RLock()

    # --- what it is

    @property
    def program(self) -> _engine.Program:
        """Its modules, and where their bytes are."""
        return self._program

    @property
    def module(self) -> ModuleRecord:
        """What the manifest says, or will say, of the function's module."""
        return self._program.modules[0]

    @property
    def platforms(self) -> tuple[str, ...]:
        """The platforms that it was exported for."""
        return self.module.platforms

    @property
    def vjp_order(self) -> int:
        """Up to which order ``jax.grad`` can go through it."""
        return len(self._program.modules) - 1

    @property
    def durable(self) -> bool:
        """Whether StableHLO's compatibility promise, of five years, covers all of it."""
        return not self.other_dialects

    @property
    def other_dialects(self) -> tuple[str, ...]:
        """The dialects, sorted, of its operations that StableHLO's compatibility promise does not cover."""
        return beyond_promise(d for module in self._program.modules for d in module.dialects)

    @property
    def engine(self) -> str:
        """The engine that runs it, ``"export"``, ``"rebuild"`` or ``"replay"``; it is read for this, if it wasn't yet.

        Raises:
          CorruptPackageError: the file is not what was saved.
          UnsupportedFormatError: this JAX does not read it.
        """
        return self._loaded.name

    @property
    def replayable(self) -> Replayability:
        """Whether it can be re-traced as ordinary JAX, on whatever platform it was exported for; true if it can.

        Its file is read for this. ``str()`` of the result says which operations stop it.

        Raises:
          CorruptPackageError: the file is not what was saved.
        """
        with context(object=self.name, package=self.package):
            return _engine.replayability(self._program)

    @property
    def operations(self) -> dict[str, int]:
        """The operations of its code, with the targets of custom calls, and how often each stands there; by name.

        Raises:
          CorruptPackageError: the file is not what was saved.
          UnsupportedFormatError: this JAX does not read it.
        """
        with context(object=self.name, package=self.package):
            return self._program.replays.operations()

    def jaxpr(self, *args: Any, **kwargs: Any) -> Any:
        """The function as a closed jaxpr of ordinary primitives, for arguments like the given ones.

        Args:
          *args: as for a call; arrays, or ``jax.ShapeDtypeStruct`` and :func:`obmlite.spec` of known sizes. With none
            at all, the signature's own, if its sizes are known.
          **kwargs: likewise.

        Returns:
          A ``ClosedJaxpr``: of the leaves of the function's arguments, with what it closed over as constants.

        Raises:
          ArgumentError: the arguments do not match the signature.
          UnsupportedFormatError: the function is not replayable; the text names the operations that stop it.
        """
        with context(object=self.name, package=self.package):
            if args or kwargs:
                arguments = self.signature.bind(args, kwargs)
            else:
                arguments = self.signature.inputs.unflatten(self.signature.input_specs)
            structs = jax.tree.map(_struct, trees.plain(arguments))
            engine = _engine.load(self._program, "replay")

            def replayed(given: Mapping[str, Any]) -> Any:
                leaves = engine(self.signature.match(given), self.captures)
                return self.signature.outputs.unflatten(list(leaves))

            return jax.make_jaxpr(replayed)(structs)

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """Its signature, as one of one; a polymorphic function has several."""
        return (self.signature,)

    @property
    def capture_keys(self) -> tuple[tuple[str, int], ...]:
        """(weights object, leaf) of each array that it closed over."""
        return tuple(_engine.captured(self._program.modules))

    # --- running it

    @once
    def _loaded(self) -> _engine.Engine:
        with context(object=self.name, package=self.package):
            return _engine.load(self._program, self._engine_name)

    @once
    def captures(self) -> tuple[Any, ...]:
        """The arrays that it closed over, as ``jax.Array``."""
        with context(object=self.name, package=self.package):
            return tuple(self._captures())

    @property
    def donated_names(self) -> frozenset[str]:
        """The names of the leaves whose buffers it may reuse."""
        return frozenset(self.signature.inputs.names[leaf] for leaf in self.module.donated)

    @once
    def _call(self) -> Call:
        return Call(self.name, self, self.signature, {}, ())

    def load(self) -> None:
        """Reads the function.

        Raises:
          CorruptPackageError: the file is not what was saved.
          UnsupportedFormatError: this JAX does not read it.
        """
        self._loaded  # noqa: B018 - cached

    def trace(self, arguments: Mapping[str, Any], captures: Sequence[Any]) -> Any:
        """The function's results for arguments by name, to be traced under ``jax.jit``.

        Raises:
          ArgumentError: the arguments do not match the signature.
        """
        with context(object=self.name):
            leaves = self.signature.match(arguments)
        return self.signature.outputs.unflatten(list(self._loaded(leaves, captures)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function.

        Raises:
          ArgumentError: the arguments do not match the signature; it names the leaf, what was expected and what came.
          PlatformError: the function was not exported for the platform that it would run on.
        """
        return self._call(args, kwargs)

    def explain(self, error: Exception, signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raises what lies behind an error of JAX's for a call with this signature, if that is known."""
        with context(object=self.name, package=self.package):
            arguments = signature.bind(args, kwargs)
            for name, leaf in _lazy_leaves(arguments):
                check_not_lazy(leaf, name)
            better = _engine.explain(error, self._program, signature.match(arguments))
            if better is not None:
                raise better from error

    # --- others like it

    def bound_to(self, weights: Mapping[str, str]) -> Function:
        """The function with a note of the weights (argument → name) that it is saved with."""
        return self._with(bindings=[Binding(argument, name) for argument, name in weights.items()])

    def on(self, mesh: jax.sharding.Mesh) -> Function:
        """The function, called on the devices of a mesh; arguments that are committed to no others are put there.

        One that fixes its mesh keeps its own axes, over the devices in the given mesh's order; under the ``replay``
        engine it takes the given mesh as it is, of any number of devices.

        Raises:
          ArgumentError: the function fixes the number of its devices, and the mesh has another.
        """
        if self._engine_name == "replay":
            return self._with(mesh=mesh)
        needed = self.module.num_devices
        if needed not in (1, mesh.size):
            raise ArgumentError(
                "The function fixes the devices that it runs on.",
                package=self.package,
                object=self.name,
                field="mesh",
                expected=f"{needed} devices" + (f", as of a mesh of {self.module.mesh}" if self.module.mesh else ""),
                found=f"a mesh of {MeshSpec.of(mesh)}",
            )
        own = self.module.mesh
        if own is not None and (own.names, own.sizes) != (tuple(mesh.axis_names), mesh.devices.shape):
            # The mesh's devices with the function's axes: those of the mesh may not express how its results are split.
            types = (jax.sharding.AxisType.Auto,) * len(own.names)
            mesh = jax.sharding.Mesh(mesh.devices.reshape(own.sizes), own.names, axis_types=types)
        return self._with(mesh=mesh)

    def compiled_with(self, options: CompileOptions) -> Function:
        """The function with other options for XLA.

        Args:
          options: platform → option → value, such as ``{"cpu": {"xla_cpu_enable_fast_min_max": True}}``.

        Raises:
          ExportError: a platform is none of those that the function was exported for, or an option no name and value.
        """
        return self._with(compile_options=_compile_options.check(options, self.platforms))

    def named(self, name: str) -> Function:
        """The function under another name."""
        return self if name == self.name else self._with(name=name)

    def moved(self, places: Mapping[tuple[str, int], tuple[str, int]]) -> Function:
        """The function with its captures elsewhere: (weights, leaf) → (weights, leaf)."""

        def move(capture: Capture) -> Capture:
            weights, leaf = places[capture.weights, capture.leaf]
            return dataclasses.replace(capture, weights=weights, leaf=leaf)

        modules = tuple(
            dataclasses.replace(module, captures=tuple(map(move, module.captures))) for module in self._program.modules
        )
        values = dict(zip((places[key] for key in _engine.captured(self._program.modules)), self.captures, strict=True))
        ordered = [values[key] for key in _engine.captured(modules)]
        return self._with(program=dataclasses.replace(self._program, modules=modules), captures=lambda: ordered)

    def _with(self, **changes: Any) -> Function:
        parts: dict[str, Any] = {
            "name": self.name,
            "signature": self.signature,
            "program": self._program,
            "captures": self._captures,
            "metadata": self.metadata,
            "bindings": self.bindings,
            "package": self.package,
            "engine": self._engine_name,
            "mesh": self.mesh,
            "compile_options": self.compile_options,
        }
        return Function(**{**parts, **changes})

    def __repr__(self) -> str:
        where = f" where {', '.join(self.signature.constraints)}" if self.signature.constraints else ""
        return f"Function {self.name}{self.signature}{where} for {', '.join(self.platforms)}"


def _struct(leaf: Any) -> Any:
    """A leaf, or what is like it, as ``jax.make_jaxpr`` takes it."""
    if not isinstance(leaf, TensorSpec):
        return leaf
    if leaf.symbols:
        raise ArgumentError("A jaxpr is made for sizes that are known.", expected="an int for each", found=str(leaf))
    return to_jax([leaf])[0]


def _lazy_leaves(arguments: Mapping[str, Any]) -> list[tuple[str, Any]]:
    try:
        leaves, tree = trees.flatten_arguments(arguments)
    except LeafError as error:
        raise ArgumentError(error.problem, leaf=error.leaf, expected=error.expected, found=error.found) from error
    return list(zip(tree.names, leaves, strict=True))


def export(
    fn: Callable[..., Any],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    static: str | Sequence[str] = (),
    name: str | None = None,
    constraints: str | Sequence[str] = (),
    platforms: str | Sequence[str] = _engine.PLATFORMS,
    vjp_order: int = 0,
    allow_custom_calls: Collection[str] = (),
    metadata: Mapping[str, Any] | None = None,
    compile_options: CompileOptions | None = None,
) -> Function:
    """Exports a function, for arguments that are like the given ones.

    Args:
      fn: the function; jitted or not.
      *args: pytrees of arrays, numbers, ``jax.ShapeDtypeStruct`` or :func:`obmlite.spec`; of arrays only shape and
        dtype matter.
      kwargs: arguments to be given by keyword, likewise.
      static: names of arguments whose values are fixed now, such as ``"train"``.
      name: the function's name in a package; its own if not given.
      constraints: what symbols in the shapes must satisfy, such as ``"b <= 16"``.
      platforms: of ``"cpu"``, ``"cuda"``, ``"rocm"`` and ``"tpu"``, those that it is to run on.
      vjp_order: up to which order ``jax.grad`` can go through the loaded function; 0 for not at all.
      allow_custom_calls: targets of custom calls beyond those that JAX promises to keep.
      metadata: what else to keep with it: None, bool, int, float, str, bytes, and lists and dicts of these.
      compile_options: XLA's options, by platform, such as ``{"cpu": {"xla_cpu_enable_fast_min_max": True}}``. They
        are kept and used whenever the function is compiled by itself or in a pipeline, not within another ``jax.jit``.

    Raises:
      ExportError: the function cannot be exported as it is.
      LeafError: an argument or a result holds something that is neither an array nor a number.
    """
    from obmlite import _exporting  # what is needed to export takes time to import, and loading has no use for it

    own = name or function_name(fn)
    platforms = [platforms] if isinstance(platforms, str) else list(platforms)
    unknown = [p for p in platforms if p not in _engine.PLATFORMS]
    if unknown or not platforms:
        raise ExportError(
            "A function is exported for some of the platforms that JAX has.",
            field="platforms",
            expected=", ".join(_engine.PLATFORMS),
            found=", ".join(map(str, unknown)) or "none",
        )
    trees.pack_static(dict(metadata or {}))
    static = [static] if isinstance(static, str) else list(static)
    exported = _exporting.export(
        fn,
        args,
        kwargs or {},
        own,
        _exporting.Options(
            static=static,
            constraints=[constraints] if isinstance(constraints, str) else list(constraints),
            platforms=platforms,
            vjp_order=vjp_order,
            allow_custom_calls=sorted(allow_custom_calls),
        ),
    )
    program = _engine.Program(
        modules=exported.modules,
        constraints=tuple(exported.signature.constraints),
        blobs=lambda module: exported.blobs[module.file],
        allow_custom_calls=allow_custom_calls,
    )
    captures = exported.captures
    ordered = [leaf for _, leaf in _engine.captured(exported.modules)]
    return Function(
        own,
        exported.signature,
        program,
        lambda: _placed([captures[leaf] for leaf in ordered]),
        metadata=metadata,
        compile_options=_compile_options.check(compile_options or {}, platforms),
    )


def _placed(values: list[Any]) -> list[Any]:
    with jax.ensure_compile_time_eval():  # kept, even if a jit around the first call is being traced
        placed: list[Any] = jax.device_put(values)
        return placed


def adopt(functions: Mapping[str, Function]) -> tuple[dict[str, Function], dict[str, Weights]]:
    """Gives the arrays that functions closed over a place among a model's weights, ``<function>.captures``.

    Returns:
      The functions, knowing where their captures are, and the new weights. An array that several functions captured
      is kept with the first of them.
    """
    places: dict[bytes, tuple[str, int]] = {}
    adopted: dict[str, Function] = {}
    weights: dict[str, Weights] = {}
    several = sum(bool(_engine.captured(f.program.modules)) for f in functions.values()) > 1
    for name, function in functions.items():
        own: list[Any] = []
        moved: dict[tuple[str, int], tuple[str, int]] = {}
        keys = _engine.captured(function.program.modules)
        for key, value in zip(keys, function.captures if keys else (), strict=True):
            place = (f"{name}.captures", len(own))
            found = places.setdefault(_arrays.content_digest(value), place) if several else place
            if found == place:
                own.append(value)
            moved[key] = found
        if own:
            weights[f"{name}.captures"] = Weights(own)
        adopted[name] = function.moved(moved) if keys else function
    return adopted, weights


def function_name(fn: Callable[..., Any]) -> str:
    """What a function is called, without a wrapper's additions."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    own = getattr(fn, "__name__", type(fn).__name__)
    return "function" if own == "<lambda>" else own
