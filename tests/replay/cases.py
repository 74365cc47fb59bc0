"""Functions of JAX for the conformance of replay, in groups that are exported as one module each.

A case is a function, what it is called with, and how near its results must be; most have to be the same to the bit.
More are added by adding lines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Case:
    """One function.

    Attributes:
      name: unique in its group.
      fn: the function, of arrays.
      arguments: what it is called with.
      rtol: how far a result of floats may be off, relative to the largest of it; 0 for the same to the bit.
    """

    name: str
    fn: Callable[..., Any]
    arguments: tuple[Any, ...]
    rtol: float = 0.0


def array(*shape: int, dtype: Any = "float32", low: float = -2.0, high: float = 2.0, seed: int = 0) -> np.ndarray:
    """Random numbers, the same each time."""
    rng = np.random.default_rng(seed + 31 * len(shape) + sum(shape))
    dtype = jnp.dtype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if jnp.issubdtype(dtype, jnp.integer):
        return rng.integers(max(int(low), 0) if dtype.kind == "u" else int(low), int(high) + 1, shape).astype(dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return (rng.uniform(low, high, shape) + 1j * rng.uniform(low, high, shape)).astype(dtype)
    return rng.uniform(low, high, shape).astype(dtype)


def words(text: str) -> list[str]:
    return text.split()


GROUPS: dict[str, list[Case]] = {}


def case(group: str, name: str, fn: Callable[..., Any], *arguments: Any, rtol: float = 0.0) -> None:
    GROUPS.setdefault(group, []).append(Case(name, fn, arguments, rtol))


FLOATS = ("float32", "bfloat16", "float16")
INTS = ("int32", "uint8", "int8", "uint32", "int16")

# --- elementwise operations of lax

_special = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, 3e38, 0.5, 1.5, 2.5, -2.5], "float32")

for _name in words(
    "abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma erf "
    "erf_inv erfc exp exp2 expm1 floor is_finite lgamma log log1p logistic neg reciprocal rsqrt "
    "round sign sin sinh sqrt square tan tanh"
):
    _fn = getattr(lax, _name)
    case("unary", _name, _fn, np.concatenate([_special, array(7, low=-0.9, high=0.9)]))
    if _name not in ("bessel_i0e", "bessel_i1e"):
        case("unary, small floats", f"{_name} bfloat16", _fn, array(9, dtype="bfloat16", low=-0.9, high=0.9))
        case("unary, small floats", f"{_name} float16", _fn, array(9, dtype="float16", low=-0.9, high=0.9))
for _name in words(
    "abs neg sin cos tan sqrt rsqrt exp log log1p expm1 tanh sign square real imag conj sinh "
    "cosh asinh acosh atanh logistic"
):
    case("unary, complex", _name, getattr(lax, _name), array(6, dtype="complex64"))
for _name in words("abs neg sign bitwise_not population_count clz square"):
    for _dtype in INTS:
        if _dtype.startswith("u") and _name == "abs":
            continue
        case("unary, integers", f"{_name} {_dtype}", getattr(lax, _name), array(8, dtype=_dtype, low=-100, high=100))
case("unary, integers", "not bool", lax.bitwise_not, array(8, dtype=bool))
for _method in lax.RoundingMethod:
    case("unary", f"round {_method.name}", lambda x, m=_method: lax.round(x, m), _special)
case("unary", "exp, highest", lambda x: lax.exp(x, accuracy=lax.AccuracyMode.HIGHEST), array(5))
case("unary", "tanh, tolerance", lambda x: lax.tanh(x, accuracy=lax.Tolerance(1e-5, 1e-5, 4)), array(5))
for _e, _m in ((5, 10), (8, 7), (4, 3)):
    case("unary", f"reduce_precision {_e} {_m}", lambda x, e=_e, m=_m: lax.reduce_precision(x, e, m), _special)
case("unary", "polygamma", lax.polygamma, np.float32([1, 2, 3]), np.float32([1.5, 2.5, 0.5]))
case("unary", "zeta", lax.zeta, np.float32([1.5, 2, 3]), np.float32([1.5, 2.5, 0.5]))
case("unary", "igamma", lax.igamma, np.float32([1.5, 2, 3]), np.float32([1.5, 2.5, 0.5]))
case("unary", "igammac", lax.igammac, np.float32([1.5, 2, 3]), np.float32([1.5, 2.5, 0.5]))
case("unary", "betainc", lax.betainc, np.float32([1.5, 2]), np.float32([1.5, 2.5]), np.float32([0.2, 0.5]))
case("unary", "random_gamma_grad", lax.random_gamma_grad, np.float32([1.5, 2, 3]), np.float32([1.5, 2.5, 0.5]))

for _name in words("add sub mul div max min pow rem atan2 nextafter"):
    _x, _y = np.meshgrid(_special, _special)
    case("binary", _name, getattr(lax, _name), _x, _y)
    for _dtype in ("bfloat16", "float16"):
        if _name != "nextafter":
            case(
                "binary, small floats",
                f"{_name} {_dtype}",
                getattr(lax, _name),
                array(9, dtype=_dtype, low=0.1),
                array(9, dtype=_dtype, seed=1),
            )
for _name in words(
    "add sub mul div max min rem bitwise_and bitwise_or bitwise_xor shift_left "
    "shift_right_logical shift_right_arithmetic"
):
    for _dtype in INTS:
        _x = array(9, dtype=_dtype, low=-90, high=90)
        _y = array(9, dtype=_dtype, low=0 if "shift" in _name else -3, high=9, seed=2)
        case("binary, integers", f"{_name} {_dtype}", getattr(lax, _name), _x, _y)
for _name in words("bitwise_and bitwise_or bitwise_xor max min eq"):
    case("binary, integers", f"{_name} bool", getattr(lax, _name), array(8, dtype=bool), array(8, dtype=bool, seed=1))
for _name in words("add sub mul div pow"):
    case(
        "unary, complex",
        f"{_name} of two",
        getattr(lax, _name),
        array(6, dtype="complex64"),
        array(6, dtype="complex64", seed=1),
    )
case("unary, complex", "complex", lax.complex, array(5), array(5, seed=1))
case(
    "unary, complex",
    "scaled by a constant",
    lambda x: x * np.array([1 + 2j, 3, 4j], "complex64") + np.complex64(2 - 1j),
    array(3, dtype="complex64"),
)
for _name in words("eq ne lt le gt ge"):
    _x, _y = np.meshgrid(_special, _special)
    case("binary", _name, getattr(lax, _name), _x, _y)
    for _dtype in ("int32", "uint8", "bfloat16"):
        case(
            "binary, integers",
            f"{_name} {_dtype}",
            getattr(lax, _name),
            array(8, dtype=_dtype, low=0),
            array(8, dtype=_dtype, low=0, seed=1),
        )
case("binary", "select", lambda p, x, y: lax.select(p, x, y), array(4, dtype=bool), array(4), array(4, seed=1))
case(
    "binary",
    "select_n",
    lambda p, *xs: lax.select_n(p, *xs),
    np.int32([0, 1, 2]),
    array(3),
    array(3, seed=1),
    array(3, seed=2),
)
case("binary", "clamp", lambda x: lax.clamp(-0.5, x, 0.5), _special)
case("binary", "integer_pow", lambda x: (x**3, x**-2, x**0), array(5))

# --- conversions

_kinds = (
    "float32",
    "bfloat16",
    "float16",
    "int32",
    "uint8",
    "int8",
    "bool",
    "complex64",
    "float8_e4m3fn",
    "float8_e5m2",
    "int4",
    "uint4",
)
for _from in _kinds:
    for _to in _kinds:
        if _from != _to and not (_from == "complex64" and _to != "complex64"):
            case(
                f"convert from {_from}",
                _to,
                lambda x, to=_to: lax.convert_element_type(x, to),
                array(6, dtype=_from, low=0, high=7),
            )
for _from, _to in (
    ("float32", "int32"),
    ("float32", "uint8"),
    ("uint32", "float32"),
    ("bfloat16", "uint16"),
    ("int32", "int8"),
    ("uint8", "int8"),
):
    case(
        "convert from float32",
        f"bits of {_from} as {_to}",
        lambda x, to=_to: lax.bitcast_convert_type(x, to),
        array(4, dtype=_from),
    )
case(
    "convert from uint8",
    "four bytes as float32",
    lambda x: lax.bitcast_convert_type(x, "float32"),
    array(3, 4, dtype="uint8", high=60),
)

# --- data movement

for _dtype in ("float32", "bfloat16", "int8", "bool", "complex64"):
    _x = array(3, 4, dtype=_dtype)
    for _name, _fn in {
        "reshape": lambda x: lax.reshape(x, (2, 6)),
        "transpose": lambda x: x.T,
        "broadcast_in_dim": lambda x: lax.broadcast_in_dim(x, (2, 3, 4), (1, 2)),
        "rev": lambda x: lax.rev(x, (0,)),
        "slice": lambda x: lax.slice(x, (0, 1), (3, 4), (2, 1)),
        "dynamic_slice": lambda x: lax.dynamic_slice(x, (jnp.int32(1), jnp.int32(-1)), (2, 2)),
        "dynamic_update_slice": lambda x: lax.dynamic_update_slice(x, x[:2, :2], (2, -9)),
        "concatenate": lambda x: lax.concatenate([x, x[:1], x], 0),
        "pad": lambda x: lax.pad(x, jnp.ones((), x.dtype), ((1, 2, 1), (-1, 0, 0))),
        "squeeze": lambda x: lax.squeeze(x[None], (0,)),
        "roll": lambda x: jnp.roll(x, 2, 1),
        "tile": lambda x: jnp.tile(x, (2, 1)),
        "take": lambda x: jnp.take(x, jnp.array([2, 0, 7]), axis=0, mode="clip"),
        "take, filled": lambda x: jnp.take(x, jnp.array([2, 0, 7, -9]), axis=0, mode="fill"),
        "take_along_axis": lambda x: jnp.take_along_axis(x, jnp.array([[0, 2, 1, 0]]), 0),
        "index": lambda x: x[jnp.array([1, -1]), jnp.array([0, 3])],
        "set": lambda x: x.at[jnp.array([0, 2]), 1].set(x[0, 0]),
        "set, dropped": lambda x: x.at[jnp.array([0, 7])].set(x[0], mode="drop"),
        "where": lambda x: jnp.where(x == x[0, 0], x, x[1, 1]),
        "repeat": lambda x: jnp.repeat(x, jnp.array([1, 0, 2]), axis=0, total_repeat_length=3),
        "flip, moveaxis": lambda x: jnp.moveaxis(jnp.flip(x)[None], 0, -1),
        "diag, tril": lambda x: (jnp.diag(x), jnp.tril(x)),
        "split": lambda x: jnp.split(x, 2, 1),
    }.items():
        case(f"data movement, {_dtype}", _name, _fn, _x)
_x = array(5, 4)
_i = np.array([[3], [0], [3], [9]], "int32")
for _name in words("add multiply min max set"):
    case("scatter", _name, lambda x, i, n=_name: getattr(x.at[i[:, 0]], n)(jnp.arange(4.0)), _x, _i)
    case(
        "scatter",
        f"{_name} int",
        lambda x, i, n=_name: getattr(x.at[i[:, 0], 1:3], n)(jnp.arange(2)),
        array(5, 4, dtype="int32"),
        _i,
    )
case("scatter", "apply", lambda x, i: x.at[i[:, 0]].apply(jnp.sin), _x, _i)
case("scatter", "power", lambda x, i: x.at[i[:2, 0]].power(2.0), np.abs(_x), _i)
case(
    "scatter",
    "batched",
    lambda x, i: jax.vmap(lambda x, i: x.at[i].add(1.0))(x, i),
    _x,
    array(5, 2, dtype="int32", low=0, high=3),
)
case("scatter", "segment_sum", lambda x, i: jax.ops.segment_sum(x, i[:, 0], 4), array(4, 3), _i)
case("scatter", "bincount, histogram", lambda i: (jnp.bincount(i[:, 0], length=5), jnp.histogram(i, 3)[0]), _i)
case("gather", "batched", lambda x, i: jax.vmap(lambda x, i: x[i])(x, i), _x, array(5, 2, dtype="int32", low=0, high=3))
case("gather", "of slices", lambda x, i: jax.vmap(lambda s: lax.dynamic_slice(x, (s[0], 1), (2, 2)))(i), _x, _i)
case("gather", "one hot, eye", lambda i: (jax.nn.one_hot(i[:, 0], 5), jnp.eye(3, 4, 1)), _i)
case(
    "gather",
    "negative dynamic slice",
    lambda x, i: lax.dynamic_slice(x, (i[0, 0] - 5, -i[0, 0]), (2, 2), allow_negative_indices=False),
    _x,
    _i,
)
case(
    "gather",
    "iotas",
    lambda x: (jnp.arange(7), lax.broadcasted_iota("uint8", (2, 3), 1), jnp.linspace(0, 1, 5), jnp.indices((2, 3))),
    _x,
)
case(
    "gather",
    "constants",
    lambda x: (
        jnp.full((40, 40), 3, "bfloat16"),
        jnp.array([1, 2, 3], "int4"),
        jnp.array([0.5, 2], "float8_e4m3fn"),
        jnp.array([True, False]),
        jnp.array([1.5, 2.5], "bfloat16"),
        jnp.array([1 + 1j, 2]),
    ),
    _x,
)

# --- reductions

for _dtype in ("float32", "bfloat16", "int32", "uint8", "complex64"):
    _x = array(4, 5, dtype=_dtype)
    for _name in words("sum prod mean max min argmax argmin any all cumsum cumprod"):
        if _dtype != "complex64" or _name in ("sum", "prod", "mean", "any", "all"):
            case(
                f"reductions, {_dtype}", _name, lambda x, n=_name: (getattr(jnp, n)(x, axis=1), getattr(jnp, n)(x)), _x
            )
_x = array(4, 5)
for _name in words("cummax cummin cumsum cumprod cumlogsumexp"):
    case(
        "reductions, float32",
        f"lax.{_name}",
        lambda x, n=_name: (getattr(lax, n)(x, 1), getattr(lax, n)(x, 0, reverse=True)),
        _x,
    )
for _name in words("std var median ptp nansum nanmax "):
    case("reductions, float32", _name, lambda x, n=_name: getattr(jnp, n)(x, axis=0), _x)
case("reductions, float32", "from another start", lambda x: lax.reduce(x, np.float32(3), lax.add, (0,)), _x)
case("reductions, float32", "by another body", lambda x: lax.reduce(x, np.float32(1), lambda a, b: a * b + b, (1,)), _x)
case(
    "reductions, float32",
    "of two",
    lambda x: lax.reduce((x, x), (np.float32(0), np.float32(1)), lambda a, b: (a[0] + b[0], a[1] * b[1]), (1,)),
    _x,
)
case("reductions, float32", "argmax of NaN", lambda x: (jnp.argmax(x), jnp.argmin(x), jnp.nanargmax(x)), _special)
case(
    "reductions, float32",
    "logsumexp, softmax",
    lambda x: (jax.nn.logsumexp(x), jax.nn.log_softmax(x), jax.nn.softmax(x)),
    _x,
)
case(
    "reductions, int32",
    "xor, and, or",
    lambda x: (lax.reduce_xor(x, (0,)), lax.reduce_and(x, (0,)), lax.reduce_or(x, (0,))),
    array(3, 3, dtype="int32"),
)
case("reductions, float32", "quantile", lambda x: jnp.quantile(x, jnp.array([0.25, 0.5])), _x)
case("reductions, float32", "associative scan", lambda x: lax.associative_scan(jnp.multiply, x), _x)

_image = array(2, 8, 8, 3)
for _name, _fn in {
    "max pool": lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME"),
    "min pool": lambda x: lax.reduce_window(x, jnp.inf, lax.min, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
    "average pool": lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 2, 1), "SAME"),
    "dilated": lambda x: lax.reduce_window(
        x, 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "VALID", base_dilation=(1, 2, 1, 1), window_dilation=(1, 1, 3, 1)
    ),
    "padded": lambda x: lax.reduce_window(
        x, 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), [(0, 0), (2, 1), (0, 1), (0, 0)]
    ),
    "by another body": lambda x: lax.reduce_window(
        x, np.float32(0), lambda a, b: jnp.maximum(jnp.abs(a), jnp.abs(b)), (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    ),
    "product": lambda x: lax.reduce_window(x, np.float32(1), lax.mul, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
    "gradient of max pool": lambda x: jax.grad(
        lambda x: jnp.sum(lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME") ** 2)
    )(x),
    "gradient of average pool": lambda x: jax.grad(
        lambda x: jnp.sum(lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "SAME") ** 2)
    )(x),
}.items():
    case("windows", _name, _fn, _image)

_rows = np.concatenate([_special, _special[::-1]]).reshape(2, 13)
for _name, _fn in {
    "sort": lambda x: (jnp.sort(x), lax.sort(x, 0)),
    "argsort": lambda x: (jnp.argsort(x), jnp.argsort(x, descending=True, stable=False)),
    "two operands": lambda x: lax.sort((x, x[::-1]), num_keys=1),
    "two keys": lambda x: lax.sort((jnp.round(x), x[::-1], x), num_keys=2),
    "integers": lambda x: lax.sort(x.view("int32"), 1),
    "unsigned": lambda x: lax.sort(x.view("uint32"), 1, is_stable=False),
    "bfloat16": lambda x: lax.sort(x.astype("bfloat16")),
    "complex": lambda x: lax.sort(lax.complex(jnp.round(x), x[::-1])),
    "bool": lambda x: lax.sort(x > 0),
    "top_k": lambda x: (lax.top_k(x[:, :6], 3), lax.top_k(x.view("int32"), 2)),
    "approximate": lambda x: (lax.approx_max_k(x[:, :6], 3), lax.approx_min_k(x[:, :6], 3)),
    "unique, searchsorted": lambda x: (jnp.unique(jnp.round(x[0, 8:]), size=4), jnp.searchsorted(jnp.arange(5.0), x)),
    "lexsort": lambda x: jnp.lexsort((x[0], x[1])),
}.items():
    case("sorting", _name, _fn, _rows)

# --- linear algebra

_a, _b = array(2, 3, 4), array(2, 4, 5, seed=1)
_HIGH = lax.Precision.HIGHEST
for _name, _fn in {
    "matmul": jnp.matmul,
    "highest": lambda a, b: jnp.matmul(a, b, precision=_HIGH),
    "mixed": lambda a, b: jnp.matmul(a, b, precision=("bfloat16", "highest")),
    "algorithm": lambda a, b: lax.dot_general(
        a, b, (((2,), (1,)), ((0,), (0,))), precision=lax.DotAlgorithmPreset.F32_F32_F32
    ),
    "no batch": lambda a, b: lax.dot_general(a, b, (((2,), (1,)), ((), ()))),
    "einsum": lambda a, b: (
        jnp.einsum("bij,bjk->kbi", a, b),
        jnp.einsum("bij,bjk->", a, b),
        jnp.einsum("iij->j", a[:, :2]),
    ),
    "dot, vdot, inner, outer": lambda a, b: (jnp.dot(a[0], b[0]), jnp.vdot(a, a), jnp.inner(a, a), jnp.outer(a, b)),
    "bfloat16": lambda a, b: jnp.matmul(a.astype("bfloat16"), b.astype("bfloat16")),
    "bfloat16 to float32": lambda a, b: jnp.matmul(
        a.astype("bfloat16"), b.astype("bfloat16"), preferred_element_type="float32"
    ),
    "integers": lambda a, b: jnp.matmul(a.astype("int8"), b.astype("int8"), preferred_element_type="int32"),
    "complex": lambda a, b: jnp.matmul(a + 1j, b * 2j),
    "tensordot, kron": lambda a, b: (jnp.tensordot(a, b, ((0, 2), (0, 1))), jnp.kron(a[0], b[0])),
    "ragged": lambda a, b: lax.ragged_dot(a[0], b, jnp.array([1, 2])),
}.items():
    case("products", _name, _fn, _a, _b)

_image, _kernel = array(2, 9, 8, 4), array(3, 2, 4, 6, seed=1)
_NHWC = ("NHWC", "HWIO", "NHWC")
for _name, _fn in {
    "same": lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=_NHWC),
    "strides": lambda x, k: lax.conv_general_dilated(x, k, (2, 1), "VALID", dimension_numbers=_NHWC),
    "dilations": lambda x, k: lax.conv_general_dilated(
        x, k, (1, 1), [(2, 1), (0, 3)], (2, 1), (1, 2), dimension_numbers=_NHWC
    ),
    "groups": lambda x, k: lax.conv_general_dilated(
        x, k[:, :, :2], (1, 1), "SAME", dimension_numbers=_NHWC, feature_group_count=2
    ),
    "batch groups": lambda x, k: lax.conv_general_dilated(
        x, k, (1, 1), "SAME", dimension_numbers=_NHWC, batch_group_count=2
    ),
    "other layouts": lambda x, k: lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0), k, (1, 1), "SAME", dimension_numbers=("CHWN", "HWIO", "WNHC")
    ),
    "transposed": lambda x, k: lax.conv_transpose(x, k, (2, 2), "SAME"),
    "highest": lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=_NHWC, precision=_HIGH),
    "bfloat16": lambda x, k: lax.conv_general_dilated(
        x.astype("bfloat16"),
        k.astype("bfloat16"),
        (1, 1),
        "SAME",
        dimension_numbers=_NHWC,
        preferred_element_type="float32",
    ),
    "one dimension": lambda x, k: jnp.convolve(x[0, 0, :, 0], k[:, 0, 0, 0]),
    "three dimensions": lambda x, k: lax.conv(x[:, None], k[None, None, :, :, :2, 0], (1, 1, 1), "VALID"),
    "patches": lambda x, k: lax.conv_general_dilated_patches(x, (2, 2), (1, 1), "VALID", dimension_numbers=_NHWC),
    "gradients": lambda x, k: jax.grad(
        lambda x, k: jnp.sum(lax.conv_general_dilated(x, k, (2, 1), "SAME", dimension_numbers=_NHWC) ** 2), (0, 1)
    )(x, k),
}.items():
    case("convolutions", _name, _fn, _image, _kernel)

_m = array(2, 4, 4)
_spd = (_m @ _m.transpose(0, 2, 1) + 3 * np.eye(4)).astype("float32")
for _name, _fn in {
    "cholesky": lambda m, s: (jnp.linalg.cholesky(s), jnp.linalg.cholesky(m), jnp.linalg.cholesky(s, upper=True)),
    "lu": lambda m, s: jax.scipy.linalg.lu(m[0]),
    "solve": lambda m, s: (jnp.linalg.solve(s, m), jnp.linalg.inv(s), jnp.linalg.det(m), jnp.linalg.slogdet(s)),
    "triangular": lambda m, s: (
        lax.linalg.triangular_solve(s, m, left_side=True, lower=True),
        lax.linalg.triangular_solve(s, m, transpose_a=True, unit_diagonal=True),
    ),
    "qr": lambda m, s: (jnp.linalg.qr(m), jnp.linalg.qr(m[:, :3], mode="complete"), jnp.linalg.qr(m, mode="raw")),
    "eigh": lambda m, s: (jnp.linalg.eigh(s), jnp.linalg.eigvalsh(m)),
    "svd": lambda m, s: (
        jnp.linalg.svd(m[:, :3]),
        jnp.linalg.svd(m[:, :3], full_matrices=False),
        jnp.linalg.svd(m, compute_uv=False),
    ),
    "eig": lambda m, s: (jnp.linalg.eig(m), jnp.linalg.eigvals(m)),
    "schur": lambda m, s: jax.scipy.linalg.schur(m[0]),
    "hessenberg": lambda m, s: jax.scipy.linalg.hessenberg(m[0], calc_q=True),
    "tridiagonal": lambda m, s: (
        lax.linalg.tridiagonal(s),
        lax.linalg.tridiagonal_solve(m[0, 0], s[0].diagonal(), m[0, 1], m[0]),
    ),
    "pinv, lstsq, rank": lambda m, s: (jnp.linalg.pinv(m), jnp.linalg.lstsq(m[0], s[0])[0], jnp.linalg.matrix_rank(m)),
    "expm, sqrtm": lambda m, s: (jax.scipy.linalg.expm(m[0]), jnp.linalg.matrix_power(m, 3)),
    "norms": lambda m, s: (jnp.linalg.norm(m), jnp.linalg.norm(m[0], ord=2), jnp.linalg.cond(s)),
    "complex": lambda m, s: (
        jnp.linalg.svd(m + 1j),
        jnp.linalg.eigh(s.astype("complex64")),
        jnp.linalg.cholesky(s + 0j),
        jnp.linalg.solve(s + 1j, m),
    ),
}.items():
    case("decompositions", _name, _fn, _m, _spd)

for _name, _fn in {
    "fft": lambda x: (jnp.fft.fft(x), jnp.fft.ifft(x), jnp.fft.fft2(x), jnp.fft.fftn(x[None])),
    "rfft": lambda x: (jnp.fft.rfft(x), jnp.fft.irfft(jnp.fft.rfft(x), 7), jnp.fft.rfft2(x), jnp.fft.hfft(x)),
    "shifts": lambda x: (jnp.fft.fftshift(x), jnp.fft.fftfreq(5)),
}.items():
    case("transforms", _name, _fn, array(4, 8))

# --- control flow

for _name, _fn in {
    "scan": lambda x: lax.scan(lambda c, r: (c * r + 1, jnp.tanh(c)), x[0], x),
    "scan, backward": lambda x: lax.scan(lambda c, r: (c * r + 1, jnp.tanh(c)), x[0], x, reverse=True),
    "scan, unrolled": lambda x: lax.scan(lambda c, r: (c * r + 1, c), x[0], x, unroll=2),
    "scan in scan": lambda x: lax.scan(lambda c, r: lax.scan(lambda d, e: (d + e, d * e), c, r), jnp.float32(0), x),
    "scan of none": lambda x: lax.scan(lambda c, r: (c + 1, c), x[0], x[:0]),
    "scan, carry read whole": lambda x: lax.scan(lambda c, i: (c.at[i].set(c.sum()), c[i]), x, jnp.arange(4)),
    "fori_loop": lambda x: lax.fori_loop(0, 5, lambda i, c: c * 0.5 + i, x),
    "fori_loop, rows": lambda x: lax.fori_loop(1, 4, lambda i, c: c.at[i].add(c[i - 1]), x),
    "fori_loop, traced end": lambda x: lax.fori_loop(0, jnp.int32(jnp.abs(x[0, 0]) * 3), lambda i, c: c * 0.5 + i, x),
    "while_loop": lambda x: lax.while_loop(
        lambda c: jnp.sum(c[0]) < 90.0, lambda c: (c[0] * 1.5 + 1, c[1] + 1), (jnp.abs(x), 0)
    ),
    "while_loop, batched": lambda x: jax.vmap(
        lambda r: lax.while_loop(lambda c: jnp.sum(c) < 90.0, lambda c: c * 1.5 + 1, r)
    )(jnp.abs(x)),
    "cond": lambda x: lax.cond(x[0, 0] > 0, lambda y: y * 2, lambda y: jnp.sin(y), x),
    "cond over values around": lambda x: lax.cond(x[0, 0] > 0, lambda: x * 2, lambda: jnp.zeros_like(x)),
    "switch": lambda x: [
        lax.switch(jnp.int32(i), [jnp.sin, jnp.cos, jnp.tan], x)
        + lax.switch(x.astype("int32")[0, 0] + i, [jnp.sin, jnp.cos, jnp.tan], x)
        for i in (-2, 1, 9)
    ],
    "map": lambda x: (lax.map(jnp.sin, x), lax.map(jnp.cumsum, x, batch_size=2)),
    "nested jit, checkpoint": lambda x: jax.jit(jax.checkpoint(lambda y: jnp.sin(jax.jit(jnp.cos)(y))))(x),
    "custom_jvp": lambda x: (jax.nn.relu(x), jax.nn.silu(x), jax.nn.relu6(x)),
    "composite": lambda x: lax.composite(lambda y: jnp.sin(y) * 2, "my.op")(x),
    "optimization_barrier": lambda x: lax.optimization_barrier((x, x[0])),
    "gradient of scan": lambda x: jax.grad(
        lambda x: jnp.sum(lax.scan(lambda c, r: (c * r + 1, jnp.tanh(c)), x[0], x)[1])
    )(x),
    "linear solve": lambda x: jax.scipy.sparse.linalg.cg(lambda v: v * 3 + v[::-1], x[0])[0],
}.items():
    case("control flow", _name, _fn, array(4, 4))

# --- jax.nn, jax.scipy, jax.image

for _name in words(
    "relu relu6 sigmoid softplus sparse_plus sparse_sigmoid soft_sign silu swish log_sigmoid "
    "leaky_relu hard_sigmoid hard_silu hard_tanh elu celu selu gelu glu squareplus mish "
    "identity softmax log_softmax logsumexp standardize"
):
    if hasattr(jax.nn, _name):
        case("nn", _name, getattr(jax.nn, _name), array(3, 8))
case("nn", "gelu, exact", lambda x: jax.nn.gelu(x, approximate=False), array(3, 8))
case("nn", "attention", lambda q: jax.nn.dot_product_attention(q, q, q, is_causal=True), array(2, 5, 3, 4))
case("nn", "attention, no mask", lambda q: jax.nn.dot_product_attention(q, q, q), array(2, 5, 3, 4))
for _name in words(
    "erf erfc erfinv expit gammaln digamma entr i0 i0e i1 i1e log_ndtr logit ndtr ndtri "
    "multigammaln xlogy xlog1py betaln gamma factorial sinc exprel expi exp1"
):
    if hasattr(jax.scipy.special, _name):
        _two = _name in ("xlogy", "xlog1py", "betaln")
        _args = (array(5, low=0.1, high=0.9), *((array(5, low=0.1, high=0.9, seed=1),) if _two else ()))
        if _name == "multigammaln":
            case("special", _name, lambda x: jax.scipy.special.multigammaln(x + 3, 2), *_args)
        else:
            # exp1 is a long sum in a loop, which XLA adds up in another order.
            case("special", _name, getattr(jax.scipy.special, _name), *_args, rtol=1e-6 if _name == "exp1" else 0.0)
for _name in words("norm laplace logistic cauchy expon gamma beta t poisson bernoulli"):
    _module = getattr(jax.scipy.stats, _name)
    _args = {"gamma": (1.5,), "beta": (1.5, 2.5), "t": (3.0,), "poisson": (2.0,), "bernoulli": (0.3,)}.get(_name, ())
    _density = "logpmf" if _name in ("poisson", "bernoulli") else "logpdf"
    case(
        "special",
        f"stats.{_name}",
        lambda x, m=_module, d=_density, a=_args: getattr(m, d)(x, *a),
        array(5, low=0.1, high=0.9),
    )
case(
    "special",
    "image.resize",
    lambda x: (jax.image.resize(x, (7, 5), "bilinear"), jax.image.resize(x, (3, 3), "nearest")),
    array(4, 4),
)
case(
    "special", "map_coordinates", lambda x: jax.scipy.ndimage.map_coordinates(x, [x, x], 1), array(4, 4, low=0, high=3)
)
case(
    "special",
    "interp, polyval",
    lambda x: (jnp.interp(x, jnp.arange(3.0), x[:3]), jnp.polyval(x, x), jnp.convolve(x, x)),
    array(5),
)
case(
    "special",
    "convolve2d, correlate",
    lambda x: (jax.scipy.signal.convolve2d(x, x), jnp.correlate(x[0], x[1])),
    array(4, 4),
)

# --- jax.numpy, what is not above

for _name in words(
    "add subtract multiply divide true_divide floor_divide remainder fmod mod power arctan2 "
    "hypot logaddexp logaddexp2 maximum minimum fmax fmin copysign heaviside nextafter "
    "float_power greater equal"
):
    case("numpy", _name, getattr(jnp, _name), array(9, low=0.3), array(9, seed=1, low=0.2))
for _name in words("gcd lcm bitwise_and left_shift right_shift floor_divide remainder divmod power"):
    case(
        "numpy",
        f"{_name}, integers",
        getattr(jnp, _name),
        array(9, dtype="int32", low=-9, high=30),
        array(9, dtype="int32", low=1, high=5, seed=1),
    )
for _name in words(
    "abs ceil floor trunc rint round sign signbit sinc i0 exp2 log2 log10 log1p deg2rad rad2deg "
    "cbrt square reciprocal nan_to_num isnan isinf isposinf frexp modf angle unwrap diff "
    "ediff1d gradient sort_complex ravel fliplr rot90 atleast_3d cov corrcoef trapezoid vander "
    "triu nonzero_size cumulative_sum"
):
    if _name == "nonzero_size":
        case("numpy", "nonzero", lambda x: jnp.nonzero(x > 0, size=4, fill_value=0), array(3, 4))
    elif callable(getattr(jnp, _name, None)):
        case(
            "numpy",
            _name,
            getattr(jnp, _name),
            array(4, low=0.2)
            if _name in ("vander", "ediff1d", "cumulative_sum", "trapezoid")
            else array(3, 4, low=0.2),
        )
for _name in words("stack vstack hstack dstack column_stack"):
    case("numpy", _name, lambda x, n=_name: getattr(jnp, n)([x, x]), array(3, 4))
case("numpy", "meshgrid, tri, identity", lambda x: (jnp.meshgrid(x, x), jnp.tri(3), jnp.identity(3)), array(3))
case(
    "numpy",
    "digitize, select, piecewise",
    lambda x: (
        jnp.digitize(x, jnp.arange(3.0)),
        jnp.select([x > 1, x > 0], [x, -x]),
        jnp.piecewise(x, [x > 0], [jnp.sin, jnp.cos]),
    ),
    array(5),
)
case(
    "numpy",
    "isin, argwhere, compress",
    lambda x: (jnp.isin(x, x[:2]), jnp.argwhere(x > 0, size=3), jnp.packbits(x > 0), jnp.unpackbits(jnp.uint8([3, 7]))),
    array(5),
)
case(
    "numpy",
    "cross, trace, swapaxes",
    lambda x: (jnp.cross(x[0], x[1]), jnp.trace(x), jnp.swapaxes(x, 0, 1)),
    array(3, 3),
)

# --- jax.random

_key = np.array([7, 11], "uint32")
for _name, _fn in {
    "bits": lambda k: [jax.random.bits(k, (3,), d) for d in ("uint8", "uint16", "uint32")],
    "uniform": lambda k: (jax.random.uniform(k, (3,)), jax.random.uniform(k, (3,), "bfloat16", 1, 2)),
    "normal": lambda k: (jax.random.normal(k, (2, 3)), jax.random.truncated_normal(k, -1, 1, (3,))),
    "split, fold_in": lambda k: [jax.random.key_data(x) for x in (jax.random.split(k, 3), jax.random.fold_in(k, 5))],
    "randint": lambda k: (jax.random.randint(k, (4,), -5, 7), jax.random.randint(k, (4,), 0, 3, "uint8")),
    "bernoulli": lambda k: (jax.random.bernoulli(k, 0.3, (5,)), jax.random.rademacher(k, (3,))),
    "categorical": lambda k: jax.random.categorical(k, jnp.arange(4.0), shape=(3,)),
    "permutation, choice": lambda k: (
        jax.random.permutation(k, 7),
        jax.random.choice(k, 5, (3,), replace=False),
        jax.random.choice(k, jnp.arange(4.0), (3,), p=jnp.ones(4) / 4),
    ),
    "exponential, gumbel": lambda k: (
        jax.random.exponential(k, (3,)),
        jax.random.gumbel(k, (3,)),
        jax.random.laplace(k, (3,)),
        jax.random.logistic(k, (3,)),
        jax.random.cauchy(k, (3,)),
    ),
    "gamma, poisson": lambda k: (jax.random.gamma(k, 1.5, (3,)), jax.random.poisson(k, 3.0, (3,))),
    "multivariate_normal": lambda k: (
        jax.random.multivariate_normal(k, jnp.zeros(2), jnp.eye(2)),
        jax.random.orthogonal(k, 3),
    ),
    "maxwell, rayleigh": lambda k: (jax.random.maxwell(k, (2,)), jax.random.rayleigh(k, 1.0, (2,))),
}.items():
    case("random", _name, lambda k, f=_fn: f(jax.random.wrap_key_data(k)), _key)
case(
    "random",
    "rng_bit_generator",
    lambda k: (lax.rng_bit_generator(k, (5,)), lax.rng_bit_generator(k, (5,), "uint8")),
    np.arange(4, dtype="uint32"),
)
case(
    "random",
    "rbg",
    lambda k: jax.random.normal(jax.random.wrap_key_data(k, impl="rbg"), (3,)),
    np.arange(4, dtype="uint32"),
)
