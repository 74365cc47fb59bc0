"""How fast requests are answered, beside the call alone, a server that does nothing, and KServe's.

``python -m benchmarks.serving`` prints the tables of docs/benchmarks.md, section Serving. It runs on Linux, which it
asks what processes used.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import obmlite
from benchmarks import report
from benchmarks.servers import NAME, SIZES, save
from tests import versions

BATCHES, FORMATS, CONNECTIONS = (1, 128), ("JSON", "binary"), (1, 8)

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_TICK = os.sysconf("SC_CLK_TCK")
_CALL, _ALONE = "call", "call and JSON"
_TITLES = {
    _CALL: "the call",
    _ALONE: "the call and its JSON",
    "echo": "echo",
    "bare": "echo with the call in it",
    "obmlite": "**obmlite**",
    "kserve": "KServe",
}
_SERVERS = {"obmlite": "obmlite", "echo": "starlette", "bare": "starlette", "kserve": "kserve"}
"""Contender → the server that it asks."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Requests of one kind."""

    batch: int
    form: str
    connections: int

    def __str__(self) -> str:
        many = "one connection" if self.connections == 1 else f"{self.connections} connections"
        return f"batch {self.batch}, {self.form}, {many}"

    def body(self) -> tuple[str, bytes, dict[str, str]]:
        """Path, body and headers of a request."""
        x = np.random.default_rng(self.batch).random((self.batch, SIZES[0]), np.float32)
        if self.form == "JSON":
            body = json.dumps({"instances": x.tolist()}).encode()
            return f"/v1/models/{NAME}:predict", body, {"Content-Type": "application/json"}
        tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
        return f"/v2/models/{NAME}/infer", head + x.tobytes(), headers


CASES = [Case(batch, form, many) for batch in BATCHES for form in FORMATS for many in CONNECTIONS]


@dataclasses.dataclass
class Figures:
    """What one contender did in one case, in seconds, over all rounds."""

    p50: list[float] = dataclasses.field(default_factory=list)
    p99: list[float] = dataclasses.field(default_factory=list)
    each: list[float] = dataclasses.field(default_factory=list)  # time over requests, of all connections
    cpu: list[float] = dataclasses.field(default_factory=list)  # of the server, for each request

    def add(self, latencies: Sequence[float], seconds: float, cpu: float) -> None:
        """Adds a round."""
        p50, p99 = np.percentile(latencies, [50, 99])
        self.p50.append(float(p50))
        self.p99.append(float(p99))
        self.each.append(seconds / len(latencies))
        self.cpu.append(cpu / len(latencies))


# --- a client


class Connection:
    """A connection that is kept, and asks the same over it."""

    def __init__(self, port: int, path: str, body: bytes, headers: dict[str, str]) -> None:
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._request = "\r\n".join([*lines, "", ""]).encode() + body
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        self._socket.close()

    def ask(self) -> bytes:
        """The body of the answer."""
        self._socket.sendall(self._request)
        data = self._socket.recv(1 << 20)
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self._more()
        head = data[:end].lower()
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(data[:500].decode())
        size = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        while len(data) < end + 4 + size:
            data += self._more()
        return data[end + 4 :]

    def _more(self) -> bytes:
        data = self._socket.recv(1 << 20)
        if not data:
            raise RuntimeError("The server closed the connection.")
        return data


