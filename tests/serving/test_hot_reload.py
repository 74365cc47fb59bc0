"""Versions that come while clients ask at full speed, of ``obmlite serve`` in a process of its own, over sockets.

No request may fail, no answer may be of two versions, what is broken may not be served, and of the versions that are
gone no memory may be left.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import itertools
import json
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("grpc")

import grpc

import obmlite
from obmlite.serving.grpc import array, tensor_proto
from obmlite.serving.grpc.messages import tensorflow_serving as tfs
from tests.serving.packages import file_of, flip
from tests.serving.program import Program, ask, until

MIB = 1 << 20
WEIGHTS = 64 * MIB  # of each version
MARGIN = 24 * MIB  # of memory beside one version's, for what allocators keep
ROWS = 3
GOOD, FLIPPED, CUT = (1, 2, 4, 6), 3, 5
LEAST = 5  # answers a second for each client: many more, if the machine does nothing else
PATIENCE = 120.0  # seconds for what takes one, on a machine that does much else

Answer = tuple[int, dict[str, Any]]
"""Which version it says it is of, 0 if it does not, and the outputs by name."""

Send = Callable[[np.ndarray], Answer]


def numbered(number: int) -> obmlite.Model:
    """A model whose answers tell its number by its function, by the first of its weights and by the last."""

    def tell(params: Any, x: Any) -> Any:
        rows, large = x * 0, params["large"]
        return {"function": rows + number, "first": rows + large[0], "last": rows + large[-1], "x": x}

    def total(params: Any, x: Any) -> Any:
        return {"mean": params["large"].mean() + x * 0}

    params = {"large": np.full(WEIGHTS // 4, number, np.float32)}
    objects = {
        fn.__name__: obmlite.export(fn, params, obmlite.spec("f32[b]"), name=fn.__name__, platforms="cpu")
        for fn in (tell, total)
    }
    return obmlite.Model(
        {**objects, "params": obmlite.Weights(params)},
        pipelines={name: obmlite.Pipeline(function=name, weights={"params": "params"}) for name in objects},
        default_pipeline="tell",
    )


# --- clients


def by_row(connection: http.client.HTTPConnection, x: np.ndarray) -> Answer:
    """TensorFlow Serving's REST API."""
    connection.request("POST", "/v1/models/m:predict", json.dumps({"instances": x.tolist()}))
    rows = json.loads(succeeded(connection.getresponse()))["predictions"]
    return 0, {name: [row[name] for row in rows] for name in rows[0]}


def v2(connection: http.client.HTTPConnection, x: np.ndarray) -> Answer:
    """The Open Inference Protocol, in JSON."""
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.tolist()}
    connection.request("POST", "/v2/models/m/infer", json.dumps({"inputs": [tensor]}))
    found = json.loads(succeeded(connection.getresponse()))
    return int(found["model_version"]), {tensor["name"]: tensor["data"] for tensor in found["outputs"]}


def v2_binary(connection: http.client.HTTPConnection, x: np.ndarray) -> Answer:
    """The Open Inference Protocol, in bytes."""
    size = {"binary_data_size": x.nbytes}
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "parameters": size}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    connection.request("POST", "/v2/models/m/infer", head + x.tobytes(), headers)
    reply = connection.getresponse()
    body, split = succeeded(reply), int(reply.headers["Inference-Header-Content-Length"])
    found, outputs = json.loads(body[:split]), {}
    for tensor in found["outputs"]:
        end = split + tensor["parameters"]["binary_data_size"]
        outputs[tensor["name"]] = np.frombuffer(body[split:end], np.float32).tolist()
        split = end
    return int(found["model_version"]), outputs


def succeeded(reply: http.client.HTTPResponse) -> bytes:
    body = reply.read()
    assert reply.status == 200, (reply.status, body)
    return body


def over_grpc(channel: grpc.Channel, x: np.ndarray) -> Answer:
    """TensorFlow Serving's gRPC API."""
    request = tfs.PredictRequest(model_spec=tfs.ModelSpec(name="m"), inputs={"x": tensor_proto(x)})
    predict = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    reply = tfs.PredictResponse.FromString(predict(request.SerializeToString(), timeout=PATIENCE))
    outputs = {name: array(name, proto).tolist() for name, proto in reply.outputs.items()}
    return reply.model_spec.version.value, outputs


