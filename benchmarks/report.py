"""What was measured, as markdown, beside what it should be."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterator, Sequence

from benchmarks.measure import Measured

__all__ = ["Goal", "Section", "environment", "render", "replace", "size"]

BEGIN, END = "<!-- figures: written by `make bench` -->", "<!-- end of figures -->"

_PACKAGES = ("jax", "jaxlib", "numpy", "safetensors", "flax", "orbax-checkpoint")


@dataclasses.dataclass(frozen=True)
class Goal:
    """What one of obmlite's figures should be.

    Attributes:
      text: for people.
      met: whether a section's figures are so.
    """

    text: str
    met: Callable[[Section], bool]


@dataclasses.dataclass
class Section:
    """One table.

    Attributes:
      title: its heading.
      goals: what obmlite's figures should be.
      runs: the measurements of each contender, by its title; obmlite's are under ``obmlite``.
      per: a fact to divide the time by, in a column of its own.
    """

    title: str
    goals: Sequence[Goal] = ()
    runs: dict[str, list[Measured]] = dataclasses.field(default_factory=dict)
    per: str = ""

    def seconds(self, contender: str = "obmlite") -> float:
        """The median time."""
        return statistics.median(run.seconds for run in self.runs[contender])

    def best(self, contender: str = "obmlite") -> float:
        """The shortest time."""
        return min(run.seconds for run in self.runs[contender])

    def anonymous(self, contender: str = "obmlite") -> float | None:
        """The median of anonymous memory."""
        return _median([run.anonymous for run in self.runs[contender]])

    def resident(self, contender: str = "obmlite") -> float | None:
        """The median of resident memory, pages of files included."""
        return _median([run.resident for run in self.runs[contender]])

    def fact(self, name: str, contender: str = "obmlite") -> float | None:
        """The median of another figure."""
        return _median([run.facts.get(name) for run in self.runs[contender]])


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds < 0.001:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"


def size(nbytes: float | None) -> str:
    """A number of bytes for people."""
    if nbytes is None:
        return "?"
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 1 << 30 else f"{nbytes / 2**20:.1f} MiB"


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _share(part: float | None, whole: float | None) -> str:
    return f"{100 * part / whole:.1f} %" if part is not None and whole else ""


def environment() -> str:
    """What it was measured with."""
    versions = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    versions.append(f"{platform.system()} on {platform.machine()}, {os.cpu_count()} cores")
    return ", ".join(versions)


def render(sections: Sequence[Section], *, goals: bool, load: float = 0) -> str:
    """The tables.

    Args:
      sections: what was measured.
      goals: whether the goals are about work of this size.
      load: the machine's load average before it began.
    """
    head = f"{environment()}; load average {load:.1f} before it began."
    return "\n".join([head, *(line for section in sections for line in _table(section, goals=goals))])


def _table(section: Section, *, goals: bool) -> Iterator[str]:
    in_place = section.fact("aliased") is not None
    memory = section.anonymous() is not None
    head = ["", "median", "best", "× obmlite"]
    head += [f"each of the {section.per}"] if section.per else []
    head += ["memory", "with file pages"] if memory else []
    head += ["in place"] if in_place else []
    yield f"\n### {section.title}\n"
    yield f"| {' | '.join(head)} |"
    yield f"| --- |{' ---: |' * (len(head) - 1)}"
    for name in section.runs:
        cells = [
            f"**{name}**" if name.startswith("obmlite") else name,
            _time(section.seconds(name)),
            _time(section.best(name)),
            "" if name == "obmlite" else _ratio(section.seconds(name) / section.seconds()),
        ]
        if section.per:
            count = section.fact(section.per, name)
            cells.append(_time(section.seconds(name) / count) if count else "")
        if memory:
            cells += [size(section.anonymous(name)), size(section.resident(name))]
        if in_place:
            cells.append(_share(section.fact("aliased", name), section.fact("bytes", name)))
        yield f"| {' | '.join(cells)} |"
    if goals and section.goals:
        yield "\n| goal | met |\n| --- | --- |"
        for goal in section.goals:
            yield f"| {goal.text} | {'yes' if goal.met(section) else '**no**'} |"


def replace(document: str, figures: str) -> str:
    """A document with other figures between its markers, which are put at its end if they are missing."""
    if BEGIN not in document:
        document = f"{document.rstrip()}\n\n{BEGIN}\n{END}\n"
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n\n{figures}\n\n{END}", document)
