"""What the disk may hold after a power cut, at every moment of a save and after it: the old package or the new one."""

import json
import os
import random

import pytest
from safetensors.numpy import load_file

import obmlite
from obmlite.consolidate import consolidate
from obmlite.errors import ObmliteError
from obmlite.foreign import realign
from obmlite.interop import safejax
from tests import generations, power
from tests.generations import model, whole, write_assets

HERE = os.path.join("deep", "m.obm")


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    return [write_assets(folder / str(n), n) for n in range(3)]


@pytest.fixture
def disk(tmp_path):
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.fixture
def cuts(tmp_path):
    return power.Cuts(tmp_path / "after", look)


def look(root):
    return whole(os.path.join(root, HERE), run=False, verified=False)


def save(disk, n, assets):
    model(n, assets[n]).save(disk / HERE, overwrite=True, max_file_bytes=8 if n == 1 else None, progress=False)


def test_of_a_first_save(disk, cuts, assets):
    recorder = power.Recorder(disk)
    seen = set()
    with recorder.recording(lambda: seen.update(cuts.after(recorder.disk))):
        save(disk, 1, assets)
    recorder.check()
    assert seen == {None, 1}
    assert set(cuts.after(recorder.disk)) == {1}  # the save is over
    assert recorder.calls > 40
    assert cuts.number > 40


def test_of_a_replacement(disk, cuts, assets):
    save(disk, 2, assets)
    save(disk, 0, assets)  # with what the one before it left, which the next one clears
    recorder = power.Recorder(disk)
    seen = []
    with recorder.recording(lambda: seen.append(set(cuts.after(recorder.disk)))):
        save(disk, 1, assets)
    recorder.check()
    # The old one, then for a moment either, and from the last fsync of the folder on the new one.
    assert [found for n, found in enumerate(seen) if not n or found != seen[n - 1]] == [{0}, {0, 1}, {1}]
    assert cuts.number > 40


@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.long)])
def test_of_a_save_after_one_that_was_killed(disk, tmp_path, assets, every):
    """What a killed save has done is not durable, and what the next one removes may be all that is."""
    model(0).save(disk / HERE)
    before = power.contents(disk)

    def killed(at):
        power.lay_out(before, os.fspath(disk))
        recorder = power.Recorder(disk)
        with recorder.recording(kill_at=at):
            save(disk, 1, assets)
        return recorder

    calls = killed(None).calls
    assert calls > 40
    for at in sorted({*range(0, calls, every), *range(calls - 6, calls)}):  # the last ones are around the commit
        recorder = killed(at)
        assert recorder.calls == at
        cuts = power.Cuts(tmp_path / f"after {at}", look, most=1)
        seen = set()
        with recorder.recording(lambda cuts=cuts, seen=seen, recorder=recorder: seen.update(cuts.after(recorder.disk))):
            save(disk, 2, assets)
        recorder.check()
        assert seen in ({0, 2}, {0, 1, 2}, {1, 2})
        assert set(cuts.after(recorder.disk)) == {2}


def test_of_a_save_after_one_whose_last_fsync_failed(disk, cuts, assets):
    """The new manifest is in place then, and nobody knows whether the disk has it."""
    model(0).save(disk / HERE)
    recorder = power.Recorder(disk)
    with recorder.recording():
        save(disk, 1, assets)
    syncs = recorder.syncs
    for lost in range(1, 4):
        power.lay_out({}, os.fspath(disk))
        model(0).save(disk / HERE)
        recorder = power.Recorder(disk)
        with pytest.raises(OSError, match="injected"), recorder.recording(fail_from=syncs - lost):
            save(disk, 1, assets)
        assert look(disk) in (0, 1)
        seen = set()
        with recorder.recording(lambda seen=seen, recorder=recorder: seen.update(cuts.after(recorder.disk))):
            save(disk, 2, assets)
        recorder.check()
        assert seen in ({0, 2}, {0, 1, 2}, {1, 2})
        assert set(cuts.after(recorder.disk)) == {2}


# --- what else writes


def consolidating(disk, scratch):
    model(1).save(scratch / "pieces.obm", max_file_bytes=8)
    return lambda: consolidate(scratch / "pieces.obm", disk / HERE), look


def a_new_version(disk, scratch):
    model(0).save(disk / "1")
    return lambda: model(1).save(disk / "2"), lambda root: whole(root, run=False, verified=False)


