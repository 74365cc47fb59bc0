import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading

import numpy as np
import pytest

from obmlite.errors import CorruptPackageError, PackageExistsError, PackageNotFoundError, UnsafePathError
from obmlite.io.commit import FOLDERS, MANIFEST, StagedFile, Transaction, is_data_name
from obmlite.io.store import LocalDirectory
from tests import crash

# The packages of these tests: the manifest is JSON, {path: SHA-256}, and a generation is a text.


def named(manifest):
    try:
        return list(json.loads(manifest))
    except ValueError as error:
        raise CorruptPackageError("the manifest is no JSON") from error


def contents(generation):
    """What one generation's package holds, without the digests in the names; one file is the same in all."""
    return {
        "functions/apply": f"function {generation}".encode(),
        "weights/params": f"weights {generation} ".encode() * 1000,
        "weights/shared": b"the same in every generation",
        "supplementals/assets": {"a.txt": f"a {generation}".encode(), "deep/er/b.txt": b"b"},
    }


def digest(data):
    return hashlib.sha256(data).hexdigest()


def stage(save, generation):
    """Stages and finishes all of a generation; returns the manifest."""
    manifest = {}
    for path, content in contents(generation).items():
        folder, slug = path.split("/")
        if isinstance(content, bytes):
            with save.create(folder) as file:
                file.write(content[:10])
                file.write(memoryview(content)[10:])
                manifest[file.finish(f"{slug}-{digest(content)[:16]}.bin")] = digest(content)
            continue
        whole = digest(repr(content).encode())[:16]
        staged = {}
        for name, data in content.items():
            staged[name] = save.create(folder)
            staged[name].write(data)
            staged[name].seal()
        for name, data in content.items():
            manifest[staged[name].finish(f"{slug}-{whole}/{name}")] = digest(data)
    return json.dumps(manifest).encode()


def save_package(path, generation, **options):
    with Transaction(path, named=named, **options) as save:
        save.commit(stage(save, generation))


def package_files(path):
    """What a whole package at the path names, each file checked; None if there is no package."""
    try:
        store = LocalDirectory(path)
    except PackageNotFoundError:
        return None
    with store:
        if MANIFEST not in store.files():
            return None
        with store.open(MANIFEST) as file:
            manifest = json.loads(file.read(0, file.size))
        for name, expected in manifest.items():
            with store.open(name) as file:
                assert digest(file.read(0, file.size)) == expected, name
        return set(manifest)


def generation_files(generation):
    names = set()
    for path, content in contents(generation).items():
        if isinstance(content, bytes):
            names.add(f"{path}-{digest(content)[:16]}.bin")
        else:
            names |= {f"{path}-{digest(repr(content).encode())[:16]}/{name}" for name in content}
    return names


def snapshot(path):
    """Every entry below a path, with files' bytes; None if nothing is there."""
    if not os.path.lexists(path):
        return None
    entries = {}
    for folder, folders, files in os.walk(path):
        for name in folders:
            entries[os.path.relpath(os.path.join(folder, name), path)] = None
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                entries[os.path.relpath(os.path.join(folder, name), path)] = file.read()
    return entries


def only_files(entries):
    return {name: data for name, data in (entries or {}).items() if data is not None}


def all_files(path):
    with LocalDirectory(path) as store:
        return set(store.files())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.obm"


# --- saving -----------------------------------------------------------------------------------------------------------


def test_first_save_makes_directories(tmp_path):
    path = tmp_path / "some" / "where" / "model.obm"
    save_package(path, "one")
    assert package_files(path) == generation_files("one")
    assert all_files(path) == {MANIFEST, *generation_files("one")}
    umask = os.umask(0)
    os.umask(umask)
    assert os.stat(path / MANIFEST).st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("spelling", ["model.obm", "./model.obm/", "link/../model.obm"])
def test_relative_paths(tmp_path, monkeypatch, spelling):
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path)
    transaction = Transaction(spelling, named=named)
    monkeypatch.chdir("/")
    with transaction as save:
        save.commit(stage(save, "one"))
    assert package_files(tmp_path / "model.obm") == generation_files("one")


