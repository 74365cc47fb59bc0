"""Pipelines: pre-processors, a function with weights bound to its arguments, post-processors; called as one."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from obmlite import _joining
from obmlite._binding import check_binding, held_leaves, subtree
from obmlite._calling import Call
from obmlite._chain import Chain, Handover, HostStep, Link, Traceable
from obmlite._once import once
from obmlite._padding import Padding
from obmlite._processes import OfOneProcess
from obmlite.errors import ArgumentError, context
from obmlite.schema.records import Binding, StepRecord, StepRole, Visibility
from obmlite.signature import Signature

if TYPE_CHECKING:
    from obmlite.supplemental import Supplemental
    from obmlite.weights import Weights

__all__ = ["BoundPipeline", "HostStep", "Pipeline", "Step", "register_host_step"]

Stage: TypeAlias = "Traceable | HostStep"
Bound: TypeAlias = "Mapping[str, str | tuple[str, str]]"
"""Argument → name of a weights object, or (name, name of a subtree of it)."""

MAX_COMBINATIONS = 1 << 12
"""Combinations of concrete functions that a pipeline's steps may have."""

HOST_STEPS: dict[str, Callable[[str, Mapping[str, Supplemental]], HostStep]] = {}
"""MIME type → what makes a step of a supplemental's name and the model's supplementals."""


def register_host_step(mime_type: str, make: Callable[[str, Mapping[str, Supplemental]], HostStep]) -> None:
    """Lets pipelines have steps that JAX does not run: supplementals of a MIME type.

    Args:
      mime_type: of the supplementals.
      make: makes the step of a supplemental's name and all supplementals of the model, since the step may need others
        beside its own. It should do little; :meth:`HostStep.run` may say what has to be installed.
    """
    HOST_STEPS[mime_type] = make


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a pipeline whose weights are not those that its function was exported with.

    Attributes:
      function: name of a function, or of a polymorphic function, of the model.
      weights: argument of the function → name of a weights object of the model, or (name, subtree). Left out, the
        bindings that the function was exported with.
    """

    function: str
    weights: Bound | None = None

    def record(self, role: StepRole, stage: Stage) -> StepRecord:
        """The step as a package has it."""
        if self.weights is None:
            return StepRecord(role, self.function, tuple(getattr(stage, "bindings", ())))
        pairs = {a: (w, "") if isinstance(w, str) else w for a, w in self.weights.items()}
        return StepRecord(role, self.function, tuple(Binding(a, *pair) for a, pair in pairs.items()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Which functions of a model to run one after the other, with which of its weights.

    ``docs/pipelines.md`` says how one step's result becomes the next one's arguments.

    Attributes:
      pre: pre-processors, as names of functions of the model or :class:`Step`.
      function: name of the model function; may be left out where there are processors.
      post: post-processors.
      weights: argument of the model function → name of a weights object of the model, or (name, subtree). Left out,
        the bindings that the function was exported with.
      pass_through: whether the last pre-processor returns a pair, of which the second value goes to the first
        post-processor, behind the model's result.
      metadata: what else to keep with it.
      visibility: ``"public"``, or ``"private"`` for one that calling the model never runs.
    """

    pre: Sequence[str | Step] = ()
    function: str | None = None
    post: Sequence[str | Step] = ()
    weights: Bound | None = None
    pass_through: bool = False
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    visibility: str | Visibility = "public"

    def records(self, find: Callable[[str], Stage]) -> tuple[StepRecord, ...]:
        """The steps as a package has them.

        Args:
          find: gives what has a name; raises where there is nothing.

        Raises:
          ArgumentError: there are no steps, or ``weights`` are given without a function.
        """
        if self.function is None and self.weights:
            raise ArgumentError("A pipeline binds weights to a function that it does not have.", field="weights")
        middle = [] if self.function is None else [Step(self.function, self.weights)]
        groups = ((StepRole.PRE_PROCESSOR, self.pre), (StepRole.MODEL, middle), (StepRole.POST_PROCESSOR, self.post))
        steps = []
        for role, given in groups:
            if isinstance(given, (str, Step)):
                raise ArgumentError(
                    "Processors are given as a list.", field="pre and post", expected='pre=["name"]', found=repr(given)
                )
            for item in given:
                step = item if isinstance(item, Step) else Step(item)
                steps.append(step.record(role, find(step.function)))
        return tuple(steps)


