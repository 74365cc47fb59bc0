"""One version of a model, from being found to being gone."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from obmlite.model import Model
from obmlite.schema.records import Visibility
from obmlite.serving.batching import Batcher
from obmlite.serving.config import BatchingConfig
from obmlite.serving.interface import Array, Interface
from obmlite.serving.observer import Observer, Silent
from obmlite.serving.status import Code, ServingError
from obmlite.serving.warmup import warm_up

__all__ = ["DEFAULT", "Servable", "State"]

DEFAULT = "serving_default"
"""The name under which the default pipeline is served beside its own, if no other pipeline has it."""


class State(enum.Enum):
    """TensorFlow Serving's states (``get_model_status.proto``)."""

    UNKNOWN = 0
    START = 10
    LOADING = 20
    AVAILABLE = 30
    UNLOADING = 40
    END = 50


class Servable:
    """One version of a model. It is loaded once, called by any number of threads, and dropped after the last of them.

    Attributes:
      name: the model's name.
      version: the number.
      state: where it is in its life.
      error: why it could not be loaded.
      model: the model, while it is loaded.
      interfaces: name of a signature → what it serves; the default pipeline's also as ``"serving_default"``, if
        no other has that name.
      default: name of the default pipeline; empty for none.
      loaded_at: seconds since the epoch at which it was ready; 0 before.
    """

    def __init__(self, name: str, version: int, observer: Observer | None = None) -> None:
        self.name = name
        self.version = version
        self.state = State.START
        self.error: ServingError | None = None
        self.model: Model | None = None
        self.interfaces: dict[str, Interface] = {}
        self.default = ""
        self.loaded_at = 0.0
        self._observer: Observer = observer or Silent()
        self._batchers: dict[str, Batcher] = {}
        self._lock = threading.Lock()
        self._uses = 0

    def __repr__(self) -> str:
        return f"Servable {self.name}, version {self.version}: {self.state.name}"

    # --- its life

    def load(self, load: Callable[[], Model], *, batching: BatchingConfig | None = None, warmup: bool = True) -> None:
        """Loads it and calls it once for each shape that can be known; :meth:`show` is what makes it available.

        Args:
          load: opens the package.
          batching: how requests are put together, where rows know nothing of one another.
          warmup: whether it is called.

        Raises:
          ServingError: it cannot be loaded or called; :attr:`error` has it too.
        """
        started = time.perf_counter()
        self._enter(State.LOADING)
        try:
            self.model = load()
            self._open(self.model)
            if warmup:
                self._warm_up(() if batching is None else batching.allowed_batch_sizes)
            if batching is not None:
                self._batch(batching)
        except Exception as error:  # whatever a package's content makes JAX raise
            found = ServingError.of(error)
            self.error = ServingError(found.code, found.problem)  # one without the frames that hold the model
            self._drop()
            self._enter(State.END)
            self._observer.loaded(self.name, self.version, time.perf_counter() - started, self.error)
            raise found from error
        self.loaded_at = time.time()
        self._observer.loaded(self.name, self.version, time.perf_counter() - started, None)

    def show(self) -> None:
        """Takes requests from now on."""
        self._enter(State.AVAILABLE)

    def _open(self, model: Model) -> None:
        public = {n: p for n, p in model.pipelines.items() if p.visibility is Visibility.PUBLIC}
        if not public:
            raise ServingError(
                Code.FAILED_PRECONDITION, "The model has no public pipeline to be served.", package=model.path
            )
        self.interfaces = {name: Interface(pipeline) for name, pipeline in public.items()}
        if len(public) == 1 or model.default_pipeline:
            self.default = model.default_pipeline or next(iter(public))
            self.interfaces.setdefault(DEFAULT, self.interfaces[self.default])

    def _warm_up(self, sizes: Sequence[int]) -> None:
        assert self.model is not None
        started, calls, examples = time.perf_counter(), 0, self.model.examples
        for interface in set(self.interfaces.values()):
            calls += warm_up(interface, examples.get(interface.name, []), sizes)
        self._observer.warmed(self.name, self.version, time.perf_counter() - started, calls)

    def _batch(self, config: BatchingConfig) -> None:
        made: dict[Interface, Batcher] = {}
        for name, interface in self.interfaces.items():
            if not interface.divisible or not interface.batched:
                continue
            if interface not in made:
                made[interface] = Batcher(interface, config, self._observe_batches(interface.name))
            self._batchers[name] = made[interface]

    def _observe_batches(self, signature: str) -> Callable[[int, int, float], None]:
        observer, name, version = self._observer, self.name, self.version
        return lambda rows, requests, waited: observer.batch(name, version, signature, rows, requests, waited)

    def acquire(self) -> bool:
        """Keeps it loaded until :meth:`release`, if it is available."""
        with self._lock:
            if self.state is not State.AVAILABLE:
                return False
            self._uses += 1
            return True

    def release(self) -> None:
        """Ends what :meth:`acquire` began; the last one after :meth:`retire` drops the model."""
        with self._lock:
            self._uses -= 1
            last = not self._uses and self.state is State.UNLOADING
        if last:
            self._end()

    def retire(self) -> None:
        """Takes no more requests, and drops the model after the last of those that it has."""
        with self._lock:
            if self.state is not State.AVAILABLE:
                return
            self.state = State.UNLOADING
            last = not self._uses
        self._observer.state(self.name, self.version, State.UNLOADING)
        if last:
            self._end()

    def _end(self) -> None:
        self._drop()
        self._enter(State.END)

    def _drop(self) -> None:
        for batcher in set(self._batchers.values()):
            batcher.stop()
        self._batchers = {}
        self.interfaces = {}
        self.model = None

    def _enter(self, state: State) -> None:
        self.state = state
        self._observer.state(self.name, self.version, state)

    # --- what it is for

    def interface(self, signature: str = "") -> Interface:
        """What it serves under a name; the default one for none.

        Raises:
          ServingError: ``INVALID_ARGUMENT``: there is nothing of this name, or no default.
        """
        try:
            return self.interfaces[signature or self.default or DEFAULT]
        except KeyError:
            known = ", ".join(self.interfaces)
            raise ServingError(
                Code.INVALID_ARGUMENT,
                f'Serving signature name: "{signature or DEFAULT}" not found in signature def, which has {known}.',
                expected=known,
                found=signature or DEFAULT,
            ) from None

    def predict(
        self,
        inputs: Mapping[str, Array],
        signature: str = "",
        output_filter: Collection[str] = (),
        timeout: float | None = None,
    ) -> dict[str, Array]:
        """Calls a pipeline; within :meth:`acquire` and :meth:`release`.

        Args:
          inputs: arrays by name, with the dtypes of the interface's inputs.
          signature: the pipeline's name; the default one if empty.
          output_filter: names of outputs; all of them if empty.
          timeout: seconds to wait for the answer where requests are put together; a call that runs is not ended.

        Raises:
          ServingError: there is no such signature or output, the inputs do not fit, the queue is full, or the call
            failed.
        """
        started = time.perf_counter()
        code, rows = Code.OK, None
        try:
            interface = self.interface(signature)
            plan = interface.check(inputs, output_filter)
            rows = plan.rows
            batcher = self._batchers.get(signature or self.default)
            if batcher is not None:
                return batcher.run(inputs, output_filter, timeout)
            return interface.run(inputs, output_filter, plan)
        except ServingError as error:
            code = error.code
            raise
        finally:
            seconds = time.perf_counter() - started
            self._observer.request(self.name, self.version, signature or DEFAULT, code, seconds, rows)
