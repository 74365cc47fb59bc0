"""TensorFlow Serving's gRPC services and the Open Inference Protocol's, over a repository (extra ``grpc``).

Methods and messages are those of the originals on the wire, so their clients work; the messages are of our own proto
packages (:mod:`obmlite.serving.grpc.messages`), so that the originals may be imported beside them.

    server = obmlite.serving.grpc.serve(repository, "127.0.0.1:8500")
    server.stop(grace=5)
"""

try:
    import grpc
    from google.protobuf import message
except ImportError as error:
    raise ImportError("gRPC needs the extra `grpc`: pip install 'obmlite[grpc]'") from error

from obmlite.serving.grpc._server import MAX_MESSAGE_BYTES, Server, serve
from obmlite.serving.grpc._tensor_proto import array, tensor_proto

__all__ = ["MAX_MESSAGE_BYTES", "Server", "array", "serve", "tensor_proto"]

del grpc, message
