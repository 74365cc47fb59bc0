"""What a package says of a framework's container, checked by making it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from obmlite.errors import CorruptPackageError


@contextlib.contextmanager
def making(name: str) -> Iterator[None]:
    """While a container is made of what was read.

    Raises:
      CorruptPackageError: it cannot be made of that.
    """
    try:
        yield
    except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
        raise CorruptPackageError(
            f"What is kept of a {name} is malformed.", field="tree.static", found=f"{error!r:.80}"
        ) from error
