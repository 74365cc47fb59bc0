"""What belongs to one process."""

from __future__ import annotations

from typing import Any, NoReturn

from obmlite.errors import ArgumentError

__all__ = ["OfOneProcess"]


class OfOneProcess:
    """What holds open files, compiled functions, arrays on devices or locks, and cannot be sent to another process.

    ``pickle`` and ``copy`` would say that they cannot pickle a lock, or send gigabytes of weights through a pipe.
    """

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses.

        Raises:
          ArgumentError: always; it says what to send instead.
        """
        kind = type(self).__name__
        raise ArgumentError(
            f"A {kind} cannot be pickled or copied: it belongs to the process that it was made in.",
            package=getattr(self, "path", None) or getattr(self, "package", None),
            expected="the path of a package",
            found=kind,
            fix="save it, if it is not in a package yet; pass the path; and call obmlite.load where it is used, which "
            "reads only the manifest",
        )
