"""The calls of a golden package: what stands in ``calls.json`` and ``calls.npz``, made again and compared.

``calls.json`` says which functions or pipelines are called, with what, and with which JAX, jaxlib, SciPy (whose LAPACK
jaxlib calls) and processor that was done; ``calls.npz`` holds inputs, outputs and gradients, by the names that
``calls.json`` gives them. An argument is one of ::

    {"array": name, "dtype": …}  {"number": 2.5}  {"weights": name}  {"dict": {…}}  {"list": […]}

Gradients are those of the weighted sum of all results that are real or complex numbers, with respect to all such
leaves of the arguments; those of order 2 are of the weighted sum of the gradients.

``python calls.py FOLDER…`` runs all that is in some folders with every engine, and prints JSON of what came; for calls
that need a process with several devices.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pathlib
import platform
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import obmlite
from obmlite import dtypes

ENGINES = ("export", "rebuild", "auto")


def made_with() -> dict[str, str]:
    """What the last bit of a result depends on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        told = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    except OSError:
        told = [platform.processor()]
    cpu = hashlib.sha256("\n".join((platform.machine(), *told)).encode()).hexdigest()[:16]
    own = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "scipy")}
    return {**own, "cpu": cpu}


def plain(array: Any) -> np.ndarray:
    """An array as ``.npy`` can hold it and a reader without ml_dtypes can read it: bits where it must be."""
    if isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(array))
    host = np.asarray(array)
    if host.dtype.kind in "biufc" and host.dtype.isbuiltin == 1:
        return host
    return host.view(f"u{host.dtype.itemsize}")


def unplain(held: np.ndarray, kind: dtypes.DType) -> Any:
    """The array that :func:`plain` was given."""
    if kind.is_key:
        return jax.random.wrap_key_data(held, impl=kind.impl)
    return held if held.dtype == kind.numpy else held.view(kind.numpy)


