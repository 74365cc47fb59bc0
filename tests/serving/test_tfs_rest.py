"""TensorFlow Serving's REST API: its paths, its formats, its rules for numbers, its errors."""

from __future__ import annotations

import base64
import json
import sys
import time
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette")

import obmlite
from obmlite.serving import _json, _json_arrays
from obmlite.serving.asgi import build_app
from obmlite.serving.status import Code, ServingError

# --- predict


def test_by_row(client: Any) -> None:
    reply = client("POST", "/v1/models/half:predict", b'{"instances": [1.0, 2.0, 5.0]}')
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
    assert reply.json() == {"predictions": [2.5, 3.0, 4.5]}


def test_by_column(client: Any) -> None:
    reply = client("POST", "/v1/models/half:predict", {"inputs": {"x": [1, 2]}, "signature_name": "serving_default"})
    assert reply.json() == {"outputs": [2.5, 3.0]}
    assert client("POST", "/v1/models/half:predict", {"inputs": [1, 2]}).json() == {"outputs": [2.5, 3.0]}


def test_several_inputs_and_outputs(client: Any) -> None:
    rows = [{"a": [1, 2, 3], "n": 4, "flag": True}, {"flag": False, "a": [0.5, 0, 0], "n": -1}]
    expected = [{"sum": 10.0, "twice": [2, 4, 6], "not": False}, {"sum": -0.5, "twice": [1, 0, 0], "not": True}]
    assert client("POST", "/v1/models/many:predict", {"instances": rows}).json() == {"predictions": expected}
    columns = {name: [row[name] for row in rows] for name in ("a", "n", "flag")}
    out = client("POST", "/v1/models/many:predict", {"inputs": {**columns, "other": "is ignored"}}).json()["outputs"]
    assert out == {name: [row[name] for row in expected] for name in ("sum", "twice", "not")}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/half/versions/1:predict",
        "/v1/models/half/versions/0002:predict",
        "/v1/models/half/labels/stable:predict",
        "/V1/Models/half:Predict",
        "/v1/models/%68alf:predict",
    ],
)
def test_paths(client: Any, path: str) -> None:
    assert client("POST", path, {"instances": [0]}).json() == {"predictions": [2.0]}


def test_constants(client: Any) -> None:
    reply = client("POST", "/v1/models/half:predict", b'{"instances": [NaN, Infinity, 1, -Infinity]}')
    assert reply.text == '{"predictions":[NaN,Infinity,2.5,-Infinity]}'
    rows = b'{"instances": [{"a": [NaN, 1, 2], "n": 0, "flag": true}]}'
    assert client("POST", "/v1/models/many:predict", rows).text.count("NaN") == 2


def test_every_dtype(client: Any) -> None:
    inputs = {"f": [0.1], "d": [0.25], "i": [-128], "u": [65535], "h": [1.5], "g": [True]}
    assert client("POST", "/v1/models/kinds:predict", {"inputs": inputs}).json()["outputs"] == inputs


def test_compressed(client: Any) -> None:
    import gzip

    body = gzip.compress(b'{"instances": [1.0]}')
    assert client("POST", "/v1/models/half:predict", body, Content_Encoding="gzip").json() == {"predictions": [2.5]}
    for cut, coding, status in ((body[:-3], "gzip", 400), (b"x", "deflate", 400), (body, "br", 415)):
        assert client("POST", "/v1/models/half:predict", cut, Content_Encoding=coding).status_code == status


# --- what is refused


