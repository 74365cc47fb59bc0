"""The gRPC services, by messages of our own; what others' clients say is in test_clients.py."""

import contextlib
import subprocess
import sys
import threading
import tracemalloc

import grpc
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import obmlite
from obmlite.errors import ArgumentError
from obmlite.interop.tensorflow_steps import Handle
from obmlite.pipeline import HOST_STEPS, HostStep
from obmlite.serving import ModelConfig, Repository, ServingError
from obmlite.serving._elements import to_bytes
from obmlite.serving.grpc import array, serve, tensor_proto
from obmlite.serving.grpc._open_inference import OpenInference
from obmlite.serving.grpc._tensorflow_serving import TensorFlowServing
from obmlite.serving.grpc.messages import inference
from obmlite.serving.grpc.messages import tensorflow_serving as tfs

PREDICTION = "/tensorflow.serving.PredictionService"
INFERENCE = "/inference.GRPCInferenceService"


def many(f, i, b, h):
    """Several inputs and outputs of several dtypes."""
    return {"sum": f + i.astype(jnp.float32)[:, None], "not": ~b, "twice": h * 2}


MANY = {
    "f": np.arange(6, dtype=np.float32).reshape(2, 3),
    "i": np.array([1, -1], np.int32),
    "b": np.array([True, False]),
    "h": np.array([[0.5], [3]], ml_dtypes.bfloat16),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Directories of versions: ``dense`` takes batches of 1 and 16, ``one`` of 4 alone, ``many`` has several inputs."""
    found = tmp_path_factory.mktemp("models")
    w = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    x = obmlite.spec("f32[b,4]")
    for version in (1, 2):
        dense = obmlite.Model.from_function(lambda w, x: x @ w, w * version, x, symbol_values={"b": (1, 16)})
        dense.save(found / "dense" / str(version))
    obmlite.Model.from_function(lambda w, x: x @ w, w, obmlite.spec("f32[4,4]")).save(found / "one" / "1")
    specs = map(obmlite.spec, ("f32[b,3]", "i32[b]", "bool[b]", "bf16[b,1]"))
    obmlite.Model.from_function(many, *specs, weights=None).save(found / "many" / "1")
    return found


@pytest.fixture(scope="module")
def repository(base):
    configs = [
        ModelConfig("dense", base / "dense", obmlite.serving.All(), labels={"stable": 1}),
        ModelConfig("one", base / "one"),
        ModelConfig("many", base / "many"),
    ]
    found = Repository(configs)
    found.scan()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def channel(repository):
    server = serve(repository, "127.0.0.1:0", max_message_bytes=1 << 20)
    with grpc.insecure_channel(server.address) as found:
        yield found
    server.stop()


def call(channel, method, request, answer):
    """The answer of a method."""
    data = request if isinstance(request, bytes) else request.SerializeToString()
    return answer.FromString(channel.unary_unary(method)(data, timeout=30))


def fails(channel, method, request):
    """The status and the text that a request is refused with."""
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, method, request, tfs.PredictResponse)
    return caught.value.code().name, caught.value.details()


def predict_request(name, inputs, **spec):
    made = tfs.PredictRequest(inputs={key: tensor_proto(value) for key, value in inputs.items()})
    made.model_spec.CopyFrom(tfs.ModelSpec(name=name, **spec))
    return made


def predict(channel, *arguments, **spec):
    response = call(channel, f"{PREDICTION}/Predict", predict_request(*arguments, **spec), tfs.PredictResponse)
    return {name: array(name, proto) for name, proto in response.outputs.items()}, response.model_spec


def expected(base, name, version, *args):
    """What the model itself gives, as leaves."""
    found = obmlite.load(base / name / str(version), pad_batch=True)(*args)
    return {k: np.asarray(v) for k, v in (found.items() if isinstance(found, dict) else {"output_0": found}.items())}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert (found[name].dtype, found[name].tolist()) == (values.dtype, values.tolist())


# --- TensorFlow Serving's services


@pytest.mark.parametrize("size", [1, 3, 16, 20])
def test_predict(channel, base, size):
    x = np.random.default_rng(size).standard_normal((size, 4)).astype(np.float32)
    outputs, spec = predict(channel, "dense", {"x": x})
    assert (spec.name, spec.version.value, spec.signature_name) == ("dense", 2, "serving_default")
    if size < 17:
        same(outputs, expected(base, "dense", 2, x))
    else:  # in parts
        parts = [expected(base, "dense", 2, part)["output_0"] for part in (x[:16], x[16:])]
        same(outputs, {"output_0": np.concatenate(parts)})


def test_versions_and_labels(channel, base):
    x = np.ones((1, 4), np.float32)
    for spec in ({"version": tfs.Int64Value(value=1)}, {"version_label": "stable"}):
        outputs, used = predict(channel, "dense", {"x": x}, **spec)
        assert used.version.value == 1
        same(outputs, expected(base, "dense", 1, x))


def test_several_dtypes_and_the_output_filter(channel, base):
    outputs, _ = predict(channel, "many", MANY)
    wanted = expected(base, "many", 1, *MANY.values())
    same(outputs, wanted)
    request = predict_request("many", MANY)
    request.output_filter.append("not")
    response = call(channel, f"{PREDICTION}/Predict", request, tfs.PredictResponse)
    assert list(response.outputs) == ["not"]


def test_metadata(channel):
    request = tfs.GetModelMetadataRequest(model_spec=tfs.ModelSpec(name="many"), metadata_field=["signature_def"])
    response = call(channel, f"{PREDICTION}/GetModelMetadata", request, tfs.GetModelMetadataResponse)
    assert (response.model_spec.name, response.model_spec.version.value) == ("many", 1)
    found = response.metadata["signature_def"]
    assert found.type_url == "type.googleapis.com/tensorflow.serving.SignatureDefMap"
    signature = tfs.SignatureDefMap.FromString(found.value).signature_def["serving_default"]
    assert signature.method_name == "tensorflow/serving/predict"
    shapes = {n: (i.dtype, [d.size for d in i.tensor_shape.dim]) for n, i in signature.inputs.items()}
    assert shapes == {"f": (1, [-1, 3]), "i": (3, [-1]), "b": (10, [-1]), "h": (14, [-1, 1])}
    assert set(signature.outputs) == {"sum", "not", "twice"}


def test_status(channel):
    request = tfs.GetModelStatusRequest(model_spec=tfs.ModelSpec(name="dense"))
    response = call(channel, "/tensorflow.serving.ModelService/GetModelStatus", request, tfs.GetModelStatusResponse)
    assert [(s.version, s.state, s.status.error_code) for s in response.model_version_status] == [
        (2, 30, 0),
        (1, 30, 0),
    ]


X = {"x": np.ones((2, 4), np.float32)}


@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        (predict_request("", X), "INVALID_ARGUMENT", "Missing model name in the request's model_spec."),
        (predict_request("none", X), "NOT_FOUND", "Servable not found for request: Latest(none)"),
        (
            predict_request("dense", X, version=tfs.Int64Value(value=7)),
            "NOT_FOUND",
            "Servable not found for request: Specific(dense, 7)",
        ),
        (
            predict_request("dense", X, version=tfs.Int64Value(value=-1)),
            "NOT_FOUND",
            "Servable not found for request: Specific(dense, -1)",
        ),
        (
            predict_request("dense", X, version_label="new"),
            "INVALID_ARGUMENT",
            "Unrecognized servable version label: new",
        ),
        (
            predict_request("dense", X, signature_name="s"),
            "INVALID_ARGUMENT",
            'Serving signature name: "s" not found in signature def',
        ),
        (
            predict_request("dense", {"y": X["x"]}),
            "INVALID_ARGUMENT",
            "len({y}) != len({x}). Sent extra: {y}. Missing but required: {x}.",
        ),
        (
            predict_request("dense", {"x": np.ones((2, 5), np.float32)}),
            "INVALID_ARGUMENT",
            "Input 'x' has another shape: expected f32[1|16,4], found f32[2,5].",
        ),
        (
            predict_request("dense", {"x": np.ones((2, 4))}),
            "INVALID_ARGUMENT",
            "Input 'x' has another dtype: expected f32[1|16,4], found f64[2,4].",
        ),
        (
            predict_request("one", X),
            "INVALID_ARGUMENT",
            "Input 'x': batch 2 does not match this model's fixed batch sizes [4]: expected f32[4,4], found f32[2,4].",
        ),
        (b"\xff\xff", "INVALID_ARGUMENT", "The request is no PredictRequest."),
        (bytes(2 << 20), "RESOURCE_EXHAUSTED", "CLIENT"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(channel, request_, code, text):
    found = fails(channel, f"{PREDICTION}/Predict", request_)
    assert found[0] == code
    assert (text if code != "RESOURCE_EXHAUSTED" else "larger than max") in found[1]


def test_inputs_that_take_more_memory_than_the_message(repository):
    # A few bytes each, and a mebibyte when written out: refused before that is done more than once.
    large = tfs.TensorProto(
        dtype=1, tensor_shape=tensor_proto(np.empty((0, 4), np.float32)).tensor_shape, float_val=[1]
    )
    large.tensor_shape.dim[0].size = 1 << 16
    service = TensorFlowServing(repository, 1 << 20)
    request = predict_request("dense", {})
    for number in range(100):
        request.inputs[str(number)].CopyFrom(large)
    whole = predict_request("many", {})
    for name in MANY:
        whole.inputs[name].CopyFrom(large)
    tracemalloc.start()
    try:
        for refused, text in ((request, "Sent extra: {"), (whole, "more than a message may hold")):
            with pytest.raises(ServingError, match=text):
                service.predict(refused, None)
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()


def test_other_methods(channel):
    for method in ("Classify", "Nothing"):
        assert fails(channel, f"{PREDICTION}/{method}", b"")[0] == "UNIMPLEMENTED"


def test_metadata_of_other_kinds(channel):
    request = tfs.GetModelMetadataRequest(model_spec=tfs.ModelSpec(name="many"), metadata_field=["x"])
    code, text = fails(channel, f"{PREDICTION}/GetModelMetadata", request)
    assert (code, text) == ("INVALID_ARGUMENT", "metadata_field has to be 'signature_def', got x.")


# --- the Open Inference Protocol


def infer_request(name, inputs, raw=True, **more):
    made = inference.ModelInferRequest(model_name=name, id="7", **more)
    kinds = {"f": "FP32", "i": "INT32", "b": "BOOL", "h": "BF16", "x": "FP32"}
    fields = {"FP32": "fp32_contents", "INT32": "int_contents", "BOOL": "bool_contents"}
    for key, values in inputs.items():
        tensor = made.inputs.add(name=key, datatype=kinds[key], shape=values.shape)
        if raw:
            made.raw_input_contents.append(values.tobytes())
        else:
            getattr(tensor.contents, fields[kinds[key]]).extend(values.ravel().tolist())
    return made


def infer(channel, request):
    return call(channel, f"{INFERENCE}/ModelInfer", request, inference.ModelInferResponse)


def test_infer(channel, base):
    response = infer(channel, infer_request("many", MANY))
    assert (response.model_name, response.model_version, response.id) == ("many", "1", "7")
    dtypes = {"FP32": np.float32, "BOOL": np.bool_, "BF16": ml_dtypes.bfloat16}
    found = {
        o.name: np.frombuffer(raw, dtypes[o.datatype]).reshape(o.shape)
        for o, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    same(found, expected(base, "many", 1, *MANY.values()))


def test_an_answer_has_the_form_of_its_request(channel, base):
    response = infer(channel, infer_request("dense", X, raw=False))
    [output] = response.outputs
    assert not response.raw_output_contents
    found = np.array(output.contents.fp32_contents, np.float32).reshape(output.shape)
    same({output.name: found}, expected(base, "dense", 2, X["x"]))


def test_infer_of_a_version_and_of_some_outputs(channel):
    assert infer(channel, infer_request("dense", X, model_version="1")).model_version == "1"
    request = infer_request("many", MANY)
    request.outputs.add(name="not")
    request.parameters["signature_name"].string_param = "serving_default"
    assert [output.name for output in infer(channel, request).outputs] == ["not"]


def test_health_and_metadata(channel):
    ask = lambda method, request, answer: call(channel, f"{INFERENCE}/{method}", request, answer)  # noqa: E731
    assert ask("ServerLive", inference.ServerLiveRequest(), inference.ServerLiveResponse).live
    assert ask("ServerReady", inference.ServerReadyRequest(), inference.ServerReadyResponse).ready
    for version, ready in (("", True), ("1", True), ("9", False)):
        request = inference.ModelReadyRequest(name="dense", version=version)
        assert ask("ModelReady", request, inference.ModelReadyResponse).ready == ready
    server = ask("ServerMetadata", inference.ServerMetadataRequest(), inference.ServerMetadataResponse)
    assert (server.name, server.version, list(server.extensions)) == (
        "obmlite",
        obmlite.__version__,
        ["model_repository"],
    )
    request = inference.ModelMetadataRequest(name="dense")
    model = ask("ModelMetadata", request, inference.ModelMetadataResponse)
    assert (model.name, sorted(model.versions), model.platform) == ("dense", ["1", "2"], "obmlite_stablehlo")
    assert [(t.name, t.datatype, list(t.shape)) for t in (*model.inputs, *model.outputs)] == [
        ("x", "FP32", [-1, 4]),
        ("output_0", "FP32", [-1, 3]),
    ]


def test_repository(channel):
    def index(ready=False):
        request = inference.RepositoryIndexRequest(ready=ready)
        response = call(channel, f"{INFERENCE}/RepositoryIndex", request, inference.RepositoryIndexResponse)
        return {(m.name, m.version): m.state for m in response.models}

    assert index(ready=True) == dict.fromkeys([("dense", "1"), ("dense", "2"), ("one", "1"), ("many", "1")], "READY")
    request = inference.RepositoryModelUnloadRequest(model_name="one")
    call(channel, f"{INFERENCE}/RepositoryModelUnload", request, inference.RepositoryModelUnloadResponse)
    assert ("one", "1") not in index(ready=True)
    assert fails(channel, f"{INFERENCE}/ModelInfer", infer_request("one", X))[0] == "NOT_FOUND"
    request = inference.RepositoryModelLoadRequest(repository_name="one")  # where KServe has the model's name
    call(channel, f"{INFERENCE}/RepositoryModelLoad", request, inference.RepositoryModelLoadResponse)
    assert index(ready=True)["one", "1"] == "READY"


def with_(request, **parameters):
    for name, value in parameters.items():
        request.inputs[0].parameters[name].string_param = value
    return request


@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        (infer_request("none", X), "NOT_FOUND", "Servable not found for request: Latest(none)"),
        (
            infer_request("dense", X, model_version="new"),
            "NOT_FOUND",
            "Servable not found for request: Specific(dense, new)",
        ),
        (infer_request("dense", {"f": X["x"]}), "INVALID_ARGUMENT", "unexpected input 'f'; expected: x"),
        (infer_request("dense", {}), "INVALID_ARGUMENT", "Missing but required: {x}."),
        (infer_request("one", X), "INVALID_ARGUMENT", "batch 2 does not match this model's fixed batch sizes [4]"),
        (
            infer_request("many", {"f": MANY["f"].astype(np.float64)}),
            "INVALID_ARGUMENT",
            "Input 'f': float32[2, 3] has other bytes: expected 24 bytes, found 48.",
        ),
        (
            with_(infer_request("dense", X), shared_memory_region="r"),
            "INVALID_ARGUMENT",
            "Tensors come in requests; 'shared_memory_region' is not served.",
        ),
        (b"\xff\xff", "INVALID_ARGUMENT", "The request is no ModelInferRequest."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_of_inference(channel, request_, code, text):
    found = fails(channel, f"{INFERENCE}/ModelInfer", request_)
    assert found[0] == code
    assert text in found[1]


def test_inputs_that_are_not_those_of_the_raw_contents(channel):
    request = infer_request("dense", X)
    request.raw_input_contents.append(b"")
    code, text = fails(channel, f"{INFERENCE}/ModelInfer", request)
    assert (code, text.partition(": ")[2]) == ("INVALID_ARGUMENT", "expected 1, found 2.")
    request = infer_request("dense", {"x": X["x"]})
    request.inputs.add().CopyFrom(request.inputs[0])
    request.raw_input_contents.append(request.raw_input_contents[0])
    assert fails(channel, f"{INFERENCE}/ModelInfer", request) == ("INVALID_ARGUMENT", "input 'x' is given twice")


# --- texts, which steps of the host take and give


class Host(HostStep):
    """A function of the host with one input and one output."""

    def __init__(self, name, call, input_, output):
        self.name, self.call = name, call
        self.signature = Handle("f", "saved_model", input_, output, tuple(input_), ("output",)).signature()

    def run(self, arguments):
        return self.call(*self.signature.match(arguments))


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A repository of one model: texts to the texts of twice their lengths."""

    def lengths(name, supplementals):
        return Host(name, lambda t: np.array([len(x) for x in t], np.int32), {"texts": "string[b]"}, "i32[b]")

    def digits(name, supplementals):
        call = lambda n: {"digits": np.array([b"%d" % x for x in np.asarray(n)], object)}  # noqa: E731
        return Host(name, call, {"numbers": "i32[b]"}, {"digits": "string[b]"})

    monkeypatch.setitem(HOST_STEPS, "application/x.lengths", lengths)
    monkeypatch.setitem(HOST_STEPS, "application/x.digits", digits)
    steps = {
        name: obmlite.Supplemental.from_bytes(b"", mime_type=f"application/x.{name}", version="1")
        for name in ("lengths", "digits")
    }
    double = obmlite.export(lambda n: n * 2, obmlite.spec("i32[b]"), name="double")
    pipeline = obmlite.Pipeline(pre=["lengths"], function="double", post=["digits"])
    obmlite.Model({"double": double}, pipelines={"main": pipeline}, supplementals=steps).save(tmp_path / "texts" / "1")
    repository = Repository([ModelConfig("texts", tmp_path / "texts")])
    repository.scan()
    yield repository
    repository.stop()


TEXTS = np.array([b"a", "größe".encode(), b"\xff\0"], object)


def test_texts_by_predict(texts):
    service = TensorFlowServing(texts, 1 << 20)
    response = service.predict(predict_request("texts", {"texts": TEXTS}), None)
    assert array("digits", response.outputs["digits"]).tolist() == [b"2", b"14", b"4"]
    request = tfs.GetModelMetadataRequest(model_spec=tfs.ModelSpec(name="texts"), metadata_field=["signature_def"])
    found = service.get_model_metadata(request, None).metadata["signature_def"].value
    assert tfs.SignatureDefMap.FromString(found).signature_def["main"].inputs["texts"].dtype == 7


@pytest.mark.parametrize("raw", [True, False])
def test_texts_by_infer(texts, raw):
    request = inference.ModelInferRequest(model_name="texts")
    tensor = request.inputs.add(name="texts", datatype="BYTES", shape=[3])
    if raw:
        request.raw_input_contents.append(to_bytes(TEXTS))
    else:
        tensor.contents.bytes_contents.extend(TEXTS)
    response = OpenInference(texts, 1 << 20).model_infer(request, None)
    assert (response.outputs[0].datatype, list(response.outputs[0].shape)) == ("BYTES", [3])
    if raw:
        assert response.raw_output_contents[0] == b"\1\0\0\x002\2\0\0\x0014\1\0\0\x004"
    else:
        assert list(response.outputs[0].contents.bytes_contents) == [b"2", b"14", b"4"]


# --- malformed messages

GOOD = {
    "Predict": predict_request("many", MANY).SerializeToString(),
    "GetModelMetadata": tfs.GetModelMetadataRequest(
        model_spec=tfs.ModelSpec(name="many"), metadata_field=["signature_def"]
    ).SerializeToString(),
    "GetModelStatus": tfs.GetModelStatusRequest(model_spec=tfs.ModelSpec(name="dense")).SerializeToString(),
    "ModelInfer": infer_request("dense", X, raw=False).SerializeToString(),
    "ModelMetadata": inference.ModelMetadataRequest(name="dense", version="1").SerializeToString(),
    "ModelReady": inference.ModelReadyRequest(name="dense", version="1").SerializeToString(),
    "RepositoryIndex": inference.RepositoryIndexRequest(ready=True).SerializeToString(),
    "RawInfer": infer_request("dense", X).SerializeToString(),
}


@st.composite
def mutated(draw):
    """A method and a good request of it with bytes changed, removed, put in, or doubled."""
    method = draw(st.sampled_from(sorted(GOOD)))
    data = bytearray(GOOD[method])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 8)))
        data[at:end] = draw(st.binary(max_size=8)) if draw(st.booleans()) else data[at:end] * 2
    return method.replace("RawInfer", "ModelInfer"), bytes(data)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutated())
