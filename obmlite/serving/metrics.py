"""Metrics for Prometheus, under the names that TensorFlow Serving has for them.

Latencies are histograms in microseconds, with its buckets. Labels hold names of models that are served, never what a
client sent.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import prometheus_client
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from obmlite.serving.observer import Silent
from obmlite.serving.status import Code, ServingError

__all__ = ["CONTENT_TYPE", "Metrics"]

T = TypeVar("T")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of what :meth:`Metrics.text` gives."""

_SERVING = ":tensorflow:serving:"
_LOADING = ":tensorflow:cc:saved_model:"
_BUCKETS = [10 * 1.8**n for n in range(33)]  # 10 µs to 25 minutes
_ROWS = [float(1 << n) for n in range(17)]
_MICROSECONDS = 1e6


class Metrics(Silent):
    """Counts what happens in a repository, and how long requests take; an observer of it.

    Attributes:
      registry: of prometheus_client, which holds the metrics; others may be registered in it.
    """

    def __init__(self, registry: prometheus_client.CollectorRegistry | None = None) -> None:
        self.registry = prometheus_client.CollectorRegistry() if registry is None else registry
        self._requests = _Counts(f"{_SERVING}request_count", "Requests by their end.", ("model_name", "status"))
        self._loads = _Counts(
            f"{_LOADING}load_attempt_count", "Loaded versions by their end.", ("model_path", "status")
        )
        self._examples = _Counts(f"{_SERVING}request_example_count_total", "Rows of requests.", ("model",))
        self._warmed = _Counts(f"{_SERVING}model_warmup_records_read", "Calls that warmed up.", ("model_path",))
        for counts in (self._requests, self._loads, self._examples, self._warmed):
            self.registry.register(counts)
        self._latency = self._histogram(
            f"{_SERVING}request_latency",
            "Microseconds from when a request's body began to be read to its answer.",
            ("model_name", "API", "entrypoint"),
        )
        self._runtime = self._histogram(
            f"{_SERVING}runtime_latency",
            "Microseconds of the model's call, queue included.",
            ("model_name", "API", "runtime"),
        )
        self._rows = self._histogram(f"{_SERVING}request_example_counts", "Rows of a request.", ("model",), _ROWS)
        self._queued = self._histogram(
            f"{_SERVING}batching_session:queuing_latency", "Microseconds in the queue for a batch.", ("model_name",)
        )
        self._load_seconds = self._histogram(
            f"{_LOADING}load_latency_distribution", "Microseconds to load a version.", ("model_path",)
        )
        self._warm_seconds = self._histogram(
            f"{_SERVING}model_warmup_latency", "Microseconds to warm a version up.", ("model_path", "status")
        )

    def _histogram(
        self, name: str, text: str, labels: tuple[str, ...], bounds: Sequence[float] = _BUCKETS
    ) -> _Histogram:
        made = _Histogram(name, text, labels, bounds)
        self.registry.register(made)
        return made

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        found: bytes = prometheus_client.generate_latest(self.registry)
        return found

    def answered(self, model: str, api: str, entrypoint: str, seconds: float) -> None:
        """A request was answered well.

        Args:
          model: the model's name.
          api: what was asked of it, such as ``"Predict"``.
          entrypoint: ``"REST"`` or ``"GRPC"``.
          seconds: from when its body began to be read to when its answer was written.
        """
        self._latency.add(seconds * _MICROSECONDS, model, api, entrypoint)

    def counted(self, model: str, read: Callable[[], T]) -> T:
        """What a request says; one that cannot be read is counted here, since the model is never asked.

        Raises:
          ServingError: of ``read``.
        """
        try:
            return read()
        except ServingError as error:
            self._requests.add(model, error.code.name)
            raise

    # --- of the observer

    def request(self, model: str, version: int, signature: str, code: Code, seconds: float, rows: int | None) -> None:
        """Counts a call."""
        self._requests.add(model, code.name)
        if code is Code.OK:
            self._runtime.add(seconds * _MICROSECONDS, model, "Predict", "XLA")
            if rows is not None:
                self._examples.add(model, by=rows)
                self._rows.add(rows, model)

    def batch(self, model: str, version: int, signature: str, rows: int, requests: int, waited: float) -> None:
        """Notes how long a batch waited."""
        self._queued.add(waited * _MICROSECONDS, model)

    def loaded(self, model: str, version: int, seconds: float, error: ServingError | None) -> None:
        """Counts an attempt to load."""
        self._loads.add(model, "success" if error is None else "fail")
        if error is None:
            self._load_seconds.add(seconds * _MICROSECONDS, model)

    def warmed(self, model: str, version: int, seconds: float, calls: int) -> None:
        """Notes a warm-up."""
        self._warmed.add(model, by=calls)
        self._warm_seconds.add(seconds * _MICROSECONDS, model, "success")


class _Counts(Collector):
    """A counter whose name is its own: prometheus_client's end in ``_total``, TensorFlow Serving's do not.

    Its type is given as unknown, since the text format of prometheus_client would announce a counter by that ending.
    """

    def __init__(self, name: str, text: str, labels: tuple[str, ...]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, ...]] = Counter()

    def add(self, *labels: str, by: int = 1) -> None:
        """Counts."""
        with self._lock:
            self._counts[labels] += by

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for."""
        metric = Metric(self._name, self._text, "unknown")
        with self._lock:
            counts = dict(self._counts)
        for values, count in counts.items():
            metric.add_sample(self._name, dict(zip(self._labels, values, strict=True)), count)
        yield metric


class _Histogram(Collector):
    """A histogram. prometheus_client's goes through its bounds one by one, which takes longer than a small model."""

    def __init__(self, name: str, text: str, labels: tuple[str, ...], bounds: Sequence[float]) -> None:
        self._name, self._text, self._labels, self._bounds = name, text, labels, bounds
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}

    def add(self, value: float, *labels: str) -> None:
        """Notes a value."""
        with self._lock:
            counts = self._counts.get(labels)
            if counts is None:
                counts = self._counts[labels] = [0] * (len(self._bounds) + 1)
                self._sums[labels] = 0.0
            counts[bisect.bisect_left(self._bounds, value)] += 1
            self._sums[labels] += value

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for."""
        metric = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        with self._lock:
            rows = [(labels, list(counts), self._sums[labels]) for labels, counts in self._counts.items()]
        names = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        for labels, counts, total in rows:
            metric.add_metric(labels, list(zip(names, itertools.accumulate(counts), strict=True)), total)
        yield metric
