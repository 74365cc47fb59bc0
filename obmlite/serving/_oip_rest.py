"""The Open Inference Protocol, v2, over HTTP: health, metadata, inference, and the model repository.

Tensors come and go as JSON or, by the binary tensor extension of Triton and KServe, as bytes behind the JSON. A model's
default pipeline is what is inferred; another one is asked for by the request's parameter ``"signature_name"``.

Source: https://github.com/kserve/open-inference-protocol, and Triton's extension_binary_data.md and
extension_model_repository.md.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from obmlite._version import __version__
from obmlite.serving import _json
from obmlite.serving._elements import checked_shape, from_bytes, to_bytes
from obmlite.serving._inference import PLATFORM, SERVER, STATES, datatype, version_number
from obmlite.serving._json import Array, Document, invalid, shown
from obmlite.serving._json_arrays import parse_tensor
from obmlite.serving._requests import Answer, CallRoute, Incoming, PathRoute, Service, json_response
from obmlite.serving.interface import Interface, TensorInfo
from obmlite.serving.metrics import Metrics
from obmlite.serving.servable import Servable, State

__all__ = ["HEADER", "routes"]

HEADER = "Inference-Header-Content-Length"
"""The header that has the bytes of JSON before a body's tensors."""

_HEADER = HEADER.lower().encode()
_LARGEST = 1 << 48  # bytes that a shape may claim: the body has as many, or it is refused
_MODEL = r"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?"


def routes(service: Service, metrics: Metrics) -> list[BaseRoute]:
    """The routes of the protocol."""
    api = _Api(service, metrics)
    return [
        CallRoute(rf"{_MODEL}/infer", api.infer),
        PathRoute("GET", r"/v2/?", api.server),
        PathRoute("GET", r"/v2/health/live", api.live),
        PathRoute("GET", r"/v2/health/ready", api.ready),
        PathRoute("POST", r"/v2/repository/index", api.index),
        PathRoute("POST", r"/v2/repository/models/(?P<name>[^/]+)/load", api.load),
        PathRoute("POST", r"/v2/repository/models/(?P<name>[^/]+)/unload", api.unload),
        PathRoute("GET", rf"{_MODEL}/ready", api.model_ready),
        PathRoute("GET", _MODEL, api.model),
    ]


class _Api:
    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service, self._metrics = service, metrics

    async def server(self, request: Request) -> Response:
        """``GET v2``."""
        extensions = ["binary_tensor_data", "model_repository"]
        return json_response({"name": SERVER, "version": __version__, "extensions": extensions})

    async def live(self, request: Request) -> Response:
        """``GET v2/health/live``."""
        return json_response({"live": True})

    async def ready(self, request: Request) -> Response:
        """``GET v2/health/ready``."""
        ready = self._service.repository.ready()
        return json_response({"ready": ready}, 200 if ready else 400)

    async def model_ready(self, request: Request) -> Response:
        """``GET v2/models/M/ready``."""
        name, version = _model(request.path_params)
        self._service.repository.status(name)  # raises for a model that is not known
        ready = self._service.repository.model_ready(name, version)
        return json_response({"name": name, "ready": ready}, 200 if ready else 400)

    async def model(self, request: Request) -> Response:
        """``GET v2/models/M``."""
        name, version = _model(request.path_params)
        repository = self._service.repository
        versions = [str(s.version) for s in repository.status(name) if s.state is State.AVAILABLE]
        with repository.acquire(name, version) as servable:
            interface = servable.interface()
            return json_response(
                {
                    "name": name,
                    "versions": versions,
                    "platform": PLATFORM,
                    "inputs": [_tensor(info) for info in interface.inputs.values()],
                    "outputs": [_tensor(info) for info in interface.outputs.values()],
                }
            )

    async def index(self, request: Request) -> Response:
        """``POST v2/repository/index``."""
        async with self._service.body(dict(request.scope["headers"]), request.receive) as body:
            asked = _parameters(body)
        repository = self._service.repository
        rows = [
            {"name": name, "version": str(s.version), "state": STATES[s.state], "reason": s.message}
            for name in repository.names()
            for s in repository.status(name)
        ]
        return json_response([row for row in rows if not asked.get("ready") or row["state"] == "READY"])

    async def load(self, request: Request) -> Response:
        """``POST v2/repository/models/M/load``."""
        async with self._service.body(dict(request.scope["headers"]), request.receive) as body:
            if _parameters(body).get("parameters"):
                raise invalid("A model is loaded as it is configured; 'parameters' cannot be given.")
        await self._service.in_thread(lambda: self._service.repository.load(request.path_params["name"]))
        return json_response({})

    async def unload(self, request: Request) -> Response:
        """``POST v2/repository/models/M/unload``."""
        async with self._service.body(dict(request.scope["headers"]), request.receive) as body:
            _parameters(body)
        await self._service.in_thread(lambda: self._service.repository.unload(request.path_params["name"]))
        return json_response({})

    async def infer(self, request: Incoming) -> Answer:
        """``POST v2/models/M/infer``."""
        begun = time.perf_counter()
        name, version = _model(request.parameters)
        repository = self._service.repository
        length = request.headers.get(_HEADER)
        async with self._service.body(request.headers, request.receive) as body:
            with repository.acquire(name, version) as servable:
                json_size = _json_size(body, length)
                answer, size = await self._service.run(
                    json_size,
                    lambda: self._metrics.counted(name, lambda: _Call.parse(servable, body, json_size)),
                    _Call.key,
                    _Call.answer,
                    waits=repository.configs[name].batching is not None,
                )
        self._metrics.answered(name, "Infer", "REST", time.perf_counter() - begun)
        if size is None:
            return Answer(answer, [(b"content-type", b"application/json")])
        return Answer(answer, [(_HEADER, b"%d" % size), (b"content-type", b"application/octet-stream")])


