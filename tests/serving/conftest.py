"""Models that are served, for the tests of protocols over HTTP: small packages, saved once; and a client in process."""

from __future__ import annotations

import asyncio
import gc
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from obmlite.serving import ModelConfig, Repository


def half(x: Any) -> Any:
    return x * 0.5 + 2


def many(a: Any, n: Any, flag: Any) -> Any:
    return {"sum": a.sum(-1) + n, "twice": a * 2, "not": ~flag}


def echo(f: Any, d: Any, i: Any, u: Any, h: Any, g: Any) -> Any:
    return {"f": f, "d": d, "i": i, "u": u, "h": h, "g": g}


def scalar(x: Any) -> Any:
    return {"total": x.sum(), "same": x}


@pytest.fixture(scope="module", autouse=True)
def _of_others():
    """What other tests have left is not looked at each time that a version is dropped, which takes half a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory of models: ``half`` in two versions, ``many``, ``fixed``, ``kinds`` and ``scalar``."""
    base = tmp_path_factory.mktemp("models")
    spec = obmlite.spec

    def model(fn: Any, *specs: str, name: str) -> obmlite.Model:
        return obmlite.Model.from_function(fn, *map(spec, specs), weights=None, name=name, platforms="cpu")

    for version in (1, 2):
        made = model(half, "f32[b]", name="half").with_examples(np.array([1.0, 2.0, 5.0], "f4"))
        made.save(base / "half" / str(version))
    model(many, "f32[b,3]", "i32[b]", "bool[b]", name="many").save(base / "many" / "1")
    model(jnp.tanh, "f32[2,3]", name="fixed").save(base / "fixed" / "1")
    names = ("f32[n]", "f16[n]", "i8[n]", "u16[n]", "bf16[n]", "bool[n]")
    model(echo, *names, name="echo").save(base / "kinds" / "1")
    model(scalar, "f32[n]", name="scalar").save(base / "scalar" / "1")
    return base


@pytest.fixture(scope="session")
def repository(models: pathlib.Path) -> Iterator[Repository]:
    """All of them, served."""
    configs = [ModelConfig(path.name, str(path)) for path in sorted(models.iterdir()) if path.name != "half"]
    both = ModelConfig("half", str(models / "half"), obmlite.serving.All(), labels={"stable": 1, "canary": 2})
    made = Repository([both, *configs])
    made.scan()
    assert made.ready(), [made.status(name) for name in made.names()]
    yield made
    made.stop()


class Client:
    """Sends requests to an application in this process; an error that it raises is no answer, and fails the test."""

    def __init__(self, app: Any) -> None:
        import httpx

        self._runner = asyncio.Runner()
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://testserver")

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is None or isinstance(body, bytes):
            return self.send(method, path, body, given)
        return self.send(method, path, json.dumps(body).encode(), {"Content-Type": "application/json", **given})

    def send(self, method: str, path: str, body: bytes | None, headers: dict[str, Any]) -> Any:
        return self._runner.run(self._client.request(method, path, content=body, headers=headers))

    def close(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()


@pytest.fixture
def new_client() -> Iterator[Callable[[Any], Client]]:
    """Makes clients of other applications."""
    made: list[Client] = []

    def make(app: Any) -> Client:
        made.append(Client(app))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def client(repository: Repository) -> Iterator[Client]:
    """A client of the REST application over those models."""
    from obmlite.serving.asgi import build_app

    made = Client(build_app(repository))
    yield made
    made.close()
