"""Who is told what happens in a repository: metrics, a log, a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from obmlite.serving.servable import State
    from obmlite.serving.status import Code, ServingError

__all__ = ["Observer", "Observers", "Silent"]


class Observer(Protocol):
    """Is called as things happen, from whichever thread they happen in; must be quick and raise nothing."""

    def request(self, model: str, version: int, signature: str, code: Code, seconds: float, rows: int | None) -> None:
        """A call of a model ended.

        Args:
          model: the model's name.
          version: the version that was called.
          signature: the name of its signature, as it was asked for.
          code: how it ended.
          seconds: from the inputs as arrays to the outputs as arrays, time in the queue included.
          rows: of the batch; None where the inputs are no batch, or were refused.
        """
        ...

    def batch(self, model: str, version: int, signature: str, rows: int, requests: int, waited: float) -> None:
        """Requests were put together.

        Args:
          model: the model's name.
          version: the version.
          signature: the name of its signature.
          rows: of all of them together.
          requests: how many they are.
          waited: seconds for which the first of them was in the queue.
        """
        ...

    def loaded(self, model: str, version: int, seconds: float, error: ServingError | None) -> None:
        """An attempt to load a version ended, well or with an error; ``seconds`` has the warm-up's."""
        ...

    def warmed(self, model: str, version: int, seconds: float, calls: int) -> None:
        """A version was warmed up by so many calls."""
        ...

    def state(self, model: str, version: int, state: State) -> None:
        """A version has another state."""
        ...


class Silent:
    """Observes nothing; a base for observers of some of it."""

    def request(self, model: str, version: int, signature: str, code: Code, seconds: float, rows: int | None) -> None:
        """Does nothing."""

    def batch(self, model: str, version: int, signature: str, rows: int, requests: int, waited: float) -> None:
        """Does nothing."""

    def loaded(self, model: str, version: int, seconds: float, error: ServingError | None) -> None:
        """Does nothing."""

    def warmed(self, model: str, version: int, seconds: float, calls: int) -> None:
        """Does nothing."""

    def state(self, model: str, version: int, state: State) -> None:
        """Does nothing."""


class Observers:
    """Several observers as one."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._all = tuple(observers)

    def add(self, observer: Observer) -> None:
        """Tells one more from now on."""
        self._all = (*self._all, observer)

    def request(self, model: str, version: int, signature: str, code: Code, seconds: float, rows: int | None) -> None:
        """Tells all of them."""
        for one in self._all:
            one.request(model, version, signature, code, seconds, rows)

    def batch(self, model: str, version: int, signature: str, rows: int, requests: int, waited: float) -> None:
        """Tells all of them."""
        for one in self._all:
            one.batch(model, version, signature, rows, requests, waited)

    def loaded(self, model: str, version: int, seconds: float, error: ServingError | None) -> None:
        """Tells all of them."""
        for one in self._all:
            one.loaded(model, version, seconds, error)

    def warmed(self, model: str, version: int, seconds: float, calls: int) -> None:
        """Tells all of them."""
        for one in self._all:
            one.warmed(model, version, seconds, calls)

    def state(self, model: str, version: int, state: State) -> None:
        """Tells all of them."""
        for one in self._all:
            one.state(model, version, state)
