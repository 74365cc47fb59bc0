"""StableHLO from strangers, read in a child process before it is read here.

MLIR's reader does not survive hostile bytes. So a child, under limits on memory and time, reads each module and writes
it anew; what is read here afterwards is what MLIR itself has written of a module that was read to its end. The child is
a fresh interpreter, gets bytes and no path, and opens nothing but what it imports.

It protects from crashes, not from an attacker who takes the child over: that takes a container around all of it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO

from obmlite.errors import CorruptPackageError, ObmliteError, UnsupportedFormatError

__all__ = ["LIMITS", "Apart", "Limits", "main", "read_apart"]


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What the child may use.

    Attributes:
      seconds: of CPU, for one module.
      together: seconds of CPU after which a child begins no other module.
      memory: bytes of address space beyond what it has before it reads the first module.
      stack: bytes of the stack on which it reads: less than any thread here has, so that what is nested so deep that it
        exhausts a stack does so there.
      start: seconds until it has imported what it needs.
    """

    seconds: int = 60
    together: int = 60
    memory: int = 4 << 30
    stack: int = 1 << 20
    start: int = 120


LIMITS = Limits()
"""Those that :func:`obmlite.load` has."""

_LENGTH = struct.Struct("<Q")
_START = (
    "import json, sys; sys.path[:0] = json.loads(sys.argv[1])['path']; from obmlite import _isolation as i; i.main()"
)


class Apart:
    """The modules of one package, as children have written them anew."""

    def __init__(self, every: Callable[[], Iterable[bytes]], limits: Limits = LIMITS) -> None:
        """Reads nothing yet.

        Args:
          every: gives all modules of the package: one child reads as many of them as it can, beside the one asked for.
          limits: of the child.
        """
        self._every = every
        self._limits = limits
        self._held: dict[bytes, _Outcome] = {}
        self._lock = threading.Lock()

    def __call__(self, module: bytes) -> bytes:
        """A portable artifact as a child has written it anew.

        Raises:
          CorruptPackageError: the child crashed over it.
          UnsupportedFormatError: it exceeded a limit, or this JAX's StableHLO does not read it.
        """
        digest = hashlib.sha256(module).digest()
        with self._lock:
            if digest not in self._held and not self._known(digest):
                modules = {hashlib.sha256(data).digest(): data for data in (module, *self._every())}
                wanted = {own: data for own, data in modules.items() if not self._known(own)}
                for own, result in zip(wanted, _child(list(wanted.values()), self._limits), strict=False):
                    self._held[own] = _OUTCOMES[own] = _Outcome(result, self._limits)
            return self._held[digest].get()

    def _known(self, digest: bytes) -> bool:
        """Whether it is known what came of a module, from this package or another one."""
        known = _OUTCOMES.get(digest)
        if known is None or known.limits != self._limits:
            return False
        self._held[digest] = known
        return True


class _Outcome:
    """What came of one module."""

    def __init__(self, result: bytes | ObmliteError, limits: Limits) -> None:
        self.result = result
        self.limits = limits

    def get(self) -> bytes:
        if isinstance(self.result, ObmliteError):
            raise copy.copy(self.result)  # facts are added to what is raised
        return self.result


_OUTCOMES: weakref.WeakValueDictionary[bytes, _Outcome] = weakref.WeakValueDictionary()
"""By the module's digest, as long as a model that needs it lives."""


def read_apart(modules: Sequence[bytes], limits: Limits = LIMITS) -> list[bytes | ObmliteError]:
    """Reads modules in child processes, the next one where one has ended.

    Args:
      modules: portable artifacts, from anywhere.
      limits: of each child.

    Returns:
      For each module what the child has written of it, or why there is nothing.

    Raises:
      UnsupportedFormatError: no child can be started.
    """
    found: list[bytes | ObmliteError] = []
    while len(found) < len(modules):
        found += _child(modules[len(found) :], limits)
    return found


