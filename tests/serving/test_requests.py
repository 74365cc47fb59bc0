"""Which calls are the event loop's, and which a thread's."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any

import pytest

pytest.importorskip("starlette")

from starlette.exceptions import HTTPException

from obmlite.serving import Repository
from obmlite.serving._requests import Limits, Service
from obmlite.serving.status import ServingError

Awaited = Coroutine[Any, Any, bool]


def run(test: Any, **limits: Any) -> Any:
    async def inside() -> Any:
        service = Service(Repository([]), Limits(**limits))
        try:
            return await test(service)
        finally:
            service.close()

    return asyncio.run(inside())


def call(service: Service, seconds: float = 0, size: int = 1, key: str = "key", **options: Any) -> Awaited:
    """Whether a call ran on the event loop's thread."""
    loop = threading.get_ident()

    def work(given: str) -> bool:
        assert given == key
        time.sleep(seconds)
        return threading.get_ident() == loop

    return service.run(size, lambda: key, lambda given: given, work, **options)


def test_quick_calls_are_the_loops() -> None:
    async def test(service: Service) -> None:
        assert not await call(service), "nothing is known of the first"
        for _ in range(50):  # until one was quick, on a machine that does other things too
            if await call(service):
                break
        else:
            pytest.fail("no call came to be the event loop's")
        assert not await call(service, key="other shapes")
        assert not await call(service, waits=True)
        assert not await call(service, size=1 << 20)

    run(test)


def test_slow_calls_leave_the_loop_alone() -> None:
    async def test(service: Service) -> None:
        for _ in range(3):
            slow = asyncio.ensure_future(call(service, seconds=0.2))
            turns = 0
            while not slow.done():
                await asyncio.sleep(0.01)
                turns += 1
            assert turns > 3
            assert not slow.result()

    run(test)


def test_a_call_that_became_slow_leaves_the_loop() -> None:
    async def test(service: Service) -> None:
        where = [await call(service) for _ in range(20)]
        where += [await call(service, seconds=0.005) for _ in range(40)]
        assert not where[-1]

    run(test)


def test_too_many_at_once() -> None:
    async def test(service: Service) -> list[Any]:
        calls = [call(service, seconds=0.2) for _ in range(5)]
        return await asyncio.gather(*calls, return_exceptions=True)

    results = run(test, requests=2)
    assert [type(result) for result in results] == [bool, bool, ServingError, ServingError, ServingError]
    assert "Too many requests at once: 2." in str(results[-1])


# --- bodies


def body(service: Service, *chunks: tuple[float, bytes]) -> Coroutine[Any, Any, bytes]:
    """A body that comes in chunks, each after some seconds."""
    left = list(chunks)

    async def receive() -> dict[str, Any]:
        seconds, chunk = left.pop(0)
        if seconds:
            await asyncio.sleep(seconds)
        return {"type": "http.request", "body": chunk, "more_body": bool(left)}

    async def read() -> bytes:
        async with service.body({}, receive) as whole:
            return whole

    return read()


def test_bodies_come_in_time() -> None:
    async def test(service: Service) -> None:
        assert await body(service, (0, b"all")) == b"all"
        assert await body(service, (0, b"a"), (0.01, b"l"), (0, b"l")) == b"all"
        for parts in ([(5.0, b"a")], [(0.0, b"a"), (5.0, b"b")], [(0.07, b"a")] * 4):
            begun = time.monotonic()
            with pytest.raises(HTTPException, match="did not arrive within") as info:
                await body(service, *parts)
            assert info.value.status_code == 408
            assert 0.1 < time.monotonic() - begun < 4
        assert service.buffered == 0
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()

    run(test, body_seconds=0.2)


def test_who_waits_for_a_body_can_be_cancelled() -> None:
    async def test(service: Service) -> None:
        waiting = asyncio.ensure_future(body(service, (0, b"a"), (5, b"b")))
        await asyncio.sleep(0.01)
        assert service.buffered == 1
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert service.buffered == 0

    run(test)
