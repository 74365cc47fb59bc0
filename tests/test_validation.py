"""Validation: differences leaf by leaf, what counts as one, latency, and the report."""

from __future__ import annotations

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from obmlite import spec
from obmlite.validation import Validation, validate

X = np.array([1.0, 2.0, 4.0], "f4")


def compared(found: Any, expected: Any, **options: Any) -> Validation:
    """Two results, compared."""
    return validate(Constant(found), [()], Constant(expected), repeats=1, **options)


class Constant:
    """Gives what it holds; not traced."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self) -> Any:
        return self.value

    def lower(self) -> None:
        """What jitted functions have."""


def test_a_good_model_passes() -> None:
    def f(params: Any, x: Any) -> Any:
        return {"y": jnp.tanh(x * params), "n": (x > 1).sum()}

    model = obmlite.Model.from_function(f, np.float32(0.5), spec("f32[n]"))
    report = model.validate([(X,), {"x": X[:2]}, X], lambda x: f(np.float32(0.5), x), repeats=3)
    assert report.passed
    assert [leaf.name for leaf in report.leaves] == ["n", "y"]
    assert (report.inputs, report.model.calls, report.reference.calls) == (3, 9, 9)
    assert 0 < report.model.percentiles[50] <= report.model.percentiles[99]
    assert "passed: 3 inputs" in str(report)


def test_differences_are_the_largest_of_each_leaf() -> None:
    report = compared({"a": X + np.array([0, 0.5, 0], "f4"), "b": X}, {"a": X, "b": X})
    a, b = report.leaves
    assert (a.max_abs, a.max_rel, a.mismatches, a.elements, a.good) == (0.5, 0.25, 1, 3, False)
    assert (b.max_abs, b.mismatches, b.good) == (0.0, 0, True)
    assert not report.passed


def test_tolerances_are_relative_and_absolute_in_their_places() -> None:
    expected = np.array([100.0])
    assert compared(np.array([101.0]), expected, rtol=0.02, atol=0).passed
    assert not compared(np.array([101.0]), expected, rtol=0, atol=0.02).passed
    assert compared(np.array([100.01]), expected, rtol=0, atol=0.02).passed
    # Of the expected value, not of what was found.
    assert not compared(np.array([2.0]), np.array([1.0]), rtol=0.6, atol=0).passed


def test_one_wrong_integer_of_many_counts() -> None:
    report = compared(np.array([1, 2, 3, 5]), np.array([1, 2, 3, 4]), rtol=1, atol=1)
    assert (report.leaves[0].mismatches, report.leaves[0].max_abs) == (1, 1.0)
    assert not report.passed
    big = 2**63
    assert compared(np.array([big + 1], "u8"), np.array([big], "u8")).leaves[0].max_abs == 1.0
    assert not compared(np.array([True, False]), np.array([True, True])).passed


def test_nans() -> None:
    nan, half = np.array([np.nan, 1.0]), np.array([1.0, np.nan])
    assert compared(nan, nan).passed
    assert not compared(nan, nan, equal_nan=False).passed
    report = compared(half, nan)
    assert (report.leaves[0].nans, report.leaves[0].mismatches, report.passed) == ((1, 1), 2, False)
    inf = np.array([np.inf, -np.inf])
    assert compared(inf, inf).leaves[0].max_abs == 0.0
    assert not compared(inf, -inf).passed
    assert json.loads(compared(inf, -inf).to_json())["leaves"][0]["max_abs"] == "inf"


def test_dtypes_shapes_and_trees_that_changed() -> None:
    assert not compared(X.astype("f2"), X).passed
    assert compared(X.astype("f2"), X).leaves[0].mismatches == 0
    assert not compared(X[:2], X).passed
    report = compared({"a": X, "new": X}, {"a": X, "gone": X})
    assert [(leaf.name, leaf.expected, leaf.found) for leaf in report.leaves] == [
        ("a", "f32[3]", "f32[3]"),
        ("gone", "f32[3]", None),
        ("new", None, "f32[3]"),
    ]
    assert not report.passed
    assert "no such leaf" in str(report)


def test_dtypes_that_numpy_lacks() -> None:
    values = jnp.array([1.0, 2.0], jnp.bfloat16)
    assert compared(values, values).passed
    assert compared(values + 1, values).leaves[0].max_abs == 1.0
    assert compared(jax.random.key(1), jax.random.key(1)).passed
    assert not compared(jax.random.key(1), jax.random.key(2)).passed
    assert compared(np.array([1j]), np.array([-1j])).leaves[0].max_abs == 2.0
    assert compared(np.zeros((0, 3)), np.zeros((0, 3))).passed


def test_the_latency_is_that_of_results_that_are_there() -> None:
    def slow(x: Any) -> Any:
        return jax.lax.fori_loop(0, 300, lambda _, y: jnp.tanh(y @ y), x)

    x = np.ones((128, 128), "f4")
    model = obmlite.Model.from_function(slow, spec("f32[128,128]"), weights=None)
    report = model.validate([x], slow, repeats=3)
    model(x)
    start = time.perf_counter()
    jax.block_until_ready(model(x))
    alone = time.perf_counter() - start
    assert report.model.percentiles[50] > alone / 5
    assert report.model.percentiles[99] < 1  # compiling was not timed


def test_the_report_is_data() -> None:
    report = compared({"a": X + 1}, {"a": X})
    data = json.loads(report.to_json())
    assert data["passed"] is False
    assert data["leaves"][0] == {
        "name": "a",
        "expected": "f32[3]",
        "found": "f32[3]",
        "max_abs": 1.0,
        "max_rel": 1.0,
        "mismatches": 3,
        "elements": 3,
        "nans": [0, 0],
        "good": False,
    }
    assert set(data["model"]["percentiles"]) == {"50", "90", "99"}
    lines = str(report).splitlines()
    assert lines[0].split() == ["leaf", "expected", "found", "max", "abs", "max", "rel", "mismatches", "NaNs"]
    assert "3 of 3" in lines[1]
    assert lines[-1] == "FAILED: 1 input, rtol 1e-06, atol 1e-06"


@pytest.mark.parametrize(
    ("inputs", "options"), [([], {}), ([()], {"rtol": -1}), ([()], {"atol": float("nan")}), ([()], {"repeats": 0})]
)
def test_what_is_refused(inputs: Any, options: Any) -> None:
    with pytest.raises(obmlite.ArgumentError):
        validate(Constant(1), inputs, Constant(1), **options)
