"""What differs between two packages, from their manifests; weights are read only where digests cannot tell."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from obmlite import listing
from obmlite._files import WeightsFiles
from obmlite._tensors import StoredSource
from obmlite.errors import context
from obmlite.io.store import LocalDirectory
from obmlite.loading import open_manifest
from obmlite.schema import records as r
from obmlite.schema.decode import decode
from obmlite.weights import Weights

__all__ = ["diff", "text"]

_KINDS = ("functions", "polymorphic", "weights", "pipelines", "supplementals")

_SLAB = 1 << 24  # bytes of each side of a tensor that are compared at one time


class _Package:
    """A package, opened for comparing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.store = LocalDirectory(path, mmap=False)
        with context(package=self.store.name):
            self.manifest = decode(open_manifest(self.store))
        self.listed = listing.listing(path)

    def weights(self, name: str) -> Weights:
        record = self.manifest.weights[name]
        source = StoredSource(WeightsFiles(self.store, self.manifest.files, record))
        return Weights.from_source(record.tree, record.specs, source, record.metadata)


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str], *, values: bool = False) -> dict[str, Any]:
    """Compares two packages.

    Args:
      a: path of one.
      b: path of the other.
      values: whether to read the tensors that differ, to say by how much. Otherwise weights are read only where they
        are cut into pieces in different ways, so that their digests cannot be compared.

    Returns:
      Plain data, for JSON: ``same``; for each kind of object the names that only one has (``only_a``, ``only_b``) and
      ``changed``: name → what of it is different → [in a, in b]; ``default_pipeline`` and ``metadata`` likewise.
      ``read`` is the number of tensors that were read of each side.

    Raises:
      PackageNotFoundError: there is no package at one of the paths.
      CorruptPackageError: one is not what was saved.
    """
    one, other = _Package(a), _Package(b)
    found: dict[str, Any] = {"a": one.store.name, "b": other.store.name, "read": 0}
    for kind in _KINDS:
        left, right = one.listed[kind], other.listed[kind]
        changed: dict[str, Any] = {}
        for name in (n for n in left if n in right):
            own = _fields(left[name], right[name], skip=("leaves", "files", "nbytes", "digests"))
            if kind == "functions" and "error" not in left[name] and "error" not in right[name]:
                own |= _code(one.manifest, other.manifest, name)
            if kind == "weights" and "error" not in left[name] and "error" not in right[name]:
                leaves, count = _leaves(one, other, name, values)
                own |= {"leaves": leaves} if leaves else {}
                found["read"] += count
            if kind == "supplementals" and "error" not in left[name] and "error" not in right[name]:
                own |= _contents(one.manifest, other.manifest, name)
            if own:
                changed[name] = own
        found[kind] = {
            "only_a": [n for n in left if n not in right],
            "only_b": [n for n in right if n not in left],
            "changed": changed,
        }
    for field in ("default_pipeline", "metadata", "device_assignment"):
        found[field] = _fields({field: one.listed[field]}, {field: other.listed[field]}).get(field)
    found["same"] = not any(any(found[kind].values()) for kind in _KINDS) and not any(
        found[field] for field in ("default_pipeline", "metadata", "device_assignment")
    )
    return found


def _fields(left: Mapping[str, Any], right: Mapping[str, Any], skip: Sequence[str] = ()) -> dict[str, Any]:
    names = [n for n in dict.fromkeys([*left, *right]) if n not in skip]
    return {n: [left.get(n), right.get(n)] for n in names if left.get(n) != right.get(n)}


def _code(one: r.ManifestRecord, other: r.ManifestRecord, name: str) -> dict[str, Any]:
    """Digests of a function's files, where they differ."""
    digests = []
    for manifest in (one, other):
        record = manifest.functions[name]
        modules = (record.primal, *record.vjps)
        digests.append([manifest.files[m.file].digest.hex() for m in modules])
    return {} if digests[0] == digests[1] else {"digests": digests}


def _contents(one: r.ManifestRecord, other: r.ManifestRecord, name: str) -> dict[str, Any]:
    """The paths of a supplemental whose bytes differ."""
    sides: list[dict[str, Any]] = []
    for manifest in (one, other):
        record = manifest.supplementals[name]
        entries = {p: None if f is None else manifest.files[f].digest for p, f in record.entries.items()}
        sides.append(entries or {"": record.inline})
    left, right = sides
    changed = [p for p in dict.fromkeys([*left, *right]) if left.get(p) != right.get(p) or (p in left) != (p in right)]
    return {"contents": changed} if changed else {}


