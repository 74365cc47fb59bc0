"""``inference.GRPCInferenceService``, the Open Inference Protocol, over a repository.

Source: github.com/kserve/open-inference-protocol, and its model repository extension.
"""

from __future__ import annotations

import time
from typing import Any

from obmlite._version import __version__
from obmlite.serving._elements import to_bytes
from obmlite.serving._inference import PLATFORM, SERVER, STATES, datatype, version_number
from obmlite.serving.grpc._infer_tensor import array, contents, field
from obmlite.serving.grpc._methods import Method, Methods
from obmlite.serving.grpc.messages import inference
from obmlite.serving.interface import Array, Interface, TensorInfo
from obmlite.serving.servable import State
from obmlite.serving.status import Code, ServingError

__all__ = ["OpenInference"]

_EXTENSIONS = ("model_repository",)
_OTHER_PLACES = {"shared_memory_region", "classification"}
"""Parameters of Triton's that ask for tensors to be somewhere or something else."""


class OpenInference(Methods):
    """The methods; answers are told of as ``"Infer"``."""

    def services(self) -> dict[str, dict[str, Method]]:
        """Service → method → what does it."""
        return {
            "inference.GRPCInferenceService": {
                "ServerLive": Method(inference.ServerLiveRequest, self.server_live),
                "ServerReady": Method(inference.ServerReadyRequest, self.server_ready),
                "ModelReady": Method(inference.ModelReadyRequest, self.model_ready),
                "ServerMetadata": Method(inference.ServerMetadataRequest, self.server_metadata),
                "ModelMetadata": Method(inference.ModelMetadataRequest, self.model_metadata),
                "ModelInfer": Method(inference.ModelInferRequest, self.model_infer),
                "RepositoryIndex": Method(inference.RepositoryIndexRequest, self.repository_index),
                "RepositoryModelLoad": Method(inference.RepositoryModelLoadRequest, self.repository_model_load),
                "RepositoryModelUnload": Method(inference.RepositoryModelUnloadRequest, self.repository_model_unload),
            }
        }

    def server_live(self, request: Any, timeout: float | None) -> Any:
        """Whether there is a server."""
        return inference.ServerLiveResponse(live=True)

    def server_ready(self, request: Any, timeout: float | None) -> Any:
        """Whether each model has a version that is served."""
        return inference.ServerReadyResponse(ready=self._repository.ready())

    def model_ready(self, request: Any, timeout: float | None) -> Any:
        """Whether a version, or any, of a model is served."""
        asked = _asked(request.name, request.version)
        self._repository.status(request.name)  # raises for a model that is not known
        return inference.ModelReadyResponse(ready=self._repository.model_ready(**asked))

    def server_metadata(self, request: Any, timeout: float | None) -> Any:
        """Name, version and extensions of the server."""
        return inference.ServerMetadataResponse(name=SERVER, version=__version__, extensions=_EXTENSIONS)

    def model_metadata(self, request: Any, timeout: float | None) -> Any:
        """Inputs and outputs of a model's default pipeline, and the versions that are served."""
        with self._repository.acquire(**_asked(request.name, request.version)) as servable:
            interface = servable.interface()
            known = self._repository.status(servable.name)
            return inference.ModelMetadataResponse(
                name=servable.name,
                versions=[str(s.version) for s in known if s.state is State.AVAILABLE],
                platform=PLATFORM,
                inputs=[_metadata(info) for info in interface.inputs.values()],
                outputs=[_metadata(info) for info in interface.outputs.values()],
            )

    def model_infer(self, request: Any, timeout: float | None) -> Any:
        """The answer of a model's default pipeline, or of the one that the parameter ``"signature_name"`` names.

        It has the form of the request: as bytes, or in ``contents`` where each output has a field there.
        """
        begun = time.perf_counter()
        signature = self._signature(request)
        wanted = [output.name for output in request.outputs]
        with self._repository.acquire(**_asked(request.model_name, request.model_version)) as servable:
            inputs = self._inputs(request, servable.interface(signature))
            outputs = servable.predict(inputs, signature, wanted, timeout=timeout)
            found = inference.ModelInferResponse(
                model_name=servable.name, model_version=str(servable.version), id=request.id
            )
        as_bytes = bool(request.raw_input_contents) or not all(field(values.dtype) for values in outputs.values())
        for name in wanted or outputs:
            values = outputs[name]
            tensor = found.outputs.add(name=name, datatype=datatype(values.dtype), shape=values.shape)
            if as_bytes:
                found.raw_output_contents.append(to_bytes(values))
            else:
                tensor.contents.CopyFrom(contents(values))
        if self._answered is not None:
            self._answered(servable.name, "Infer", "GRPC", time.perf_counter() - begun)
        return found

    def _signature(self, request: Any) -> str:
        for tensor in (*request.inputs, *request.outputs):
            for name in tensor.parameters:
                if name in _OTHER_PLACES:
                    raise ServingError(Code.INVALID_ARGUMENT, f"Tensors come in requests; {name!r} is not served.")
        if "signature_name" not in request.parameters:
            return ""
        parameter = request.parameters["signature_name"]
        if parameter.WhichOneof("parameter_choice") != "string_param":
            raise ServingError(Code.INVALID_ARGUMENT, "The parameter 'signature_name' has to be a text.")
        return str(parameter.string_param)

    def _inputs(self, request: Any, interface: Interface) -> dict[str, Array]:
        """The inputs of a request by name."""
        raw = request.raw_input_contents
        if raw and len(raw) != len(request.inputs):
            raise ServingError(
                Code.INVALID_ARGUMENT,
                "raw_input_contents has other elements than there are inputs: "
                f"expected {len(request.inputs)}, found {len(raw)}.",
            )
        found: dict[str, Array] = {}
        left = self._limit
        for place, tensor in enumerate(request.inputs):
            info = interface.inputs.get(tensor.name)
            if info is None:
                known = ", ".join(interface.inputs)
                raise ServingError(
                    Code.INVALID_ARGUMENT, f"unexpected input {tensor.name[:200]!r}; expected: {known}", expected=known
                )
            if tensor.name in found:
                raise ServingError(Code.INVALID_ARGUMENT, f"input {tensor.name[:200]!r} is given twice")
            found[tensor.name] = array(tensor, raw[place] if raw else None, info, left)
            left -= found[tensor.name].nbytes
        return found

    def repository_index(self, request: Any, timeout: float | None) -> Any:
        """All versions of all models; with ``ready`` those that are served."""
        found = inference.RepositoryIndexResponse()
        for name in self._repository.names():
            for status in self._repository.status(name):
                state = STATES[status.state]
                if state == "READY" or not request.ready:
                    found.models.add(name=name, version=str(status.version), state=state, reason=status.message)
        return found

    def repository_model_load(self, request: Any, timeout: float | None) -> Any:
        """Loads what was unloaded."""
        self._repository.load(_model_name(request))
        return inference.RepositoryModelLoadResponse()

    def repository_model_unload(self, request: Any, timeout: float | None) -> Any:
        """Drops a model until it is loaded again."""
        self._repository.unload(_model_name(request))
        return inference.RepositoryModelUnloadResponse()


def _model_name(request: Any) -> str:
    """The model to load or unload. KServe's messages have its name where Triton's have a repository's."""
    return str(request.model_name or request.repository_name)


def _asked(name: str, version: str) -> dict[str, Any]:
    """Which model a request asks for, as the repository's methods take it."""
    return {"name": name, "version": version_number(name, version) if version else None}


def _metadata(info: TensorInfo) -> Any:
    return inference.ModelMetadataResponse.TensorMetadata(
        name=info.name,
        datatype=datatype(info.dtype),
        shape=[-1 if size is None else size for size in info.shape],
    )
