"""Micro-batching: what is put together, what is not, limits, and that one request's failure is its own."""

import concurrent.futures
import threading
import time

import numpy as np
import pytest

import obmlite
from obmlite.serving import BatchingConfig, Code, Interface, ServingError
from obmlite.serving.batching import Batcher
from tests.serving.packages import WIDTH, fixed, model, rows, threads

LONG = 10_000_000  # microseconds; what waits for a batch to fill would wait for ever


class Gate:
    """An interface whose calls wait until they are let through, and are noted."""

    def __init__(self, interface, *, open_=False):
        self._interface = interface
        self.sizes = []
        self.begun = threading.Semaphore(0)
        self.open = threading.Event()
        if open_:
            self.open.set()

    def __getattr__(self, name):
        return getattr(self._interface, name)

    def run(self, inputs, output_filter=()):
        self.sizes.append(len(next(iter(inputs.values()))))
        self.begun.release()
        assert self.open.wait(10)
        return self._interface.run(inputs, output_filter)


@pytest.fixture(scope="module")
def interface():
    return Interface(model(2.0).pipeline)


@pytest.fixture
def make():
    """Makes batchers, and stops them."""
    made = []

    def batcher(own, **options):
        observe = options.pop("observe", lambda *_: None)
        made.append(Batcher(own, BatchingConfig(**options), observe))
        return made[-1]

    yield batcher
    for batcher in made:
        if isinstance(batcher._interface, Gate):
            batcher._interface.open.set()
        batcher.stop()


def in_thread(work):
    """Runs in a thread; ``result()`` gives what came of it."""
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(work())
        except ServingError as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_requests_become_one_batch(interface, make):
    gate, seen = Gate(interface, open_=True), []
    batcher = make(gate, max_batch_size=8, batch_timeout_micros=LONG, observe=lambda *told: seen.append(told))
    found = threads(4, lambda n: batcher.run({"x": rows(2, first=100 * n)}))
    assert gate.sizes == [8]
    for n, outputs in enumerate(found):
        np.testing.assert_array_equal(outputs["output_0"], rows(2, first=100 * n) * 2)
    [(size, requests, waited)] = seen
    assert (size, requests) == (8, 4)
    assert 0 <= waited < 10


def test_a_batch_that_does_not_fill_goes_when_its_time_is_up(interface, make):
    gate = Gate(interface, open_=True)
    batcher = make(gate, max_batch_size=8, batch_timeout_micros=20_000)
    started = time.monotonic()
    found = batcher.run({"x": rows(3)})
    assert time.monotonic() - started >= 0.02
    assert gate.sizes == [3]
    np.testing.assert_array_equal(found["output_0"], rows(3) * 2)


def test_a_request_larger_than_a_batch_is_one_of_its_own(interface, make):
    gate = Gate(interface, open_=True)
    batcher = make(gate, max_batch_size=4, batch_timeout_micros=LONG)
    np.testing.assert_array_equal(batcher.run({"x": rows(9)})["output_0"], rows(9) * 2)
    assert gate.sizes == [9]


def test_batches_are_filled_up_to_allowed_sizes(interface, make):
    gate = Gate(interface, open_=True)
    batcher = make(gate, max_batch_size=8, batch_timeout_micros=0, allowed_batch_sizes=(4, 8))
    for count, size in ((1, 4), (4, 4), (5, 8), (8, 8), (11, 11)):
        assert batcher.run({"x": rows(count)})["output_0"].shape == (count, WIDTH)
        assert gate.sizes.pop() == size


def test_fixed_sizes_are_the_models_own(make):
    batcher = make(Interface(fixed((2, 8), 3.0).pipeline), max_batch_size=8, batch_timeout_micros=LONG)
    found = threads(8, lambda n: batcher.run({"x": rows(1, first=n)}))
    for n, outputs in enumerate(found):
        np.testing.assert_array_equal(outputs["output_0"], rows(1, first=n) * 3)


def test_a_full_queue_refuses(interface, make):
    gate = Gate(interface)
    batcher = make(gate, max_batch_size=2, batch_timeout_micros=0, max_enqueued_batches=2)
    running = in_thread(lambda: batcher.run({"x": rows(2)}))
    assert gate.begun.acquire(timeout=10)
    waiting = [in_thread(lambda: batcher.run({"x": rows(2)})) for _ in range(2)]
    wait_for(lambda: batcher._rows == 4)
    with pytest.raises(ServingError, match="is full: 4 rows wait, of at most 4") as caught:
        batcher.run({"x": rows(1)})
    assert (caught.value.code, caught.value.code.http) == (Code.UNAVAILABLE, 503)
    gate.open.set()
    for future in (running, *waiting):
        assert future.result(10)["output_0"].shape == (2, WIDTH)
    assert batcher.run({"x": rows(1)})["output_0"].shape == (1, WIDTH)


