"""Runs a package in a process that cannot import the framework it was made with, and compares bit by bit.

The examples ``with_*.py`` call :func:`run` and :func:`compare`; the process that the latter starts runs this file.
"""

from __future__ import annotations

import argparse
import importlib.abc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


class Refuse(importlib.abc.MetaPathFinder):
    """Makes a framework look as if it were not installed."""

    def __init__(self, framework: str) -> None:
        self.framework = framework

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == self.framework:
            raise ImportError(f"{name} is not there")


def run(main: Callable[[Path], int], description: str | None) -> None:
    """Runs an example, which gets the directory for what it makes and returns its exit status."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="directory for what is made (default: demo)")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    sys.exit(main(folder))


def compare(package: Path, framework: str, x: Any, expected: Any) -> int:
    """Whether the package computes the same without the framework: 0 for yes."""
    arrays = package.with_suffix(".npz")
    np.savez(arrays, x=np.asarray(x), expected=np.asarray(expected))
    return subprocess.run([sys.executable, "-I", __file__, package, framework, arrays], check=False).returncode


def main(package: str, framework: str, arrays: str) -> int:
    sys.meta_path.insert(0, Refuse(framework))
    import obmlite

    model = obmlite.load(package)
    print(f"{framework} cannot be imported here; loaded {package}: {model.signature}")
    with np.load(arrays) as file:
        equal = np.asarray(model(file["x"])).tobytes() == file["expected"].tobytes()
    print(f"bitwise equal to the trained network: {'yes' if equal else 'no'}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
