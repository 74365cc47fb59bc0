"""The figures of docs/trust.md: ``python -m tests.adversarial.figures`` writes its table anew from ``figures.json``.

``figures.json`` has the counts that ``fuzz --tally`` added up, and those of the readers that ``--readers N`` compares
on the crafted files and on N changed ones.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import sys
from typing import Any

import safetensors

from tests.adversarial import fuzzing

HERE = pathlib.Path(__file__).resolve().parent
FIGURES = HERE / "figures.json"
DOCUMENT = HERE.parents[1] / "docs" / "trust.md"
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->"

FINDINGS = ("crash", "hang", "memory", "exception", "wrong")
"""What must not come of an input, as :mod:`tests.adversarial.fuzzing` calls it."""

READERS = {"obmlite": "obmlite", "safetensors": "safetensors", "orbax": "orbax-checkpoint's `SafetensorsLayout`"}


def table(figures: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    from tests.adversarial.all import KINDS

    lines = _head("kind|what is changed", "inputs|refused|read|crashes|hangs|over memory|other exceptions|wrong data")
    totals: collections.Counter[str] = collections.Counter()
    for name, kind in KINDS.items():
        counts = collections.Counter(figures["kinds"].get(name, {}))
        totals.update(counts)
        lines.append(_row(f"`{name}`", kind.about, counts))
    lines.append(_row("all", "", totals))
    numbers = "refused|read as the format says|read, and break a rule|uninitialised memory given out|wrong data|crashes"
    lines += ["", *_head("reader|files", numbers)]
    for corpus in ("crafted", "changed"):
        for reader, title in READERS.items():
            counts = collections.Counter(figures["readers"][corpus][reader])
            shown = [counts["refused"], counts["right"], counts["forbidden"], counts["uninitialised"], counts["wrong"]]
            cells = " | ".join(f"{n:,}" for n in [*shown, counts["crash"] + counts["hang"] + counts["memory"]])
            lines.append(f"| {title} {figures['versions'].get(reader, '')} | {corpus}, {counts.total():,} | {cells} |")
    return "\n".join(lines) + "\n"


def _head(texts: str, numbers: str) -> list[str]:
    columns = [*texts.split("|"), *numbers.split("|")]
    rules = ["---"] * (texts.count("|") + 1) + ["---:"] * (numbers.count("|") + 1)
    return [f"| {' | '.join(columns)} |", f"| {' | '.join(rules)} |"]


def _row(name: str, about: str, counts: collections.Counter[str]) -> str:
    read = counts["same"] + counts["other"]
    refused = counts["refused"] + counts["crashed child"]
    cells = [counts.total(), refused, read, *(counts[finding] for finding in FINDINGS)]
    return f"| {name} | {about} | " + " | ".join(f"{n:,}" for n in cells) + " |"


def compare(count: int) -> dict[str, dict[str, dict[str, int]]]:
    """What each reader makes of the crafted files, and of changed ones."""
    from tests.adversarial import crafted, peers

    files = [*(file for file, _, _ in crafted.FORBIDDEN.values()), *crafted.ODD.values()]
    found: dict[str, dict[str, dict[str, int]]] = {"crafted": {}, "changed": {}}
    for reader in READERS:
        found["crafted"][reader] = dict(collections.Counter(peers.outcome(reader, file) for file in files))
        kind = peers.PEERS[f"peer-{reader}"]
        tally = fuzzing.run(kind, seed=1, seconds=3600, count=count, findings=str(HERE.parents[1] / ".cache" / "fuzz"))
        found["changed"][reader] = dict(tally.outcomes)
        print(reader, found["crafted"][reader], found["changed"][reader], flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--readers", type=int, help="compare the readers on so many changed files")
    parser.add_argument("--tally", help="counts to take for the kinds")
    options = parser.parse_args()
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"kinds": {}, "readers": {}, "versions": {}}
    if options.tally:
        figures["kinds"] = json.loads(pathlib.Path(options.tally).read_text())
    if options.readers:
        import orbax.checkpoint

        figures["readers"] = compare(options.readers)
        figures["versions"] = {"safetensors": safetensors.__version__, "orbax": orbax.checkpoint.__version__}
    FIGURES.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table(figures) + END + rest.split(END)[1], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
