"""Which file systems are better read than mapped."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable

# A page fault on these waits for a server or another process, one page after the other, and cannot fail other than by
# killing the process that touched the page.
_REMOTE = frozenset(
    (
        *(
            "9p",
            "afs",
            "beegfs",
            "ceph",
            "cifs",
            "davfs",
            "gfs2",
            "glusterfs",
            "gpfs",
            "lustre",
            "ncpfs",
            "nfs",
            "nfs4",
        ),
        *("ocfs2", "orangefs", "panfs", "smb3", "smbfs", "virtiofs", "wekafs"),
    )
)


def is_remote(descriptor: int) -> bool:
    """Whether an open file or directory lies on a network or FUSE file system, as far as Linux says.

    On other systems, and where the mount cannot be told (some file systems give files other device numbers than their
    mount), the answer is no.

    Raises:
      OSError: the file cannot be looked at.
    """
    device = os.fstat(descriptor).st_dev
    return is_remote_kind(_kind(os.major(device), os.minor(device)))


def is_remote_kind(kind: str) -> bool:
    """Whether file systems of a type lie elsewhere; of FUSE's it cannot be told, and the answer is yes."""
    return kind in _REMOTE or kind.split(".")[0] in ("fuse", "fuseblk")


@functools.lru_cache(maxsize=64)
def _kind(major: int, minor: int) -> str:
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            return kind_of(mounts, major, minor)
    except OSError:  # no Linux
        return ""


def kind_of(mounts: Iterable[str], major: int, minor: int) -> str:
    """The type of the file system of a device, by the lines of a mountinfo file (proc_pid_mountinfo(5)).

    Nothing where there is no such device, or the lines look otherwise.
    """
    for line in mounts:
        fields = line.split()
        if f"{major}:{minor}" in fields[2:3] and "-" in fields[6:-1]:
            return fields[fields.index("-", 6) + 1]
    return ""
