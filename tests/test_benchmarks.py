"""The benchmark runs, at a size that takes no time."""

import os
import subprocess
import sys

import pytest

from benchmarks import calls, replaying, report
from benchmarks.measure import Measured

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.mark.long
def test_every_case_runs(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--size", "0.0005", "--rounds", "1", "--directory", str(tmp_path)]
    peers = ["--contenders", "safetensors", "copy", "hashing", "header"]
    peers += ["--cases", "save", "restore", "list", "verify", "import"]
    done = subprocess.run([*command, *peers], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("### ") == 6
    assert done.stdout.count("| **obmlite** |") == 6
    for title in ("safetensors", "one numpy copy", "SHA-256 alone", "obmlite, and opening a package"):
        assert title in done.stdout
    assert "goal" not in done.stdout  # which are about the full size
    assert os.listdir(tmp_path) == []


@pytest.mark.long
def test_cases_on_several_devices_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--size", "0.0005", "--rounds", "1", "--directory", str(tmp_path)]
    peers = ["--contenders", "obmlite-budget", "copy", "--cases", "sharded", "small"]
    done = subprocess.run([*command, *peers], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, last, one, replicated = done.stdout.split("### ")[1:]
    assert "first dimension" in first
    assert "in place" in first
    for title in ("| **obmlite** |", "| **obmlite, memory_budget=64 MiB** |", "| one numpy copy |"):
        assert title in last
    for section in (one, replicated):
        assert "| each of the leaves |" in section
    assert os.listdir(tmp_path) == []


SAME_WORK = """
import sys

import pytest

import jax
import numpy as np

from benchmarks.contenders import CONTENDERS
from benchmarks.layouts import DEVICES, LAYOUTS, Layout
from benchmarks.measure import _in_place, _mapped

leaves = {
    "a.kernel": np.arange(16 * 24, dtype=np.float32).reshape(16, 24),
    "a.bias": np.arange(3, dtype=np.float32),
    "b": np.arange(8 * 3, dtype=np.float32).reshape(8, 3),
}
paths = {}
for name in ("obmlite", "safetensors", "orbax"):
    paths[name] = f"{sys.argv[1]}/{name}{CONTENDERS[name].suffix}"
    writer = CONTENDERS[name]()
    writer.save(writer.prepare(leaves), paths[name])
for layout in (None, *map(Layout, LAYOUTS)):
    for name in ("obmlite", "obmlite-budget", "safetensors-put", "orbax", "orbax-safetensors", "put", "put-each"):
        contender = CONTENDERS[name]()
        path = paths[contender.uses or name]
        restored = contender.restore(path, contender.target(path, layout))
        flat = {".".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(restored)}
        for key, value in leaves.items():
            np.testing.assert_array_equal(flat[key], value, err_msg=f"{name} {key}")
            assert layout is None or flat[key].sharding.is_equivalent_to(layout.sharding(value.shape), value.ndim)
        if name == "obmlite" and layout is None:
            assert _in_place(flat["a.kernel"], _mapped(path)) == leaves["a.kernel"].nbytes
        if name.startswith("put"):
            assert not any(_in_place(leaf, _mapped(path)) for leaf in flat.values())
    copy = CONTENDERS["copy"]()
    copied = copy.restore(paths["safetensors"], copy.target(paths["safetensors"], layout))
    assert sum(part.nbytes for part in copied) == sum(leaf.nbytes for leaf in leaves.values())
    if layout is not None and layout.dimension == -1:
        assert sum(part.shape == (16, 24 // DEVICES) for part in copied) == DEVICES
"""


def test_contenders_do_the_same_work(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SAME_WORK, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


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


def test_replays_are_timed():
    *_, row = replaying.table(1, ["dropout"]).split("\n")
    cells = row.strip("| ").split(" | ")
    assert cells[0] == "dropout"
    assert len(cells) == 5
    assert 0.1 < float(cells[-1]) < 10


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


def test_a_table_gives_the_time_of_each():
    section = report.Section("Restore", (), {"obmlite": [Measured(0.5, None, None, {"leaves": 50_000})]}, per="leaves")
    text = report.render([section], goals=False)
    assert "| each of the leaves |" in text
    assert "| **obmlite** | 500 ms | 500 ms |  | 10.0 µs |" in text


def test_figures_are_put_between_their_markers():
    document = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.replace(document, "new") == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    assert report.replace("text\n", r"\1").endswith(f"{report.BEGIN}\n\n\\1\n\n{report.END}\n")
