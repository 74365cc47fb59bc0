"""Killing, failing and recording what a save does to the file system, call by call.

The calls are those that change something and that obmlite makes through the ``os`` module. Actions run in
forked children, which is quick but has a price: in a child of a process that has used JAX, only the calling
thread is left. So an action may write files, but must not trace, compile or run anything; prepare that before.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import select
import signal
import threading
import traceback
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

CALLS = (
    *("write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir"),
    # Not made today; here so that a save that begins to make them is killed there too.
    *("pwrite", "writev", "ftruncate", "truncate", "link", "symlink", "remove", "chmod", "sendfile", "copy_file_range"),
)
"""What changes a file system. A file is made by ``open`` and has its first byte by ``write``: what a kill between the
two leaves is what one before the first ``write`` leaves."""

_RENAMES = ("replace", "rename", "link")
_BY_DESCRIPTOR = ("write", "fsync", "pwrite", "writev", "ftruncate", "sendfile")


@contextlib.contextmanager
def intercept(hook: Callable[[str, Callable[[], Any], tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """Calls ``hook(name, call, args, kwargs)`` in place of each of :data:`CALLS`; it runs ``call()`` or doesn't."""
    real = {name: getattr(os, name) for name in CALLS if hasattr(os, name)}

    def wrapper(name: str) -> Callable[..., Any]:
        @functools.wraps(real[name])
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return hook(name, lambda: real[name](*args, **kwargs), args, kwargs)

        return wrapped

    try:
        for name in real:
            setattr(os, name, wrapper(name))
        yield
    finally:
        for name, call in real.items():
            setattr(os, name, call)


