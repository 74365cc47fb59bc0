from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from obmlite import dtypes
from obmlite.dtypes import ALL, KEY, DType, by_code, of, parse
from obmlite.errors import CorruptPackageError, ExportError, LeafError, RestoreError

# code, name, short name, bits, storage: never changed, only added to. 30 is the code of keys.
TABLE = """\
 1 bool               bool             8 BOOL
 2 int2               i2               2 U8
 3 int4               i4               4 U8
 4 int8               i8               8 I8
 5 int16              i16             16 I16
 6 int32              i32             32 I32
 7 int64              i64             64 I64
 8 uint2              u2               2 U8
 9 uint4              u4               4 U8
10 uint8              u8               8 U8
11 uint16             u16             16 U16
12 uint32             u32             32 U32
13 uint64             u64             64 U64
14 float4_e2m1fn      f4_e2m1fn        4 U8
15 float8_e3m4        f8_e3m4          8 U8
16 float8_e4m3        f8_e4m3          8 U8
17 float8_e4m3b11fnuz f8_e4m3b11fnuz   8 U8
18 float8_e4m3fn      f8_e4m3fn        8 F8_E4M3
19 float8_e4m3fnuz    f8_e4m3fnuz      8 F8_E4M3FNUZ
20 float8_e5m2        f8_e5m2          8 F8_E5M2
21 float8_e5m2fnuz    f8_e5m2fnuz      8 F8_E5M2FNUZ
22 float8_e8m0fnu     f8_e8m0fnu       8 F8_E8M0
23 float16            f16             16 F16
24 bfloat16           bf16            16 BF16
25 float32            f32             32 F32
26 float64            f64             64 F64
27 complex64          c64             64 C64
28 complex128         c128           128 F64
29 float0             float0           0 -
31 float6_e2m3fn      f6_e2m3fn        6 U8
32 float6_e3m2fn      f6_e3m2fn        6 U8
"""
IMPLS = {"threefry2x32": (2,), "rbg": (4,), "unsafe_rbg": (4,)}
STORED = [d for d in ALL if d.storage]
PACKED = [d for d in ALL if d.is_packed]
DIRECT = [d for d in ALL if d.is_direct]


def by_short(dtype: DType) -> str:
    return dtype.short


def random_bytes(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8)


