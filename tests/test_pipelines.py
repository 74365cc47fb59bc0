"""Pipelines: steps put together, checked against one another, saved, loaded, and run as one program."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from obmlite import Pipeline, Step, Weights, spec
from obmlite.pipeline import HOST_STEPS, HostStep, register_host_step
from obmlite.signature import Signature

PARAMS = {"w": np.linspace(-1, 1, 12, dtype="f4").reshape(4, 3)}
STATS = {"mean": np.float32(3.0), "scale": np.float32(0.5)}
X = np.arange(8, dtype="u1").reshape(2, 4)


def normalise(stats: Any, image: Any) -> Any:
    return (image.astype(jnp.float32) - stats["mean"]) * stats["scale"]


def apply(params: Any, x: Any) -> Any:
    return x @ params["w"]


def label(logits: Any) -> Any:
    return {"label": jnp.argmax(logits, -1), "probability": jax.nn.softmax(logits).max(-1)}


def by_hand(stats: Any, params: Any, image: Any) -> Any:
    return label(apply(params, normalise(stats, image)))


def objects(**others: Any) -> dict[str, Any]:
    return {
        "pre": obmlite.export(normalise, STATS, spec("u8[n,4]")).bound_to({"stats": "stats"}),
        "apply": obmlite.export(apply, PARAMS, spec("f32[b,4]")),
        "post": obmlite.export(label, spec("f32[k,3]")),
        "stats": Weights(STATS),
        "params": Weights(PARAMS),
        **others,
    }


def whole(**options: Any) -> Pipeline:
    return Pipeline(pre=["pre"], function="apply", post=["post"], weights={"params": "params"}, **options)


def reload(model: obmlite.Model, folder: pathlib.Path) -> obmlite.Model:
    model.save(folder / "model.obm")
    return obmlite.load(folder / "model.obm")


def refused(kind: type[obmlite.ObmliteError], make: Any) -> obmlite.ObmliteError:
    with pytest.raises(kind) as caught:
        make()
    return caught.value


def same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_steps_run_one_after_the_other(tmp_path: pathlib.Path) -> None:
    model = obmlite.Model(objects(), pipelines={"serving_default": whole(metadata={"for": "digits"})})
    expected = by_hand(STATS, PARAMS, X)
    same(model(X), expected)
    loaded = reload(model, tmp_path)
    pipeline = loaded.pipelines["serving_default"]
    same(pipeline(X), expected)
    same(loaded(image=X), expected)
    assert str(loaded.signature) == "(image: u8[n,4]) -> {label: i32[n], probability: f32[n]}"
    assert pipeline.metadata == {"for": "digits"}
    assert [s.function for s in pipeline.steps] == ["pre", "apply", "post"]
    same(obmlite.load(tmp_path / "model.obm").restore()(X), expected)


def test_several_pipelines_and_functions_over_one_weights_object(tmp_path: pathlib.Path) -> None:
    more = {"twice": obmlite.export(lambda params, x: 2 * apply(params, x), PARAMS, spec("f32[b,4]"))}
    model = obmlite.Model(
        objects(**more),
        pipelines={
            "a": whole(),
            "b": Pipeline(function="apply", weights={"params": "params"}),
            "c": Pipeline(function="twice", weights={"params": "params"}),
            "only processors": Pipeline(pre=["pre"]),
        },
    )
    loaded = reload(model, tmp_path)
    x = X.astype("f4")
    np.testing.assert_allclose(loaded.pipelines["c"](x), 2 * np.asarray(loaded.pipelines["b"](x)), rtol=1e-6)
    np.testing.assert_allclose(loaded.pipelines["only processors"](X), (x - 3) * 0.5)
    assert "no default pipeline" in str(refused(obmlite.ArgumentError, lambda: loaded(x)))
    held = [loaded.pipelines[n]._calls[0]._arrays[0] for n in ("b", "c")]
    assert held[0][0][0] is held[1][0][0]  # one array on the device, not one for each pipeline


def test_a_processor_with_other_weights() -> None:
    other = {"mean": np.float32(0.0), "scale": np.float32(1.0)}
    model = obmlite.Model(
        objects(other=Weights({"inner": other})),
        pipelines={
            "p": Pipeline(
                pre=[Step("pre", weights={"stats": ("other", "inner")})], function="apply", weights={"params": "params"}
            )
        },
    )
    np.testing.assert_allclose(model(X), apply(PARAMS, X.astype("f4")), rtol=1e-6)


def test_a_value_passes_the_model_by(tmp_path: pathlib.Path) -> None:
    def pre(image: Any, ids: Any) -> Any:
        return (image.astype(jnp.float32), {"ids": ids, "mask": image[:, 0] > 0})

    def post(logits: Any, passed: Any) -> Any:
        return {"ids": passed["ids"], "logits": jnp.where(passed["mask"][:, None], logits, 0)}

    model = obmlite.Model(
        {
            "pre": obmlite.export(pre, spec("u8[n,4]"), spec("i32[n]")),
            "apply": obmlite.export(apply, PARAMS, spec("f32[b,4]")),
            "post": obmlite.export(post, spec("f32[k,3]"), spec({"ids": "i32[k]", "mask": "bool[k]"})),
            "params": Weights(PARAMS),
        },
        pipelines={"p": whole(pass_through=True)},
    )
    ids = np.array([7, 9], "i4")
    expected = {"ids": ids, "logits": np.where([[False], [True]], apply(PARAMS, X.astype("f4")), 0)}
    for own in (model, reload(model, tmp_path)):
        same(own(X, ids), expected)
        assert own.pipeline.pass_through
        assert str(own.signature) == "(image: u8[n,4], ids: i32[n]) -> {ids: i32[n], logits: f32[n,3]}"


@pytest.mark.parametrize(
    "result",
    [
        lambda x: {"b": x + 1, "a": x},
        lambda x: (x, x + 1),
    ],
    ids=["a dict by name", "a tuple in order"],
)
def test_results_become_arguments(result: Any) -> None:
    model = obmlite.Model(
        {
            "first": obmlite.export(result, spec("f32[n]")),
            "second": obmlite.export(lambda a, b: a - 10 * b, spec("f32[m]"), spec("f32[m]")),
        },
        pipelines={"p": Pipeline(pre=["first"], function="second")},
    )
    np.testing.assert_array_equal(model(np.ones(2, "f4")), [-19, -19])


def test_a_dict_that_is_one_argument() -> None:
    model = obmlite.Model(
        {
            "first": obmlite.export(lambda x: {"a": x, "b": x + 1}, spec("f32[n]")),
            "second": obmlite.export(lambda batch: batch["a"] + batch["b"], spec({"a": "f32[m]", "b": "f32[m]"})),
        },
        pipelines={"p": Pipeline(pre=["first"], function="second")},
    )
    np.testing.assert_array_equal(model(np.ones(2, "f4")), [3, 3])


def two(first: str, second: str, result: Any = None, **options: Any) -> obmlite.Model:
    """A model of two steps: specs of what the first takes, and of what the second does."""
    return obmlite.Model(
        {
            "first": obmlite.export(result or (lambda x: x), spec(first)),
            "second": obmlite.export(lambda y: y, spec(second), **options),
        },
        pipelines={"p": Pipeline(pre=["first"], function="second")},
    )


@pytest.mark.parametrize(
    ("first", "second", "signature"),
    [
        ("f32[b,4]", "f32[n,4]", "(x: f32[b,4]) -> f32[b,4]"),
        ("f32[b,4]", "f32[b,c]", "(x: f32[b,4]) -> f32[b,4]"),
        ("f32[b,c]", "f32[n,n]", "(x: f32[c,c]) -> f32[c,c]"),
        ("f32[b,c]", "f32[8,n]", "(x: f32[8,c]) -> f32[8,c]"),
        ("f32[2*b]", "f32[n]", "(x: f32[2*b]) -> f32[2*b]"),
        ("f32[2*b]", "f32[8]", "(x: f32[8]) -> f32[8]"),
        ("f32[6]", "f32[2*n]", "(x: f32[6]) -> f32[6]"),
    ],
)
def test_symbols_unify(first: str, second: str, signature: str) -> None:
    assert str(two(first, second).signature) == signature


def test_symbols_of_one_name_are_different_ones() -> None:
    model = two("f32[b,c]", "f32[c,b]")
    assert str(model.signature) == "(x: f32[b,c]) -> f32[b,c]"
    assert model(np.ones((2, 3), "f4")).shape == (2, 3)


def test_constraints_of_later_steps_are_the_pipelines() -> None:
    model = two("f32[n]", "f32[b]", constraints="b <= 4")
    assert model.signature.constraints == ("n <= 4",)
    wrong = refused(obmlite.ArgumentError, lambda: model(np.ones(5, "f4")))
    assert "b <= 4" in str(wrong)
    assert "broken" in str(refused(obmlite.ArgumentError, lambda: two("f32[8]", "f32[b]", constraints="b <= 4")))


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        ("f32[b,4]", "f32[b,5]", None),
        ("f32[b,4]", "f32[b]", None),
        ("f32[b]", "i32[b]", None),
        ("f32[b]", "f32[b]", lambda x: {"y": x, "z": x}),
        ("f32[6]", "f32[4*n]", None),
        ("f32[b]", "f32[b]", lambda x: (x, x)),
    ],
)
def test_neighbours_that_do_not_fit(first: str, second: str, result: Any) -> None:
    wrong = refused(obmlite.ArgumentError, lambda: two(first, second, result))
    assert wrong.object == "p"
    assert "second(y: " in str(wrong.expected)
    assert "first -> " in str(wrong.found)


def test_both_sides_are_shown() -> None:
    wrong = refused(obmlite.ArgumentError, lambda: two("f32[b,4]", "f32[n,5]"))
    assert wrong.leaf == "y"
    assert wrong.expected == "f32[n,5], as second(y: f32[n,5]) -> f32[n,5] takes it"
    assert wrong.found == "f32[b,4], as first -> f32[b,4] gives it"


def test_what_is_not_there() -> None:
    wrong = refused(obmlite.ArgumentError, lambda: obmlite.Model(objects(), pipelines={"p": Pipeline(pre=["nothing"])}))
    assert (wrong.object, wrong.found, wrong.expected) == ("p", "nothing", "pre, apply, post")
    wrong = refused(
        obmlite.ArgumentError,
        lambda: obmlite.Model(objects(), pipelines={"p": Pipeline(function="apply", weights={"params": "nothing"})}),
    )
    assert (wrong.found, wrong.expected) == ("nothing", "stats, params")
    wrong = refused(
        obmlite.ArgumentError,
        lambda: obmlite.Model(objects(), pipelines={"p": Pipeline(function="apply", weights={"params": "stats"})}),
    )
    assert wrong.leaf == "params.w"


@pytest.mark.parametrize(
    ("pipelines", "problem"),
    [
        ({"p": Pipeline(pre=["p"], function="apply")}, "step is a pipeline"),
        ({"p": Pipeline(pre=["q"]), "q": Pipeline(pre=["p"])}, "step is a pipeline"),
        ({"p": Pipeline()}, "no steps"),
        ({"p": Pipeline(pre=["pre"], weights={"params": "params"})}, "does not have"),
        ({"p": Pipeline(pre=["pre"], function="apply", pass_through=True)}, "only from a pre-processor"),
        ({"p": whole(pass_through=True)}, "returns a pair"),
        ({"p": Pipeline(pre="pre")}, "as a list"),
        ({"p": whole(visibility="hidden")}, "no such visibility"),
    ],
)
def test_pipelines_that_make_no_sense(pipelines: dict[str, Pipeline], problem: str) -> None:
    assert problem in str(refused(obmlite.ArgumentError, lambda: obmlite.Model(objects(), pipelines=pipelines)))


def test_private_pipelines_are_not_the_model(tmp_path: pathlib.Path) -> None:
    inner = Pipeline(pre=["pre"], visibility="private")
    model = reload(obmlite.Model(objects(), pipelines={"inner": inner, "p": whole()}, private=["apply"]), tmp_path)
    same(model(X), by_hand(STATS, PARAMS, X))
    assert model.pipelines["inner"](X).shape == (2, 4)
    assert {n for n, v in model.visibility.items() if v.name == "PRIVATE"} == {"apply"}
    alone = obmlite.Model(objects(), pipelines={"serving_default": inner})
    assert "public" in str(refused(obmlite.ArgumentError, lambda: alone(X)))
    refused(obmlite.ArgumentError, lambda: obmlite.Model(objects(), private=["nothing"]))
    refused(
        obmlite.ArgumentError,
        lambda: obmlite.Model(objects(), pipelines={"inner": inner}, default_pipeline="inner"),
    )


def test_gradients_go_through_a_pipeline() -> None:
    def f(x: Any) -> Any:
        return jnp.sin(x)

    model = obmlite.Model(
        {
            "f": obmlite.export(f, spec("f32[n]"), vjp_order=1),
            "g": obmlite.export(lambda y: y * y, spec("f32[n]"), vjp_order=1),
        },
        pipelines={"p": Pipeline(pre=["f"], function="g")},
    )
    x = jnp.arange(3.0)
    found = jax.grad(lambda x: model(x).sum())(x)
    np.testing.assert_allclose(found, 2 * np.sin(x) * np.cos(x), rtol=1e-5)


def test_what_functions_closed_over() -> None:
    table = np.arange(4096, dtype="f4")

    def f(x: Any) -> Any:
        return x + table

    model = obmlite.Model(
        {"f": obmlite.export(f, spec("f32[n,4096]")), "g": obmlite.export(lambda y: y * table, spec("f32[n,4096]"))},
        pipelines={"p": Pipeline(pre=["f"], function="g", post=["f"])},
    )
    assert list(model.weights) == ["f.captures"]
    np.testing.assert_allclose(model(np.zeros((1, 4096), "f4"))[0], table * table + table)
    assert len(model.pipeline._calls[0]._arrays[1]) == 1  # one array for three steps


def test_it_is_one_program() -> None:
    model = obmlite.Model(objects(), pipelines={"p": whole()})
    model(X)
    [call] = model.pipeline._calls
    assert call._jitted._cache_size() == 1
    text = call._jitted.lower(call._arrays, {}, (X,), {}).as_text()
    assert text.count("func.func public") == 1


def test_the_overhead_over_a_function_fused_by_hand() -> None:
    model = obmlite.Model(objects(), pipelines={"p": whole()})
    native, stats, params, x = jax.jit(by_hand), *jax.device_put((STATS, PARAMS, X))

    def best(call: Any) -> float:
        def once() -> float:
            start = time.perf_counter()
            for _ in range(200):
                jax.block_until_ready(call())
            return (time.perf_counter() - start) / 200

        return min(once() for _ in range(15))

    pipeline = model.pipeline
    pairs = [(best(lambda: pipeline(x)), best(lambda: native(stats, params, x))) for _ in range(3)]
    assert min(ours - theirs for ours, theirs in pairs) < 10e-6, pairs


# --- steps of the host


class Lengths(HostStep):
    """Takes texts, which no array of JAX holds: what other runtimes' steps will do."""

    def __init__(self, name: str, _: Any) -> None:
        self.name = name
        f = obmlite.export(lambda texts: texts, spec("i32[n]"))
        self.signature: Signature = f.signature

    def run(self, arguments: Mapping[str, Any]) -> Any:
        return np.array([len(text) for text in arguments["texts"]], "i4")


