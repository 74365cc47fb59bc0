"""What is made when first asked for, once, whichever threads ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class once(Generic[_T]):  # noqa: N801 - used as a decorator, like property
    """``functools.cached_property`` under the instance's own ``_lock``, a ``threading.RLock``.

    Python's has no lock since 3.12, and before that one for all instances of a class: two properties that need one
    another's objects would then wait for each other for ever. Here locks are taken in the order in which objects
    refer to one another.
    """

    def __init__(self, make: Callable[[Any], _T]) -> None:
        self._make = make
        self._name = make.__name__
        self.__doc__ = make.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> _T:
        with instance._lock:
            made = instance.__dict__
            if self._name not in made:
                made[self._name] = self._make(instance)
            value: _T = made[self._name]  # found there from now on, before this is asked
            return value
