"""Haiku: parameters, state, and transformed functions."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from tests.frameworks.helper import assert_same, loaded, saved, without_frameworks

hk = pytest.importorskip("haiku")
optax = pytest.importorskip("optax")

IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
WORDS = np.array([1, 2, 3], np.int32)


def residual(images: Any, train: bool) -> Any:
    """A residual block, with names of modules and of methods in its parameters' names."""
    return ResNet(name="res_net50")(images, train)


class ResNet(hk.Module):
    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        self.conv = hk.Conv2D(4, 3, stride=2, name="initial_conv")
        self.norm = hk.BatchNorm(True, True, 0.9, name="initial_batchnorm")
        self.block = hk.Conv2D(4, 3, name="block")

    def __call__(self, images: Any, train: bool) -> Any:
        y = jax.nn.relu(self.norm(self.conv(images), train))
        return hk.Linear(5, name="logits")(jnp.mean(y + self.block(y), axis=(1, 2)))


def tied(words: Any) -> Any:
    embed = hk.Embed(7, 4, name="embed")
    y = jax.nn.relu(hk.Linear(4)(embed(words)))
    return y @ embed.embeddings.T


@pytest.fixture(scope="module")
def network() -> Any:
    """What was transformed, parameters and state after some steps of training."""
    made = hk.transform_with_state(residual)
    params, state = made.init(jax.random.key(0), IMAGES, train=True)
    optimizer = optax.sgd(0.1)
    moments = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, moments: Any) -> Any:
        def loss(params: Any) -> Any:
            logits, new = made.apply(params, state, None, IMAGES, train=True)
            return jnp.mean((logits - 1) ** 2), new

        gradient, new = jax.grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, updates), new, moments

    for _ in range(2):
        params, state, moments = step(params, state, moments)
    assert np.asarray(state["res_net50/~/initial_batchnorm/~/mean_ema"]["average"]).all()
    return made, params, state


@pytest.fixture(scope="module")
def wanted(network: Any) -> Any:
    made, params, state = network
    return np.asarray(jax.jit(lambda p, s, x: made.apply(p, s, None, x, train=False)[0])(params, state, IMAGES))


@pytest.fixture(scope="module")
def model(network: Any, tmp_path_factory: pytest.TempPathFactory) -> obmlite.Model:
    made, params, state = network
    return loaded(
        tmp_path_factory.mktemp("haiku"), obmlite.Model.from_haiku(made, params, IMAGES, state=state, train=False)
    )


def test_params(network: Any, model: obmlite.Model) -> None:
    found = model.weights["params"].restore()
    assert_same(found, network[1])
    assert "res_net50/~/initial_conv" in found
    assert "res_net50/~/initial_conv.w" in model.weights["params"].flat


def test_state(network: Any, model: obmlite.Model) -> None:
    assert_same(model.weights["state"].restore(), network[2])


def test_immutable_dicts_come_back(network: Any, tmp_path: pathlib.Path) -> None:
    value = hk.data_structures.to_immutable_dict(network[1])
    found = saved(tmp_path, value).restore()
    assert type(found) is type(value) is not dict
    assert_same(found, value)


def test_a_recurrent_state(tmp_path: pathlib.Path) -> None:
    value = hk.LSTMState(jnp.ones(2), jnp.zeros(2))
    found = saved(tmp_path, {"lstm": value}).restore()["lstm"]
    assert type(found) is hk.LSTMState
    assert_same(found, value)


def test_a_shared_embedding(tmp_path: pathlib.Path) -> None:
    made = hk.without_apply_rng(hk.transform(tied))
    params = made.init(jax.random.key(0), WORDS)
    model = loaded(tmp_path, obmlite.Model.from_haiku(made, params, WORDS))
    assert [leaf.shape for leaf in model.weights["params"].flat.values()].count((7, 4)) == 1
    wanted = np.asarray(jax.jit(made.apply)(params, WORDS))
    assert np.asarray(model(WORDS)).tobytes() == wanted.tobytes()


def test_tied_leaves_stay_tied(network: Any, tmp_path: pathlib.Path) -> None:
    ((first, leaves), *_) = network[1].items()
    found = saved(tmp_path, {first: leaves, "other": leaves}).restore()
    assert all(found[first][key] is found["other"][key] for key in leaves)