def described(array: Any, name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """An entry for an array, whose values go to ``arrays``."""
    kind = dtypes.of(array)
    if not kind.storage:  # float0
        return {"dtype": kind.short, "shape": list(np.shape(array))}
    arrays[name] = plain(array)
    return {"array": name, "dtype": kind.short}


def encode(value: Any, name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """An argument as JSON; its arrays go to ``arrays``."""
    if isinstance(value, obmlite.Weights):
        raise TypeError("weights are named")
    if isinstance(value, dict) and set(value) == {"weights"}:
        return value
    if isinstance(value, dict):
        return {"dict": {k: encode(v, f"{name}.{k}", arrays) for k, v in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"list": [encode(v, f"{name}.{n}", arrays) for n, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"number": value}
    return described(value, name, arrays)


def decode(entry: dict[str, Any], arrays: Any, model: obmlite.Model) -> Any:
    """The argument that :func:`encode` was given."""
    if "weights" in entry:
        return model.weights[entry["weights"]].restore()
    if "dict" in entry:
        return {k: decode(v, arrays, model) for k, v in entry["dict"].items()}
    if "list" in entry:
        return [decode(v, arrays, model) for v in entry["list"]]
    if "number" in entry:
        return entry["number"]
    if "array" not in entry:
        return np.zeros(entry["shape"], jax.dtypes.float0)
    return unplain(arrays[entry["array"]], dtypes.parse(entry["dtype"]))


# --- running


def weighted(leaves: list[Any]) -> Any:
    """A sum that every element has another part in."""
    total = jnp.float32(0)
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            factors = (np.arange(np.size(leaf)) % 7 - 3).reshape(np.shape(leaf)) / 4
            total += jnp.real(jnp.sum(leaf.astype(jnp.result_type(leaf, jnp.float32)) * factors.astype("f4")))
    return total


def differentiate(fn: Any, args: list[Any], kwargs: dict[str, Any], order: int, mesh: Any) -> list[list[Any]]:
    """Gradients of order 1, …, ``order``, each a list of leaves, on a mesh's devices if one is given."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    chosen = [n for n, leaf in enumerate(leaves) if _differentiable(leaf)]

    def total(values: list[Any]) -> Any:
        given = list(leaves)
        for n, value in zip(chosen, values, strict=True):
            given[n] = value
        again, named = jax.tree.unflatten(tree, given)
        return weighted(jax.tree.leaves(fn(*again, **named)))

    def every(values: list[Any]) -> list[Any]:
        gradients, current = [], total  # type: list[Any], Any
        for _ in range(order):
            gradient = jax.grad(current)
            gradients.append(gradient(values))
            current = _summed(gradient)
        return gradients

    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()) if mesh else None
    found: list[list[Any]] = jax.jit(every)([jax.device_put(leaves[n], place) for n in chosen])
    return found


def _differentiable(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def _summed(fn: Any) -> Any:
    return lambda values: weighted(fn(values))


def read(folder: pathlib.Path) -> dict[str, Any]:
    """``calls.json``."""
    content: dict[str, Any] = json.loads((folder / "calls.json").read_text(encoding="utf-8"))
    return content


def stored(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """``calls.npz``."""
    if not (folder / "calls.npz").exists():
        return {}
    with np.load(folder / "calls.npz", allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def run(folder: pathlib.Path, engine: str, arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[Any]]:
    """Makes all calls of a package.

    Returns:
      Results and gradients by name; and for each call what ``calls.json`` is to say of its results.
    """
    model = obmlite.load(folder / "package.obm", engine=engine)
    results: dict[str, np.ndarray] = {}
    entries = []
    for n, call in enumerate(read(folder)["calls"]):
        target: Any = model.pipelines[call["pipeline"]] if "pipeline" in call else model.functions[call["function"]]
        mesh = jax.make_mesh(tuple(call["mesh"].values()), tuple(call["mesh"])) if call["mesh"] else None
        if mesh is not None:
            target = target.on(mesh)

        def given(call: dict[str, Any] = call) -> Any:
            args = [decode(a, arrays, model) for a in call["args"]]
            return args, {k: decode(a, arrays, model) for k, a in call["kwargs"].items()}

        args, kwargs = given()
        leaves = jax.tree.leaves(target(*args, **kwargs))
        entry = [described(leaf, f"out.{n}.{m}", results) for m, leaf in enumerate(leaves)]
        if call["order"]:
            args, kwargs = given()
            for order, gradients in enumerate(differentiate(target, args, kwargs, call["order"], mesh), 1):
                for m, gradient in enumerate(gradients):
                    entry.append(described(gradient, f"grad.{n}.{order}.{m}", results))
        if "function" in call and engine != "auto":
            assert model.functions[call["function"]].engine == engine
        entries.append(entry)
    return results, entries


def differences(folder: pathlib.Path, engine: str) -> list[str]:
    """What is other than stored when the calls are made now: bits, if all that they depend on is the same."""
    expected = stored(folder)
    results, entries = run(folder, engine, expected)
    content = read(folder)
    exact = content["made_with"] == made_with()
    found = []
    for call, entry in zip(content["calls"], entries, strict=True):
        if call["results"] != entry:
            found.append(f"{call['results']} expected, {entry} found")
            continue
        for one in entry:
            if "array" not in one:
                continue
            kind, name = dtypes.parse(one["dtype"]), one["array"]
            old, new = expected[name], results[name]
            if exact or kind.is_key or not jnp.issubdtype(kind.numpy, jnp.inexact):
                same = old.dtype == new.dtype and old.shape == new.shape and old.tobytes() == new.tobytes()
            else:
                same = _close(unplain(old, kind), unplain(new, kind))
            if not same:
                found.append(f"{name}: {old!r} expected, {new!r} found")
    return found


def _close(old: np.ndarray, new: np.ndarray) -> bool:
    """To 1e-6 of the largest, or to what the dtype resolves where that is coarser."""
    if old.shape != new.shape or not old.size:
        return old.shape == new.shape
    tolerance = max(1e-6, float(jnp.finfo(old.dtype).eps) * 1.01 if old.dtype.itemsize < 4 else 0)
    wide = np.complex128 if old.dtype.kind == "c" else np.float64
    a, b = old.astype(wide), new.astype(wide)
    return bool(np.all(np.abs(a - b) <= tolerance * np.max(np.abs(a))))


def outcome(folder: pathlib.Path, engine: str) -> dict[str, Any]:
    """Differences, or the error, as JSON holds them."""
    try:
        return {"differences": differences(folder, engine)}
    except obmlite.ObmliteError as error:
        return {"error": type(error).__name__, "facts": error.facts()}


if __name__ == "__main__":
    print(json.dumps({f: {e: outcome(pathlib.Path(f), e) for e in ENGINES} for f in sys.argv[1:]}))
