"""Makes the golden packages of this format version with the JAX that is installed.

Run by ``make golden``. What is there is never made again: a package that was released must open for ever, in
whatever form it was written. Each package stands beside its leaves as ``.npy`` files and a ``leaves.json`` that names
them (dtypes that ``.npy`` cannot hold as the bits of unsigned integers), and beside inputs and outputs of its function.

The layout is ``<format>/jax-<version>/<case>/{package.obm,leaves,leaves.json,calls.npz}``.
"""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import obmlite
from obmlite import dtypes
from obmlite.schema import records

HERE = pathlib.Path(__file__).parent
FORMAT = f"{records.FORMAT_MAJOR}.{records.FORMAT_MINOR}"


class Stats(NamedTuple):
    mean: Any
    var: Any


def plain(array: Any) -> np.ndarray:
    """An array as ``.npy`` can hold it and a reader without ml_dtypes can read it: bits where it must be."""
    if isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(array))
    host = np.asarray(array)
    if host.dtype.kind in "biufc" and host.dtype.isbuiltin == 1:
        return host
    return host.view(f"u{host.dtype.itemsize}")


def values(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Every bit pattern in turn, so that no value is special."""
    count = int(np.prod(shape))
    if dtype == np.bool_:
        return (np.arange(count) % 3 == 0).reshape(shape)
    bits = dtypes.of(dtype).bits
    if bits < 8:
        return (np.arange(count) % (1 << bits)).astype("u1").view(dtype).reshape(shape)
    raw = (np.arange(count * dtype.itemsize) * 37 + 11) % 256
    return raw.astype("u1").view(dtype).reshape(shape)


def every_dtype() -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for kind in dtypes.ALL:
        if kind.name == "float0":
            tree[kind.name] = np.zeros((2, 3), jax.dtypes.float0)
        elif kind.bits != 6:  # no JAX before 0.12 holds these on a device
            tree[kind.name] = values(kind.numpy, (3, 5))
    tree["key"] = jax.random.key(7)
    tree["keys"] = jax.random.split(jax.random.key(8, impl="rbg"), 3)
    return tree


def odd_names() -> Any:
    shared = np.arange(12, dtype="f4").reshape(3, 4)
    return {
        "a.b": [shared, (np.float32(1.5), None)],
        "back\\slash": {"": np.arange(3, dtype="i4"), "é": np.arange(2, dtype="i8")},
        "__metadata__": collections.OrderedDict(z=shared, a=np.zeros((0, 4), "f4")),
        "ints": {10: np.ones(2, "f4"), 9: np.full(2, 9, "f4")},
        "tuples": {("x", 1): np.arange(5, dtype="u1"), ("x", 2): np.arange(7, dtype="u1")},
        "stats": Stats(np.arange(4, dtype="f4"), np.ones(4, "f4")),
        "numbers": [True, 3, 2.5, 1j],
        "empty": {},
        "bf16": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    }


def digits(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(x.reshape(x.shape[0], -1) @ params["dense"]["kernel"] + params["dense"]["bias"])
    return {"logits": hidden @ params["head"], "argmax": jnp.argmax(hidden @ params["head"], -1)}


def cases() -> Iterator[tuple[str, obmlite.Model, Callable[[obmlite.Model], dict[str, Any]], dict[str, Any]]]:
    rng = np.random.default_rng(0)
    yield "dtypes", obmlite.Model({"all": obmlite.Weights(every_dtype())}), lambda model: {}, {}
    yield "names", obmlite.Model({"odd": obmlite.Weights(odd_names())}), lambda model: {}, {}
    params = {
        "dense": {"kernel": rng.normal(size=(64, 16)).astype("f4"), "bias": np.zeros(16, "f4")},
        "head": rng.normal(size=(16, 10)).astype("f4"),
    }
    x = rng.normal(size=(5, 8, 8)).astype("f4")
    model = obmlite.Model.from_function(
        digits, params, obmlite.spec("f32[b,8,8]"), constraints="b <= 16", metadata={"license": "Apache-2.0"}
    )
    yield "symbolic", model, lambda m: m(x), {"x": x}


def main() -> None:
    for name, model, call, inputs in cases():
        folder = HERE / FORMAT / f"jax-{jax.__version__}" / name
        if folder.exists():
            print(f"{folder.relative_to(HERE)} is there and stays as it is")
            continue
        (folder / "leaves").mkdir(parents=True)
        model.save(folder / "package.obm", progress=False)
        listing = {}
        for own, weights in model.weights.items():
            for n, (leaf, lazy) in enumerate(weights.flat.items()):
                entry = {"weights": own, "leaf": leaf, "dtype": lazy.spec.kind.name, "shape": list(lazy.shape)}
                if lazy.spec.kind.storage:
                    entry["file"] = f"{own}-{n:03d}.npy"
                    np.save(folder / "leaves" / entry["file"], plain(np.asarray(lazy)), allow_pickle=False)
                listing[f"{own}/{n}"] = entry
        (folder / "leaves.json").write_text(json.dumps(list(listing.values()), indent=1, ensure_ascii=False) + "\n")
        outputs = call(model)
        if outputs:
            np.savez(
                folder / "calls.npz",
                **{f"in.{k}": v for k, v in inputs.items()},
                **{f"out.{k}": np.asarray(v) for k, v in outputs.items()},
            )
        print(f"made {folder.relative_to(HERE)}")


if __name__ == "__main__":
    main()
