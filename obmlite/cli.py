"""The command line: ``obmlite show``, ``run``, ``verify`` and the other commands."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tqdm

from obmlite import _running, diff, listing, planning, signing
from obmlite._version import __version__
from obmlite.consolidate import consolidate
from obmlite.errors import ArgumentError, ObmliteError
from obmlite.foreign import realign
from obmlite.loading import load
from obmlite.plan.topology import Topology, parse_axes
from obmlite.serving import _command as serving
from obmlite.verify import verify
from obmlite.weights import size

GOOD, BAD, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes."""

PASSPHRASE = "OBMLITE_PASSPHRASE"  # noqa: S105 - where it is, and not what
"""The environment variable that may hold a private key's passphrase."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
      The exit code: 0 for a good package, 1 for a bad one or none, 2 for wrong usage, 130 after Ctrl-C.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options, parser)
        sys.stdout.flush()
    except ObmliteError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return BAD
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return GOOD
    except (ImportError, OSError) as error:  # what is not installed, a key that is not there, a full disk
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return BAD
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="obmlite",
        description="Looks into packages of JAX functions and weights.",
        epilog="Exit codes: 0 good, 1 bad package or none, or for diff a difference, 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"obmlite {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    show = commands.add_parser("show", help="list what a package holds; reads only its manifest")
    show.add_argument("path", metavar="PATH", help="the package")
    show.add_argument("name", metavar="NAME", nargs="?", help="a function, weights, … to show in full")
    show.add_argument("--json", action="store_true", help="as JSON")
    show.add_argument("--leaves", type=_count, default=listing.LEAVES, metavar="N", help="leaves to show at most")
    show.add_argument("--all", action="store_true", help="show every leaf")
    show.add_argument(
        "--ops",
        action="store_true",
        help="list the operations and custom calls of functions, and those that cannot be replayed; reads their files",
    )
    show.set_defaults(run=_show)

    run = commands.add_parser("run", help="run a pipeline on arrays from files, or on the package's examples")
    run.add_argument("path", metavar="PATH", help="the package")
    run.add_argument("pipeline", metavar="PIPELINE", nargs="?", help="the pipeline; the default one if left out")
    run.add_argument(
        "--input",
        type=_named,
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a leaf of the arguments from a .npy file; leaves by name from .npz or .safetensors; may be given again",
    )
    run.add_argument(
        "--output",
        type=_named,
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="a leaf of the results to a .npy file, or all to .npz or .safetensors; left out, they are described",
    )
    run.add_argument("--pad-batch", action="store_true", help="run an odd batch on the next larger size that there is")
    _add_public_key(run)
    run.add_argument("--untrusted", action="store_true", help="run a package from a stranger: see docs/trust.md")
    run.set_defaults(run=_run)

    extract = commands.add_parser("extract", help="write a supplemental out of a package")
    extract.add_argument("path", metavar="PATH", help="the package")
    extract.add_argument("name", metavar="NAME", help="the supplemental")
    extract.add_argument("--to", metavar="TARGET", help="the new file or directory; NAME here if left out")
    extract.set_defaults(run=_extract)

    compare = commands.add_parser("diff", help="say what differs between two packages; exit code 1 if anything does")
    compare.add_argument("a", metavar="A", help="a package")
    compare.add_argument("b", metavar="B", help="another")
    compare.add_argument("--values", action="store_true", help="read the tensors that differ, to say by how much")
    compare.add_argument("--json", action="store_true", help="as JSON")
    compare.set_defaults(run=_diff)

    plan = commands.add_parser("plan", help="say what each host would read to restore weights; reads only the manifest")
    plan.add_argument("path", metavar="PATH", help="the package")
    plan.add_argument(
        "--mesh",
        type=_parsed(parse_axes),
        required=True,
        metavar="AXIS=SIZE,…",
        help="the mesh, such as data=4,model=8",
    )
    plan.add_argument(
        "--hosts",
        type=_count,
        default=1,
        metavar="N",
        help="hosts, which have contiguous blocks of devices (default 1)",
    )
    plan.add_argument("--weights", metavar="NAME", help="only these weights")
    plan.add_argument(
        "--rules",
        type=_parsed(planning.parse_rules),
        metavar="NAME=AXIS,…",
        help="mesh axes (AXIS, AXIS+AXIS or None) of logical axes, and of saved mesh axes that the mesh lacks",
    )
    plan.add_argument(
        "--partition",
        type=_parsed(planning.parse_partition),
        action="append",
        default=[],
        metavar="GLOB=AXIS,…",
        help="split leaves whose names match so, not as saved; may be given again: the last that matches counts",
    )
    plan.add_argument(
        "--bandwidth",
        type=_positive,
        action="append",
        metavar="GIB",
        help="GiB per second that each host reads (default 1); may be given again",
    )
    plan.add_argument(
        "--broadcast", action="store_true", help="as if hosts that need the same bytes shared out the reading"
    )
    plan.add_argument("--json", action="store_true", help="as JSON")
    plan.set_defaults(run=_plan)

    whole = commands.add_parser("consolidate", help="copy a package, with tensors whole that lie in pieces")
    whole.add_argument("path", metavar="PATH", help="the package")
    whole.add_argument("out", metavar="OUT", help="the new one")
    whole.add_argument("--overwrite", action="store_true", help="replace a package that is there, also PATH itself")
    whole.add_argument(
        "--max-file-bytes", type=_count, metavar="N", help="bytes of tensors in one weights file (default 5 GB)"
    )
    whole.set_defaults(run=_consolidate)

    align = commands.add_parser(
        "realign", help="rewrite another library's safetensors files so that they can be mapped"
    )
    align.add_argument("path", metavar="PATH", help="a safetensors file, an index, or a directory")
    align.add_argument("out", metavar="OUT", help="the new file; or the directory of the new files and their index")
    align.add_argument("--overwrite", action="store_true", help="replace files that are there")
    align.set_defaults(run=_realign)

    check = commands.add_parser("verify", help="read all of a package and compare it with its digests")
    check.add_argument("path", metavar="PATH", help="the package")
    check.add_argument("--json", action="store_true", help="as JSON")
    _add_public_key(check)
    check.set_defaults(run=_verify)

    keys = commands.add_parser("keygen", help="make a pair of keys to sign packages with")
    keys.add_argument("key", metavar="KEY", help="the private key's new file; the public one's is KEY.pub")
    keys.add_argument(
        "--passphrase", action="store_true", help=f"encrypt it, with a passphrase that is asked for, or in {PASSPHRASE}"
    )
    keys.set_defaults(run=_keygen)

    sign = commands.add_parser("sign", help="sign a package, as it is now")
    sign.add_argument("path", metavar="PATH", help="the package")
    sign.add_argument("--key", required=True, metavar="KEY", help="the private key's file, as of keygen")
    sign.set_defaults(run=_sign)

    serving.add_parser(commands, _printable)
    return parser


def _add_public_key(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--public-key",
        action="append",
        metavar="FILE",
        help="refuse a package that is not signed with this key; may be given again: one of them suffices",
    )


def _count(text: str) -> int:
    count = int(text)
    if count < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return count


def _named(text: str) -> tuple[str, str]:
    """``NAME=FILE``, or a file without a name."""
    name, equals, file = text.partition("=")
    return (name, file) if equals else ("", text)


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("must be positive")
    return number


def _parsed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser of ours as argparse wants one."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ArgumentError as error:
            raise argparse.ArgumentTypeError(f"{error.problem} Expected: {error.expected}.") from error

    return parsed


def _show(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    found = listing.listing(options.path, operations=options.ops)
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


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    model = load(options.path, public_key=options.public_key, untrusted=options.untrusted)
    if options.pipeline is not None and options.pipeline not in model.pipelines:
        names = ", ".join(model.pipelines) or "no pipelines"
        parser.error(f"there is no pipeline {options.pipeline!r} in {options.path}; there are {names}")
    pipeline = model.pipeline if options.pipeline is None else model.pipelines[options.pipeline]
    call = pipeline.padded() if options.pad_batch else pipeline
    if options.input or not pipeline.signature.inputs.num_leaves:
        calls = [_running.read_inputs(pipeline, options.input)]
    else:
        calls = model.examples.get(pipeline.name, [])
        if not calls:
            parser.error(f"give --input: the package has no examples for {pipeline.signature}")
    if options.output and len(calls) > 1:
        parser.error(f"--output takes the results of one call, and there are {len(calls)} examples")
    for arguments in calls:
        args, keywords = pipeline.signature.spread(arguments)
        result = call(*args, **keywords)
        for name, path in _running.write_outputs(result, options.output):
            print(_printable(f"{name or 'result'} → {path}"))
        if not options.output:
            for line in _running.summary(_running.host_leaves(result)):
                print(_printable(line))
    return GOOD


def _extract(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    model = load(options.path)
    if options.name not in model.supplementals:
        names = ", ".join(model.supplementals) or "no supplementals"
        parser.error(f"there is no {options.name!r} in {options.path}; there are {names}")
    if options.to is None and (os.path.basename(options.name) != options.name or options.name in (".", "..")):
        parser.error(f"give --to: {options.name!r} is no file name")
    print(_printable(model.supplementals[options.name].extract(options.to or options.name)))
    return GOOD


def _diff(options: argparse.Namespace, _: argparse.ArgumentParser) -> int:
    found = diff.diff(options.a, options.b, values=options.values)
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False, default=_plain))
    else:
        for line in diff.text(found):
            print(_printable(line))
    return GOOD if found["same"] else BAD


def _plan(options: argparse.Namespace, _: argparse.ArgumentParser) -> int:
    topology = Topology(options.mesh, options.hosts)
    found = planning.package_traffic(
        options.path,
        topology,
        weights=options.weights,
        rules=options.rules,
        partitions=dict(options.partition),
        broadcast=options.broadcast,
    )
    if not found:
        print(f"{options.path} has no weights")
        return GOOD
    listed = planning.listing(found, topology, [number * planning.GIB for number in options.bandwidth or [1.0]])
    if options.json:
        print(json.dumps(listed, indent=2, ensure_ascii=False))
        return GOOD
    for line in planning.text(listed):
        print(_printable(line))
    return GOOD


def _consolidate(options: argparse.Namespace, _: argparse.ArgumentParser) -> int:
    consolidate(options.path, options.out, overwrite=options.overwrite, max_file_bytes=options.max_file_bytes)
    return GOOD


def _realign(options: argparse.Namespace, _: argparse.ArgumentParser) -> int:
    with tqdm.tqdm(unit="B", unit_scale=True, desc="writing", disable=None, delay=1) as bar:
        realign(options.path, options.out, overwrite=options.overwrite, progress=bar.update)
    return GOOD


def _verify(options: argparse.Namespace, _: argparse.ArgumentParser) -> int:
    with tqdm.tqdm(unit="B", unit_scale=True, desc="verifying", disable=None, delay=1) as bar:
        report = verify(options.path, public_key=options.public_key, progress=bar.update)
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
                    "signer": report.signer,
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
        if report.signer:
            print(f"signed with {report.signer}")
        count = f"{report.files} {'file' if report.files == 1 else 'files'}, {size(report.nbytes)}"
        print(f"{report.package}: {'good' if report.good else 'BAD'}, {count} read")
    return GOOD if report.good else BAD


def _keygen(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    passphrase = None
    if options.passphrase:
        passphrase = _passphrase("Passphrase: ")
        if PASSPHRASE not in os.environ and passphrase != getpass.getpass("Once more: "):
            parser.error("the passphrases differ")
    public, fingerprint = signing.keygen(options.key, passphrase=passphrase)
    print(_printable(f"{options.key}: the private key, for obmlite sign; keep it to yourself"))
    print(_printable(f"{public}: the public key {fingerprint}"))
    return GOOD


def _sign(options: argparse.Namespace, _: argparse.ArgumentParser) -> int:
    fingerprint = signing.sign(
        options.path, options.key, passphrase=lambda: _passphrase(f"{options.key}: passphrase: ")
    )
    print(_printable(f"{options.path}: signed with {fingerprint}"))
    return GOOD


def _passphrase(prompt: str) -> str:
    try:
        return os.environ.get(PASSPHRASE) or getpass.getpass(prompt)
    except EOFError:
        raise ArgumentError(
            "There is nobody who could be asked for the passphrase.",
            field="passphrase",
            expected="a terminal",
            found="no input",
            fix=f"put the passphrase into the environment variable {PASSPHRASE}",
        ) from None
