"""What Orbax Model had in ``core``: objects, options, saving and loading."""

from __future__ import annotations

from obmlite.device_assignment import device as DeviceAssignment  # noqa: N812 - Orbax Model's name
from obmlite.device_assignment import devices_of as mesh_to_device_assignment
from obmlite.interop.orbax_model._objects import (
    ORBAX_CHECKPOINT,
    ExternalValue,
    GlobalSupplemental,
    SaveOptions,
    UnstructuredData,
    convert_path_to_value,
)
from obmlite.interop.orbax_model._save import save
from obmlite.loading import load
from obmlite.schema.records import Visibility

__all__ = [
    "ORBAX_CHECKPOINT",
    "DeviceAssignment",
    "ExternalValue",
    "GlobalSupplemental",
    "SaveOptions",
    "UnstructuredData",
    "Visibility",
    "convert_path_to_value",
    "load",
    "mesh_to_device_assignment",
    "save",
]
