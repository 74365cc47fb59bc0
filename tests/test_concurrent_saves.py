"""Processes that save to one path, and others that read there: whatever is seen is whole, and of one generation."""

import multiprocessing
import random
import shutil
import threading
import time

import numpy as np
import pytest

import obmlite
from obmlite import MissingFileError, loading
from obmlite.schema.decode import decode
from tests import crash
from tests.generations import files, look, model, params, whole


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "m.obm"


def test_two_processes_save_at_once(path):
    """Round after round behind a barrier; with a reader that looks all the time."""
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

    def watch(finished, seen):
        try:
            while not finished.is_set():
                seen.append(look(path))
        except Exception as error:  # noqa: BLE001 - the main thread must hear of it
            seen.append(error)

    children = [crash.fork(saver(me)) for me in (0, 1)]
    winners = set()
    try:
        for n in range(rounds):
            if n % 3 == 0:
                shutil.rmtree(path, ignore_errors=True)  # a first save, by both
            finished = threading.Event()
            seen: list = []
            reader = threading.Thread(target=watch, args=(finished, seen))
            reader.start()
            start.wait(30)
            done.wait(30)
            finished.set()
            reader.join()
            assert not [found for found in seen if isinstance(found, Exception)], seen
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


@pytest.mark.parametrize("mmap", [True, False])
def test_readers_while_another_process_replaces_the_package(path, mmap):
    """A reader that holds a model sees the generation that it opened, however late it looks, or an error."""
    model(0).save(path)
    stop = path.with_name("stop")
    satisfied = [path.with_name(f"satisfied-{n}") for n in range(2)]

    def reader(own):
        def run():
            chance = random.Random(own)
            held = []
            while not stop.exists():
                loaded = obmlite.load(path, mmap=mmap)  # never fails: there is a whole package at every moment
                n = int(loaded.metadata["generation"])
                leaf = chance.choice("wb")
                try:
                    # Once the file of one is open, it stays; those that are not yet may be gone by the time.
                    first = np.asarray(loaded.weights["params"][leaf])
                except MissingFileError:
                    continue
                assert np.array_equal(first, params(n)[leaf])
                held.append((n, leaf, loaded, first))
                if len({n for n, *_ in held}) > 5:
                    satisfied[own].touch()
                n, leaf, loaded, first = held[chance.randrange(len(held))]
                assert np.array_equal(first, params(n)[leaf])  # mapped or not, whatever was saved since
                assert np.array_equal(np.asarray(loaded.weights["params"][leaf]), params(n)[leaf])
                other = "b" if leaf == "w" else "w"
                function = loaded.functions["apply"]
                try:
                    assert np.array_equal(np.asarray(loaded.weights["params"][other]), params(n)[other])
                    function.program.blobs(function.module)  # compares its digest
                    assert function.metadata == {"odd": n % 2}
                except MissingFileError as error:
                    pieces = loaded.weights["params"].source.files.weights.pieces
                    assert error.package == str(path)
                    assert error.found in {function.module.file, *(piece.file for own in pieces for piece in own)}

        return run

    readers = [crash.fork(reader(n)) for n in range(2)]
    until = time.monotonic() + 60
    last = 0
    while not all(mark.exists() for mark in satisfied) and time.monotonic() < until:
        last += 1
        model(last).save(path, overwrite=True, max_file_bytes=8 if last % 3 else None, progress=False)
    stop.touch()
    for child in readers:
        child.wait()
    assert all(mark.exists() for mark in satisfied), last
    assert whole(path) == last


def test_a_package_that_is_replaced_twice_while_it_is_opened(path, monkeypatch):
    """Then the files of the manifest that was read are gone; the package is not."""
    model(0).save(path)
    real = loading.open_manifest
    read = []

    def replaced_meanwhile(store):
        read.append(real(store))
        if len(read) == 1:
            model(1).save(path, overwrite=True)
            model(2).save(path, overwrite=True)
        return read[-1]

    monkeypatch.setattr(loading, "open_manifest", replaced_meanwhile)
    assert obmlite.load(path).metadata["generation"] == 2
    assert len(read) == 2
    [file] = (path / "weights").glob(f"*{decode(read[1]).weights['params'].pieces[0][0].file[-20:]}")
    file.unlink()
    with pytest.raises(MissingFileError):  # of a package that nobody replaces
        obmlite.load(path)
