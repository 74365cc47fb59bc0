"""Is a model still the function that it was made from? Differences and latency of both, on the same inputs."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from obmlite import tree as trees
from obmlite.errors import ArgumentError
from obmlite.examples import call_of
from obmlite.specs import TensorSpec

__all__ = ["Latency", "LeafReport", "Validation", "validate"]

RTOL = ATOL = 1e-6
"""Tolerances unless told otherwise, as :func:`numpy.isclose` has them."""

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """One leaf of the results, over all inputs.

    Attributes:
      name: of the leaf.
      expected: the reference's shape and dtype; None where it has no such leaf.
      found: the model's.
      max_abs: largest absolute difference of elements that are numbers on both sides; exact for integers.
      max_rel: largest absolute difference over the reference's absolute value, where that is not 0.
      mismatches: elements that differ by more than the tolerances, or at all where they are no floats.
      elements: that were compared.
      nans: (the reference's, the model's).
      good: whether shapes and dtypes are the same and there are no mismatches.
    """

    name: str
    expected: str | None
    found: str | None
    max_abs: float = 0.0
    max_rel: float = 0.0
    mismatches: int = 0
    elements: int = 0
    nans: tuple[int, int] = (0, 0)
    good: bool = True


@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds that a call takes, until its results are there.

    Attributes:
      calls: that were timed, after one for each input that was not.
      mean: of them.
      percentiles: percent → seconds.
    """

    calls: int
    mean: float
    percentiles: Mapping[int, float]


@dataclasses.dataclass(frozen=True)
class Validation:
    """What :func:`validate` found. Prints as a table.

    Attributes:
      passed: whether all leaves are good.
      leaves: one report for each leaf of either side.
      reference: the reference's latency.
      model: the model's.
      rtol: relative tolerance.
      atol: absolute tolerance.
      inputs: number of inputs.
    """

    passed: bool
    leaves: tuple[LeafReport, ...]
    reference: Latency
    model: Latency
    rtol: float
    atol: float
    inputs: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return dataclasses.asdict(self)

    def to_json(self, *, indent: int | None = 2) -> str:
        """Everything as JSON; infinite and undefined numbers as text, which JSON lacks."""
        return json.dumps(_finite(self.to_dict()), indent=indent, ensure_ascii=False)

    def __str__(self) -> str:
        head = ("leaf", "expected", "found", "max abs", "max rel", "mismatches", "NaNs", "")
        rows = [head]
        for leaf in self.leaves:
            rows.append(
                (
                    leaf.name or "(the leaf)",
                    leaf.expected or "no such leaf",
                    "the same" if leaf.found == leaf.expected else leaf.found or "no such leaf",
                    f"{leaf.max_abs:.3g}",
                    f"{leaf.max_rel:.3g}",
                    f"{leaf.mismatches} of {leaf.elements}",
                    f"{leaf.nans[0]}, {leaf.nans[1]}" if any(leaf.nans) else "none",
                    "good" if leaf.good else "BAD",
                )
            )
        table = _table(rows)
        times = [("latency, ms", "mean", *(f"p{p}" for p in self.model.percentiles), "calls")]
        for name, own in (("reference", self.reference), ("model", self.model)):
            values = [own.mean, *own.percentiles.values()]
            times.append((name, *(f"{value * 1e3:.3f}" for value in values), str(own.calls)))
        verdict = "passed" if self.passed else "FAILED"
        count = f"{self.inputs} {'input' if self.inputs == 1 else 'inputs'}"
        return "\n".join(
            [*table, "", *_table(times), "", f"{verdict}: {count}, rtol {self.rtol:g}, atol {self.atol:g}"]
        )


def validate(
    call: Callable[..., Any],
    inputs: Sequence[Any],
    reference: Callable[..., Any],
    *,
    rtol: float = RTOL,
    atol: float = ATOL,
    equal_nan: bool = True,
    repeats: int = 10,
) -> Validation:
    """Calls a model and a reference with the same inputs, compares their results and times both.

    Args:
      call: the model, or one of its pipelines or functions.
      inputs: for each call its arguments: a tuple of positional ones, a dict of them by name, or one argument.
      reference: what gives the expected results for the same arguments; jitted here if it is not yet.
      rtol: relative tolerance: floats match where their difference is at most ``atol + rtol * abs(expected)``.
      atol: absolute tolerance.
      equal_nan: whether a NaN matches a NaN.
      repeats: timed calls for each input.

    Raises:
      ArgumentError: there are no inputs, or a tolerance or ``repeats`` is out of range.
    """
    if not inputs or not rtol >= 0 or not atol >= 0 or repeats < 1:
        raise ArgumentError(
            "A validation needs inputs, tolerances of at least 0, and at least one repeat.",
            field="inputs, rtol, atol, repeats",
            found=f"{len(inputs)} inputs, rtol={rtol}, atol={atol}, repeats={repeats}",
        )
    expected_call = reference if hasattr(reference, "lower") or _is_ours(reference) else jax.jit(reference)
    signature = getattr(call, "signature", None)
    arguments = [call_of(given, signature) for given in inputs]
    pairs = ((_result(own, *given) for own in (expected_call, call)) for given in arguments)
    leaves = _compared(pairs, rtol, atol, equal_nan)
    return Validation(
        all(leaf.good for leaf in leaves),
        leaves,
        _latency(expected_call, arguments, repeats),
        _latency(call, arguments, repeats),
        rtol,
        atol,
        len(inputs),
    )


