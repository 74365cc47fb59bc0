"""The devices that a model was made for, by where they are in the machine: kept and shown, and nothing more."""

from __future__ import annotations

from typing import Any

from obmlite.errors import ArgumentError
from obmlite.schema.records import DeviceRecord

__all__ = ["DeviceRecord", "device", "devices_of"]


def devices_of(mesh: Any) -> tuple[DeviceRecord, ...]:
    """The devices of a ``jax.sharding.Mesh``, in its order, with their coordinates where they have any (TPUs)."""
    return tuple(device(d.id, getattr(d, "coords", None), getattr(d, "core_on_chip", None)) for d in mesh.devices.flat)


def device(number: int, coords: Any = None, core_on_chip: int | None = None) -> DeviceRecord:
    """One device.

    Args:
      number: as JAX numbers devices; at least 0.
      coords: of its chip: integers.
      core_on_chip: which core of the chip; at least 0. Both are given or neither.

    Raises:
      ArgumentError: only one of them is given, or a number is out of range.
    """
    coords = tuple(int(c) for c in coords) if coords is not None else None
    if (coords is None) != (core_on_chip is None) or coords == ():
        raise ArgumentError(
            "A device's coordinates and its core are given together or not at all.",
            field="device_assignment",
            expected="coords=(x, y, z) and core_on_chip=n, or neither",
            found=f"coords={coords}, core_on_chip={core_on_chip}",
        )
    if not 0 <= number < 1 << 32 or any(abs(c) >= 1 << 31 for c in coords or ()) or (core_on_chip or 0) < 0:
        raise ArgumentError("A device's number is out of range.", field="device_assignment", found=str(number))
    return DeviceRecord(number, coords, core_on_chip)
