"""Weights are written out to the disk while they are still being saved."""

import errno
import os
import threading

import numpy as np
import pytest

import obmlite
from obmlite import _writing
from obmlite.verify import verify

FLUSH = "fdatasync" if hasattr(os, "fdatasync") else "fsync"
WEIGHTS = {f"w{n}": np.full(50_000, n, np.float32) for n in range(20)}


@pytest.fixture(autouse=True)
def early(monkeypatch):
    monkeypatch.setattr(_writing, "_FLUSHED", 1)


def save(path):
    obmlite.Model({"params": obmlite.Weights(WEIGHTS)}).save(path, progress=False)


def test_on_another_thread_and_whole(tmp_path, monkeypatch):
    threads = set()
    flush = getattr(os, FLUSH)
    monkeypatch.setattr(os, FLUSH, lambda descriptor: (threads.add(threading.current_thread()), flush(descriptor))[1])
    save(tmp_path / "m.obm")
    assert threads - {threading.main_thread()}
    assert verify(tmp_path / "m.obm").good


def test_one_that_fails_fails_the_save_though_later_ones_do_not(tmp_path, monkeypatch):
    # The kernel reports a failed write to one caller only.
    flush, failed = getattr(os, FLUSH), []

    def fail(descriptor):
        if failed or threading.current_thread() is threading.main_thread():
            return flush(descriptor)
        failed.append(descriptor)
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, FLUSH, fail)
    with pytest.raises(OSError, match="the disk is broken"):
        save(tmp_path / "m.obm")
    assert os.listdir(tmp_path) == []
