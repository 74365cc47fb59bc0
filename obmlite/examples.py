"""Example inputs, which a package carries as a supplemental: for trying a model, and for warming it up.

They are one safetensors file; its ``__metadata__`` has the pytree (``obmlite.tree``) and the leaves' dtypes and shapes
(``obmlite.leaves``) as JSON, so that nothing but arrays and plain containers ever comes out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from obmlite import _arrays, dtypes
from obmlite import tree as trees
from obmlite.errors import ArgumentError, CorruptPackageError, ExportError, context
from obmlite.io import safetensors
from obmlite.supplemental import Supplemental

if TYPE_CHECKING:
    from obmlite.model import Model
    from obmlite.signature import Signature

__all__ = ["MIME_TYPE", "NAME", "examples_of", "pack", "unpack", "with_examples"]

NAME = "examples"
"""The supplemental's name."""

MIME_TYPE = "application/x.obmlite-examples+safetensors"
VERSION = "1"

MAX_BYTES = 1 << 30
"""Bytes of all example inputs of a model, which are read whole."""

_MAX_ELEMENTS = 1 << 58  # of 16 bytes, numpy's limit

_TREE, _LEAVES = "obmlite.tree", "obmlite.leaves"

Examples = Mapping[str, Sequence[Mapping[str, Any]]]
"""Pipeline → for each example its arguments by name."""


def pack(examples: Examples) -> bytes:
    """Examples as the bytes of a safetensors file.

    Raises:
      LeafError: a leaf is no array or number.
    """
    leaves, tree = trees.flatten({name: list(map(dict, calls)) for name, calls in examples.items()})
    specs = []
    for name, leaf in zip(tree.names, leaves, strict=True):
        with context(leaf=name):
            specs.append(_arrays.check_leaf(leaf))
    stored = [spec.kind.to_storage(_arrays.to_host(leaf, spec)) for leaf, spec in zip(leaves, specs, strict=True)]
    layout = safetensors.layout(
        [
            (str(n), spec.kind.storage, spec.kind.storage_shape(spec.shape))  # type: ignore[arg-type]
            for n, spec in enumerate(specs)
        ]
    )
    metadata = {
        _TREE: json.dumps(trees.to_columns(tree), ensure_ascii=False),
        _LEAVES: json.dumps([[spec.kind.short, list(spec.shape)] for spec in specs]),
    }
    bodies = [np.ascontiguousarray(stored[int(entry.name)]).tobytes() for entry in layout]
    return safetensors.encode_header(layout, metadata) + b"".join(bodies)


def unpack(data: bytes) -> dict[str, list[dict[str, Any]]]:
    """Undoes :func:`pack`; leaves are numpy arrays, containers of registered classes their plain views.

    Raises:
      CorruptPackageError: the bytes are no examples.
    """
    with context(object=NAME):
        size = safetensors.header_size(data[:8], len(data))
        header = safetensors.parse_header(data[:size], len(data))
        tree = trees.from_columns(_described(header, _TREE))
        rows = _described(header, _LEAVES)
        if not isinstance(rows, list) or len(rows) != tree.num_leaves or len(rows) != len(header.entries):
            raise _malformed(_LEAVES, f"a list of {tree.num_leaves} leaves and {len(header.entries)} tensors", rows)
        leaves = [_leaf(data, header, n, row) for n, row in enumerate(rows)]
        value = tree.unflatten(leaves)
        if type(value) is not dict or not all(
            type(calls) is list and all(type(call) is dict for call in calls) for calls in value.values()
        ):
            raise _malformed(_TREE, "a mapping of lists of arguments", value)
    return value


def _described(header: safetensors.Header, key: str) -> Any:
    try:
        return json.loads(header.metadata.get(key, ""))
    except (ValueError, RecursionError) as error:
        raise _malformed(key, "JSON", header.metadata.get(key)) from error


