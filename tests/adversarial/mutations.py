"""Changes to good input: of any bytes, of numbers at known places, and of JSON."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator, Sequence
from typing import Any

FORMS = ("<B", "<H", "<I", "<Q", ">H", ">I", ">Q")


def number(rng: random.Random, bits: int, now: int = 0) -> int:
    """A number that breaks things: a limit, a neighbour, a power of two, or any."""
    top = (1 << bits) - 1
    choice = rng.random()
    if choice < 0.3:
        return rng.choice((0, 1, top, top >> 1, (top >> 1) + 1, top - 1)) & top
    if choice < 0.6:
        return (now + rng.choice((-1, 1, -2, 2, 4, -4, 8, 64, -64))) & top
    if choice < 0.8:
        return ((1 << rng.randrange(bits)) + rng.choice((-1, 0, 1))) & top
    return rng.getrandbits(bits)


def changed(rng: random.Random, data: bytes, words: Sequence[bytes] = (), others: Sequence[bytes] = ()) -> bytes:
    """Bytes with a few changes of any kind.

    Args:
      rng: decides.
      data: the bytes.
      words: what the format is made of, to be put in.
      others: other good inputs, of which parts are put in.
    """
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        _change(rng, out, words, others)
    return bytes(out)


def _change(rng: random.Random, out: bytearray, words: Sequence[bytes], others: Sequence[bytes]) -> None:
    size = len(out)
    at = rng.randrange(size + 1)
    kind = rng.randrange(11)
    if kind < 3 and at < size:
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 3 and at < size:
        out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.getrandbits(8)))
    elif kind < 6:
        form = rng.choice(FORMS)
        width = struct.calcsize(form)
        if size >= width:
            at = rng.randrange(size - width + 1)
            [now] = struct.unpack_from(form, out, at)
            struct.pack_into(form, out, at, number(rng, 8 * width, now))
    elif kind == 6:
        del out[at : at + rng.choice((1, 2, 4, 8, 64, size))]
    elif kind == 7:
        length = rng.choice((1, 4, 16, 256))
        out[at:at] = out[rng.randrange(size + 1) :][:length]
    elif kind == 8:
        word = rng.choice(words) if words and rng.random() < 0.8 else rng.randbytes(rng.choice((1, 2, 4, 16)))
        end = at + (len(word) if rng.random() < 0.5 else 0)
        out[at:end] = word
    elif kind == 9 and others:
        other = rng.choice(others)
        start = rng.randrange(len(other) + 1)
        part = other[start : start + rng.choice((4, 16, 64, 1024))]
        out[at : at + rng.choice((0, len(part)))] = part
    else:
        out[at:] = b"" if rng.random() < 0.5 else out[at:] + bytes(rng.choice((1, 8, 4096)))


_TEXTS = (
    "", "a", "..", "../x", "/etc/passwd", "a/b", "\\", "\0", "\ud800", "é", "x" * 300, "__metadata__", "F32", "BF16",
    "F4", "0", "-1", "NaN", ".", "a.b", "float32", "int4", "key<rbg>", "9" * 30,
)  # fmt: skip
_NUMBERS = (0, 1, -1, 2, 3, 65, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63, 2**64 - 1, 2**64, 10**30)


def changed_json(rng: random.Random, value: Any) -> str:
    """A JSON document with one to three of its values replaced, left out, repeated or added; sometimes of bad text."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(parts(value))
        if not places:
            break
        parent, key = rng.choice(places)
        kind = rng.randrange(10)
        if kind < 5:
            parent[key] = _replaced(rng, parent[key])
        elif kind == 5:
            del parent[key]
        elif kind == 6 and isinstance(parent, dict):
            parent[rng.choice(_TEXTS)] = parent[key]
        elif kind == 6:
            parent.insert(key, parent[key])
        elif kind == 7:
            other, place = rng.choice(places)
            if place in range(len(other)) if isinstance(other, list) else place in other:
                parent[key] = json.loads(_dumped(other[place]))
        elif kind == 8 and isinstance(parent, dict):
            parent[rng.choice(_TEXTS)] = parent.pop(key)
        elif isinstance(parent[key], list):
            rng.shuffle(parent[key])
        else:
            parent[key] = [parent[key]]
    text = _dumped(value)
    if rng.random() < 0.1 and text:
        at = rng.randrange(len(text))
        text = (
            text[:at] + rng.choice(('"', "{", "}", ",", "[", "\\", " ", "\0", "NaN", "1e999", "[" * 2000)) + text[at:]
        )
    if rng.random() < 0.05 and ":" in text:  # a key twice
        at = text.index("{") + 1
        text = text[:at] + text[at : text.index(":", at)] + ":null," + text[at:]
    return text


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in nested dicts and lists."""
    pending = [value]
    while pending:
        parent = pending.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent)) if isinstance(parent, list) else ()
        for key in keys:
            yield parent, key
            if isinstance(parent[key], (dict, list)):
                pending.append(parent[key])


def _replaced(rng: random.Random, value: Any) -> Any:
    choice = rng.random()
    if type(value) is int and choice < 0.5:
        return value + rng.choice((-1, 1, -4, 4, 8, -8, 16, value))
    if isinstance(value, str) and choice < 0.3 and value:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(_TEXTS) + value[at + 1 :]
    if isinstance(value, list) and choice < 0.4 and value:
        return [*value, rng.choice(value)] if choice < 0.2 else value[:-1]
    return rng.choice(
        (None, True, False, 0.5, 1e400, {}, [], {"a": []}, [[1]], *_TEXTS[:8], *_NUMBERS, rng.choice(_TEXTS))
    )
