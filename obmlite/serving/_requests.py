"""What the protocols over HTTP share: paths, bodies within limits, calls beside the event loop, errors as JSON.

A call of a small model takes less time than handing it to a thread, so calls whose last ones were quick run on the
event loop; all others, and whatever belongs to a large body, run in a pool of threads. For the same reason calls have
routes of their own, :class:`CallRoute`, which go without Starlette's objects for a request and its answer.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import re
import time
import types
import zlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Generator, Hashable, Mapping
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from obmlite.serving import _json
from obmlite.serving.repository import Repository
from obmlite.serving.status import Code, ServingError

__all__ = ["Answer", "CallRoute", "Incoming", "Limits", "PathRoute", "Service", "error_response", "json_response"]

T = TypeVar("T")
D = TypeVar("D")

MIB = 1 << 20

_LARGE_BODY = 64 << 10
"""Bytes of a body from which on reading it is no longer the event loop's."""

_QUICK = 0.001
"""Seconds within which a call may hold up the event loop: a few times what it costs to use a thread."""

_SHORT = 256
"""Characters of paths whose parameters are kept."""

_KEPT = 1024
"""Shapes of calls whose times are kept."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What clients may take.

    Attributes:
      body_bytes: of a request's body, unpacked; beyond it, 413.
      body_seconds: in which a body has to arrive; beyond it, 408.
      head_seconds: in which a request's line and headers have to arrive; beyond it, 408.
      buffered_bytes: of all bodies at once; beyond it, 429.
      requests: that run or wait for a thread at once; beyond it, 429.
      threads: that run calls.
    """

    body_bytes: int = 64 * MIB
    body_seconds: float = 30.0
    head_seconds: float = 10.0
    buffered_bytes: int = 1024 * MIB
    requests: int = 256
    threads: int = min(32, (os.cpu_count() or 1) + 4)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A document."""
    return Response(_json.dumps(value), status, headers, "application/json")


def error_response(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    """An error, as all the protocols have it; the text may have anything of the request in it."""
    if status == 429:
        headers = {"Retry-After": "1", **(headers or {})}
    return json_response({"error": text.encode("utf-8", "replace").decode()}, status, headers)


class PathRoute(BaseRoute):
    """A route whose whole path, as it came, matches a regular expression; its groups are the path's parameters.

    Starlette's own routes see the unquoted path, in which a name's ``/`` cannot be told from another.
    """

    def __init__(self, method: str, pattern: str, endpoint: Callable[[Request], Awaitable[Response]]) -> None:
        self.method, self._endpoint = method, endpoint
        self.parameters = functools.partial(_parameters, re.compile(pattern))

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Whether a request is for this route, or would be with another method."""
        if scope["type"] != "http":
            return Match.NONE, {}
        parameters = self.parameters(raw_path(scope))
        if parameters is None:
            return Match.NONE, {}
        whole = Match.FULL if not self.method or scope["method"] == self.method else Match.PARTIAL
        return whole, {"path_params": parameters}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or refuses the method."""
        if self.method and scope["method"] != self.method:
            raise HTTPException(405, f"Method not allowed: {scope['method']}", {"Allow": self.method})
        await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


@dataclasses.dataclass(slots=True)
class Incoming:
    """A request, as much of it as a call needs.

    Attributes:
      parameters: of the path.
      headers: by their names in lower case.
      receive: gives ASGI's messages with the body.
    """

    parameters: Mapping[str, str]
    headers: Mapping[bytes, bytes]
    receive: Receive


@dataclasses.dataclass(slots=True)
class Answer:
    """What a call gives.

    Attributes:
      body: of the response.
      headers: beside its length.
    """

    body: bytes
    headers: list[tuple[bytes, bytes]]

    async def send(self, send: Send) -> None:
        """Sends it."""
        headers = [*self.headers, (b"content-length", b"%d" % len(self.body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


class CallRoute(PathRoute):
    """A route to a call, which goes without Starlette where it can.

    Attributes:
      parameters: gives a path's, or None where the route is for others.
      call: answers.
    """

    def __init__(self, pattern: str, call: Callable[[Incoming], Awaitable[Answer]]) -> None:
        self.method, self.call = "POST", call
        self.parameters = functools.partial(_parameters, re.compile(pattern))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self.call(Incoming(scope["path_params"], dict(scope["headers"]), receive))
        await answer.send(send)


def _parameters(pattern: re.Pattern[str], path: str) -> Mapping[str, str] | None:
    """A path's parameters; None where it does not match."""
    return (_short_parameters if len(path) <= _SHORT else _all_parameters)(pattern, path)


def _all_parameters(pattern: re.Pattern[str], path: str) -> Mapping[str, str] | None:
    found = pattern.fullmatch(path)
    return found and {name: _unquoted(text) for name, text in found.groupdict().items() if text is not None}


_short_parameters = functools.lru_cache(1024)(_all_parameters)  # clients ask the same paths again and again


def raw_path(scope: Scope) -> str:
    """The path as the client sent it, below where the application is mounted."""
    raw = scope.get("raw_path")
    path: str = raw.decode("latin-1") if raw else scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _unquoted(text: str) -> str:
    try:
        return unquote_to_bytes(text.encode("latin-1")).decode()
    except UnicodeDecodeError:
        raise HTTPException(400, "The path is no UTF-8.") from None


