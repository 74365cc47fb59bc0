"""Directories of numbered versions: which one is loaded, which are passed over, and what is said when there is none."""

import pathlib
import shutil

import numpy as np
import pytest

import obmlite
from obmlite.io.versions import numbered


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Versions 1, 9 and 10, whose weights are their number: as text, 9 would be the highest."""
    folder = tmp_path_factory.mktemp("versions") / "model"
    for number in (1, 9, 10):
        save(folder / str(number), number)
    return folder


@pytest.fixture
def folder(packages, tmp_path) -> pathlib.Path:
    return shutil.copytree(packages, tmp_path / "model")


def save(path, number):
    model = obmlite.Model.from_function(
        lambda params, x: params + x, np.float32(number), obmlite.spec("f32[]"), name="add", platforms="cpu"
    )
    model.save(path)


def loaded(folder, **options):
    return float(obmlite.load(folder, **options)(np.float32(0)))


def file_of(package, kind):
    return next((package / kind).iterdir())


def test_the_highest_number_is_loaded(folder):
    assert loaded(folder) == 10
    assert obmlite.load(folder).path == str(folder / "10")


def test_a_version_can_be_asked_for(folder):
    assert loaded(folder, version=9) == 9
    assert loaded(str(folder), version=1) == 1


def test_a_package_is_itself(folder):
    assert loaded(folder / "9") == 9
    with pytest.raises(obmlite.ArgumentError, match="what is a package itself"):
        obmlite.load(folder / "9", version=9)


def test_a_package_wins_over_numbered_directories_in_it(folder):
    shutil.copytree(folder / "10", folder / "9" / "11")
    assert loaded(folder / "9") == 9


def test_other_names_are_ignored(folder):
    for name in ("latest", "v11", "11.tmp-3f2a", "-12", "1e2", "²", "٣", "9" * 20):
        (folder / name).mkdir()
    (folder / "12").write_text("a file")
    assert list(numbered(folder)) == [10, 9, 1]
    assert loaded(folder) == 10


def test_numbers_may_be_padded_and_be_links(folder):
    (folder / "10").rename(folder / "00000010")
    (folder / "11").symlink_to("9")
    assert loaded(folder) == 9
    assert loaded(folder, version=10) == 10


def test_two_directories_of_one_number(folder):
    shutil.copytree(folder / "9", folder / "09")
    assert loaded(folder) == 10
    with pytest.raises(obmlite.ArgumentError, match="Two directories") as caught:
        obmlite.load(folder, version=9)
    assert caught.value.found == "09, 9"
    shutil.rmtree(folder / "10")
    with pytest.raises(obmlite.ArgumentError, match="Two directories"):
        obmlite.load(folder)


def remove_manifest(package):
    (package / "manifest.obm").unlink()


def cut_manifest(package):
    data = (package / "manifest.obm").read_bytes()
    (package / "manifest.obm").write_bytes(data[: len(data) // 2])


def remove_weights(package):
    file_of(package, "weights").unlink()


def cut_function(package):
    file = file_of(package, "functions")
    file.write_bytes(file.read_bytes()[:-1])


def empty(package):
    shutil.rmtree(package)
    package.mkdir()


@pytest.mark.parametrize("damage", [remove_manifest, cut_manifest, remove_weights, cut_function, empty])
def test_incomplete_versions_are_passed_over(folder, damage):
    damage(folder / "10")
    assert loaded(folder) == 9
    with pytest.raises(obmlite.ObmliteError) as caught:
        obmlite.load(folder, version=10)
    assert isinstance(caught.value, (obmlite.PackageNotFoundError, obmlite.CorruptPackageError))
    assert caught.value.package == str(folder / "10")
    assert caught.value.fix == "versions here, complete or not: 10, 9, 1"


def test_a_version_that_needs_a_newer_obmlite_is_not_passed_over(folder):
    manifest = folder / "10" / "manifest.obm"
    data = bytearray(manifest.read_bytes())
    data[-24:-20] = (2).to_bytes(4, "little")  # the trailer's version
    manifest.write_bytes(data)
    with pytest.raises(obmlite.UnsupportedFormatError) as caught:
        obmlite.load(folder)
    assert caught.value.package == str(folder / "10")


def test_no_version_is_complete(folder):
    remove_manifest(folder / "10")
    remove_weights(folder / "9")
    cut_manifest(folder / "1")
    with pytest.raises(obmlite.PackageNotFoundError, match="No version in the directory is complete") as caught:
        obmlite.load(folder)
    assert caught.value.package == str(folder)
    lines = caught.value.found.split("\n    ")
    assert [line.partition(":")[0] for line in lines] == ["", "10", "9", "1"]
    assert "it has no manifest" in lines[1]


def test_a_version_that_is_not_there(folder):
    with pytest.raises(obmlite.PackageNotFoundError, match="no such version") as caught:
        obmlite.load(folder, version=8)
    assert caught.value.package == str(folder)
    assert (caught.value.expected, caught.value.found) == ("version 8", "10, 9, 1")


@pytest.mark.parametrize("version", ["9", -1, 9.0, True])
def test_a_version_is_a_number(folder, version):
    with pytest.raises(obmlite.ArgumentError, match="A version is a number"):
        obmlite.load(folder, version=version)


def test_no_versions(tmp_path):
    with pytest.raises(obmlite.PackageNotFoundError, match="no manifest"):
        obmlite.load(tmp_path)
    with pytest.raises(obmlite.PackageNotFoundError, match="nothing at the path"):
        obmlite.load(tmp_path / "model")
    with pytest.raises(obmlite.PackageNotFoundError, match="no such version") as caught:
        obmlite.load(tmp_path, version=1)
    assert caught.value.found == "no numbered versions"
