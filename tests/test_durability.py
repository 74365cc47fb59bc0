"""Whole models, killed and raced; the transaction below has its own tests in ``io/test_commit.py``."""

import json
import multiprocessing
import os
import shutil
import sys
import threading
import time

import jax
import numpy as np
import pytest

import obmlite
from obmlite import MissingFileError, Model, PackageNotFoundError, Pipeline, Weights
from obmlite.schema.decode import decode
from obmlite.verify import verify
from tests import crash

X = np.ones((2, 3), np.float32)
SHAPES = {"w": jax.ShapeDtypeStruct((3, 2), "float32"), "b": jax.ShapeDtypeStruct((2,), "float32")}

# Exported here, once: a forked child must not trace.
FUNCTIONS = [
    obmlite.export(fn, SHAPES, X, name="apply", platforms="cpu", metadata={"odd": n})
    for n, fn in enumerate(
        (
            lambda params, x: x @ params["w"] + params["b"],
            lambda params, x: x @ params["w"] * params["b"],
        )
    )
]


def params(n):
    return {"w": np.full((3, 2), n, np.float32), "b": np.full(2, n + 1, np.float32)}


def model(n):
    """Generation ``n``; everything in it says which one it is."""
    return Model(
        {"apply": FUNCTIONS[n % 2], "params": Weights(params(n))},
        pipelines={"serving_default": Pipeline(function="apply", weights={"params": "params"})},
        metadata={"generation": n},
    )


def expected(n):
    p = params(n)
    return X @ p["w"] + p["b"] if n % 2 == 0 else X @ p["w"] * p["b"]


def whole(path, *, run=True):
    """The generation at a path, once all of it is found to be of that one; None if there is no package."""
    try:
        loaded = obmlite.load(path)
    except PackageNotFoundError:
        return None
    n = loaded.metadata["generation"]
    for name, value in params(n).items():
        assert np.array_equal(np.asarray(loaded.weights["params"][name]), value)
    assert loaded.functions["apply"].metadata == {"odd": n % 2}
    report = verify(path)
    assert report.good, report.problems
    if run:  # takes a compilation
        assert np.array_equal(loaded(X), expected(n))
    return n


