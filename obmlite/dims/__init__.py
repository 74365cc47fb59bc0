"""Symbolic dimensions: expressions such as ``2*b + 1`` and constraints such as ``b <= 16``, as text of our own.

JAX prints a symbolic dimension and reads one back (``jax.export.symbolic_shape``), but has no grammar that it
promises, no limits, and loses constraints when it serializes. A package holds the text that this module writes,
and reads it without evaluating it as code. The grammar is what JAX 0.9 to 0.12 prints and accepts
(``jax/_src/export/shape_poly.py``, ``_Parser`` and ``_DimExpr.__str__``); it is written out in ``docs/format.md``.

Symbols stand for integers of at least 1, and ``floordiv`` and ``mod`` are Python's ``//`` and ``%``.
"""

from obmlite.dims.constraints import Constraint, bind, check_together
from obmlite.dims.export import MAX_JAX_COMPARED, from_jax, to_jax
from obmlite.dims.expressions import MAX_EXPONENT, MAX_INTEGER, Expression
from obmlite.dims.parsing import MAX_NESTING, MAX_TEXT, MAX_TOKENS, parse, parse_constraint, parse_shape
from obmlite.dims.substitution import substitute

__all__ = [
    "MAX_EXPONENT",
    "MAX_INTEGER",
    "MAX_JAX_COMPARED",
    "MAX_NESTING",
    "MAX_TEXT",
    "MAX_TOKENS",
    "Constraint",
    "Expression",
    "bind",
    "check_together",
    "from_jax",
    "parse",
    "parse_constraint",
    "parse_shape",
    "substitute",
    "to_jax",
]
