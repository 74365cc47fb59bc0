"""Odd batches, run on the next larger size that there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from obmlite import tree as trees
from obmlite.errors import ArgumentError, context
from obmlite.signature import Signature


class Padding:
    """A call of something with several signatures, for batches between their sizes."""

    def __init__(self, name: str, call: Callable[..., Any], signatures: Sequence[Signature]) -> None:
        """Looks for the sizes.

        Args:
          name: for errors.
          call: what takes batches of these sizes.
          signatures: of its call, for each set of shapes that it takes; symbolic ones take what they take.

        Raises:
          ArgumentError: there are no fixed sizes.
        """
        self._name = name
        self._call = call
        self._signatures = signatures
        self._fixed = [s for s in signatures if not s.symbols]
        if not self._fixed:
            raise ArgumentError(
                "There are no batches of fixed sizes to pad to.",
                object=name,
                expected="functions without symbols in their shapes",
                found=", ".join(map(str, signatures)),
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls it, with arguments of a batch of any size up to the largest.

        Raises:
          ArgumentError: the arguments do not fit any size, or a result does not have the batch as its leading
            dimension.
        """
        first = self._signatures[0]
        with context(object=self._name):
            arguments = first.bind(args, first.drop_fixed(kwargs) if kwargs else kwargs)
            leaves, tree = trees.flatten_arguments(arguments)
            shapes = {name: np.shape(leaf) for name, leaf in zip(tree.names, leaves, strict=True)}
            if any(_takes(signature, shapes) for signature in self._signatures):
                return self._call(*args, **kwargs)
            found = [batch for signature in self._fixed if (batch := self._batch(signature, shapes))]
            if not found:
                return self._call(*args, **kwargs)  # which says what there is
            size, count, signature, batched = min(found, key=lambda batch: batch[0])
            self._check_results(signature, size)
        padded = [
            _filled(leaf, size) if name in batched else leaf for name, leaf in zip(tree.names, leaves, strict=True)
        ]
        given = dict(zip(arguments, _unflattened(tree, padded, arguments), strict=True))
        args, kwargs = first.spread(given)
        result = self._call(*args, **kwargs)
        rows, shape = trees.flatten(result)
        return shape.unflatten([leaf[:count] for leaf in rows])

    def _batch(
        self, signature: Signature, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[int, int, Signature, frozenset[str]] | None:
        """(size, rows that there are, signature, leaves that are to be filled), if all it takes is more rows."""
        wanted = {name: spec.shape for name, spec in zip(signature.inputs.names, signature.input_specs, strict=True)}
        if wanted.keys() != shapes.keys():
            return None
        short = {name for name, shape in shapes.items() if shape != wanted[name]}
        if any(not shapes[n] or shapes[n][1:] != wanted[n][1:] for n in short):
            return None
        pairs = {(wanted[n][0], shapes[n][0]) for n in short}
        if len(pairs) != 1:
            return None
        [(size, count)] = pairs
        if not isinstance(size, int) or not 0 < count < size:
            return None
        return size, count, signature, frozenset(short)

    def _check_results(self, signature: Signature, size: int) -> None:
        """Refuses results that are not made of rows: what was filled in would be part of them."""
        for leaf, (name, spec) in enumerate(zip(signature.outputs.names, signature.output_specs, strict=True)):
            others = [
                s.output_specs[leaf].shape[:1] for s in self._fixed if s is not signature and _alike(s, signature)
            ]
            if spec.shape[:1] != (size,) or spec.shape[:1] in others:
                raise ArgumentError(
                    "A batch cannot be padded: a result does not have the batch as its leading dimension.",
                    leaf=name,
                    expected=f"{size} rows",
                    found=str(spec),
                )


def _takes(signature: Signature, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    wanted = {name: spec.shape for name, spec in zip(signature.inputs.names, signature.input_specs, strict=True)}
    return wanted.keys() == shapes.keys() and all(
        len(shape) == len(wanted[name])
        and all(not isinstance(d, int) or d == n for d, n in zip(wanted[name], shape, strict=True))
        for name, shape in shapes.items()
    )


def _alike(one: Signature, other: Signature) -> bool:
    """Whether two signatures differ in leading dimensions only."""
    return all(
        a.names == b.names and [s.shape[1:] for s in left] == [s.shape[1:] for s in right]
        for a, b, left, right in (
            (one.inputs, other.inputs, one.input_specs, other.input_specs),
            (one.outputs, other.outputs, one.output_specs, other.output_specs),
        )
    )


def _filled(leaf: Any, size: int) -> Any:
    """A batch with copies of its last row behind it; real ones, because zeros may be what a model divides by."""
    numpy: Any = jax.numpy if isinstance(leaf, jax.Array) else np
    return numpy.concatenate([leaf, numpy.repeat(leaf[-1:], size - len(leaf), axis=0)])


def _unflattened(tree: trees.Tree, leaves: Sequence[Any], arguments: Mapping[str, Any]) -> list[Any]:
    """The arguments, one after the other, with other leaves."""
    found = []
    for node in tree.children(0):
        first, last = tree.first_leaf[node], tree.first_leaf[tree.ends[node]]
        found.append(tree.subtree(node).unflatten(leaves[first:last]))
    assert len(found) == len(arguments)
    return found
