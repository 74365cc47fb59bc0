"""What the processes of one program tell each other, without collectives: short texts by way of process 0.

Collectives hang, or mix up data, when processes disagree on what they are doing; so whether they agree is found out
here first. Messages go through the key-value store of JAX's coordination service, which ``jax.distributed.initialize``
starts in process 0. JAX has no public access to it: this module alone takes it from ``jax._src.distributed``, as seen
in JAX 0.9.2, 0.10.2 and 0.12.0 (``global_state.client`` and its ``key_value_*`` and ``blocking_key_value_get_bytes``).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax._src import distributed

from obmlite.errors import ArgumentError, CoordinationError, ObmliteError

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["TIMEOUT", "Session", "process_count", "process_index"]

TIMEOUT = 300.0
"""Seconds for which a process waits for the others at each step, unless told otherwise."""

_PART = 1 << 20  # bytes of one message; gRPC takes 4 MiB unless told otherwise
_SLICE = 0.5  # seconds between looks at whether another process has failed
_LEAVING = 10.0  # seconds that process 0 gives the others to clear away what they made
_BRANCHES = 64  # digests that are compared in one round while the first difference is looked for

_numbers = itertools.count()


def process_index() -> int:
    """This process's number in the program; 0 if ``jax.distributed`` was not initialized."""
    return 0 if distributed.global_state.client is None else int(distributed.global_state.process_id)


def process_count() -> int:
    """Processes in the program; 1 if ``jax.distributed`` was not initialized."""
    return 1 if distributed.global_state.client is None else int(distributed.global_state.num_processes)


