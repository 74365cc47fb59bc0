"""A checkpoint in Hugging Face's layout, restored stacked, transposed and sharded over eight devices: bytes and memory.

Memory is a whole process', so the check runs in one of its own, which has eight devices: this file, as a program.
"""

from __future__ import annotations

import gc
import os
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import obmlite
from tests import llama
from tests.on_devices import on_devices

MEBI = 1 << 20
LAYERS, HIDDEN, VOCABULARY = 4, 1024, 8192
BUDGET, REST = 8 * MEBI, 24 * MEBI  # what Python, JAX and the threads take besides


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_restored_straight_into_place(tmp_path: pathlib.Path) -> None:
    found = llama.tensors(LAYERS, HIDDEN, VOCABULARY)
    llama.save(tmp_path / "hub", found)
    expected = llama.converted(found, LAYERS)
    np.savez(
        tmp_path / "expected.npz",
        **{jax.tree_util.keystr(p): x.view(np.uint16) for p, x in jax.tree_util.tree_leaves_with_path(expected)},
    )
    # glibc then gives large buffers back as soon as they are freed
    printed = on_devices(__file__, tmp_path, timeout=120, MALLOC_MMAP_THRESHOLD_="131072")
    assert printed.count("equal") == 4


def place(mesh: Mesh) -> Any:
    """Layers whole, kernels split both ways."""
    specs = {1: P("model"), 2: P("data", "model"), 3: P(None, "data", "model")}
    return lambda name, spec: NamedSharding(mesh, specs[len(spec.shape)])


def main(folder: pathlib.Path) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    for mmap in (True, False):
        for dtype in (None, "float32"):
            weights = obmlite.open_weights(folder / "hub", names=llama.NAMES, transform=llama.TRANSFORM, mmap=mmap)
            # What JAX and the threads take once is not the point.
            weights.restore(select="norm", shardings=place(mesh), dtype=dtype)
            gc.collect()
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak is what there is now (proc_pid_clear_refs(5))
            before = status("VmRSS")
            restored = weights.restore(shardings=place(mesh), dtype=dtype, memory_budget=BUDGET)
            jax.block_until_ready(restored)
            most = status("VmHWM") - before
            destination = sum(leaf.nbytes for leaf in jax.tree.leaves(restored))
            assert destination == weights.nbytes * (1 if dtype is None else 2) > 2 * (BUDGET + REST)
            assert 0.9 * destination < most <= destination + BUDGET + REST, (
                mmap,
                dtype,
                most / MEBI,
                destination / MEBI,
            )
            with np.load(folder / "expected.npz") as expected:
                for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
                    wanted = expected[jax.tree_util.keystr(path)].view(llama.BFLOAT16)
                    assert leaf.sharding.spec == place(mesh)("", leaf).spec
                    np.testing.assert_array_equal(np.asarray(leaf), wanted.astype(leaf.dtype), err_msg=str(path))
            print("equal", mmap, dtype, f"{(most - destination) / MEBI:.1f} MiB beyond {destination / MEBI:.1f}")
            del restored, leaf


def status(name: str) -> int:
    """A number of bytes of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
