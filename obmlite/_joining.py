"""Which result of one step of a pipeline is which argument of the next, and whether the two fit.

A step's result becomes the next one's arguments, of which those that are bound to weights are left out:

* a dict whose keys are the arguments' names: by name;
* a tuple with as many values as there are arguments, if these are several: in order;
* anything else: whole, as the one argument.

Values and specs of values go by the same rule, so what was checked when a pipeline was made is what runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from obmlite import dims
from obmlite import tree as trees
from obmlite.errors import ArgumentError, LeafError
from obmlite.schema.records import ArgumentKind
from obmlite.signature import Signature
from obmlite.specs import Dimension, TensorSpec

Size = Dimension
"""A number, or an expression over symbols."""


def deal(value: Any, names: Sequence[str], keyword_only: Sequence[bool] = ()) -> dict[str, Any]:
    """One step's result as the next one's arguments.

    Args:
      value: the result.
      names: the arguments, without those that are bound.
      keyword_only: for each whether it is never given by position; none of them if left out.

    Raises:
      ArgumentError: the result is not so many arguments.
    """
    if isinstance(value, dict) and value.keys() == set(names):
        return {name: value[name] for name in names}
    if type(value) is tuple and len(value) == len(names) > 1 and not any(keyword_only):
        return dict(zip(names, value, strict=True))
    if len(names) == 1:
        return {names[0]: value}
    raise ArgumentError(
        "The result of a pipeline's step is not the arguments of the next one.",
        expected=f"a dict with the keys {', '.join(names)}, or a tuple of {len(names)}" if names else "no arguments",
        found=_kind(value),
    )


def split(value: Any) -> tuple[Any, Any]:
    """The last pre-processor's result: what goes on to the model, and what passes it by.

    Raises:
      ArgumentError: it is no pair.
    """
    if type(value) is tuple and len(value) == 2:
        return value
    raise ArgumentError(
        "With pass_through=True the last pre-processor returns a pair: what the model gets, and what passes it by.",
        expected="a tuple of two",
        found=_kind(value),
    )


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dict with the keys {', '.join(map(str, value)) or 'none'}"
    if type(value) is tuple:
        return f"a tuple of {len(value)}"
    return str(value) if isinstance(value, TensorSpec) else f"one {type(value).__name__}"


# --- specs


@dataclasses.dataclass(frozen=True)
class Flow:
    """What is known of a pipeline up to some step, for one choice of concrete functions.

    Attributes:
      inputs: the first step's signature, without bound arguments.
      outputs: tree of the latest result.
      specs: of its leaves.
      passed: the value that passes the model by: a pytree of specs.
      known: what symbols turned out to be.
      constraints: of all steps so far.
      steps: number of steps so far.
    """

    inputs: Signature | None = None
    outputs: trees.Tree | None = None
    specs: Sequence[TensorSpec] = ()
    passed: Any = None
    known: Mapping[str, Size] = dataclasses.field(default_factory=dict)
    constraints: tuple[dims.Constraint, ...] = ()
    steps: int = 0

    def then(self, signature: Signature, bound: Sequence[str], *, joined: bool = False, splits: bool = False) -> Flow:
        """The flow after one more step.

        Args:
          signature: of the step.
          bound: its arguments that take weights.
          joined: whether it takes the passed value beside the result.
          splits: whether its result is a pair, of which one passes the model by.

        Raises:
          ArgumentError: the step does not fit.
        """
        own = signature.without(tuple(bound))
        known = dict(self.known)
        rename: dict[str, Size] = {}
        if self.steps:  # a later step's symbols have nothing to do with earlier ones of the same name
            rename = {symbol: dims.parse(f"{symbol}__{self.steps}") for symbol in _symbols(signature)}
        if self.outputs is not None:
            value = self.outputs.unflatten(list(self.specs))
            given = (value, self.passed) if joined else value
            _unify(given, own, rename, known)
        own_constraints = [_rewritten(dims.parse_constraint(text), rename) for text in signature.constraints]
        constraints = (*self.constraints, *own_constraints)
        _check_constraints(constraints, known)
        outputs, specs = signature.outputs, [_resolved(spec, rename, known) for spec in signature.output_specs]
        passed = None if joined else self.passed
        if splits:
            value, passed = split(outputs.unflatten(specs))
            specs, outputs = _flattened(value)
        return Flow(self.inputs or own, outputs, specs, passed, known, constraints, self.steps + 1)

    def signature(self) -> Signature:
        """The pipeline's signature."""
        assert self.inputs is not None
        assert self.outputs is not None
        inputs = tuple(_resolved(spec, {}, self.known) for spec in self.inputs.input_specs)
        outputs = tuple(_resolved(spec, {}, self.known) for spec in self.specs)
        symbols = frozenset().union(*(spec.symbols for spec in inputs))
        found = [_rewritten(constraint, self.known) for constraint in self.constraints]
        kept = tuple(dict.fromkeys(str(c) for c in found if c.symbols and c.symbols <= symbols))
        return dataclasses.replace(
            self.inputs, input_specs=inputs, outputs=self.outputs, output_specs=outputs, constraints=kept
        )


