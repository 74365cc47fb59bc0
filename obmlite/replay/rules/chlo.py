"""CHLO: operations that JAX has primitives for. In artifacts they are composites, with a decomposition into StableHLO
for who does not know them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax import lax

from obmlite.replay._interpreter import Site
from obmlite.replay._program import Operation
from obmlite.replay._table import COMPOSITES, rule
from obmlite.replay.rules.elementwise import accuracy

GROUP = "CHLO"


def _both(name: str, apply: Callable[..., Any], meaning: str) -> None:
    rule(f"chlo.{name}", group=GROUP, meaning=meaning)(apply)
    rule(f"chlo.{name}", group=GROUP, meaning=meaning, table=COMPOSITES)(apply)


def _primitive(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
        asked = accuracy(operation)
        return function(*operands) if asked is None else function(*operands, accuracy=asked)

    return apply


for _name, _function in {
    "acos": "acos",
    "acosh": "acosh",
    "asin": "asin",
    "asinh": "asinh",
    "atan": "atan",
    "atanh": "atanh",
    "bessel_i1e": "bessel_i1e",
    "conj": "conj",
    "cosh": "cosh",
    "digamma": "digamma",
    "erf": "erf",
    "erf_inv": "erf_inv",
    "erfc": "erfc",
    "lgamma": "lgamma",
    "mulhi": "mulhi",
    "next_after": "nextafter",
    "polygamma": "polygamma",
    "sinh": "sinh",
    "square": "square",
    "tan": "tan",
    "zeta": "zeta",
}.items():
    if hasattr(lax, _function):  # mulhi came after JAX 0.9
        _both(_name, _primitive(getattr(lax, _function)), "one `lax` operation")


def _top_k(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    attributes = operation.get("composite_attributes", None) or operation.attributes
    return lax.top_k(operands[0], attributes["k"])


_both("top_k", _top_k, "`lax.top_k`")