def _is_ours(call: Callable[..., Any]) -> bool:
    return type(call).__module__.startswith("obmlite.")


def _result(call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's leaves by name, ready."""
    leaves, tree = trees.flatten(jax.block_until_ready(call(*args, **kwargs)))
    return dict(zip(tree.names, leaves, strict=True))


def _latency(
    call: Callable[..., Any], arguments: Sequence[tuple[tuple[Any, ...], dict[str, Any]]], repeats: int
) -> Latency:
    """Times calls; all shapes have been compiled by now."""
    seconds = []
    for _ in range(repeats):
        for args, kwargs in arguments:
            start = time.perf_counter()
            jax.block_until_ready(call(*args, **kwargs))
            seconds.append(time.perf_counter() - start)
    return Latency(len(seconds), float(np.mean(seconds)), {p: float(np.percentile(seconds, p)) for p in PERCENTILES})


def _compared(
    pairs: Iterable[Iterable[Mapping[str, Any]]], rtol: float, atol: float, equal_nan: bool
) -> tuple[LeafReport, ...]:
    reports: dict[str, LeafReport] = {}
    for expected, found in pairs:
        for name in [*expected, *(n for n in found if n not in expected)]:
            own = _leaf(name, expected.get(name), found.get(name), rtol, atol, equal_nan)
            reports[name] = _together(reports[name], own) if name in reports else own
    return tuple(reports.values())


def _together(one: LeafReport, other: LeafReport) -> LeafReport:
    """Two inputs' reports of a leaf; of shapes and dtypes those of the first that is not good."""
    shown = one if not one.good and one.expected != one.found else other
    return LeafReport(
        one.name,
        shown.expected,
        shown.found,
        max(one.max_abs, other.max_abs),
        max(one.max_rel, other.max_rel),
        one.mismatches + other.mismatches,
        one.elements + other.elements,
        (one.nans[0] + other.nans[0], one.nans[1] + other.nans[1]),
        one.good and other.good,
    )


def _leaf(name: str, expected: Any, found: Any, rtol: float, atol: float, equal_nan: bool) -> LeafReport:
    left, right = (None if value is None else TensorSpec.of(value) for value in (expected, found))
    if left is None or right is None or left.shape != right.shape:
        return LeafReport(name, _shown(left), _shown(right), good=False)
    a, b = _values(expected), _values(found)
    floats = [np.issubdtype(v.dtype, np.inexact) for v in (a, b)]
    nans = (int(np.isnan(a).sum()) if floats[0] else 0, int(np.isnan(b).sum()) if floats[1] else 0)
    if any(floats):
        with np.errstate(all="ignore"):
            match = np.isclose(b, a, rtol=rtol, atol=atol, equal_nan=equal_nan)  # relative to the second
            difference = np.abs(b - a)
            difference = np.where(a == b, 0.0, difference)  # infinities
            relative = np.where(a != 0, difference / np.abs(a), 0.0)
    else:
        match = a == b
        # As Python's integers: differences of 64-bit ones do not fit in 64 bits.
        exact = [v.reshape(-1).astype(np.int8 if v.dtype == bool else v.dtype).astype(object) for v in (a, b)]
        difference = np.abs(exact[1] - exact[0]).astype(np.float64)
        sizes = np.abs(exact[0]).astype(np.float64)
        with np.errstate(all="ignore"):
            relative = np.where(sizes != 0, difference / sizes, 0.0)
    wrong = int(np.size(match) - np.count_nonzero(match))
    return LeafReport(
        name,
        _shown(left),
        _shown(right),
        _largest(difference),
        _largest(relative),
        wrong,
        int(np.size(match)),
        nans,
        left.kind == right.kind and not wrong,
    )


def _shown(spec: TensorSpec | None) -> str | None:
    """Shape and dtype; that a value is weakly typed makes no other one of it."""
    return None if spec is None else f"{spec.kind.short}[{','.join(map(str, spec.shape))}]"


def _values(value: Any) -> np.ndarray[Any, Any]:
    """A leaf's values in a dtype that holds them and that numpy computes with."""
    if hasattr(value, "dtype") and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    if array.dtype == jax.dtypes.float0:
        return np.zeros(array.shape, np.int8)
    if jax.dtypes.issubdtype(array.dtype, np.complexfloating):
        return array.astype(np.complex128)
    if jax.dtypes.issubdtype(array.dtype, np.floating):
        return array.astype(np.float64)
    if array.dtype == bool:
        return array
    return array.astype(np.uint64 if array.dtype == np.uint64 else np.int64)


def _largest(values: Any) -> float:
    """The largest of some numbers that is one; 0 where there is none."""
    known = values[~np.isnan(values)]
    return float(known.max()) if known.size else 0.0


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(own) for own in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
