"""A disk that loses power: what POSIX lets be left of an action that was cut off, or that has just ended.

What an action does to a directory is recorded (:class:`Recorder`), as bytes and names on a model of the disk
(:class:`Disk`). A file's bytes are only sure to be there after an ``fsync`` of it, a name only after an ``fsync`` of
its folder; until then each change, by itself, may be there or not, whatever came before or after it. That is more
than file systems with a journal let happen: they keep the order of names. After Pillai et al., "All File Systems Are
Not Created Equal: On the Complexity of Crafting Crash-Consistent Applications", OSDI 2014.

What is assumed: a renaming is done or not, and a name leads to the old file or to the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import itertools
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from typing import Any

Files = dict[str, bytes | None]
"""Path → content; None for a folder."""

LOST = ("short", "zeros", "half")
"""What becomes of bytes that were written and not synchronized: they are not there, or are zeros, or half of them are
there. That all are there needs no trying: it is what a killed process leaves."""


@dataclasses.dataclass(eq=False)
class File:
    """A file: what was written, and how much of it is sure to stay."""

    content: bytearray = dataclasses.field(default_factory=bytearray)
    synced: int = 0

    def after(self, lost: str) -> bytes:
        """What a cut leaves of it."""
        sure, rest = bytes(self.content[: self.synced]), self.content[self.synced :]
        return sure + {"short": b"", "zeros": bytes(len(rest)), "half": bytes(rest[: len(rest) // 2])}[lost]


@dataclasses.dataclass(eq=False)
class Folder:
    """A folder: the names that are sure to stay, by now."""

    entries: dict[str, File | Folder] = dataclasses.field(default_factory=dict)
    now: dict[str, File | Folder] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """A change of names that is done as a whole or not at all: folder, name, and what the name leads to from then on.

    ``before`` is what the name led to: a removal takes away nothing else.
    """

    steps: tuple[tuple[Folder, str, File | Folder | None, File | Folder | None], ...]

    def touches(self, folder: Folder) -> bool:
        return any(own is folder for own, *_ in self.steps)


class Disk:
    """A directory on a disk, as it was when this was made, and what happened to it since."""

    def __init__(self, root: str) -> None:
        self.root = Folder()
        self._nodes: dict[tuple[int, int], File | Folder] = {}
        self._pending: list[Change] = []
        self._load(root, self.root)

    def _load(self, path: str, folder: Folder) -> None:
        self._nodes[_identity(os.stat(path))] = folder
        with os.scandir(path) as entries:
            for entry in entries:
                node: File | Folder = Folder()
                if entry.is_dir(follow_symlinks=False):
                    self._load(entry.path, node)  # type: ignore[arg-type]
                else:
                    with open(entry.path, "rb") as stream:
                        content = bytearray(stream.read())
                    node = File(content, len(content))
                    self._nodes[_identity(entry.stat(follow_symlinks=False))] = node
                folder.entries[entry.name] = folder.now[entry.name] = node

    # --- what happens

    def knows(self, found: os.stat_result) -> bool:
        """Whether a file or folder lies in the directory."""
        return _identity(found) in self._nodes

    def node(self, found: os.stat_result) -> Any:
        """A file or folder by what ``stat`` says of it."""
        return self._nodes[_identity(found)]

    def create(self, folder: Folder, name: str, found: os.stat_result) -> None:
        """A new file or folder."""
        node = Folder() if stat.S_ISDIR(found.st_mode) else File()
        self._nodes[_identity(found)] = node  # the number may have been another one's, which is gone
        self._change((folder, name, node))

    def write(self, file: File, data: bytes) -> None:
        """Bytes at a file's end."""
        file.content += data

    def remove(self, folder: Folder, name: str) -> None:
        """A name that goes."""
        self._change((folder, name, None))

    def rename(self, source: Folder, name: str, target: Folder, final: str) -> None:
        """A name that becomes another one."""
        self._change((target, final, source.now[name]), (source, name, None))

    def sync(self, node: File | Folder) -> None:
        """An ``fsync``."""
        if isinstance(node, File):
            node.synced = len(node.content)
            return
        pending = []
        for change in self._pending:
            if not change.touches(node):
                pending.append(change)
                continue
            # Of a renaming to another folder, the new name is sure first: never neither of the two.
            own = [step for step in change.steps if step[0] is node]
            done = change.steps if change.steps[-1][0] is node else own
            _apply(Change(tuple(done)), lambda folder: folder.entries)
            rest = tuple(step for step in change.steps if step not in done)
            if rest:
                pending.append(Change(rest))
        self._pending = pending

    def _change(self, *steps: tuple[Folder, str, File | Folder | None]) -> None:
        change = Change(tuple((folder, name, node, folder.now.get(name)) for folder, name, node in steps))
        _apply(change, lambda folder: folder.now)
        self._pending.append(change)

    # --- what is left

    def contents(self) -> Files:
        """What all see while the power is on."""
        return dict(_listed(self.root, lambda folder: folder.now, lambda file: bytes(file.content), ""))

    def cut(self, chance: random.Random, most: int) -> Iterator[Files]:
        """What may be left when the power goes now: the extremes, and some of the rest by chance.

        Args:
          chance: of which.
          most: changes of names up to which all combinations are given.
        """
        number = len(self._pending)
        chosen: list[tuple[int, ...]]
        if number <= most:
            chosen = [own for n in range(number + 1) for own in itertools.combinations(range(number), n)]
        else:
            everything = tuple(range(number))
            chosen = [everything[:n] for n in range(number + 1)]
            chosen += [(n,) for n in everything] + [everything[:n] + everything[n + 1 :] for n in everything]
            chosen += [tuple(n for n in everything if chance.random() < 0.5) for _ in range(1 << most)]
        for own in chosen:
            for lost in LOST:
                yield self._after([self._pending[n] for n in own], lost)

    def _after(self, changes: list[Change], lost: str) -> Files:
        entries: dict[int, dict[str, File | Folder]] = {}

        def table(folder: Folder) -> dict[str, File | Folder]:
            return entries.setdefault(id(folder), dict(folder.entries))

        for change in changes:
            _apply(change, table)
        return dict(_listed(self.root, table, lambda file: file.after(lost), ""))


