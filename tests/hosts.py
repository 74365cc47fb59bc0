"""What the processes of ``test_multihost.py`` do: ``python tests/hosts.py SCENARIO FOLDER``."""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import pathlib
import signal
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import obmlite
from obmlite import _coordination, _together
from tests import processes


def values() -> dict[str, Any]:
    """What is saved, as numpy has it: the same on every process, and in the test."""
    draw = np.random.default_rng(0)
    return {
        "rows": draw.normal(size=(16, 6)).astype(np.float32),
        "columns": draw.normal(size=(3, 16)).astype(ml_dtypes.bfloat16),
        "grid": draw.normal(size=(8, 8, 3)).astype(np.float32),
        "some": draw.normal(size=(8, 5)).astype(np.float32),
        "everywhere": draw.normal(size=(64, 33)).astype(np.float32),
        "packed": draw.integers(-8, 8, (8, 3)).astype(ml_dtypes.int4),
        "keys": np.asarray(jax.random.key_data(jax.random.split(jax.random.key(3), 8))),
        "third": draw.normal(size=(5,)).astype(np.float32),
        "numpy": draw.normal(size=(100_000,)).astype(np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "step": 7,
    }


PLACES = {
    "rows": P(("x", "y")),
    "columns": P(None, ("x", "y")),
    "grid": P("x", "y"),
    "some": P("x"),
    "everywhere": P(),
    "packed": P("x"),
    "keys": P(("x", "y")),
    "empty": P(None, "x"),
}


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(jax.process_count(), -1), ("x", "y"))


def placed() -> dict[str, Any]:
    """The values on the devices of all processes."""
    tree: dict[str, Any] = {}
    for name, value in values().items():
        if name in PLACES:
            sharding = NamedSharding(mesh(), PLACES[name])
            if name == "keys":
                value = jax.random.wrap_key_data(jnp.asarray(value))
            tree[name] = jax.make_array_from_callback(value.shape, sharding, lambda index, value=value: value[index])
        elif name == "third":  # on one process alone, which is not the first
            owner = next(d for d in jax.devices() if d.process_index == jax.process_count() - 1)
            sharding = NamedSharding(Mesh([owner], "z"), P())
            mine = [jax.device_put(value, owner)] if owner.process_index == jax.process_index() else []
            tree[name] = jax.make_array_from_single_device_arrays(value.shape, sharding, mine, dtype=value.dtype)
        else:
            tree[name] = value
    tree["tied"] = tree["grid"]
    return tree


def model(tree: Any) -> obmlite.Model:
    function = obmlite.export(lambda x: 2 * x, obmlite.spec("f32[b]"), platforms="cpu", name="double")
    return obmlite.Model({"double": function, "params": obmlite.Weights(tree)})


@contextlib.contextmanager
def reported(what: str):
    """Reports the error that the block ends with, and how long it took."""
    begun = time.monotonic()
    try:
        yield
        found = None
    except Exception as error:  # noqa: BLE001 - it is what the test looks at
        found = [type(error).__name__, str(error)]
    processes.report([what, found, time.monotonic() - begun])


