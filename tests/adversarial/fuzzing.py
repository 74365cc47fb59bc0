"""Runs inputs of one kind in a child, so that what kills it is counted, kept and can be tried again."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import pathlib
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import traceback

from obmlite.errors import ObmliteError
from tests.adversarial.kinds import MEMORY, Kind, judge
from tests.adversarial.memory import Finding

ROOM = 64 << 20
"""Bytes of the file in which a child keeps its counts and its latest input; it is mapped, and outlives the child."""

_HEAD = struct.Struct("<QQQ")  # inputs begun, bytes of the counts as JSON, bytes of the input
_INPUT = 4096  # where the input begins; the counts are before it

BLOCKED = 120.0
"""Seconds without a new input after which a child is ended: a hang that takes no processor time."""

_FOLDER = pathlib.Path(os.environ.get("TMPDIR", "/tmp"))


@dataclasses.dataclass
class Tally:
    """What came of the inputs of one kind.

    Attributes:
      outcomes: how many were "refused", "same" and "other".
      findings: kind of finding → where it is seen (class and line) → files of some inputs.
    """

    outcomes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    findings: dict[str, dict[str, list[str]]] = dataclasses.field(default_factory=dict)

    @property
    def inputs(self) -> int:
        """How many were tried."""
        return sum(self.outcomes.values())

    def found(self, what: str, where: str, file: str) -> None:
        self.outcomes[what] += 1
        kept = self.findings.setdefault(what, {}).setdefault(where, [])
        if len(kept) < 3:
            kept.append(file)

    def add(self, other: Tally) -> None:
        self.outcomes.update(other.outcomes)
        for what, places in other.findings.items():
            for where, files in places.items():
                kept = self.findings.setdefault(what, {}).setdefault(where, [])
                kept += files[: 3 - len(kept)]


def where(error: BaseException) -> str:
    """The class of an error, what it says, and the last place of the library in its traceback."""
    cause = error.__cause__ if isinstance(error, Finding) and error.__cause__ is not None else error
    frames = traceback.extract_tb(cause.__traceback__)
    own = [frame for frame in frames if "/obmlite/" in frame.filename] or frames
    text = cause.problem if isinstance(cause, ObmliteError) else str(cause)
    more = f"{error}: " if cause is not error else ""
    return f"{more}{type(cause).__name__} at {pathlib.Path(own[-1].filename).name}:{own[-1].lineno}: {text:.100}"


def _resident() -> int:
    """Bytes of memory that this process had at its most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def one(kind: Kind, data: bytes) -> tuple[dict[str, int], BaseException | None]:
    """What comes of one input within its limits of time and memory; if that is a finding, also its error."""
    before = _resident()
    signal.setitimer(signal.ITIMER_PROF, kind.seconds)  # kills the process: nothing could be sure to interrupt it
    try:
        found = judge(kind, data)
    except MemoryError as error:
        return {"memory": 1}, error
    except Exception as error:  # noqa: BLE001 - what it is, is the question
        return {"wrong" if isinstance(error, (AssertionError, Finding)) else "exception": 1}, error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if _resident() - before > MEMORY // 4:
        return {"memory": 1}, MemoryError("resident memory")
    return found, None


def child(kind: Kind, seed: int, seconds: float, count: int, place: str, findings: str) -> None:
    """Tries inputs until time or count are up, and prints the tally as JSON."""
    rng = random.Random(f"{kind.stream or kind.name} {seed}")
    tally = Tally()
    one(kind, kind.make(random.Random(0)))  # what is imported and made on first use counts to no input
    with contextlib.suppress(FileNotFoundError):  # elsewhere such a limit would not hold either
        used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    end = time.monotonic() + seconds
    with open(place, "r+b") as file, mmap.mmap(file.fileno(), ROOM) as slot:
        tried = 0
        while tally.inputs < count and time.monotonic() < end:
            data = kind.make(rng)
            tried += 1
            _note(slot, tried, tally, data)
            found, error = one(kind, data)
            if error is None:
                tally.outcomes.update(found)
            else:
                tally.found(next(iter(found)), where(error), keep(kind, data, findings))
                _write(place + ".findings", tally)
        _note(slot, tried, tally, b"")


def _note(slot: mmap.mmap, tried: int, tally: Tally, data: bytes) -> None:
    counts = json.dumps(tally.outcomes).encode()
    slot[: _HEAD.size + len(counts)] = _HEAD.pack(tried, len(counts), len(data)) + counts
    slot[_INPUT : _INPUT + len(data)] = data


def _noted(place: str) -> tuple[int, Tally, bytes]:
    with open(place, "rb") as file:
        tried, counts, size = _HEAD.unpack(file.read(_HEAD.size))
        tally = Tally(collections.Counter(json.loads(file.read(counts) or b"{}")))
        file.seek(_INPUT)
        data = file.read(size)
    with contextlib.suppress(FileNotFoundError), open(place + ".findings") as file:
        tally.findings = json.load(file)
    return tried, tally, data


def _write(path: str, tally: Tally) -> None:
    with open(path + ".new", "w") as out:
        json.dump(tally.findings, out)
    os.replace(path + ".new", path)


def keep(kind: Kind, data: bytes, findings: str) -> str:
    """Keeps an input under a name that says its kind."""
    os.makedirs(findings, exist_ok=True)
    path = os.path.join(findings, f"{kind.name}-{hashlib.sha256(data).hexdigest()[:16]}")
    with open(path, "wb") as out:
        out.write(data)
    return path


def run(kind: Kind, *, seed: int, seconds: float, count: int = sys.maxsize, findings: str) -> Tally:
    """Tries inputs of a kind in children, one after the other as they die.

    Args:
      kind: the kind.
      seed: of the inputs; the same one makes the same inputs.
      seconds: how long.
      count: how many at most.
      findings: folder for inputs of which something came that must not.
    """
    total = Tally()
    end = time.monotonic() + seconds
    place = str(_FOLDER / f"fuzzing-{kind.name}-{os.getpid()}")
    while total.inputs < count and (left := end - time.monotonic()) > 0:
        with open(place, "wb") as file:
            file.truncate(ROOM)
        pathlib.Path(place + ".findings").unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.adversarial", "child", kind.name, str(seed), str(left)]
        command += [str(count - total.inputs), place, findings]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            status, blocked, errors = _wait(process, place, max(BLOCKED, 10 * kind.seconds))
        tried, tally, data = _noted(place)
        if status > 0:
            raise RuntimeError(f"the child for {kind.name} failed itself: status {status}, input {tried}\n{errors}")
        if status:
            hung = blocked or status == -signal.SIGPROF
            name = "hang" if hung else f"signal {signal.Signals(-status).name}"
            tally.found("hang" if hung else "crash", name, keep(kind, data, findings))
            seed += 1_000_003
        total.add(tally)
        if not status and tally.inputs == 0:
            break
    for path in (place, place + ".findings"):
        pathlib.Path(path).unlink(missing_ok=True)
    return total


def _wait(process: subprocess.Popen[bytes], place: str, patience: float) -> tuple[int, bool, str]:
    """(exit status, whether it was ended for blocking, the end of what it wrote to stderr)."""
    last, since = b"", time.monotonic()
    while True:
        try:
            _, errors = process.communicate(timeout=0.5)
        except subprocess.TimeoutExpired:
            with open(place, "rb") as file:
                now = file.read(8)  # of the number of inputs begun
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > patience:
                process.kill()
                process.wait()
                return process.returncode, True, ""
            continue
        return process.returncode, False, errors.decode(errors="replace")[-4000:]
