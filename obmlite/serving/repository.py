"""The models that are served, each in some of its versions. No sockets: protocols are built on this."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from obmlite.errors import ArgumentError
from obmlite.loading import load as load_package
from obmlite.serving.config import ModelConfig
from obmlite.serving.manager import Manager, VersionStatus, not_found
from obmlite.serving.observer import Observer, Observers
from obmlite.serving.servable import Servable
from obmlite.serving.status import Code, ServingError

__all__ = ["Repository", "VersionStatus"]

_LOG = logging.getLogger("obmlite.serving")


class Repository:
    """Models by name, loaded and dropped as their directories change. Threads may share it.

    Attributes:
      configs: what is served, by name.
    """

    def __init__(
        self,
        configs: Sequence[ModelConfig],
        *,
        poll_seconds: float = 1.0,
        load_retries: int = 5,
        retry_seconds: float = 60.0,
        load_threads: int = 1,
        load: Callable[..., Any] = load_package,
        observers: Sequence[Observer] = (),
    ) -> None:
        """Notes what is to be served; nothing is read yet.

        Args:
          configs: the models.
          poll_seconds: how often their directories are looked at; 0 for once.
          load_retries: how often a version that could not be loaded is tried again, before it is given up until its
            manifest is another one.
          retry_seconds: between two attempts. A version that is not complete is looked at each time.
          load_threads: models that are loaded at the same time.
          load: opens a version, as :func:`obmlite.load` does, given ``base_path``, ``version=``, and ``verify=``,
            ``public_key=`` and ``untrusted=`` where the model's configuration has them.
          observers: who is told what happens.

        Raises:
          ArgumentError: two models have one name, a public key is none, or ``poll_seconds`` is out of range.
          ImportError: there are public keys, and ``cryptography`` is not installed.
          OSError: the file of a public key cannot be read.
        """
        if not 0 <= poll_seconds <= threading.TIMEOUT_MAX:
            raise ArgumentError(
                "The time between two looks is none.",
                field="poll_seconds",
                expected="seconds",
                found=repr(poll_seconds),
            )
        self.configs = {config.name: config for config in configs}
        if len(self.configs) != len(configs):
            raise ArgumentError(
                "Two models have one name.", field="name", found=", ".join(config.name for config in configs)
            )
        self._observers = Observers(observers)
        self._managers = {
            name: Manager(config, load, retries=load_retries, retry_seconds=retry_seconds, observer=self._observers)
            for name, config in self.configs.items()
        }
        self._poll_seconds = poll_seconds
        self._load_threads = load_threads
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    # --- its life

    def start(self, wait: float | None = None) -> bool:
        """Begins to look for versions, in a thread of its own.

        Args:
          wait: seconds for which to wait until each model was looked at; None for not at all.

        Returns:
          Whether each model has a version that is served.

        Raises:
          ArgumentError: it was stopped.
        """
        if self._stopping.is_set():
            raise ArgumentError("A repository that was stopped does not start again.", fix="make another one")
        if self._thread is None:
            self._thread = threading.Thread(target=self._poll, name="obmlite repository", daemon=True)
            self._thread.start()
        deadline = time.monotonic() + (wait or 0)
        while time.monotonic() < deadline and not all(manager.looked for manager in self._managers.values()):
            time.sleep(0.005)
        return self.ready()

    def stop(self) -> None:
        """Looks no more, and drops each version after its last request."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        for manager in self._managers.values():
            manager.want(False)

    def __enter__(self) -> Repository:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def scan(self) -> None:
        """Looks at each model once, and loads and drops what is to be before it returns."""
        for manager in self._managers.values():
            manager.look()

    def _poll(self) -> None:
        running: dict[str, concurrent.futures.Future[None]] = {}
        with concurrent.futures.ThreadPoolExecutor(self._load_threads, "obmlite load") as pool:
            while not self._stopping.is_set():
                for name, manager in self._managers.items():
                    if name not in running or running[name].done():
                        running[name] = pool.submit(self._look, manager)
                self._stopping.wait(self._poll_seconds or None)
            pool.shutdown(cancel_futures=True)

    def _look(self, manager: Manager) -> None:
        try:
            manager.look()
        except Exception:  # noqa: BLE001 - one model's trouble ends neither the others nor the next look
            _LOG.exception("%s: looking for versions failed", manager.config.name)

    def observe(self, observer: Observer) -> None:
        """Tells one more observer of all that happens from now on."""
        self._observers.add(observer)

    # --- what is served

    def names(self) -> list[str]:
        """The models."""
        return list(self._managers)

    @contextlib.contextmanager
    def acquire(self, name: str, version: int | None = None, label: str | None = None) -> Iterator[Servable]:
        """A version of a model, which stays loaded for the block.

        Args:
          name: the model.
          version: its number; the highest that is served if left out.
          label: that stands for the version, instead.

        Raises:
          ServingError: ``NOT_FOUND``: it is not served; ``INVALID_ARGUMENT``: there is no such label.
        """
        manager = self._manager(name, version)
        servable = manager.acquire(self._version(manager, version, label))
        try:
            yield servable
        finally:
            servable.release()

    def labels(self, name: str) -> dict[str, int]:
        """A model's labels that stand for versions that are served.

        Raises:
          ServingError: ``NOT_FOUND``: there is no such model.
        """
        manager = self._manager(name)
        available = manager.available()
        return {label: version for label, version in manager.labels.items() if version in available}

    def assign(self, name: str, label: str, version: int) -> None:
        """Makes a label stand for a version.

        Raises:
          ServingError: ``NOT_FOUND``: there is no such model; ``FAILED_PRECONDITION``: the version is not served.
        """
        self._manager(name).assign(label, version)

    def status(self, name: str, version: int | None = None, label: str | None = None) -> list[VersionStatus]:
        """What is known of a model's versions, the highest first.

        A version that is there and not served has the reason: one that is not complete is at ``START``, one that
        could not be loaded at ``LOADING`` as long as it is tried again, then at ``END``.

        Raises:
          ServingError: ``NOT_FOUND``: there is no such model or version; ``INVALID_ARGUMENT``: no such label.
        """
        manager = self._manager(name, version)
        found = manager.statuses()
        version = self._version(manager, version, label)
        if version is None:
            return found
        own = [status for status in found if status.version == version]
        if not own:
            raise not_found(name, version)
        return own

    def problem(self, name: str) -> ServingError | None:
        """Why a model's directory cannot be read or has no versions; None if it has some.

        Raises:
          ServingError: ``NOT_FOUND``: there is no such model.
        """
        return self._manager(name).problem

    def load(self, name: str) -> None:
        """Serves a model again that was unloaded, and tries what could not be loaded once more.

        Raises:
          ServingError: ``NOT_FOUND``: there is no such model; else why no version of it is served.
        """
        manager = self._manager(name)
        manager.want(True)
        if not manager.available():
            failed = [s for s in manager.statuses() if s.code is not Code.OK]
            if failed:
                raise ServingError(
                    failed[0].code, f"failed to load '{name}', version {failed[0].version}: {failed[0].message}"
                )
            raise manager.problem or ServingError(
                Code.NOT_FOUND, f"failed to load '{name}': no version is to be served."
            )

    def unload(self, name: str) -> None:
        """Drops all versions of a model after their last requests, until it is loaded again.

        Raises:
          ServingError: ``NOT_FOUND``: there is no such model.
        """
        self._manager(name).want(False)

    def ready(self) -> bool:
        """Whether each model that is to be served has a version that is."""
        wanted = [manager for manager in self._managers.values() if manager.wanted]
        return not self._stopping.is_set() and all(manager.available() for manager in wanted)

    def model_ready(self, name: str, version: int | None = None) -> bool:
        """Whether a version of a model is served; any, if none is given.

        Raises:
          ServingError: ``NOT_FOUND``: there is no such model.
        """
        available = self._manager(name, version).available()
        return bool(available) if version is None else version in available

    def _manager(self, name: str, version: int | None = None) -> Manager:
        manager = self._managers.get(name)
        if manager is None:
            raise not_found(name, version)
        return manager

    @staticmethod
    def _version(manager: Manager, version: int | None, label: str | None) -> int | None:
        if label is None:
            return version
        if version is not None:
            raise ServingError(Code.INVALID_ARGUMENT, "Both a version and a version label are given.")
        return manager.of_label(label)
