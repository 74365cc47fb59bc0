"""What of a pipeline is served: a function from named arrays to named arrays.

A tensor's name is the path of its leaf joined by ``.``: the argument's name first for inputs (``x``, ``batch.image``);
for outputs the keys of the result (``logits``), behind ``output_`` where they begin with a position, and ``output_0``
for a result that is one array.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from obmlite import tree as trees
from obmlite.schema.records import ArgumentKind
from obmlite.serving.inputs import Array, Inputs, Plan, TensorInfo
from obmlite.serving.status import Code, ServingError

if TYPE_CHECKING:
    from obmlite.pipeline import BoundPipeline

__all__ = ["Array", "Interface", "TensorInfo"]


class Interface:
    """A pipeline as a function from named arrays of numpy to named arrays of numpy. Threads may share it.

    Attributes:
      name: the pipeline's.
      inputs: what it takes, by name.
      outputs: what it gives, by name.
      batch_sizes: the sizes that batches have where they are fixed; None where any size goes, or there is no batch.
      batched: whether all inputs and outputs have one leading dimension in common, of rows.
      rows: names of the inputs whose leading dimension is the batch.
      divisible: whether batches may be filled up, split and put together: their size was left open, or there are
        several of them, so that rows know nothing of one another.
    """

    def __init__(self, pipeline: BoundPipeline) -> None:
        """Reads the pipeline's signatures; nothing is compiled."""
        self.name = pipeline.name
        self._pipeline = pipeline
        self._signature = pipeline.signature
        self._inputs = Inputs(pipeline.signatures)
        self._keys = {n: spec.kind.impl for n, spec in enumerate(self._signature.input_specs) if spec.kind.is_key}
        tree, kinds = self._signature.inputs, self._signature.argument_kinds
        # What has one array for each argument, as most have, needs no trees.
        self._positional = ArgumentKind.KEYWORD_ONLY not in kinds and all(
            tree.kinds[node] == trees.Kind.LEAF for node in tree.children(0)
        )
        # The same for results.
        self._single = self._signature.outputs.kinds[0] == trees.Kind.LEAF
        self.inputs: Mapping[str, TensorInfo] = self._inputs.inputs
        self.outputs: Mapping[str, TensorInfo] = self._inputs.outputs
        self.batch_sizes = self._inputs.batch_sizes
        self.batched = self._inputs.batched
        self.rows = self._inputs.rows
        self.divisible = self._inputs.divisible

    def check(self, inputs: Mapping[str, Array], output_filter: Collection[str] = ()) -> Plan:
        """Compares inputs with the signature: how many rows they are, and how they are run.

        Raises:
          ServingError: ``INVALID_ARGUMENT``: they do not fit, or there is no output of a name in the filter.
        """
        for name in output_filter:
            if name not in self.outputs:
                raise ServingError(
                    Code.INVALID_ARGUMENT,
                    f"output tensor alias not found in signature: {name} Outputs expected to be in the set "
                    f"{{{','.join(self.outputs)}}}.",
                    leaf=name,
                )
        return self._inputs.check(inputs)

    def group(self, inputs: Mapping[str, Array]) -> Any:
        """What inputs that fit must have in common to be put together in one batch; hashable."""
        return self._inputs.group(inputs)

    def named(self, arguments: Mapping[str, Any]) -> dict[str, Array]:
        """A call's arguments by name, which are pytrees, as the arrays that :meth:`run` takes.

        Raises:
          ServingError: ``INVALID_ARGUMENT``: they have other leaves than the signature.
        """
        leaves, tree = trees.flatten_arguments(arguments)
        found = dict(zip(tree.names, to_host(leaves), strict=True))
        if found.keys() != set(self._signature.inputs.names):
            raise ServingError(
                Code.INVALID_ARGUMENT,
                f"The arguments have other leaves: expected {', '.join(self._signature.inputs.names)}, found "
                f"{', '.join(found)}.",
            )
        ordered = (found[name] for name in self._signature.inputs.names)
        return {
            # Python's numbers are of any dtype, as in a call of JAX's.
            i.name: a.astype(i.dtype) if not a.ndim and i.kind == "tensor" else a
            for i, a in zip(self.inputs.values(), ordered, strict=True)
        }

    def zeros(self) -> Iterator[dict[str, Array]]:
        """Zeros that it takes, for each signature for which some are found; none where it takes texts."""
        return self._inputs.zeros()

    def run(
        self, inputs: Mapping[str, Array], output_filter: Collection[str] = (), plan: Plan | None = None
    ) -> dict[str, Array]:
        """Calls the pipeline.

        A batch of a size between fixed ones is filled up with copies of its last row, a larger one is run in parts.

        Args:
          inputs: by name, with the dtypes of :attr:`inputs`; of PRNG keys their data, of texts arrays of bytes.
          output_filter: names of outputs; all of them if empty.
          plan: what :meth:`check` gave for them, if they were checked before.

        Returns:
          The outputs by name, in host memory; they may be read-only.

        Raises:
          ServingError: ``INVALID_ARGUMENT`` for inputs that do not fit; or the call failed.
        """
        if plan is None:
            plan = self.check(inputs, output_filter)
        try:
            if not plan.sizes:
                return self._call(inputs, output_filter)
            return self._divided(inputs, output_filter, plan)
        except ServingError:
            raise
        except Exception as error:  # whatever a model raises is an answer to the one who called it
            raise ServingError.of(error) from error

    def _divided(self, inputs: Mapping[str, Array], output_filter: Collection[str], plan: Plan) -> dict[str, Array]:
        parts: list[dict[str, Array]] = []
        at = 0
        for size in plan.sizes:
            given = {n: filled(a[at : at + size], size) if n in self.rows else a for n, a in inputs.items()}
            parts.append(self._call(given, output_filter))
            at += size
        if len(parts) == 1:
            return {name: array[: plan.rows] for name, array in parts[0].items()}
        return {name: np.concatenate([part[name] for part in parts])[: plan.rows] for name in parts[0]}

    def _call(self, inputs: Mapping[str, Array], output_filter: Collection[str]) -> dict[str, Array]:
        leaves: list[Any] = [inputs[name] for name in self.inputs]
        for n, impl in self._keys.items():
            leaves[n] = jax.random.wrap_key_data(leaves[n], impl=impl)
        if self._positional:
            result = self._pipeline(*leaves)
        else:
            args, kwargs = self._signature.spread(self._signature.inputs.unflatten(leaves))
            result = self._pipeline(*args, **kwargs)
        if self._single:
            return dict(zip(self.outputs, to_host([result]), strict=True))
        named = dict(zip(self.outputs, jax.tree.leaves(result), strict=True))
        names = list(output_filter or named)
        return dict(zip(names, to_host([named[name] for name in names]), strict=True))


def filled(rows: Array, size: int) -> Array:
    """A batch with copies of its last row behind it; real ones, because zeros may be what a model divides by."""
    if len(rows) == size:
        return rows
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


def to_host(values: Sequence[Any]) -> list[Array]:
    """Values in host memory, all of them on their way there at once; of PRNG keys their data."""
    values = [jax.random.key_data(value) if _is_key(value) else value for value in values]
    if len(values) > 1:
        for value in values:
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
    return [np.asarray(value) for value in values]


def _is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and _is_key_dtype(value.dtype)


@functools.cache  # asked of each output of each call
def _is_key_dtype(dtype: Any) -> bool:
    return bool(jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key))
