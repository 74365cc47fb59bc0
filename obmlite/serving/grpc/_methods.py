"""From a method of a protocol, message to message, to a handler of gRPC's."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from obmlite.errors import ObmliteError
from obmlite.serving.repository import Repository
from obmlite.serving.status import Code, ServingError

__all__ = ["Answered", "Method", "Methods", "handler"]

Answered: TypeAlias = Callable[[str, str, str, float], None]
"""Is told of a request that was answered: the model, what was asked of it, by which way, and the seconds it took."""


_TEXT = 2000
"""Bytes of an error's text: it travels as a header, escaped to three times that, and clients take 8 KiB of headers."""

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of a service.

    Attributes:
      kind: the class of its requests.
      run: a request and the seconds that are left for it (None: any number) to the answer; raises ServingError.
    """

    kind: Any
    run: Callable[[Any, float | None], Any]

    def __call__(self, data: bytes, timeout: float | None = None) -> bytes:
        """The answer's bytes to a request's.

        Raises:
          ServingError: INVALID_ARGUMENT, the bytes are no such request; and what the method raises.
        """
        try:
            request = self.kind.FromString(data)
        except DecodeError as error:
            raise ServingError(Code.INVALID_ARGUMENT, f"The request is no {self.kind.DESCRIPTOR.name}.") from error
        return bytes(self.run(request, timeout).SerializeToString())


class Methods:
    """What the methods of a protocol have in common.

    Args:
      repository: what is served.
      limit: bytes that the inputs of a request may take.
      answered: is told of answers: model, what was asked of it, ``"GRPC"``, seconds.
    """

    def __init__(self, repository: Repository, limit: int, answered: Answered | None = None) -> None:
        self._repository = repository
        self._limit = limit
        self._answered = answered


def handler(method: Method) -> Any:
    """A method as gRPC calls it.

    Bytes are not made into messages by gRPC itself, whose answer to malformed ones is INTERNAL.
    """

    def call(data: bytes, context: Any) -> bytes:
        if not context.is_active():  # the client gave up while the request waited for a thread
            context.abort(grpc.StatusCode.CANCELLED, "The client went away.")
        try:
            return method(data, context.time_remaining())
        except ServingError as error:
            failure = error
        except ObmliteError as error:
            failure = ServingError.of(error)
        except Exception:  # noqa: BLE001 - a client is told nothing of what this process is made of
            _LOG.exception("A request failed.")
            failure = ServingError(Code.INTERNAL, "Internal error.")
        text = str(failure).encode()[:_TEXT].decode(errors="ignore")
        context.abort(_CODES[failure.code.value], text)
        raise AssertionError("abort raises")

    return grpc.unary_unary_rpc_method_handler(call)
