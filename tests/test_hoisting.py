"""Captured arrays leave a module: which, from where, and that it still computes the same to the last bit."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export, lax
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import chlo, sdy, stablehlo

from obmlite import _stablehlo, dtypes
from obmlite._hoisting import Constant

ROOT = pathlib.Path(__file__).parent.parent
ALL_PLATFORMS = ("cpu", "tpu", "cuda")


def with_hoisted(exported: export.Exported, module: _stablehlo.Module) -> export.Exported:
    """The function with what was hoisted as further arguments."""
    before, further = len(exported.in_avals), len(module.hoisted)
    avals = tuple(jax.core.ShapedArray(v.shape, v.dtype) for v in module.hoisted)
    return dataclasses.replace(
        exported,
        mlir_module_serialized=module.artifact,
        in_avals=(*exported.in_avals, *avals),
        in_tree=jax.tree.structure((tuple(range(before + further)), {})),
        out_tree=jax.tree.structure(tuple(range(len(exported.out_avals)))),
        module_kept_var_idx=(*exported.module_kept_var_idx, *range(before, before + further)),
        in_shardings_hlo=exported.in_shardings_hlo + (None,) * further,
        _in_named_shardings=exported._in_named_shardings + (None,) * further,
        _get_vjp=None,
    )


def to_bytes(results: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(results)]


def check(exported: export.Exported, *args: Any) -> _stablehlo.Module:
    """Hoists, and compares what the module computes before and after."""
    module = _stablehlo.normalise(exported.mlir_module_serialized)
    assert module.constants == ()
    again = _stablehlo.normalise(module.artifact, limit=1024)
    assert (again.hoisted, again.constants, again.artifact) == ((), (), module.artifact)
    assert len(module.artifact) < 10_240
    # The artifacts of JAX 0.9 hold eight bools in a byte.
    gone = sum(v.nbytes // 8 if v.dtype == bool else v.nbytes for v in module.hoisted)
    assert len(module.artifact) <= len(exported.mlir_module_serialized) - gone
    after = jax.jit(with_hoisted(exported, module).call)(*args, *module.hoisted)
    assert to_bytes(after) == to_bytes(jax.jit(exported.call)(*args))
    return module


def context() -> ir.Context:
    made = ir.Context()
    for dialect in (stablehlo, chlo, sdy):
        dialect.register_dialect(made)
    # What reads an artifact also loads the dialect of functions, which cannot be asked for by itself.
    trivial = export.export(jax.jit(lambda x: x), platforms=("cpu",))(jax.ShapeDtypeStruct((), "float32"))
    stablehlo.deserialize_portable_artifact(made, trivial.mlir_module_serialized)
    return made


def assemble(text: str) -> bytes:
    """The artifact of a module given as text, where ``@value`` stands for 300 different float32."""
    data = np.arange(300, dtype="<f4").tobytes().hex().upper()
    text = text.replace("@value", f'stablehlo.constant dense<"0x{data}"> : tensor<300xf32>')
    with context(), ir.Location.unknown():
        return bytes(stablehlo.serialize_portable_artifact(ir.Module.parse(text), _stablehlo.OLDEST_TARGET, True))


def disassemble(artifact: bytes) -> str:
    made = context()
    with made:
        return str(stablehlo.deserialize_portable_artifact(made, artifact))


# ---- every dtype, everywhere that JAX puts constants


def _table(dtype: Any, seed: int, shape: tuple[int, ...] = (300, 4)) -> np.ndarray[Any, Any]:
    # Powers of two: products of them are exact, so the compiler may fold and reorder as it likes.
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.kind == "c":
        return (rng.choice([1, 2, -1], shape) + 1j * rng.choice([0.5, -1, 2], shape)).astype(dtype)
    choices = (
        [1, 2, 4] if dtype.kind == "u" else [1, 2, -1] if dtypes.of(dtype).name.startswith("int") else [0.5, 2, -1]
    )
    return rng.choice(choices, shape).astype(dtype)


KINDS = (
    "float32",
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.int4,
    "complex64",
    "bool",
    "int32",
    "uint8",
    "float16",
)
TABLES = [_table(dtype, seed) for seed, dtype in enumerate(KINDS)]
KEYS = jax.random.split(jax.random.key(7), 300)
KEY_DATA = np.asarray(jax.random.key_data(KEYS))


def _factor(row: jax.Array) -> jax.Array:
    if row.dtype == bool:
        return jnp.where(row, 2.0, -1.0).astype(jnp.float32)
    if jnp.issubdtype(row.dtype, jnp.complexfloating):
        row = row.real * row.imag
    return row.astype(jnp.float32)


def use(x: jax.Array, i: jax.Array) -> jax.Array:
    """x, f32[b,4], times row i of every table."""
    for table in TABLES:
        x = x * _factor(lax.dynamic_index_in_dim(jnp.asarray(table), i, keepdims=False))
    key = jax.random.wrap_key_data(lax.dynamic_index_in_dim(jax.random.key_data(KEYS), i, keepdims=False))
    return x * (1 + jax.random.key_data(key)[0] % 2).astype(jnp.float32)


OTHER = _table("float32", 99)


def _custom_vjp(x: Any, i: Any) -> Any:
    @jax.custom_vjp
    def f(x: Any, i: Any) -> Any:
        return use(x, i)

    def forward(x: Any, i: Any) -> Any:
        return use(x, i), i

    def backward(i: Any, ct: Any) -> Any:
        return ct * lax.dynamic_index_in_dim(jnp.asarray(OTHER), i, keepdims=False), None

    f.defvjp(forward, backward)
    return f(x, i)


def _custom_jvp(x: Any, i: Any) -> Any:
    @jax.custom_jvp
    def f(x: Any, i: Any) -> Any:
        return use(x, i)

    f.defjvps(lambda t, _, x, i: t * lax.dynamic_index_in_dim(jnp.asarray(OTHER), i, keepdims=False), None)
    return f(x, i)


def _two_calls(x: Any, i: Any) -> Any:
    inner = jax.jit(use)
    return inner(x, i) + jax.jit(lambda x: inner(x * 2, i) - inner(x, i + 1))(x)


def _while(test: Callable[[Any], Any], body: Callable[[Any], Any], x: Any) -> Any:
    return lax.while_loop(lambda s: (s[0] < 2) & test(s[1]), lambda s: (s[0] + 1, body(s[1])), (0, x))[1]


def _small(x: Any) -> Any:
    return jnp.all(x < 1e9)


inner = jax.jit(use)
PLACES: dict[str, Callable[[Any, Any], Any]] = {
    "top": use,
    "jit": lambda x, i: jax.jit(use)(x, i),
    "jit in jit": lambda x, i: jax.jit(lambda x: jax.jit(use)(x, i) + 1)(x),
    "called from two places": _two_calls,
    "scan": lambda x, i: lax.scan(lambda c, j: (use(c, i + j), None), x, jnp.arange(2))[0],
    "scan of jit": lambda x, i: lax.scan(lambda c, j: (inner(c, i + j), None), x, jnp.arange(2))[0],
    "while body": lambda x, i: _while(_small, lambda x: use(x, i), x),
    "while cond": lambda x, i: _while(lambda x: _small(use(x, i)), lambda x: x * 2, x),
    "while cond of jit": lambda x, i: _while(lambda x: _small(inner(x, i)), lambda x: inner(x, i), x),
    "fori": lambda x, i: lax.fori_loop(0, i, lambda j, x: use(x, j), x),
    "cond": lambda x, i: lax.cond(i > 1, use, lambda x, i: x, x, i),
    "cond of jit": lambda x, i: lax.cond(i > 1, lambda x, i: x, jax.jit(lambda x, i: inner(x, i)), x, i),
    "switch": lambda x, i: lax.switch(i, [lambda x: x, lambda x: x + 1, lambda x: inner(x, i), lambda x: use(x, i)], x),
    "custom_vjp": _custom_vjp,
    "custom_jvp": _custom_jvp,
    "remat": lambda x, i: jax.checkpoint(use)(x, i),
    "vmap": lambda x, i: jax.vmap(lambda row: use(row, i))(x),
    "platform": lambda x, i: lax.platform_dependent(x, i, cpu=use, default=lambda x, i: inner(x, i) + 1),
    "while in scan in cond": lambda x, i: lax.cond(
        i > 1,
        lambda x: lax.scan(lambda c, _: (_while(_small, lambda x: inner(x, i), c), None), x, None, 2)[0],
        jnp.sin,
        x,
    ),
}
NO_VJP = {"while body", "while cond", "while cond of jit", "fori", "while in scan in cond"}
X = np.array([[1, 2, 3, 4], [-1, 5, 0, 7]], "f4")


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("place", PLACES)
def test_matrix(place: str, symbolic: bool) -> None:
    """Every dtype at once: at one place, the function and its VJP, for one platform or three."""
    shape = jax.export.symbolic_shape("b, 4") if symbolic else (2, 4)
    platforms = ALL_PLATFORMS if symbolic else ("cpu",)
    specs = (jax.ShapeDtypeStruct(shape, "float32"), jax.ShapeDtypeStruct((), "int32"))
    exported = export.export(jax.jit(lambda x, i: (PLACES[place](x, i),)), platforms=platforms)(*specs)
    module = check(exported, X, np.int32(2))
    expected = [(v.dtype, v.shape, v.tobytes()) for v in (*TABLES, KEY_DATA)]
    assert [(v.dtype, v.shape, v.tobytes()) for v in module.hoisted] == expected
    if place not in NO_VJP:
        vjp = check(exported.vjp(), X, np.int32(2), X)
        known = {v.tobytes() for v in (*TABLES, KEY_DATA, OTHER)}
        assert vjp.hoisted
        assert {v.tobytes() for v in vjp.hoisted} <= known


def test_sixty_four_bits() -> None:
    with jax.enable_x64(True):
        tables = [_table(dtype, 3) for dtype in ("complex128", "float64", "int64", "uint64")]
        tables.append(_table("complex128", 4, (80,)))  # 1,280 bytes in fewer elements than are printed together

        def f(x: Any, i: Any) -> Any:
            for table in tables:
                x = x * _factor(lax.dynamic_index_in_dim(jnp.asarray(table), i, keepdims=False))
            return lax.scan(lambda c, _: (c * _factor(jnp.asarray(tables[0])[i]), None), x, None, 2)[0]

        exported = export.export(jax.jit(lambda *a: (jax.jit(f)(*a),)))(
            jax.ShapeDtypeStruct((2, 4), "float32"), jax.ShapeDtypeStruct((), "int64")
        )
        module = check(exported, X, np.int64(2))
        assert [v.tobytes() for v in module.hoisted] == [t.tobytes() for t in tables]
        check(exported.vjp(), X, np.int64(2), X)


# ---- values


def _bits(dtype: dtypes.DType, count: int) -> np.ndarray[Any, Any]:
    """Any bits at all, NaNs of every kind among them."""
    held = dtype.numpy
    raw = np.random.default_rng(count).integers(0, 256, (count, held.itemsize), dtype="u1")
    if dtype.bits == 16 and held.kind != "i":
        raw[::7] = [1, 0x7F]
    raw[3:] |= np.uint8(1)
    if dtype.name == "bool":
        raw = np.arange(count, dtype="u1").reshape(-1, 1) % 3 == 1
    elif dtype.is_packed:
        low = raw & ((1 << dtype.bits) - 1)
        # ml_dtypes extends the sign of its integers through the byte.
        return low.view(np.int8).reshape(-1).astype(held) if "int" in dtype.name else low.view(held).reshape(-1)
    return raw.view(held).reshape(-1)


@pytest.mark.parametrize("dtype", [d for d in dtypes.ALL if d.storage], ids=str)
def test_values_of_every_dtype(dtype: dtypes.DType) -> None:
    with jax.enable_x64(True):
        values = [_bits(dtype, count) for count in (2, 6, 70, 100, 102, 1000)]
        f = jax.jit(lambda: tuple(jnp.asarray(v.reshape(2, -1)) for v in values))
        try:
            exported = export.export(f, platforms=("cpu",))()
        except TypeError:
            pytest.skip("this JAX has no arrays of it")
    module = _stablehlo.normalise(exported.mlir_module_serialized, limit=0)
    assert module.constants == ()
    assert len(module.hoisted) == len(values)
    for found, value in zip(module.hoisted, values, strict=True):
        assert (found.dtype, found.shape) == (value.dtype, (2, len(value) // 2))
        assert found.tobytes() == value.tobytes()
        assert not found.flags.writeable


def test_order_is_that_of_first_use() -> None:
    """In the order in which main would meet them, wherever its functions stand."""

    def value(n: int) -> str:
        return f'stablehlo.constant dense<"0x{np.arange(n, n + 300, dtype="<f4").tobytes().hex()}"> : tensor<300xf32>'

    kind = "tensor<300xf32>"
    artifact = assemble(f"""
        func.func private @last(%x: {kind}) -> {kind} {{ %c = {value(5)}
          %o = stablehlo.add %x, %c : {kind}
          return %o : {kind} }}
        func.func private @first(%x: {kind}) -> {kind} {{ %c = {value(3)}
          %a = stablehlo.add %x, %c : {kind}
          %b = func.call @second(%a) : ({kind}) -> {kind}
          %d = {value(1)}
          %o = stablehlo.add %b, %d : {kind}
          return %o : {kind} }}
        func.func public @main(%x: {kind}) -> {kind} {{
          %c = {value(4)}
          %a = func.call @first(%x) : ({kind}) -> {kind}
          %b = func.call @last(%a) : ({kind}) -> {kind}
          %e = func.call @first(%b) : ({kind}) -> {kind}
          %d = {value(2)}
          %f = stablehlo.add %c, %d : {kind}
          %o = stablehlo.add %e, %f : {kind}
          return %o : {kind} }}
        func.func private @second(%x: {kind}) -> {kind} {{ %c = {value(2)}
          %o = stablehlo.add %x, %c : {kind}
          return %o : {kind} }}""")
    module = _stablehlo.normalise(artifact)
    assert [v[0] for v in module.hoisted] == [4, 3, 2, 1, 5]
    assert module.constants == ()
    _run(artifact, module)


def test_one_argument_for_equal_constants() -> None:
    table = np.arange(300, dtype="f4")

    def f(x: Any) -> Any:
        inside = jax.jit(lambda x: x * jnp.asarray(table.copy()))(x)
        return inside + table + lax.scan(lambda c, _: (c - jnp.array(table), None), x, None, 2)[0]

    exported = export.export(jax.jit(f))(jax.ShapeDtypeStruct((300,), "float32"))
    (value,) = check(exported, np.ones(300, "f4")).hoisted
    np.testing.assert_array_equal(value, table)


def test_equal_bytes_of_another_type_are_another_argument() -> None:
    a = np.arange(300, dtype="f4")
    tables = (a, a.view("i4"), a.reshape(30, 10))
    exported = export.export(jax.jit(lambda: tuple(jnp.asarray(t) + 0 for t in tables)))()
    found = check(exported).hoisted
    assert {(v.dtype.name, v.shape) for v in found} == {("float32", (300,)), ("int32", (300,)), ("float32", (30, 10))}


@pytest.mark.parametrize(
    ("dtype", "at_limit"),
    [("float32", 256), ("uint8", 1024), ("bool", 1024), (ml_dtypes.int4, 1024), ("complex64", 128), ("float16", 512)],
)
def test_limit(dtype: Any, at_limit: int) -> None:
    small, large = (_table(dtype, 5, (n,)) for n in (at_limit, at_limit + 1))
    exported = export.export(jax.jit(lambda: (jnp.asarray(small), jnp.asarray(large))))()
    module = check(exported)
    assert [v.tobytes() for v in module.hoisted] == [large.tobytes()]
    lower = _stablehlo.normalise(exported.mlir_module_serialized, limit=1023)
    assert [v.shape for v in lower.hoisted] == [(at_limit,), (at_limit + 1,)]


@pytest.mark.parametrize("dtype", ["float32", "bool", "complex64", ml_dtypes.bfloat16, ml_dtypes.int4, "int32"])
def test_splats_stay(dtype: Any) -> None:
    table = np.ones((500, 40), dtype)
    exported = export.export(jax.jit(lambda: (jax.jit(lambda: jnp.asarray(table))(),)))()
    module = check(exported)
    assert module.hoisted == ()
    assert "dense<" in disassemble(module.artifact)


def test_nothing_to_hoist() -> None:
    exported = export.export(jax.jit(jnp.sin))(jax.ShapeDtypeStruct((2,), "float32"))
    module = check(exported, np.ones(2, "f4"))
    assert (module.hoisted, module.constants) == ((), ())


def test_attributes_of_arguments_and_results_are_kept() -> None:
    table = np.arange(300, dtype="f4")

    def f(x: Any, y: Any) -> Any:
        return {"sum": jax.jit(lambda v: v + table)(x) + y}

    specs = [jax.ShapeDtypeStruct((300,), "float32")] * 2
    exported = export.export(jax.jit(f, donate_argnums=(1,)), platforms=("cpu", "tpu"))(*specs)

    def header(text: str) -> str:
        found = re.search(r"func\.func public @main\(.*", text)
        assert found
        return found[0]

    before = header(exported.mlir_module())
    before = re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", before)
    module = check(exported, *[np.ones(300, "f4")] * 2)
    after = header(disassemble(module.artifact))
    arguments, results = before.split(") -> ", 1)
    found_arguments, found_results = after.split(") -> ", 1)
    assert re.match(re.escape(arguments) + r", %arg\d+: tensor<300xf32>$", found_arguments)
    assert found_results == results
    assert "tf.aliasing_output" in after or "jax.buffer_donor" in after


# ---- what stays


def _loop(body: str, op: str) -> str:
    return {
        "reduce": f"""
          %z = stablehlo.constant dense<0.0> : tensor<f32>
          %r = "stablehlo.reduce"(%x, %z) ({{ ^bb0(%a: tensor<f32>, %b: tensor<f32>):
            {body}
            %u = stablehlo.add %a, %b : tensor<f32>
            %v = stablehlo.add %u, %t : tensor<f32>
            stablehlo.return %v : tensor<f32> }}) {{dimensions = array<i64: 0>}}
            : (tensor<300xf32>, tensor<f32>) -> tensor<f32>
          %o = stablehlo.broadcast_in_dim %r, dims = [] : (tensor<f32>) -> tensor<300xf32>""",
        "sort": f"""
          %o = "stablehlo.sort"(%x) ({{ ^bb0(%a: tensor<f32>, %b: tensor<f32>):
            {body}
            %u = stablehlo.add %a, %t : tensor<f32>
            %v = stablehlo.compare LT, %u, %b : (tensor<f32>, tensor<f32>) -> tensor<i1>
            stablehlo.return %v : tensor<i1> }}) {{dimension = 0 : i64}} : (tensor<300xf32>) -> tensor<300xf32>""",
        "map": f"""
          %o = "stablehlo.map"(%x) ({{ ^bb0(%a: tensor<f32>):
            {body}
            %u = stablehlo.add %a, %t : tensor<f32>
            stablehlo.return %u : tensor<f32> }}) {{dimensions = array<i64: 0>}}
            : (tensor<300xf32>) -> tensor<300xf32>""",
        "if": f"""
          %p = stablehlo.constant dense<true> : tensor<i1>
          %o = "stablehlo.if"(%p) ({{
            {body}
            %u = stablehlo.broadcast_in_dim %t, dims = [] : (tensor<f32>) -> tensor<300xf32>
            stablehlo.return %u : tensor<300xf32> }}, {{ stablehlo.return %x : tensor<300xf32> }})
            : (tensor<i1>) -> tensor<300xf32>""",
    }[op]


ELEMENT = """%c = {}
            %s = stablehlo.slice %c [3:4] : (tensor<300xf32>) -> tensor<1xf32>
            %t = stablehlo.reshape %s : (tensor<1xf32>) -> tensor<f32>"""


def _run(artifact: bytes, module: _stablehlo.Module) -> None:
    x = np.arange(300, dtype="f4")  # integers: exact in whatever order they are added
    like = export.export(jax.jit(lambda x: (x,)), platforms=("cpu",))(jax.ShapeDtypeStruct((300,), "float32"))
    like = dataclasses.replace(like, mlir_module_serialized=artifact)
    after = jax.jit(with_hoisted(like, module).call)(x, *module.hoisted)
    assert to_bytes(after) == to_bytes(jax.jit(like.call)(x))


@pytest.mark.parametrize("called", [False, True], ids=["constant", "call"])
@pytest.mark.parametrize("op", ["reduce", "sort", "map", "if"])
def test_regions(op: str, called: bool) -> None:
    """What XLA does not compile with a capture keeps its constants, also those of what it calls."""
    body = ELEMENT.format("func.call @table() : () -> tensor<300xf32>" if called else "@value")
    function = "func.func private @table() -> tensor<300xf32> { %c = @value\n return %c : tensor<300xf32> }"
    artifact = assemble(f"""
        func.func public @main(%x: tensor<300xf32>) -> tensor<300xf32> {{
          {_loop(body, op)}
          return %o : tensor<300xf32>
        }}
        {function if called else ""}""")
    module = _stablehlo.normalise(artifact)
    if op == "if":
        assert (len(module.hoisted), module.constants) == (1, ())
    else:
        assert (module.hoisted, module.constants) == ((), (Constant("f32[300]", 1200, f"stablehlo.{op}"),))
    # XLA's own readers do not take a call in a reducer, before or after.
    if op == "if" or not called:
        _run(artifact, module)


def test_composites_keep_theirs_and_what_they_call() -> None:
    a, b, c = (np.arange(300 + n, dtype="f4") for n in range(3))

    @jax.jit
    def called(x: Any) -> Any:
        return x + b[0] + jnp.asarray(b)[:300] + jax.jit(lambda x: x * jnp.asarray(c)[:300])(x)

    def f(x: Any) -> Any:
        # JAX makes operands of what a composite captures itself, so that is an argument in the end.
        return lax.composite(lambda x: called(x) + jnp.asarray(a), "my.op")(x) + a + jnp.asarray(c)[:300]

    exported = export.export(jax.jit(f), platforms=("cpu",))(jax.ShapeDtypeStruct((300,), "float32"))
    module = _stablehlo.normalise(exported.mlir_module_serialized)
    assert {v.tobytes() for v in module.hoisted} == {a.tobytes(), c.tobytes()}
    assert module.constants == (
        Constant("f32[302]", 1208, "stablehlo.composite my.op"),
        Constant("f32[301]", 1204, "stablehlo.composite my.op"),
    )
    x = np.ones(300, "f4")
    after = jax.jit(with_hoisted(exported, module).call)(x, *module.hoisted)
    assert to_bytes(after) == to_bytes(jax.jit(exported.call)(x))


TABLE = "func.func private @table() -> tensor<300xf32> { %c = @value\n return %c : tensor<300xf32> }"


def test_computations_of_custom_calls_keep_theirs() -> None:
    artifact = assemble(f"""
        func.func public @main(%x: tensor<300xf32>) -> tensor<300xf32> {{
          %a = stablehlo.custom_call @target(%x) {{called_computations = [@table]}}
            : (tensor<300xf32>) -> tensor<300xf32>
          %b = func.call @table() : () -> tensor<300xf32>
          %o = stablehlo.add %a, %b : tensor<300xf32>
          return %o : tensor<300xf32>
        }}
        {TABLE}""")
    module = _stablehlo.normalise(artifact)
    assert module.hoisted == ()
    assert module.constants == (Constant("f32[300]", 1200, "stablehlo.custom_call target"),)


def test_functions_that_are_not_called() -> None:
    """They, and what they call, keep theirs: nobody would give them more arguments."""
    artifact = assemble(f"""
        func.func public @main(%x: tensor<300xf32>) -> tensor<300xf32> {{
          %o = func.call @table() : () -> tensor<300xf32>
          return %o : tensor<300xf32>
        }}
        func.func private @unused() -> tensor<300xf32> {{
          %o = func.call @table() : () -> tensor<300xf32>
          return %o : tensor<300xf32>
        }}
        {TABLE}""")
    module = _stablehlo.normalise(artifact)
    assert module.hoisted == ()
    assert module.constants == (Constant("f32[300]", 1200, "func.func unused, which main does not call"),)


def test_values_that_cannot_be_read() -> None:
    artifact = assemble("""
        func.func public @main(%x: tensor<300xf32>) -> tensor<300xf32> {
          %c = stablehlo.constant dense_resource<blob> : tensor<300xf32>
          return %c : tensor<300xf32>
        }""")
    module = _stablehlo.normalise(artifact)
    assert (module.hoisted, module.constants) == ((), (Constant("f32[300]", 1200, "dense_resource"),))


def test_attributes_of_calls_are_kept() -> None:
    artifact = assemble("""
        func.func public @main(%x: tensor<300xf32>) -> tensor<300xf32> {
          %o = "func.call"(%x) <{arg_attrs = [{my.attr = 1 : i32}], res_attrs = [{my.attr = 2 : i32}], callee = @add}>
            {mhlo.frontend_attributes = {inlineable = "false"}} : (tensor<300xf32>) -> tensor<300xf32>
          return %o : tensor<300xf32>
        }
        func.func private @add(%x: tensor<300xf32>) -> tensor<300xf32> {
          %c = @value
          %o = stablehlo.add %x, %c : tensor<300xf32>
          return %o : tensor<300xf32>
        }""")
    module = _stablehlo.normalise(artifact)
    assert len(module.hoisted) == 1
    text = disassemble(module.artifact)
    for kept in ("my.attr = 1", "my.attr = 2", 'inlineable = "false"'):
        assert kept in text
    _run(artifact, module)


# ---- the same bytes, and none of the machine

DETERMINISTIC = """
import hashlib, sys
import jax, jax.numpy as jnp, numpy as np
from jax import export, lax
from obmlite import _stablehlo
tables = [np.arange(300 + n, dtype="f4") + n for n in range(8)]
def f(x):
    g = jax.jit(lambda x: sum((x * jnp.sum(jnp.asarray(t)) for t in tables[3:]), x))
    y = lax.scan(lambda c, _: (g(c) + jnp.asarray(tables[0])[:300], None), x, None, 2)[0]
    return lax.cond(y[0] > 0, g, lambda x: x + tables[1][:300] + jnp.asarray(tables[2])[:300], y) + g(x)
