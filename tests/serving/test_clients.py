"""Clients that others wrote against ``obmlite serve``: tensorflow-serving-api, tritonclient, and REST as TensorFlow
Serving's documentation has it. What they are answered equals what the model gives.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import obmlite

WHY = "tensorflow-serving-api and tritonclient are in an environment of their own"
grpc = pytest.importorskip("grpc")
tf = pytest.importorskip("tensorflow", reason=WHY)
predict_pb2 = pytest.importorskip("tensorflow_serving.apis.predict_pb2", reason=WHY)
prediction_service = pytest.importorskip("tensorflow_serving.apis.prediction_service_pb2_grpc", reason=WHY)
model_service = pytest.importorskip("tensorflow_serving.apis.model_service_pb2_grpc", reason=WHY)
metadata_pb2 = pytest.importorskip("tensorflow_serving.apis.get_model_metadata_pb2", reason=WHY)
status_pb2 = pytest.importorskip("tensorflow_serving.apis.get_model_status_pb2", reason=WHY)
triton_grpc = pytest.importorskip("tritonclient.grpc", reason=WHY)
triton_http = pytest.importorskip("tritonclient.http", reason=WHY)
tritonclient_utils = pytest.importorskip("tritonclient.utils", reason=WHY)
messages = pytest.importorskip("obmlite.serving.grpc.messages")
inference, tensorflow_serving = messages.inference, messages.tensorflow_serving


def half(x):
    """The model of TensorFlow Serving's documentation."""
    return x * 0.5 + 2


def many(f, i, b, h):
    """Several inputs and outputs, of several dtypes; ``h`` is bfloat16."""
    return {"sum": f + i.astype(jnp.float32)[:, None], "not": ~b, "twice": h * 2, "code": i.astype(jnp.uint8)}


IMAGES = [np.random.default_rng(0).standard_normal((n, 4)).astype(np.float32) for n in (1, 5, 16, 40)]
MANY = {
    "f": np.arange(6, dtype=np.float32).reshape(2, 3),
    "i": np.array([1, -1], np.int32),
    "b": np.array([True, False]),
    "h": np.array([[0.5], [3]], ml_dtypes.bfloat16),
}


