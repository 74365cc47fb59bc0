"""Trains a classifier of handwritten digits, saves it, and runs it in a process that has never seen its source.

    python examples/digits.py --out demo

Needs scikit-learn (for the digits) and matplotlib (for the picture): ``pip install '.[examples]'``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import digits_model
import jax
import numpy as np

import obmlite

BATCHES = (1, 7, 64, 360)
USE = Path(__file__).with_name("digits_use.py")


def run(*arguments: str | Path) -> int:
    """Runs Python afresh, isolated (-I): nothing next to this script can be imported there."""
    words = [str(argument) for argument in arguments]
    print("\n$ python -I", *words, flush=True)
    return subprocess.run([sys.executable, "-I", *words], check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="directory for what is made (default: demo)")
    parser.add_argument("--steps", type=int, default=800, help="training steps (default: 800)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    package, expected = options.out / "digits.obm", options.out / "digits.npz"

    training, held_out = digits_model.load_data()
    print(f"training on {len(training.labels)} digits, {len(held_out.labels)} are held out")
    params = digits_model.train(training, steps=options.steps)

    model = obmlite.Model.from_function(
        digits_model.apply,
        params,
        obmlite.spec("f32[b,8,8,1]"),  # b: any batch size
        platforms=("cpu", "cuda", "tpu"),
        metadata={"classes": [str(n) for n in range(digits_model.CLASSES)]},
    )
    model.save(package, overwrite=True)
    print(f"saved {package}")

    # What the other process must reproduce, bit by bit: JAX compiles each batch size by itself, so each has its logits.
    apply = jax.jit(digits_model.apply)
    logits = {f"logits_{n}": np.asarray(apply(params, held_out.images[:n])) for n in BATCHES}
    np.savez(expected, images=held_out.images, labels=held_out.labels, **logits)

    return run("-m", "obmlite", "show", package) or run(USE, package, expected, options.out / "digits.png")


if __name__ == "__main__":
    sys.exit(main())
