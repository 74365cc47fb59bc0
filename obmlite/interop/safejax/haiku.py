"""``safejax.haiku``: the same as :mod:`obmlite.interop.safejax`, since Haiku's parameters are nested dicts."""

from obmlite.interop.safejax._load import deserialize
from obmlite.interop.safejax._save import serialize

__all__ = ["deserialize", "serialize"]
