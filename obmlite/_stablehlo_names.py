"""What can be said of a StableHLO module by names alone, without MLIR."""

_DURABLE = frozenset({"builtin", "func", "stablehlo", "vhlo", "chlo"})


def durable(dialects: tuple[str, ...]) -> bool:
    """Whether StableHLO's compatibility promise covers all of a module that has these dialects."""
    return _DURABLE.issuperset(dialects)
