import hashlib
import os

import pytest

from obmlite.errors import CorruptPackageError
from obmlite.io import checked
from obmlite.io.digest import CHUNK
from obmlite.io.source import LocalFile


def opened(tmp_path, data):
    path = tmp_path / "file"
    path.write_bytes(data)
    return LocalFile(os.open(path, os.O_RDONLY), "file")


@pytest.mark.parametrize("data", [b"", b"abc", b"x" * (CHUNK + 3)])
def test_what_was_saved_is_given_in_order_and_once(tmp_path, data):
    with opened(tmp_path, data) as source:
        sha = hashlib.sha256(data).digest()
        assert b"".join(checked.chunks(source, "file", len(data), sha)) == data
        assert checked.read(source, "file", len(data), sha) == data


def test_another_length_is_refused_before_anything_is_given(tmp_path):
    with opened(tmp_path, b"abcd") as source:
        with pytest.raises(CorruptPackageError) as caught:
            next(checked.chunks(source, "f/name", 3, hashlib.sha256(b"abc").digest()))
        assert (caught.value.field, caught.value.expected, caught.value.found) == (
            "length",
            "f/name: 3 bytes",
            "4 bytes",
        )
        with pytest.raises(CorruptPackageError, match="another length"):
            checked.check_length(source, "f/name", 5)
        checked.check_length(source, "f/name", 4)


def test_other_bytes_are_refused_at_the_end(tmp_path):
    data = b"x" * (CHUNK + 1)
    sha = hashlib.sha256(data).digest()
    with opened(tmp_path, data[:-1] + b"y") as source:
        given = checked.chunks(source, "f/name", len(data), sha)
        assert next(given) == data[:CHUNK]
        with pytest.raises(CorruptPackageError) as caught:
            list(given)
        assert caught.value.field == "digest"
        assert sha.hex() in str(caught.value)
        with pytest.raises(CorruptPackageError):
            checked.read(source, "f/name", len(data), sha)
