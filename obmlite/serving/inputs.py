"""Named arrays against the signatures of a pipeline: do they fit, and as batches of which sizes are they run?

All that a client may get wrong is found here, before anything is traced or compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from obmlite import dims
from obmlite.errors import ArgumentError
from obmlite.serving.status import Code, ServingError
from obmlite.signature import Signature
from obmlite.specs import Dimension, TensorSpec

__all__ = ["Array", "Inputs", "Plan", "TensorInfo"]

Array = np.ndarray[Any, np.dtype[Any]]
Shape: TypeAlias = "tuple[Dimension, ...]"

_PLANS = 256  # shapes of requests whose plans are kept
_OPEN = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256)  # sizes that are tried for open dimensions; constraints may refuse some


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor that is served.

    Attributes:
      name: its name, in protocols.
      dtype: numpy's; ``object`` for texts, ``uint32`` for the data of PRNG keys.
      shape: sizes; None for a dimension that may have several.
      text: dtype and shape for people: ``"f32[b,28,28,1]"``, or ``"f32[1|16,28,28,1]"`` where there are several.
      kind: ``"tensor"``, or ``"text"`` for one of bytes, which a step that JAX does not run takes or gives.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]
    text: str
    kind: str = "tensor"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How inputs are run.

    Attributes:
      rows: of the batch; None where the inputs are no batch.
      sizes: of the batches to run it as, the last filled up; empty for one call as it comes.
    """

    rows: int | None
    sizes: tuple[int, ...] = ()


