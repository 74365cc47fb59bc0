"""Equinox: modules, of which the arrays are saved, and their state."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from tests.frameworks.helper import assert_same, loaded, saved, without_frameworks

eqx = pytest.importorskip("equinox")
optax = pytest.importorskip("optax")

WORDS = np.array([1, 2, 3], np.int32)


class Network(eqx.Module):
    """A word to the logits of words; functions and numbers stand among the arrays."""

    embed: eqx.nn.Embedding
    layers: list[Any]
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    activation: Callable[..., Any]
    head: Any
    scale: float
    name: str = eqx.field(static=True)

    def __init__(self, key: Any) -> None:
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(7, 4, key=keys[0])
        self.layers = [eqx.nn.Linear(4, 4, key=keys[1]), jax.nn.relu, eqx.nn.Linear(4, 4, key=keys[2])]
        self.norm = eqx.nn.BatchNorm(4, "batch", mode="ema")
        self.dropout = eqx.nn.Dropout(0.1)
        self.activation = jax.nn.gelu
        self.head = self.embed.weight
        self.scale = 0.5
        self.name = "network"

    def __call__(self, word: Any, state: Any, key: Any = None) -> Any:
        y = self.embed(word)
        for layer in self.layers:
            y = layer(y)
        y, state = self.norm(y, state)
        return self.head @ self.dropout(self.activation(y), key=key) * self.scale, state


def batched(module: Any, state: Any, words: Any) -> Any:
    return jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(words, state)


@pytest.fixture(scope="module")
def pair() -> Any:
    """A module and its state after some steps of training, for inference."""
    module, state = eqx.nn.make_with_state(Network)(jax.random.key(0))
    optimizer = optax.sgd(0.1)
    moments = optimizer.init(eqx.filter(module, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(module: Any, state: Any, moments: Any) -> Any:
        def loss(module: Any, state: Any) -> Any:
            logits, state = batched(eqx.tree_at(lambda m: m.dropout.inference, module, replace=True), state, WORDS)
            return jnp.mean((logits - jax.nn.one_hot(WORDS, 7)) ** 2), state

        gradient, state = eqx.filter_grad(loss, has_aux=True)(module, state)
        updates, moments = optimizer.update(gradient, moments)
        return eqx.apply_updates(module, updates), state, moments

    for _ in range(3):
        module, state, moments = step(module, state, moments)
    module = eqx.tree_at(lambda m: m.head, module, replace=module.embed.weight)
    return eqx.nn.inference_mode(module), state


@pytest.fixture(scope="module")
def wanted(pair: Any) -> Any:
    return np.asarray(eqx.filter_jit(lambda module, state, words: batched(module, state, words)[0])(*pair, WORDS))


@pytest.fixture(scope="module")
def model(pair: Any, tmp_path_factory: pytest.TempPathFactory) -> obmlite.Model:
    def apply(module: Any, state: Any, words: Any) -> Any:
        return batched(module, state, words)[0]

    made = obmlite.Model.from_function(apply, *pair, WORDS, weights=("module", "state"))
    return loaded(tmp_path_factory.mktemp("equinox"), made)


def other() -> Any:
    return eqx.nn.inference_mode(eqx.nn.make_with_state(Network)(jax.random.key(9))[0])


def test_arrays(pair: Any, model: obmlite.Model) -> None:
    found = model.weights["module"].restore()
    assert list(found) == ["embed", "layers", "norm", "head"]
    assert found["layers"][1] is None
    assert np.asarray(found["layers"][2]["bias"]).tobytes() == np.asarray(pair[0].layers[2].bias).tobytes()
    assert "layers.2.bias" in model.weights["module"].flat


def test_a_module_comes_back_into_a_template(pair: Any, model: obmlite.Model, wanted: Any) -> None:
    found = model.weights["module"].restore(like=other())
    assert type(found) is Network
    assert (found.scale, found.name, found.activation) == (0.5, "network", jax.nn.gelu)
    assert_same(eqx.filter(found, eqx.is_array), eqx.filter(pair[0], eqx.is_array))
    state = model.weights["state"].restore(like=pair[1])
    assert np.asarray(eqx.filter_jit(batched)(found, state, WORDS)[0]).tobytes() == wanted.tobytes()


def test_a_partition_comes_back_into_a_template(pair: Any, tmp_path: pathlib.Path) -> None:
    arrays, _ = eqx.partition(pair[0], eqx.is_array)
    shapes = eqx.filter_eval_shape(lambda: arrays)
    found = saved(tmp_path, arrays).restore(like=shapes)
    assert_same(found, arrays)


def test_state(pair: Any, model: obmlite.Model) -> None:
    weights = model.weights["state"]
    assert list(weights.restore()) == ["Network.norm.ema_first_time_index", "Network.norm.ema_state_index"]
    found = weights.restore(like=pair[1])
    assert type(found) is eqx.nn.State
    assert_same(found, pair[1])
    assert not np.asarray(found.get(pair[0].norm.ema_first_time_index))


def test_tied_leaves_stay_tied(model: obmlite.Model) -> None:
    found = model.weights["module"].restore(like=other())
    assert found.head is found.embed.weight
    assert model.weights["module"].nbytes == sum(
        leaf.nbytes for name, leaf in model.weights["module"].flat.items() if name != "head"
    )


def test_shared_layers(tmp_path: pathlib.Path) -> None:
    def make(key: Any) -> Any:
        pair = (eqx.nn.Embedding(7, 4, key=key), eqx.nn.Linear(4, 7, use_bias=False, key=key))
        return eqx.nn.Shared(pair, where=lambda p: p[1].weight, get=lambda p: p[0].weight)

    shared = make(jax.random.key(0))
    weights = saved(tmp_path, shared)
    assert len(weights.flat) == 1
    assert_same(weights.restore(like=make(jax.random.key(1)))()[1].weight, shared()[0].weight)


def test_the_function_runs(model: obmlite.Model, wanted: Any) -> None:
    assert np.asarray(model(WORDS)).tobytes() == wanted.tobytes()


def test_from_equinox(pair: Any, tmp_path: pathlib.Path) -> None:
    module, state = pair
    made = loaded(tmp_path, obmlite.Model.from_equinox(module, WORDS[0], state=state))
    assert made.signature.arguments == ("word",)
    call = eqx.filter_jit(lambda module, word, state: module(word, state))
    assert_same(made(WORDS[0]), call(module, WORDS[0], state)[0])
    made = loaded(tmp_path, obmlite.Model.from_equinox(module, WORDS[0], state=state, mutable=True))
    found, new = made(WORDS[0])
    wanted, states = call(module, WORDS[0], state)
    assert_same((found, list(jax.tree.leaves(new))), (wanted, list(jax.tree.leaves(states))))
    dense = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    made = loaded(tmp_path, obmlite.Model.from_equinox(dense, np.ones(3, np.float32)))
    assert_same(made(np.ones(3, np.float32)), eqx.filter_jit(lambda m, x: m(x))(dense, np.ones(3, np.float32)))


def test_the_function_takes_any_container(pair: Any, model: obmlite.Model, wanted: Any) -> None:
    module, state = pair
    for given in (module, eqx.filter(module, eqx.is_array), model.weights["module"].restore()):
        for own in (state, model.weights["state"].restore()):
            assert np.asarray(model.functions["apply"](given, own, WORDS)).tobytes() == wanted.tobytes()


def test_without_equinox(model: obmlite.Model, wanted: Any) -> None:
    arrays, facts = without_frameworks(pathlib.Path(model.path or ""), WORDS)
    assert arrays["model"].tobytes() == arrays["function"].tobytes() == wanted.tobytes()
    assert facts["trees"]["module"]["layers"][1:] == [
        {"weight": "ArrayImpl", "bias": "ArrayImpl"},
        None,
        {"weight": "ArrayImpl", "bias": "ArrayImpl"},
    ]
    assert facts["ties"]["module"] == [["embed.weight", "head"]]
    assert facts["refused"] == []  # a module's class is the user's: nothing is asked for


def test_an_unsupported_leaf() -> None:
    module = eqx.tree_at(lambda m: m.head, other(), replace=np.array(["text"]))
    with pytest.raises(obmlite.LeafError) as caught:
        obmlite.Weights({"model": module})
    assert caught.value.leaf == "model.head"


def test_a_template_lists_all_differences(model: obmlite.Model) -> None:
    wrong = eqx.tree_at(lambda m: m.head, other(), replace=jnp.ones((8, 4)))
    wrong = eqx.tree_at(lambda m: m.layers[0].bias, wrong, replace=None)
    with pytest.raises(obmlite.RestoreError) as caught:
        model.weights["module"].restore(like=wrong)
    assert "head" in str(caught.value)
    assert "layers.0.bias" in str(caught.value)