def test_the_function_runs(model: obmlite.Model, wanted: Any) -> None:
    assert np.asarray(model(IMAGES)).tobytes() == wanted.tobytes()
    with pytest.raises(obmlite.ArgumentError, match="train"):
        model(IMAGES, train=True)


def test_the_function_takes_any_container(network: Any, model: obmlite.Model, wanted: Any) -> None:
    _, params, state = network
    for convert in (hk.data_structures.to_mutable_dict, hk.data_structures.to_immutable_dict):
        found = model.functions["apply"](convert(params), convert(state), IMAGES)
        assert np.asarray(found).tobytes() == wanted.tobytes()


def test_the_new_state(network: Any, tmp_path: pathlib.Path) -> None:
    made, params, state = network
    model = obmlite.Model.from_haiku(made, params, IMAGES, state=state, mutable=True, train=True)
    found = loaded(tmp_path, model)(IMAGES)
    assert_same(found, jax.jit(lambda p, s, x: made.apply(p, s, None, x, train=True))(params, state, IMAGES))


def test_a_key(tmp_path: pathlib.Path) -> None:
    made = hk.transform(lambda x: hk.dropout(hk.next_rng_key(), 0.5, hk.Linear(3)(x)))
    x, key = jnp.ones((2, 3)), jax.random.key(3)
    params = made.init(key, x)
    model = loaded(tmp_path, obmlite.Model.from_haiku(made, params, x, rng=key))
    assert_same(model(x, rng=key), jax.jit(made.apply)(params, key, x))


def test_what_does_not_fit() -> None:
    plain = hk.without_apply_rng(hk.transform(tied))
    with pytest.raises(obmlite.ExportError, match="state"):
        obmlite.Model.from_haiku(plain, {}, WORDS, state={})
    with pytest.raises(obmlite.ExportError, match="state"):
        obmlite.Model.from_haiku(hk.transform_with_state(tied), {}, WORDS)
    with pytest.raises(obmlite.ExportError, match="rng"):
        obmlite.Model.from_haiku(plain, {}, WORDS, rng=jax.random.key(0))


def test_without_haiku(model: obmlite.Model, wanted: Any) -> None:
    arrays, facts = without_frameworks(pathlib.Path(model.path or ""), IMAGES)
    assert arrays["model"].tobytes() == arrays["function"].tobytes() == wanted.tobytes()
    assert facts["trees"]["params"]["res_net50/~/initial_conv"] == {"b": "ArrayImpl", "w": "ArrayImpl"}
    assert facts["refused"] == []  # plain dicts name no class


def test_immutable_dicts_are_dicts_without_haiku(network: Any, tmp_path: pathlib.Path) -> None:
    saved(tmp_path, hk.data_structures.to_immutable_dict(network[1]))
    _, facts = without_frameworks(tmp_path / "weights.obm")
    assert facts["trees"]["weights"]["res_net50/~/initial_conv"] == {"b": "ArrayImpl", "w": "ArrayImpl"}
    assert facts["refused"] == ["haiku"]


def test_an_unsupported_leaf(network: Any) -> None:
    made, params, state = network
    wrong = hk.data_structures.to_immutable_dict({**params, "notes": {"author": "someone"}})
    with pytest.raises(obmlite.LeafError) as caught:
        obmlite.Model.from_haiku(made, wrong, IMAGES, state=state, train=False)
    assert caught.value.leaf == "notes.author"


def test_a_template_lists_all_differences(network: Any, model: obmlite.Model) -> None:
    template = hk.data_structures.to_immutable_dict(network[1])
    assert_same(model.weights["params"].restore(like=template), template)
    wrong = hk.data_structures.to_mutable_dict(template)
    del wrong["res_net50/~/initial_conv"]
    wrong["res_net50/logits"] = {**wrong["res_net50/logits"], "b": jnp.ones(9)}
    with pytest.raises(obmlite.RestoreError) as caught:
        model.weights["params"].restore(like=wrong)
    assert "res_net50/~/initial_conv.w" in str(caught.value)
    assert "res_net50/logits.b" in str(caught.value)
