"""Signature files beside a package, changed; nobody but the key's owner makes one that holds."""

from __future__ import annotations

import functools
import random
from typing import Any

from obmlite import _signatures
from obmlite.errors import CorruptPackageError, SignatureError, UnsupportedFormatError
from obmlite.io.staging import signature_name
from obmlite.schema.trailer import unseal
from tests.adversarial import manifests, mutations
from tests.adversarial.kinds import Kind
from tests.adversarial.memory import Finding, MemoryStore


@functools.cache
def _keys() -> tuple[Any, Any]:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(bytes(range(32))), Ed25519PrivateKey.from_private_bytes(bytes(32))


@functools.cache
def good_signature() -> bytes:
    """Two signatures of the good manifest, of which the first key is trusted."""
    _, digest = unseal(manifests.good())
    message = _signatures.message(digest)
    own = [_signatures.Signature(_signatures.fingerprint(k.public_key()), k.sign(message)) for k in _keys()]
    return _signatures.pack(digest, own)


@functools.cache
def _other() -> bytes:
    """The same keys' signatures of another manifest."""
    message = _signatures.message(bytes(32))
    own = [_signatures.Signature(_signatures.fingerprint(k.public_key()), k.sign(message)) for k in _keys()]
    return _signatures.pack(bytes(32), own)


def _make(rng: random.Random) -> bytes:
    if rng.random() < 0.5:  # the same form, other digits
        data = bytearray(good_signature())
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(data))
            if data[at] in b"0123456789abcdef":
                data[at] = rng.choice(b"0123456789abcdef")
        return bytes(data)
    return mutations.changed(
        rng, good_signature(), (b"\n", b"ed25519 ", b"obmlite signature 2", b"0" * 128), (_other(),)
    )


def _read(data: bytes) -> str:
    manifest, trusted = manifests.good(), _keys()[0].public_key()
    _, digest = unseal(manifest)
    store = MemoryStore({signature_name(digest): data})
    key = _signatures.check(store, manifest, {_signatures.fingerprint(trusted): trusted})
    lines = good_signature().splitlines()
    kept = [line for line in lines if key.hex().encode() in line]
    if key != _signatures.fingerprint(trusted) or any(line not in data.splitlines() for line in [lines[1], *kept]):
        raise Finding("wrong data")
    return "same" if data == good_signature() else "other"


SIGNATURE = Kind(
    "signature",
    "signature files, of one trusted key and another",
    _make,
    _read,
    refusals=(SignatureError, CorruptPackageError, UnsupportedFormatError),
)