def free_ports(count):
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for own in found:
            own.bind(("127.0.0.1", 0))
        return [own.getsockname()[1] for own in found]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name → version → model, and the directory that has them."""
    base = tmp_path_factory.mktemp("models")
    w = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    made = {
        "half_plus_two": {123: obmlite.Model.from_function(half, obmlite.spec("f32[b]"), weights=None)},
        "many": {
            1: obmlite.Model.from_function(
                many,
                *map(obmlite.spec, ("f32[b,3]", "i32[b]", "bool[b]", "bf16[b,1]")),
                weights=None,
            )
        },
        "dense": {
            v: obmlite.Model.from_function(
                lambda w, x: jnp.tanh(x @ w), w * v, obmlite.spec("f32[b,4]"), symbol_values={"b": (1, 16)}
            )
            for v in (1, 2)
        },
    }
    for name, versions in made.items():
        for version, model in versions.items():
            model.save(base / name / str(version))
    loaded = {n: {v: obmlite.load(base / n / str(v), pad_batch=True) for v in own} for n, own in made.items()}
    return base, loaded


@pytest.fixture(scope="module")
def server(models):
    """Host and port of REST and of gRPC."""
    base, _ = models
    (base / "models.json").write_text(
        json.dumps(
            {
                "model": [
                    {"name": "half_plus_two", "base_path": "half_plus_two"},
                    {"name": "many", "base_path": "many"},
                    {"name": "dense", "base_path": "dense", "policy": "all", "labels": {"stable": 1}},
                ]
            }
        )
    )
    rest, rpc = free_ports(2)
    command = ["-m", "obmlite", "serve", "--config", str(base / "models.json"), "--port", rest, "--grpc-port", rpc]
    with open(base / "log", "w") as log:
        started = [sys.executable, *map(str, command)]
        process = subprocess.Popen(started, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": "."})
    try:
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{rest}/v2/health/ready", timeout=5).close()
                break
            time.sleep(0.1)
        else:
            pytest.fail((base / "log").read_text())
        yield f"127.0.0.1:{rest}", f"127.0.0.1:{rpc}"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (base / "log").read_text()


# --- TensorFlow Serving: gRPC


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server[1]) as found:
        yield found


def predict_request(name, inputs, **spec):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = name
    for key, value in spec.items():
        if key == "version":
            request.model_spec.version.value = value
        else:
            setattr(request.model_spec, key, value)
    for key, value in inputs.items():
        request.inputs[key].CopyFrom(tf.make_tensor_proto(value, shape=value.shape))
    return request


def outputs(response):
    return {name: tf.make_ndarray(proto) for name, proto in response.outputs.items()}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        values = np.asarray(values)
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape)
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("images", IMAGES, ids=len)
def test_predict(channel, models, images):
    model = models[1]["dense"][2]
    response = prediction_service.PredictionServiceStub(channel).Predict(predict_request("dense", {"x": images}))
    parts = [np.asarray(model(part)) for part in np.split(images, range(16, len(images), 16))]
    same(outputs(response), {"output_0": np.concatenate(parts)})
    assert (response.model_spec.name, response.model_spec.version.value) == ("dense", 2)


def test_predict_of_a_version_and_of_a_label(channel, models):
    for spec in ({"version": 1}, {"version_label": "stable"}):
        request = predict_request("dense", {"x": IMAGES[0]}, signature_name="serving_default", **spec)
        response = prediction_service.PredictionServiceStub(channel).Predict(request)
        same(outputs(response), {"output_0": models[1]["dense"][1](IMAGES[0])})
        assert response.model_spec.version.value == 1


def test_predict_of_several_dtypes(channel, models):
    response = prediction_service.PredictionServiceStub(channel).Predict(predict_request("many", MANY))
    same(outputs(response), models[1]["many"][1](**MANY))


def test_metadata(channel):
    request = metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "many"
    response = prediction_service.PredictionServiceStub(channel).GetModelMetadata(request)
    signatures = metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    inputs = signatures.signature_def["serving_default"].inputs
    found = {
        name: (tf.as_dtype(info.dtype).name, tf.TensorShape(info.tensor_shape).as_list())
        for name, info in inputs.items()
    }
    assert found == {
        "f": ("float32", [None, 3]),
        "i": ("int32", [None]),
        "b": ("bool", [None]),
        "h": ("bfloat16", [None, 1]),
    }


def test_status(channel):
    request = status_pb2.GetModelStatusRequest()
    request.model_spec.name = "dense"
    response = model_service.ModelServiceStub(channel).GetModelStatus(request)
    available = status_pb2.ModelVersionStatus.AVAILABLE
    assert {s.version: s.state for s in response.model_version_status} == {1: available, 2: available}


@pytest.mark.parametrize(
    ("arguments", "spec", "code", "text"),
    [
        (("none", {"x": IMAGES[0]}), {}, "NOT_FOUND", "Servable not found for request: Latest(none)"),
        (
            ("dense", {"x": IMAGES[0]}),
            {"version": 9},
            "NOT_FOUND",
            "not found for request: Specific(dense, 9)",
        ),
        (("dense", {"x": np.ones((2, 4))}), {}, "INVALID_ARGUMENT", "found f64[2,4]"),
        (("dense", {}), {}, "INVALID_ARGUMENT", "Missing but required: {x}."),
    ],
)
def test_errors(channel, server, arguments, spec, code, text):
    with pytest.raises(grpc.RpcError) as caught:
        prediction_service.PredictionServiceStub(channel).Predict(predict_request(*arguments, **spec))
    assert caught.value.code().name == code
    assert text in caught.value.details()


# --- TensorFlow Serving: REST, as its documentation has it


def ask(server, path, body=None):
    """Status and document."""
    data = None if body is None else body.encode()
    try:
        with urllib.request.urlopen(f"http://{server[0]}{path}", data, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_rest_half_plus_two(server):
    path = "/v1/models/half_plus_two"
    assert ask(server, path) == (
        200,
        {
            "model_version_status": [
                {"version": "123", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
            ]
        },
    )
    body = '{"instances": [1.0, 2.0, 5.0]}'
    for predict in (":predict", "/versions/123:predict"):
        assert ask(server, path + predict, body) == (200, {"predictions": [2.5, 3.0, 4.5]})
    assert ask(server, f"{path}:predict", '{"inputs": [1.0]}') == (200, {"outputs": [2.5]})


def test_rest_rows_and_columns_of_several_inputs(server, models):
    wanted = {k: np.asarray(v) for k, v in models[1]["many"][1](**MANY).items()}
    columns = {k: v.astype(np.float32).tolist() if k == "h" else v.tolist() for k, v in MANY.items()}
    status, found = ask(server, "/v1/models/many:predict", json.dumps({"inputs": columns}))
    assert status == 200, found
    assert {k: np.asarray(v, wanted[k].dtype).tolist() for k, v in found["outputs"].items()} == {
        k: v.tolist() for k, v in wanted.items()
    }
    rows = [{k: v[n] for k, v in columns.items()} for n in range(2)]
    status, found = ask(server, "/v1/models/many:predict", json.dumps({"instances": rows}))
    assert status == 200, found
    assert [row["code"] for row in found["predictions"]] == wanted["code"].tolist()


@pytest.mark.parametrize("images", IMAGES, ids=len)
def test_rest_labels(server, models, images):
    body = json.dumps({"instances": images.tolist()})
    status, found = ask(server, "/v1/models/dense/labels/stable:predict", body)
    assert status == 200, found
    model = models[1]["dense"][1]
    parts = [np.asarray(model(part)) for part in np.split(images, range(16, len(images), 16))]
    np.testing.assert_array_equal(np.asarray(found["predictions"], np.float32), np.concatenate(parts))


# --- the Open Inference Protocol


@pytest.fixture(scope="module", params=["http", "grpc"])
def triton(request, server):
    """tritonclient's module and a client of it."""
    module, address = {"http": (triton_http, server[0]), "grpc": (triton_grpc, server[1])}[request.param]
    client = module.InferenceServerClient(address)
    yield module, client
    client.close()


