"""Restoring what several processes hold: read once by all of them together, and spread from device to device.

A box that r devices hold is cut into r parts, of which each device's process reads one. The parts go to the devices, an
``all_gather`` over those r makes the box of them, on each. The processes' leaves, shardings and dtypes are compared
before (:mod:`obmlite._coordination`), and nothing is sent between devices before all have what they were to read.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import lax

from obmlite import _coordination, restoring
from obmlite._arrays import Array
from obmlite._placing import Placer
from obmlite.plan import Box, boxes
from obmlite.restoring import Limits, Target
from obmlite.specs import TensorSpec

if TYPE_CHECKING:
    from obmlite.weights import LazyArray


def restore(
    leaves: Sequence[LazyArray],
    targets: Sequence[Target],
    limits: Limits,
    progress: Callable[[int], Any],
    timeout: float | None,
) -> list[Any]:
    """As :func:`obmlite.restoring.restore`, by all processes together.

    Raises:
      CoordinationError: the processes do not restore the same, or one failed or did not answer within ``timeout``
        seconds.
    """
    found: list[Any] = []
    with _coordination.Session("restore", timeout=timeout or _coordination.TIMEOUT) as session:
        session.agree(
            "leaves to restore", [(leaf.name, _text(leaf, t)) for leaf, t in zip(leaves, targets, strict=True)]
        )
        placers = functools.lru_cache(maxsize=None)(_Sharing)
        for first, last in _batches(leaves, targets, placers, limits.memory_budget):
            read = restoring.restore(leaves[first:last], targets[first:last], limits, progress, placers)
            session.barrier()  # who could not read has said so now; in an all_gather the others would wait for ever
            spread: dict[int, Any] = {}
            for part in read:
                if isinstance(part, _Parts) and id(part) not in spread:
                    spread[id(part)] = part.spread()
            found += [spread.get(id(part), part) for part in read]
            jax.block_until_ready(list(spread.values()))
    return found


def _text(leaf: LazyArray, target: Target) -> str:
    sharding = target.sharding
    if sharding is None or sharding.is_fully_addressable:  # each process has its own
        return f"{leaf.spec} {target.dtype}"
    placed = [(device.id, index) for device, index in sharding.devices_indices_map(leaf.spec.shape).items()]
    return f"{leaf.spec} {target.dtype} {sharding} {placed}"


def _batches(
    leaves: Sequence[LazyArray], targets: Sequence[Target], placers: Callable[[Any], _Sharing], budget: int
) -> Iterator[tuple[int, int]]:
    """Ranges of leaves whose parts fit in the budget; the same ones on each process, which have to keep step."""
    first = total = 0
    for n, (leaf, target) in enumerate(zip(leaves, targets, strict=True)):
        shape: tuple[int, ...] = leaf.spec.shape  # type: ignore[assignment]
        cut = placers(target.sharding).cut(shape)
        nbytes = 0 if cut is None else cut.most * leaf.spec.kind.bits // 8 * cut.together
        if total and total + nbytes > budget:
            yield first, n
            first, total = n, 0
        total += nbytes
    yield first, len(leaves)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How a shape's boxes are cut into parts.

    Attributes:
      devices: a row for each box, in it the devices that hold the box.
      parts: of each row the part that each device reads, as boxes of the tensor.
      axis: along which boxes are cut.
      most: elements of the largest part.
      together: most parts that one process reads.
    """

    devices: tuple[tuple[Any, ...], ...]
    parts: tuple[tuple[Box, ...], ...]
    axis: int
    most: int
    together: int


class _Sharing(Placer):
    """Reads parts of boxes that other processes hold, too, and the whole of others."""

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - a placer lives for one restore
    def cut(self, shape: tuple[int, ...]) -> _Cut | None:
        """How a shape is cut; None where each process reads its boxes as they are.

        That is where no box is on several processes, and for a single element, which cannot be cut.
        """
        if math.prod(shape) == 0 or not shape or self.in_other_memory:
            return None
        held: dict[Box, list[Any]] = {}
        for device, index in self.sharding.devices_indices_map(shape).items():
            held.setdefault(boxes.of_index(index, shape), []).append(device)
        if all(len({device.process_index for device in own}) == 1 for own in held.values()):
            return None
        count = len(next(iter(held.values())))
        extents = boxes.shape_of(next(iter(held)))
        # The first axis that has enough for all: parts of it lie together in the file.
        axis = next((n for n, size in enumerate(extents) if size >= count), None)
        if axis is None:
            axis = max(range(len(extents)), key=extents.__getitem__)
        parts = tuple(tuple(_part(box, axis, n, count) for n in range(count)) for box in held)
        most = max(boxes.size_of(part) for row in parts for part in row)
        own = collections.Counter(device.process_index for row in held.values() for device in row)
        return _Cut(tuple(map(tuple, held.values())), parts, axis, most, max(own.values()))

    def boxes(self, shape: tuple[int, ...]) -> tuple[Box, ...]:
        cut = self.cut(shape)
        if cut is None:
            return super().boxes(shape)
        read = {
            device: part
            for row, own in zip(cut.devices, cut.parts, strict=True)
            for device, part in zip(row, own, strict=True)
        }
        return tuple([read[device] for device in self.devices(shape)])

    def is_plain(self, shape: tuple[int, ...]) -> bool:
        return self.cut(shape) is None

    def leaf(self, spec: TensorSpec, buffers: Sequence[Any], dtype: Any) -> Any:
        shape: tuple[int, ...] = spec.shape  # type: ignore[assignment]
        cut = self.cut(shape)
        if cut is None:
            return super().leaf(spec, buffers, dtype)
        return _Parts(self, spec, cut, dict(zip(self.devices(shape), buffers, strict=True)), np.dtype(dtype))


