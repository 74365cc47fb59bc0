"""What restoring costs, by what the operating system counts: bytes read, pages of files in memory, and peak memory.

The numbers are a whole process', so the checks run in one of their own, which has eight devices: this file, as a
program.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import pathlib
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import obmlite
from obmlite import Model, Weights
from obmlite.plan import Request, boxes, plan
from tests import pieces
from tests.on_devices import on_devices
from tests.test_weights import file_of, offset_of

PAGE = mmap.PAGESIZE
MEBI = 1 << 20


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="needs Linux's /proc")
def test_what_the_operating_system_counts(tmp_path: pathlib.Path) -> None:
    # glibc then gives large buffers back as soon as they are freed
    printed = on_devices(__file__, tmp_path, timeout=300, MALLOC_MMAP_THRESHOLD_="131072")
    assert printed.split() == CHECKS, "each has run and printed its name"


def mesh(*sizes: int) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(sizes), tuple("abc"[: len(sizes)]))


# --- bytes read


def bytes_read(what: Callable[..., Any], *args: Any, **options: Any) -> int:
    """Bytes that read calls of this process return meanwhile (proc_pid_io(5))."""

    def rchar() -> int:
        with open("/proc/self/io", "rb", buffering=0) as file:
            return int(file.read(400).split()[1])

    before = rchar()
    own = rchar() - before  # what looking itself reads
    before = rchar()
    what(*args, **options)
    return rchar() - before - own


def planned(weights: Any, names: list[str], place: Any) -> int:
    """Bytes that the plan reads for leaves."""
    requests = []
    for name in names:
        leaf = weights[name]
        wanted = [
            boxes.of_index(index, leaf.shape) for index in place.addressable_devices_indices_map(leaf.shape).values()
        ]
        requests.append(Request(leaf.shape, leaf.spec.kind.bits, leaf.tensor.boxes, tuple(wanted)))
    return plan(requests).read


def check_bytes_read_are_those_of_the_plan(folder: pathlib.Path) -> None:
    value = {
        "large": np.ones((512, 1024), np.float32),
        "wide": np.ones((64, 8 * 4096), np.uint8),
        "cube": np.ones((16, 64, 512), np.float16),
    }
    Model({"w": Weights(value)}).save(folder / "whole")
    pieces.save(value, folder / "pieces")
    for name in ("whole", "pieces"):
        weights = obmlite.load(folder / name, mmap=False).weights["w"]
        weights.source.open()
        total = sum(leaf.nbytes for leaf in value.values())
        for dtype in (None, "bfloat16"):  # what JAX and numpy themselves read at first
            weights.restore(shardings=NamedSharding(mesh(8), P(None, "a")), dtype=dtype)
        for sizes, spec in (((8,), P("a")), ((8,), P(None, "a")), ((4, 2), P("b")), ((4, 2), P("a", "b")), ((8,), P())):
            place = NamedSharding(mesh(*sizes), spec)
            found = bytes_read(weights.restore, shardings=place, threads=3)
            assert found == planned(weights, list(value), place) == total, (name, spec, found, total)
            found = bytes_read(weights.restore, select=["large", "cube"], shardings=place, dtype="bfloat16")
            assert found == value["large"].nbytes + value["cube"].nbytes, (name, spec, found)
        found = bytes_read(weights["large"].__getitem__, np.s_[100:200, 8:16])
        between = 4096 if name == "whole" else 2048  # bytes from row to row, which are read, too
        assert found == 99 * between + 32
        assert bytes_read(weights["wide"].__getitem__, np.s_[:, 8000:8008]) == 64 * 8, "and more is not"


# --- pages in memory


def resident(path: pathlib.Path) -> set[int]:
    """Numbers of a file's pages that are in the page cache (mincore(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        count = -(-len(view) // PAGE)
        found = (ctypes.c_ubyte * count)()
        anchor = ctypes.c_char.from_buffer(view)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(len(view)), found)
        del anchor
        assert failed == 0, ctypes.get_errno()
    return {number for number, state in enumerate(found) if state & 1}


