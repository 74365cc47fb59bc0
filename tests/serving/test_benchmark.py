"""The benchmark of serving, in small: each contender answers each kind of request."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("starlette")

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark runs on Linux")
def test_a_trial() -> None:
    options = ["--rounds", "1", "--seconds", "0.02", "--without-kserve"]
    command = [sys.executable, "-m", "benchmarks.serving", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    latencies, rates, times, ratios = done.stdout.split("\n\n")[1:]
    for table in (latencies, rates, times):
        assert "| the call | the call and its JSON | echo | echo with the call in it | **obmlite** |" in table
    cases = [line.split(" | ") for line in ratios.splitlines()[2:]]
    assert len(cases) == 8
    for _, together, bare in cases:
        for ratio in re.findall(r"\d+\.\d+", together + bare):
            assert 0.1 < float(ratio) < 100, ratios  # of what takes so short a time, whatever else the machine does