def _child(modules: Sequence[bytes], limits: Limits) -> list[bytes | ObmliteError]:
    """What comes of modules in one child, as far as it gets: of the first at least, and of the one that ends it."""
    if not sys.executable:
        raise _not_started("this program has no Python interpreter that could be started")
    task = {**dataclasses.asdict(limits), "path": [path for path in _paths() if os.path.isabs(path)]}
    given = b"".join(part for module in modules for part in (_LENGTH.pack(len(module)), module))
    # The limit on CPU time comes first, unless the machine is busy.
    patience = limits.start + 4 * limits.seconds * len(modules)
    late = False
    with subprocess.Popen(
        # Isolated: neither this program's directory nor its variables say what is imported.
        [sys.executable, "-I", "-c", _START, json.dumps(task)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"},
    ) as process:
        try:
            out, err = process.communicate(given, timeout=patience)
        except subprocess.TimeoutExpired:
            late = True
            process.kill()
            out, err = process.communicate()
        except BaseException:  # an interrupt too leaves no child behind
            process.kill()
            raise
    messages = err.decode(errors="replace")
    stream = io.BytesIO(out)
    if not late and stream.readline() != _READY:
        raise _not_started(f"{_status(process.returncode)}: {messages[-500:].strip()}")
    done: list[bytes | ObmliteError] = []
    while len(done) < len(modules) and (reply := _reply(stream)) is not None:
        done.append(reply)
    if len(done) < len(modules) and (late or process.returncode or not done):
        done.append(_died(process.returncode, late, messages, limits))
    return done


def _paths() -> list[str]:
    """Where a child finds what this process has found."""
    above = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return [above, *(path for path in sys.path if path != above)]


def _reply(stream: BinaryIO) -> bytes | ObmliteError | None:
    """The next reply; None if there is no whole one."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    said: dict[str, Any] = json.loads(line)
    if "length" not in said:
        return UnsupportedFormatError(
            said["problem"], **{name: said.get(name) for name in ("field", "expected", "found", "fix")}
        )
    data = stream.read(said["length"])
    return data if len(data) == said["length"] else None


def _died(code: int, late: bool, messages: str, limits: Limits) -> ObmliteError:
    if late or code == -signal.SIGXCPU:
        return UnsupportedFormatError(
            "Reading the function's code takes too long.",
            field="seconds",
            expected=f"at most {limits.seconds} seconds",
            found="more",
        )
    if re.search(r"bad_alloc|out of memory|memory exhausted|Cannot allocate", messages, re.IGNORECASE):
        return _too_large(limits)
    return CorruptPackageError(
        "Reading the function's code crashed the process that did: it is damaged, or made to do so.",
        field="code",
        expected="StableHLO",
        found=_status(code),
    )


def _too_large(limits: Limits) -> UnsupportedFormatError:
    return UnsupportedFormatError(
        "Reading the function's code takes too much memory.",
        field="memory",
        expected=f"at most {limits.memory} bytes",
        found="more",
    )


def _not_started(why: str) -> UnsupportedFormatError:
    return UnsupportedFormatError(
        "The process that reads a stranger's code does not start.",
        field="untrusted",
        expected=f"Python, at {sys.executable or 'sys.executable'}, that imports obmlite",
        found=why,
    )


def _status(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


# --- in the child

_READY = b"ready\n"


def main() -> None:
    """Answers for each module on standard input, until it ends."""
    task = json.loads(sys.argv[1])
    limits = Limits(**{field.name: task[field.name] for field in dataclasses.fields(Limits)})
    # What others print must not stand between the replies.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from obmlite.replay import _reading

    _limit(limits)
    replies.write(_READY)
    replies.flush()
    enough = time.process_time() + limits.together
    while header := sys.stdin.buffer.read(_LENGTH.size):
        (length,) = _LENGTH.unpack(header)
        said, data = _answer(_reading.rewrite, sys.stdin.buffer.read(length), limits)
        replies.write(json.dumps(said).encode() + b"\n" + data)
        replies.flush()
        if time.process_time() > enough:
            break


def _answer(rewrite: Callable[[bytes], bytes], module: bytes, limits: Limits) -> tuple[dict[str, Any], bytes]:
    _limit_time(limits.seconds)
    try:
        anew = rewrite(module)
    except ObmliteError as error:
        return error.facts(), b""
    except MemoryError:
        return _too_large(limits).facts(), b""
    except Exception as error:  # noqa: BLE001 - whatever hostile bytes lead to is a refusal
        refused = UnsupportedFormatError(
            "The function's code is not of a form that is known.",
            field="code",
            found=f"{type(error).__name__}: {error}"[:300],
        )
        return refused.facts(), b""
    return {"length": len(anew)}, anew


def _limit(limits: Limits) -> None:
    import resource

    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_STACK, limits.stack)
    with contextlib.suppress(OSError):  # where there is no such file, such a limit would not hold either
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        _lower(resource.RLIMIT_AS, used + limits.memory)


def _limit_time(seconds: int) -> None:
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    wanted = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _lower(what: int, limit: int) -> None:
    import resource

    _, hard = resource.getrlimit(what)
    with contextlib.suppress(ValueError):  # macOS keeps some of them as they are
        resource.setrlimit(what, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
