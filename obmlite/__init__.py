"""Save a jitted JAX function with its parameters; load it anywhere, lazily, without its source."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from obmlite._collector import importing

with importing():
    from obmlite import frameworks, interop
    from obmlite._version import __version__
    from obmlite.device_assignment import devices_of
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
        SignatureError,
        UnknownNameError,
        UnsafePathError,
        UnsupportedFormatError,
    )
    from obmlite.function import Function, export
    from obmlite.loading import load
    from obmlite.model import Model
    from obmlite.pipeline import Pipeline, Step
    from obmlite.polymorphic import Polymorphic, PolymorphicFunction
    from obmlite.signature import Signature
    from obmlite.specs import TensorSpec, spec
    from obmlite.supplemental import Supplemental
    from obmlite.tree import register_node
    from obmlite.weights import LazyArray, Weights

if TYPE_CHECKING:
    from obmlite.foreign import open_weights

frameworks.install()
interop.install()

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
    "Polymorphic",
    "PolymorphicFunction",
    "RestoreError",
    "Signature",
    "SignatureError",
    "Step",
    "Supplemental",
    "TensorSpec",
    "UnknownNameError",
    "UnsafePathError",
    "UnsupportedFormatError",
    "Weights",
    "__version__",
    "devices_of",
    "export",
    "load",
    "open_weights",
    "register_node",
    "spec",
]

_LATER = {"open_weights": "obmlite.foreign"}
"""What few programs need: imported when it is asked for."""


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