@pytest.mark.parametrize(
    ("model", "body", "text"),
    [
        ("half", "", "JSON Parse error: The document is empty"),
        ("half", "{", "JSON Parse error: "),
        ("half", "[" * 5000 + "]" * 5000, "depth"),
        ("half", "[" * 5000 + "NaN" + "]" * 5000, "JSON Parse error: depth limit exceeded"),
        ("half", '{"instances": [NaN, }', "JSON Parse error: "),
        ("half", '{"inputs": [NaN], "signature_name": "\\ud800"}', "JSON Parse error: "),
        ("half", '{"inputs": [NaN, ' + "9" * 5000 + "]}", "JSON Parse error: "),
        ("half", "[1]", "JSON Value: [1] Is not object"),
        ("half", "{}", "Missing 'inputs' or 'instances' key"),
        ("half", '{"inputs": 1, "instances": 1}', "expecting only one of 'inputs' or 'instances' keys to exist"),
        ("half", '{"inputs": 1, "signature_name": 3}', "'signature_name' key must be a string value."),
        ("half", '{"inputs": 1, "signature_name": "x"}', 'Serving signature name: "x" not found in signature def'),
        ("half", '{"instances": 1}', "Excepting 'instances' to be an list/array"),
        ("half", '{"instances": []}', "No values in 'instances' array"),
        ("half", '{"instances": ["x"]}', 'JSON Value: "x" Type: String is not of expected type: float'),
        ("half", '{"instances": [true]}', "JSON Value: true Type: True is not of expected type: float"),
        ("half", '{"instances": [1.5, false]}', "JSON Value: false Type: False is not of expected type: float"),
        ("half", '{"instances": [null]}', "JSON Value: null Type: Null is not of expected type: float"),
        ("half", '{"instances": [1, {}]}', "Expecting value/list but got object at item 1 of input list"),
        ("half", '{"instances": [[], {"": 1}, 2]}', "but got object at item 1 of input list"),
        ("half", '{"instances": [[1, 2], [1]]}', "Expecting shape [2] but got: [1]"),
        (
            "half",
            '{"inputs": [[1, 2], [1, 2, 3]]}',
            "Encountered list at unexpected size: 3 at level: 1 expected size: 2",
        ),
        ("half", '{"inputs": [[1, 2], 1]}', "found at incorrect level: 2 in the JSON DOM. Expected at level: 2"),
        ("half", '{"inputs": [1, [2]]}', "Encountered list at unexpected level: 1 expected < 1"),
        ("half", '{"inputs": ' + "[" * 40 + "]" * 40 + "}", "Encountered list at unexpected level: 32 expected < 32"),
        ("half", '{"inputs": {"y": [1]}}', "Missing named input: x in 'inputs' object."),
        ("half", '{"inputs": [16777217]}', "Cannot convert JSON value: 16777217 to float without loss of precision."),
        ("half", '{"inputs": [1.5, 16777217]}', "Cannot convert JSON value: 16777217 to float without loss"),
        ("half", '{"inputs": [1e39]}', "Cannot convert JSON value: 1e+39 to float without loss of precision."),
        ("half", '{"inputs": {"b64": "AAAA"}}', "Type: Object is not of expected type: float"),
        ("many", '{"instances": [1]}', "instances is a plain list, but expecting list of objects"),
        ("many", '{"inputs": [1]}', "inputs is a plain value/list, but expecting an object"),
        ("many", '{"instances": [{"a": [1, 2, 3], "n": 1}]}', "keys must be equal to: a,flag,n"),
        (
            "many",
            '{"instances": [{"a": [1, 2, 3], "n": 1, "flag": true, "z": 1}]}',
            "element: 0 key: z of 'instances' list. Error: INVALID_ARGUMENT: JSON object: does not have named input: z",
        ),
        (
            "many",
            '{"instances": [{"a": [1, 2, 3], "n": 1, "flag": true}, 1]}',
            "Expecting object but got list at item 1",
        ),
        (
            "many",
            '{"instances": [{"a": [1, 2, 3], "n": 1, "flag": true}, {"a": [1, 2, 3], "n": 1.0, "flag": true}]}',
            "element: 1 key: n of 'instances' list. Error: INVALID_ARGUMENT: JSON Value: 1.0 Type: Number is not of",
        ),
        ("many", '{"inputs": {"a": [[1, 2, 3]], "n": [2147483648], "flag": [true]}}', "not of expected type: int32"),
        ("many", '{"inputs": {"a": [[1, 2, 3]], "n": [1], "flag": [1]}}', "Type: Number is not of expected type: bool"),
        ("many", '{"inputs": {"a": [[1, 2, 3]], "n": [1, 2], "flag": [true]}}', "'n'"),
        ("fixed", '{"inputs": [[1, 2, 3]]}', "batch 1 does not match this model's fixed batch sizes [2]"),
        ("scalar", '{"instances": [1, 2]}', "Tensor name: total has no shape information"),
    ],
)
def test_refused(client: Any, model: str, body: str, text: str) -> None:
    reply = client("POST", f"/v1/models/{model}:predict", body.encode())
    assert reply.status_code == 400
    [(key, found)] = reply.json().items()
    assert key == "error"
    assert text in found


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("POST", "/v1/models/none:predict", 404, "Servable not found for request: Latest(none)"),
        ("POST", "/v1/models/half/versions/7:predict", 404, "Servable not found for request: Specific(half, 7)"),
        ("GET", "/v1/models/none", 404, "Servable not found for request: Latest(none)"),
        ("GET", "/v1/models/half/versions/7", 404, "Servable not found for request: Specific(half, 7)"),
        ("POST", "/v1/models/half/labels/no:predict", 400, "Unrecognized servable version label: no"),
        ("GET", f"/v1/models/half/versions/{2**63}", 400, f"Failed to convert version: {2**63} to numeric."),
        ("GET", "/v1/models", 400, "Missing model name in request."),
        (
            "POST",
            "/v1/models/half/versions/x:predict",
            400,
            "Malformed request: POST /v1/models/half/versions/x",
        ),
        ("POST", "/v1/models/half", 400, "Malformed request: POST /v1/models/half"),
        ("PUT", "/v1/models/half:predict", 400, "Malformed request: PUT /v1/models/half:predict"),
        ("POST", "/v1/models/half:classify", 400, "Expected classify signature"),
        ("GET", "/v1/models/%ff", 400, "The path is no UTF-8."),
        ("GET", "/nothing", 404, "Not found: GET /nothing"),
        ("POST", "/metrics", 405, "Method not allowed: POST"),
    ],
)
def test_paths_that_are_refused(client: Any, method: str, path: str, status: int, text: str) -> None:
    reply = client(method, path, b"{}")
    assert (reply.status_code, list(reply.json())) == (status, ["error"])
    assert text in reply.json()["error"]


