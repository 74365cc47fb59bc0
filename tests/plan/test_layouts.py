"""Pieces that are parts of what is stored, in another order: planned, and carried out by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from obmlite.plan import GAP, Box, Layout, Request, boxes, plan
from obmlite.plan.layouts import row_major
from tests.plan.test_planner import grids


@st.composite
def layouts(draw: Any) -> tuple[Layout, tuple[int, ...]]:
    """A layout, and the shape of its piece."""
    stored = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    used = draw(st.permutations(range(len(stored))))[: draw(st.integers(0, len(stored)))]
    origin, axes, shape = [draw(st.integers(0, size - 1)) for size in stored], [], []
    for axis in used:
        size = draw(st.integers(1, stored[axis] - origin[axis]))
        axes.append(axis)
        shape.append(size)
    for _ in range(draw(st.integers(0, 2))):  # dimensions that the stored array lacks
        at = draw(st.integers(0, len(axes)))
        axes.insert(at, -1)
        shape.insert(at, 1)
    return Layout(stored, tuple(origin), tuple(axes)), tuple(shape)


def elements(layout: Layout, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """For each element of a piece its number in what is stored."""
    numbers = np.zeros(shape, int)
    for index in np.ndindex(*shape):
        at = list(layout.origin)
        for axis, n in zip(layout.axes, index, strict=True):
            if axis >= 0:
                at[axis] += n
        numbers[index] = np.ravel_multi_index(at, layout.shape) if at else 0
    return numbers


@settings(max_examples=300, deadline=None)
@given(
    layouts(), st.data(), st.sampled_from([8, 16, 4]), st.sampled_from([0, 8, GAP]), st.sampled_from([1, 8, 1 << 20])
)
def test_buffers_get_their_elements(
    laid: tuple[Layout, tuple[int, ...]], data: Any, bits: int, gap: int, chunk: int
) -> None:
    layout, shape = laid
    wanted: list[Box] = data.draw(st.lists(st.sampled_from(data.draw(grids(shape, 2))), min_size=1, unique=True))
    places = elements(layout, shape)
    [tensor] = plan([Request(shape, bits, (boxes.whole(shape),), tuple(wanted), (layout,))]).tensors
    filled = [np.full(boxes.shape_of(buffer.box), -1) for buffer in tensor.buffers]
    times = np.zeros(-(-int(np.prod(layout.shape)) * bits // 8), int)
    before = -1
    for read in tensor.reads(gap=gap, chunk=chunk):
        own = np.zeros_like(times)
        for start in read.runs.offsets():
            assert 0 <= start <= start + read.runs.nbytes <= len(times)
            own[start : start + read.runs.nbytes] += 1
        times += own
        assert len(boxes.merge(wanted)) > 1 or read.runs.offset > before, "forwards through what is stored"
        before = read.runs.offset
        for number, part in read.fills:
            held = places[(*boxes.slices(part), ...)]
            first, last = held.reshape(-1) * bits // 8, ((held.reshape(-1) + 1) * bits - 1) // 8
            assert own[first].all(), "what is filled was read"
            assert own[last].all()
            target = filled[number][(*boxes.slices(boxes.relative(part, tensor.buffers[number].box)), ...)]
            assert (target == -1).all(), "once"
            target[...] = held
            stored = np.arange(np.prod(layout.shape, dtype=int)).reshape(layout.shape)
            assert sorted(stored[(*boxes.slices(read.stored), ...)].reshape(-1)) == sorted(
                places[(*boxes.slices(read.box), ...)].reshape(-1)
            )
    for buffer, found in zip(tensor.buffers, filled, strict=True):
        np.testing.assert_array_equal(found, places[boxes.slices(buffer.box)])
    if bits % 8 == 0 and gap == 0:
        assert times.max(initial=0) <= 1, "no byte is read twice"
        assert times.sum() == sum(found.size for found in filled) * bits // 8, "and none in vain"


@settings(max_examples=300, deadline=None)
@given(layouts(), st.data())
def test_a_run_is_what_need_not_be_copied(laid: tuple[Layout, tuple[int, ...]], data: Any) -> None:
    layout, shape = laid
    box = data.draw(st.sampled_from(data.draw(grids(shape, 2))))
    [tensor] = plan([Request(shape, 16, (boxes.whole(shape),), (box,), (layout,))]).tensors
    own = elements(layout, shape)[(*boxes.slices(box), ...)].reshape(-1)
    in_a_row = bool((np.diff(own) == 1).all())
    assert tensor.buffers[0].run == ((0, int(own[0]) * 2) if in_a_row else None)


def test_pieces_of_a_stack() -> None:
    """Three matrices, the second of them transposed, as one tensor: each is read from its own beginning."""
    plain, turned = row_major((1, 2, 3)), Layout((3, 2), (0, 0), (-1, 1, 0))
    pieces = tuple(((n, n + 1), (0, 2), (0, 3)) for n in range(3))
    column = ((0, 3), (0, 2), (1, 2))
    [tensor] = plan([Request((3, 2, 3), 32, pieces, (column,), (None, turned, None))], gap=0).tensors
    found = [(read.piece, list(read.runs.offsets()), read.runs.nbytes) for read in tensor.reads(gap=0)]
    assert found == [(0, [4, 16], 4), (1, [8], 8), (2, [4, 16], 4)]
    assert tensor.request.layout(0) == plain
    orders = [layout.keeps_order(box) for layout, box in itertools.product((plain, turned), (column, pieces[0]))]
    assert orders == [True, True, True, False], "of one column there is but one order"
