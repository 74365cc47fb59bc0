"""JAX's side of Orbax Model's names: functions and checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from obmlite.errors import ExportError
from obmlite.function import Function, export
from obmlite.interop.orbax_model import _checkpoints
from obmlite.interop.orbax_model._objects import ExternalValue, PendingFunction, convert_path_to_value

__all__ = [
    "ExternalValue",
    "convert",
    "convert_path_to_value",
    "get_shape_dtype_struct",
    "save_checkpoint",
    "to_shape_dtype_struct",
]


def convert(
    fun_jax: Callable[..., Any],
    args_spec: Sequence[Any],
    kwargs_spec: Mapping[str, Any] | None = None,
    platforms: Sequence[Any] | None = None,
    native_serialization_disabled_checks: Sequence[Any] = (),
) -> Function | PendingFunction:
    """Exports a function of JAX's.

    Args:
      fun_jax: the function; jitted or not.
      args_spec: for each positional argument a pytree of ``jax.ShapeDtypeStruct`` or arrays. As in Orbax Model's
        README, the first one may be left out if it is the weights: then the function is exported when the model is
        saved, for the weights that the orchestration names.
      kwargs_spec: the same for keyword arguments.
      platforms: of ``"cpu"``, ``"cuda"``, ``"rocm"`` and ``"tpu"``; left out, all four (Orbax Model had TPUs alone).
      native_serialization_disabled_checks: ``jax.export.DisabledSafetyCheck`` of custom calls.

    Raises:
      ExportError: the function cannot be exported as it is, or another check is to be disabled.
      LeafError: an argument or a result holds something that is neither an array nor a number.
    """
    args, kwargs = tuple(args_spec), dict(kwargs_spec or {})
    options: dict[str, Any] = {}
    if platforms is not None:
        options["platforms"] = [str(getattr(p, "name", p)).lower() for p in platforms]
    targets = [check.is_custom_call() for check in native_serialization_disabled_checks]
    if None in targets:
        raise ExportError(
            "Only the check of custom calls can be disabled.",
            field="native_serialization_disabled_checks",
            expected="jax.export.DisabledSafetyCheck.custom_call(…)",
            found=", ".join(map(str, native_serialization_disabled_checks)),
        )
    if targets:
        options["allow_custom_calls"] = targets
    if _lacks_first(fun_jax, args, kwargs):
        return PendingFunction(fun_jax, args, kwargs, options)
    return export(fun_jax, *args, kwargs=kwargs, **options)


def _lacks_first(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function can be called with one more argument in front, and not without."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return False
    for given, fits in ((args, False), ((None, *args), True)):
        try:
            signature.bind(*given, **kwargs)
        except TypeError:
            if fits:
                return False
        else:
            return fits
    return False


def to_shape_dtype_struct(value: Any) -> Any:
    """An array's shape, dtype and sharding."""
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=getattr(value, "sharding", None))


def get_shape_dtype_struct(tree: Any) -> Any:
    """The same for each leaf of a pytree."""
    return jax.tree.map(to_shape_dtype_struct, tree)


def save_checkpoint(state: Any, path: Any) -> None:
    """Saves a pytree of arrays as an Orbax checkpoint, for :func:`convert_path_to_value`.

    Args:
      state: the pytree.
      path: a directory that is not there yet.

    Raises:
      ImportError: orbax-checkpoint is not installed.
    """
    _checkpoints.write(state, path)
