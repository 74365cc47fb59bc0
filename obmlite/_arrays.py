"""Between JAX's arrays and numpy's: what is saved of a leaf, and how one is made of what was saved."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import jax
import numpy as np

from obmlite import dtypes
from obmlite.errors import ExportError, LeafError, RestoreError
from obmlite.io import digest
from obmlite.plan import Box, boxes
from obmlite.specs import TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]

ALIGNMENT = 64
"""Bytes to which a host buffer must be aligned for XLA's CPU client to use it in place (seen in jaxlib 0.9 to 0.12)."""


def check_leaf(leaf: Any) -> TensorSpec:
    """The spec of a leaf that can be saved.

    Raises:
      LeafError: it is no array or number, has been deleted, or is being traced.
    """
    spec = TensorSpec.of(leaf)
    if isinstance(leaf, jax.core.Tracer):
        raise LeafError(
            "A leaf is being traced and has no value to save.",
            found=str(leaf)[:200],
            fix="save outside of jit and grad",
        )
    if isinstance(leaf, jax.Array):
        if leaf.is_deleted():
            raise LeafError(
                "A leaf's buffer was deleted, most likely because it was donated to a jitted function.",
                found=f"deleted {spec}",
                fix="save before donating, or save the function's result instead",
            )
    elif isinstance(leaf, (jax.ShapeDtypeStruct, TensorSpec)):
        raise LeafError("A leaf has a shape and a dtype but no values to save.", found=str(spec))
    return spec


def to_host(leaf: Any, spec: TensorSpec) -> Array:
    """A leaf's values in host memory, without a copy where they are there already; a key's are its key data."""
    if isinstance(leaf, (bool, int, float, complex)):
        return np.asarray(leaf, spec.kind.numpy)
    if spec.kind.is_key and isinstance(leaf, jax.Array):
        return np.asarray(jax.random.key_data(leaf))
    held = np.asarray(leaf)
    return held if held.dtype.isnative else held.astype(held.dtype.newbyteorder("="))


def read_box(leaf: Any, spec: TensorSpec, box: Box) -> Array:
    """A box of a leaf as :func:`to_host` gives it; of an array that lies on several processes, from the shards here.

    Raises:
      LeafError: no shard of this process has all of the box.
    """
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return _part(to_host(leaf, spec), box)
    shape: tuple[int, ...] = spec.shape  # type: ignore[assignment]
    for shard in leaf.addressable_shards:
        own = boxes.of_index(shard.index[: len(shape)], shape)  # a key's shard has dimensions of its key data too
        if all(a <= c and d <= b for (a, b), (c, d) in zip(own, box, strict=True)):
            return _part(to_host(shard.data, spec), boxes.relative(box, own))
    raise LeafError(
        "A leaf lies partly on other processes' devices.",
        expected="arrays that this process can read whole",
        found=str(leaf.sharding),
        fix="save from all processes, or gather it first, as with jax.experimental.multihost_utils.process_allgather",
    )


def _part(held: Array, box: Box) -> Array:
    index: tuple[Any, ...] = (*boxes.slices(box), ...)  # with the dots an array also where there are no dimensions
    part: Array = held[index]
    return part


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An uninitialised array that XLA's CPU client can use in place."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + nbytes].view(dtype).reshape(shape)


def is_aligned(array: Array) -> bool:
    """Whether XLA's CPU client can use an array in place."""
    return bool(array.ctypes.data % ALIGNMENT == 0)


def aligned(array: Array) -> Array:
    """An array that XLA's CPU client can use in place: the same, or a read-only copy."""
    if is_aligned(array):
        return array
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    copy.flags.writeable = False
    return copy


_FAMILIES = (np.floating, np.integer, np.complexfloating)


