"""What is measured: obmlite and its peers, each doing the same work in its own way.

Every contender imports what it needs when it is made, so that imports are over before the clock runs.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import mmap
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np

from benchmarks import trees

__all__ = ["CONTENDERS", "Contender", "Leaves", "available", "remove"]

Leaves = dict[str, Any]
Listing = list[tuple[str, tuple[int, ...], Any]]  # name, shape, dtype


class Contender:
    """One way to do the work. ``save`` returns when the bytes are durable, ``restore`` a pytree of ``jax.Array``."""

    title: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()  # imports
    saves: ClassVar[bool] = True
    uses: ClassVar[str] = ""  # whose files it reads, if it writes none itself

    def __init__(self) -> None:
        for name in self.needs:
            importlib.import_module(name)

    def prepare(self, leaves: Leaves) -> Any:
        """What ``save`` is given; made before the clock runs."""
        return leaves

    def save(self, tree: Any, path: str) -> None:
        raise NotImplementedError

    def target(self, path: str) -> Any:  # noqa: ARG002
        """What ``restore`` is told beside the path; made before the clock runs."""
        return None

    def restore(self, path: str, target: Any) -> Any:
        raise NotImplementedError

    def list(self, path: str) -> Listing:
        """Name, shape and dtype of every tensor."""
        raise NotImplementedError


class Obmlite(Contender):
    title = "obmlite"
    needs = ("obmlite",)

    def prepare(self, leaves: Leaves) -> Any:
        return trees.nested(leaves)

    def save(self, tree: Any, path: str) -> None:
        import obmlite

        obmlite.Model({"params": obmlite.Weights(tree)}).save(path, progress=False)

    def restore(self, path: str, target: Any) -> Any:  # noqa: ARG002
        import obmlite

        return obmlite.load(path).weights["params"].restore()

    def list(self, path: str) -> Listing:
        import obmlite

        leaves = obmlite.load(path).weights["params"].flat
        return [(name, leaf.shape, leaf.dtype) for name, leaf in leaves.items()]


class Safetensors(Contender):
    title = "safetensors"
    needs = ("safetensors.numpy", "safetensors.flax")

    def save(self, tree: Any, path: str) -> None:
        import safetensors.numpy

        safetensors.numpy.save_file(tree, path)
        _sync(path)

    def restore(self, path: str, target: Any) -> Any:  # noqa: ARG002
        import safetensors.flax

        return safetensors.flax.load_file(path)

    def list(self, path: str) -> Listing:
        import safetensors

        with safetensors.safe_open(path, framework="np") as file:
            slices = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118 - no mapping
            return [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices]


class Flax(Contender):
    title = "flax msgpack"
    needs = ("flax.serialization", "jax")

    def prepare(self, leaves: Leaves) -> Any:
        return trees.nested(leaves)

    def save(self, tree: Any, path: str) -> None:
        import flax.serialization

        with open(path, "wb") as file:
            file.write(flax.serialization.to_bytes(tree))
        _sync(path)

    def restore(self, path: str, target: Any) -> Any:  # noqa: ARG002
        import flax.serialization
        import jax

        with open(path, "rb") as file:
            return jax.device_put(flax.serialization.from_bytes(None, file.read()))


class Orbax(Contender):
    title = "orbax"
    needs = ("orbax.checkpoint", "jax")

    def prepare(self, leaves: Leaves) -> Any:
        return trees.nested(leaves)

    def save(self, tree: Any, path: str) -> None:
        import orbax.checkpoint

        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
        _sync(path)

    def target(self, path: str) -> Any:
        import jax
        import orbax.checkpoint

        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            found = checkpointer.metadata(path).item_metadata.tree
        return jax.tree.map(lambda m: jax.ShapeDtypeStruct(tuple(m.shape), m.dtype, sharding=sharding), found)

    def restore(self, path: str, target: Any) -> Any:
        import orbax.checkpoint

        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, target)


class Npz(Contender):
    title = "numpy npz"
    needs = ("jax",)

    def save(self, tree: Any, path: str) -> None:
        with open(path, "wb") as file:
            np.savez(file, **tree)
        _sync(path)

    def restore(self, path: str, target: Any) -> Any:  # noqa: ARG002
        import jax

        with np.load(path) as file:
            return jax.device_put({name: file[name] for name in file.files})


class Copy(Contender):
    """The least that a restore costs where no byte can be used in place: each tensor copied once, from a map."""

    title = "one numpy copy"
    needs = ("obmlite.io.safetensors", "jax")
    saves = False
    uses = "safetensors"

    def target(self, path: str) -> Any:
        from obmlite.io import safetensors

        header = safetensors.parse_header(_header(path), os.path.getsize(path))
        return [(header.size + entry.start, entry.end - entry.start) for entry in header.entries.values()]

    def restore(self, path: str, target: Any) -> Any:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return [np.frombuffer(mapped, np.uint8, length, start).copy() for start, length in target]


class Hashing(Contender):
    """The least that a save costs: the SHA-256 of the bytes, on as many threads and in such chunks as obmlite's."""

    title = "SHA-256 alone"

    def save(self, tree: Any, path: str) -> None:
        chunk = 8 << 20
        views = [memoryview(leaf.reshape(-1).view(np.uint8)) for leaf in tree.values()]
        chunks = [view[start : start + chunk] for view in views for start in range(0, len(view), chunk)]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            digests = pool.map(lambda part: hashlib.sha256(part).digest(), chunks)
            with open(path, "wb") as file:
                file.writelines(digests)


class Header(Contender):
    """obmlite's own strict parser of a safetensors header, in Python, without a manifest."""

    title = "safetensors header, strict Python parser"
    needs = ("obmlite.io.safetensors",)
    saves = False
    uses = "safetensors"

    def list(self, path: str) -> Listing:
        from obmlite.io import safetensors

        header = safetensors.parse_header(_header(path), os.path.getsize(path))
        return [(name, entry.shape, entry.dtype) for name, entry in header.entries.items()]


def _header(path: str) -> bytes:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(0)
        return file.read(8 + length)


def _sync(path: str) -> None:
    """Makes durable what a peer wrote: every file and folder, and the folder that they are in."""
    inside = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in [*names, "."]]
    for place in [*inside, path, os.path.dirname(path)]:
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


CONTENDERS: dict[str, type[Contender]] = {
    "obmlite": Obmlite,
    "safetensors": Safetensors,
    "flax": Flax,
    "orbax": Orbax,
    "numpy": Npz,
    "copy": Copy,
    "hashing": Hashing,
    "header": Header,
}


def available(name: str) -> bool:
    """Whether what a contender needs is installed."""
    return all(importlib.util.find_spec(module.partition(".")[0]) for module in CONTENDERS[name].needs)


def remove(path: str) -> None:
    """Removes what a contender wrote, if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.unlink(path)
