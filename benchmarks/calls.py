"""What a call costs beyond the computation, and how long a fresh process takes to its first prediction.

Run as ``python -m benchmarks.calls CASE DIRECTORY``, it does one case in this process and prints seconds as JSON; the
parent starts it anew for each measurement.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

LEAVES = (2, 200)
FIRST = ("obmlite", "export", "jax2tf")
_BLOCK = 200  # calls in one timing
_BLOCKS = 60


def _tree(leaves: int) -> dict[str, Any]:
    """A nested dict, as frameworks make them, of small arrays."""
    import numpy as np

    names = [f"layer_{n // 2}" for n in range(leaves)]
    return {name: {"kernel": np.ones(8, "f4"), "bias": np.ones(8, "f4")} for name in dict.fromkeys(names)}


def _small(params: Any, x: Any) -> Any:
    for layer in params.values():
        x = x * layer["kernel"] + layer["bias"]
    return x


def make_calls(directory: str) -> None:
    """Saves what the calls are of."""
    import jax
    import numpy as np

    import obmlite

    x = np.ones(8, "f4")
    for leaves in LEAVES:
        params = _tree(leaves)
        obmlite.Model.from_function(_small, params, x, name="small").save(_path(directory, f"obmlite-{leaves}"))
        exported = jax.export.export(jax.jit(_small), platforms=["cpu"])(params, x)
        with open(_path(directory, f"export-{leaves}"), "wb") as file:
            file.write(exported.serialize())


def _path(directory: str, name: str) -> str:
    return os.path.join(directory, name)


def calls(directory: str) -> dict[str, float]:
    """Seconds of each kind of call, measured in turns in this process: the medians of blocks of calls."""
    import jax

    import obmlite

    kinds: dict[str, Callable[[], Any]] = {}
    for leaves in LEAVES:
        model = obmlite.load(_path(directory, f"obmlite-{leaves}"))
        params = jax.device_put(_tree(leaves))
        x = jax.device_put(_tree(2)["layer_0"]["kernel"])
        with open(_path(directory, f"export-{leaves}"), "rb") as file:
            exported = jax.export.deserialize(bytearray(file.read()))
        native, under_jit, loaded = jax.jit(_small), jax.jit(exported.call), model.functions["small"]
        kinds[f"native jit, {leaves} leaves"] = _calling(native, params, x)
        kinds[f"obmlite function, {leaves} leaves"] = _calling(loaded, params, x)
        kinds[f"obmlite with bound weights, {leaves} leaves"] = _calling(model, x)
        kinds[f"jit(Exported.call), {leaves} leaves"] = _calling(under_jit, params, x)
        kinds[f"Exported.call, {leaves} leaves"] = _calling(exported.call, params, x)
    for call in kinds.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(_BLOCKS):
        for name, call in kinds.items():
            count = _BLOCK // 20 if name.startswith("Exported") else _BLOCK
            begin = time.perf_counter()
            for _ in range(count):
                result = call()
            jax.block_until_ready(result)
            times[name].append((time.perf_counter() - begin) / count)
    return {name: statistics.median(values) for name, values in times.items()}


def _calling(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: fn(*args)


# --- to the first prediction


def _cnn(params: Any, x: Any, *, lapack: bool) -> Any:
    import jax
    import jax.numpy as jnp

    for n in range(3):
        x = jax.lax.conv_general_dilated(
            x, params[f"conv_{n}"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = x.reshape(x.shape[0], -1) @ params["dense"]
    if lapack:
        few = x[:, :8]
        x = x * jnp.linalg.cholesky(few.T @ few + jnp.eye(8))[0, 0]
    return x @ params["head"]


def make_first(directory: str) -> None:
    """Saves a small CNN for each way to run it, once with a LAPACK call and once without."""
    import jax
    import numpy as np
    import safetensors.flax

    import obmlite

    rng = np.random.default_rng(0)
    shapes = {
        "conv_0": (3, 3, 1, 32),
        "conv_1": (3, 3, 32, 64),
        "conv_2": (3, 3, 64, 64),
        "dense": (3 * 3 * 64, 1024),
        "head": (1024, 10),
    }
    params = {name: (rng.normal(size=shape) * 0.05).astype("f4") for name, shape in shapes.items()}
    for lapack in (False, True):
        suffix = "lapack" if lapack else "plain"

        def apply(params: Any, x: Any, lapack: bool = lapack) -> Any:
            return _cnn(params, x, lapack=lapack)

        spec = obmlite.spec("f32[b,28,28,1]")
        obmlite.Model.from_function(apply, params, spec).save(_path(directory, f"first-obmlite-{suffix}"))
        (b,) = jax.export.symbolic_shape("b")
        struct = jax.ShapeDtypeStruct((b, 28, 28, 1), "float32")
        platforms = ["cpu", "cuda", "rocm", "tpu"]
        exported = jax.export.export(jax.jit(lambda p, x, f=apply: f(p, x)), platforms=platforms)(params, struct)
        with open(_path(directory, f"first-export-{suffix}"), "wb") as file:
            file.write(exported.serialize())
        if "jax2tf" in contenders(suffix):
            _save_jax2tf(apply, params, struct, _path(directory, f"first-jax2tf-{suffix}"))
        safetensors.flax.save_file(params, _path(directory, f"first-export-{suffix}.safetensors"))


def _save_jax2tf(apply: Callable[..., Any], params: Any, struct: Any, path: str) -> None:
    """The same as a TensorFlow SavedModel."""
    import tensorflow as tf
    from jax.experimental import jax2tf

    converted = jax2tf.convert(
        apply, polymorphic_shapes=[None, str(struct.shape)], native_serialization_platforms=["cpu"]
    )
    module = tf.Module()
    module.params = tf.nest.map_structure(tf.Variable, params)
    spec = tf.TensorSpec([None, *struct.shape[1:]], tf.float32)
    module.call = tf.function(lambda x: converted(module.params, x), input_signature=[spec], autograph=False)
    tf.saved_model.save(module, path)


def contenders(suffix: str) -> list[str]:
    """Those of :data:`FIRST` that can run a case here: TensorFlow has to be installed, and has no LAPACK calls."""
    tensorflow = suffix == "plain" and importlib.util.find_spec("tensorflow") is not None
    return [name for name in FIRST if name != "jax2tf" or tensorflow]


_FIRST = {
    "obmlite": """
