"""Models: put together, called, loaded."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from obmlite.io.store import LocalDirectory
from obmlite.loading import open_manifest
from obmlite.schema.decode import decode
from obmlite.schema.encode import encode

PARAMS = {"w": np.linspace(-1, 1, 12, dtype="f4").reshape(4, 3), "b": np.arange(3, dtype="f4")}
X = np.linspace(0, 1, 8, dtype="f4").reshape(2, 4)


def apply(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["w"] + params["b"])


def two(variables: Any, ema: Any, x: Any, train: bool = False) -> Any:
    return apply(variables, x) + apply(ema, x)


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "model.obm"


def test_the_common_case(path: pathlib.Path) -> None:
    model = obmlite.Model.from_function(apply, PARAMS, jax.ShapeDtypeStruct((2, 4), "float32"))
    expected = np.asarray(jax.jit(apply)(PARAMS, X))
    np.testing.assert_array_equal(model(X), expected)
    model.save(path)
    loaded = obmlite.load(path)
    np.testing.assert_array_equal(loaded(X), expected)
    np.testing.assert_array_equal(loaded(x=X), expected)
    np.testing.assert_array_equal(loaded.pipelines["serving_default"](X), expected)
    np.testing.assert_array_equal(loaded.functions["apply"](PARAMS, X), expected)
    assert str(loaded.signature) == "(x: f32[2,4]) -> f32[2,3]"
    assert set(loaded.objects) == {"apply", "params"}
    assert loaded.objects["params"] is loaded.weights["params"]
    assert dict(loaded.supplementals) == {}


def test_repr(path: pathlib.Path) -> None:
    obmlite.Model.from_function(apply, PARAMS, obmlite.spec("f32[b,4]"), metadata={"license": "MIT"}).save(path)
    assert repr(obmlite.load(path)) == "\n".join(
        [
            f"Model at {path}",
            "  functions",
            "    apply(params: {b: f32[3], w: f32[4,3]}, x: f32[b,4]) -> f32[b,3]",
            "  weights",
            "    params: 2 leaves, 15 parameters, 60 B",
            "  pipelines",
            "    serving_default(x: f32[b,4]) -> f32[b,3]",
            "  metadata: license",
        ]
    )


def test_loading_reads_only_the_manifest(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    obmlite.Model.from_function(apply, PARAMS, obmlite.spec("f32[b,4]")).save(path)
    opened: list[str] = []
    original = LocalDirectory.open
    monkeypatch.setattr(LocalDirectory, "open", lambda self, name: (opened.append(name), original(self, name))[1])
    model = obmlite.load(path)
    repr(model), repr(model.weights["params"]), repr(model.functions["apply"])
    assert opened == ["manifest.obm"]
    model(X)
    assert [name.split("/")[0] for name in opened[1:]] == ["weights", "functions"]


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        ({"variables": "params", "ema": "average"}, {"variables": "params", "ema": "average"}),
        ((0, "ema"), {"variables": "variables", "ema": "ema"}),
        (("variables", "ema"), {"variables": "variables", "ema": "ema"}),
        (-2, {"ema": "ema"}),
        ("ema", {"ema": "ema"}),
        (None, {}),
    ],
)
def test_weights_by_position_name_and_mapping(weights: Any, names: dict[str, str], path: pathlib.Path) -> None:
    ema = {k: v * 0.5 for k, v in PARAMS.items()}
    model = obmlite.Model.from_function(two, PARAMS, ema, X, weights=weights)
    model.save(path)
    loaded = obmlite.load(path)
    assert {b.argument: b.weights for b in loaded.functions["two"].bindings} == names
    assert set(loaded.weights) == set(names.values())
    rest = [a for n, a in (("variables", PARAMS), ("ema", ema), ("x", X)) if n not in names]
    np.testing.assert_array_equal(loaded(*rest), jax.jit(two)(PARAMS, ema, X))


def test_keyword_static_and_named(path: pathlib.Path) -> None:
    def step(params: Any, x: Any, *, mask: Any, train: bool) -> Any:
        return apply(params, x) * mask if train else apply(params, x) * mask + 1

    mask = np.ones((2, 1), "f4")
    model = obmlite.Model.from_function(
        step, PARAMS, X, kwargs={"train": False, "mask": mask}, static="train", name="eval", platforms="cpu"
    )
    model.save(path)
    loaded = obmlite.load(path)
    np.testing.assert_array_equal(loaded(X, mask=mask), loaded(X, mask=mask, train=False))
    np.testing.assert_allclose(loaded(X, mask=mask), apply(PARAMS, X) + 1, rtol=1e-6)
    assert list(loaded.functions) == ["eval"]
    with pytest.raises(obmlite.ArgumentError, match="static"):
        loaded(X, mask=mask, train=True)


def test_the_general_case(path: pathlib.Path) -> None:
    model = obmlite.Model(
        {
            "apply": obmlite.export(apply, PARAMS, obmlite.spec("f32[b,4]"), metadata={"kind": "mlp"}),
            "first": obmlite.Weights(PARAMS, metadata={"steps": 7}),
            "second": obmlite.Weights({k: v * 2 for k, v in PARAMS.items()}),
        },
        pipelines={
            "one": obmlite.Pipeline(function="apply", weights={"params": "first"}, metadata={"note": "a"}),
            "two": obmlite.Pipeline(function="apply", weights={"params": "second"}),
            "bare": obmlite.Pipeline(function="apply"),
        },
        default_pipeline="two",
        metadata={"license": "Apache-2.0", "nested": {"list": [1, None, 2.5], "raw": b"\x00\x01"}},
    )
    model.save(path)
    loaded = obmlite.load(path)
    np.testing.assert_array_equal(loaded.pipelines["one"](X), jax.jit(apply)(PARAMS, X))
    np.testing.assert_array_equal(loaded(X), loaded.pipelines["two"](X))
    np.testing.assert_array_equal(loaded.pipelines["bare"](PARAMS, X), loaded.pipelines["one"](X))
    assert loaded.metadata == model.metadata
    assert loaded.functions["apply"].metadata == {"kind": "mlp"}
    assert loaded.weights["first"].metadata == {"steps": 7}
    assert loaded.pipelines["one"].metadata == {"note": "a"}


def test_no_default_pipeline(path: pathlib.Path) -> None:
    obmlite.Model({"params": obmlite.Weights(PARAMS)}).save(path)
    with pytest.raises(obmlite.ArgumentError, match="no default pipeline"):
        obmlite.load(path)(X)


def test_restore_gives_a_model_with_its_weights_in_place(path: pathlib.Path) -> None:
    obmlite.Model.from_function(apply, PARAMS, X).save(path)
    loaded = obmlite.load(path)
    restored = loaded.restore()
    np.testing.assert_array_equal(restored(X), loaded(X))
    assert "in memory" in repr(restored.weights["params"]["w"])
    assert isinstance(restored.weights["params"].restore()["w"], jax.Array)
    restored.save(path.with_name("again.obm"))
    assert _files(path) == _files(path.with_name("again.obm"))
    with pytest.raises(obmlite.ArgumentError) as caught:
        loaded.restore(dtype="bfloat16")(X)
    assert (caught.value.leaf, caught.value.expected, caught.value.found) == ("params.b", "f32[3]", "bf16[3]")


def _files(path: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_bound_weights_are_never_donated_and_restored_once(path: pathlib.Path) -> None:
    obmlite.Model.from_function(apply, PARAMS, X).save(path)
    loaded = obmlite.load(path)
    for _ in range(3):
        first = loaded(X)
    np.testing.assert_array_equal(first, jax.jit(apply)(PARAMS, X))
    assert loaded.pipelines["serving_default"] is loaded.pipeline


# --- models that do not fit together


@pytest.mark.parametrize(
    ("make", "facts"),
    [
        (
            lambda f, w: obmlite.Model({"f": f}, pipelines={"p": obmlite.Pipeline(function="g")}),
            {"object": "p", "found": "g"},
        ),
        (
            lambda f, w: obmlite.Model(
                {"f": f, "w": w}, pipelines={"p": obmlite.Pipeline(function="f", weights={"params": "v"})}
            ),
            {"object": "p", "found": "v"},
        ),
        (
            lambda f, w: obmlite.Model(
                {"f": f, "w": w}, pipelines={"p": obmlite.Pipeline(function="f", weights={"parameters": "w"})}
            ),
            {"object": "p", "leaf": "parameters"},
        ),
        (
            lambda f, w: obmlite.Model(
                {"f": f, "w": obmlite.Weights({"w": PARAMS["w"]})},
                pipelines={"p": obmlite.Pipeline(function="f", weights={"params": "w"})},
            ),
            {"object": "p", "leaf": "params.b", "expected": "f32[3]", "found": "no such leaf"},
        ),
        (lambda f, w: obmlite.Model({"f": f}, default_pipeline="p"), {"object": "p"}),
        (lambda f, w: obmlite.Model({"f": PARAMS}), {"object": "f"}),
        (lambda f, w: obmlite.Model({"": f}), {}),
    ],
)
def test_what_does_not_fit_is_refused_when_made(make: Any, facts: dict[str, str]) -> None:
    function = obmlite.export(apply, PARAMS, X, platforms="cpu")
    with pytest.raises(obmlite.ArgumentError) as caught:
        make(function, obmlite.Weights(PARAMS))
    for name, value in facts.items():
        assert getattr(caught.value, name) == value


def test_from_function_refusals() -> None:
    with pytest.raises(obmlite.LeafError) as caught:
        obmlite.Model.from_function(apply, jax.eval_shape(lambda: PARAMS), X)
    assert (caught.value.object, caught.value.leaf) == ("params", "b")
    with pytest.raises(obmlite.ExportError) as failed:
        obmlite.Model.from_function(apply, PARAMS, X, weights=5)
    assert failed.value.field == "weights"
    with pytest.raises(obmlite.ExportError, match="one name"):
        obmlite.Model.from_function(apply, PARAMS, X, name="params")
    with pytest.raises(obmlite.ExportError) as failed:
        obmlite.Model.from_function(apply, PARAMS, X, weights="parameters")
    assert failed.value.field == "weights"
    with pytest.raises(obmlite.LeafError):
        obmlite.Model.from_function(apply, PARAMS, X, metadata={"when": object()})


# --- packages of other versions


def rewrite(path: pathlib.Path, change: Any) -> None:
    manifest = decode(open_manifest(LocalDirectory(path)))
    (path / "manifest.obm").write_bytes(encode(change(manifest)))


def test_an_unknown_feature_of_one_object_leaves_the_others(path: pathlib.Path) -> None:
    obmlite.Model(
        {
            "apply": obmlite.export(apply, PARAMS, X),
            "params": obmlite.Weights(PARAMS),
            "odd": obmlite.Weights({"v": np.ones(2, "f4")}),
        },
        pipelines={"p": obmlite.Pipeline(function="apply", weights={"params": "params"})},
    ).save(path)

    def require(manifest: Any) -> Any:
        odd = dataclasses.replace(manifest.weights["odd"], required=("quantized",))
        return dataclasses.replace(manifest, weights={**manifest.weights, "odd": odd})

    rewrite(path, require)
    model = obmlite.load(path)
    np.testing.assert_array_equal(model(X), jax.jit(apply)(PARAMS, X))
    with pytest.raises(obmlite.UnsupportedFormatError) as caught:
        model.weights["odd"]
    assert (caught.value.object, caught.value.found) == ("odd", "quantized")
    assert "odd: This needs features" in repr(model)


def test_an_unknown_feature_of_the_package(path: pathlib.Path) -> None:
    obmlite.Model({"params": obmlite.Weights(PARAMS)}).save(path)
    rewrite(path, lambda manifest: dataclasses.replace(manifest, required=("encrypted",)))
    with pytest.raises(obmlite.UnsupportedFormatError) as caught:
        obmlite.load(path)
    assert caught.value.found == "encrypted"
    assert caught.value.package == str(path)


def test_a_future_format_names_the_obmlite_that_reads_it(path: pathlib.Path) -> None:
    obmlite.Model({"params": obmlite.Weights(PARAMS)}).save(path)
    rewrite(path, lambda manifest: dataclasses.replace(manifest, format=(2, 0), reader="obmlite 3.1 or later"))
    with pytest.raises(obmlite.UnsupportedFormatError, match=r"obmlite 3\.1 or later") as caught:
        obmlite.load(path)
    assert caught.value.field == "format_major"


@pytest.mark.parametrize("kind", ["missing", "empty directory", "file"])
def test_what_is_no_package(kind: str, path: pathlib.Path) -> None:
    if kind == "empty directory":
        path.mkdir()
    elif kind == "file":
        path.write_text("hello")
    with pytest.raises(obmlite.PackageNotFoundError) as caught:
        obmlite.load(path)
    assert isinstance(caught.value, FileNotFoundError)
    assert caught.value.package == str(path)
