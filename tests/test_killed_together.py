"""Saving from several processes, of which one is killed at each of its calls in turn.

The processes are forked and talk through a directory in place of JAX's coordination service, which takes seconds to
start for each kill; with JAX's own, and some kills, it is in ``test_multihost.py``.
"""

import itertools
import os
import shutil
import time
import urllib.parse

import jax
import numpy as np
import pytest
from jax._src import distributed

import obmlite
from obmlite import ObmliteError, PackageNotFoundError
from obmlite.verify import verify
from tests import crash
from tests.generations import FUNCTIONS, files

COUNT = 3
TIMEOUT = 4.0
_replace, _listdir = os.replace, os.listdir  # not those that kill


class Service:
    """The methods of JAX's client that sessions use, on a directory."""

    def __init__(self, folder):
        self._folder = folder
        self._numbers = itertools.count()

    def _path(self, key):
        return os.path.join(self._folder, urllib.parse.quote(key, safe=""))

    def key_value_set_bytes(self, key, value):
        temporary = os.path.join(self._folder, f".{os.getpid()}-{next(self._numbers)}")
        with open(temporary, "wb") as stream:
            stream.write(value)
        _replace(temporary, self._path(key))

    def key_value_try_get_bytes(self, key):
        try:
            with open(self._path(key), "rb") as stream:
                return stream.read()
        except FileNotFoundError:
            raise jax.errors.JaxRuntimeError("NOT_FOUND") from None

    def blocking_key_value_get_bytes(self, key, milliseconds):
        until = time.monotonic() + milliseconds / 1000
        while True:
            try:
                return self.key_value_try_get_bytes(key)
            except jax.errors.JaxRuntimeError:
                if time.monotonic() > until:
                    raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED") from None
            time.sleep(0.002)

    def key_value_dir_get_bytes(self, prefix):
        keys = [urllib.parse.unquote(name) for name in _listdir(self._folder) if not name.startswith(".")]
        return [(key, self.key_value_try_get_bytes(key)) for key in keys if key.startswith(prefix)]

    def key_value_delete(self, key):
        pass  # nothing is asked for again


def values(n):
    return {f"w{leaf}": np.full(1000 + leaf, n, np.float32) for leaf in range(COUNT)}


def model(n):
    return obmlite.Model({"apply": FUNCTIONS[n], "params": obmlite.Weights(values(n))}, metadata={"generation": n})


def part(folder, index, outcomes):
    """What a process does."""

    def run():
        state = distributed.global_state  # this process's own, since it was forked
        state.client, state.process_id, state.num_processes = Service(folder / "service"), index, COUNT
        try:
            model(1).save(folder / "m.obm", overwrite=True, timeout=TIMEOUT, progress=False)
        except ObmliteError as error:
            outcomes.joinpath(str(index)).write_text(type(error).__name__)
        else:
            outcomes.joinpath(str(index)).write_text("saved")

    return run


def begin(folder, old, victim=None, kill_at=None, after=False):
    """Begins a save by all, of which one is killed."""
    (folder / "service").mkdir(parents=True)
    (folder / "outcomes").mkdir()
    if old:
        shutil.copytree(old, folder / "m.obm")
    return [
        crash.start(part(folder, n, folder / "outcomes"), kill_at if n == victim else None, after=after)
        for n in range(COUNT)
    ]


def end(folder, children):
    """What calls each process made, None for the one that was killed; and what the others said."""
    calls = [child.wait() for child in children]
    return calls, {int(name): (folder / "outcomes" / name).read_text() for name in os.listdir(folder / "outcomes")}


def generation(path):
    try:
        loaded = obmlite.load(path)
    except PackageNotFoundError:
        return None
    n = loaded.metadata["generation"]
    for name, value in values(n).items():
        assert np.array_equal(np.asarray(loaded.weights["params"][name]), value)
    assert verify(path).good
    return n


@pytest.mark.parametrize("replacing", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("every", [24, pytest.param(1, marks=pytest.mark.long)])
def test_each_process_in_turn(tmp_path, replacing, every):
    old = None
    if replacing:
        old = tmp_path / "old.obm"
        model(0).save(old)
    whole, outcomes = end(tmp_path / "whole", begin(tmp_path / "whole", old))
    assert outcomes == dict.fromkeys(range(COUNT), "saved")
    assert generation(tmp_path / "whole" / "m.obm") == 1
    counts = list(map(len, whole))
    assert counts[0] > 15
    assert min(counts) >= 5  # a file of each: header, tensor, fsync, name, fsync of the folder
    jobs = [
        (victim, at, after)
        for victim, count in enumerate(counts)
        for at in range(count)
        for after in (False, True)
        if (2 * at + after) % every == 0 or (victim == 0 and at >= count - 3)
    ]
    seen = set()
    for several in [jobs[n : n + 16] for n in range(0, len(jobs), 16)]:
        folders = [tmp_path / "-".join(map(str, job)) for job in several]
        # They mostly wait for the one that is dead. Forked by one thread, so that none has a lock of another one's.
        started = [begin(folder, old, *job) for folder, job in zip(folders, several, strict=True)]
        for folder, (victim, _, _), children in zip(folders, several, started, strict=True):
            calls, outcomes = end(folder, children)
            assert [own is None for own in calls] == [index == victim for index in range(COUNT)]
            assert victim not in outcomes
            seen.add((victim, check(folder / "m.obm", victim, outcomes, 0 if replacing else None)))
            shutil.rmtree(folder)
    before = 0 if replacing else None
    assert seen >= {(0, before), (0, 1), *((victim, before) for victim in range(1, COUNT))}


def check(path, victim, outcomes, before):
    """The generation at the path: the old one or the new one, as those who live say."""
    found = generation(path) if path.exists() else None
    assert found in (before, 1)
    if victim:
        assert (found == 1) == (outcomes[0] == "saved")
    else:  # without its word, the others cannot know
        assert set(outcomes.values()) <= {"CoordinationError", "saved"}
    # The next save goes through; it, or the one behind it, clears what was left.
    model(0).save(path, overwrite=found is not None)
    model(0).save(path, overwrite=True)
    assert generation(path) == 0
    assert not verify(path).extra
    assert not [name for name in files(path) if name.endswith(".tmp")]
    return found
