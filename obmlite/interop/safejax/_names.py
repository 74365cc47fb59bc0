"""Names of tensors as safejax made them: keys joined by ``.``, and an Objax variable's type behind ``::``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from obmlite.errors import RestoreError

SEPARATOR = "::"
"""Stands between a variable's name and its type."""

TYPES = ("TrainVar", "TrainRef", "StateVar", "RandomState", "BaseVar", "BaseState")
"""Types of Objax' variables."""


def split_type(name: str) -> tuple[str, str | None]:
    """A name without the type of a variable, and that type; None where there is none."""
    key, separator, kind = name.rpartition(SEPARATOR)
    return (key, kind) if separator and kind in TYPES else (name, None)


def any_typed(names: Iterable[str]) -> bool:
    """Whether a name has the type of a variable."""
    return any(split_type(name)[1] is not None for name in names)


def typed(values: Mapping[str, Any]) -> dict[str, tuple[str | None, Any]]:
    """The type and value of each variable, by its name without the type.

    Raises:
      RestoreError: two names differ in the type alone.
    """
    found: dict[str, tuple[str | None, Any]] = {}
    for name, value in values.items():
        key, kind = split_type(name)
        if key in found:
            raise RestoreError("Two tensors have the name of one variable.", leaf=key, found=name)
        found[key] = kind, value
    return found


def unflatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of values by name: a name's parts between dots are keys, and types of variables are left out.

    Raises:
      RestoreError: two names lead to one place, or one leads through the other's value.
    """
    root: dict[str, Any] = {}
    places: dict[tuple[str, ...], dict[str, Any]] = {}
    for name, value in values.items():
        *above, last = split_type(name)[0].split(".")
        place = root
        for depth, key in enumerate(above, 1):
            path = tuple(above[:depth])
            if path not in places:
                if key in place:
                    raise _ambiguous(name)
                places[path] = place[key] = {}
            place = places[path]
        if last in place:
            raise _ambiguous(name)
        place[last] = value
    return root


def _ambiguous(name: str) -> RestoreError:
    return RestoreError(
        "Names of tensors cannot be made into nested dicts: another name takes the same place.",
        leaf=name,
        expected="no name that is the beginning of another, up to a dot",
        fix="deserialize with requires_unflattening=False, which gives a flat dict",
    )