DATATYPES = {"f": "FP32", "i": "INT32", "b": "BOOL", "h": "BF16", "x": "FP32"}


def infer(triton, name, inputs, wanted=None, **options):
    """The answer's arrays by name."""
    module, client = triton
    given = []
    for key, values in inputs.items():
        given.append(module.InferInput(key, list(values.shape), DATATYPES[key]))
        given[-1].set_data_from_numpy(values)
    asked = None if wanted is None else [module.InferRequestedOutput(output) for output in wanted]
    return client.infer(name, given, outputs=asked, **options)


@pytest.mark.parametrize("images", IMAGES, ids=len)
def test_triton(triton, models, images):
    result = infer(triton, "dense", {"x": images}, request_id="7")
    model = models[1]["dense"][2]
    parts = [np.asarray(model(part)) for part in np.split(images, range(16, len(images), 16))]
    np.testing.assert_array_equal(result.as_numpy("output_0"), np.concatenate(parts))
    response = result.get_response() if isinstance(result.get_response(), dict) else result.get_response(as_json=True)
    assert (response["model_version"], response["id"]) == ("2", "7")


def test_triton_of_a_version(triton, models):
    result = infer(triton, "dense", {"x": IMAGES[1]}, model_version="1")
    np.testing.assert_array_equal(result.as_numpy("output_0"), np.asarray(models[1]["dense"][1](IMAGES[1])))


def test_triton_of_several_dtypes(triton, models):
    wanted = {name: np.asarray(values) for name, values in models[1]["many"][1](**MANY).items()}
    result = infer(triton, "many", MANY, wanted=list(wanted))
    for name, values in wanted.items():
        np.testing.assert_array_equal(result.as_numpy(name), values)