class Inputs:
    """What a pipeline takes and gives, as named tensors.

    Of several signatures those count that have the dtypes and ranks of the most general one, the last.

    Attributes:
      inputs: what is taken, by name.
      outputs: what is given, by name.
      rows: names of the inputs whose leading dimension is the batch.
      batch_sizes: the sizes that batches have where they are fixed; None where any size goes, or there is no batch.
      batched: whether all inputs and outputs have one leading dimension in common, of rows.
      divisible: whether batches may be filled up, split and put together: their size was left open, or there are
        several of them, so that rows know nothing of one another.
    """

    def __init__(self, signatures: Sequence[Signature]) -> None:
        last = signatures[-1]
        names, results = _input_names(last), _output_names(last)
        same = [s for s in signatures if _face(s) == _face(last)]
        self._takes = [dict(zip(names, map(_shape, s.input_specs), strict=True)) for s in same]
        self._gives = [dict(zip(results, map(_shape, s.output_specs), strict=True)) for s in same]
        self._constraints = [tuple(map(dims.parse_constraint, s.constraints)) for s in same]
        self.inputs = _infos(names, last.input_specs, self._takes)
        self.outputs = _infos(results, last.output_specs, self._gives)
        self._find_batch()
        self._plans: dict[Any, Plan] = {}

    def _find_batch(self) -> None:
        heads = [
            {shape[:1] for shape in (*takes.values(), *gives.values())}
            for takes, gives in zip(self._takes, self._gives, strict=True)
        ]
        self.batched = bool(self.inputs) and all(len(own) == 1 and own != {()} for own in heads)
        self.rows = frozenset(self.inputs) if self.batched else frozenset()
        self.divisible = False
        self.batch_sizes: tuple[int, ...] | None = None
        varying = frozenset(n for n in self.inputs if len({own[n][:1] for own in self._takes}) > 1)
        sizes = [_size(own, varying or self.rows) for own in self._takes]
        if self.batched and None in sizes:
            head, shapes = self._takes[-1], (*self._takes[-1].values(), *self._gives[-1].values())
            symbol = next(iter(head.values()))[0]
            # Rows of a batch whose size is used elsewhere too may know of one another.
            elsewhere = frozenset[str]().union(*(d.symbols for s in shapes for d in s[1:] if not isinstance(d, int)))
            self.divisible = not isinstance(symbol, int) and symbol.text in symbol.symbols - elsewhere
        elif varying and all(
            size is not None and all(shape[:1] == (size,) for shape in gives.values())
            for size, gives in zip(sizes, self._gives, strict=True)
        ):
            self.rows, self.divisible = varying, True
        if None not in sizes and (self.batched or self.divisible):
            self.batch_sizes = tuple(sorted({size for size in sizes if size is not None}))

    def check(self, arrays: Mapping[str, Array]) -> Plan:
        """Compares arrays by name with the signatures.

        Raises:
          ServingError: ``INVALID_ARGUMENT``: they do not fit. The text names the input, what was expected and what
            came, and for a batch the sizes that there are.
        """
        if arrays.keys() != self.inputs.keys():
            raise _other_names(arrays, self.inputs)
        key = tuple([(array.dtype, array.shape) for array in map(arrays.__getitem__, self.inputs)])
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plan(arrays)
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def group(self, arrays: Mapping[str, Array]) -> Any:
        """What arrays that fit must have in common to be put together: all but their leading dimension."""
        return tuple([arrays[name].shape[1:] for name in self.inputs])

    def zeros(self) -> Iterator[dict[str, Array]]:
        """Zeros that fit, for each signature for which some are found; none where texts are taken."""
        if any(info.kind == "text" for info in self.inputs.values()):
            return
        for takes, constraints in zip(self._takes, self._constraints, strict=True):
            symbols = frozenset[str]().union(
                *(d.symbols for shape in takes.values() for d in shape if not isinstance(d, int))
            )
            for size in _OPEN if symbols else (1,):
                values = dict.fromkeys(symbols, size)
                try:
                    shapes = {n: tuple(_evaluated(d, values) for d in shape) for n, shape in takes.items()}
                except ArgumentError:
                    continue
                if min((d for shape in shapes.values() for d in shape), default=0) < 0:
                    continue
                if not self._misfit(takes, constraints, shapes):
                    yield {name: np.zeros(shape, self.inputs[name].dtype) for name, shape in shapes.items()}
                    break

    def _plan(self, arrays: Mapping[str, Array]) -> Plan:
        for name, info in self.inputs.items():
            self._check_kind(info, arrays[name])
        shapes = {name: arrays[name].shape for name in self.inputs}
        rows = shapes[min(self.rows)][0] if self.rows else None
        problem = ""
        for takes, constraints in zip(self._takes, self._constraints, strict=True):
            problem = self._misfit(takes, constraints, shapes)
            if not problem:
                return Plan(rows)
        if rows and self.divisible and self.batch_sizes and {shapes[name][0] for name in self.rows} == {rows}:
            sizes = []
            for takes, constraints in zip(self._takes, self._constraints, strict=True):
                size = _size(takes, self.rows)
                assert size is not None
                filled = {name: (size, *shape[1:]) if name in self.rows else shape for name, shape in shapes.items()}
                problem = self._misfit(takes, constraints, filled, shapes)
                if not problem:
                    sizes.append(size)
            if sizes:
                return Plan(rows, _divided(rows, sorted(set(sizes))))
        raise ServingError(Code.INVALID_ARGUMENT, problem)

    def _check_kind(self, info: TensorInfo, array: Array) -> None:
        fits = array.dtype.kind in "OSU" if info.kind == "text" else array.dtype == info.dtype
        if not fits or array.ndim != len(info.shape):
            what = "rank" if fits else "dtype"
            raise ServingError(
                Code.INVALID_ARGUMENT,
                f"Input '{info.name}' has another {what}: expected {info.text}, found {_describe(array)}.",
                leaf=info.name,
                expected=info.text,
                found=_describe(array),
            )

    def _misfit(
        self,
        takes: Mapping[str, Shape],
        constraints: Sequence[dims.Constraint],
        shapes: Mapping[str, tuple[int, ...]],
        came: Mapping[str, tuple[int, ...]] | None = None,
    ) -> str:
        """Why shapes do not fit a signature; empty if they do. ``came`` has those that the text names, if others."""
        came = shapes if came is None else came
        pairs = []
        for name, shape in takes.items():
            for axis, (wanted, size) in enumerate(zip(shape, shapes[name], strict=True)):
                if not isinstance(wanted, int):
                    pairs.append((f"input '{name}', dimension {axis}", wanted, size))
                elif wanted != size:
                    return self._other_size(name, axis, came)
        try:
            values = dims.bind(pairs)
            broken = [c.text for c in constraints if c.holds(values) is False]
        except ArgumentError as error:
            problem = error.problem[:1].upper() + error.problem[1:]
            return f"{problem}: {error.leaf}, expected {error.expected}, found {error.found}; {self._expected(came)}"
        if broken:
            found = ", ".join(f"{symbol} = {value}" for symbol, value in sorted(values.items()))
            return f"The sizes break {', '.join(broken)}: found {found}; {self._expected(came)}"
        return ""

    def _other_size(self, name: str, axis: int, shapes: Mapping[str, tuple[int, ...]]) -> str:
        size = shapes[name][axis]
        if axis or name not in self.rows or not self.batch_sizes:
            return f"Input '{name}' has another shape: {self._expected(shapes, name)}"
        others = next((n for n in self.rows if shapes[n][0] != size), None)
        if others is not None:
            return f"Inputs are batches of different sizes: '{name}' {size}, '{others}' {shapes[others][0]}."
        sizes = ", ".join(map(str, self.batch_sizes))
        return (
            f"Input '{name}': batch {size} does not match this model's fixed batch sizes [{sizes}]: "
            f"{self._expected(shapes, name)}"
        )

    def _expected(self, shapes: Mapping[str, tuple[int, ...]], name: str = "") -> str:
        """What one input, or all that have open dimensions, should be, and what came."""
        infos = [self.inputs[name]] if name else [i for i in self.inputs.values() if None in i.shape]
        wanted, found = (
            ", ".join(text if name else f"{info.name}: {text}" for info, text in zip(infos, texts, strict=True))
            for texts in ([i.text for i in infos], [_text(i.text, shapes[i.name]) for i in infos])
        )
        return f"expected {wanted}, found {found}."


