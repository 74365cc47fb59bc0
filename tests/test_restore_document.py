"""docs/restore.md says what is so: its code runs, in one go, and prints what its comments say."""

import os
import pathlib
import re
import subprocess
import sys

DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "restore.md"


def test_examples_print_what_their_comments_say(tmp_path):
    code = "".join(re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE))
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    (tmp_path / "example.py").write_text(code)
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "example.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == expected
    assert len(expected) == code.count("print(")
