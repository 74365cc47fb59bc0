"""The REST application under Ray Serve: replicas on many machines, autoscaling, versions that change without a gap.

    from ray import serve
    app = obmlite.serving.ray.application([ModelConfig("mnist", "/models/mnist")], num_replicas=2)
    serve.run(app, name="mnist")                       # http://…:8000/v1/models/mnist:predict

It is :func:`obmlite.serving.asgi.build_app` as it is. Each replica has a repository of its own over the same directory,
which all machines must see. Extra: ``ray``. Seen with Ray 2.60.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from obmlite.errors import ArgumentError
from obmlite.serving.config import ModelConfig, read_config
from obmlite.serving.repository import Repository
from obmlite.serving.status import Code, ServingError

try:
    from ray import serve
except ImportError as error:
    raise ImportError("Ray Serve needs the extra `ray`: pip install 'obmlite[ray]'") from error

if TYPE_CHECKING:
    from obmlite.serving.asgi import Limits

__all__ = ["application", "build"]

NAME = "obmlite"
"""The deployment's name, unless another is given."""


def application(
    models: Sequence[ModelConfig],
    *,
    wait: float = 600.0,
    limits: Limits | None = None,
    repository: Mapping[str, Any] | None = None,
    **deployment: Any,
) -> Any:
    """An application for ``serve.run``.

    A replica takes requests once all models are loaded and warmed up. Two things change a version. A policy such as
    ``Latest`` has every replica take up a new directory by itself, each at its next look. An application with another
    policy, run under the same name, has Ray replace one replica after the other, and keep the old ones where the new
    ones do not come up.

    Args:
      models: what each replica serves; their paths are read on the replicas' machines.
      wait: seconds within which a replica has to have a version of every model, or it fails.
      limits: what clients may take from a replica.
      repository: further arguments of its :class:`~obmlite.serving.Repository`, such as ``poll_seconds``.
      deployment: options of ``serve.deployment``: ``num_replicas``, ``autoscaling_config``, ``ray_actor_options``, ….

    Raises:
      ArgumentError: there are no models.
    """
    if not models:
        raise ArgumentError("An application serves no models.", field="models", expected="at least one ModelConfig")
    own, options = copy.deepcopy(list(models)), dict(repository or {})

    def built() -> Any:  # on the replica: repositories have threads and do not travel
        return _Started(Repository(own, **options), wait, limits)

    deployment.setdefault("name", NAME)
    # Ray's defaults: 5, which leaves a replica idle that answers in less than a millisecond; and as many as come.
    deployment.setdefault("max_ongoing_requests", 64)
    deployment.setdefault("max_queued_requests", 256)
    return serve.deployment(**deployment)(serve.ingress(built)()).bind()


def build(arguments: Mapping[str, str]) -> Any:
    """The same for Ray's command line and its configuration files.

    ``serve run obmlite.serving.ray:build name=mnist base=/models/mnist``, or ``config=models.toml`` with a file for
    :func:`~obmlite.serving.read_config`.

    Raises:
      ArgumentError: other arguments.
    """
    given = dict(arguments)
    if given.keys() == {"config"}:
        return application(read_config(given["config"]))
    if given.keys() == {"name", "base"}:
        return application([ModelConfig(given["name"], given["base"])])
    raise ArgumentError(
        "The application needs to know its models.",
        field="arguments",
        expected="name=NAME base=DIRECTORY, or config=FILE",
        found=", ".join(given) or "nothing",
    )


class _Started:
    """The application of a repository that runs as long as it does."""

    def __init__(self, repository: Repository, wait: float, limits: Limits | None) -> None:
        from obmlite.serving.asgi import build_app

        self._repository = repository
        self._wait = wait
        self._app = build_app(repository, limits=limits)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            if not await asyncio.to_thread(self._repository.start, self._wait):
                raise ServingError(Code.UNAVAILABLE, f"A replica does not come up: {_reasons(self._repository)}")
            await self._app(scope, receive, send)
        finally:
            await asyncio.to_thread(self._repository.stop)


def _reasons(repository: Repository) -> str:
    """Why models are not served."""
    found = []
    for name in repository.names():
        if not repository.model_ready(name):
            texts = [status.message for status in repository.status(name) if status.message]
            texts += [str(problem) for problem in [repository.problem(name)] if problem is not None]
            found.append(f"{name}: {' '.join(texts) or 'there is no version in time.'}")
    return "; ".join(found)