def test_the_directory_may_be_empty_or_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_package(tmp_path / "link", "one")
    assert (tmp_path / "link").is_symlink()
    assert package_files(tmp_path / "real") == generation_files("one")


def test_replacing_keeps_the_previous_generation_and_only_that(path):
    save_package(path, "one")
    save_package(path, "two", overwrite=True)
    assert package_files(path) == generation_files("two")
    assert all_files(path) == {MANIFEST, *generation_files("one"), *generation_files("two")}
    save_package(path, "three", overwrite=True)
    assert all_files(path) == {MANIFEST, *generation_files("two"), *generation_files("three")}
    save_package(path, "three", overwrite=True)
    assert all_files(path) == {MANIFEST, *generation_files("three")}


def test_a_reader_keeps_the_old_bytes(path):
    save_package(path, "one")
    with LocalDirectory(path) as store:
        opened = {name: store.open(name) for name in [MANIFEST, *generation_files("one")]}
        before = {name: file.read(0, file.size) for name, file in opened.items()}
        mapped = {name: file.map() for name, file in opened.items()}
        for generation in ("two", "three", "four"):
            save_package(path, generation, overwrite=True)
        assert all_files(path).isdisjoint(generation_files("one") - generation_files("four"))
        for name, file in opened.items():
            assert file.read(0, file.size) == before[name] == bytes(mapped[name])
            file.close()
    assert package_files(path) == generation_files("four")


def test_what_is_not_ours_in_a_package_stays(path):
    save_package(path, "one")
    (path / "README.md").write_bytes(b"about")
    (path / "weights" / "notes").write_bytes(b"notes")
    (path / "weights" / "folder-0123456789abcdef").mkdir()
    (path / "functions" / "link-0123456789abcdef").symlink_to("/etc/passwd")
    (path / ".obmlite-0123456789abcdef.tmp").mkdir()
    save_package(path, "two", overwrite=True)
    save_package(path, "three", overwrite=True)
    assert {"README.md", "weights/notes", "functions/link-0123456789abcdef"} < all_files(path)
    assert (path / "weights" / "folder-0123456789abcdef").is_dir()


def test_a_damaged_manifest_costs_no_data(path):
    save_package(path, "one")
    (path / MANIFEST).write_bytes(b"damaged")
    (path / "weights" / ".obmlite-0123456789abcdef.tmp").write_bytes(b"")
    with pytest.raises(PackageExistsError, match="already"):
        save_package(path, "two")
    assert ".obmlite-0123456789abcdef.tmp" in os.listdir(path / "weights")
    save_package(path, "two", overwrite=True)
    assert all_files(path) == {MANIFEST, *generation_files("one"), *generation_files("two")}
    save_package(path, "three", overwrite=True)
    assert all_files(path) == {MANIFEST, *generation_files("two"), *generation_files("three")}


def test_an_error_of_named_itself_changes_nothing(path):
    def broken(manifest):
        raise KeyError("a bug")

    save_package(path, "one")
    (path / "weights" / ".obmlite-0123456789abcdef.tmp").write_bytes(b"")
    before = snapshot(path)
    with pytest.raises(KeyError), Transaction(path, overwrite=True, named=broken):
        raise AssertionError("not reached")
    assert snapshot(path) == before
    save_package(path, "two", overwrite=True)  # the lock was given back


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "entry",
    [
        "README.md",
        "folder/",
        "weights/params.safetensors",
        "weights/folder-0123456789abcdef/",
        "weights/.obmlite-0123456789abcdef.tmp/",
        "supplementals/folder/",
        "manifest.obm/",
        ".obmlite-0123456789abcdef.tmp/",
        "functions",
        "functions -> /tmp",
        "manifest.obm -> /etc/passwd",
    ],
)
def test_a_directory_that_holds_something_else_is_not_touched(path, entry, overwrite):
    path.mkdir()
    (path / "supplementals").mkdir()
    (path / "supplementals" / ".obmlite-0123456789abcdef.tmp").write_bytes(b"")
    name, _, target = entry.partition(" -> ")
    (path / name).parent.mkdir(exist_ok=True)
    if target:
        (path / name).symlink_to(target)
    elif name.endswith("/"):
        (path / name).mkdir()
    else:
        (path / name).write_bytes(b"mine")
    before = sorted(path.rglob("*"))
    with pytest.raises(PackageExistsError, match="holds something else") as caught:
        save_package(path, "one", overwrite=overwrite)
    assert caught.value.package == str(path)
    assert name.rstrip("/") in caught.value.found
    assert sorted(path.rglob("*")) == before


