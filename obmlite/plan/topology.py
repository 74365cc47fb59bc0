"""Meshes without devices: which box of a tensor each device of a mesh holds, and whether a partition fits at all."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from obmlite.errors import ArgumentError
from obmlite.plan.boxes import Box

Entry: TypeAlias = "str | tuple[str, ...] | None"
"""What a dimension is split over: one mesh axis, several (the first varies slowest), or none."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A mesh of devices, dealt to hosts.

    Devices are in row-major order of the axes, and each host has a contiguous block of them, all of one size.

    Attributes:
      axes: devices along each mesh axis.
      hosts: processes that the devices are dealt to.

    Raises:
      ArgumentError: an axis or the number of hosts is not positive, or hosts would get different numbers of devices.
    """

    axes: Mapping[str, int]
    hosts: int = 1

    def __post_init__(self) -> None:
        for name, size in self.axes.items():
            if size < 1:
                raise ArgumentError("A mesh axis has no devices.", field=name, expected="at least 1", found=size)
        if self.hosts < 1 or self.devices % self.hosts:
            raise ArgumentError(
                "A mesh's devices cannot be dealt evenly to the hosts.",
                field="hosts",
                expected=f"a divisor of {self.devices}, the devices of the mesh ({self})",
                found=self.hosts,
                fix="give another number of hosts, or another mesh",
            )

    @property
    def devices(self) -> int:
        """Number of devices."""
        return math.prod(self.axes.values())

    @property
    def per_host(self) -> int:
        """Number of devices of each host."""
        return self.devices // self.hosts

    def local(self, host: int) -> range:
        """The devices of a host."""
        return range(host * self.per_host, (host + 1) * self.per_host)

    def __str__(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.axes.items())

    @functools.cached_property
    def coordinates(self) -> Mapping[str, Sequence[int]]:
        """For each axis the coordinate of each device."""
        found, stride = {}, self.devices
        for name, size in self.axes.items():
            stride //= size
            found[name] = [device // stride % size for device in range(self.devices)]
        return found


def parse_axes(text: str) -> dict[str, int]:
    """Mesh axes from text such as ``data=4,model=8``, in the order in which they stand.

    Raises:
      ArgumentError: the text is malformed, or an axis is there twice.
    """
    axes: dict[str, int] = {}
    for item in text.split(","):
        name, _, size = (part.strip() for part in item.partition("="))
        if not name or not (size.isascii() and size.isdigit()) or int(size) < 1:
            raise ArgumentError(
                "A mesh is malformed.",
                field="mesh",
                expected="axes and sizes, such as data=4,model=8",
                found=repr(text),
            )
        if name in axes:
            raise ArgumentError("A mesh has an axis twice.", field="mesh", expected="one size each", found=repr(name))
        axes[name] = int(size)
    return axes


def axes_of(entry: Entry) -> tuple[str, ...]:
    """The mesh axes of an entry."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def misfit(shape: Sequence[int], entries: Sequence[Entry], axes: Mapping[str, int]) -> str | None:
    """Why a tensor cannot be split so over a mesh; None if it can.

    Args:
      shape: the tensor's.
      entries: of each dimension; as many as there are dimensions, or fewer.
      axes: the mesh's axes and their sizes.
    """
    if len(entries) > len(shape):
        return f"the partition has {len(entries)} entries, for {len(shape)} dimensions"
    used: set[str] = set()
    for axis in (axis for entry in entries for axis in axes_of(entry)):
        if axis not in axes:
            return f"the mesh has no axis {axis!r}"
        if axis in used:
            return f"the axis {axis!r} is used twice"
        used.add(axis)
    for dimension, (size, entry) in enumerate(zip(shape, entries, strict=False)):
        parts = math.prod(axes[axis] for axis in axes_of(entry))
        if size % parts:
            over = " x ".join(f"{axis}={axes[axis]}" for axis in axes_of(entry))
            return f"dimension {dimension} has {size} elements, which do not divide over {over}"
    return None


def boxes(shape: Sequence[int], entries: Sequence[Entry], topology: Topology) -> list[Box]:
    """The box of a tensor that each device holds, in the devices' order.

    Args:
      shape: the tensor's.
      entries: of each dimension; may be fewer than there are dimensions.
      topology: the mesh.

    Raises:
      ArgumentError: the tensor cannot be split so.
    """
    problem = misfit(shape, entries, topology.axes)
    if problem:
        raise ArgumentError(
            "A tensor cannot be split so over this mesh.", field="partition", expected=str(topology), found=problem
        )
    ranges: list[Sequence[tuple[int, int]]] = []
    for dimension, size in enumerate(shape):
        split = axes_of(entries[dimension]) if dimension < len(entries) else ()
        places, parts = [0] * topology.devices, 1
        for axis in split:
            along = topology.axes[axis]
            places = [place * along + own for place, own in zip(places, topology.coordinates[axis], strict=True)]
            parts *= along
        part = size // parts
        each = [(n * part, (n + 1) * part) for n in range(parts)]
        ranges.append([each[place] for place in places])
    return list(zip(*ranges, strict=True)) if ranges else [()] * topology.devices
