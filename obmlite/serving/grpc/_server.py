"""The server: gRPC's own, with our methods, limits and a graceful end."""

from __future__ import annotations

import concurrent.futures
import os
from typing import Any

import grpc

from obmlite.errors import ArgumentError
from obmlite.serving.grpc._methods import Answered, handler
from obmlite.serving.grpc._open_inference import OpenInference
from obmlite.serving.grpc._tensorflow_serving import TensorFlowServing
from obmlite.serving.repository import Repository

__all__ = ["MAX_MESSAGE_BYTES", "Server", "serve"]

MAX_MESSAGE_BYTES = 64 << 20
"""The largest request that is taken, unless another is asked for."""


class Server:
    """A server that runs; made by :func:`serve`.

    Attributes:
      address: where it listens, such as ``"127.0.0.1:8500"``.
      port: the port of it.
    """

    def __init__(self, server: Any, pool: concurrent.futures.Executor, address: str, port: int) -> None:
        self._server = server
        self._pool = pool
        self.address = address
        self.port = port

    def stop(self, grace: float | None = None) -> None:
        """Takes no more requests, and waits for those in flight.

        Args:
          grace: seconds after which those still in flight are cancelled; None for at once.
        """
        self._server.stop(grace).wait()
        self._pool.shutdown(wait=False)

    def wait(self) -> None:
        """Waits until it is stopped."""
        self._server.wait_for_termination()


def serve(
    repository: Repository,
    address: str = "127.0.0.1:8500",
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    threads: int | None = None,
    max_requests: int = 256,
    credentials: Any = None,
    answered: Answered | None = None,
) -> Server:
    """Serves a repository by gRPC, from threads of its own, until it is stopped.

    Args:
      repository: what is served; it is started and stopped by whoever made it.
      address: host and port; port 0 for any that is free. Loopback unless it says otherwise.
      max_message_bytes: of a request, and of all its inputs when they are written out; larger ones get
        RESOURCE_EXHAUSTED or INVALID_ARGUMENT. Answers are as large as they are.
      threads: requests that are worked on at a time; by default as many as there are processors, and at least 4.
      max_requests: requests that are worked on or wait, and are held in memory; one beyond them gets
        RESOURCE_EXHAUSTED.
      credentials: ``grpc.ssl_server_credentials(…)`` for TLS; None for none.
      answered: is told of each request that was answered; a Metrics' method of this name.

    Raises:
      ArgumentError: it cannot listen there.
    """
    pool = concurrent.futures.ThreadPoolExecutor(threads or max(4, os.cpu_count() or 1), "obmlite-grpc")
    server = grpc.server(
        pool,
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # a port that another server has is an error, not half of its requests
        ],
        maximum_concurrent_rpcs=max_requests,
    )
    for protocol in (TensorFlowServing, OpenInference):
        for service, methods in protocol(repository, max_message_bytes, answered).services().items():
            handlers = {name: handler(method) for name, method in methods.items()}
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ArgumentError(
            "The gRPC server cannot listen at its address.",
            field="address",
            found=address,
            expected="a host of this machine and a port that is free",
        ) from error
    server.start()
    host, _, asked = address.rpartition(":")
    return Server(server, pool, f"{host}:{port}" if asked == "0" else address, port)
