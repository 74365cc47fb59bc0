"""The files of weights that another library wrote: one, those of an index, or all of a directory."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from obmlite._files import TensorFile
from obmlite.errors import ArgumentError, CorruptPackageError, PackageNotFoundError, UnsafePathError, context
from obmlite.io import safetensors
from obmlite.io.store import LocalDirectory, check_path

INDEX = ".safetensors.index.json"
"""How the name of an index ends."""

_SUFFIX = ".safetensors"

MAX_INDEX_BYTES = safetensors.MAX_HEADER_SIZE
"""Bytes of an index: as of a header."""


@dataclasses.dataclass(frozen=True)
class Files:
    """Files, opened, and what their headers say.

    Attributes:
      name: where they are.
      headers: of each file, by its name.
      opened: each file.
      index: the index' name and content, where there is one.
    """

    name: str
    headers: dict[str, safetensors.Header]
    opened: dict[str, TensorFile]
    index: tuple[str, dict[str, Any]] | None

    @property
    def metadata(self) -> dict[str, str]:
        """What the files' ``__metadata__`` say; of what they disagree about, what the first says."""
        found: dict[str, str] = {}
        for header in self.headers.values():
            found = {**header.metadata, **found}
        return found


def open_files(path: str | os.PathLike[str], *, mmap: bool | None = None) -> Files:
    """Opens a safetensors file, the files that an index names, or those of a directory. Reads their headers alone.

    Of a directory that is the one index in it; without an index all its safetensors files. Links are followed.

    Raises:
      PackageNotFoundError: there is nothing at the path, or no such files.
      MissingFileError: a file of the index is missing.
      CorruptPackageError: a header is malformed, a tensor is in two files, or index and headers disagree.
      UnsafePathError: the index names a file elsewhere.
      ArgumentError: the directory has several indices.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        store = LocalDirectory(name, mmap=mmap, follow_links=True)
        with context(package=name):
            own = sorted(entry for entry in os.listdir(name) if not entry.startswith("."))
            index = _index_of(own)
            shards = [entry for entry in own if entry.endswith(_SUFFIX)]
            if not shards and index is None:
                raise PackageNotFoundError(
                    "The directory has no safetensors files.", expected=f"*{_SUFFIX} or *{INDEX}", found=_kinds(own)
                )
            return _open(store, shards, index)
    if not os.path.lexists(name):
        raise PackageNotFoundError("There is nothing at the path.", package=name)
    folder, base = os.path.split(name)
    store = LocalDirectory(folder or os.curdir, mmap=mmap, follow_links=True)
    with context(package=name):
        is_index = base.endswith(".json")
        return _open(store, [] if is_index else [base], base if is_index else None)


def _index_of(entries: list[str]) -> str | None:
    found = [entry for entry in entries if entry.endswith(INDEX)]
    if len(found) > 1:
        raise ArgumentError(
            "The directory has several indices.", found=", ".join(found), fix="give the path of the one that is meant"
        )
    return found[0] if found else None


def _kinds(entries: list[str]) -> str:
    if "manifest.obm" in entries:
        return "a package, which obmlite.load opens"
    return ", ".join(entries[:8]) or "nothing"


def _open(store: LocalDirectory, shards: list[str], index: str | None) -> Files:
    content = None if index is None else _read_index(store, index)
    weight_map: dict[str, str] | None = None if content is None else content["weight_map"]
    names = shards if weight_map is None else sorted(set(weight_map.values()))
    headers: dict[str, safetensors.Header] = {}
    opened: dict[str, TensorFile] = {}
    for name in names:
        source = store.open(name)
        with context(object=name if len(names) > 1 or index is not None else None):
            prefix = source.read(0, min(8, source.size))
            header = safetensors.parse_header(source.read(0, safetensors.header_size(prefix, source.size)), source.size)
        headers[name] = header
        opened[name] = TensorFile(source, {n: header.size + entry.start for n, entry in header.entries.items()})
    _check_once(headers)
    if weight_map is not None:
        _check_index(weight_map, headers)
    return Files(store.name, headers, opened, None if content is None or index is None else (index, content))


def _read_index(store: LocalDirectory, name: str) -> dict[str, Any]:
    source = store.open(name)
    try:
        if source.size > MAX_INDEX_BYTES:
            raise _malformed(f"{source.size} bytes")
        raw = source.read(0, source.size)
    finally:
        source.close()
    try:
        found = json.loads(raw.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _malformed(str(error)[:200]) from error
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise _malformed("no weight_map" if weight_map is None else "another weight_map")
    for tensor, file in weight_map.items():
        with context(leaf=tensor):
            check_path(file)
            if "/" in file:
                raise UnsafePathError(
                    "An index names a file in another directory.", field="weight_map", expected="a name", found=file
                )
    return dict(found)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key is there twice")
    return result


def _malformed(found: str) -> CorruptPackageError:
    return CorruptPackageError(
        "The index is malformed.",
        field="index",
        expected='JSON of {"weight_map": {tensor: file}}, each key once',
        found=found,
    )


def _check_once(headers: Mapping[str, safetensors.Header]) -> None:
    where: dict[str, str] = {}
    for file, header in headers.items():
        for tensor in header.entries:
            other = where.setdefault(tensor, file)
            if other != file:
                raise CorruptPackageError(
                    "A tensor is in two files.",
                    leaf=tensor,
                    expected="each tensor once",
                    found=f"{other} and {file}",
                    fix="give the path of one of the files, or of an index of those that belong together",
                )


def _check_index(weight_map: Mapping[str, str], headers: Mapping[str, safetensors.Header]) -> None:
    for tensor, file in weight_map.items():
        if tensor not in headers[file].entries:
            other = next((name for name, header in headers.items() if tensor in header.entries), None)
            raise CorruptPackageError(
                "The index names a file that does not have the tensor.",
                leaf=tensor,
                field="weight_map",
                expected=f"in {file}",
                found="in no file of the index" if other is None else f"in {other}",
            )
    for file, header in headers.items():
        for tensor in header.entries:
            if tensor not in weight_map:
                raise CorruptPackageError(
                    "A file has a tensor that the index does not name.", leaf=tensor, field="weight_map", found=file
                )