class Session:
    """One operation in which all processes take part, each calling the same methods in the same order.

    ::

        with Session("save", timeout=300) as session:
            session.agree("trees", [(name, str(spec)) for …])
            tables = session.exchange(table)

    A process that leaves the block by an exception tells the others, and whatever they wait for then, or later, raises
    :class:`CoordinationError` at once. With one process everything is at hand, and nothing is sent.

    All processes have to begin the same sessions in the same order, so not on several threads.

    Attributes:
      index: this process's number.
      count: processes in the program.
      timeout: seconds for which this process waits for the others at each step.
    """

    def __init__(self, operation: str, *, timeout: float = TIMEOUT) -> None:
        """Sends nothing yet.

        Args:
          operation: what is done, for people; the processes have to give the same.
          timeout: seconds to wait for the others at each step.

        Raises:
          ArgumentError: the timeout is not above 0.
        """
        if not timeout > 0:
            raise ArgumentError(
                "A timeout is not above 0.", field="timeout", expected="seconds, above 0", found=str(timeout)
            )
        self.index = process_index()
        self.count = process_count()
        self._operation = operation
        self.timeout = timeout
        self._client: Any = distributed.global_state.client if self.count > 1 else None
        self._slice = max(_SLICE, self.count / 500)  # more processes ask less often
        self._steps = itertools.count()
        self._gathered = -1  # the step at which process 0 last asked all
        self._number = -1
        self._told = False
        self._looked = time.monotonic()
        self._failed: set[int] = set()
        self._silent: set[int] = set()

    @property
    def _root(self) -> str:
        return f"obmlite/{self._number}"

    @property
    def leader_failed(self) -> bool:
        """Whether process 0 is known to have failed."""
        return 0 in self._failed

    def __enter__(self) -> Session:
        """Begins, when all others do.

        Raises:
          CoordinationError: they do something else, or nothing.
        """
        if self._client is None:
            return self
        self._number = next(_numbers)
        try:
            self.agree("operation", [("", self._operation)])
            if self.index == 0 and self._number:
                # All are here, so nobody reads what is left of the session before.
                self._delete(f"obmlite/{self._number - 1}")
        except BaseException as error:
            self._tell(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tells the others if this process failed."""
        if error is not None:
            self._tell(error)

    # --- messages

    def gather(self, payload: bytes = b"") -> list[bytes]:
        """Sends a message to process 0.

        Returns:
          On process 0 the messages of all processes, in their order; on the others nothing.

        Raises:
          CoordinationError: a process has failed or not answered in time.
        """
        return self._gather(payload)

    def broadcast(self, payload: bytes | None = None, *, decided: bool = False) -> bytes:
        """Sends a message from process 0 to all.

        Args:
          payload: the message, on process 0.
          decided: the message says how it ended. What becomes of others makes no difference any more to those who wait
            for it, and process 0 does not tell that it failed, whatever happens then.

        Raises:
          CoordinationError: as for :meth:`gather`.
        """
        return self._broadcast(payload, decided=decided)

    def exchange(self, payload: bytes) -> list[bytes]:
        """Sends a message from each process to each other.

        Args:
          payload: the message, of any length; process 0 holds those of all.

        Returns:
          The messages of all processes, in their order.

        Raises:
          CoordinationError: as for :meth:`gather`.
        """
        gathered = self._gather(payload)
        joined = b"".join(len(part).to_bytes(8, "little") + part for part in gathered)
        joined = self._broadcast(joined)
        parts, at = [], 0
        while at < len(joined):
            first = at + 8
            at = first + int.from_bytes(joined[at:first], "little")
            parts.append(joined[first:at])
        return parts

    def barrier(self) -> None:
        """Returns when all processes have come here.

        Raises:
          CoordinationError: as for :meth:`gather`.
        """
        self._gather(b"")
        self._broadcast(b"")

    def agree(self, what: str, entries: Iterable[tuple[str, str]]) -> None:
        """Makes sure that all processes give the same texts in the same order.

        Args:
          what: what is compared, for people.
          entries: name of a leaf (or of something else), and what has to be the same about it.

        Raises:
          CoordinationError: they differ; raised by every process, and names the first leaf that does.
          CoordinationError: as for :meth:`gather`.
        """
        if self._client is None:
            return
        entries = list(entries)
        digests = [_digest([f"{len(name)} {name}{text}".encode(errors="surrogatepass")]) for name, text in entries]
        answers = self._gather(len(digests).to_bytes(8, "little") + _digest(digests))
        most = max((int.from_bytes(answer[:8], "little") for answer in answers), default=0)
        verdict = b"" if len(set(answers)) == 1 else most.to_bytes(8, "little")
        verdict = self._broadcast(verdict)
        if not verdict:
            return
        first, last = 0, int.from_bytes(verdict, "little")
        while last - first > 1:
            size = -(-(last - first) // _BRANCHES)
            starts = range(first, last, size)
            found = self.exchange(b"".join(_digest(digests[start : start + size]) for start in starts))
            differing = [n for n in range(len(starts)) if len({one[32 * n : 32 * n + 32] for one in found}) > 1]
            first = starts[differing[0]]
            last = min(first + size, last)
        name, text = entries[first] if first < len(entries) else ("", "nothing")
        texts = [t.decode(errors="replace") for t in self.exchange(_encoded(f"{name} {text}".strip()[:400]))]
        common = max(texts, key=texts.count)
        raise CoordinationError(
            f"The processes disagree about the {what}.",
            leaf=name or None,
            expected=f"the same on all {self.count} processes",
            found="; ".join(
                f"process{'es' if len(group) > 1 else ''} {_numbered(group)}: {text}"
                for text in sorted(set(texts), key=lambda t: (t != common, texts.index(t)))
                for group in ([n for n, t in enumerate(texts) if t == text],)
            ),
            fix="give every process the same pytree, in the same order",
        )

    # --- failures

    def check(self, *, leader: bool = False) -> None:
        """Looks whether another process has failed.

        Args:
          leader: only process 0 matters.

        Raises:
          CoordinationError: one has.
        """
        if self._client is None:
            return
        self._looked = time.monotonic()
        failures = {process: (own, text) for process, own, text in self._failures() if process != self.index}
        self._failed.update(failures)
        if not failures or (leader and 0 not in failures):
            return
        # Where it began, if that is known.
        process = next((n for n, (own, _) in failures.items() if own), min(failures))
        raise self._error("Another process failed.", found=f"process {process}: {failures[process][1]}")

    def poll(self) -> None:
        """:meth:`check`, but at most once in a second or so; for work that takes long.

        Raises:
          CoordinationError: a process has failed.
        """
        if time.monotonic() - self._looked > 2 * self._slice:
            self.check()

    def abandon(self, error: BaseException) -> None:
        """Tells the others, on process 0, that it failed, and waits a little until they have cleared up."""
        if self._client is None:
            return
        self._tell(error)
        until = time.monotonic() + min(self.timeout, _LEAVING)
        with contextlib.suppress(ObmliteError):
            while time.monotonic() < until:
                gone = {process for process, _, _ in self._failures()} | self._silent
                if len(gone) >= self.count:
                    return
                time.sleep(_SLICE / 10)

    # --- the key-value store

    def _tell(self, error: BaseException) -> None:
        if self._client is None or self._told:
            return
        self._told = True
        own = not isinstance(error, CoordinationError)
        text = f"{type(error).__name__}: {error}"[:2000]
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the error that is on its way says more
            self._client.key_value_set_bytes(f"{self._root}/failed/{self.index}", bytes([own]) + _encoded(text))

    def _failures(self) -> Iterable[tuple[int, bool, str]]:
        """(process, whether it was the one where it began, its error) of those that have said so."""
        try:
            found = self._client.key_value_dir_get_bytes(f"{self._root}/failed/")
        except jax.errors.JaxRuntimeError as error:
            raise self._broken(error) from error
        for key, value in found:
            yield int(key.rpartition("/")[2]), bool(value[0]), value[1:].decode(errors="replace")

    def _gather(self, payload: bytes) -> list[bytes]:
        if self._client is None:
            return [payload]
        step = self._gathered = next(self._steps)
        if self.index:
            self._put(f"{self._root}/{step}/{self.index}", payload)
            return []
        until = time.monotonic() + self.timeout
        result = [payload]
        for process in range(1, self.count):
            found = self._get(f"{self._root}/{step}/{process}", until)
            if found is None:
                raise self._unanswered()
            result.append(found)
        self._delete(f"{self._root}/{step}")
        return result

    def _broadcast(self, payload: bytes | None, *, decided: bool = False) -> bytes:
        step = next(self._steps)
        if self.index == 0:
            assert payload is not None
            self._told |= decided
            if self._client is not None:
                self._put(f"{self._root}/{step}/0", payload)
            return payload
        found = self._get(f"{self._root}/{step}/0", time.monotonic() + self.timeout, leader=decided)
        if found is None:
            raise self._unanswered()
        return found

    def _put(self, key: str, payload: bytes) -> None:
        parts = [payload[start : start + _PART] for start in range(0, len(payload), _PART)] or [b""]
        try:
            for n in reversed(range(1, len(parts))):
                self._client.key_value_set_bytes(f"{key}/{n}", parts[n])
            # Last, so that all is there when this is; before the content stands the number of parts.
            self._client.key_value_set_bytes(f"{key}/0", len(parts).to_bytes(4, "little") + parts[0])
        except jax.errors.JaxRuntimeError as error:
            raise self._broken(error) from error

    def _get(self, key: str, until: float, *, leader: bool = False) -> bytes | None:
        """A message, when it is there; None where it has not come in time."""
        while True:
            left = until - time.monotonic()
            try:
                head = self._client.blocking_key_value_get_bytes(f"{key}/0", max(1, int(1000 * min(self._slice, left))))
                rest = [
                    self._client.blocking_key_value_get_bytes(f"{key}/{n}", max(1000, int(1000 * left)))
                    for n in range(1, int.from_bytes(head[:4], "little"))
                ]
                return b"".join([head[4:], *rest])
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise self._broken(error) from error
            self.check(leader=leader)
            if time.monotonic() >= until:
                return None

    def _delete(self, key: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # it only costs memory; what matters fails by itself
            self._client.key_value_delete(key)

    def _there(self, key: str) -> bool:
        try:
            self._client.key_value_try_get_bytes(f"{key}/0")
        except jax.errors.JaxRuntimeError:
            return False
        return True

    def _unanswered(self) -> CoordinationError:
        """The error that names those for whom process 0 waits; where it has their messages, itself."""

        def sent(process: int) -> bool:
            return self._there(f"{self._root}/{self._gathered}/{process}")

        waiting = self.index == 0 or sent(self.index)  # it clears them away when it has all
        silent = [n for n in range(1, self.count) if waiting and not sent(n)] or [0]
        self._silent.update(silent)
        return self._error(
            "Processes have not answered in time.",
            expected=f"an answer within {self.timeout:g} s from all {self.count} processes",
            found=f"nothing from process{'es' if len(silent) > 1 else ''} {_numbered(silent)}",
            fix="see what became of them; give a longer timeout= if they only need more time",
        )

    def _broken(self, error: Exception) -> CoordinationError:
        return self._error(
            "JAX's coordination service has failed, most likely because another process died.", found=str(error)[:400]
        )

    def _error(self, problem: str, **facts: Any) -> CoordinationError:
        return CoordinationError(f"{problem} All were to {self._operation}.", **facts)


def _digest(texts: Iterable[bytes]) -> bytes:
    return hashlib.sha256(b"".join(texts)).digest()


def _encoded(text: str) -> bytes:
    return text.encode(errors="backslashreplace")


def _numbered(processes: Sequence[int]) -> str:
    shown = ", ".join(map(str, processes[:16]))
    return f"{shown} and {len(processes) - 16} more" if len(processes) > 16 else shown
