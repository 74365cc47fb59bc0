"""How a saved module runs: the boundary between JAX's errors and ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import export as jax_export

from obmlite.errors import ArgumentError, ObmliteError, PlatformError, UnsupportedFormatError
from obmlite.schema.records import ModuleRecord

FlatCall = Callable[[Sequence[Any]], Sequence[Any]]


def load(module: ModuleRecord, blob: bytes) -> FlatCall:
    """A call over flat leaves, to be traced under ``jax.jit``.

    Args:
      module: what the manifest says of the module.
      blob: the file's bytes; their digest has been checked.

    Raises:
      UnsupportedFormatError: this JAX does not read it.
    """
    try:
        exported = jax_export.deserialize(bytearray(blob))
    except Exception as error:
        raise UnsupportedFormatError(
            "This JAX does not read the function.",
            expected=f"jax {jax.__version__}",
            found=f"saved with jax {module.jax_version}: {error}"[:300],
            fix=f"load it with a JAX near {module.jax_version}",
        ) from error

    def call(leaves: Sequence[Any]) -> Sequence[Any]:
        result: Sequence[Any] = exported.call(*leaves)
        return result

    return call


def explain(error: Exception, module: ModuleRecord, leaves: Sequence[Any]) -> ObmliteError | None:
    """What lies behind an error that JAX raised when a function with good arguments ran; None if not known."""
    platform = _platform(leaves)
    names = {"gpu": {"cuda", "rocm"}}.get(platform, {platform})
    if not names & set(module.platforms):
        return PlatformError(
            "The function was not exported for the platform that it is to run on.",
            field="platforms",
            expected=", ".join(module.platforms),
            found=platform,
            fix=f"export it with platforms= that include {platform}, or move its arguments",
        )
    text = str(error)
    if "Failed to deserialize StableHLO" in text or "deserialize StableHLO" in text:
        return UnsupportedFormatError(
            "This JAX does not run the function.",
            expected=f"StableHLO that jax {jax.__version__} reads",
            found=f"StableHLO {module.stablehlo_version}, saved with jax {module.jax_version}",
            fix=f"load it with jax {module.jax_version} or later",
        )
    if "Error refining shapes" in text or "refinement" in text:
        return ArgumentError("The shapes of the arguments do not fit the function.", found=text[:300])
    return None


def _platform(leaves: Sequence[Any]) -> str:
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.committed:
            return str(next(iter(leaf.sharding.device_set)).platform)
    device = jax.config.jax_default_device
    return str(getattr(device, "platform", device) or jax.default_backend())
