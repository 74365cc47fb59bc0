"""Trains a classifier of handwritten digits, saves it as a numbered version, and compares what is loaded with it.

    python examples/mnist.py                                          # pure JAX; batches of 1, 16 and 128
    python examples/mnist.py --model flax --serving_batch_size=-1     # Flax; one function for every batch size
    python examples/mnist.py --nogenerate_model                       # no training: the highest version that is there

Needs Flax, scikit-learn (for the digits) and matplotlib (for the picture): ``pip install '.[flax,examples]'``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import digits_model
import digits_use
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import obmlite

IMAGES = obmlite.spec("f32[b,8,8,1]")
COMPARED = (1, 7, 128)
"""Batches on which a function for every batch size is compared."""


class PureJax:
    """A dense network; its parameters are pairs of a kernel and a bias."""

    sizes = (64, 128, 128)

    def init(self, key: jax.Array) -> Any:
        *keys, last = jax.random.split(key, len(self.sizes))
        layers = zip(keys, self.sizes, self.sizes[1:], strict=False)
        return {
            "hidden": [self._layer(k, inputs, outputs) for k, inputs, outputs in layers],
            "classifier": self._layer(last, self.sizes[-1], digits_model.CLASSES),
        }

    def _layer(self, key: jax.Array, inputs: int, outputs: int) -> tuple[jax.Array, jax.Array]:
        return jax.nn.initializers.lecun_normal()(key, (inputs, outputs)), jnp.zeros(outputs)

    def apply(self, params: Any, images: jax.Array, with_classifier: bool = True) -> jax.Array:
        """Logarithms of probabilities, f32[b,10]; without the classifier features, f32[b,128]."""
        x = images.reshape(images.shape[0], -1)
        for kernel, bias in params["hidden"]:
            x = jnp.tanh(x @ kernel + bias)
        if not with_classifier:
            return x
        kernel, bias = params["classifier"]
        return jax.nn.log_softmax(x @ kernel + bias)

    def features_only(self, params: Any) -> Any:
        return {"hidden": params["hidden"]}

    def package(self, params: Any, with_classifier: bool, **options: Any) -> obmlite.Model:
        return obmlite.Model.from_function(
            self.apply,
            params,
            IMAGES,
            kwargs={"with_classifier": with_classifier},
            static="with_classifier",
            name="predict",
            **options,
        )


class Flax:
    """A convolutional network in Flax; its parameters are its variables, in one collection."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, images: jax.Array, with_classifier: bool = True) -> jax.Array:
            x = nn.relu(nn.Conv(16, (3, 3))(images))
            x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
            x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
            return nn.log_softmax(nn.Dense(digits_model.CLASSES, name="classifier")(x)) if with_classifier else x

    network = Network()

    def init(self, key: jax.Array) -> Any:
        return self.network.init(key, jnp.zeros((1, *IMAGES.shape[1:])))

    def apply(self, variables: Any, images: jax.Array, with_classifier: bool = True) -> jax.Array:
        result: jax.Array = self.network.apply(variables, images, with_classifier)
        return result

    def features_only(self, variables: Any) -> Any:
        return {"params": {name: own for name, own in variables["params"].items() if name != "classifier"}}

    def package(self, variables: Any, with_classifier: bool, **options: Any) -> obmlite.Model:
        return obmlite.Model.from_linen(
            self.network, variables, IMAGES, with_classifier=with_classifier, name="predict", **options
        )


NETWORKS = {"jax": PureJax(), "flax": Flax()}


