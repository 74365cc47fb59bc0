"""Steps of a pipeline, one after the other, traced as one."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax

from obmlite import _joining
from obmlite.errors import ArgumentError, context
from obmlite.schema.records import ArgumentKind, Binding, StepRole
from obmlite.signature import Signature

if TYPE_CHECKING:
    from obmlite.schema.records import ModuleRecord

CaptureKey = tuple[str, int]
"""(weights object, leaf) of an array that a function closed over."""


class Traceable(Protocol):
    """What a step runs under JAX: a function, or several of which the arguments choose one."""

    name: str
    package: str | None

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The mesh that it is called on, if one was given."""
        ...

    @property
    def signatures(self) -> Sequence[Signature]:
        """Of each concrete function, the most specific first."""
        ...

    @property
    def capture_keys(self) -> Sequence[CaptureKey]:
        """Which arrays it closed over."""
        ...

    @property
    def captures(self) -> tuple[Any, ...]:
        """These arrays."""
        ...

    @property
    def donated_names(self) -> frozenset[str]:
        """The names of the leaves whose buffers it may reuse."""
        ...

    @property
    def compile_options(self) -> Mapping[str, Mapping[str, Any]]:
        """XLA's options, by platform."""
        ...

    @property
    def module(self) -> ModuleRecord:
        """What the manifest says of its module."""
        ...

    @property
    def vjp_order(self) -> int:
        """Up to which order its VJPs were saved."""
        ...

    def load(self) -> None:
        """Reads it."""
        ...

    def trace(self, arguments: Mapping[str, Any], captures: Sequence[Any]) -> Any:
        """Its results, to be traced under ``jax.jit``."""
        ...

    def explain(self, error: Exception, signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raises what lies behind an error of JAX's, if that is known."""
        ...


class HostStep(abc.ABC):
    """A step that runs in Python, outside of JAX's programs: its values may be anything that its signature says.

    A package names such a step by a supplemental, whose MIME type says who makes the step of it
    (:func:`obmlite.pipeline.register_host_step`).

    Attributes:
      name: of the supplemental.
      signature: of its arguments and results; its specs may be of dtypes that no array of JAX has.
    """

    name: str
    signature: Signature

    @property
    def signatures(self) -> Sequence[Signature]:
        """The one signature."""
        return (self.signature,)

    @abc.abstractmethod
    def run(self, arguments: Mapping[str, Any]) -> Any:
        """The results for arguments by name."""


@dataclasses.dataclass(frozen=True)
class Link:
    """A step in its place.

    Attributes:
      role: what it does.
      stage: what it runs.
      bindings: which of its arguments take weights.
      joins: whether it takes the passed value beside the result before it.
      splits: whether its result is a pair, of which the second value is passed on.
    """

    role: StepRole
    stage: Traceable | HostStep
    bindings: tuple[Binding, ...] = ()
    joins: bool = False
    splits: bool = False

    def arguments(self, value: Any, passed: Any) -> dict[str, Any]:
        """What came before, as this step's arguments."""
        signature = self.stage.signatures[0]
        bound = {b.argument for b in self.bindings}
        kinds = dict(zip(signature.arguments, signature.argument_kinds, strict=True))
        names = [name for name in kinds if name not in bound]
        keyword_only = [kinds[name] is ArgumentKind.KEYWORD_ONLY for name in names]
        with context(object=self.stage.name):
            return _joining.deal((value, passed) if self.joins else value, names, keyword_only)

    def results(self, result: Any, passed: Any) -> tuple[Any, Any]:
        """What goes on from here: the value, and the one that is passed by."""
        with context(object=self.stage.name):
            return _joining.split(result) if self.splits else (result, None if self.joins else passed)


class Handover:
    """The signature of steps behind a step of the host: they take what has become of the value so far."""

    fixed = ()

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - as a signature has it
        """The arguments by name."""
        value, passed = args
        return {"value": value, "passed": passed}

    def drop_fixed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """All of them."""
        return kwargs

    def covered(self, names: object) -> frozenset[str]:  # noqa: ARG002 - likewise
        """Nothing is donated."""
        return frozenset()


class Chain:
    """Steps of JAX's that follow on each other: one function, to :class:`obmlite._calling.Call`.

    Its bound arguments are named (number of the step, argument).
    """

    def __init__(self, name: str, links: Sequence[Link], signatures: Sequence[Signature], *, last: bool) -> None:
        """Puts them together.

        Args:
          name: of the pipeline.
          links: the steps; all of them run under JAX.
          signatures: of their arguments, for each choice of concrete functions; none for steps behind one of the host.
          last: whether the last of them is the pipeline's last; where not, the result is a pair: the value, and the one
            that is passed by.

        Raises:
          ArgumentError: two steps are to be compiled with different values of one option.
        """
        self.name = name
        self.links = links
        self.stages: list[Traceable] = [link.stage for link in links]  # type: ignore[misc]
        self.package = self.stages[0].package
        self.signatures = signatures
        self._last = last
        model = [s for s, link in zip(self.stages, links, strict=True) if link.role is StepRole.MODEL]
        self.mesh = next((s.mesh for s in (*model, *self.stages) if s.mesh is not None), None)
        self.compile_options = _merged(self.stages)
        keys: dict[CaptureKey, int] = {}
        for stage in self.stages:
            for key in stage.capture_keys:
                keys.setdefault(key, len(keys))
        self._capture_numbers = [[keys[key] for key in stage.capture_keys] for stage in self.stages]

    @property
    def captures(self) -> tuple[Any, ...]:
        """The arrays that its functions closed over, each once."""
        return tuple(capture_values(self.stages).values())

    @property
    def donated_names(self) -> frozenset[str]:
        """The names of the leaves of its arguments whose buffers it may reuse: those of the first step."""
        return self.stages[0].donated_names if self.signatures else frozenset()

    @property
    def vjp_order(self) -> int:
        """Up to which order VJPs of any of its functions were saved."""
        return max(stage.vjp_order for stage in self.stages)

    def load(self) -> None:
        """Reads all of its functions."""
        for stage in self.stages:
            stage.load()

    def trace(self, arguments: Mapping[Any, Any], captures: Sequence[Any]) -> Any:
        """The last step's result, to be traced under ``jax.jit``.

        Raises:
          ArgumentError: the arguments do not match the first step's signature, or make a step's result one that does
            not match the next one's.
        """
        given = {name: value for name, value in arguments.items() if isinstance(name, str)}
        first = bool(self.signatures)
        value, passed = (None, None) if first else (given["value"], given["passed"])
        for number, (link, stage) in enumerate(zip(self.links, self.stages, strict=True)):
            own = given if first and number == 0 else link.arguments(value, passed)
            bound = {b.argument: arguments[number, b.argument] for b in link.bindings}
            result = stage.trace({**own, **bound}, [captures[n] for n in self._capture_numbers[number]])
            value, passed = link.results(result, passed)
        return value if self._last else (value, passed)

    def explain(self, error: Exception, signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raises what lies behind an error of JAX's, if a step knows it."""
        if not self.signatures:
            return
        arguments = signature.bind(args, kwargs)
        fitting = [own for own in self.signatures if _fits(own, arguments)]
        if fitting or len(self.signatures) == 1:
            for stage in self.stages:
                stage.explain(error, (fitting or self.signatures)[0], args, kwargs)


def _fits(signature: Signature, arguments: Mapping[str, Any]) -> bool:
    try:
        signature.match(arguments)
    except ArgumentError:
        return False
    return True


def capture_values(stages: Sequence[Traceable]) -> dict[CaptureKey, Any]:
    """The arrays that functions closed over, each once; what all of a function's are known already is not asked for."""
    values: dict[CaptureKey, Any] = {}
    for stage in stages:
        if any(key not in values for key in stage.capture_keys):
            for key, value in zip(stage.capture_keys, stage.captures, strict=True):
                values.setdefault(key, value)
    return values


def _merged(stages: Sequence[Traceable]) -> dict[str, dict[str, Any]]:
    """The options of all steps, which are compiled together."""
    merged: dict[str, dict[str, Any]] = {}
    for stage in stages:
        for platform, options in stage.compile_options.items():
            own = merged.setdefault(platform, {})
            for option, value in options.items():
                if own.setdefault(option, value) != value:
                    raise ArgumentError(
                        "Steps of a pipeline, which compiles as one, have different values of one XLA option.",
                        field=f"compile_options: {platform}, {option}",
                        expected=repr(own[option]),
                        found=f"{value!r} of {stage.name}",
                        fix="give them the same value, or the option to one of them only",
                    )
    return merged
