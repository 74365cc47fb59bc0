"""Chunks are compared before a byte of them is given out, each once, and exactly those that are touched."""

from __future__ import annotations

import os
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

from obmlite.errors import CorruptPackageError
from obmlite.io import chunked, digest
from obmlite.io.chunked import Chunks, Part, Recent
from obmlite.io.source import LocalFile

SIZE = 100
"""Bytes of a chunk here."""

HEAD = 7  # bytes before the parts
PARTS = {"a": 250, "b": 100, "c": 0, "d": 1, "e": 30, "f": 401}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK", SIZE)
    monkeypatch.setattr(digest, "CHUNK", SIZE)


@pytest.fixture
def data(tmp_path: pathlib.Path) -> bytes:
    content = os.urandom(HEAD + sum(PARTS.values()))
    (tmp_path / "file").write_bytes(content)
    return content


@pytest.fixture(params=[True, False], ids=["mapped", "read"])
def opened(request: pytest.FixtureRequest, tmp_path: pathlib.Path, data: bytes) -> Callable[..., Chunks]:
    def make(recent: Recent | None = None) -> Chunks:
        source = LocalFile(os.open(tmp_path / "file", os.O_RDONLY), "file", mmap=request.param)
        parts, at = [], HEAD
        for name, nbytes in PARTS.items():
            parts.append(Part(name, at, nbytes, digest.chunk_digests(data[at : at + nbytes])))
            at += nbytes
        return Chunks(source, "file", parts, recent or Recent())

    return make


def flip(path: pathlib.Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def read(chunks: Chunks, offset: int, nbytes: int) -> bytes:
    buffer = bytearray(nbytes)
    chunks.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def test_every_range_is_what_the_file_holds(opened: Callable[..., Chunks], data: bytes) -> None:
    chunks = opened()
    for start in range(HEAD, len(data), 13):
        for nbytes in (0, 1, 30, 99, 100, 101, 350, 780):
            if start + nbytes <= len(data):
                assert read(chunks, start, nbytes) == data[start : start + nbytes]


def test_a_changed_byte_is_found_by_whoever_touches_its_chunk_and_by_nobody_else(
    opened: Callable[..., Chunks], data: bytes, tmp_path: pathlib.Path
) -> None:
    ends = [(HEAD, 100), (HEAD + 100, 100), (HEAD + 200, 50), (HEAD + 250, 100), (HEAD + 350, 1), (HEAD + 351, 30)]
    for first, nbytes in ends:
        flip(tmp_path / "file", first + nbytes // 2)
        chunks = opened()
        for start in range(HEAD, len(data) - 20, 10):
            touches = start < first + nbytes and start + 20 > first
            for use in (lambda c, s: read(c, s, 20), lambda c, s: c.check([(s, 20)])):
                try:
                    use(chunks, start)
                    assert not touches, (first, start)
                except CorruptPackageError as error:
                    assert touches, (first, start)
                    assert error.field == "chunk digest"
                    assert error.leaf in PARTS
        flip(tmp_path / "file", first + nbytes // 2)


def test_what_has_no_digest_is_not_given_out(opened: Callable[..., Chunks], data: bytes) -> None:
    chunks = opened()
    for offset, nbytes in ((0, 5), (HEAD - 1, 2), (len(data) - 1, 2), (len(data), 1)):
        with pytest.raises(ValueError, match="have no digests"):
            chunks.check([(offset, nbytes)])
        with pytest.raises(ValueError, match="have no digests"):
            read(chunks, offset, nbytes)
    chunks.check([(0, 0)])


def test_a_range_that_is_read_in_parts_is_hashed_once(
    opened: Callable[..., Chunks], data: bytes, hashed: list[int]
) -> None:
    chunks = opened()
    for start in range(HEAD, len(data) - 30, 30):
        read(chunks, start, 30)
    read(chunks, HEAD + 30 * ((len(data) - HEAD) // 30), (len(data) - HEAD) % 30)
    assert sum(hashed) == sum(PARTS.values())


def test_threads_hash_a_chunk_once(opened: Callable[..., Chunks], data: bytes, hashed: list[int]) -> None:
    chunks = opened(Recent(20))
    wrong: list[int] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait()
        for start in range(HEAD + number, len(data), 8):
            if read(chunks, start, 1) != data[start : start + 1]:
                wrong.append(start)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(hashed) == sum(PARTS.values())


@pytest.mark.parametrize("opened", [False], indirect=True)  # what is mapped is what the file holds
def test_what_was_read_is_what_was_compared(
    tmp_path: pathlib.Path, opened: Callable[..., Chunks], data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file changes as soon as a chunk was hashed."""
    real = chunked.sha256

    def spy(found: Any) -> bytes:
        result = real(found)
        (tmp_path / "file").write_bytes(bytes(len(data)))
        return result

    monkeypatch.setattr(chunked, "sha256", spy)
    for start, nbytes in ((HEAD, 100), (HEAD + 10, 30), (HEAD + 50, 100), (HEAD + 200, 150)):
        (tmp_path / "file").write_bytes(data)
        try:
            assert read(opened(), start, nbytes) == data[start : start + nbytes]
        except CorruptPackageError:  # of a later chunk
            assert nbytes > SIZE or (start - HEAD) % SIZE + nbytes > SIZE


def test_few_chunks_are_kept_and_none_that_was_used_up(
    opened: Callable[..., Chunks], data: bytes, hashed: list[int]
) -> None:
    recent = Recent(2)
    chunks = opened(recent)
    for _ in range(2):
        for start in range(HEAD, HEAD + 250, 50):
            read(chunks, start, 25)
    assert len(recent._kept) <= 2
    recent = Recent(2)
    chunks = opened(recent)
    for start in range(HEAD, len(data), 1):
        read(chunks, start, 1)
    assert not recent._kept


def test_groups_of_what_is_left_to_do(opened: Callable[..., Chunks], data: bytes) -> None:
    chunks = opened()
    assert chunks.ranges == [(7, 250), (257, 100), (357, 1), (358, 30), (388, 401)]
    groups = chunks.pending(chunks.ranges)
    whole = [(7, 100), (107, 100), (207, 50), (257, 100), (357, 1), (358, 30)]
    whole += [(388, 100), (488, 100), (588, 100), (688, 100), (788, 1)]
    assert [part for group in groups for part in group] == whole
    assert all(sum(nbytes for _, nbytes in group) <= SIZE for group in groups)
    assert len(groups) < 11
    chunks.check(groups[0])
    left = [] if chunks._source.map() is None else groups[1:]
    for group in left:
        chunks.check(group)
    assert chunks.pending(chunks.ranges) == ([] if left else groups), "what is not mapped may change"
    assert chunks.pending([(10, 3), (20, 3)]) == ([] if left else [[(7, 100)]])