import sys, numpy, obmlite
print(float(obmlite.load(sys.argv[1])(numpy.ones((8, 28, 28, 1), "f4")).sum()))
""",
    "export": """
import sys, numpy, jax, jax.export, safetensors.flax
params = safetensors.flax.load_file(sys.argv[1] + ".safetensors")
with open(sys.argv[1], "rb") as file:
    exported = jax.export.deserialize(bytearray(file.read()))
print(float(jax.jit(exported.call)(params, numpy.ones((8, 28, 28, 1), "f4")).sum()))
""",
    "jax2tf": """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy, tensorflow
loaded = tensorflow.saved_model.load(sys.argv[1])
print(float(tensorflow.reduce_sum(loaded.call(numpy.ones((8, 28, 28, 1), "f4")))))
""",
}
TITLES = {"obmlite": "obmlite", "export": "jax.export + safetensors.flax", "jax2tf": "jax2tf SavedModel, TensorFlow"}


def first(directory: str, contender: str, suffix: str) -> float:
    """Seconds from the start of a process to the end of its first prediction."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    path = _path(directory, f"first-{contender}-{suffix}")
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", _FIRST[contender], path], env=environment, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        line = child.stdout.readline()  # what comes after it is the interpreter's end
        seconds = time.perf_counter() - begin
        child.wait()
    float(line)
    return seconds


def in_child(case: str, directory: str) -> dict[str, float]:
    """Runs a case of this module in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.calls", case, directory], check=True, stdout=subprocess.PIPE, text=True
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def kinds(result: dict[str, float], leaves: int) -> Iterator[tuple[str, float]]:
    """The calls over a number of leaves: name, seconds."""
    ending = f", {leaves} leaves"
    return ((name.removesuffix(ending), seconds) for name, seconds in result.items() if name.endswith(ending))


if __name__ == "__main__":
    case, directory = sys.argv[1:]
    steps: dict[str, Callable[[str], Any]] = {"make-calls": make_calls, "make-first": make_first, "calls": calls}
    print(json.dumps(steps[case](directory)))
