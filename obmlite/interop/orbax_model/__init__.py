"""Orbax Model's names: its documented usage runs with changed imports, and gives a package of obmlite's.

    from obmlite.interop.orbax_model import core as obm, jax2obm, tf2obm
    from obmlite.interop import orbax_model as oex

``docs/orbax_model.md`` says what is the same, what is better and what is not here.
"""

from __future__ import annotations

from obmlite.interop.orbax_model import core, jax2obm, tf2obm
from obmlite.interop.orbax_model._carried import read_checkpoints
from obmlite.interop.orbax_model._objects import Orchestration, orchestration
from obmlite.interop.orbax_model.core import GlobalSupplemental, SaveOptions, convert_path_to_value, load, save
from obmlite.interop.orbax_model.jax2obm import convert

__all__ = [
    "GlobalSupplemental",
    "Orchestration",
    "SaveOptions",
    "convert",
    "convert_path_to_value",
    "core",
    "jax2obm",
    "load",
    "orchestration",
    "read_checkpoints",
    "save",
    "tf2obm",
]
