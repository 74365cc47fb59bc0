"""Modules as they are saved: their target, what is said of them, and that they load."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from obmlite import _mlir, _stablehlo

f32 = jax.ShapeDtypeStruct((4, 4), "float32")


def exported(f: Any, *specs: Any, platforms: tuple[str, ...] = ("cpu",), **options: Any) -> export.Exported:
    return export.export(jax.jit(f), platforms=platforms, **options)(*(specs or (f32,)))


def artifact(f: Any, *specs: Any, platforms: tuple[str, ...] = ("cpu",)) -> bytes:
    return bytes(exported(f, *specs, platforms=platforms).mlir_module_serialized)


def header(module: bytes) -> str:
    """The version in a portable artifact's first bytes."""
    found = re.match(rb"ML\xefR.StableHLO_v([\d.]+)\0", module, re.DOTALL)
    assert found
    return found[1].decode()


def test_the_oldest_target_is_tried_first() -> None:
    module = _stablehlo.normalise(artifact(jnp.sin))
    assert module.version == header(module.artifact) == _stablehlo.OLDEST_TARGET


def test_targets_go_upward_from_the_oldest() -> None:
    targets = _stablehlo._targets()
    keys = [tuple(map(int, t.split("."))) for t in targets]
    assert targets[0] == _stablehlo.OLDEST_TARGET
    assert keys == sorted(set(keys))
    assert targets[-1] == _stablehlo.stablehlo.get_current_version()


@pytest.mark.parametrize("refused", [1, 2, 3])
def test_the_next_target_is_taken_where_one_refuses(refused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = _stablehlo._targets()
    if refused >= len(targets):
        pytest.skip("this JAX has fewer targets")
    serialize = _stablehlo.stablehlo.serialize_portable_artifact

    def refuse(module: Any, version: str, mixed: bool) -> Any:
        if version in targets[:refused]:
            raise ValueError("failed to serialize module")
        return serialize(module, version, mixed)

    monkeypatch.setattr(_stablehlo.stablehlo, "serialize_portable_artifact", refuse)
    module = _stablehlo.normalise(artifact(jnp.sin))
    assert module.version == header(module.artifact) == targets[refused]


def test_a_module_that_no_target_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = artifact(jnp.sin)

    def refuse(*_: Any) -> Any:
        raise ValueError("failed to serialize module")

    monkeypatch.setattr(_stablehlo.stablehlo, "serialize_portable_artifact", refuse)
    with pytest.raises(ValueError, match="failed to serialize"):
        _stablehlo.normalise(data)


def top_k(x: Any) -> Any:
    return lax.top_k(x, 4)[0]


def _in_scan(x: Any) -> Any:
    return lax.scan(lambda c, _: (jnp.linalg.cholesky(c @ c.T), None), x, None, 2)[0]


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (jnp.sin, set()),
        (jnp.linalg.cholesky, {"lapack_spotrf_ffi"}),
        (jax.jit(jax.jit(jnp.linalg.cholesky)), {"lapack_spotrf_ffi"}),
        (_in_scan, {"lapack_spotrf_ffi"}),
        (lambda x: lax.cond(x[0, 0] > 0, jnp.linalg.cholesky, lambda x: x, x), {"lapack_spotrf_ffi"}),
    ],
    ids=["none", "top", "jit in jit", "scan", "cond"],
)
def test_custom_calls_anywhere(f: Any, expected: set[str]) -> None:
    module = _stablehlo.normalise(artifact(f))
    assert {c for c in module.custom_calls if c.startswith("lapack_")} == expected
    assert list(module.custom_calls) == sorted(set(module.custom_calls))


def test_custom_calls_of_every_platform() -> None:
    spec = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 2*b"), "float32")
    module = _stablehlo.normalise(artifact(lambda x: jnp.linalg.cholesky(x @ x.T), spec, platforms=("cpu", "tpu")))
    assert "shape_assertion" in module.custom_calls
    assert "lapack_spotrf_ffi" in module.custom_calls
    assert len(module.custom_calls) >= 2


def test_dialects() -> None:
    assert _stablehlo.normalise(artifact(jnp.sin)).dialects == ("builtin", "func", "stablehlo")


def test_a_mesh_is_seen() -> None:
    axis = jax.sharding.AxisType.Auto
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("x",), axis_types=(axis,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    data = artifact(lambda x: jnp.sin(lax.with_sharding_constraint(x, sharding)))
    assert _stablehlo.normalise(data).dialects == ("builtin", "func", "sdy", "stablehlo")


@pytest.mark.parametrize("f", [jnp.sin, _in_scan, top_k], ids=["plain", "custom call", "top_k"])
def test_look_says_what_normalise_said(f: Any) -> None:
    data = artifact(f, platforms=("cpu", "tpu"))
    module = _stablehlo.normalise(data)
    assert _mlir.look(module.artifact) == (module.custom_calls, module.dialects)
    assert _mlir.look(data) == (module.custom_calls, module.dialects)


def test_look_changes_nothing() -> None:
    table = np.arange(1000, dtype="f4")
    data = artifact(lambda x: x + table[3] + jnp.asarray(table)[:4])
    before = bytes(data)
    _mlir.look(data)
    assert data == before
    assert len(_stablehlo.normalise(data).hoisted) == 1


def test_no_source_locations() -> None:
    def a_telling_name(x: Any) -> Any:
        return jnp.sin(x)

    data = artifact(a_telling_name)
    assert b"test_stablehlo.py" in data
    module = _stablehlo.normalise(data)
    assert b"test_stablehlo" not in module.artifact
    assert len(module.artifact) < len(data)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("f", [jnp.sin, _in_scan, top_k], ids=["plain", "custom call", "top_k"])
def test_the_artifact_loads_and_computes_the_same(f: Any, symbolic: bool) -> None:
    if symbolic and f is _in_scan:
        f32_or_symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, b"), "float32")
    else:
        f32_or_symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 4") if symbolic else (4, 4), "float32")
    before = exported(f, f32_or_symbolic, platforms=("cpu", "tpu"))
    module = _stablehlo.normalise(before.mlir_module_serialized)
    assert module.hoisted == ()
    after = dataclasses.replace(before, mlir_module_serialized=module.artifact)
    again = export.deserialize(after.serialize())
    x = np.eye(4, dtype="f4") * 3 + 1
    np.testing.assert_array_equal(again.call(x), before.call(x))


def test_normalising_again_changes_nothing() -> None:
    table = np.arange(1000, dtype="f4")
    first = _stablehlo.normalise(artifact(lambda x: jax.jit(lambda x: x + jnp.asarray(table)[:4])(x)))
    second = _stablehlo.normalise(first.artifact)
    assert second == dataclasses.replace(first, hoisted=())