def test_mutated_messages_are_answered_or_refused(repository, case):
    method, data = case
    found = {}
    for protocol in (TensorFlowServing, OpenInference):
        for methods in protocol(repository, 1 << 20).services().values():
            found |= methods
    try:
        assert isinstance(found[method](data), bytes)
    except ServingError as error:  # nothing else is raised
        assert error.code.name in ("INVALID_ARGUMENT", "NOT_FOUND")
        assert len(str(error)) < 2000


# --- the server


def test_an_error_of_ours_tells_nothing_and_does_not_end_the_server(channel, repository, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("secret")

    monkeypatch.setattr(type(repository), "status", broken)
    request = tfs.GetModelStatusRequest(model_spec=tfs.ModelSpec(name="dense"))
    method = "/tensorflow.serving.ModelService/GetModelStatus"
    assert fails(channel, method, request) == ("INTERNAL", "Internal error.")
    monkeypatch.undo()
    assert call(channel, method, request, tfs.GetModelStatusResponse).model_version_status


def test_a_long_error_fits_into_the_headers(channel):
    name = "ü" * 100_000
    assert fails(channel, f"{PREDICTION}/Predict", predict_request(name, X))[0] == "NOT_FOUND"


def test_requests_are_observed(repository):
    told = []
    server = serve(repository, "127.0.0.1:0", answered=lambda *facts: told.append(facts))
    try:
        with grpc.insecure_channel(server.address) as channel:
            predict(channel, "dense", X)
            infer(channel, infer_request("dense", X))
            fails(channel, f"{PREDICTION}/Predict", predict_request("dense", {}))
    finally:
        server.stop()
    assert [facts[:3] for facts in told] == [("dense", "Predict", "GRPC"), ("dense", "Infer", "GRPC")]
    assert all(0 < facts[3] < 30 for facts in told)


class Slow:
    """A repository whose only answer waits for an event."""

    def __init__(self, repository):
        self.entered, self.leave = threading.Semaphore(0), threading.Event()
        self._repository = repository

    @contextlib.contextmanager
    def acquire(self, **asked):
        self.entered.release()
        assert self.leave.wait(30)
        with self._repository.acquire(**asked) as found:
            yield found


def test_requests_in_flight_end_before_the_server(repository):
    slow = Slow(repository)
    server = serve(slow, "127.0.0.1:0")
    with grpc.insecure_channel(server.address) as channel:
        send = channel.unary_unary(f"{PREDICTION}/Predict")
        pending = send.future(predict_request("dense", X).SerializeToString(), timeout=30)
        assert slow.entered.acquire(timeout=30)
        stopping = threading.Thread(target=server.stop, args=(30,))
        stopping.start()
        slow.leave.set()
        assert tfs.PredictResponse.FromString(pending.result()).outputs
        stopping.join(30)
        assert not stopping.is_alive()


def test_there_is_a_limit_on_requests_that_wait(repository):
    slow = Slow(repository)
    server = serve(slow, "127.0.0.1:0", threads=1, max_requests=2)
    request = predict_request("dense", X).SerializeToString()
    try:
        with grpc.insecure_channel(server.address) as channel:
            send = channel.unary_unary(f"{PREDICTION}/Predict")
            first = send.future(request, timeout=30)
            assert slow.entered.acquire(timeout=30)
            others = [send.future(request, timeout=30) for _ in range(4)]
            codes = []
            refused = [other for other in others if _refused(other, codes)]
            slow.leave.set()
            assert first.result()
            assert len(refused) == 3
            assert set(codes) == {"RESOURCE_EXHAUSTED"}
    finally:
        slow.leave.set()
        server.stop(30)


def _refused(future, codes):
    """Whether it is refused at once; appends the code."""
    try:
        future.result(timeout=1)
    except grpc.FutureTimeoutError:
        return False
    except grpc.RpcError as error:
        codes.append(error.code().name)
        return True
    return False


def test_an_address_that_is_taken(repository):
    server = serve(repository, "127.0.0.1:0")
    try:
        with pytest.raises(ArgumentError, match="cannot listen") as caught:
            serve(repository, server.address)
        assert caught.value.found == server.address
    finally:
        server.stop()


def test_without_grpc_the_extra_is_named():
    code = (
        "import sys; sys.modules['grpc'] = None\n"
        "try: import obmlite.serving.grpc\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "gRPC needs the extra `grpc`: pip install 'obmlite[grpc]'\n"
