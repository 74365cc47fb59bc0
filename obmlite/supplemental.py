"""Supplementals: files and directories of any content that a package carries, byte for byte."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from obmlite import tree as trees
from obmlite._contents import BytesContent, Content, FileContent, StoredContent
from obmlite._processes import OfOneProcess
from obmlite.errors import (
    ArgumentError,
    CorruptPackageError,
    PackageExistsError,
    UnknownNameError,
    context,
)
from obmlite.io.replacing import appearing
from obmlite.io.staging import sync, write_all
from obmlite.io.store import check_path
from obmlite.schema.records import SupplementalForm

if TYPE_CHECKING:
    from obmlite.io.store import Store
    from obmlite.schema.records import FileRecord, SupplementalRecord

__all__ = ["Supplemental"]

INLINE_BYTES = 4096
"""A supplemental of one file of at most so many bytes lies in the manifest itself."""

_ROOM = "supplementals/" + "x" * 100 + "/"  # what stands before an entry's path in a package, at its longest


class Supplemental(OfOneProcess):
    """A file, or a directory of files, that a package carries beside its functions and weights.

    Made by :meth:`from_bytes`, :meth:`from_file` and :meth:`from_directory`; those of a loaded package are in
    ``model.supplementals``. Nothing is read before it is asked for, and what comes from a package is compared with its
    digest first.

    Attributes:
      form: one file, a directory, or inline in the manifest.
      entries: content of each file by its path; a folder's path ends in ``/`` and has None.
      mime_type: what it is.
      version: of what it is, as text.
      function: the function that it belongs to; empty for the whole package.
      metadata: what the user attached.
    """

    def __init__(
        self,
        form: SupplementalForm,
        entries: Mapping[str, Content | None],
        *,
        mime_type: str = "",
        version: str = "",
        function: str = "",
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Keeps what the constructors found; use those.

        Raises:
          UnsafePathError: a path leaves the supplemental, or cannot be in a package.
          CorruptPackageError: a path lies below a file.
        """
        trees.pack_static(dict(metadata or {}))
        self.form = form
        self.entries = dict(entries)
        self.mime_type = mime_type
        self.version = version
        self.function = function
        self.metadata = dict(metadata or {})
        files = {path for path, content in self.entries.items() if content is not None}
        for path in self.entries:
            check_path(path.removesuffix("/"))
            names = path.removesuffix("/").split("/")
            above = ["/".join(names[:n]) for n in range(1, len(names) + (path.endswith("/")))]
            for place in above:
                if place in files:
                    raise CorruptPackageError(
                        "A supplemental has a path below a file.", field="Supplemental.entry_path", found=ascii(path)
                    )

    # --- making one

    @classmethod
    def from_bytes(
        cls,
        data: bytes,
        *,
        mime_type: str = "application/octet-stream",
        version: str = "",
        function: str = "",
        metadata: Mapping[str, Any] | None = None,
    ) -> Supplemental:
        """A supplemental of bytes.

        Args:
          data: the bytes.
          mime_type: what they are.
          version: of what they are.
          function: the function of the model that it belongs to; the whole package if left out.
          metadata: what else to keep with it: None, bool, int, float, str, bytes, and lists and dicts of these.
        """
        return cls._one("data", BytesContent(bytes(data)), mime_type, version, function, metadata)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        mime_type: str = "application/octet-stream",
        version: str = "",
        function: str = "",
        metadata: Mapping[str, Any] | None = None,
    ) -> Supplemental:
        """A supplemental of one file, which is read when the model is saved.

        Args:
          path: the file.
          mime_type: what it is.
          version: of what it is.
          function: the function of the model that it belongs to; the whole package if left out.
          metadata: what else to keep with it.

        Raises:
          ArgumentError: it is no regular file.
          UnsafePathError: its name cannot be in a package.
          FileNotFoundError: there is nothing.
        """
        path = os.path.abspath(path)
        _check_regular(path, os.stat(path))
        return cls._one(os.path.basename(path), FileContent(path), mime_type, version, function, metadata)

    @classmethod
    def _one(
        cls,
        name: str,
        content: Content,
        mime_type: str,
        version: str,
        function: str,
        metadata: Mapping[str, Any] | None,
    ) -> Supplemental:
        form = SupplementalForm.INLINE if content.size <= INLINE_BYTES else SupplementalForm.FILE
        return cls(form, {name: content}, mime_type=mime_type, version=version, function=function, metadata=metadata)

    @classmethod
    def from_directory(
        cls,
        path: str | os.PathLike[str],
        *,
        mime_type: str = "application/octet-stream",
        version: str = "",
        function: str = "",
        metadata: Mapping[str, Any] | None = None,
    ) -> Supplemental:
        """A supplemental of a directory: its files, which are read when the model is saved, and its empty folders.

        Args:
          path: the directory; symbolic links in it are refused.
          mime_type: what it is.
          version: of what it is.
          function: the function of the model that it belongs to; the whole package if left out.
          metadata: what else to keep with it.

        Raises:
          ArgumentError: there is something in it that is neither a regular file nor a folder.
          UnsafePathError: a name in it cannot be in a package.
          NotADirectoryError: it is no directory.
        """
        entries: dict[str, Content | None] = {}
        pending = [""]
        while pending:
            folder = pending.pop()
            with os.scandir(os.path.join(path, folder)) as found:
                items = list(found)
            if folder and not items:
                entries[f"{folder}/"] = None
            for item in items:
                inner = f"{folder}/{item.name}" if folder else item.name
                check_path(_ROOM + inner)
                if item.is_dir(follow_symlinks=False):
                    pending.append(inner)
                    continue
                _check_regular(item.path, item.stat(follow_symlinks=False))
                entries[inner] = FileContent(os.path.abspath(item.path))
        return cls(
            SupplementalForm.DIRECTORY,
            dict(sorted(entries.items())),
            mime_type=mime_type,
            version=version,
            function=function,
            metadata=metadata,
        )

    @classmethod
    def from_record(cls, store: Store, files: Mapping[str, FileRecord], record: SupplementalRecord) -> Supplemental:
        """One of a package.

        Args:
          store: the package.
          files: its files, by path.
          record: what the manifest says of it.

        Raises:
          UnsafePathError: a path leaves the supplemental.
          CorruptPackageError: a path lies below a file.
        """
        entries: dict[str, Content | None] = {
            path: None if file is None else StoredContent(store, files[file]) for path, file in record.entries.items()
        }
        if record.form is SupplementalForm.INLINE:
            entries = {"data": BytesContent(record.inline)}
        with context(object=record.name, package=store.name):
            return cls(
                record.form,
                entries,
                mime_type=record.mime_type,
                version=record.version,
                function=record.function,
                metadata=record.metadata,
            )

    # --- looking

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory, and not one file."""
        return self.form is SupplementalForm.DIRECTORY

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of its files, as :meth:`open` takes them."""
        return tuple(path for path, content in self.entries.items() if content is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(content.size for content in self.entries.values() if content is not None)

    def _content(self, path: str | None) -> Content:
        if path is None and not self.is_directory:
            [content] = self.entries.values()
            assert content is not None
            return content
        found = self.entries.get(path or "")
        if found is None:
            raise UnknownNameError(
                "The supplemental has no such file.",
                expected=_some(self.files),
                found="no path, for a directory" if path is None else repr(path),
            )
        return found

    def open(self, path: str | None = None) -> BinaryIO:
        """A file as a stream of bytes, to be closed by the caller.

        Args:
          path: of a file of a directory; left out where there is only one file.

        Raises:
          UnknownNameError: there is no such file.
          CorruptPackageError: its bytes are not those that were saved.
        """
        return self._content(path).open()

    def read(self, path: str | None = None) -> bytes:
        """A file's bytes.

        Args:
          path: as for :meth:`open`.

        Raises:
          UnknownNameError: there is no such file.
          CorruptPackageError: its bytes are not those that were saved.
        """
        with self.open(path) as stream:
            return stream.read()

    def extract(self, target: str | os.PathLike[str]) -> str:
        """Writes it outside of the package: a directory as a directory, one file as a file.

        Args:
          target: where; there must be nothing yet. Until all of it is there, durably, nothing is.

        Returns:
          The target's path.

        Raises:
          PackageExistsError: there is something at the target.
          CorruptPackageError: a file's bytes are not those that were saved.
          OSError: the target cannot be written.
        """
        target = os.path.abspath(target)
        if os.path.lexists(target):
            raise PackageExistsError("There is something where a supplemental is to be written.", found=target)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with appearing(target) as beside:
            if not self.is_directory:
                self._copy(None, beside)
            else:
                os.mkdir(beside)
                for path, content in self.entries.items():
                    place = os.path.join(beside, *path.removesuffix("/").split("/"))
                    os.makedirs(place if content is None else os.path.dirname(place), exist_ok=True)
                    if content is not None:
                        self._copy(path, place)
        return target

    def _copy(self, path: str | None, place: str) -> None:
        with self.open(path) as source:
            descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                while data := source.read(1 << 20):
                    write_all(descriptor, data)
                sync(descriptor)
            finally:
                os.close(descriptor)

    def __repr__(self) -> str:
        kind = f"{len(self.files)} files" if self.is_directory else "one file"
        return f"Supplemental: {kind}, {self.nbytes:,} bytes, {self.mime_type} {self.version}".rstrip()


def _check_regular(path: str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ArgumentError(
            "Only regular files and folders can be carried.",
            expected="a regular file",
            found=f"{path}, {'a symbolic link' if stat.S_ISLNK(found.st_mode) else 'something else'}",
            fix="put the file itself there" if stat.S_ISLNK(found.st_mode) else None,
        )


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:10]) + (f", … ({len(paths)} in all)" if len(paths) > 10 else "") or "no files"
