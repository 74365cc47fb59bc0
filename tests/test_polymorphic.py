"""Several functions under one name: which one a call runs, saving, padding, and what is refused."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite
from obmlite import Pipeline, Polymorphic, Weights, spec
from obmlite.io.commit import MANIFEST
from obmlite.schema.decode import decode
from obmlite.schema.encode import encode
from obmlite.verify import verify

PARAMS = {"w": np.linspace(-1, 1, 12, dtype="f4").reshape(4, 3)}


def apply(params: Any, x: Any) -> Any:
    return x @ params["w"]


def rows(count: int) -> Any:
    return np.arange(4 * count, dtype="f4").reshape(count, 4) % 7


def reload(model: obmlite.Model, folder: pathlib.Path) -> obmlite.Model:
    model.save(folder / "model.obm")
    return obmlite.load(folder / "model.obm")


def constant(value: float, *texts: str, **options: Any) -> obmlite.Function:
    """A function that says which it is."""
    return obmlite.export(lambda x: jnp.full((), value), *map(spec, texts), **options)


def several(*functions: obmlite.Function) -> obmlite.PolymorphicFunction:
    return obmlite.Model({"f": Polymorphic(functions)}).polymorphic["f"]


def refused(make: Any) -> obmlite.ArgumentError:
    with pytest.raises(obmlite.ArgumentError) as caught:
        make()
    return caught.value


def test_batch_sizes_beside_a_symbolic_one(tmp_path: pathlib.Path) -> None:
    model = obmlite.Model.from_function(
        apply, PARAMS, spec("f32[b,4]"), symbol_values={"b": (1, 16, 128, None)}, constraints="b <= 200"
    )
    for own in (model, reload(model, tmp_path)):
        assert [f.name for f in own.polymorphic["apply"].functions] == [
            "apply.b=1",
            "apply.b=16",
            "apply.b=128",
            "apply.b",
        ]
        assert list(own.weights) == ["params"]
        for count in (1, 5, 16):
            np.testing.assert_allclose(own(rows(count)), rows(count) @ PARAMS["w"], rtol=1e-5)
            np.testing.assert_allclose(
                own.polymorphic["apply"](PARAMS, rows(count)), rows(count) @ PARAMS["w"], rtol=1e-5
            )
        assert {v.name for n, v in own.visibility.items() if n.startswith("apply.")} == {"PRIVATE"}
        assert own.visibility["apply"].name == "PUBLIC"
        assert [str(s) for s in own.pipeline.signatures] == [
            f"(x: f32[{b},4]) -> f32[{b},3]" for b in ("1", "16", "128", "b")
        ]


def test_only_the_function_that_is_chosen_is_read(tmp_path: pathlib.Path) -> None:
    model = obmlite.Model.from_function(apply, PARAMS, spec("f32[b,4]"), symbol_values={"b": (1, 16)})
    loaded = reload(model, tmp_path)
    loaded(rows(16))
    assert ["_loaded" in f.__dict__ for f in loaded.polymorphic["apply"].functions] == [False, True]


def test_a_product_of_symbols() -> None:
    model = obmlite.Model.from_function(
        lambda x: x.sum(1), spec("f32[b,s,2]"), weights=None, name="f", symbol_values={"b": (1, 8), "s": (16, 32)}
    )
    assert [f.name for f in model.polymorphic["f"].functions] == [
        "f.b=1,s=16",
        "f.b=1,s=32",
        "f.b=8,s=16",
        "f.b=8,s=32",
    ]
    assert model(np.ones((8, 32, 2), "f4")).shape == (8, 2)
    refused(lambda: model(np.ones((8, 31, 2), "f4")))


@pytest.mark.parametrize(
    ("values", "text", "constraints"),
    [
        ({"c": (1,)}, "f32[b,4]", ()),
        ({"b": ()}, "f32[b,4]", ()),
        ({"b": (0,)}, "f32[b,4]", ()),
        ({"b": (1, 32)}, "f32[b,4]", ("b <= 16",)),
        ({"b": (1,)}, "f32[2,4]", ()),
    ],
)
def test_symbol_values_that_make_no_sense(values: Any, text: str, constraints: Any) -> None:
    with pytest.raises(obmlite.ExportError) as caught:
        obmlite.Model.from_function(apply, PARAMS, spec(text), symbol_values=values, constraints=constraints)
    assert caught.value.field == "symbol_values"


def test_the_most_specific_is_chosen() -> None:
    f = several(
        constant(0, "f32[a,b]"),
        constant(1, "f32[a,a]"),
        constant(2, "f32[a,4]", constraints="a <= 64"),
        constant(3, "f32[a,4]"),
        constant(4, "f32[8,4]"),
        constant(5, "i32[8,4]"),
        constant(6, "f32[a,4]", constraints="a <= 16"),
    )
    expected = {(8, 4): 4, (9, 4): 6, (17, 4): 2, (65, 4): 3, (5, 5): 1, (5, 6): 0}
    assert {shape: float(f(np.zeros(shape, "f4"))) for shape in expected} == expected
    assert float(f(np.zeros((8, 4), "i4"))) == 5


def test_an_exact_dtype_goes_before_one_that_a_number_becomes() -> None:
    f = several(constant(0, "f32[]"), constant(1, "~i32[]"))
    assert float(f(2)) == 1
    assert float(f(2.5)) == 0
    assert float(several(constant(0, "f32[]"), constant(1, "f16[2]"))(3)) == 0


def test_what_there_is_is_listed() -> None:
    f = several(constant(0, "f32[1,4]"), constant(1, "f32[b,2]", constraints="b <= 9"))
    wrong = refused(lambda: f(np.zeros((3, 4), "f4")))
    assert wrong.object == "f"
    assert "f.0(x: f32[1,4]) -> ~i32[]" in str(wrong.expected)
    assert "f.1(x: f32[b,2]) -> ~i32[] where b <= 9" in str(wrong.expected)
    assert wrong.found == "(x: f32[3,4])"


def test_functions_by_name_stay_public(tmp_path: pathlib.Path) -> None:
    model = obmlite.Model(
        {"one": constant(1, "f32[1]"), "two": constant(2, "f32[2]"), "f": Polymorphic(["two", "one"])}
    )
    loaded = reload(model, tmp_path)
    assert float(loaded.polymorphic["f"](np.zeros(2, "f4"))) == 2
    assert float(loaded.functions["one"](np.zeros(1, "f4"))) == 1
    assert {v.name for v in loaded.visibility.values()} == {"PUBLIC"}


@pytest.mark.parametrize(
    ("objects", "problem"),
    [
        ({"f": Polymorphic(["f"])}, "in a circle"),
        ({"f": Polymorphic(["g"]), "g": Polymorphic(["h"]), "h": Polymorphic(["f"])}, "in a circle"),
        ({"f": Polymorphic(["g"]), "g": Polymorphic([constant(0, "f32[]")])}, "no function of the model"),
        ({"f": Polymorphic(["w"]), "w": Weights(PARAMS)}, "no function of the model"),
        ({"f": Polymorphic(["nothing"])}, "no function of the model"),
        ({"f": Polymorphic([])}, "has no functions"),
        ({"f": Polymorphic([constant(0, "f32[]")]), "f.0": Weights(PARAMS)}, "name that is taken"),
        (
            {"f": Polymorphic([constant(0, "f32[]"), obmlite.export(lambda y: y, spec("f32[2]"))])},
            "differ in their arguments",
        ),
    ],
)
def test_what_is_refused(objects: dict[str, Any], problem: str) -> None:
    assert problem in str(refused(lambda: obmlite.Model(objects)))


@pytest.mark.parametrize(("members", "found"), [(("f",), "f"), (("absent",), "absent"), (("params",), "params")])
def test_a_package_whose_polymorphic_function_names_no_function(
    members: tuple[str, ...], found: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "model.obm"
    obmlite.Model({"f": Polymorphic([constant(0, "f32[]")]), "params": Weights(PARAMS)}).save(path)
    manifest = decode((path / MANIFEST).read_bytes())
    changed = {"f": dataclasses.replace(manifest.polymorphic["f"], functions=members)}
    (path / MANIFEST).write_bytes(encode(dataclasses.replace(manifest, polymorphic=changed)))
    loaded = obmlite.load(path)
    with pytest.raises(obmlite.CorruptPackageError) as caught:
        loaded.polymorphic["f"]
    assert (caught.value.object, caught.value.found) == ("f", found)
    assert float(loaded.functions["f.0"](np.float32(1))) == 0
    assert [p.object for p in verify(path).problems] == ["f"]


def test_in_a_pipeline_the_pipeline_has_the_choice(tmp_path: pathlib.Path) -> None:
    made = obmlite.Model.from_function(apply, PARAMS, spec("f32[b,4]"), symbol_values={"b": (2, 8)})
    model = obmlite.Model(
        {
            "pre": obmlite.export(lambda image: image.astype(jnp.float32), spec("u8[n,4]")),
            "apply": made.polymorphic["apply"],
            "params": made.weights["params"],
        },
        pipelines={"p": Pipeline(pre=["pre"], function="apply")},
    )
    for own in (model, reload(model, tmp_path)):
        assert [str(s) for s in own.pipeline.signatures] == [
            "(image: u8[2,4]) -> f32[2,3]",
            "(image: u8[8,4]) -> f32[8,3]",
        ]
        image = rows(8).astype("u1")
        np.testing.assert_allclose(own(image), image.astype("f4") @ PARAMS["w"], rtol=1e-5)
        np.testing.assert_allclose(own.pipeline.padded()(image[:5]), image[:5].astype("f4") @ PARAMS["w"], rtol=1e-5)
        assert "f32[3,4]" in str(refused(lambda own=own: own(rows(3).astype("u1"))))


# --- padding


def test_an_odd_batch_runs_on_the_next_larger_size(tmp_path: pathlib.Path) -> None:
    model = obmlite.Model.from_function(apply, PARAMS, spec("f32[b,4]"), symbol_values={"b": (1, 16, 128)})
    loaded = reload(model, tmp_path)
    padded = loaded.pipeline.padded()
    for count in (1, 2, 16, 17, 128):
        np.testing.assert_allclose(padded(rows(count)), rows(count) @ PARAMS["w"], rtol=1e-5)
        np.testing.assert_allclose(padded(x=jnp.asarray(rows(count))), rows(count) @ PARAMS["w"], rtol=1e-5)
    compiled = loaded.pipeline._calls[0]._jitted._cache_size()
    padded(rows(3)), padded(rows(100))
    assert loaded.pipeline._calls[0]._jitted._cache_size() == compiled
    assert ".padded()" in str(refused(lambda: loaded(rows(17))))
    always = obmlite.load(tmp_path / "model.obm", pad_batch=True)
    np.testing.assert_allclose(always(rows(17)), rows(17) @ PARAMS["w"], rtol=1e-5)
    assert always.restore()(rows(17)).shape == (17, 3)
    refused(lambda: padded(rows(129)))
    refused(lambda: padded(rows(0)))
    refused(lambda: padded(np.ones((3, 5), "f4")))


def test_only_what_has_the_batch_is_padded() -> None:
    def f(x: Any, table: Any) -> Any:
        return {"y": x @ table, "first": x[:, 0]}

    model = obmlite.Model.from_function(
        f, spec("f32[b,4]"), spec("f32[4,4]"), weights=None, symbol_values={"b": (4, 8)}
    )
    table = np.eye(4, dtype="f4") * 2
    found = model.pipeline.padded()(rows(3), table)
    np.testing.assert_array_equal(found["y"], rows(3) * 2)
    np.testing.assert_array_equal(found["first"], rows(3)[:, 0])


@pytest.mark.parametrize("f", [lambda x: x.sum(), lambda x: x.sum(0), lambda x: jnp.zeros(8), lambda x: (x, x.mean())])
def test_results_without_the_batch_are_not_padded(f: Any) -> None:
    model = obmlite.Model.from_function(f, spec("f32[b,4]"), weights=None, symbol_values={"b": (4, 8)}, name="f")
    assert "leading dimension" in str(refused(lambda: model.pipeline.padded()(rows(5))))


def test_there_must_be_sizes_to_pad_to() -> None:
    model = obmlite.Model.from_function(apply, PARAMS, spec("f32[b,4]"))
    assert "fixed sizes" in str(refused(lambda: model.pipeline.padded()))


def test_a_symbolic_function_needs_no_padding() -> None:
    model = obmlite.Model.from_function(
        lambda x: x.sum(), spec("f32[b,4]"), weights=None, name="f", symbol_values={"b": (4, None)}
    )
    assert float(model.pipeline.padded()(np.ones((3, 4), "f4"))) == 12


# --- what is shared, and what it costs


def test_what_they_closed_over_is_kept_once(tmp_path: pathlib.Path) -> None:
    table = np.arange(4096, dtype="f4")
    model = obmlite.Model.from_function(
        lambda x: x + table, spec("f32[b,4096]"), weights=None, name="f", symbol_values={"b": (1, 2)}
    )
    loaded = reload(model, tmp_path)
    assert loaded.weights["f.b=1.captures"].nbytes == table.nbytes
    assert list(loaded.weights) == ["f.b=1.captures"]
    np.testing.assert_array_equal(loaded(np.zeros((2, 4096), "f4")), np.stack([table, table]))
    assert len(loaded.polymorphic["f"].captures) == 1


def test_gradients_go_through_the_chosen_function() -> None:
    model = obmlite.Model.from_function(
        lambda x: x**2, spec("f32[b]"), weights=None, name="f", vjp_order=1, symbol_values={"b": (2, None)}
    )
    for count in (2, 3):
        x = jnp.arange(float(count))
        np.testing.assert_allclose(jax.grad(lambda x: model(x).sum())(x), 2 * x)


def test_a_repeated_call_costs_what_a_functions_does() -> None:
    params, x = jax.device_put(PARAMS), jax.device_put(rows(16))
    one = obmlite.export(apply, PARAMS, spec("f32[16,4]"))
    f = obmlite.Model.from_function(apply, PARAMS, spec("f32[b,4]"), symbol_values={"b": (1, 16, None)}).polymorphic[
        "apply"
    ]

    def best(call: Any) -> float:
        def once() -> float:
            start = time.perf_counter()
            for _ in range(200):
                call(params, x)
            return (time.perf_counter() - start) / 200

        return min(once() for _ in range(15))

    pairs = [(best(f), best(one)) for _ in range(3)]
    assert min(several - single for several, single in pairs) < 3e-6, pairs
