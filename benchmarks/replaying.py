"""How fast compiled functions run that were replayed, beside the same functions as exported and as written.

``python -m benchmarks.replaying`` prints the table of docs/replay.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

import obmlite
from benchmarks import report
from tests import networks

TIMES_LARGER = 64
"""How many times each example's batch: so small a network spends all its time on being called."""

_BLOCK_SECONDS = 0.02  # calls in one timing take about so long


def compiled(network: networks.Network, folder: str) -> tuple[dict[str, Any], list[Any]]:
    """The network as JAX has it, and saved and loaded, by the two engines, each compiled; and their arguments."""
    network.model(vjp_order=0).save(folder)
    written = getattr(network.fn, "__wrapped__", network.fn)  # without its jit, which donates
    functions: dict[str, Callable[..., Any]] = {"written": lambda *args: written(*args, **network.static)}
    for engine in ("export", "replay"):
        (functions[engine],) = obmlite.load(folder, engine=engine).functions.values()
    inputs = [
        jax.tree.map(lambda leaf: leaf.repeat(TIMES_LARGER, 0), value) if name in network.symbolic else value
        for name, value in network.inputs.items()
    ]
    arguments = [*network.weights.values(), *inputs]
    return {
        name: jax.jit(lambda *args, call=call: call(*args)).lower(*arguments).compile()
        for name, call in functions.items()
    }, arguments


def measure(calls: Mapping[str, Any], arguments: Sequence[Any], rounds: int) -> dict[str, float]:
    """Seconds of each call: the medians of blocks of calls, which take turns."""
    for call in calls.values():
        jax.block_until_ready(call(*arguments))
    begin = time.perf_counter()
    for call in calls.values():
        jax.block_until_ready(call(*arguments))
    count = max(1, round(_BLOCK_SECONDS * len(calls) / (time.perf_counter() - begin)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        names = list(calls)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begin = time.perf_counter()
            for _ in range(count):
                result = calls[name](*arguments)
            jax.block_until_ready(result)
            times[name].append((time.perf_counter() - begin) / count)
    return {name: statistics.median(values) for name, values in times.items()}


def table(rounds: int, names: Sequence[str]) -> str:
    """Measures networks, and gives the figures as Markdown."""
    lines = [
        "| network | as written | exported | replayed | replayed / exported |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            seconds = measure(*compiled(networks.ALL[name](), f"{folder}/m.obm"), rounds)
        cells = [f"{1e6 * seconds[kind]:,.0f} µs" for kind in ("written", "export", "replay")]
        lines.append(f"| {' | '.join([name, *cells])} | {seconds['replay'] / seconds['export']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks.replaying", description=__doc__)
    parser.add_argument("--rounds", type=int, default=60, help="timings of each (60)")
    parser.add_argument("--networks", nargs="+", choices=list(networks.ALL), default=list(networks.ALL))
    options = parser.parse_args()
    print(f"{report.environment()}\n\n{table(options.rounds, options.networks)}")
