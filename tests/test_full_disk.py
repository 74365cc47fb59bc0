"""Disks that are full or read-only, and calls that fail: an error, nothing half written, and nothing left behind."""

import errno
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import obmlite
from obmlite.consolidate import consolidate
from obmlite.foreign import realign
from obmlite.interop import safejax
from obmlite.verify import verify
from tests import crash, power
from tests.generations import model, params, whole, write_assets

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Runs with a file system of its own, of 128 KiB: with no page of it free, with one, and so on until it is enough.
FULL = """
import errno, json, os, shutil, sys
import numpy as np
import obmlite
from tests import power
from tests.generations import model, whole

disk, ballast = sys.argv[1], os.path.join(sys.argv[1], "ballast")
path = os.path.join(disk, "m.obm")
large = obmlite.Weights({"w": np.arange(5000, dtype=np.float32)})
bigger = obmlite.Model({"large": large, "params": obmlite.Weights(np.ones(3000, np.float32))})
found = []
for old in (False, True):
    left = 0
    while True:
        if old and not os.path.exists(path):
            model(0).save(path)
        with open(ballast, "wb", buffering=0) as stream:
            try:
                while True:
                    stream.write(bytes(4096))
            except OSError:
                stream.truncate(stream.tell() - left)
        before = power.contents(disk)
        try:
            bigger.save(path, overwrite=True, max_file_bytes=20_000, progress=False)
        except OSError as error:
            assert power.contents(disk) == before, (left, set(power.contents(disk)) ^ set(before))
            assert not old or whole(path, run=False) == 0
            found.append([old, left, error.errno])
            left += 4096
        else:
            break
    assert np.array_equal(np.asarray(obmlite.load(path).weights["large"]["w"]), np.arange(5000))
    os.unlink(ballast)
    shutil.rmtree(path)

from obmlite.interop import safejax
model(0).save(path)
os.system(f"mount -o remount,ro {disk}")
before = power.contents(disk)
read_only = []
for action in (
    lambda: model(1).save(path, overwrite=True),
    lambda: model(1).save(os.path.join(disk, "other", "m.obm")),
    lambda: safejax.serialize({"w": np.ones(3)}, filename=os.path.join(disk, "w.safetensors")),
):
    try:
        action()
    except OSError as error:
        read_only.append(error.errno)
assert power.contents(disk) == before
assert whole(path) == 0
print(json.dumps([found, read_only]))
"""


def test_a_small_disk_that_is_full_and_then_read_only(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=128k none {disk}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*command, mount], capture_output=True, check=False).returncode
    ):
        pytest.skip("no file system can be mounted here, not even in a user namespace")
    script = f'{mount} && exec "$0" -c "$1" {disk}'
    done = subprocess.run(
        [*command, script, sys.executable, FULL],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    full, read_only = json.loads(done.stdout)
    for old in (False, True):
        errors = [number for kind, _, number in full if kind is old]
        assert len(errors) >= 8  # it failed at that many places
        assert set(errors) == {errno.ENOSPC}
    assert read_only == [errno.EROFS] * 3


@pytest.mark.parametrize("old", [False, True])
def test_files_that_may_not_grow(tmp_path, old):
    """What needs no file system of its own: the kernel refuses to let a file become longer, and writes a part of it."""
    path = tmp_path / "m.obm"
    large = obmlite.Model({"large": obmlite.Weights({"w": np.arange(5000, dtype=np.float32)})})
    failed = 0
    for size in (1, 500, 4000, 4096, 5000, 20_000, 1 << 20):
        shutil.rmtree(path, ignore_errors=True)
        if old:
            model(0).save(path)
        before = power.contents(tmp_path)

        def action(size=size):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            try:
                large.save(path, overwrite=True, progress=False)
            except OSError as error:
                return error.errno
            return None

        number = crash.fork(action).wait()
        if number is None:
            assert np.array_equal(np.asarray(obmlite.load(path).weights["large"]["w"]), np.arange(5000))
            continue
        failed += 1
        assert number == errno.EFBIG
        assert power.contents(tmp_path) == before
    assert failed == 6


# --- each call in turn


def consolidating(folder):
    model(1).save(folder / "pieces.obm", max_file_bytes=8)

    def done():
        assert whole(folder / "out.obm", run=False) == 1
        return verify(folder / "out.obm").good

    return lambda: consolidate(folder / "pieces.obm", folder / "out.obm"), done


def extracting(folder):
    model(0, write_assets(folder / "assets", 0)).save(folder / "m.obm")
    assets = obmlite.load(folder / "m.obm").supplementals["assets"]

    def done():
        return power.contents(folder / "out") == power.contents(folder / "assets")

    return lambda: assets.extract(folder / "out"), done


def a_safejax_file(folder):
    safejax.serialize(params(0), filename=folder / "w.safetensors")

    def done():
        return np.array_equal(load_file(folder / "w.safetensors")["w"], params(1)["w"])

    return lambda: safejax.serialize(params(1), filename=folder / "w.safetensors"), done


def realigning(folder):
    place = folder / "place"
    place.mkdir()
    safejax.serialize(params(0), filename=place / "model.safetensors")
    out = folder / "out.safetensors"

    def done():
        return np.array_equal(load_file(out)["w"], params(0)["w"])

    return lambda: realign(place / "model.safetensors", out), done


@pytest.mark.parametrize("begin", [consolidating, extracting, a_safejax_file, realigning])
def test_every_call_may_fail(tmp_path, begin):
    """Saving itself, at every call, is in ``test_saving.py`` and ``io/test_commit.py``."""
    folder = tmp_path / "folder"
    folder.mkdir()
    calls = crash.run(begin(folder)[0]).calls
    raised = 0
    for at in range(len(calls)):
        shutil.rmtree(folder)
        folder.mkdir()
        action, done = begin(folder)
        before = power.contents(folder)
        try:
            with crash.fail(at, OSError(errno.EIO, "injected")):
                action()
        except OSError as error:
            assert error.errno == errno.EIO
            raised += 1
        else:
            assert calls[at] == "mkdir"  # of a folder that is there
            assert done()
            continue
        found = power.contents(folder)
        assert not [name for name in found if name.endswith(".tmp")]
        assert found == before or done()  # what failed was the last fsync, which comes after the renaming
    assert raised >= 4
