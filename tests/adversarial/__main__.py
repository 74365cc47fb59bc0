"""``python -m tests.adversarial``: tries inputs, or one that was kept again.

``fuzz [--seconds 60] [--kind manifest …] [--count N] [--seed N]``: as ``make fuzz`` does it.
``replay FILE``: an input that was kept; its name begins with its kind.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time

from tests.adversarial import fuzzing
from tests.adversarial.kinds import Kind

FINDINGS = pathlib.Path(__file__).resolve().parents[2] / ".cache" / "fuzz"


def find(name: str) -> Kind:
    """A kind by its name. What it needs is imported when it is asked for."""
    if name == "broken":
        from tests.adversarial.broken import BROKEN

        return BROKEN
    if name.startswith("peer-"):
        from tests.adversarial.peers import PEERS

        return PEERS[name]
    from tests.adversarial.all import KINDS

    return KINDS[name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    fuzz = commands.add_parser("fuzz", help="try inputs")
    fuzz.add_argument("--seconds", type=float, default=60, help="for all kinds together")
    fuzz.add_argument("--kind", action="append", help="only this one; may be given again")
    fuzz.add_argument("--count", type=int, default=sys.maxsize, help="inputs of each kind at most")
    fuzz.add_argument("--seed", type=int, default=None, help="left out, another one each time")
    fuzz.add_argument("--tally", help="a JSON file to which counts are added")
    replay = commands.add_parser("replay", help="try one input that was kept")
    replay.add_argument("file")
    child = commands.add_parser("child")
    child.add_argument("arguments", nargs=6)
    options = parser.parse_args()
    if options.command == "child":
        kind, seed, seconds, count, place, findings = options.arguments
        fuzzing.child(find(kind), int(seed), float(seconds), int(count), place, findings)
        return 0
    if options.command == "replay":
        path = pathlib.Path(options.file)
        outcome, error = fuzzing.one(find(path.name.rpartition("-")[0]), path.read_bytes())
        print(outcome)
        if error is not None:
            raise error
        return 0
    return _fuzz(options)


def _fuzz(options: argparse.Namespace) -> int:
    seed = int(time.time()) if options.seed is None else options.seed
    chosen = options.kind
    if not chosen:
        from tests.adversarial.all import KINDS

        chosen = list(KINDS)
    findings = 0
    print(f"seed {seed}; inputs that are kept are in {FINDINGS}")
    for name in chosen:
        begun = time.monotonic()
        seconds = options.seconds / len(chosen)
        tally = fuzzing.run(find(name), seed=seed, seconds=seconds, count=options.count, findings=str(FINDINGS))
        counts = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(tally.outcomes.items()))
        print(f"{name}: {tally.inputs:,} inputs in {time.monotonic() - begun:.0f} s: {counts}", flush=True)
        for what, places in tally.findings.items():
            for place, files in places.items():
                findings += 1
                print(f"  {what}: {place}\n    {files[0]}", flush=True)
        if options.tally:
            _add(pathlib.Path(options.tally), name, tally)
    return 1 if findings else 0


def _add(path: pathlib.Path, name: str, tally: fuzzing.Tally) -> None:
    totals = json.loads(path.read_text()) if path.exists() else {}
    counts = totals.setdefault(name, {})
    for outcome, count in tally.outcomes.items():
        counts[outcome] = counts.get(outcome, 0) + count
    path.write_text(json.dumps(totals, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