def test_other_sites_pages(client: Any) -> None:
    body = {"instances": [1]}
    assert client("POST", "/v1/models/half:predict", body, Origin="http://evil.example").status_code == 403
    assert client("POST", "/v1/models/half:predict", body, Origin="http://testserver").status_code == 200
    assert "access-control-allow-origin" not in client("GET", "/v1/models/half", Origin="http://evil.example").headers


def test_cors_where_it_is_asked_for(repository: Any, new_client: Any) -> None:
    asked = new_client(build_app(repository, cors=["http://good.example"]))
    reply = asked("POST", "/v1/models/half:predict", {"instances": [1]}, Origin="http://good.example")
    assert reply.headers["access-control-allow-origin"] == "http://good.example"
    preflight = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
    assert asked("OPTIONS", "/v1/models/half:predict", Origin="http://good.example", **preflight).status_code == 200
    refused = asked("OPTIONS", "/v1/models/half:predict", Origin="http://evil.example", **preflight)
    assert "access-control-allow-origin" not in refused.headers
    # A browser sends a plain POST without asking first.
    assert asked("POST", "/v2/repository/models/half/unload", Origin="http://evil.example").status_code == 403
    assert asked("POST", "/v1/models/half:predict", {"instances": [1]}, Origin="http://testserver").status_code == 200
    everyone = new_client(build_app(repository, cors=["*"]))
    reply = everyone("POST", "/v1/models/half:predict", {"instances": [1]}, Origin="http://evil.example")
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "*")


