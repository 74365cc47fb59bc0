"""How adapters are found: when a class or a name of theirs is met, and never because of what else a package says."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import obmlite
from obmlite import tree as trees
from obmlite.tree import nodes
from tests.frameworks.helper import ROOT

flax_core = pytest.importorskip("flax.core")

FRESH = """
import sys
import jax, numpy as np, obmlite
FRAMEWORKS = {"flax", "optax", "haiku", "equinox", "objax"}
there = lambda: sorted(FRAMEWORKS & set(sys.modules))
ours = lambda: sorted(m for m in sys.modules if m.startswith("obmlite.frameworks.") and m[19:] in
                      ("linen", "nnx", "haiku", "objax", "equinox", "optax"))
assert not there() and not ours(), (there(), ours())
obmlite.Weights({"a": np.ones(2), "b": [1.0, None, jax.numpy.ones(3)]})
model = obmlite.load(sys.argv[1])
model.weights["weights"].flat, repr(model.weights["weights"])
np.asarray(model.weights["weights"]["x"]["w"])
assert not there() and not ours(), (there(), ours())
found = model.weights["weights"].restore()
print(type(found).__name__, there(), ours())
"""


def test_nothing_is_imported_before_it_is_needed(tmp_path: pathlib.Path) -> None:
    value = flax_core.freeze({"x": {"w": np.ones(2, np.float32)}})
    obmlite.Model({"weights": obmlite.Weights(value)}).save(tmp_path / "m.obm")
    environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "m.obm")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    name, _, rest = done.stdout.strip().partition(" ")
    assert name == "FrozenDict"
    assert "'flax'" in rest
    assert "obmlite.frameworks.linen" in rest
    assert not any(other in rest for other in ("haiku", "equinox", "objax"))


@pytest.mark.parametrize(
    "name",
    ["flax.core.frozen_dict.FrozenDict", "flax.linen.Module", "flax.nnx.Module", "optax.adam", "equinox.nn.State",
     "haiku.Transformed", "objax.Module", "flax.core", "os.path", "flaxes.core.FrozenDict", ""],
)  # fmt: skip
def test_names_that_are_on_no_list(name: str) -> None:
    tree = trees.Tree([9, 1], [1, 0], [1, 2], [None, "command"], {0: name})
    assert tree.unflatten([1.0]) == {"command": 1.0}


def test_the_users_own_registration_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "by_class", {})
    monkeypatch.setattr(nodes, "by_name", {})
    value = flax_core.freeze({"a": 1.0})
    assert trees.flatten(value)[1].classes == {0: "flax.core.FrozenDict"}
    try:
        obmlite.register_node(flax_core.FrozenDict, "mine", unflatten=lambda _, children: ("mine", children))
        leaves, tree = trees.flatten(value)
        assert tree.classes == {0: "mine"}
        assert tree.unflatten(leaves) == ("mine", {"a": 1.0})
    finally:
        for cached in (nodes._adapted, nodes.of_name, nodes._is_foreign):
            cached.cache_clear()


def test_a_leaf_within_is_named_from_the_top() -> None:
    with pytest.raises(obmlite.LeafError) as caught:
        trees.flatten({"x": [flax_core.freeze({"a": {1.5: 1}})]})
    assert caught.value.leaf == r"x.0.a.1\.5"


def test_plain() -> None:
    value: Any = {"x": [flax_core.freeze({"a": {"b": 1}})], "y": (1, None)}
    assert trees.plain(value) == {"x": [{"a": {"b": 1}}], "y": (1, None)}


class Callable:
    """Neither a module nor uncallable."""

    def __call__(self, x: Any) -> Any:
        return x


@pytest.mark.parametrize(
    ("framework", "module", "lacks"),
    [
        ("linen", 1, "apply"),
        ("linen", Callable(), "apply"),
        ("nnx", 1, "__call__"),
        ("haiku", Callable(), "apply"),
        ("equinox", 1, "__call__"),
    ],
)
def test_what_is_no_module_is_refused_by_name(framework: str, module: Any, lacks: str) -> None:
    pytest.importorskip("flax" if framework in ("linen", "nnx") else framework)
    with pytest.raises(obmlite.ArgumentError) as caught:
        getattr(obmlite.Model, f"from_{framework}")(module, {}, np.ones(3))
    assert lacks in str(caught.value.expected)
    assert caught.value.found == type(module).__name__


def test_a_class_and_a_method_that_is_not_there_are_refused() -> None:
    from flax import linen

    with pytest.raises(obmlite.ArgumentError, match="A class is given") as caught:
        obmlite.Model.from_linen(linen.Dense, {}, np.ones(3))
    assert caught.value.found == "Dense"
    with pytest.raises(obmlite.ArgumentError, match="without a method 'nope'"):
        obmlite.Model.from_linen(linen.Dense(3), {}, np.ones(3), method="nope")
