"""Frameworks' containers as pytrees: one small module each, imported when the first of its classes is met.

A class is found by where it, or a base of its, is defined; a name in a package by its beginning, and then on the fixed
list of that framework's module. No framework is imported before that, and none because of what else a package says.
"""

from __future__ import annotations

import functools
import importlib

from obmlite import tree as trees

_MODULES = {
    "flax.core": "linen",
    "flax.linen": "linen",
    "flax.nnx": "nnx",
    "haiku": "haiku",
    "objax": "objax",
    "equinox": "equinox",
    "optax": "optax",
}
"""Where a framework defines its classes → the module here that knows them."""


@functools.cache
def _adapter(module: str) -> trees.Adapter:
    found: trees.Adapter = importlib.import_module(f"{__name__}.{module}").ADAPTER
    return found


def install() -> None:
    """Lets trees find the modules here."""
    for prefix, module in _MODULES.items():
        trees.add_adapter(prefix, functools.partial(_adapter, module))
