"""What is known of a tensor without its values: shape, dtype, weak type, and hints of where it lives."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np

from obmlite import dims, dtypes
from obmlite.errors import ExportError, LeafError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Dimension", "MeshSpec", "Partition", "TensorSpec", "spec"]

Dimension: TypeAlias = "int | dims.Expression"


class AxisType(enum.IntEnum):
    """A mesh axis' type. Numbers are the format's; append only."""

    AUTO = 1
    EXPLICIT = 2
    MANUAL = 3


@dataclasses.dataclass(frozen=True, slots=True)
class MeshSpec:
    """A mesh without devices.

    Attributes:
      names: axis names.
      sizes: devices along each axis.
      types: :class:`AxisType` of each axis.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    types: tuple[int, ...]

    @staticmethod
    def of(mesh: Any) -> MeshSpec:
        """What a mesh is besides its devices."""
        return MeshSpec(
            tuple(mesh.axis_names),
            tuple(mesh.shape[name] for name in mesh.axis_names),
            tuple(int(AxisType[kind.name.upper()]) for kind in mesh.axis_types),
        )

    def __str__(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in zip(self.names, self.sizes, strict=True))


UNCONSTRAINED = "?"
"""An entry of a partition spec that leaves its dimension to the compiler."""

Entry: TypeAlias = "str | tuple[str, ...] | None"


