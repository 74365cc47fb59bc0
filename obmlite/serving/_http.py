"""Uvicorn's HTTP/1.1 protocol, strict about clients that are slow, stop halfway, or speak no HTTP.

Uvicorn answers what is no HTTP in plain text, waits for ever for a request's head, however long it gets, and forgets
the body of a request that offers another protocol, as Java's client does. Here each of them is told what was wrong, as
JSON, and an offer is passed over. What llhttp lets pass and proxies read in several ways is refused: a second host,
codings of a body beside ``chunked``, trailers as headers.

The class overrides methods of ``uvicorn.protocols.http.httptools_impl.HttpToolsProtocol`` that Uvicorn's documentation
does not name, seen so in 0.35 to 0.54.
"""

from __future__ import annotations

import asyncio
import enum
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from obmlite.serving import _json

__all__ = ["protocol"]

_LARGEST = 64 << 10
"""Bytes of a head, and of whatever else comes without being a body's."""

_QUEUED = 64
"""Requests that may wait on a connection for the one that is answered."""

_PHRASES = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


def protocol(head_seconds: float) -> type[asyncio.Protocol]:
    """The class for Uvicorn's ``http=``.

    Args:
      head_seconds: in which a request's line and headers have to arrive, and what is left of a body that was refused.
    """
    return type("JsonProtocol", (_JsonProtocol,), {"head_seconds": head_seconds})


class _State(enum.Enum):
    IDLE = enum.auto()  # between requests
    HEAD = enum.auto()
    BODY = enum.auto()
    OVER = enum.auto()  # nothing is read any more


class _RefusedError(Exception):
    """What is wrong with a head; llhttp's parser takes it for a failure of its callback."""

    def __init__(self, status: int, text: str) -> None:
        self.status, self.text = status, text


class _JsonProtocol(HttpToolsProtocol):
    head_seconds = 10.0
    _deadline: asyncio.TimerHandle | None = None
    _state = _State.IDLE
    _progress = False  # whether a head, a part of a body or a request became complete
    _behind = 0  # bytes since then
    _problem: _RefusedError | None = None
    cycle: Any  # of the last request whose head is complete; None before the first

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._state is _State.OVER:
            return
        self._unset_keepalive_if_required()
        self._progress = False
        try:
            self._feed(data)
        except httptools.HttpParserError:
            problem = self._problem or _RefusedError(400, "Invalid HTTP request received.")
            self._refuse(problem.status, problem.text)
            return
        self._behind = 0 if self._progress else self._behind + len(data)
        if self._behind > _LARGEST:
            self._refuse(431, _too_large())
        elif self._state is _State.HEAD or not self._progress or self._is_left():
            self._watch()
        else:
            self._unwatch()

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as found:
                # llhttp is done with the connection. Another one reads the same head without the offer, and goes on.
                line = b"%b %b HTTP/1.1\r\n" % (self.parser.get_method(), self.url)
                head = b"".join(b"%b: %b\r\n" % pair for pair in self.headers if pair[0] != b"upgrade")
                data = b"".join((line, head, b"\r\n", data[found.args[0] :]))
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as Uvicorn has it
            else:
                return

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client will send no more: what it began is not complete, what it completed is answered yet."""
        if self._state in (_State.HEAD, _State.BODY):
            self._refuse(400, "The request is not complete.")
            return True
        return self._is_busy()

    # --- what the parser finds

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._state = _State.HEAD

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._state is _State.HEAD:  # behind a body they are trailers, for which nobody waits
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        try:
            self._check_head()
        except _RefusedError as problem:
            self._problem = problem
            raise
        if self.parser.should_upgrade():
            return  # to be read again
        super().on_headers_complete()
        self.cycle.transport = _Joined(self.transport, self.cycle)  # the application runs later
        self._state, self._progress = _State.BODY, True

    def _check_head(self) -> None:
        hosts = codings = size = 0
        for name, value in self.headers:
            size += len(name) + len(value) + 4  # as it is written
            if name == b"host":
                hosts += 1
            elif name == b"transfer-encoding":
                codings += 1
                if codings > 1 or value.lower() != b"chunked":
                    raise _RefusedError(400, "Transfer-Encoding is something else than chunked.")
        version = self.parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise _RefusedError(400, f"HTTP/{version} is not spoken here; HTTP/1.1 is.")
        if hosts > 1 or (not hosts and version == "1.1"):
            raise _RefusedError(400, "The request does not name one Host.")
        if codings and version == "1.0":
            raise _RefusedError(400, "HTTP/1.0 has no Transfer-Encoding.")
        if self.parser.get_method() == b"CONNECT":
            raise _RefusedError(400, "This is no proxy.")
        if size + len(self.url) > _LARGEST:
            raise _RefusedError(431, _too_large())
        if len(self.pipeline) >= _QUEUED:
            raise _RefusedError(400, "Too many requests are sent ahead.")

    def on_body(self, body: bytes) -> None:
        self._progress = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._state is _State.BODY:
            super().on_message_complete()
            self._state, self._progress = _State.IDLE, True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_left():
            self._watch()

    # --- refusing

    def _is_busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _is_left(self) -> bool:
        """Whether a body is still coming whose request was answered."""
        return self._state is _State.BODY and not self._is_busy()

    def _refuse(self, status: int, text: str) -> None:
        """Answers in place of the application, which is told that the client is gone."""
        self._unwatch()
        state, self._state = self._state, _State.OVER
        if self._is_busy() and state is not _State.BODY:
            self.cycle.keep_alive = False  # those before it are answered yet, and the connection ends with the last
            return
        answered = state is _State.BODY and (self.cycle.response_started or bool(self.pipeline))
        if self._is_busy():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not answered and not self.transport.is_closing():
            body = _json.dumps({"error": text})
            head = (
                b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head % (status, _PHRASES[status], len(body)) + body)
        self.transport.close()

    # --- the time that a head may take

    def _watch(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.head_seconds, self._too_slow)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self._is_busy():
            self._watch()  # until it is answered the client may not be read from; for its body the application waits
        elif self._state is _State.HEAD:
            self._refuse(408, f"The request did not arrive within {self.head_seconds:g} seconds.")
        else:
            self.transport.close()


class _Joined:
    """A transport for one answer, whose head goes out with the beginning of its body: to send is what takes long.

    It has what ``RequestResponseCycle`` asks of a transport.
    """

    __slots__ = ("_cycle", "_held", "_transport", "is_closing")

    def __init__(self, transport: Any, cycle: Any) -> None:
        self._transport, self._cycle = transport, cycle
        self._held: bytes | None = None  # the head; empty once it is sent
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if self._held is None and self._cycle.response_started and self._cycle.scope["method"] != "HEAD":
            self._held = data
            return
        if self._held:
            data, self._held = self._held + data, b""
        self._transport.write(data)

    def close(self) -> None:
        if self._held:
            self._transport.write(self._held)
        self._transport.close()


def _too_large() -> str:
    return f"The request's line and headers are larger than {_LARGEST} bytes."
