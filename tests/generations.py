"""Models of which every part says which generation it is of, so that a mixture of two is found out."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np

import obmlite
from obmlite import MissingFileError, Model, PackageNotFoundError, Pipeline, Supplemental, Weights
from obmlite.verify import verify

X = np.ones((2, 3), np.float32)
SHAPES = {"w": jax.ShapeDtypeStruct((3, 2), "float32"), "b": jax.ShapeDtypeStruct((2,), "float32")}

# Exported here, once: a forked child must not trace.
FUNCTIONS = [
    obmlite.export(fn, SHAPES, X, name="apply", platforms="cpu", metadata={"odd": n})
    for n, fn in enumerate(
        (
            lambda params, x: x @ params["w"] + params["b"],
            lambda params, x: x @ params["w"] * params["b"],
        )
    )
]


def params(n: int) -> dict[str, Any]:
    return {"w": np.full((3, 2), n, np.float32), "b": np.full(2, n + 1, np.float32)}


def model(n: int, assets: str | os.PathLike[str] | None = None) -> Model:
    """Generation ``n``, with a directory of supplementals (see :func:`write_assets`) if one is given."""
    return Model(
        {"apply": FUNCTIONS[n % 2], "params": Weights(params(n))},
        pipelines={"serving_default": Pipeline(function="apply", weights={"params": "params"})},
        supplementals={"assets": Supplemental.from_directory(assets)} if assets else {},
        metadata={"generation": n},
    )


def write_assets(folder: str | os.PathLike[str], n: int) -> str:
    """A directory of generation ``n``, one file of which is the same in all of them."""
    os.makedirs(os.path.join(folder, "deep", "er"))
    for name, text in asset_texts(n).items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as stream:
            stream.write(text)
    return os.fspath(folder)


def asset_texts(n: int) -> dict[str, str]:
    return {"vocabulary.txt": f"words {n} " * 20, "deep/er/same.txt": "the same"}


def expected(n: int) -> np.ndarray:
    p = params(n)
    return X @ p["w"] + p["b"] if n % 2 == 0 else X @ p["w"] * p["b"]


def whole(path: str | os.PathLike[str], *, run: bool = True, verified: bool = True, **options: Any) -> int | None:
    """The generation at a path, once all of it is found to be of that one; None if there is no package.

    Args:
      path: of the package.
      run: whether to run it, which takes a compilation.
      verified: whether to compare digests with those of the file's bytes, too, beside the values.
      **options: for ``load``.
    """
    try:
        loaded = obmlite.load(path, **options)
    except PackageNotFoundError:
        return None
    n = int(loaded.metadata["generation"])
    for name, value in params(n).items():
        assert np.array_equal(np.asarray(loaded.weights["params"][name]), value)
    assert loaded.functions["apply"].metadata == {"odd": n % 2}
    for supplemental in loaded.supplementals.values():
        assert {name: supplemental.read(name).decode() for name in supplemental.files} == asset_texts(n)
    if verified:
        report = verify(loaded.path)
        assert report.good, report.problems
    if run:
        assert np.array_equal(loaded(X), expected(n))
    return n


def look(path: str | os.PathLike[str], **options: Any) -> int | None:
    """The generation at a path that somebody saves to again and again; None if it went while it was looked at.

    Unlike :func:`whole`, opens it once, so that all that is seen has to be of that one package.
    """
    try:
        loaded = obmlite.load(path, **options)
        n = int(loaded.metadata["generation"])
        for name, value in params(n).items():
            assert np.array_equal(np.asarray(loaded.weights["params"][name]), value)
        assert loaded.functions["apply"].metadata == {"odd": n % 2}
        loaded.functions["apply"].program.blobs(loaded.functions["apply"].module)  # compares its digest
    except (PackageNotFoundError, MissingFileError):
        return None  # two generations have passed since it was opened, or there is none yet
    return n


def files(path: str | os.PathLike[str]) -> list[str]:
    """What lies in a directory and below it."""
    return sorted(
        os.path.relpath(os.path.join(folder, name), path) for folder, _, names in os.walk(path) for name in names
    )
