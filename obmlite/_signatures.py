"""Signatures of manifests: Ed25519 over the manifest's digest, which covers every byte of the package.

They lie beside the manifest, in a file whose name holds its digest (``docs/format.md``). Keys and signatures are those
of the ``cryptography`` package, which is imported when a key is first needed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from obmlite.errors import ArgumentError, MissingFileError, SignatureError, UnsupportedFormatError
from obmlite.io.staging import is_signature_name, signature_name
from obmlite.schema.trailer import unseal

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from obmlite.io.store import Store

__all__ = [
    "MAX_SIGNATURES",
    "PublicKeys",
    "Signature",
    "check",
    "content",
    "fingerprint",
    "message",
    "pack",
    "public_keys",
    "read",
    "unpack",
]

MAX_SIGNATURES = 64
"""Signatures of one manifest."""

PublicKey: TypeAlias = "str | os.PathLike[str] | bytes | Ed25519PublicKey"
PublicKeys: TypeAlias = "PublicKey | Collection[PublicKey]"
"""A PEM file by its path, the bytes of one, or a key of the ``cryptography`` package; or several of these."""

_MAGIC = b"obmlite signature "
_FILE = re.compile(
    rb"obmlite signature 1\nmanifest ([0-9a-f]{64})\n((?:ed25519 [0-9a-f]{64} [0-9a-f]{128}\n){1,%d})" % MAX_SIGNATURES
)
_MAX_BYTES = 1 << 14  # of the file, at its longest


@dataclasses.dataclass(frozen=True, slots=True)
class Signature:
    """One signature of a manifest.

    Attributes:
      key: fingerprint of the public key, 32 bytes.
      value: the signature, 64 bytes.
    """

    key: bytes
    value: bytes


def message(digest: bytes) -> bytes:
    """What is signed: the manifest's digest, behind a text that no signature for another purpose begins with."""
    return b"obmlite manifest signature v1\0" + digest


# --- the file


def pack(digest: bytes, signatures: Iterable[Signature]) -> bytes:
    """The file of a manifest's signatures.

    Args:
      digest: the manifest's.
      signatures: one for each key, at most :data:`MAX_SIGNATURES`.
    """
    lines = [b"obmlite signature 1", b"manifest " + digest.hex().encode()]
    lines += [
        f"ed25519 {own.key.hex()} {own.value.hex()}".encode() for own in sorted(signatures, key=lambda own: own.key)
    ]
    return b"".join(line + b"\n" for line in lines)


def unpack(data: bytes) -> tuple[bytes, list[Signature]]:
    """(digest of the manifest that is signed, its signatures).

    Raises:
      SignatureError: this is no such file.
      UnsupportedFormatError: a newer obmlite wrote it.
    """
    first = data.partition(b"\n")[0]
    if first.startswith(_MAGIC) and re.fullmatch(rb"[0-9]{1,9}", version := first[len(_MAGIC) :]) and version != b"1":
        raise UnsupportedFormatError(
            "The signature file is of a kind that this obmlite does not read.",
            field="signature file",
            expected="version 1",
            found=f"version {version.decode()}",
            fix="install a newer obmlite",
        )
    found = _FILE.fullmatch(data)
    rows = [line.split(b" ") for line in found[2].splitlines()] if found else []
    signatures = [Signature(bytes.fromhex(key.decode()), bytes.fromhex(value.decode())) for _, key, value in rows]
    if found is None or len({own.key for own in signatures}) != len(signatures):
        raise SignatureError(
            "The signature file is not what docs/format.md says of one.",
            field="signature file",
            expected="its version, a manifest's digest, and a line for each key",
            found=ascii(data[:100].decode("latin-1")),
            fix="sign the package again, once the file is removed",
        )
    return bytes.fromhex(found[1].decode()), signatures


def read(store: Store, digest: bytes) -> list[Signature]:
    """The signatures of a package's manifest; none if it has no such file.

    Args:
      store: the package.
      digest: the manifest's.

    Raises:
      SignatureError: the file is damaged, or holds signatures of another manifest.
      UnsupportedFormatError: a newer obmlite wrote it.
    """
    name = signature_name(digest)
    try:
        source = store.open(name)
    except MissingFileError:
        return []
    try:
        if source.size > _MAX_BYTES:
            raise SignatureError(
                "The signature file is too large.",
                field="signature file",
                expected=f"{name}: at most {_MAX_BYTES} bytes",
                found=f"{source.size} bytes",
            )
        data = bytes(source.read(0, source.size))
    finally:
        source.close()
    signed, signatures = unpack(data)
    if signed != digest:
        raise SignatureError(
            "The signature is of another manifest.",
            field="manifest digest",
            expected=digest.hex(),
            found=signed.hex(),
            fix="do not use the package, or have it signed again by whom you trust",
        )
    return signatures


