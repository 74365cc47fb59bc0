"""A safetensors file → a pytree."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from obmlite import _arrays, dtypes
from obmlite._placing import Placer
from obmlite._writing import LEAVES_KEY
from obmlite.errors import CorruptPackageError, ExportError, RestoreError, context
from obmlite.interop.safejax import _description, _names, _variables
from obmlite.interop.safejax._description import TREE_KEY, Description
from obmlite.interop.safejax._places import File, opened
from obmlite.interop.safejax._save import FROZEN_DICT
from obmlite.specs import TensorSpec

if TYPE_CHECKING:
    import fsspec

_OWN = (TREE_KEY, LEAVES_KEY)
_PLAIN = {
    k.storage: k for k in dtypes.ALL if k.storage and not k.is_packed and k.storage_numpy == k.numpy and not k.tail
}


def deserialize(
    path_or_buf: str | os.PathLike[str] | bytes,
    fs: fsspec.AbstractFileSystem | None = None,
    freeze_dict: bool = False,
    requires_unflattening: bool = True,
    to_var_collection: bool = False,
) -> Any:
    """The parameters in a safetensors file, as ``jax.Array`` on the default device.

    On CPU arrays use a local file in place where they can: it must be replaced, and not written into, while they live.

    Args:
      path_or_buf: a file's path, or its bytes.
      fs: the fsspec filesystem that the file is on; None for a path of this machine.
      freeze_dict: whether to return Flax' ``FrozenDict``, which is otherwise a dict.
      requires_unflattening: whether to return the containers that were serialized: of a file that safejax wrote, and
        of a ``VarCollection``, nested dicts by the dots in names. If not, a dict of names and values.
      to_var_collection: whether to return Objax' ``VarCollection``. Where names don't tell the variables' types, that
        gives a warning and a dict of names and values, which may be assigned to a module's variables.

    Returns:
      The parameters; or, where the file has metadata, a tuple of them and the metadata, as text by key.

    Raises:
      CorruptPackageError: the file breaks a rule of its format.
      RestoreError: names don't make nested dicts, what is not a mapping is to be frozen, or a tensor is of a dtype
        that JAX would narrow (64 bits, without ``jax_enable_x64``) or does not have.
      ArgumentError: the path or ``fs`` is something else.
      ImportError: ``fs``, ``freeze_dict`` or ``to_var_collection`` need what is not installed.
      OSError: the file cannot be read.
    """
    return load(path_or_buf, fs, freeze_dict, requires_unflattening, to_var_collection)


def load(
    path_or_buf: str | os.PathLike[str] | bytes,
    fs: Any,
    freeze_dict: bool,
    requires_unflattening: bool,
    to_var_collection: bool,
) -> Any:
    """What every ``deserialize`` does; warnings name their caller."""
    content = read(path_or_buf, fs)
    with _naming(path_or_buf):
        if to_var_collection:
            params = _collection(content)
        elif requires_unflattening:
            params = _unflattened(content, freeze_dict)
        else:
            params = content.values
        if freeze_dict and not to_var_collection:
            params = _freeze(params)
    return (params, content.metadata) if content.metadata else params


@dataclasses.dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
      values: arrays and Python numbers by name, in the order of the description if there is one, else sorted.
      metadata: the user's.
      description: of the pytree; None in files that need none.
    """

    values: dict[str, Any]
    metadata: dict[str, str]
    description: Description | None


def read(path_or_buf: str | os.PathLike[str] | bytes, fs: Any = None) -> Content:
    """Reads a file; the errors are :func:`deserialize`'s."""
    with _naming(path_or_buf), opened(path_or_buf, fs) as file:
        header = file.header
        text = header.metadata.get(TREE_KEY)
        description = None if text is None else _description.decode(text)
        names = sorted(header.entries) if description is None else description.names
        for name in sorted(header.entries.keys() ^ set(names)):
            raise CorruptPackageError(
                "A file's tensors are not those that the description of its pytree names.",
                leaf=name,
                field=f"__metadata__.{TREE_KEY}",
            )
        numbers = frozenset[int]() if description is None else description.numbers
        weak = frozenset[int]() if description is None else description.weak
        logical = _logical(header.metadata.get(LEAVES_KEY), header.entries)
        placer = Placer(None)
        values = {}
        for leaf, name in enumerate(names):
            with context(leaf=name):
                values[name] = _value(file, name, logical.get(name), leaf in numbers, leaf in weak, placer)
        return Content(values, {k: v for k, v in header.metadata.items() if k not in _OWN}, description)


