"""The classes of the messages, made from ``descriptors.binpb`` in a descriptor pool of their own.

``descriptors.binpb`` is what ``protoc`` makes of the .proto files beside it. Code that ``protoc`` generates for Python
would refuse versions of protobuf older than protoc's own, or two major versions newer; a descriptor set is data, which
every version reads. The pool keeps these classes apart from the originals, which a process may import as well.

``tensorflow_serving.PredictRequest`` and ``inference.ModelInferRequest`` are classes like any that protoc generates.
"""

from __future__ import annotations

import importlib.resources
import types
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = ["inference", "tensorflow_serving"]


def _load() -> dict[str, types.SimpleNamespace]:
    """Last part of a proto package's name → its messages by name."""
    data = importlib.resources.files(__package__).joinpath("descriptors.binpb").read_bytes()
    files = descriptor_pb2.FileDescriptorSet.FromString(data).file
    pool = descriptor_pool.DescriptorPool()
    found = {}
    for file in files:
        pool.Add(file)
        found[file.package.rpartition(".")[2]] = types.SimpleNamespace(
            **{
                m.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{m.name}"))
                for m in file.message_type
            }
        )
    return found


_PACKAGES = _load()

tensorflow_serving: Final[Any] = _PACKAGES["tensorflow_serving"]
"""Messages of ``tensorflow.serving``, and of ``tensorflow`` and ``google.protobuf`` in them."""

inference: Final[Any] = _PACKAGES["inference"]
"""Messages of ``inference``."""
