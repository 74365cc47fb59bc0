"""Data files that get their bytes under temporary names, and then names that contain a digest.

A name is never used again for other bytes, so that nothing a reader may have open is written again. What a
process that died has left is recognised by its name.

Every change goes through ``os.write``, ``os.fsync``, ``os.replace``, ``os.mkdir``, ``os.unlink`` and
``os.rmdir``, looked up when called, so that the tests can fail or kill a save at each one of them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import threading
from typing import TYPE_CHECKING

from obmlite.io.digest import flat
from obmlite.io.store import check_path

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from types import TracebackType

    from obmlite.io.digest import Bytes

__all__ = ["FOLDERS", "StagedFile", "Staging", "is_data_name", "is_signature_name", "signature_name"]

FOLDERS = ("functions", "weights", "supplementals")
"""Folders of data files; the last one may also hold whole directories."""

NESTING = "supplementals"

# What our own files are called; only what has such a name is ever removed.
_DATA_NAME = re.compile(r"[\w.-]*-[0-9a-f]{16}(\.[\w+-]+){0,4}", re.ASCII)
_TEMPORARY_NAME = re.compile(r"\.obmlite-[0-9a-f]{16}\.tmp")
_SIGNATURE_NAME = re.compile(r"manifest-[0-9a-f]{64}\.sig")

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_INNER_FOLDER = FOLDER | os.O_NOFOLLOW
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

# macOS refuses to write more than INT_MAX bytes at once, and Linux writes at most 4 KiB less than 2 GiB.
_MOST = 1 << 30

_FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)


def is_data_name(name: str) -> bool:
    """Whether a name has the form of a data file's: ``<slug>-<16 hex digits>``, with or without suffixes."""
    return _DATA_NAME.fullmatch(name) is not None


def is_temporary_name(name: str) -> bool:
    """Whether a name is that of a file that is, or was, being written."""
    return _TEMPORARY_NAME.fullmatch(name) is not None


def is_signature_name(name: str) -> bool:
    """Whether a name is that of a manifest's signatures."""
    return _SIGNATURE_NAME.fullmatch(name) is not None


def signature_name(digest: bytes) -> str:
    """The file in which a manifest's signatures are, by the manifest's digest."""
    return f"manifest-{digest.hex()}.sig"


class Staging:
    """The files that one process adds to a package's directory, and what takes them away again.

    Belongs to one thread, but its staged files may be filled and finished on several, one for each.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Touches nothing yet.

        Args:
          path: the package's directory.
        """
        # Made absolute as it is, because the working directory may change; not normalised, because `..` behind a
        # symbolic link is not what it looks like.
        self.path = os.fspath(path)
        if not os.path.isabs(self.path):
            self.path = os.path.join(os.getcwd(), self.path)
        self._descriptor = -1  # of the directory, while open
        self._guard = threading.Lock()  # over the four below
        self._staged: set[StagedFile] = set()
        self._files: dict[str, None] = {}  # made by us, in order
        self._folders: dict[str, None] = {}
        self._unsynced: set[str] = set()
        self._kept: Collection[str] = ()  # files that are not ours, whether they are there or not

    def create(self, folder: str) -> StagedFile:
        """Starts a data file under a temporary name.

        Args:
          folder: one of :data:`FOLDERS`, or a folder below ``supplementals/<slug>-<16 hex digits>``.

        Raises:
          ValueError: the folder is none of these.
          OSError: the file or its folder cannot be made.
        """
        self._check_open()
        top, _, below = check_path(folder).partition("/")
        if top not in FOLDERS or (below and top != NESTING):
            raise ValueError(f"{folder!r} is no place for data files: {', '.join(FOLDERS)}, deeper only in {NESTING}")
        # Temporary files lie in the top folders only, so that the next save needs to look nowhere else.
        return StagedFile(self, folder, *self._open_temporary(top))

    # --- for those that build on it

    def _check_open(self) -> None:
        """Refuses further files when it is too late for them.

        Raises:
          RuntimeError: it is.
        """
        if self._descriptor < 0:
            raise RuntimeError("the transaction is not open")

    def _sync_folders(self) -> None:
        """Makes the names of all files so far durable."""
        for folder in sorted(self._unsynced, key=lambda name: name.count("/") + bool(name), reverse=True):
            with self._folder(folder) as descriptor:
                sync_folder(descriptor)

    def _discard(self) -> None:
        """Removes what is not finished."""
        for staged in tuple(self._staged):
            staged.discard()

    def _undo(self) -> None:
        """Removes what is finished, and folders that were made for it."""
        # What cannot be removed now, the next save removes; the error that led here must not be hidden by another.
        for path in self._files:
            self._unlink(path)
        for path in reversed(self._folders):
            above, _, name = path.rpartition("/")
            with contextlib.suppress(OSError), self._folder(above) as descriptor:
                os.rmdir(name, dir_fd=descriptor)

    @contextlib.contextmanager
    def _folder(self, path: str, *, make: bool = False) -> Iterator[int]:
        """A descriptor of a folder in the package, for as long as the block lasts; "" is the package itself."""
        current = os.dup(self._descriptor)
        try:
            names = path.split("/") if path else []
            for depth, name in enumerate(names):
                if make:
                    self._make_folder(current, name, "/".join(names[:depth]))
                below = os.open(name, _INNER_FOLDER, dir_fd=current)
                os.close(current)
                current = below
            yield current
        finally:
            os.close(current)

    def _make_folder(self, descriptor: int, name: str, above: str) -> None:
        try:
            os.mkdir(name, dir_fd=descriptor)
        except FileExistsError:
            return
        with self._guard:
            self._folders[f"{above}/{name}" if above else name] = None
            self._unsynced.add(above)

    def _open_temporary(self, folder: str) -> tuple[str, int]:
        """A new, empty file with a temporary name: its path and a descriptor to write to."""
        name = f".obmlite-{secrets.token_hex(8)}.tmp"
        with self._folder(folder, make=True) as descriptor:
            return (f"{folder}/{name}" if folder else name), os.open(name, _NEW_FILE, 0o666, dir_fd=descriptor)

    def _finish(self, temporary: str, path: str) -> None:
        """Gives a staged file its name."""
        above, _, name = temporary.rpartition("/")
        folder, _, final = path.rpartition("/")
        with self._folder(above) as source, self._folder(folder, make=True) as target:
            fresh = path not in self._kept and stat_at(final, target) is None
            with self._guard:
                if fresh:
                    self._files[path] = None
                self._unsynced.add(folder)
            os.replace(name, final, src_dir_fd=source, dst_dir_fd=target)

    def _unlink(self, path: str) -> None:
        """Removes a file if it is there and can be removed."""
        above, _, name = path.rpartition("/")
        with contextlib.suppress(OSError), self._folder(above) as descriptor:
            os.unlink(name, dir_fd=descriptor)

    def _stat(self, path: str) -> os.stat_result | None:
        """What lies at a path of at most two components, the first of which is one of ours; None if nothing does."""
        return stat_at(path, self._descriptor)


