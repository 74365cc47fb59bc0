"""Adding data files to a package that another process saves: it locks, decides, clears and commits."""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING

from obmlite.errors import PackageNotFoundError
from obmlite.io.staging import FOLDER, Staging, stat_at

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Participant"]


class Participant(Staging):
    """One process's part of another one's :class:`~obmlite.io.commit.Transaction`.

    ::

        with Participant(path, invitation, patience=10) as part:
            with part.create("weights") as file:
                file.write(data)
                name = file.finish(f"params-p00001-of-00004-{digest}.safetensors")
            part.seal()                      # durable under their names: may be named in a manifest from now on
            ...                              # tell the other process; hear what came of it
            part.keep()

    Leaving the block without :meth:`keep` removes what was made here.
    """

    def __init__(self, path: str | os.PathLike[str], invitation: str, *, patience: float) -> None:
        """Touches nothing yet.

        Args:
          path: the package's directory, as this process names it.
          invitation: name of the file by which to recognise it (:meth:`Transaction.invitation`).
          patience: seconds to look for that file, since network file systems show new names late.
        """
        super().__init__(path)
        self._invitation = invitation
        self._patience = patience
        self._keeping = False

    def __enter__(self) -> Participant:
        """Opens the directory.

        Raises:
          PackageNotFoundError: what is at the path here is not the directory in which the other process saves.
          OSError: it cannot be opened.
        """
        until = time.monotonic() + self._patience
        while not self._open():
            if time.monotonic() > until:
                raise PackageNotFoundError(
                    "The path leads this process to another directory than process 0.",
                    package=self.path,
                    expected=f"{self._invitation} in it, which process 0 has made",
                    found="another directory, or none",
                    fix="have all processes save to one path, on a file system that all of them see",
                )
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Removes what is not to be kept."""
        try:
            self._discard()
            if not self._keeping:
                self._undo()
        finally:
            self._close()

    def seal(self) -> None:
        """Makes the names of the finished files durable.

        Raises:
          OSError: they could not be made durable.
        """
        self._sync_folders()

    def keep(self) -> None:
        """Leaves the files where they are: a manifest names them, or may do so.

        Where it does not, after all, the next save removes them.
        """
        self._keeping = True

    def drop(self) -> None:
        """Takes :meth:`keep` back: no manifest will name them."""
        self._keeping = False

    def _open(self) -> bool:
        """Whether the right directory is there and open."""
        try:
            self._descriptor = os.open(self.path, FOLDER)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                return False
            raise
        if stat_at(self._invitation, self._descriptor) is not None:
            return True
        self._close()
        return False

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
