"""The Open Inference Protocol over HTTP: health, metadata, inference as JSON and as bytes, the repository."""

from __future__ import annotations

import json
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("starlette")

from obmlite.serving import ModelConfig, Repository
from obmlite.serving.asgi import build_app

HEADER = "Inference-Header-Content-Length"


def tensor(name: str, datatype: str, shape: list[int], data: Any = None, **parameters: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
    return made | ({} if data is None else {"data": data}) | ({"parameters": parameters} if parameters else {})


def binary(client: Any, path: str, asked: Any, *tails: bytes) -> Any:
    head = json.dumps(asked).encode()
    return client("POST", path, b"".join([head, *tails]), Inference_Header_Content_Length=str(len(head)))


def outputs_of(reply: Any) -> dict[str, Any]:
    """The outputs of a reply, whether as JSON or as bytes, by a reader of its own."""
    size = int(reply.headers.get(HEADER, len(reply.content)))
    answer, tail = json.loads(reply.content[:size]), reply.content[size:]
    found = {}
    for row in answer["outputs"]:
        if "data" in row:
            found[row["name"]] = (row["datatype"], row["shape"], row["data"])
            continue
        count = row["parameters"]["binary_data_size"]
        found[row["name"]] = (row["datatype"], row["shape"], tail[:count])
        tail = tail[count:]
    assert not tail
    return found


def test_health_and_metadata(client: Any) -> None:
    assert client("GET", "/v2/health/live").json() == {"live": True}
    assert client("GET", "/v2/health/ready").json() == {"ready": True}
    server = client("GET", "/v2").json()
    assert (server["name"], server["extensions"]) == ("obmlite", ["binary_tensor_data", "model_repository"])
    assert client("GET", "/v2/models/half/ready").json() == {"name": "half", "ready": True}
    assert client("GET", "/v2/models/half/versions/1/ready").status_code == 200
    assert client("GET", "/v2/models/half/versions/9/ready").status_code == 400
    found = client("GET", "/v2/models/many").json()
    assert (found["name"], found["versions"], found["platform"]) == ("many", ["1"], "obmlite_stablehlo")
    assert found["inputs"][0] == {"name": "a", "datatype": "FP32", "shape": [-1, 3]}
    assert {row["name"]: row["datatype"] for row in found["outputs"]} == {
        "sum": "FP32", "twice": "FP32", "not": "BOOL",
    }  # fmt: skip
    assert client("GET", "/v2/models/half").json()["versions"] == ["2", "1"]
    kinds = client("GET", "/v2/models/kinds").json()["inputs"]
    assert [row["datatype"] for row in kinds] == ["FP32", "FP16", "INT8", "UINT16", "BF16", "BOOL"]


@pytest.mark.parametrize("data", [[1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]])
def test_infer(client: Any, data: Any) -> None:
    inputs = [tensor("flag", "BOOL", [2], [True, False]), tensor("n", "INT32", [2], [1, 2])]
    asked = {"id": "seven", "inputs": [tensor("a", "FP32", [2, 3], data), *inputs]}
    answer = client("POST", "/v2/models/many/infer", asked).json()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("many", "1", "seven")
    rows = {row["name"]: row for row in answer["outputs"]}
    assert rows["sum"] == tensor("sum", "FP32", [2], [7.0, 17.0])
    assert rows["not"] == tensor("not", "BOOL", [2], [False, True])
    assert rows["twice"] == tensor("twice", "FP32", [2, 3], [2.0, 4, 6, 8, 10, 12])


def test_versions_and_filters(client: Any) -> None:
    asked = {"inputs": [tensor("x", "FP32", [1], [1])], "outputs": [{"name": "output_0"}]}
    answer = client("POST", "/v2/models/half/versions/1/infer", asked).json()
    assert (answer["model_version"], answer["outputs"][0]["data"]) == ("1", [2.5])
    many = {
        "inputs": [
            tensor("a", "FP32", [1, 3], [1, 2, 3]),
            tensor("n", "INT32", [1], [0]),
            tensor("flag", "BOOL", [1], [True]),
        ],
        "outputs": [{"name": "twice"}, {"name": "sum"}],
    }
    assert [row["name"] for row in client("POST", "/v2/models/many/infer", many).json()["outputs"]] == ["twice", "sum"]


def test_binary(client: Any) -> None:
    f, h = np.array([1.5, np.nan], "<f4"), np.array([2.5, -1], ml_dtypes.bfloat16)
    asked = {
        "inputs": [
            tensor("f", "FP32", [2], binary_data_size=8),
            tensor("d", "FP16", [2], [0.5, 1]),
            tensor("i", "INT8", [2], binary_data_size=2),
            tensor("u", "UINT16", [2], [1, 2]),
            tensor("h", "BF16", [2], binary_data_size=4),
            tensor("g", "BOOL", [2], binary_data_size=2),
        ],
        "parameters": {"binary_data_output": True},
        "outputs": [{"name": n} for n in "fdhg"] + [tensor("i", "", [], binary_data=False)],
    }
    tails = [f.tobytes(), b"\x01\xff", h.tobytes(), b"\x00\x02"]
    reply = binary(client, "/v2/models/kinds/infer", asked, *tails)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/octet-stream")
    assert outputs_of(reply) == {
        "f": ("FP32", [2], f.tobytes()),
        "d": ("FP16", [2], np.array([0.5, 1], "<f2").tobytes()),
        "h": ("BF16", [2], h.tobytes()),
        "g": ("BOOL", [2], b"\x00\x01"),
        "i": ("INT8", [2], [1, -1]),
    }


def test_empty_tensors(client: Any) -> None:
    """They are read as such; that this model takes no empty batch is another matter."""
    asked = {"inputs": [tensor("x", "FP32", [0], binary_data_size=0)]}
    for reply in (
        binary(client, "/v2/models/half/infer", asked),
        client("POST", "/v2/models/half/infer", {"inputs": [tensor("x", "FP32", [0], [])]}),
    ):
        assert "found x: f32[0]" in reply.json()["error"]


def good() -> dict[str, Any]:
    return {"inputs": [tensor("x", "FP32", [1], [1])]}


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ([], "Is not object"),
        ({}, "Missing 'inputs' key"),
        ({"inputs": {}}, "Missing 'inputs' key, or it is no list"),
        ({"inputs": [1]}, "it has no name"),
        ({"inputs": []}, "Missing but required: {x}"),
        ({"inputs": [tensor("y", "FP32", [1], [1])]}, "unexpected input 'y'; expected: x"),
        ({"inputs": good()["inputs"] * 2}, "input 'x' is given twice"),
        ({"inputs": [tensor("x", "FP64", [1], [1])]}, 'expected datatype FP32 (f32[b]), got "FP64"'),
        ({"inputs": [tensor("x", "FP32", [2], [1])]}, "Expecting 2 elements of shape [2] but got: 1"),
        ({"inputs": [tensor("x", "FP32", [-1], [1])]}, "-1"),
        ({"inputs": [tensor("x", "FP32", [True], [1])]}, "'shape' is no list of sizes"),
        ({"inputs": [tensor("x", "FP32", [0, 2**62, 2**62], [])]}, "the shape needs more"),
        ({"inputs": [tensor("x", "FP32", [1, 1], [1])]}, "rank"),
        ({"inputs": [tensor("x", "FP32", [1], ["a"])]}, 'JSON Value: "a" Type: String is not of expected type: float'),
        ({"inputs": [tensor("x", "FP32", [1])]}, "neither 'data' nor a parameter 'binary_data_size'"),
        ({"inputs": [tensor("x", "FP32", [1], binary_data_size=4)]}, "'binary_data_size' is 4, and 0 bytes are left"),
        ({**good(), "id": 1}, "'id' of"),
        ({**good(), "parameters": {"signature_name": "no"}}, '"no" not found'),
        ({**good(), "outputs": [{"name": "y"}]}, "unexpected output 'y'; expected: output_0"),
        ({**good(), "outputs": [{"name": "output_0"}] * 2}, "given twice"),
    ],
)
def test_refused(client: Any, asked: Any, text: str) -> None:
    reply = client("POST", "/v2/models/half/infer", asked)
    assert (reply.status_code, list(reply.json())) == (400, ["error"])
    assert text in reply.json()["error"]


