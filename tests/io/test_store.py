import os
import socket
from typing import TYPE_CHECKING

import pytest

from obmlite.errors import MissingFileError, PackageNotFoundError, UnsafePathError
from obmlite.io.store import MAX_COMPONENT_BYTES, MAX_PATH_BYTES, MAX_PATH_DEPTH, LocalDirectory, Store, check_path

if TYPE_CHECKING:
    from obmlite.io.source import ByteSource


@pytest.fixture
def package(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"secret")
    package = tmp_path / "package"
    (package / "weights").mkdir(parents=True)
    (package / "weights" / "a").write_bytes(b"abc")
    (package / "manifest.obm").write_bytes(b"manifest")
    return package


@pytest.mark.parametrize(
    "path",
    [
        "a",
        "weights/params-0123456789abcdef.safetensors",
        "supplementals/Ünïcode name…/.hidden",
        "...",
        "a" * MAX_COMPONENT_BYTES,
        "/".join(["a"] * MAX_PATH_DEPTH),
    ],
)
def test_plain_paths_pass(path):
    assert check_path(path) == path


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("", "empty"),
        ("/etc/passwd", "absolute"),
        ("//a", "absolute"),
        ("a//b", "component"),
        ("a/", "component"),
        (".", "component"),
        ("./a", "component"),
        ("..", "component"),
        ("a/../b", "component"),
        ("a/..", "component"),
        ("a\\b", "backslash"),
        ("a\0b", "control"),
        ("a\nb", "control"),
        ("a\x7fb", "control"),
        ("a\x85b", "control"),
        ("a\ud800", "control"),
        ("a" * (MAX_COMPONENT_BYTES + 1), "more than 255 bytes"),
        ("ä" * 200, "more than 255 bytes"),
        ("a/" * MAX_PATH_DEPTH + "a", "more than 32 components"),
        ("/".join(["a" * 100] * 11), f"longer than {MAX_PATH_BYTES} bytes"),
        ("/".join(["ä" * 100] * 6), f"longer than {MAX_PATH_BYTES} bytes"),
        ("a" * 1_000_000, f"longer than {MAX_PATH_BYTES} bytes"),
    ],
)
def test_other_paths_are_refused_and_not_opened(path, problem, package):
    with pytest.raises(UnsafePathError, match=problem) as caught:
        check_path(path)
    assert caught.value.field == "path"
    assert len(str(caught.value)) < 1500
    str(caught.value).encode()
    with LocalDirectory(package) as store, pytest.raises(UnsafePathError, match=problem):
        store.open(path)


def test_opens_files(package):
    store: Store = LocalDirectory(package)
    file: ByteSource = store.open("weights/a")
    assert (store.name, file.name) == (str(package), "weights/a")
    store.close()
    store.close()
    assert file.read(0, 3) == b"abc"
    assert bytes(file.map()) == b"abc"
    file.close()
    with pytest.raises(ValueError, match="closed"):
        store.open("weights/a")
    with pytest.raises(ValueError, match="closed"):
        store.files()


def test_mapping_can_be_off(package):
    with LocalDirectory(package, mmap=False) as store, store.open("weights/a") as file:
        assert file.map() is None


def test_links_are_followed_where_asked(package, tmp_path):
    """For caches of other libraries, which consist of links; paths are checked all the same."""
    (package / "link").symlink_to(tmp_path / "outside" / "secret")
    (package / "folder").symlink_to("weights")
    with LocalDirectory(package, follow_links=True) as store:
        assert store.open("link").read(0, 6) == b"secret"
        assert store.open("folder/a").read(0, 3) == b"abc"
        with pytest.raises(UnsafePathError):
            store.open("../outside/secret")
        with pytest.raises(UnsafePathError):
            store.open("folder")


def test_the_root_may_be_a_symlink(package, tmp_path):
    (tmp_path / "link").symlink_to(package)
    with LocalDirectory(tmp_path / "link") as store, store.open("weights/a") as file:
        assert file.read(0, 3) == b"abc"