def test_calls_are_the_same_with_and_without_starlette(repository: Any, new_client: Any) -> None:
    """A call goes around it where nothing of it is needed: what it answers does not depend on that."""
    import starlette.applications

    own, body = build_app(repository), {"instances": [1]}
    around = new_client(own)
    mounted = starlette.applications.Starlette()
    mounted.mount("/below", own)
    below = new_client(mounted)
    calls = [
        ("/v1/models/half:predict", body, 200),
        ("/v1/models/half:predict", b"{", 400),
        ("/v1/models/none:predict", body, 404),
        ("/v1/models/%FF:predict", body, 400),
        ("/v1/models/half/versions/99999999999999999999:predict", body, 400),
        ("/v2/models/half/infer", {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}, 200),
        ("/v2/models/half/infer", {}, 400),
        ("/v2/models/half/inferred", {}, 404),
    ]
    for path, sent, status in calls:
        direct = around("POST", path, sent)
        passed = around("POST", path, sent, Origin="http://testserver")
        assert (direct.status_code, passed.status_code) == (status, status), path
        assert (direct.content, direct.headers) == (passed.content, passed.headers)
        if status == 200:
            assert below("POST", f"/below{path}", sent).content == direct.content


def test_what_nobody_expected_says_nothing(repository: Any, new_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = new_client(build_app(repository))
    monkeypatch.setattr(repository, "acquire", lambda *_: 1 / 0)
    for headers in ({}, {"Origin": "http://testserver"}):
        reply = client("POST", "/v1/models/half:predict", {"instances": [1]}, **headers)
        assert (reply.status_code, reply.json()) == (500, {"error": "Internal error."})


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/", "", "https://"])
def test_what_is_no_origin(repository: Any, origin: str) -> None:
    with pytest.raises(obmlite.ArgumentError) as caught:
        build_app(repository, cors=[origin])
    assert caught.value.field == "cors"


# --- status and metadata


def test_status(client: Any) -> None:
    def row(version: int) -> dict[str, Any]:
        return {"version": str(version), "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}

    assert client("GET", "/v1/models/half").json() == {"model_version_status": [row(2), row(1)]}
    for path in ("/v1/models/half/versions/1", "/v1/models/half/labels/stable"):
        assert client("GET", path).json() == {"model_version_status": [row(1)]}


def test_metadata(client: Any) -> None:
    found = client("GET", "/v1/models/many/metadata").json()
    assert found["model_spec"] == {"name": "many", "signature_name": "", "version": "1"}
    signature = found["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["method_name"] == "tensorflow/serving/predict"
    assert signature["inputs"]["a"] == {
        "dtype": "DT_FLOAT",
        "tensor_shape": {"dim": [{"size": "-1", "name": ""}, {"size": "3", "name": ""}], "unknown_rank": False},
        "name": "a",
    }
    assert {name: info["dtype"] for name, info in signature["outputs"].items()} == {
        "sum": "DT_FLOAT", "twice": "DT_FLOAT", "not": "DT_BOOL",
    }  # fmt: skip
    kinds = client("GET", "/v1/models/kinds/versions/1/metadata").json()["metadata"]["signature_def"]["signature_def"]
    dtypes = [info["dtype"] for info in kinds["serving_default"]["inputs"].values()]
    assert dtypes == ["DT_FLOAT", "DT_HALF", "DT_INT8", "DT_UINT16", "DT_BFLOAT16", "DT_BOOL"]


# --- arrays and JSON

DTYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "bfloat16", "float8_e5m2", "int4"]


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4), st.integers(0, 2**32 - 1))
def test_round_trip(name: str, shape: list[int], seed: int) -> None:
    dtype, rng = dtype_of(name), np.random.default_rng(seed)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        array = rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    else:
        array = np.asarray(rng.standard_normal(shape) * 3).astype(dtype)
        if dtype.kind == "f" and array.ndim and array.size:
            array.reshape(-1)[0] = [np.nan, np.inf, -np.inf, 0][seed % 4]
    text = _json.dumps({"x": _json.writable(array)})
    document = _json.parse_text(text)
    found = _json_arrays.parse_array(document.value["x"], dtype, booleans=document.booleans)
    depth = next((n for n, size in enumerate(shape) if not size), len(shape))  # behind a 0 JSON has no more sizes
    assert found.shape[: depth + 1] == tuple(shape[: depth + 1])
    assert found.dtype == dtype
    if array.size:
        np.testing.assert_array_equal(found.astype(np.float64), array.astype(np.float64))
    parsed = json.loads(text)["x"]  # a second reader, which takes the constants too
    again = np.array(parsed, np.float64).astype(dtype).reshape(shape)
    np.testing.assert_array_equal(again.astype(np.float64), array.astype(np.float64))