class Client:
    """A thread that asks without a pause over one connection, and looks at every answer.

    Attributes:
      name: for people.
      asked: how many answers were good.
      seen: the versions that answered, in their order.
      error: what ended it too early.
    """

    def __init__(self, name: str, send: Send) -> None:
        self.name, self.asked, self.seen = name, 0, [0]
        self.error: BaseException | None = None
        self._send, self._ended = send, threading.Event()
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def _run(self) -> None:
        try:
            for number in itertools.count():
                if self._ended.is_set():
                    break
                self._ask(np.arange(number % 1000, number % 1000 + ROWS, dtype=np.float32))
        except BaseException as error:  # noqa: BLE001 - checked by the test
            self.error = error

    def _ask(self, x: np.ndarray) -> None:
        said, outputs = self._send(x)
        told = {value for name in ("function", "first", "last") for value in outputs[name]}
        assert len(told) == 1, f"an answer of several versions: {outputs}"
        version = int(told.pop())
        assert said in (0, version), f"an answer of version {version} that says {said}"
        assert outputs["x"] == x.tolist()
        assert version >= self.seen[-1], f"version {version} after {self.seen[-1]}"
        if version != self.seen[-1]:
            self.seen.append(version)
        self.asked += 1

    def checked(self) -> Client:
        if self.error is not None:
            raise AssertionError(f"{self.name}, after {self.asked} answers") from self.error
        return self

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


@pytest.fixture
def base(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A base path; hundreds of MiB are not left behind."""
    yield tmp_path / "m"
    shutil.rmtree(tmp_path)


def publish(base: pathlib.Path, number: int) -> None:
    """Saves a version: whole ones in place, as anyone would, others aside."""
    if number in GOOD:
        numbered(number).save(base / str(number))
        return
    aside = base / f".{number}"
    numbered(number).save(aside)
    if number == FLIPPED:
        flip(file_of(aside, "functions"))
    else:
        weights = file_of(aside, "weights")
        os.truncate(weights, weights.stat().st_size // 2)
    os.rename(aside, base / str(number))


def resident(pid: int) -> int:
    """Bytes of memory that a process has, pages of mapped files included."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="memory is read from Linux' /proc")
@pytest.mark.parametrize("seconds", [10, pytest.param(60, marks=pytest.mark.long)])
def test_versions_that_come_under_load(base: pathlib.Path, seconds: int) -> None:
    publish(base, 1)
    with Program(base, "--grpc-port", "0") as program:
        until(lambda: states(program).get(1) == "AVAILABLE", PATIENCE)
        with asking(program) as clients:
            for number in range(1, 7):
                if number > 1:
                    publish(base, number)
                end = time.monotonic() + seconds / 6
                if number in GOOD:
                    until(lambda n=number: all(client.checked().seen[-1] == n for client in clients), PATIENCE)
                else:
                    until(lambda n=number: reason(program, n) != "", PATIENCE)
                until(lambda e=end: all(map(Client.checked, clients)) and time.monotonic() > e)
                if number == 1:
                    use_all(program, number)
                    alone = resident(program.process.pid)
            use_all(program, 6)
            reasons = {number: reason(program, number) for number in (FLIPPED, CUT)}
        assert {client.name: client.checked().seen for client in clients} == {c.name: [0, *GOOD] for c in clients}
        assert all(client.asked >= LEAST * seconds for client in clients), {c.name: c.asked for c in clients}
        assert "digest does not match" in reasons[FLIPPED]
        assert "another length" in reasons[CUT]
        assert [number for number, state in states(program).items() if state == "AVAILABLE"] == [6]
        with contextlib.suppress(AssertionError):  # what is dropped is collected at the next look for versions
            until(lambda: resident(program.process.pid) <= alone + MARGIN, 10)
        left = resident(program.process.pid)
        assert left <= alone + MARGIN, f"{alone / MIB:.0f} MiB with one version, {left / MIB:.0f} MiB after five more"


@contextlib.contextmanager
def asking(program: Program) -> Iterator[list[Client]]:
    """Clients of each protocol, which ask until the block ends."""
    host, port = program.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        clients = []
        for number, send in enumerate((by_row, v2, v2_binary, v2_binary)):
            connection = stack.enter_context(contextlib.closing(http.client.HTTPConnection(host, int(port))))
            clients.append(Client(f"{send.__name__} {number}", functools.partial(send, connection)))
            stack.callback(clients[-1].end)
        channel = stack.enter_context(grpc.insecure_channel(program.grpc_address))
        clients.append(Client("gRPC", functools.partial(over_grpc, channel)))
        stack.callback(clients[-1].end)
        yield clients


def use_all(program: Program, number: int) -> None:
    """Has a version read all of its weights."""
    body = {"signature_name": "total", "inputs": [0.0]}
    assert ask(f"{program.url}/v1/models/m:predict", body) == {"outputs": [float(number)]}


def _statuses(program: Program) -> list[Any]:
    return ask(f"{program.url}/v1/models/m")["model_version_status"]


def states(program: Program) -> dict[int, str]:
    """Version → state."""
    return {int(status["version"]): status["state"] for status in _statuses(program)}


def reason(program: Program, number: int) -> str:
    """Why a version is not served; empty if it is, or is not known yet."""
    found = [s["status"]["error_message"] for s in _statuses(program) if int(s["version"]) == number]
    return found[0] if found else ""