def test_a_package_is_not_replaced_unasked(path):
    save_package(path, "one")
    before = snapshot(path)
    with pytest.raises(PackageExistsError, match="already") as caught:
        save_package(path, "two")
    assert "overwrite=True" in caught.value.fix
    assert snapshot(path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_path_that_is_no_directory(tmp_path, overwrite):
    (tmp_path / "file").write_bytes(b"mine")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, problem in (("file", "no directory"), ("fifo", "no directory"), ("dangling", "leads nowhere")):
        with pytest.raises(PackageExistsError, match=problem):
            save_package(tmp_path / name, "one", overwrite=overwrite)
    with pytest.raises(NotADirectoryError):
        save_package(tmp_path / "file" / "below", "one", overwrite=overwrite)
    with pytest.raises(FileNotFoundError):
        save_package(tmp_path / "dangling" / "below", "one", overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "fifo", "file"]


def test_data_names():
    for name in ("params-0123456789abcdef.safetensors", "a.b-c-0123456789abcdef", "x-0123456789abcdef.tar.gz"):
        assert is_data_name(name)
    for name in ("params.safetensors", "x-0123456789ABCDEF", "x-0123456789abcde", "a/x-0123456789abcdef", ".", "x\n"):
        assert not is_data_name(name)


def test_wrong_use(path):
    transaction = Transaction(path, named=named)
    with pytest.raises(RuntimeError, match="not open"):
        transaction.create("weights")
    with transaction as save:
        for folder in ("elsewhere", "weights/below", MANIFEST):
            with pytest.raises(ValueError, match="no place"):
                save.create(folder)
        with pytest.raises(UnsafePathError):
            save.create("weights/..")
        file = save.create("weights")
        file.write(b"abc")
        for name in ("params.safetensors", "x-0123456789abcdef/below", "../x-0123456789abcdef"):
            with pytest.raises(ValueError, match=r"path|name"):
                file.finish(name)
        with pytest.raises(RuntimeError, match="neither finished"):
            save.commit(b"{}")
        with pytest.raises(RuntimeError, match="not committed yet"):
            save.publish("index.json", b"")
        file.finish("x-0123456789abcdef")
        for use in (lambda: file.finish("x-0123456789abcdef"), lambda: file.write(b"")):
            with pytest.raises(RuntimeError):
                use()
        file.discard()
        other = save.create("weights")
        other.discard()
        with pytest.raises(RuntimeError):
            other.seal()
        save.commit(json.dumps({"weights/x-0123456789abcdef": digest(b"abc")}).encode())
        for use in (lambda: save.create("weights"), lambda: save.commit(b"{}")):
            with pytest.raises(RuntimeError, match="already"):
                use()
        for place in (MANIFEST, "weights", "elsewhere/index.json", "weights/deep/index.json"):
            with pytest.raises(ValueError, match="no place"):
                save.publish(place, b"")
    with pytest.raises(RuntimeError, match="not open"):
        save.publish("index.json", b"")
    with pytest.raises(RuntimeError, match="twice"):
        transaction.__enter__()
    assert package_files(path) == {"weights/x-0123456789abcdef"}


# --- staged files and published ones ----------------------------------------------------------------------------------


def test_staged_buffers_of_any_kind(path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:1000]))
    array = np.arange(3000, dtype=np.complex128).reshape(3, 1000)
    with Transaction(path, named=named) as save:
        with save.create("weights") as file:
            file.write(b"")
            file.write(array)
            file.write(np.zeros((0, 2)))
            file.write(bytearray(b"end"))
            assert file.size == array.nbytes + 3
            with pytest.raises(ValueError, match="contiguous"):
                file.write(array.T)
            name = file.finish("x-0123456789abcdef.bin")
        save.commit(json.dumps({name: digest(array.tobytes() + b"end")}).encode())
    assert package_files(path) == {name}


