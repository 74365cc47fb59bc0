"""Data files that other processes add to a transaction; here all in one."""

import os

import pytest

from obmlite.errors import CorruptPackageError, PackageNotFoundError
from obmlite.io.commit import MANIFEST, Transaction
from obmlite.io.participant import Participant

NAME = "w-0123456789abcdef.safetensors"


def begin(path, **options):
    return Transaction(path, named=lambda manifest: manifest.decode().split(), **options)


def add(part, data=b"data", name=NAME):
    with part.create("weights") as file:
        file.write(data)
        path = file.finish(name)
    part.seal()
    return path


def everything(path):
    return sorted(os.path.relpath(os.path.join(at, f), path) for at, _, files in os.walk(path) for f in files)


def test_a_file_of_another_process_is_committed(tmp_path):
    path = tmp_path / "m.obm"
    with begin(path) as transaction:
        with transaction.invitation("weights") as invitation, Participant(path, invitation, patience=0) as part:
            own = add(part)
            part.keep()
        assert everything(path) == [own]  # the invitation is gone
        transaction.adopt(own, 4)
        transaction.commit(own.encode())
    assert everything(path) == [MANIFEST, own]


def test_without_keep_everything_goes(tmp_path):
    path = tmp_path / "m.obm"
    with begin(path) as transaction, transaction.invitation("weights") as invitation:
        with Participant(path, invitation, patience=0) as part:
            add(part)
            part.create("weights").write(b"half")
        assert everything(path) == [invitation]
        with Participant(path, invitation, patience=0) as part:
            add(part)
            part.keep()
            part.drop()
        assert everything(path) == [invitation]
    assert not path.exists()  # nor the folder, which the transaction had made


def test_a_file_of_the_package_in_place_stays(tmp_path):
    path = tmp_path / "m.obm"
    with begin(path) as transaction:
        with transaction.invitation("weights") as invitation, Participant(path, invitation, patience=0) as part:
            own = add(part)
            part.keep()
        transaction.commit(own.encode())
    with (
        begin(path, overwrite=True) as transaction,
        transaction.invitation() as invitation,
        Participant(path, invitation, patience=0) as part,
    ):
        add(part)  # of the same digest
    assert everything(path) == [MANIFEST, own]


@pytest.mark.parametrize("other", ["nothing.obm", "other.obm", "file"])
def test_another_directory(tmp_path, other):
    (tmp_path / "other.obm").mkdir()
    (tmp_path / "file").touch()
    with (
        begin(tmp_path / "m.obm") as transaction,
        transaction.invitation() as invitation,
        pytest.raises(PackageNotFoundError, match="another directory"),
        Participant(tmp_path / other, invitation, patience=0.1),
    ):
        pass


def test_files_that_are_not_there_are_not_adopted(tmp_path):
    with begin(tmp_path / "m.obm") as transaction:
        with transaction.invitation("weights"):
            pass
        with pytest.raises(CorruptPackageError, match="nothing"):
            transaction.adopt(f"weights/{NAME}", 4)
        (tmp_path / "m.obm/weights" / NAME).write_bytes(b"datum")
        with pytest.raises(CorruptPackageError, match="5 bytes"):
            transaction.adopt(f"weights/{NAME}", 4)
        (tmp_path / "m.obm/weights" / NAME).unlink()
        for path in ("weights/w", MANIFEST, f"elsewhere/{NAME}"):
            with pytest.raises(ValueError, match="no name"):
                transaction.adopt(path, 4)


def test_a_participant_is_open_only_in_its_block(tmp_path):
    with begin(tmp_path / "m.obm") as transaction, transaction.invitation("weights") as invitation:
        part = Participant(tmp_path / "m.obm", invitation, patience=0)
        with pytest.raises(RuntimeError, match="not open"):
            part.create("weights")
        with part:
            pass
        with pytest.raises(RuntimeError, match="not open"):
            part.create("weights")
