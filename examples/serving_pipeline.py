"""Pre-processing, a model and post-processing as one package: what the service gets goes in, what it answers comes out.

    python examples/serving_pipeline.py --out demo

A client sends images as bytes from 0 to 255 and wants digits with probabilities. The pipeline scales the images, runs
the network of digits.py on its weights, and turns logits into an answer. How much ink an image has passes by the
network, so that the post-processor can say that an empty image shows no digit. The three are one XLA program, and the
command line alone can run it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digits_model
import jax
import jax.numpy as jnp
import numpy as np

import obmlite

NO_DIGIT = -1


def scale(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the network takes, f32[b,8,8,1] from 0 to 1, and the share of ink in each image, f32[b]; of u8[b,8,8]."""
    x = images.astype(jnp.float32) / 255
    return x[..., None], x.mean(axis=(1, 2))


def answer(logits: jax.Array, ink: jax.Array) -> dict[str, jax.Array]:
    """Digits, i32[b], with -1 where there is next to no ink, and their probabilities, f32[b]."""
    probabilities = jax.nn.softmax(logits)
    empty = ink < 0.01
    return {
        "digit": jnp.where(empty, NO_DIGIT, probabilities.argmax(axis=-1)).astype(jnp.int32),
        "probability": jnp.where(empty, 1.0, probabilities.max(axis=-1)),
    }


def package(params: digits_model.Params) -> obmlite.Model:
    """The model with its pipeline."""
    network = obmlite.export(digits_model.apply, params, obmlite.spec("f32[b,8,8,1]"), name="network")
    model = obmlite.Model(
        {
            "scale": obmlite.export(scale, obmlite.spec("u8[b,8,8]")),
            "network": network,
            "answer": obmlite.export(answer, obmlite.spec("f32[b,10]"), obmlite.spec("f32[b]")),
            "params": obmlite.Weights(params),
        },
        pipelines={
            "serving_default": obmlite.Pipeline(
                pre=["scale"], function="network", weights={"params": "params"}, post=["answer"], pass_through=True
            ),
            "logits": obmlite.Pipeline(function="network", weights={"params": "params"}),
        },
        metadata={"classes": [str(n) for n in range(digits_model.CLASSES)]},
    )
    return model.with_examples(np.zeros((1, 8, 8), np.uint8))


def by_hand(params: digits_model.Params) -> Callable[[Any], Any]:
    """The same without a package: the three parts in one ``jax.jit``."""

    @jax.jit
    def fused(params: Any, images: Any) -> Any:
        x, ink = scale(images)
        return answer(digits_model.apply(params, x), ink)

    return lambda images: fused(params, images)


def microseconds(call: Callable[[Any], Any], images: Any, calls: int = 200) -> float:
    """The median time of a call."""
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(call(images))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)) * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="directory for what is made (default: demo)")
    parser.add_argument("--steps", type=int, default=800, help="training steps (default: 800)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path, sent, received = (options.out / name for name in ("serving.obm", "images.npy", "answer.npz"))

    training, held_out = digits_model.load_data()
    params = digits_model.train(training, steps=options.steps)
    package(params).save(path, overwrite=True)
    model = obmlite.load(path)
    print(model)

    images = np.round(held_out.images[..., 0] * 255).astype(np.uint8)
    images[0] = 0  # an empty one
    np.save(sent, images)
    command = ["-m", "obmlite", "run", path, "serving_default", "--input", f"images={sent}", "--output", received]
    print("\n$ python -I", *command, flush=True)
    if code := subprocess.run([sys.executable, "-I", *map(str, command)], check=False).returncode:
        return code

    fused = by_hand(params)
    expected = fused(images)
    with np.load(received) as file:
        equal = file.keys() == expected.keys() and all(
            file[k].tobytes() == np.asarray(expected[k]).tobytes() for k in file
        )
        digits = file["digit"]
    print(f"bitwise equal to the three parts in one jax.jit: {'yes' if equal else 'no'}")
    print(f"the empty image: {'no digit' if digits[0] == NO_DIGIT else digits[0]}")
    print(f"accuracy on {len(digits) - 1} held-out digits: {(digits == held_out.labels)[1:].mean():.4f}")
    batch = jnp.asarray(images[:1])
    print(f"one image: {microseconds(model, batch):.0f} µs; by hand {microseconds(fused, batch):.0f} µs")
    return 0 if equal and digits[0] == NO_DIGIT else 1


if __name__ == "__main__":
    sys.exit(main())
