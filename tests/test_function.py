"""Exporting, saving, loading and calling functions."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import obmlite

f32 = functools.partial(jax.ShapeDtypeStruct, dtype="float32")


def reload(function: obmlite.Function, path: pathlib.Path) -> obmlite.Function:
    obmlite.Model({function.name: function}).save(path / "m.obm")
    return obmlite.load(path / "m.obm").functions[function.name]


def mlp(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"] + params["b"])


PARAMS = {"w": np.linspace(-1, 1, 12, dtype="f4").reshape(4, 3), "b": np.arange(3, dtype="f4")}


def test_signature_text() -> None:
    tree = {f"layer_{n}": {"w": f32((4, 4))} for n in range(12)}
    function = obmlite.export(
        lambda params, x: x @ params["layer_0"]["w"], tree, obmlite.spec("f32[b,4]"), name="apply", platforms="cpu"
    )
    assert str(function.signature) == "(params: {…12 leaves}, x: f32[b,4]) -> f32[b,4]"
    assert repr(function) == "Function apply(params: {…12 leaves}, x: f32[b,4]) -> f32[b,4] for cpu"


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (lambda x: (x, {"a": x, "b": x}), "((f32[2], {a: f32[2], b: f32[2]}))"),
        (lambda x: (x,), "(f32[2],)"),
        (lambda x: {"a": x}, "{a: f32[2]}"),
        (lambda x: [x, None], "[f32[2], None]"),
        (lambda x: None, "None"),
        (lambda x: {"a": {}, "b": x}, "{a: {}, b: f32[2]}"),
    ],
)
def test_signature_of_results(result: Any, text: str, tmp_path: pathlib.Path) -> None:
    function = obmlite.export(lambda x: result(x), f32((2,)), name="f", platforms="cpu")
    again = reload(function, tmp_path)
    assert str(again.signature) == str(function.signature)
    x = np.ones(2, "f4")
    assert jax.tree.structure(again(x)) == jax.tree.structure(result(x))
    if "((" not in text:
        assert str(function.signature) == f"(x: f32[2]) -> {text}"


def test_equal_to_the_last_bit_in_memory_and_loaded(tmp_path: pathlib.Path) -> None:
    x = np.linspace(-2, 2, 20, dtype="f4").reshape(5, 4)
    expected = np.asarray(jax.jit(mlp)(PARAMS, x))
    function = obmlite.export(mlp, PARAMS, obmlite.spec("f32[b,4]"))
    np.testing.assert_array_equal(function(PARAMS, x), expected)
    np.testing.assert_array_equal(reload(function, tmp_path)(PARAMS, x), expected)


def test_arguments_by_position_and_by_name(tmp_path: pathlib.Path) -> None:
    x = np.ones((2, 4), "f4")
    function = reload(obmlite.export(mlp, PARAMS, f32((2, 4))), tmp_path)
    for call in (lambda: function(PARAMS, x), lambda: function(PARAMS, x=x), lambda: function(x=x, params=PARAMS)):
        np.testing.assert_array_equal(call(), mlp(PARAMS, x))


def test_any_container_with_the_same_keys() -> None:
    import collections

    class Params(tuple):
        __slots__ = ()

    x = np.ones((2, 4), "f4")
    function = obmlite.export(mlp, PARAMS, f32((2, 4)), platforms="cpu")
    pair = collections.namedtuple("pair", ["w", "b"])
    np.testing.assert_array_equal(function(collections.OrderedDict(b=PARAMS["b"], w=PARAMS["w"]), x), mlp(PARAMS, x))
    np.testing.assert_array_equal(function(pair(**PARAMS), x), mlp(PARAMS, x))


def test_static_default_and_keyword_arguments(tmp_path: pathlib.Path) -> None:
    def apply(x: Any, scale: float = 2.0, *, train: bool, shift: Any) -> Any:
        return x * scale + shift if train else x * scale - shift

    function = obmlite.export(apply, f32((2,)), kwargs={"train": False, "shift": f32(())}, static="train")
    function = reload(function, tmp_path)
    assert str(function.signature) == "(x: f32[2], *, shift: f32[]) -> f32[2]"
    x = np.array([1, 2], "f4")
    np.testing.assert_array_equal(function(x, shift=np.float32(1)), [1, 3])
    np.testing.assert_array_equal(function(x, shift=1, train=False, scale=2.0), [1, 3])
    with pytest.raises(obmlite.ArgumentError, match="static") as caught:
        function(x, shift=1, train=True)
    assert (caught.value.leaf, caught.value.expected, caught.value.found) == ("train", "False", "True")
    with pytest.raises(obmlite.ArgumentError, match="default") as caught:
        function(x, shift=1, scale=3.0)
    assert caught.value.leaf == "scale"


def test_variable_arguments(tmp_path: pathlib.Path) -> None:
    def total(first: Any, *rest: Any, **named: Any) -> Any:
        return first + sum(rest) + sum(named.values())

    x = np.arange(3, dtype="f4")
    function = reload(obmlite.export(total, x, x, x, kwargs={"k": x}), tmp_path)
    assert function.signature.arguments == ("first", "rest[0]", "rest[1]", "k")
    np.testing.assert_array_equal(function(x, x, x, k=x), 4 * x)


def test_callables_that_are_no_plain_functions(tmp_path: pathlib.Path) -> None:
    class Layer:
        def __call__(self, x: Any) -> Any:
            return x + 1

        def method(self, x: Any) -> Any:
            return x + 2

    x = np.zeros(2, "f4")
    for fn, name in (
        (Layer(), "Layer"),
        (Layer().method, "method"),
        (jax.jit(mlp), "mlp"),
        (functools.partial(mlp, PARAMS), "mlp"),
        (lambda x: x, "function"),
    ):
        args = [PARAMS, f32((2, 4))] if name == "mlp" and not isinstance(fn, functools.partial) else [f32((2, 4))]
        assert obmlite.export(fn, *args, platforms="cpu").name == name
    assert obmlite.export(Layer(), x, platforms="cpu")(x).tolist() == [1, 1]


def test_python_numbers_are_weak_as_under_jit(tmp_path: pathlib.Path) -> None:
    function = reload(obmlite.export(lambda x, s: x * s, f32((2,)), 1.0, name="f"), tmp_path)
    assert str(function.signature) == "(x: f32[2], s: ~f32[]) -> f32[2]"
    for scale in (3, 3.0, np.float32(3), np.float64(3), jnp.float32(3)):
        assert function(np.ones(2, "f4"), scale).tolist() == [3, 3]
    with pytest.raises(obmlite.ArgumentError):
        function(np.ones(2, "f4"), 3j)
    with pytest.raises(obmlite.ArgumentError):
        function(np.ones(2, "f4"), True)


def test_numpy_64_bit_input_is_narrowed_as_jax_does() -> None:
    function = obmlite.export(lambda x: x + 1, f32((2,)), name="f", platforms="cpu")
    assert function(np.ones(2, "f8")).dtype == np.float32
    integer = obmlite.export(lambda x: x + 1, obmlite.spec("i32[2]"), name="f", platforms="cpu")
    assert integer(np.ones(2, "i8")).dtype == np.int32


def test_keys_and_odd_dtypes(tmp_path: pathlib.Path) -> None:
    def noise(key: Any, x: Any) -> Any:
        return x + jax.random.normal(key, x.shape, x.dtype), jax.random.split(key, 2)

    key = jax.random.key(3)
    function = reload(obmlite.export(noise, key, obmlite.spec("bf16[4]")), tmp_path)
    assert "key: key<threefry2x32>[]" in str(function.signature)
    x = jnp.ones(4, "bfloat16")
    for ours, theirs in zip(function(key, x), jax.jit(noise)(key, x), strict=True):
        if jax.dtypes.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_unused_arguments(tmp_path: pathlib.Path) -> None:
    function = reload(obmlite.export(lambda unused, x: x + 1, PARAMS, f32((2,)), name="f"), tmp_path)
    assert function(PARAMS, np.zeros(2, "f4")).tolist() == [1, 1]
    assert function.module.kept == (2,)


def test_composes_under_jit_and_transformations_of_its_arguments() -> None:
    function = obmlite.export(mlp, PARAMS, obmlite.spec("f32[b,4]"), platforms="cpu")
    x = np.ones((3, 4), "f4")
    np.testing.assert_array_equal(jax.jit(lambda p, v: function(p, v) * 2)(PARAMS, x), mlp(PARAMS, x) * 2)
    assert jax.eval_shape(function, PARAMS, f32((7, 4))).shape == (7, 3)


def test_export_again_with_another_symbol() -> None:
    inner = obmlite.export(mlp, PARAMS, obmlite.spec("f32[b,4]"), platforms="cpu")
    outer = obmlite.export(
        lambda p, v: inner(p, v) + 1, PARAMS, obmlite.spec("f32[2*c,4]"), name="outer", platforms="cpu"
    )
    x = np.ones((6, 4), "f4")
    np.testing.assert_allclose(outer(PARAMS, x), mlp(PARAMS, x) + 1, rtol=1e-6)


# --- symbolic dimensions and constraints


def test_symbols_of_jax_and_their_constraints(tmp_path: pathlib.Path) -> None:
    b, c = jax.export.symbolic_shape("b, c", constraints=["b <= 4", "c >= 2*b"])
    function = obmlite.export(lambda x, y: x.sum() + y.sum(), f32((b,)), f32((c,)), name="f", constraints="c <= 100")
    function = reload(function, tmp_path)
    assert function.signature.constraints == ("c <= 100", "b <= 4", "c >= 2*b")
    assert function(np.ones(2, "f4"), np.ones(4, "f4")) == 6
    for sizes, broken in (((5, 10), "b <= 4"), ((3, 5), "c >= 2*b"), ((1, 101), "c <= 100")):
        with pytest.raises(obmlite.ArgumentError, match="constraint") as caught:
            function(*(np.ones(n, "f4") for n in sizes))
        assert caught.value.expected == broken


def test_symbols_are_solved_and_compared() -> None:
    function = obmlite.export(lambda x, y: x.sum() + y.sum(), *obmlite.spec(("f32[2*b]", "f32[b+1]")), name="f")
    assert function(np.ones(6, "f4"), np.ones(4, "f4")) == 10
    with pytest.raises(obmlite.ArgumentError) as caught:
        function(np.ones(6, "f4"), np.ones(5, "f4"))
    assert caught.value.leaf == "y, dimension 0"
    with pytest.raises(obmlite.ArgumentError) as caught:
        function(np.ones(5, "f4"), np.ones(4, "f4"))
    assert caught.value.leaf in ("x, dimension 0", "y, dimension 0")


def test_two_scopes_are_refused() -> None:
    (a,) = jax.export.symbolic_shape("a")
    (b,) = jax.export.symbolic_shape("b")
    with pytest.raises(obmlite.ExportError, match="different scopes"):
        obmlite.export(lambda x, y: x.sum() + y.sum(), f32((a,)), f32((b,)), name="f")


@pytest.mark.parametrize(
    "constraints", [("b <= 4", "b >= 5"), ("b <= 0",), ("2*b == 7",), ("b == 4", "b + 1 >= 6"), ("8 <= b", "16 >= 4*b")]
)
def test_a_constraint_that_cannot_hold_is_refused(constraints: tuple[str, ...]) -> None:
    with pytest.raises(obmlite.ExportError) as caught:
        obmlite.export(lambda x: x, obmlite.spec("f32[b]"), constraints=constraints, name="f")
    assert caught.value.field == "constraint"


# --- wrong calls


@pytest.fixture(scope="module")
def function() -> obmlite.Function:
    return obmlite.export(mlp, PARAMS, obmlite.spec("f32[b,4]"), constraints="b <= 16", platforms="cpu")


X = np.ones((2, 4), "f4")


@pytest.mark.parametrize(
    ("args", "leaf", "expected", "found"),
    [
        ((PARAMS, np.ones((2, 5), "f4")), "x", "f32[b,4]", "f32[2,5]"),
        ((PARAMS, np.ones(4, "f4")), "x", "f32[b,4]", "f32[4]"),
        ((PARAMS, np.ones((2, 4), "i4")), "x", "f32[b,4]", "i32[2,4]"),
        ((PARAMS, np.ones((2, 4), bool)), "x", "f32[b,4]", "bool[2,4]"),
        ((PARAMS, [X]), "x", "missing: x", "not expected: x.0"),
        ((PARAMS, None), "x", "missing: x", None),
        ((PARAMS, "text"), "x", None, "builtins.str"),
        (({"w": PARAMS["w"]}, X), "params.b", "missing: params.b", None),
        (({**PARAMS, "c": X}, X), "params.c", None, "not expected: params.c"),
        (({**PARAMS, "b": np.zeros(4, "f4")}, X), "params.b", "f32[3]", "f32[4]"),
        ((PARAMS, np.ones((17, 4), "f4")), None, "b <= 16", "b = 17"),
        ((PARAMS,), "x", None, None),
        ((PARAMS, X, X), None, None, "3"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(
    function: obmlite.Function, args: Any, leaf: str | None, expected: str | None, found: str | None
) -> None:
    with pytest.raises(obmlite.ArgumentError) as caught:
        function(*args)
    error = caught.value
    assert isinstance(error, TypeError)
    assert isinstance(error, ValueError)
    assert error.object == "mlp"
    assert error.leaf == leaf
    if expected is not None:
        assert error.expected == expected
    if found is not None:
        assert error.found == found
    assert str(error).startswith(error.problem)


def test_a_wrong_keyword(function: obmlite.Function) -> None:
    with pytest.raises(obmlite.ArgumentError) as caught:
        function(PARAMS, X, y=X)
    assert caught.value.leaf == "y"
    with pytest.raises(obmlite.ArgumentError, match="twice"):
        function(PARAMS, X, x=X)


def test_an_empty_batch_is_refused_by_name(function: obmlite.Function) -> None:
    with pytest.raises(obmlite.ArgumentError) as caught:
        function(PARAMS, np.ones((0, 4), "f4"))
    assert caught.value.leaf == "x, dimension 0"


def test_a_lazy_leaf_is_refused_with_the_remedy(function: obmlite.Function) -> None:
    weights = obmlite.Weights(PARAMS)
    for given in (weights, weights.lazy()):
        with pytest.raises(obmlite.ArgumentError, match=r"restore\(\)"):
            function(given, X)
    np.testing.assert_array_equal(function(weights.restore(), X), mlp(PARAMS, X))


def test_a_platform_that_this_machine_lacks(tmp_path: pathlib.Path) -> None:
    function = reload(obmlite.export(mlp, PARAMS, f32((2, 4)), platforms=("tpu", "cuda")), tmp_path)
    with pytest.raises(obmlite.PlatformError) as caught:
        function(PARAMS, X)
    assert caught.value.expected == "tpu, cuda"
    assert caught.value.found == "cpu"
    assert caught.value.object == "mlp"


# --- functions that cannot be exported


def test_splat_constants_may_be_large() -> None:
    obmlite.export(lambda x: x + jnp.full((64, 64), 2.0), f32((64, 64)), name="f", platforms="cpu")


def test_a_primitive_that_a_platform_lacks_is_named() -> None:
    with pytest.raises(obmlite.ExportError) as caught:
        obmlite.export(lambda x: jnp.linalg.eigvals(x), f32((3, 3)), name="f")
    assert caught.value.field == "platforms"
    assert "eig" in caught.value.found
    assert caught.value.fix.startswith("platforms=")


@pytest.mark.parametrize("platforms", ["cpu", ("cpu", "tpu")])
def test_callbacks_are_refused(platforms: Any) -> None:
    def with_print(x: Any) -> Any:
        return jax.lax.fori_loop(0, 3, lambda i, v: (jax.debug.print("{}", v), v)[1], x)

    def with_callback(x: Any) -> Any:
        return jax.pure_callback(lambda v: v, x, x)

    for fn in (with_print, with_callback):
        with pytest.raises(obmlite.ExportError, match="calls back into Python"):
            obmlite.export(fn, f32((2,)), platforms=platforms)


def test_text_as_an_argument_suggests_static() -> None:
    with pytest.raises(obmlite.LeafError) as caught:
        obmlite.export(lambda x, mode: x, f32((2,)), "fast", name="f")
    assert caught.value.leaf == "mode"
    assert "static" in caught.value.fix


def test_a_flag_that_decides_suggests_static() -> None:
    with pytest.raises(jax.errors.ConcretizationTypeError) as caught:
        obmlite.export(lambda x, train: x if train else -x, f32((2,)), True, name="f")
    assert any("static" in note for note in caught.value.__notes__)


def test_the_users_own_errors_pass_through() -> None:
    with pytest.raises(ZeroDivisionError):
        obmlite.export(lambda x: 1 // 0, f32((2,)), name="f")


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: obmlite.export(mlp, PARAMS, f32((2, 4)), platforms="gpu"), "platforms"),
        (lambda: obmlite.export(mlp, PARAMS, f32((2, 4)), platforms=()), "platforms"),
        (lambda: obmlite.export(mlp, PARAMS, f32((2, 4)), static="nothing"), "static"),
        (lambda: obmlite.spec("f32[b"), "spec"),
        (lambda: obmlite.spec("f99[b]"), "dtype"),
        (lambda: obmlite.spec("f32[b+]"), "dimension"),
        (lambda: obmlite.export(mlp, PARAMS, f32((2, 4)), constraints="b ?"), "constraint"),
    ],
)
def test_wrong_options(call: Any, field: str) -> None:
    with pytest.raises(obmlite.ExportError) as caught:
        call()
    assert caught.value.field == field


def test_too_many_and_missing_arguments() -> None:
    with pytest.raises(obmlite.ExportError, match="fewer arguments"):
        obmlite.export(mlp, PARAMS, f32((2, 4)), f32(()))
    with pytest.raises(obmlite.ExportError, match="was not given") as caught:
        obmlite.export(mlp, PARAMS)
    assert caught.value.leaf == "x"


def test_a_result_that_is_no_array() -> None:
    with pytest.raises(obmlite.LeafError) as caught:
        obmlite.export(lambda x: {"a": x, "b": "text"}, f32((2,)), name="f")
    assert caught.value.leaf == "result b"
    assert caught.value.object == "f"
