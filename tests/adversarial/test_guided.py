"""A bounded part of what atheris finds, where it is installed."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed here")


@pytest.mark.parametrize("kind", ["manifest", "header", "msgpack", "examples", "description", "text", "static"])
def test_nothing_is_found(kind: str) -> None:
    command = [sys.executable, "-m", "tests.adversarial.guided", kind, "10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "INITED" in done.stderr
