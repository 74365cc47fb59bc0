"""Files of tests that run as programs too, in a process that has several devices.

How many devices there are is settled when JAX starts, so checks that need several run in a process of their own.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def on_devices(file: str, *arguments: object, count: int = 8, timeout: float = 600, **environment: str) -> str:
    """Runs a file as a program that has so many CPU devices.

    Args:
      file: its path.
      *arguments: its arguments.
      count: devices.
      timeout: seconds.
      **environment: further variables.

    Returns:
      What it printed. It must end well.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, file, *map(str, arguments)],
        env={**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    return done.stdout
