"""One measurement in a fresh process: seconds, and the memory that the work took.

The child prepares everything, says what it holds, waits for a line, does the work once and says how long it took.
Meanwhile the parent samples the child's anonymous memory from outside, where no lock of the interpreter is in the way.
The largest resident size, pages of mapped files included, is the kernel's own mark (``VmHWM``), reset by writing 5 to
``/proc/self/clear_refs``; see proc(5). Without ``/proc`` there are times only.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

from benchmarks.layouts import DEVICES, Layout

__all__ = ["Job", "Measured", "measure"]

_SAMPLE_SECONDS = 0.002
_LOOKED_AT = 2000  # leaves up to which it is found out where they lie


@dataclasses.dataclass(frozen=True)
class Job:
    """What a child is to do.

    Attributes:
      case: ``save``, ``restore``, ``list`` or ``import``.
      contender: a key of :data:`benchmarks.contenders.CONTENDERS`; for ``import``, a module.
      tree: a key of :data:`benchmarks.trees.TREES`.
      size: fraction of the tree's full size.
      path: where the contender's files are, or are to be.
      layout: a key of :data:`benchmarks.layouts.LAYOUTS`; empty for one device.
    """

    case: str
    contender: str
    tree: str
    size: float
    path: str
    layout: str = ""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one child found.

    Attributes:
      seconds: from the first to the last byte that the work is about.
      anonymous: most bytes of anonymous memory above what was held before, None if unknown.
      resident: the same of resident memory, pages of files included.
      facts: what else there is to tell: ``bytes`` (of the tensors), ``leaves``, ``aliased`` (those of ``bytes`` that
        are used in place), ``checks`` (seconds).
    """

    seconds: float
    anonymous: int | None
    resident: int | None
    facts: dict[str, float]


def measure(job: Job) -> Measured:
    """Runs a job in a process of its own.

    Raises:
      RuntimeError: the child failed; its own error is on stderr.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    if job.layout:
        flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
        environment["XLA_FLAGS"] = flags.strip()
    command = [sys.executable, "-m", "benchmarks.measure", json.dumps(dataclasses.asdict(job))]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        ready = child.stdout.readline()
        if not ready:
            raise RuntimeError(f"{job.contender} failed to prepare {job.case}")
        before = json.loads(ready)
        sampler = _Sampler(child.pid)
        sampler.start()
        child.stdin.write("\n")
        answer = child.stdout.readline()
        most = sampler.stop()
        if not answer:
            raise RuntimeError(f"{job.contender} failed to {job.case}")
        after = json.loads(answer)
    memory = {
        key: None if before[key] is None else max(0, after[key] - before[key]) for key in ("anonymous", "resident")
    }
    if before["anonymous"] is not None:
        memory["anonymous"] = max(memory["anonymous"] or 0, most - before["anonymous"])
    return Measured(after["seconds"], memory["anonymous"], memory["resident"], after["facts"])


class _Sampler(threading.Thread):
    """Watches another process' anonymous memory."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self._process = process
        self._most = 0
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(_SAMPLE_SECONDS):
            self._most = max(self._most, _status(self._process).get("RssAnon", 0))

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self._most


def _status(process: int | str) -> dict[str, int]:
    """The sizes in a process' status, in bytes; empty where there is no /proc."""
    try:
        with open(f"/proc/{process}/status") as file:
            lines = [line.split() for line in file]
    except OSError:
        return {}
    return {line[0].rstrip(":"): int(line[1]) << 10 for line in lines if line[-1] == "kB"}


# --- in the child


def _say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def _begin() -> None:
    """Says what is held, with the kernel's mark reset, and waits for the parent."""
    gc.collect()
    resident = None
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        resident = _status("self")["VmRSS"]
    except OSError:
        pass
    _say(anonymous=_status("self").get("RssAnon"), resident=resident)
    sys.stdin.readline()


def _end(seconds: float, **facts: float) -> None:
    status = _status("self")
    _say(seconds=seconds, anonymous=status.get("RssAnon"), resident=status.get("VmHWM"), facts=facts)


def _run(job: Job) -> None:
    if job.case == "import":
        _import(job)
        return
    from benchmarks.contenders import CONTENDERS

    contender = CONTENDERS[job.contender]()
    if job.case == "save":
        from benchmarks import trees

        leaves = trees.flat(job.tree, job.size)
        tree = contender.prepare(leaves)
        _begin()
        start = time.perf_counter()
        contender.save(tree, job.path)
        _end(time.perf_counter() - start, bytes=sum(leaf.nbytes for leaf in leaves.values()), leaves=len(leaves))
    elif job.case == "list":
        _begin()
        start = time.perf_counter()
        listing = contender.list(job.path)
        _end(time.perf_counter() - start, leaves=len(listing))
    else:
        _restore(job, contender)


def _restore(job: Job, contender: Any) -> None:
    import jax
    import numpy as np

    layout = Layout(job.layout) if job.layout else None
    # JAX's own start is not what is measured.
    jax.block_until_ready(jax.device_put(np.ones(3, np.float32), layout and layout.sharding((3,))))
    target = contender.target(job.path, layout)
    _begin()
    start = time.perf_counter()
    restored = jax.block_until_ready(contender.restore(job.path, target))
    seconds = time.perf_counter() - start
    status = _status("self")
    leaves = jax.tree.leaves(restored)
    facts = {"bytes": sum(leaf.nbytes for leaf in leaves), "leaves": len(leaves)}
    if len(leaves) <= _LOOKED_AT:
        mapped = _mapped(job.path)
        facts["aliased"] = sum(_in_place(leaf, mapped) for leaf in leaves if isinstance(leaf, jax.Array))
    _say(seconds=seconds, anonymous=status.get("RssAnon"), resident=status.get("VmHWM"), facts=facts)


def _in_place(array: Any, mapped: list[range]) -> int:
    """Bytes of an array that each device which holds them uses where the file is mapped."""
    shards: dict[str, list[Any]] = {}
    for shard in array.addressable_shards:
        shards.setdefault(str(shard.index), []).append(shard.data)
    return sum(
        copies[0].nbytes
        for copies in shards.values()
        if all(any(data.unsafe_buffer_pointer() in place for place in mapped) for data in copies)
    )


def _mapped(path: str) -> list[range]:
    """The addresses at which files below a path are mapped."""
    try:
        with open("/proc/self/maps") as file:
            lines = [line.split(maxsplit=5) for line in file]
    except OSError:
        return []
    places = [line[0].split("-") for line in lines if len(line) == 6 and line[5].startswith(os.path.realpath(path))]
    return [range(int(first, 16), int(last, 16)) for first, last in places]


def _import(job: Job) -> None:
    for module in ("jax", "numpy"):
        importlib.import_module(module)
    _begin()
    start = time.perf_counter()
    importlib.import_module(job.contender)
    seconds = time.perf_counter() - start
    facts = {}
    if job.contender == "obmlite":
        import obmlite

        _ = len(obmlite.load(job.path).weights["params"].flat)
        facts["checks"] = time.perf_counter() - start - seconds
    _end(seconds, **facts)


if __name__ == "__main__":
    _run(Job(**json.loads(sys.argv[1])))
