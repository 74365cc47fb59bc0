"""Objax: collections of variables, and modules. Runs where JAX still has what Objax uses, which 0.9.2 has."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from tests.frameworks.helper import loaded, saved, without_frameworks

objax = pytest.importorskip("objax", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings("ignore:jax.sharding.PmapSharding:DeprecationWarning")  # Objax' own

MEAN = objax.TrainVar(jnp.ones(1))._reduce
WORDS = np.array([1, 2, 3], np.int32)


class Network(objax.Module):
    """Words to the logits of words, the embedding shared with the output."""

    def __init__(self, seed: int = 0) -> None:
        generator = objax.random.Generator(seed)
        self.embed = objax.TrainVar(objax.random.normal((7, 4), generator=generator))
        self.head = self.embed
        self.linear = objax.nn.Linear(4, 4)
        self.norm = objax.nn.BatchNorm0D(4)
        self.dropout = objax.nn.Dropout(0.9, generator=generator)

    def __call__(self, words: Any, training: bool) -> Any:
        y = self.norm(self.linear(self.embed.value[words]), training)
        return self.dropout(objax.functional.relu(y), training) @ self.head.value.T


@pytest.fixture(scope="module")
def trained() -> Any:
    """A module and its optimizer after some steps."""
    module = Network()
    optimizer = objax.optimizer.Adam(module.vars())

    def loss(words: Any) -> Any:
        return ((module(words, training=True) - jax.nn.one_hot(words, 7)) ** 2).mean()

    gradients = objax.GradValues(loss, module.vars())

    @objax.Function.with_vars(module.vars() + optimizer.vars() + gradients.vars())
    def step(words: Any) -> None:
        found, _ = gradients(words)
        optimizer(0.1, found)

    jitted = objax.Jit(step)
    for _ in range(3):
        jitted(WORDS)
    assert np.asarray(module.norm.running_mean.value).all()
    return module, optimizer


@pytest.fixture(scope="module")
def module(trained: Any) -> Any:
    return trained[0]


def native(module: Any) -> np.ndarray:
    return np.asarray(objax.Jit(lambda words: module(words, training=False), module.vars())(WORDS))


@pytest.fixture(scope="module")
def wanted(module: Any) -> np.ndarray:
    return native(module)


@pytest.fixture(scope="module")
def model(module: Any, tmp_path_factory: pytest.TempPathFactory) -> obmlite.Model:
    return loaded(tmp_path_factory.mktemp("objax"), obmlite.Model.from_objax(module, WORDS, training=False))


def assert_same(found: Any, wanted: Any) -> None:
    assert type(found) is objax.VarCollection
    assert list(found.keys()) == list(wanted.keys())
    for name, variable in wanted.items():
        own = found[name]
        assert type(own) is type(variable), name
        assert own._reduce is (variable._reduce if variable._reduce is MEAN else None), name
        assert np.asarray(own.value).tobytes() == np.asarray(variable.value).tobytes(), name
    shared = [[a is b for b in wanted.values()] for a in wanted.values()]
    assert [[a is b for b in found.values()] for a in found.values()] == shared


def test_variables(module: Any, model: obmlite.Model) -> None:
    assert_same(model.weights["variables"].restore(), module.vars())
    assert model.weights["variables"]["(Network).linear(Linear).w"].shape == (4, 4)


def test_state(module: Any, model: obmlite.Model) -> None:
    found = model.weights["variables"].restore()
    assert list(found.subset(is_a=objax.StateVar).keys()) == list(module.vars().subset(is_a=objax.StateVar).keys())
    assert type(found["(Network).norm(BatchNorm0D).running_mean"]) is objax.StateVar
    assert type(found["(Network).dropout(Dropout).keygen(Generator)._key"]) is objax.RandomState


def test_an_optimizer(trained: Any, tmp_path: pathlib.Path) -> None:
    module, optimizer = trained
    variables = module.vars() + optimizer.vars()
    found = saved(tmp_path, variables).restore()
    assert_same(found, variables)
    references = [(name, v) for name, v in found.items() if isinstance(v, objax.TrainRef)]
    assert len(references) == 5
    restored = {id(variable): found[name] for name, variable in variables.items()}
    for name, reference in references:
        assert reference.ref is restored[id(variables[name].ref)]
    alone = saved(tmp_path, optimizer.vars()).restore()
    assert_same(alone, optimizer.vars())


def test_tied_leaves_stay_tied(model: obmlite.Model) -> None:
    found = model.weights["variables"].restore()
    assert found["(Network).embed"] is found["(Network).head"]
    names = [name for name, leaf in model.weights["variables"].flat.items() if leaf.shape == (7, 4)]
    assert len(names) == 2
    assert model.weights["variables"].num_parameters == 28 + 16 + 4 + 4 * 4 + 2


def test_assignment_into_a_module(model: obmlite.Model, wanted: Any) -> None:
    other = Network(5)
    assert native(other).tobytes() != wanted.tobytes()
    variables = other.vars()
    variables.assign(model.weights["variables"].restore(like=variables).tensors())
    assert native(other).tobytes() == wanted.tobytes()
    assert other.head is other.embed


def test_the_function_runs(module: Any, model: obmlite.Model, wanted: Any) -> None:
    assert np.asarray(model(WORDS)).tobytes() == wanted.tobytes()
    assert str(model.signature) == "(words: i32[3]) -> f32[3,7]"
    assert native(module).tobytes() == wanted.tobytes()  # exporting left the module as it was


def test_the_function_takes_any_container(module: Any, model: obmlite.Model, wanted: Any) -> None:
    variables = module.vars()
    plain = {name: variable.value for name, variable in variables.items()}
    for given in (variables, plain, model.weights["variables"].restore()):
        assert np.asarray(model.functions["apply"](given, WORDS)).tobytes() == wanted.tobytes()


def test_a_collection_as_an_argument(module: Any, tmp_path: pathlib.Path) -> None:
    def apply(variables: Any, x: Any) -> Any:
        return x @ variables["(Network).embed"].value.T

    x = np.ones((2, 4), np.float32)
    made = loaded(tmp_path, obmlite.Model.from_function(apply, module.vars(), x))
    assert np.asarray(made(x)).tobytes() == np.asarray(jax.jit(lambda w, x: x @ w.T)(module.embed.value, x)).tobytes()


def test_the_new_values(trained: Any, tmp_path: pathlib.Path) -> None:
    module = Network(3)
    made = loaded(tmp_path, obmlite.Model.from_objax(module, WORDS, mutable=True, training=True))
    result, values = made(WORDS)
    wanted = objax.Jit(lambda words: module(words, training=True), module.vars())(WORDS)  # which changes the module
    assert np.asarray(result).tobytes() == np.asarray(wanted).tobytes()
    for name, variable in module.vars().items():
        assert np.asarray(values[name]).tobytes() == np.asarray(variable.value).tobytes(), name


def test_a_reduction_of_the_users_own_is_left_out(tmp_path: pathlib.Path) -> None:
    value = objax.VarCollection({"a": objax.StateVar(jnp.ones(2), lambda x: x[0]), "b": objax.StateVar(jnp.ones(2))})
    found = saved(tmp_path, value).restore()
    assert found["a"]._reduce is None
    assert found["b"]._reduce is value["b"]._reduce


def test_without_objax(model: obmlite.Model, wanted: Any) -> None:
    arrays, facts = without_frameworks(pathlib.Path(model.path or ""), WORDS)
    assert arrays["model"].tobytes() == arrays["function"].tobytes() == wanted.tobytes()
    assert facts["trees"]["variables"]["(Network).embed"] == "ArrayImpl"
    assert facts["ties"]["variables"] == [[r"(Network)\.embed", r"(Network)\.head"]]
    assert facts["refused"] == ["objax"]


def test_an_unsupported_leaf() -> None:
    value = objax.VarCollection({"a": objax.TrainVar(np.array(["text"]))})
    with pytest.raises(obmlite.LeafError) as caught:
        obmlite.Weights({"variables": value})
    assert caught.value.leaf == "variables.a"


def test_a_template_lists_all_differences(module: Any, model: obmlite.Model) -> None:
    wrong = objax.VarCollection({n: v for n, v in module.vars().items() if "beta" not in n and "embed" not in n})
    wrong["(Network).embed"] = objax.TrainVar(jnp.ones((8, 4)))
    with pytest.raises(obmlite.RestoreError) as caught:
        model.weights["variables"].restore(like=wrong)
    assert "beta" in str(caught.value)
    assert "embed" in str(caught.value)


def test_malformed_kinds(module: Any) -> None:
    leaves, tree = obmlite.tree.flatten(module.vars())
    static = tree.static[0]
    for wrong in (
        None,
        {**static, "names": [99] * len(leaves)},
        {**static, "variables": [("TrainRef", None, 0)] * len(leaves)},
    ):
        tree.static[0] = wrong
        with pytest.raises(obmlite.CorruptPackageError, match="malformed"):
            tree.unflatten(leaves)
