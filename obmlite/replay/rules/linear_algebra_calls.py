"""Calls of LAPACK and cuSOLVER that JAX promises to keep, each as the primitive of ``lax.linalg`` that made it.

A call has a result more than the primitive: the routine's ``info``, 0 where it succeeded. The primitives give NaN where
it did not; info is read from those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from obmlite.replay._interpreter import Site
from obmlite.replay._program import Operation
from obmlite.replay._table import CUSTOM_CALLS, rule

GROUP = "linear algebra"


def _targets(name: str, kinds: str = "sdcz", gpu: str = "") -> tuple[str, ...]:
    lapack = tuple(f"lapack_{kind}{name}_ffi" for kind in kinds)
    return (*lapack, *(f"{maker}solver_{gpu}_ffi" for maker in ("cu", "hip") if gpu))


def _option(operation: Operation, name: str) -> str:
    """An option of a routine: a letter, as LAPACK has them."""
    return chr(operation["mhlo.backend_config"][name])


def _lower(operation: Operation) -> bool:
    config = operation["mhlo.backend_config"]
    return _option(operation, "uplo") == "L" if "uplo" in config else bool(config.get("lower", True))


def _info(x: Any, dimensions: int) -> Any:
    """0 where the last dimensions of an array hold no NaN, else 1; -1 is for what only JAX's own rules refuse."""
    axes = tuple(range(np.ndim(x) - dimensions, np.ndim(x)))
    return lax.convert_element_type(lax.reduce_or(lax.ne(x, x), axes), np.dtype(np.int32))


def _call(*targets: str, meaning: str, refuse: Callable[[Operation], str | None] | None = None) -> Callable[[Any], Any]:
    return rule(*targets, group=GROUP, table=CUSTOM_CALLS, meaning=meaning, refuse=refuse)


