"""One jitted call: of a function, with some of its arguments bound to weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from obmlite import tree as trees
from obmlite.errors import ObmliteError, add_facts, context

if TYPE_CHECKING:
    from obmlite.function import Function
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
        function: Function,
        signature: Signature,
        bound: Mapping[str, Tree],
        weights: Sequence[Sequence[Any]],
    ) -> None:
        """Makes the call ready; nothing is traced yet.

        Args:
          name: for errors.
          function: what to call.
          signature: of the arguments that are not bound.
          bound: the tree of each argument that is.
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
        self._jitted = jax.jit(run, donate_argnums=1 if self._donated else ())
        # A gradient needs the arguments once more, and would find them gone.
        self._keeping = jax.jit(run) if self._donated else self._jitted

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
            self._function.explain(error, self._signature, args, kwargs)
            raise

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._donated:
            return self._jitted(self._arrays, {}, args, kwargs)
        given = self._signature.bind(args, kwargs)
        if _differentiated(given):
            return self._keeping(self._arrays, {}, (), given)
        donated = {name: given.pop(name) for name in self._donated}
        return self._jitted(self._arrays, donated, (), given)


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