def evict(path: pathlib.Path) -> bool:
    """Takes a file out of the page cache, where the file system allows it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        for _ in range(20):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not resident(path):
                return True
            time.sleep(0.05)
    return False


def pages(first: int, last: int) -> set[int]:
    return set(range(first // PAGE, -(-last // PAGE)))


def check_pages_in_memory_are_those_of_the_plan(folder: pathlib.Path) -> None:
    value = {
        "a": np.ones((64, 1 << 16), np.uint8),
        "b": np.ones((256, 4096), np.float32),
        "c": np.ones((16, 1 << 16), np.float32),
    }
    path = folder / "pages"
    Model({"w": Weights(value)}).save(path)
    weights = obmlite.load(path).weights["w"]
    weights.source.open()
    file = file_of(path, weights, "a")
    begin = {name: offset_of(path, weights, name) for name in value}
    assert all(offset % PAGE == 0 for offset in begin.values())
    if not evict(file):
        return  # as on tmpfs
    strided = weights["b"].restore(sharding=NamedSharding(mesh(8), P(None, "a")))
    assert resident(file) == pages(begin["b"], begin["b"] + value["b"].nbytes), "of this tensor all, and nothing else"
    assert evict(file), "nothing holds the file's pages"
    leading = weights.restore(shardings=NamedSharding(mesh(4, 2), P("a")))
    assert resident(file) == set(), "shards that lie in a row are used where they are, and not touched"
    assert evict(file)
    box = ((0, 64), (3 * 8192, 3 * 8192 + 4096))
    part = weights["a"].tensor.read(box)
    wanted = set().union(
        *(pages(begin["a"] + (row << 16) + box[1][0], begin["a"] + (row << 16) + box[1][1]) for row in range(64))
    )
    assert resident(file) == wanted, "of each row its own page"
    assert part.all()
    assert np.asarray(strided).all()
    assert all(np.asarray(leaf).all() for leaf in leading.values())


# --- memory


def status(name: str) -> int:
    """A number of bytes of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(f"{name}:"))


def peak(what: Callable[[], Any]) -> int:
    """Bytes of memory, file pages included, that this process takes meanwhile beyond what it has."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is what there is now (proc_pid_clear_refs(5))
    before = status("VmRSS")
    what()
    return status("VmHWM") - before


def check_memory_stays_within_the_budget(folder: pathlib.Path) -> None:
    value = {f"leaf {n}": np.full((1024, 8192), n, np.float32) for n in range(8)}
    path = folder / "memory"
    Model({"w": Weights(value)}).save(path)
    del value
    total, budget = 256 * MEBI, 16 * MEBI
    place = NamedSharding(mesh(8), P(None, "a"))
    found = {}
    for mapped in (True, False):
        for threads, dtype in ((1, None), (4, None), (4, "bfloat16"), (2, "float8_e4m3fn")):
            weights = obmlite.load(path, mmap=mapped).weights["w"]
            weights.source.open()
            kept: list[Any] = []

            def restore(weights=weights, kept=kept, **options: Any) -> None:
                kept.append(jax.block_until_ready(weights.restore(shardings=place, memory_budget=budget, **options)))

            destination = total * np.dtype(dtype or "float32").itemsize // 4
            most = peak(lambda restore=restore, threads=threads, dtype=dtype: restore(threads=threads, dtype=dtype))
            found[mapped, threads, dtype] = (most - destination) / MEBI
            [restored] = kept
            assert [float(leaf[-1, -1]) for leaf in restored.values()] == list(range(8))
            kept.clear()
            del restored
            gc.collect()
    assert min(found.values()) > -16, f"what was restored before is not counted: {found}"
    assert max(found.values()) <= (budget + 32 * MEBI) / MEBI, found


CHECKS = [name for name in globals() if name.startswith("check_")]

if __name__ == "__main__":
    failed = False
    for check in CHECKS:
        try:
            globals()[check](pathlib.Path(tempfile.mkdtemp(dir=sys.argv[1])))
        except BaseException:  # noqa: BLE001 - what failed is printed, and the others still run
            failed = True
            traceback.print_exc(file=sys.stderr)
        else:
            print(check)
    sys.exit(failed)
