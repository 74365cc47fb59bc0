"""A package in a process that cannot import any framework."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np

import obmlite

ROOT = pathlib.Path(__file__).parent.parent.parent

CHILD = """
import importlib.abc, json, sys

FRAMEWORKS = ("flax", "optax", "haiku", "equinox", "objax", "chex", "orbax", "tests")

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FRAMEWORKS:
            refused.append(name)
            raise ImportError(f"{name} is not there")

refused = []
sys.meta_path.insert(0, Refuse())
import jax
import numpy as np
import obmlite

def shown(value):
    if isinstance(value, dict):
        return {str(key): shown(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(shown, value)]
    return None if value is None else type(value).__name__

package, inputs, outputs = sys.argv[1:]
model = obmlite.load(package)
assert not refused, refused
with np.load(inputs) as file:
    given = [file[f"arr_{n}"] for n in range(len(file))]
facts = {"trees": {}, "ties": {}}
arrays = {"model": model(*given)} if model.functions else {}
restored = {}
for name, weights in model.weights.items():
    restored[name] = weights.restore()
    facts["trees"][name] = shown(restored[name])
    leaves = weights.restore_leaves()
    same = [[n for n, b in zip(weights.names, leaves) if a is b] for a in leaves]
    facts["ties"][name] = sorted({tuple(names) for names in same if len(names) > 1})
for function in model.functions.values():
    bound = {b.argument: restored[b.weights] for b in function.bindings}
    arrays["function"] = function(*given, **bound) if not bound else function(*bound.values(), *given)
facts["refused"] = sorted(set(refused))
np.savez(outputs, **arrays)
print(json.dumps(facts))
"""


def without_frameworks(package: pathlib.Path, *inputs: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What a package does where no framework can be imported.

    Returns:
      The results of calling the model, and of its function on the weights as they are restored there; and what is known
      of the weights: their containers, which leaves are one array, and which modules were asked for.
    """
    given, found = package.with_suffix(".inputs.npz"), package.with_suffix(".outputs.npz")
    np.savez(given, *map(np.asarray, inputs))
    environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, str(package), str(given), str(found)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(found) as file:
        return dict(file), json.loads(done.stdout)


def saved(folder: pathlib.Path, value: Any) -> obmlite.Weights:
    """A pytree, saved and loaded; nothing is restored yet."""
    obmlite.Model({"weights": obmlite.Weights(value)}).save(folder / "weights.obm", overwrite=True)
    return obmlite.load(folder / "weights.obm").weights["weights"]


def loaded(folder: pathlib.Path, model: obmlite.Model) -> obmlite.Model:
    """A model, saved and loaded."""
    model.save(folder / "model.obm", overwrite=True)
    return obmlite.load(folder / "model.obm")


def assert_same(found: Any, wanted: Any) -> None:
    """Asserts that two pytrees have the same containers and, bit by bit, the same arrays."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if jax.dtypes.issubdtype(getattr(a, "dtype", None), jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
