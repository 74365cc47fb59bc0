"""Plain JAX with Optax: saves parameters and the optimizer's state, and goes on training where it stopped.

python examples/with_optax.py --out demo
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import elsewhere
import jax
import jax.numpy as jnp
import optax

import obmlite


def apply(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["w"] + params["b"]) @ params["w"].T


def main(out: Path) -> int:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    x = jax.random.normal(jax.random.key(0), (8, 4))
    params = {"w": jax.random.normal(jax.random.key(1), (4, 16)), "b": jnp.zeros(16)}
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        gradient = jax.grad(lambda params: jnp.mean((apply(params, x) - x) ** 2))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, state)
    package = out / "optax.obm"
    obmlite.Model({"params": obmlite.Weights(params), "optimizer": obmlite.Weights(state)}).save(
        package, overwrite=True
    )

    weights = obmlite.load(package).weights
    params, _ = step(params, state)
    resumed, _ = step(weights["params"].restore(), weights["optimizer"].restore())  # the optimizer's own classes
    assert all((resumed[key] == params[key]).all() for key in params)

    trained = out / "trained.obm"
    obmlite.Model.from_function(apply, resumed, x).save(trained, overwrite=True)
    return elsewhere.compare(trained, "optax", x, jax.jit(apply)(params, x))


if __name__ == "__main__":
    elsewhere.run(main, __doc__)
