"""Classes that trees may hold instances of and rebuild, by names that are registered for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

Flatten: TypeAlias = "Callable[[Any], tuple[Mapping[Any, Any] | Sequence[Any], Any]]"
Unflatten: TypeAlias = "Callable[[Any, dict[Any, Any] | tuple[Any, ...]], Any]"


@dataclasses.dataclass(frozen=True, slots=True)
class Registration:
    cls: type
    name: str
    flatten: Flatten | None
    unflatten: Unflatten | None


by_class: dict[type, Registration] = {}
by_name: dict[str, Registration] = {}


def register_node(
    cls: type,
    name: str | None = None,
    *,
    flatten: Flatten | None = None,
    unflatten: Unflatten | None = None,
) -> type:
    """Lets trees hold instances of a class and rebuild them when loading.

    A namedtuple needs nothing but its name. A class that JAX knows as a pytree node may leave out ``flatten``;
    it is then taken apart by JAX. May be used as a decorator.

    Args:
      cls: the class.
      name: the name under which packages hold it, ``module.qualname`` if not given. Packages are opened by this
        name for years: choose one that stays.
      flatten: instance → (children, static). Children are a mapping from keys
        (attribute names, say), or a sequence. Static
        data must be what msgpack can hold (None, bool, int, float, str, bytes, and lists, tuples and dicts of them).
      unflatten: (static, children as dict or tuple) → instance.

    Raises:
      ValueError: the class or the name is registered already, for something else.
    """
    if unflatten is None and not is_namedtuple_type(cls):
        raise ValueError(f"register_node({cls.__name__}) needs unflatten=: only a namedtuple is rebuilt without it")
    entry = Registration(cls, name or f"{cls.__module__}.{cls.__qualname__}", flatten, unflatten)
    for taken in (by_class.get(cls), by_name.get(entry.name)):
        if taken is not None and taken != entry:
            raise ValueError(f"{cls.__name__} as {entry.name!r} clashes with {taken.cls} registered as {taken.name!r}")
    by_class[cls] = by_name[entry.name] = entry
    return cls


def is_namedtuple_type(cls: type) -> bool:
    return issubclass(cls, tuple) and hasattr(cls, "_fields")


def class_name(cls: type) -> str:
    entry = by_class.get(cls)
    return entry.name if entry else f"{cls.__module__}.{cls.__qualname__}"
