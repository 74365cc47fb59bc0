"""What several processes hold is read once by them together."""

import pathlib
import shutil

import numpy as np
import pytest

import obmlite
from obmlite import Model, Weights
from tests import processes, sharers

LARGE = {"w": np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024), "b": np.arange(3000, dtype=np.float32)}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What the two processes, of two devices each, reported."""
    folder = tmp_path_factory.mktemp("shared")
    Model({"w": Weights(sharers.values())}).save(folder / "m.obm")
    Model({"w": Weights(LARGE)}).save(folder / "large.obm")
    shutil.copytree(folder / "large.obm", folder / "bad.obm")
    ended = processes.run(str(pathlib.Path(sharers.__file__)), 2, str(folder))
    for process in ended:
        assert process.code == 0, process.output
    return [process.reports for process in ended]


def test_shards_are_those_of_a_whole_load(reports):
    for wrong, *_ in reports:
        assert len(wrong) == 2 * 3 * 4 + 2
        assert {case: names for case, names in wrong.items() if names} == {}


@pytest.mark.skipif(not pathlib.Path("/proc/self/io").exists(), reason="the system does not count bytes read")
def test_every_byte_is_read_once_by_all_processes_together(reports):
    size = sum(value.nbytes for value in LARGE.values())
    slack = 4096  # reading /proc/self/io counts, too
    for _, (alone, _), same, _ in reports:
        assert size <= alone <= size + slack
        assert same
    together = sum(one for _, (_, one), _, _ in reports)
    assert size <= together <= size + 2 * slack


def test_processes_that_disagree_are_told_before_anything_is_sent(reports):
    for *_, (order, sharding, _) in reports:
        assert "CoordinationError" in order
        assert "disagree about the leaves to restore" in order
        assert "CoordinationError" in sharding
        assert "leaf: b" in sharding


def test_a_process_that_cannot_read_ends_all(reports):
    (*_, healthy), (*_, broken) = reports
    assert "MissingFileError" in broken[2]
    assert "CoordinationError" in healthy[2]
    assert "process 1" in healthy[2]


def test_one_process_needs_no_other(tmp_path):
    Model({"w": Weights(LARGE)}).save(tmp_path / "m.obm")
    found = obmlite.load(tmp_path / "m.obm").weights["w"].restore(broadcast=True)
    assert all(np.array_equal(found[name], value) for name, value in LARGE.items())
