"""Special functions that a module holds as many operations have the derivatives that they have in JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from obmlite import replay
from obmlite.replay import _special
from tests.replay import special
from tests.replay.test_conformance import FAST

POINTS = np.array(
    [-np.inf, -1e30, -100, -10, -2, -1, -0.5, -1e-20, 0, 1e-20, 0.5, 1, 2, 10, 100, 1e30, np.inf], "float32"
)


def replayed(fn: Any, *specs: Any) -> Any:
    return replay.to_jax(export.export(jax.jit(fn))(*specs).mlir_module_serialized)


def test_the_forms_of_this_jax_are_known() -> None:
    found = set(special.forms())
    assert {function for function, _, _ in found} >= {"erf_inv", "lgamma", "logistic"}
    missing = {(function, dtype) for function, dtype, form in found if _special.FORMS.get(form) != function}
    assert not missing, "python -m tests.replay.special"


def both_modes(fn: Any, x: jax.Array) -> Any:
    """A function's values and its derivatives in forward and in reverse mode."""

    def run(x: jax.Array) -> Any:
        return (*jax.jvp(fn, (x,), (jnp.full_like(x, 2),)), jax.grad(lambda x: fn(x).sum())(x))

    return [np.asarray(result, "float32") for result in jax.jit(run, compiler_options=FAST)(x)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("function", _special.FUNCTIONS)
def test_derivatives(function: str, dtype: str) -> None:
    fn, x = getattr(lax, function), jnp.asarray(POINTS, dtype)
    again = replayed(fn, jax.ShapeDtypeStruct(export.symbolic_shape("b"), dtype))
    # Of small floats the operations, and so the derivative, are float32's.
    tolerance = {"rtol": 1e-6} if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-3}
    for wanted, got in zip(both_modes(fn, x), both_modes(lambda x: again(x)[0], x), strict=True):
        np.testing.assert_allclose(got, wanted, **tolerance)


def layer(x: jax.Array) -> jax.Array:
    """Functions of what was computed before."""
    x = jax.nn.gelu(x * 2, approximate=False) + jax.nn.silu(-100 * x)
    return lax.erf_inv(0.9 * jnp.tanh(x)) * lax.lgamma(jax.nn.sigmoid(-x) + 1)


def loop(x: jax.Array) -> jax.Array:
    """Within a loop."""
    return lax.scan(lambda c, r: (jax.nn.sigmoid(100 * (c - r)), lax.lgamma(c + 4.5)), x[0], x)[1]


# Up to JAX 0.10 a rule within a loop is one for the first derivative only, whoever wrote it.
@pytest.mark.parametrize(("fn", "order"), [(layer, 1), (layer, 2), (loop, 1)])
def test_in_a_network(fn: Any, order: int) -> None:
    x = np.linspace(-3, 3, 21, dtype="float32").reshape(3, 7)
    again = replayed(fn, jax.ShapeDtypeStruct(export.symbolic_shape("b, 7"), "float32"))

    def derivative(fn: Any) -> Any:
        for _ in range(order):
            fn = jax.grad(lambda x, fn=fn: jnp.sin(fn(x)).sum())
        return jax.jit(jax.vmap(lambda x: fn(x[None])), compiler_options=FAST)(x)

    wanted, got = derivative(fn), derivative(lambda x: again(x)[0])
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(got, wanted, 2e-4, 2e-5)


LOGISTIC = """
func.func @main(%x: tensor<2xf32>) -> tensor<2xf32> {{
  %one = stablehlo.constant dense<{}> : tensor<2xf32>
  %0 = stablehlo.negate %x : tensor<2xf32>
  %1 = stablehlo.exponential %0 : tensor<2xf32>
  %2 = stablehlo.add %one, %1 : tensor<2xf32>
  %3 = stablehlo.divide %one, %2 : tensor<2xf32>
  return %3 : tensor<2xf32>
}}
"""


def test_what_is_another_function_is_left_alone() -> None:
    (found,) = _special.look(replay.read(LOGISTIC.format("1.0"))).values.values()
    assert (found.function, found.argument, len(found.operations)) == ("logistic", 0, 4)
    other = LOGISTIC.format("1.5")
    assert not _special.look(replay.read(other)).values
    x = np.array([-1.0, 0.5], "float32")
    slope = 1.5 * np.exp(-x) / (1.5 + np.exp(-x)) ** 2
    np.testing.assert_allclose(jax.grad(lambda x: replay.to_jax(other)(x)[0].sum())(x), slope, 1e-5)


def test_functions_that_call_each_other_for_ever() -> None:
    text = """
    func.func @main(%x: tensor<f32>) -> tensor<f32> {
      %0 = func.call @other(%x) : (tensor<f32>) -> tensor<f32>
      return %0 : tensor<f32>
    }
    func.func @other(%x: tensor<f32>) -> tensor<f32> {
      %0 = func.call @other(%x) : (tensor<f32>) -> tensor<f32>
      return %0 : tensor<f32>
    }
    """
    assert not _special.look(replay.read(text)).values