@pytest.fixture
def host() -> Any:
    register_host_step("application/x.lengths", Lengths)
    yield
    del HOST_STEPS["application/x.lengths"]


def test_steps_of_the_host_between_programs(host: Any, tmp_path: pathlib.Path) -> None:
    model = obmlite.Model(
        {
            "double": obmlite.export(lambda n: 2 * n, spec("i32[n]")),
            "square": obmlite.export(lambda n: n * n, spec("i32[n]")),
        },
        pipelines={"p": Pipeline(pre=["lengths"], function="double", post=["square"])},
        supplementals={"lengths": obmlite.Supplemental.from_bytes(b"", mime_type="application/x.lengths")},
    )
    for own in (model, reload(model, tmp_path)):
        np.testing.assert_array_equal(own(["a", "bcd"]), [4, 36])
        assert len(own.pipeline._calls) == 2  # what follows on each other is one program


def test_a_package_whose_host_step_is_not_known(host: Any, tmp_path: pathlib.Path) -> None:
    model = obmlite.Model(
        {"double": obmlite.export(lambda n: 2 * n, spec("i32[n]"))},
        pipelines={"p": Pipeline(pre=["lengths"], function="double"), "q": Pipeline(function="double")},
        supplementals={"lengths": obmlite.Supplemental.from_bytes(b"", mime_type="application/x.lengths")},
    )
    model.save(tmp_path / "model.obm")
    make = HOST_STEPS.pop("application/x.lengths")
    try:
        loaded = obmlite.load(tmp_path / "model.obm")
        np.testing.assert_array_equal(loaded.pipelines["q"](np.array([3], "i4")), [6])
        assert "not there" in str(refused(obmlite.CorruptPackageError, lambda: loaded.pipelines["p"]))
    finally:
        HOST_STEPS["application/x.lengths"] = make


