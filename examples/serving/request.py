"""Sends handwritten digits to a server, as jax2tf's ``model_server_request.py`` does, and counts what it reads right.

    python examples/serving/request.py --model_spec_name=mnist --serving_batch_size=16 --count_images=128
    python examples/serving/request.py --model_spec_name=mnist --nouse_grpc --prediction_service_addr=localhost:8501

The server may be ``obmlite serve`` or TensorFlow Serving itself: the protocol is the same. Of obmlite only the messages
are used, in place of tensorflow-serving-api; any client of TensorFlow Serving's will do.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np

from obmlite.serving.grpc import array, tensor_proto
from obmlite.serving.grpc.messages import tensorflow_serving

sys.path.insert(0, str(Path(__file__).parent.parent))
import digits_model

INPUT = "images"
"""The parameter's name in examples/mnist.py."""


class Refused(Exception):  # noqa: N818 - an answer like any other
    """The server's answer is an error."""


def by_grpc(address: str, model: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function from images, f32[b,8,8,1], to logarithms of probabilities, f32[b,10], by PredictionService."""
    method = grpc.insecure_channel(address).unary_unary(
        "/tensorflow.serving.PredictionService/Predict",
        request_serializer=tensorflow_serving.PredictRequest.SerializeToString,
        response_deserializer=tensorflow_serving.PredictResponse.FromString,
    )

    def call(images: np.ndarray) -> np.ndarray:
        request = tensorflow_serving.PredictRequest(inputs={INPUT: tensor_proto(images)})
        request.model_spec.name = model
        try:
            response = method(request, timeout=60)
        except grpc.RpcError as error:
            raise Refused(f"{error.code().name}: {error.details()}") from error
        [(name, output)] = response.outputs.items()
        return array(name, output)

    return call


def by_rest(address: str, model: str) -> Callable[[np.ndarray], np.ndarray]:
    """The same by the REST API."""

    def call(images: np.ndarray) -> np.ndarray:
        body = json.dumps({"inputs": images.tolist()}).encode()
        try:
            with urllib.request.urlopen(f"http://{address}/v1/models/{model}:predict", body, timeout=60) as response:
                return np.asarray(json.load(response)["outputs"], np.float32)
        except urllib.error.HTTPError as error:
            with error:
                raise Refused(f"{error.code}: {json.load(error)['error']}") from error

    return call


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_spec_name", default="mnist", help="the name under which the model is served (default: mnist)")
    add("--use_grpc", action="store_true", default=True, help="by gRPC, which is the default")
    add("--nouse_grpc", dest="use_grpc", action="store_false", help="by REST")
    add(
        "--prediction_service_addr",
        default="localhost:8500",
        help="host and port (default: localhost:8500; obmlite serve has REST at localhost:8501)",
    )
    add("--serving_batch_size", type=int, default=1, help="images in a request; divides --count_images (default: 1)")
    add("--count_images", type=int, default=16, help="images to send, at most 360 (default: 16)")
    options = parser.parse_args()
    if options.serving_batch_size < 1 or options.count_images % options.serving_batch_size:
        parser.error("--count_images has to be a multiple of --serving_batch_size")
    return options


def main() -> int:
    options = parse()
    _, held_out = digits_model.load_data()
    send = (by_grpc if options.use_grpc else by_rest)(options.prediction_service_addr, options.model_spec_name)
    right = 0
    for start in range(0, options.count_images, options.serving_batch_size):
        chosen = slice(start, start + options.serving_batch_size)
        try:
            digits = send(held_out.images[chosen]).argmax(axis=-1)
        except Refused as error:
            print(f"the server refuses: {error}")
            return 1
        right += int((digits == held_out.labels[chosen]).sum())
    print(f"accuracy on {options.count_images} images: {right / options.count_images:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
