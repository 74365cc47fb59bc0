"""``tensorflow.serving.PredictionService`` and ``ModelService`` over a repository.

Source: tensorflow_serving/apis/{prediction_service,model_service,predict,get_model_metadata,get_model_status}.proto.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from obmlite.serving.grpc._methods import Method, Methods
from obmlite.serving.grpc._tensor_proto import array, data_type, fill
from obmlite.serving.grpc.messages import tensorflow_serving as tfs
from obmlite.serving.interface import Array, Interface, TensorInfo
from obmlite.serving.servable import DEFAULT, Servable
from obmlite.serving.status import Code, ServingError

__all__ = ["TensorFlowServing"]

_SIGNATURE_DEF = "signature_def"
_ANY = "type.googleapis.com/tensorflow.serving.SignatureDefMap"
_METHOD = "tensorflow/serving/predict"
_NOTHING: Array = np.empty(0)


class TensorFlowServing(Methods):
    """The methods; answers are told of as ``"Predict"``."""

    def services(self) -> dict[str, dict[str, Method]]:
        """Service → method → what does it."""
        return {
            "tensorflow.serving.PredictionService": {
                "Predict": Method(tfs.PredictRequest, self.predict),
                "GetModelMetadata": Method(tfs.GetModelMetadataRequest, self.get_model_metadata),
            },
            "tensorflow.serving.ModelService": {
                "GetModelStatus": Method(tfs.GetModelStatusRequest, self.get_model_status)
            },
        }

    def predict(self, request: Any, timeout: float | None) -> Any:
        """PredictRequest → PredictResponse."""
        begun = time.perf_counter()
        with self._repository.acquire(**_asked(request)) as servable:
            signature = request.model_spec.signature_name
            inputs = self._inputs(request, servable.interface(signature))
            outputs = servable.predict(inputs, signature, tuple(request.output_filter), timeout=timeout)
            response = tfs.PredictResponse(model_spec=_effective(servable, signature or DEFAULT))
        for name, values in outputs.items():
            fill(response.outputs[name], values)
        if self._answered is not None:
            self._answered(servable.name, "Predict", "GRPC", time.perf_counter() - begun)
        return response

    def _inputs(self, request: Any, interface: Interface) -> dict[str, Array]:
        """The inputs of a request by name; of those that the signature has not, the name alone."""
        found: dict[str, Array] = {}
        left = self._limit  # for all of them: a few bytes may stand for any number of values
        for name, proto in request.inputs.items():
            found[name] = array(name, proto, left) if name in interface.inputs else _NOTHING
            left -= found[name].nbytes
        return found

    def get_model_metadata(self, request: Any, timeout: float | None) -> Any:
        """GetModelMetadataRequest → GetModelMetadataResponse, of all signatures."""
        fields = list(request.metadata_field)
        if not fields or any(field != _SIGNATURE_DEF for field in fields):
            raise ServingError(
                Code.INVALID_ARGUMENT,
                f"metadata_field has to be {_SIGNATURE_DEF!r}, got {', '.join(fields) or 'none'}.",
            )
        with self._repository.acquire(**_asked(request)) as servable:
            signatures = tfs.SignatureDefMap(
                signature_def={name: _signature(interface) for name, interface in servable.interfaces.items()}
            )
            response = tfs.GetModelMetadataResponse(model_spec=_effective(servable, ""))
        response.metadata[_SIGNATURE_DEF].CopyFrom(tfs.Any(type_url=_ANY, value=signatures.SerializeToString()))
        return response

    def get_model_status(self, request: Any, timeout: float | None) -> Any:
        """GetModelStatusRequest → GetModelStatusResponse."""
        found = self._repository.status(**_asked(request))
        statuses = [
            tfs.ModelVersionStatus(
                version=status.version,
                state=status.state.value,
                status=tfs.StatusProto(error_code=status.code.value, error_message=status.message),
            )
            for status in found
        ]
        return tfs.GetModelStatusResponse(model_version_status=statuses)


def _asked(request: Any) -> dict[str, Any]:
    """Which model a request asks for, as the repository's methods take it."""
    spec = request.model_spec
    if not spec.name:
        raise ServingError(Code.INVALID_ARGUMENT, "Missing model name in the request's model_spec.")
    return {
        "name": spec.name,
        "version": spec.version.value if spec.HasField("version") else None,
        "label": spec.version_label if spec.HasField("version_label") else None,
    }


def _effective(servable: Servable, signature: str) -> Any:
    """Which model answered."""
    return tfs.ModelSpec(name=servable.name, version=tfs.Int64Value(value=servable.version), signature_name=signature)


def _signature(interface: Interface) -> Any:
    """The SignatureDef of a pipeline."""
    return tfs.SignatureDef(
        inputs={name: _tensor_info(info) for name, info in interface.inputs.items()},
        outputs={name: _tensor_info(info) for name, info in interface.outputs.items()},
        method_name=_METHOD,
    )


def _tensor_info(info: TensorInfo) -> Any:
    sizes = [tfs.TensorShapeProto.Dim(size=-1 if size is None else size) for size in info.shape]
    return tfs.TensorInfo(name=info.name, dtype=data_type(info.dtype), tensor_shape=tfs.TensorShapeProto(dim=sizes))
