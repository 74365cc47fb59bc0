"""safejax's interface for Objax. Runs where JAX still has what Objax uses, which 0.9.2 has."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import obmlite
from obmlite.interop import safejax
from obmlite.io import safetensors as headers

objax = pytest.importorskip("objax", exc_type=ImportError)

from obmlite.interop.safejax.objax import deserialize, deserialize_with_assignment, serialize  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:jax.sharding.PmapSharding:DeprecationWarning")  # Objax' own

X = np.ones((2, 3), np.float32)


class Network(objax.Module):
    def __init__(self) -> None:
        self.linear = objax.nn.Linear(3, 4)
        self.norm = objax.nn.BatchNorm0D(4)
        self.dropout = objax.nn.Dropout(0.5, generator=objax.random.Generator(1))

    def __call__(self, x: Any) -> Any:
        return self.norm(self.linear(x), training=False)


@pytest.fixture
def module() -> Any:
    made = Network()
    made.dropout(jnp.ones(3), training=True)  # the generator makes its state when it is first used
    return made


def names_of(data: bytes) -> set[str]:
    return set(headers.parse_header(data[: headers.header_size(data[:8], len(data))], len(data)).entries)


def same_variables(found: Any, wanted: Any) -> None:
    assert type(found) is objax.VarCollection
    assert list(found.keys()) == list(wanted.keys())
    for name, variable in wanted.items():
        assert type(found[name]) is type(variable)
        assert found[name]._reduce is variable._reduce
        assert isinstance(found[name].value, jax.Array)
        assert np.asarray(found[name].value).tobytes() == np.asarray(variable.value).tobytes()


def cleared(module: Any) -> Any:
    variables = module.vars()
    variables.assign([jnp.zeros(x.shape, x.dtype) for x in variables.tensors()])
    return variables


@pytest.mark.parametrize("place", ["bytes", "file"])
def test_a_collection(module: Any, place: str, tmp_path: pathlib.Path) -> None:
    variables = module.vars()
    given = serialize(params=variables, filename=tmp_path / "a" if place == "file" else None)
    data = given if place == "bytes" else given.read_bytes()
    # As safejax named them.
    assert names_of(data) == {f"{name}::{type(variable).__name__}" for name, variable in variables.items()}
    assert "(Network).linear(Linear).w::TrainVar" in names_of(data)
    assert any(name.endswith("::RandomState") for name in names_of(data))
    same_variables(deserialize(path_or_buf=given), variables)
    same_variables(safejax.deserialize(given, to_var_collection=True), variables)
    found, metadata = deserialize(serialize(variables, {"a": "b"}))
    same_variables(found, variables)
    assert metadata == {"a": "b"}


def test_files_that_safejax_wrote(module: Any, tmp_path: pathlib.Path) -> None:
    """safejax installs nowhere today, so its layout is made by hand: names with their types, and nothing else."""
    variables = module.vars()
    arrays = {f"{name}::{type(v).__name__}": np.asarray(v.value) for name, v in variables.items()}
    data = safetensors.numpy.save(arrays)
    found = deserialize(data)
    same_variables(objax.VarCollection({name: found[name] for name in variables.keys()}), variables)  # noqa: SIM118 - they iterate over variables
    with pytest.warns(UserWarning, match="types"):
        assert safejax.deserialize(data)["(Network)"]["linear(Linear)"]["w"].shape == (3, 4)
    path = tmp_path / "a"
    path.write_bytes(data)
    wanted = module(X)
    deserialize_with_assignment(path, cleared(module))
    assert (module(X) == wanted).all()


def test_without_types(module: Any) -> None:
    """The documented use that assigns one value after the other, which wants arrays."""
    variables = module.vars()
    wanted = module(X)
    data = safejax.serialize(params=variables)
    assert names_of(data) == set(variables.keys())
    with pytest.warns(UserWarning, match="VarCollection"):
        decoded = safejax.deserialize(data, requires_unflattening=False, to_var_collection=True)
    assert decoded.keys() == safejax.deserialize(data, requires_unflattening=False).keys() == variables.keys()
    cleared(module)
    for key, value in decoded.items():
        if key in module.vars():
            module.vars()[key].assign(value)
    assert (module(X) == wanted).all()
    assert safejax.deserialize(data)["(Network)"]["linear(Linear)"]["b"].shape == (4,)


def test_sharing_and_references(module: Any) -> None:
    """What names alone don't tell: safejax's reader failed on these."""
    optimizer = objax.optimizer.Momentum(module.vars())
    variables = module.vars() + optimizer.vars() + objax.VarCollection({"tied": module.linear.w})
    found = deserialize(serialize(variables))
    same_variables(found, variables)
    assert found["tied"] is found["(Network).linear(Linear).w"]
    reference = next(name for name, v in variables.items() if isinstance(v, objax.TrainRef))
    referent = next(name for name, v in variables.items() if v is variables[reference].ref)
    assert found[reference].ref is found[referent]


def test_variables_in_dicts(module: Any) -> None:
    variables = module.vars()
    assert serialize(dict(variables)) == serialize(variables)
    nested = {"a": {"w": module.linear.w, "x": X}}
    assert names_of(serialize(nested)) == {"a.w::TrainVar", "a.x"}
    for data in (serialize(nested), safejax.serialize(nested)):
        found = safejax.deserialize(data)
        assert (found["a"]["w"] == module.linear.w.value).all()
        assert (found["a"]["x"] == X).all()
    within = safejax.deserialize(serialize({"model": variables}))
    same_variables(within["model"], variables)


def test_unknown_types_are_part_of_a_name() -> None:
    data = safetensors.numpy.save({"a::Other": X})
    with pytest.warns(UserWarning, match="VarCollection"):
        assert set(deserialize(data)) == {"a::Other"}


@pytest.mark.parametrize("typed", [True, False])
def test_assignment(module: Any, typed: bool, tmp_path: pathlib.Path) -> None:
    wanted = module(X)
    path = serialize(params=module.vars(), filename=str(tmp_path / "a"), include_objax_variables=typed)
    variables = cleared(module)
    assert not (module(X) == wanted).all()
    assert deserialize_with_assignment(filename=path, model_vars=variables) is None
    assert (module(X) == wanted).all()


def test_assignment_lists_all_differences(module: Any, tmp_path: pathlib.Path) -> None:
    variables = module.vars()
    wrong = {f"{name}::TrainVar": np.asarray(v.value) for name, v in variables.items()}
    wrong["(Network).linear(Linear).w::TrainVar"] = X
    wrong["(Network).linear(Linear).b::TrainVar"] = np.ones((4,), np.float16)
    wrong["new"] = wrong.pop("(Network).norm(BatchNorm0D).beta::TrainVar")
    path = tmp_path / "a"
    safetensors.numpy.save_file(wrong, path)
    before = variables.tensors()
    with pytest.raises(obmlite.RestoreError) as caught:
        deserialize_with_assignment(path, variables)
    for part in ("new is only in", "beta is not in", "float32[2, 3] in", "float16[4] in"):
        assert part in str(caught.value.found)
    assert all(a is b for a, b in zip(variables.tensors(), before, strict=True))


def test_assignment_of_something_else(module: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(obmlite.ArgumentError) as caught:
        deserialize_with_assignment(tmp_path / "a", {})
    assert caught.value.field == "model_vars"
    with pytest.raises(ValueError):  # as safejax
        deserialize_with_assignment(b"", module.vars())  # type: ignore[arg-type]
    path = tmp_path / "a"
    safetensors.numpy.save_file({"a": X, "a::TrainVar": X}, path)
    with pytest.raises(obmlite.RestoreError, match="one variable"):
        deserialize_with_assignment(path, module.vars())
