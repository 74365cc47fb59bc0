"""``obmlite serve``: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import jax

from obmlite.errors import ArgumentError
from obmlite.io.commit import MANIFEST
from obmlite.serving import config
from obmlite.serving.observer import Silent
from obmlite.serving.repository import Repository
from obmlite.serving.servable import State
from obmlite.serving.status import ServingError

__all__ = ["add_parser"]

MIB = 1 << 20
_MAX_BODY = 2047  # MiB: of messages, gRPC takes less than 2 GiB
_MAX_SECONDS = 1_000_000


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
        "--verify",
        choices=config.VERIFY,
        help="what is compared with a package's digests before it is served (default structure; with a key, lazy)",
    )
    parser.add_argument(
        "--public-key",
        action="append",
        metavar="FILE",
        help="serve no version that is not signed with this key; may be given again: one of them suffices",
    )
    parser.add_argument("--untrusted", action="store_true", help="serve packages from strangers: see docs/trust.md")
    parser.add_argument("--no-warmup", action="store_true", help="serve without calling a model first")
    parser.add_argument(
        "--poll", type=_seconds, default=1.0, metavar="SECONDS", help="between looks for versions; 0 to look only once"
    )
    parser.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="sites whose pages may ask; or *")
    parser.add_argument(
        "--max-body", type=_count(_MAX_BODY), default=64, metavar="MIB", help="of a request (default 64)"
    )
    parser.add_argument("--max-requests", type=_count(1 << 20), default=256, metavar="N", help="at once (default 256)")
    parser.add_argument(
        "--grace", type=_seconds, default=30.0, metavar="SECONDS", help="for requests when it is stopped"
    )
    parser.add_argument("--no-page", action="store_true", help="without the page at /")

    def run(options: argparse.Namespace, _: argparse.ArgumentParser) -> int:
        return _run(options, parser, printable)

    parser.set_defaults(run=run)


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) >= 1 << 16:
        raise argparse.ArgumentTypeError("must be from 0 to 65535")
    return int(text)


def _count(most: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"must be from 1 to {most}")
        return int(text)

    return count


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"must be from 0 to {_MAX_SECONDS}")
    return seconds


def _policy(text: str) -> config.Policy:
    if text in ("latest", "all"):
        return config.parse_policy(text)
    kind, _, rest = text.partition("=")
    if kind == "latest" and re.fullmatch(r"[1-9][0-9]{0,5}", rest):
        return config.Latest(int(rest))
    if kind == "specific" and re.fullmatch(r"[0-9]{1,18}(,[0-9]{1,18})*", rest):
        return config.Specific(tuple(map(int, rest.split(","))))
    raise argparse.ArgumentTypeError("expected latest, latest=N, all or specific=N,N")


def _models(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[config.ModelConfig]:
    if (options.base is None) == (options.config is None):
        parser.error("give BASE or --config, and not both")
    if options.config is not None:
        own = ("name", "policy", "verify", "public_key", "untrusted", "no_warmup")
        if given := [f"--{option.replace('_', '-')}" for option in own if getattr(options, option)]:
            parser.error(f"what {', '.join(given)} says stands in the file of --config, for each model")
        try:
            return config.read_config(options.config)
        except OSError as error:
            parser.error(f"{options.config} cannot be read: {error.strerror}")
    base = os.path.abspath(options.base)
    # What is not there yet may come. These will not become directories of versions by themselves.
    if not options.base or os.path.isfile(base):
        parser.error(f"{options.base!r} is no directory of versions")
    if os.path.exists(os.path.join(base, MANIFEST)):
        parser.error(
            f"{options.base} is a package itself, and not a directory of versions: move it to NAME/1 and serve NAME"
        )
    return [
        config.ModelConfig(
            options.name or os.path.basename(base),
            base,
            options.policy or config.Latest(),
            verify=options.verify or "structure",
            warmup=not options.no_warmup,
            public_key=options.public_key,
            untrusted=options.untrusted,
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

    # Each call is waited for: to hand it to another thread, as JAX does on CPUs, takes as long as a small model's call.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
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
        if error is None:  # why a version is not served is logged, and so goes to stderr
            self._say(f"{model} {version}: loaded in {seconds:.2f} s")

    def state(self, model: str, version: int, state: State) -> None:
        if state is State.UNLOADING:
            self._say(f"{model} {version}: unloading")
