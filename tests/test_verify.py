"""``verify`` finds whatever was changed, and says where."""

from __future__ import annotations

import os
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from obmlite.verify import verify


def apply(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["w"])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("verify") / "model.obm"
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 3)).astype("f4"), "big": rng.integers(0, 255, (3, 5 << 20), "u1")}
    obmlite.Model.from_function(apply, params, obmlite.spec("f32[b,4]")).save(path, max_file_bytes=1 << 20)
    return path


@pytest.fixture
def package(original: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(original, tmp_path / "model.obm"))


def data_files(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in path.rglob("*") if p.is_file() and not p.name.endswith(".json"))


def test_a_good_package(package: pathlib.Path) -> None:
    report = verify(package)
    assert report.good
    assert report.extra == ()
    assert report.files == 3
    assert report.nbytes == sum(p.stat().st_size for p in data_files(package))


def test_progress_counts_every_byte_of_data(package: pathlib.Path) -> None:
    seen: list[int] = []
    verify(package, progress=seen.append)
    tensors = 3 * (5 << 20) + 4 * 3 * 4
    [function] = (package / "functions").iterdir()
    assert sum(seen) == tensors + function.stat().st_size


def test_every_byte_counts(package: pathlib.Path) -> None:
    rng = np.random.default_rng(1)
    for file in data_files(package):
        whole = file.read_bytes()
        places = {0, len(whole) - 1, 9 << 20} | set(rng.integers(0, len(whole), 12).tolist())
        for place in places:
            if place < len(whole):
                with file.open("r+b") as f:
                    f.seek(place)
                    f.write(bytes([whole[place] ^ 0x10]))
                report = verify(package)
                assert not report.good, f"{file.name} byte {place}"
                assert all(p.package == str(package) for p in report.problems)
                with file.open("r+b") as f:
                    f.seek(place)
                    f.write(whole[place : place + 1])
    assert verify(package).good


@pytest.mark.parametrize("how", ["cut", "extended", "removed", "empty", "link", "fifo"])
def test_every_file_counts(how: str, package: pathlib.Path) -> None:
    for file in data_files(package):
        whole = file.read_bytes()
        if how == "cut":
            file.write_bytes(whole[:-1])
        elif how == "extended":
            file.write_bytes(whole + b" ")
        elif how == "empty":
            file.write_bytes(b"")
        else:
            file.unlink()
        if how == "link":
            elsewhere = package.parent / "elsewhere"
            elsewhere.write_bytes(whole)
            file.symlink_to(elsewhere)
        elif how == "fifo":
            os.mkfifo(file)
        try:
            report = verify(package)
        except obmlite.ObmliteError as error:
            assert file.name == "manifest.obm"
            assert isinstance(error, obmlite.PackageNotFoundError if how == "removed" else obmlite.CorruptPackageError)
        else:
            assert not report.good
            kinds = {
                "link": obmlite.UnsafePathError,
                "fifo": obmlite.UnsafePathError,
                "removed": obmlite.MissingFileError,
            }
            assert isinstance(report.problems[0], kinds.get(how, obmlite.CorruptPackageError))
        if file.is_symlink() or file.exists():
            file.unlink()
        file.write_bytes(whole)
    assert verify(package).good


def test_swapped_files_are_found(package: pathlib.Path) -> None:
    first, second = sorted((package / "weights").glob("*.safetensors"))
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    assert {p.object for p in verify(package).problems} == {"params"}


def test_extra_files_are_listed_and_do_no_harm(package: pathlib.Path) -> None:
    (package / "README").write_text("hello")
    (package / "weights" / ".obmlite-0123456789abcdef.tmp").write_bytes(b"left behind")
    (package / "supplementals").mkdir(exist_ok=True)
    (package / "supplementals" / "old-0123456789abcdef").mkdir()
    (package / "supplementals" / "old-0123456789abcdef" / "x").write_bytes(b"")
    report = verify(package)
    assert report.good
    assert report.extra == (
        "README",
        "supplementals/old-0123456789abcdef/x",
        "weights/.obmlite-0123456789abcdef.tmp",
    )
    assert obmlite.load(package)(np.ones((1, 4), "f4")).shape == (1, 3)
