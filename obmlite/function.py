"""Functions: exported, saved, loaded, called."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from obmlite import _engine, _exporting
from obmlite import tree as trees
from obmlite.errors import ArgumentError, ExportError, LeafError, ObmliteError, context
from obmlite.schema.records import Binding, ModuleRecord
from obmlite.signature import Signature
from obmlite.weights import check_not_lazy

__all__ = ["Function", "export"]

JAX_ERRORS = (TypeError, ValueError, RuntimeError, NotImplementedError)
"""What JAX raises for a call that it refuses; jaxlib's own error is a RuntimeError."""


class Blob(Protocol):
    """Bytes that may not have been read yet."""

    def __call__(self) -> bytes:
        """The bytes, once their digest matches."""
        ...


class Function:
    """A function that runs without its source.

    Called like the function that was exported; arguments may be in any containers with the same keys. A call runs
    under one ``jax.jit``, made at the first call.

    Attributes:
      name: its name in the package.
      signature: pytrees of its arguments and results.
      metadata: what the user attached.
    """

    def __init__(
        self,
        name: str,
        signature: Signature,
        module: ModuleRecord,
        blob: Blob,
        *,
        metadata: Mapping[str, Any] | None = None,
        bindings: Sequence[Binding] = (),
        package: str | None = None,
    ) -> None:
        self.name = name
        self.signature = signature
        self.metadata = dict(metadata or {})
        self._module = module
        self._blob = blob
        self._bindings = tuple(bindings)
        self._package = package
        self._lock = threading.Lock()

    @property
    def module(self) -> ModuleRecord:
        """What the manifest says, or will say, of the function's module."""
        return self._module

    @property
    def bindings(self) -> tuple[Binding, ...]:
        """The weights objects that it was saved with."""
        return self._bindings

    @property
    def platforms(self) -> tuple[str, ...]:
        """The platforms that it was exported for."""
        return self._module.platforms

    def blob(self) -> bytes:
        """The bytes of its file.

        Raises:
          CorruptPackageError: they are not those that were saved.
        """
        with context(object=self.name, package=self._package):
            return self._blob()

    @functools.cached_property
    def _flat(self) -> _engine.FlatCall:
        with self._lock, context(object=self.name, package=self._package):
            return _engine.load(self._module, self.blob())

    @functools.cached_property
    def _jitted(self) -> Any:
        self.load()

        def call(*args: Any, **kwargs: Any) -> Any:
            with context(object=self.name):
                arguments = self.signature.bind(args, kwargs)
            return self.trace(arguments)

        call.__name__ = self.name
        return jax.jit(call)

    def trace(self, arguments: Mapping[str, Any]) -> Any:
        """The function's results for arguments by name, to be traced under ``jax.jit``.

        Raises:
          ArgumentError: the arguments do not match the signature.
        """
        with context(object=self.name):
            leaves = self.signature.match(arguments)
        return self.signature.outputs.unflatten(list(self._flat(leaves)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function.

        Raises:
          ArgumentError: the arguments do not match the signature; it names the leaf, what was expected and what came.
          PlatformError: the function was not exported for the platform that it would run on.
        """
        if kwargs and self.signature.fixed:
            with context(object=self.name):
                kwargs = self.signature.drop_fixed(kwargs)
        try:
            return self._jitted(*args, **kwargs)
        except ObmliteError:
            raise
        except JAX_ERRORS as error:
            self.explain(error, self.signature, args, kwargs)
            raise

    def named(self, name: str) -> Function:
        """The function under another name."""
        return Function(
            name,
            self.signature,
            self._module,
            self._blob,
            metadata=self.metadata,
            bindings=self._bindings,
            package=self._package,
        )

    def bound_to(self, weights: Mapping[str, str]) -> Function:
        """The function with a note of the weights (argument → name) that it is saved with."""
        bindings = [Binding(argument, name) for argument, name in weights.items()]
        return Function(self.name, self.signature, self._module, self._blob, metadata=self.metadata, bindings=bindings)

    def load(self) -> None:
        """Reads the function, so that what is wrong with its file is not found while tracing.

        Raises:
          CorruptPackageError: the file is not what was saved.
          UnsupportedFormatError: this JAX does not read it.
        """
        self._flat  # noqa: B018 - cached

    def explain(self, error: Exception, signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raises what lies behind an error of JAX's for a call with this signature, if that is known."""
        with context(object=self.name, package=self._package):
            arguments = signature.bind(args, kwargs)
            for name, leaf in _lazy_leaves(arguments):
                check_not_lazy(leaf, name)
            better = _engine.explain(error, self._module, signature.match(arguments))
            if better is not None:
                raise better from error

    def __repr__(self) -> str:
        return f"Function {self.name}{self.signature} for {', '.join(self.platforms)}"


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
    platforms: str | Sequence[str] = _exporting.PLATFORMS,
    metadata: Mapping[str, Any] | None = None,
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
      metadata: what else to keep with it: None, bool, int, float, str, bytes, and lists and dicts of these.

    Raises:
      ExportError: the function cannot be exported as it is.
      LeafError: an argument or a result holds something that is neither an array nor a number.
    """
    own = name or function_name(fn)
    platforms = [platforms] if isinstance(platforms, str) else list(platforms)
    unknown = [p for p in platforms if p not in _exporting.PLATFORMS]
    if unknown or not platforms:
        raise ExportError(
            "A function is exported for some of the platforms that JAX has.",
            field="platforms",
            expected=", ".join(_exporting.PLATFORMS),
            found=", ".join(map(str, unknown)) or "none",
        )
    exported = _exporting.export(
        fn,
        args,
        kwargs or {},
        static=[static] if isinstance(static, str) else list(static),
        constraints=[constraints] if isinstance(constraints, str) else list(constraints),
        platforms=platforms,
        name=own,
    )
    trees.pack_static(dict(metadata or {}))
    return Function(own, exported.signature, exported.module, lambda: exported.blob, metadata=metadata)


def function_name(fn: Callable[..., Any]) -> str:
    """What a function is called, without a wrapper's additions."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    own = getattr(fn, "__name__", type(fn).__name__)
    return "function" if own == "<lambda>" else own