def _leaves(one: _Package, other: _Package, name: str, values: bool) -> tuple[dict[str, Any], int]:
    """The leaves of a weights object that differ, and how many tensors were read."""
    left, right = one.manifest.weights[name], other.manifest.weights[name]
    numbers = {n: i for i, n in enumerate(left.tree.names)}
    others = {n: i for i, n in enumerate(right.tree.names)}
    found: dict[str, Any] = {}
    read = 0
    known: dict[tuple[int, int], tuple[bool, dict[str, Any]]] = {}  # tied leaves are compared once
    for leaf in dict.fromkeys([*numbers, *others]):
        if leaf not in numbers or leaf not in others:
            found[leaf] = {"spec": [_spec(left, numbers.get(leaf)), _spec(right, others.get(leaf))]}
            continue
        i, j = numbers[leaf], others[leaf]
        if (left.specs[i].shape, left.specs[i].kind) != (right.specs[j].shape, right.specs[j].kind):
            found[leaf] = {"spec": [_spec(left, i), _spec(right, j)]}
            continue
        tensors = int(left.leaf_tensor[i]), int(right.leaf_tensor[j])
        if -1 in tensors:
            continue
        if tensors not in known:
            same = _by_digest(left.pieces[tensors[0]], right.pieces[tensors[1]])
            numeric: dict[str, Any] = {}
            if same is None or (values and not same):
                read += 1
                numeric = _by_value(one.weights(name).leaf(i), other.weights(name).leaf(j))
                same = numeric["bytes_equal"]
            known[tensors] = bool(same), numeric
        same, numeric = known[tensors]
        if not same:
            found[leaf] = {"values": {k: v for k, v in numeric.items() if k != "bytes_equal"} or "differ"}
    return found, read


def _spec(record: r.WeightsRecord, leaf: int | None) -> str | None:
    return None if leaf is None else str(record.specs[leaf])


def _by_digest(one: Sequence[r.Piece], other: Sequence[r.Piece]) -> bool | None:
    """Whether a tensor's pieces have the same digests; None where they are other pieces."""
    left, right = ({(p.begin, p.shape): p.digests for p in pieces} for pieces in (one, other))
    return None if left.keys() != right.keys() else left == right


def _by_value(one: Any, other: Any) -> dict[str, Any]:
    """How far two tensors are apart."""
    equal, mismatches, largest = True, 0, 0.0
    for box in _slabs(one.shape, max(1, _SLAB // max(1, one.spec.kind.bits // 8))):
        a, b = (np.asarray(leaf.tensor.read(box)) for leaf in (one, other))
        kind = one.spec.kind
        if np.array_equal(kind.to_storage(a), kind.to_storage(b)):
            continue
        equal = False
        if a.dtype == bool or kind.is_key:
            differ = a != b
            mismatches += int(np.count_nonzero(differ))
            largest = max(largest, 1.0)
            continue
        wide = np.complex128 if np.issubdtype(a.dtype, np.complexfloating) else np.float64
        a, b = a.astype(wide), b.astype(wide)
        with np.errstate(all="ignore"):
            differ = ~((a == b) | (np.isnan(a) & np.isnan(b)))
            apart = np.abs(b - a)[differ]
        mismatches += int(np.count_nonzero(differ))
        if apart.size and not np.isnan(apart).all():
            largest = max(largest, float(np.nanmax(apart)))
    return {"bytes_equal": equal, "mismatches": mismatches, "of": int(np.prod(one.shape)), "max_abs": largest}


def _slabs(shape: Sequence[int], most: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Boxes of whole rows that make up a tensor."""
    if not shape or 0 in shape:
        yield tuple((0, size) for size in shape)
        return
    rows = max(1, most // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], rows):
        yield ((start, min(start + rows, shape[0])), *((0, size) for size in shape[1:]))


def text(found: Mapping[str, Any]) -> Iterator[str]:
    """What :func:`diff` found, as lines for people."""
    if found["same"]:
        yield f"{found['a']} and {found['b']} hold the same"
        return
    yield f"- {found['a']}"
    yield f"+ {found['b']}"
    for kind in _KINDS:
        if not any(found[kind].values()):
            continue
        yield ""
        yield kind
        for sign, names in (("-", found[kind]["only_a"]), ("+", found[kind]["only_b"])):
            yield from (f"{sign} {name}" for name in names)
        for name, fields in found[kind]["changed"].items():
            yield f"  {name}"
            for field, value in fields.items():
                yield from _field(field, value)
    for field in ("default_pipeline", "metadata", "device_assignment"):
        if found[field]:
            yield ""
            yield from _field(field, found[field])


def _field(field: str, value: Any) -> Iterator[str]:
    if field == "leaves":
        for leaf, what in value.items():
            if "spec" in what:
                before, after = what["spec"]
                yield f"    {leaf or '(the leaf)'}: {before or 'not there'} → {after or 'not there'}"
            elif what["values"] == "differ":
                yield f"    {leaf or '(the leaf)'}: other values"
            else:
                by = what["values"]
                yield (
                    f"    {leaf or '(the leaf)'}: {by['mismatches']} of {by['of']} elements differ, by up to "
                    f"{by['max_abs']:.3g}"
                )
    elif field == "contents":
        yield from (f"    {path or 'content'}: other bytes" for path in value)
    elif field == "digests":
        yield "    other code"
    elif field in ("inputs", "outputs"):
        before, after = ({leaf["name"]: leaf for leaf in side or ()} for side in value)
        for name in dict.fromkeys([*before, *after]):
            if before.get(name) != after.get(name):
                yield f"    {field}, {name or '(the leaf)'}: {_leaf(before.get(name))} → {_leaf(after.get(name))}"
    else:
        yield f"    {field}: {value[0]} → {value[1]}"


def _leaf(leaf: Mapping[str, Any] | None) -> str:
    if leaf is None:
        return "not there"
    rest = [f"{k} {v}" for k, v in leaf.items() if k not in ("name", "dtype", "shape")]
    return ", ".join([f"{leaf['dtype']}[{','.join(map(str, leaf['shape']))}]", *rest])
