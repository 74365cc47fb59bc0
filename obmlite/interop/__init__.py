"""Other libraries' formats and interfaces, each optional and imported when it is used."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from obmlite.pipeline import HostStep, register_host_step

if TYPE_CHECKING:
    from obmlite.supplemental import Supplemental

_STEPS = {"application/x.obmlite-tensorflow-function": "tensorflow_steps"}
"""MIME type of a supplemental that describes a step → the module here whose ``Step`` runs it."""


def _step(module: str, name: str, supplementals: Mapping[str, Supplemental]) -> HostStep:
    step: HostStep = importlib.import_module(f"{__name__}.{module}").Step(name, supplementals)
    return step


def install() -> None:
    """Lets pipelines have other runtimes' functions as steps."""
    for mime_type, module in _STEPS.items():
        register_host_step(mime_type, functools.partial(_step, module))
