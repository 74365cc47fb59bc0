"""Replay against ``Exported.call``, over the functions of :mod:`tests.replay.cases` and the networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from obmlite import replay
from tests import networks
from tests.replay.cases import GROUPS, Case

OTHER_JAX = not jax.__version__.startswith("0.10.")
SLOW = {"unary", "unary, complex", "special", "random", "decompositions", "numpy", "nn"}
"""Groups that take long to compile: on the JAX of the main environment only."""

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler options: what is compared is what XLA is given, and most of the time goes into LLVM."""


def compiled(fn: Callable[..., Any]) -> Any:
    return jax.jit(fn, compiler_options=FAST)


def structs(arrays: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(np.shape(a), a.dtype) for a in arrays]


def compare(case: Case, wanted: Sequence[Any], got: Sequence[Any]) -> list[str]:
    wrong = []
    for n, (want, have) in enumerate(zip(wanted, got, strict=True)):
        want, have = np.asarray(want), np.asarray(have)
        same = (want.dtype, want.shape) == (have.dtype, have.shape)
        if same and want.tobytes() == have.tobytes():
            continue
        if same and case.rtol and jnp.issubdtype(want.dtype, jnp.inexact):
            wide = np.complex128 if want.dtype.kind == "c" else np.float64
            off = np.abs(want.astype(wide) - have.astype(wide))
            if np.nanmax(off) <= case.rtol * np.nanmax(np.abs(want.astype(wide))):
                continue
        wrong.append(f"{case.name}, result {n}: {want} {want.dtype}, replayed {have} {have.dtype}")
    return wrong


@pytest.mark.parametrize(
    "group",
    [
        pytest.param(g, marks=[pytest.mark.long, pytest.mark.skipif(OTHER_JAX, reason="slow")] if g in SLOW else [])
        for g in GROUPS
    ],
)
def test_functions_give_what_their_export_gives(group: str) -> None:
    cases = GROUPS[group]

    def functions(*arguments: Any) -> list[list[Any]]:
        rest = iter(arguments)
        return [jax.tree.leaves(case.fn(*(next(rest) for _ in case.arguments))) for case in cases]

    arguments = [argument for case in cases for argument in case.arguments]
    exported = export.export(jax.jit(functions, keep_unused=True))(*structs(arguments))
    wanted = compiled(exported.call)(*arguments)
    got = jax.tree.unflatten(
        jax.tree.structure(wanted), compiled(replay.to_jax(exported.mlir_module_serialized))(*arguments)
    )
    wrong = [text for case, w, g in zip(cases, wanted, got, strict=True) for text in compare(case, w, g)]
    assert not wrong, "\n".join(wrong)


# --- symbolic shapes, on several platforms

B4 = ("b, 4", [(3, 4)])


