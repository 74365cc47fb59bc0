"""Small packages to be served: their results tell which version, and which pipeline, ran."""

import os
import pathlib
import threading

import numpy as np

import obmlite

WIDTH = 4


def scaled(params, x):
    return x * params["scale"]


def model(scale=1.0, spec=f"f32[b,{WIDTH}]", **options):
    """Multiplies ``x`` by a number, which versions tell themselves apart by."""
    return obmlite.Model.from_function(
        scaled, {"scale": np.float32(scale)}, obmlite.spec(spec), name="scaled", platforms="cpu", **options
    )


def fixed(sizes, scale=1.0, fn=scaled, **options):
    """The same for batches of some sizes only."""
    functions = [
        obmlite.export(
            fn, {"scale": np.float32(0)}, obmlite.spec(f"f32[{size},{WIDTH}]"), name=f"scaled{size}", platforms="cpu"
        )
        for size in sizes
    ]
    return obmlite.Model(
        {"scaled": obmlite.Polymorphic(functions), "params": obmlite.Weights({"scale": np.float32(scale)})},
        pipelines={"main": obmlite.Pipeline(function="scaled", weights={"params": "params"})},
        **options,
    )


def save(base, number, made=None, name=None):
    """Version ``number`` under a base path, which multiplies by it; put in place whole."""
    hidden = pathlib.Path(base) / f".{number}.new"
    (made or model(float(number))).save(hidden)
    os.rename(hidden, pathlib.Path(base) / (name or str(number)))


def rows(count, first=1.0):
    """A batch whose rows differ."""
    return np.arange(count * WIDTH, dtype=np.float32).reshape(count, WIDTH) + np.float32(first)


def file_of(package, kind):
    """A data file of a package."""
    return next((pathlib.Path(package) / kind).iterdir())


def flip(path):
    """Changes one byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def threads(count, work):
    """Runs ``work(number)`` in threads, and gives what they returned, or the first error."""
    results, errors = [None] * count, []

    def run(number):
        try:
            results[number] = work(number)
        except Exception as error:  # noqa: BLE001 - raised below
            errors.append(error)

    started = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if errors:
        raise errors[0]
    return results