def extracting(disk, scratch):
    model(1, write_assets(scratch / "assets", 1)).save(scratch / "m.obm")
    assets = obmlite.load(scratch / "m.obm").supplementals["assets"]

    def look(root):
        out = os.path.join(root, "out")
        if not os.path.exists(out):
            return None
        assert power.contents(out) == power.contents(scratch / "assets")
        return 1

    return lambda: assets.extract(disk / "out"), look


def a_safejax_file(disk, scratch):
    safejax.serialize(generations.params(0), filename=disk / "w.safetensors")

    def look(root):
        found = load_file(os.path.join(root, "w.safetensors"))
        n = int(found["w"][0, 0])
        assert all((found[name] == value).all() for name, value in generations.params(n).items())
        return n

    return lambda: safejax.serialize(generations.params(1), filename=disk / "w.safetensors"), look


def realigning(disk, scratch):
    names = {f"model-0000{n}-of-00002.safetensors": {f"w{n}": generations.params(n)["w"]} for n in (1, 2)}
    for name, tensors in names.items():
        safejax.serialize(tensors, filename=disk / name, metadata={"odd": "x" * 7})
    index = {"metadata": {}, "weight_map": {leaf: name for name, own in names.items() for leaf in own}}
    with open(disk / "model.safetensors.index.json", "w") as stream:
        json.dump(index, stream)

    def look(root):
        weights = obmlite.open_weights(root, mmap=False)
        return 1 if [float(weights[f"w{n}"][0, 0]) for n in (1, 2)] == [1, 2] else None

    return lambda: realign(disk, disk, overwrite=True), look


@pytest.mark.parametrize(
    ("begin", "before"),
    [(consolidating, None), (a_new_version, 0), (extracting, None), (a_safejax_file, 0), (realigning, 1)],
)
def test_of_other_writing(disk, tmp_path, begin, before):
    action, look = begin(disk, tmp_path)
    cuts = power.Cuts(tmp_path / "after", look, most=2)
    recorder = power.Recorder(disk)
    seen = set(cuts.after(recorder.disk))
    assert seen == {before}
    with recorder.recording(lambda: seen.update(cuts.after(recorder.disk))):
        action()
    recorder.check()
    assert seen == {before, 1}
    assert set(cuts.after(recorder.disk)) == {1}
    assert cuts.number >= 2


# --- the model of a disk


@pytest.mark.parametrize("skipped", ["files", "folders"])
def test_a_save_that_does_not_synchronize_is_found_out(disk, tmp_path, assets, skipped):
    """So that the tests above say something."""

    def broken(root):
        try:
            return look(root)
        except ObmliteError:
            return "broken"

    save(disk, 0, assets)
    cuts = power.Cuts(tmp_path / "after", broken)
    recorder = power.Recorder(disk)
    seen = set()
    with recorder.recording(lambda: seen.update(cuts.after(recorder.disk)), forgotten=skipped):
        save(disk, 1, assets)
    assert "broken" in seen


def test_what_a_cut_may_leave(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    (folder / "old").write_bytes(b"old")
    recorder = power.Recorder(folder)

    def states():
        return {frozenset(files.items()) for files in recorder.disk.cut(random.Random(0), 8)}

    def state(**files):
        return frozenset(files.items())

    with recorder.recording():
        descriptor = os.open(folder / "new", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        assert states() == {state(old=b"old"), state(old=b"old", new=b"")}
        os.write(descriptor, b"1234")
        several = {state(old=b"old", new=content) for content in (b"", b"12", b"\0\0\0\0")}
        assert states() == {state(old=b"old"), *several}
        os.rename(folder / "new", folder / "old")  # before its bytes are durable
        renamed = {state(old=content) for content in (b"", b"12", b"\0\0\0\0")}
        assert renamed <= states()
        os.fsync(descriptor)
        assert states() == {state(old=b"old"), state(old=b"old", new=b"1234"), state(old=b"1234")}
        above = os.open(folder, os.O_RDONLY)
        os.fsync(above)
        assert states() == {state(old=b"1234")}
        os.mkdir(folder / "below")
        os.rename(folder / "old", folder / "below" / "old")
        assert states() == {
            state(old=b"1234"),
            state(old=b"1234", below=None),
            frozenset({("below", None), ("below/old", b"1234")}),
            state(),  # the file went to a folder that is not there
        }
        os.fsync(above)
        assert states() == {frozenset({("below", None), ("below/old", b"1234")})}
        os.close(above)
        os.close(descriptor)
    recorder.check()
    (folder / "unseen").touch()
    with pytest.raises(AssertionError, match="not all"):
        recorder.check()
