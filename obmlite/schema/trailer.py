"""The 64 bytes behind the flatbuffer: nothing in it is read before they match.

========  =====  ==========================================
offset    size   what
========  =====  ==========================================
0         8      length of the flatbuffer in bytes, u64
8         32     SHA-256 of the flatbuffer
40        4      version of the trailer, u32, 1
44        4      flags, u32, 0
48        16     magic, ``obmlite manifest``
========  =====  ==========================================

All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import struct

from obmlite.errors import CorruptPackageError, UnsupportedFormatError

MAGIC = b"obmlite manifest"
VERSION = 1
_LAYOUT = struct.Struct("<Q32sII16s")
SIZE = _LAYOUT.size
IDENTIFIER = b"OBML"

MAX_MANIFEST_BYTES = (1 << 31) - 1
"""Length of the flatbuffer: the largest that its signed 32-bit offsets can address."""


def seal(flatbuffer: bytes) -> bytes:
    """The manifest file's bytes: the flatbuffer and its trailer.

    Raises:
      UnsupportedFormatError: the flatbuffer is over :data:`MAX_MANIFEST_BYTES`.
    """
    if len(flatbuffer) > MAX_MANIFEST_BYTES:
        raise UnsupportedFormatError(
            "The manifest is too large.", expected=f"at most {MAX_MANIFEST_BYTES} bytes", found=len(flatbuffer)
        )
    return flatbuffer + _LAYOUT.pack(len(flatbuffer), hashlib.sha256(flatbuffer).digest(), VERSION, 0, MAGIC)


def check_size(size: int) -> None:
    """Refuses a manifest file by its length, before it is read.

    Raises:
      CorruptPackageError: it is too short or too long to be one.
    """
    if not SIZE + 8 <= size <= SIZE + MAX_MANIFEST_BYTES:
        raise CorruptPackageError(
            f"The manifest is too {'short' if size < SIZE + 8 else 'long'}.",
            field="length",
            expected=f"{SIZE + 8} to {SIZE + MAX_MANIFEST_BYTES} bytes",
            found=size,
        )


def unseal(manifest: bytes) -> tuple[bytes, bytes]:
    """(the flatbuffer, its SHA-256), once the trailer matches.

    Raises:
      CorruptPackageError: the file is not what its trailer says.
      UnsupportedFormatError: the trailer is of a later version.
    """
    check_size(len(manifest))
    length, digest, version, flags, magic = _LAYOUT.unpack_from(manifest, len(manifest) - SIZE)
    if magic != MAGIC:
        raise CorruptPackageError(
            "The manifest does not end as one does: it was cut off, extended, or is something else.",
            field="magic",
            expected=MAGIC,
            found=magic,
        )
    if version != VERSION or flags:
        raise UnsupportedFormatError(
            "The manifest's trailer is of a kind that this obmlite does not read.",
            field="trailer version",
            expected=f"version {VERSION}, flags 0",
            found=f"version {version}, flags {flags:#x}",
            fix="install a newer obmlite",
        )
    if length + SIZE != len(manifest):
        raise CorruptPackageError(
            "The manifest's length is not what its trailer says.",
            field="length",
            expected=length + SIZE,
            found=len(manifest),
        )
    flatbuffer = manifest[:length]
    found = hashlib.sha256(flatbuffer).digest()
    if found != digest:
        raise CorruptPackageError(
            "The manifest's digest does not match: its bytes were changed.",
            field="digest",
            expected=digest.hex(),
            found=found.hex(),
        )
    if flatbuffer[4:8] != IDENTIFIER:
        raise CorruptPackageError(
            "The manifest is no obmlite manifest.", field="identifier", expected=IDENTIFIER, found=flatbuffer[4:8]
        )
    return flatbuffer, digest
