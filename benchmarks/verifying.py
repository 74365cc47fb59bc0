"""What it costs to open a package with more or less of it compared with its digests, beside the hashing alone.

Run as ``python -m benchmarks.verifying TREE SIZE PATH SMALL FIRST``, it does each of the :data:`KINDS` once in this
process, beginning with number FIRST, and prints seconds as JSON. PATH is a package of the tree; SMALL is another one,
which is opened before the clock runs, so that nothing is imported while it does.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

__all__ = ["KINDS", "in_child"]

_CHUNK = 8 << 20


def _threads() -> int:
    from obmlite.io.chunked import processors

    return processors()


def _hash(chunks: list[Any]) -> None:
    """The SHA-256 of what is in memory, on as many threads and in such chunks as obmlite's."""
    with ThreadPoolExecutor(_threads()) as pool:
        list(pool.map(lambda chunk: hashlib.sha256(chunk).digest(), chunks))


def _load(path: str, **options: Any) -> Any:
    import obmlite

    return obmlite.load(path, **options)


def _restore(path: str, **options: Any) -> None:
    import jax

    jax.block_until_ready(_load(path, **options).weights["params"].restore(progress=False))


KINDS: dict[str, Callable[[str, list[Any]], Any]] = {
    "obmlite": lambda path, _: _load(path, verify="all"),
    'obmlite, mmap=False, verify="all"': lambda path, _: _load(path, verify="all", mmap=False),
    'obmlite, verify="structure"': lambda path, _: _load(path),
    'obmlite, verify="lazy"': lambda path, _: _load(path, verify="lazy"),
    'obmlite, verify="structure", and a restore': lambda path, _: _restore(path),
    'obmlite, verify="lazy", and a restore': lambda path, _: _restore(path, verify="lazy"),
    "SHA-256 alone, of bytes in memory": lambda _, chunks: _hash(chunks),
}
"""What is measured; the first is ``load(verify="all")``."""


def _measure(tree: str, size: float, path: str, small: str, first: int) -> dict[str, float]:
    import numpy as np

    from benchmarks import trees

    views = [leaf.reshape(-1).view(np.uint8).data for leaf in trees.flat(tree, size).values()]
    chunks = [view[start : start + _CHUNK] for view in views for start in range(0, len(view), _CHUNK)]
    for kind in KINDS.values():
        kind(small, chunks[:1])
    names = list(KINDS)
    seconds = {}
    for name in [*names[first:], *names[:first]]:
        start = time.perf_counter()
        made = KINDS[name](path, chunks)
        seconds[name] = time.perf_counter() - start
        del made
    return seconds


def in_child(tree: str, size: float, path: str, small: str, first: int) -> dict[str, float]:
    """Measures each kind once, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.verifying", tree, str(size), path, small, str(first % len(KINDS))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    name, fraction, package, other, begin = sys.argv[1:]
    print(json.dumps(_measure(name, float(fraction), package, other, int(begin))))
