"""Flax NNX: trains a network with batch normalization, saves it, runs it without Flax, and gets its state back.

python examples/with_nnx.py --out demo
"""

from __future__ import annotations

from pathlib import Path

import elsewhere
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import obmlite


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(4, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.dropout(nnx.relu(self.norm(self.dense(x)))))


def main(out: Path) -> int:
    network = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(network, optax.adam(1e-2), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (8, 4))

    @nnx.jit
    def step(network: Network, optimizer: nnx.Optimizer) -> None:
        gradient = nnx.grad(lambda network: jnp.mean((network(x) - x[:, :2]) ** 2))(network)
        optimizer.update(network, gradient)

    for _ in range(10):
        step(network, optimizer)

    network.eval()
    package = out / "nnx.obm"
    obmlite.Model.from_nnx(network, x).save(package, overwrite=True)

    restored = Network(nnx.Rngs(1))
    restored.eval()
    nnx.update(restored, obmlite.load(package).weights["state"].restore())  # an nnx.State again
    expected = nnx.jit(lambda network, x: network(x))(restored, x)
    return elsewhere.compare(package, "flax", x, expected)


if __name__ == "__main__":
    elsewhere.run(main, __doc__)
