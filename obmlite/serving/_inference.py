"""What the Open Inference Protocol over HTTP and over gRPC have in common: names of datatypes, states, versions.

Source: github.com/kserve/open-inference-protocol, and Triton's extension_model_repository.md.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Final

import numpy as np

from obmlite.serving.servable import State
from obmlite.serving.status import Code, ServingError

__all__ = ["PLATFORM", "SERVER", "STATES", "datatype", "version_number"]

SERVER: Final = "obmlite"
"""The server's name."""

PLATFORM: Final = "obmlite_stablehlo"
"""What a model is, ``<project>_<format>``."""

STATES: Final = {
    State.UNKNOWN: "UNKNOWN",
    State.START: "LOADING",
    State.LOADING: "LOADING",
    State.AVAILABLE: "READY",
    State.UNLOADING: "UNLOADING",
    State.END: "UNAVAILABLE",
}
"""The repository index's names."""

_DATATYPES: Final = {
    "bool": "BOOL", "object": "BYTES", "bfloat16": "BF16", "float16": "FP16", "float32": "FP32", "float64": "FP64",
    **{f"{u}int{n}": f"{u.upper()}INT{n}" for u in ("", "u") for n in (8, 16, 32, 64)},
}  # fmt: skip


@functools.cache  # numpy makes a dtype's name anew each time
def datatype(dtype: np.dtype[Any]) -> str:
    """The protocol's name of a dtype; numpy's in capitals for those that it has none for."""
    return "BYTES" if dtype.kind in "OSUT" else _DATATYPES.get(dtype.name, dtype.name.upper())


def version_number(name: str, version: str) -> int:
    """The number of a version; the protocol's versions are texts.

    Raises:
      ServingError: NOT_FOUND, it is no number, so there is no such version.
    """
    if not re.fullmatch(r"[0-9]{1,18}", version):
        raise ServingError(Code.NOT_FOUND, f"Servable not found for request: Specific({name}, {version[:40]})")
    return int(version)