class Splitting(Lengths):
    """Passes the texts themselves by."""

    def __init__(self, name: str, given: Any) -> None:
        super().__init__(name, given)
        self.signature = obmlite.export(lambda texts: (texts, texts), spec("i32[n]")).signature

    def run(self, arguments: Mapping[str, Any]) -> Any:
        return super().run(arguments), arguments["texts"]


class Naming(Lengths):
    """Takes a result and the texts."""

    def __init__(self, name: str, given: Any) -> None:
        super().__init__(name, given)
        self.signature = obmlite.export(lambda n, texts: n, spec("i32[n]"), spec("i32[n]")).signature

    def run(self, arguments: Mapping[str, Any]) -> Any:
        return dict(zip(arguments["texts"], np.asarray(arguments["n"]).tolist(), strict=True))


def test_texts_pass_a_program_by(host: Any) -> None:
    register_host_step("application/x.splitting", Splitting)
    register_host_step("application/x.naming", Naming)
    try:
        model = obmlite.Model(
            {"double": obmlite.export(lambda n: 2 * n, spec("i32[n]"))},
            pipelines={"p": Pipeline(pre=["split"], function="double", post=["name"], pass_through=True)},
            supplementals={
                "split": obmlite.Supplemental.from_bytes(b"", mime_type="application/x.splitting"),
                "name": obmlite.Supplemental.from_bytes(b"", mime_type="application/x.naming"),
            },
        )
        assert model(["a", "bcd"]) == {"a": 2, "bcd": 6}
    finally:
        del HOST_STEPS["application/x.splitting"], HOST_STEPS["application/x.naming"]
