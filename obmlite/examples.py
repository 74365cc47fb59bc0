"""Example inputs, which a package carries as a supplemental: for trying a model, and for warming it up.

They are one safetensors file; its ``__metadata__`` has the pytree (``obmlite.tree``) and the leaves' dtypes and shapes
(``obmlite.leaves``) as JSON, so that nothing but arrays and plain containers ever comes out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from obmlite import _arrays, dtypes
from obmlite import tree as trees
from obmlite.errors import ArgumentError, CorruptPackageError, context
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
    described = {
        "kinds": [int(kind) for kind in tree.kinds],
        "arities": [int(arity) for arity in tree.arities],
        "key_kinds": [int(kind) for kind in tree.key_kinds],
        "keys": ["" if key is None else trees.key_text(key) for key in tree.keys],
    }
    metadata = {
        _TREE: json.dumps(described, ensure_ascii=False),
        _LEAVES: json.dumps([[spec.kind.short, list(spec.shape)] for spec in specs]),
    }
    bodies = [np.ascontiguousarray(stored[int(entry.name)]).tobytes() for entry in layout]
    return safetensors.encode_header(layout, metadata) + b"".join(bodies)


def unpack(data: bytes) -> dict[str, list[dict[str, Any]]]:
    """Undoes :func:`pack`; leaves are numpy arrays, containers of registered classes their plain views.

    Raises:
      CorruptPackageError: the bytes are no examples.
    """
    size = safetensors.header_size(data[:8], len(data))
    header = safetensors.parse_header(data[:size], len(data))
    try:
        described, rows = (json.loads(header.metadata[key]) for key in (_TREE, _LEAVES))
        columns = [described[key] for key in ("kinds", "arities", "key_kinds", "keys")]
        if len({*map(len, columns)}) != 1:
            raise ValueError("columns of different lengths")
        kinds, arities, key_kinds, texts = columns
        key_kinds = [trees.KeyKind(kind) for kind in key_kinds]
        keys = [trees.key_from_text(kind, text) for kind, text in zip(key_kinds, texts, strict=True)]
        tree = trees.Tree([trees.Kind(kind) for kind in kinds], list(map(int, arities)), key_kinds, keys)
        tree.check()
        leaves = []
        for n, (dtype, shape) in enumerate(rows):
            kind, entry = dtypes.parse(dtype), header.entries[str(n)]
            if (entry.dtype, tuple(entry.shape)) != (kind.storage, kind.storage_shape(tuple(shape))):
                raise ValueError(f"leaf {n} is stored otherwise")
            raw = np.frombuffer(data, np.uint8, entry.end - entry.start, size + entry.start)
            held = raw.view(kind.storage_numpy).reshape(kind.storage_shape(tuple(shape)))
            leaf = kind.from_storage(held, tuple(shape))
            leaves.append(jax.random.wrap_key_data(leaf, impl=kind.impl) if kind.is_key else leaf)
        value = tree.unflatten(leaves)
        if type(value) is not dict or not all(
            type(calls) is list and all(type(call) is dict for call in calls) for calls in value.values()
        ):
            raise ValueError("no mapping of lists of arguments")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptPackageError("The example inputs are malformed.", object=NAME, found=str(error)[:300]) from error
    return value


def examples_of(supplementals: Mapping[str, Supplemental]) -> dict[str, list[dict[str, Any]]]:
    """The examples among a model's supplementals: pipeline → for each example its arguments by name.

    Raises:
      CorruptPackageError: they are not those that were saved.
    """
    if NAME not in supplementals or supplementals[NAME].mime_type != MIME_TYPE:
        return {}
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
    return Supplemental.from_bytes(pack(found), mime_type=MIME_TYPE, version=VERSION)


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
