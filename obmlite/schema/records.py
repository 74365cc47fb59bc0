"""What a manifest says, as frozen dataclasses. ``docs/format.md`` gives the meaning of each field in full."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from obmlite.specs import MeshSpec, TensorSpec
from obmlite.tree import Tree

FORMAT_MAJOR = 1
FORMAT_MINOR = 1
READER = "obmlite 0.1 or later"
"""Written into every manifest: which obmlite reads it."""

KNOWN_FEATURES: frozenset[str] = frozenset()
"""Features beyond the format's first version that this reader knows, for the ``required`` fields."""

CHUNK_SIZE = 8 << 20
"""Bytes that one chunk digest covers."""

MAX_FUNCTION_BYTES = (1 << 31) - 1
"""Bytes of a function's file, which is read whole: what jax.export's own flatbuffer can address."""

Indices = np.ndarray[Any, np.dtype[np.int64]]


class FileKind(enum.IntEnum):
    """What a data file holds."""

    FUNCTION = 1
    WEIGHTS = 2
    SUPPLEMENTAL = 3


class ModuleFormat(enum.IntEnum):
    """How a function's file wraps its StableHLO."""

    JAX_EXPORT = 1
    PORTABLE_ARTIFACT = 2


class ArgumentKind(enum.IntEnum):
    """How an argument may be given."""

    POSITIONAL_ONLY = 1
    POSITIONAL_OR_KEYWORD = 2
    KEYWORD_ONLY = 3


class FixedKind(enum.IntEnum):
    """Why an argument was fixed when exporting."""

    STATIC = 1
    DEFAULT = 2


class Visibility(enum.IntEnum):
    """Whether an object is meant for users of the package or only for its other objects."""

    PUBLIC = 1
    PRIVATE = 2


class StepRole(enum.IntEnum):
    """What a function does in a pipeline."""

    PRE_PROCESSOR = 1
    MODEL = 2
    POST_PROCESSOR = 3


class SupplementalForm(enum.IntEnum):
    """Where a supplemental's bytes are."""

    INLINE = 1
    FILE = 2
    DIRECTORY = 3


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A data file. ``digest`` is that of a weights file's header, and of all bytes of any other file."""

    path: str
    length: int
    kind: FileKind
    digest: bytes


@dataclass(frozen=True, slots=True)
class Binding:
    """An argument (or a subtree of one, by name) that takes a weights object (or a subtree of it)."""

    argument: str
    weights: str
    subtree: str = ""


@dataclass(frozen=True, slots=True)
class Capture:
    """A leaf of a weights object that a module takes as argument number ``argument``."""

    weights: str
    leaf: int
    differentiable: bool
    argument: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRecord:
    """One StableHLO module with what calling it needs.

    ``kept`` None means that it takes all arguments. ``traced`` is how many arguments it was traced with; those behind
    were hoisted from its code. ``mesh`` is the one that the function fixes, if it does.
    """

    file: str
    format: ModuleFormat
    offset: int
    length: int
    stablehlo_version: str
    calling_convention: int
    platforms: tuple[str, ...]
    num_devices: int
    arguments: tuple[TensorSpec, ...]
    results: tuple[TensorSpec, ...]
    traced: int
    mesh: MeshSpec | None = None
    kept: tuple[int, ...] | None = None
    donated: tuple[int, ...] = ()
    captures: tuple[Capture, ...] = ()
    ordered_effects: tuple[str, ...] = ()
    unordered_effects: tuple[str, ...] = ()
    disabled_checks: tuple[str, ...] = ()
    uses_global_constants: bool = False
    custom_calls: tuple[str, ...] = ()
    dialects: tuple[str, ...] = ()
    jax_version: str = ""
    jaxlib_version: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class FixedArgument:
    """An argument that was fixed when exporting; ``held`` says whether ``value`` could be stored."""

    name: str
    kind: FixedKind
    held: bool
    value: Any
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectRecord:
    """What every object has."""

    name: str
    required: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionRecord(ObjectRecord):
    """A function: its signature (an ARGUMENTS tree, an output tree) and its modules."""

    inputs: Tree
    outputs: Tree
    argument_kinds: tuple[ArgumentKind, ...]
    primal: ModuleRecord
    fixed: tuple[FixedArgument, ...] = ()
    constraints: tuple[str, ...] = ()
    bindings: tuple[Binding, ...] = ()
    vjps: tuple[ModuleRecord, ...] = ()
    compile_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    visibility: Visibility = Visibility.PUBLIC


@dataclass(frozen=True, slots=True, kw_only=True)
class PolymorphicRecord(ObjectRecord):
    """Several functions under one name."""

    functions: tuple[str, ...]
    visibility: Visibility = Visibility.PUBLIC


@dataclass(frozen=True, slots=True)
class Piece:
    """A hyper-rectangle of a tensor in one file.

    Attributes:
      file: path of the weights file.
      name: the tensor's name in that file.
      begin: first index along each dimension, in logical elements.
      shape: extent along each dimension.
      digests: SHA-256 of each chunk of the piece's bytes, one after the other.
    """

    file: str
    name: str
    begin: tuple[int, ...]
    shape: tuple[int, ...]
    digests: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsRecord(ObjectRecord):
    """A pytree of tensors.

    Attributes:
      tree: the pytree; names of leaves come from it.
      specs: of each leaf.
      leaf_tensor: for each leaf its tensor, -1 for float0, which has none.
      tensor_leaf: for each tensor the leaf that it is named after.
      pieces: of each tensor.
    """

    tree: Tree
    specs: tuple[TensorSpec, ...]
    leaf_tensor: Indices
    tensor_leaf: Indices
    pieces: tuple[tuple[Piece, ...], ...]
    visibility: Visibility = Visibility.PUBLIC


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One function of a pipeline."""

    role: StepRole
    function: str
    bindings: tuple[Binding, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineRecord(ObjectRecord):
    """Pre-processors, at most one model function, post-processors."""

    steps: tuple[StepRecord, ...]
    pass_through: bool = False
    visibility: Visibility = Visibility.PUBLIC


@dataclass(frozen=True, slots=True, kw_only=True)
class SupplementalRecord(ObjectRecord):
    """An attachment. ``entries`` maps paths within it to data files; a folder's path ends in ``/`` and has none."""

    form: SupplementalForm
    mime_type: str = ""
    version: str = ""
    function: str = ""
    inline: bytes = b""
    entries: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """A device that a package was made for.

    Attributes:
      id: as JAX numbers the devices of a program.
      coords: where its chip is in the machine, of a TPU; None for others.
      core_on_chip: which core of the chip it is, where ``coords`` are.
    """

    id: int
    coords: tuple[int, ...] | None = None
    core_on_chip: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestRecord:
    """The whole manifest. The mappings of objects, by name, may decode a record only when it is asked for."""

    producer: str
    files: Mapping[str, FileRecord]
    functions: Mapping[str, FunctionRecord] = field(default_factory=dict)
    polymorphic: Mapping[str, PolymorphicRecord] = field(default_factory=dict)
    weights: Mapping[str, WeightsRecord] = field(default_factory=dict)
    pipelines: Mapping[str, PipelineRecord] = field(default_factory=dict)
    supplementals: Mapping[str, SupplementalRecord] = field(default_factory=dict)
    default_pipeline: str = ""
    device_assignment: tuple[DeviceRecord, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    format: tuple[int, int] = (FORMAT_MAJOR, FORMAT_MINOR)
    reader: str = READER
    digest: bytes = b""