def test_arrays_that_are_not_plain() -> None:
    array = np.arange(12, dtype=">i4").reshape(3, 4)
    assert _json.dumps(_json.writable(array[:, ::2])) == b"[[0,2],[4,6],[8,10]]"
    assert _json.dumps(_json.writable(np.float32(0.1))) == b"0.1"
    assert _json.dumps(_json.writable(np.array(np.nan, "f4"))) == b"NaN"
    with pytest.raises(ServingError, match="complex64") as info:
        _json.writable(np.zeros(1, "c8"))
    assert info.value.code is Code.UNIMPLEMENTED


def test_numbers_at_the_edge() -> None:
    def read(text: str, dtype: str) -> Any:
        document = _json.parse_text(text.encode())
        return _json_arrays.parse_array(document.value, dtype_of(dtype), booleans=document.booleans).tolist()

    assert read("[18446744073709551615, 0]", "u8") == [2**64 - 1, 0]
    assert read("[9223372036854775807, -9223372036854775808]", "i8") == [2**63 - 1, -(2**63)]
    assert read("[16777215, 16777217.0]", "f4") == [16777215.0, 16777216.0]
    assert read("3", "i4") == 3
    assert read("[]", "f4") == []
    for text, dtype in (
        ("[18446744073709551616]", "u8"),
        ("[9223372036854775808]", "i8"),
        ("[-1]", "u1"),
        ("[256]", "u1"),
        ("[8]", "int4"),
        ("[65520]", "f2"),
        ("[1e999]", "f8"),
        ("[9007199254740993]", "f8"),
        ('["1"]', "f4"),
        ('[[1], ""]', "f4"),
        ("[[1], {}]", "f4"),
        ("[true, 2]", "i4"),
    ):
        with pytest.raises(ServingError):
            read(text, dtype)


def test_texts() -> None:
    raw = b"\x89PNG\xff"
    value = [["plain", {"b64": base64.b64encode(raw).decode()}]]
    found = _json_arrays.parse_array(value, np.dtype(object))
    assert found.tolist() == [[b"plain", raw]]
    assert _json.writable(found) == value
    assert _json.writable(found, binary=True)[0][0] == {"b64": base64.b64encode(b"plain").decode()}
    for bad, text in (
        ([{"b64": "!"}], "Unable to base64 decode"),
        ([{"b64": 1}], "not formatted correctly for base64 data"),
        ([1], "JSON Value: 1 Type: Number is not of expected type: string"),
        ([["a"], ["b", "c"]], "Encountered list at unexpected size: 2 at level: 1 expected size: 1"),
    ):
        with pytest.raises(ServingError) as info:
            _json_arrays.parse_array(bad, np.dtype(object))
        assert text in str(info.value)


def test_no_python_for_each_number() -> None:
    array = np.random.default_rng(0).standard_normal((128, 28, 28, 1)).astype("f4")
    array[0, 0, 0] = np.nan
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        text = _json.dumps(_json.writable(array))
        document = _json.parse_text(text)
        found = _json_arrays.parse_array(document.value, array.dtype, booleans=document.booleans)
    finally:
        sys.setprofile(None)
    np.testing.assert_array_equal(found, array)
    assert calls < 10_000, "for 100,352 numbers"


def test_faster_than_the_standard_library() -> None:
    array = np.random.default_rng(0).standard_normal((128, 784)).astype("f4")
    text = json.dumps(array.tolist()).encode()

    def best(call: Any) -> float:
        def once() -> float:
            begun = time.process_time()
            call()
            return time.process_time() - begun

        return min(once() for _ in range(5))

    ours = best(lambda: _json_arrays.parse_array(_json.parse_text(text).value, array.dtype, booleans=False))
    theirs = best(lambda: np.asarray(json.loads(text), array.dtype))
    assert ours < theirs
    assert best(lambda: _json.dumps(_json.writable(array))) < best(lambda: json.dumps(array.tolist())) / 3