def _part(box: Box, axis: int, number: int, count: int) -> Box:
    """One of the parts, as even as they can be, that a box is cut into."""
    start, stop = box[axis]
    size = stop - start
    cut = (start + size * number // count, start + size * (number + 1) // count)
    return (*box[:axis], cut, *box[axis + 1 :])


@dataclasses.dataclass(frozen=True, eq=False)
class _Parts:
    """Parts that this process has read of a leaf."""

    placer: _Sharing
    spec: TensorSpec
    cut: _Cut
    buffers: dict[Any, Array]
    dtype: np.dtype[Any]

    def spread(self) -> Any:
        """The leaf, by all processes together."""
        cut, spec = self.cut, self.spec
        if not self.buffers:  # this process has none of the devices
            return self.placer.joined(spec, {}, self.dtype)
        tail: tuple[int, ...] = spec.kind.key_data_shape if spec.kind.is_key else ()
        words, lanes = _words(self.dtype, math.prod(tail))
        local = []
        for device, held in self.buffers.items():
            part = np.zeros((1, 1, cut.most * lanes), words)
            flat = held.reshape(-1).view(words)
            part[0, 0, : flat.size] = flat
            local.append(jax.device_put(part, device))
        mesh = jax.sharding.Mesh(np.array(cut.devices), ("box", "part"))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("box", "part"))
        shape = (*mesh.devices.shape, cut.most * lanes)
        sent = jax.make_array_from_single_device_arrays(shape, sharding, local, dtype=words)
        sizes = tuple(boxes.shape_of(part) for part in cut.parts[0])  # those of every box: all have one shape
        found = _assembling(mesh, sizes, cut.axis, tail, self.dtype, lanes)(sent)
        return self.placer.joined(spec, {shard.device: shard.data for shard in found.addressable_shards}, self.dtype)


def _words(dtype: np.dtype[Any], elements: int) -> tuple[np.dtype[Any], int]:
    """The unsigned integers that elements travel as, which every backend can send, and how many for each."""
    width = min(dtype.itemsize, 4)
    return np.dtype(f"u{width}"), dtype.itemsize * elements // width


@functools.lru_cache(maxsize=1024)
def _assembling(
    mesh: Any, sizes: tuple[tuple[int, ...], ...], axis: int, tail: tuple[int, ...], dtype: np.dtype[Any], lanes: int
) -> Any:
    """From parts, as words, to the box that each device holds; those of all devices side by side in dimension 0."""

    def box(part: Any) -> Any:
        gathered = lax.all_gather(part[0, 0], "part")
        pieces = [gathered[n, : math.prod(size) * lanes].reshape(*size, lanes) for n, size in enumerate(sizes)]
        return _elements(lax.concatenate(pieces, axis), dtype, tail)

    spec = jax.sharding.PartitionSpec
    # The result is the same along "part", which shard_map's check cannot know of an all_gather.
    return jax.jit(jax.shard_map(box, mesh=mesh, in_specs=spec("box", "part"), out_specs=spec("box"), check_vma=False))


def _elements(words: Any, dtype: np.dtype[Any], tail: tuple[int, ...]) -> Any:
    """Words, in the last dimension those of an element, as elements."""
    shape = (*words.shape[:-1], *tail)
    if tail:
        return words.reshape(shape)
    if dtype == np.bool_:
        return words.reshape(shape).astype(bool)
    if dtype.kind == "c":
        half = np.dtype(f"f{dtype.itemsize // 2}")
        pair = lax.bitcast_convert_type(words.reshape(*shape, 2, -1) if half.itemsize > 4 else words, half)
        return lax.complex(pair[..., 0], pair[..., 1])
    bits = jax.numpy.iinfo(dtype).bits if jax.dtypes.issubdtype(dtype, np.integer) else jax.numpy.finfo(dtype).bits
    if bits < 8:
        return lax.bitcast_convert_type(words.reshape(shape).astype(f"uint{bits}"), dtype)
    if dtype.itemsize > 4:
        return lax.bitcast_convert_type(words, dtype)
    return lax.bitcast_convert_type(words.reshape(shape), dtype)