def files(path):
    return sorted(
        os.path.relpath(os.path.join(folder, name), path) for folder, _, names in os.walk(path) for name in names
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "m.obm"


@pytest.fixture
def packages(tmp_path):
    """One package of each of two generations, the second in several files."""
    model(0).save(tmp_path / "0")
    model(1).save(tmp_path / "1", max_file_bytes=8)
    return [tmp_path / "0", tmp_path / "1"]


def test_a_first_save_that_is_killed(path):
    seen = set()

    def prepare():
        shutil.rmtree(path.parent, ignore_errors=True)

    for kill in crash.sweep(prepare, lambda: model(1).save(path, max_file_bytes=8)):
        assert {"mkdir", "write", "fsync", "replace"} <= set(kill.calls)
        n = whole(path, run=kill.calls[kill.at] == "replace") if path.exists() else None
        assert n in (None, 1)
        seen.add(n)
        # The next save goes through without overwrite= where there is no package, and clears what was left.
        model(2).save(path, overwrite=n is not None)
        assert whole(path, run=False) == 2
        assert not [name for name in files(path) if name.endswith(".tmp")]
        if n is None:
            assert set(files(path)) - {"manifest.obm"} == set(decode((path / "manifest.obm").read_bytes()).files)
    assert seen == {None, 1}


def test_a_replacement_that_is_killed(path, packages):
    seen = []

    def prepare():
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(packages[0], path)

    for kill in crash.sweep(prepare, lambda: model(1).save(path, overwrite=True, max_file_bytes=8)):
        n = whole(path, run=kill.calls[kill.at] == "replace")
        seen.append(n)
        model(2).save(path, overwrite=True)
        assert whole(path, run=False) == 2
        assert not [name for name in files(path) if name.endswith((".tmp", ".json"))]
        model(3).save(path, overwrite=True, max_file_bytes=8)
        index = json.loads((path / "weights" / "params.safetensors.index.json").read_text())
        named = decode((path / "manifest.obm").read_bytes()).files
        assert {f"weights/{file}" for file in index["weight_map"].values()} <= set(named)
    assert seen == sorted(seen)  # the old one, and from some call on the new one
    assert set(seen) == {0, 1}


@pytest.mark.parametrize("first", [True, False])
def test_the_order_of_calls(path, packages, first):
    if not first:
        shutil.copytree(packages[0], path)
    calls: list = []
    with crash.record(calls):
        model(1).save(path, overwrite=True, max_file_bytes=8)
    root = str(path)
    commit = next(i for i, call in enumerate(calls) if call[-1] == f"{root}/manifest.obm")
    named = decode((path / "manifest.obm").read_bytes()).files
    assert len(named) == 3
    durable = set()
    for name in named:
        placed = next(i for i, call in enumerate(calls) if call[0] == "replace" and call[2] == f"{root}/{name}")
        temporary = calls[placed][1]
        written = [i for i, call in enumerate(calls) if call == ("write", temporary)]
        synced = calls.index(("fsync", temporary))
        folder_synced = [i for i, call in enumerate(calls) if call == ("fsync", os.path.dirname(f"{root}/{name}"))]
        assert max(written) < synced < placed < commit
        # The folder's names are durable before the manifest speaks of them.
        assert any(placed < i < commit for i in folder_synced)
        durable.add(placed)
    manifest = calls[commit][1]
    assert ("write", manifest) in calls[max(durable) : commit]
    assert calls[commit - 1] == ("fsync", manifest)
    assert calls[commit + 1] == ("fsync", root)
    # Nothing of the previous generation goes before the commit, nor after it.
    assert [call for call in calls if call[0] in ("unlink", "rmdir")] == []
    after = calls[commit + 2 :]
    assert [call[-1] for call in after if call[0] == "replace"] == [f"{root}/weights/params.safetensors.index.json"]
    made = [call[1] for call in calls if call[0] == "mkdir"]
    if first:
        assert {os.path.dirname(root), root, f"{root}/weights", f"{root}/functions"} <= set(made)
        for folder in (root, os.path.dirname(root), os.path.dirname(os.path.dirname(root))):
            assert ("fsync", folder) in calls[:commit]
    else:
        assert made == []


def test_two_processes_save_at_once(path):
    """Round after round behind a barrier; with a reader that looks all the time. Whatever is seen is whole."""
    rounds = 24
    path.parent.mkdir()
    context = multiprocessing.get_context("fork")
    start, done = context.Barrier(3), context.Barrier(3)

    def saver(me):
        def run():
            for n in range(rounds):
                start.wait(30)
                model(2 * n + me).save(path, overwrite=True, max_file_bytes=8 if me else None)
                done.wait(30)

        return run

    children = [crash.fork(saver(me)) for me in (0, 1)]
    winners = set()
    try:
        for n in range(rounds):
            if n % 3 == 0:
                shutil.rmtree(path, ignore_errors=True)  # a first save, by both
            finished = threading.Event()
            looks = []
            reader = threading.Thread(target=look, args=(path, finished, looks))
            reader.start()
            start.wait(30)
            done.wait(30)
            finished.set()
            reader.join()
            assert all(isinstance(found, int) for found in looks), looks
            found = whole(path, run=n in (0, rounds - 1))
            assert found in (2 * n, 2 * n + 1)
            winners.add(found % 2)
            assert not [name for name in files(path) if name.endswith(".tmp")]
    finally:
        start.abort()
        done.abort()
        for child in children:
            child.wait()
    assert winners <= {0, 1}


def look(path, finished, looks):
    """Loads and reads until told to stop; notes generations, and what should not happen."""
    while not finished.is_set():
        try:
            loaded = obmlite.load(path)
            n = loaded.metadata["generation"]
            for name, value in params(n).items():
                assert np.array_equal(np.asarray(loaded.weights["params"][name]), value)
            assert loaded.functions["apply"].metadata == {"odd": n % 2}
            loaded.functions["apply"].load()  # compares its digest
            looks.append(n)
        except (PackageNotFoundError, MissingFileError):
            pass  # two generations have passed since it was opened, or there is none yet
        except Exception as error:  # noqa: BLE001 - the main thread must hear of it
            looks.append(repr(error))
            return


def together(threads):
    """Runs threads, which must not wait for one another for ever."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that they get in each other's way
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a deadlock"
    finally:
        sys.setswitchinterval(interval)


def test_eight_threads_restore_a_pipelines_weights_once(path, monkeypatch):
    model(0).save(path)
    restored: list = []
    real = Weights.restore_leaves

    def counted(self, **options):
        restored.append(threading.get_ident())
        time.sleep(0.05)  # so that the others come while the first is at it
        return real(self, **options)

    monkeypatch.setattr(Weights, "restore_leaves", counted)
    loaded = obmlite.load(path)
    barrier = threading.Barrier(8)
    results: list = []

    def use():
        barrier.wait(30)
        results.append(np.asarray(loaded(X)))

    threads = [threading.Thread(target=use, daemon=True) for _ in range(8)]
    together(threads)
    assert len(restored) == 1
    assert len(results) == 8
    assert all(np.array_equal(result, expected(0)) for result in results)


@pytest.mark.parametrize("mmap", [True, False])
def test_eight_threads_use_a_loaded_model_first(path, monkeypatch, mmap):
    model(0).save(path, max_file_bytes=8)
    opened: list = []
    real = os.open

    def counted(name, *args, **kwargs):
        opened.append(name)
        return real(name, *args, **kwargs)

    for _ in range(10):  # which thread comes first to what is chance
        loaded = obmlite.load(path, mmap=mmap)
        barrier = threading.Barrier(8)
        results: list = [None] * 8
        opened.clear()

        def use(n, loaded=loaded, barrier=barrier, results=results):
            barrier.wait(30)
            try:
                if n % 4 == 3:
                    results[n] = np.asarray(loaded.weights["params"]["w"]) * 3 + params(0)["b"]
                elif n % 4 == 2:
                    results[n] = loaded.functions["apply"](loaded.weights["params"].restore(), X)
                else:
                    results[n] = loaded(X)
            except BaseException as error:  # noqa: BLE001 - the main thread must hear of it
                results[n] = error

        threads = [threading.Thread(target=use, args=(n,), daemon=True) for n in range(8)]
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", counted)
            together(threads)
        for n, result in enumerate(results):
            assert not isinstance(result, BaseException), result
            if n % 4 != 3:
                assert np.array_equal(result, expected(0))
        # Each file was opened once.
        data = [name for name in opened if str(name).endswith((".safetensors", ".jaxexport"))]
        assert len(data) == len(set(data)) == 3


def test_eight_threads_save_one_model(path):
    weights = {f"w{n}": Weights(params(n)) for n in range(8)}
    shared = Model({"apply": FUNCTIONS[0], **weights})
    errors: list = []
    barrier = threading.Barrier(8)

    def save(n):
        barrier.wait(30)
        try:
            shared.save(path if n % 2 else path.with_name(f"{n}.obm"), overwrite=True)
        except BaseException as error:  # noqa: BLE001 - the main thread must hear of it
            errors.append(error)

    threads = [threading.Thread(target=save, args=(n,), daemon=True) for n in range(8)]
    together(threads)
    assert errors == []
    for name in ("m.obm", "0.obm", "2.obm", "4.obm", "6.obm"):
        assert verify(path.with_name(name)).good
        for n in range(8):
            loaded = obmlite.load(path.with_name(name)).weights[f"w{n}"]
            assert np.array_equal(np.asarray(loaded["w"]), params(n)["w"])
