"""The versions of one model: which are there, which are to be served, and what it takes to get there.

As TensorFlow Serving has it (its ``AvailabilityPreservingPolicy``): what is new is loaded and warmed up before what it
replaces is dropped, and a base path that cannot be read changes nothing.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from obmlite import _signatures
from obmlite.errors import CorruptPackageError, PackageNotFoundError, context
from obmlite.io import versions
from obmlite.io.commit import MANIFEST
from obmlite.io.staging import is_signature_name
from obmlite.model import Model
from obmlite.serving.config import ModelConfig
from obmlite.serving.observer import Observer, Silent
from obmlite.serving.servable import Servable, State
from obmlite.serving.status import Code, ServingError

__all__ = ["Manager", "VersionStatus"]

_LOG = logging.getLogger("obmlite.serving")
_PAST = 16  # versions that are gone and still listed


@dataclasses.dataclass(frozen=True)
class VersionStatus:
    """What is known of a version.

    Attributes:
      version: its number.
      state: where it is in its life.
      code: ``OK``, or why it is not served.
      message: the same in a sentence; empty for ``OK``.
    """

    version: int
    state: State
    code: Code = Code.OK
    message: str = ""


@dataclasses.dataclass
class _Failure:
    """Why a version is not served, and when it is tried again."""

    status: VersionStatus
    stamp: object
    attempts: int
    retry_at: float  # of time.monotonic


class Manager:
    """One model's versions.

    Attributes:
      config: what is to be served.
      labels: label → version, of the configuration and later ones.
      problem: why its directory cannot be read, or has nothing to serve; None otherwise.
      looked: whether it was looked at before.
    """

    def __init__(
        self,
        config: ModelConfig,
        load: Callable[..., Model],
        *,
        retries: int = 5,
        retry_seconds: float = 60.0,
        observer: Observer | None = None,
    ) -> None:
        self.config = config
        self.labels = dict(config.labels)
        self.problem: ServingError | None = None
        self.looked = False
        self._load = load
        self._trust: dict[str, Any] = {}  # further arguments of load
        if config.public_key is not None:
            with context(object=config.name):
                self._trust["public_key"] = list(_signatures.public_keys(config.public_key).values())
        if config.untrusted:
            self._trust["untrusted"] = True
        self._retries = retries
        self._retry_seconds = retry_seconds
        self._observer: Observer = observer or Silent()
        self._one = threading.RLock()  # one look at a time
        self._lock = threading.RLock()  # of what follows; an observer may ask what there is
        self._serving: dict[int, Servable] = {}
        self._loading: Servable | None = None
        self._failures: dict[int, _Failure] = {}
        self._past: dict[int, Servable] = {}
        self._leaving: list[Servable] = []  # may be in use
        self._wanted = True
        self._garbage = False  # of a version that could not be loaded

    # --- who is served

    def acquire(self, version: int | None = None) -> Servable:
        """A version that is kept until its ``release()``; the highest one for None.

        Raises:
          ServingError: ``NOT_FOUND``: it is not served.
        """
        while True:
            with self._lock:
                chosen = max(self._serving, default=None) if version is None else version
                servable = None if chosen is None else self._serving.get(chosen)
            if servable is None:
                raise not_found(self.config.name, version)
            if servable.acquire():
                return servable

    def of_label(self, label: str) -> int:
        """The version that a label stands for.

        Raises:
          ServingError: ``INVALID_ARGUMENT``: there is no such label, or its version is not served.
        """
        version = self.labels.get(label)
        if version is None or version not in self._serving:
            raise ServingError(Code.INVALID_ARGUMENT, f"Unrecognized servable version label: {label}")
        return version

    def assign(self, label: str, version: int) -> None:
        """Makes a label stand for a version that is served.

        Raises:
          ServingError: ``FAILED_PRECONDITION``: it is not.
        """
        with self._lock:
            if version not in self._serving:
                raise ServingError(
                    Code.FAILED_PRECONDITION,
                    f"Label {label} is assigned to version {version} of {self.config.name}, which is not loaded: "
                    f"expected one of {', '.join(map(str, sorted(self._serving))) or 'no versions'}.",
                )
            self.labels = {**self.labels, label: version}

    def available(self) -> list[int]:
        """The versions that are served, the highest first."""
        with self._lock:
            return sorted(self._serving, reverse=True)

    def statuses(self) -> list[VersionStatus]:
        """What is known of its versions, the highest first."""
        with self._lock:
            found = {version: VersionStatus(version, s.state) for version, s in self._past.items()}
            found.update({version: failure.status for version, failure in self._failures.items()})
            found.update({version: VersionStatus(version, s.state) for version, s in self._serving.items()})
            loading = self._loading
            if loading is not None:
                found[loading.version] = VersionStatus(loading.version, loading.state)
        return [found[version] for version in sorted(found, reverse=True)]

    # --- what changes it

    @property
    def wanted(self) -> bool:
        """Whether any version is to be served."""
        return self._wanted

    def want(self, wanted: bool) -> None:
        """Serves its versions, or none; those that failed are tried again."""
        with self._one:
            self._wanted = wanted
            with self._lock:
                self._failures = {}
            self.look()

    def look(self) -> None:
        """Looks at the directory, loads what is new and drops what is to go. What goes wrong is in the statuses."""
        with self._one:
            if self._wanted:
                self._look()
            else:
                self._retire(set())
            self._clear()
            self.looked = True

    def _look(self) -> None:
        base, policy = self.config.base_path, self.config.policy
        try:
            there = versions.numbered(base)
        except OSError as error:
            stays = ", and what is served stays" if self._serving else ""
            self._complain(Code.NOT_FOUND, f"The base path cannot be read{stays}: {error}.")
            return
        if not there:
            package = os.path.exists(os.path.join(base, MANIFEST))
            more = ": it is a package itself, whose directory is to be named by a number" if package else ""
            self._complain(Code.NOT_FOUND, f"No versions were found under the base path {base}{more}.")
        else:
            self.problem = None
        with self._lock:
            self._failures = {
                v: f for v, f in self._failures.items() if v in there and f.stamp == self._stamp(v, there)
            }
        tried: set[int] = set()
        while True:
            wanted = policy.choose([v for v in there if v in self._serving or (v not in tried and self._due(v))])
            new = next((version for version in wanted if version not in self._serving), None)
            if new is None:
                break
            tried.add(new)
            self._bring(new, there)
        # As long as nothing of what is wanted can be loaded, what is not wanted any more goes on.
        if wanted or not policy.choose(there):
            self._retire(set(wanted))

    def _due(self, version: int) -> bool:
        failure = self._failures.get(version)
        return failure is None or failure.retry_at <= time.monotonic()

    def _stamp(self, version: int, there: dict[int, list[str]]) -> object:
        """What is another one once somebody has replaced the package, or signed it."""
        found: list[tuple[object, ...]] = []
        for name in there[version]:
            folder = os.path.join(self.config.base_path, name)
            for file in (MANIFEST, *self._signature_files(folder)):
                try:
                    stat = os.stat(os.path.join(folder, file))
                except OSError:
                    found.append((name, file))
                else:
                    found.append((name, file, stat.st_ino, stat.st_ctime_ns, stat.st_size))
        return found

    def _signature_files(self, folder: str) -> list[str]:
        """The signature files of a package, if they decide whether it is served."""
        if self.config.public_key is None:
            return []
        try:
            return sorted(filter(is_signature_name, os.listdir(folder)))
        except OSError:
            return []

    def _bring(self, version: int, there: dict[int, list[str]]) -> None:
        """Loads a version and serves it, or notes why not."""
        name = self.config.name
        stamp = self._stamp(version, there)
        servable = Servable(name, version, self._observer)
        with self._lock:
            self._loading = servable
        started = time.monotonic()

        def verified() -> Model:
            level = self.config.verify
            return opened if level == "structure" else self._open(version, verify=level)

        try:
            try:
                opened = self._open(version)
            except (PackageNotFoundError, CorruptPackageError) as error:
                # Somebody may still be writing it; to look again at the next time costs little.
                self._fail(version, stamp, State.START, ServingError.of(error), 0, 0.0)
                return
            servable.load(verified, batching=self.config.batching, warmup=self.config.warmup)
            with self._lock:
                self._serving[version] = servable
                servable.show()
                self._failures.pop(version, None)
                self._past.pop(version, None)
        except Exception as error:  # noqa: BLE001 - whatever a package's content makes JAX raise, the others are served
            found = ServingError.of(error)
            if servable.error is None:  # it was not even opened, so that nobody was told
                self._observer.loaded(name, version, time.monotonic() - started, found)
            self._failed(version, stamp, found)
            return
        finally:
            with self._lock:
                self._loading = None
        _LOG.info("%s: version %d is served after %.2f s", name, version, time.monotonic() - started)

    def _open(self, version: int, **options: Any) -> Model:
        return self._load(self.config.base_path, version=version, **self._trust, **options)

    def _failed(self, version: int, stamp: object, error: ServingError) -> None:
        self._garbage = True
        before = self._failures.get(version)
        attempts = 1 + (before.attempts if before is not None else 0)
        last = attempts > self._retries
        retry_at = math.inf if last else time.monotonic() + self._retry_seconds
        self._fail(version, stamp, State.END if last else State.LOADING, error, attempts, retry_at)

    def _fail(
        self, version: int, stamp: object, state: State, error: ServingError, attempts: int, retry_at: float
    ) -> None:
        code, message = error.code, error.problem
        if state is State.START:
            code, message = Code.UNAVAILABLE, f"The version is not complete yet: {message}"
        status = VersionStatus(version, state, code, message)
        with self._lock:
            before = self._failures.get(version)
            self._failures[version] = _Failure(status, stamp, attempts, retry_at)
        if before is None or before.status != status:
            _LOG.warning("%s: version %d is not served: %s", self.config.name, version, message)

    def _complain(self, code: Code, text: str) -> None:
        if self.problem is None or self.problem.problem != text:
            _LOG.warning("%s: %s", self.config.name, text)
        self.problem = ServingError(code, text)

    def _retire(self, stay: set[int]) -> None:
        """Drops versions, the lowest first, each after its last request."""
        for version in sorted(self._serving.keys() - stay):
            with self._lock:
                servable = self._serving.pop(version)
                self._past[version] = servable
                self._leaving.append(servable)
            _LOG.info("%s: version %d is dropped", self.config.name, version)
            servable.retire()

    def _clear(self) -> None:
        """Forgets versions that are gone, but for the last ones."""
        with self._lock:
            leaving, self._leaving = self._leaving, [s for s in self._leaving if s.state is not State.END]
            gone = [version for version, s in self._past.items() if s.state is State.END]
            for version in gone[: max(0, len(gone) - _PAST)]:
                del self._past[version]
            garbage, self._garbage = self._garbage or len(leaving) > len(self._leaving), False
        if garbage:
            gc.collect()  # jitted functions and what they close over refer to one another


def not_found(name: str, version: int | None = None) -> ServingError:
    """As TensorFlow Serving says it."""
    what = f"Latest({name})" if version is None else f"Specific({name}, {version})"
    return ServingError(Code.NOT_FOUND, f"Servable not found for request: {what}", object=name)
