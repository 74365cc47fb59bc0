"""From tensors' pieces and the boxes that a process' devices hold to buffers, and the bytes that fill them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator

from obmlite.plan import boxes
from obmlite.plan.boxes import Box
from obmlite.plan.layouts import Layout, row_major
from obmlite.plan.runs import Runs, runs_of

GAP = 4096
"""Bytes between rows up to which both are read at once: a page, which is read whole in any case."""

CHUNK = 8 << 20
"""Bytes that are read at one time at most, and in flight for each thread."""


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """A tensor, and what one process wants of it.

    Attributes:
      shape: of the tensor.
      bits: of an element.
      pieces: the boxes that it is stored in, without padding. They cover the tensor, or what is wanted of it, without
        overlap.
      boxes: what each of the process' devices is to hold. Two are equal or disjoint.
      layouts: how each piece lies in what is stored; None for one that is stored by itself, row-major. Empty where all
        are.
    """

    shape: tuple[int, ...]
    bits: int
    pieces: tuple[Box, ...]
    boxes: tuple[Box, ...]
    layouts: tuple[Layout | None, ...] = ()

    def layout(self, piece: int) -> Layout:
        """How a piece lies in what is stored."""
        found = self.layouts[piece] if self.layouts else None
        return found or row_major(boxes.shape_of(self.pieces[piece]))


@dataclasses.dataclass(frozen=True, slots=True)
class Buffer:
    """Host memory for one distinct box.

    Attributes:
      box: in the tensor's coordinates.
      users: numbers of the devices (in the order of ``Request.boxes``) that hold it.
      run: (number of a piece, bytes from its first byte) where the box's bytes lie in one piece, in a row: then they
        need not be copied from where they are. None elsewhere.
    """

    box: Box
    users: tuple[int, ...]
    run: tuple[int, int] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Read:
    """A part of a piece that is read, and what it fills. Boxes are in the tensor's coordinates.

    Attributes:
      piece: number of the piece.
      own: the piece's box.
      layout: how the piece lies in what is stored.
      box: the part.
      runs: its bytes in what is stored.
      fills: (number of a buffer, the box in it that is filled).
    """

    piece: int
    own: Box
    layout: Layout
    box: Box
    runs: Runs
    fills: tuple[tuple[int, Box], ...]

    @property
    def stored(self) -> Box:
        """The part in the coordinates of what is stored."""
        return self.layout.stored(boxes.relative(self.box, self.own))

    @property
    def keeps_order(self) -> bool:
        """Whether the part's elements are stored in the tensor's order."""
        return self.layout.keeps_order(self.box)


@dataclasses.dataclass(frozen=True, slots=True)
class TensorPlan:
    """What one process does for one tensor."""

    request: Request
    buffers: tuple[Buffer, ...]

    @property
    def needed(self) -> int:
        """Bytes of the distinct boxes, as they are stored."""
        return sum(-(-boxes.size_of(b.box) * self.request.bits // 8) for b in self.buffers)

    def reads(self, fill: Iterable[int] | None = None, *, gap: int = GAP, chunk: int = CHUNK) -> Iterator[Read]:
        """What is read to fill buffers, in parts of at most ``chunk`` bytes and in the order of each piece's bytes.

        Boxes that lie side by side, or so near that what lies between their rows would be read with both, are read
        together: without a gap no byte is read twice, and with one next to none. A part is never less than one
        element, nor, where rows do not end on bytes, than eight rows.

        Args:
          fill: numbers of the buffers to fill; all of them if not given.
          gap: as for :func:`obmlite.plan.runs_of`.
          chunk: bytes.
        """
        wanted = range(len(self.buffers)) if fill is None else list(fill)
        merged = boxes.merge(self.buffers[n].box for n in wanted)
        for number, own in enumerate(self.request.pieces):
            inside = [part for box in merged if (part := boxes.intersect(box, own)) is not None]
            layout = self.request.layout(number)
            for part, runs in _joined(inside, own, layout, self.request.bits, gap):
                fills = tuple(
                    (n, common) for n in wanted if (common := boxes.intersect(self.buffers[n].box, part)) is not None
                )
                yield from _parts(Read(number, own, layout, part, runs, fills), self.request.bits, gap, chunk)


@dataclasses.dataclass(frozen=True)  # without slots: what it sums up is kept
class Plan:
    """What one process does to restore tensors.

    Attributes:
      tensors: one for each request.
      gap: as for :func:`obmlite.plan.runs_of`.
      chunk: bytes that are read at one time at most.
    """

    tensors: tuple[TensorPlan, ...]
    gap: int = GAP
    chunk: int = CHUNK

    @functools.cached_property
    def needed(self) -> int:
        """Bytes that the process' devices hold, those that several of them hold once."""
        return sum(tensor.needed for tensor in self.tensors)

    @functools.cached_property
    def _counted(self) -> tuple[int, int]:
        nbytes = reads = 0
        for tensor in self.tensors:
            for read in tensor.reads(gap=self.gap, chunk=self.chunk):
                nbytes += read.runs.total
                reads += read.runs.count
        return nbytes, reads

    @property
    def read(self) -> int:
        """Bytes that are read."""
        return self._counted[0]

    @property
    def reads(self) -> int:
        """Number of ranges that are read."""
        return self._counted[1]

    @property
    def amplification(self) -> float:
        """Bytes read for each byte needed."""
        return self.read / self.needed if self.needed else 1.0