def load(connections: Sequence[Connection], seconds: float) -> tuple[list[float], float]:
    """Asks over all connections at once, and over each again and again: how long each took, and all of it."""
    latencies: list[list[float]] = [[] for _ in connections]
    barrier = threading.Barrier(len(connections))

    def run(connection: Connection, own: list[float]) -> None:
        barrier.wait()
        begun = before = time.perf_counter()
        while before < begun + seconds:
            connection.ask()
            now = time.perf_counter()
            own.append(now - before)
            before = now

    threads = [threading.Thread(target=run, args=pair) for pair in zip(connections, latencies, strict=True)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - begun
    if not all(latencies):
        raise RuntimeError("A connection failed.")
    return [one for own in latencies for one in own], taken


# --- contenders


class Server:
    """A contender's process."""

    def __init__(self, kind: str, python: str, base: str, core: str) -> None:
        command = [python, "-m", "benchmarks.servers", kind, base, core]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=_ROOT, env=environment, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def cpu(self) -> float:
        """Seconds of processors that it has used."""
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def answer(self, path: str, body: bytes, headers: dict[str, str], seconds: float = 120) -> bytes:
        """The first answer, for which it may have to load."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                with contextlib.closing(Connection(self.port, path, body, headers)) as connection:
                    return connection.ask()
            except (OSError, RuntimeError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


def peer(server: str) -> str:
    """The Python that a server is run by: KServe has an environment of its own, which is made if it is not there."""
    if server != "kserve":
        return sys.executable
    [run] = [run for run in versions.runs()[0] if run.name == "serving"]
    if not run.python.exists():
        versions.prepare(run)
    return str(run.python)


def calls(base: str) -> Iterator[tuple[str, int, str, Callable[[], Any]]]:
    """What is compared with the servers, in this process: name, batch, form and call."""
    import orjson

    model = obmlite.load(pathlib.Path(base) / "1")
    for batch in BATCHES:
        x = np.random.default_rng(batch).random((batch, SIZES[0]), np.float32)
        text = json.dumps({"instances": x.tolist()}).encode()

        def call(x: Any = x) -> Any:
            return np.asarray(model(x))

        def with_json(text: bytes = text) -> bytes:
            value = np.asarray(orjson.loads(text)["instances"], np.float32)
            return orjson.dumps({"predictions": np.asarray(model(value))}, option=orjson.OPT_SERIALIZE_NUMPY)

        for form in FORMATS:
            yield _CALL, batch, form, call
        yield _ALONE, batch, "JSON", with_json


def repeat(call: Callable[[], Any], seconds: float) -> tuple[list[float], float, float]:
    """How long each call took, all of them, and of the processors."""
    latencies = []
    begun, cpu = time.perf_counter(), time.process_time()
    before = begun
    while before < begun + seconds:
        call()
        now = time.perf_counter()
        latencies.append(now - before)
        before = now
    return latencies, before - begun, time.process_time() - cpu


def asked(
    server: Server, connections: int, request: tuple[str, bytes, dict[str, str]], seconds: float
) -> tuple[list[float], float, float]:
    """The same of a server's answers; of the processors, what the server used."""
    server.answer(*request)
    with contextlib.ExitStack() as opened:
        made = [opened.enter_context(contextlib.closing(Connection(server.port, *request))) for _ in range(connections)]
        load(made, seconds / 4)  # not counted
        cpu = server.cpu()
        latencies, taken = load(made, seconds)
        return latencies, taken, server.cpu() - cpu


# --- all of it


def measure(kinds: Sequence[str], rounds: int, seconds: float, cores: Sequence[int]) -> dict[Case, dict[str, Figures]]:
    """The figures: in each round each contender in each case, one after another."""
    server_core, own_core = (str(cores[0]), {cores[1]}) if len(cores) > 1 else ("", set(cores))
    os.sched_setaffinity(0, own_core)
    found: dict[Case, dict[str, Figures]] = {case: {} for case in CASES}
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(tempfile.TemporaryDirectory())
        save(base)
        started = {
            server: stack.enter_context(contextlib.closing(Server(server, peer(server), base, server_core)))
            for server in dict.fromkeys(_SERVERS[kind] for kind in kinds)
        }
        servers = {kind: started[_SERVERS[kind]] for kind in kinds}
        requests = {case: case.body() for case in CASES}
        sizes = {case: len(servers["obmlite"].answer(*request)) for case, request in requests.items()}
        for number in range(rounds):
            for name, batch, form, call in calls(base):
                call()
                figures = repeat(call, seconds / 4)
                for case in CASES:
                    if (case.batch, case.form) == (batch, form):
                        found[case].setdefault(name, Figures()).add(*figures)
            for case, (path, body, headers) in requests.items():
                for kind in [*kinds[number % len(kinds) :], *kinds[: number % len(kinds)]]:
                    request = (f"/{sizes[case]}" if kind == "echo" else path, body, headers)
                    figures = found[case].setdefault(kind, Figures())
                    figures.add(*asked(servers[kind], case.connections, request, seconds))
                print(f"round {number + 1}, {case}", file=sys.stderr, flush=True)
    return found


def table(found: dict[Case, dict[str, Figures]]) -> str:
    """The figures as Markdown: of each the median over all rounds."""
    kinds = [kind for kind in _TITLES if any(kind in figures for figures in found.values())]
    middle = statistics.median
    tables: list[tuple[str, Callable[[Figures], str]]] = [
        ("p50 / p99", lambda f: f"{_time(middle(f.p50))} / {_time(middle(f.p99))}"),
        ("requests per second", lambda f: f"{1 / middle(f.each):,.0f}"),
        ("processor time of the server, each", lambda f: _time(middle(f.cpu))),
    ]
    lines = []
    for title, cell in tables:
        rows = {
            case: [cell(figures[kind]) if kind in figures else "" for kind in kinds] for case, figures in found.items()
        }
        lines += _markdown(title, [_TITLES[kind] for kind in kinds], rows)
    peers = [kind for kind in ("bare", "kserve") if kind in kinds]
    rows = {}
    for case, figures in found.items():
        others = [("echo", _ALONE if _ALONE in figures else _CALL), *((kind,) for kind in peers)]
        rows[case] = [" / ".join(f"{ratio:.2f}" for ratio in _ratios(figures, each)) for each in others]
    heads = ["echo + the call, its JSON included", *(_TITLES[kind] for kind in peers)]
    lines += _markdown("obmlite's p50 / time per request / processor time, as a multiple of", heads, rows)
    return "\n".join(lines)


def _ratios(figures: dict[str, Figures], others: Sequence[str]) -> Iterator[float]:
    """Of obmlite's p50, time per request and processor time to what others take together."""
    for what in ("p50", "each", "cpu"):
        median = {kind: statistics.median(getattr(own, what)) for kind, own in figures.items()}
        total = sum(median[kind] for kind in others)
        yield median["obmlite"] / total if total else math.nan  # the clock of processor time ticks slowly


def _markdown(title: str, heads: Sequence[str], rows: dict[Case, list[str]]) -> list[str]:
    lines = ["", f"| {title} | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    return [*lines, *(f"| {case} | {' | '.join(cells)} |" for case, cells in rows.items())]


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs" if seconds < 0.01 else f"{seconds * 1e3:,.1f} ms"


def environment() -> str:
    """What it was measured with."""
    found = [report.environment()]
    for package in ("starlette", "uvicorn", "h11", "uvloop", "httptools", "orjson"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def main() -> None:
    """Measures what was asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks.serving", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="of all cases (7)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each contender in each case and round (1)")
    parser.add_argument("--without-kserve", action="store_true", help="whose environment takes minutes to make")
    options = parser.parse_args()
    kinds = [kind for kind in _SERVERS if kind != "kserve" or not options.without_kserve]
    cores = sorted(os.sched_getaffinity(0))
    load_before = os.getloadavg()[0]
    found = measure(kinds, options.rounds, options.seconds, cores)
    print(f"{environment()}; load average {load_before:.1f} before it began.\n{table(found)}")


if __name__ == "__main__":
    main()
