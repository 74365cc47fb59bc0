"""The pytrees that are saved and restored; the same bytes in every run, and never zeros."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["TREES", "flat", "nested"]

_PAIRS = 80
_ROWS, _COLUMNS = 2048, 2456  # 19.2 MiB of float32; 80 of them are 1.5 GiB; both divide by 8 devices
_MANY, _SMALL = 10_000, 50_000

Shapes = dict[str, tuple[int, ...]]


def _odd(number: float) -> int:
    """The nearest odd number, 3 at the least."""
    return max(3, 2 * round((number - 1) / 2) + 1)


def _small(pair: int, size: float) -> tuple[int, ...]:
    """A norm, a bias or a head of about 1 % of a large tensor's bytes, no multiple of more than 4 bytes."""
    elements = _ROWS * _COLUMNS * size / 100
    return [(_odd(elements) + 2 * pair,), (3, _odd(elements / 3) + 2 * pair), (1, 5, _odd(elements / 5))][pair % 3]


def _large_shapes(size: float) -> Shapes:
    """Half of the leaves, with 99 % of the bytes, are of shapes as models have them; the other half is odd."""
    shapes: Shapes = {}
    for pair in range(_PAIRS):
        shapes[f"layer_{pair:02d}.kernel"] = (_ROWS, max(8, 8 * round(_COLUMNS * size / 8)))
        shapes[f"layer_{pair:02d}.bias"] = _small(pair, size)
    return shapes


def _odd_shapes(size: float) -> Shapes:
    """As many bytes, and no leaf whose size is a multiple of more than 4 bytes."""
    shapes: Shapes = {}
    for pair in range(_PAIRS):
        shapes[f"layer_{pair:02d}.kernel"] = (_ROWS - 1, _odd(_COLUMNS * size))
        shapes[f"layer_{pair:02d}.bias"] = _small(pair, size)
    return shapes


def _many_shapes(count: int, size: float) -> Shapes:
    """Tensors of a few hundred bytes."""
    return {
        f"block_{pair // 50:03d}.layer_{pair % 50:02d}.{leaf}": shape
        for pair in range(max(50, round(count * size / 2)))
        for leaf, shape in (("kernel", (5 + pair % 7, 8 + pair % 5)), ("bias", (8 + pair % 5,)))
    }


TREES: dict[str, Callable[[float], Shapes]] = {
    "large": _large_shapes,
    "odd": _odd_shapes,
    "many": functools.partial(_many_shapes, _MANY),
    "small": functools.partial(_many_shapes, _SMALL),
}


def flat(tree: str, size: float) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """The leaves by name, each an array of its own."""
    shapes = TREES[tree](size)
    elements = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    noise = np.random.default_rng(20).random(max(elements.values()), np.float32)
    return {
        name: (noise[: elements[name]] + np.float32(number)).reshape(shape)
        for number, (name, shape) in enumerate(shapes.items())
    }


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """The same as nested dicts."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *above, last = name.split(".")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