Table = Callable[[Folder], dict[str, "File | Folder"]]


def _apply(change: Change, table: Table) -> None:
    for folder, name, node, before in change.steps:
        if node is not None:
            table(folder)[name] = node
        elif table(folder).get(name) is before:
            table(folder).pop(name, None)


def _listed(
    folder: Folder, table: Table, content: Callable[[File], bytes], prefix: str
) -> Iterator[tuple[str, bytes | None]]:
    for name, node in sorted(table(folder).items()):
        if isinstance(node, File):
            yield prefix + name, content(node)
        else:
            yield prefix + name, None
            yield from _listed(node, table, content, f"{prefix}{name}/")


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


class Killed(BaseException):
    """The process is gone: nothing that it does from here on has any effect."""


class Recorder:
    """Keeps a model of a directory's disk up to date while an action runs; and looks at what a cut would leave.

    Only what is done by ``os.open``, ``write``, ``fsync``, ``replace``, ``rename``, ``mkdir``, ``unlink`` and
    ``rmdir`` is seen; :meth:`check` finds out if there was more.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.path.realpath(root)
        self.disk = Disk(self.root)
        self.calls = 0
        self.syncs = 0

    def check(self) -> None:
        """Compares the model with the directory.

        Raises:
          AssertionError: something happened that was not seen.
        """
        assert self.disk.contents() == contents(self.root), "not all that was done was seen"

    @contextlib.contextmanager
    def recording(
        self,
        each: Callable[[], Any] = lambda: None,
        *,
        kill_at: int | None = None,
        fail_from: int | None = None,
        forgotten: str = "",
    ) -> Iterator[None]:
        """Records what is done in the block.

        Args:
          each: called after every call that changed something.
          kill_at: number of the call of this block, from 0, from which on none has any effect: as if the process had
            been killed there. The block is left there.
          fail_from: number of the ``fsync`` of this block, from 0, from which on all fail, and do nothing.
          forgotten: ``"files"`` or ``"folders"``: an ``fsync`` of one does nothing, and says that it did.
        """
        made = itertools.count()
        first = self.syncs
        dead = looking = False
        real: dict[str, Callable[..., Any]] = {
            name: getattr(os, name)
            for name in ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
        }
        disk = self.disk

        def place(path: str | os.PathLike[str], descriptor: int | None) -> tuple[Folder | None, str]:
            head, name = os.path.split(os.fspath(path).rstrip("/"))
            if descriptor is None or os.path.isabs(path):
                found = os.stat(head or ".")
            else:
                found = os.stat(head or ".", dir_fd=descriptor)
            return (disk.node(found) if disk.knows(found) else None), name

        def patched(name: str) -> Callable[..., Any]:
            @functools.wraps(real[name])
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                nonlocal dead, looking
                note = None if looking else effect(name, args, kwargs)
                if note is None:
                    return real[name](*args, **kwargs)
                if dead or next(made) == kill_at:
                    dead = True
                    raise Killed
                if name == "fsync":
                    self.syncs += 1
                    if fail_from is not None and self.syncs - first > fail_from:
                        raise OSError(errno.EIO, "injected")
                result = real[name](*args, **kwargs)
                note(result)
                self.calls += 1
                looking = True  # what a look writes is none of the action's
                try:
                    each()
                finally:
                    looking = False
                return result

            return wrapper

        def effect(name: str, args: Any, kwargs: Any) -> Callable[[Any], None] | None:
            """What a call will do to the disk; None if nothing."""
            if name in ("write", "fsync"):
                found = os.fstat(args[0])
                if not disk.knows(found):
                    return None
                node = disk.node(found)
                if name == "write":
                    return lambda done: disk.write(node, bytes(args[1][:done]))
                kind = "files" if isinstance(node, File) else "folders"
                return lambda _: disk.sync(node) if kind != forgotten else None
            if name == "open":
                if not (args[1] if len(args) > 1 else kwargs["flags"]) & os.O_CREAT:
                    return None
                folder, own = place(args[0], kwargs.get("dir_fd"))
                if folder is None or own in folder.now:
                    return None
                return lambda descriptor: disk.create(folder, own, os.fstat(descriptor))
            if name in ("replace", "rename"):
                source, old = place(args[0], kwargs.get("src_dir_fd"))
                target, new = place(args[1], kwargs.get("dst_dir_fd"))
                return None if source is None or target is None else lambda _: disk.rename(source, old, target, new)
            folder, own = place(args[0], kwargs.get("dir_fd"))
            if folder is None:
                return None
            if name != "mkdir":
                return (lambda _: disk.remove(folder, own)) if own in folder.now else None
            if own in folder.now:
                return None
            look = functools.partial(os.stat, args[0], dir_fd=kwargs.get("dir_fd"), follow_symlinks=False)
            return lambda _: disk.create(folder, own, look())

        try:
            for name in real:
                setattr(os, name, patched(name))
            with contextlib.suppress(Killed) if kill_at is not None else contextlib.nullcontext():
                yield
        finally:
            for name, call in real.items():
                setattr(os, name, call)


class Cuts:
    """The distinct states that cuts leave, each laid out once in a folder and looked at.

    What has a temporary name, or lies below one, is left out: nobody who reads looks there.
    """

    def __init__(self, scratch: str | os.PathLike[str], look: Callable[[str], Any], *, most: int = 3) -> None:
        """Begins with none.

        Args:
          scratch: the folder, which is not there yet.
          look: what is made of a state.
          most: see :meth:`Disk.cut`.
        """
        self._scratch = os.fspath(scratch)
        self._look = look
        self._most = most
        self._found: dict[int, Any] = {}
        self._chance = random.Random(0)
        self._there: Files = {}
        os.mkdir(self._scratch)

    @property
    def number(self) -> int:
        """How many states were looked at."""
        return len(self._found)

    def after(self, disk: Disk) -> list[Any]:
        """What is made of each state that a cut may leave at this moment."""
        results = []
        for state in disk.cut(self._chance, self._most):
            files = {path: content for path, content in state.items() if ".tmp" not in path}
            key = hash(frozenset(files.items()))
            if key not in self._found:
                self._lay_out(files)
                self._found[key] = self._look(self._scratch)
            results.append(self._found[key])
        return results

    def _lay_out(self, files: Files) -> None:
        """Makes the folder hold this, by what differs from what it held before."""
        for path in sorted(self._there, reverse=True):  # what is in a folder before the folder
            if path not in files or (files[path] is None) != (self._there[path] is None):
                place = os.path.join(self._scratch, path)
                os.unlink(place) if self._there.pop(path) is not None else os.rmdir(place)
        for path, content in files.items():
            if path not in self._there or self._there[path] != content:
                _write(os.path.join(self._scratch, path), content)
        self._there = files


def contents(root: str | os.PathLike[str]) -> Files:
    """What lies in a directory."""
    found: Files = {}
    for folder, folders, files in os.walk(root):
        prefix = os.path.relpath(folder, root) + "/" if folder != os.fspath(root) else ""
        found.update({prefix + name: None for name in folders})
        for name in files:
            with open(os.path.join(folder, name), "rb") as stream:
                found[prefix + name] = stream.read()
    return found


def lay_out(files: Files, root: str) -> None:
    """Makes a directory hold this and nothing else."""
    shutil.rmtree(root, ignore_errors=True)
    os.mkdir(root)
    for path, content in files.items():  # folders come before what is in them
        _write(os.path.join(root, path), content)


def _write(path: str, content: bytes | None) -> None:
    if content is None:
        os.mkdir(path)
        return
    with open(path, "wb") as stream:
        stream.write(content)
