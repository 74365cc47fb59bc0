"""Files that are read for themselves: examples, an index, Flax' msgpack, a described pytree; and texts."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import random
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import msgpack
import numpy as np
import safetensors.numpy

from obmlite import dims, dtypes, examples, foreign, specs
from obmlite import tree as trees
from obmlite.errors import ArgumentError, CorruptPackageError, ExportError, LeafError, MissingFileError
from obmlite.foreign import flax_msgpack
from obmlite.interop.safejax import _description
from tests.adversarial import mutations
from tests.adversarial.kinds import Kind
from tests.adversarial.memory import Finding

# --- example inputs


@functools.cache
def good_examples() -> bytes:
    arguments = {
        "x": np.arange(6, dtype="f4").reshape(2, 3),
        "n": {"a": np.int8([1, 2]), "l": [np.zeros((), "f2"), ml_dtypes.bfloat16(2)], "t": (1, 2.5)},
        "k": jax.random.key(1),
        "p": np.arange(5).astype(ml_dtypes.int4),
    }
    return examples.pack({"main": [arguments, {**arguments, "x": np.ones((1, 3), "f4")}], "other": []})


def _make_examples(rng: random.Random) -> bytes:
    data = good_examples()
    if rng.random() < 0.3:
        return mutations.changed(rng, data, (b"[", b"{", b"1e999", b"null", b"key<rbg>"))
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    inner = rng.choice(("obmlite.tree", "obmlite.leaves"))
    header["__metadata__"][inner] = mutations.changed_json(rng, json.loads(header["__metadata__"][inner]))
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data[size:]


def _read_examples(data: bytes) -> str:
    for calls in examples.unpack(data).values():
        for call in calls:
            for leaf in jax.tree.leaves(call):
                np.asarray(jax.random.key_data(leaf) if isinstance(leaf, jax.Array) else leaf).tobytes()
    return "same" if data == good_examples() else "other"


EXAMPLES = Kind("examples", "example inputs: their file, and the JSON in it", _make_examples, _read_examples)


# --- an index of files


@functools.cache
def _shards() -> pathlib.Path:
    """A directory of three files; the index is written anew for each input."""
    place = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    folder = pathlib.Path(place.name)
    _KEEP.append(place)
    rng = np.random.default_rng(0)
    for n in range(2):
        safetensors.numpy.save_file(
            {f"layer.{n}.{w}": rng.normal(size=(n + 1, 3)).astype("f4") for w in "ab"}, folder / f"m-{n}.safetensors"
        )
    safetensors.numpy.save_file({"outside": np.ones(3, "f4")}, folder / "outside.safetensors")
    return folder


_KEEP: list[Any] = []


@functools.cache
def good_index() -> dict[str, Any]:
    weight_map = {f"layer.{n}.{w}": f"m-{n}.safetensors" for n in range(2) for w in "ab"}
    return {"metadata": {"total_size": 72}, "weight_map": weight_map}


def _make_index(rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return mutations.changed(rng, json.dumps(good_index()).encode(), (b"../", b"outside.safetensors", b"[[", b"{}"))
    return mutations.changed_json(rng, good_index()).encode(errors="surrogatepass")


def _read_index(data: bytes) -> str:
    folder = _shards()
    (folder / "m.safetensors.index.json").write_bytes(data)
    weights = foreign.open_weights(folder / "m.safetensors.index.json")
    weight_map = json.loads(data)["weight_map"]
    right = {}
    for file in set(weight_map.values()):
        right.update(safetensors.numpy.load_file(folder / file))
    found = {name: np.asarray(leaf) for name, leaf in weights.flat.items()}
    if found.keys() != right.keys() or any(not np.array_equal(found[n], right[n]) for n in found):
        raise Finding("wrong data")
    return "same" if weight_map == good_index()["weight_map"] else "other"


INDEX = Kind(
    "index",
    "an index of safetensors files",
    _make_index,
    _read_index,
    # Two names may clash as paths of nested dicts, which is for the caller to solve (names=).
    refusals=(CorruptPackageError, MissingFileError, ArgumentError),
)


# --- Flax' msgpack


@functools.cache
def good_msgpack() -> tuple[bytes, ...]:
    """As ``flax.serialization.msgpack_serialize`` writes it: arrays as an extension of (shape, dtype, bytes)."""

    def array(value: Any) -> msgpack.ExtType:
        value = np.asarray(value)
        return msgpack.ExtType(1, msgpack.packb((value.shape, value.dtype.name, value.tobytes()), use_bin_type=True))

    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(4, 6)).astype("f4"), rng.normal(size=5).astype(ml_dtypes.bfloat16)
    flat = a.reshape(-1)
    chunked = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 4, "1": 6},
        "chunks": {"0": array(flat[:7]), "1": array(flat[7:20]), "2": array(flat[20:])},
    }
    nested = {"0": {"count": 3, "scale": 0.5, "on": True, "none": None}, "1": array(np.int8([[1], [2]]))}
    values = (
        {"params": {"kernel": array(a), "bias": array(b)}, "opt": nested},
        {"big": chunked, "i4": array(rng.integers(-8, 8, 5).astype(ml_dtypes.int4)), "s": array(np.float64(2))},
        {"c": msgpack.ExtType(2, msgpack.packb((1.5, 2.5))), "n": msgpack.ExtType(3, array(np.int32(7)).data)},
    )
    return tuple(msgpack.packb(value, use_bin_type=True, strict_types=True) for value in values)


_WORDS = (
    b"\xc7", b"\xc8", b"\xc9", b"\xc1", b"\x93", b"\x81", b"\xdc\xff\xff", b"\xdd\xff\xff\xff\xff",
    b"\xdf\x7f\xff\xff\xff",
    b"\x91" * 300, b"\x81\xa1a" * 120, b"\xc9\x00\x00\x00\x10\x01", b"float32", b"float8_e4m3fn", b"int4", b"object",
    b"\xa1V", b"\xd6\xff\0\0\0\0", b"\xc6\xff\xff\xff\xff", b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff",
)  # fmt: skip


def _read_msgpack(data: bytes) -> str:
    weights = flax_msgpack.read(data)
    again = flax_msgpack.read(data)
    for leaf, spec in enumerate(weights.specs):
        held = weights.source.tensor(leaf).whole()
        if held.shape != spec.shape or held.dtype != spec.kind.numpy:
            raise Finding("a leaf is not what its spec says")
        if held.tobytes() != again.source.tensor(leaf).whole().tobytes():
            raise Finding("a leaf reads differently each time")
        if held.nbytes > len(data) * 8:
            raise Finding("a leaf is larger than the file")
    return "same" if data in good_msgpack() else "other"


MSGPACK = Kind(
    "msgpack",
    "checkpoints of Flax",
    lambda rng: mutations.changed(rng, rng.choice(good_msgpack()), _WORDS, good_msgpack()),
    _read_msgpack,
    # A leaf may be text, or of a dtype that JAX lacks: the file is msgpack, and holds no weights.
    refusals=(CorruptPackageError, LeafError),
    unnamed=lambda error: isinstance(error, LeafError),
)


# --- a pytree described in a file's metadata


@functools.cache
def good_description() -> str:
    tree = {"a": [0, (1, None)], "b": {("k", 1): 2, ("k", 2): 3}}
    _, structure = trees.flatten(tree)
    return _description.encode(
        _description.Description(structure, ("w", "x", "y", "z"), frozenset({1}), frozenset({2}))
    )


def _make_description(rng: random.Random) -> bytes:
    text = good_description()
    if rng.random() < 0.2:
        return mutations.changed(rng, text.encode(), (b"[", b"1e999", b'"static":{"0":"gA=="}'))
    return mutations.changed_json(rng, json.loads(text)).encode(errors="surrogatepass")


def _read_description(data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError:  # a header holds nothing else
        text = data.decode(errors="replace")
    found = _description.decode(text)
    found.tree.unflatten(range(found.tree.num_leaves))
    if len(found.names) != found.tree.num_leaves:
        raise Finding("leaves without names")
    return "same" if text == good_description() else "other"


DESCRIPTION = Kind("description", "a pytree in a file's __metadata__", _make_description, _read_description)


# --- texts

_TEXTS: tuple[tuple[str, Callable[[str], Any]], ...] = (
    ("2*b^2*s + floordiv(b + s, 2) - max(b, mod(s, 7)) + 12", dims.parse),
    ("b, 28, 2*b + 1, mod(b, 3)", dims.parse_shape),
    ("2*b + s <= max(16, s)", dims.parse_constraint),
    ("~bf16[b, 2*s+1, 28]", specs.spec),
    ("key<threefry2x32>", dtypes.parse),
    ('["a",[1,["b",-2]]]', lambda text: trees.key_from_text(trees.KeyKind.TUPLE, text)),
    ("-9223372036854775807", lambda text: trees.key_from_text(trees.KeyKind.INT, text)),
)
_TOKENS = tuple(
    word.encode()
    for word in ("floordiv(", "mod(", "max(b,", "min(", "^62", "^63", "*b" * 50, "-" * 40, "9" * 25, "(" * 40,
                 "b" * 300, ", ", " <= ", "==", "é", "١", "²", "[[", "]]", "1e9", "true", "key<", "f32[", "~", "\0")
)  # fmt: skip


def _make_text(rng: random.Random) -> bytes:
    number = rng.randrange(len(_TEXTS))
    others = [text.encode() for text, _ in _TEXTS]
    return bytes([number]) + mutations.changed(rng, others[number], _TOKENS, others)


def _read_text(data: bytes) -> str:
    good, parse = _TEXTS[data[0] % len(_TEXTS)]
    text = data[1:].decode(errors="surrogateescape")
    found = parse(text)
    if isinstance(found, dims.Expression) and dims.parse(found.text) != found:
        raise Finding("a canonical text reads as something else")
    return "same" if text == good else "other"


TEXT = Kind(
    "text",
    "dimensions, shapes, constraints, specs, dtypes and keys",
    _make_text,
    _read_text,
    refusals=(ExportError, CorruptPackageError, LeafError),
)

# --- static data and metadata


@functools.cache
def good_static() -> bytes:
    return trees.pack_static({"a": [1, 2.5, None, True, b"x", (1, (2, "é"))], 3: {"n": {"m": []}}, -(2**63): 2**64 - 1})


def _read_static(data: bytes) -> str:
    found = trees.unpack_static(data)
    repr(found)
    return "same" if data == good_static() else "other"


STATIC = Kind(
    "static",
    "static data and metadata",
    lambda rng: mutations.changed(rng, good_static(), _WORDS, (good_static(),)),
    _read_static,
)
