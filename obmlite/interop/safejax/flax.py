"""``safejax.flax``: :func:`deserialize` returns a ``FrozenDict`` unless told otherwise."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from obmlite.interop.safejax._load import load
from obmlite.interop.safejax._save import serialize

if TYPE_CHECKING:
    import fsspec

__all__ = ["deserialize", "serialize"]


def deserialize(
    path_or_buf: str | os.PathLike[str] | bytes,
    fs: fsspec.AbstractFileSystem | None = None,
    freeze_dict: bool = True,
    requires_unflattening: bool = True,
    to_var_collection: bool = False,
) -> Any:
    """:func:`obmlite.interop.safejax.deserialize`, with ``freeze_dict=True``; needs Flax."""
    return load(path_or_buf, fs, freeze_dict, requires_unflattening, to_var_collection)