def test_triton_json(server, models):
    client = triton_http.InferenceServerClient(server[0])
    given = triton_http.InferInput("x", [5, 4], "FP32")
    given.set_data_from_numpy(IMAGES[1], binary_data=False)
    asked = triton_http.InferRequestedOutput("output_0", binary_data=False)
    result = client.infer("dense", [given], outputs=[asked])
    client.close()
    np.testing.assert_array_equal(result.as_numpy("output_0"), np.asarray(models[1]["dense"][2](IMAGES[1])))


def test_triton_health_and_metadata(triton):
    module, client = triton
    as_json = {"as_json": True} if module is triton_grpc else {}
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("dense")
    assert client.is_model_ready("dense", "1")
    assert not client.is_model_ready("dense", "9")
    assert client.get_server_metadata(**as_json)["name"] == "obmlite"
    found = client.get_model_metadata("dense", **as_json)
    assert sorted(found["versions"]) == ["1", "2"]
    [tensor] = found["inputs"]
    assert (tensor["name"], tensor["datatype"], [int(n) for n in tensor["shape"]]) == ("x", "FP32", [-1, 4])


def test_triton_repository(triton):
    _module, client = triton

    def index():
        found = client.get_model_repository_index()
        rows = found if isinstance(found, list) else [{"name": m.name, "state": m.state} for m in found.models]
        return {row["name"]: row["state"] for row in rows}

    assert index()["half_plus_two"] == "READY"
    client.unload_model("half_plus_two")
    assert index().get("half_plus_two") != "READY"
    client.load_model("half_plus_two")
    assert index()["half_plus_two"] == "READY"


def test_triton_errors(triton):
    _module, _client = triton
    with pytest.raises(tritonclient_utils.InferenceServerException, match="found f32\\[2,5\\]"):
        infer(triton, "dense", {"x": np.ones((2, 5), np.float32)})
    with pytest.raises(tritonclient_utils.InferenceServerException, match=r"Latest\(none\)"):
        infer(triton, "none", {"x": IMAGES[0]})


# --- our messages are the originals'


def fields(descriptor, seen):
    """Field number → what goes over the wire, all the way down; names of messages and enums aside."""
    if descriptor.name in seen:
        return {}
    found = {}
    for field in descriptor.fields:
        kind = field.TYPE_INT32 if field.type == field.TYPE_ENUM else field.type  # enums are varints as well
        inner = fields(field.message_type, {*seen, descriptor.name}) if field.message_type else None
        packed = kind not in (field.TYPE_STRING, field.TYPE_BYTES, field.TYPE_MESSAGE) and field.is_packed
        found[field.number] = (field.name, kind, field.is_repeated, packed, inner)
    return found


def within(ours, theirs, path=""):
    """Fields that are not the originals'."""
    for number, (name, kind, repeated, packed, inner) in ours.items():
        other = theirs.get(number)
        if other is None or other[:4] != (name, kind, repeated, packed):
            yield f"{path}.{name}: {(name, kind, repeated, packed)} {other and other[:4]}"
        elif inner:
            yield from within(inner, other[4], f"{path}.{name}")


TFS = {
    "PredictRequest": predict_pb2.PredictRequest,
    "PredictResponse": predict_pb2.PredictResponse,
    "GetModelMetadataRequest": metadata_pb2.GetModelMetadataRequest,
    "GetModelMetadataResponse": metadata_pb2.GetModelMetadataResponse,
    "SignatureDefMap": metadata_pb2.SignatureDefMap,
    "GetModelStatusRequest": status_pb2.GetModelStatusRequest,
    "GetModelStatusResponse": status_pb2.GetModelStatusResponse,
}
OIP = [name for name in vars(inference) if name.endswith(("Request", "Response"))]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        *((getattr(tensorflow_serving, name), theirs) for name, theirs in TFS.items()),
        *((getattr(inference, name), getattr(triton_grpc.service_pb2, name)) for name in OIP),
    ],
    ids=lambda value: value.DESCRIPTOR.full_name,
)
def test_messages_are_the_originals(ours, theirs):
    found = fields(ours.DESCRIPTOR, set())
    assert list(within(found, fields(theirs.DESCRIPTOR, set()))) == []
    assert ours.DESCRIPTOR.full_name.startswith("obmlite.")
