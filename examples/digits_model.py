"""A small convolutional network for 8×8 handwritten digits, and its training loop, in plain JAX."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

Params = dict[str, dict[str, jax.Array]]

# Name, input channels, output channels, stride.
CONVS = (("conv1", 1, 32, 1), ("conv2", 32, 32, 1), ("conv3", 32, 64, 2), ("conv4", 64, 64, 2))
CLASSES = 10


class Digits(NamedTuple):
    """Images, f32[n,8,8,1] from 0 to 1, and their labels, i32[n]."""

    images: np.ndarray
    labels: np.ndarray


def load_data(held_out: int = 360, seed: int = 0) -> tuple[Digits, Digits]:
    """The 1,797 digits that come with scikit-learn, shuffled: those to train on, and those held out."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images = (images[order] / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    labels = labels[order].astype(np.int32)
    return Digits(images[held_out:], labels[held_out:]), Digits(images[:held_out], labels[:held_out])


def init(key: jax.Array) -> Params:
    """Fresh parameters, by He's initialisation."""
    shapes: dict[str, tuple[int, ...]] = {name: (3, 3, inputs, outputs) for name, inputs, outputs, _ in CONVS}
    shapes["dense"] = (2 * 2 * CONVS[-1][2], CLASSES)
    keys = jax.random.split(key, len(shapes))
    he = jax.nn.initializers.he_normal()
    return {
        name: {"kernel": he(k, shape), "bias": jnp.zeros(shape[-1])}
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def apply(params: Params, images: jax.Array) -> jax.Array:
    """Logits, f32[b,10], of images, f32[b,8,8,1]."""
    x = images
    for name, _, _, stride in CONVS:
        x = jax.lax.conv_general_dilated(
            x,
            params[name]["kernel"],
            window_strides=(stride, stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(x + params[name]["bias"])
    x = x.reshape(x.shape[0], -1)
    return x @ params["dense"]["kernel"] + params["dense"]["bias"]


def loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    log_probabilities = jax.nn.log_softmax(apply(params, images))
    return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1).mean()


def train(data: Digits, *, steps: int, batch: int = 64, rate: float = 0.05, seed: int = 0) -> Params:
    """Parameters after ``steps`` of SGD with momentum, its learning rate falling linearly to zero."""

    @jax.jit
    def step(n: int, params: Params, velocity: Params) -> tuple[Params, Params, jax.Array]:
        choice_key, shift_key = jax.random.split(jax.random.fold_in(key, n))
        chosen = jax.random.randint(choice_key, (batch,), 0, len(labels))
        shift = jax.random.randint(shift_key, (2,), -1, 2)
        shifted = jnp.roll(images[chosen], shift, axis=(1, 2))  # by a pixel at most: there are few digits to learn from
        value, gradient = jax.value_and_grad(loss)(params, shifted, labels[chosen])
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
        params = jax.tree.map(lambda p, v: p - rate * (1 - n / steps) * v, params, velocity)
        return params, velocity, value

    images, labels = jnp.asarray(data.images), jnp.asarray(data.labels)
    key, init_key = jax.random.split(jax.random.key(seed))
    params = init(init_key)
    velocity = jax.tree.map(jnp.zeros_like, params)
    for n in range(steps):
        params, velocity, value = step(n, params, velocity)
        if n % 100 == 0 or n == steps - 1:
            print(f"  step {n:4d}  loss {value:.4f}")
    return params