def train(
    network: PureJax | Flax, data: digits_model.Digits, *, epochs: int, batch: int = 32, rate: float = 0.02
) -> Any:
    """Parameters after some epochs of stochastic gradient descent with momentum."""

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(network.apply(params, images), labels[:, None], axis=1).mean()

    @jax.jit
    def step(params: Any, velocity: Any, images: jax.Array, labels: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, images, labels)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
        return jax.tree.map(lambda p, v: p - rate * v, params, velocity), velocity, value

    params = network.init(jax.random.key(0))
    velocity = jax.tree.map(jnp.zeros_like, params)
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(len(data.labels))
        for chosen in np.split(order[: len(order) // batch * batch], len(order) // batch):
            params, velocity, value = step(params, velocity, data.images[chosen], data.labels[chosen])
        if epoch % 5 == 0 or epoch == epochs - 1:
            print(f"  epoch {epoch:3d}  loss {value:.4f}")
    return params


def predicted(model: obmlite.Model, images: np.ndarray) -> np.ndarray:
    """The digits that a model reads in any number of images."""
    sizes = fixed_sizes(model)
    if not sizes:
        return np.asarray(model(images)).argmax(axis=-1)
    call = model.pipeline.padded()  # the last batch is an odd one
    batches = np.split(images, range(max(sizes), len(images), max(sizes)))
    return np.concatenate([np.asarray(call(batch)).argmax(axis=-1) for batch in batches])


def fixed_sizes(model: obmlite.Model) -> list[int]:
    """The batch sizes that a model has functions for; none if it has one for all."""
    return [s.input_specs[0].shape[0] for s in model.pipeline.signatures if not s.symbols]


def batch_sizes(text: str) -> list[int]:
    sizes = [int(size) for size in text.split(",")]
    if sizes != [-1] and min(sizes) < 1:
        raise ValueError(text)
    return sizes


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=NETWORKS, default="jax", help="what the network is written in (default: jax)")
    add(
        "--serving_batch_size",
        type=batch_sizes,
        default=[1, 16, 128],
        metavar="N,…",
        help="the batch sizes to save a function for (default: 1,16,128); -1: one function for every size",
    )
    add("--features_only", action="store_true", help="leave the classifier out, for use in a larger model")
    add("--model_path", type=Path, default=Path("demo"), help="directory for what is made (default: demo)")
    add("--model_version", type=int, help="the version's number (default: the next; without training the highest)")
    add("--num_epochs", type=int, default=20, help="epochs of training (default: 20)")
    add("--nogenerate_model", dest="generate_model", action="store_false", help="use what was saved before")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    name = "mnist_features" if options.features_only else "mnist"
    versions = options.model_path / name
    training, held_out = digits_model.load_data()

    params = None
    if options.generate_model:
        network = NETWORKS[options.model]
        params = train(network, training, epochs=options.num_epochs)
        if options.features_only:
            params = network.features_only(params)
        version = options.model_version
        if version is None:
            version = 1 + max((int(path.name) for path in versions.glob("[0-9]*") if path.name.isdecimal()), default=0)
        symbolic = options.serving_batch_size == [-1]
        model = network.package(
            params,
            with_classifier=not options.features_only,
            symbol_values=None if symbolic else {"b": options.serving_batch_size},
            vjp_order=1 if options.features_only else 0,  # a larger model's gradients go through it
            metadata={"network": options.model},
        )
        model.save(versions / str(version))
        print(f"saved {versions / str(version)}")

    model = obmlite.load(versions, version=options.model_version)
    print(model)

    network = NETWORKS[model.metadata["network"]]
    if params is None:
        [weights] = model.weights.values()
        params = weights.restore()
    report = model.validate(
        [np.take(held_out.images, range(n), axis=0, mode="wrap") for n in fixed_sizes(model) or COMPARED],
        reference=lambda images: network.apply(params, images, not options.features_only),
        rtol=1e-5,
        atol=1e-5,
    )
    print(report)

    if not options.features_only:
        digits = predicted(model, held_out.images)
        print(f"accuracy on {len(digits)} held-out digits: {(digits == held_out.labels).mean():.4f}")
        picture = options.model_path / "mnist.png"
        digits_use.draw(str(picture), held_out.images, held_out.labels, digits)
        print(f"wrote {picture}")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
