"""The place where a package lies: relative names in, sources of bytes out.

A package may come from anywhere, so its paths are not trusted: they are checked as text, and then every
component is opened relative to the one before it without following symbolic links, so that nothing can be
swapped between a check and its use and nothing outside the package is ever opened.
"""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
import weakref
from typing import TYPE_CHECKING, NoReturn, Protocol

from obmlite.errors import MissingFileError, PackageNotFoundError, UnsafePathError
from obmlite.io.filesystem import is_remote
from obmlite.io.source import LocalFile

if TYPE_CHECKING:
    from types import TracebackType

    from obmlite.io.source import ByteSource

__all__ = [
    "MAX_COMPONENT_BYTES",
    "MAX_PATH_BYTES",
    "MAX_PATH_DEPTH",
    "LocalDirectory",
    "Store",
    "check_path",
]

MAX_PATH_BYTES = 1024
"""Longest path in a package, in bytes of UTF-8; object stores allow 1024 for a whole key."""

MAX_COMPONENT_BYTES = 255
"""Longest single name in a path, in bytes of UTF-8; most file systems allow no more."""

MAX_PATH_DEPTH = 32
"""Most names in one path."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Non-blocking, because opening a FIFO for reading otherwise waits for a writer, perhaps for ever.
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


def check_path(path: str) -> str:
    """Refuses every path that is not a plain relative one inside the package.

    Args:
      path: names joined by ``/``.

    Returns:
      The same path.

    Raises:
      UnsafePathError: the path is empty, absolute or too long or deep, has an empty, ``.`` or ``..``
        component, or contains a backslash, a control character or a lone surrogate.
    """
    problem = _problem(path)
    if problem is not None:
        # repr of a bounded part: the text is not trusted, and an error message is no place for a megabyte of it.
        raise UnsafePathError(f"a path in the package {problem}", field="path", found=ascii(path[:200]))
    return path


def _problem(path: str) -> str | None:
    if not path:
        return "is empty"
    if len(path) > MAX_PATH_BYTES:  # before anything that takes time in proportion to it
        return f"is longer than {MAX_PATH_BYTES} bytes"
    if path.startswith("/"):
        return "is absolute"
    if "\\" in path:
        return "contains a backslash"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in path):
        return "contains a control character"
    if len(path.encode()) > MAX_PATH_BYTES:
        return f"is longer than {MAX_PATH_BYTES} bytes"
    names = path.split("/")
    if len(names) > MAX_PATH_DEPTH:
        return f"has more than {MAX_PATH_DEPTH} components"
    if any(name in ("", ".", "..") for name in names):
        return "has an empty, '.' or '..' component"
    if any(len(name.encode()) > MAX_COMPONENT_BYTES for name in names):
        return f"has a component of more than {MAX_COMPONENT_BYTES} bytes"
    return None


class Store(Protocol):
    """Where one package lies.

    Attributes:
      name: what the place is called in messages, usually its path or address.
    """

    name: str

    def open(self, path: str) -> ByteSource:
        """Opens one file of the package.

        Raises:
          UnsafePathError: the path leaves the package or names something other than a regular file.
          MissingFileError: there is no such file.
        """
        ...

    def size(self, path: str) -> int:
        """Length of one file of the package in bytes; it is not opened.

        Raises:
          UnsafePathError: as for :meth:`open`.
          MissingFileError: there is no such file.
        """
        ...

    def files(self) -> list[str]:
        """Relative paths of everything in the package that is no directory, sorted."""
        ...

    def close(self) -> None:
        """Gives the place's handle back; sources that were opened stay open."""
        ...


