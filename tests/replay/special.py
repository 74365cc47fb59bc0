"""``python -m tests.replay.special``: how this JAX writes special functions, for ``replay/_special.py``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import jax
from jax import export, lax

from obmlite import replay
from obmlite.replay import _special

MODES = [("float32", False), ("float32", True), ("float64", True), ("bfloat16", False), ("float16", False)]
"""Dtypes, and whether in JAX's 64-bit mode, in which some numbers between are wider."""


def module(function: str, dtype: str, *, wide: bool, shape: str = "3") -> replay.Program:
    """A module of nothing but the function; ``wide`` in JAX's 64-bit mode."""
    with jax.enable_x64(wide):
        spec = jax.ShapeDtypeStruct(export.symbolic_shape(shape), dtype)
        exported = export.export(jax.jit(getattr(lax, function)), platforms=["cpu"])(spec)
    return replay.read(exported.mlir_module_serialized)


def forms() -> Iterator[tuple[str, str, _special.Form]]:
    """Function, dtype and form, where this JAX writes a function as several operations of that dtype."""
    for function, (dtype, wide) in itertools.product(_special.FUNCTIONS, MODES):
        program = module(function, dtype, wide=wide)
        body = program.functions["main"].body
        for form in _special.forms(program, body.returns[0], body.arguments[-1]):
            if not form.last.startswith("convert"):  # of another dtype in between
                yield function, dtype, form


if __name__ == "__main__":
    for function, dtype, form in sorted(set(forms())):
        print(f'    Form("{form.last}", {form.operations}, "{form.digest}"): "{function}",  # {dtype}')
