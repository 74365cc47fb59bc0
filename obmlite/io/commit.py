"""Writing a package so that its path holds, at every moment, one whole package or none.

Data files get their bytes under temporary names and then names that contain a digest, so that nothing a
reader may have open is written again. The commit is one replacement of the manifest. What a process that
died has left is recognised by its name and removed by the next save, which can know that it is dead because
a save holds an exclusive lock on the directory from its first look to its last write.

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
import shutil
import stat
import threading
from typing import TYPE_CHECKING

from obmlite.errors import ObmliteError, PackageExistsError
from obmlite.io.digest import flat
from obmlite.io.store import check_path

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from types import TracebackType

    from obmlite.io.digest import Bytes

__all__ = ["FOLDERS", "MANIFEST", "StagedFile", "Transaction", "is_data_name"]

MANIFEST = "manifest.obm"
"""The file whose replacement is the commit."""

FOLDERS = ("functions", "weights", "supplementals")
"""Folders of data files; the last one may also hold whole directories."""

_NESTING = "supplementals"

# What our own files are called; only what has such a name is ever removed.
_DATA_NAME = re.compile(r"[\w.-]*-[0-9a-f]{16}(\.[\w+-]+){0,4}", re.ASCII)
_TEMPORARY_NAME = re.compile(r"\.obmlite-[0-9a-f]{16}\.tmp")

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_INNER_FOLDER = _FOLDER | os.O_NOFOLLOW
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

# macOS refuses to write more than INT_MAX bytes at once, and Linux writes at most 4 KiB less than 2 GiB.
_MOST = 1 << 30

_FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)


def is_data_name(name: str) -> bool:
    """Whether a name has the form of a data file's: ``<slug>-<16 hex digits>``, with or without suffixes."""
    return _DATA_NAME.fullmatch(name) is not None