@pytest.mark.parametrize("path", ["nothing", "weights/nothing", "nothing/a", "n" * 255])
def test_missing(package, path):
    with LocalDirectory(package) as store, pytest.raises(MissingFileError) as caught:
        store.open(path)
    assert (caught.value.field, caught.value.found, caught.value.package) == ("path", path, str(package))


def test_everything_but_a_regular_file_is_refused(package, tmp_path):
    (package / "file_link").symlink_to(tmp_path / "outside" / "secret")
    (package / "inner_link").symlink_to("weights/a")
    (package / "broken_link").symlink_to("nowhere")
    (package / "folder_link").symlink_to(tmp_path / "outside")
    (package / "inner_folder_link").symlink_to("weights")
    os.mkfifo(package / "fifo")
    cases = {
        "file_link": "a symbolic link",
        "inner_link": "a symbolic link",
        "broken_link": "a symbolic link",
        "folder_link": "a symbolic link",
        "folder_link/secret": "a symbolic link",
        "inner_folder_link/a": "a symbolic link",
        "fifo": "a FIFO",
        "fifo/a": "a FIFO",
        "weights": "a directory",
        "manifest.obm/a": "a regular file in a folder's place",
    }
    with LocalDirectory(package) as store:
        for path, kind in cases.items():
            with pytest.raises(UnsafePathError, match=f"{kind} is there") as caught:
                store.open(path)
            assert (caught.value.field, caught.value.found) == ("path", path)
            assert not isinstance(caught.value, MissingFileError)
        assert store.files() == [
            "broken_link",
            "fifo",
            "file_link",
            "folder_link",
            "inner_folder_link",
            "inner_link",
            "manifest.obm",
            "weights/a",
        ]


def test_a_socket_is_refused(package, monkeypatch):
    monkeypatch.chdir(package)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with LocalDirectory(package) as store, pytest.raises(UnsafePathError, match="a socket"):
            store.open("socket")


def test_a_device_is_refused():
    with LocalDirectory("/dev") as store, pytest.raises(UnsafePathError, match="a device"):
        store.open("null")


def test_descriptors_do_not_leak(package):
    def count():
        return len(os.listdir("/dev/fd"))

    (package / "link").symlink_to("weights")
    os.mkfifo(package / "fifo")
    with LocalDirectory(package) as store:
        before = count()
        for path in ("nothing", "weights/nothing", "link", "link/a", "fifo", "weights", "manifest.obm/a", ".."):
            with pytest.raises((MissingFileError, UnsafePathError)):
                store.open(path)
        store.open("weights/a").close()
        store.files()
        assert count() == before


def test_no_directory(package, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for path in ("nothing", "fifo", "loop", "package/manifest.obm", "package/manifest.obm/below"):
        with pytest.raises(PackageNotFoundError) as caught:
            LocalDirectory(tmp_path / path)
        assert caught.value.package == str(tmp_path / path)


def test_the_directory_is_held_not_its_path(package, tmp_path):
    with LocalDirectory(package) as store:
        package.rename(tmp_path / "elsewhere")
        (package / "weights").mkdir(parents=True)
        (package / "weights" / "a").write_bytes(b"other")
        with store.open("weights/a") as file:
            assert file.read(0, file.size) == b"abc"


def test_a_directory_that_is_removed_is_missing(package):
    with LocalDirectory(package) as store:
        (package / "weights" / "a").unlink()
        (package / "weights").rmdir()
        (package / "manifest.obm").unlink()
        package.rmdir()
        with pytest.raises(MissingFileError):
            store.open("manifest.obm")


def test_files_of_deep_trees(package):
    deep = package
    for _ in range(200):
        deep = deep / "d"
        deep.mkdir()
    (deep / "leaf").write_bytes(b"")
    with LocalDirectory(package) as store:
        assert store.files() == ["d/" * 200 + "leaf", "manifest.obm", "weights/a"]