def _model(parts: Mapping[str, str]) -> tuple[str, int | None]:
    """The model and version of a path."""
    name, version = parts["name"], parts.get("version")
    return name, None if version is None else version_number(name, version)


def _json_size(body: bytes, header: bytes | None) -> int:
    if header is None:
        return len(body)
    if not header.isdigit() or len(header) > 18 or int(header) > len(body):
        raise invalid(f"{HEADER} is no number of bytes that the body has: {header[:40].decode('latin-1')}")
    return int(header)


def _parameters(body: bytes) -> dict[str, Any]:
    value = _json.parse_text(body).value if body else {}
    if type(value) is not dict:
        raise invalid(f"JSON Value: {shown(value)} Is not object")
    return value


def _tensor(info: TensorInfo) -> dict[str, Any]:
    return {"name": info.name, "datatype": datatype(info.dtype), "shape": [-1 if n is None else n for n in info.shape]}


class _Call:
    """An inference request that was read."""

    def __init__(self, servable: Servable, asked: dict[str, Any], inputs: dict[str, Array]) -> None:
        self.servable, self.inputs = servable, inputs
        self._id = _of_kind(asked, "id", str, "")
        parameters = _of_kind(asked, "parameters", dict, {})
        self._signature: str = _of_kind(parameters, "signature_name", str, "")
        binary = _of_kind(parameters, "binary_data_output", bool, False)
        interface = servable.interface(self._signature)
        self._binary = dict.fromkeys(interface.outputs, binary)
        wanted = _of_kind(asked, "outputs", list, [])
        self._wanted: list[str] = []
        for output in wanted:
            name = _name(output, "output", interface.outputs, self._wanted)
            self._wanted.append(name)
            self._binary[name] = _of_kind(_of_kind(output, "parameters", dict, {}), "binary_data", bool, binary)

    @staticmethod
    def parse(servable: Servable, body: bytes, size: int) -> _Call:
        """Reads a request, of whose body so many bytes are JSON, and tensors what is behind it."""
        document = _json.parse_text(body[:size])
        asked = document.value
        if type(asked) is not dict:
            raise invalid(f"JSON Value: {shown(asked)} Is not object")
        signature = _of_kind(_of_kind(asked, "parameters", dict, {}), "signature_name", str, "")
        inputs = read_inputs(asked, servable.interface(signature), document, memoryview(body)[size:])
        return _Call(servable, asked, inputs)

    def key(self) -> tuple[Any, ...]:
        shapes = tuple([array.shape for array in self.inputs.values()])
        return self.servable.name, self.servable.version, self.servable.loaded_at, self._signature, shapes

    def answer(self) -> tuple[bytes, int | None]:
        """The body, and bytes of its JSON if tensors lie behind it."""
        outputs = self.servable.predict(self.inputs, self._signature, self._wanted)
        interface = self.servable.interface(self._signature)
        tails: list[bytes] = []
        rows = []
        for name in self._wanted or outputs:
            array = outputs[name]
            row: dict[str, Any] = {
                "name": name,
                "datatype": datatype(interface.outputs[name].dtype),
                "shape": list(array.shape),
            }
            if self._binary[name]:
                tails.append(to_bytes(array))
                row["parameters"] = {"binary_data_size": len(tails[-1])}
            else:
                row["data"] = _json.writable(array.reshape(-1))
            rows.append(row)
        answer: dict[str, Any] = {"model_name": self.servable.name, "model_version": str(self.servable.version)}
        if self._id:
            answer["id"] = self._id
        answer["outputs"] = rows
        head = _json.dumps(answer)
        return (b"".join([head, *tails]), len(head)) if tails else (head, None)


