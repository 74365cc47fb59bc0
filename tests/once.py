"""A mark for tests that take long and say little more about another JAX."""

import pathlib
import sys

import pytest

once = pytest.mark.skipif(
    pathlib.Path(sys.prefix).parent.name == "venvs",
    reason="takes long: not once more in versions.py's other environments",
)
