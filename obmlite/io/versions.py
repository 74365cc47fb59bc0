"""A directory of numbered versions of a package, ``mnist/1``, ``mnist/2``, …: which of them is the one to open.

Numbers are decimal and may be padded with zeros, as TensorFlow Serving has them; everything else in the directory is
ignored. A version that somebody is still saving or copying lies beside the finished ones, and is passed over.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TypeVar

from obmlite.errors import (
    ArgumentError,
    CorruptPackageError,
    ObmliteError,
    PackageNotFoundError,
    add_facts,
)

__all__ = ["numbered", "open_version"]

T = TypeVar("T")

_NUMBER = re.compile(r"[0-9]{1,19}")  # int64, as on the wire of serving protocols
_SHOWN = 20  # versions that an error lists
# A version that needs a newer obmlite is complete: to run an older one in its place would be a surprise.
_INCOMPLETE = (PackageNotFoundError, CorruptPackageError)


def numbered(path: str | os.PathLike[str]) -> dict[int, list[str]]:
    """The versions in a directory, complete or not: number → names of its directories, the highest number first.

    Raises:
      OSError: the directory is not there or cannot be read.
    """
    found: dict[int, list[str]] = {}
    with os.scandir(path) as entries:
        for entry in entries:
            if _NUMBER.fullmatch(entry.name) and entry.is_dir():
                found.setdefault(int(entry.name), []).append(entry.name)
    return {number: sorted(found[number]) for number in sorted(found, reverse=True)}


def open_version(path: str | os.PathLike[str], version: int | None, opened: Callable[[str], T]) -> T:
    """Opens a version in a directory of them.

    Args:
      path: the directory.
      version: its number; None for the highest that is complete.
      opened: opens a package at a path; raises :class:`PackageNotFoundError` or :class:`CorruptPackageError` where
        not all of it is there.

    Raises:
      PackageNotFoundError: there is no version, no complete one, or not the one that was asked for.
      ArgumentError: ``version`` is no number, or two directories have it.
      ObmliteError: of ``opened``: what is wrong with the version that was asked for.
    """
    if version is not None and (type(version) is not int or version < 0):
        raise ArgumentError(
            "A version is a number.", field="version", expected="an integer of at least 0", found=repr(version)
        )
    there = numbered(path)
    if version is not None:
        if version not in there:
            raise PackageNotFoundError(
                "There is no such version.", package=os.fspath(path), expected=f"version {version}", found=_list(there)
            )
        try:
            return opened(_place(path, version, there))
        except ObmliteError as error:
            add_facts(error, fix=f"versions here, complete or not: {_list(there)}")
            raise
    problems = []
    for number in there:
        try:
            return opened(_place(path, number, there))
        except _INCOMPLETE as error:
            problems.append((number, error))
    raise PackageNotFoundError(
        "No version in the directory is complete.",
        package=os.fspath(path),
        expected="a version whose manifest and files are all there",
        found="".join(
            f"\n    {number}: {error.problem} {_facts(error)}".rstrip() for number, error in problems[:_SHOWN]
        ),
    )


def _place(path: str | os.PathLike[str], number: int, there: dict[int, list[str]]) -> str:
    names = there[number]
    if len(names) > 1:
        raise ArgumentError(
            "Two directories have the number of a version.",
            package=os.fspath(path),
            expected=f"one directory for version {number}",
            found=", ".join(names),
            fix="remove one, or load the other by its own path",
        )
    return os.path.join(path, names[0])


def _list(there: dict[int, list[str]]) -> str:
    shown = ", ".join(map(str, list(there)[:_SHOWN]))
    return f"{shown}, …" if len(there) > _SHOWN else shown or "no numbered versions"


def _facts(error: ObmliteError) -> str:
    return f"({error.expected})" if error.expected else ""