class BoundPipeline(OfOneProcess):
    """A pipeline of a model, called with the arguments of its first step that are not bound.

    Weights are restored at the first call, once, and never donated. Steps that run under JAX are one program.

    Attributes:
      name: its name in the model.
      steps: what runs, and which weights its arguments take.
      stages: the functions that the steps name.
      pass_through: whether a value goes past the model function.
      signatures: its arguments and results, for each choice of concrete functions; one where no step has a choice.
      metadata: what the user attached.
      visibility: whether calling the model may run it.
      pad_batch: whether a call with an odd batch runs on the next larger size, as :meth:`padded` says.
    """

    def __init__(
        self,
        name: str,
        steps: Sequence[StepRecord],
        find: Callable[[str], Stage],
        weights: Mapping[str, Weights],
        metadata: Mapping[str, Any],
        *,
        pass_through: bool = False,
        visibility: Visibility = Visibility.PUBLIC,
        pad_batch: bool = False,
    ) -> None:
        """Puts the steps together, and checks that each one's result fits the next.

        Args:
          name: its name.
          steps: in order.
          find: gives what a step names.
          weights: the model's.
          metadata: what the user attached.
          pass_through: whether the last pre-processor's second value goes to the first post-processor.
          visibility: whether calling the model may run it.
          pad_batch: whether it is called as :meth:`padded` does, where it has sizes to pad to.

        Raises:
          ArgumentError: steps do not fit one another, or weights do not fit the arguments that they are bound to.
        """
        self.name = name
        self.steps = tuple(steps)
        self.stages = [find(step.function) for step in self.steps]
        self.pass_through = pass_through
        self.metadata = dict(metadata)
        self.visibility = visibility
        self._find = find
        self._all_weights = weights
        self._lock = threading.RLock()
        with context(object=name):
            self._links = self._put_together()
            for link in self._links:
                for binding in link.bindings:
                    bound = subtree(weights[binding.weights], binding)
                    for signature in link.stage.signatures:
                        check_binding(signature, binding.argument, bound)
            self.signatures = _join(self._links)
            self.pad_batch = pad_batch and any(not signature.symbols for signature in self.signatures)
            self._segments = list(_segments(name, self._links, self.signatures))

    def _put_together(self) -> list[Link]:
        roles = [step.role for step in self.steps]
        splits = joins = -1
        if self.pass_through:
            if StepRole.PRE_PROCESSOR not in roles or StepRole.POST_PROCESSOR not in roles:
                raise ArgumentError(
                    "A value passes the model function only from a pre-processor to a post-processor.",
                    field="pass_through",
                    expected="pre= and post=",
                    found=", ".join(f"{s.role.name.lower()} {s.function}" for s in self.steps) or "no steps",
                )
            splits = len(roles) - 1 - roles[::-1].index(StepRole.PRE_PROCESSOR)
            joins = roles.index(StepRole.POST_PROCESSOR)
        if not self.steps:
            raise ArgumentError("A pipeline has no steps.", expected="function=, pre= or post=")
        return [
            Link(step.role, stage, step.bindings, joins=n == joins, splits=n == splits)
            for n, (step, stage) in enumerate(zip(self.steps, self.stages, strict=True))
        ]

    @property
    def function(self) -> Any:
        """The model function; None in a pipeline of processors alone."""
        return next((link.stage for link in self._links if link.role is StepRole.MODEL), None)

    @property
    def bindings(self) -> tuple[Binding, ...]:
        """Which weights the model function's arguments take."""
        return next((link.bindings for link in self._links if link.role is StepRole.MODEL), ())

    @property
    def signature(self) -> Signature:
        """Its arguments, those that are bound left out, and its results; the most general of :attr:`signatures`."""
        return self.signatures[-1]

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Compares arguments by name with the signatures.

        Raises:
          ArgumentError: they match none.
        """
        for signature in self.signatures:
            try:
                signature.match(arguments)
                return
            except ArgumentError:
                if signature is self.signatures[-1]:
                    raise

    @once
    def _calls(self) -> list[Any]:
        """For each step of the host itself, for each run of steps under JAX their one call."""
        return [s if isinstance(s, HostSegment) else self._jax_call(s) for s in self._segments]

    def _jax_call(self, chain: Chain) -> Call:
        signature: Any = self.signature if chain.signatures else Handover()
        trees: dict[Any, Any] = {}
        weights = []
        for number, link in enumerate(chain.links):
            for binding in link.bindings:
                own = self._all_weights[binding.weights]
                trees[number, binding.argument] = subtree(own, binding).tree
                weights.append(held_leaves(own, binding))
        return Call(self.name, chain, signature, trees, weights)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the steps on the bound weights and the given arguments.

        Raises:
          ArgumentError: the arguments do not match the signature; it names the leaf, what was expected and what came.
          PlatformError: a function was not exported for the platform that it would run on.
        """
        return self._padded(*args, **kwargs) if self.pad_batch else self._exactly(*args, **kwargs)

    def _exactly(self, *args: Any, **kwargs: Any) -> Any:
        calls = self._calls
        if len(calls) == 1 and isinstance(calls[0], Call):
            return calls[0](args, kwargs)
        return self._run_mixed(calls, args, kwargs)

    def _run_mixed(self, calls: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Steps of the host in Python, the others in programs between them."""
        value: Any = None
        passed: Any = None
        for number, call in enumerate(calls):
            if isinstance(call, HostSegment):
                given = self.signature.bind(args, kwargs) if number == 0 else call.link.arguments(value, passed)
                with context(object=self.name):
                    value, passed = call.link.results(call.stage.run(given), passed)
                continue
            chain, last = self._segments[number], number == len(calls) - 1
            assert isinstance(chain, Chain)
            if number == 0:
                value, passed = call(args, kwargs)
                continue
            # What only passes by may be what no array of JAX holds, so it does not go through the program.
            inside = any(link.splits or link.joins for link in chain.links)
            result = call((value, passed if inside else None), {})
            value, joined = (result, None) if last else result
            passed = joined if inside else passed
        return value

    def padded(self) -> Padding:
        """Its call for batches of any size up to the largest that it has: each is run on the next larger size.

        See :meth:`obmlite.PolymorphicFunction.padded`; the sizes are those that the pipeline takes.
        """
        return Padding(self.name, self._exactly, self.signatures)

    @once
    def _padded(self) -> Padding:
        return self.padded()

    def over(self, weights: Mapping[str, Weights]) -> BoundPipeline:
        """The same pipeline over other weights of the same names."""
        return BoundPipeline(
            self.name,
            self.steps,
            self._find,
            weights,
            self.metadata,
            pass_through=self.pass_through,
            visibility=self.visibility,
            pad_batch=self.pad_batch,
        )

    def __repr__(self) -> str:
        parts = []
        for step in self.steps:
            parts.append(step.function + "".join(f", {b.argument} = {b.weights!r}" for b in step.bindings))
        return f"Pipeline {self.name}{self.signature}: {' → '.join(parts)}"


@dataclasses.dataclass(frozen=True)
class HostSegment:
    """A step that JAX does not run."""

    link: Link
    stage: HostStep


def _segments(name: str, links: Sequence[Link], signatures: Sequence[Signature]) -> Iterator[HostSegment | Chain]:
    """Each step of the host by itself, and what lies between as chains."""
    at = 0
    for host, group in itertools.groupby(links, lambda link: isinstance(link.stage, HostStep)):
        own = list(group)
        last = at + len(own) == len(links)
        if host:
            yield from (HostSegment(link, link.stage) for link in own if isinstance(link.stage, HostStep))
        else:
            yield Chain(name, own, () if at else signatures, last=last)
        at += len(own)


def _join(links: Sequence[Link]) -> tuple[Signature, ...]:
    """The pipeline's signature for each choice of concrete functions that fit one another.

    Raises:
      ArgumentError: none do; the error shows both sides.
    """
    flows: list[tuple[_joining.Flow, Signature | None]] = [(_joining.Flow(), None)]
    before: Stage | None = None
    for link in links:
        bound = [b.argument for b in link.bindings]
        grown: list[tuple[_joining.Flow, Signature | None]] = []
        problem: ArgumentError | None = None
        for flow, last in flows:
            for signature in link.stage.signatures:
                try:
                    grown.append((flow.then(signature, bound, joined=link.joins, splits=link.splits), signature))
                except ArgumentError as error:
                    problem = problem or _both_sides(error, before, last, link.stage, signature.without(bound))
        if not grown:
            assert problem is not None
            raise problem
        if len(grown) > MAX_COMBINATIONS:
            raise ArgumentError(
                "The steps of a pipeline have too many combinations of concrete functions.",
                expected=f"at most {MAX_COMBINATIONS}",
                found=str(len(grown)),
            )
        flows, before = grown, link.stage
    return tuple(flow.signature() for flow, _ in flows)


def _both_sides(
    error: ArgumentError, before: Stage | None, last: Signature | None, after: Stage, signature: Signature
) -> ArgumentError:
    if before is None or last is None:
        return error
    returned = str(last).rpartition(" -> ")[2]
    return ArgumentError(
        error.problem,
        object=error.object,
        leaf=error.leaf,
        expected=f"{error.expected}, as {after.name}{signature} takes it",
        found=f"{error.found}, as {before.name} -> {returned} gives it",
        fix="put a step between them, or export one of them again",
    )
