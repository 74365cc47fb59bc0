"""What JAX and StableHLO promise to keep, by names: custom calls and dialects.

A custom call runs native code by its name, and a module that was made to do so can crash the process: JAX looks at the
names only when it exports. The names here are those that JAX promises to keep (``jax.export``'s documentation,
"Compatibility guarantees for custom calls"); the same in JAX 0.9.2 to 0.12 but for one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from obmlite._collector import importing
from obmlite.errors import ExportError, ObmliteError, UnsupportedFormatError

_LAPACK = {
    f"lapack_{kind}{name}_ffi"
    for name, kinds in {
        "gees": "sdcz",
        "geev": "sdcz",
        "gehrd": "sdcz",
        "geqrf": "sdcz",
        "gesdd": "sdcz",
        "getrf": "sdcz",
        "gtsv": "sdcz",
        "heevd": "cz",
        "hetrd": "cz",
        "orgqr": "sd",
        "potrf": "sdcz",
        "syevd": "sd",
        "sytrd": "sd",
        "trsm": "sdcz",
        "ungqr": "cz",
    }.items()
    for kind in kinds
}

_GPU = {
    *(f"cusolver_{name}_ffi" for name in ("geqrf", "gesvd", "gesvdj", "getrf", "orgqr", "potrf", "syevd", "sytrd")),
    *(
        f"hipsolver_{name}_ffi"
        for name in ("geqrf", "gesdd", "gesvd", "gesvdj", "getrf", "orgqr", "potrf", "syevd", "sytrd")
    ),
    "cu_lu_pivots_to_permutation",
    "cu_threefry2x32_ffi",
    "cusparse_gtsv2_ffi",
    "hip_lu_pivots_to_permutation",
    "hip_threefry2x32_ffi",
    "mosaic_gpu_v2",
}

_TPU = {"ApproxTopK", "Eigh", "LuDecomposition", "ProductOfElementaryHouseholderReflectors", "Qr", "tpu_custom_call"}

_ANY = {
    "AllocateBuffer",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
    "Sharding",
    "annotate_device_placement",
    "shape_assertion",
    "stablehlo.dynamic_approx_top_k",
    "stablehlo.dynamic_reduce_window",
    "stablehlo.dynamic_rng_bit_generator",
    "stablehlo.dynamic_top_k",
}

STABLE = frozenset(_LAPACK | _GPU | _TPU | _ANY)
"""Targets that JAX promises to keep, but ``tf.call_tf_function``, which nothing here makes."""


def check_custom_calls(targets: Iterable[str], allowed: Collection[str], *, loading: bool) -> None:
    """Refuses custom calls that neither JAX's promise covers nor the user allowed.

    Raises:
      ExportError: there is one, when exporting.
      UnsupportedFormatError: there is one, when loading.
    """
    refused = sorted(set(targets) - STABLE - set(allowed))
    if not refused:
        return
    kind: type[ObmliteError] = UnsupportedFormatError if loading else ExportError
    raise kind(
        "The function makes custom calls that JAX does not promise to keep.",
        field="custom calls",
        expected="those of JAX's list of stable targets",
        found=", ".join(refused),
        fix=f"allow_custom_calls={set(refused)!r}, if you trust the package and have the library that provides them"
        if loading
        else f"allow_custom_calls={set(refused)!r}, here and when loading",
    )


def prepare(artifact: bytes) -> None:
    """Sets up what a module's custom calls need before anything of it may run.

    Without LAPACK's tables, which JAX fills by itself only when it lowers linear algebra of its own, a LAPACK call
    in a deserialized module crashes the process (seen in JAX 0.9.2, 0.10.2 and 0.12). The bytes are looked at, not the
    manifest, which may be wrong.
    """
    if b"lapack_" in artifact:
        from jaxlib import lapack

        with importing():  # of SciPy
            lapack._lapack.initialize()


_DURABLE = frozenset({"builtin", "func", "stablehlo", "vhlo", "chlo"})


def durable(dialects: tuple[str, ...]) -> bool:
    """Whether StableHLO's compatibility promise covers all of a module that has these dialects."""
    return _DURABLE.issuperset(dialects)


def beyond_promise(dialects: Iterable[str]) -> tuple[str, ...]:
    """Those of some dialects that the promise does not cover, sorted."""
    return tuple(sorted(set(dialects) - _DURABLE))
