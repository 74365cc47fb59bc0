"""Saving from several processes, which are real ones, and what other numbers of processes make of the packages."""

import itertools
import json
import os
import pathlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors import safe_open

import obmlite
from obmlite import _dealing
from obmlite.consolidate import consolidate
from obmlite.verify import verify
from tests import hosts, processes
from tests.independent_reader import read_package
from tests.once import once

SCRIPT = str(pathlib.Path(hosts.__file__))
COUNT = 4


def read(path):
    """All leaves of a package as numpy has them."""
    return {name: np.asarray(leaf) for name, leaf in obmlite.load(path).weights["params"].flat.items()}


def check(path):
    assert verify(path).good, verify(path).problems
    expected = hosts.values()
    expected["tied"] = expected["grid"]
    found = read(path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
        assert found[name].dtype == np.asarray(value).dtype or name == "step"
    weights = obmlite.load(path).weights["params"]
    assert weights.source.number(list(found).index("tied")) == weights.source.number(list(found).index("grid"))
    np.testing.assert_array_equal(obmlite.load(path).functions["double"](np.ones(3, np.float32)), [2, 2, 2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def saved(folder):
    """What the processes reported: for each step the error of each process, None for success."""
    ended = processes.run(SCRIPT, COUNT, "saving", str(folder))
    for process in ended:
        assert process.code == 0, process.output
    return {
        step: [next((error for what, error, _ in p.reports if what == step), None) for p in ended]
        for step, _, _ in ended[0].reports
    } | {"seconds": {step: seconds for p in ended for step, _, seconds in p.reports}}


def test_a_package_from_four_processes_opens_in_one(saved, folder):
    assert saved["good"] == saved["afterwards"] == [None] * COUNT
    check(folder / "afterwards.obm")


def test_each_process_writes_a_share(saved, folder):
    files = sorted((folder / "afterwards.obm/weights").iterdir())
    assert [f.name[:-29] for f in files] == [f"params-p{n:05d}-of-00004" for n in range(COUNT)]
    sizes = [sum(piece_bytes(f).values()) for f in files]
    assert sum(sizes) == obmlite.load(folder / "afterwards.obm").weights["params"].nbytes  # each byte once
    assert max(sizes) < 0.98 * sum(sizes)  # `numpy`, 400 kB of 412, is dealt whole
    assert min(sizes) > 0


def piece_bytes(path):
    with safe_open(path, "numpy") as file:
        names = list(file.keys())
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    entries = json.loads(header)
    return {name: entries[name]["data_offsets"][1] - entries[name]["data_offsets"][0] for name in names}


def test_other_tools_do_not_take_a_piece_for_the_tensor(saved, folder):
    path = folder / "afterwards.obm"
    names = obmlite.load(path).weights["params"].names
    whole, pieces = set(), {}
    for file in (path / "weights").glob("*.safetensors"):
        with safe_open(file, "numpy") as opened:
            own = json.loads(opened.metadata().get("obmlite.pieces", "{}"))
            whole |= set(opened.keys()) - own.keys()
            pieces |= own
    assert whole == {"numpy", "third", "everywhere", "step"}
    assert not pieces.keys() & set(names)
    assert pieces["rows@[2:4,0:6]"] == {"tensor": "rows", "shape": [16, 6], "begin": [2, 0]}
    assert {piece["tensor"] for piece in pieces.values()} == {
        "rows",
        "columns",
        "grid",
        "some",
        "packed",
        "keys",
        "empty",
    }
    assert not (path / "weights/params.safetensors.index.json").exists()


def test_a_reader_that_knows_the_specification_alone_reads_it(saved, folder):
    weights = read_package(folder / "afterwards.obm").weights["params"]
    expected = hosts.values()
    expected["columns"] = expected["columns"].view(np.uint16)  # it knows these two by their bits
    expected["packed"] = expected["packed"].astype(np.int8) & 15
    for name, value in expected.items():
        np.testing.assert_array_equal(weights.leaves[name].value, value, err_msg=name)


def test_over_the_package_that_was_loaded(saved, folder):
    assert saved["over itself"] == [None] * COUNT
    check(folder / "good.obm")


def test_files_of_limited_size_and_their_index(saved, folder):
    assert saved["files"] == [None] * COUNT
    files = {f.name for f in (folder / "files.obm/weights").glob("*.safetensors")}
    assert sum("-p00002-of-00004-00003-of-00003-" in name for name in files) == 1
    [index] = (folder / "files.obm/weights").glob("*.json")
    assert set(json.loads(index.read_text())["weight_map"].values()) == files
    assert verify(folder / "files.obm").good


@pytest.mark.parametrize(("step", "leaf"), [("dtype", "some"), ("leaf", "extra"), ("order", None), ("value", "step")])
def test_a_disagreement_is_found_by_all(saved, folder, step, leaf):
    for kind, text in saved[step]:
        assert kind == "CoordinationError"
        assert "disagree" in text
        assert leaf is None or f"params: {leaf}" in text
    assert saved["seconds"][step] < 10
    assert not (folder / "bad.obm").exists()


def test_a_package_in_the_way(saved):
    kinds = [kind for kind, _ in saved["exists"]]
    assert kinds == ["PackageExistsError"] + ["CoordinationError"] * 3
    assert all("there is a package at the path already" in text for _, text in saved["exists"])


def test_paths_that_are_not_one_directory(saved, folder):
    kinds = [kind for kind, _ in saved["path"]]
    assert kinds == ["CoordinationError"] * 3 + ["PackageNotFoundError"]
    assert not (folder / "bad.obm").exists()
    assert not (folder / "elsewhere.obm").exists()


@pytest.mark.parametrize(("step", "culprit"), [("full", 2), ("full, new", 2), ("full at 0", 0), ("full at 0, new", 0)])
def test_a_full_disk_of_one_fails_all_and_leaves_what_was_there(saved, folder, step, culprit):
    for process, (kind, text) in enumerate(saved[step]):
        assert kind == ("OSError" if process == culprit else "CoordinationError")
        assert "No space left" in text
    assert saved["seconds"][step] < 10
    assert not (folder / "bad.obm").exists()
    assert not [f for _, _, files in os.walk(folder / "good.obm") for f in files if f.endswith(".tmp")]
    assert verify(folder / "good.obm").good


def test_messages_and_the_first_of_many_differences(saved):
    for kind, text in saved["messages"]:
        assert kind == "CoordinationError"
        assert "leaf: n777\n" in text
        assert "processes 0, 2, 3: n777 False; process 1: n777 True" in text


def test_different_operations(saved):
    assert all("process 2: read" in text for _, text in saved["operation"])


def test_a_commit_that_fails(saved, folder):
    assert [kind for kind, _ in saved["before the commit"]] == ["OSError"] + ["CoordinationError"] * 3
    assert not (folder / "before the commit.obm").exists()  # with the files of all processes


def test_a_failure_behind_the_commit_leaves_the_new_package_whole(saved, folder):
    kinds, texts = zip(*saved["after the commit"], strict=True)
    assert kinds == ("OSError",) + ("CoordinationError",) * 3
    assert all("has saved the package, but then failed" in text and "disk is broken" in text for text in texts[1:])
    check(folder / "after the commit.obm")


def test_a_process_that_does_not_come_is_named(saved, folder):
    for kind, text in saved["absent"][:3]:
        assert kind == "CoordinationError"
        assert "process 3" in text or "Another process failed" in text
    assert any("nothing from process 3" in text for _, text in saved["absent"][:3])
    assert saved["seconds"]["absent"] < 6
    assert not (folder / "bad.obm").exists()


def test_one_process_alone(saved, folder):
    assert saved["local"] == [None] * COUNT
    assert [int(np.asarray(obmlite.load(folder / f"local-{n}.obm").weights["w"]["i"])) for n in range(COUNT)] == [
        0,
        1,
        2,
        3,
    ]
    assert {kind for kind, _ in saved["not local"]} == {kind for kind, _ in saved["whole"]} == {"LeafError"}


@pytest.mark.parametrize(
    ("count", "victim", "timeout", "heartbeat"),
    [
        pytest.param(4, 2, 3, 100, id="timeout", marks=once),
        pytest.param(2, 1, 100, 5, id="heartbeat"),
        pytest.param(2, 0, 100, 100, id="process-0", marks=once),
    ],
)
def test_a_process_that_is_killed_ends_all_and_leaves_no_package(tmp_path, count, victim, timeout, heartbeat):
    tree = {"w": np.arange(10)}
    obmlite.Model({"params": obmlite.Weights(tree)}).save(tmp_path / "old.obm")
    ended = processes.run(
        SCRIPT, count, "dying", str(tmp_path), str(victim), str(timeout), "old.obm" if victim else "new.obm",
        timeout=60, heartbeat=heartbeat,
    )  # fmt: skip
    assert ended[victim].code == -9
    for process in ended:
        assert process.seconds < 40, process.output
        if process is not ended[victim]:
            # By our error or, when JAX finds out first, by JAX, which ends the process.
            assert process.code or process.reports[-1][1][0] == "CoordinationError", process.output
    if timeout < heartbeat:
        assert all("nothing from process 2" in p.reports[-1][1][1] for p in ended if p.reports)
    np.testing.assert_array_equal(obmlite.load(tmp_path / "old.obm").weights["params"]["w"], np.arange(10))
    with pytest.raises(obmlite.PackageNotFoundError):
        obmlite.load(tmp_path / "new.obm")
    for name in ("old.obm", "new.obm"):  # what the dead one left is cleared
        obmlite.Model({"params": obmlite.Weights(tree)}).save(tmp_path / name, overwrite=True)
        assert not verify(tmp_path / name).extra


def test_consolidated_it_is_as_from_one_process(saved, folder, tmp_path):
    consolidate(folder / "afterwards.obm", tmp_path / "whole.obm")
    check(tmp_path / "whole.obm")
    obmlite.load(folder / "afterwards.obm").save(tmp_path / "saved.obm")
    assert os.listdir(tmp_path / "whole.obm/weights") == os.listdir(tmp_path / "saved.obm/weights")


@pytest.mark.parametrize("count", [2, 4])
def test_restored_on_another_number_of_processes_and_back(saved, folder, tmp_path, count):
    if count == 2:  # from four to two
        source = folder / "afterwards.obm"
    else:  # from one to four
        source = tmp_path / "one.obm"
        loaded = obmlite.load(folder / "afterwards.obm")
        loaded.save(source)
    ended = processes.run(SCRIPT, count, "restoring", str(tmp_path), str(source), "back.obm")
    for process in ended:
        assert process.code == 0, process.output
        assert process.reports[0] == "restored", process.reports
        assert process.reports[1][1] is None, process.reports
    check(tmp_path / "back.obm")


# --- who writes what


def held(name, nbytes, *holders):
    return SimpleNamespace(name=name, nbytes=nbytes, holders=holders)


def test_what_one_has_is_its_own_and_the_rest_evens_out():
    found = [
        held("a", 100, 1),
        held("b", 50, 0, 1, 2),
        held("c", 50, 0, 1, 2),
        held("d", 60, 0, 1),
        held("e", 40, 1, 2),
    ]
    assert _dealing.deal(found, 3) == [1, 2, 2, 0, 1]


def test_dealing_depends_on_the_boxes_as_a_set():
    found = [held(f"t{n}", 10 * (n % 3), *((0, 1, 2) if n % 2 else (1, 2))) for n in range(12)]
    expected = dict(zip([h.name for h in found], _dealing.deal(found, 3), strict=True))
    for shuffled in itertools.islice(itertools.permutations(found), 0, 10_000, 997):
        assert dict(zip([h.name for h in shuffled], _dealing.deal(shuffled, 3), strict=True)) == expected


def test_replicated_tensors_are_dealt_out_evenly():
    draw = np.random.default_rng(0)
    found = [held(f"t{n}", int(size), *range(8)) for n, size in enumerate(draw.integers(1, 10_000, 200))]
    loads = [0] * 8
    for box, owner in zip(found, _dealing.deal(found, 8), strict=True):
        loads[owner] += box.nbytes
    assert max(loads) < 1.01 * sum(loads) / 8


def test_names_of_pieces_are_no_names_of_tensors():
    assert _dealing.piece_name("w", ((0, 4), (8, 16)), {"w"}) == "w@[0:4,8:16]"
    assert _dealing.piece_name("w", ((0, 4),), {"w", "w@[0:4]"}) == "w@[0:4]@"


def test_one_process_needs_no_others():
    assert jax.process_count() == 1
    from obmlite import _coordination

    with _coordination.Session("nothing", timeout=1) as session:
        assert session.exchange(b"x") == session.gather(b"x") == [b"x"]
        assert session.broadcast(b"y") == b"y"
        session.barrier()
        session.agree("trees", [("a", "1")])
    with pytest.raises(obmlite.ArgumentError, match="timeout"):
        _coordination.Session("nothing", timeout=0)
