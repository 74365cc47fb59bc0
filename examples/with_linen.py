"""Flax Linen: trains a network with batch normalization, saves it, runs it without Flax, and gets its variables back.

python examples/with_linen.py --out demo
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import elsewhere
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import obmlite


class Network(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dense(16)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(2)(nn.relu(x))


def main(out: Path) -> int:
    network = Network()
    x = jax.random.normal(jax.random.key(0), (8, 4))
    variables = network.init(jax.random.key(1), x, train=True)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(variables["params"])

    @jax.jit
    def step(variables: Any, state: Any) -> Any:
        def loss(params: Any) -> Any:
            y, new = network.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return jnp.mean((y - x[:, :2]) ** 2), new

        gradient, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradient, state)
        return {"params": optax.apply_updates(variables["params"], updates), **new}, state

    for _ in range(10):
        variables, state = step(variables, state)

    package = out / "linen.obm"
    obmlite.Model.from_linen(network, variables, x, train=False).save(package, overwrite=True)

    restored = obmlite.load(package).weights["variables"].restore()  # with the containers that were given
    expected = jax.jit(lambda variables, x: network.apply(variables, x, train=False))(restored, x)
    return elsewhere.compare(package, "flax", x, expected)


if __name__ == "__main__":
    elsewhere.run(main, __doc__)
