"""Networks through save → a process that has never seen their code → the same numbers, and the same gradients."""

from __future__ import annotations

import inspect
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from tests import networks
from tests.once import once

ROOT = pathlib.Path(__file__).parent.parent
ENGINES = ("export", "rebuild", "replay")


def copied(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.copy(), tree)


def gradient(call: Callable[..., Any], arguments: Any) -> list[Any]:
    """Of the sum of squares of the results, with respect to each argument's leaves that are real or complex."""
    leaves, tree = jax.tree.flatten(copied(arguments))
    free = [n for n, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    @jax.jit
    def squares(results: Any) -> Any:
        floating = [r for r in jax.tree.leaves(results) if jnp.issubdtype(r.dtype, jnp.inexact)]
        return sum(jnp.sum(jnp.real(r * jnp.conj(r))) for r in floating)

    def loss(values: list[Any]) -> Any:
        given = list(leaves)
        for n, value in zip(free, values, strict=True):
            given[n] = value
        return squares(call(*jax.tree.unflatten(tree, given)))

    return jax.grad(loss)([leaves[n] for n in free])


FRESH = """
import importlib.abc, json, sys
from typing import Any, Callable

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("networks", "tests", "flax", "conftest"):
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Refuse())
import jax
import jax.numpy as jnp
import numpy as np
import obmlite

COPIED

GRADIENT

engine, folder, *names = sys.argv[1:]
arrays, facts = {}, {}
for name in names:
    model = obmlite.load(f"{folder}/{name}.obm", engine=engine)
    (function,) = model.functions.values()
    assert function.engine == engine, function.engine
    own = list(obmlite.load(f"{folder}/{name}.inputs").weights["inputs"].restore().values())
    weights = [model.weights[binding.weights].restore() for binding in function.bindings]
    inputs, again = copied(own), copied(own)
    results = {
        "model": model(*inputs),
        "model, once more": model(*again),
        "function": function(*weights, *copied(own)),
        "gradient": gradient(lambda *args: function(*args), [*weights, *own]),
    }
    deleted = [any(leaf.is_deleted() for leaf in jax.tree.leaves(i)) for i in inputs]
    facts[name] = {
        "results": str(jax.tree.structure(results["model"])),
        "any deleted": deleted,
        "all deleted": [all(leaf.is_deleted() for leaf in jax.tree.leaves(i)) for i in inputs],
    }
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves([weights, own]))
    for what, tree in results.items():
        arrays |= {f"{name}/{what}/{n}": np.asarray(leaf) for n, leaf in enumerate(jax.tree.leaves(tree))}
assert "networks" not in sys.modules
np.savez(f"{folder}/{engine}.npz", **arrays)
with open(f"{folder}/{engine}.json", "w") as file:
    json.dump(facts, file)
"""


@pytest.fixture(scope="module")
def made() -> dict[str, networks.Network]:
    return {name: make() for name, make in networks.ALL.items()}


@pytest.fixture(scope="module")
def packages(made: dict[str, networks.Network], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("networks")
    for name, network in made.items():
        network.model().save(folder / f"{name}.obm")
        inputs = obmlite.Weights({f"{n}": value for n, value in enumerate(network.inputs.values())})
        obmlite.Model({"inputs": inputs}).save(folder / f"{name}.inputs")
    return folder


def fresh(engine: str, packages: pathlib.Path) -> tuple[dict[str, Any], Any]:
    """What one process that knows only obmlite computes with all of them."""
    script = packages / f"{engine}.py"
    text = FRESH.replace("COPIED", inspect.getsource(copied)).replace("GRADIENT", inspect.getsource(gradient))
    script.write_text(text)
    # First the one that calls LAPACK: nothing else may have set it up.
    names = sorted(networks.ALL, key=lambda name: name != "spectral")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(script), engine, str(packages), *names],
        capture_output=True,
        text=True,
        env=environment,
        cwd=packages,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(packages / f"{engine}.npz") as arrays:
        return dict(arrays), json.loads((packages / f"{engine}.json").read_text())


@pytest.fixture(scope="module")
def native(made: dict[str, networks.Network]) -> Callable[[str], tuple[Any, list[Any]]]:
    """What JAX itself computes, each network once."""
    held: dict[str, tuple[Any, list[Any]]] = {}

    def compute(name: str) -> tuple[Any, list[Any]]:
        if name not in held:
            network = made[name]
            own = getattr(network.fn, "__wrapped__", network.fn)  # without its jit, which donates

            def call(*args: Any) -> Any:
                return own(*args, **network.static)

            arguments = [*network.weights.values(), *network.inputs.values()]
            jitted = jax.jit(call)
            held[name] = jitted(*arguments), gradient(jitted, arguments)
        return held[name]

    return compute


def part(arrays: dict[str, Any], name: str, what: str) -> list[Any]:
    prefix = f"{name}/{what}/"
    return [arrays[f"{prefix}{n}"] for n in range(sum(key.startswith(prefix) for key in arrays))]


# One test for each engine, and not one for each network: what they share is made once in each of pytest's workers.


@pytest.mark.parametrize(
    "engine", [ENGINES[0], *(pytest.param(engine, marks=[once, pytest.mark.long]) for engine in ENGINES[1:])]
)
def test_a_fresh_process(engine: str, made: Any, packages: pathlib.Path, native: Callable[[str], Any]) -> None:
    arrays, facts = fresh(engine, packages)
    for name, network in made.items():
        results, gradients = native(name)
        assert facts[name]["results"] == str(jax.tree.structure(results)), name
        wanted = [np.asarray(leaf) for leaf in jax.tree.leaves(results)]
        for what in ("model", "model, once more", "function"):
            same_bits(f"{name}, {what}", part(arrays, name, what), wanted)

        found = part(arrays, name, "gradient")
        assert len(found) == len(gradients) > 0
        for n, (value, leaf) in enumerate(zip(found, map(np.asarray, gradients), strict=True)):
            assert (value.dtype, value.shape) == (leaf.dtype, leaf.shape), (name, n)
            atol = 2e-6 * np.abs(leaf).max(initial=0)
            np.testing.assert_allclose(value, leaf, rtol=2e-6, atol=atol, err_msg=f"{name}, gradient {n}")

        # What was donated is gone, and nothing else.
        donated = [own in network.donated for own in network.inputs]
        assert facts[name]["any deleted"] == facts[name]["all deleted"] == donated, name


def same_bits(what: str, found: list[Any], wanted: list[Any]) -> None:
    for n, (value, leaf) in enumerate(zip(found, wanted, strict=True)):
        assert (value.dtype, value.shape) == (leaf.dtype, leaf.shape), (what, n)
        assert value.tobytes() == leaf.tobytes(), (what, n, np.abs(value - leaf).max())


def test_what_functions_say_of_themselves(made: Any, packages: pathlib.Path) -> None:
    for name in networks.ALL:
        for function in obmlite.load(packages / f"{name}.obm").functions.values():
            assert function.durable, name  # a PRNG key, say, must not bring operations of other dialects along
            assert function.vjp_order == 1
            assert {leaf.partition(".")[0] for leaf in function.donated_names} == set(made[name].donated)


def test_a_loop_of_donated_steps(made: dict[str, networks.Network], packages: pathlib.Path) -> None:
    network = made["transformer"]
    model = obmlite.load(packages / "transformer.obm")
    jitted = jax.jit(network.fn.__wrapped__)  # type: ignore[attr-defined]
    params, wanted, cache = network.weights["params"], network.inputs["cache"], copied(network.inputs["cache"])
    tokens = network.inputs["tokens"]
    for position in range(4, 8):
        expected, wanted = jitted(params, wanted, tokens, position)
        before = cache
        logits, cache = model(before, tokens, position)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
        assert np.asarray(logits).tobytes() == np.asarray(expected).tobytes()
        tokens = logits.argmax(-1).astype("int32")


def test_weights_that_are_bound_are_not_donated(tmp_path: pathlib.Path) -> None:
    @jax.jit
    def plain(params: Any, x: jax.Array) -> Any:
        return jax.tree.map(lambda p: p - 0.1 * x.mean() * p, params)

    step = jax.jit(plain.__wrapped__, donate_argnums=0)
    params = {"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(4)}
    x = jnp.full(3, 2.0)
    obmlite.Model.from_function(step, params, x, name="step").save(tmp_path / "m.obm")
    assert not any(leaf.is_deleted() for leaf in params.values())
    model = obmlite.load(tmp_path / "m.obm")
    wanted = plain(params, x)
    for _ in range(3):  # the same weights each time
        jax.tree.map(np.testing.assert_array_equal, model(x), wanted)
    function = model.functions["step"]
    assert function.donated_names == {"params.w", "params.b"}
    own = model.weights["params"].restore()
    given = copied(own)
    jax.tree.map(np.testing.assert_array_equal, function(given, x), wanted)
    assert all(leaf.is_deleted() for leaf in given.values())
    jax.tree.map(np.testing.assert_array_equal, model(x), wanted)
    jax.tree.map(np.testing.assert_array_equal, own, params)


@pytest.mark.parametrize("name", ["transformer", "dropout", "closure"])
def test_another_batch_size(name: str, made: dict[str, networks.Network], packages: pathlib.Path) -> None:
    network = made[name]
    own = getattr(network.fn, "__wrapped__", network.fn)
    inputs = {
        key: jax.tree.map(lambda leaf: leaf[:2], value) if key in network.symbolic else value
        for key, value in network.inputs.items()
    }
    wanted = jax.jit(lambda *args: own(*args, **network.static))(*network.weights.values(), *inputs.values())
    found = obmlite.load(packages / f"{name}.obm")(*copied(list(inputs.values())))
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def test_tied_embeddings_are_one_array(packages: pathlib.Path) -> None:
    model = obmlite.load(packages / "two_tower.obm")
    params = model.weights["params"].restore()
    assert params["query"]["embed"] is params["document"]["embed"]
    assert params["query"]["w"] is not params["document"]["w"]
    embed, w = params["query"]["embed"].nbytes, params["query"]["w"].nbytes
    stored = sum(path.stat().st_size for path in (packages / "two_tower.obm" / "weights").iterdir())
    assert embed + 2 * w < stored < embed + 2 * w + 8192


def test_what_a_network_closed_over_is_not_in_its_code(packages: pathlib.Path) -> None:
    model = obmlite.load(packages / "closure.obm")
    assert sorted(leaf.shape for leaf in model.weights["recur.captures"].restore()) == [
        (16, 32),
        (16, 32),
        (32, 16),
        (64, 16),
    ]
    assert all(file.stat().st_size < 20_000 for file in (packages / "closure.obm" / "functions").iterdir())
