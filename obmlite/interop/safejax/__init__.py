"""safejax's interface, for code that was written for it: change the import and nothing else.

``from safejax import deserialize, serialize`` becomes ``from obmlite.interop.safejax import deserialize, serialize``;
``safejax.flax``, ``.haiku`` and ``.objax`` are here under the same names. Files are safetensors, and files that safejax
wrote are read as it read them. What is better, and what is refused now: ``docs/safejax.md``.

Interface: https://github.com/alvarobartt/safejax, version 0.5.0.
"""

from obmlite.interop.safejax._load import deserialize
from obmlite.interop.safejax._save import serialize

__all__ = ["deserialize", "serialize"]
