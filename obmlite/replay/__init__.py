"""StableHLO, re-traced as ordinary ``jax.lax`` operations.

What comes out of a module is a Python function that JAX traces like any other: it runs under ``jit``, ``vmap``,
``grad``, ``jvp`` and ``checkpoint``, for other batch sizes where the module leaves them open, on other devices, and for
as long as StableHLO keeps its promise. ``docs/replay.md`` lists the operations.

Loading this module loads MLIR's bindings; the rest of obmlite imports it only where it is used.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from obmlite.errors import ArgumentError, UnknownNameError
from obmlite.replay import _documentation, _special, _survey
from obmlite.replay import rules as _rules
from obmlite.replay._interpreter import PLATFORM_INDEX, Replay, check_argument, traceable
from obmlite.replay._program import Program
from obmlite.replay._reading import read
from obmlite.replay._survey import Reason
from obmlite.replay._varying import axes_of

__all__ = ["Program", "Reason", "check", "operations", "read", "table", "to_jax"]

Module = bytes | str | Program

del _rules  # entered into the tables by being imported


def to_jax(
    module: Module,
    *,
    function: str = "main",
    custom_calls: Mapping[str, Callable[..., Any]] | None = None,
    platform_index: int | None = None,
) -> Callable[..., tuple[Any, ...]]:
    """A module's function as one that JAX can trace.

    Args:
      module: a portable artifact, MLIR text, or what :func:`read` made of either; trusted.
      function: which of its functions.
      custom_calls: further targets of custom calls, each with a function that is called with the operands, and with
        the call's attributes by name, and returns an array or a tuple of them.
      platform_index: the position of the platform that it will run on among those that the module was exported for;
        needed if these are several.

    Returns:
      A function of flat arrays that returns a tuple of arrays. It raises :class:`ArgumentError` while it is traced if
      the arguments are not those of the module.

    Raises:
      UnsupportedFormatError: this JAX does not read the module, or it holds operations that cannot be replayed; the
        text names each.
      UnknownNameError: it has no such function.
      ArgumentError: ``platform_index`` is needed.
    """
    program = module if isinstance(module, Program) else read(module)
    given = dict(custom_calls or {})
    if function not in program.functions:
        raise UnknownNameError(
            "The module has no such function.", expected=", ".join(program.functions), found=function
        )
    main = program.functions[function]
    constants = main.constants
    if PLATFORM_INDEX in constants and platform_index is None:
        raise ArgumentError(
            "The module was exported for several platforms.",
            field="platform_index",
            expected="which of them",
            found=None,
        )
    if reasons := check(program, function=function, custom_calls=given, platform_index=platform_index):
        raise _survey.refusal(reasons)
    special = _special.look(program)
    block = main.body
    taken = [kind for kind, name in zip(block.types, constants, strict=True) if name != PLATFORM_INDEX]

    def replayed(*arguments: Any) -> tuple[Any, ...]:
        if len(arguments) != len(taken):
            raise ArgumentError("The module takes another number of arrays.", expected=len(taken), found=len(arguments))
        if not jax.config.jax_enable_x64 and any(kind.wide for kind in main.results):
            raise ArgumentError(
                "The module returns 64-bit numbers.",
                expected=", ".join(kind.text for kind in main.results),
                fix="jax_enable_x64",
            )
        arrays = [
            value
            if isinstance(value, jax.Array)
            else np.asarray(value, None if hasattr(value, "dtype") else kind.dtype)
            for value, kind in zip(arguments, taken, strict=True)
        ]
        for n, (value, kind) in enumerate(zip(arrays, taken, strict=True)):
            check_argument(n, value, kind)
        rest = iter(arrays)
        values = [
            np.asarray(platform_index, kind.dtype) if name == PLATFORM_INDEX else jax.numpy.asarray(next(rest))
            for kind, name in zip(block.types, constants, strict=True)
        ]
        results = Replay(program, given, special, axes_of(arrays)).call(function, values)
        return tuple(jax.numpy.asarray(traceable(result)) for result in results)

    replayed.__name__ = replayed.__qualname__ = "replayed"
    return replayed


def check(
    module: Module,
    *,
    function: str = "main",
    custom_calls: Mapping[str, Any] | None = None,
    platform_index: int | None = None,
) -> list[Reason]:
    """What keeps a function of a module from being replayed; nothing is traced or run.

    Args:
      module: as for :func:`to_jax`.
      function: which of its functions.
      custom_calls: targets that will be given to :func:`to_jax`.
      platform_index: as for :func:`to_jax`; without it, what any of the platforms runs is looked at.

    Returns:
      Operations, how often each stands in the module, and why it is not replayed; empty if the function is replayable.

    Raises:
      UnsupportedFormatError: this JAX does not read the module.
    """
    program = module if isinstance(module, Program) else read(module)
    return _survey.reasons(program, function, frozenset(custom_calls or ()), platform_index)


def operations(module: Module, *, function: str = "main", platform_index: int | None = None) -> dict[str, int]:
    """The operations that a function of a module reaches, with the targets of custom calls, and how often each stands
    in it; sorted by name.

    Raises:
      UnsupportedFormatError: this JAX does not read the module.
    """
    program = module if isinstance(module, Program) else read(module)
    counts = collections.Counter(o.title for o in _survey.reached(program, function, platform_index))
    return dict(sorted(counts.items()))


def table() -> str:
    """The table of operations in ``docs/replay.md``, as Markdown."""
    return _documentation.table()