def plan(requests: Iterable[Request], *, gap: int = GAP, chunk: int = CHUNK) -> Plan:
    """What one process does to get what its devices are to hold.

    Args:
      requests: the tensors.
      gap: bytes between rows up to which both are read at once.
      chunk: bytes that are read at one time at most.

    Raises:
      ValueError: a box reaches outside its tensor.
    """
    return Plan(tuple(_plan(request) for request in requests), gap, chunk)


def _plan(request: Request) -> TensorPlan:
    users: dict[Box, list[int]] = {}
    for device, box in enumerate(request.boxes):
        users.setdefault(box, []).append(device)
    bounds = boxes.whole(request.shape)
    for box in users:
        if any(not a <= start <= stop <= b for (start, stop), (a, b) in zip(box, bounds, strict=True)):
            raise ValueError(f"the box {box} reaches outside the shape {request.shape}")
    return TensorPlan(request, tuple(Buffer(box, tuple(own), _run(request, box)) for box, own in users.items()))


def _run(request: Request, box: Box) -> tuple[int, int] | None:
    """Where all of a box lies in a row."""
    if request.bits % 8:
        return None
    for number, own in enumerate(request.pieces):
        if boxes.intersect(box, own) != box:
            continue
        layout = request.layout(number)
        runs = runs_of(layout.stored(boxes.relative(box, own)), layout.shape, request.bits)
        return (number, runs.offset) if runs.count == 1 and layout.keeps_order(box) else None
    return None


def _joined(parts: Iterable[Box], own: Box, layout: Layout, bits: int, gap: int) -> list[tuple[Box, Runs]]:
    """Disjoint boxes in a piece and their runs; one box around several where that is at most a gap more to read."""

    def runs_in(box: Box) -> Runs:
        return runs_of(layout.stored(boxes.relative(box, own)), layout.shape, bits, gap)

    joined: list[tuple[Box, Runs]] = []
    for part in parts:
        box, runs = part, runs_in(part)
        n = 0
        while n < len(joined):
            around = boxes.hull(box, joined[n][0])
            together = runs_in(around)
            apart = boxes.intersect(box, joined[n][0]) is None
            if apart and together.total > runs.total + joined[n][1].total + gap:
                n += 1
                continue
            box, runs = around, together
            del joined[n]
            n = 0
        joined.append((box, runs))
    return sorted(joined, key=lambda found: found[1].offset)


def _parts(read: Read, bits: int, gap: int, chunk: int) -> Iterator[Read]:
    """A read in parts of at most ``chunk`` bytes."""
    if not read.runs.count or not read.fills:  # what lies between boxes that are read together
        return
    axis = next((n for n in read.layout.order if read.box[n][1] - read.box[n][0] > 1), None)
    if read.runs.total <= chunk or axis is None:
        yield read
        return
    start, stop = read.box[axis]
    shape = read.layout.shape
    rows = max(1, (stop - start) * chunk // read.runs.total)
    if bits * math.prod(shape[read.layout.axes[axis] + 1 :]) % 8:
        rows = -(-rows // 8) * 8  # so that a part begins on a byte whenever the read does
        if rows >= stop - start:
            yield read
            return
    for first in range(start, stop, rows):
        box = (*read.box[:axis], (first, min(first + rows, stop)), *read.box[axis + 1 :])
        runs = runs_of(read.layout.stored(boxes.relative(box, read.own)), shape, bits, gap)
        fills = tuple((n, common) for n, part in read.fills if (common := boxes.intersect(part, box)) is not None)
        yield from _parts(dataclasses.replace(read, box=box, runs=runs, fills=fills), bits, gap, chunk)