class LocalDirectory:
    """A :class:`Store` over a directory, held by its descriptor.

    What was opened stays the same directory, even if its path is renamed or given to another one.
    """

    def __init__(self, path: str | os.PathLike[str], *, mmap: bool | None = None, follow_links: bool = False) -> None:
        """Opens the directory; symbolic links on the way to it are followed, in it they are not.

        Args:
          path: the package's path.
          mmap: whether its files may be mapped; left out, unless they lie on a network or FUSE file system.
          follow_links: whether to follow links in it, too: not for packages, but caches of other libraries consist of
            links.

        Raises:
          PackageNotFoundError: there is nothing at the path, or something that is no directory.
          OSError: the directory cannot be opened for another reason.
        """
        self.name = os.fspath(path)
        try:
            self._descriptor = os.open(self.name, _FOLDER)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                raise PackageNotFoundError("there is nothing at the path", package=self.name) from error
            if error.errno == errno.ENOTDIR:
                raise PackageNotFoundError(
                    "what is at the path is no directory, and so no package", package=self.name
                ) from error
            raise
        self._closer = weakref.finalize(self, os.close, self._descriptor)
        self._mmap = not is_remote(self._descriptor) if mmap is None else mmap
        self._no_links = 0 if follow_links else os.O_NOFOLLOW

    def __repr__(self) -> str:
        return f"LocalDirectory({self.name!r})"

    def __enter__(self) -> LocalDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self, path: str) -> LocalFile:
        """Opens one file of the package.

        Args:
          path: relative path, components joined by ``/``.

        Raises:
          UnsafePathError: the path leaves the package, passes through something that is no directory, or names
            something other than a regular file; symbolic links count as such.
          MissingFileError: there is no such file.
          OSError: the file cannot be opened for another reason, e.g. its permissions.
          ValueError: the directory is closed.
        """
        *folders, last = check_path(path).split("/")
        folder = self._walk(folders, path)
        try:
            try:
                descriptor = os.open(last, _FILE | self._no_links, dir_fd=folder)
            except OSError as error:
                _refuse(error, folder, last, path, self.name)
        finally:
            os.close(folder)
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise _unsafe(path, mode, self.name)
            return LocalFile(descriptor, path, mmap=self._mmap)
        except BaseException:
            os.close(descriptor)
            raise

    def size(self, path: str) -> int:
        """Length of one file of the package in bytes; it is not opened.

        Raises:
          UnsafePathError: as for :meth:`open`.
          MissingFileError: there is no such file.
          OSError: the file cannot be looked at for another reason, e.g. a folder's permissions.
          ValueError: the directory is closed.
        """
        *folders, last = check_path(path).split("/")
        folder = self._walk(folders, path)
        try:
            found = os.stat(last, dir_fd=folder, follow_symlinks=not self._no_links)
        except OSError as error:
            _refuse(error, folder, last, path, self.name)
        finally:
            os.close(folder)
        if not stat.S_ISREG(found.st_mode):
            raise _unsafe(path, found.st_mode, self.name)
        return found.st_size

    def local_path(self, path: str) -> str:
        """A file's path for libraries that open files themselves; what they find there is theirs to check.

        Raises:
          UnsafePathError: the path leaves the package.
        """
        return os.path.join(self.name, *check_path(path).split("/"))

    def files(self) -> list[str]:
        """Relative paths of everything in the directory that is no directory itself, sorted.

        Symbolic links, FIFOs and the like are listed and not followed. Names that are not UTF-8 come as
        :func:`os.fsdecode` gives them.

        Raises:
          OSError: a folder cannot be read.
          ValueError: the directory is closed.
        """
        found: list[str] = []
        pending: list[list[str]] = [[]]
        while pending:
            folders = pending.pop()
            descriptor = self._walk(folders, "/".join(folders))
            try:
                with os.scandir(descriptor) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            pending.append([*folders, entry.name])
                        else:
                            found.append("/".join([*folders, entry.name]))
            finally:
                os.close(descriptor)
        return sorted(found)

    def close(self) -> None:
        """Closes the directory's descriptor; files that were opened stay open. May be called again."""
        self._closer()

    def _walk(self, folders: list[str], path: str) -> int:
        """A new descriptor of a folder inside the directory, reached component by component."""
        if not self._closer.alive:
            raise ValueError(f"{self.name} is closed")
        try:
            # Not a duplicate, which would share its reading position with every other listing.
            current = os.open(".", _FOLDER, dir_fd=self._descriptor)
        except FileNotFoundError as error:  # the whole package was removed
            _refuse(error, self._descriptor, ".", path, self.name)
        for name in folders:
            try:
                below = os.open(name, _FOLDER | self._no_links, dir_fd=current)
            except OSError as error:
                _refuse(error, current, name, path, self.name)
            finally:
                os.close(current)
            current = below
        return current


def _refuse(error: OSError, folder: int, name: str, path: str, package: str) -> NoReturn:
    """Raises what an error that opening ``name`` in ``folder`` gave means for the package."""
    if error.errno == errno.ENOENT:
        raise MissingFileError("a file of the package is missing", package=package, field="path", found=path) from error
    # Which number a link, socket or file in a folder's place gives differs between systems; what is there doesn't.
    # EMLINK is how some BSDs spell ELOOP.
    if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENOTDIR, errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP):
        try:
            mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
        except OSError:
            mode = 0
        raise _unsafe(path, mode, package) from error
    raise error


_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFREG: "a regular file in a folder's place",
}


def _unsafe(path: str, mode: int, package: str) -> UnsafePathError:
    kind = _KINDS.get(stat.S_IFMT(mode), "something else")
    return UnsafePathError(
        f"a path in the package does not lead to a regular file: {kind} is there",
        package=package,
        field="path",
        expected="a regular file",
        found=path,
    )
