"""Inside ``shard_map`` JAX types values by the mesh axes over which they vary, and a loop's carry or a conditional's
branches have to agree on them. StableHLO says nothing of it: where anything varies, what they carry is made to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

__all__ = ["axes_of", "vary"]


def axes_of(values: Iterable[Any]) -> frozenset[str]:
    """The axes over which any of some values varies."""
    return frozenset().union(*map(_varying, values), ())


def vary(value: Any, axes: frozenset[str]) -> Any:
    """A value that varies over all of some axes."""
    missing = tuple(sorted(axes - _varying(value))) if axes else ()
    return jax.lax.pcast(value, missing, to="varying") if missing else value


def _varying(value: Any) -> frozenset[str]:
    aval = jax.typeof(value)
    manual = getattr(aval, "manual_axis_type", None)  # from JAX 0.10 on; before it, `vma`
    return frozenset(manual.varying if manual is not None else getattr(aval, "vma", ()))