exported = export.export(jax.jit(f), platforms=("cpu", "tpu", "cuda"))(jax.ShapeDtypeStruct((300,), "float32"))
for part in (exported, exported.vjp()):
    module = _stablehlo.normalise(part.mlir_module_serialized)
    values = b"".join(v.tobytes() for v in module.hoisted)
    print(len(module.hoisted), hashlib.sha256(module.artifact + values).hexdigest())
    assert sys.argv[1].encode() in part.mlir_module_serialized
    assert sys.argv[1].encode() not in module.artifact and b".py" not in module.artifact
"""


def _python(source: pathlib.Path, *arguments: str, **environment: str) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(source), *arguments],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_deterministic_and_without_paths(tmp_path: pathlib.Path) -> None:
    found = []
    for seed in ("1", "2"):
        directory = tmp_path / f"here_{seed}"
        directory.mkdir()
        (directory / "script.py").write_text(DETERMINISTIC)
        found.append(_python(directory / "script.py", directory.name, PYTHONHASHSEED=seed))
    assert found[0] == found[1]
    assert found[0].startswith("8 ")


# ---- eight devices

DEVICES = """
import importlib.util, sys
import jax, jax.numpy as jnp, numpy as np
from jax import export, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
spec = importlib.util.spec_from_file_location("test_hoisting", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
sys.modules["test_hoisting"] = tests
spec.loader.exec_module(tests)

mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
small = np.random.default_rng(0).integers(-2, 3, (16, 20)).astype("f4")
other = np.random.default_rng(1).integers(-2, 3, (16, 20)).astype("f4")
rows = P("x", None)

def whole(f):
    return jax.shard_map(f, mesh=mesh, in_specs=rows, out_specs=rows)

def part(f):
    return jax.shard_map(f, mesh=mesh, in_specs=rows, out_specs=rows, axis_names={"x"})

def nested(x):
    inner = jax.shard_map(twice, in_specs=P(None, "y"), out_specs=P(None, "y"), axis_names={"y"})
    def outer(v):
        v = jnp.concatenate([v, v], 1)
        return inner(v)[:, :16] + jax.jit(lambda v: v[:, :16] @ other @ small.T)(v)
    return part(outer)(x)

@jax.jit
def twice(v):
    return v @ small @ other.T

def in_scan(f):
    return lambda x: lax.scan(lambda c, _: (f(c), None), x, None, 2)[0]

cases = {
    "constraint": lambda x: lax.with_sharding_constraint(jax.jit(lambda x: x @ small)(x), NamedSharding(mesh, rows)),
    "whole": whole(jax.jit(lambda v: v @ small + lax.psum(v @ other, "x"))),
    "whole without jit": whole(lambda v: v @ small),
    "part": part(jax.jit(lambda v: v @ small + lax.psum(v @ other, "x"))),
    "nested": nested,
    "scan of jit in it": whole(in_scan(twice)),
    "in a scan": in_scan(whole(twice)),
    "in a jit": lambda x: jax.jit(part(jax.jit(lambda v: v @ small)))(twice(x)),
}
x = np.arange(8 * 16, dtype="f4").reshape(8, 16) % 7 - 3
sharded = jax.device_put(x, NamedSharding(mesh, P("x", "y")))
with jax.set_mesh(mesh):
    for name, f in cases.items():
        for shape in ((8, 16), jax.export.symbolic_shape("8*b, 16")):
            if name == "nested" and shape != (8, 16):
                continue
            spec = jax.ShapeDtypeStruct(shape, "float32")
            e = export.export(jax.jit(lambda x: (f(x),)), platforms=("cpu", "tpu"))(spec)
            assert e.nr_devices == 8
            module = tests.check(e, sharded)
            assert module.hoisted, name
            if name == "nested":  # JAX itself cannot export its VJP
                continue
            vjp = e.vjp()
            y = e.call(sharded)
            found = tests.check(vjp, sharded, *(jnp.ones_like(v) for v in y))
            assert found.hoisted, name
        print(name, len(module.artifact), len(module.hoisted))
"""


@pytest.mark.long
def test_eight_devices(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "devices.py"
    script.write_text(DEVICES)
    out = _python(script, __file__, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert len(out.splitlines()) == 8