def _target(dtype: Any) -> tuple[np.dtype[Any], Any]:
    """The dtype that a request names, and its family."""
    try:
        target = dtypes.parse(dtype).numpy if isinstance(dtype, str) else np.dtype(dtype)
    except (TypeError, ExportError) as error:
        raise RestoreError(
            "There is no dtype of that name.", field="dtype", expected="such as float32 or bfloat16", found=repr(dtype)
        ) from error
    for family in _FAMILIES:
        if jax.dtypes.issubdtype(target, family):
            return target, family
    raise RestoreError(
        "Weights cannot be cast to this dtype.",
        field="dtype",
        expected="a float, integer or complex dtype",
        found=target,
    )


def same_family(spec: TensorSpec, dtype: Any) -> bool:
    """Whether a leaf may be cast to a dtype: floats become floats, integers integers, complex numbers such."""
    _, family = _target(dtype)
    if spec.kind.is_key or not spec.kind.storage:
        return False
    if family is np.floating and spec.kind.name.startswith("float"):  # JAX 0.9 does not know floats of 6 bits as such
        return True
    return bool(jax.dtypes.issubdtype(spec.kind.numpy, family))


def cast_to(spec: TensorSpec, dtype: Any) -> np.dtype[Any] | None:
    """The dtype that a request turns a leaf into; None for no change."""
    if dtype is None or not same_family(spec, dtype):
        return None
    target, _ = _target(dtype)
    return target if target != spec.kind.numpy else None


def cast(value: Any, target: np.dtype[Any]) -> Any:
    """An array of a dtype of the same family."""
    if isinstance(value, np.ndarray) and not np.can_cast(value.dtype, target, "unsafe"):
        # ml_dtypes has no casts between some of its own; each of those dtypes is held exactly by the one between.
        value = value.astype(np.float32 if jax.dtypes.issubdtype(target, np.floating) else np.int32)
    # At compile time as in to_device. What is out of range becomes infinite without a warning, as JAX has it.
    with jax.ensure_compile_time_eval(), np.errstate(over="ignore", invalid="ignore"):
        return value.astype(target)


def check_x64(spec: TensorSpec, name: str, target: np.dtype[Any] | None) -> None:
    """Refuses what JAX would silently narrow, or does not hold at all.

    Raises:
      RestoreError: the leaf has 64-bit numbers and ``jax_enable_x64`` is off, or JAX has no arrays of its dtype.
    """
    wanted = target or (None if spec.kind.is_key or not spec.kind.storage else spec.kind.numpy)
    if wanted is None:
        return
    canonical = jax.dtypes.canonicalize_dtype(wanted)
    if canonical != wanted:
        raise RestoreError(
            "A leaf has 64-bit numbers, which JAX holds only with jax_enable_x64.",
            leaf=name,
            expected=str(canonical),
            found=str(wanted),
            fix=f'jax.config.update("jax_enable_x64", True), or restore(dtype="{canonical}")',
        )
    if wanted.kind == "V" and not _on_device(wanted):
        raise RestoreError(
            "A leaf is of a dtype that this JAX cannot put on a device.",
            leaf=name,
            found=str(wanted),
            fix="restore(dtype=…), or a later JAX",
        )


@functools.lru_cache(maxsize=64)
def _on_device(dtype: np.dtype[Any]) -> bool:
    """Whether JAX makes arrays of one of ml_dtypes' dtypes; it names some (those of 6 bits) that it does not."""
    try:
        jax.device_put(np.zeros(1, dtype))
    except (TypeError, RuntimeError):
        return False
    return True


def nbytes(spec: TensorSpec) -> int:
    """Bytes of a leaf's storage; 0 for float0."""
    shape: tuple[int, ...] = spec.shape  # type: ignore[assignment]
    return spec.kind.storage_nbytes(shape)


def number_of(spec: TensorSpec) -> int:
    """Number of elements."""
    return int(np.prod([int(d) for d in spec.shape], dtype=np.int64))  # type: ignore[arg-type]


def content_digest(value: Any) -> bytes:
    """Equal for arrays of the same dtype, shape and bytes."""
    key = jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended)
    held = np.asarray(jax.random.key_data(value)) if key else np.asarray(value)
    state = hashlib.sha256(f"{value.dtype} {held.shape}".encode())
    state.update(digest.flat(np.ascontiguousarray(held)))
    return state.digest()
