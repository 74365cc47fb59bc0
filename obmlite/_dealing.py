"""Which process saves which piece of which tensor: the same answer on every process, from what all of them know."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from obmlite.plan import Box, boxes

__all__ = ["Held", "deal", "held_by", "piece_name", "processes_of"]


class Held(Protocol):
    """A box of a tensor.

    Attributes:
      name: tells it from others, and is the same on all processes.
      nbytes: bytes to be written for it.
      holders: the processes that have it, ascending; not empty.
    """

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def holders(self) -> tuple[int, ...]: ...


def deal(held: Sequence[Held], count: int) -> list[int]:
    """Gives each box to one of the processes that hold it, so that all write about as many bytes.

    What only one process has is its own. Of the rest the largest goes first, to the one that has least so far:
    nobody's share is then above the even one by more than a third, but for boxes that are larger than that.

    Args:
      held: the boxes.
      count: processes in the program.

    Returns:
      For each box the process that writes it. It depends on the boxes as a set.
    """
    loads = np.zeros(count, np.int64)
    owners = [box.holders[0] for box in held]
    shared = []
    for n, box in enumerate(held):
        if len(box.holders) == 1:
            loads[box.holders[0]] += box.nbytes
        else:
            shared.append(n)
    candidates: dict[tuple[int, ...], np.ndarray[Any, Any]] = {}
    for n in sorted(shared, key=lambda n: (-held[n].nbytes, held[n].name)):
        holders = held[n].holders
        among = candidates.setdefault(holders, np.array(holders))
        owners[n] = int(among[np.argmin(loads[among])])
        loads[owners[n]] += held[n].nbytes
    return owners


@functools.lru_cache(maxsize=4096)
def processes_of(sharding: Any) -> tuple[int, ...]:
    """The processes that have devices of a sharding, ascending."""
    return tuple(sorted({device.process_index for device in sharding.device_set}))


@functools.lru_cache(maxsize=4096)
def held_by(sharding: Any, shape: tuple[int, ...]) -> Mapping[Box, tuple[int, ...]]:
    """The distinct boxes into which a sharding cuts an array, in their order, each with the processes that hold it."""
    found: dict[Box, set[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        found.setdefault(boxes.of_index(index, shape), set()).add(device.process_index)
    return {box: tuple(sorted(found[box])) for box in sorted(found)}


@functools.lru_cache(maxsize=4096)
def fingerprint(sharding: Any, shape: tuple[int, ...]) -> str:
    """Equal where :func:`held_by` is; of one process, equal whichever it is, since each has arrays of its own."""
    if len(processes_of(sharding)) == 1:
        return "on one process"
    return "in pieces " + hashlib.sha256(repr(held_by(sharding, shape)).encode()).hexdigest()[:16]


def piece_name(tensor: str, box: Box, taken: Iterable[str]) -> str:
    """What a piece is called in a file, so that nobody takes it for the tensor: ``kernel@[0:4,8:16]``.

    Args:
      tensor: the tensor's name.
      box: where the piece lies in it.
      taken: names of tensors, for which it must not be taken either.
    """
    name = f"{tensor}@[{','.join(f'{start}:{stop}' for start, stop in box)}]"
    while name in taken:
        name += "@"
    return name