def _leaf(data: bytes, header: safetensors.Header, number: int, row: Any) -> Any:
    """One leaf, if what is described of it is what is stored."""
    good = type(row) is list and len(row) == 2 and type(row[0]) is str and type(row[1]) is list
    if not good or len(row[1]) > safetensors.MAX_RANK or any(type(size) is not int or size < 0 for size in row[1]):
        raise _malformed(_LEAVES, "a dtype and a shape", row)
    if math.prod(size or 1 for size in row[1]) > _MAX_ELEMENTS:  # a 0 does not hide what stands beside it
        raise _malformed(_LEAVES, "an array that can be addressed", row)
    try:
        kind = dtypes.parse(row[0])
    except ExportError as error:
        raise _malformed(_LEAVES, "a dtype", row) from error
    shape, entry = tuple(row[1]), header.entries.get(str(number))
    found = None if entry is None else (entry.dtype, entry.shape)
    if entry is None or not kind.storage or found != (kind.storage, kind.storage_shape(shape)):
        raise _malformed(_LEAVES, f"what is stored as {number}, {found}", row)
    raw = np.frombuffer(data, np.uint8, entry.end - entry.start, header.size + entry.start)
    leaf = kind.from_storage(raw.view(kind.storage_numpy).reshape(entry.shape), shape)
    return jax.random.wrap_key_data(leaf, impl=kind.impl) if kind.is_key else leaf


def _malformed(key: str, expected: str, found: Any) -> CorruptPackageError:
    return CorruptPackageError(
        "The example inputs are malformed.",
        object=NAME,
        field=f"__metadata__.{key}",
        expected=expected,
        found=f"{found!r:.80}",
    )


def examples_of(supplementals: Mapping[str, Supplemental]) -> dict[str, list[dict[str, Any]]]:
    """The examples among a model's supplementals: pipeline → for each example its arguments by name.

    Raises:
      CorruptPackageError: they are not those that were saved.
    """
    if NAME not in supplementals or supplementals[NAME].mime_type != MIME_TYPE:
        return {}
    if supplementals[NAME].nbytes > MAX_BYTES:
        raise CorruptPackageError(
            "The example inputs are too large.",
            object=NAME,
            field="Files.length",
            expected=f"at most {MAX_BYTES} bytes",
            found=supplementals[NAME].nbytes,
        )
    return unpack(supplementals[NAME].read())


def with_examples(model: Model, inputs: Sequence[Any], pipeline: str | None) -> Supplemental:
    """The supplemental of a model's examples, with more of them.

    Args:
      model: the model.
      inputs: for each example its arguments: a tuple of positional ones, a dict of them by name, or one argument.
      pipeline: that they are for; the default one if None.

    Raises:
      ArgumentError: an example does not match the pipeline's signature, or another supplemental has the name.
    """
    if NAME in model.supplementals and model.supplementals[NAME].mime_type != MIME_TYPE:
        raise ArgumentError(
            "The name of the example inputs is taken.",
            object=NAME,
            expected=f"a supplemental of type {MIME_TYPE}",
            found=model.supplementals[NAME].mime_type,
            fix="give that supplemental another name",
        )
    target = model.pipeline if pipeline is None else model.pipelines[pipeline]
    found = examples_of(model.supplementals)
    own = found.setdefault(target.name, [])
    for given in inputs:
        args, kwargs = call_of(given, target.signature)
        with context(object=target.name):
            arguments = target.signature.bind(args, kwargs)
            target.check(arguments)
        own.append(arguments)
    packed = pack(found)
    if len(packed) > MAX_BYTES:
        raise ArgumentError(
            "The example inputs are too large.",
            object=NAME,
            field="inputs",
            expected=f"at most {MAX_BYTES} bytes",
            found=len(packed),
        )
    return Supplemental.from_bytes(packed, mime_type=MIME_TYPE, version=VERSION)


def call_of(given: Any, signature: Signature | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of a call.

    Args:
      given: a tuple of positional arguments, a dict of them by name, or one argument.
      signature: of what is called; a dict with other keys than its arguments' names is then the one argument. Without
        it every dict is of arguments by name.
    """
    if type(given) is tuple:
        return given, {}
    if type(given) is dict:
        if signature is None:
            return (), given
        if set(given) == set(signature.arguments):
            return signature.spread(given)
    return (given,), {}
