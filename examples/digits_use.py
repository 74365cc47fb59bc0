"""Loads the package that digits.py saved and runs it on held-out digits, without the code that trained it."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
from matplotlib.figure import Figure

import obmlite

ROWS, COLUMNS = 5, 12


def draw(path: str, images: np.ndarray, labels: np.ndarray, predicted: np.ndarray) -> None:
    """A grid of digits with what they were taken for, those that the model got wrong first."""
    wrong = predicted != labels
    order = np.argsort(~wrong, kind="stable")
    figure = Figure(figsize=(0.8 * COLUMNS, 1.0 * ROWS + 0.4), layout="constrained")
    for axis, n in zip(figure.subplots(ROWS, COLUMNS).flat, order, strict=False):
        axis.imshow(images[n, :, :, 0], cmap="gray_r", vmin=0, vmax=1)
        title = f"{predicted[n]}, is {labels[n]}" if wrong[n] else f"{predicted[n]}"
        axis.set_title(title, fontsize=10, color="crimson" if wrong[n] else "black", pad=3)
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set(color="crimson" if wrong[n] else "lightgray", linewidth=1.5 if wrong[n] else 0.8)
    figure.suptitle(
        f"What the loaded model reads: {wrong.sum()} wrong of {len(labels)} held-out digits, the wrong ones first",
        fontsize=12,
    )
    figure.savefig(path, dpi=150)


def main(package: str, expected: str, picture: str) -> int:
    assert importlib.util.find_spec("digits_model") is None, "the training code can be imported here"

    model = obmlite.load(package)
    print(f"digits_model cannot be imported here; loaded {package}: {model.signature}")

    with np.load(expected) as file:
        images, labels = file["images"], file["labels"]
        trained = {int(name.removeprefix("logits_")): file[name] for name in file if name.startswith("logits_")}

    equal = True
    for batch, wanted in trained.items():
        logits = np.asarray(model(images[:batch]))
        same = logits.shape == wanted.shape and logits.tobytes() == wanted.tobytes()
        difference = "" if same else f" (largest difference {np.abs(logits - wanted).max():.2g})"
        print(f"  batch of {batch:3d}: logits {'equal' if same else 'DIFFERENT'}{difference}")
        equal &= same

    predicted = np.asarray(model(images)).argmax(axis=-1)
    accuracy = float((predicted == labels).mean())
    draw(picture, images, labels, predicted)
    print(f"bitwise equal to the trained model: {'yes' if equal else 'no'}")
    print(f"accuracy on {len(labels)} held-out digits: {accuracy:.4f}")
    print(f"wrote {picture}")
    return 0 if equal and accuracy >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