class Service:
    """What answers requests: a repository, within limits.

    Attributes:
      repository: the models.
      limits: what clients may take.
      buffered: bytes of bodies that are held.
    """

    def __init__(self, repository: Repository, limits: Limits) -> None:
        self.repository, self.limits = repository, limits
        self._pool = concurrent.futures.ThreadPoolExecutor(limits.threads, "obmlite-call")
        self.buffered = 0
        self._running = 0
        self._seconds: OrderedDict[Hashable, float] = OrderedDict()

    def close(self) -> None:
        """Ends the threads; nobody waits for their calls any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def body(self, headers: Mapping[bytes, bytes], receive: Receive) -> Body:
        """A request's body, for an ``async with`` block; it counts against the limits until the block ends.

        Raises:
          HTTPException: 400, 408, 413, 415 or 429.
        """
        return Body(self, headers, receive)

    async def run(
        self,
        size: int,
        read: Callable[[], D],
        key: Callable[[D], Hashable],
        call: Callable[[D], T],
        *,
        waits: bool = False,
    ) -> T:
        """Reads a request and answers it, on the event loop or in a thread.

        Args:
          size: bytes of JSON in the body.
          read: gives what the body says.
          key: of calls that take about the same time; not known before.
          call: answers it.
          waits: whether the call waits for others, and so is never the event loop's.
        """
        if size > _LARGE_BODY:
            return await self.in_thread(lambda: call(read()))
        given = read()
        of = key(given)
        if not waits and self._seconds.get(of, _QUICK) < _QUICK:
            return self._timed(of, call, given)
        return await self.in_thread(lambda: self._timed(of, call, given))

    async def in_thread(self, call: Callable[[], T]) -> T:
        """Runs a call beside the event loop.

        Raises:
          ServingError: too many run already.
        """
        if self._running >= self.limits.requests:
            raise ServingError(Code.RESOURCE_EXHAUSTED, f"Too many requests at once: {self._running}.")
        self._running += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, call)
        finally:
            self._running -= 1

    def _timed(self, key: Hashable, call: Callable[[D], T], given: D) -> T:
        begun = time.perf_counter()
        result = call(given)
        seconds = time.perf_counter() - begun
        # Near the shortest of the last ones: in a thread a call may wait for others longer than it takes.
        self._seconds[key] = min(seconds, 1.25 * self._seconds.pop(key, seconds))
        if len(self._seconds) > _KEPT:
            with contextlib.suppress(KeyError):  # another thread may be here too
                self._seconds.popitem(last=False)
        return result


class Body:
    """A request's body while it is worked on."""

    def __init__(self, service: Service, headers: Mapping[bytes, bytes], receive: Receive) -> None:
        self._service, self._headers, self._receive, self._held = service, headers, receive, 0

    async def __aenter__(self) -> bytes:
        limits, headers = self._service.limits, self._headers
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > limits.body_bytes):
            raise _too_large(limits.body_bytes)
        try:
            body = await _within(limits.body_seconds, self._read(limits))
            coding = headers.get(b"content-encoding", b"identity").decode("latin-1").lower()
            if coding != "identity":
                packed = body
                body = await self._service.in_thread(lambda: _unpacked(packed, coding, limits.body_bytes))
                self._hold(len(body))
        except TimeoutError:
            self._release()
            text = f"The body did not arrive within {limits.body_seconds:g} seconds."
            raise HTTPException(408, text, {"Connection": "close"}) from None
        except BaseException:
            self._release()
            raise
        return body

    async def __aexit__(self, *_: object) -> None:
        self._release()

    def _hold(self, count: int) -> None:
        self._held += count
        self._service.buffered += count
        if self._service.buffered > self._service.limits.buffered_bytes:
            raise HTTPException(429, "Too many bytes of requests are being read.")

    def _release(self) -> None:
        self._service.buffered -= self._held
        self._held = 0

    async def _read(self, limits: Limits) -> bytes:
        chunks: list[bytes] = []
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise HTTPException(400, "The body is not complete.")
            chunk, more = message.get("body", b""), message.get("more_body", False)
            self._hold(len(chunk))
            if self._held > limits.body_bytes:
                raise _too_large(limits.body_bytes)
            if chunk:
                chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)


@types.coroutine
def _within(seconds: float, work: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """What a coroutine gives within a time.

    A body is mostly there with its head, and ``asyncio.timeout`` takes a third as long as a small model's call: time
    is kept only once the coroutine has to wait.

    Raises:
      TimeoutError: it takes longer.
    """
    try:
        awaited = work.send(None)
    except StopIteration as done:
        found: T = done.value
        return found
    return (yield from _timed(seconds, work, awaited))


def _timed(seconds: float, work: Coroutine[Any, Any, T], awaited: Any) -> Generator[Any, Any, T]:
    task, late = asyncio.current_task(), False
    assert task is not None

    def end() -> None:
        nonlocal late
        late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, end)
    try:
        while True:
            try:
                step = functools.partial(work.send, (yield awaited))
            except BaseException as error:  # noqa: BLE001 - is the coroutine's
                step = functools.partial(work.throw, error)
            awaited = step()
    except StopIteration as done:
        found: T = done.value
        return found
    except asyncio.CancelledError:
        if not late or task.uncancel():  # others want it to end, too
            raise
        raise TimeoutError from None
    finally:
        work.close()
        timer.cancel()


def _too_large(largest: int) -> HTTPException:
    return HTTPException(413, f"The body is larger than {largest} bytes.")


def _unpacked(body: bytes, coding: str, largest: int) -> bytes:
    """A compressed body, within the same limit."""
    if coding not in ("gzip", "deflate"):
        raise HTTPException(415, f"Content-Encoding {coding[:40]!r} is not known; gzip, deflate or none is.")
    machine = zlib.decompressobj(zlib.MAX_WBITS | (16 if coding == "gzip" else 0))
    try:
        data = machine.decompress(body, largest + 1)
    except zlib.error:
        raise HTTPException(400, f"The body is no {coding}.") from None
    if len(data) > largest:
        raise _too_large(largest)
    if not machine.eof or machine.unused_data:
        raise HTTPException(400, f"The body is no whole {coding}.")
    return data
