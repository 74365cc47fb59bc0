"""Host buffers → ``jax.Array``, at the cost of one call into JAX's runtime for each array.

Public JAX takes some 20 µs of Python for each array on one device and 40 µs for each on eight. What it calls in the end
takes 3 and 15, but is private: ``jax._src.lib.xla_client.batched_device_put(aval, sharding, buffers, devices,
committed)``, seen in JAX 0.9.2, 0.10.2 and 0.12.0. Where that is missing, public JAX is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from obmlite.plan import Box, boxes
from obmlite.specs import TensorSpec

try:
    from jax._src.lib import xla_client as _runtime

    _batched: Callable[..., Any] | None = _runtime.batched_device_put
except (ImportError, AttributeError):  # another JAX than those above
    _batched = None


class Placer:
    """Makes arrays of one sharding."""

    def __init__(self, sharding: jax.sharding.Sharding | None) -> None:
        """Looks up the devices.

        Args:
          sharding: where arrays go; None for the default device, uncommitted.
        """
        self._committed = sharding is not None
        if sharding is None:
            # Asks JAX: the default device may be set globally, for a thread, or by the name of a platform.
            sharding = jax.device_put(np.zeros((), np.uint8)).sharding
        self.sharding: Any = sharding

    @functools.cached_property
    def on_cpu(self) -> bool:
        """Whether the devices' memory is the host's, so that buffers are used in place where they are aligned."""
        return all(device.platform == "cpu" for device in self.sharding.device_set)

    @functools.cached_property
    def in_other_memory(self) -> bool:
        """Whether arrays go to another memory than the devices' usual one."""
        kind = self.sharding.memory_kind
        devices = self.sharding.addressable_devices
        return kind is not None and any(kind != device.default_memory().kind for device in devices)

    def boxes(self, shape: tuple[int, ...]) -> tuple[Box, ...]:
        """The box of a shape that each of this process' devices holds, in the sharding's order."""
        return self._devices_boxes(shape)[1]

    def devices(self, shape: tuple[int, ...]) -> list[Any]:
        """This process' devices, in the sharding's order, for a shape that it fits."""
        return self._devices_boxes(shape)[0]

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - a placer lives for one restore
    def _devices_boxes(self, shape: tuple[int, ...]) -> tuple[list[Any], tuple[Box, ...]]:
        indices = self.sharding.addressable_devices_indices_map(shape)
        return list(indices), tuple([boxes.of_index(index, shape) for index in indices.values()])

    def is_plain(self, shape: tuple[int, ...]) -> bool:  # noqa: ARG002 - of subclasses
        """Whether arrays of a shape are made of what this process' devices hold alone."""
        return True

    def leaf(self, spec: TensorSpec, buffers: Sequence[Any], dtype: Any) -> Any:
        """A leaf.

        Args:
          spec: its spec.
          buffers: as for :meth:`place`; of a PRNG key its key data.
          dtype: dtype of the buffers.
        """
        shape: tuple[int, ...] = spec.shape  # type: ignore[assignment]
        if not spec.kind.is_key:
            return self.place(shape, buffers, dtype, weak=spec.weak_type)
        data = self.place((*shape, *spec.kind.key_data_shape), buffers, dtype)
        return jax.random.wrap_key_data(data, impl=spec.kind.impl)

    def joined(self, spec: TensorSpec, shards: Mapping[Any, Any], dtype: Any) -> Any:
        """A leaf of what is on this process' devices already.

        Args:
          spec: its spec.
          shards: device → single-device array of its box; of a PRNG key its key data.
          dtype: their dtype.
        """
        shape: tuple[int, ...] = spec.shape  # type: ignore[assignment]
        tail = spec.kind.key_data_shape if spec.kind.is_key else ()
        local = [shards[device] for device in self.devices(shape)]
        array = jax.make_array_from_single_device_arrays((*shape, *tail), self.sharding, local, dtype=dtype)
        return jax.random.wrap_key_data(array, impl=spec.kind.impl) if spec.kind.is_key else array

    def place(self, shape: tuple[int, ...], buffers: Sequence[Any], dtype: Any, *, weak: bool = False) -> Any:
        """An array.

        Args:
          shape: its shape.
          buffers: what each of this process' devices holds, in the order of :meth:`boxes`; read-only host arrays. On
            CPU those that are aligned are used in place, and must not change any more.
          dtype: its dtype.
          weak: whether it is weakly typed.
        """
        return self.maker(shape, dtype, weak)(list(buffers))

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - a placer lives for one restore
    def maker(self, shape: tuple[int, ...], dtype: Any, weak: bool) -> Callable[[list[Any]], Any]:
        """:meth:`place` for arrays of one kind."""
        devices, sharding, committed = self.devices(shape), self.sharding, self._committed
        put = _batched

        def public(buffers: list[Any]) -> Any:
            if not committed:
                return jax.device_put(buffers[0])
            local = jax.device_put(buffers, singles)
            return jax.make_array_from_single_device_arrays(shape, sharding, local, dtype=dtype)

        def explicit(buffers: list[Any]) -> Any:
            if not types:  # JAX says it of an array that it made
                types.append(jax.typeof(public(buffers)).update(weak_type=weak))
            return put(types[0], sharding, buffers, devices, committed)  # type: ignore[misc]

        kind = sharding.memory_kind
        singles = [jax.sharding.SingleDeviceSharding(device, memory_kind=kind) for device in devices]
        types: list[Any] = []
        if put is None or not devices or self.in_other_memory:
            return public
        if _explicit(sharding):
            return explicit
        aval = jax.core.ShapedArray(shape, dtype, weak_type=weak)
        return lambda buffers: put(aval, sharding, buffers, devices, committed)


def _explicit(sharding: Any) -> bool:
    """Whether arrays of a sharding have it in their type."""
    mesh = getattr(sharding, "mesh", None)
    return mesh is not None and any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types)
