"""A program's modules as ordinary JAX functions: what the ``replay`` engine runs, and what transformations need.

A module for several platforms is replayed as the one at hand runs it: its operations are then JAX's, which lowers them
for any other too. The bytes of a module are parsed only once their digest matched; MLIR's bindings are loaded when the
first one is.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from obmlite.errors import CorruptPackageError, ObmliteError, UnsupportedFormatError

if TYPE_CHECKING:
    from obmlite import replay
    from obmlite._engine import Program
    from obmlite.schema.records import ModuleRecord
    from obmlite.specs import TensorSpec

CALLING_CONVENTIONS = (9, 10)
"""Those whose ``main`` takes what replay gives it, whatever the JAX at hand calls."""


@dataclasses.dataclass(frozen=True)
class Replayability:
    """Whether a function can be re-traced as ordinary JAX; true if it can.

    Attributes:
      reasons: operations that stop it, each with how often it stands in the module, and why.
      platforms: where they do, of those that the function was exported for.
    """

    reasons: tuple[replay.Reason, ...]
    platforms: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        if not self.reasons:
            return "yes"
        return f"not on {', '.join(self.platforms)}: {'; '.join(map(str, self.reasons))}"


class Replays:
    """The modules of a program, each read when first needed."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._modules: dict[int, replay.Program] = {}
        self._reasons: dict[tuple[int, str], tuple[replay.Reason, ...]] = {}
        self._calls: dict[tuple[int, str], Callable[..., tuple[Any, ...]]] = {}

    def replayable(self, order: int = 0, platform: str | None = None) -> Replayability:
        """Whether a module can be replayed.

        Args:
          order: 0 for the function, 1, 2, … for its VJPs.
          platform: where; None, or one that it was not exported for, for all that it was.

        Raises:
          CorruptPackageError: the module's file is not what was saved.
          UnsupportedFormatError: this JAX does not read the module.
        """
        platforms = self._program.modules[order].platforms
        if platform is not None and platform not in platforms:
            platform = None
        refused = {name: self._refused(order, name) for name in platforms if platform in (None, name)}
        reasons = dict.fromkeys(reason for own in refused.values() for reason in own)
        return Replayability(tuple(reasons), tuple(name for name, own in refused.items() if own))

    def _refused(self, order: int, platform: str) -> tuple[replay.Reason, ...]:
        from obmlite import replay

        key = order, platform
        if key not in self._reasons:
            index = self._program.modules[order].platforms.index(platform)
            self._reasons[key] = tuple(replay.check(self._module(order), platform_index=index))
        return self._reasons[key]

    def check(self, order: int, platform: str | None = None) -> None:
        """Refuses a module that cannot be replayed.

        Raises:
          CorruptPackageError: its file is not what was saved.
          UnsupportedFormatError: it cannot; the text names the operations that stop it.
        """
        if reasons := self.replayable(order, platform).reasons:
            raise UnsupportedFormatError(
                "The function holds operations that are not replayed.",
                field="operations",
                expected="those of docs/replay.md",
                found="; ".join(map(str, reasons[:5])) + (f"; … ({len(reasons)} in all)" if len(reasons) > 5 else ""),
                fix='engine="export" or engine="rebuild"'
                if self._program.apart is None
                else "leave untrusted=True out, if you trust who made the package",
            )

    def operations(self, order: int = 0) -> dict[str, int]:
        """The operations of a module, with the targets of custom calls, and how often each stands in it."""
        from obmlite import replay

        return replay.operations(self._module(order))

    def call(self, order: int, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Runs a module by tracing its operations.

        Args:
          order: 0 for the function, 1, 2, … for its VJPs.
          arguments: all that the module record lists, as JAX has them.

        Returns:
          The results that the record lists.

        Raises:
          UnsupportedFormatError: the module holds operations that cannot be replayed.
        """
        record, here = self._program.modules[order], platform_at_hand()
        kept = range(len(record.arguments)) if record.kept is None else record.kept
        values = [_stored(arguments[n], record.arguments[n]) for n in kept]
        with contextlib.nullcontext() if self._program.apart is None else _forged(record):
            if here in record.platforms:
                results = self._call(order, here)(*values)
            else:  # JAX decides when it lowers, and refuses what it lowers for any other platform
                branches = {platform: self._call(order, platform) for platform in record.platforms}
                results = jax.lax.platform_dependent(*values, **branches)
            return tuple(_logical(value, spec) for value, spec in zip(results, record.results, strict=True))

    def _call(self, order: int, platform: str) -> Callable[..., tuple[Any, ...]]:
        from obmlite import replay

        key = order, platform
        if key not in self._calls:
            index = self._program.modules[order].platforms.index(platform)
            self._calls[key] = replay.to_jax(self._module(order), platform_index=index)
        return self._calls[key]

    def _module(self, order: int) -> replay.Program:
        if order not in self._modules:
            record = self._program.modules[order]
            self._modules[order] = _read(record, self._program.artifact(record), self._program.apart)
        return self._modules[order]


@contextlib.contextmanager
def _forged(record: ModuleRecord) -> Iterator[None]:
    """Within this, a stranger's module is traced, which may say anything of its operations.

    Raises:
      UnsupportedFormatError: JAX, or a rule, has met what no module that was exported says.
    """
    try:
        yield
    except ObmliteError:
        raise
    except Exception as error:
        raise UnsupportedFormatError(
            "An operation of the function is not of a form that is known.",
            object=record.name,
            field="operation",
            found=f"{type(error).__name__}: {error}"[:300],
        ) from error


def too_new(record: ModuleRecord) -> UnsupportedFormatError:
    """The error for a module of a StableHLO that this JAX does not have."""
    return UnsupportedFormatError(
        "This JAX does not run the function.",
        field="stablehlo",
        expected=f"StableHLO that jax {jax.__version__} reads",
        found=f"StableHLO {record.stablehlo_version}, saved with jax {record.jax_version}",
        fix=f"load it with jax {record.jax_version} or later",
    )


def unread(error: UnsupportedFormatError) -> replay.Reason:
    """The reason why a module that is not read at all is not replayable."""
    from obmlite import replay

    return replay.Reason("module", 1, error.found or error.problem)


def _read(record: ModuleRecord, artifact: bytes, apart: Callable[[bytes], bytes] | None) -> replay.Program:
    from obmlite import replay

    if record.calling_convention not in CALLING_CONVENTIONS:
        raise UnsupportedFormatError(
            "Functions of this calling convention are not replayed.",
            field="Module.calling_convention",
            expected=" or ".join(map(str, CALLING_CONVENTIONS)),
            found=str(record.calling_convention),
        )
    if record.ordered_effects or record.unordered_effects:
        raise UnsupportedFormatError(
            "A function with effects is not replayed.",
            found=", ".join((*record.ordered_effects, *record.unordered_effects)),
        )
    try:
        program = replay.read(artifact if apart is None else apart(artifact))
    except UnsupportedFormatError as error:
        raise (too_new(record) if error.field == "stablehlo" else error) from error
    called = {
        operation["call_target_name"]
        for function in program.functions.values()
        for operation in function.body.walk()
        if operation.name == "stablehlo.custom_call"
    }
    if tuple(sorted(called)) != record.custom_calls:
        raise CorruptPackageError(
            "A function's code calls other targets than the manifest says.",
            field="Module.custom_calls",
            expected=", ".join(record.custom_calls) or "none",
            found=", ".join(sorted(called)) or "none",
        )
    return program


# --- arrays as a module has them


def _stored(value: Any, spec: TensorSpec) -> Any:
    if spec.dtype == jax.dtypes.float0:
        return np.zeros(np.shape(value), np.bool_)
    return jax.random.key_data(value) if spec.kind.is_key else value


def _logical(value: Any, spec: TensorSpec) -> Any:
    if spec.dtype == jax.dtypes.float0:
        return np.zeros(value.shape, jax.dtypes.float0)
    return jax.random.wrap_key_data(value, impl=spec.kind.impl) if spec.kind.is_key else value


# --- where it runs


def platform_at_hand() -> str:
    """The platform that is traced for, as functions name it, unless arguments say otherwise."""
    device = jax.config.jax_default_device
    platform = str(getattr(device, "platform", device) or jax.default_backend())
    if platform == "gpu":  # JAX's name for both kinds
        from jax.extend import backend  # takes long to import

        return "rocm" if "rocm" in backend.get_backend("gpu").platform_version.lower() else "cuda"
    return platform


# --- what decides for replay

_forced: contextvars.ContextVar[bool] = contextvars.ContextVar("forced", default=False)


@contextlib.contextmanager
def forced() -> Iterator[None]:
    """Within this, what is traced of saved functions is replayed."""
    token = _forced.set(True)
    try:
        yield
    finally:
        _forced.reset(token)


def is_forced() -> bool:
    """Whether this is within :func:`forced`."""
    return _forced.get()


def in_forward_mode(values: Any) -> bool:
    """Whether an array of a call is being differentiated in forward mode (``jax.jvp``, ``jax.jacfwd``).

    A ``custom_vjp``, which binds saved VJPs, cannot be, and nothing public tells before it is too late. Private: the
    traces that a tracer is part of, by ``Tracer._trace`` and ``Trace.parent_trace``, and their classes' names, as in
    JAX 0.9.2, 0.10.2 and 0.12. Where they are not so, the answer is no, and JAX refuses.
    """
    tracers = (leaf for leaf in jax.tree.leaves(values) if isinstance(leaf, jax.core.Tracer))
    traces = {id(trace): trace for trace in (getattr(tracer, "_trace", None) for tracer in tracers)}
    return any(map(_is_forward, traces.values()))


def _is_forward(trace: Any) -> bool:
    while trace is not None:
        parent = getattr(trace, "parent_trace", None)
        # Without jax_use_direct_linearize, reverse mode is this class too, over partial evaluation.
        if type(trace).__name__ == "JVPTrace" and type(parent).__name__ != "JaxprTrace":
            return True
        trace = parent
    return False
