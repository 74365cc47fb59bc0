"""Micro-batching: requests that come at about the same time, run as one batch.

It pays where one call of a batch costs far less than a call for each of its rows, as on accelerators.
"""

from __future__ import annotations

import bisect
import collections
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from obmlite.serving.config import BatchingConfig
from obmlite.serving.interface import Array, Interface, filled
from obmlite.serving.status import Code, ServingError

__all__ = ["Batcher"]


@dataclasses.dataclass(eq=False)
class _Request:
    inputs: Mapping[str, Array]
    output_filter: frozenset[str]
    rows: int
    since: float  # of time.monotonic
    answer: concurrent.futures.Future[dict[str, Array]] = dataclasses.field(default_factory=concurrent.futures.Future)


class Batcher:
    """The queue of one interface, and the threads that empty it.

    Only requests that differ in nothing but their number of rows are put together. One that waits is never overtaken
    by a later one that it could be put together with.
    """

    def __init__(
        self,
        interface: Interface,
        config: BatchingConfig,
        observe: Callable[[int, int, float], object] = lambda *_: None,
    ) -> None:
        """Starts the threads.

        Args:
          interface: that is called; its batches have to be divisible.
          config: sizes and limits.
          observe: is told each batch's rows, its requests, and the seconds that the first of them waited.
        """
        self._interface = interface
        self._config = config
        self._observe = observe
        self._most = config.max_batch_size * config.max_enqueued_batches
        self._changed = threading.Condition()
        # What requests have in common → those that wait, the first in front; the groups in no order.
        self._waiting: dict[Any, collections.deque[_Request]] = {}
        self._rows = 0  # that wait
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._work, name=f"batches of {interface.name}", daemon=True)
            for _ in range(config.num_batch_threads)
        ]
        for thread in self._threads:
            thread.start()

    def run(
        self, inputs: Mapping[str, Array], output_filter: Collection[str] = (), timeout: float | None = None
    ) -> dict[str, Array]:
        """The outputs for inputs, as :meth:`Interface.run` gives them, from a batch with others.

        Args:
          inputs: by name.
          output_filter: names of outputs; all of them if empty.
          timeout: seconds to wait for the answer.

        Raises:
          ServingError: the inputs do not fit; ``UNAVAILABLE``: the queue is full; ``DEADLINE_EXCEEDED``; or the call
            failed.
        """
        rows = self._interface.check(inputs, output_filter).rows
        assert rows is not None  # divisible
        request = _Request(inputs, frozenset(output_filter), rows, time.monotonic())
        with self._changed:
            if self._stopping:
                raise ServingError(Code.UNAVAILABLE, "The version is being unloaded.")
            if self._rows and self._rows + rows > self._most:
                raise ServingError(
                    Code.UNAVAILABLE,
                    f"The batch scheduling queue to which this task was submitted is full: {self._rows} rows wait, of "
                    f"at most {self._most}.",
                )
            self._rows += rows
            self._waiting.setdefault(self._interface.group(inputs), collections.deque()).append(request)
            self._changed.notify()
        try:
            return request.answer.result(timeout)
        except TimeoutError:
            request.answer.cancel()  # if it has not begun, it never will
            raise ServingError(Code.DEADLINE_EXCEEDED, f"There was no answer within {timeout:g} seconds.") from None

    def stop(self) -> None:
        """Answers what waits, and ends the threads."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while batch := self._next():
            running = [request for request in batch if request.answer.set_running_or_notify_cancel()]
            if running:
                self._answer(running)

    def _next(self) -> list[_Request]:
        """Waits for the next batch; none if there will be none."""
        wait = self._config.batch_timeout_micros * 1e-6
        with self._changed:
            while True:
                if not self._waiting:
                    if self._stopping:
                        return []
                    self._changed.wait()
                    continue
                now = time.monotonic()
                full = [key for key, queue in self._waiting.items() if self._fills(queue)]
                key = min(full or self._waiting, key=lambda key: self._waiting[key][0].since)
                left = self._waiting[key][0].since + wait - now
                if full or left <= 0 or self._stopping:
                    return self._take(key)
                self._changed.wait(left)

    def _fills(self, queue: collections.deque[_Request]) -> bool:
        rows = 0
        for request in queue:
            rows += request.rows
            if rows >= self._config.max_batch_size:
                return True
        return False

    def _take(self, key: Any) -> list[_Request]:
        queue, rows = self._waiting[key], 0
        batch: list[_Request] = []
        while queue and (not batch or rows + queue[0].rows <= self._config.max_batch_size):
            batch.append(queue.popleft())
            rows += batch[-1].rows
        if not queue:
            del self._waiting[key]
        else:
            self._changed.notify()  # another thread may have the rest
        self._rows -= rows
        return batch

    def _answer(self, batch: Sequence[_Request]) -> None:
        rows = sum(request.rows for request in batch)
        self._observe(rows, len(batch), time.monotonic() - batch[0].since)
        try:
            outputs = self._together(batch, rows)
        except Exception as error:  # noqa: BLE001 - whatever it is, who waits is told, and the thread goes on
            if len(batch) == 1:
                batch[0].answer.set_exception(ServingError.of(error))
                return
            for request in batch:  # what is wrong with one of them is nothing to the others
                self._answer([request])
            return
        at = 0
        for request in batch:
            wanted = request.output_filter or outputs
            request.answer.set_result({name: outputs[name][at : at + request.rows] for name in wanted})
            at += request.rows

    def _together(self, batch: Sequence[_Request], rows: int) -> dict[str, Array]:
        filters = [request.output_filter for request in batch]
        wanted = frozenset[str]().union(*filters) if all(filters) else frozenset[str]()
        inputs = {
            name: np.concatenate([request.inputs[name] for request in batch]) if len(batch) > 1 else array
            for name, array in batch[0].inputs.items()
        }
        sizes = self._config.allowed_batch_sizes
        if sizes and not self._interface.batch_sizes and rows < sizes[-1]:
            size = sizes[bisect.bisect_left(sizes, rows)]
            inputs = {name: filled(array, size) for name, array in inputs.items()}
        return self._interface.run(inputs, wanted)