@pytest.mark.parametrize(
    ("length", "tail", "text"),
    [
        ("x", b"", "is no number of bytes that the body has"),
        ("-1", b"", "is no number of bytes that the body has"),
        ("99999", b"", "is no number of bytes that the body has"),
        ("", b"\0\0\0", "'binary_data_size' is 4, and 3 bytes are left"),
        ("", b"\0\0\0\0\0", "1 bytes behind the JSON belong to no input"),
    ],
)
def test_binary_that_is_refused(client: Any, length: str, tail: bytes, text: str) -> None:
    head = json.dumps({"inputs": [tensor("x", "FP32", [1], binary_data_size=4)]}).encode()
    reply = client("POST", "/v2/models/half/infer", head + tail, **{HEADER: length or str(len(head))})
    assert reply.status_code == 400
    assert text in reply.json()["error"]


def test_paths_that_are_refused(client: Any) -> None:
    for method, path, status in (
        ("POST", "/v2/models/none/infer", 404),
        ("POST", "/v2/models/half/versions/v10/infer", 404),
        ("GET", "/v2/models/half/versions/9", 404),
        ("GET", "/v2/models/none/ready", 404),
        ("GET", "/v2/models/half/infer", 405),
        ("GET", "/v2/nothing", 404),
        ("POST", "/v2/repository/models/none/load", 404),
        ("POST", "/v2/repository/models/none/unload", 404),
    ):
        reply = client(method, path, b"{}" if method == "POST" else None)
        assert (reply.status_code, list(reply.json())) == (status, ["error"]), path


def test_repository(models: pathlib.Path, new_client: Any) -> None:
    with Repository([ModelConfig("half", str(models / "half"))]) as own:
        own.scan()
        client = new_client(build_app(own))
        row = {"name": "half", "version": "2", "state": "READY", "reason": ""}
        assert client("POST", "/v2/repository/index").json() == [row]
        assert client("POST", "/v2/repository/models/half/unload", {}).status_code == 200
        assert client("POST", "/v2/repository/index", {"ready": True}).json() == []
        assert client("GET", "/v2/models/half/ready").status_code == 400
        assert client("POST", "/v2/models/half/infer", good()).status_code == 404
        refused = client("POST", "/v2/repository/models/half/load", {"parameters": {"config": "{}"}})
        assert refused.status_code == 400
        assert client("POST", "/v2/repository/models/half/load").status_code == 200
        assert client("POST", "/v2/models/half/infer", good()).json()["outputs"][0]["data"] == [2.5]
    assert client("GET", "/v2/health/ready").json() == {"ready": False}


def test_bytes_are_little_endian(client: Any) -> None:
    asked = {"inputs": [tensor("x", "FP32", [1], binary_data_size=4)]}
    answer = binary(client, "/v2/models/half/infer", asked, struct.pack("<f", 3.0)).json()
    assert answer["outputs"][0]["data"] == [3.5]
