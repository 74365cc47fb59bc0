"""Artifacts of old: what JAX itself keeps to test its promise with, and modules written for old StableHLO.

JAX's own are from 2023 on, of calling convention 9 and before, some for GPUs and TPUs: those run here as well, as what
they call is replayed.
"""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.extend.mlir.dialects import stablehlo

from obmlite import replay

DATA = "jax._src.internal_test_util.export_back_compat_test_data"  # seen in JAX 0.9.2, 0.10.2 and 0.12

# Those whose results have no sign or order to choose: no eigenvectors.
OLD = {
    "cuda_threefry2x32": 0.0,
    "rocm_threefry2x32": 0.0,
    "cpu_lu_lapack_getrf": 1e-6,
    "cuda_lu_cusolver_getrf": 1e-6,
    "tpu_Lu": 1e-6,
    "cpu_cholesky_lapack_potrf": 1e-5,
    "cuda_cholesky_solver_potrf": 1e-5,
    "tpu_Qr": 1e-5,
    "cpu_triangular_solve_blas_trsm": 1e-5,
    "cpu_tridiagonal_solve_lapack_gtsv": 1e-5,
    "cuda_tridiagonal_solve": 1e-5,
    "stablehlo_dynamic_approx_top_k": 0.0,
    "stablehlo_dynamic_rng_bit_generator": 0.0,
    "stablehlo_dynamic_top_k": 0.0,
    "tpu_ApproxTopK": 0.0,
    "annotate_data_placement": 0.0,
}


def artifacts(found: Any) -> list[dict[str, Any]]:
    """Records of a module of data, which holds them bare, in lists or in mappings."""
    if isinstance(found, dict) and "mlir_module_serialized" in found:
        return [found]
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else ()
    return [record for part in parts for record in artifacts(part)]


def is_wide(array: Any) -> bool:
    dtype = np.asarray(array).dtype
    return dtype.itemsize // (2 if dtype.kind == "c" else 1) > 4


@pytest.mark.parametrize("name", OLD)
def test_what_jax_keeps(name: str) -> None:
    module = pytest.importorskip(f"{DATA}.{name}")
    records = [r for key in sorted(vars(module)) if key.startswith("data") for r in artifacts(vars(module)[key])]
    assert records
    tested = 0
    for record in records:
        arrays = jax.tree.leaves((record["inputs"], record["expected_outputs"]))
        if any(map(is_wide, arrays)):
            continue  # the same again, in 64 bits
        replayed = replay.to_jax(bytes(record["mlir_module_serialized"]))
        results = jax.jit(replayed)(*jax.tree.leaves(record["inputs"]))
        for want, have in zip(jax.tree.leaves(record["expected_outputs"]), results, strict=True):
            np.testing.assert_allclose(np.asarray(have), want, rtol=OLD[name], atol=OLD[name] * 10)
        tested += 1
    assert tested


def test_convention_and_age_of_what_jax_keeps() -> None:
    """So that what is said above is true."""
    module = importlib.import_module(f"{DATA}.stablehlo_dynamic_top_k")
    (record, *_) = artifacts(vars(module))
    assert b"StableHLO_v0.9.0" in record["mlir_module_serialized"][:32]
    assert record["xla_call_module_version"] < 9


def block(x: Any, w: Any) -> Any:
    x = x + jax.nn.softmax(x @ w @ x.T) @ x
    x = lax.scan(lambda c, r: (jnp.tanh(c + r), c), x[0], x)[1]
    return (
        jnp.sort(x, 0),
        x.at[jnp.array([0, 2])].add(1.0),
        jnp.argmax(x, 1),
        lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 1), "SAME"),
    )


@pytest.mark.parametrize("version", ["0.9.0", "0.20.0", "1.0.0", "1.7.0", "1.13.0"])
def test_modules_written_for_an_old_stablehlo(version: str) -> None:
    x, w = np.random.default_rng(0).normal(size=(2, 4, 4)).astype("float32")
    module = export.export(jax.jit(block))(*[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, w)])
    old = stablehlo.serialize_portable_artifact_str(str(module.mlir_module()), version)
    assert f"StableHLO_v{version}".encode() in old[:40]
    for want, have in zip(jax.jit(module.call)(x, w), jax.jit(replay.to_jax(old))(x, w), strict=True):
        np.testing.assert_array_equal(have, want)
