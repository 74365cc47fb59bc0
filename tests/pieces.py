"""Packages whose tensors lie in pieces, as several processes would save them, made by this one."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
from typing import Any

import numpy as np

from obmlite import Model, Weights
from obmlite.io import digest, safetensors
from obmlite.plan import boxes
from obmlite.schema import records as r
from obmlite.schema.decode import decode
from obmlite.schema.encode import encode


def save(value: Any, path: str | os.PathLike[str]) -> None:
    """Saves a pytree as the weights ``w``: each tensor cut once along each dimension, the pieces in two files."""
    weights = Weights(value)
    Model({"w": weights}).save(path)
    folder = pathlib.Path(path)
    manifest = decode((folder / "manifest.obm").read_bytes())
    record = manifest.weights["w"]
    contents: list[dict[str, Any]] = [{}, {}]
    placed = []
    count = itertools.count()
    for leaf in record.tensor_leaf.tolist():
        spec = record.specs[leaf]
        ranges = [[(0, n)] if n < 2 else [(0, n // 2 or 1), (n // 2 or 1, n)] for n in spec.shape]
        held = np.asarray(weights.leaf(leaf))
        own = []
        for box in itertools.product(*ranges):
            number = next(count)
            name = f"{record.tree.names[leaf]}@{number}"
            stored = spec.kind.to_storage(held[(*boxes.slices(box), ...)])
            contents[number % 2][name] = (spec.kind.storage, stored)
            own.append((number % 2, name, box, digest.chunk_digests(stored)))
        placed.append(own)
    for old in manifest.files:
        (folder / old).unlink()
    files = {}
    for number, content in enumerate(contents):
        shapes = {name: (kind, stored.shape) for name, (kind, stored) in content.items()}
        entries = safetensors.layout([(name, kind, shape) for name, (kind, shape) in shapes.items()])
        header = safetensors.encode_header(entries, {})
        data = header + b"".join(content[entry.name][1].tobytes() for entry in entries)
        file = r.FileRecord(f"weights/w-{number}.safetensors", len(data), r.FileKind.WEIGHTS, digest.sha256(header))
        (folder / file.path).write_bytes(data)
        files[file.path] = file
    pieces = tuple(
        tuple(
            r.Piece(f"weights/w-{n}.safetensors", name, tuple(a for a, _ in box), boxes.shape_of(box), digests)
            for n, name, box, digests in own
        )
        for own in placed
    )
    changed = dataclasses.replace(manifest, files=files, weights={"w": dataclasses.replace(record, pieces=pieces)})
    (folder / "manifest.obm").write_bytes(encode(changed))
