import os

import pytest

from obmlite.io.replacing import appearing, replacing, replacing_in


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    reader = os.open(path, os.O_RDONLY)
    with replacing(path) as descriptor:
        os.write(descriptor, b"ne")
        assert path.read_bytes() == b"old"
        os.write(descriptor, b"w")
    assert path.read_bytes() == b"new"
    assert os.pread(reader, 9, 0) == b"old"  # who had it open goes on reading it
    os.close(reader)

    def fail():
        with replacing(path) as descriptor:
            os.write(descriptor, b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    with replacing(tmp_path / "link") as descriptor:
        os.write(descriptor, b"data")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_bytes() == b"data"


def test_several_files_get_their_names_together(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    folder = str(tmp_path)
    with replacing_in(folder) as create:
        for name in ("a", "b"):
            with create(name) as descriptor:
                os.write(descriptor, name.encode())
            assert (tmp_path / "a").read_bytes() == b"old"
            assert not (tmp_path / "b").exists()
    assert sorted(os.listdir(folder)) == ["a", "b"]
    assert (tmp_path / "a").read_bytes() == b"a"

    def fail():
        with replacing_in(folder) as create:
            with create("a") as descriptor:
                os.write(descriptor, b"newer")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert sorted(os.listdir(folder)) == ["a", "b"]
    assert (tmp_path / "a").read_bytes() == b"a"


def test_a_directory_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "no" / "file"):
        pass


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    target = str(tmp_path / "out")
    with appearing(target) as beside:
        os.makedirs(os.path.join(beside, "deep"))
        (tmp_path / beside / "deep" / "a").write_text("a")
        assert not os.path.exists(target)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "deep" / "a").read_text() == "a"

    def fail(make):
        with appearing(str(tmp_path / "other")) as beside:
            make(beside)
            raise ZeroDivisionError

    for make in (os.mkdir, lambda path: os.close(os.open(path, os.O_CREAT))):
        with pytest.raises(ZeroDivisionError):
            fail(make)
        assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(OSError), appearing(target) as beside:  # something is there by now
        (tmp_path / beside).mkdir()
    assert (tmp_path / "out" / "deep" / "a").read_text() == "a"
    assert os.listdir(tmp_path) == ["out"]
