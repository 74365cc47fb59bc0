"""The versions of one model: what is loaded, what stays when something goes wrong, what is tried again."""

import os
import shutil
import weakref

import numpy as np
import pytest

import obmlite
from obmlite import signing
from obmlite.serving import All, Code, Latest, ModelConfig, ServingError, Specific, State
from obmlite.serving import manager as manager_module
from obmlite.serving.manager import Manager
from obmlite.serving.observer import Silent
from tests.serving.packages import file_of, flip, rows, save


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Versions 1, 2 and 10."""
    base = tmp_path_factory.mktemp("packages")
    for number in (1, 2, 10):
        save(base, number)
    return base


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "half"
    path.mkdir()
    return path


@pytest.fixture
def add(packages, base):
    """Puts versions below the base path."""

    def add(*numbers, name=None):
        for number in numbers:
            shutil.copytree(packages / str(number), base / f".{number}")
            os.rename(base / f".{number}", base / (name or str(number)))

    return add


@pytest.fixture
def manage(base):
    """Makes managers, and ends them."""
    made = []

    def manage(policy=None, *, retries=5, retry_seconds=0.0, load=obmlite.load, **options):
        config = ModelConfig("half", base, policy or Latest(), **options)
        made.append(Manager(config, load, retries=retries, retry_seconds=retry_seconds))
        return made[-1]

    yield manage
    for manager in made:
        manager.want(False)


def factor(manager, version=None):
    """By what the version that is served multiplies."""
    servable = manager.acquire(version)
    try:
        return float(servable.predict({"x": rows(1)})["output_0"][0, 0])
    finally:
        servable.release()


def states(manager):
    return [(status.version, status.state, status.code) for status in manager.statuses()]


def served(version):
    return version, State.AVAILABLE, Code.OK


def ended(version):
    return version, State.END, Code.OK


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Latest(), [10]),
        (Latest(2), [10, 2]),
        (All(), [10, 2, 1]),
        (Specific((1, 2)), [2, 1]),
        (Specific((1, 7)), [1]),
        (Specific((7,)), []),
    ],
)
def test_policies(add, manage, policy, expected):
    add(1, 2, 10)
    manager = manage(policy)
    manager.look()
    assert manager.available() == expected
    assert states(manager) == [served(version) for version in expected]
    for version in expected:
        assert factor(manager, version) == version


def test_a_new_version_replaces_the_old_one(add, manage):
    add(1)
    manager = manage()
    assert not manager.looked
    manager.look()
    assert factor(manager) == 1
    held = manager.acquire()
    add(2)
    manager.look()
    assert states(manager) == [served(2), (1, State.UNLOADING, Code.OK)]
    assert factor(manager) == 2
    assert held.predict({"x": rows(1)})["output_0"][0, 0] == 1
    held.release()
    assert states(manager) == [served(2), ended(1)]
    with pytest.raises(ServingError, match=r"Servable not found for request: Specific\(half, 1\)") as caught:
        manager.acquire(1)
    assert caught.value.code is Code.NOT_FOUND


def test_the_new_one_is_there_before_the_old_one_goes(add, manage):
    """While version 2 is loaded, version 1 answers; and it is not dropped before 2 was shown."""
    seen = []

    def load(base, *, version, **options):
        if version == 2:
            seen.append((factor(manager), states(manager)))
        return obmlite.load(base, version=version, **options)

    manager = manage(load=load)
    add(1)
    manager.look()
    add(2)
    manager.look()
    assert seen == [(1.0, [(2, State.START, Code.OK), served(1)])]
    assert manager.available() == [2]


def test_names_that_are_no_versions(add, base, manage):
    add(1, name="00000001")
    (base / "notes").mkdir()
    (base / "7.tmp").mkdir()
    (base / "8").write_text("no directory")
    manager = manage()
    manager.look()
    assert states(manager) == [served(1)]


def test_two_directories_of_one_number(add, manage):
    add(1)
    add(2)
    add(2, name="002")
    manager = manage()
    manager.look()
    assert manager.available() == [1]
    [failed] = [status for status in manager.statuses() if status.version == 2]
    assert "Two directories have the number" in failed.message
    assert "002, 2" in failed.message


@pytest.mark.parametrize("broken", ["nothing", "manifest", "cut", "weights", "short"])
def test_a_version_that_is_not_complete_waits(add, base, packages, manage, broken):
    add(1)
    manager = manage(retry_seconds=1000.0)
    manager.look()
    copy = base / "2"
    shutil.copytree(packages / "2", copy)
    manifest, weights = copy / "manifest.obm", file_of(copy, "weights")
    if broken == "nothing":
        shutil.rmtree(copy)
        copy.mkdir()
    elif broken == "manifest":
        manifest.unlink()
    elif broken == "cut":
        manifest.write_bytes(manifest.read_bytes()[:100])
    elif broken == "weights":
        weights.unlink()
    else:
        os.truncate(weights, weights.stat().st_size - 1)
    for _ in range(3):
        manager.look()
        assert states(manager) == [(2, State.START, Code.UNAVAILABLE), served(1)]
    assert "not complete yet" in manager.statuses()[0].message
    shutil.copytree(packages / "2", copy, dirs_exist_ok=True)
    manager.look()
    assert manager.available() == [2]


def flip_function(base):
    flip(file_of(base / "2", "functions"))


def flip_weights(base):
    data = file_of(base / "2", "weights")
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "verify", "code"),
    [
        (flip_function, "structure", Code.DATA_LOSS),
        (flip_weights, "lazy", Code.DATA_LOSS),
        (flip_weights, "all", Code.DATA_LOSS),
    ],
)
def test_the_old_version_stays_when_the_new_one_is_corrupt(add, base, packages, manage, spoil, verify, code):
    add(1)
    manager = manage(verify=verify, retry_seconds=1000.0)
    manager.look()
    add(2)
    spoil(base)
    manager.look()
    assert factor(manager) == 1
    assert states(manager) == [(2, State.LOADING, code), served(1)]
    assert "changed" in manager.statuses()[0].message or "not what was saved" in manager.statuses()[0].message
    shutil.rmtree(base / "2")
    add(2)  # another manifest: it is tried at once
    manager.look()
    assert states(manager) == [served(2), ended(1)]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Ann's and Bob's."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ann", "bob"):
        signing.keygen(folder / name)
    return folder


def test_only_what_is_signed_is_served(add, base, manage, keys):
    add(1, 2)
    signing.sign(base / "1", keys / "ann")
    manager = manage(public_key=[keys / "ann.pub"], retry_seconds=1000.0)
    manager.look()
    assert factor(manager) == 1
    assert states(manager) == [(2, State.LOADING, Code.FAILED_PRECONDITION), served(1)]
    assert "The package is not signed." in manager.statuses()[0].message
    signing.sign(base / "2", keys / "bob")  # a signature more: it is tried at once
    manager.look()
    assert states(manager) == [(2, State.LOADING, Code.FAILED_PRECONDITION), served(1)]
    assert "not with a key that is trusted" in manager.statuses()[0].message
    signing.sign(base / "2", keys / "ann")
    manager.look()
    assert states(manager) == [served(2), ended(1)]
    assert factor(manager) == 2


def test_an_observer_is_told_once_of_what_is_not_loaded(add, base, keys):
    """Whether it is refused when it is opened, or later."""

    class Told(Silent):
        def loaded(self, model, version, seconds, error):
            told.append((version, error.code))

    told = []
    add(1, 2)
    signing.sign(base / "1", keys / "ann")
    flip_function(base)
    signing.sign(base / "2", keys / "ann")
    add(10)
    config = ModelConfig("half", base, Specific((2, 10)), public_key=keys / "ann.pub")
    Manager(config, obmlite.load, observer=Told()).look()
    assert told == [(10, Code.FAILED_PRECONDITION), (2, Code.DATA_LOSS)]


def test_a_signed_version_is_compared(add, base, manage, keys):
    """Also at the level that compares no tensors otherwise."""
    add(2)
    signing.sign(base / "2", keys / "ann")
    flip_weights(base)
    manager = manage(public_key=keys / "ann.pub")
    manager.look()
    assert states(manager) == [(2, State.LOADING, Code.DATA_LOSS)]


def test_keys_are_read_at_once(base, manage, keys):
    with pytest.raises(obmlite.ArgumentError, match="no public key") as caught:
        manage(public_key=keys / "ann")
    assert caught.value.object == "half"
    with pytest.raises(FileNotFoundError):
        manage(public_key=keys / "nobody")


@pytest.mark.parametrize("verify", ["structure", "all"])
def test_what_trust_is_passed_on(add, base, manage, keys, verify):
    """Each time that a version is opened."""
    given = []

    def load(base, **options):
        given.append(options)
        return obmlite.load(base, **options)

    add(1)
    signing.sign(base / "1", keys / "bob")
    manager = manage(load=load, public_key=keys / "bob.pub", untrusted=True, verify=verify)
    manager.look()
    assert factor(manager) == 1
    assert len(given) == (1 if verify == "structure" else 2)
    assert all(options["untrusted"] is True and options["public_key"] for options in given)


def test_what_is_gone_is_served_as_long_as_nothing_replaces_it(add, base, manage):
    add(1)
    manager = manage(retry_seconds=1000.0)
    manager.look()
    shutil.rmtree(base / "1")
    add(2)
    flip_function(base)
    manager.look()
    assert states(manager) == [(2, State.LOADING, Code.DATA_LOSS), served(1)]
    shutil.rmtree(base / "2")
    add(2)
    manager.look()
    assert manager.available() == [2]


def test_without_a_good_one_the_one_before_is_served(add, base, manage):
    add(1, 2)
    flip_function(base)
    manager = manage(retry_seconds=1000.0)
    manager.look()
    assert manager.available() == [1]


def failing(times):
    """Opens packages, and fails some times with version 2."""
    calls = []

    def load(base, *, version=None, **options):
        if version == 2:
            calls.append(version)
            if len(calls) <= times:
                raise RuntimeError("the disk is on fire")
        return obmlite.load(base, version=version, **options)

    load.calls = calls
    return load


def test_retries(add, manage):
    load = failing(3)
    manager = manage(load=load)
    add(1, 2)
    for attempt in range(1, 4):
        manager.look()
        assert len(load.calls) == attempt
        assert states(manager) == [(2, State.LOADING, Code.INTERNAL), served(1)]
        assert manager.statuses()[0].message == "RuntimeError: the disk is on fire"
    manager.look()
    assert states(manager) == [served(2), ended(1)]


def test_nothing_is_left_of_what_could_not_be_loaded(add, base, manage):
    made = []

    def load(base, **options):
        opened = obmlite.load(base, **options)
        made.append(weakref.ref(opened.pipeline))
        return opened

    add(2)
    flip_function(base)
    manager = manage(load=load)
    manager.look()
    assert states(manager) == [(2, State.LOADING, Code.DATA_LOSS)]
    assert [reference() for reference in made] == [None]


def test_an_observer_may_ask(add, base):
    class Asking(Silent):
        def state(self, model, version, state):
            told.append((state, manager.statuses(), manager.available()))

    told = []
    add(1)
    manager = Manager(ModelConfig("half", base), obmlite.load, observer=Asking())
    manager.look()
    assert [state for state, *_ in told] == [State.LOADING, State.AVAILABLE]
    assert told[1][2] == [1]
    manager.want(False)


def test_retries_wait(add, manage):
    load = failing(1)
    manager = manage(load=load, retry_seconds=1000.0)
    add(2)
    for _ in range(3):
        manager.look()
    assert len(load.calls) == 1
    manager.want(True)  # asked for
    assert manager.available() == [2]


def test_retries_end(add, base, manage):
    load = failing(1000)
    manager = manage(load=load, retries=2)
    add(1, 2)
    for _ in range(6):
        manager.look()
    assert len(load.calls) == 3
    assert states(manager) == [(2, State.END, Code.INTERNAL), served(1)]
    os.utime(base / "2" / "manifest.obm", ns=(1, 1))
    manager.look()
    assert len(load.calls) == 4


def test_a_specific_version_that_fails_leaves_the_others(add, manage):
    add(1, 2)
    manager = manage(Specific((1, 2)), load=failing(1000), retries=0)
    manager.look()
    assert states(manager) == [(2, State.END, Code.INTERNAL), served(1)]


def test_a_failing_version_that_is_removed_is_forgotten(add, base, manage):
    add(1, 2)
    manager = manage(load=failing(1000), retry_seconds=1000.0)
    manager.look()
    shutil.rmtree(base / "2")
    manager.look()
    assert states(manager) == [served(1)]


def test_a_base_path_that_vanishes_changes_nothing(add, base, manage):
    add(1)
    manager = manage()
    manager.look()
    base.rename(base.with_name("gone"))
    manager.look()
    assert factor(manager) == 1
    assert "cannot be read, and what is served stays" in str(manager.problem)
    base.with_name("gone").rename(base)
    add(2)
    manager.look()
    assert manager.problem is None
    assert factor(manager) == 2


def test_a_base_path_that_is_not_there_yet(base, add, manage):
    base.rmdir()
    manager = manage()
    manager.look()
    assert manager.problem.code is Code.NOT_FOUND
    assert str(manager.problem).startswith("The base path cannot be read: ")
    with pytest.raises(ServingError, match=r"Servable not found for request: Latest\(half\)"):
        manager.acquire()
    base.mkdir()
    add(1)
    manager.look()
    assert factor(manager) == 1


def test_an_empty_base_path_drops_all(add, base, manage):
    add(1)
    manager = manage()
    manager.look()
    shutil.rmtree(base / "1")
    manager.look()
    assert states(manager) == [ended(1)]
    assert "No versions were found under the base path" in str(manager.problem)


def test_a_base_path_that_is_a_package(base, packages, manage):
    shutil.copytree(packages / "1", base, dirs_exist_ok=True)
    manager = manage()
    manager.look()
    assert "it is a package itself, whose directory is to be named by a number" in str(manager.problem)


def test_a_version_that_is_removed(add, base, manage):
    add(1, 2)
    manager = manage()
    manager.look()
    shutil.rmtree(base / "2")
    manager.look()
    assert states(manager) == [ended(2), served(1)]
    add(2)
    manager.look()
    assert states(manager) == [served(2), ended(1)]


def test_what_was_removed_is_still_served_to_who_has_it(add, base, manage):
    add(1)
    manager = manage()
    manager.look()
    held = manager.acquire()
    shutil.rmtree(base / "1")
    manager.look()
    np.testing.assert_array_equal(held.predict({"x": rows(5)})["output_0"], rows(5))
    held.release()


def test_labels(add, manage):
    add(1, 2)
    manager = manage(All(), labels={"stable": 1, "canary": 7})
    with pytest.raises(ServingError, match="Unrecognized servable version label: stable"):
        manager.of_label("stable")
    manager.look()
    assert manager.of_label("stable") == 1
    for label in ("canary", "other"):
        with pytest.raises(ServingError, match=f"Unrecognized servable version label: {label}") as caught:
            manager.of_label(label)
        assert caught.value.code is Code.INVALID_ARGUMENT
    manager.assign("stable", 2)
    assert manager.of_label("stable") == 2
    with pytest.raises(ServingError, match="version 7 of half, which is not loaded: expected one of 1, 2") as caught:
        manager.assign("stable", 7)
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert manager.of_label("stable") == 2


def test_unwanted_until_it_is_wanted(add, manage):
    add(1)
    manager = manage()
    manager.look()
    manager.want(False)
    assert states(manager) == [ended(1)]
    manager.look()
    assert manager.available() == []
    assert not manager.wanted
    manager.want(True)
    assert factor(manager) == 1


def test_only_the_last_of_those_that_are_gone_are_listed(add, base, packages, manage, monkeypatch):
    monkeypatch.setattr(manager_module, "_PAST", 3)
    manager = manage(warmup=False)
    for number in range(1, 8):
        shutil.copytree(packages / "1", base / str(number))
        manager.look()
        shutil.rmtree(base / str(number))
    assert len(manager.statuses()) < 6
    assert manager.available() == [7]