class Transaction:
    """One save: everything in its block becomes the package at once, or nothing does.

    ::

        with Transaction(path, overwrite=True, named=names_in_manifest) as save:
            with save.create("weights") as file:
                file.write(data)
                name = file.finish(f"params-{digest}.safetensors")
            save.commit(manifest)
            save.publish("weights/params.safetensors.index.json", index)

    Leaving the block without a commit removes what it made: files, folders, and the package's directory if
    the transaction made that and it is empty (directories above it stay, since others may use them by now).
    Files of the previous package stay until the next save, for those who have it open.

    A directory without a manifest that holds anything but our own leftovers is never written to, and one with
    a manifest is a package: whatever else lies in it is left alone.

    A transaction belongs to one thread, but its staged files may be filled and finished on several, one for
    each. The lock is advisory (``flock`` on the directory), waits without limit, and is not reentrant: a
    second transaction on the same path inside the block waits for ever.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, overwrite: bool = False, named: Callable[[bytes], Collection[str]]
    ) -> None:
        """Describes the save; nothing is touched before the block is entered.

        Args:
          path: where the package is to lie. It, and directories above it, are made if they are missing.
          overwrite: whether a package that is there may be replaced.
          named: gives the relative paths of the data files that a manifest, of these bytes, names; raises an
            :class:`ObmliteError` if it can't be read, and then nothing but temporary files is removed.
        """
        # Made absolute as it is, because the working directory may change; not normalised, because `..` behind a
        # symbolic link is not what it looks like.
        self.path = os.fspath(path)
        if not os.path.isabs(self.path):
            self.path = os.path.join(os.getcwd(), self.path)
        self._overwrite = overwrite
        self._named = named
        self._descriptor = -1
        self._replaced = False
        self._entered = False
        self._guard = threading.Lock()  # over the four below
        self._staged: set[StagedFile] = set()
        self._files: dict[str, None] = {}  # made by us, in order
        self._folders: dict[str, None] = {}
        self._unsynced: set[str] = set()
        self._kept: Collection[str] = ()
        self._first = False  # no manifest in place
        self._made = False  # the package's directory is ours
        self._made_above = 0

    def __repr__(self) -> str:
        return f"Transaction({self.path!r}, overwrite={self._overwrite})"

    def __enter__(self) -> Transaction:
        """Locks the directory, made if there is none, decides whether to write there, and clears leftovers.

        Raises:
          PackageExistsError: the path holds a package and ``overwrite`` is False, or something that is no package.
          OSError: the directory cannot be made, opened, locked or read.
        """
        if self._entered:
            raise RuntimeError("a transaction cannot be used twice")
        self._entered = True
        self._acquire()
        try:
            manifest = self._decide()
            self._first = manifest is None
            self._clear(manifest)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Undoes what was not committed, and gives the lock back."""
        self._leave()

    def create(self, folder: str) -> StagedFile:
        """Starts a data file under a temporary name.

        Args:
          folder: one of :data:`FOLDERS`, or a folder below ``supplementals/<slug>-<16 hex digits>``.

        Raises:
          ValueError: the folder is none of these.
          OSError: the file or its folder cannot be made.
        """
        self._check(committed=False)
        top, _, below = check_path(folder).partition("/")
        if top not in FOLDERS or (below and top != _NESTING):
            raise ValueError(f"{folder!r} is no place for data files: {', '.join(FOLDERS)}, deeper only in {_NESTING}")
        # Temporary files lie in the top folders only, so that the next save needs to look nowhere else.
        return StagedFile(self, folder, *self._open_temporary(top))

    def commit(self, manifest: Bytes) -> None:
        """Makes the package what the manifest says: the files become durable, then the manifest is replaced.

        Args:
          manifest: the whole content of the manifest.

        Raises:
          RuntimeError: a staged file is neither finished nor discarded, or the transaction is over.
          OSError: a write or an fsync failed. If only the last fsync did, the new package is in place, but may
            not survive a power failure; otherwise leaving the block restores what was there.
        """
        self._check(committed=False)
        if self._staged:
            raise RuntimeError("a staged file is neither finished nor discarded")
        unsynced = self._unsynced | ({""} if self._first else set())
        for folder in sorted(unsynced, key=lambda name: name.count("/") + bool(name), reverse=True):
            with self._folder(folder) as descriptor:
                _sync_folder(descriptor)
        if self._first:
            # Even if an earlier save made the directory: it may have died before it got as far as this.
            self._sync_above()
        temporary, descriptor = self._open_temporary("")
        try:
            try:
                _write(descriptor, manifest)
                _sync(descriptor)
            finally:
                os.close(descriptor)
            # Set before the call, because an interrupt right after it must not undo the data of a manifest in place.
            self._replaced = True
            try:
                os.replace(temporary, MANIFEST, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
            except OSError:
                # Some network file systems report an error for a rename that they did.
                self._replaced = self._stat(temporary) is None
                raise
        except BaseException:
            self._unlink(temporary)
            raise
        _sync_folder(self._descriptor)

    def publish(self, path: str, data: Bytes) -> None:
        """Writes, after the commit, a small file that no manifest names, replacing one of the same name at once.

        Args:
          path: relative path, in the package's directory itself or in one of its data folders.
          data: the whole content.

        Raises:
          ValueError: the path is the manifest's or lies elsewhere.
          RuntimeError: the transaction has not committed.
          OSError: the file cannot be written; the package is whole nevertheless.
        """
        self._check(committed=True)
        folder, _, name = check_path(path).rpartition("/")
        if folder not in ("", *FOLDERS) or path in (MANIFEST, *FOLDERS):
            raise ValueError(f"{path!r} is no place for a file outside the manifest")
        temporary, descriptor = self._open_temporary(folder)
        try:
            try:
                _write(descriptor, data)
                _sync(descriptor)
            finally:
                os.close(descriptor)
            with self._folder(folder) as place:
                os.replace(os.path.basename(temporary), name, src_dir_fd=place, dst_dir_fd=place)
                _sync_folder(place)
        except BaseException:
            self._unlink(temporary)
            raise

    def withdraw(self, path: str) -> None:
        """Removes, after the commit, what an earlier save published and this one has no use for; if it is there.

        Raises:
          RuntimeError: the transaction has not committed.
          OSError: the file cannot be removed; the package is whole nevertheless.
        """
        self._check(committed=True)
        folder, _, name = check_path(path).rpartition("/")
        with contextlib.suppress(FileNotFoundError), self._folder(folder) as place:
            os.unlink(name, dir_fd=place)

    # --- entering -------------------------------------------------------------------------------------------------

    def _acquire(self) -> None:
        """Opens and locks the directory, and makes it if it isn't there."""
        while True:
            made = _make_directories(self.path)
            try:
                descriptor = os.open(self.path, _FOLDER)
            except FileNotFoundError:
                if os.path.islink(self.path):
                    raise self._occupied("the path is a symbolic link that leads nowhere") from None
                continue  # whoever made it has removed it again
            except NotADirectoryError:
                raise self._occupied("the path is no directory") from None
            self._descriptor = descriptor
            self._made = made > 0
            self._made_above = max(self._made_above, made - 1)
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                except OSError as error:
                    error.add_note("obmlite locks a package's directory with flock, which this file system refused")
                    raise
                # The one who held the lock may have removed the directory, and another one made it anew.
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                        return
            except BaseException:
                # Without the lock an empty directory of ours may be one that another save is about to fill.
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._made = False
                except OSError:
                    pass  # where nobody can lock, nobody else is in there
                self._leave()
                raise
            self._descriptor = -1
            os.close(descriptor)

    def _decide(self) -> bytes | None:
        """The manifest in place, None if there is none; refuses the directory if it must not be written to."""
        manifest = self._stat(MANIFEST)
        if manifest is not None:
            if not stat.S_ISREG(manifest.st_mode):
                raise self._occupied("the directory holds something else", found=f"{MANIFEST}, no regular file")
            if not self._overwrite:
                raise self._occupied("there is a package at the path already", fix="pass overwrite=True to replace it")
        for folder in FOLDERS:
            entry = self._stat(folder)
            if entry is not None and not stat.S_ISDIR(entry.st_mode):
                raise self._occupied("the directory holds something else", found=f"{folder}, no directory")
        if manifest is not None:
            return self._read(MANIFEST)
        foreign = sorted(self._foreign())
        if foreign:
            shown = ", ".join(map(ascii, foreign[:3])) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
            raise self._occupied(
                "the directory holds something else", found=shown, fix="save to a path where there is nothing yet"
            )
        return None

    def _foreign(self) -> Iterator[str]:
        """What lies in the directory and cannot have been left by a save that died."""
        for name in os.listdir(self._descriptor):
            if name not in FOLDERS and not self._is_temporary(name):
                yield name
        for folder in FOLDERS:
            for name in self._entries(folder):
                path = f"{folder}/{name}"
                if not self._is_temporary(path) and not self._is_data(path):
                    yield path

    def _clear(self, manifest: bytes | None) -> None:
        """Removes what saves that are over have left: temporary files, and data that no manifest names."""
        kept: Collection[str] | None = ()
        if manifest is not None:
            try:
                kept = self._named(manifest)
            except ObmliteError:
                kept = None  # what a damaged manifest names cannot be known, so all data stay
        if kept is not None:
            self._kept = frozenset(kept)
        heads = {"/".join(path.split("/", 2)[:2]) for path in self._kept}
        for path in os.listdir(self._descriptor):
            if self._is_temporary(path):
                os.unlink(path, dir_fd=self._descriptor)
        for folder in FOLDERS:
            entries = self._entries(folder)
            if not entries:
                continue
            with self._folder(folder) as descriptor:
                for name in entries:
                    path = f"{folder}/{name}"
                    if self._is_temporary(path):
                        os.unlink(name, dir_fd=descriptor)
                    elif kept is not None and path not in heads and (mode := self._is_data(path)):
                        if stat.S_ISDIR(mode):
                            shutil.rmtree(name, dir_fd=descriptor)
                        else:
                            os.unlink(name, dir_fd=descriptor)

    # --- leaving --------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        if self._descriptor < 0:
            return
        try:
            for staged in tuple(self._staged):
                staged.discard()
            if not self._replaced:
                self._undo()
        finally:
            descriptor, self._descriptor = self._descriptor, -1
            # Unlocked by name: a child that was forked meanwhile still has the descriptor, and with it the lock.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _undo(self) -> None:
        # What cannot be removed now, the next save removes; the error that led here must not be hidden by another.
        for path in self._files:
            self._unlink(path)
        for path in reversed(self._folders):
            above, _, name = path.rpartition("/")
            with contextlib.suppress(OSError), self._folder(above) as descriptor:
                os.rmdir(name, dir_fd=descriptor)
        if self._made:
            with contextlib.suppress(OSError):
                # Another one's directory may have the path by now; if it is empty, its owner can make it again.
                if os.path.samestat(os.fstat(self._descriptor), os.stat(self.path)):
                    os.rmdir(self.path)

    # --- between --------------------------------------------------------------------------------------------------

    def _check(self, *, committed: bool) -> None:
        if self._descriptor < 0:
            raise RuntimeError("the transaction is not open")
        if self._replaced != committed:
            raise RuntimeError("the transaction has " + ("not committed yet" if committed else "committed already"))

    def _occupied(self, problem: str, *, found: str | None = None, fix: str | None = None) -> PackageExistsError:
        return PackageExistsError(problem, package=self.path, found=found, fix=fix)

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
            fresh = path not in self._kept and _stat(final, target) is None
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
        return _stat(path, self._descriptor)

    def _is_temporary(self, path: str) -> bool:
        if not _TEMPORARY_NAME.fullmatch(path.rpartition("/")[2]):
            return False
        entry = self._stat(path)
        return entry is not None and stat.S_ISREG(entry.st_mode)

    def _is_data(self, path: str) -> int:
        """The mode of a data file or of a directory of supplementals; 0 for anything else."""
        folder, _, name = path.rpartition("/")
        entry = self._stat(path) if is_data_name(name) else None
        if entry is None:
            return 0
        whole = stat.S_ISREG(entry.st_mode) or (stat.S_ISDIR(entry.st_mode) and folder == _NESTING)
        return entry.st_mode if whole else 0

    def _entries(self, folder: str) -> list[str]:
        if self._stat(folder) is None:
            return []
        with self._folder(folder) as descriptor:
            return os.listdir(descriptor)

    def _read(self, name: str) -> bytes:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._descriptor)
        with os.fdopen(descriptor, "rb") as file:
            return file.read()

    def _sync_above(self) -> None:
        """Makes the package's directory, and those above it that were made with it, durable."""
        current = os.dup(self._descriptor)
        try:
            for _ in range(self._made_above + 1):
                try:
                    above = os.open("..", _FOLDER, dir_fd=current)
                except PermissionError:
                    return  # a directory that we may not open, we cannot fsync either
                os.close(current)
                current = above
                _sync_folder(current)
        finally:
            os.close(current)


