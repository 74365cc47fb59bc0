"""Many small tensors at once: what is the same for all tensors of one kind and place is worked out once.

Restoring a tensor by itself costs tens of µs of Python, whatever its size. A model may have tens of thousands of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np

from obmlite import _arrays
from obmlite._arrays import Array
from obmlite._files import TensorFile
from obmlite._placing import Placer
from obmlite._tensors import StoredTensor
from obmlite.errors import ObmliteError, add_facts
from obmlite.io.chunked import Range
from obmlite.plan import CHUNK, GAP, TensorPlan, boxes
from obmlite.specs import TensorSpec

SMALL = 256 << 10
"""Bytes up to which a tensor is small: XLA copies it as fast as threads would, where it is not aligned."""


@dataclasses.dataclass(slots=True)
class Group:
    """Small tensors of one dtype, shape and place.

    Attributes:
      make: from what each of this process' devices holds to an array.
      dtype: of the elements.
      buffers: for each distinct box bytes from the tensor's first byte, number of elements, and shape.
      users: for each device the number of its buffer.
      nbytes: of a tensor.
      is_whole: whether this process needs all of each tensor.
      shared: whether several devices in this host's memory hold one buffer. XLA copies what is not aligned, once for
        each of them.
    """

    make: Callable[[list[Any]], Any]
    dtype: np.dtype[Any]
    buffers: tuple[tuple[int, int, tuple[int, ...]], ...]
    users: tuple[int, ...]
    nbytes: int
    is_whole: bool
    shared: bool

    @staticmethod
    def of(spec: TensorSpec, placer: Placer, plan: Callable[[], TensorPlan]) -> Group | None:
        """The group of a leaf of one piece that is not cast; None if such leaves have to be gathered one by one."""
        kind = spec.kind
        shape: tuple[int, ...] = spec.shape  # type: ignore[assignment]
        if not kind.is_direct or kind.is_key or _arrays.nbytes(spec) > SMALL or not placer.is_plain(shape):
            return None
        planned = plan().buffers
        if any(buffer.run is None for buffer in planned):
            return None
        users = {user: n for n, buffer in enumerate(planned) for user in buffer.users}
        return Group(
            placer.maker(shape, kind.numpy, spec.weak_type),
            kind.numpy,
            tuple((b.run[1], boxes.size_of(b.box), boxes.shape_of(b.box)) for b in planned if b.run is not None),
            tuple(users[n] for n in range(len(users))),
            _arrays.nbytes(spec),
            sum([boxes.size_of(buffer.box) for buffer in planned]) == _arrays.number_of(spec),
            placer.on_cpu and any(len(buffer.users) > 1 for buffer in planned),
        )

    def array(self, data: Any, offset: int) -> Any:
        """The array of the tensor whose bytes begin at an offset of a buffer."""
        dtype = self.dtype
        held = [np.frombuffer(data, dtype, count, offset + at).reshape(shape) for at, count, shape in self.buffers]
        if self.shared:
            held = [_arrays.aligned(array) for array in held]
        return self.make([held[n] for n in self.users])


def restore(
    tensors: Sequence[tuple[int, StoredTensor, Group]], name: Callable[[int], str], threads: Callable[[], Executor]
) -> Iterator[tuple[int, Any]]:
    """The arrays of tensors of one piece each, by number.

    Those in mapped files are used, or copied by XLA, where they are. Others are read together with their neighbours.

    Args:
      tensors: number, tensor and group of each.
      name: of the leaf with a number, for errors.
      threads: what compares tensors with their digests, where that is to be.
    """
    placed = [(number, group, *_place(tensor, number, name)) for number, tensor, group in tensors]
    _compare(placed, threads)
    number = 0
    try:
        maps: dict[int, Any] = {}
        unmapped: list[tuple[int, TensorFile, int, Group]] = []
        for number, group, file, base in placed:
            data = maps.get(id(file))
            if data is None:
                data = maps[id(file)] = file.map(()) or ()  # what will be looked at was compared
            if data:
                yield number, group.array(data, base)
            else:
                unmapped.append((number, file, base, group))
        unmapped.sort(key=lambda entry: (id(entry[1]), entry[2]))
        first = 0
        while first < len(unmapped):
            number, file, start, group = unmapped[first]
            gap = 0 if file.is_checked else GAP  # what nobody asked for is no reason to refuse what somebody did
            last, end = first + 1, start + group.nbytes
            while last < len(unmapped):
                _, other, base, group = unmapped[last]
                if other is not file or base - end > gap or base + group.nbytes - start > CHUNK:
                    break
                last, end = last + 1, base + group.nbytes
            data = _read(file, start, end)
            for other_number, _, base, group in unmapped[first:last]:
                yield other_number, group.array(data, base - start)
            first = last
    except ObmliteError as error:
        add_facts(error, leaf=name(number))
        raise


def _place(tensor: StoredTensor, number: int, name: Callable[[int], str]) -> tuple[TensorFile, int]:
    try:
        return tensor.place(0)
    except ObmliteError as error:
        add_facts(error, leaf=name(number))
        raise


def _compare(placed: Sequence[tuple[int, Group, TensorFile, int]], threads: Callable[[], Executor]) -> None:
    """Compares those that lie in mapped files with their digests, if they are to be."""
    ranges: dict[int, tuple[TensorFile, list[Range]]] = {}
    for _, group, file, base in placed:
        if file.is_checked:
            ranges.setdefault(id(file), (file, []))[1].append((base, group.nbytes))
    jobs = [(f, part) for f, whole in ranges.values() if f.is_mapped for part in f.pending(whole)]
    if jobs:
        list(threads().map(lambda job: job[0].check(job[1]), jobs))


def _read(file: TensorFile, start: int, end: int) -> Array:
    """A range of a file, so that what is aligned there is aligned here."""
    lead = start % _arrays.ALIGNMENT
    buffer = _arrays.aligned_empty((lead + end - start,), np.dtype(np.uint8))[lead:]
    file.read_into(start, buffer.data)
    buffer.flags.writeable = False
    return buffer
