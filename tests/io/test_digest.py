import hashlib
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from obmlite.io.digest import CHUNK, chunk_digests, file_digest, flat, piece_digest, sha256


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def test_sha256_joins_buffers_of_any_kind():
    array = np.arange(6, dtype=np.complex64).reshape(2, 3)
    assert sha256() == digest(b"")
    assert sha256(b"ab", bytearray(b"c"), memoryview(b"d")) == digest(b"abcd")
    assert sha256(array, np.zeros((0, 3), "f4"), np.float16(2)) == digest(array.tobytes() + np.float16(2).tobytes())


@pytest.mark.parametrize("dtype", ["?", "i1", "<f2", ">f4", "f8", "c16", "M8[s]", ml_dtypes.bfloat16])
def test_flat_shows_the_bytes_without_a_copy(dtype):
    array = np.zeros((2, 3), dtype)
    view = flat(array)
    assert (view.format, view.ndim, view.nbytes) == ("B", 1, array.nbytes)
    view[0] = 1
    assert array.view("u1").flat[0] == 1


def test_flat_keeps_read_only_and_refuses_gaps():
    assert flat(b"ab").readonly
    assert flat(np.frombuffer(b"ab", "u1")).readonly
    assert bytes(flat(memoryview(np.ones((2, 2), "c8")))) == np.ones(4, "c8").tobytes()
    assert bytes(flat(memoryview(np.ones((2, 0))))) == b""
    with pytest.raises(ValueError, match="contiguous"):
        flat(np.zeros((4, 4))[:, ::2])
    with pytest.raises(ValueError, match="contiguous"):
        flat(np.zeros((4, 4), order="F"))
    with pytest.raises(ValueError, match="contiguous"):
        flat(memoryview(bytes(8))[::2])
    with pytest.raises(TypeError):
        flat(np.array([None]))
    with pytest.raises(TypeError):
        flat("text")


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_chunks(size):
    data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    expected = b"".join(digest(data[start : start + CHUNK]) for start in range(0, size, CHUNK))
    assert chunk_digests(data) == expected
    assert len(expected) == 32 * -(-size // CHUNK)
    with ThreadPoolExecutor(3) as pool:
        assert chunk_digests(memoryview(data), pool) == expected


def test_chunks_count_bytes_not_items():
    array = np.arange(CHUNK // 4, dtype="f8").reshape(-1, 8)
    data = array.tobytes()
    assert chunk_digests(array) == digest(data[:CHUNK]) + digest(data[CHUNK:])


def test_derived_digests():
    chunks = digest(b"a") + digest(b"b")
    assert piece_digest(chunks) == digest(chunks)
    assert piece_digest(b"") == digest(b"")
    assert file_digest(digest(b"h"), iter([digest(b"p"), digest(b"q")])) == digest(
        digest(b"h") + digest(b"p") + digest(b"q")
    )
    assert file_digest(digest(b"h"), []) == digest(digest(b"h"))
    with pytest.raises(ValueError, match="multiple"):
        piece_digest(b"abc")
    with pytest.raises(ValueError, match="32 bytes"):
        file_digest(digest(b"h"), [b"", digest(b"p")])
