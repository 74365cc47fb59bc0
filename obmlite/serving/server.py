"""A server: the REST application under Uvicorn and, if asked for, gRPC beside it, until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

try:
    import uvicorn
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("REST needs the extra `serve`: pip install 'obmlite[serve]'", name=error.name) from error

from obmlite.errors import ArgumentError
from obmlite.serving._http import protocol
from obmlite.serving.asgi import Limits, build_app
from obmlite.serving.metrics import Metrics
from obmlite.serving.repository import Repository

__all__ = ["LOOPBACK", "Server"]

LOOPBACK = "127.0.0.1"

_GRACE = 30.0


class Server:
    """Serves a repository over HTTP and gRPC.

    Blocking, as a program of its own: ``Server(repository).run()``. In a thread beside others, until the block ends::

        with Server(repository, port=0) as server:
            print(server.url)

    The repository is started with the server, if it is not yet, and stopped with it.
    """

    def __init__(
        self,
        repository: Repository,
        *,
        host: str = LOOPBACK,
        port: int = 8501,
        grpc_port: int | None = None,
        limits: Limits | None = None,
        cors: Sequence[str] = (),
        page: bool = True,
        grace: float = _GRACE,
    ) -> None:
        """Binds the addresses; nothing is answered yet.

        Args:
          repository: what is served.
          host: address to listen at. Nobody is asked who they are: the default lets in this machine's processes alone.
          port: of HTTP; 0 for any that is free.
          grpc_port: of gRPC; None for no gRPC.
          limits: what clients may take.
          cors: as for :func:`obmlite.serving.asgi.build_app`.
          page: whether there is a page at ``/``.
          grace: seconds that requests may take to end after the server was told to stop.

        Raises:
          ArgumentError: an address cannot be had, or what gRPC needs is not installed.
        """
        self.repository = repository
        self._grpc_port, self._grace = grpc_port, grace
        self._grpc: Any = None
        if grpc_port is not None:
            _grpc()
        self._limits = limits = limits or Limits()
        self._metrics = Metrics()
        repository.observe(self._metrics)
        app = build_app(repository, limits=limits, cors=cors, metrics=self._metrics, page=page)
        self._socket = _bound(host, port)
        self._name: tuple[str, int] = self._socket.getsockname()[:2]
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                http=protocol(limits.head_seconds),
                ws="none",
                lifespan="on",
                access_log=False,
                log_config=None,  # how a program logs is its own matter
                log_level="error",  # below it, each line that is no HTTP
                server_header=False,
                proxy_headers=False,  # nobody asks where a request is from
                timeout_graceful_shutdown=max(1, int(grace)),
                timeout_keep_alive=75,
            )
        )
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def url(self) -> str:
        """Of the REST application."""
        return f"http://{_address(*self._name)}"

    @property
    def grpc_address(self) -> str | None:
        """Of gRPC; None without it, and before it runs."""
        return None if self._grpc is None else str(self._grpc.address)

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serves until a signal (SIGINT, SIGTERM) or :meth:`stop` ends it; requests that are under way are finished.

        Args:
          ready: is called once requests are answered.

        Raises:
          ArgumentError: gRPC cannot listen at its address.
        """
        with self._socket, _signals(self.stop):
            try:
                self.repository.start()
                if self._grpc_port is not None:
                    self._grpc = _grpc().serve(
                        self.repository,
                        _address(self._name[0], self._grpc_port),
                        max_message_bytes=self._limits.body_bytes,
                        max_requests=self._limits.requests,
                        answered=self._metrics.answered,
                    )
                    self._uvicorn.last = functools.partial(self._grpc.stop, self._grace)
                self._uvicorn.first = ready
                self._uvicorn.run(sockets=[self._socket])
            finally:
                if self._grpc is not None:
                    self._grpc.stop(self._grace)
                self.repository.stop()

    def stop(self) -> None:
        """Tells it to stop, from any thread."""
        self._uvicorn.should_exit = True

    def __enter__(self) -> Server:
        self._thread = threading.Thread(target=self._run_apart, name="obmlite-server", daemon=True)
        self._thread.start()
        while not self._uvicorn.started and self._thread.is_alive():
            self._thread.join(0.005)
        if self._error is not None:
            raise self._error
        return self

    def _run_apart(self) -> None:
        try:
            self.run()
        except Exception as error:  # noqa: BLE001 - raised where the server was entered
            self._error = error

    def __exit__(self, *_: object) -> None:
        assert self._thread is not None
        self.stop()
        self._thread.join()


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ArgumentError(
            "The server cannot listen there.",
            field="host and port",
            expected="an address of this machine and a free port",
            found=f"{_address(host, port)}: {error.strerror or error}",
        ) from error


def _grpc() -> Any:
    try:
        return importlib.import_module("obmlite.serving.grpc")
    except ImportError as error:
        raise ArgumentError(
            "Serving over gRPC needs what is not installed.",
            expected="the extra grpc",
            found=str(error),
            fix='pip install "obmlite[grpc]", or serve without gRPC',
        ) from error


class _Uvicorn(uvicorn.Server):
    """Uvicorn with something to do when it has started and when it is told to stop."""

    first: Callable[[], None] = staticmethod(lambda: None)
    last: Callable[[], None] = staticmethod(lambda: None)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.first()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.get_running_loop().run_in_executor(None, self.last)  # both protocols end at once
        await super().shutdown(sockets)
        await ending


@contextlib.contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Has signals stop the server before Uvicorn takes them, and after.

    Uvicorn raises the one that stopped it once more, and the process would end before all is put away.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stop()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
