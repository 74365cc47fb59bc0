"""Objax: trains a network with batch normalization, saves it, runs it without Objax, and gets its variables back.

    python examples/with_objax.py --out demo

Objax needs a JAX before 0.10.
"""

from __future__ import annotations

from pathlib import Path

import elsewhere
import jax
import objax

import obmlite


class Network(objax.Module):
    def __init__(self) -> None:
        self.dense = objax.nn.Linear(4, 16)
        self.norm = objax.nn.BatchNorm0D(16)
        self.out = objax.nn.Linear(16, 2)

    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        return self.out(objax.functional.relu(self.norm(self.dense(x), training)))


def main(out: Path) -> int:
    network = Network()
    optimizer = objax.optimizer.Adam(network.vars())
    x = jax.random.normal(jax.random.key(0), (8, 4))
    gradients = objax.GradValues(lambda: ((network(x, training=True) - x[:, :2]) ** 2).mean(), network.vars())

    @objax.Function.with_vars(network.vars() + optimizer.vars())
    def step() -> None:
        optimizer(1e-2, gradients()[0])

    jitted = objax.Jit(step)
    for _ in range(10):
        jitted()

    package = out / "objax.obm"
    obmlite.Model.from_objax(network, x, training=False).save(package, overwrite=True)

    other = Network()
    restored = obmlite.load(package).weights["variables"].restore(like=other.vars())  # a VarCollection again
    other.vars().assign(restored.tensors())
    expected = objax.Jit(lambda x: other(x, training=False), other.vars())(x)
    return elsewhere.compare(package, "objax", x, expected)


if __name__ == "__main__":
    elsewhere.run(main, __doc__)
