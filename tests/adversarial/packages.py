"""A small package of everything, in memory, and what its weights must read as."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import random
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors

import obmlite
from obmlite import loading
from obmlite.errors import CorruptPackageError, ObmliteError, RestoreError, UnsupportedFormatError
from obmlite.io import digest
from obmlite.io import safetensors as st
from obmlite.io.commit import MANIFEST
from obmlite.plan import boxes
from obmlite.schema import records as r
from obmlite.schema.decode import decode
from obmlite.weights import Weights
from tests import pieces
from tests.adversarial import manifests, mutations
from tests.adversarial.kinds import Kind
from tests.adversarial.memory import Finding, MemoryStore

TABLE = np.linspace(0, 1, 300, dtype=np.float32)


def _apply(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["w"]) * jnp.asarray(TABLE)[:3] + params["b"].astype(jnp.float32)


def tree() -> dict[str, Any]:
    """Leaves of every kind of storage."""
    rng = np.random.default_rng(7)
    w = rng.normal(size=(4, 3)).astype("f4")
    return {
        "w": w,
        "b": rng.normal(size=3).astype(ml_dtypes.bfloat16),
        "tied": w,
        "odd": rng.integers(-8, 8, (3, 5)).astype(ml_dtypes.int4),
        "list": [rng.integers(0, 255, (7, 2), "u1"), np.bool_([True, False])],
        "key": jax.random.key(3),
        "c": np.array(1 + 2j, "c16"),
        "empty": np.zeros((0, 3), "f4"),
        "none": np.zeros((2,), jax.dtypes.float0),
    }


def _contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@functools.cache
def whole() -> dict[str, bytes]:
    """Files of a package with functions, a derivative, captures, pipelines and supplementals."""
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        (folder / "attached").mkdir()
        (folder / "attached" / "a.txt").write_bytes(b"attached" * 1000)
        values = tree()
        wide = {"c": values.pop("c")}  # no argument of a function, unless 64 bits are enabled
        model = obmlite.Model(
            {
                "apply": obmlite.export(_apply, values, obmlite.spec("f32[b,4]"), vjp_order=1),
                "params": obmlite.Weights(values),
                "wide": obmlite.Weights(wide),
            },
            pipelines={"main": obmlite.Pipeline(function="apply", weights={"params": "params"})},
            supplementals={
                "attached": obmlite.Supplemental.from_directory(folder / "attached"),
                "file": obmlite.Supplemental.from_bytes(bytes(range(256)) * 40),
                "note": obmlite.Supplemental.from_bytes(b"short"),
            },
            metadata={"license": "none"},
        )
        model.save(folder / "m.obm")
        return _contents(folder / "m.obm")


@functools.cache
def in_pieces() -> dict[str, bytes]:
    """Files of a package whose tensors lie in pieces."""
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place) / "m.obm"
        value = tree()
        del value["none"], value["tied"], value["empty"], value["key"], value["odd"]
        value["odd"] = np.random.default_rng(1).integers(-8, 8, (4, 6)).astype(ml_dtypes.int4)
        pieces.save(value, folder)
        return _contents(folder)


def packages() -> tuple[dict[str, bytes], ...]:
    return whole(), in_pieces()


@functools.cache
def record_of(package: int) -> r.ManifestRecord:
    return decode(packages()[package][MANIFEST])


def expected(contents: Mapping[str, bytes], record: r.WeightsRecord) -> Iterator[bytes | None]:
    """What each leaf must read as, put together piece by piece from what the safetensors package reads."""
    files = {p.file for own in record.pieces for p in own}
    read = {file: dict(safetensors.deserialize(contents[file])) for file in files}
    made: dict[int, bytes] = {}
    for leaf, tensor in enumerate(record.leaf_tensor.tolist()):
        if tensor < 0:
            yield None
            continue
        spec = record.specs[leaf]
        if tensor not in made:
            kind = spec.kind
            tail = kind.key_data_shape if kind.is_key else ()
            target = np.zeros((*spec.shape, *tail), kind.storage_numpy if kind.is_key else kind.numpy)  # type: ignore[arg-type]
            filled = np.zeros(spec.shape, bool)  # type: ignore[arg-type]
            for piece in record.pieces[tensor]:
                raw = np.frombuffer(read[piece.file][piece.name]["data"], np.uint8)
                stored = raw.view(kind.storage_numpy).reshape(kind.storage_shape(piece.shape))
                place = boxes.slices(boxes.of_piece(piece.begin, piece.shape))
                if filled[place].any():
                    raise Finding("two pieces overlap")
                filled[place] = True
                target[place] = stored if kind.is_key else kind.from_storage(stored, piece.shape)
            if not filled.all():
                raise Finding("pieces leave a hole")
            made[tensor] = target.tobytes()
        yield made[tensor]


def check_weights(contents: Mapping[str, bytes], manifest: r.ManifestRecord) -> None:
    """Reads every leaf, mapped and not, and a part of each."""
    for mapped in (True, False):
        model = loading.open_model(MemoryStore(contents, mapped=mapped), manifest)
        for name in manifest.weights:
            with _or_refused():
                check_leaves(model.weights[name], contents, manifest.weights[name])


def check_leaves(weights: Weights, contents: Mapping[str, bytes], record: r.WeightsRecord) -> None:
    weights.source.open()
    for leaf, right in enumerate(expected(contents, record)):
        lazy, spec = weights.leaf(leaf), record.specs[leaf]
        if (lazy.shape, lazy.dtype) != (spec.shape, spec.dtype):
            raise Finding("a leaf is not what its spec says")
        tensor = weights.source.tensor(leaf)
        if right is None:
            continue
        read = tensor.whole()
        if read.shape[: len(spec.shape)] != spec.shape or read.tobytes() != right:
            raise Finding("wrong data")
        if spec.shape and not spec.kind.is_key:
            part = tensor.part(slice(0, 1))
            if part.tobytes() != read[:1].tobytes():
                raise Finding("wrong data in a part")


@contextlib.contextmanager
def _or_refused() -> Iterator[None]:
    """Refusals are counted where the whole input is: an object that is refused leaves the others in order."""
    try:
        yield
    except (CorruptPackageError, UnsupportedFormatError, RestoreError) as error:
        if not error.field:
            raise Finding("an error names no field") from error
        _REFUSED.append(error)


_REFUSED: list[ObmliteError] = []


def check_package(contents: Mapping[str, bytes], manifest: r.ManifestRecord) -> None:
    """Uses everything of a package but what runs code: functions are described, and not run."""
    _REFUSED.clear()
    check_weights(contents, manifest)
    model = loading.open_model(MemoryStore(contents), manifest)
    for group in (model.functions, model.polymorphic, model.pipelines):
        for name in group:
            with _or_refused():
                str(group[name].signature), repr(group[name])
    for name in model.supplementals:
        with _or_refused():
            attached = model.supplementals[name]
            for path in attached.files:
                attached.read(path)
    for file in manifest.files.values():
        if file.kind is r.FileKind.FUNCTION:
            with _or_refused():
                loading.read_file(MemoryStore(contents), file)
    if _REFUSED:
        raise _REFUSED[0]


# --- forged manifests over files that are as they were


def _make_package(rng: random.Random) -> bytes:
    package = rng.randrange(2)
    manifest = packages()[package][MANIFEST]
    forge = manifests.restructured if rng.random() < 0.1 else manifests.forged
    return bytes([package]) + forge(rng, manifest)


def _read_package(data: bytes) -> str:
    contents = packages()[data[0] % 2]
    check_package(contents, decode(data[1:]))
    return "same" if data[1:] == contents[MANIFEST] else "other"


PACKAGE = Kind(
    "package",
    "a manifest, its digest made again, over weights and attachments that are as they were",
    _make_package,
    _read_package,
    refusals=(CorruptPackageError, UnsupportedFormatError, RestoreError),
)


# --- weights files whose header was changed, in a package whose digests were made again


def weights_files() -> list[tuple[int, str]]:
    return [(n, p) for n in range(2) for p, f in record_of(n).files.items() if f.kind is r.FileKind.WEIGHTS]


def changed_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with its header changed, as JSON or as bytes; sometimes its data, too."""
    size = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        return mutations.changed(rng, data[:size], (b'"F32"', b'"F4"', b"[0,0]", b'"__metadata__":{}')) + data[size:]
    text = mutations.changed_json(rng, json.loads(data[8:size]))
    header = text.encode(errors="surrogatepass")
    header += b" " * rng.choice((0, 0, -len(header) % 8, 100))
    body = data[size:]
    if rng.random() < 0.1:
        body = body[: rng.randrange(len(body) + 1)] if rng.random() < 0.5 else body + bytes(rng.choice((1, 4, 64)))
    return len(header).to_bytes(8, "little") + header + body


