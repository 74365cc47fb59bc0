import gc
import mmap
import os
import threading

import numpy as np
import pytest

from obmlite.errors import CorruptPackageError
from obmlite.io.source import LocalFile

DATA = bytes(range(256)) * 64


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(DATA)
    return path


def opened(path, **options):
    return LocalFile(os.open(path, os.O_RDONLY), "weights/data", **options)


def test_reads_exactly(path):
    with opened(path) as file:
        assert (file.size, file.name) == (len(DATA), "weights/data")
        assert file.read(0, len(DATA)) == DATA
        assert file.read(7, 5) == DATA[7:12]
        assert file.read(len(DATA), 0) == b""
        array = np.zeros((2, 3), ">u2")
        file.read_into(10, array.data)
        assert array.tobytes() == DATA[10:22]
        file.read_into(0, np.zeros((0, 3)).data)


@pytest.mark.parametrize(("offset", "length"), [(0, len(DATA) + 1), (len(DATA), 1), (1 << 70, 1), (0, 1 << 70)])
def test_a_range_behind_the_end_allocates_nothing(path, offset, length):
    with opened(path) as file, pytest.raises(CorruptPackageError, match="outside the file weights/data"):
        file.read(offset, length)


def test_wrong_use(path):
    with opened(path) as file:
        with pytest.raises(ValueError, match="negative"):
            file.read(-1, 1)
        with pytest.raises(ValueError, match="negative"):
            file.read(0, -1)
        with pytest.raises(TypeError, match="read-only"):
            file.read_into(0, memoryview(b"abc"))
        with pytest.raises(CorruptPackageError, match="outside"):
            file.read_into(len(DATA) - 1, memoryview(bytearray(2)))
        file.close()
        file.close()
        for use in (lambda: file.read(0, 1), lambda: file.read_into(0, memoryview(bytearray(1))), file.map):
            with pytest.raises(ValueError, match="closed"):
                use()


def test_short_reads_are_continued(path, monkeypatch):
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, 1000), offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:1000]], offset))
    with opened(path) as file:
        assert file.read(3, 5001) == DATA[3:5004]
        buffer = bytearray(5001)
        file.read_into(3, memoryview(buffer))
        assert buffer == DATA[3:5004]


def test_a_file_that_shrinks_is_a_clear_error(path):
    with opened(path) as file:
        os.truncate(path, 100)
        assert file.read(0, 100) == DATA[:100]
        for use in (
            lambda: file.read(50, 100),
            lambda: file.read_into(50, memoryview(bytearray(100))),
            file.map,
        ):
            with pytest.raises(CorruptPackageError, match="changed while it was open") as caught:
                use()
            assert caught.value.expected == f"{len(DATA)} bytes"
            assert caught.value.found == "100 bytes"


def test_a_file_that_grows_keeps_its_size(path):
    with opened(path) as file:
        with path.open("ab") as more:
            more.write(b"more")
        assert file.size == len(file.map()) == len(DATA)


def test_map_is_read_only_made_once_and_outlives_the_file(path):
    file = opened(path)
    views = []
    threads = [threading.Thread(target=lambda: views.append(file.map())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(view is views[0] for view in views)
    assert views[0].readonly
    assert isinstance(views[0].obj, mmap.mmap)
    array = np.frombuffer(file.map(), "u1")
    file.close()
    views.clear()
    gc.collect()
    assert array.tobytes() == DATA
    assert not array.flags.writeable


def test_no_map(path, tmp_path):
    with opened(path, mmap=False) as file:
        assert file.map() is None
    (tmp_path / "empty").write_bytes(b"")
    with opened(tmp_path / "empty") as file:
        assert file.map() is None
        assert file.read(0, 0) == b""


def test_the_descriptor_goes_with_the_object(path):
    descriptor = os.open(path, os.O_RDONLY)
    file = LocalFile(descriptor, "data")
    del file
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux's /proc")
def test_dropped_pages_leave_the_process_and_can_be_read_again(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(os.urandom(64 * mmap.PAGESIZE) + b"end")

    def resident():
        with open("/proc/self/smaps") as maps:
            own = maps.read().split(str(path), 1)[1]
        return int(own.split("Rss:", 1)[1].split()[0]) << 10

    with opened(path) as file:
        data = np.frombuffer(file.map(), np.uint8)
        expected = path.read_bytes()
        assert data.tobytes() == expected
        everything = resident()
        assert everything == 65 * mmap.PAGESIZE
        file.drop(16 * mmap.PAGESIZE + 5, 16 * mmap.PAGESIZE - 5)
        assert resident() == everything - 16 * mmap.PAGESIZE
        file.drop(3, 0)
        assert resident() == everything - 16 * mmap.PAGESIZE
        file.drop(0, len(expected))
        assert resident() == 0
        assert data.tobytes() == expected


def test_hints_anywhere_in_the_file(path):
    with opened(path) as file:
        for hint in (file.prefetch, file.drop):
            hint(0, len(DATA))  # not mapped yet: there is nothing to do
        view = file.map()
        for hint in (file.prefetch, file.drop):
            for offset, length in (
                (0, len(DATA)),
                (5, 1),
                (mmap.PAGESIZE, 0),
                (7, 0),
                (len(DATA) - 1, 1),
                (len(DATA), 0),
            ):
                hint(offset, length)
        assert bytes(view) == DATA
        file.close()
        for hint in (file.prefetch, file.drop):
            hint(0, len(DATA))
        assert bytes(view) == DATA, "and the view stays"
    with opened(path, mmap=False) as file:
        assert file.map() is None
        file.prefetch(0, len(DATA))
        file.drop(0, len(DATA))
