"""A KServe model server over a directory of versions: v1 and v2 requests, REST and gRPC, by KServe's own server.

    pip install kserve obmlite
    python examples/kserve_model.py --model_name mnist --base /mnt/models --http_port 8080

In an InferenceService this is the command of a custom predictor; KServe mounts ``storageUri`` at /mnt/models, which
has to hold numbered versions. KServe has no versions of its own: the newest is served, and a new one taken up as it
appears.
``obmlite serve`` speaks the same protocol without KServe, in the same kind of container.
"""

from __future__ import annotations

import argparse
import uuid
from typing import Any

import kserve
import numpy as np
from kserve.errors import InferenceError, InvalidInput, ModelNotReady

from obmlite.serving import Code, ModelConfig, Repository, ServingError, TensorInfo

DATATYPES = {"bool": "BOOL", "float16": "FP16", "float32": "FP32", "float64": "FP64", "object": "BYTES"}


class Package(kserve.Model):
    """Versions of a package as a model of KServe's."""

    def __init__(self, name: str, base: str) -> None:
        super().__init__(name)
        self.repository = Repository([ModelConfig(name, base)])

    def load(self) -> bool:
        self.ready = self.repository.start(wait=600)
        return self.ready

    def stop(self) -> None:
        self.repository.stop()

    async def healthy(self) -> bool:
        return self.repository.ready()

    async def get_input_types(self) -> list[dict[str, Any]]:
        with self.repository.acquire(self.name) as servable:
            return [described(info) for info in servable.interface().inputs.values()]

    async def get_output_types(self) -> list[dict[str, Any]]:
        with self.repository.acquire(self.name) as servable:
            return [described(info) for info in servable.interface().outputs.values()]

    def predict(self, payload: Any, *_: Any, **__: Any) -> Any:  # KServe adds headers
        try:
            with self.repository.acquire(self.name) as servable:
                infos = servable.interface().inputs
                by_row = isinstance(payload, dict)
                outputs = servable.predict(rows(payload, infos) if by_row else tensors(payload))
                version = str(servable.version)
        except ServingError as error:
            raise translated(error, self.name) from error
        if by_row:
            return {"predictions": predictions(outputs)}
        found = [kserve.InferOutput(n, list(v.shape), datatype(v.dtype)) for n, v in outputs.items()]
        for output, values in zip(found, outputs.values(), strict=True):
            output.set_data_from_numpy(values, binary_data=payload.use_binary_outputs)
        return kserve.InferResponse(payload.id or str(uuid.uuid4()), self.name, found, model_version=version)


def tensors(payload: kserve.InferRequest) -> dict[str, np.ndarray]:
    """The inputs of a v2 request."""
    return {tensor.name: tensor.as_numpy() for tensor in payload.inputs}


def rows(payload: dict[str, Any], infos: dict[str, TensorInfo]) -> dict[str, np.ndarray]:
    """The inputs of a v1 request, which has no dtypes: those of the signature."""
    instances = payload["instances"]
    if len(infos) == 1 and not isinstance(instances[0], dict):
        [(name, info)] = infos.items()
        return {name: numbers(name, instances, info)}
    return {name: numbers(name, [row[name] for row in instances], info) for name, info in infos.items()}


def numbers(name: str, values: Any, info: TensorInfo) -> np.ndarray:
    try:
        return np.asarray(values, info.dtype)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidInput(f"Input '{name}' is no {info.text}: {error}") from error


def predictions(outputs: dict[str, np.ndarray]) -> list[Any]:
    """The rows of a v1 answer: values, or objects where there are several outputs."""
    lists = {name: values.tolist() for name, values in outputs.items()}
    if len(lists) == 1:
        return list(*lists.values())
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def datatype(dtype: np.dtype) -> str:
    return DATATYPES.get(dtype.name, dtype.name.upper())


def described(info: TensorInfo) -> dict[str, Any]:
    shape = [-1 if size is None else size for size in info.shape]
    return {"name": info.name, "datatype": datatype(info.dtype), "shape": shape}


def translated(error: ServingError, name: str) -> Exception:
    """KServe's exception, which has the status of HTTP."""
    if error.code is Code.INVALID_ARGUMENT:
        return InvalidInput(str(error))
    if error.code in (Code.NOT_FOUND, Code.UNAVAILABLE):
        return ModelNotReady(name, str(error))
    return InferenceError(str(error))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(parents=[kserve.model_server.parser])
    parser.add_argument("--base", default="/mnt/models", help="directory of versions (default: /mnt/models)")
    options, _ = parser.parse_known_args()
    model = Package(options.model_name, options.base)
    model.load()
    kserve.ModelServer().start([model])
