"""What is written: the manifest, as bytes and as dataclasses. Knows nothing of how bytes are read and written."""

from obmlite.schema.decode import decode
from obmlite.schema.encode import encode

__all__ = ["decode", "encode"]