@_call(*_targets("potrf", gpu="potrf"), meaning="`lax.linalg.cholesky`")
def _potrf(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    (x,) = operands
    if _lower(operation):
        factor = lax.linalg.cholesky_p.bind(x)
    else:
        factor = jnp.conj(jnp.swapaxes(lax.linalg.cholesky_p.bind(jnp.conj(jnp.swapaxes(x, -1, -2))), -1, -2))
    return factor, _info(factor, 2)


@_call(*_targets("getrf", gpu="getrf"), meaning="`lax.linalg.lu`")
def _getrf(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    factors, pivots, _ = lax.linalg.lu(operands[0])
    # Positive where a pivot is zero, which JAX takes as a success; it is never negative here.
    return factors, lax.add(pivots, lax.full_like(pivots, 1)), jnp.zeros(pivots.shape[:-1], np.int32)


@_call("LuDecomposition", meaning="`lax.linalg.lu`")
def _lu(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return lax.linalg.lu(operands[0])


@_call("Qr", *_targets("geqrf", gpu="geqrf"), meaning='`jnp.linalg.qr`, mode "raw"')
def _geqrf(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    turned, taus = jnp.linalg.qr(operands[0], mode="raw")
    return jnp.swapaxes(turned, -1, -2), taus


@_call("cu_lu_pivots_to_permutation", "hip_lu_pivots_to_permutation", meaning="`lax.linalg.lu_pivots_to_permutation`")
def _permutation(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return lax.linalg.lu_pivots_to_permutation(operands[0], operation.types[0].shape[-1])


@_call(
    "ProductOfElementaryHouseholderReflectors",
    *_targets("orgqr", "sd", "orgqr"),
    *_targets("ungqr", "cz"),
    meaning="`lax.linalg.householder_product`",
)
def _orgqr(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return lax.linalg.householder_product(*operands)


def _values_only(operation: Operation) -> str | None:
    return None if _option(operation, "mode") == "V" else "without eigenvectors"


@_call(*_targets("syevd", "sd"), *_targets("heevd", "cz"), meaning="`lax.linalg.eigh`", refuse=_values_only)
@_call("cusolver_syevd_ffi", "hipsolver_syevd_ffi", meaning="`lax.linalg.eigh`")
def _syevd(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    vectors, values = lax.linalg.eigh(operands[0], lower=_lower(operation), symmetrize_input=False)
    return vectors, values, _info(values, 1)


@_call("Eigh", meaning="`lax.linalg.eigh`")
def _eigh(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    lower, ordered, *_ = str(operation["backend_config"]).split(",")
    options = {"lower": lower == "1", "sort_eigenvalues": ordered == "1"}
    return lax.linalg.eigh(operands[0], symmetrize_input=False, **options)


# Whatever the routine's algorithm, the platform's own is taken: none of the others is there on every platform.


@_call(*_targets("gesdd"), *_targets("gesvd"), meaning="`lax.linalg.svd`")
def _gesdd(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    mode = _option(operation, "mode")
    return _svd(operation, *operands, vectors=mode != "N", full=mode == "A")


@_call("cusolver_gesvd_ffi", "hipsolver_gesvd_ffi", "hipsolver_gesdd_ffi", meaning="`lax.linalg.svd`")
def _gesvd(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    config = operation["mhlo.backend_config"]
    x, values, u, vh, info = _svd(operation, *operands, vectors=config["compute_uv"], full=config["full_matrices"])
    # A wide matrix goes in as its transpose, of which the vectors of either side are the other's.
    return (x, values, vh, u, info) if config["transposed"] and config["compute_uv"] else (x, values, u, vh, info)


@_call(
    *(f"{maker}solver_{name}_ffi" for name in ("gesvdj", "gesvdp") for maker in ("cu", "hip")),
    meaning="`lax.linalg.svd`",
)
def _gesvdj(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    config = operation["mhlo.backend_config"]
    x, values, u, vh, info = _svd(operation, *operands, vectors=config["compute_uv"], full=config["full_matrices"])
    return x, values, u, jnp.conj(jnp.swapaxes(vh, -1, -2)) if config["compute_uv"] else vh, info


def _svd(operation: Operation, x: Any, *, vectors: bool, full: bool) -> tuple[Any, ...]:
    """The results of a routine: x, which it works in, singular values, U, Vᴴ and info."""
    if vectors:
        # Of a square matrix they are the same, and only the derivatives of the reduced ones are implemented.
        u, values, vh = lax.linalg.svd(x, full_matrices=full and x.shape[-2] != x.shape[-1])
    else:
        values = lax.linalg.svd(x, compute_uv=False)
        # What the routine does not compute has a place all the same, and nobody looks at it.
        u, vh = (
            jnp.zeros(_shape(kind, x, size), kind.dtype)
            for kind, size in zip(operation.types[2:4], x.shape[-2:], strict=True)
        )
    return x, values, u, vh, _info(values, 1)


def _shape(kind: Any, x: Any, size: int) -> tuple[int, ...]:
    """The shape of a type with x's leading sizes; its own, where they are open, are ``size``."""
    own = tuple(size if n is None else n for n in kind.shape[-2:])
    return (*x.shape[:-2], *own) if own else ()


@_call(*_targets("geev"), meaning="`lax.linalg.eig`")
def _geev(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    (x,) = operands
    config = operation["mhlo.backend_config"]
    left, right = (chr(config[name]) == "V" for name in ("compute_left", "compute_right"))
    values, *vectors = lax.linalg.eig(x, compute_left_eigenvectors=left, compute_right_eigenvectors=right)
    rest = iter(vectors)
    u, v = (next(rest) if wanted else jnp.zeros(x.shape, values.dtype) for wanted in (left, right))
    parts = (values,) if x.dtype.kind == "c" else (lax.real(values), lax.imag(values))
    return *parts, u, v, _info(values, 1)


@_call(*_targets("gehrd"), meaning="`lax.linalg.hessenberg`")
def _gehrd(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    form, taus = lax.linalg.hessenberg(operands[0])
    return form, taus, _info(form, 2)


@_call(*_targets("gees"), meaning="`lax.linalg.schur`")
def _gees(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    (x,) = operands
    wanted = _option(operation, "mode") == "V"
    form, *vectors = lax.linalg.schur(x, compute_schur_vectors=wanted)
    # Its eigenvalues, and how many of them a sort chose, JAX does not use.
    rest = (jnp.zeros(_trimmed(kind.shape, x.shape), kind.dtype) for kind in operation.types[2:-1])
    return form, vectors[0] if wanted else jnp.zeros_like(form), *rest, _info(form, 2)


def _trimmed(shape: Sequence[int | None], like: Sequence[int]) -> tuple[int, ...]:
    return tuple(like[: len(shape)])


@_call(*_targets("sytrd", "sd", "sytrd"), *_targets("hetrd", "cz"), meaning="`lax.linalg.tridiagonal`")
def _sytrd(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    form, diagonal, beside, taus = lax.linalg.tridiagonal(operands[0], lower=_lower(operation))
    return form, diagonal, beside, taus, _info(diagonal, 1)


@_call(*_targets("gtsv"), meaning="`lax.linalg.tridiagonal_solve`")
def _gtsv(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    x = lax.linalg.tridiagonal_solve(*operands)
    return *operands[:3], x, _info(x, 2)


@_call("cusparse_gtsv2_ffi", meaning="`lax.linalg.tridiagonal_solve`")
def _gtsv2(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    return lax.linalg.tridiagonal_solve(*operands)


@_call(*_targets("trsm"), meaning="`lax.linalg.triangular_solve`")
def _trsm(site: Site, operation: Operation, operands: Sequence[Any]) -> Any:
    transpose = _option(operation, "trans_x")
    return lax.linalg.triangular_solve(
        *operands[:2],
        left_side=_option(operation, "side") == "L",
        lower=_lower(operation),
        transpose_a=transpose != "N",
        conjugate_a=transpose == "C",
        unit_diagonal=_option(operation, "diag") == "U",
    )
