"""The whole of jax2tf's serving walk-through with ``examples/mnist.py``: train, serve, ask, and train again meanwhile.

    python examples/serving/walk_through.py --out demo

Each step is a command, printed before it runs; README.md beside this file goes through them by hand. Version 1 takes
batches of any size. Version 2 takes batches of 16 alone and replaces it under way; after that a request of another
size is refused. Needs ``pip install '.[flax,examples,serve,grpc]'``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODEL = "mnist"


def run(*arguments: Any, expected: int = 0) -> None:
    """Runs a Python script and stops if it ends otherwise than expected."""
    shown(*arguments)
    code = subprocess.run([sys.executable, *map(str, arguments)], check=False).returncode
    if code != expected:
        sys.exit(f"exit status {code}, expected {expected}")


def shown(*arguments: Any) -> None:
    print("\n$ python", shlex.join(map(str, arguments)), flush=True)


@contextlib.contextmanager
def serving(directory: Path, rest: int, grpc: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server for the block."""
    command = ["-m", "obmlite", "serve", directory, "--name", MODEL, "--port", rest, "--grpc-port", grpc]
    shown(*command)
    with subprocess.Popen([sys.executable, *map(str, command)]) as server:
        try:
            yield server
        finally:
            server.terminate()


def wait_for(server: subprocess.Popen[bytes], version: int, rest: int, seconds: float = 60) -> None:
    """Waits until a version is served."""
    url = f"http://localhost:{rest}/v1/models/{MODEL}"
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            with urllib.request.urlopen(url, timeout=5) as response:
                found = json.load(response)["model_version_status"]
            if any((s["version"], s["state"]) == (str(version), "AVAILABLE") for s in found):
                print(f"version {version} is served", flush=True)
                return
        time.sleep(0.1)
    sys.exit(f"version {version} is not served")


def next_version(directory: Path) -> int:
    """1, or the number after those that are there from another time."""
    return 1 + max((int(path.name) for path in directory.glob("[0-9]*") if path.name.isdecimal()), default=0)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="directory for what is made (default: demo)")
    parser.add_argument("--model", default="flax", help="what the network is written in: flax or jax (default: flax)")
    parser.add_argument("--num_epochs", type=int, default=20, help="epochs of training (default: 20)")
    options = parser.parse_args()
    rest, grpc = free_port(), free_port()
    train = [HERE.parent / "mnist.py", "--model_path", options.out, "--model", options.model]
    train += ["--num_epochs", options.num_epochs]
    ask = [HERE / "request.py", f"--model_spec_name={MODEL}"]
    by_grpc = [*ask, f"--prediction_service_addr=localhost:{grpc}"]
    by_rest = [*ask, "--nouse_grpc", f"--prediction_service_addr=localhost:{rest}"]

    first = next_version(options.out / MODEL)
    run(*train, f"--model_version={first}", "--serving_batch_size=-1")
    with serving(options.out / MODEL, rest, grpc) as server:
        wait_for(server, first, rest)
        run(*by_grpc, "--serving_batch_size=16", "--count_images=128")
        run(*by_rest, "--serving_batch_size=3", "--count_images=12")

        run(*train, f"--model_version={first + 1}", "--serving_batch_size=16")
        wait_for(server, first + 1, rest)
        run(*by_grpc, "--serving_batch_size=16", "--count_images=128")
        run(*by_rest, "--serving_batch_size=16", "--count_images=128")
        run(*by_grpc, "--serving_batch_size=1", expected=1)
        run(*by_rest, "--serving_batch_size=1", expected=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
