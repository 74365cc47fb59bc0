"""What is measured: obmlite and its peers, each doing the same work in its own way.

Every contender imports what it needs when it is made, so that imports are over before the clock runs.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import mmap
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from benchmarks import trees

if TYPE_CHECKING:
    from benchmarks.layouts import Layout

__all__ = ["BUDGET", "CONTENDERS", "Contender", "Leaves", "available", "remove"]

Leaves = dict[str, Any]
BUDGET = 64 << 20

Listing = list[tuple[str, tuple[int, ...], Any]]  # name, shape, dtype


class Contender:
    """One way to do the work. ``save`` returns when the bytes are durable, ``restore`` a pytree of ``jax.Array``."""

    title: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()  # imports
    saves: ClassVar[bool] = True
    uses: ClassVar[str] = ""  # whose files it reads, if it writes none itself
    suffix: ClassVar[str] = ""  # of the path that it writes

    def __init__(self) -> None:
        for name in self.needs:
            importlib.import_module(name)

    def prepare(self, leaves: Leaves) -> Any:
        """What ``save`` is given; made before the clock runs."""
        return leaves

    def save(self, tree: Any, path: str) -> None:
        raise NotImplementedError

    def target(self, path: str, layout: Layout | None) -> Any:  # noqa: ARG002
        """What ``restore`` is told beside the path; made before the clock runs.

        Args:
          path: of the files.
          layout: how tensors are split over devices; None for one device.
        """
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

    def target(self, path: str, layout: Layout | None) -> Any:  # noqa: ARG002
        if layout is None:
            return {}
        if layout.dimension is None:
            return {"shardings": layout.sharding(())}
        return {"shardings": lambda _, spec: layout.sharding(spec.shape)}

    def restore(self, path: str, target: Any) -> Any:
        import obmlite

        return obmlite.load(path).weights["params"].restore(**target)

    def list(self, path: str) -> Listing:
        import obmlite

        leaves = obmlite.load(path).weights["params"].flat
        return [(name, leaf.shape, leaf.dtype) for name, leaf in leaves.items()]


class ObmliteBudget(Obmlite):
    title = f"obmlite, memory_budget={BUDGET >> 20} MiB"
    saves = False
    uses = "obmlite"

    def target(self, path: str, layout: Layout | None) -> Any:
        return {**super().target(path, layout), "memory_budget": BUDGET}


class Safetensors(Contender):
    title = "safetensors"
    needs = ("safetensors.numpy", "safetensors.flax")
    suffix = ".safetensors"

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


class SafetensorsPut(Contender):
    """safetensors has no restore of its own onto several devices: all tensors as numpy arrays, then to the devices."""

    title = "safetensors + device_put"
    needs = ("safetensors.numpy", "jax")
    saves = False
    uses = "safetensors"

    def target(self, path: str, layout: Layout | None) -> Any:
        import safetensors

        with safetensors.safe_open(path, framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        return {name: layout and layout.sharding(shape) for name, shape in shapes.items()}

    def restore(self, path: str, target: Any) -> Any:
        import jax
        import safetensors.numpy

        arrays = safetensors.numpy.load_file(path)
        return jax.device_put(arrays, {name: target[name] for name in arrays})


class Put(Contender):
    """What JAX takes without any file: the arrays are there already."""

    title = "jax.device_put of one pytree, no file"
    needs = ("safetensors.numpy", "jax")
    saves = False
    uses = "safetensors"

    def target(self, path: str, layout: Layout | None) -> Any:
        import safetensors.numpy

        arrays = safetensors.numpy.load_file(path)
        return arrays, {name: layout and layout.sharding(array.shape) for name, array in arrays.items()}

    def restore(self, path: str, target: Any) -> Any:  # noqa: ARG002
        import jax

        return jax.device_put(*target)


class PutEach(Put):
    title = "jax.device_put one by one, no file"

    def restore(self, path: str, target: Any) -> Any:  # noqa: ARG002
        import jax

        arrays, shardings = target
        return {name: jax.device_put(array, shardings[name]) for name, array in arrays.items()}


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

    def target(self, path: str, layout: Layout | None) -> Any:
        import jax
        import orbax.checkpoint

        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            found = checkpointer.metadata(path).item_metadata.tree
        return jax.tree.map(lambda m: _described(m.shape, m.dtype, layout), found)

    def restore(self, path: str, target: Any) -> Any:
        import orbax.checkpoint

        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, target)


class OrbaxSafetensors(Contender):
    """orbax's own loader of safetensors files, by its public interface; it saves none."""

    title = "orbax, safetensors layout"
    needs = ("orbax.checkpoint.experimental.v1",)
    saves = False
    uses = "safetensors"

    def target(self, path: str, layout: Layout | None) -> Any:
        import safetensors

        with safetensors.safe_open(path, framework="np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
        return {name: _described(shape, np.float32, layout) for name, shape in shapes.items()}

    def restore(self, path: str, target: Any) -> Any:
        import orbax.checkpoint.experimental.v1 as ocp

        context = ocp.Context()
        context.checkpoint_layout = ocp.options.CheckpointLayout.SAFETENSORS
        with context:
            return ocp.load(path, target)


def _described(shape: Sequence[int], dtype: Any, layout: Layout | None) -> Any:
    """A leaf as orbax is told of it."""
    import jax

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    sharding = layout.sharding(tuple(shape)) if layout else device
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


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
    """The least that a restore costs where no byte can be used in place: each byte copied once, from a map.

    One thread copies, each distinct shard to an array of its own.
    """

    title = "one numpy copy"
    needs = ("obmlite.io.safetensors", "jax")
    saves = False
    uses = "safetensors"

    def target(self, path: str, layout: Layout | None) -> Any:
        from obmlite.io import safetensors

        header = safetensors.parse_header(_header(path), os.path.getsize(path))
        return [
            (header.size + entry.start, entry.shape, _shards(layout, entry.shape)) for entry in header.entries.values()
        ]

    def restore(self, path: str, target: Any) -> Any:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return [
            tensor[index].copy()
            for start, shape, shards in target
            for tensor in [np.frombuffer(mapped, np.float32, math.prod(shape), start).reshape(shape)]
            for index in shards
        ]


def _shards(layout: Layout | None, shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """The distinct parts of a tensor that devices hold."""
    if layout is None:
        return [()]
    indices = layout.sharding(shape).devices_indices_map(shape).values()
    return list({str(index): index for index in indices}.values())


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
    "obmlite-budget": ObmliteBudget,
    "safetensors": Safetensors,
    "safetensors-put": SafetensorsPut,
    "flax": Flax,
    "orbax": Orbax,
    "orbax-safetensors": OrbaxSafetensors,
    "put": Put,
    "put-each": PutEach,
    "numpy": Npz,
    "copy": Copy,
    "hashing": Hashing,
    "header": Header,
}


def available(name: str) -> bool:
    """Whether what a contender needs is installed."""
    for module in CONTENDERS[name].needs:
        try:
            if importlib.util.find_spec(module) is None:
                return False
        except ModuleNotFoundError:  # what it is in is not there, either
            return False
    return True


def remove(path: str) -> None:
    """Removes what a contender wrote, if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.unlink(path)
