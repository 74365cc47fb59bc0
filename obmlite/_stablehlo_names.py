"""What can be said of a StableHLO module by names alone, without MLIR."""

from collections.abc import Iterable

_DURABLE = frozenset({"builtin", "func", "stablehlo", "vhlo", "chlo"})


def durable(dialects: tuple[str, ...]) -> bool:
    """Whether StableHLO's compatibility promise covers all of a module that has these dialects."""
    return _DURABLE.issuperset(dialects)


def beyond_promise(dialects: Iterable[str]) -> tuple[str, ...]:
    """Those of some dialects that the promise does not cover, sorted."""
    return tuple(sorted(set(dialects) - _DURABLE))
