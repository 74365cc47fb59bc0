"""How tensors are split over devices where a restore is onto several. JAX is imported only when one is made."""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["DEVICES", "LAYOUTS", "Layout"]

DEVICES = 8

LAYOUTS = {"leading": 0, "last": -1, "replicated": None}
"""Name → the dimension that is split; None where each device holds all."""


class Layout:
    """One of :data:`LAYOUTS` on :data:`DEVICES` devices; what does not divide is replicated."""

    def __init__(self, name: str) -> None:
        """Starts JAX; the process must have been started with that many devices."""
        import jax
        import numpy as np

        self.dimension = LAYOUTS[name]
        self._mesh = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("x",))
        self.sharding = functools.lru_cache(maxsize=None)(self._sharding)

    def _sharding(self, shape: tuple[int, ...]) -> Any:
        import jax

        entries: list[str | None] = [None] * len(shape)
        if self.dimension is not None and shape and shape[self.dimension] % DEVICES == 0:
            entries[self.dimension] = "x"
        return jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec(*entries))
