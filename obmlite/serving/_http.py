"""Uvicorn's HTTP/1.1 protocol, strict about clients that are slow, stop halfway, or speak no HTTP.

Uvicorn answers what is no HTTP in plain text, waits for ever for a request's head, and drops a connection whose client
closes its half of it. Here each of them is told what was wrong, as JSON. The class overrides methods of
``uvicorn.protocols.http.h11_impl.H11Protocol`` that Uvicorn's documentation does not name, seen so in 0.35 to 0.54.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from obmlite.serving import _json

__all__ = ["protocol"]


def protocol(head_seconds: float) -> type[asyncio.Protocol]:
    """The class for Uvicorn's ``http=``.

    Args:
      head_seconds: in which a request's line and headers have to arrive, and what is left of a body that was refused.
    """
    return type("JsonProtocol", (_JsonProtocol,), {"head_seconds": head_seconds})


class _JsonProtocol(H11Protocol):
    head_seconds = 10.0
    _deadline: asyncio.TimerHandle | None = None
    cycle: Any  # None before the first request

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE or (
            self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        ):
            self._watch()
        else:
            self._unwatch()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client will send no more: what it began is not complete, what it completed is answered yet."""
        if self._is_halfway():
            self._refuse(400, "The request is not complete.")
            return True
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _is_halfway(self) -> bool:
        if self.conn.their_state is h11.IDLE:
            return bool(self.conn.trailing_data[0])
        return self.conn.their_state is h11.SEND_BODY

    def _refuse(self, status: int, text: str) -> None:
        """Answers in place of the application, which is told that the client is gone."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not self.transport.is_closing() and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = _json.dumps({"error": text})
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            events = (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage())
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
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
        if self._is_halfway():
            self._refuse(408, f"The request did not arrive within {self.head_seconds:g} seconds.")
        elif self.conn.their_state is h11.IDLE:
            self.transport.close()
