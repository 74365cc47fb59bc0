"""Signatures: the pytree of specs of a function's arguments and results, and matching a call against it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from obmlite import dims
from obmlite import tree as trees
from obmlite.errors import ArgumentError, LeafError, UnknownNameError
from obmlite.schema.records import ArgumentKind, FixedArgument, FixedKind
from obmlite.specs import TensorSpec
from obmlite.tree import Kind, Tree

__all__ = ["Signature"]

_SHOWN = 10  # leaves that an error lists


@dataclasses.dataclass(frozen=True)
class Signature:
    """What a function takes and returns.

    ``str(signature)`` reads ``(params: {…12 leaves}, x: f32[b,28,28,1]) -> f32[b,10]``.

    Attributes:
      inputs: tree over the arguments; its root has one child for each, under its name.
      input_specs: of each leaf of the arguments.
      outputs: tree of the results.
      output_specs: of each leaf of the results.
      argument_kinds: how each argument may be given.
      constraints: what the symbols in the shapes must satisfy, such as ``"b <= 16"``.
      fixed: arguments that were fixed when exporting.
    """

    inputs: Tree
    input_specs: Sequence[TensorSpec]
    outputs: Tree
    output_specs: Sequence[TensorSpec]
    argument_kinds: Sequence[ArgumentKind]
    constraints: Sequence[str] = ()
    fixed: Sequence[FixedArgument] = ()

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of the arguments, in order."""
        return tuple(self.inputs.keys[node] for node in self.inputs.children(0))  # type: ignore[misc]

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbols in the shapes of the arguments, sorted."""
        return tuple(sorted(frozenset().union(*(s.symbols for s in self.input_specs))))

    def argument(self, name: str) -> tuple[Tree, Sequence[TensorSpec]]:
        """The tree and the leaves' specs of one argument.

        Raises:
          UnknownNameError: there is none of that name.
        """
        node = self.inputs.child(0, name)
        if node is None:
            raise UnknownNameError("There is no such argument.", expected=", ".join(self.arguments), found=name)
        return self.inputs.subtree(node), self.input_specs[slice(*self.leaves(node))]

    def covered(self, names: Collection[str]) -> frozenset[str]:
        """The arguments that have leaves, all of whose names are among some."""
        found = set()
        for node in self.inputs.children(0):
            own = self.inputs.names[slice(*self.leaves(node))]
            if own and all(name in names for name in own):
                found.add(str(self.inputs.keys[node]))
        return frozenset(found)

    def leaves(self, node: int) -> tuple[int, int]:
        """The range of leaves below a node of :attr:`inputs`."""
        return self.inputs.first_leaf[node], self.inputs.first_leaf[self.inputs.ends[node]]

    def __str__(self) -> str:
        parts = []
        keyword = False
        for node, kind in zip(self.inputs.children(0), self.argument_kinds, strict=True):
            if kind is ArgumentKind.KEYWORD_ONLY and not keyword:
                parts.append("*")
                keyword = True
            first, last = self.leaves(node)
            parts.append(f"{self.inputs.keys[node]}: {describe(self.inputs, node, self.input_specs[first:last])}")
        return f"({', '.join(parts)}) -> {describe(self.outputs, 0, self.output_specs)}"

    def without(self, names: Sequence[str]) -> Signature:
        """The signature of the function with some arguments bound."""
        children = list(self.inputs.children(0))
        bound = {node: None for node in children if self.inputs.keys[node] in names}
        leaves = set(itertools.chain.from_iterable(range(*self.leaves(node)) for node in bound))
        return dataclasses.replace(
            self,
            inputs=self.inputs.without(list(bound)),
            input_specs=tuple(s for n, s in enumerate(self.input_specs) if n not in leaves),
            argument_kinds=tuple(
                kind for node, kind in zip(children, self.argument_kinds, strict=True) if node not in bound
            ),
        )

    # --- calls

    def drop_fixed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's keyword arguments without those that were fixed when exporting, which may be given again.

        Raises:
          ArgumentError: a fixed one has another value.
        """
        for fixed in self.fixed:
            if fixed.name in kwargs:
                self._check_fixed(fixed, kwargs[fixed.name])
        names = {fixed.name for fixed in self.fixed}
        return {name: value for name, value in kwargs.items() if name not in names}

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name.

        Raises:
          ArgumentError: too many, missing or unknown arguments.
        """
        names = dict.fromkeys(self.arguments)
        positional = [n for n, k in zip(names, self.argument_kinds, strict=True) if k is not ArgumentKind.KEYWORD_ONLY]
        if len(args) > len(positional):
            raise ArgumentError(
                "Too many positional arguments.", expected=f"at most {len(positional)}: {self}", found=str(len(args))
            )
        given = dict(zip(positional, args, strict=False))
        only_positional = {
            n for n, k in zip(names, self.argument_kinds, strict=True) if k is ArgumentKind.POSITIONAL_ONLY
        }
        for name, value in kwargs.items():
            if name in given:
                raise ArgumentError("An argument is given twice.", leaf=name, expected=str(self))
            if name not in names or name in only_positional:
                raise ArgumentError("There is no keyword argument of this name.", leaf=name, expected=str(self))
            given[name] = value
        missing = [n for n in names if n not in given]
        if missing:
            raise ArgumentError("An argument is missing.", leaf=", ".join(missing), expected=str(self))
        return {name: given[name] for name in names}

    def spread(self, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Undoes :meth:`bind`: arguments by name, as a call gives them."""
        kinds = dict(zip(self.arguments, self.argument_kinds, strict=True))
        positional = tuple(arguments[name] for name, kind in kinds.items() if kind is not ArgumentKind.KEYWORD_ONLY)
        return positional, {name: arguments[name] for name, kind in kinds.items() if kind is ArgumentKind.KEYWORD_ONLY}

    @staticmethod
    def _check_fixed(fixed: FixedArgument, value: Any) -> None:
        if fixed.held and type(value) is type(fixed.value) and value == fixed.value:
            return
        how = "is static" if fixed.kind is FixedKind.STATIC else "was left at its default when exporting"
        raise ArgumentError(
            f"An argument {how} and cannot be changed.",
            leaf=fixed.name,
            expected=fixed.text,
            found=f"{value!r:.80}",
            fix="leave it out; for another value, export the function again with it",
        )

    def match(self, arguments: Mapping[str, Any]) -> list[Any]:
        """The leaves of a call's arguments in the signature's order.

        Leaves match by name, so any container with the same keys will do. Weakly typed values (Python numbers) are
        converted as under ``jax.jit``.

        Args:
          arguments: values by argument name, as :meth:`bind` gives them.

        Raises:
          ArgumentError: a leaf is missing, is not expected, or has another shape or dtype; or a constraint on the
            symbols is broken. It names the leaf, what was expected and what came.
        """
        leaves, tree = _flatten(arguments)
        given = dict(zip(tree.names, leaves, strict=True))
        self._check_names(given)
        pairs: list[tuple[str, Any, int]] = []
        matched = []
        for name, spec in zip(self.inputs.names, self.input_specs, strict=True):
            value = given[name]
            found = _spec_of(name, value)
            value = _convert(value, found, spec)
            if value is None or found.ndim != spec.ndim:
                raise _mismatch(name, spec, found)
            for axis, (wanted, size) in enumerate(zip(spec.shape, found.shape, strict=True)):
                if isinstance(wanted, int):
                    if wanted != size:
                        raise _mismatch(name, spec, found)
                elif isinstance(size, int):  # a symbolic size is JAX's to check: the call is being exported again
                    pairs.append((f"{name}, dimension {axis}", wanted, size))
            matched.append(value)
        values = dims.bind(pairs)
        for text in self.constraints:
            if dims.parse_constraint(text).holds(values) is False:
                symbols = ", ".join(f"{k} = {v}" for k, v in sorted(values.items()))
                raise ArgumentError("A constraint on the shapes is broken.", expected=text, found=symbols)
        return matched

    def _check_names(self, given: Mapping[str, Any]) -> None:
        wanted = set(self.inputs.names)
        missing = [n for n in self.inputs.names if n not in given]
        extra = [n for n in given if n not in wanted]
        if not missing and not extra:
            return
        problem = " and ".join(
            [
                *(["leaves are missing"] if missing else []),
                *(["there are leaves that are not expected"] if extra else []),
            ]
        )
        below = next((n for n in missing if any(e.startswith(f"{n}.") for e in extra)), None)
        raise ArgumentError(
            f"The arguments do not match the signature: {problem}.",
            leaf=_list(missing or extra),
            expected=f"missing: {_list(missing)}" if missing else f"only the leaves of {self}",
            found=f"not expected: {_list(extra)}" if extra else None,
            fix=f"{below} is to be one array, as numpy.asarray makes of a list" if below else None,
        )