class StagedFile:
    """A data file that is being written, under a temporary name until it is finished.

    As a context manager it removes itself if the block is left before :meth:`finish`.
    """

    def __init__(self, staging: Staging, folder: str, temporary: str, descriptor: int) -> None:
        """For :meth:`Staging.create` only."""
        self._staging = staging
        self._folder = folder
        self._temporary = temporary
        self._descriptor = descriptor
        self._sealed = False
        self._size = 0
        with staging._guard:
            staging._staged.add(self)

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._size

    def write(self, buffer: Bytes) -> None:
        """Appends a buffer's bytes.

        Args:
          buffer: C-contiguous, of any item type and length.

        Raises:
          RuntimeError: the file is sealed, finished or discarded.
          OSError: the bytes cannot be written.
        """
        if self._descriptor < 0:
            raise RuntimeError("the staged file is closed")
        self._size += write_all(self._descriptor, buffer)

    def flush(self) -> None:
        """Returns when the disk has what was written so far, so that less is left for :meth:`finish` to wait for.

        May be called on another thread than the one that writes, but not beside :meth:`seal`, :meth:`finish` or
        :meth:`discard`.

        Raises:
          OSError: the content could not be written; the file must not be used then, since later calls may not fail.
        """
        getattr(os, "fdatasync", os.fsync)(self._descriptor)  # macOS has no fdatasync

    def seal(self) -> None:
        """Makes the content durable and closes the descriptor, while the name stays temporary.

        For those who stage many files before they know the first one's name: a process may have few open.

        Raises:
          OSError: the content could not be made durable; it must not be used then.
        """
        if self._sealed:
            return
        if self._descriptor < 0:
            raise RuntimeError("the staged file is closed")
        try:
            sync(self._descriptor)
        finally:
            self._close()
        self._sealed = True

    def finish(self, name: str) -> str:
        """Makes the content durable and gives the file its final name.

        Args:
          name: name in the folder; in ``supplementals`` it may contain folders, which are made. The part directly
            below the top folder must have the form ``<slug>-<16 hex digits>``, with suffixes or without.

        Returns:
          The file's path in the package.

        Raises:
          UnsafePathError: the path is not a plain relative one.
          ValueError: the name has another form, so that a later save would not know the file as one of ours.
          RuntimeError: the file is finished or discarded already.
          OSError: an fsync or the renaming failed.
        """
        path = check_path(f"{self._folder}/{name}")
        top, head, *below = path.split("/")
        if not is_data_name(head) or (below and top != NESTING):
            raise ValueError(f"{path!r} is no name for a data file")
        self._staging._check_open()
        self.seal()
        if self not in self._staging._staged:
            raise RuntimeError("the staged file is finished already")
        self._staging._finish(self._temporary, path)
        self._forget()
        return path

    def discard(self) -> None:
        """Removes the file, unless it is finished; may be called again."""
        self._close()
        if self in self._staging._staged:
            self._staging._unlink(self._temporary)
            self._forget()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _forget(self) -> None:
        with self._staging._guard:
            self._staging._staged.discard(self)


def stat_at(name: str, descriptor: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=descriptor, follow_symlinks=False)
    except FileNotFoundError:
        return None


def write_all(descriptor: int, buffer: Bytes) -> int:
    """Writes all of a buffer; returns its bytes."""
    view = flat(buffer)
    done = 0
    while done < len(view):
        done += os.write(descriptor, view[done : done + _MOST])
    return done


def sync(descriptor: int) -> None:
    """Returns when a file's content is durable."""
    os.fsync(descriptor)
    if _FULL_SYNC is not None:
        # macOS: fsync leaves the bytes in the drive's cache, which may write them in any order.
        with contextlib.suppress(OSError):  # not known to every file system
            fcntl.fcntl(descriptor, _FULL_SYNC)


def sync_folder(descriptor: int) -> None:
    """Returns when a folder's names are durable."""
    try:
        sync(descriptor)
    except OSError as error:
        # File systems that cannot fsync a folder say so with these (PostgreSQL ignores them too).
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
