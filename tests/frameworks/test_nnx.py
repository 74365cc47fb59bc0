"""Flax NNX: states, modules, and graph definitions."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from tests.frameworks.helper import assert_same, loaded, saved, without_frameworks

nnx = pytest.importorskip("flax.nnx")
optax = pytest.importorskip("optax")

WORDS = np.array([[1, 2, 3], [4, 5, 6]], np.int32)


class Network(nnx.Module):
    """Words to the logits of words; two layers share a kernel, the output shares the embedding."""

    def __init__(self, rngs: Any) -> None:
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        split = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
        with nnx.use_eager_sharding(False):  # there is no mesh here
            self.layers = nnx.List([nnx.Linear(4, 4, kernel_init=split, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)])
        self.layers[1].kernel = self.layers[0].kernel
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, words: Any) -> Any:
        y = self.embed(words)
        for layer in self.layers:
            y = nnx.relu(layer(y))
        return self.embed.attend(self.dropout(self.norm(y)))

    def hidden(self, words: Any) -> Any:
        return self.norm(self.embed(words))


def trained(steps: int = 3) -> Any:
    module = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, optax.adam(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(module: Any, optimizer: Any) -> None:
        def loss(module: Any) -> Any:
            return jnp.mean((module(WORDS) - jax.nn.one_hot(WORDS, 7)) ** 2)

        optimizer.update(module, nnx.grad(loss)(module))

    for _ in range(steps):
        step(module, optimizer)
    return module, optimizer


@pytest.fixture(scope="module")
def pair() -> Any:
    module, optimizer = trained()
    assert np.asarray(module.norm.mean[...]).any()
    module.eval()
    return module, optimizer


@pytest.fixture(scope="module")
def module(pair: Any) -> Any:
    return pair[0]


@pytest.fixture(scope="module")
def wanted(module: Any) -> Any:
    return np.asarray(nnx.jit(lambda m, words: m(words))(module, WORDS))


@pytest.fixture(scope="module")
def model(module: Any, tmp_path_factory: pytest.TempPathFactory) -> obmlite.Model:
    return loaded(tmp_path_factory.mktemp("nnx"), obmlite.Model.from_nnx(module, WORDS))


def test_state(module: Any, model: obmlite.Model) -> None:
    found = model.weights["state"].restore()
    assert type(found) is nnx.State
    assert_same(found, nnx.state(module))
    assert "layers.0.kernel" in model.weights["state"].flat


def test_parameters_alone(module: Any, tmp_path: pathlib.Path) -> None:
    params = nnx.state(module, nnx.Param)
    assert_same(saved(tmp_path, params).restore(), params)


def test_kinds_of_variables(module: Any, model: obmlite.Model) -> None:
    found = model.weights["state"].restore()
    assert type(found["norm"]["mean"]) is nnx.BatchStat
    assert type(found["norm"]["scale"]) is nnx.Param
    params, statistics, rest = nnx.split_state(found, nnx.Param, nnx.BatchStat, ...)
    assert len(nnx.to_flat_state(statistics)) == 2
    kernel = nnx.to_pure_dict(params)["layers"][0]["kernel"]
    assert kernel.tobytes() == np.asarray(module.layers[0].kernel[...]).tobytes()
    assert {type(v) for _, v in nnx.to_flat_state(rest)} == {nnx.RngCount, nnx.RngKey}


def test_batch_statistics(module: Any, model: obmlite.Model) -> None:
    found = model.weights["state"].restore()["norm"]["mean"][...]
    assert found.tobytes() == np.asarray(module.norm.mean[...]).tobytes()


def test_rngs(module: Any, model: obmlite.Model, tmp_path: pathlib.Path) -> None:
    found = model.weights["state"].restore()["dropout"]["rngs"]
    assert found["key"].tag == found["count"].tag == "default"
    assert found["count"][...] == 3
    rngs = nnx.Rngs(0, params=7)
    rngs.params()
    state = nnx.state(rngs)
    other = nnx.Rngs(1, params=1)
    nnx.update(other, saved(tmp_path, state).restore())
    assert (other.params() == rngs.params()).all()


def test_axes(model: obmlite.Model) -> None:
    flat = model.weights["state"].flat
    assert str(flat["layers.0.kernel"].spec.logical_axes) == "P(None, model)"
    assert flat["embed.embedding"].spec.logical_axes is None
    assert model.weights["state"].restore()["layers"][0]["kernel"].get_metadata("out_sharding") == (None, "model")


def test_shared_variables_are_there_once(module: Any, model: obmlite.Model) -> None:
    kernels = [name for name in model.weights["state"].flat if name.endswith("kernel")]
    assert kernels == ["layers.0.kernel"]
    other = Network(nnx.Rngs(9))
    nnx.update(other, model.weights["state"].restore())
    assert other.layers[0].kernel is other.layers[1].kernel


def test_a_module_takes_its_state_back(model: obmlite.Model, wanted: Any) -> None:
    other = Network(nnx.Rngs(9))
    other.eval()
    nnx.update(other, model.weights["state"].restore())
    assert np.asarray(nnx.jit(lambda m, words: m(words))(other, WORDS)).tobytes() == wanted.tobytes()


def test_a_split(module: Any, wanted: Any, tmp_path: pathlib.Path) -> None:
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def apply(params: Any, rest: Any, words: Any) -> Any:
        return nnx.merge(graphdef, params, rest)(words)

    made = loaded(tmp_path, obmlite.Model.from_function(apply, params, rest, WORDS, weights=(0, 1)))
    assert np.asarray(made(WORDS)).tobytes() == wanted.tobytes()
    merged = nnx.merge(graphdef, made.weights["params"].restore(), made.weights["rest"].restore())
    assert_same(nnx.state(merged), nnx.state(module))


def test_a_split_as_one_argument(module: Any, wanted: Any, tmp_path: pathlib.Path) -> None:
    made = obmlite.Model.from_function(lambda split, words: nnx.merge(*split)(words), nnx.split(module), WORDS)
    assert np.asarray(loaded(tmp_path, made)(WORDS)).tobytes() == wanted.tobytes()


def test_a_module_as_an_argument(module: Any, wanted: Any, tmp_path: pathlib.Path) -> None:
    made = loaded(tmp_path, obmlite.Model.from_function(lambda m, words: m(words), module, WORDS))
    assert np.asarray(made(WORDS)).tobytes() == wanted.tobytes()


def test_an_optimizer(pair: Any, tmp_path: pathlib.Path) -> None:
    state = nnx.state(pair[1])
    found = saved(tmp_path, pair[1]).restore()
    assert_same(found, state)
    assert {type(v) for _, v in nnx.to_flat_state(found)} == {type(v) for _, v in nnx.to_flat_state(state)}
    _, other = trained(0)
    nnx.update(other, found)
    assert_same(nnx.state(other), state)


def test_the_function_runs(model: obmlite.Model, wanted: Any) -> None:
    assert np.asarray(model(WORDS)).tobytes() == wanted.tobytes()
    assert str(model.signature) == "(words: i32[2,3]) -> f32[2,3,7]"


def test_the_function_takes_any_container(module: Any, model: obmlite.Model, wanted: Any) -> None:
    state = nnx.state(module)
    for given in (module, state, nnx.to_pure_dict(state), model.weights["state"].restore()):
        assert np.asarray(model.functions["apply"](given, WORDS)).tobytes() == wanted.tobytes()


def test_the_new_state(tmp_path: pathlib.Path) -> None:
    module, _ = trained()
    made = loaded(tmp_path, obmlite.Model.from_nnx(module, WORDS, mutable=True))
    result, state = made(WORDS)
    wanted = nnx.jit(lambda m, words: m(words))(module, WORDS)  # which changes the module
    assert_same((result, state), (wanted, nnx.state(module)))


def test_a_method(module: Any, tmp_path: pathlib.Path) -> None:
    made = loaded(tmp_path, obmlite.Model.from_nnx(module, WORDS, method="hidden", platforms="cpu"))
    assert list(made.functions) == ["hidden"]
    wanted = nnx.jit(lambda m, words: m.hidden(words))(module, WORDS)
    assert np.asarray(made(WORDS)).tobytes() == np.asarray(wanted).tobytes()


def test_variables_of_the_users_own(tmp_path: pathlib.Path) -> None:
    class Momentum(nnx.Variable):
        pass

    class Named(nnx.Variable):
        pass

    nnx.register_variable_name("named_for_a_test", Named)
    value = {"own": Momentum(jnp.ones(2)), "named": Named(jnp.ones(2), note="n", hook=print), "plain": jnp.ones(2)}
    for given in (nnx.State(value), value):
        found = saved(tmp_path, given).restore()
        assert type(found["own"]) is nnx.Variable
        assert type(found["named"]) is Named
        assert found["named"].note == "n"
        assert isinstance(found["plain"], jax.Array)


def test_without_flax(model: obmlite.Model, wanted: Any) -> None:
    arrays, facts = without_frameworks(pathlib.Path(model.path or ""), WORDS)
    assert arrays["model"].tobytes() == arrays["function"].tobytes() == wanted.tobytes()
    assert facts["trees"]["state"]["norm"] == dict.fromkeys(["bias", "mean", "scale", "var"], "ArrayImpl")
    assert facts["trees"]["state"]["layers"]["0"] == {"bias": "ArrayImpl", "kernel": "ArrayImpl"}
    assert facts["refused"] == ["flax"]


def test_an_unsupported_leaf(tmp_path: pathlib.Path) -> None:
    state = nnx.State({"layers": {0: {"note": nnx.Variable("text")}}})
    with pytest.raises(obmlite.LeafError, match="neither an array nor a number") as caught:
        obmlite.Weights({"model": state})
    assert caught.value.leaf == "model.layers.0.note"
    state = nnx.State({"layers": {0: {"note": nnx.Variable([jnp.ones(1), jnp.ones(2)])}}})
    with pytest.raises(obmlite.LeafError, match="container") as caught:
        obmlite.Weights({"model": state})
    assert caught.value.leaf == "model.layers.0.note"


def test_a_template_lists_all_differences(module: Any, model: obmlite.Model) -> None:
    weights = model.weights["state"]
    found = weights.restore(like=nnx.eval_shape(lambda: nnx.state(Network(nnx.Rngs(0)))))
    assert_same(nnx.to_pure_dict(found), nnx.to_pure_dict(nnx.state(module)))
    other = weights.restore(like=Network(nnx.Rngs(3)))
    assert type(other) is Network
    assert_same(nnx.state(other, nnx.Param), nnx.state(module, nnx.Param))
    wrong = nnx.to_pure_dict(nnx.state(module))
    del wrong["norm"]["mean"]
    wrong["embed"]["embedding"] = jnp.ones((8, 4))
    with pytest.raises(obmlite.RestoreError) as caught:
        weights.restore(like=wrong)
    assert "norm.mean" in str(caught.value)
    assert "embed.embedding" in str(caught.value)


def test_malformed_kinds(module: Any) -> None:
    leaves, tree = obmlite.tree.flatten(nnx.state(module))
    static = tree.static[0]
    for wrong in (
        None,
        {**static, "variables": static["variables"][1:]},
        {**static, "variables": [99] * len(leaves)},
        {**static, "kinds": [1]},
    ):
        tree.static[0] = wrong
        with pytest.raises(obmlite.CorruptPackageError, match="malformed"):
            tree.unflatten(leaves)
