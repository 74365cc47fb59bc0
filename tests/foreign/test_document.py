"""docs/foreign.md and the example say what is so: the code runs, in one go, and prints what its comments say."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent


def run(path: pathlib.Path, *arguments: str, cwd: pathlib.Path) -> str:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", str(path), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_document_prints_what_its_comments_say(tmp_path: pathlib.Path) -> None:
    text = (ROOT / "docs" / "foreign.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert len(expected) == code.count("print(")
    (tmp_path / "example.py").write_text(code)
    assert run(tmp_path / "example.py", cwd=tmp_path).splitlines() == expected


def test_the_example(tmp_path: pathlib.Path) -> None:
    printed = run(ROOT / "examples" / "llama_from_huggingface.py", "--out", "out", cwd=tmp_path)
    assert "layers.attention.k: bf16[3,64,4,8]\n" in printed
    assert "q: (3, 64, 8, 8) P" in printed
    assert "logits (8, 96) equal from the package: yes\n" in printed
