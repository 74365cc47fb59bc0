"""``obmlite serve``: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from obmlite.errors import ArgumentError
from obmlite.serving import config
from obmlite.serving.observer import Silent
from obmlite.serving.repository import Repository
from obmlite.serving.servable import State
from obmlite.serving.status import ServingError

__all__ = ["add_parser"]

MIB = 1 << 20


def add_parser(commands: Any, printable: Callable[[str], str]) -> None:
    """Adds the command to those of ``obmlite``.

    Args:
      commands: what ``add_subparsers`` gave.
      printable: makes a line safe for a terminal.
    """
    parser = commands.add_parser("serve", help="serve the versions of a model over HTTP, and gRPC if asked for")
    parser.add_argument("base", metavar="BASE", nargs="?", help="a directory of versions, BASE/1, BASE/2, …")
    parser.add_argument("--name", help="the model's name; that of the directory if left out")
    parser.add_argument("--config", metavar="FILE", help="a .toml or .json file of models, instead of BASE")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=_port, default=8501, help="of HTTP (default 8501); 0 for any that is free")
    parser.add_argument("--grpc-port", type=_port, help="of gRPC, usually 8500; no gRPC if left out")
    parser.add_argument(
        "--policy",
        type=_policy,
        metavar="POLICY",
        help="which versions: latest (default), latest=N, all, or specific=N,N",
    )
    parser.add_argument(
        "--verify", choices=config.VERIFY, help="how packages are checked before they are served (default structure)"
    )
    parser.add_argument("--no-warmup", action="store_true", help="serve without calling a model first")
    parser.add_argument("--poll", type=float, default=1.0, metavar="SECONDS", help="between looks for versions")
    parser.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="sites whose pages may ask; or *")
    parser.add_argument("--max-body", type=int, default=64, metavar="MIB", help="of a request (default 64)")
    parser.add_argument("--max-requests", type=int, default=256, metavar="N", help="at once (default 256)")
    parser.add_argument("--grace", type=float, default=30.0, metavar="SECONDS", help="for requests when it is stopped")
    parser.add_argument("--no-page", action="store_true", help="without the page at /")

    def run(options: argparse.Namespace, _: argparse.ArgumentParser) -> int:
        return _run(options, parser, printable)

    parser.set_defaults(run=run)


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port < 1 << 16:
        raise argparse.ArgumentTypeError("must be from 0 to 65535")
    return port


def _policy(text: str) -> config.Policy:
    if text in ("latest", "all"):
        return config.parse_policy(text)
    kind, _, rest = text.partition("=")
    if kind == "latest" and re.fullmatch(r"[1-9][0-9]{0,5}", rest):
        return config.Latest(int(rest))
    if kind == "specific" and re.fullmatch(r"[0-9]{1,19}(,[0-9]{1,19})*", rest):
        return config.Specific(tuple(map(int, rest.split(","))))
    raise argparse.ArgumentTypeError("expected latest, latest=N, all or specific=N,N")


def _models(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[config.ModelConfig]:
    if (options.base is None) == (options.config is None):
        parser.error("give BASE or --config, and not both")
    if options.config is not None:
        if options.name or options.policy or options.verify or options.no_warmup:
            parser.error("--name, --policy, --verify and --no-warmup stand in the file of --config")
        try:
            return config.read_config(options.config)
        except OSError as error:
            parser.error(f"{options.config} cannot be read: {error.strerror}")
    base = os.path.abspath(options.base)
    return [
        config.ModelConfig(
            options.name or os.path.basename(base),
            base,
            options.policy or config.Latest(),
            verify=options.verify or "structure",
            warmup=not options.no_warmup,
        )
    ]


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser, printable: Callable[[str], str]) -> int:
    def say(line: str) -> None:
        sys.stdout.write(f"{printable(line)}\n")
        sys.stdout.flush()

    models = _models(options, parser)
    try:
        from obmlite.serving.asgi import Limits
        from obmlite.serving.server import Server
    except ModuleNotFoundError as error:
        raise ArgumentError(
            "Serving needs what is not installed.",
            expected=str(error.name),
            fix='pip install "obmlite[serve]"',
        ) from error
    repository = Repository(models, poll_seconds=options.poll, observers=[_Log(say)])
    limits = Limits(body_bytes=options.max_body * MIB, requests=options.max_requests)
    server = Server(
        repository,
        host=options.host,
        port=options.port,
        grpc_port=options.grpc_port,
        limits=limits,
        cors=options.cors,
        page=not options.no_page,
        grace=options.grace,
    )

    def ready() -> None:
        for model in models:
            say(f"{model.name}: {model.base_path}, {model.policy}")
        say(f"listening at {server.url}{f', gRPC at {server.grpc_address}' if server.grpc_address else ''}")

    # What was imported stays, and later collections need not look at it. This comes before anything is loaded: models
    # are in cycles of references, and those that are frozen are never collected.
    gc.collect()
    gc.freeze()
    server.run(ready)
    say("stopped")
    return 0


class _Log(Silent):
    """Says which versions come and go."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def loaded(self, model: str, version: int, seconds: float, error: ServingError | None) -> None:
        what = f"loaded in {seconds:.2f} s" if error is None else f"not loaded: {error}"
        self._say(f"{model} {version}: {what}")

    def state(self, model: str, version: int, state: State) -> None:
        if state is State.UNLOADING:
            self._say(f"{model} {version}: unloading")