def _make_weights(rng: random.Random) -> bytes:
    number = rng.randrange(len(weights_files()))
    package, path = weights_files()[number]
    return bytes([number]) + changed_header(rng, packages()[package][path])


def _read_weights(data: bytes) -> str:
    package, path = weights_files()[data[0] % len(weights_files())]
    file, manifest = data[1:], record_of(package)
    header = file[: 8 + min(int.from_bytes(file[:8], "little"), len(file))]
    forged = dataclasses.replace(manifest.files[path], length=len(file), digest=digest.sha256(header))
    contents = {**packages()[package], path: file}
    changed = dataclasses.replace(manifest, files={**manifest.files, path: forged})
    _REFUSED.clear()
    check_weights(contents, changed)
    if _REFUSED:
        raise _REFUSED[0]
    return "same" if file == packages()[package][path] else "other"


WEIGHTS = Kind(
    "weights",
    "headers of a package's weights files, the digests made again",
    _make_weights,
    _read_weights,
)


# --- the same files for everyone: what the safetensors package says of them


def _make_header(rng: random.Random) -> bytes:
    package, path = rng.choice(weights_files())
    return changed_header(rng, packages()[package][path])


def tensors(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """A file's tensors, read as the library reads them."""
    header = st.parse_header(data[: st.header_size(data[:8], len(data))], len(data))
    return {
        name: (e.dtype, e.shape, data[header.size + e.start : header.size + e.end])
        for name, e in header.entries.items()
    }


def _read_header(data: bytes) -> str:
    own = tensors(data)
    try:
        theirs = {n: (e["dtype"], tuple(e["shape"]), bytes(e["data"])) for n, e in safetensors.deserialize(data)}
    except safetensors.SafetensorError as error:
        raise Finding("accepted what the safetensors package refuses") from error
    if own != theirs:
        raise Finding("wrong data")
    return "same" if data in {packages()[n][p] for n, p in weights_files()} else "other"


HEADER = Kind(
    "header", "headers of safetensors files, compared with the safetensors package", _make_header, _read_header
)


# --- any file of a package, its digest left as it was


def _make_content(rng: random.Random) -> bytes:
    paths = sorted(record_of(0).files)
    number = rng.randrange(len(paths))
    return bytes([number]) + mutations.changed(rng, whole()[paths[number]])


def _read_content(data: bytes) -> str:
    path = sorted(record_of(0).files)[data[0] % len(record_of(0).files)]
    contents = {**whole(), path: data[1:]}
    _REFUSED.clear()
    check_digests(contents, record_of(0), path)
    if _REFUSED:
        raise _REFUSED[0]
    if data[1:] != whole()[path]:
        raise Finding("accepted what was changed")
    return "same"


def check_digests(contents: Mapping[str, bytes], manifest: r.ManifestRecord, path: str) -> None:
    """Reads a file in the way that compares all of it with its digests."""
    file = manifest.files[path]
    store = MemoryStore(contents)
    if file.kind is not r.FileKind.WEIGHTS:
        loading.read_file(store, file)
        return
    model = loading.open_model(store, manifest, verify="lazy")
    for name, record in manifest.weights.items():
        for leaf, tensor in enumerate(record.leaf_tensor.tolist()):
            if tensor >= 0 and any(p.file == path for p in record.pieces[tensor]):
                model.weights[name].source.tensor(leaf).whole()


CONTENT = Kind(
    "content", "any bytes of a package's data files, their digests left as they were", _make_content, _read_content
)
