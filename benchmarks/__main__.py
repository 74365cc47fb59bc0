"""``python -m benchmarks``: measures, prints the tables, and writes them into docs/benchmarks.md."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence

from benchmarks import calls, report, verifying
from benchmarks.contenders import BUDGET, CONTENDERS, available, remove
from benchmarks.layouts import DEVICES
from benchmarks.measure import Job, Measured, measure
from benchmarks.report import Goal, Section
from benchmarks.trees import TREES

_HERE = os.path.dirname(os.path.abspath(__file__))
_DOCS = os.path.join(os.path.dirname(_HERE), "docs", "benchmarks.md")
_MIB = 1 << 20

_SAVE = ("obmlite", "safetensors", "flax", "orbax", "numpy", "hashing")
_RESTORE = ("obmlite", "safetensors", "flax", "orbax", "numpy")
_RESTORE_ODD = ("obmlite", "safetensors", "copy")
_LEADING = ("obmlite", "safetensors-put", "orbax", "orbax-safetensors", "copy")
_LAST = ("obmlite", "obmlite-budget", "safetensors-put", "orbax", "orbax-safetensors", "copy")
_SMALL = ("obmlite", "safetensors", "put", "put-each")
_SMALL_REPLICATED = ("obmlite", "safetensors-put", "put", "put-each")
_LIST = ("obmlite", "safetensors", "header")
_IMPORT = {"obmlite": "obmlite", "safetensors": "safetensors.flax", "flax": "flax", "orbax": "orbax.checkpoint"}


class Bench:
    """One run of the benchmark over a directory of its own."""

    def __init__(self, directory: str, size: float, rounds: int, only: Sequence[str]) -> None:
        self._directory = directory
        self._size = size
        self._rounds = rounds
        self._only = only

    def _chosen(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self._only]

    def _path(self, contender: str, tree: str) -> str:
        writer = CONTENDERS[contender].uses or contender
        return os.path.join(self._directory, f"{writer}-{tree}{CONTENDERS[writer].suffix}")

    def _job(self, case: str, contender: str, tree: str, layout: str = "") -> Job:
        return Job(case, contender, tree, self._size, self._path(contender, tree), layout)

    def _what(self, tree: str) -> str:
        """How much a tree is, for people."""
        shapes = TREES[tree](self._size)
        return f"{report.size(4 * sum(map(math.prod, shapes.values())))} in {len(shapes):,} tensors"

    def _interleaved(self, names: Sequence[str], rounds: int) -> Iterator[str]:
        """Every contender once a round, each round begun by another one."""
        for number in range(rounds):
            yield from (names[(number + n) % len(names)] for n in range(len(names)))

    def _files(self, names: Sequence[str], tree: str) -> None:
        """Makes the files that contenders read, where an earlier case has not left them."""
        for name in dict.fromkeys(CONTENDERS[name].uses or name for name in names):
            if not os.path.exists(self._path(name, tree)):
                measure(self._job("save", name, tree))
        os.sync()

    def _clean(self, tree: str) -> None:
        for name in CONTENDERS:
            remove(self._path(name, tree))

    def save(self) -> Section:
        """Saving, until the bytes are durable."""
        names = self._chosen(_SAVE)
        section = Section(f"Save, until durable: {self._what('large')}", [_save_goal()])
        for name in self._interleaved(names, self._rounds):
            remove(self._path(name, "large"))
            os.sync()
            _add(section, CONTENDERS[name].title, measure(self._job("save", name, "large")))
        return _ordered(section, names)

    def restore(self, tree: str) -> Section:
        """Restoring to one CPU device, from files that the kernel has in memory."""
        names = self._chosen(_RESTORE if tree == "large" else _RESTORE_ODD)
        self._files(names, tree)
        if tree == "large":
            section = Section(
                f"Restore on one CPU device: {self._what(tree)}, half of them, with 1 % of the bytes, of odd shapes",
                [
                    Goal("below 30 ms", lambda s: s.seconds() < 0.030),
                    Goal("below 5 MiB of memory", lambda s: (s.anonymous() or 0) < 5 * _MIB),
                ],
            )
        else:
            section = Section(f"Restore on one CPU device: {self._what(tree)}, all of odd shapes")
        for name in self._interleaved(names, self._rounds):
            _read(self._path(name, tree))
            _add(section, CONTENDERS[name].title, measure(self._job("restore", name, tree)))
        self._clean(tree)
        return _ordered(section, names)

    def sharded(self) -> Iterator[Section]:
        """Restoring onto several CPU devices, each of which holds a part, from files that the kernel has in memory."""
        copy = CONTENDERS["copy"].title
        what = f"{self._what('large')}, the odd ones, with 1 % of the bytes, on each"
        leading = Section(
            f"Restore over {DEVICES} CPU devices, first dimension: {what}",
            [
                Goal("below 60 ms", lambda s: s.seconds() < 0.060),
                Goal(
                    "below 5 MiB of memory beside one copy of what lies unaligned",
                    lambda s: (s.anonymous() or 0) - _copied(s) < 5 * _MIB,
                ),
            ],
        )
        yield self._layout(leading, _LEADING, "leading")
        last = Section(
            f"Restore over {DEVICES} CPU devices, last dimension: {what}",
            [
                Goal(f"at most 1.3 × {copy}", lambda s: s.seconds() <= 1.3 * s.seconds(copy)),
                Goal("memory, file pages included, at most the bytes + 64 MiB", lambda s: _beside(s, "obmlite") <= 64),
                Goal(
                    f"with memory_budget={BUDGET >> 20} MiB at most that + the bytes + 64 MiB",
                    lambda s: _beside(s, CONTENDERS["obmlite-budget"].title) <= (BUDGET >> 20) + 64,
                ),
            ],
        )
        yield self._layout(last, _LAST, "last")
        self._clean("large")

    def _layout(self, section: Section, contenders: Sequence[str], layout: str) -> Section:
        names = self._chosen(contenders)
        self._files(names, "large")
        for name in self._interleaved(names, self._rounds):
            _read(self._path(name, "large"))
            _add(section, CONTENDERS[name].title, measure(self._job("restore", name, "large", layout)))
        return _ordered(section, names)

    def small(self) -> Iterator[Section]:
        """Restoring many small tensors, where what each costs is all that counts."""
        for contenders, layout, where in (
            (_SMALL, "", "on one CPU device"),
            (_SMALL_REPLICATED, "replicated", f"on each of {DEVICES} CPU devices"),
        ):
            names = self._chosen(contenders)
            self._files(names, "small")
            section = Section(f"Restore many small tensors {where}: {self._what('small')}", per="leaves")
            for name in self._interleaved(names, self._rounds):
                _read(self._path(name, "small"))
                _add(section, CONTENDERS[name].title, measure(self._job("restore", name, "small", layout)))
            yield _ordered(section, names)
        self._clean("small")

    def list(self) -> Section:
        """Opening and listing what there is of many tensors."""
        names = self._chosen(_LIST)
        self._files(names, "many")
        section = Section(
            f"Open and list names, shapes and dtypes: {self._what('many')}",
            [Goal("below 100 ms", lambda s: s.seconds() < 0.1)],
        )
        for name in self._interleaved(names, 2 * self._rounds - 1):
            _read(self._path(name, "many"))
            _add(section, CONTENDERS[name].title, measure(self._job("list", name, "many")))
        self._clean("many")
        return _ordered(section, names)

    def verify(self) -> Section:
        """Opening a package, and comparing more or less of it with its digests."""
        self._files(["obmlite"], "large")
        small = os.path.join(self._directory, "obmlite-small")
        measure(Job("save", "obmlite", "large", 0.001, small))
        peer, lazy = list(verifying.KINDS)[-1], 'obmlite, verify="structure"'
        section = Section(
            f'Open, with verify="all" where nothing else is said: {self._what("large")}',
            [
                Goal(f"at 90 % of the rate of {peer}, at the least", lambda s: s.seconds(peer) >= 0.9 * s.seconds()),
                Goal('verify="structure" below 5 ms', lambda s: s.seconds(lazy) < 0.005),
            ],
        )
        for number in range(2 * self._rounds - 1):
            _read(self._path("obmlite", "large"))
            found = verifying.in_child("large", self._size, self._path("obmlite", "large"), small, number)
            for title in verifying.KINDS:
                _add(section, title, Measured(found[title], None, None, {}))
        remove(small)
        self._clean("large")
        return section

    def imports(self) -> Section:
        """What an import costs that comes after those of jax and numpy."""
        names = self._chosen(list(_IMPORT))
        path = os.path.join(self._directory, "obmlite-small")
        measure(Job("save", "obmlite", "large", 0.001, path))
        section = Section(
            "Import, behind jax and numpy, bytecode cached",
            [
                Goal(
                    "below 25 ms, opening a package of 160 tensors and its checks included",
                    lambda s: s.seconds(_CHECKED) < 0.025,
                )
            ],
        )
        for name in names:
            measure(Job("import", _IMPORT[name], "", 0, path))  # leaves the bytecode behind
        for name in self._interleaved(names, 2 * self._rounds - 1):
            run = measure(Job("import", _IMPORT[name], "", 0, path))
            _add(section, _IMPORT[name], run)
            if "checks" in run.facts:
                whole = Measured(run.seconds + run.facts["checks"], run.anonymous, run.resident, {})
                _add(section, _CHECKED, whole)
        remove(path)
        return section

    def calls(self) -> Iterator[Section]:
        """What a call costs, over few and many leaves, natively and loaded."""
        calls.in_child("make-calls", self._directory)
        results = [calls.in_child("calls", self._directory) for _ in range(self._rounds)]
        for leaves in calls.LEAVES:
            goals = [Goal("a loaded function at most 5 µs over native jit", _over_native)]
            if leaves > 100:
                goals.append(Goal("with bound weights below native jit", _bound_below_native))
            section = Section(f"Call: a small function of {leaves} arrays", goals)
            for result in results:
                for name, seconds in calls.kinds(result, leaves):
                    title = "obmlite" if name == "obmlite function" else name
                    _add(section, title, Measured(seconds, None, None, {}))
            yield section

    def first(self) -> Iterator[Section]:
        """From the start of a process to its first prediction."""
        calls.in_child("make-first", self._directory)
        for suffix, what, most in (("plain", "no LAPACK call", 0.7), ("lapack", "a LAPACK call", 0.8)):
            peer = calls.TITLES["export"]
            goal = Goal(
                f"below {most:.2f} × {peer}", lambda s, most=most, peer=peer: s.seconds() < most * s.seconds(peer)
            )
            section = Section(f"Process start to first prediction: a small CNN with {what}, bytecode cached", [goal])
            for name in calls.contenders(suffix):
                calls.first(self._directory, name, suffix)  # leaves the bytecode behind
            for name in self._interleaved(calls.contenders(suffix), 2 * self._rounds + 1):
                seconds = calls.first(self._directory, name, suffix)
                _add(section, calls.TITLES[name], Measured(seconds, None, None, {}))
            yield section


def _over_native(section: Section) -> bool:
    return section.seconds() - section.seconds("native jit") <= 5e-6


def _bound_below_native(section: Section) -> bool:
    return section.seconds("obmlite with bound weights") < section.seconds("native jit")


def _copied(section: Section) -> float:
    """Bytes of the tensors that are not used in place."""
    return (section.fact("bytes") or 0) - (section.fact("aliased") or 0)


def _beside(section: Section, contender: str) -> float:
    """MiB of memory beside the tensors' own bytes, pages of files included."""
    return ((section.resident(contender) or 0) - (section.fact("bytes", contender) or 0)) / _MIB