def _of_kind(value: Any, key: str, kind: type, default: Any) -> Any:
    """What an object has under a key, which may be left out."""
    found = value.get(key, default)
    if type(found) is not kind:
        raise invalid(f"{key!r} of {shown(value)} is not of type {kind.__name__}")
    return found


def _name(value: Any, what: str, known: Mapping[str, TensorInfo], taken: Any) -> str:
    name = value.get("name") if type(value) is dict else None
    if type(name) is not str:
        raise invalid(f"JSON Value: {shown(value)} is no {what}: it has no name")
    if name not in known:
        raise invalid(f"unexpected {what} {name[:200]!r}; expected: {', '.join(known)}")
    if name in taken:
        raise invalid(f"{what} {name[:200]!r} is given twice")
    return name


# --- tensors


def read_inputs(
    asked: Mapping[str, Any], interface: Interface, document: Document, tail: memoryview
) -> dict[str, Array]:
    """The inputs of a request.

    Args:
      asked: the request.
      interface: what is called.
      document: that the request is of.
      tail: what comes behind the JSON.

    Raises:
      ServingError: an input is not known or comes twice, its datatype is not the signature's, its data do not make a
        tensor of its shape, or bytes are missing or left over.
    """
    if type(asked.get("inputs")) is not list:
        raise invalid("Missing 'inputs' key, or it is no list")
    inputs: dict[str, Array] = {}
    at = 0
    for value in asked["inputs"]:
        name = _name(value, "input", interface.inputs, inputs)
        info = interface.inputs[name]
        if value.get("datatype") != datatype(info.dtype):
            given = shown(value.get("datatype"))
            raise invalid(f"input {name!r}: expected datatype {datatype(info.dtype)} ({info.text}), got {given}")
        sizes = value.get("shape")
        if type(sizes) is not list or not all(type(n) is int for n in sizes):
            raise invalid(f"input {name!r}: 'shape' is no list of sizes: {shown(sizes)}")
        shape = checked_shape(name, sizes, info.dtype.itemsize, _LARGEST)
        size = _of_kind(value, "parameters", dict, {}).get("binary_data_size")
        if size is None:
            if "data" not in value:
                raise invalid(f"input {name!r} has neither 'data' nor a parameter 'binary_data_size'")
            inputs[name] = parse_tensor(value["data"], info.dtype, shape, booleans=document.booleans)
            continue
        if type(size) is not int or not 0 <= size <= len(tail) - at:
            raise invalid(f"input {name!r}: 'binary_data_size' is {shown(size)}, and {len(tail) - at} bytes are left")
        inputs[name] = from_bytes(name, tail[at : at + size], info.dtype, shape)
        at += size
    if at != len(tail):
        raise invalid(f"{len(tail) - at} bytes behind the JSON belong to no input")
    return inputs
