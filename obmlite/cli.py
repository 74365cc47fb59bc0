"""The command line: ``obmlite show`` and ``obmlite verify``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import tqdm

from obmlite import listing
from obmlite._version import __version__
from obmlite.errors import ObmliteError
from obmlite.verify import verify
from obmlite.weights import size

GOOD, BAD, USAGE = 0, 1, 2
"""Exit codes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
      The exit code: 0 for a good package, 1 for a bad one or none, 2 for wrong usage.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options, parser)
        sys.stdout.flush()
    except ObmliteError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return BAD
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return GOOD
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="obmlite",
        description="Looks into packages of JAX functions and weights.",
        epilog="Exit codes: 0 good, 1 bad package or none, 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"obmlite {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    show = commands.add_parser("show", help="list what a package holds; reads only its manifest")
    show.add_argument("path", metavar="PATH", help="the package")
    show.add_argument("name", metavar="NAME", nargs="?", help="a function, weights, … to show in full")
    show.add_argument("--json", action="store_true", help="as JSON")
    show.add_argument("--leaves", type=_count, default=listing.LEAVES, metavar="N", help="leaves to show at most")
    show.add_argument("--all", action="store_true", help="show every leaf")
    show.set_defaults(run=_show)

    check = commands.add_parser("verify", help="read all of a package and compare it with its digests")
    check.add_argument("path", metavar="PATH", help="the package")
    check.add_argument("--json", action="store_true", help="as JSON")
    check.set_defaults(run=_verify)
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return count


def _show(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    found = listing.listing(options.path)
    kinds = ("functions", "weights", "pipelines", "polymorphic", "supplementals")
    if options.name is not None and not any(options.name in found[kind] for kind in kinds):
        names = ", ".join(name for kind in kinds for name in found[kind])
        parser.error(f"there is no {options.name!r} in {options.path}; there are {names or 'no objects'}")
    if options.json:
        chosen = found
        if options.name is not None:
            chosen = {kind: {options.name: found[kind][options.name]} for kind in kinds if options.name in found[kind]}
        print(json.dumps(chosen, indent=2, ensure_ascii=False, default=_plain))
        return GOOD
    for line in listing.text(found, options.name, leaves=None if options.all else options.leaves):
        print(_printable(line))
    return GOOD


def _plain(value: Any) -> Any:
    """What JSON lacks: bytes as hexadecimal digits."""
    return value.hex() if isinstance(value, bytes) else str(value)


def _printable(line: str) -> str:
    """Names come from the package: what would move a terminal's cursor is shown instead."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _verify(options: argparse.Namespace, _: argparse.ArgumentParser) -> int:
    with tqdm.tqdm(unit="B", unit_scale=True, desc="verifying", disable=None, delay=1) as bar:
        report = verify(options.path, progress=bar.update)
    if options.json:
        problems = [{"kind": type(p).__name__, **p.facts()} for p in report.problems]
        print(
            json.dumps(
                {
                    "package": report.package,
                    "good": report.good,
                    "problems": problems,
                    "extra": report.extra,
                    "files": report.files,
                    "nbytes": report.nbytes,
                },
                indent=2,
                ensure_ascii=False,
            )
        )
    else:
        for problem in report.problems:
            print(f"{type(problem).__name__}: {problem}")
        for path in report.extra:
            print(_printable(f"not part of the package: {path}"))
        count = f"{report.files} {'file' if report.files == 1 else 'files'}, {size(report.nbytes)}"
        print(f"{report.package}: {'good' if report.good else 'BAD'}, {count} read")
    return GOOD if report.good else BAD
