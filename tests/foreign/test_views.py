"""Views do what numpy's do, and what is read through them is what numpy has."""

from __future__ import annotations

import pathlib
import tempfile
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import obmlite
from obmlite import ArgumentError, _gather, dtypes
from obmlite.foreign import View
from obmlite.io import safetensors
from obmlite.plan import Box, Request, boxes, plan
from tests.plan.test_planner import grids

F32 = dtypes.parse("f32")


def view(*shape: int) -> View:
    return View.of("w", "file", F32, shape)


@st.composite
def changes(draw: Any, shape: tuple[int, ...]) -> list[tuple[str, Any]]:
    """A few operations that numpy does without a copy, one after the other."""
    value, found = np.zeros(shape, np.uint8), []
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from(["transpose", "index", "reshape", "split"]))
        argument: Any = None
        if name == "transpose":
            argument = tuple(draw(st.permutations(range(value.ndim))))
        elif name == "index":
            argument = tuple(
                draw(st.integers(-size, size - 1) if size else st.just(slice(None)))
                if draw(st.integers(0, 3)) == 0
                else slice(*sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))))
                for size in value.shape[: draw(st.integers(0, value.ndim))]
            )
        elif name == "reshape":
            argument = []
            left = value.size
            while left > 1:
                argument.append(draw(st.sampled_from([n for n in range(2, left + 1) if left % n == 0])))
                left //= argument[-1]
            argument = tuple(argument) if value.size else (0,)
        elif not value.ndim or value.shape[-1] % 2:
            continue
        try:
            apply(View.of("w", "file", F32, shape), [*found, (name, argument)])
        except ArgumentError:
            assert name == "reshape", "only joining dimensions can be refused"
            continue
        found.append((name, argument))
        value = apply(value, found[-1:])
    return found


def apply(value: Any, found: list[tuple[str, Any]]) -> Any:
    for name, argument in found:
        if name == "transpose":
            value = value.transpose(*argument) if argument else value
        elif name == "index":
            value = value[argument]
        elif name == "reshape":
            value = value.reshape(argument)
        else:
            half = value.shape[-1] // 2
            value = value.split(2, axis=-1)[1] if isinstance(value, View) else value[..., half:]
    return value


def write(path: pathlib.Path, value: np.ndarray[Any, Any], code: str) -> None:
    """A file with one tensor, at an odd place."""
    kind = next(kind for kind in dtypes.ALL if kind.numpy == value.dtype)
    raw = kind.to_storage(value).tobytes()
    header = safetensors.encode_header([safetensors.Entry("w", code, value.shape, 0, len(raw))], {})
    text = header[8:].rstrip()
    text += b" " * (1 + len(text) % 2)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw)


def gathered(leaf: Any, cells: list[Box], gap: int, chunk: int) -> list[np.ndarray[Any, Any]]:
    """Disjoint boxes of a leaf, read in parts of a few bytes."""
    tensor, kind = leaf.tensor, leaf.spec.kind
    [planned] = plan([Request(leaf.shape, kind.bits, tensor.boxes, tuple(cells), tensor.layouts)]).tensors
    held = [np.zeros(boxes.shape_of(cell), kind.numpy) for cell in cells]
    into = {n: (array, cell) for n, (array, cell) in enumerate(zip(held, cells, strict=True))}
    for read in planned.reads(gap=gap, chunk=chunk):
        _gather.gather(read, kind, *tensor.place(read.piece), into)
    return held


KINDS = {
    "U8": np.uint8,
    "U16": np.uint16,
    "BF16": ml_dtypes.bfloat16,
    "F4": ml_dtypes.float4_e2m1fn,
    "C64": np.complex64,
}


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(sorted(KINDS)), st.booleans())
def test_what_is_read_is_what_numpy_has(data: Any, code: str, mmap: bool) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=4)))
    if code == "F4" and np.prod(shape) % 2:
        shape = (*shape, 2)
    random = np.random.default_rng(5)
    raw = random.integers(0, 8 if code == "F4" else 120, shape, np.uint8)
    value = raw.view(KINDS[code]) if code == "F4" else np.asarray(raw.astype(np.float32).astype(KINDS[code]))
    found = data.draw(changes(shape))
    expected = np.asarray(apply(value, found))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "x.safetensors"
        write(path, value, code)
        weights = obmlite.open_weights(path, transform=lambda name, x: apply(x, found), mmap=mmap)
        leaf = weights["w"]
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(np.asarray(leaf), expected)
        box = tuple(tuple(sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in expected.shape)
        np.testing.assert_array_equal(leaf.tensor.read(box), expected[(*boxes.slices(box), ...)])
        cells = data.draw(grids(expected.shape, 2))
        gap, chunk = data.draw(st.sampled_from([0, 3, 4096])), data.draw(st.sampled_from([1, 5, 16, 1 << 20]))
        for cell, held in zip(cells, gathered(leaf, cells, gap, chunk), strict=True):
            np.testing.assert_array_equal(held, expected[(*boxes.slices(cell), ...)])
        restored = leaf.restore()
        assert restored.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(restored), expected)