def test_staged_files_in_threads(path):
    def work(save, number, names):
        data = bytes([number]) * 100_000
        with save.create("supplementals" if number % 2 else "weights") as file:
            file.write(data)
            deep = "/deep" if number % 2 else ""
            names[file.finish(f"x-{digest(data)[:16]}{deep}")] = digest(data)

    names = {}
    with Transaction(path, named=named) as save:
        threads = [threading.Thread(target=work, args=(save, number, names)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        save.commit(json.dumps(names).encode())
    assert package_files(path) == set(names)
    assert len(names) == 16


def test_published_files(path):
    with Transaction(path, named=named) as save:
        save.commit(stage(save, "one"))
        save.publish("weights/params.safetensors.index.json", b"1")
        save.publish("weights/params.safetensors.index.json", b"2")
        save.publish("manifest-0123.sig", b"signature")
        before = snapshot(path)
        with crash.fail(1, OSError(errno.ENOSPC, "full")), pytest.raises(OSError, match="full"):
            save.publish("weights/params.safetensors.index.json", b"3")
        assert snapshot(path) == before
    assert (path / "weights" / "params.safetensors.index.json").read_bytes() == b"2"
    assert (path / "manifest-0123.sig").read_bytes() == b"signature"
    assert package_files(path) == generation_files("one")


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_order_of_durability(tmp_path, first):
    path = tmp_path.resolve() / "made" / "model.obm"
    if not first:
        save_package(path, "one")
    calls = []
    with crash.record(calls):
        save_package(path, "two", overwrite=True)
    commit = next(i for i, call in enumerate(calls) if call[0] == "replace" and call[2] == str(path / MANIFEST))
    fsyncs = {}  # path to the numbers of its fsyncs
    for number, call in enumerate(calls):
        if call[0] == "fsync":
            fsyncs.setdefault(call[1], []).append(number)

    def synced_between(name, start, stop):
        return any(start < number < stop for number in fsyncs.get(str(name), ()))

    renamed = set()
    for number, call in enumerate(calls):
        if call[0] != "replace":
            continue
        _, source, target = call
        writes = [i for i, other in enumerate(calls) if other == ("write", source)]
        assert writes
        assert synced_between(source, writes[-1], number), f"{target} was renamed before its bytes were durable"
        if number != commit:
            assert number < commit
            renamed.add(os.path.relpath(target, path))
            assert synced_between(os.path.dirname(target), number, commit), f"{target}'s name was not durable"
    assert renamed == generation_files("two")
    made = {call[1]: number for number, call in enumerate(calls) if call[0] == "mkdir"}
    assert (str(path.parent) in made) == first
    for name, number in made.items():
        assert synced_between(os.path.dirname(name), number, commit), f"the folder {name} was not durable"
    if first:  # even where the directory was there already, left by a save that died
        assert synced_between(path.parent, -1, commit)
    assert calls[commit + 1 :] == [("fsync", str(path))]


def test_a_first_save_into_a_directory_that_was_left_makes_it_durable(path):
    for folder in FOLDERS:
        (path / folder).mkdir(parents=True)
    calls = []
    with crash.record(calls):
        save_package(path, "one")
    before = calls[: next(i for i, call in enumerate(calls) if call[-1].endswith(MANIFEST))]
    assert ("fsync", str(path.resolve())) in before
    assert ("fsync", str(path.resolve().parent)) in before


# --- kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_kill_of_a_first_save(path):
    def check(kill):
        found = package_files(path)
        committed = kill.done > commit
        assert found == (generation_files("one") if committed else None), kill
        save_package(path, "three", overwrite=True)
        assert package_files(path) == generation_files("three")
        expected = {MANIFEST, *generation_files("three"), *(found or ())}
        assert all_files(path) == expected, kill

    commit = None
    kills = 0
    for kill in crash.sweep(lambda: shutil.rmtree(path, ignore_errors=True), lambda: save_package(path, "one")):
        if commit is None:
            commit = len(kill.calls) - 1 - kill.calls[::-1].index("replace")
        kills += 1
        check(kill)
    assert kills > 45
    assert {"write", "fsync", "replace", "mkdir"} == set(kill.calls)


@pytest.mark.long
def test_kill_of_a_replacement(path, tmp_path):
    # The old package comes with what the one before it left, so that the kills meet the clearing too.
    model = tmp_path / "prepared"
    save_package(model, "zero")
    save_package(model, "one", overwrite=True)

    def prepare():
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(model, path)

    commit = None
    for kill in crash.sweep(prepare, lambda: save_package(path, "two", overwrite=True)):
        if commit is None:
            commit = len(kill.calls) - 1 - kill.calls[::-1].index("replace")
        committed = kill.done > commit
        found = package_files(path)
        assert found == generation_files("two" if committed else "one"), kill
        save_package(path, "three", overwrite=True)
        assert package_files(path) == generation_files("three")
        assert all_files(path) == {MANIFEST, *generation_files("three"), *found}, kill
    assert set(kill.calls) == {"write", "fsync", "replace", "mkdir", "unlink", "rmdir"}


def test_a_save_that_was_killed_is_no_reason_to_refuse_the_next(path):
    for kill in crash.sweep(lambda: shutil.rmtree(path, ignore_errors=True), lambda: save_package(path, "one")):
        if package_files(path) is None:
            save_package(path, "two")
            assert all_files(path) == {MANIFEST, *generation_files("two")}, kill


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("old", [None, "one"])
@pytest.mark.parametrize("after", [False, True])
def test_every_call_may_fail(path, number, old, after):
    at = 0
    while True:
        shutil.rmtree(path, ignore_errors=True)
        if old:
            save_package(path, old)
        before = snapshot(path)
        calls = []
        raised = OSError(number, "injected")
        caught = None
        try:
            with crash.record(calls), crash.fail(at, raised, after=after):
                save_package(path, "two", overwrite=True)
        except OSError as error:
            caught = error
        if caught is None:
            break
        assert caught is raised
        committed = any(call[0] == "replace" and call[2].endswith(MANIFEST) for call in calls)
        if committed:
            assert package_files(path) == generation_files("two"), at
            assert all_files(path) == {MANIFEST, *generation_files("two"), *(generation_files(old) if old else ())}
        elif after:
            # Of a folder that was made and reported as failed, as network file systems do, we can't say it is ours.
            assert only_files(snapshot(path)) == only_files(before), (at, calls)
        else:
            assert snapshot(path) == before, (at, calls)
        at += 1
    assert at > 30


def test_a_block_that_raises_or_ends_without_commit_leaves_nothing(path):
    for old in (None, "one"):
        if old:
            save_package(path, old)
        before = snapshot(path)
        with contextlib.suppress(KeyboardInterrupt), Transaction(path, overwrite=True, named=named) as save:
            stage(save, "two")
            save.create("weights").write(b"unfinished")
            raise KeyboardInterrupt
        assert snapshot(path) == before
        with Transaction(path, overwrite=True, named=named) as save:
            stage(save, "two")
        assert snapshot(path) == before


def test_an_interrupt_right_after_the_replacement_undoes_nothing(path, monkeypatch):
    replace = os.replace

    def interrupted(source, target, **options):
        replace(source, target, **options)
        if target == MANIFEST:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_package(path, "one")
    assert package_files(path) == generation_files("one")


def test_folders_that_cannot_be_synced_are_tolerated(path, monkeypatch):
    fsync = os.fsync

    def refuse(descriptor):
        if os.path.isdir(crash.path_of(descriptor)):
            raise OSError(errno.EINVAL, "no fsync for folders here")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    save_package(path, "one")
    assert package_files(path) == generation_files("one")


def test_descriptors_do_not_leak(path):
    def count():
        return len(os.listdir("/dev/fd"))

    before = count()
    save_package(path, "one")
    with pytest.raises(PackageExistsError):
        save_package(path, "two")
    for at in range(0, 40, 3):
        with contextlib.suppress(OSError), crash.fail(at, OSError(errno.EIO, "injected")):
            save_package(path, "two", overwrite=True)
    assert count() == before


def test_where_locking_is_not_possible(path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="no locks here") as caught:
        save_package(path, "one")
    assert "flock" in "".join(caught.value.__notes__)
    assert not path.exists()


def test_an_interrupted_wait_leaves_the_other_ones_directory(path, monkeypatch):
    # We make the directory, another save locks it first, and we are interrupted while waiting for it.
    flock = fcntl.flock
    other = []

    def interrupted(descriptor, operation):
        if operation == fcntl.LOCK_EX and not other:
            other.append(os.open(path, os.O_RDONLY))
            flock(other[0], fcntl.LOCK_EX)
            raise KeyboardInterrupt
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_package(path, "one")
    assert path.is_dir()
    os.close(other[0])


# --- several savers ---------------------------------------------------------------------------------------------------


class Crew:
    """Processes that all start an action when told, round after round."""

    def __init__(self, size, action):
        self.pipes = []
        self.children = []
        for number in range(size):
            go, start = os.pipe()
            result, done = os.pipe()
            inherited = [end for pair in self.pipes for end in pair] + [start, result]

            def loop(number=number, go=go, done=done, inherited=inherited):
                for end in inherited:  # or no child would see the others' pipes close
                    os.close(end)
                while order := os.read(go, 1):
                    os.write(done, action(number, order[0]).encode())

            self.children.append(crash.fork(loop))
            os.close(go)
            os.close(done)
            self.pipes.append((start, result))

    def round(self, number):
        for start, _ in self.pipes:
            os.write(start, bytes([number]))
        return [os.read(result, 100).decode() for _, result in self.pipes]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pair in self.pipes:
            for end in pair:
                os.close(end)
        for child in self.children:
            child.wait()


def test_savers_of_one_path_leave_one_whole_package(path):
    def action(number, order):
        save_package(path, f"{number} {order}", overwrite=True)
        return "saved"

    with Crew(3, action) as crew:
        for order in range(25):
            if order % 5 == 0:
                shutil.rmtree(path, ignore_errors=True)
            assert crew.round(order) == ["saved"] * 3
            names = package_files(path)
            assert names in [generation_files(f"{number} {order}") for number in range(3)]
            previous = [generation_files(f"{number} {order}") | {MANIFEST} for number in range(3)]
            assert all_files(path) in [names | other for other in previous]


def test_one_of_several_first_savers_wins(path):
    def action(number, order):
        try:
            save_package(path, f"{number} {order}")
        except PackageExistsError:
            return "refused"
        return "saved"

    with Crew(3, action) as crew:
        for order in range(25):
            shutil.rmtree(path, ignore_errors=True)
            results = crew.round(order)
            assert sorted(results) == ["refused", "refused", "saved"]
            winner = results.index("saved")
            assert package_files(path) == generation_files(f"{winner} {order}")
            assert all_files(path) == {MANIFEST, *generation_files(f"{winner} {order}")}


def test_a_saver_that_gives_up_takes_no_directory_from_another(path):
    def action(number, order):
        try:
            with Transaction(path, named=named) as save:
                manifest = stage(save, f"{number} {order}")
                if number < 2:
                    raise InterruptedError
                save.commit(manifest)
        except InterruptedError:
            return "gave up"
        except PackageExistsError:
            return "refused"
        return "saved"

    with Crew(3, action) as crew:
        for order in range(25):
            shutil.rmtree(path, ignore_errors=True)
            assert crew.round(order)[2] == "saved"
            assert all_files(path) == {MANIFEST, *generation_files(f"2 {order}")}


def test_a_second_saver_waits(path):
    with Transaction(path, named=named) as save:
        child = crash.fork(lambda: save_package(path, "two", overwrite=True))
        manifest = stage(save, "one")
        assert package_files(path) is None
        save.commit(manifest)
        assert package_files(path) == generation_files("one")
    child.wait()
    assert package_files(path) == generation_files("two")


def test_a_forked_child_does_not_keep_the_lock(path):
    stop, going = os.pipe()

    def wait():
        os.close(going)
        os.read(stop, 1)

    with Transaction(path, named=named) as save:
        child = crash.fork(wait)
        save.commit(stage(save, "one"))
    save_package(path, "two", overwrite=True)  # waits for ever if the child, which has the descriptor, has the lock
    os.close(going)
    os.close(stop)
    child.wait()


def test_faces():
    assert FOLDERS == ("functions", "weights", "supplementals")
    assert MANIFEST == "manifest.obm"
    assert StagedFile.__doc__
