"""A pytree → a safetensors file."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from obmlite import _arrays, dtypes
from obmlite import tree as trees
from obmlite._writing import LEAVES_KEY
from obmlite.errors import ArgumentError, LeafError, RestoreError, context
from obmlite.interop.safejax import _description, _names, _variables
from obmlite.interop.safejax._description import TREE_KEY, Description
from obmlite.interop.safejax._places import filesystem, local_path
from obmlite.io import digest, safetensors
from obmlite.io.replacing import replacing
from obmlite.io.staging import write_all
from obmlite.plan import boxes
from obmlite.specs import TensorSpec

if TYPE_CHECKING:
    import fsspec

FROZEN_DICT = "flax.core.FrozenDict"

_RESERVED = "obmlite."


def serialize(
    params: Any,
    metadata: Mapping[str, str] | None = None,
    include_objax_variables: bool = False,
    filename: str | os.PathLike[str] | None = None,
    fs: fsspec.AbstractFileSystem | None = None,
) -> bytes | str | os.PathLike[str]:
    """Parameters → the bytes of a safetensors file, or a file.

    Args:
      params: any pytree of arrays and Python numbers: dicts, ``FrozenDict``, Haiku's dicts, an Objax
        ``VarCollection``, and also lists, tuples, namedtuples, None and registered classes.
      metadata: text by key, kept in the file's header; :func:`deserialize` then returns it too.
      include_objax_variables: whether the tensors' names tell the types of Objax' variables, as in
        ``(Linear).w::TrainVar``; it takes them to make a ``VarCollection`` again.
      filename: the file to write; it holds the old content or the new at every moment. None returns bytes.
      fs: the fsspec filesystem that the file is on; None for a path of this machine.

    Returns:
      ``bytes``; with a filename, the ``pathlib.Path`` that was written, or for a remote ``fs`` the filename as given.

    Raises:
      LeafError: a leaf, key or name cannot be kept; nothing is written then.
      ArgumentError: metadata are no text by key, or ``fs`` is no fsspec filesystem.
      ImportError: ``fs`` was given, and fsspec is not installed.
      OSError: the file cannot be written.
    """
    content = _Content(params, _checked(metadata), include_objax_variables)
    if filename is None:
        return b"".join([content.header, *content.data()])
    if not isinstance(filename, (str, os.PathLike)):
        raise ArgumentError("A filename must be a path.", field="filename", found=type(filename).__name__)
    with context(package=os.fspath(filename)):
        path = local_path(filename, fs)
        if path is None:
            # All bytes at once, since other ways leave a part of a file where something fails on the way.
            filesystem(fs).pipe_file(os.fspath(filename), b"".join([content.header, *content.data()]))
            return filename
        with replacing(path) as descriptor:
            write_all(descriptor, content.header)
            for tensor in content.data():
                write_all(descriptor, tensor)
    return pathlib.Path(path)


def _checked(metadata: Mapping[str, str] | None) -> dict[str, str]:
    found = dict(metadata or {})
    for key, value in found.items():
        if type(key) is not str or type(value) is not str:
            raise ArgumentError(
                "Metadata must be text by key.",
                field="metadata",
                expected="str and str",
                found=f"{key!r:.80}: {value!r:.80}",
                fix="json.dumps what is no text",
            )
        if key.startswith(_RESERVED):
            raise ArgumentError(
                "Keys of metadata that begin with 'obmlite.' are used by obmlite itself.", field="metadata", found=key
            )
    return found


class _Content:
    """What a file is to hold. Everything is checked when it is made; arrays are fetched from devices when written."""

    def __init__(self, params: Any, metadata: dict[str, str], typed: bool) -> None:
        leaves, tree = trees.flatten(_variables.collected(params))
        kinds = _variables.types(leaves, tree)
        leaves = _variables.values(leaves)
        is_collection = _variables.is_collection(tree)
        names = [str(tree.keys[c]) for c in tree.children(0)] if is_collection else list(tree.names)
        if typed:
            names = [
                f"{name}{_names.SEPARATOR}{kind}" if kind else name for name, kind in zip(names, kinds, strict=True)
            ]
        specs = []
        for name, leaf in zip(names, leaves, strict=True):
            with context(leaf=name):
                specs.append(_spec(leaf))
        description = Description(
            tree,
            tuple(names),
            frozenset(n for n, leaf in enumerate(leaves) if _is_number(leaf)),
            frozenset(n for n, spec in enumerate(specs) if spec.weak_type),
        )
        # Of a collection without types safejax, and who reads the file, expects values by name and nothing more.
        if typed if is_collection else not _tells_all(description):
            metadata = {**metadata, TREE_KEY: _description.encode(description)}
        self._entries = safetensors.layout(
            [(name, s.kind.storage, s.kind.storage_shape(_shape(s))) for name, s in zip(names, specs, strict=True)]
        )
        self._leaves = dict(zip(names, zip(leaves, specs, strict=True), strict=True))
        logical = {name: _logical(spec) for name, (_, spec) in sorted(self._leaves.items()) if not _is_plain(spec)}
        if logical:
            metadata[LEAVES_KEY] = json.dumps(logical, ensure_ascii=False, separators=(",", ":"))
        self.header = safetensors.encode_header(self._entries, metadata)

    def data(self) -> Iterator[memoryview]:
        """The tensors' bytes, in the file's order."""
        for entry in self._entries:
            leaf, spec = self._leaves[entry.name]
            with context(leaf=entry.name):
                held = _arrays.read_box(leaf, spec, boxes.whole(_shape(spec)))
                yield digest.flat(spec.kind.to_storage(held))


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, (bool, int, float, complex)) and not isinstance(leaf, np.generic)


def _spec(leaf: Any) -> TensorSpec:
    if _is_number(leaf):  # as wide as Python's, whatever JAX would make of it
        if type(leaf) not in (bool, int, float, complex):
            raise LeafError("A leaf is of a class derived from a number's.", found=type(leaf).__qualname__)
        if type(leaf) is int and not -(1 << 63) <= leaf < 1 << 63:
            raise LeafError("An integer is too large.", expected="at most 63 bits", found=f"{leaf.bit_length()} bits")
        return TensorSpec((), dtypes.of(np.result_type(type(leaf))))
    spec = _arrays.check_leaf(leaf)
    if not spec.kind.storage:
        raise LeafError("A leaf has no bits that a file could hold.", found=str(spec), fix="leave it out")
    return spec


def _shape(spec: TensorSpec) -> tuple[int, ...]:
    return spec.shape  # type: ignore[return-value]


def _is_plain(spec: TensorSpec) -> bool:
    """Whether a tensor's entry in the header says it all."""
    kind = spec.kind
    return not kind.is_key and kind.storage_numpy == kind.numpy and kind.storage_shape(_shape(spec)) == spec.shape


def _logical(spec: TensorSpec) -> dict[str, Any]:
    return {"dtype": spec.kind.short if spec.kind.is_key else spec.kind.name, "shape": list(_shape(spec))}


def _tells_all(description: Description) -> bool:
    """Whether the names alone, read as safejax reads them, give the same pytree."""
    if description.numbers or description.weak or _names.any_typed(description.names):
        return False
    with contextlib.suppress(RestoreError):
        _, found = trees.flatten(_names.unflatten(dict.fromkeys(description.names, 0)))
        return _columns(found) == _columns(description.tree)
    return False


def _columns(tree: trees.Tree) -> Sequence[Any]:
    # A FrozenDict is read as a dict in any case, unless it is asked for.
    frozen = {node for node, name in tree.classes.items() if name == FROZEN_DICT}
    kinds = [trees.Kind.DICT if node in frozen else kind for node, kind in enumerate(tree.kinds)]
    return kinds, list(tree.arities), list(tree.key_kinds), list(tree.keys), tree.classes.keys() - frozen