_CHECKED = "obmlite, and opening a package"


def _save_goal() -> Goal:
    peer, floor = CONTENDERS["safetensors"].title, CONTENDERS["hashing"].title
    return Goal(
        "at most the longer of 1.1 × safetensors with fsync and SHA-256 alone",
        lambda s: s.seconds() <= max(1.1 * s.seconds(peer), s.seconds(floor)),
    )


def _add(section: Section, title: str, run: Measured) -> None:
    section.runs.setdefault(title, []).append(run)
    print(f"{section.title.partition(':')[0]} · {title}: {run.seconds:.6f} s", file=sys.stderr, flush=True)


def _ordered(section: Section, names: Sequence[str]) -> Section:
    section.runs = {CONTENDERS[name].title: section.runs[CONTENDERS[name].title] for name in names}
    return section


def _read(path: str) -> None:
    """Brings files into the kernel's memory."""
    buffer = bytearray(_MIB)
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names] or [path]
    for place in paths:
        with open(place, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def main() -> None:
    """Runs the cases that were asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks", description="Measures obmlite beside its peers.")
    parser.add_argument("--cases", nargs="+", choices=_CASES, default=list(_CASES), help="which to run")
    parser.add_argument(
        "--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), help="whom to run"
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each; the short cases get more (5)")
    parser.add_argument("--size", type=float, default=1.0, help="fraction of the full size, for a trial (1.0)")
    parser.add_argument("--directory", default=os.path.join(_HERE, "data"), help="where the files lie; up to 8 GiB")
    parser.add_argument("--docs", default=_DOCS, help="the document that full-size figures of all cases are put into")
    options = parser.parse_args()
    only = [name for name in CONTENDERS if name == "obmlite" or (name in options.contenders and available(name))]
    os.makedirs(options.directory, exist_ok=True)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        bench = Bench(directory, options.size, options.rounds, only)
        sections = [section for case in _CASES if case in options.cases for section in _CASES[case](bench)]
    full = options.size == 1 and set(only) == set(CONTENDERS)
    figures = report.render(sections, goals=full, load=load)
    print(figures)
    if full and options.cases == list(_CASES):
        with open(options.docs, encoding="utf-8") as file:
            document = file.read()
        with open(options.docs, "w", encoding="utf-8") as file:
            file.write(report.replace(document, figures))


_CASES = {
    "save": lambda bench: [bench.save()],
    "restore": lambda bench: [bench.restore("large"), bench.restore("odd")],
    "sharded": lambda bench: bench.sharded(),
    "small": lambda bench: bench.small(),
    "list": lambda bench: [bench.list()],
    "verify": lambda bench: [bench.verify()],
    "import": lambda bench: [bench.imports()],
    "calls": lambda bench: bench.calls(),
    "first": lambda bench: bench.first(),
}

if __name__ == "__main__":
    main()
