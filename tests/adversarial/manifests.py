"""Manifests, with and without a trailer that matches, and packages whose manifest was forged."""

from __future__ import annotations

import copy
import functools
import random
import struct
from typing import Any

from obmlite.errors import CorruptPackageError, RestoreError, UnsupportedFormatError
from obmlite.schema import decode, trailer
from obmlite.schema.encode import encode
from tests.adversarial import mutations
from tests.adversarial.kinds import Kind
from tests.schema import flat, samples


@functools.cache
def good() -> bytes:
    """A manifest in which every field of the schema is there."""
    return encode(samples.sample())


@functools.cache
def _expected() -> Any:
    return samples.undigested(decode.decode(good()))


@functools.cache
def places(manifest: bytes) -> tuple[tuple[flat.Place, ...], tuple[int, ...]]:
    """Every number of a manifest by its field, and where tables and vectors begin."""
    found = list(flat.walk(manifest[: -trailer.SIZE]))
    return tuple(found), tuple(p.position for p in found if p.what in ("soffset", "count"))


@functools.cache
def _by_field(manifest: bytes) -> list[list[flat.Place]]:
    groups: dict[tuple[str, str], list[flat.Place]] = {}
    for place in places(manifest)[0]:
        groups.setdefault((place.label, place.what), []).append(place)
    return list(groups.values())


def forged(rng: random.Random, manifest: bytes) -> bytes:
    """A manifest with some numbers changed, each field as likely as any other, and a trailer that matches."""
    data = bytearray(manifest[: -trailer.SIZE])
    _, targets = places(manifest)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        place = rng.choice(rng.choice(_by_field(manifest)))
        form = place.form.upper()  # what is signed is changed bit by bit, too
        bits = 8 * struct.calcsize(form)
        [now] = struct.unpack_from(form, data, place.position)
        value = mutations.number(rng, bits, now)
        if place.what == "offset" and rng.random() < 0.5:
            value = (rng.choice(targets) - place.position) & ((1 << bits) - 1)
        if place.what in ("item", "scalar") and rng.random() < 0.3:
            value = rng.randrange(8)
        struct.pack_into(form, data, place.position, value)
    if rng.random() < 0.1:
        data[8:] = mutations.changed(rng, bytes(data[8:]))
    return trailer.seal(bytes(data))


def restructured(rng: random.Random, manifest: bytes) -> bytes:
    """A manifest with rows left out, repeated, exchanged or added, written anew."""
    found = flat.to_dict(manifest)
    for _ in range(rng.choice((1, 1, 2, 3))):
        spots = list(mutations.parts(found))
        parent, key = rng.choice(spots)
        kind = rng.randrange(6)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent[key], list) and parent[key]:
            vector = parent[key]
            vector.insert(rng.randrange(len(vector) + 1), rng.choice(vector))
        elif kind == 2 and isinstance(parent[key], list) and parent[key]:
            del parent[key][rng.randrange(len(parent[key])) :]
        elif kind == 3 and isinstance(parent[key], list):
            rng.shuffle(parent[key])
        elif kind == 4 and isinstance(parent[key], bytes):
            parent[key] = mutations.changed(rng, parent[key], (b"\xff", b"", b"b", b"a" * 300))
        else:
            same = [o[k] for o, k in spots if k == key and type(o) is type(parent)]
            parent[key] = copy.deepcopy(rng.choice(same))
    try:
        return flat.from_dict(found)
    except (struct.error, AttributeError, KeyError, TypeError):  # a number or a table where the schema has none
        return forged(rng, manifest)


def _make(rng: random.Random) -> bytes:
    return restructured(rng, good()) if rng.random() < 0.1 else forged(rng, good())


def _read(data: bytes) -> str:
    read = decode.decode(data)
    samples.touch(read)
    return "same" if samples.undigested(read) == _expected() else "other"


def _read_sealed(data: bytes) -> str:
    flatbuffer, _ = trailer.unseal(data)
    if flatbuffer != good()[: -trailer.SIZE]:
        raise AssertionError("other bytes under the same digest")
    return "same"


MANIFEST = Kind(
    "manifest",
    "numbers, offsets and rows of a manifest, its digest made again",
    _make,
    _read,
    # RestoreError: a namedtuple that is registered has other fields than the forged tree.
    refusals=(CorruptPackageError, UnsupportedFormatError, RestoreError),
)

SEALED = Kind(
    "sealed",
    "any bytes of a manifest with its trailer",
    lambda rng: mutations.changed(rng, good(), (trailer.MAGIC, b"OBML")),
    _read_sealed,
)
