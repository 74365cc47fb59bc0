"""The example of each framework, as a user would run it."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent.parent / "examples"
NEEDS = {"linen": "flax", "nnx": "flax", "haiku": "haiku", "objax": "objax", "equinox": "equinox", "optax": "optax"}


def test_every_example_is_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("with_*.py")} == {f"with_{name}" for name in NEEDS}


# What the others do is in the files of their frameworks, too.
LONG = ("haiku", "equinox", "optax")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] if n in LONG else []) for n in NEEDS])
def test_example(name: str, tmp_path: pathlib.Path) -> None:
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed here")
    warnings = ("-W", "ignore::DeprecationWarning") if name == "objax" else ("-W", "error")
    command = [sys.executable, *warnings, str(EXAMPLES / f"with_{name}.py"), "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{NEEDS[name]} cannot be imported here" in done.stdout
    assert "bitwise equal to the trained network: yes\n" in done.stdout
