"""Equinox: trains a network, saves it, runs it without Equinox, and gets it back into a template.

python examples/with_equinox.py --out demo
"""

from __future__ import annotations

from pathlib import Path

import elsewhere
import equinox as eqx
import jax
import jax.numpy as jnp

import obmlite


class Network(eqx.Module):
    layers: list
    activation: object

    def __init__(self, key: jax.Array) -> None:
        first, second = jax.random.split(key)
        self.layers = [eqx.nn.Linear(4, 16, key=first), eqx.nn.LayerNorm(16), eqx.nn.Linear(16, 2, key=second)]
        self.activation = jax.nn.relu

    def __call__(self, x: jax.Array) -> jax.Array:
        first, norm, second = self.layers
        return second(self.activation(norm(first(x))))


def main(out: Path) -> int:
    network = Network(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (8, 4))

    @eqx.filter_jit
    def step(network: Network) -> Network:
        gradient = eqx.filter_grad(lambda network: jnp.mean((jax.vmap(network)(x) - x[:, :2]) ** 2))(network)
        return eqx.apply_updates(network, jax.tree.map(lambda g: -0.1 * g, gradient))

    for _ in range(10):
        network = step(network)

    package = out / "equinox.obm"
    model = obmlite.Model.from_function(lambda network, x: jax.vmap(network)(x), network, x, name="network_apply")
    model.save(package, overwrite=True)

    template = Network(jax.random.key(2))  # its static parts are used, its arrays replaced
    restored = obmlite.load(package).weights["network"].restore(like=template)
    expected = eqx.filter_jit(lambda network, x: jax.vmap(network)(x))(restored, x)
    return elsewhere.compare(package, "equinox", x, expected)


if __name__ == "__main__":
    elsewhere.run(main, __doc__)
