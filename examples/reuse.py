"""Trains a larger model around a feature extractor that was loaded from a package, and saves it as one of its own.

    python examples/reuse.py                # only the new layers are trained
    python examples/reuse.py --finetune     # and the loaded weights with them

mnist.py makes the extractor (``--features_only``): a network without its last layer, saved with its derivative. Here
nothing of that network's code is used: its function and weights come from the package alone. Two new layers behind it
learn whether a digit is odd.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import digits_model
import jax
import jax.numpy as jnp
import mnist
import numpy as np

import obmlite

HIDDEN = 32


def init_head(key: jax.Array, features: int) -> Any:
    """Parameters of the new layers."""
    first, second = jax.random.split(key)
    normal = jax.nn.initializers.lecun_normal()
    return {
        "hidden": {"kernel": normal(first, (features, HIDDEN)), "bias": jnp.zeros(HIDDEN)},
        "out": {"kernel": normal(second, (HIDDEN, 1)), "bias": jnp.zeros(1)},
    }


def head(params: Any, features: jax.Array) -> jax.Array:
    """Logits of being odd, f32[b], of features, f32[b,n]."""
    x = jax.nn.relu(features @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return (x @ params["out"]["kernel"] + params["out"]["bias"])[:, 0]


def train(apply: Any, trained: Any, frozen: Any, data: digits_model.Digits, *, steps: int, rate: float = 0.02) -> Any:
    """What is to be trained, after some steps of gradient descent with momentum; what is frozen is only used."""
    images, odd = jnp.asarray(data.images), jnp.asarray(data.labels % 2)

    def loss(trained: Any, chosen: jax.Array) -> jax.Array:
        logits = apply({**frozen, **trained}, images[chosen])
        return jnp.mean(jnp.logaddexp(0, logits) - odd[chosen] * logits)

    @jax.jit
    def step(n: int, trained: Any, velocity: Any) -> Any:
        chosen = jax.random.randint(jax.random.fold_in(jax.random.key(2), n), (64,), 0, len(images))
        value, gradient = jax.value_and_grad(loss)(trained, chosen)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
        return jax.tree.map(lambda p, v: p - rate * v, trained, velocity), velocity, value

    velocity = jax.tree.map(jnp.zeros_like, trained)
    for n in range(steps):
        trained, velocity, value = step(n, trained, velocity)
        if n % 50 == 0 or n == steps - 1:
            print(f"  step {n:4d}  loss {value:.4f}")
    return trained


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=mnist.NETWORKS, default="jax", help="the extractor, if it is made here")
    parser.add_argument("--model_path", type=Path, default=Path("demo"), help="directory (default: demo)")
    parser.add_argument("--num_epochs", type=int, default=20, help="the extractor's training (default: 20)")
    parser.add_argument("--steps", type=int, default=200, help="the larger model's training (default: 200)")
    parser.add_argument("--finetune", action="store_true", help="train the loaded weights, too")
    options = parser.parse_args()

    package = options.model_path / "mnist_features"
    if not package.exists():
        made = ["--features_only", "--serving_batch_size=-1", "--model", options.model]
        mnist.main([*made, "--model_path", str(options.model_path), "--num_epochs", str(options.num_epochs)])

    extractor = obmlite.load(package)  # the highest version
    features = extractor.functions["predict"]
    [weights] = extractor.weights.values()
    print(f"loaded {extractor.path}: {features.signature}")

    def apply(params: Any, images: jax.Array) -> jax.Array:
        return head(params["head"], features(params["extractor"], images))

    before = {
        "extractor": weights.restore(),
        "head": init_head(jax.random.key(1), features.signature.output_specs[0].shape[-1]),
    }
    names = ["head", "extractor"] if options.finetune else ["head"]
    training, held_out = digits_model.load_data()
    trained = train(apply, {n: before[n] for n in names}, before, training, steps=options.steps)
    params = {**before, **trained}

    for name in before:
        changes = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before[name], params[name])
        print(f"largest change of the {name}'s parameters: {max(jax.tree.leaves(changes)):.2g}")
    right = (np.asarray(jax.jit(apply)(params, held_out.images)) > 0) == held_out.labels % 2
    print(f"accuracy on {len(right)} held-out digits: {right.mean():.4f}")

    # The loaded function is exported as a part of the larger one, so the new package needs none of the old.
    larger = options.model_path / "odd.obm"
    obmlite.Model.from_function(apply, params, mnist.IMAGES, name="odd").save(larger, overwrite=True)
    inputs = [held_out.images[:n] for n in (1, 64)]
    report = obmlite.load(larger).validate(inputs, lambda x: apply(params, x), rtol=1e-5, atol=1e-5)
    print(f"saved {larger}\n{report}")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
