"""Making keys, and signing packages with them; :func:`obmlite.load` checks signatures with ``public_key=``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from obmlite import _signatures
from obmlite.errors import ArgumentError, context
from obmlite.io.commit import locked
from obmlite.io.replacing import replacing
from obmlite.io.staging import signature_name, sync, sync_folder, write_all
from obmlite.io.store import LocalDirectory
from obmlite.loading import open_manifest
from obmlite.schema.decode import decode

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["PUBLIC_SUFFIX", "keygen", "sign"]

PUBLIC_SUFFIX = ".pub"
"""What the public key's file has behind the private key's name."""

PrivateKey: TypeAlias = "str | os.PathLike[str] | bytes | Ed25519PrivateKey"
Phrase: TypeAlias = "str | bytes | Callable[[], str | bytes | None] | None"


def keygen(path: str | os.PathLike[str], *, passphrase: str | bytes | None = None) -> tuple[str, str]:
    """Makes a pair of Ed25519 keys, as PEM files.

    Args:
      path: file of the private key (PKCS #8, readable by its owner only); the public one (SubjectPublicKeyInfo) gets
        ``.pub`` behind its name. Neither may be there.
      passphrase: the private key is encrypted with it.

    Returns:
      The public key's file, and its fingerprint in hexadecimal digits.

    Raises:
      FileExistsError: one of the files is there.
      ArgumentError: the passphrase is empty.
      ImportError: ``cryptography`` is not installed.
      OSError: a file cannot be written.
    """
    _signatures.require()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if passphrase is not None and not passphrase:
        raise ArgumentError("The passphrase is empty.", field="passphrase", expected="text, or None for no encryption")
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(_bytes(passphrase))
    private = os.fspath(path)
    public = private + PUBLIC_SUFFIX
    key = Ed25519PrivateKey.generate()
    own = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    shown = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    _create(public, shown, 0o666)  # first: one that is there may belong to a private key that is not
    try:
        _create(private, own, 0o600)
    except BaseException:
        os.unlink(public)
        raise
    return public, _signatures.fingerprint(key.public_key()).hex()


def sign(path: str | os.PathLike[str], key: PrivateKey, *, passphrase: Phrase = None) -> str:
    """Signs a package: its manifest, which holds a digest of everything else in it.

    Whoever saved it should: nothing but the manifest is read, and who signs vouches for what the manifest says. A
    package that is signed with other keys is then signed with this one, too. Saving over the package leaves the new
    one unsigned; the next save removes the signatures of the one before.

    Args:
      path: the package's directory.
      key: a private key of Ed25519: a PEM file by its path, the bytes of one, or a key of the ``cryptography`` package.
      passphrase: the private key's, if it is encrypted; or what gives it, called only then.

    Returns:
      The key's fingerprint, in hexadecimal digits.

    Raises:
      PackageNotFoundError: there is no package at the path.
      CorruptPackageError: the manifest is not what was saved.
      UnsupportedFormatError: the package needs a newer obmlite.
      SignatureError: the package's signature file is damaged.
      ArgumentError: the key is none of Ed25519, the passphrase is missing or wrong, or there are too many signatures.
      ImportError: ``cryptography`` is not installed.
      OSError: the key cannot be read, or the signature not be written.
    """
    private = _private_key(key, passphrase)
    own = _signatures.fingerprint(private.public_key())
    with LocalDirectory(path) as store, context(package=store.name), locked(path):
        digest = decode(open_manifest(store)).digest
        signatures = {before.key: before for before in _signatures.read(store, digest)}
        signatures[own] = _signatures.Signature(own, private.sign(_signatures.message(digest)))
        if len(signatures) > _signatures.MAX_SIGNATURES:
            raise ArgumentError(
                "The package has too many signatures.", expected=f"at most {_signatures.MAX_SIGNATURES}", found="more"
            )
        with replacing(os.path.join(path, signature_name(digest))) as descriptor:
            write_all(descriptor, _signatures.pack(digest, signatures.values()))
    return own.hex()


def _private_key(given: PrivateKey, passphrase: Phrase) -> Ed25519PrivateKey:
    _signatures.require()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if isinstance(given, Ed25519PrivateKey):
        return given
    shown, given = _signatures.content(given)
    if not isinstance(given, bytes):
        raise _no_key(shown, type(given).__name__)
    secret: str | bytes | None = None
    if b"ENCRYPTED" in given:
        secret = passphrase() if callable(passphrase) else passphrase
        if not secret:
            raise ArgumentError("The private key is encrypted.", field="passphrase", expected="its passphrase")
    try:
        key: Any = load_pem_private_key(given, _bytes(secret) if secret else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _no_key(shown, "a wrong passphrase, or a damaged file" if secret else "something else") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(shown, type(key).__name__)
    return key


def _no_key(where: str, found: str) -> ArgumentError:
    return ArgumentError(
        "What is given is no private key of Ed25519 that can be read.",
        field="key",
        expected="a PEM file, as obmlite keygen writes it; its bytes; or a key of the cryptography package",
        found=f"{where}: {found}",
    )


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _create(path: str, data: bytes, mode: int) -> None:
    """Writes a file that is not there yet, durably."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        try:
            write_all(descriptor, data)
            sync(descriptor)
        finally:
            os.close(descriptor)
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sync_folder(folder)
        finally:
            os.close(folder)
    except BaseException:
        os.unlink(path)
        raise
