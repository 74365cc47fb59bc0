"""Lazy leaves → ``jax.Array``: every byte that this process' devices need is read once, straight into place.

What a device is to hold is a box of a tensor (:mod:`obmlite.plan`). A box whose bytes lie in a row in a mapped file is
used where it is; every other one is gathered by threads, a chunk at a time, into a buffer that JAX then takes over as
it is. On CPU those buffers are the arrays; elsewhere transfers go on while the next buffers are filled.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from obmlite import _arrays, _batching, _gather
from obmlite import plan as planning
from obmlite._arrays import Array
from obmlite._collector import paused
from obmlite._files import TensorFile
from obmlite._placing import Placer
from obmlite._tensors import StoredTensor
from obmlite.dtypes import DType
from obmlite.errors import ArgumentError, context
from obmlite.io.chunked import Range
from obmlite.plan import Box, Read, boxes
from obmlite.specs import TensorSpec

if TYPE_CHECKING:
    from obmlite.weights import LazyArray

MEMORY_BUDGET = 1 << 30
"""Bytes of host memory in flight, unless told otherwise."""

_THREADS = 8  # at most, unless told otherwise: reading from a disk gains little beyond
_SMALLEST_CHUNK = 64 << 10


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """Where a leaf goes.

    Attributes:
      sharding: a ``jax.sharding.Sharding``; None for the default device, uncommitted.
      dtype: what to cast to; None for no change.
    """

    sharding: Any = None
    dtype: np.dtype[Any] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a restore may use.

    Attributes:
      memory_budget: bytes of host memory in flight: file pages and buffers that are not yet, or no longer, part of a
        result in host memory. One shard is always held whole where it goes to an accelerator.
      threads: that read and copy.
    """

    memory_budget: int = MEMORY_BUDGET
    threads: int = min(_THREADS, os.cpu_count() or 1)

    @staticmethod
    def of(memory_budget: int | None, threads: int | None) -> Limits:
        """Limits as a caller gives them.

        Raises:
          ArgumentError: one is no positive number.
        """
        given = {"memory_budget": memory_budget, "threads": threads}
        for name, value in given.items():
            if value is not None and (type(value) is not int or value < 1):
                raise ArgumentError("A limit must be a positive number.", field=name, found=repr(value))
        return Limits(**{name: value for name, value in given.items() if value is not None})

    @property
    def chunk(self) -> int:
        """Bytes that each thread may have in flight."""
        return min(planning.CHUNK, max(self.memory_budget // (2 * self.threads), _SMALLEST_CHUNK))

    def chunk_of(self, kind: DType, cast: np.dtype[Any] | None) -> int:
        """The same in stored bytes, for elements that may take memory of their own before they are in place."""
        if kind.is_direct and cast is None:
            return self.chunk
        widest = max(4, cast.itemsize if cast is not None else 1)
        return max(self.chunk * kind.bits // (kind.bits + 8 * widest), planning.GAP)


@dataclasses.dataclass(slots=True)
class _Filling:
    """A tensor whose buffers are being filled, or are on their way to their devices."""

    number: int
    spec: TensorSpec
    tensor: StoredTensor
    placer: Placer
    plan: planning.TensorPlan
    dtype: Any
    buffers: list[Array]
    nbytes: int  # held until the devices have them
    futures: list[Future[None]]


def restore(
    leaves: Sequence[LazyArray],
    targets: Sequence[Target],
    limits: Limits,
    progress: Callable[[int], Any] = lambda _: None,
    placer: Callable[[Any], Placer] = Placer,
) -> list[Any]:
    """The arrays of leaves, in their order; leaves that are tied and wanted alike are one array.

    Args:
      leaves: the leaves.
      targets: where each goes.
      limits: what may be used.
      progress: told the stored bytes of what is there.
      placer: makes the arrays of a sharding.

    Raises:
      RestoreError: a leaf has 64-bit numbers and JAX does not hold them, or is of a dtype that no array can have.
      CorruptPackageError: a file is not what the manifest says.
    """
    numbers: dict[Any, int] = {}
    distinct: list[tuple[LazyArray, Target]] = []
    places = []
    checked = set()
    with paused():
        for leaf, target in zip(leaves, targets, strict=True):
            if (leaf.spec.kind.code, target.dtype) not in checked:
                _arrays.check_x64(leaf.spec, leaf.name, target.dtype)
                checked.add((leaf.spec.kind.code, target.dtype))
            key = (leaf.tensor.key, target, leaf.spec.weak_type)
            if key not in numbers:
                numbers[key] = len(distinct)
                distinct.append((leaf, target))
            places.append(numbers[key])
    # Arrays are kept, even if a jit around the first call is being traced; and a restore is no implicit transfer.
    explicit = jax.transfer_guard_host_to_device("allow")
    with jax.ensure_compile_time_eval(), explicit, _Restorer(limits, progress, placer) as restorer:
        arrays = restorer.run(distinct)
    return [arrays[place] for place in places]


class _Restorer:
    def __init__(self, limits: Limits, progress: Callable[[int], Any], placer: Callable[[Any], Placer]) -> None:
        self._limits = limits
        self._progress = progress
        self._pool: ThreadPoolExecutor | None = None
        self._queue: collections.deque[_Filling] = collections.deque()
        self._moving: collections.deque[tuple[Any, _Filling]] = collections.deque()
        self._held = 0
        self._placer = functools.lru_cache(maxsize=None)(placer)
        self._plan = functools.lru_cache(maxsize=4096)(_plan)  # most tensors are of few shapes
        self._arrays: dict[int, Any] = {}

    def __enter__(self) -> _Restorer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, leaves: Sequence[tuple[LazyArray, Target]]) -> list[Any]:
        """Restores them all."""
        groups: dict[Any, _batching.Group | None] = {}
        batch: list[tuple[int, StoredTensor, _batching.Group]] = []
        for number, (leaf, target) in enumerate(leaves):
            tensor = leaf.tensor
            if isinstance(tensor, StoredTensor) and tensor.is_whole and target.dtype is None:
                spec = leaf.spec
                key = (spec.kind.code, spec.shape, spec.weak_type, target.sharding)
                if key not in groups:
                    groups[key] = self._group(leaf, tensor, target)
                group = groups[key]
                if group is not None and (group.is_whole or tensor.is_mapped):
                    batch.append((number, tensor, group))
                    continue
            with context(leaf=leaf.name):
                if isinstance(tensor, StoredTensor):
                    self._begin(number, leaf, tensor, target)
                else:
                    self._arrays[number] = _from_memory(leaf, target, self._placer(target.sharding))
                    self._progress(leaf.nbytes)
        with paused():
            for number, array in _batching.restore(batch, lambda number: leaves[number][0].name, lambda: self._threads):
                self._arrays[number] = array
        self._progress(sum([group.nbytes for _, _, group in batch]))
        while self._queue:
            self._finish()
        while self._moving:
            self._arrived()
        return [self._arrays[number] for number in range(len(leaves))]

    def _group(self, leaf: LazyArray, tensor: StoredTensor, target: Target) -> _batching.Group | None:
        placer, spec = self._placer(target.sharding), leaf.spec
        return _batching.Group.of(
            spec, placer, lambda: self._plan(placer, spec.shape, spec.kind.bits, tensor.boxes, ())
        )

    def _begin(self, number: int, leaf: LazyArray, tensor: StoredTensor, target: Target) -> None:
        """Has a tensor's buffers filled, or takes them where they are."""
        kind, placer = leaf.spec.kind, self._placer(target.sharding)
        plan = self._plan(placer, leaf.spec.shape, kind.bits, tensor.boxes, tensor.layouts)
        held: list[Array] = []
        fill: dict[int, tuple[Array, Box]] = {}
        compare: list[tuple[TensorFile, list[Range]]] = []
        for n, buffer in enumerate(plan.buffers):
            array = None
            if buffer.run is not None and target.dtype is None:
                file, base = tensor.place(buffer.run[0])
                start = base + buffer.run[1]
                array = _gather.mapped(file, kind, start, boxes.shape_of(buffer.box), ())
                if array is not None and placer.on_cpu and not _arrays.is_aligned(array):
                    array = None  # XLA would copy it for each device, and keep the file's pages
                if array is not None:
                    compare += [(file, part) for part in file.pending([(start, array.nbytes)])]
                    if not placer.on_cpu:
                        file.prefetch(start, array.nbytes)
            if array is None:
                element = target.dtype or (kind.storage_numpy if kind.is_key else kind.numpy)
                array = _arrays.aligned_empty(_gather.held_shape(kind, buffer.box), element)
                fill[n] = (array, buffer.box)
            held.append(array)
        nbytes = 0 if placer.on_cpu else sum([array.nbytes for array in held])
        while self._held and self._held + nbytes > self._limits.memory_budget:
            self._make_room()
        self._held += nbytes
        futures = [self._threads.submit(self._compare, leaf, *part) for part in compare]
        if fill:
            reads = plan.reads(fill, chunk=self._limits.chunk_of(kind, target.dtype))
            futures += [self._threads.submit(self._gather, read, leaf, tensor, fill) for read in reads]
        self._progress(sum([array.nbytes for n, array in enumerate(held) if n not in fill]))
        dtype = np.dtype(np.uint32) if kind.is_key else target.dtype or kind.numpy
        filling = _Filling(number, leaf.spec, tensor, placer, plan, dtype, held, nbytes, futures)
        if futures or nbytes:
            self._queue.append(filling)
        else:
            self._place(filling)

    @property
    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._limits.threads, "obmlite-restore")
        return self._pool

    def _compare(self, leaf: LazyArray, file: TensorFile, ranges: list[Range]) -> None:
        with context(leaf=leaf.name):
            file.check(ranges)

    def _gather(self, read: Read, leaf: LazyArray, tensor: StoredTensor, into: _gather.Buffers) -> None:
        with context(leaf=leaf.name):
            _gather.gather(read, leaf.spec.kind, *tensor.place(read.piece), into)
        self._progress(read.runs.total)

    def _make_room(self) -> None:
        if self._moving:
            self._arrived()
        else:
            self._finish()

    def _finish(self) -> None:
        """Waits for the tensor that was begun first, and hands it over to its devices."""
        filling = self._queue.popleft()
        for future in filling.futures:
            future.result()
        self._place(filling)

    def _place(self, filling: _Filling) -> None:
        for array in filling.buffers:
            array.flags.writeable = False  # JAX may copy what it is given writable
        buffers: list[Any] = [None] * len(filling.plan.request.boxes)
        for held, buffer in zip(filling.buffers, filling.plan.buffers, strict=True):
            for user in buffer.users:
                buffers[user] = held
        array = filling.placer.leaf(filling.spec, buffers, filling.dtype)
        self._arrays[filling.number] = array
        if filling.nbytes:
            self._moving.append((array, filling))

    def _arrived(self) -> None:
        """Waits for the transfer that was begun first."""
        array, filling = self._moving.popleft()
        jax.block_until_ready(array)
        _drop(filling.plan, filling.tensor)
        self._held -= filling.nbytes


def _plan(
    placer: Placer,
    shape: tuple[int, ...],
    bits: int,
    pieces: tuple[Box, ...],
    layouts: tuple[planning.Layout | None, ...],
) -> planning.TensorPlan:
    [tensor] = planning.plan([planning.Request(shape, bits, pieces, placer.boxes(shape), layouts)]).tensors
    return tensor


def _drop(plan: planning.TensorPlan, tensor: StoredTensor) -> None:
    """Takes pages of mapped files that were sent to a device out of this process' memory."""
    for buffer in plan.buffers:
        if buffer.run is not None:
            file, base = tensor.place(buffer.run[0])
            file.drop(base + buffer.run[1], boxes.size_of(buffer.box) * plan.request.bits // 8)


def _from_memory(leaf: LazyArray, target: Target, placer: Placer) -> Any:
    """A leaf that is in memory already, as its user gave it."""
    spec = leaf.spec
    value = leaf.tensor.for_device()
    if not spec.kind.storage:
        return value
    if target.dtype is not None:
        value = _arrays.cast(value, target.dtype)
    if isinstance(value, jax.Array):
        return value if target.sharding is None else jax.device_put(value, target.sharding)
    dtype = np.dtype(np.uint32) if spec.kind.is_key else value.dtype
    shape: tuple[int, ...] = spec.shape  # type: ignore[assignment]
    wanted = placer.boxes(shape)
    parts: dict[Box, Array] = {}
    for box in wanted:
        if box not in parts:
            # A copy, since JAX uses host memory in place and the user may write to theirs.
            parts[box] = _arrays.aligned_empty(_gather.held_shape(spec.kind, box), dtype)
            parts[box][...] = value[(*boxes.slices(box), ...)]
            parts[box].flags.writeable = False
    return placer.leaf(spec, [parts[box] for box in wanted], dtype)
