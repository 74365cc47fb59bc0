"""examples/kserve_model.py under KServe's own server, by v1 and v2, REST and gRPC."""

import contextlib
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import grpc
import numpy as np
import pytest

import obmlite
from obmlite.serving.grpc.messages import inference

# KServe is not imported here: its messages and tritonclient's have the same names, and one process holds one of them.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("kserve") is None, reason="KServe is in an environment of its own"
)
EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "kserve_model.py"
X = np.arange(8, dtype=np.float32).reshape(2, 4)
W = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


def save(base, version):
    obmlite.Model.from_function(lambda w, x: x @ w, W * version, obmlite.spec("f32[b,4]")).save(base / str(version))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The directory of versions, and the ports of REST and of gRPC."""
    base = tmp_path_factory.mktemp("dense")
    save(base, 1)
    with socket.socket() as one, socket.socket() as other:
        for own in (one, other):
            own.bind(("127.0.0.1", 0))
        rest, rpc = one.getsockname()[1], other.getsockname()[1]
    command = [EXAMPLE, "--model_name=dense", f"--base={base}", f"--http_port={rest}", f"--grpc_port={rpc}"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1])}
    with (base / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    try:
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError):
                if ask(rest, "/v2/models/dense/ready")[0] == 200:
                    break
            time.sleep(0.2)
        else:
            pytest.fail((base / "log").read_text())
        yield base, rest, rpc
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def ask(port, path, body=None):
    """Status and document."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def expected(base, version):
    return np.asarray(obmlite.load(base / str(version))(X))


def v2(x):
    flat = np.ravel(x).tolist()
    return {"inputs": [{"name": "x", "shape": list(np.shape(x)), "datatype": "FP32", "data": flat}]}


def test_rest(server):
    base, port, _ = server
    status, found = ask(port, "/v1/models/dense:predict", {"instances": X.tolist()})
    assert status == 200, found
    np.testing.assert_array_equal(np.asarray(found["predictions"], np.float32), expected(base, 1))
    status, found = ask(port, "/v2/models/dense/infer", v2(X))
    assert (status, found["model_version"]) == (200, "1"), found
    [output] = found["outputs"]
    np.testing.assert_array_equal(np.asarray(output["data"], np.float32).reshape(output["shape"]), expected(base, 1))
    status, found = ask(port, "/v2/models/dense")
    assert (status, found["inputs"][0]) == (200, {"name": "x", "datatype": "FP32", "shape": [-1, 4]})


def test_errors(server):
    _, port, _ = server
    wanted = {"error": "Input 'x' has another shape: expected f32[b,4], found f32[2,3]."}
    assert ask(port, "/v2/models/dense/infer", v2(X[:, :3])) == (400, wanted)
    assert ask(port, "/v1/models/dense:predict", {"instances": X[:, :3].tolist()}) == (400, wanted)
    status, found = ask(port, "/v1/models/dense:predict", {"instances": [["a"]]})
    assert status == 400
    assert found["error"].startswith("Input 'x' is no f32[b,4]")


def test_grpc_and_a_new_version(server):
    base, _, port = server

    request = inference.ModelInferRequest(model_name="dense", raw_input_contents=[X.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=X.shape)

    def infer():
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            answer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(request.SerializeToString())
        response = inference.ModelInferResponse.FromString(answer)
        [output], [raw] = response.outputs, response.raw_output_contents
        return response.model_version, np.frombuffer(raw, np.float32).reshape(output.shape)

    version, found = infer()
    assert version == "1"
    np.testing.assert_array_equal(found, expected(base, 1))
    save(base, 2)
    end = time.monotonic() + 60
    while version != "2" and time.monotonic() < end:
        time.sleep(0.2)
        version, found = infer()
    np.testing.assert_array_equal(found, expected(base, 2))
