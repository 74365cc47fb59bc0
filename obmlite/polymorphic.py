"""Several functions under one name, of which a call's arguments choose one."""

from __future__ import annotations

import dataclasses
import functools
import re
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from obmlite import dims
from obmlite._calling import Call
from obmlite._chain import CaptureKey, capture_values
from obmlite._once import once
from obmlite._padding import Padding
from obmlite._processes import OfOneProcess
from obmlite.errors import ArgumentError, add_facts
from obmlite.signature import Signature
from obmlite.specs import TensorSpec

if TYPE_CHECKING:
    import jax

    from obmlite.function import Function
    from obmlite.schema.records import ModuleRecord

__all__ = ["Polymorphic", "PolymorphicFunction"]

_SHOWN = 20  # leaves of a call that an error lists


@dataclasses.dataclass(frozen=True)
class Polymorphic:
    """What a model is given for a polymorphic function: the functions, or the names of functions of the model.

    Attributes:
      functions: :class:`obmlite.Function` objects, which become private functions of the model named
        ``<name>.0``, ``<name>.1``, …; a mapping gives them other names after the dot; or names of functions that the
        model has.
      metadata: what else to keep with it.
    """

    functions: Sequence[Function | str] | Mapping[str, Function]
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class PolymorphicFunction(OfOneProcess):
    """Several functions with the same arguments by name, for different shapes and dtypes.

    A call runs the most specific function that takes its arguments: the one with the fewest symbols in its shapes, then
    the one whose shapes have the fewest symbolic dimensions, then the one with the tightest constraints, then the
    first. The choice is made when JAX traces a call, so a call with shapes that came before chooses nothing.

    Attributes:
      name: its name in the package.
      functions: the concrete functions, the most specific first.
      metadata: what the user attached.
    """

    def __init__(self, name: str, functions: Sequence[Function], metadata: Mapping[str, Any] | None = None) -> None:
        """Puts functions together.

        Raises:
          ArgumentError: there are none, or they differ in the names of their arguments or the weights bound to them.
        """
        self.name = name
        self.metadata = dict(metadata or {})
        self.functions: tuple[Function, ...] = tuple(sorted(functions, key=lambda f: _order(f.signature)))
        if not functions:
            raise ArgumentError("A polymorphic function has no functions.", object=name, expected="at least one")
        first = self.functions[0]
        for other in self.functions[1:]:
            if _face(other) != _face(first):
                raise ArgumentError(
                    "The functions of a polymorphic function differ in their arguments' names, or in how they are "
                    "given, or in the weights bound to them.",
                    object=name,
                    expected=f"{first.name}{first.signature}",
                    found=f"{other.name}{other.signature}",
                )
        self.package = first.package
        self._keys: tuple[CaptureKey, ...] = tuple(dict.fromkeys(k for f in self.functions for k in f.capture_keys))
        self._numbers = {f.name: [self._keys.index(key) for key in f.capture_keys] for f in self.functions}
        self._lock = threading.RLock()

    # --- what it is

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """Of each concrete function, the most specific first."""
        return tuple(f.signature for f in self.functions)

    @property
    def signature(self) -> Signature:
        """The most general function's."""
        return self.functions[-1].signature

    @property
    def bindings(self) -> tuple[Any, ...]:
        """The weights objects that its functions were saved with."""
        return self.functions[0].bindings

    @property
    def platforms(self) -> tuple[str, ...]:
        """The platforms that all of its functions were exported for."""
        return tuple(p for p in self.functions[0].platforms if all(p in f.platforms for f in self.functions))

    @property
    def module(self) -> ModuleRecord:
        """The most general function's module."""
        return self.functions[-1].module

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The mesh that its functions are called on, if one was given."""
        return next((f.mesh for f in self.functions if f.mesh is not None), None)

    @property
    def donated_names(self) -> frozenset[str]:
        """The names of the leaves whose buffers all of its functions may reuse."""
        return functools.reduce(frozenset.intersection, (f.donated_names for f in self.functions))

    @property
    def capture_keys(self) -> tuple[CaptureKey, ...]:
        """Which arrays its functions closed over, each once."""
        return self._keys

    @once
    def captures(self) -> tuple[Any, ...]:
        """These arrays, as ``jax.Array``."""
        values = capture_values(self.functions)
        return tuple(values[key] for key in self._keys)

    @property
    def compile_options(self) -> Mapping[str, Mapping[str, Any]]:
        """The options that all of its functions have alike, by platform: one call may compile each of them."""
        first, *others = (f.compile_options for f in self.functions)
        found = {
            platform: {o: v for o, v in options.items() if all(c.get(platform, {}).get(o) == v for c in others)}
            for platform, options in first.items()
        }
        return {platform: options for platform, options in found.items() if options}

    @property
    def vjp_order(self) -> int:
        """Up to which order VJPs of any of its functions were saved."""
        return max(function.vjp_order for function in self.functions)

    # --- running it

    def load(self) -> None:
        """Does nothing: each function is read when a call first chooses it."""

    def choose(self, arguments: Mapping[str, Any]) -> Function:
        """The most specific function that takes arguments.

        Args:
          arguments: by name.

        Raises:
          ArgumentError: none does; the text lists what there is.
        """
        promoted: Function | None = None
        for function in self.functions:
            try:
                leaves = function.signature.match(arguments)
            except ArgumentError:
                continue
            if all(a is b for a, b in zip(leaves, _leaves(arguments, function.signature), strict=True)):
                return function
            promoted = promoted or function  # it takes a Python number, as a call does; another may be exact
        if promoted is None:
            raise self._unmatched(arguments)
        return promoted

    def trace(self, arguments: Mapping[str, Any], captures: Sequence[Any]) -> Any:
        """The results for arguments by name, to be traced under ``jax.jit``.

        Raises:
          ArgumentError: no function takes the arguments.
        """
        function = self.choose(arguments)
        return function.trace(arguments, [captures[n] for n in self._numbers[function.name]])

    @once
    def _call(self) -> Call:
        return Call(self.name, self, self.signature, {}, ())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the most specific function that takes the arguments.

        Raises:
          ArgumentError: none does; the text lists what there is.
          PlatformError: it was not exported for the platform that it would run on.
        """
        return self._call(args, kwargs)

    def padded(self) -> Padding:
        """Its call for batches of any size up to the largest that it has: each is run on the next larger size.

        What is missing is filled with copies of the last row, and cut off the results. The batch is the leading
        dimension in which the functions of fixed shapes differ; rows must not depend on one another.

        Raises:
          ArgumentError: when called, a result does not have the batch as its leading dimension.
        """
        return Padding(self.name, self, self.signatures)

    def explain(self, error: Exception, signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raises what lies behind an error of JAX's, if that is known."""
        arguments = signature.bind(args, kwargs)
        if set(arguments) == set(self.signature.arguments):
            try:
                function = self.choose(arguments)
            except ArgumentError as better:
                add_facts(better, package=self.package)
                raise better from error
            function.explain(error, function.signature, args, kwargs)
        else:  # some are bound
            self.functions[-1].explain(error, signature, args, kwargs)

    def on(self, mesh: jax.sharding.Mesh) -> PolymorphicFunction:
        """The function, called on the devices of a mesh, as by :meth:`obmlite.Function.on`."""
        return PolymorphicFunction(self.name, [f.on(mesh) for f in self.functions], self.metadata)

    def _unmatched(self, arguments: Mapping[str, Any]) -> ArgumentError:
        there = "".join(f"\n    {f.name}{f.signature}{_where(f.signature)}" for f in self.functions)
        return ArgumentError(
            "No concrete function takes these arguments.",
            object=self.name,
            expected=f"one of{there}",
            found=described(arguments),
            fix=".padded() runs an odd batch on the next larger size" if self._has_batches else None,
        )

    @property
    def _has_batches(self) -> bool:
        return sum(not s.symbols for s in self.signatures) > 1

    def __repr__(self) -> str:
        lines = [f"  {f.name}{f.signature}{_where(f.signature)}" for f in self.functions]
        return "\n".join([f"PolymorphicFunction {self.name}", *lines])


def described(arguments: Mapping[str, Any]) -> str:
    """Names, shapes and dtypes of a call's leaves."""
    from obmlite import tree as trees

    leaves, tree = trees.flatten_arguments(arguments)
    shown = []
    for name, leaf in list(zip(tree.names, leaves, strict=True))[:_SHOWN]:
        try:
            shown.append(f"{name}: {TensorSpec.of(leaf)}")
        except TypeError:
            shown.append(f"{name}: {type(leaf).__name__}")
    more = [f"… ({len(leaves)} leaves)"] if len(leaves) > _SHOWN else []
    return f"({', '.join([*shown, *more])})"


def _leaves(arguments: Mapping[str, Any], signature: Signature) -> list[Any]:
    from obmlite import tree as trees

    leaves, tree = trees.flatten_arguments(arguments)
    given = dict(zip(tree.names, leaves, strict=True))
    return [given[name] for name in signature.inputs.names]


def _where(signature: Signature) -> str:
    return f" where {', '.join(signature.constraints)}" if signature.constraints else ""


def _face(function: Function) -> tuple[Any, ...]:
    """What the functions of a polymorphic function have in common."""
    signature = function.signature
    return signature.arguments, tuple(signature.argument_kinds), function.bindings


_BOUND = re.compile(r"([^\W\d]\w*) <= (\d+)")


def _order(signature: Signature) -> tuple[float, ...]:
    """How general a function is: symbols, symbolic dimensions, dimensions that are plain symbols, upper bounds."""
    sizes = [d for spec in signature.input_specs for d in spec.shape if isinstance(d, dims.Expression)]
    plain = sum(d.text in d.symbols for d in sizes)
    bounds = [int(match[2]) for text in signature.constraints if (match := _BOUND.fullmatch(text))]
    return (
        len(signature.symbols),
        len(sizes),
        plain,
        -len(signature.constraints),
        min(bounds, default=float("inf")),
    )