class StagedFile:
    """A data file that is being written, under a temporary name until it is finished.

    As a context manager it removes itself if the block is left before :meth:`finish`.
    """

    def __init__(self, transaction: Transaction, folder: str, temporary: str, descriptor: int) -> None:
        """For :meth:`Transaction.create` only."""
        self._transaction = transaction
        self._folder = folder
        self._temporary = temporary
        self._descriptor = descriptor
        self._sealed = False
        self._size = 0
        with transaction._guard:
            transaction._staged.add(self)

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
        self._size += _write(self._descriptor, buffer)

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
            _sync(self._descriptor)
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
        if not is_data_name(head) or (below and top != _NESTING):
            raise ValueError(f"{path!r} is no name for a data file")
        self._transaction._check(committed=False)
        self.seal()
        if self not in self._transaction._staged:
            raise RuntimeError("the staged file is finished already")
        self._transaction._finish(self._temporary, path)
        self._forget()
        return path

    def discard(self) -> None:
        """Removes the file, unless it is finished; may be called again."""
        self._close()
        if self in self._transaction._staged:
            self._transaction._unlink(self._temporary)
            self._forget()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _forget(self) -> None:
        with self._transaction._guard:
            self._transaction._staged.discard(self)


def _make_directories(path: str) -> int:
    """Makes a directory and those above it that are missing; returns how many."""
    try:
        os.mkdir(path)
    except FileExistsError:
        return 0
    except FileNotFoundError:
        above = os.path.dirname(path.rstrip("/"))
        if not above or above == path:
            raise
        made = _make_directories(above)
        try:
            os.mkdir(path)
        except FileExistsError:
            return made
        return made + 1
    return 1


def _stat(name: str, descriptor: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=descriptor, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _write(descriptor: int, buffer: Bytes) -> int:
    """Writes all of a buffer; returns its bytes."""
    view = flat(buffer)
    done = 0
    while done < len(view):
        done += os.write(descriptor, view[done : done + _MOST])
    return done


def _sync(descriptor: int) -> None:
    """Returns when a file's content is durable."""
    os.fsync(descriptor)
    if _FULL_SYNC is not None:
        # macOS: fsync leaves the bytes in the drive's cache, which may write them in any order.
        with contextlib.suppress(OSError):  # not known to every file system
            fcntl.fcntl(descriptor, _FULL_SYNC)


def _sync_folder(descriptor: int) -> None:
    """Returns when a folder's names are durable."""
    try:
        _sync(descriptor)
    except OSError as error:
        # File systems that cannot fsync a folder say so with these (PostgreSQL ignores them too).
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
