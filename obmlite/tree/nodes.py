"""Classes that trees may hold instances of and rebuild, by names that are registered for them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

Flatten: TypeAlias = "Callable[[Any], tuple[Mapping[Any, Any] | Sequence[Any], Any]]"
Unflatten: TypeAlias = "Callable[[Any, dict[Any, Any] | tuple[Any, ...]], Any]"
Fill: TypeAlias = "Callable[[Any, Sequence[Any]], Any]"


@dataclasses.dataclass(frozen=True, slots=True)
class Registration:
    """How a class is taken apart and rebuilt.

    Attributes:
      cls: the class.
      name: that packages have for it.
      flatten: instance → (children, static); None where JAX, or a namedtuple's fields, do it.
      unflatten: (static, children) → instance; None for a namedtuple, and for what only a template rebuilds.
      fill: (instance, other leaves) → an instance like it that has these. Only for a class that JAX does not take apart
        as ``flatten`` does: one that it takes for a leaf, or whose leaves are not all arrays.
    """

    cls: type
    name: str
    flatten: Flatten | None = None
    unflatten: Unflatten | None = None
    fill: Fill | None = None


class Adapter(Protocol):
    """What knows a framework's classes. It is asked only when one of them, or a name of theirs, is met."""

    def of_class(self, cls: type) -> Registration | None:
        """The registration of a class of the framework's, or of a class derived from one; None for a leaf or none."""

    def of_name(self, name: str) -> Registration | None:
        """The registration that packages have a name for, out of a fixed list; None if it is not on it.

        Raises:
          ImportError: the framework is not there.
        """


by_class: dict[type, Registration] = {}
by_name: dict[str, Registration] = {}
_adapters: dict[str, Callable[[], Adapter]] = {}


def add_adapter(prefix: str, adapter: Callable[[], Adapter]) -> None:
    """Adds a framework: where its classes are defined, and what returns the adapter when one is first met."""
    _adapters[prefix] = adapter


def of_class(cls: type) -> Registration | None:
    """The registration of a class: the user's, or else an adapter's."""
    return by_class.get(cls) or _adapted(cls)


@functools.lru_cache(maxsize=4096)
def _adapted(cls: type) -> Registration | None:
    for base in cls.__mro__:
        adapter = _adapter(base.__module__)
        if adapter is not None:
            with contextlib.suppress(ImportError, AttributeError):  # another module of that name, or another version
                if entry := adapter().of_class(cls):
                    return entry
    return None


@functools.lru_cache(maxsize=4096)
def of_name(name: str) -> Registration | None:
    """The registration that has a name: the user's, or else an adapter's if its framework is installed."""
    entry = by_name.get(name)
    adapter = None if entry else _adapter(name)
    if adapter is None:
        return entry
    try:
        return adapter().of_name(name)
    except (ImportError, AttributeError):  # absent, or made for another JAX, of which it misses something
        return None


def _adapter(name: str) -> Callable[[], Adapter] | None:
    return next((a for prefix, a in _adapters.items() if name == prefix or name.startswith(f"{prefix}.")), None)


@functools.lru_cache(maxsize=4096)
def _is_foreign(cls: type) -> bool:
    entry = of_class(cls)
    return entry is not None and entry.fill is not None


is_foreign: Callable[[type], bool] = _is_foreign
"""Whether JAX does not take instances of a class apart as trees do. Asked at every call, so what it found is kept."""


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
    for cached in (_adapted, of_name, _is_foreign):
        cached.cache_clear()
    return cls


def is_namedtuple_type(cls: type) -> bool:
    return issubclass(cls, tuple) and hasattr(cls, "_fields")


def class_name(cls: type) -> str:
    entry = of_class(cls)
    return entry.name if entry else f"{cls.__module__}.{cls.__qualname__}"
