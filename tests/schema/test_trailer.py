"""The trailer: nothing of a manifest is read before its length and digest match."""

from __future__ import annotations

import hashlib
import struct

import pytest

from obmlite.errors import CorruptPackageError, UnsupportedFormatError
from obmlite.schema import trailer
from obmlite.schema.decode import decode
from obmlite.schema.encode import encode
from tests.schema import samples

GOOD = encode(samples.sample())
FLATBUFFER = GOOD[: -trailer.SIZE]


def refused(manifest, error, field):
    with pytest.raises((CorruptPackageError, UnsupportedFormatError)) as caught:
        decode(manifest)
    assert (type(caught.value), caught.value.field) == (error, field)
    return caught.value


def sealed(flatbuffer=FLATBUFFER, *, length=None, digest=None, version=1, flags=0, magic=b"obmlite manifest"):
    """A trailer as docs/format.md describes it."""
    return flatbuffer + struct.pack(
        "<Q32sII16s",
        len(flatbuffer) if length is None else length,
        hashlib.sha256(flatbuffer).digest() if digest is None else digest,
        version,
        flags,
        magic,
    )


def test_the_trailer_is_as_documented():
    assert sealed() == GOOD
    assert trailer.SIZE == 64
    assert trailer.unseal(GOOD) == (FLATBUFFER, hashlib.sha256(FLATBUFFER).digest())
    assert FLATBUFFER[4:8] == b"OBML"


@pytest.mark.parametrize(
    ("manifest", "error", "field"),
    [
        (b"", CorruptPackageError, "length"),
        (b"\0", CorruptPackageError, "length"),
        (GOOD[-64:], CorruptPackageError, "length"),
        (GOOD[-71:], CorruptPackageError, "length"),
        (bytes(72), CorruptPackageError, "magic"),
        (b"\n" * 5000, CorruptPackageError, "magic"),
        (GOOD[:-1], CorruptPackageError, "magic"),
        (GOOD[:-64], CorruptPackageError, "magic"),
        (GOOD + b"\0", CorruptPackageError, "magic"),
        (GOOD + b"\n", CorruptPackageError, "magic"),
        (GOOD[1:], CorruptPackageError, "length"),
        (b"\0" + GOOD, CorruptPackageError, "length"),
        (GOOD + GOOD, CorruptPackageError, "length"),
        (FLATBUFFER + bytes(8) + GOOD[-64:], CorruptPackageError, "length"),
        (sealed(length=len(FLATBUFFER) + 1), CorruptPackageError, "length"),
        (sealed(length=len(FLATBUFFER) - 1), CorruptPackageError, "length"),
        (sealed(length=0), CorruptPackageError, "length"),
        (sealed(length=2**64 - 1), CorruptPackageError, "length"),
        (sealed(length=2**64 - 64), CorruptPackageError, "length"),
        (sealed(digest=bytes(32)), CorruptPackageError, "digest"),
        (sealed(version=0), UnsupportedFormatError, "trailer version"),
        (sealed(version=2), UnsupportedFormatError, "trailer version"),
        (sealed(version=2**32 - 1), UnsupportedFormatError, "trailer version"),
        (sealed(flags=1), UnsupportedFormatError, "trailer version"),
        (sealed(flags=1 << 31), UnsupportedFormatError, "trailer version"),
        (sealed(magic=b"obmlite manifes\0"), CorruptPackageError, "magic"),
        (sealed(magic=b"OBMLITE MANIFEST"), CorruptPackageError, "magic"),
        (sealed(FLATBUFFER[:4] + b"OBMX" + FLATBUFFER[8:]), CorruptPackageError, "identifier"),
        (sealed(bytes(8)), CorruptPackageError, "identifier"),
        (sealed(b"\xff\xff\xff\xffOBML"), CorruptPackageError, "Manifest"),
        (sealed(bytes(4) + b"OBML"), CorruptPackageError, "Manifest"),
    ],
)
def test_what_is_no_manifest_is_refused(manifest, error, field):
    refused(manifest, error, field)


@pytest.mark.parametrize("length", range(0, len(GOOD), 61))
def test_a_manifest_that_is_cut_off_is_refused(length):
    refused(GOOD[:length], CorruptPackageError, "length" if length < 72 else "magic")


PARTS = {"length": (0, 8), "digest": (8, 40), "trailer version": (40, 48), "magic": (48, 64)}


@pytest.mark.parametrize("field", PARTS)
def test_any_flipped_bit_of_the_trailer_is_found(field):
    error = UnsupportedFormatError if field == "trailer version" else CorruptPackageError
    for byte in range(*PARTS[field]):
        for bit in range(8):
            changed = bytearray(GOOD)
            changed[len(FLATBUFFER) + byte] ^= 1 << bit
            refused(bytes(changed), error, field)


def test_any_flipped_bit_of_the_flatbuffer_is_found():
    for byte in range(len(FLATBUFFER)):
        changed = bytearray(GOOD)
        changed[byte] ^= 1 << (byte % 8)
        with pytest.raises(CorruptPackageError) as caught:
            trailer.unseal(bytes(changed))
        assert caught.value.field == "digest"


def test_a_later_trailer_says_what_to_do():
    error = refused(sealed(version=7, flags=5), UnsupportedFormatError, "trailer version")
    assert error.found == "version 7, flags 0x5"
    assert "newer obmlite" in str(error)


def test_a_manifest_that_is_too_large_is_not_written(monkeypatch):
    monkeypatch.setattr(trailer, "MAX_MANIFEST_BYTES", len(FLATBUFFER))
    assert trailer.seal(FLATBUFFER) == GOOD
    monkeypatch.setattr(trailer, "MAX_MANIFEST_BYTES", len(FLATBUFFER) - 1)
    with pytest.raises(UnsupportedFormatError, match="too large"):
        encode(samples.sample())
