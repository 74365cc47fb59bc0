"""Options for XLA that are kept with functions: what they may be, since whoever loads a package compiles with them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from obmlite.errors import ExportError, UnsupportedFormatError

__all__ = ["CompileOptions", "check", "check_saved"]

CompileOptions: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Platform → option → value, a bool, int, float or str."""

# XLA's options that write or read files, or are handed on to another compiler, have such names, or values that are more
# than one word; those that tune have neither.
_BEYOND_TUNING = re.compile("dump|file|path|dir|cache|extra|results|llvm_ir")
_WORD = re.compile(r"[\w.+-]{0,64}", re.ASCII)


def _beyond_tuning(options: CompileOptions) -> list[str]:
    return [
        f"{platform}: {option}={value}"
        for platform, own in options.items()
        for option, value in own.items()
        if _BEYOND_TUNING.search(option) or (isinstance(value, str) and not _WORD.fullmatch(value))
    ]


def check(options: CompileOptions, platforms: Sequence[str]) -> CompileOptions:
    """Refuses options that are not to be kept with a function.

    Args:
      options: platform → option → value.
      platforms: that the function is exported for.

    Raises:
      ExportError: a platform is none of the function's, an option is no name and value, or it is for this machine: it
        names files, or flags of another compiler.
    """
    for platform, own in options.items():
        if platform not in platforms:
            raise ExportError(
                "Compile options are given for a platform that the function is not exported for.",
                field="compile_options",
                expected=", ".join(platforms),
                found=str(platform),
            )
        for option, value in own.items():
            if type(option) is not str or type(value) not in (bool, int, float, str):
                raise ExportError(
                    "A compile option is a name with a bool, int, float or str.",
                    field="compile_options",
                    expected='such as {"cpu": {"xla_cpu_enable_fast_min_max": True}}',
                    found=f"{option!r}: {value!r:.80}",
                )
    if found := _beyond_tuning(options):
        raise ExportError(
            "A compile option that names files, or flags of another compiler, is not kept with a function.",
            field="compile_options",
            expected="options that tune: numbers, booleans and single words",
            found=", ".join(found)[:300],
            fix="set it where the function is compiled, by XLA_FLAGS",
        )
    return {platform: dict(own) for platform, own in options.items()}


def check_saved(options: CompileOptions) -> None:
    """Refuses options of a package that no save has written, since they do more than tune.

    Raises:
      UnsupportedFormatError: one names files, or flags of another compiler.
    """
    if found := _beyond_tuning(options):
        raise UnsupportedFormatError(
            "A function is to be compiled with options for XLA that name files, or flags of another compiler.",
            field="compile_options",
            expected="options that tune: numbers, booleans and single words",
            found=", ".join(found)[:300],
            fix="load it with compile_options=False",
        )
