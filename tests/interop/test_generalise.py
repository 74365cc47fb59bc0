"""Jaxprs of several sizes as one for any size. Needs no converter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from obmlite.errors import ExportError
from obmlite.interop import _generalise

W = np.random.default_rng(0).normal(size=(8, 3)).astype("f4")


def fitted(fn: Callable[..., Any], shape: Callable[..., tuple[int, ...]], symbols: tuple[str, ...]) -> Any:
    values = _generalise.sizes(symbols)
    structs = [jax.ShapeDtypeStruct(shape(**own), "f4") for own in values]
    traces = [_generalise.inlined(jax.make_jaxpr(fn)(struct)) for struct in structs]
    return traces[0], _generalise.generalise(traces, values)


def at(general: Any, x: Any, **sizes: int) -> Any:
    closed, operations = general
    return _generalise.run(closed, [x], fitted=operations, dimensions=sizes)


def test_sizes_in_shapes_and_in_numbers() -> None:
    def fn(x: Any) -> Any:
        y = jnp.concatenate([x, jnp.zeros((2, 8), "f4")]).reshape(-1) * 2
        return y[: x.shape[0] * 4], jnp.where(x > 0, x, -x) @ W, x.mean(0), jnp.broadcast_to(x.sum(), (x.shape[0] + 1,))

    general = fitted(fn, lambda b: (b, 8), ("b",))
    for b in (1, 2, 5):
        x = np.random.default_rng(b).normal(size=(b, 8)).astype("f4")
        for found, wanted in zip(at(general, x, b=b), fn(x), strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_two_symbols() -> None:
    def fn(x: Any) -> Any:
        return jnp.where(jnp.tril(jnp.ones((x.shape[1],) * 2, bool)), x[:, :, None] * x[:, None], 0.0)

    general = fitted(fn, lambda b, t: (b, t), ("b", "t"))
    x = np.arange(12, dtype="f4").reshape(3, 4)
    np.testing.assert_array_equal(at(general, x, b=3, t=4)[0], fn(x))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.ones((x.shape[0] ** 2,)) * x.sum(),
        lambda x: x * np.arange(x.shape[0], dtype="f4")[:, None],
        lambda x: x + 1 if x.shape[0] > 12 else x - 1,
        lambda x: x * 2 + 1 if x.shape[0] > 12 else x,
        lambda x: x / np.float32(np.sqrt(x.shape[0])),
        lambda x: x[:, : x.shape[0] % 2 + 1],
    ],
    ids=["square", "constant array", "operation", "number of operations", "fraction", "remainder"],
)
def test_what_depends_on_sizes_otherwise_is_refused(fn: Callable[..., Any]) -> None:
    with pytest.raises(ExportError, match="known sizes"):
        fitted(fn, lambda b: (b, 8), ("b",))


def test_rules_for_derivatives_are_left_out() -> None:
    """As replay has them for functions that StableHLO writes out."""
    function = jax.custom_jvp(lambda x: jnp.sin(x) * 2)
    function.defjvp(lambda primals, tangents: (function(*primals), tangents[0]))
    closed = jax.make_jaxpr(jax.jit(lambda x: function(x) + 1))(jnp.ones(3))
    inlined = _generalise.inlined(closed)
    assert [eqn.primitive.name for eqn in inlined.eqns] == ["sin", "mul", "add"]