def fail(at: int, error: OSError, *, after: bool = False) -> contextlib.AbstractContextManager[None]:
    """Within the block, the ``at``-th call (from 0) raises ``error``, instead of or after what it does."""
    count = _Counter()

    def hook(name: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        if count() != at:
            return call()
        if after:
            with contextlib.suppress(OSError):
                call()
        raise error

    return intercept(hook)


def path_of(descriptor: int) -> str:
    """The path that an open descriptor has now."""
    if hasattr(fcntl, "F_GETPATH"):
        return fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0").decode()
    return os.readlink(f"/proc/self/fd/{descriptor}")


@contextlib.contextmanager
def record(calls: list[tuple[str, ...]]) -> Iterator[None]:
    """Appends ``(call, path)``, and for replace ``(call, from, to)``, with descriptors resolved to full paths."""

    def full(path: str, folder: int | None) -> str:
        return path if folder is None else os.path.join(path_of(folder), path)

    def hook(name: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        if name in _BY_DESCRIPTOR:
            entry: tuple[str, ...] = (name, path_of(args[0]))
        elif name in _RENAMES:
            entry = (name, full(args[0], kwargs.get("src_dir_fd")), full(args[1], kwargs.get("dst_dir_fd")))
        else:
            entry = (name, full(args[0], kwargs.get("dir_fd")))
        result = call()
        calls.append(entry)
        return result

    with intercept(hook):
        yield


@dataclasses.dataclass
class Child:
    """A forked process that runs an action."""

    pid: int
    _pipe: int

    def wait(self, timeout: float = 60) -> Any:
        """What the action returned (as JSON keeps it); None if the process was killed.

        Raises:
          AssertionError: the action raised, or it takes longer than ``timeout`` seconds.
        """
        received = b""
        try:
            while True:
                ready, _, _ = select.select([self._pipe], [], [], timeout)
                if not ready:
                    os.kill(self.pid, signal.SIGKILL)
                    raise AssertionError(f"the child is not done after {timeout} s")
                part = os.read(self._pipe, 1 << 16)
                if not part:
                    break
                received += part
        finally:
            os.close(self._pipe)
            _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return None
        assert received, f"the child ended without a result, status {status}"
        answer = json.loads(received)
        assert "error" not in answer, answer["error"]
        return answer["result"]


def fork(action: Callable[[], Any]) -> Child:
    """Runs an action in a forked child; its result, which JSON must be able to hold, comes from ``wait()``."""
    reading, writing = os.pipe()
    write = os.write
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's and JAX's about threads; see above
        pid = os.fork()
    if pid:
        os.close(writing)
        return Child(pid, reading)
    try:
        os.close(reading)
        try:
            answer = {"result": action()}
        except BaseException:  # noqa: BLE001 - whatever it is, the parent must hear of it
            answer = {"error": traceback.format_exc()}
        data = json.dumps(answer).encode()
        while data:
            data = data[write(writing, data) :]
    finally:
        os._exit(0)


@dataclasses.dataclass(frozen=True)
class Run:
    """How an action in a child went."""

    calls: list[str]
    """Names of the intercepted calls, in order; empty if the child was killed."""
    killed: bool


def start(action: Callable[[], Any], kill_at: int | None = None, *, after: bool = False, torn: bool = False) -> Child:
    """Begins :func:`run`: ``wait()`` gives the names of the intercepted calls, or None if the child was killed."""

    def child() -> list[str]:
        names: list[str] = []
        count = _Counter()
        unpatched_write = os.write

        def hook(name: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
            mine = count() == kill_at
            if mine and torn:
                part = memoryview(args[1]).cast("B")
                unpatched_write(args[0], part[: len(part) // 2])
            if mine and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            names.append(name)
            try:
                return call()
            finally:
                if mine:
                    os.kill(os.getpid(), signal.SIGKILL)

        with intercept(hook):
            action()
        return names

    return fork(child)


def run(
    action: Callable[[], Any],
    kill_at: int | None = None,
    *,
    after: bool = False,
    torn: bool = False,
    timeout: float = 60,
) -> Run:
    """Runs an action in a forked child, which SIGKILLs itself at the ``kill_at``-th intercepted call (from 0).

    Args:
      action: what to run; what it returns is ignored.
      kill_at: number of the call; None lets it run to its end.
      after: kill after the real call instead of before it.
      torn: kill when half of a ``write`` is done.
      timeout: in seconds.

    Raises:
      AssertionError: the action raised or takes too long.
    """
    calls = start(action, kill_at, after=after, torn=torn).wait(timeout)
    return Run(calls=calls or [], killed=calls is None)


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill of a sweep."""

    at: int
    after: bool
    torn: bool
    calls: list[str]
    """Names of all calls that the action makes when it is let run."""

    @property
    def done(self) -> int:
        """How many calls had all of their effect."""
        return self.at + self.after


def sweep(
    prepare: Callable[[], Any], action: Callable[[], Any], *, calls: Mapping[str, int] | None = None
) -> Iterator[Kill]:
    """Kills an action at each of its calls in turn: before the first, after each, amid each write; yields after each.

    A kill before any other call leaves what one after the call before it leaves.

    Args:
      prepare: brings the file system into the state before the action, whatever state it is in.
      action: what is killed; it must make the same calls each time.
      calls: how often the action makes each call at least: what is not killed is not tested.
    """
    prepare()
    whole = run(action)
    assert not whole.killed
    assert whole.calls, "the action makes none of the intercepted calls"
    made = collections.Counter(whole.calls)
    for name, least in (calls or {}).items():
        assert made[name] >= least, f"the action was to make {least} of {name}: {made}"
    for at, name in enumerate(whole.calls):
        for after, torn in ((False, False), (False, True), (True, False)):
            if (torn and name != "write") or (at and not (after or torn)):
                continue
            prepare()
            result = run(action, at, after=after, torn=torn)
            assert result.killed, f"the action made fewer calls than before: {at}"
            yield Kill(at, after, torn, whole.calls)


class _Counter:
    """0, 1, 2, … across threads."""

    def __init__(self) -> None:
        self._next = 0
        self._lock = threading.Lock()

    def __call__(self) -> int:
        with self._lock:
            self._next += 1
            return self._next - 1