def _flattened(value: Any) -> tuple[list[Any], trees.Tree]:
    try:
        return trees.flatten(value)
    except LeafError as error:
        raise ArgumentError(error.problem, leaf=error.leaf, expected=error.expected, found=error.found) from error


def _unify(given: Any, wanted: Signature, rename: Mapping[str, Size], known: dict[str, Size]) -> None:
    """Compares what a step gets with what it takes; adds what that says of symbols.

    Raises:
      ArgumentError: they differ.
    """
    keyword_only = [kind is ArgumentKind.KEYWORD_ONLY for kind in wanted.argument_kinds]
    arguments = deal(given, wanted.arguments, keyword_only)
    leaves, tree = trees.flatten_arguments(arguments)
    found = dict(zip(tree.names, leaves, strict=True))
    expected = dict(zip(wanted.inputs.names, wanted.input_specs, strict=True))
    for name in [*expected, *(n for n in found if n not in expected)]:
        left, right = expected.get(name), found.get(name)
        if left is None or right is None or not _fits(right, _resolved(left, rename, known), known):
            raise ArgumentError(
                "The result of a pipeline's step does not fit the next one.",
                leaf=name,
                expected=str(left or "no such leaf"),
                found=str(_resolved(right, {}, known) if right else "no such leaf"),
            )


def _fits(found: TensorSpec, wanted: TensorSpec, known: dict[str, Size]) -> bool:
    if found.ndim != wanted.ndim or not _promotes(found, wanted):
        return False
    return all(_unified(a, b, known) for a, b in zip(found.shape, wanted.shape, strict=True))


def _promotes(found: TensorSpec, wanted: TensorSpec) -> bool:
    """Whether the dtype is the wanted one, or becomes it as a weakly typed value's does in a call."""
    if found.kind == wanted.kind:
        return True
    if not found.weak_type or wanted.kind.is_key or not wanted.kind.storage:
        return False
    weak = jax.ShapeDtypeStruct((), found.dtype, weak_type=True)
    return bool(jax.dtypes.result_type(weak, wanted.kind.numpy) == wanted.kind.numpy)


def _unified(one: Size, other: Size, known: dict[str, Size]) -> bool:
    """Makes two dimensions one, if they can be. What cannot be decided here is left to the call, which checks it."""
    one, other = _substituted(one, known), _substituted(other, known)
    if one == other:
        return True
    if isinstance(one, int) and isinstance(other, int):
        return False
    # The later step's symbol gives way to the earlier one's expression.
    for symbol, value in ((other, one), (one, other)):
        if isinstance(symbol, dims.Expression) and symbol.text in symbol.symbols:
            if isinstance(value, dims.Expression) and symbol.text in value.symbols:
                return True  # b against 2*b, say: undecided
            known[symbol.text] = value
            return not (isinstance(value, int) and value < 1)
    for expression, size in ((one, other), (other, one)):
        if isinstance(expression, dims.Expression) and isinstance(size, int):
            try:
                solved = expression.solve(size, {})
            except ArgumentError:
                return False
            if solved is not None:
                known[solved[0]] = solved[1]
    return True


# --- symbols


def _symbols(signature: Signature) -> frozenset[str]:
    specs = (*signature.input_specs, *signature.output_specs)
    return frozenset().union(
        *(s.symbols for s in specs), *(dims.parse_constraint(c).symbols for c in signature.constraints)
    )


def _replace(size: Size, values: Mapping[str, Size]) -> Size:
    try:
        return dims.substitute(size, values)
    except ArgumentError:  # too large a number, say: the call will tell
        return size


def _substituted(size: Size, known: Mapping[str, Size]) -> Size:
    """A dimension with what is known of its symbols put in, until nothing more is."""
    for _ in range(len(known) + 1):
        if isinstance(size, int) or not size.symbols & known.keys():
            break
        size = _replace(size, known)
    return size


def _resolved(spec: TensorSpec, rename: Mapping[str, Size], known: Mapping[str, Size]) -> TensorSpec:
    """A spec with symbols renamed, and what is known of them put in."""
    if not spec.symbols:
        return spec
    return dataclasses.replace(spec, shape=tuple(_substituted(_replace(d, rename), known) for d in spec.shape))


def _rewritten(constraint: dims.Constraint, values: Mapping[str, Size]) -> dims.Constraint:
    return dims.Constraint(
        _substituted(constraint.left, values), constraint.relation, _substituted(constraint.right, values)
    )


def _check_constraints(constraints: Iterable[dims.Constraint], known: Mapping[str, Size]) -> None:
    """Refuses sizes that break a step's constraint.

    Raises:
      ArgumentError: they do.
    """
    for constraint in constraints:
        now = _rewritten(constraint, known)
        if now.holds({}) is False:
            raise ArgumentError(
                "A constraint of a pipeline's step is broken by the steps beside it.",
                expected=str(constraint),
                found=str(now),
            )
