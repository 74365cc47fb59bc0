"""Rewriting other libraries' safetensors files so that their tensors can be used where they are mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from obmlite._files import TensorFile
from obmlite.errors import ArgumentError, PackageExistsError, context
from obmlite.foreign.files import Files, open_files
from obmlite.io import safetensors
from obmlite.io.replacing import replacing_in
from obmlite.io.staging import write_all

_BLOCK = 8 << 20  # bytes that are copied at one time


def realign(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Callable[[int], Any] = lambda _: None,
) -> None:
    """Rewrites safetensors files so that every tensor whose size is a multiple of 64 bytes begins at one.

    Arrays on CPU can then be the mapped file itself. Names, dtypes, shapes, values and metadata stay as they are, and
    so does what tensor is in what file. Only the safetensors files and their index are written, and nothing else of a
    directory. All files are written under temporary names and then renamed, the index last: a file is the old one or
    the new one, and who has the old one open keeps it. Memory does not grow with the files.

    Args:
      path: a safetensors file, an index, or a directory, as for :func:`obmlite.open_weights`.
      out: for a file, the new file's path; for others the directory of the new ones, which is made if need be. May be
        where the old ones are, with ``overwrite``.
      overwrite: whether files that are there are replaced.
      progress: told the bytes that were written.

    Raises:
      PackageNotFoundError: there is nothing at ``path``.
      CorruptPackageError: a file breaks a rule of its format, or the index and its files disagree.
      PackageExistsError: a file is there already, and ``overwrite`` was not given.
      ArgumentError: ``out`` is a directory and ``path`` is one file, or the other way round.
      OSError: a file cannot be written; then no file was replaced that had not been before.
    """
    files = open_files(path, mmap=False)  # mapped, the pages that were read would count as this process's memory
    folder, names = _places(os.fspath(path), os.fspath(out), files)
    with context(package=os.fspath(out)):
        new = [*names.values(), *([files.index[0]] if files.index is not None else [])]
        taken = [name for name in new if os.path.lexists(os.path.join(folder, name))]
        if taken and not overwrite:
            raise PackageExistsError(
                "There is a file already.", found=", ".join(sorted(taken)[:8]), fix="another path, or overwriting"
            )
    if files.index is not None or os.path.isdir(path):
        os.makedirs(folder, exist_ok=True)
    with replacing_in(folder) as create:
        for old, name in names.items():
            with create(name) as descriptor:
                _rewrite(files.opened[old], files.headers[old], descriptor, progress)
        if files.index is not None:
            index, content = files.index
            with create(index) as descriptor:
                write_all(descriptor, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _places(path: str, out: str, files: Files) -> tuple[str, dict[str, str]]:
    """The directory that files go to, and their new names by the old ones."""
    if files.index is not None or os.path.isdir(path):
        if os.path.lexists(out) and not os.path.isdir(out):
            raise ArgumentError("Several files need a directory.", field="out", found=out)
        return out, {name: name for name in files.headers}
    if os.path.isdir(out):
        raise ArgumentError("One file needs the path of a file.", field="out", found=f"{out}, a directory")
    folder, base = os.path.split(out)
    [old] = files.headers
    return folder or os.curdir, {old: base}


def _rewrite(file: TensorFile, header: safetensors.Header, descriptor: int, progress: Callable[[int], Any]) -> None:
    entries = safetensors.layout([(entry.name, entry.dtype, entry.shape) for entry in header.entries.values()])
    write_all(descriptor, safetensors.encode_header(entries, header.metadata))
    buffer = memoryview(bytearray(_BLOCK))
    filled = 0

    def flush() -> None:
        nonlocal filled
        write_all(descriptor, buffer[:filled])
        progress(filled)
        filled = 0

    for entry in entries:
        start, end = file.offset(entry.name), file.offset(entry.name) + entry.end - entry.start
        while start < end:  # many small tensors make one write
            size = min(end - start, _BLOCK - filled)
            file.read_into(start, buffer[filled : filled + size])
            start, filled = start + size, filled + size
            if filled == _BLOCK:
                flush()
    flush()