def _divided(rows: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """The batches to run rows as: as many of the largest as they fill, and the next larger one for the rest."""
    whole, rest = divmod(rows, sizes[-1])
    return (sizes[-1],) * whole + ((next(s for s in sizes if s >= rest),) if rest else ())


def _size(takes: Mapping[str, Shape], rows: frozenset[str]) -> int | None:
    """The one fixed size of the leading dimension of some inputs."""
    found = {takes[name][0] if takes[name] else None for name in rows}
    [size] = found if len(found) == 1 else [None]
    return size if isinstance(size, int) else None


def _other_names(arrays: Mapping[str, Array], wanted: Mapping[str, TensorInfo]) -> ServingError:
    given, expected = ",".join(arrays), ",".join(wanted)
    extra = ",".join(name for name in arrays if name not in wanted)
    missing = ",".join(name for name in wanted if name not in arrays)
    return ServingError(  # as TensorFlow Serving says it
        Code.INVALID_ARGUMENT,
        f"input size does not match signature: {len(arrays)}!={len(wanted)} len({{{given}}}) != len({{{expected}}}). "
        f"Sent extra: {{{extra}}}. Missing but required: {{{missing}}}.",
        leaf=missing or extra,
        expected=expected,
        found=given,
    )


def _evaluated(dimension: Dimension, values: Mapping[str, int]) -> int:
    return dimension if isinstance(dimension, int) else dimension.evaluate(values)


# --- names, dtypes and shapes


def _input_names(signature: Signature) -> list[str]:
    """A leaf's path joined by ``.``, which begins with the argument's name."""
    return [f"input_{name}" if not name or name[0].isdigit() else name for name in signature.inputs.names]


def _output_names(signature: Signature) -> list[str]:
    """A leaf's path, behind ``output_`` where it begins with a position; ``output_0`` for what has no path."""
    return [f"output_{name or 0}" if not name or name[0].isdigit() else name for name in signature.outputs.names]


def _face(signature: Signature) -> Any:
    return (
        [
            (name, spec.kind, spec.ndim)
            for name, spec in zip(signature.inputs.names, signature.input_specs, strict=True)
        ],
        [
            (name, spec.kind, spec.ndim)
            for name, spec in zip(signature.outputs.names, signature.output_specs, strict=True)
        ],
    )


def _shape(spec: TensorSpec) -> Shape:
    return (*spec.shape, *spec.kind.key_data_shape) if spec.kind.is_key else spec.shape


def _infos(
    names: Sequence[str], specs: Sequence[TensorSpec], shapes: Sequence[Mapping[str, Shape]]
) -> dict[str, TensorInfo]:
    """What is said of tensors over all signatures."""
    found = {}
    for name, spec in zip(names, specs, strict=True):
        dtype = np.dtype(np.uint32) if spec.kind.is_key else spec.kind.numpy
        each = [list(dict.fromkeys(own[name][axis] for own in shapes)) for axis in range(len(shapes[-1][name]))]
        text = ",".join("|".join(map(str, sizes)) for sizes in each)
        found[name] = TensorInfo(
            name,
            dtype,
            tuple(size if len(sizes) == 1 and isinstance(size := sizes[0], int) else None for sizes in each),
            f"{'u32' if spec.kind.is_key else spec.kind.short}[{text}]",
            "text" if dtype.hasobject else "tensor",
        )
    return found


def _describe(array: Array) -> str:
    if array.dtype.kind in "OSU":
        return _text("string", array.shape)
    try:
        return str(TensorSpec.of(array))
    except TypeError:  # of a dtype that JAX does not have
        return _text(str(array.dtype), array.shape)


def _text(text: str, shape: Sequence[int]) -> str:
    return f"{text.partition('[')[0]}[{','.join(map(str, shape))}]"
