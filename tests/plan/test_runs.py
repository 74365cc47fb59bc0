"""Runs of bytes, compared with what numpy's slicing selects of a row-major array."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obmlite.plan import Box, boxes, runs_of

BITS = (2, 4, 6, 8, 16, 32, 64, 128)


def bytes_of(box: Box, shape: tuple[int, ...], bits: int) -> np.ndarray[Any, Any]:
    """The bytes that hold a box's bits, sorted."""
    elements = np.arange(int(np.prod(shape))).reshape(shape)[boxes.slices(box)].reshape(-1)
    return np.unique((elements[:, None] * bits + np.arange(bits)) // 8)


def intervals(places: np.ndarray[Any, Any], gap: int = 0) -> list[tuple[int, int]]:
    """Sorted numbers as half-open intervals, holes of up to ``gap`` filled."""
    if not len(places):
        return []
    ends = np.flatnonzero(np.diff(places) > gap + 1)
    first, last = [0, *(ends + 1)], [*ends, len(places) - 1]
    return [(int(places[a]), int(places[b]) + 1) for a, b in zip(first, last, strict=True)]


@st.composite
def cases(draw: Any) -> tuple[Box, tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    whole = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    return tuple((0, n) if all_ else (a, b) for n, (a, b), all_ in zip(shape, ends, whole, strict=True)), shape


@settings(max_examples=400, deadline=None)
@given(cases(), st.sampled_from(BITS), st.sampled_from([0, 1, 3, 16, 100, 4096]))
def test_runs_are_the_box(case: tuple[Box, tuple[int, ...]], bits: int, gap: int) -> None:
    box, shape = case
    runs = runs_of(box, shape, bits, gap)
    needed = bytes_of(box, shape, bits)
    found = [(start, start + runs.nbytes) for start in runs.offsets()] if runs.nbytes else []
    assert (len(found), runs.total) == (runs.count, sum(b - a for a, b in found))
    if not len(needed):
        assert (runs.count, runs.total) == (0, 0)
        return
    assert runs.span == (found[0][0], found[-1][1])
    if bits % 8 == 0:
        assert found == intervals(needed, gap), "no byte more, and no run that could be longer"
        return
    # Packed: the same where rows end on bytes, else one run from the first byte to the last.
    assert found in (intervals(needed, gap), [(needed[0], needed[-1] + 1)])


def test_packed_rows_that_end_on_bytes_are_runs_of_their_own() -> None:
    runs = runs_of(((0, 4), (2, 4)), (4, 8), 4)
    assert (runs.offset, runs.nbytes, runs.loops) == (1, 1, ((4, 4),))
    assert list(runs.offsets()) == [1, 5, 9, 13]
    odd = runs_of(((0, 4), (1, 4)), (4, 8), 4)
    assert (odd.offset, odd.nbytes, odd.loops) == (0, 14, ())


@pytest.mark.parametrize("gap", [0, 48, 47])
def test_gap_is_what_lies_between_rows(gap: int) -> None:
    runs = runs_of(((0, 3), (0, 4)), (3, 16), 32, gap)
    assert (runs.count, runs.total) == ((1, 2 * 64 + 16) if gap == 48 else (3, 48))


def test_runs_of_several_loops_are_in_the_order_of_the_file() -> None:
    shape, box = (3, 4, 5, 6), ((0, 3), (1, 3), (2, 4), (0, 6))
    runs = runs_of(box, shape, 8)
    assert runs.loops == ((3, 120), (2, 30))
    starts = [a * 120 + b * 30 + 12 for a, b in itertools.product(range(3), (1, 2))]
    assert list(runs.offsets()) == starts