@contextlib.contextmanager
def _naming(path_or_buf: Any) -> Iterator[None]:
    named = isinstance(path_or_buf, (str, os.PathLike))
    with context(package=os.fspath(path_or_buf)) if named else contextlib.nullcontext():
        yield


def _value(
    file: File,
    name: str,
    logical: tuple[dtypes.DType, tuple[int, ...]] | None,
    number: bool,
    weak: bool,
    placer: Placer,
) -> Any:
    entry = file.header.entries[name]
    kind, shape = logical or (_PLAIN.get(entry.dtype), entry.shape)
    if kind is None:
        raise RestoreError("JAX has no dtype like this one of safetensors.", field="dtype", found=entry.dtype)
    # The header's dtype, and not the description's: from_storage compares them.
    storage = file.tensor(entry, _STORAGE[entry.dtype])
    try:
        held = kind.from_storage(storage, shape)
    except CorruptPackageError:
        raise
    except (ValueError, OverflowError) as error:  # without elements, and too large nevertheless
        raise CorruptPackageError("A tensor's shape is too large.", field="shape") from error
    if number:
        if kind.name not in _NUMBERS or shape:
            raise CorruptPackageError("A tensor is no Python number's.", field="dtype", found=f"{kind}{list(shape)}")
        return held.item()
    spec = TensorSpec(shape, kind, weak)
    try:
        _arrays.check_x64(spec, name, None)
    except RestoreError as error:
        error.fix = 'jax.config.update("jax_enable_x64", True)' if kind.bits >= 64 else "a later JAX"
        raise
    return placer.leaf(spec, [held], held.dtype)


_NUMBERS = frozenset(("bool", "int64", "float64", "complex128"))
_STORAGE = {kind.storage: kind.storage_numpy for kind in dtypes.ALL if kind.storage}


def _logical(text: str | None, entries: Mapping[str, Any]) -> dict[str, tuple[dtypes.DType, tuple[int, ...]]]:
    """Dtype and shape of the tensors that a file stores as something else, by name."""
    if text is None:
        return {}
    field = f"__metadata__.{LEAVES_KEY}"
    found = {}
    try:
        raw = json.loads(text)
        for name, fact in raw.items():
            shape = fact["shape"]
            if name not in entries or fact.keys() != {"dtype", "shape"}:
                raise ValueError(name)
            if not isinstance(shape, list) or any(type(d) is not int or d < 0 for d in shape):
                raise ValueError(shape)
            kind = dtypes.parse(fact["dtype"])
            if not kind.storage:
                raise ValueError(kind.name)
            found[name] = kind, tuple(shape)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ExportError) as error:
        raise CorruptPackageError(
            "The dtypes of a file's tensors are malformed.", field=field, found=f"{text:.80}"
        ) from error
    return found


def _unflattened(content: Content, frozen: bool) -> Any:
    description = content.description
    if description is not None and not _variables.is_collection(description.tree):
        tree = description.tree
        if not frozen:  # without its class it is built as a dict
            classes = {node: name for node, name in tree.classes.items() if name != FROZEN_DICT}
            tree = dataclasses.replace(tree, classes=classes)
        return tree.unflatten(list(content.values.values()))
    if _names.any_typed(content.values):
        warnings.warn(
            "The file holds Objax variables, whose types are left out of nested dicts. "
            "obmlite.interop.safejax.objax.deserialize, or requires_unflattening=False with to_var_collection=True, "
            "returns a VarCollection.",
            stacklevel=4,
        )
    return _names.unflatten(content.values)


def _collection(content: Content) -> Any:
    description = content.description
    if description is not None and _variables.is_collection(description.tree):
        _variables.imported()  # without it the tree would be built as a dict
        return description.tree.unflatten(list(content.values.values()))
    found = _variables.collection(content.values)
    if found is not None:
        return found
    warnings.warn(
        "The file does not tell the types of Objax variables, so a dict of names and values is returned in place of a "
        "VarCollection. Serialize with include_objax_variables=True, or with obmlite.interop.safejax.objax.serialize.",
        stacklevel=4,
    )
    return content.values


def _freeze(params: Any) -> Any:
    try:
        from flax.core import FrozenDict, freeze
    except ImportError as error:
        raise ImportError("freeze_dict=True needs Flax: pip install 'obmlite[flax]'") from error
    if isinstance(params, FrozenDict):
        return params
    if not isinstance(params, Mapping):
        raise RestoreError(
            "Only a mapping can be made a FrozenDict.",
            expected="a dict at the root",
            found=type(params).__qualname__,
            fix="deserialize with freeze_dict=False",
        )
    return freeze(params)
