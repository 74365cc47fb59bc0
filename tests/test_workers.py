"""Loaded models and worker processes: forked, spawned, and what cannot be sent to them."""

import concurrent.futures
import copy
import json
import multiprocessing
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

import obmlite
from obmlite import ArgumentError
from tests.generations import FUNCTIONS, X, expected, model, params, write_assets

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    model(3, write_assets(folder / "assets", 3)).save(folder / "m.obm", max_file_bytes=8)
    return str(folder / "m.obm")


# --- forked

FORKING = """
import json, os, sys, warnings
import jax, numpy as np, obmlite
from tests.crash import fork

path, mmap = sys.argv[1], json.loads(sys.argv[2])
loaded = obmlite.load(path, mmap=mmap)
weights = loaded.weights["params"]
before = np.asarray(weights["w"])          # mapped, or read, and the file is open, in the parent
x = np.ones((2, 3), np.float32)

def child(n):
    def run():
        found = {"seen": before.tolist(), "leaf": np.asarray(weights["b"]).tolist()}
        found["slice"] = weights["w"][n % 3].tolist()
        found["supplemental"] = loaded.supplementals["assets"].read("vocabulary.txt").decode()
        found["anew"] = np.asarray(obmlite.load(path).weights["params"]["w"]).tolist()
        if n:
            found["restored"] = np.asarray(weights.restore()["w"]).tolist()
            found["called"] = np.asarray(loaded(x)).tolist()
        return found
    return run

real, said = os.fork, []
def noted():  # JAX warns of a fork once it has a backend
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pid = real()
    said.extend(str(w.message) for w in caught if "JAX is multithreaded" in str(w.message))
    return pid
os.fork = noted
results = [child.wait() for child in [fork(child(n)) for n in range(4)]]
before = len(said)
called = np.asarray(loaded(x)).tolist()
fork(lambda: None).wait()
print(json.dumps([results, called, before, len(said)]))
"""


@pytest.mark.parametrize("mmap", [True, False])
def test_forked_before_jax_has_a_backend(path, mmap):
    """Everything works in the children, on files that the parent has opened; each makes a backend of its own."""
    done = subprocess.run(
        [sys.executable, "-c", FORKING, path, json.dumps(mmap)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results, called, *warned = json.loads(done.stdout)
    assert warned == [0, 1]  # the second one shows that the first says something
    wanted = {name: value.tolist() for name, value in params(3).items()}
    for n, found in enumerate(results):
        assert found["seen"] == found["anew"] == wanted["w"]
        assert found["leaf"] == wanted["b"]
        assert found["slice"] == wanted["w"][n % 3]
        assert found["supplemental"] == "words 3 " * 20
        if n:
            assert found["restored"] == wanted["w"]
            assert found["called"] == expected(3).tolist()
    assert called == expected(3).tolist()


# --- spawned


def begin(path):
    """What a worker begins with, as ``docs/trust.md`` shows it."""
    global loaded
    loaded = obmlite.load(path)


def work(x):
    return [os.getpid(), np.asarray(loaded(x)).tolist(), np.asarray(loaded.weights["params"]["b"]).tolist()]


def test_spawned_with_the_path(path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    here = obmlite.load(path)
    np.asarray(here(X))  # JAX has a backend here, and threads
    with multiprocessing.get_context("spawn").Pool(2, begin, [path]) as pool:
        results = pool.map(work, [X * n for n in range(4)])
    assert os.getpid() not in {pid for pid, _, _ in results}
    for n, (_, called, b) in enumerate(results):
        assert called == np.asarray(here(X * n)).tolist()
        assert b == params(3)["b"].tolist()


# --- what cannot be sent


def things(path):
    loaded = obmlite.load(path)
    memory = obmlite.Weights({"w": np.ones(3)})
    double = obmlite.PolymorphicFunction("double", [FUNCTIONS[0]])
    yield from [loaded, loaded.functions["apply"], loaded.weights["params"], loaded.weights["params"]["w"]]
    yield from [loaded.pipelines["serving_default"], loaded.supplementals["assets"], memory, memory["w"], FUNCTIONS[0]]
    yield from [model(1), double]


@pytest.mark.parametrize("send", [pickle.dumps, copy.copy, copy.deepcopy])
def test_what_belongs_to_a_process_says_so(path, send):
    for thing in things(path):
        with pytest.raises(ArgumentError, match=r"cannot be pickled or copied(?s:.*)pass the path") as caught:
            send(thing)
        assert caught.value.found == type(thing).__name__
    with pytest.raises(ArgumentError) as caught:
        send(obmlite.load(path))
    assert caught.value.package == path


def test_what_is_sent_to_a_pool_is_refused_at_once(path):
    here = obmlite.load(path)
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(1, context) as pool,
        pytest.raises(ArgumentError, match="pass the path"),
    ):
        pool.submit(work, here).result(30)
