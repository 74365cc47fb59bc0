"""Custom calls that JAX promises to keep, each as the JAX function that made it. (Linear algebra has a module of its
own.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from obmlite.replay._interpreter import Site, is_known, traceable
from obmlite.replay._program import Operation
from obmlite.replay._table import CUSTOM_CALLS, assertion_failed, known_ints, rule, unsupported
from obmlite.replay.rules import random, reduction

GROUP = "custom calls"


@rule("stablehlo.custom_call", group=GROUP, meaning="by its target (below), or by `custom_calls=`")
def _custom_call(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    target = operation["call_target_name"]
    if target in site.custom_calls:
        config = operation.get("mhlo.backend_config", operation.get("backend_config", {}))
        options = config if isinstance(config, dict) else {"backend_config": config}
        found = site.custom_calls[target](*map(traceable, operands), **options)
        return found if isinstance(found, (list, tuple)) else (found,)
    known = CUSTOM_CALLS.get(target)
    if known is None:
        raise unsupported(operation, "there is no rule for it")
    # Where a result's shape is dynamic the call is told of it, in operands that tell us nothing new.
    shapes = set(np.ravel(operation.get("indices_of_shape_operands", ())).tolist())
    operands = [value for n, value in enumerate(operands) if n not in shapes]
    given = operands if target in _WITH_KNOWN else [traceable(value) for value in operands]
    found = known.apply(site, operation, given)
    several = isinstance(found, (list, tuple))
    return (
        (tuple(found),) if several and operation.types[0:1] and operation.types[0].text.startswith("tuple<") else found
    )


_WITH_KNOWN = frozenset({"shape_assertion"}) | {
    f"stablehlo.dynamic_{name}" for name in ("reduce_window", "rng_bit_generator", "top_k", "approx_top_k")
}


@rule("shape_assertion", group=GROUP, table=CUSTOM_CALLS, meaning="an error while tracing, if it does not hold")
def _shape_assertion(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    holds, *numbers = operands
    if not is_known(holds):
        raise unsupported(operation, "it depends on the content of an array")
    if not holds:
        values = {n: int(number) for n, number in enumerate(numbers) if is_known(number)}
        raise assertion_failed(str(operation.get("error_message", "")), values)
    return ()


@rule("stablehlo.dynamic_reduce_window", group=GROUP, table=CUSTOM_CALLS, meaning="as `reduce_window`")
def _dynamic_reduce_window(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    count = len(operation.results)
    window, strides, base, dilation, padding = (
        known_ints(operation, value, "window") for value in operands[2 * count :]
    )
    (name,) = operation["called_computations"]
    return reduction.reduce_window(
        site,
        site.program.functions[name].body,
        [traceable(value) for value in operands[:count]],
        operands[count : 2 * count],
        window,
        strides,
        list(zip(padding[::2], padding[1::2], strict=True)),
        base,
        dilation,
    )


@rule("stablehlo.dynamic_rng_bit_generator", group=GROUP, table=CUSTOM_CALLS, meaning="`lax.rng_bit_generator`")
def _dynamic_rng_bit_generator(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    state, shape = operands
    return random.bits(operation, state, known_ints(operation, shape, "shape"), str(operation["rng_algorithm"]))


@rule("stablehlo.dynamic_top_k", group=GROUP, table=CUSTOM_CALLS, meaning="`lax.top_k`")
def _dynamic_top_k(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    x, k = operands
    (number,) = known_ints(operation, k, "k")
    return lax.top_k(traceable(x), number)


_TOP_K = {"top_k_gt": "approx_max_k", "top_k_lt": "approx_min_k"}


def _approximate(operation: Operation) -> str | None:
    (name,) = operation.get("called_computations", None) or ("",)
    if not any(name.startswith(prefix) for prefix in _TOP_K):
        return "by a comparator that is not JAX's"
    return None


@rule(
    "ApproxTopK",
    "stablehlo.dynamic_approx_top_k",
    group=GROUP,
    table=CUSTOM_CALLS,
    refuse=_approximate,
    meaning="`lax.approx_max_k`, `lax.approx_min_k`",
)
def _approx_top_k(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    config = operation["mhlo.backend_config"]
    k = config["top_k"] if "top_k" in config else known_ints(operation, operands[-1], "k")[0]
    (name,) = operation["called_computations"]
    function = next(getattr(lax, function) for prefix, function in _TOP_K.items() if name.startswith(prefix))
    return function(
        traceable(operands[0]),
        k,
        reduction_dimension=config["reduction_dim"],
        recall_target=config["recall_target"],
        reduction_input_size_override=config["reduction_input_size_override"],
        aggregate_to_topk=config["aggregate_to_topk"],
    )


@rule(
    "cu_threefry2x32_ffi",
    "hip_threefry2x32_ffi",
    group=GROUP,
    table=CUSTOM_CALLS,
    meaning="threefry's rounds of `lax` operations",
)
def _threefry2x32(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    first, second, x, y = operands
    keys = [first, second, lax.bitwise_xor(lax.bitwise_xor(first, second), lax.full_like(first, 0x1BD11BDA))]
    x, y = lax.add(x, keys[0]), lax.add(y, keys[1])
    for group in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = lax.add(x, y)
            left = lax.shift_left(y, lax.full_like(y, distance))
            y = lax.bitwise_xor(x, lax.bitwise_or(left, lax.shift_right_logical(y, lax.full_like(y, 32 - distance))))
        x = lax.add(x, keys[(group + 1) % 3])
        y = lax.add(lax.add(y, keys[(group + 2) % 3]), lax.full_like(y, group + 1))
    return x, y


@rule("AllocateBuffer", group=GROUP, table=CUSTOM_CALLS, meaning="zeros: it promises no content")
def _allocate(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    kind = operation.types[0]
    return lax.full(kind.sizes, np.zeros((), kind.dtype), kind.dtype)
