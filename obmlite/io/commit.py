"""Writing a package so that its path holds, at every moment, one whole package or none.

The commit is one replacement of the manifest, after the data files have their names (see ``staging``). What a
process that died has left is removed by the next save, which can know that it is dead because a save holds an
exclusive lock on the directory from its first look to its last write.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from typing import TYPE_CHECKING

from obmlite.errors import CorruptPackageError, ObmliteError, PackageExistsError
from obmlite.io.staging import (
    FOLDER,
    FOLDERS,
    NESTING,
    StagedFile,
    Staging,
    is_data_name,
    is_signature_name,
    is_temporary_name,
    sync,
    sync_folder,
    write_all,
)
from obmlite.io.store import check_path

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from types import TracebackType

    from obmlite.io.digest import Bytes

__all__ = ["FOLDERS", "MANIFEST", "StagedFile", "Transaction", "is_data_name", "locked"]

MANIFEST = "manifest.obm"
"""The file whose replacement is the commit."""


class Transaction(Staging):
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
          named: gives the relative paths of the data files that a manifest, of these bytes, names, and of its
            signatures; raises an :class:`ObmliteError` if it can't be read, and then nothing but temporary files is
            removed.
        """
        super().__init__(path)
        self._overwrite = overwrite
        self._named = named
        self._replaced = False
        self._entered = False
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
        except BaseException:  # an interrupt too gives the lock back: there is no __exit__ yet
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Undoes what was not committed, and gives the lock back."""
        self._leave()

    @property
    def committed(self) -> bool:
        """Whether the new manifest is in place."""
        return self._replaced

    @contextlib.contextmanager
    def invitation(self, *folders: str) -> Iterator[str]:
        """Lets other processes add files (as :class:`obmlite.io.participant.Participant`).

        Args:
          *folders: those that they will add files to; they are made here, so that this transaction removes them.

        Yields:
          The name of an empty file in the package's directory, which is there as long as the block lasts: who finds
          it sees the same directory.

        Raises:
          OSError: the file or a folder cannot be made.
        """
        self._check_open()
        for folder in folders:
            with self._folder(folder, make=True):
                pass
        name, descriptor = self._open_temporary("")
        os.close(descriptor)
        try:
            yield name
        finally:
            self._unlink(name)

    def adopt(self, path: str, length: int) -> None:
        """Checks a data file that another process has added, and takes it into the commit.

        Args:
          path: as :meth:`StagedFile.finish` returned it there.
          length: its bytes.

        Raises:
          CorruptPackageError: there is no such file of this length.
          ValueError: the path is not that of a data file.
        """
        self._check_open()
        folder, _, name = check_path(path).rpartition("/")
        if folder not in FOLDERS or not is_data_name(name):
            raise ValueError(f"{path!r} is no name for a data file")
        entry = self._stat(path)
        if entry is None or not stat.S_ISREG(entry.st_mode) or entry.st_size != length:
            raise CorruptPackageError(
                "A file that another process wrote is not in the package's directory.",
                expected=f"{path}: {length} bytes",
                found="nothing" if entry is None else f"{entry.st_size} bytes",
                fix="have all processes save to one directory, on a file system that all of them see",
            )
        self._unsynced |= {folder, ""}

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
        if self._first:
            self._unsynced.add("")
        self._sync_folders()
        if self._first:
            # Even if an earlier save made the directory: it may have died before it got as far as this.
            self._sync_above()
        temporary, descriptor = self._open_temporary("")
        try:
            try:
                write_all(descriptor, manifest)
                sync(descriptor)
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
        except BaseException:  # an interrupt too leaves nothing behind
            self._unlink(temporary)
            raise
        sync_folder(self._descriptor)

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
                write_all(descriptor, data)
                sync(descriptor)
            finally:
                os.close(descriptor)
            with self._folder(folder) as place:
                os.replace(os.path.basename(temporary), name, src_dir_fd=place, dst_dir_fd=place)
                sync_folder(place)
        except BaseException:  # as above
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
                descriptor = os.open(self.path, FOLDER)
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
        """Removes what is left of saves that are over: temporary files, data that no manifest names, signatures."""
        kept: Collection[str] | None = ()
        if manifest is not None:
            # Whoever put it there may have died before that was durable: the disk would still have the one before,
            # which names what is about to go.
            sync_folder(self._descriptor)
            try:
                kept = self._named(manifest)
            except ObmliteError:
                kept = None  # what a damaged manifest names cannot be known, so all data stay
        if kept is not None:
            self._kept = frozenset(kept)
        heads = {"/".join(path.split("/", 2)[:2]) for path in self._kept}
        for path in os.listdir(self._descriptor):
            stale = kept is not None and path not in self._kept and is_signature_name(path)
            if self._is_temporary(path) or (stale and self._is_file(path)):
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
            self._discard()
            if not self._replaced:
                self._undo()
        finally:
            descriptor, self._descriptor = self._descriptor, -1
            # Unlocked by name: a child that was forked meanwhile still has the descriptor, and with it the lock.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _undo(self) -> None:
        super()._undo()
        if self._made:
            with contextlib.suppress(OSError):
                # Another one's directory may have the path by now; if it is empty, its owner can make it again.
                if os.path.samestat(os.fstat(self._descriptor), os.stat(self.path)):
                    os.rmdir(self.path)

    # --- between --------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        self._check(committed=False)

    def _check(self, *, committed: bool) -> None:
        super()._check_open()
        if self._replaced != committed:
            raise RuntimeError("the transaction has " + ("not committed yet" if committed else "committed already"))

    def _occupied(self, problem: str, *, found: str | None = None, fix: str | None = None) -> PackageExistsError:
        return PackageExistsError(problem, package=self.path, found=found, fix=fix)

    def _is_temporary(self, path: str) -> bool:
        return is_temporary_name(path.rpartition("/")[2]) and self._is_file(path)

    def _is_file(self, path: str) -> bool:
        entry = self._stat(path)
        return entry is not None and stat.S_ISREG(entry.st_mode)

    def _is_data(self, path: str) -> int:
        """The mode of a data file or of a directory of supplementals; 0 for anything else."""
        folder, _, name = path.rpartition("/")
        entry = self._stat(path) if is_data_name(name) else None
        if entry is None:
            return 0
        whole = stat.S_ISREG(entry.st_mode) or (stat.S_ISDIR(entry.st_mode) and folder == NESTING)
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
                    above = os.open("..", FOLDER, dir_fd=current)
                except PermissionError:
                    return  # a directory that we may not open, we cannot fsync either
                os.close(current)
                current = above
                sync_folder(current)
        finally:
            os.close(current)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the lock of saves on a package's directory, for what is written beside its manifest.

    Raises:
      OSError: the directory is not there, or cannot be locked.
    """
    descriptor = os.open(path, FOLDER)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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
