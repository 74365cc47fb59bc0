"""What the processes of ``test_broadcasting.py`` do: ``python tests/sharers.py FOLDER``."""

from __future__ import annotations

import pathlib
import re
import sys
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import obmlite
from tests import processes

DTYPES = ["float32", "bfloat16", "float16", "int8", "uint16", "bool", "complex64", "float8_e4m3fn", "int4", "uint2"]


def values() -> dict[str, Any]:
    """What is restored."""
    draw = np.random.default_rng(0)
    tree: dict[str, Any] = {
        name: draw.integers(0, 4, (16, 24)).astype(getattr(ml_dtypes, name, name)) for name in DTYPES
    }
    tree["complex64"] = (draw.normal(size=(16, 24)) * (1 + 2j)).astype(np.complex64)
    tree["large"] = draw.normal(size=(1024, 256)).astype(np.float32)
    tree["odd"] = draw.normal(size=(7, 5)).astype(np.float32)
    tree["few"] = draw.normal(size=(1, 2, 1)).astype(np.float32)
    tree["empty"] = np.zeros((0, 3), np.float32)
    tree["number"] = 2.5
    tree["keys"] = jax.random.split(jax.random.key(3), 8)
    return tree


def choose(mesh: Mesh, spec: P) -> Any:
    """Shards what can be, and replicates the rest."""

    def sharding(_: str, leaf: Any) -> NamedSharding:
        wanted = NamedSharding(mesh, spec)
        try:
            assert len(leaf.shape) >= len(spec)
            wanted.shard_shape(leaf.shape)
        except (AssertionError, ValueError):
            return NamedSharding(mesh, P())
        return wanted

    return sharding


def differ(found: Any, expected: Any) -> list[str]:
    """Leaves of which a shard here is not what it should be."""
    wrong = []
    for name, value in expected.items():
        array = jax.random.key_data(found[name]) if name == "keys" else found[name]
        value = np.asarray(jax.random.key_data(value) if name == "keys" else value)
        good = array.shape == value.shape and (name == "number" or array.dtype == value.dtype)
        if not good or not all(np.array_equal(np.asarray(s.data), value[s.index]) for s in array.addressable_shards):
            wrong.append(name)
    return wrong


def rchar() -> int:
    """Bytes that this process has read so far, as the operating system counts them."""
    text = pathlib.Path("/proc/self/io").read_text()
    return int(re.search(r"rchar: (\d+)", text)[1])  # type: ignore[index]


def main(folder: str) -> None:
    index = processes.join(2)
    expected = values()
    devices = np.array(jax.devices())
    meshes = {
        "line": Mesh(devices.reshape(4), ("x",)),
        "grid": Mesh(devices.reshape(2, 2), ("x", "y")),
        "turned": Mesh(devices[[0, 2, 1, 3]].reshape(2, 2), ("x", "y")),
    }
    wrong = {}
    for mmap in (True, False):
        weights = obmlite.load(f"{folder}/m.obm", mmap=mmap).weights["w"]
        for name, mesh in meshes.items():
            for n, spec in enumerate([P(), P("x"), P(None, mesh.axis_names[-1]), P(mesh.axis_names)]):
                found = weights.restore(shardings=choose(mesh, spec), broadcast=True, timeout=30)
                wrong[f"{mmap} {name} {n}: {spec}"] = differ(found, expected)
    small = weights.restore(shardings=choose(meshes["grid"], P("x")), broadcast=True, memory_budget=1000, timeout=30)
    wrong["budget"] = differ(small, expected)
    half = weights.restore(shardings=choose(meshes["line"], P()), broadcast=True, dtype="bfloat16", select="large")
    wrong["cast"] = differ(half, {"large": expected["large"].astype(ml_dtypes.bfloat16)})
    processes.report(wrong)

    weights = obmlite.load(f"{folder}/large.obm", mmap=False).weights["w"]
    np.asarray(weights["w"][:0])
    weights.source.open()
    everywhere = NamedSharding(meshes["line"], P())
    before = rchar()
    alone = weights.restore(shardings=everywhere)
    between = rchar()
    together = weights.restore(shardings=everywhere, broadcast=True)
    processes.report([between - before, rchar() - between])
    processes.report(all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together))))  # noqa: B905

    errors = []
    for case in ("order", "sharding", "file"):
        target: Any = everywhere
        package = pathlib.Path(folder, "bad.obm" if case == "file" and index else "large.obm")
        weights = obmlite.load(package, mmap=False).weights["w"]
        if package.name == "bad.obm":
            next((package / "weights").glob("*.safetensors")).unlink()
        select = None
        if case == "order" and index:
            select = "w"
        if case == "sharding" and index:
            target = NamedSharding(meshes["line"], P("x"))
        try:
            weights.restore(shardings=target, select=select, broadcast=True, timeout=20)
            errors.append("none")
        except obmlite.ObmliteError as error:
            errors.append(f"{type(error).__name__}: {error}")
    processes.report(errors)


if __name__ == "__main__":
    main(sys.argv[1])
    processes.leave()
