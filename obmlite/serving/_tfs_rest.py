"""TensorFlow Serving's REST API, v1: predict by row and by column, status and metadata of models.

Paths, bodies, texts and codes are those of its ``http_rest_api_util.cc`` and ``json_tensor.cc``. A model's signatures
are its public pipelines.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from obmlite.serving import _json
from obmlite.serving._json import Array, Document, invalid, shown
from obmlite.serving._json_arrays import first_fault, is_base64, parse_array
from obmlite.serving._requests import Answer, CallRoute, Incoming, PathRoute, Service, json_response, raw_path
from obmlite.serving.interface import Interface, TensorInfo
from obmlite.serving.metrics import Metrics
from obmlite.serving.servable import Servable
from obmlite.serving.status import ServingError

__all__ = ["routes"]

_VERSION = r"(?:(?:/versions/(?P<version>\d+))|(?:/labels/(?P<label>[^/:]+)))?"
_PREDICT = rf"(?i:/v1/models/(?P<name>[^/:]+){_VERSION}:(?P<verb>classify|regress|predict))"
_STATUS = rf"(?i:/v1/models(?:/(?P<name>[^/:]+))?{_VERSION}(?P<metadata>/metadata)?)"

_MAX_VERSION = 2**63 - 1

_TYPES = {"object": "STRING", "bool": "BOOL", "float16": "HALF", "float32": "FLOAT", "float64": "DOUBLE"}


def routes(service: Service, metrics: Metrics) -> list[BaseRoute]:
    """The routes of the API, predictions first; the last one takes whatever else begins with ``/v1``."""
    api = _Api(service, metrics)
    return [
        CallRoute(_PREDICT, api.predict),
        PathRoute("GET", _STATUS, api.describe),
        PathRoute("", r"(?i:/v1)(?:/.*)?", _malformed),
    ]


async def _malformed(request: Request) -> Response:
    raise HTTPException(400, f"Malformed request: {request.method} {raw_path(request.scope)[:500]}")


def dtype_name(info: TensorInfo) -> str:
    """TensorFlow's name of a tensor's dtype, such as ``DT_FLOAT``."""
    return f"DT_{_TYPES.get(info.dtype.name, info.dtype.name.upper())}"


class _Api:
    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service, self._metrics = service, metrics

    async def predict(self, request: Incoming) -> Answer:
        """``POST …:predict``."""
        begun = time.perf_counter()
        name, version, label = _model(request.parameters)
        repository = self._service.repository
        async with self._service.body(request.headers, request.receive) as body:
            with repository.acquire(name, version, label) as servable:
                verb = request.parameters["verb"].lower()
                if verb != "predict":
                    raise invalid(
                        f"Expected {verb} signature method_name to be tensorflow/serving/{verb}. "
                        "Was: tensorflow/serving/predict"
                    )
                answer = await self._service.run(
                    len(body),
                    lambda: self._metrics.counted(name, lambda: _Call.parse(servable, body)),
                    _Call.key,
                    _Call.answer,
                    waits=repository.configs[name].batching is not None,
                )
        self._metrics.answered(name, "Predict", "REST", time.perf_counter() - begun)
        return Answer(answer, [(b"content-type", b"application/json")])

    async def describe(self, request: Request) -> Response:
        """``GET /v1/models/NAME…``: status, or metadata."""
        if "name" not in request.path_params:
            raise invalid("Missing model name in request.")
        name, version, label = _model(request.path_params)
        if "metadata" in request.path_params:
            with self._service.repository.acquire(name, version, label) as servable:
                return json_response(metadata(servable))
        found = self._service.repository.status(name, version, label)
        return json_response(
            {
                "model_version_status": [
                    {
                        "version": str(status.version),
                        "state": status.state.name,
                        "status": {"error_code": status.code.name, "error_message": status.message},
                    }
                    for status in found
                ]
            }
        )


def _model(parts: Mapping[str, str]) -> tuple[str, int | None, str | None]:
    text = parts.get("version")
    version = None if text is None or len(text) > 40 else int(text)
    if text is not None and (version is None or version > _MAX_VERSION):
        raise invalid(f"Failed to convert version: {text[:40]} to numeric.")
    return parts["name"], version, parts.get("label")


def metadata(servable: Servable) -> dict[str, Any]:
    """``GetModelMetadataResponse`` as its JSON."""
    signatures = {
        name: {
            "inputs": {key: _info(info) for key, info in interface.inputs.items()},
            "outputs": {key: _info(info) for key, info in interface.outputs.items()},
            "method_name": "tensorflow/serving/predict",
            "defaults": {},
        }
        for name, interface in servable.interfaces.items()
    }
    return {
        "model_spec": {"name": servable.name, "signature_name": "", "version": str(servable.version)},
        "metadata": {"signature_def": {"signature_def": signatures}},
    }


def _info(info: TensorInfo) -> dict[str, Any]:
    sizes = [{"size": "-1" if size is None else str(size), "name": ""} for size in info.shape]
    return {"dtype": dtype_name(info), "tensor_shape": {"dim": sizes, "unknown_rank": False}, "name": info.name}


class _Call:
    """A predict request that was read."""

    def __init__(self, servable: Servable, signature: str, inputs: dict[str, Array], by_row: bool) -> None:
        self.servable, self.signature, self.inputs, self.by_row = servable, signature, inputs, by_row

    @staticmethod
    def parse(servable: Servable, body: bytes) -> _Call:
        document = _json.parse_text(body)
        value = document.value
        if type(value) is not dict:
            raise invalid(f"JSON Value: {shown(value)} Is not object")
        signature = value.get("signature_name", "")
        if type(signature) is not str:
            raise invalid(
                f"JSON Value: {shown(value)} not formatted correctly. 'signature_name' key must be a string value."
            )
        interface = servable.interface(signature)
        if "instances" in value and "inputs" in value:
            raise invalid(
                f"JSON Value: {shown(value)} Not formatted correctly expecting only one of 'inputs' or 'instances' "
                "keys to exist"
            )
        if "instances" in value:
            return _Call(servable, signature, read_rows(value["instances"], interface, document), True)
        if "inputs" in value:
            return _Call(servable, signature, read_columns(value["inputs"], interface, document), False)
        raise invalid("Missing 'inputs' or 'instances' key")

    def key(self) -> tuple[Any, ...]:
        shapes = tuple([array.shape for array in self.inputs.values()])
        return self.servable.name, self.servable.version, self.servable.loaded_at, self.signature, shapes

    def answer(self) -> bytes:
        outputs = self.servable.predict(self.inputs, self.signature)
        return write_rows(outputs) if self.by_row else write_columns(outputs)


# --- requests


def read_rows(value: Any, interface: Interface, document: Document) -> dict[str, Array]:
    """The inputs of ``"instances"``: a list with a value, or an object of named values, for each row.

    Raises:
      ServingError: it is something else, or its values do not make tensors of the signature's dtypes.
    """
    if type(value) is not list:
        raise invalid(f"JSON Value: {shown(document.value)} Excepting 'instances' to be an list/array")
    if not value:
        raise invalid(f"JSON Value: {shown(document.value)} No values in 'instances' array")
    infos = interface.inputs
    named = type(value[0]) is dict and not is_base64(value[0])
    if not named:
        if len(infos) != 1:
            raise invalid(
                "instances is a plain list, but expecting list of objects as multiple input tensors required as per "
                "tensorinfo_map"
            )
        [(name, info)] = infos.items()
        return {name: _read_list(value, info, document, "")}
    for number, row in enumerate(value):
        if type(row) is not dict or is_base64(row):
            raise invalid(f"Expecting object but got list at item {number} of input list")
        if row.keys() != infos.keys():
            _raise_keys(number, row, infos)
    return {
        name: _read_list([row[name] for row in value], info, document, f" key: {name}") for name, info in infos.items()
    }


def _raise_keys(number: int, row: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> None:
    for key in row:
        if key not in infos:
            raise invalid(
                f"Failed to process element: {number} key: {key[:200]} of 'instances' list. "
                f"Error: INVALID_ARGUMENT: JSON object: does not have named input: {key[:200]}"
            )
    raise invalid(
        f"Failed to process element: {number} of 'instances' list. JSON object: {shown(row)} keys must be equal to: "
        f"{','.join(sorted(infos))}"
    )


def _read_list(values: list[Any], info: TensorInfo, document: Document, key: str) -> Array:
    try:
        return parse_array(values, info.dtype, booleans=document.booleans)
    except ServingError:
        number, problem = first_fault(values, info.dtype)
        if number == len(values):
            raise
    if not key and type(values[number]) is dict and not is_base64(values[number]):
        raise invalid(f"Expecting value/list but got object at item {number} of input list")
    raise invalid(f"Failed to process element: {number}{key} of 'instances' list. Error: INVALID_ARGUMENT: {problem}")


def read_columns(value: Any, interface: Interface, document: Document) -> dict[str, Array]:
    """The inputs of ``"inputs"``: one value, or an object of named ones, of which more than are asked for may come.

    Raises:
      ServingError: it is something else, or its values do not make tensors of the signature's dtypes.
    """
    infos = interface.inputs
    if type(value) is not dict or is_base64(value):
        if len(infos) != 1:
            raise invalid(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required as per "
                "tensorinfo_map"
            )
        value = {next(iter(infos)): value}
    for name in infos:
        if name not in value:
            raise invalid(f"Missing named input: {name} in 'inputs' object.")
    return {name: parse_array(value[name], info.dtype, booleans=document.booleans) for name, info in infos.items()}


# --- responses


def write_rows(outputs: Mapping[str, Array]) -> bytes:
    """``{"predictions": […]}``.

    Raises:
      ServingError: the outputs do not have one leading dimension in common.
    """
    sizes = {name: array.shape[0] if array.ndim else None for name, array in outputs.items()}
    size = next(iter(sizes.values()), None)
    for name, own in sizes.items():
        if own is None:
            raise invalid(f"Tensor name: {name} has no shape information; ask for it by 'inputs'")
        if own != size:
            raise invalid(f"Tensor name: {name} has inconsistent batch size: {own} expecting: {size}; ask by 'inputs'")
    if len(outputs) == 1:
        [(name, array)] = outputs.items()
        return _json.dumps({"predictions": _column(name, array)})
    columns = [_json.rows_of(array, binary=name.endswith("_bytes")) for name, array in outputs.items()]
    return _json.dumps({"predictions": [dict(zip(outputs, row, strict=True)) for row in zip(*columns, strict=True)]})


def write_columns(outputs: Mapping[str, Array]) -> bytes:
    """``{"outputs": …}``."""
    columns = {name: _column(name, array) for name, array in outputs.items()}
    return _json.dumps({"outputs": next(iter(columns.values())) if len(columns) == 1 else columns})


def _column(name: str, array: Array) -> Any:
    return _json.writable(np.asarray(array), binary=name.endswith("_bytes"))