def open_step(carry: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A step on arrays of an open size, which it asks for."""
    return jnp.tanh(carry + row / row.shape[0]), carry[::-1] + jnp.arange(carry.shape[0])


SYMBOLIC: dict[str, tuple[Callable[..., Any], tuple[str, list[tuple[int, ...]]]]] = {
    "layers": (lambda x: jax.nn.softmax(jnp.tanh(x @ jnp.ones((4, 3)))), B4),
    "reshape": (lambda x: (x.reshape(-1), x.reshape(x.shape[0] * 2, -1), x.T), B4),
    "iota": (lambda x: (jnp.arange(x.shape[0] * 4 // 2 + 1), x.mean(), x.var(), jnp.eye(x.shape[0])), B4),
    "sorting": (lambda x: (jnp.sort(x, 0), lax.top_k(x, 2), jnp.argmax(x, 0), jnp.median(x, 0)), B4),
    "cumulative": (lambda x: (jnp.cumsum(x, 0), lax.cummax(x, 0), jnp.cumprod(x)), B4),
    "slices": (lambda x: (x[1:], x[::2], lax.dynamic_slice(x, (1, 0), (2, 2)), x.at[0].set(1), x[-1]), B4),
    "padding": (lambda x: (jnp.pad(x, ((1, 2), (0, 0))), jnp.concatenate([x, x]), jnp.roll(x, 1, 0)), B4),
    "scan": (lambda x: lax.scan(lambda c, r: (c + r, c * 2), x[0], x), B4),
    "scan, backward": (lambda x: lax.scan(lambda c, r: (c + r, c * 2), x[0], x, reverse=True), B4),
    "loops": (lambda x: (lax.fori_loop(0, x.shape[0], lambda i, c: c + x[i], x[0]), lax.map(jnp.sum, x)), B4),
    "branches": (lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), B4),
    "while": (lambda x: lax.while_loop(lambda c: c.sum() < 99, lambda c: jnp.abs(c) * 2 + 1, x), B4),
    "scan over another dimension": (lambda x: lax.scan(open_step, x[:, 0], x.T), B4),
    "scan over another dimension, backward": (lambda x: lax.scan(open_step, x[:, 0], x.T, reverse=True), B4),
    "scan within scan": (
        lambda x: lax.scan(lambda c, r: lax.scan(open_step, c + r, x.T * r), jnp.zeros(x.shape[0]), x.T),
        B4,
    ),
    "scan in a branch": (
        lambda x: lax.cond(x.sum() > 99, lambda x: x[:, 0], lambda x: lax.scan(open_step, x[:, 1], x.T)[0], x),
        B4,
    ),
    "branch in a scan": (
        lambda x: lax.scan(
            lambda c, r: (lax.cond(r[0] > 0, lambda: c + r, lambda: c * jnp.ones(x.shape[0])), r), x[:, 0], x.T
        ),
        B4,
    ),
    "slices of open sizes in loops": (
        lambda x: (
            lax.fori_loop(0, 3, lambda i, c: c + lax.dynamic_slice(x, (0, i), (x.shape[0], 2)), x[:, :2]),
            lax.fori_loop(0, 3, lambda i, c: c + lax.dynamic_index_in_dim(x, 2 * i, 1), x[:, :1]),
            lax.while_loop(
                lambda c: c[0] < 4,
                lambda c: (c[0] + 1, c[1] + lax.dynamic_slice(x, (c[0] - 2, c[0]), (x.shape[0] - 1, 1))),
                (0, x[1:, :1]),
            ),
        ),
        B4,
    ),
    "slices at open places": (
        lambda x: (
            lax.dynamic_slice(x, (x.argmax() % 3, x.argmin() % 2), (x.shape[0] - 1, 2)),
            lax.dynamic_slice(x.reshape(-1), (x.argmax(),), (x.shape[0],)),
        ),
        B4,
    ),
    "gradient of a scan": (
        jax.grad(lambda x: lax.scan(lambda c, r: (jnp.tanh(c + r), c * r), x[:, 0], x.T)[1].sum()),
        B4,
    ),
    "convolution": (
        lambda x: lax.conv_general_dilated(x[:, None], jnp.ones((2, 1, 3)), (1,), "SAME"),
        ("b, c", [(2, 5)]),
    ),
    "window": (lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2), (1, 2), "SAME"), ("b, c", [(2, 5)])),
    "random": (
        lambda x: (jax.random.normal(jax.random.key(0), x.shape), jax.random.permutation(jax.random.key(0), x, 1)),
        B4,
    ),
    "rbg": (lambda x: jax.random.normal(jax.random.key(0, impl="rbg"), x.shape), B4),
    "attention": (lambda x: jax.nn.dot_product_attention(x, x, x, is_causal=True), ("b, t, 2, 4", [(3, 5, 2, 4)])),
    "special": (lambda x: (jax.scipy.special.erf(x), jax.nn.gelu(x), lax.lgamma(x), lax.erf_inv(x), lax.acos(x)), B4),
    "transform": (lambda x: (jnp.fft.fft(x), jnp.fft.rfft(x)), B4),
    "scatter": (
        lambda x: (
            jnp.zeros((x.shape[0], 3)).at[:, 0].add(x[:, 0]),
            jax.ops.segment_sum(x, jnp.zeros(x.shape[0], "int32"), 2),
        ),
        B4,
    ),
    "gradient": (jax.grad(lambda x: (jnp.tanh(x) @ x.T).sum()), B4),
}
LINEAR: dict[str, tuple[Callable[..., Any], tuple[str, list[tuple[int, ...]]]]] = {
    "batched": (
        lambda x: (jnp.linalg.eigh(x @ x.mT), jnp.linalg.solve(x, x), jnp.linalg.eig(x), jnp.linalg.qr(x)),
        ("b, 3, 3", [(2, 3, 3)]),
    ),
    "tall": (lambda x: (jnp.linalg.qr(x), jnp.linalg.svd(x)[1]), ("b, 4", [(6, 4)])),
}


@pytest.mark.parametrize(
    ("name", "platforms"),
    [*((name, ("cuda", "cpu", "tpu")) for name in SYMBOLIC), *((name, ("cpu",)) for name in LINEAR)],
)
def test_symbolic_shapes(name: str, platforms: tuple[str, ...]) -> None:
    function, (shape, sizes) = {**SYMBOLIC, **LINEAR}[name]
    dims = export.symbolic_shape(
        shape, constraints=["b >= 4" if name == "tall" else "b >= 2", *(["c >= 3"] if "c" in shape else [])]
    )
    exported = export.export(jax.jit(function), platforms=platforms)(jax.ShapeDtypeStruct(dims, "float32"))
    index = platforms.index("cpu") if len(platforms) > 1 else None
    replayed = replay.to_jax(exported.mlir_module_serialized, platform_index=index)
    for size in sizes:
        x = np.random.default_rng(0).uniform(-2, 2, size).astype("float32")
        wanted = jax.tree.leaves(compiled(exported.call)(x))
        got = compiled(replayed)(x)
        assert not compare(Case(name, function, ()), wanted, got), (name, size)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm"])
@pytest.mark.parametrize(
    ("shape", "open_shape"), [((2, 5, 3), None), ((3, 4), None), ((4, 4), None), ((5, 3), "m, n"), ((3, 5), "n, m")]
)
def test_singular_values_saved_for_any_platform(shape: tuple[int, ...], open_shape: str | None, platform: str) -> None:
    """By Jacobi's method where sizes are known, else by QR, which takes a wide matrix as its transpose."""
    dims = shape if open_shape is None else export.symbolic_shape(open_shape, constraints=["m >= n + 1"])

    def functions(x: jax.Array) -> Any:
        return jnp.linalg.svd(x), jnp.linalg.svd(x, full_matrices=False), jnp.linalg.svd(x, compute_uv=False)

    exported = export.export(jax.jit(functions), platforms=[platform])(jax.ShapeDtypeStruct(dims, "complex64"))
    program = replay.read(exported.mlir_module_serialized)
    prefix = {"cpu": "lapack_cgesdd", "cuda": "cusolver_gesvd", "rocm": "hipsolver_gesvd"}[platform]
    assert any(prefix in name for name in replay.operations(program))
    real, imaginary = np.random.default_rng(0).normal(size=(2, *shape))
    x = (real + 1j * imaginary).astype("complex64")
    wanted = jax.tree.leaves(compiled(functions)(x))
    got = compiled(replay.to_jax(program))(x)
    assert [r.shape for r in got] == [r.shape for r in wanted]
    for u, s, vh in (got[:3], got[3:6]):
        k = s.shape[-1]
        np.testing.assert_allclose((u[..., :k] * s[..., None, :]) @ vh[..., :k, :], x, atol=1e-5)
        np.testing.assert_allclose(s, wanted[6], rtol=1e-5)
    np.testing.assert_allclose(got[6], wanted[6], rtol=1e-5)


def test_shapes_that_the_module_refuses() -> None:
    exported = export.export(jax.jit(lambda x: x * 2))(jax.ShapeDtypeStruct(export.symbolic_shape("2*b, 4"), "float32"))
    replayed = jax.jit(replay.to_jax(exported.mlir_module_serialized))
    with pytest.raises(ValueError, match="Division had remainder 1 when computing the value of 'b'"):
        replayed(np.ones((3, 4), "float32"))
    with pytest.raises(ValueError, match=r"expected: tensor<\?x4xf32>\n  found: float32\[2, 5\]"):
        replayed(np.ones((2, 5), "float32"))


# --- networks


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if name in ("cnn_in_training", "transformer", "spectral") else [])
        for name in networks.ALL
    ],
)
def test_networks_forward_and_gradient(name: str) -> None:
    network = networks.ALL[name]()
    leaves, tree = jax.tree.flatten([*network.weights.values(), *network.inputs.values()])
    keys = [jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    arrays = [jax.random.key_data(leaf) if key else leaf for leaf, key in zip(leaves, keys, strict=True)]

    def flat(*values: Any) -> list[Any]:
        given = [jax.random.wrap_key_data(v) if key else v for v, key in zip(values, keys, strict=True)]
        results = jax.tree.leaves(network.fn(*jax.tree.unflatten(tree, given), **network.static))
        return [jax.random.key_data(r) if jnp.issubdtype(r.dtype, jax.dtypes.prng_key) else r for r in results]

    def results_and_gradient(call: Callable[..., Any]) -> tuple[Any, Any]:
        free = [n for n, a in enumerate(arrays) if jnp.issubdtype(a.dtype, jnp.inexact)]

        def loss(values: list[Any]) -> Any:
            given = list(arrays)
            for n, value in zip(free, values, strict=True):
                given[n] = value
            results = call(*given)
            floating = [r for r in results if jnp.issubdtype(r.dtype, jnp.inexact)]
            return sum(jnp.sum(jnp.real(r * jnp.conj(r))) for r in floating), results

        (_, results), gradient = compiled(jax.value_and_grad(loss, has_aux=True))([arrays[n] for n in free])
        return results, gradient

    exported = export.export(jax.jit(flat, keep_unused=True))(*structs(arrays))
    replayed = replay.to_jax(exported.mlir_module_serialized)
    wanted, got = compiled(exported.call)(*arrays), compiled(replayed)(*arrays)
    assert not compare(Case(name, flat, ()), wanted, got)
    (_, gradient), (_, again) = results_and_gradient(flat), results_and_gradient(replayed)
    for want, have in zip(gradient, again, strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=2e-6 * max(1.0, float(jnp.max(jnp.abs(want)))))


@pytest.mark.parametrize("name", ["cnn", "transformer", "lstm"])
def test_a_compiled_replay_costs_what_the_original_costs(name: str) -> None:
    network = networks.ALL[name]()
    leaves, tree = jax.tree.flatten([*network.weights.values(), *network.inputs.values()])
    original = jax.jit(lambda *xs: jax.tree.leaves(network.fn(*jax.tree.unflatten(tree, xs), **network.static)))
    exported = export.export(original)(*structs(leaves))
    replayed = jax.jit(replay.to_jax(exported.mlir_module_serialized))
    kept = [leaves[n] for n in exported.module_kept_var_idx]

    def cost(compiled: Any) -> tuple[float, float]:
        found = compiled.cost_analysis()
        return found["flops"], found["bytes accessed"]

    assert cost(replayed.lower(*kept).compile()) == cost(original.lower(*leaves).compile())
