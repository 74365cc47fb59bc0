"""The planner: its reads are carried out by hand, on bytes, and what they fill is compared with numpy's slices."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obmlite.plan import GAP, Box, Request, TensorPlan, boxes, plan
from tests.plan.test_runs import BITS, bytes_of, intervals


@st.composite
def grids(draw: Any, shape: tuple[int, ...], most: int) -> list[Box]:
    """A tensor cut into a grid, not always evenly."""
    axes = []
    for size in shape:
        least = draw(st.integers(0, min(most, max(size - 1, 0))))
        cuts = draw(st.sets(st.integers(1, size - 1), min_size=least, max_size=most)) if size > 1 else set()
        axes.append(list(itertools.pairwise([0, *sorted(cuts), size])))
    return list(itertools.product(*axes))


@st.composite
def requests(draw: Any) -> Request:
    shape = tuple(draw(st.lists(st.sampled_from([4, 6, 8, 9]) | st.integers(0, 9), max_size=4)))
    pieces = draw(grids(shape, 1))
    cells = draw(grids(shape, 3))
    # Devices in any order; a cell on several of them, or on none: then it is another process'.
    wanted = draw(st.lists(st.sampled_from(cells), min_size=1, max_size=8) | st.permutations(cells))
    return Request(shape, draw(st.sampled_from(BITS)), tuple(draw(st.permutations(pieces))), tuple(wanted))


class Stored:
    """A tensor of random bits, and its pieces as bytes: row-major, low bits first, padded to a byte."""

    def __init__(self, request: Request) -> None:
        random = np.random.default_rng(7)
        self.bits = request.bits
        self.elements = random.integers(0, 2, (*request.shape, request.bits), np.uint8)
        self.pieces = [
            np.packbits(self.elements[boxes.slices(own)].reshape(-1), bitorder="little") for own in request.pieces
        ]

    def box(self, box: Box) -> np.ndarray[Any, Any]:
        return self.elements[boxes.slices(box)]


def carried_out(
    tensor: TensorPlan, stored: Stored, **options: Any
) -> tuple[dict[int, np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """The buffers that reads fill (2 where nothing does), and how often each byte of each piece is read."""
    filled = {n: np.full((*boxes.shape_of(b.box), stored.bits), 2, np.uint8) for n, b in enumerate(tensor.buffers)}
    times = [np.zeros(len(piece), int) for piece in stored.pieces]
    before, apart = (-1, -1), len(boxes.merge(buffer.box for buffer in tensor.buffers)) > 1
    for read in tensor.reads(**options):
        piece, own = stored.pieces[read.piece], tensor.request.pieces[read.piece]
        assert read.own == own
        assert read.runs.count > 0
        assert read.fills
        assert apart or (read.piece, read.runs.offset) > before, "forwards through each piece"
        before = (read.piece, read.runs.offset)
        have = np.full(len(piece), -1)  # what this read alone brings
        for start in read.runs.offsets():
            assert 0 <= start <= start + read.runs.nbytes <= len(piece)
            have[start : start + read.runs.nbytes] = piece[start : start + read.runs.nbytes]
            times[read.piece][start : start + read.runs.nbytes] += 1
        numbers = np.arange(boxes.size_of(own)).reshape(boxes.shape_of(own))
        for n, part in read.fills:
            assert boxes.intersect(part, read.box) == part
            wanted = numbers[boxes.slices(boxes.relative(part, own))]
            places = wanted[..., None] * stored.bits + np.arange(stored.bits)
            assert (have[places // 8] >= 0).all(), "what is filled was read"
            target = filled[n][boxes.slices(boxes.relative(part, tensor.buffers[n].box))]
            assert (target == 2).all(), "once"
            target[...] = (have[places // 8] >> (places % 8)) & 1
    return filled, times


@settings(max_examples=300, deadline=None)
@given(requests(), st.sampled_from([0, 1, 8, 64, GAP]), st.sampled_from([1, 7, 64, 1 << 20]))
def test_buffers_get_what_numpy_slices(request_: Request, gap: int, chunk: int) -> None:
    [tensor] = plan([request_]).tensors
    stored = Stored(request_)
    users = [user for buffer in tensor.buffers for user in buffer.users]
    assert sorted(users) == list(range(len(request_.boxes)))
    assert len({buffer.box for buffer in tensor.buffers}) == len(tensor.buffers), "replicas share a buffer"
    filled, times = carried_out(tensor, stored, gap=gap, chunk=chunk)
    for n, buffer in enumerate(tensor.buffers):
        assert all(request_.boxes[user] == buffer.box for user in buffer.users)
        np.testing.assert_array_equal(filled[n], stored.box(buffer.box))
    needed = [np.zeros(len(piece), bool) for piece in stored.pieces]
    for number, own in enumerate(request_.pieces):
        for buffer in tensor.buffers:
            common = boxes.intersect(buffer.box, own)
            if common is not None:
                needed[number][bytes_of(boxes.relative(common, own), boxes.shape_of(own), request_.bits)] = True
    if request_.bits % 8 == 0:
        if gap == 0 or len(boxes.merge(buffer.box for buffer in tensor.buffers)) == 1:
            assert all((count <= 1).all() for count in times), "no byte is read twice"
        if gap == 0:
            assert all(np.array_equal(count == 1, own) for count, own in zip(times, needed, strict=True))
        else:  # and with gaps no more than those between what is needed
            spans = [np.ptp(np.flatnonzero(own)) + 1 if own.any() else 0 for own in needed]
            assert all(count.sum() <= span + gap for count, span in zip(times, spans, strict=True))
        assert all(read.runs.total <= max(chunk, request_.bits // 8) for read in tensor.reads(gap=gap, chunk=chunk))
        assert tensor.needed == sum(int(own.sum()) for own in needed)


@settings(max_examples=200, deadline=None)
@given(requests())
def test_a_run_is_the_bytes_of_its_buffer(request_: Request) -> None:
    [tensor] = plan([request_]).tensors
    stored = Stored(request_)
    for buffer in tensor.buffers:
        in_a_row = None
        for number, own in enumerate(request_.pieces):
            if boxes.size_of(buffer.box) and boxes.intersect(buffer.box, own) == buffer.box:
                places = bytes_of(boxes.relative(buffer.box, own), boxes.shape_of(own), request_.bits)
                in_a_row = number if len(intervals(places)) == 1 else None
        if request_.bits % 8 or in_a_row is None:
            assert buffer.run is None
            continue
        assert buffer.run is not None
        assert buffer.run[0] == in_a_row
        content = np.packbits(stored.box(buffer.box).reshape(-1), bitorder="little")
        found = stored.pieces[in_a_row][buffer.run[1] : buffer.run[1] + len(content)]
        np.testing.assert_array_equal(found, content)


@settings(max_examples=100, deadline=None)
@given(requests(), st.data())
def test_only_some_buffers(request_: Request, data: Any) -> None:
    [tensor] = plan([request_]).tensors
    fill = data.draw(st.sets(st.integers(0, len(tensor.buffers) - 1)))
    stored = Stored(request_)
    filled, _ = carried_out(tensor, stored, fill=fill, gap=data.draw(st.sampled_from([0, GAP])))
    for n, buffer in enumerate(tensor.buffers):
        assert np.array_equal(filled[n], stored.box(buffer.box)) if n in fill else (filled[n] == 2).all()


def test_boxes_of_one_process_that_lie_apart_are_read_once() -> None:
    # A process that holds every other column: with what lies between, its columns are one range.
    columns = tuple(((0, 64), (a, a + 8)) for a in (0, 16, 32, 48))
    request = Request((64, 64), 32, (boxes.whole((64, 64)),), columns)
    near = plan([request])
    assert near.read == 64 * 64 * 4 - 8 * 4
    assert near.reads == 1
    exact = plan([request], gap=0)
    assert (exact.read, exact.needed, exact.reads) == (64 * 32 * 4, 64 * 32 * 4, 64 * 4)


def test_sums() -> None:
    whole = boxes.whole((8, 8))
    split = Request((8, 8), 16, (whole,), (((0, 4), (0, 8)), ((4, 8), (0, 8)), ((0, 4), (0, 8))))
    found = plan([split, split], chunk=32)
    assert (found.needed, found.read, found.reads, found.amplification) == (256, 256, 8, 1)
    assert plan([]).amplification == 1
    empty = plan([Request((0, 4), 16, (((0, 0), (0, 4)),), (((0, 0), (0, 4)),))])
    assert (empty.needed, empty.read, empty.reads, empty.amplification) == (0, 0, 0, 1)


@pytest.mark.parametrize("box", [((0, 9),), ((-1, 2),), ((5, 3),)])
def test_a_box_outside_is_refused(box: Box) -> None:
    with pytest.raises(ValueError, match="outside the shape"):
        plan([Request((8,), 8, (((0, 8),),), (box,))])
