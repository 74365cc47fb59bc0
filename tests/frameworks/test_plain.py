"""Plain JAX: any pytree, optimizer states among them."""

from __future__ import annotations

import collections
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from tests.frameworks.helper import assert_same, loaded, saved, without_frameworks

optax = pytest.importorskip("optax")

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


class Statistics(NamedTuple):
    mean: Any
    variance: Any


def apply(params: Any, state: Any, x: Any) -> Any:
    y = (x @ params["w"] - state.mean) / jnp.sqrt(state.variance + 1e-5)
    for layer in params["layers"]:
        y = jax.nn.relu(y @ layer["w"] + layer["b"])
    return y @ params["head"].T


def optimizer() -> Any:
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.add_decayed_weights(1e-3), lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p)),
        optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    )


@pytest.fixture(scope="module")
def trained() -> Any:
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w": jax.random.normal(keys[0], (3, 4)),
        "layers": [{"w": jax.random.normal(k, (4, 4)), "b": jnp.zeros(4)} for k in keys[1:]],
        "head": jnp.ones((3, 4)),
    }
    state = Statistics(jnp.zeros(4), jnp.ones(4))
    optimizing = optimizer()
    moments = optimizing.init(params)

    @jax.jit
    def step(params: Any, state: Any, moments: Any) -> Any:
        gradient = jax.grad(lambda p: jnp.mean((apply(p, state, X) - X) ** 2))(params)
        updates, moments = optimizing.update(gradient, moments, params)
        y = X @ params["w"]
        state = Statistics(0.9 * state.mean + 0.1 * y.mean(0), 0.9 * state.variance + 0.1 * y.var(0))
        return optax.apply_updates(params, updates), state, moments

    for _ in range(3):
        params, state, moments = step(params, state, moments)
    params["head"] = params["w"]
    return params, state, moments


@pytest.fixture(scope="module")
def wanted(trained: Any) -> Any:
    return np.asarray(jax.jit(apply)(*trained[:2], X))


@pytest.fixture(scope="module")
def model(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> obmlite.Model:
    params, state, _ = trained
    made = obmlite.Model.from_function(apply, params, state, X, weights=("params", "state"))
    return loaded(tmp_path_factory.mktemp("plain"), made)


def test_params(trained: Any, model: obmlite.Model) -> None:
    assert_same(model.weights["params"].restore(), trained[0])


def test_state(trained: Any, model: obmlite.Model) -> None:
    found = model.weights["state"].restore(like=trained[1])
    assert type(found) is Statistics
    assert_same(found, trained[1])


def test_containers_come_back(trained: Any, tmp_path: pathlib.Path) -> None:
    value = {
        "a": (jnp.int32(1), [jnp.ones(()), None]),
        "b": collections.OrderedDict(z=jnp.ones(2), y=()),
        "c": {(0, "x"): jnp.zeros(1)},
    }
    found = saved(tmp_path, value).restore()
    assert_same(found, value)
    assert type(found["b"]) is collections.OrderedDict


def test_tied_leaves_stay_tied(model: obmlite.Model) -> None:
    found = model.weights["params"].restore()
    assert found["head"] is found["w"]


def test_the_function_runs(model: obmlite.Model, wanted: Any) -> None:
    assert np.asarray(model(X)).tobytes() == wanted.tobytes()


def test_the_function_takes_any_container(trained: Any, model: obmlite.Model, wanted: Any) -> None:
    params, state, _ = trained
    for given in (params, collections.OrderedDict(params)):
        for own in (state, state._asdict()):
            assert np.asarray(model.functions["apply"](given, own, X)).tobytes() == wanted.tobytes()


def test_optimizer_states_come_back(trained: Any, tmp_path: pathlib.Path) -> None:
    found = saved(tmp_path, trained[2]).restore()
    assert_same(found, trained[2])
    assert type(found[1]) is optax.MaskedState
    assert type(found[1].inner_state) is optax.EmptyState
    assert type(found[2].inner_state[0]) is optax.ScaleByAdamState
    optimizer().update(jax.tree.map(jnp.ones_like, trained[0]), found, trained[0])  # which needs its own classes


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.sgd(0.1, momentum=0.9),
        lambda: optax.adafactor(0.1),
        lambda: optax.lamb(0.1),
        lambda: optax.rmsprop(0.1),
        lambda: optax.lion(0.1),
        lambda: optax.lbfgs(),
        lambda: optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.1, 0.0, 9)),
        lambda: optax.optimistic_gradient_descent(0.1),
        lambda: optax.MultiSteps(optax.adam(0.1), 2),
        lambda: optax.apply_if_finite(optax.adam(0.1), 2),
        lambda: optax.partition({"a": optax.adam(0.1), "b": optax.set_to_zero()}, {"w": "a", "b": "b"}),
        lambda: optax.contrib.schedule_free_adamw(0.1),
        lambda: optax.contrib.muon(0.1),
        lambda: optax.contrib.prodigy(),
    ],
)
def test_optimizers(make: Any, tmp_path: pathlib.Path) -> None:
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    state = make().init(params)
    assert_same(saved(tmp_path, state).restore(), state)


def test_all_states_on_the_list_are_there() -> None:
    from obmlite.frameworks.optax import _NAMES, ADAPTER

    for name in _NAMES:
        entry = ADAPTER.of_name(name)
        assert entry is not None, name
        assert entry.cls._fields is not None
        assert ADAPTER.of_class(entry.cls) == entry
    assert ADAPTER.of_name("optax.GradientTransformation") is None


def test_without_optax(trained: Any, model: obmlite.Model, wanted: Any, tmp_path: pathlib.Path) -> None:
    arrays, facts = without_frameworks(pathlib.Path(model.path or ""), X)
    assert arrays["model"].tobytes() == arrays["function"].tobytes() == wanted.tobytes()
    assert facts["ties"]["params"] == [["head", "w"]]
    assert facts["trees"]["state"] == {"mean": "ArrayImpl", "variance": "ArrayImpl"}

    saved(tmp_path, trained[2])
    _, facts = without_frameworks(tmp_path / "weights.obm")
    assert facts["trees"]["weights"][0] == "tuple"
    assert facts["trees"]["weights"][2] == {"inner_state": {}}
    assert facts["refused"] == ["optax"]


def test_an_unsupported_leaf() -> None:
    with pytest.raises(obmlite.LeafError) as caught:
        obmlite.Weights({"params": [jnp.ones(1), optax.adam(0.1)]})
    assert caught.value.leaf == "params.1.init"


def test_a_template_lists_all_differences(trained: Any, tmp_path: pathlib.Path) -> None:
    weights = saved(tmp_path, trained[2])
    template = jax.eval_shape(optimizer().init, {k: trained[0][k] for k in trained[0]})
    assert_same(weights.restore(like=template), trained[2])
    with pytest.raises(obmlite.RestoreError) as caught:
        weights.restore(like=optimizer().init({"w": jnp.ones((3, 5)), "head": jnp.ones((3, 4))}))
    assert "2.inner_state.0.mu.w" in str(caught.value)
    assert "2.inner_state.0.mu.layers.0.w" in str(caught.value)