def saving(folder: pathlib.Path, index: int) -> None:
    """Packages that are to be good, and everything short of a death that may go wrong on the way."""
    tree = placed()
    with reported("good"):
        model(tree).save(folder / "good.obm")
    loaded = obmlite.load(folder / "good.obm")
    with reported("over itself"):
        loaded.save(folder / "good.obm", overwrite=True)
    with reported("exists"):
        loaded.save(folder / "good.obm")
    with reported("files"):
        obmlite.Model({"a b": obmlite.Weights({n: np.full(5000, n, np.float32) for n in range(12)})}).save(
            folder / "files.obm", max_file_bytes=20_000
        )

    other = {**tree, "rows": tree["rows"], "some": tree["some"].astype(jnp.bfloat16) if index == 1 else tree["some"]}
    with reported("dtype"):
        model(other).save(folder / "good.obm", overwrite=True)
    with reported("leaf"):
        model({**tree, **({"extra": np.zeros(3)} if index == 2 else {})}).save(folder / "bad.obm")
    with reported("order"):
        names = ["a", "b"] if index else ["b", "a"]
        model(collections.OrderedDict((name, np.zeros(3)) for name in names)).save(folder / "bad.obm")
    with reported("value"):
        model({"same": np.arange(3), "step": index == 3}).save(folder / "bad.obm")
    _together._PATIENCE = 1
    with reported("path"):
        model(tree).save(folder / ("elsewhere.obm" if index == 3 else "bad.obm"))
    with reported("whole"):
        np.asarray(obmlite.Weights(tree)["rows"])
    with reported("local"):
        obmlite.Model({"w": obmlite.Weights({"i": index})}).save(folder / f"local-{index}.obm", local=True)
    with reported("not local"):
        model(tree).save(folder / "bad.obm", local=True)

    real, left = os.write, [3]

    def full(*args: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    for what, culprit in (("full", 2), ("full at 0", 0)):
        left[0] = 3
        os.write = full if index == culprit else real
        with reported(what):
            model(tree).save(folder / "good.obm", overwrite=True)
        with reported(f"{what}, new"):
            left[0] = 3
            model(tree).save(folder / "bad.obm")
    os.write = real

    replace, sync = os.replace, os.fsync

    def refuse(source: Any, target: Any, **descriptors: Any) -> None:
        if target == "manifest.obm":
            raise OSError(errno.EIO, "The disk is broken")
        replace(source, target, **descriptors)

    def break_down(source: Any, target: Any, **descriptors: Any) -> None:
        replace(source, target, **descriptors)
        if target == "manifest.obm":
            os.fsync = broken

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "The disk is broken")

    for what, hook in (("before the commit", refuse), ("after the commit", break_down)):
        os.replace = hook if index == 0 else replace
        with reported(what):
            model(tree).save(folder / f"{what}.obm")
        os.replace, os.fsync = replace, sync
    with reported("afterwards"):
        model(tree).save(folder / "afterwards.obm")

    with reported("messages"), _coordination.Session("talk", timeout=20) as session:
        long = bytes([index]) * (3 << 20)  # longer than what gRPC takes at once
        assert session.exchange(long) == [bytes([n]) * (3 << 20) for n in range(session.count)]
        assert session.broadcast(b"from 0" if index == 0 else None) == b"from 0"
        assert session.gather(bytes([index])) == ([b"\0", b"\1", b"\2", b"\3"] if index == 0 else [])
        session.agree("names", [(f"n{n}", "same") for n in range(1000)])
        session.barrier()
        session.agree("names", [(f"n{n}", str(index == 1 and n >= 777)) for n in range(1000)])
    with reported("operation"), _coordination.Session("read" if index == 2 else "write"):
        pass
    if index != 3:
        with reported("absent"):
            model(tree).save(folder / "bad.obm", timeout=2)


def dying(folder: pathlib.Path, index: int) -> None:
    """A process dies while it writes a piece, over a package that is there."""
    tree = placed()
    victim, timeout = int(sys.argv[3]), float(sys.argv[4])
    if index == victim:
        real, left = os.write, [2]

        def die(*args: Any) -> int:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        os.write = die
    with reported("dying"):
        model(tree).save(folder / sys.argv[5], overwrite=True, timeout=timeout)


def restoring(folder: pathlib.Path, index: int) -> None:
    """A package of another topology, on this one; and back: saved from here for one process to read."""
    del index
    weights = obmlite.load(folder / sys.argv[3]).weights["params"]
    expected = values()
    shardings = {n: NamedSharding(mesh(), PLACES.get("grid" if n == "tied" else n, P())) for n in weights}
    restored = weights.restore(shardings=shardings)
    for name, array in restored.items():
        value = np.asarray(expected["grid" if name == "tied" else name])
        for shard in array.addressable_shards:
            data = jax.random.key_data(shard.data) if name == "keys" else shard.data
            if not np.array_equal(np.asarray(data), value[shard.index[: array.ndim]]):
                processes.report([name, "differs", str(shard.index)])
    processes.report("restored")
    with reported("saved"):
        model(restored).save(folder / sys.argv[4])


if __name__ == "__main__":
    number = processes.join(devices=2)
    {"saving": saving, "dying": dying, "restoring": restoring}[sys.argv[1]](pathlib.Path(sys.argv[2]), number)
    processes.leave(*[int(sys.argv[3])] if sys.argv[1] == "dying" else [])