def held(dtype: DType, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bits, as a held array."""
    data = random_bytes(math.prod(shape) * dtype.numpy.itemsize, seed)
    if dtype.bits < 8:
        data &= (1 << dtype.bits) - 1
    if dtype.name == "bool":
        data &= 1
    return data.view(dtype.numpy).reshape(shape)


def bits_of(array: np.ndarray) -> bytes:
    return array.tobytes()


# ---- the table ----


def test_the_table_is_frozen():
    rows = [line.split() for line in TABLE.splitlines()]
    assert [[str(d.code), d.name, d.short, str(d.bits), d.storage or "-"] for d in ALL] == rows
    assert KEY == 30
    assert [d.name for d in ALL if d.tail] == ["complex128"]


@pytest.mark.parametrize("dtype", ALL, ids=by_short)
def test_names_and_objects_lead_back(dtype):
    assert of(dtype.numpy) is dtype
    assert of(dtype.jax) is dtype
    assert by_code(dtype.code) is by_code(dtype.code, "") is dtype
    assert parse(dtype.name) is parse(dtype.short) is parse(str(dtype)) is dtype
    assert pickle.loads(pickle.dumps(dtype)) == copy.deepcopy(dtype) == dtype
    if dtype.name != "float0":
        assert dtype.numpy == np.dtype(dtype.name)
        assert of(np.zeros((2, 3), dtype.numpy)) is dtype
        assert of(dtype.numpy.newbyteorder(">")) is dtype
        assert of(dtype.numpy.type) is dtype
        assert of(np.zeros(1, dtype.numpy)[0]) is dtype
    assert not dtype.is_key
    assert dtype.is_packed == (dtype.bits in (2, 4, 6))


@pytest.mark.parametrize("dtype", ALL, ids=by_short)
def test_agrees_with_jax(dtype):
    if not hasattr(jnp, dtype.name) and dtype.name != "float0":
        pytest.skip("this JAX does not have it")
    struct = jax.ShapeDtypeStruct((2, 3), dtype.jax)
    assert of(struct) is dtype
    if dtype.name != "float0":
        assert jax.dtypes.itemsize_bits(dtype.jax) == dtype.bits
        assert of(getattr(jnp, dtype.name)) is dtype


def test_every_dtype_of_jax_numpy_is_known():
    # JAX names int1 and uint1 where ml_dtypes has them, but lowers them as bool.
    for name in dir(jnp):
        value = getattr(jnp, name)
        if isinstance(getattr(value, "dtype", None), np.dtype) and isinstance(value, type):
            if name in ("int1", "uint1"):
                with pytest.raises(LeafError):
                    of(value)
            else:
                assert of(value).numpy == value.dtype


@pytest.mark.parametrize("dtype", STORED, ids=by_short)
def test_device_round_trip(dtype):
    if dtype.bits == 6:
        pytest.skip("no device of the oldest supported JAX holds it")
    with jax.enable_x64(True):
        array = held(dtype, (3, 5))
        on_device = jax.device_put(array)
        assert of(on_device) is dtype
        back = np.asarray(on_device)
        assert bits_of(dtype.to_storage(back)) == bits_of(dtype.to_storage(array))


def test_float0():
    float0 = parse("float0")
    assert of(jax.grad(lambda x: x * 1.0, allow_int=True)(3)) is float0
    assert of(np.zeros((2, 3), jax.dtypes.float0)) is float0
    assert float0.numpy == jax.dtypes.float0
    assert float0.bits == 0
    assert float0.storage_nbytes((2, 3)) == 0
    assert not float0.is_direct
    for call in (
        lambda: float0.storage_numpy,
        lambda: float0.storage_shape((2,)),
        lambda: float0.to_storage(np.zeros(2, jax.dtypes.float0)),
        lambda: float0.from_storage(np.zeros(0, np.uint8), (2,)),
    ):
        with pytest.raises(LeafError, match="no tensor"):
            call()


# ---- of ----


@pytest.mark.parametrize(
    ("value", "plain", "wide"),
    [
        (True, "bool", "bool"),
        (3, "i32", "i64"),
        (-1.5, "f32", "f64"),
        (1j, "c64", "c128"),
        (int, "i32", "i64"),
        (float, "f32", "f64"),
        (complex, "c64", "c128"),
        (bool, "bool", "bool"),
        (np.float64(1), "f64", "f64"),
        (np.zeros(1, np.int64), "i64", "i64"),
        (jnp.bfloat16, "bf16", "bf16"),
        (np.longlong, "i64", "i64"),
    ],
)
def test_python_values_have_the_dtype_that_jax_gives_them(value, plain, wide):
    with jax.enable_x64(False):
        assert of(value).short == plain
    with jax.enable_x64(True):
        assert of(value).short == wide


def test_a_python_integer_has_to_fit():
    with jax.enable_x64(False):
        assert of(2**31 - 1).short == of(-(2**31)).short == "i32"
        with pytest.raises(LeafError) as caught:
            of(2**31)
        assert caught.value.found == "an int of 32 bits"
    with jax.enable_x64(True):
        assert of(2**31).short == "i64"
        with pytest.raises(LeafError):
            of(2**63)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "float32",
        b"x",
        [],
        [1.0],
        {},
        object(),
        lambda: 0,
        object,
        str,
        list,
        np.floating,
        np.generic,
        np.array(["a"]),
        np.array([None]),
        np.str_("a"),
        np.zeros(1, "M8[s]"),
        np.zeros(1, "m8[s]"),
        np.longdouble(1),
        np.clongdouble(1),
        np.zeros(1, [("a", "f4")]),
        np.zeros(1, [("a", "V")]),
        np.dtype(("f4", (2,))),
        np.dtype("V0"),
        np.dtype("V2"),
        np.ma.zeros(3),
        jax.dtypes.prng_key,
    ],
    ids=lambda v: type(v).__name__,
)
def test_what_is_no_tensor_is_refused(value):
    with pytest.raises(LeafError) as caught:
        of(value)
    assert caught.value.found
    assert isinstance(caught.value, TypeError)


def test_a_foreign_dtype_is_refused():
    class Tensor:
        dtype = "torch.float32"

    with pytest.raises(LeafError) as caught:
        of(Tensor())
    assert caught.value.found == "torch.float32"


# ---- by_code, parse ----


@pytest.mark.parametrize(
    ("code", "impl"),
    [
        (0, None),
        (-1, None),
        (33, None),
        (255, None),
        (6, "rbg"),
        (KEY, None),
        (KEY, ""),
        (KEY, "a>b"),
        (KEY, "\x1b[2J"),
        (KEY, "rbg\n"),
        (KEY, "x" * 65),
    ],
)
def test_unknown_codes(code, impl):
    with pytest.raises(CorruptPackageError) as caught:
        by_code(code, impl)
    assert caught.value.field == "dtype"


@pytest.mark.parametrize(
    "text", ["", "f31", "Float32", "float128", "key", "key<>", "key<nope>", "key<a b>", "int1", "object", " f32"]
)
def test_unknown_names(text):
    with pytest.raises(ExportError) as caught:
        parse(text)
    assert caught.value.field == "dtype"
    assert caught.value.found == repr(text)


# ---- keys ----


@pytest.mark.parametrize("impl", IMPLS)
def test_keys(impl):
    keys = jax.random.split(jax.random.key(7, impl=impl), (2, 3))
    dtype = of(keys)
    assert dtype is of(keys)
    assert dtype == of(keys.dtype) == of(jax.ShapeDtypeStruct((), keys.dtype)) == by_code(KEY, impl)
    assert dtype == parse(f"key<{impl}>") == parse(str(keys.dtype))
    assert (dtype.code, dtype.name, dtype.short, dtype.impl) == (KEY, "key", f"key<{impl}>", impl)
    assert dtype.jax == keys.dtype
    assert dtype.is_key
    assert dtype.is_direct
    assert not dtype.is_packed
    assert dtype.key_data_shape == IMPLS[impl]
    assert dtype.bits == 32 * math.prod(IMPLS[impl])
    assert jax.ShapeDtypeStruct((4,), dtype.jax).dtype == keys.dtype
    data = np.asarray(jax.random.key_data(keys))
    storage = dtype.to_storage(data)
    assert np.shares_memory(storage, data)
    assert storage.shape == dtype.storage_shape((2, 3)) == (2, 3, *IMPLS[impl])
    assert storage.nbytes == dtype.storage_nbytes((2, 3))
    back = dtype.from_storage(storage, (2, 3))
    assert np.shares_memory(storage, back)
    wrapped = jax.random.wrap_key_data(back, impl=impl)
    assert wrapped.dtype == keys.dtype
    assert (jax.random.bits(wrapped[1, 2]) == jax.random.bits(keys[1, 2])).all()
    swapped = data.astype(">u4", order="F")
    assert bits_of(dtype.to_storage(swapped)) == bits_of(data)
    with pytest.raises(LeafError):
        _ = dtype.numpy


def test_implementations_that_jax_has_are_tabled_as_it_has_them():
    for name, tag, shape in dtypes._IMPLS:
        try:
            key = jax.eval_shape(lambda name=name: jax.random.key(0, impl=name))
        except ValueError:
            continue
        assert str(key.dtype) == f"key<{tag}>"
        assert jax.eval_shape(jax.random.key_data, key).shape == shape
        assert of(key) == by_code(KEY, name)


def test_an_unknown_implementation_is_listed_but_not_used():
    dtype = by_code(KEY, "from_the_future")
    assert (dtype.short, dtype.impl, dtype.storage, dtype.bits) == ("key<from_the_future>", "from_the_future", "U32", 0)
    assert dtype.is_key
    assert dtype.is_direct
    assert not dtype.is_packed
    assert dtype == by_code(KEY, "from_the_future")
    for call in (
        lambda: dtype.jax,
        lambda: dtype.key_data_shape,
        lambda: dtype.storage_shape((2,)),
        lambda: dtype.storage_nbytes((2,)),
        lambda: dtype.to_storage(np.zeros((2, 2), np.uint32)),
        lambda: dtype.from_storage(np.zeros((2, 2), np.uint32), (2,)),
    ):
        with pytest.raises(RestoreError) as caught:
            call()
        assert caught.value.found == "from_the_future"
        assert jax.__version__ in str(caught.value)


def test_key_data_is_checked():
    dtype = parse("key<rbg>")
    for bad in (np.zeros((3, 2), np.uint32), np.uint32(1)[None][0:0], np.zeros((), np.uint32)):
        with pytest.raises(LeafError):
            dtype.to_storage(np.asarray(bad))
    with pytest.raises(LeafError):
        dtype.to_storage(np.zeros((3, 4), np.int32))
    with pytest.raises(LeafError):
        _ = parse("f32").key_data_shape


def test_keys_need_no_device():
    code = (
        "from obmlite import dtypes as d; k = d.parse('key<rbg>'); "
        "assert d.of(k.jax) == k and d.of(3).name == 'int32' and k.storage_shape((2,)) == (2, 4)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"JAX_PLATFORMS": "nosuch", "PYTHONPATH": ":".join(sys.path)}
    )


# ---- storage: bits ----


@pytest.mark.parametrize("dtype", [d for d in DIRECT if d.numpy.itemsize == 1], ids=by_short)
def test_all_bytes(dtype):
    data = np.arange(256, dtype=np.uint8)
    array = data.view(dtype.numpy)
    storage = dtype.to_storage(array)
    assert np.shares_memory(storage, data)
    assert storage.dtype == dtype.storage_numpy
    assert bits_of(storage) == bytes(range(256))
    assert bits_of(dtype.from_storage(storage, (256,))) == bytes(range(256))


@pytest.mark.parametrize("dtype", [d for d in DIRECT if d.numpy.itemsize == 2], ids=by_short)
@pytest.mark.parametrize("order", "<>")
def test_all_pairs_of_bytes(dtype, order):
    data = np.arange(65536, dtype="<u2")
    array = data.view(dtype.numpy)
    if order == ">":
        array = data.astype(">u2").view(dtype.numpy.newbyteorder(">"))
    storage = dtype.to_storage(array)
    assert bits_of(storage) == bits_of(data)
    assert bits_of(dtype.from_storage(storage, (65536,))) == bits_of(data)


SPECIAL = {
    "f32": ("<u4", [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00001, 0x7F800001, 0xFFFFFFFF, 1, 0x80000001]),
    "f64": ("<u8", [0, 1 << 63, 0x7FF0 << 48, 0xFFF0 << 48, (0x7FF0 << 48) + 1, (0x7FF8 << 48) + 5, 2**64 - 1, 1]),
}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("short", ["f32", "f64", "c64", "c128"])
def test_nan_payloads_infinities_and_negative_zero(short, order):
    dtype = parse(short)
    word, patterns = SPECIAL[{"c64": "f32", "c128": "f64"}.get(short, short)]
    if short.startswith("c"):
        patterns = [p for a in patterns for b in patterns for p in (a, b)]
    data = np.array(patterns, word)
    array = data.astype(word.replace("<", order)).view(dtype.numpy.newbyteorder(order))
    storage = dtype.to_storage(array)
    assert bits_of(storage) == bits_of(data)
    assert storage.dtype == dtype.storage_numpy
    back = dtype.from_storage(storage, array.shape)
    assert back.dtype == dtype.numpy
    assert bits_of(back) == bits_of(data)
    assert np.shares_memory(storage, array) == (order == "<")


@pytest.mark.parametrize("dtype", PACKED, ids=by_short)
def test_all_patterns_and_what_lies_above_them(dtype):
    array = np.arange(256, dtype=np.uint8).view(dtype.numpy)
    storage = dtype.to_storage(array)
    assert storage.shape == (256 * dtype.bits // 8,)
    expected = np.arange(256, dtype=np.uint8) & ((1 << dtype.bits) - 1)
    back = dtype.from_storage(storage, (256,))
    assert back.dtype == dtype.numpy
    assert bits_of(back) == bits_of(expected)


@pytest.mark.parametrize(
    ("short", "values", "expected"),
    [
        ("i4", [1, 2], "21"),
        ("i4", [1, 2, 3], "2103"),
        ("i4", [-1, -8, 7], "8f07"),
        ("u4", [15, 0, 9, 1, 5], "0f1905"),
        ("i2", [1, -2, -1, 0], f"{0b00_11_10_01:02x}"),
        ("i2", [-1, -1, -1, -1, -2], "ff02"),
        ("u2", [3, 0, 1, 2, 3], f"{0b10_01_00_11:02x}03"),
        ("u2", [2], "02"),
        ("f4_e2m1fn", [0.5, 1.0, -6.0], "210f"),
        ("f4_e2m1fn", [-0.0, 1.5], "38"),
        ("f6_e2m3fn", [0.125, 0.25, 0.375, 0.5], "813010"),  # 1, 2, 3, 4: 000001 000010 000011 000100
        ("f6_e3m2fn", [-0.0], "20"),
        ("u4", [], ""),
    ],
)
def test_packed_layout(short, values, expected):
    dtype = parse(short)
    array = np.array(values, np.float32).astype(dtype.numpy)
    assert bits_of(dtype.to_storage(array)).hex() == expected
    assert (dtype.from_storage(dtype.to_storage(array), array.shape) == array).all()


def test_packed_is_row_major_and_flat():
    dtype = parse("u4")
    array = np.array([[1, 2, 3], [4, 5, 6]]).astype(dtype.numpy)
    for order in "CF":
        storage = dtype.to_storage(np.asarray(array, order=order))
        assert bits_of(storage).hex() == "214365"
    assert dtype.storage_shape((2, 3)) == (3,)
    assert dtype.storage_shape((5,)) == (3,)
    assert dtype.storage_shape(()) == (1,)
    assert dtype.storage_shape((4, 0)) == (0,)
    assert parse("i2").storage_shape((5,)) == (2,)
    assert parse("f6_e2m3fn").storage_shape((3,)) == (3,)


@pytest.mark.parametrize("dtype", PACKED, ids=by_short)
def test_packed_against_bit_by_bit(dtype):
    for n in range(20):
        elements = held(dtype, (n,), n)
        number = sum(int(e) << (i * dtype.bits) for i, e in enumerate(elements.view(np.uint8)))
        storage = dtype.to_storage(elements)
        assert bits_of(storage) == number.to_bytes(math.ceil(n * dtype.bits / 8), "little")
        for first in range(n + 1):
            for count in range(n + 1 - first):
                start, stop = dtype.packed_range(first, count)
                assert 0 <= start <= stop <= len(storage)
                assert stop - start <= count * dtype.bits // 8 + 2
                part = dtype.unpack(storage[start:stop], first, count)
                assert part.dtype == dtype.numpy
                assert bits_of(part) == bits_of(elements[first : first + count])


@pytest.mark.parametrize("dtype", PACKED, ids=by_short)
def test_padding_bits_are_ignored_when_read(dtype):
    one = dtype.from_storage(np.array([0xFF], np.uint8), (1,))
    assert one.view(np.uint8)[0] == (1 << dtype.bits) - 1


def test_bool_bytes_stay_what_they_are():
    dtype = parse("bool")
    storage = np.array([0, 1, 2, 255], np.uint8).view(np.bool_)
    assert bits_of(dtype.from_storage(storage, (4,))) == bits_of(dtype.to_storage(storage)) == b"\x00\x01\x02\xff"


def test_complex128_is_pairs():
    dtype = parse("c128")
    storage = dtype.to_storage(np.array([1 + 2j, 3 - 4j]))
    assert storage.tolist() == [[1, 2], [3, -4]]
    assert dtype.to_storage(np.array(1 + 2j)).tolist() == [1, 2]
    assert dtype.from_storage(np.array([1.0, 2.0]), ()) == np.array(1 + 2j)


# ---- storage: shapes, strides, copies ----


@pytest.mark.parametrize("dtype", STORED, ids=by_short)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (0,), (3, 0, 2), (2, 3, 5), (1, 1)], ids=str)
def test_shapes(dtype, shape):
    array = held(dtype, shape)
    storage = dtype.to_storage(array)
    assert storage.shape == dtype.storage_shape(shape)
    assert storage.dtype == dtype.storage_numpy
    assert storage.nbytes == dtype.storage_nbytes(shape)
    assert storage.flags.c_contiguous
    back = dtype.from_storage(storage, shape)
    assert back.shape == shape
    assert back.dtype == dtype.numpy
    assert bits_of(back) == bits_of(array)
    if array.size:
        assert np.shares_memory(storage, array) == np.shares_memory(back, storage) == dtype.is_direct


@pytest.mark.parametrize("dtype", STORED, ids=by_short)
def test_read_only_stays_so_and_the_input_is_left_alone(dtype):
    array = held(dtype, (4, 3))
    storage = dtype.to_storage(array)
    assert dtype.from_storage(storage, (4, 3)).flags.writeable
    storage.flags.writeable = False
    assert not dtype.from_storage(storage, (4, 3)).flags.writeable
    assert array.flags.writeable
    array.flags.writeable = False
    assert dtype.to_storage(array).flags.writeable == dtype.is_packed
    wide = np.repeat(storage, 2, axis=0)
    wide.flags.writeable = False
    strided = wide[::2]
    back = dtype.from_storage(strided, (4, 3))
    assert bits_of(back) == bits_of(array)
    assert not back.flags.writeable


@pytest.mark.parametrize("dtype", DIRECT, ids=by_short)
def test_a_mapped_file_is_viewed(dtype, tmp_path):
    array = held(dtype, (6, 4))
    path = tmp_path / "data"
    path.write_bytes(b"\0" * 3 + bits_of(dtype.to_storage(array)))  # misaligned on purpose
    mapped = np.memmap(path, np.uint8, "r")
    view = mapped[3:].view(dtype.storage_numpy).reshape(dtype.storage_shape((6, 4)))
    back = dtype.from_storage(view, (6, 4))
    assert np.shares_memory(back, mapped)
    assert type(back) is np.ndarray
    assert not back.flags.writeable
    assert bits_of(back) == bits_of(array)


@st.composite
def strided(draw: st.DrawFn) -> tuple[DType, np.ndarray]:
    dtype = draw(st.sampled_from(STORED))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    steps = [draw(st.sampled_from([1, 1, 2, 3, -1, -2])) for _ in shape]
    base = held(dtype, tuple(n * abs(s) for n, s in zip(shape, steps, strict=True)), draw(st.integers(0, 9)))
    if draw(st.booleans()):
        base = base.astype(base.dtype.newbyteorder(">"))
    array = base[tuple(slice(None, None, s) for s in steps)]
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    if array.ndim and draw(st.booleans()):
        array = np.broadcast_to(array, (2, *array.shape))
    return dtype, array


@settings(max_examples=300, deadline=None)
@given(strided())
def test_any_strides(case):
    dtype, array = case
    native = array.astype(array.dtype.newbyteorder("="))
    before = bits_of(array)
    storage = dtype.to_storage(array)
    assert storage.flags.c_contiguous
    assert storage.shape == dtype.storage_shape(array.shape)
    back = dtype.from_storage(storage, array.shape)
    assert bits_of(back) == bits_of(native)
    assert bits_of(array) == before
    if dtype.is_direct:
        assert bits_of(storage) == bits_of(native)


# ---- storage: refusals ----


@pytest.mark.parametrize("dtype", STORED, ids=by_short)
def test_another_dtype_is_refused(dtype):
    other = parse("i16") if dtype.short != "i16" else parse("u16")
    with pytest.raises(LeafError) as caught:
        dtype.to_storage(np.zeros(3, other.numpy))
    assert caught.value.expected == dtype.numpy
    assert caught.value.found == other.numpy
    wrong = np.zeros(dtype.storage_shape((3,)), other.numpy)
    with pytest.raises(CorruptPackageError) as caught:
        dtype.from_storage(wrong, (3,))
    assert caught.value.field == "dtype"
    with pytest.raises(CorruptPackageError) as caught:
        dtype.from_storage(np.zeros((4, 1), dtype.storage_numpy), (3,))
    assert caught.value.field == "shape"


def test_unpack_refuses():
    dtype = parse("i4")
    with pytest.raises(CorruptPackageError):
        dtype.unpack(np.zeros(3, np.uint8), 0, 4)
    with pytest.raises(CorruptPackageError):
        dtype.unpack(np.zeros((2, 1), np.uint8), 0, 4)
    for short in ("f32", "u8", "bool", "key<rbg>", "float0"):
        with pytest.raises(LeafError):
            parse(short).packed_range(0, 1)
        with pytest.raises(LeafError):
            parse(short).unpack(np.zeros(1, np.uint8), 0, 1)


# ---- the second opinion ----


@pytest.mark.parametrize("dtype", [*STORED, *(parse(f"key<{i}>") for i in IMPLS)], ids=by_short)
def test_the_safetensors_package_reads_it(dtype):
    shape = (3, 5)
    array = held(parse("u32"), (*shape, *dtype.key_data_shape)) if dtype.is_key else held(dtype, shape)
    storage = dtype.to_storage(array)
    header = {"x": {"dtype": dtype.storage, "shape": storage.shape, "data_offsets": [0, storage.nbytes]}}
    text = json.dumps(header).encode()
    file = len(text).to_bytes(8, "little") + text + bits_of(storage)
    ((name, tensor),) = safetensors.deserialize(file)
    assert name == "x"
    assert tensor["dtype"] == dtype.storage
    assert tuple(tensor["shape"]) == dtype.storage_shape(shape)
    assert bytes(tensor["data"]) == bits_of(storage)
    back = np.frombuffer(tensor["data"], np.uint8).view(dtype.storage_numpy).reshape(tensor["shape"])
    assert bits_of(dtype.from_storage(back, shape)) == bits_of(array)


def test_the_held_dtypes_are_those_of_ml_dtypes():
    assert parse("bf16").numpy == np.dtype(ml_dtypes.bfloat16)
    assert parse("f8_e4m3fn").storage_numpy == np.dtype(ml_dtypes.float8_e4m3fn)
    assert parse("f8_e4m3").storage_numpy == np.uint8
