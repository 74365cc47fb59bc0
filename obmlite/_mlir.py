"""MLIR's bindings, and modules of StableHLO in them.

``jax.extend.mlir`` is these bindings under public names. Importing it imports all of ``jax.extend`` too, from JAX 0.10
on with Pallas, which takes longer than the rest of obmlite: so they are imported from where they are, the same in JAX
0.9.2, 0.10.2 and 0.12. Only modules that are trusted may be parsed: MLIR's reader does not survive hostile bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import chlo, sdy, stablehlo

__all__ = ["chlo", "in_context", "ir", "look", "look_into", "parsed", "sdy", "stablehlo"]


@contextlib.contextmanager
def in_context(listen: Callable[[str], object] = lambda _: None) -> Iterator[Any]:
    """A context of one's own: a context keeps every constant that it has met as long as it lives.

    Args:
      listen: called with each message of MLIR's, which would go to stderr otherwise.
    """
    context = ir.Context()
    for dialect in (stablehlo, chlo, sdy):
        dialect.register_dialect(context)

    def handle(diagnostic: Any) -> bool:
        listen(str(diagnostic.message))
        return True

    handler = context.attach_diagnostic_handler(handle)
    try:
        with context, ir.Location.unknown():
            yield context
    finally:
        handler.detach()


@contextlib.contextmanager
def parsed(artifact: bytes) -> Iterator[Any]:
    """The module of a portable artifact, in a context of its own.

    Raises:
      ValueError: this JAX's StableHLO does not read it.
    """
    with in_context() as context:
        yield stablehlo.deserialize_portable_artifact(context, artifact)


def look(artifact: bytes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Targets of a module's custom calls, and dialects of its operations, each sorted.

    Args:
      artifact: a portable artifact that is trusted.

    Raises:
      ValueError: this JAX's StableHLO does not read it.
    """
    with parsed(artifact) as module:
        return look_into(module)


def look_into(module: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What :func:`look` gives, of a module that is parsed."""
    custom_calls: set[str] = set()
    dialects: set[str] = set()

    def visit(op: Any) -> Any:
        name = op.name
        dialects.add(name.partition(".")[0])
        if name == "stablehlo.custom_call":
            custom_calls.add(ir.StringAttr(op.attributes["call_target_name"]).value)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return tuple(sorted(custom_calls)), tuple(sorted(dialects))