def _list(names: Sequence[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _flatten(arguments: Mapping[str, Any]) -> tuple[list[Any], Tree]:
    try:
        return trees.flatten_arguments(arguments)
    except LeafError as error:
        raise ArgumentError(error.problem, leaf=error.leaf, expected=error.expected, found=error.found) from error


def _spec_of(name: str, value: Any) -> TensorSpec:
    try:
        return TensorSpec.of(value)
    except LeafError as error:
        raise ArgumentError(error.problem, leaf=name, expected=error.expected, found=error.found) from error


def _mismatch(name: str, expected: TensorSpec, found: TensorSpec) -> ArgumentError:
    what = "shape" if expected.kind == found.kind else "dtype"
    return ArgumentError(f"An argument has another {what}.", leaf=name, expected=str(expected), found=str(found))


def _convert(value: Any, found: TensorSpec, wanted: TensorSpec) -> Any:
    """The value with the wanted dtype, as JAX would promote it; None where it would not."""
    if found.kind == wanted.kind:
        return value
    if found.kind.is_key or wanted.kind.is_key or not found.kind.storage or not wanted.kind.storage:
        return None
    if found.weak_type and jax.dtypes.result_type(_weak(found), wanted.kind.numpy) == wanted.kind.numpy:
        return jax.numpy.asarray(value, wanted.kind.numpy)
    if isinstance(value, (np.ndarray, np.generic)) and jax.dtypes.canonicalize_dtype(value.dtype) == wanted.kind.numpy:
        return value  # jit narrows it
    return None


def _weak(spec: TensorSpec) -> Any:
    kind = spec.kind.numpy
    return next(t for t, family in ((int, np.integer), (float, np.floating), (complex, np.complexfloating))
                if jax.dtypes.issubdtype(kind, family))  # fmt: skip


def describe(tree: Tree, node: int, specs: Sequence[TensorSpec]) -> str:
    """A pytree of specs on one line: whole when small, brackets and a count when not."""
    kind = tree.kinds[node]
    if kind == Kind.LEAF:
        return str(specs[0])
    if kind == Kind.NONE:
        return "None"
    children = list(tree.children(node))
    dicts = kind in (Kind.DICT, Kind.ORDERED_DICT, Kind.DEFAULT_DICT)
    opening, closing = "[]" if kind == Kind.LIST else "()" if kind == Kind.TUPLE else "{}"
    head = "" if dicts or kind in (Kind.LIST, Kind.TUPLE) else tree.classes.get(node, "").rpartition(".")[2]
    if len(children) > 4 or any(tree.arities[c] for c in children):
        return f"{head}{opening}…{len(specs)} {'leaf' if len(specs) == 1 else 'leaves'}{closing}"
    first = tree.first_leaf[node]
    parts = []
    for child in children:
        text = describe(tree, child, specs[tree.first_leaf[child] - first :])
        parts.append(text if opening in "[(" else f"{trees.key_text(tree.keys[child])}: {text}")  # type: ignore[arg-type]
    comma = "," if opening == "(" and len(parts) == 1 else ""
    return f"{head}{opening}{', '.join(parts)}{comma}{closing}"