def test_deadlines(interface, make):
    gate = Gate(interface)
    batcher = make(gate, max_batch_size=2, batch_timeout_micros=0)
    running = in_thread(lambda: batcher.run({"x": rows(1)}))
    assert gate.begun.acquire(timeout=10)
    with pytest.raises(ServingError, match="no answer within") as caught:
        batcher.run({"x": rows(2)}, timeout=0.01)
    assert (caught.value.code, caught.value.code.http) == (Code.DEADLINE_EXCEEDED, 504)
    gate.open.set()
    assert running.result(10)
    batcher.stop()
    assert gate.sizes == [1]  # what nobody waits for any more is not run


def test_only_what_has_the_same_shape_is_put_together(make):
    made = obmlite.Model.from_function(
        lambda x: x.sum(1), obmlite.spec("f32[b,n]"), name="sums", platforms="cpu", weights=None
    )
    gate = Gate(Interface(made.pipeline))
    batcher = make(gate, max_batch_size=4, batch_timeout_micros=0)
    first = in_thread(lambda: batcher.run({"x": np.ones((1, 9), np.float32)}))
    assert gate.begun.acquire(timeout=10)
    futures = []
    for width in (2, 3, 2, 3):
        futures.append(in_thread(lambda width=width: batcher.run({"x": np.ones((2, width), np.float32)})))
        wait_for(lambda: batcher._rows == 2 * len(futures))
    gate.open.set()
    assert [future.result(10)["output_0"].tolist() for future in futures] == [[2, 2], [3, 3]] * 2
    assert first.result(10)["output_0"].tolist() == [9]
    assert gate.sizes == [1, 4, 4]


def test_outputs_that_are_asked_for(make):
    made = obmlite.Model.from_function(
        lambda x: {"a": x, "b": -x}, obmlite.spec("f32[b]"), name="two", platforms="cpu", weights=None
    )
    batcher = make(Interface(made.pipeline), max_batch_size=3, batch_timeout_micros=LONG)
    wanted = [["a"], ["b"], []]
    found = threads(3, lambda n: batcher.run({"x": np.full(1, n, np.float32)}, wanted[n]))
    assert [{name: array.tolist() for name, array in own.items()} for own in found] == [
        {"a": [0]},
        {"b": [-1]},
        {"a": [2], "b": [-2]},
    ]


class Picky:
    """An interface that fails with whatever batch has a negative number in it."""

    def __init__(self, interface):
        self._interface = interface
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self._interface, name)

    def run(self, inputs, output_filter=()):
        self.calls += 1
        if (inputs["x"] < 0).any():
            raise ZeroDivisionError("negative")
        return self._interface.run(inputs, output_filter)


def test_one_requests_failure_is_its_own(interface, make):
    own = Picky(interface)
    batcher = make(own, max_batch_size=4, batch_timeout_micros=LONG)

    def request(n):
        try:
            return batcher.run({"x": rows(1, first=-1000 if n == 2 else n)})["output_0"]
        except ServingError as error:
            return error

    found = threads(4, request)
    assert own.calls == 5
    assert found[2].code is Code.INTERNAL
    for n in (0, 1, 3):
        np.testing.assert_array_equal(found[n], rows(1, first=n) * 2)
    assert batcher.run({"x": rows(4)})  # the thread is still there


def test_inputs_are_checked_before_they_are_queued(interface, make):
    batcher = make(interface, max_batch_size=4, batch_timeout_micros=LONG)
    with pytest.raises(ServingError, match="Missing but required"):
        batcher.run({})
    assert batcher._rows == 0


def test_what_waits_is_answered_before_the_end(interface, make):
    gate = Gate(interface, open_=True)
    batcher = make(gate, max_batch_size=8, batch_timeout_micros=LONG)
    waiting = in_thread(lambda: batcher.run({"x": rows(1)}))
    wait_for(lambda: batcher._rows == 1)
    batcher.stop()
    assert waiting.result(10)["output_0"].shape == (1, WIDTH)
    with pytest.raises(ServingError, match="being unloaded") as caught:
        batcher.run({"x": rows(1)})
    assert caught.value.code is Code.UNAVAILABLE


def test_several_threads_answer_right(interface, make):
    """Many requests of many sizes over two threads: each gets its own rows back."""
    batcher = make(interface, max_batch_size=8, batch_timeout_micros=200, num_batch_threads=2, allowed_batch_sizes=(8,))

    def client(n):
        for turn in range(25):
            count = 1 + (n + turn) % 5
            found = batcher.run({"x": rows(count, first=1000 * n + turn)})["output_0"]
            np.testing.assert_array_equal(found, rows(count, first=1000 * n + turn) * 2)

    threads(6, client)
    assert batcher._rows == 0
