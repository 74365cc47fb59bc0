"""The benchmark runs, at a size that takes no time."""

import os
import subprocess
import sys

from benchmarks import calls, report
from benchmarks.measure import Measured

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_every_case_runs(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--size", "0.0005", "--rounds", "1", "--directory", str(tmp_path)]
    peers = ["--contenders", "safetensors", "copy", "hashing", "header"]
    peers += ["--cases", "save", "restore", "list", "import"]
    done = subprocess.run([*command, *peers], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("### ") == 5
    assert done.stdout.count("| **obmlite** |") == 5
    for title in ("safetensors", "one numpy copy", "SHA-256 alone", "obmlite, and opening a package"):
        assert title in done.stdout
    assert "goal" not in done.stdout  # which are about the full size
    assert os.listdir(tmp_path) == []


def test_calls_are_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(calls, "_BLOCKS", 2)
    monkeypatch.setattr(calls, "_BLOCK", 20)
    monkeypatch.setattr(calls, "LEAVES", (2,))
    calls.make_calls(str(tmp_path))
    found = dict(calls.kinds(calls.calls(str(tmp_path)), 2))
    assert set(found) == {
        "native jit",
        "obmlite function",
        "obmlite with bound weights",
        "jit(Exported.call)",
        "Exported.call",
    }
    assert 0 < found["native jit"] < found["Exported.call"]


def test_a_table_gives_medians_ratios_and_goals():
    runs = [Measured(seconds, 1 << 20, 2 << 20, {"bytes": 100, "aliased": 99}) for seconds in (0.010, 0.030, 0.012)]
    section = report.Section(
        "Restore",
        [report.Goal("fast", lambda s: s.seconds() < 0.020), report.Goal("small", lambda s: s.anonymous() < 1000)],
        {"obmlite": runs, "peer": [Measured(2.4, None, None, {})]},
    )
    text = report.render([section], goals=True)
    assert "| **obmlite** | 12 ms | 10 ms |  | 1.0 MiB | 2.0 MiB | 99.0 % |" in text
    assert "| peer | 2.40 s | 2.40 s | 200 | ? | ? |  |" in text
    assert "| fast | yes |" in text
    assert "| small | **no** |" in text
    assert "met" not in report.render([section], goals=False)


def test_figures_are_put_between_their_markers():
    document = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.replace(document, "new") == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    assert report.replace("text\n", r"\1").endswith(f"{report.BEGIN}\n\n\\1\n\n{report.END}\n")
