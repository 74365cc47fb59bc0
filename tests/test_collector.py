"""Pausing the garbage collector leaves it as it was."""

import gc
import threading

import pytest

from obmlite._collector import importing, paused


@pytest.fixture(autouse=True)
def enabled():
    gc.enable()
    yield
    gc.enable()


def test_it_is_paused_for_the_block():
    with paused():
        assert not gc.isenabled()
        with paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_goes_on_after_an_error():
    with pytest.raises(KeyError), paused():
        raise KeyError
    assert gc.isenabled()


def test_who_had_it_off_keeps_it_off():
    gc.disable()
    with paused():
        pass
    assert not gc.isenabled()


def test_the_last_of_several_threads_resumes_it():
    inside, leave = threading.Event(), threading.Event()

    def other():
        with paused():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with paused():
        thread.start()
        assert inside.wait(10)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_what_was_imported_is_old_at_once():
    with importing():
        made = [[] for _ in range(10)]
        assert not gc.isenabled()
    assert gc.isenabled()
    old = set(map(id, gc.get_objects(2)))
    assert all(id(each) in old for each in made)


def test_what_somebody_put_aside_stays_there():
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        with importing():
            pass
        assert gc.get_freeze_count() == count
    finally:
        gc.unfreeze()
