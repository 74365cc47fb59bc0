"""Whole models whose saving is killed; the transaction below has its own tests in ``io/test_commit.py``.

What a kill leaves is what the kernel had been told of. What a power cut leaves is in ``test_power_cuts.py``.
"""

import collections
import faulthandler
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import obmlite
from obmlite import PackageNotFoundError
from obmlite.consolidate import consolidate
from obmlite.foreign import realign
from obmlite.interop import safejax
from obmlite.schema.decode import decode
from obmlite.verify import verify
from tests import crash
from tests.generations import asset_texts, files, model, params, whole, write_assets

SAVING = {"write": 7, "fsync": 9, "replace": 5}
"""Calls that any save of these models makes at least: a function, weights in two files, their index, the manifest."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "m.obm"


@pytest.fixture
def packages(tmp_path):
    """One package of each of two generations: one with what the one before it left, and one in several files."""
    model(5).save(tmp_path / "0")
    model(0).save(tmp_path / "0", overwrite=True)
    model(1).save(tmp_path / "1", max_file_bytes=8)
    return [tmp_path / "0", tmp_path / "1"]


def temporary(folder):
    return [name for name in files(folder) if name.endswith(".tmp")]


def test_a_first_save_that_is_killed(path):
    seen = set()

    def prepare():
        shutil.rmtree(path.parent, ignore_errors=True)

    for _ in crash.sweep(prepare, lambda: model(1).save(path, max_file_bytes=8), calls={**SAVING, "mkdir": 4}):
        n = whole(path, run=1 not in seen) if path.exists() else None
        assert n in (None, 1)
        seen.add(n)
        # The next save goes through without overwrite= where there is no package, and clears what was left.
        model(2).save(path, overwrite=n is not None)
        assert whole(path, run=False) == 2
        assert not temporary(path)
        if n is None:
            assert set(files(path)) - {"manifest.obm"} == set(decode((path / "manifest.obm").read_bytes()).files)
    assert seen == {None, 1}


def test_a_replacement_that_is_killed(path, packages):
    seen = []

    def prepare():
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(packages[0], path)

    def action():
        model(1).save(path, overwrite=True, max_file_bytes=8)

    for kill in crash.sweep(prepare, action, calls={**SAVING, "unlink": 2}):
        n = whole(path, run=kill.calls[kill.at] == "replace" and kill.after and kill.at > len(kill.calls) - 8)
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


# --- what else writes


def test_a_new_version_that_is_killed(tmp_path, packages):
    """It becomes the one that is loaded at once or not at all, and until then the one before it is."""
    folder = tmp_path / "versions"
    shutil.copytree(packages[0], folder / "1")
    seen = []

    def action():
        model(1).save(folder / "2", max_file_bytes=8)

    for _ in crash.sweep(lambda: shutil.rmtree(folder / "2", ignore_errors=True), action, calls=SAVING):
        n = whole(folder, run=False)
        seen.append(n)
        if n == 0 and (folder / "2").exists():
            with pytest.raises(PackageNotFoundError):
                obmlite.load(folder, version=2)
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}


def test_a_consolidation_that_is_killed(path, packages):
    seen = set()
    before = {name: (packages[1] / name).read_bytes() for name in files(packages[1])}

    def prepare():
        shutil.rmtree(path.parent, ignore_errors=True)

    calls = {"write": 5, "fsync": 7, "replace": 3, "mkdir": 4}
    for _ in crash.sweep(prepare, lambda: consolidate(packages[1], path), calls=calls):
        n = whole(path, run=False) if path.exists() else None
        if n is None:
            consolidate(packages[1], path)  # goes through, and clears what was left
            assert whole(path, run=False) == 1
            assert not verify(path).extra
        seen.add(n)
    assert seen == {None, 1}
    assert {name: (packages[1] / name).read_bytes() for name in files(packages[1])} == before


def test_realigning_in_place_that_is_killed(tmp_path):
    """Each file is the old one or the new one, and both hold the same; what is half written has another name."""
    original, place = tmp_path / "original", tmp_path / "place"
    original.mkdir()
    values = {n: {f"w{n}": np.arange(n + 5, dtype=np.float32), f"b{n}": np.ones(3, np.int8)} for n in range(2)}
    names = [f"model-0000{n + 1}-of-00002.safetensors" for n in range(2)]
    for n, name in enumerate(names):
        safejax.serialize(values[n], filename=original / name)
    index = {"metadata": {}, "weight_map": {leaf: names[n] for n in range(2) for leaf in values[n]}}
    (original / "model.safetensors.index.json").write_text(json.dumps(index))

    def prepare():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(original, place)

    for _ in crash.sweep(
        prepare, lambda: realign(place, place, overwrite=True), calls={"write": 5, "fsync": 4, "replace": 3}
    ):
        for n, name in enumerate(names):
            found = load_file(place / name)
            assert found.keys() == values[n].keys()
            assert all(np.array_equal(found[leaf], value) for leaf, value in values[n].items())
        assert json.loads((place / "model.safetensors.index.json").read_text())["weight_map"] == index["weight_map"]
        weights = obmlite.open_weights(place)
        assert np.array_equal(np.asarray(weights["w1"]), values[1]["w1"])
        assert set(files(place)) - {*names, "model.safetensors.index.json"} == set(temporary(place))


def test_a_file_of_safejax_that_is_killed(tmp_path):
    target = tmp_path / "params.safetensors"
    seen = []

    def prepare():
        safejax.serialize(params(0), filename=target)

    for _ in crash.sweep(
        prepare,
        lambda: safejax.serialize(params(1), filename=target),
        calls={"write": 3, "fsync": 2, "replace": 1},
    ):
        found = load_file(target)
        n = int(found["w"][0, 0])
        assert {name: value.tolist() for name, value in found.items()} == {k: v.tolist() for k, v in params(n).items()}
        seen.append(n)
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}


def test_an_extraction_that_is_killed(path, tmp_path):
    model(0, write_assets(tmp_path / "assets", 0)).save(path)
    assets = obmlite.load(path).supplementals["assets"]
    out = tmp_path / "out"
    seen = set()
    for _ in crash.sweep(
        lambda: shutil.rmtree(out, ignore_errors=True),
        lambda: assets.extract(out / "assets"),
        calls={"write": 2, "fsync": 5, "mkdir": 4, "rename": 1},
    ):
        there = (out / "assets").exists()
        if there:
            assert {name: (out / "assets" / name).read_text() for name in files(out / "assets")} == asset_texts(0)
        else:
            shutil.rmtree(out, ignore_errors=True)
            assets.extract(out / "assets")
        seen.add(there)
    assert seen == {False, True}


def test_signing_that_is_killed(path, tmp_path):
    """Whoever trusts the first signature can load at every moment; and a save after the signed one clears up."""
    pytest.importorskip("cryptography")
    from obmlite import signing

    keys = [signing.keygen(tmp_path / name) for name in ("first", "second")]
    signed = tmp_path / "signed.obm"
    model(0).save(signed)
    signing.sign(signed, tmp_path / "first")
    seen = []

    def prepare():
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(signed, path)

    for _ in crash.sweep(
        prepare, lambda: signing.sign(path, tmp_path / "second"), calls={"write": 1, "fsync": 2, "replace": 1}
    ):
        assert whole(path, run=False, public_key=keys[0][0]) == 0
        try:
            seen.append(whole(path, run=False, public_key=keys[1][0]))
        except obmlite.SignatureError:
            seen.append(None)
        model(1).save(path, overwrite=True)
        assert not temporary(path)
        with pytest.raises(obmlite.SignatureError):
            obmlite.load(path, public_key=keys[0][0])
        model(2).save(path, overwrite=True)
        assert not list(path.glob("*.sig"))
    assert seen == sorted(seen, key=lambda n: n is not None)
    assert set(seen) == {None, 0}


# --- the order of calls


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
    # The generation before the previous one goes first, when the previous one's manifest is durable; of that, nothing.
    removed = [i for i, call in enumerate(calls) if call[0] in ("unlink", "rmdir")]
    assert removed == ([] if first else [1, 2])
    assert first or calls[0] == ("fsync", root)
    after = calls[commit + 2 :]
    assert [call[-1] for call in after if call[0] == "replace"] == [f"{root}/weights/params.safetensors.index.json"]
    made = [call[1] for call in calls if call[0] == "mkdir"]
    if first:
        assert {os.path.dirname(root), root, f"{root}/weights", f"{root}/functions"} <= set(made)
        for folder in (root, os.path.dirname(root), os.path.dirname(os.path.dirname(root))):
            assert ("fsync", folder) in calls[:commit]
    else:
        assert made == []


# --- a file that changes under a reader


def test_a_file_that_shrinks_under_a_reader(path):
    """Where files are read, it is an error. Where they are mapped, it kills the process that touches a lost page."""
    weights = {"w": np.arange(1 << 16, dtype=np.float32), "b": np.ones(4, np.float32)}
    obmlite.Model({"params": obmlite.Weights(weights)}).save(path)
    [file] = (path / "weights").iterdir()

    def touch(mmap):
        opened = obmlite.load(path, mmap=mmap).weights["params"]
        np.asarray(opened["b"])  # opens the file
        os.truncate(file, 4096)
        with pytest.raises(obmlite.CorruptPackageError, match="shorter") as caught:
            np.asarray(opened["w"]).sum()
        return [caught.value.leaf, caught.value.fix]

    content = file.read_bytes()
    assert crash.fork(lambda: touch(False)).wait() == [
        "w",
        "load the package again; files of a package must not be written in place",
    ]
    file.write_bytes(content)

    def lose():
        faulthandler.disable()
        array = np.asarray(obmlite.load(path, mmap=True).weights["params"]["w"])
        os.truncate(file, 4096)
        array.sum()

    with pytest.raises(AssertionError, match=f"status {signal.SIGBUS}"):
        crash.fork(lose).wait()
    with pytest.raises(obmlite.CorruptPackageError):
        np.asarray(obmlite.load(path).weights["params"]["w"])


# --- whether all of this sees what is done

TRACED = """
import json, os, pathlib, shutil, sys
import jax, numpy as np, obmlite
from obmlite.consolidate import consolidate
from obmlite.foreign import realign
from obmlite.interop import safejax
from tests import crash
from tests.generations import model, params, write_assets

