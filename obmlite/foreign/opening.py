"""Another library's safetensors files as :class:`obmlite.Weights`."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from obmlite import dtypes
from obmlite import tree as trees
from obmlite._files import TensorFile
from obmlite._tensors import ListedSource, StoredTensor
from obmlite.errors import ArgumentError, CorruptPackageError, RestoreError, context
from obmlite.foreign import names as naming
from obmlite.foreign.files import open_files
from obmlite.foreign.names import Naming
from obmlite.foreign.views import View
from obmlite.plan import Layout
from obmlite.schema.records import Piece
from obmlite.specs import TensorSpec
from obmlite.weights import Weights

Change: TypeAlias = "Callable[[str, View], View | Mapping[str, View] | None]"
Transform: TypeAlias = "Change | Mapping[str, Change | str]"

MSGPACK = ".msgpack"
"""How the name of a file that Flax wrote ends."""

_BLOCK = 1 << 20  # bytes

_BY_STORAGE = {
    kind.storage: kind
    for kind in dtypes.ALL
    if kind.storage and not kind.is_packed and not kind.tail and kind.storage_numpy == kind.numpy
} | {"F4": dtypes.parse("float4_e2m1fn")}


def open_weights(
    path: str | os.PathLike[str],
    *,
    names: Naming | None = None,
    transform: Transform | None = None,
    mmap: bool | None = None,
) -> Weights:
    """Opens weights that another library wrote, such as a checkpoint of the Hugging Face hub. No values are read.

    What comes back is as lazy as the weights of a package, and has all that they have: it can be looked into, restored
    to any devices (each reads its own bytes, and transposes and stacks them on the way), and saved in a package.

    Args:
      path: a safetensors file, an index (``*.safetensors.index.json``), a directory with an index or with safetensors
        files, or a file that Flax wrote (``*.msgpack``). Symbolic links are followed.
      names: where tensors go: a function from a tensor's name to a path (text joined by ``.``, or a tuple of keys),
        to a :class:`obmlite.foreign.Part` for one entry of a stacked leaf, or to None to leave the tensor out. Or a
        table from patterns to paths or None, of which the first that matches counts: ``*`` is any text, ``{word}`` what
        is between dots; a word that the path lacks makes a new leading dimension, along which tensors are stacked by
        their numbers. Left out, nested dicts by the dots in the names.
      transform: what to change before that: a function from a tensor's name and a :class:`obmlite.foreign.View` of it,
        which is transposed, reshaped, sliced and split as in numpy, to a view, to a dict of views by what is to be
        added to the name (behind a dot), or to None to leave the tensor out. Or a table from globs over names to such
        functions, or to ``"transpose"``, of which the first that matches counts.
      mmap: whether files are mapped, as for :func:`obmlite.load`.

    Returns:
      The weights. Their metadata is what the files' ``__metadata__`` say.

    Raises:
      PackageNotFoundError: there is nothing at the path, or nothing that can be opened.
      CorruptPackageError: a file breaks a rule of its format, a tensor is in two files, or an index and its files
        disagree.
      UnsafePathError: an index names a file elsewhere.
      ArgumentError: ``names`` or ``transform`` don't fit the tensors.
      RestoreError: JAX has no dtype like that of a tensor, which is not left out.
    """
    if os.fspath(path).endswith(MSGPACK):
        from obmlite.foreign import flax_msgpack

        if names is not None or transform is not None:
            raise ArgumentError("Flax' files hold a tree: names= and transform= are for others.", package=path)
        return flax_msgpack.read(path, mmap=mmap)
    files = open_files(path, mmap=mmap)
    with context(package=os.fspath(path)):
        views: dict[str, View] = {}
        unknown: dict[str, str] = {}
        change = _tabled(transform) if isinstance(transform, Mapping) else transform
        for file, header in files.headers.items():
            for name, entry in header.entries.items():
                kind = _BY_STORAGE.get(entry.dtype)
                if kind is None:  # it may yet be left out
                    unknown[name] = entry.dtype
                    kind = _BY_STORAGE["U8"]
                views.update(_changed(View.of(name, file, kind, entry.shape), change))
        places = naming.placed(sorted(views), names)
        _check_kinds([views[name] for name in places], unknown)
        return _weights({name: (views[name], *place) for name, place in places.items()}, files.opened, files.metadata)


def _check_kinds(views: Iterable[View], unknown: Mapping[str, str]) -> None:
    wrong = sorted({view.name for view in views if view.name in unknown})
    if wrong:
        raise RestoreError(
            "Tensors are of a dtype that does not say how its elements are packed.",
            leaf=wrong[0],
            field="dtype",
            found=", ".join(f"{name} ({unknown[name]})" for name in wrong[:20]),
            fix="leave them out, by names=",
        )


def _tabled(table: Mapping[str, Change | str]) -> Change:
    """A table of changes as one."""
    changes: dict[str, Change] = {}
    for glob, given in table.items():
        if not callable(given) and given != "transpose":
            raise ArgumentError(
                "A table of transforms has something else in it.",
                field="transform",
                expected='functions and "transpose"',
                found=f"{glob!r}: {given!r}",
            )
        changes[glob] = given if callable(given) else lambda _, view: view.transpose()

    def change(name: str, view: View) -> View | Mapping[str, View] | None:
        found = next((found for glob, found in changes.items() if fnmatch.fnmatchcase(name, glob)), None)
        return view if found is None else found(name, view)

    return change


def _changed(view: View, change: Change | None) -> dict[str, View]:
    """The views that a change makes of one, by name."""
    if change is None:
        return {view.name: view}
    with context(leaf=view.name):
        made: Any = change(view.name, view)
    if made is None:
        return {}
    if isinstance(made, Mapping):
        found = {f"{view.name}.{suffix}": part for suffix, part in made.items()}
    else:
        found = {view.name: made}
    for part in found.values():
        if not isinstance(part, View) or (part.name, part.file) != (view.name, view.file):
            raise ArgumentError(
                "A transform gave something else than a view of its tensor.",
                leaf=view.name,
                field="transform",
                expected="a view, a dict of views, or None",
                found=repr(part)[:200],
            )
    return found


_Source: TypeAlias = tuple[View, tuple[Any, ...], tuple[int, ...]]


def _weights(sources: Mapping[str, _Source], opened: Mapping[str, TensorFile], metadata: Mapping[str, str]) -> Weights:
    """Weights of views, each at a path and an index."""
    parts: dict[tuple[Any, ...], dict[tuple[int, ...], str]] = {}
    for name, (_, path, index) in sources.items():
        own = parts.setdefault(path, {})
        if index in own:
            raise ArgumentError(
                "Two tensors are to be one leaf.",
                leaf=trees.join([str(key) for key in path]),
                field="names",
                found=f"{own[index]!r} and {name!r}",
            )
        own[index] = name
    paths, tree = trees.flatten(_nested(parts))
    specs: list[TensorSpec] = []
    tensors = []
    file_of = opened.__getitem__
    for number, (path, leaf) in enumerate(zip(paths, tree.names, strict=True)):
        own = parts[path.keys]
        sizes = naming.grid(leaf, own)
        views = {index: sources[own[index]][0] for index in sorted(own)}
        _check_alike(leaf, {own[index]: view for index, view in views.items()})
        first = next(iter(views.values()))
        spec = TensorSpec((*sizes, *first.shape), first.kind)
        pieces = [_piece(index, view) for index, view in views.items()]
        specs.append(spec)
        stored = _TruthValues if spec.kind.storage == "BOOL" else StoredTensor
        tensors.append(stored(spec, pieces, file_of, number, _layouts(views)))
    return Weights.from_source(tree, tuple(specs), ListedSource(tensors), dict(metadata))


class _TruthValues(StoredTensor):
    """Truth values, of which XLA goes astray where a byte is not 0 or 1: looked through before they are first used."""

    @functools.cached_property
    def _checked(self) -> set[int]:
        return set()

    def place(self, piece: int) -> tuple[TensorFile, int]:
        file, base = super().place(piece)
        if piece not in self._checked:
            layout = self.layouts[piece] if self.layouts else None
            nbytes = math.prod(layout.shape if layout is not None else self._pieces[piece].shape)
            for start in range(0, nbytes, _BLOCK):
                most = int(file.read(base + start, min(_BLOCK, nbytes - start)).max())
                if most > 1:
                    raise CorruptPackageError("A truth value is neither 0 nor 1.", field="BOOL", found=most)
            self._checked.add(piece)
        return file, base


class _Leaf:
    """A path, which is no container here."""

    def __init__(self, keys: tuple[Any, ...]) -> None:
        self.keys = keys


def _nested(paths: Iterable[tuple[Any, ...]]) -> Any:
    """Nested dicts, with a leaf at each path."""
    root: dict[Any, Any] = {}
    for path in paths:
        if not path:
            return _Leaf(path)
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = _Leaf(path)
    return root


def _piece(index: tuple[int, ...], view: View) -> Piece:
    begin = (*index, *(0,) * view.ndim)
    return Piece(view.file, view.name, begin, (*(1,) * len(index), *view.shape), b"")


def _layouts(views: Mapping[tuple[int, ...], View]) -> tuple[Layout | None, ...]:
    """How the views of a leaf lie; empty where it is one, stored as it is."""
    found = []
    for index, view in views.items():
        axes = (*(-1,) * len(index), *view.layout.axes)
        found.append(None if view.is_stored else dataclasses.replace(view.layout, axes=axes))
    return tuple(found) if any(found) else ()


def _check_alike(leaf: str, views: Mapping[str, View]) -> None:
    kinds: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for name, view in views.items():
        kinds.setdefault((view.shape, view.kind.short), []).append(name)
    if len(kinds) > 1:
        raise ArgumentError(
            "Tensors that a leaf is to be stacked of differ in shape or dtype.",
            leaf=leaf,
            field="names",
            expected="tensors that are alike",
            found="; ".join(
                f"{kind}{list(shape)}: {', '.join(map(repr, own[:4]))}{', …' if len(own) > 4 else ''}"
                for (shape, kind), own in kinds.items()
            ),
        )
