"""Files outside of packages, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator

from obmlite.io.staging import FOLDER, sync, sync_folder

__all__ = ["appearing", "replacing", "replacing_in"]


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[int]:
    """A descriptor to write to; when the block ends well, the path holds what was written, durably.

    Until then, and if it ends badly, the path holds what it held; a file that was mapped stays as it was. A symbolic
    link stays one.

    Raises:
      OSError: the file cannot be made, synchronized or renamed.
    """
    folder, name = os.path.split(os.path.realpath(path))
    with replacing_in(folder) as create, create(name) as descriptor:
        yield descriptor


@contextlib.contextmanager
def replacing_in(folder: str) -> Iterator[Callable[[str], contextlib.AbstractContextManager[int]]]:
    """Makes several files in a directory: :func:`replacing`, for all of them.

    What it gives makes one, by its name: a context manager with the descriptor to write to. They get their names, in
    the order in which they were made, when the whole block ends well, and vanish otherwise.

    Raises:
      OSError: a file cannot be made, synchronized or renamed; those that were renamed before stay.
    """
    made: dict[str, str] = {}
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    @contextlib.contextmanager
    def create(name: str) -> Iterator[int]:
        temporary = f".obmlite-{secrets.token_hex(8)}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(temporary, flags, 0o666, dir_fd=descriptor)
        made[name] = temporary
        try:
            yield file
            sync(file)
        finally:
            os.close(file)

    try:
        yield create
        for name in list(made):
            os.replace(made[name], name, src_dir_fd=descriptor, dst_dir_fd=descriptor)
            del made[name]
        sync_folder(descriptor)
    finally:
        for temporary in made.values():
            with contextlib.suppress(OSError):  # the error that led here must not be hidden by another
                os.unlink(temporary, dir_fd=descriptor)
        os.close(descriptor)


@contextlib.contextmanager
def appearing(path: str) -> Iterator[str]:
    """Another path, at which to make a file or a directory; when the block ends well, it is at ``path``, durably.

    Until then there is nothing at ``path``, and if the block ends badly, nothing stays at either. The files have to be
    synchronized by who writes them; folders are here.

    Args:
      path: absolute; nothing is there, and its folder is.

    Raises:
      OSError: a folder cannot be synchronized, or the renaming failed.
    """
    beside = f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        yield beside
        for folder, _, _ in os.walk(beside, topdown=False):
            _sync_folder_at(folder)
        os.rename(beside, path)
    except BaseException:  # an interrupt too leaves nothing behind
        with contextlib.suppress(OSError):  # the error that led here must not be hidden by another
            if os.path.isdir(beside):
                shutil.rmtree(beside, ignore_errors=True)
            else:
                os.unlink(beside)
        raise
    _sync_folder_at(os.path.dirname(path))


def _sync_folder_at(path: str) -> None:
    descriptor = os.open(path, FOLDER)
    try:
        sync_folder(descriptor)
    finally:
        os.close(descriptor)
