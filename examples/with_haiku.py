"""Haiku: trains a network with batch normalization, saves it, runs it without Haiku, and gets its parameters back.

python examples/with_haiku.py --out demo
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import elsewhere
import haiku as hk
import jax
import jax.numpy as jnp

import obmlite


def network(x: jax.Array, train: bool) -> jax.Array:
    x = hk.BatchNorm(True, True, 0.9)(hk.Linear(16)(x), train)
    return hk.Linear(2)(jax.nn.relu(x))


def main(out: Path) -> int:
    transformed = hk.without_apply_rng(hk.transform_with_state(network))
    x = jax.random.normal(jax.random.key(0), (8, 4))
    params, state = transformed.init(jax.random.key(1), x, train=True)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        def loss(params: Any) -> Any:
            y, new = transformed.apply(params, state, x, train=True)
            return jnp.mean((y - x[:, :2]) ** 2), new

        gradient, state_ = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), state_

    for _ in range(10):
        params, state = step(params, state)

    package = out / "haiku.obm"
    obmlite.Model.from_haiku(transformed, params, x, state=state, train=False).save(package, overwrite=True)

    weights = obmlite.load(package).weights
    params, state = weights["params"].restore(), weights["state"].restore()
    expected, _ = jax.jit(lambda params, state, x: transformed.apply(params, state, x, train=False))(params, state, x)
    return elsewhere.compare(package, "haiku", x, expected)


if __name__ == "__main__":
    elsewhere.run(main, __doc__)
