"""Starting the processes of one JAX program, as on several hosts: ``jax.distributed`` over the loopback, on CPU.

The parent calls :func:`run` with a script; in the script each process calls :func:`join` first, and says what came of
its part with :func:`report`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
_REPORT = "report: "
_TAKEN = ("Address already in use", "address already in use", "Failed to bind", "No address added out of total")


@dataclasses.dataclass
class Ended:
    """A process that has ended.

    Attributes:
      code: its exit code, negative for a signal.
      output: all that it wrote.
      reports: what it reported, in order.
      seconds: how long it ran.
    """

    code: int
    output: str
    reports: list[Any]
    seconds: float


def run(script: str, count: int, *arguments: str, timeout: float = 120, heartbeat: int = 100) -> list[Ended]:
    """Runs a script in several processes, and kills them all if they take too long.

    Args:
      script: path of the script.
      count: processes.
      *arguments: for the script.
      timeout: seconds.
      heartbeat: seconds after which JAX takes a process that says nothing for dead.

    Returns:
      How each process ended, in their order.
    """
    for _ in range(5):  # the port was free when it was chosen, which need not last
        ended = _run(script, count, arguments, timeout, heartbeat)
        if not any(text in ended[0].output for text in _TAKEN):
            break
    return ended


def _run(script: str, count: int, arguments: tuple[str, ...], timeout: float, heartbeat: int) -> list[Ended]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_")) and "proxy" not in k.lower()
    }
    environment["PYTHONPATH"] = str(ROOT)
    environment["JAX_PLATFORMS"] = "cpu"
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [open(os.path.join(folder, str(n)), "w+b") for n in range(count)]  # noqa: SIM115 - closed below
        started = [
            subprocess.Popen(
                [sys.executable, "-u", script, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment, "OBMLITE_TEST": json.dumps([port, count, n, heartbeat, folder])},
            )
            for n, output in enumerate(outputs)
        ]
        seconds = [0.0] * count
        try:
            while any(process.poll() is None for process in started) and time.monotonic() - begun < timeout:
                for n, process in enumerate(started):
                    if process.poll() is None:
                        seconds[n] = time.monotonic() - begun
                time.sleep(0.02)
        finally:
            for process in started:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                process.wait()
        ended = []
        for process, output, spent in zip(started, outputs, seconds, strict=True):
            output.seek(0)
            text = output.read().decode(errors="replace")
            output.close()
            reports = [json.loads(line[len(_REPORT) :]) for line in text.splitlines() if line.startswith(_REPORT)]
            ended.append(Ended(process.returncode, text, reports, spent))
    return ended


def join(devices: int = 1) -> int:
    """In a script: joins the program, with some CPU devices of its own; returns this process's number."""
    import jax

    port, count, index, heartbeat, _ = json.loads(os.environ["OBMLITE_TEST"])
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}", count, index, heartbeat_timeout_seconds=heartbeat, initialization_timeout=60
    )
    return int(index)


def report(value: Any) -> None:
    """In a script: tells the parent something that JSON can hold."""
    print(_REPORT + json.dumps(value), flush=True)


def leave(*dead: int) -> None:
    """In a script: ends, without JAX's waiting for all, of which some may be dead; process 0 goes last."""
    _, count, index, _, folder = json.loads(os.environ["OBMLITE_TEST"])
    pathlib.Path(folder, f"left-{index}").touch()
    until = time.monotonic() + 10
    expected = {f"left-{n}" for n in range(count) if n not in dead}
    while index == 0 and not expected <= set(os.listdir(folder)) and time.monotonic() < until:
        time.sleep(0.02)
    if index == 0:
        time.sleep(0.2)
    os._exit(0)
