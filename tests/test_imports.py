"""What a process to its first prediction imports: JAX, and of the rest only what takes little time."""

import subprocess
import sys

import numpy as np

import obmlite
from obmlite import interop
from obmlite.interop import tensorflow_steps

SLOW = ["jax.extend", "scipy.linalg", "obmlite.replay", "obmlite.interop.tensorflow_steps", "obmlite.foreign"]

PREDICT = """
import sys
import numpy as np
import obmlite
print("obmlite._mlir" in sys.modules)
obmlite.load(sys.argv[1])(np.ones((2, 3), "f4"))
print([name for name in sys.argv[2:] if name in sys.modules])
"""


def test_to_the_first_prediction(tmp_path):
    w = np.ones((3, 4), "f4")
    obmlite.Model.from_function(lambda w, x: x @ w, w, obmlite.spec("f32[b,3]")).save(tmp_path / "m.obm")
    command = [sys.executable, "-c", PREDICT, str(tmp_path / "m.obm"), *SLOW]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.split("\n") == ["False", "[]", ""]


def test_steps_of_other_runtimes_are_found_by_their_type():
    assert interop._STEPS[tensorflow_steps.HANDLE] == "tensorflow_steps"
    assert issubclass(tensorflow_steps.Step, obmlite.pipeline.HostStep)
