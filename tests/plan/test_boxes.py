"""Boxes, compared with sets of indices."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from obmlite.plan import Box, boxes


def points(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(a, b) for a, b in box)))


@st.composite
def some(draw: Any, rank: int, most: int = 5) -> Box:
    ends = [sorted(draw(st.tuples(st.integers(0, most), st.integers(0, most)))) for _ in range(rank)]
    return tuple((a, b) for a, b in ends)


@st.composite
def cells(draw: Any) -> list[Box]:
    """Some boxes of a grid, in any order, some of them twice."""
    cuts = draw(st.lists(st.sets(st.integers(0, 6), min_size=2, max_size=4), max_size=3))
    grid = list(itertools.product(*(itertools.pairwise(sorted(axis)) for axis in cuts)))
    return draw(st.lists(st.sampled_from(grid), max_size=12))


@given(st.integers(0, 3).flatmap(lambda rank: st.tuples(some(rank), some(rank))))
def test_intersection(pair: tuple[Box, Box]) -> None:
    one, other = pair
    found = boxes.intersect(one, other)
    common = points(one) & points(other)
    assert (found is None) == (not common)
    assert found is None or points(found) == common
    assert boxes.size_of(one) == len(points(one))


@given(cells())
def test_merging_keeps_the_elements(given: list[Box]) -> None:
    merged = boxes.merge(given)
    assert sum(map(boxes.size_of, merged)) == len(set().union(*map(points, merged))), "disjoint"
    assert set().union(*map(points, merged)) == set().union(*map(points, given))
    assert len(merged) <= len(set(given))


@given(st.lists(st.integers(1, 3), max_size=4), st.randoms())
def test_merging_all_cells_of_a_grid_gives_the_whole(splits: list[int], random: Any) -> None:
    shape = [2 * split for split in splits]
    grid = list(itertools.product(*([(a, a + 2) for a in range(0, size, 2)] for size in shape)))
    random.shuffle(grid)
    assert boxes.merge(grid) == [boxes.whole(shape)]


def test_what_shares_no_whole_face_stays_apart() -> None:
    diagonal = [((0, 2), (0, 2)), ((2, 4), (2, 4))]
    assert boxes.merge(diagonal) == diagonal
    assert boxes.merge([((0, 2), (0, 2)), ((0, 3), (2, 4))]) == [((0, 2), (0, 2)), ((0, 3), (2, 4))]
    assert boxes.merge([]) == []
    assert boxes.merge([((0, 2), (0, 0)), ((2, 4), (0, 0))]) == [((0, 4), (0, 0))]


@pytest.mark.parametrize("shape", [(), (5,), (4, 0), (3, 4, 2)])
def test_index_and_slices(shape: tuple[int, ...]) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape)
    for index in ((slice(None),) * len(shape), (slice(1, 3),) * len(shape), (slice(2, 99),) * len(shape)):
        box = boxes.of_index(index, shape)
        assert np.array_equal(array[boxes.slices(box)], array[index])
        assert boxes.shape_of(box) == array[index].shape
    assert boxes.of_index((slice(None),) * len(shape), shape) == boxes.whole(shape)
    with pytest.raises(ValueError, match="zip"):
        boxes.of_index((slice(None),) * (len(shape) + 1), shape)


def test_pieces_and_coordinates() -> None:
    own = boxes.of_piece((2, 3), (4, 5))
    assert own == ((2, 6), (3, 8))
    assert boxes.relative(((3, 4), (3, 5)), own) == ((1, 2), (0, 2))
    array = np.arange(100).reshape(10, 10)
    inside = ((3, 4), (3, 5))
    piece = array[boxes.slices(own)]
    assert np.array_equal(piece[boxes.slices(boxes.relative(inside, own))], array[boxes.slices(inside)])