# --- keys


def fingerprint(key: Ed25519PublicKey) -> bytes:
    """SHA-256 of a public key's SubjectPublicKeyInfo in DER (RFC 8410), 32 bytes."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def public_keys(given: PublicKeys) -> dict[bytes, Ed25519PublicKey]:
    """Fingerprint → key.

    Raises:
      ArgumentError: there is no key, or what is given is none, or one of another kind.
      ImportError: ``cryptography`` is not installed.
      OSError: a file cannot be read.
    """
    keys = [_public_key(key) for key in _several(given)]
    if not keys:
        raise ArgumentError("No public key is given.", field="public_key", expected="at least one", found="none")
    return {fingerprint(key): key for key in keys}


def _several(given: PublicKeys) -> Collection[Any]:
    # A mapping's keys, or the numbers of a bytearray, are no keys of this kind.
    if isinstance(given, Collection) and not isinstance(given, (str, bytes, bytearray, memoryview, Mapping)):
        return given
    return [given]


def _public_key(given: Any) -> Ed25519PublicKey:
    require()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if isinstance(given, Ed25519PublicKey):
        return given
    shown, given = content(given)
    try:
        key = load_pem_public_key(given) if isinstance(given, bytes) else given
    except (ValueError, UnsupportedAlgorithm):
        private = isinstance(given, bytes) and b"PRIVATE KEY" in given
        raise _no_key(shown, "a private key" if private else "something else") from None
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key(shown, type(key).__name__)
    return key


def content(given: Any) -> tuple[str, Any]:
    """What a key is given as, for people; and the bytes of its file, where that is a path."""
    if isinstance(given, (str, os.PathLike)):
        with open(given, "rb") as file:
            return os.fspath(given), file.read()
    return "the bytes given" if isinstance(given, bytes) else "an object", given


def _no_key(where: str, found: str) -> ArgumentError:
    return ArgumentError(
        "What is given is no public key of Ed25519.",
        field="public_key",
        expected="a PEM file, as obmlite keygen writes it to KEY.pub; its bytes; or a key of the cryptography package",
        found=f"{where}: {found}",
    )


def require() -> None:
    """Refuses where the ``cryptography`` package is missing.

    Raises:
      ImportError: it is; the text says how to install it.
    """
    try:
        import cryptography.hazmat.primitives.asymmetric.ed25519  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise ImportError("signatures need the cryptography package: pip install 'obmlite[sign]'") from error


# --- both together


def check(store: Store, manifest: bytes, keys: Mapping[bytes, Ed25519PublicKey]) -> bytes:
    """Refuses a manifest that none of some keys has signed. Nothing of it is read but its digest.

    Args:
      store: the package.
      manifest: the bytes of the manifest that will be used.
      keys: those that are trusted, by fingerprint; one of them suffices.

    Returns:
      The fingerprint of the key that has signed it.

    Raises:
      SignatureError: none of them has; the text says what there is instead.
      CorruptPackageError: the manifest is not what was saved.
    """
    from cryptography.exceptions import InvalidSignature

    _, digest = unseal(manifest)
    signatures = read(store, digest)
    if not signatures:
        old = [name for name in store.files() if is_signature_name(name)]
        raise SignatureError(
            "The package is not signed.",
            field="signature file",
            expected=signature_name(digest),
            found=f"signatures of other manifests: {', '.join(old[:3])}" if old else "no signature",
            fix="obmlite sign, by whoever saved it, after every save",
        )
    forged = False
    for own in signatures:
        if own.key not in keys:
            continue
        try:
            keys[own.key].verify(own.value, message(digest))
        except InvalidSignature:
            forged = True
        else:
            return own.key
    trusted = ", ".join(key.hex() for key in keys)
    if forged:
        raise SignatureError(
            "The signature does not fit the manifest: it was not made with the key that it names.",
            field="signature",
            expected=f"a signature by {trusted}",
            found="another one under that name",
            fix="do not use the package",
        )
    raise SignatureError(
        "The package is signed, but not with a key that is trusted.",
        field="key",
        expected=trusted,
        found=", ".join(own.key.hex() for own in signatures),
        fix="public_key= of whoever signed it, if you trust them",
    )