@dataclasses.dataclass(frozen=True, slots=True)
class Partition:
    """A partition spec: for each dimension the axes that it is split over.

    Attributes:
      entries: per dimension None (not split), the mesh axes, or :data:`UNCONSTRAINED`. May be shorter than the rank.
      mesh: the mesh that the axes belong to; None where the entries are logical axis names.
      unreduced: axes over which the value is still to be summed, sorted.
      reduced: axes over which the value's cotangent is, sorted.
    """

    entries: tuple[Entry, ...]
    mesh: MeshSpec | None = None
    unreduced: tuple[str, ...] = ()
    reduced: tuple[str, ...] = ()

    @staticmethod
    def of(sharding: Any) -> Partition | None:
        """The partition of a ``NamedSharding``; None for every other sharding, which names no axes."""
        if not isinstance(sharding, jax.sharding.NamedSharding) or not sharding.mesh.axis_names:
            return None
        mesh = sharding.mesh
        entries: list[Entry] = []
        # JAX refuses to iterate over a spec with unreduced or reduced axes; before it did, there was no `partitions`.
        for entry in getattr(sharding.spec, "partitions", sharding.spec):
            if entry is None or isinstance(entry, tuple):
                entries.append(entry or None)
            elif entry is jax.sharding.PartitionSpec.UNCONSTRAINED:
                entries.append(UNCONSTRAINED)
            else:
                entries.append((entry,))
        return Partition(
            tuple(entries),
            MeshSpec.of(mesh),
            tuple(sorted(getattr(sharding.spec, "unreduced", ()))),
            tuple(sorted(getattr(sharding.spec, "reduced", ()))),
        )

    def __str__(self) -> str:
        entries = ", ".join("None" if e is None else e if isinstance(e, str) else "+".join(e) for e in self.entries)
        return f"P({entries})"


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor, and what else a signature says of it.

    Attributes:
      shape: dimensions; an int, or an expression over symbols such as ``b`` or ``2*b``.
      kind: the dtype as the format knows it; :attr:`dtype` is JAX's.
      weak_type: whether JAX's type promotion treats it as it would a Python number.
      partition: the mesh axes over which it was, or should be, split.
      memory_kind: such as ``"pinned_host"``; None for a device's default memory.
      logical_axes: logical names of the dimensions, to be mapped to mesh axes by rules.
    """

    shape: tuple[Dimension, ...]
    kind: dtypes.DType
    weak_type: bool = False
    partition: Partition | None = None
    memory_kind: str | None = None
    logical_axes: Partition | None = None

    @staticmethod
    def of(value: Any) -> TensorSpec:
        """The spec of an array, of a Python number, or of anything that has ``shape`` and ``dtype``.

        Raises:
          LeafError: it is none of these, or its dtype is one that the format does not hold.
        """
        if isinstance(value, TensorSpec):
            return value
        # numpy's float64 and complex128 are Python numbers by inheritance alone: their dtype is not weak.
        if isinstance(value, (bool, int, float, complex)) and not isinstance(value, np.generic):
            return TensorSpec((), dtypes.of(value), weak_type=not isinstance(value, bool))
        shape = None if isinstance(value, type) else getattr(value, "shape", None)
        if shape is None or not hasattr(value, "dtype"):
            raise LeafError(
                "A leaf is neither an array nor a number.",
                expected="jax.Array, numpy.ndarray, jax.ShapeDtypeStruct, bool, int, float or complex",
                found=f"{type(value).__module__}.{type(value).__qualname__}",
                fix=f"obmlite.spec({value!r})" if isinstance(value, str) and value.endswith("]") else None,
            )
        # A tracer has none, and says so in a text that takes long to make: the whole trace is searched for it.
        sharding = None if isinstance(value, jax.core.Tracer) else getattr(value, "sharding", None)
        memory_kind = getattr(sharding, "memory_kind", None)
        if memory_kind is not None and memory_kind == _default_memory(sharding):
            memory_kind = None
        return TensorSpec(
            tuple(d if type(d) is int else dims.from_jax(d) for d in shape),
            dtypes.of(value),
            bool(getattr(value, "weak_type", False)),
            Partition.of(sharding),
            memory_kind,
        )

    @property
    def dtype(self) -> Any:
        """The dtype as JAX has it: a numpy dtype, or a key dtype."""
        return self.kind.jax

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def symbols(self) -> frozenset[str]:
        """The symbols in the shape."""
        return frozenset().union(*(d.symbols for d in self.shape if not isinstance(d, int)))

    def __str__(self) -> str:
        weak = "~" if self.weak_type else ""
        return f"{weak}{self.kind.short}[{','.join(str(d) for d in self.shape)}]"


def _default_memory(sharding: Any) -> str:
    """The memory that arrays are in unless told otherwise: worth no word in a spec."""
    try:
        return str(next(iter(sharding.device_set)).default_memory().kind)
    except (ValueError, NotImplementedError):  # an abstract mesh has no devices
        return "device"


def spec(text: Any) -> Any:
    """Describes an array by text: ``"f32[b,28,28,1]"``; maps over pytrees of text.

    A dimension is a number, or an expression over symbols such as ``b`` or ``2*b+1``; the grammar is in
    ``docs/format.md``. A dtype is its short or full name (``f32``, ``bfloat16``, ``key<threefry2x32>``). A ``~`` in
    front makes it weakly typed. Leaves that are no text are left as they are.

    Raises:
      ExportError: the text is malformed.
    """
    return jax.tree.map(lambda leaf: _parse(leaf) if isinstance(leaf, str) else leaf, text)


def _parse(text: str) -> TensorSpec:
    name, bracket, shape = text.strip().removesuffix("]").partition("[")
    if bool(bracket) != text.strip().endswith("]"):
        raise ExportError(
            "A spec is malformed.",
            field="spec",
            expected="a dtype and a shape, such as f32[b,28,28,1]",
            found=text[:80],
        )
    weak = name.startswith("~")
    return TensorSpec(dims.parse_shape(shape), dtypes.parse(name.removeprefix("~").strip()), weak)


def to_jax(specs: Sequence[TensorSpec], constraints: Sequence[str] = ()) -> list[jax.ShapeDtypeStruct]:
    """Specs as JAX has them, with all symbols in one new scope that has the constraints.

    Raises:
      ExportError: an expression or a constraint is malformed, or JAX refuses the constraints; it does not find every
        contradiction.
    """
    shapes = dims.to_jax([s.shape for s in specs], [dims.parse_constraint(c) for c in constraints])
    return [jax.ShapeDtypeStruct(shape, s.dtype, weak_type=s.weak_type) for shape, s in zip(shapes, specs, strict=True)]
