"""One jitted call: of a function, with some of its arguments bound to weights."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from obmlite import _replaying
from obmlite import tree as trees
from obmlite.errors import ObmliteError, UnsupportedFormatError, add_facts, context

if TYPE_CHECKING:
    from obmlite._chain import Chain, Handover, Traceable
    from obmlite.signature import Signature
    from obmlite.tree import Tree

_JAX_ERRORS = (TypeError, ValueError, RuntimeError, NotImplementedError)
"""What JAX raises for a call that it refuses; jaxlib's own error is a RuntimeError."""


class Call:
    """A function under one ``jax.jit``, some arguments bound.

    Weights and captures are arguments of the jitted function, as flat tuples: as constants they would be compiled in,
    and JAX takes a tuple apart faster than a nested dict.
    """

    def __init__(
        self,
        name: str,
        function: Traceable | Chain,
        signature: Signature | Handover,
        bound: Mapping[Any, Tree],
        weights: Sequence[Sequence[Any]],
    ) -> None:
        """Makes the call ready; nothing is traced yet.

        Args:
          name: for errors.
          function: what to call.
          signature: of the arguments that are not bound.
          bound: the tree of each argument that is; a chain of steps numbers them.
          weights: the leaves of each of these.
        """
        function.load()  # so that what is wrong with its file is not found while tracing
        self._name = name
        self._function = function
        self._signature = signature
        self._bound = dict(bound)
        self._arrays = (tuple(map(tuple, weights)), function.captures)
        self._donated = signature.covered(function.donated_names)
        self._mesh = function.mesh

        def run(arrays: Any, donated: dict[str, Any], args: Any, kwargs: Any) -> Any:
            if self._mesh is not None and jax.sharding.get_abstract_mesh().empty:
                arrays, donated, args, kwargs = _placed((arrays, donated, args, kwargs), self._mesh)
            leaves, captures = arrays
            given = {**donated, **kwargs} if self._donated else signature.bind(args, kwargs)
            weights = {a: tree.unflatten(own) for (a, tree), own in zip(self._bound.items(), leaves, strict=True)}
            return function.trace({**weights, **given}, captures)

        run.__name__ = name
        donated = 1 if self._donated else ()
        self._jitted = jax.jit(run, donate_argnums=donated)
        self._by_platform = {
            platform: jax.jit(run, donate_argnums=donated, compiler_options=dict(options))
            for platform, options in function.compile_options.items()
        }
        # A gradient needs the arguments once more, and would find them gone.
        self._keeping = jax.jit(run) if self._donated else self._jitted
        self._saved_vjps = function.vjp_order > 0

        def replayed(arrays: Any, args: Any, kwargs: Any) -> Any:
            with _replaying.forced():
                return run(arrays, {}, args, kwargs)

        replayed.__name__ = name
        self._forward = jax.jit(replayed)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls it.

        Raises:
          ArgumentError: the arguments do not match the signature.
          PlatformError: the function was not exported for the platform that it would run on.
        """
        if any(map(trees.is_foreign, map(type, args))) or any(map(trees.is_foreign, map(type, kwargs.values()))):
            args, kwargs = tuple(map(_known, args)), {name: _known(value) for name, value in kwargs.items()}
        if kwargs and self._signature.fixed:
            with context(object=self._name, package=self._function.package):
                kwargs = self._signature.drop_fixed(kwargs)
        try:
            if self._mesh is not None and not _traced((args, kwargs)):
                with jax.set_mesh(self._mesh):
                    return self._run(args, kwargs)
            return self._run(args, kwargs)
        except ObmliteError as error:
            add_facts(error, object=self._name, package=self._function.package)
            raise
        except _JAX_ERRORS as error:
            if self._by_platform and "option" in str(error):
                raise self._refused_options(error) from error
            self._function.explain(error, self._signature, args, kwargs)  # type: ignore[arg-type]
            raise

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._saved_vjps and _tracing() and _replaying.in_forward_mode((args, kwargs)):
            # What binds the saved VJPs has a derivative in reverse mode only.
            if self._donated:
                args, kwargs = (), self._signature.bind(args, kwargs)
            return self._forward(self._arrays, args, kwargs)
        jitted = self._compiled_for(args, kwargs) if self._by_platform else self._jitted
        if not self._donated:
            return jitted(self._arrays, {}, args, kwargs)
        given = self._signature.bind(args, kwargs)
        if _differentiated(given):
            return self._keeping(self._arrays, {}, (), given)
        donated = {name: given.pop(name) for name in self._donated}
        return jitted(self._arrays, donated, (), given)

    def _compiled_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The jitted function with XLA's options for the platform that a call runs on."""
        if _tracing():  # the outer program has options of its own, and JAX refuses others within it
            return self._jitted
        return self._by_platform.get(_platform((args, kwargs, self._arrays)), self._jitted)

    def _refused_options(self, error: Exception) -> ObmliteError:
        return UnsupportedFormatError(
            "XLA refuses an option that the function is to be compiled with.",
            package=self._function.package,
            object=self._name,
            field="compile_options",
            found=str(error)[:300],
            fix="load it with compile_options=False",
        )


def _known(value: Any) -> Any:
    """An argument in containers that JAX takes apart as trees do."""
    return trees.plain(value) if trees.is_foreign(type(value)) else value


def _placed(values: Any, mesh: jax.sharding.Mesh) -> Any:
    """The same values, on the devices of a mesh, in whatever way; for a call within what is traced without one."""
    automatic = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=automatic)

    def place(value: Any) -> Any:
        if not isinstance(value, jax.core.Tracer) or value.dtype == jax.dtypes.float0:
            return value
        if not jax.typeof(value).sharding.mesh.empty:  # typed by a mesh of explicit axes, and so on its devices
            return value
        spec = jax.P(*[jax.P.UNCONSTRAINED] * value.ndim)
        return jax.lax.with_sharding_constraint(value, jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(place, values)


def _traced(arguments: Any) -> bool:
    """Whether a call is part of what is being traced, whose devices are then the outer call's."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))


def _differentiated(arguments: Any) -> bool:
    """Whether a call is being differentiated, not only recorded by an outer ``jit``, which may still donate."""
    # The class is private; under another name, exporting a loaded function once more would lose its donation.
    return any(
        isinstance(leaf, jax.core.Tracer) and type(leaf).__name__ != "DynamicJaxprTracer"
        for leaf in jax.tree.leaves(arguments)
    )


@functools.cache
def _not_tracing() -> Any:
    """The state of a thread that traces nothing, as a new one does."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(_trace_state()))
    thread.start()
    thread.join()
    return found[0]


def _trace_state() -> Any:
    """What JAX is tracing at the moment. Up to JAX 0.9 it is in ``jax.core``, where later ones deprecate it."""
    from jax.extend import core  # takes time to import

    return (getattr(core, "get_opaque_trace_state", None) or jax.core.get_opaque_trace_state)()


def _tracing() -> bool:
    """Whether a call is part of a program that is being traced, even if all of its arguments are values."""
    return bool(_trace_state() != _not_tracing())


def _platform(values: Any) -> str:
    """The platform that a call runs on, as functions name it."""
    device: Any = None
    for leaf in jax.tree.leaves(values):
        if isinstance(leaf, jax.Array) and leaf.committed:
            device = next(iter(leaf.sharding.device_set))
            break
    device = device or jax.config.jax_default_device
    platform = str(getattr(device, "platform", device) or jax.default_backend())
    if platform == "gpu":  # JAX's name for both kinds
        from jax.extend import backend

        return "rocm" if "rocm" in backend.get_backend("gpu").platform_version.lower() else "cuda"
    return platform
