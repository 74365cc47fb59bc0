"""Save a jitted JAX function with its parameters; load it anywhere, lazily, without its source."""

from obmlite import frameworks
from obmlite._version import __version__
from obmlite.errors import (
    ArgumentError,
    CoordinationError,
    CorruptPackageError,
    ExportError,
    LeafError,
    MissingFileError,
    ObmliteError,
    PackageExistsError,
    PackageNotFoundError,
    PlatformError,
    RestoreError,
    UnknownNameError,
    UnsafePathError,
    UnsupportedFormatError,
)
from obmlite.foreign import open_weights
from obmlite.function import Function, export
from obmlite.loading import load
from obmlite.model import Model
from obmlite.pipeline import Pipeline
from obmlite.signature import Signature
from obmlite.specs import TensorSpec, spec
from obmlite.tree import register_node
from obmlite.weights import LazyArray, Weights

frameworks.install()

__all__ = [
    "ArgumentError",
    "CoordinationError",
    "CorruptPackageError",
    "ExportError",
    "Function",
    "LazyArray",
    "LeafError",
    "MissingFileError",
    "Model",
    "ObmliteError",
    "PackageExistsError",
    "PackageNotFoundError",
    "Pipeline",
    "PlatformError",
    "RestoreError",
    "Signature",
    "TensorSpec",
    "UnknownNameError",
    "UnsafePathError",
    "UnsupportedFormatError",
    "Weights",
    "__version__",
    "export",
    "load",
    "open_weights",
    "register_node",
    "spec",
]
