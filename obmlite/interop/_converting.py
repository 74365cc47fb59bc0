"""Conversion in a child process: OpenVINO's telemetry forks, and jax2onnx patches JAX and Flax while it traces.

The child (:mod:`obmlite.interop._conversion`) gets the function as a package and writes a file, so nothing of a
converter is ever imported here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from typing import Any

import jax

from obmlite.errors import ExportError
from obmlite.interop._flattened import Flattened
from obmlite.model import Model

__all__ = ["convert", "require"]

TIMEOUT = 3600
"""Seconds that a conversion may take."""


def require(modules: Collection[str], what: str, extra: str) -> None:
    """Refuses if a module is not installed.

    Raises:
      ImportError: it is not; the text says what needs it, and how to install it.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{what} needs {', '.join(missing)}: pip install 'obmlite[{extra}]'")


def convert(flat: Flattened, target: str, output: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Converts a function.

    Args:
      flat: the function.
      target: ``"onnx"`` or ``"openvino"``.
      output: the file to be written; what is there is replaced.
      options: the target's.

    Returns:
      What the child says of it: ``route``, and ``why``.

    Raises:
      ExportError: the function holds what cannot be converted; the text says which operation, as far as it is known.
    """
    with tempfile.TemporaryDirectory(prefix="obmlite-") as folder:
        package = os.path.join(folder, "function.obm")
        Model({"function": flat.function.named("function")}).save(package)
        task = {
            "package": package,
            "target": target,
            "output": os.path.abspath(output),
            "inputs": flat.inputs,
            "outputs": flat.outputs,
            "report": os.path.join(folder, "report.json"),
            **options,
        }
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_X64": str(bool(jax.config.jax_enable_x64)),
            "CI": "true",  # OpenVINO's telemetry sends nothing, and forks nothing, where this is set
            # jax2onnx compiles dozens of small things when it is imported: 3 s less of 8.
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        done = subprocess.run(
            [sys.executable, "-m", "obmlite.interop._conversion"],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            env=environment,
            timeout=TIMEOUT,
            check=False,
        )
        try:
            with open(task["report"], encoding="utf-8") as stream:
                report: dict[str, Any] = json.load(stream)
        except FileNotFoundError:
            report = {"error": f"exit status {done.returncode}: {done.stderr[-2000:].strip()}"}
    if "error" in report:
        raise ExportError(
            f"The function cannot be converted to {target}.",
            object=flat.function.name,
            field=report.get("field"),
            found=report["error"],
            fix=report.get("fix"),
        )
    return report