folder = pathlib.Path(sys.argv[1])
model(0).save(folder / "m.obm")
model(1, write_assets(folder / "assets", 1)).save(folder / "m.obm", overwrite=True)
new = model(2)
calls = []
os.stat(folder / "begin")
with crash.record(calls):
    new.save(folder / "m.obm", overwrite=True, max_file_bytes=8)
    consolidate(folder / "m.obm", folder / "out.obm")
    safejax.serialize(params(0), filename=folder / "w.safetensors")
    realign(folder / "w.safetensors", folder / "new" / "w.safetensors")
    obmlite.Supplemental.from_directory(folder / "assets").extract(folder / "copy")
os.stat(folder / "end")
names = {"replace": "rename", "remove": "unlink"}
print(json.dumps([names.get(call[0], call[0]) for call in calls]))
"""

# Every call of Linux that changes a file, a name or what is known of them; of the others none is allowed.
CHANGING = (
    "write,writev,pwrite64,pwritev,pwritev2,fsync,fdatasync,sync,syncfs,sync_file_range,msync,rename,renameat,renameat2,"
    "mkdir,mkdirat,mknod,mknodat,unlink,unlinkat,rmdir,link,linkat,symlink,symlinkat,truncate,ftruncate,fallocate,"
    "copy_file_range,sendfile,splice,chmod,fchmod,fchmodat,chown,fchown,fchownat,utimensat,setxattr,fsetxattr"
)


@pytest.mark.long
def test_every_call_that_changes_something_is_among_those_that_are_killed(tmp_path):
    """What the kernel was asked to do, against what the sweeps saw."""
    if (
        shutil.which("strace") is None
        or subprocess.run(["strace", "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no strace here, or it may not trace")
    log = tmp_path / "log"
    folder = tmp_path / "folder"
    (folder / "new").mkdir(parents=True)
    (folder / "begin").touch()
    (folder / "end").touch()
    done = subprocess.run(
        [
            "strace",
            "-f",
            "-y",
            "-o",
            log,
            "-e",
            "trace=" + ",".join("?" + name for name in [*CHANGING.split(","), "stat", "newfstatat", "statx"]),
            sys.executable,
            "-c",
            TRACED,
            folder,
        ],
        cwd=pathlib.Path(__file__).resolve().parent.parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = collections.Counter(json.loads(done.stdout))
    text = log.read_text()
    text = text[text.index(f'"{folder}/begin"') : text.index(f'"{folder}/end"')]
    asked = collections.Counter()
    for line in text.splitlines():
        found = re.match(r"\d+ +(\w+)\((.*)", line)
        if found and str(folder) in line and "stat" not in found[1] and " = -1 " not in line:
            name = re.sub("at2?$", "", found[1])
            asked["rmdir" if name == "unlink" and "AT_REMOVEDIR" in line else name] += 1
    assert asked.total() > 50
    assert asked == seen
