"""Servers for ``benchmarks.serving``, each in a process of its own: ``python -m benchmarks.servers KIND BASE CORE``.

All listen at a free port of this machine, which is the only line that they print, and end with their standard input.
"""

from __future__ import annotations

import os
import pathlib
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import obmlite

NAME = "mlp"
SIZES = (784, 128, 10)


def save(base: str) -> None:
    """Version 1 of the model that is served: a small network of any batch."""

    def mlp(params: Any, x: Any) -> Any:
        return jax.nn.relu(x @ params["first"]) @ params["second"]

    numbers = np.random.default_rng(0)
    params = {
        name: numbers.standard_normal(shape).astype(np.float32) / 28
        for name, shape in (("first", SIZES[:2]), ("second", SIZES[1:]))
    }
    model = obmlite.Model.from_function(mlp, params, obmlite.spec(f"f32[b,{SIZES[0]}]"), name=NAME, platforms="cpu")
    model.save(pathlib.Path(base) / "1")


def serve_obmlite(base: str, port: int) -> None:
    """The command, as anyone starts it."""
    from obmlite import cli

    cli.main(["serve", base, "--name", NAME, "--port", str(port)])


def serve_starlette(base: str, port: int) -> None:
    """Starlette and Uvicorn: an echo, which sends as many bytes as the path says; and the least that makes the call."""
    import orjson
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    loaded = obmlite.load(pathlib.Path(base) / "1")

    async def echo(request: Request) -> Response:
        await request.body()
        return Response(bytes(request.path_params["size"]), media_type="application/octet-stream")

    async def by_json(request: Request) -> Response:
        x = np.asarray(orjson.loads(await request.body())["instances"], np.float32)
        body = orjson.dumps({"predictions": np.asarray(loaded(x))}, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(body, media_type="application/json")

    async def in_bytes(request: Request) -> Response:
        head, body = int(request.headers["Inference-Header-Content-Length"]), await request.body()
        x = np.frombuffer(body, np.float32, offset=head).reshape(-1, SIZES[0])
        return Response(np.asarray(loaded(x)).tobytes(), media_type="application/octet-stream")

    routes = [("/{size:int}", echo), (f"/v1/models/{NAME}:predict", by_json), (f"/v2/models/{NAME}/infer", in_bytes)]
    app = Starlette(routes=[Route(path, endpoint, methods=["POST"]) for path, endpoint in routes])
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="error", server_header=False)


def serve_kserve(base: str, port: int) -> None:
    """KServe's SDK over the same package, written as its documentation has it; without its line for each request."""
    import logging

    import kserve

    logging.disable(logging.INFO)

    loaded = obmlite.load(pathlib.Path(base) / "1")

    class Served(kserve.Model):
        def load(self) -> bool:
            self.ready = True
            return True

        def predict(self, payload: Any, *_: Any, **__: Any) -> Any:
            if isinstance(payload, dict):
                return {"predictions": np.asarray(loaded(np.asarray(payload["instances"], np.float32))).tolist()}
            result = np.asarray(loaded(payload.inputs[0].as_numpy()))
            output = kserve.InferOutput("output_0", list(result.shape), "FP32")
            output.set_data_from_numpy(result, binary_data=True)
            return kserve.InferResponse(payload.id or "", self.name, [output])

    model = Served(NAME)
    model.load()
    server = kserve.ModelServer(http_port=port, enable_grpc=False, enable_latency_logging=False, access_log_format=None)
    server.start([model])


KINDS: dict[str, Callable[[str, int], None]] = {
    "obmlite": serve_obmlite,
    "starlette": serve_starlette,
    "kserve": serve_kserve,
}


def _main(kind: str, base: str, core: str) -> None:
    if core:
        os.sched_setaffinity(0, {int(core)})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    print(port, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    KINDS[kind](base, port)


if __name__ == "__main__":
    _main(*sys.argv[1:])
