"""Flax Linen: variables, boxes, and modules."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from tests.frameworks.helper import assert_same, loaded, saved, without_frameworks

flax = pytest.importorskip("flax")
optax = pytest.importorskip("optax")
nn = pytest.importorskip("flax.linen")

WORDS = np.array([[1, 2, 3], [4, 5, 6]], np.int32)


class Network(nn.Module):
    """Words to the logits of words, the embedding shared with the output."""

    @nn.compact
    def __call__(self, words: Any, train: bool) -> Any:
        embed = nn.Embed(7, 4, name="embed")
        split = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        y = nn.Dense(4, kernel_init=split, name="dense")(embed(words))
        y = nn.BatchNorm(use_running_average=not train, name="norm")(y)
        y = nn.Dropout(0.1, deterministic=not train)(nn.relu(y))
        logical = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        return embed.attend(nn.Dense(4, kernel_init=logical, name="out")(y))

    def twice(self, x: Any) -> Any:
        return 2 * x


@pytest.fixture(scope="module")
def module() -> Any:
    return Network()


@pytest.fixture(scope="module")
def variables(module: Any) -> Any:
    """A dict of variables, some of them boxed, after some steps of training."""
    made = module.init(jax.random.key(0), WORDS, train=False)
    optimizer = optax.adam(0.1)
    state = optimizer.init(made["params"])

    @jax.jit
    def step(variables: Any, state: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            given = {**variables, "params": params}
            logits, new = module.apply(given, WORDS, train=True, mutable=["batch_stats"], rngs={"dropout": key})
            return jnp.mean((logits - jax.nn.one_hot(WORDS, 7)) ** 2), new

        gradient, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradient, state)
        return {"params": optax.apply_updates(variables["params"], updates), **new}, state

    for n in range(3):
        made, state = step(made, state, jax.random.key(n))
    assert np.asarray(made["batch_stats"]["norm"]["mean"]).all()
    return made


@pytest.fixture(scope="module")
def wanted(module: Any, variables: Any) -> Any:
    return np.asarray(jax.jit(lambda v, words: module.apply(v, words, train=False))(variables, WORDS))


@pytest.fixture(scope="module")
def model(module: Any, variables: Any, tmp_path_factory: pytest.TempPathFactory) -> obmlite.Model:
    return loaded(tmp_path_factory.mktemp("linen"), obmlite.Model.from_linen(module, variables, WORDS, train=False))


def test_params(variables: Any, model: obmlite.Model) -> None:
    found = model.weights["variables"].restore()
    assert_same(found["params"], variables["params"])
    assert "params.dense.kernel.value" in model.weights["variables"].flat


def test_batch_statistics(variables: Any, model: obmlite.Model) -> None:
    found = model.weights["variables"].restore()
    assert_same(found, variables)
    assert type(found) is dict
    assert set(found) == {"params", "batch_stats"}


def test_every_collection(tmp_path: pathlib.Path) -> None:
    value = {"params": {"w": jnp.ones(2)}, "cache": {"index": jnp.int32(3)}, "intermediates": {"y": (jnp.zeros(2),)}}
    assert_same(saved(tmp_path, value).restore(), value)


def test_a_shared_embedding_is_there_once(model: obmlite.Model) -> None:
    assert [n for n, leaf in model.weights["variables"].flat.items() if leaf.shape == (7, 4)] == [
        "params.embed.embedding"
    ]


def test_tied_leaves_stay_tied(variables: Any, tmp_path: pathlib.Path) -> None:
    params = variables["params"]
    tied = flax.core.freeze({"params": {**params, "head": params["embed"]}})
    found = saved(tmp_path, tied).restore()
    assert found["params"]["head"]["embedding"] is found["params"]["embed"]["embedding"]


def test_frozen_dicts_come_back(variables: Any, tmp_path: pathlib.Path) -> None:
    for value in (flax.core.freeze(variables), {"a": [flax.core.freeze({"b": jnp.ones(2)})]}, flax.core.freeze({})):
        found = saved(tmp_path, value).restore()
        assert_same(found, value)
    assert type(found) is flax.core.FrozenDict


def test_boxes_come_back_with_their_axes(variables: Any, model: obmlite.Model) -> None:
    kernel = model.weights["variables"].restore()["params"]["dense"]["kernel"]
    assert type(kernel) is nn.Partitioned
    assert kernel.names == (None, "model")
    out = model.weights["variables"].restore()["params"]["out"]["kernel"]
    assert type(out) is nn.LogicallyPartitioned
    assert out.names == ("embed", "mlp")
    flat = model.weights["variables"].flat
    assert str(flat["params.dense.kernel.value"].spec.logical_axes) == "P(None, model)"
    assert str(flat["params.out.kernel.value"].spec.logical_axes) == "P(embed, mlp)"
    assert flat["params.dense.bias"].spec.logical_axes is None


def test_the_function_runs(model: obmlite.Model, wanted: Any) -> None:
    assert str(model.functions["apply"].signature).startswith("(variables: {…9 leaves}, words: i32[2,3])")
    assert np.asarray(model(WORDS)).tobytes() == wanted.tobytes()
    assert np.asarray(model(WORDS, train=False)).tobytes() == wanted.tobytes()
    with pytest.raises(obmlite.ArgumentError, match="train"):
        model(WORDS, train=True)


def test_the_function_takes_any_container(variables: Any, model: obmlite.Model, wanted: Any) -> None:
    plain = jax.tree.map(np.asarray, {c: obmlite.tree.plain(v) for c, v in variables.items()})
    for given in (variables, flax.core.freeze(variables), plain, model.weights["variables"].restore()):
        assert np.asarray(model.functions["apply"](given, WORDS)).tobytes() == wanted.tobytes()


def test_mutable_collections(module: Any, variables: Any, tmp_path: pathlib.Path) -> None:
    key = jax.random.key(5)
    made = obmlite.Model.from_linen(
        module, flax.core.freeze(variables), WORDS, mutable=["batch_stats"], rngs={"dropout": key}, train=True
    )
    found, new = loaded(tmp_path, made)(WORDS, rngs={"dropout": key})
    call = jax.jit(lambda v, w, k: module.apply(v, w, train=True, mutable=["batch_stats"], rngs={"dropout": k}))
    assert_same((found, new), call(variables, WORDS, key))


@pytest.mark.parametrize("method", ["twice", Network.twice, lambda module, x: module.twice(x)])
def test_a_method(module: Any, variables: Any, method: Any) -> None:
    model = obmlite.Model.from_linen(module, variables, obmlite.spec("f32[b]"), method=method, platforms="cpu")
    assert list(model.functions) == ["twice" if getattr(method, "__name__", method) == "twice" else "apply"]
    assert model.signature.arguments == ("x",)
    assert model(np.ones(3, np.float32)).tolist() == [2, 2, 2]


def test_without_flax(model: obmlite.Model, wanted: Any) -> None:
    arrays, facts = without_frameworks(pathlib.Path(model.path or ""), WORDS)
    assert arrays["model"].tobytes() == arrays["function"].tobytes() == wanted.tobytes()
    dense = facts["trees"]["variables"]["params"]["dense"]
    assert dense == {"bias": "ArrayImpl", "kernel": {"value": "ArrayImpl"}}
    assert facts["refused"] == ["flax"]


def test_frozen_dicts_are_dicts_without_flax(variables: Any, tmp_path: pathlib.Path) -> None:
    saved(tmp_path, flax.core.freeze(variables))
    _, facts = without_frameworks(tmp_path / "weights.obm")
    assert set(facts["trees"]["weights"]) == {"params", "batch_stats"}


def test_an_unsupported_leaf(module: Any, variables: Any) -> None:
    wrong = flax.core.freeze({**variables, "notes": {"author": "someone"}})
    with pytest.raises(obmlite.LeafError, match="neither an array nor a number") as caught:
        obmlite.Model.from_linen(module, wrong, WORDS, train=False)
    assert caught.value.leaf == "notes.author"


def test_a_template_lists_all_differences(variables: Any, model: obmlite.Model) -> None:
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), flax.core.freeze(variables))
    found = model.weights["variables"].restore(like=template)
    assert_same(found, flax.core.freeze(variables))
    wrong = flax.core.unfreeze(template)
    del wrong["batch_stats"]["norm"]["mean"]
    wrong["params"]["norm"]["scale"] = jax.ShapeDtypeStruct((5,), np.float32)
    with pytest.raises(obmlite.RestoreError) as caught:
        model.weights["variables"].restore(like=wrong)
    assert "batch_stats.norm.mean" in str(caught.value)
    assert "params.norm.scale" in str(caught.value)


def test_malformed_boxes() -> None:
    leaves, tree = obmlite.tree.flatten(nn.Partitioned(jnp.ones((2, 2)), (None, "model")))
    for wrong in (None, {}, [1]):
        tree.static[0] = wrong
        with pytest.raises(obmlite.CorruptPackageError, match="malformed"):
            tree.unflatten(leaves)
    tree = obmlite.tree.Tree([9, 1], [1, 0], [1, 5], [None, 0], {0: "flax.core.FrozenDict"})
    with pytest.raises(obmlite.CorruptPackageError, match="malformed"):
        tree.unflatten(leaves)
