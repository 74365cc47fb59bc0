"""Objects by name, as a model shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from obmlite.errors import UnknownNameError

_T = TypeVar("_T")


class Names(Mapping[str, _T]):
    """Objects by name, made when first asked for."""

    def __init__(self, names: Sequence[str], make: Callable[[str], _T]) -> None:
        self._names = tuple(names)
        self._make = make
        self._made: dict[str, _T] = {}

    def __getitem__(self, name: str) -> _T:
        if name not in self._made:
            if name not in self._names:
                raise UnknownNameError(
                    "The model has nothing of this name.", expected=", ".join(self._names) or "none", found=repr(name)
                )
            # Two threads may both make it; one result is kept.
            self._made.setdefault(name, self._make(name))
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names  # also if it cannot be made

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return "{" + ", ".join(self._names) + "}"

    @staticmethod
    def over(mapping: Mapping[str, _T]) -> Mapping[str, _T]:
        """What a mapping holds, as such names."""
        return mapping if isinstance(mapping, Names) else Names(list(mapping), mapping.__getitem__)