def test_large_transposes_go_in_tiles(tmp_path: pathlib.Path) -> None:
    """Sizes above a tile's and not multiples of it, with a dimension outside, and with a cast."""
    value = np.arange(3 * 200 * 333, dtype=np.float32).reshape(3, 200, 333)
    write(tmp_path / "x.safetensors", value, "F32")
    for order in ((0, 2, 1), (2, 1, 0), (1, 0, 2), (2, 0, 1)):
        leaf = obmlite.open_weights(tmp_path / "x.safetensors", transform=lambda _, x, o=order: x.transpose(o))["w"]
        np.testing.assert_array_equal(np.asarray(leaf), value.transpose(order))
        half = leaf.restore(dtype="bfloat16")
        np.testing.assert_array_equal(np.asarray(half), value.transpose(order).astype(ml_dtypes.bfloat16))


def test_numpys_words() -> None:
    x = view(6, 4)
    assert (x.shape, x.dtype, x.ndim, x.size, repr(x)) == ((6, 4), np.float32, 2, 24, "View('w', f32[6,4])")
    assert x.T.shape == x.transpose().shape == x.transpose(1, 0).shape == x.transpose((-1, 0)).shape == (4, 6)
    assert x.reshape(3, -1).shape == x.reshape((3, 8)).shape == (3, 8)
    assert [part.shape for part in x.split([1, 2, 3])] == [(1, 4), (2, 4), (3, 4)]
    assert [part.shape for part in x.split(2, axis=1)] == [(6, 2), (6, 2)]
    assert x[..., 1].shape == (6,)
    assert x[1:3, 0].shape == (2,)


def test_heads() -> None:
    """A fused projection, taken apart as is usual: by parts, then by heads, then turned."""
    parts = view(3 * 4 * 8, 16).split(3)
    assert [part.reshape(4, 8, 16).transpose(2, 0, 1).shape for part in parts] == [(16, 4, 8)] * 3
    assert view(3 * 4 * 8, 16).T.reshape(16, 3, 4, 8)[:, 1].shape == (16, 4, 8)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda x: x[::2], "cannot be indexed"),
        (lambda x: x[::-1], "cannot be indexed"),
        (lambda x: x[7], "cannot be indexed"),
        (lambda x: x[True], "cannot be indexed"),
        (lambda x: x[None], "cannot be indexed"),
        (lambda x: x[0, 0, 0], "does not fit"),
        (lambda x: x[..., ...], "does not fit"),
        (lambda x: x.transpose(0), "name each dimension once"),
        (lambda x: x.transpose(0, 0), "name each dimension once"),
        (lambda x: x.transpose(0, 2), "no such dimension"),
        (lambda x: x.split(4), "add up"),
        (lambda x: x.split(0), "add up"),
        (lambda x: x.split([7, -1]), "add up"),
        (lambda x: x.reshape(5, 5), "does not have this shape"),
        (lambda x: x.reshape(-1, 5), "does not have this shape"),
        (lambda x: x.reshape(-24, -1), "does not have this shape"),
        (lambda x: x.T.reshape(24), "not side by side"),
        (lambda x: x[:, :2].reshape(12), "not side by side"),
        (lambda x: x[1:5].reshape(2, 2, 4), "cannot be divided"),
    ],
)
def test_what_views_refuse(change: Any, problem: str) -> None:
    with pytest.raises(ArgumentError, match=problem) as caught:
        change(view(6, 4))
    assert caught.value.leaf == "w"
