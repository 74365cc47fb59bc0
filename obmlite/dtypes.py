"""Every dtype that JAX has, its number in a manifest, and how its elements lie in a safetensors file.

Three things are told apart. The *logical* dtype is what JAX computes with (``int4``, ``key<threefry2x32>``).
The *held* array is what numpy holds for it: one element per item, an ``int4`` in the low bits of a byte of its
own. The *storage* array is what a safetensors file holds, little-endian and row-major:

===========================================  ==============================================================
logical                                      storage
===========================================  ==============================================================
a dtype that safetensors knows               its code, same shape, same bytes
an 8-bit float that it does not know         ``U8``, same shape, same bytes
complex128                                   ``F64``, a trailing dimension of 2: real, imaginary
PRNG keys                                    ``U32``, the key data's trailing dimensions
less than a byte (2, 4 and 6 bits)           ``U8``, flat, packed: element *i* is bits *i·b* to *i·b+b−1* of the
                                             tensor, counted from each byte's lowest bit; row-major; the bits
                                             after the last element are zero
float0                                       no tensor: it has no bits
===========================================  ==============================================================

Codes: https://github.com/huggingface/safetensors#format. Theirs for fewer than 8 bits (``F4``, ``F6_E2M3``, …) are
not used: the ``safetensors`` package cannot load them into numpy or JAX, and there is none for integers.

What is not checked here: a ``BOOL`` byte other than 0 or 1 stays what it is, because a view must not be changed
and looking would read every page of a mapped file; whoever takes a file that obmlite did not write to a device
has to look. Padding bits are written as zeros and ignored when read.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any, Final

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from obmlite.errors import CorruptPackageError, ExportError, LeafError, RestoreError

__all__ = ["ALL", "KEY", "DType", "by_code", "of", "parse"]

KEY: Final = 30
"""The code of all PRNG keys; the implementation's name stands beside it."""

# Little-endian is said where numpy can say it; ml_dtypes' types have the machine's order only, and no machine
# that jaxlib is built for has the other one.
_STORAGE: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),  # safetensors means the finite one, as torch does
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}


@dataclass(frozen=True, slots=True)
class DType:
    """A logical dtype; made by :func:`of`, :func:`by_code` and :func:`parse`, not by hand.

    Attributes:
      code: the number in a manifest. Append-only; 0 is never used, it means unspecified there.
      name: JAX's and numpy's name, ``"bfloat16"``, ``"int4"``, ``"float0"``; ``"key"`` for all PRNG keys.
      short: the name in signatures, ``"bf16"``, ``"i4"``, ``"key<threefry2x32>"``.
      bits: bits of one logical element; all the key data's for a key. 0 for float0, and for keys of an
        implementation that this JAX does not know.
      storage: the safetensors code, ``""`` for float0.
      impl: the PRNG implementation's name, for keys.
      tail: dimensions that the storage has after the logical ones; None where ``impl`` is unknown.
    """

    code: int
    name: str
    short: str
    bits: int
    storage: str
    impl: str | None = None
    tail: tuple[int, ...] | None = ()

    def __str__(self) -> str:
        return self.short

    @property
    def is_key(self) -> bool:
        """Whether the elements are PRNG keys."""
        return self.code == KEY

    @property
    def is_packed(self) -> bool:
        """Whether the storage holds several elements in a byte."""
        return 0 < self.bits < 8

    @property
    def is_direct(self) -> bool:
        """Whether the storage's bytes are those of the held array, so that a mapped file can be viewed as it."""
        return bool(self.storage) and not self.is_packed

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype of a held element.

        Raises:
          LeafError: for keys, which numpy cannot hold.
        """
        if self.is_key:
            raise LeafError(
                "numpy has no dtype for PRNG keys", found=self.short, fix="work on jax.random.key_data(keys), uint32"
            )
        return _NUMPY[self.code]

    @property
    def jax(self) -> Any:
        """What ``jax.ShapeDtypeStruct`` takes as its dtype.

        Raises:
          RestoreError: for keys of a PRNG implementation that this JAX does not know.
        """
        if self.impl is None:
            return self.numpy
        try:
            return _key_dtype(self.impl)
        except ValueError as error:
            raise self._unknown_impl() from error

    @property
    def key_data_shape(self) -> tuple[int, ...]:
        """Shape of one key's uint32 data: what ``jax.random.key_data`` appends to the keys' shape.

        Raises:
          LeafError: if this is no key dtype.
          RestoreError: for keys of a PRNG implementation that this JAX does not know.
        """
        if not self.is_key:
            raise LeafError("only PRNG keys have key data", found=self.short)
        return self._known_tail()

    # ---- storage ---------------------------------------------------------------------------------------------

    @property
    def storage_numpy(self) -> np.dtype[Any]:
        """The numpy dtype of the storage array.

        Raises:
          LeafError: for float0.
        """
        if not self.storage:
            raise LeafError("float0 has no bits, so no tensor is stored for it", found=self.short)
        return _STORAGE[self.storage]

    def storage_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the safetensors tensor that holds logical elements of ``shape``.

        Raises:
          LeafError: for float0.
          RestoreError: for keys of a PRNG implementation that this JAX does not know.
        """
        if not self.storage:
            raise LeafError("float0 has no bits, so no tensor is stored for it", found=self.short)
        if self.is_packed:
            return (self.packed_range(0, math.prod(shape))[1],)
        return (*shape, *self._known_tail())

    def storage_nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of that tensor; 0 for float0.

        Raises:
          RestoreError: for keys of a PRNG implementation that this JAX does not know.
        """
        if not self.storage:
            return 0
        return math.prod(self.storage_shape(shape)) * self.storage_numpy.itemsize

    def to_storage(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The storage array of a held one; for keys, of their uint32 key data.

        Args:
          array: of this dtype in any byte order, any strides.

        Returns:
          A C-contiguous array of ``storage_numpy`` and ``storage_shape``. It shares the input's memory when
          the input's bytes are the storage already: native order, C-contiguous, not packed.

        Raises:
          LeafError: if the array is not of this dtype, or for float0.
        """
        shape, held = self._held(array)
        target = self.storage_numpy
        if array.dtype.newbyteorder("=") != held:
            raise LeafError(
                "the array is not of the dtype that it is to be stored as", expected=held, found=array.dtype
            )
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        # Not np.ascontiguousarray, which makes one dimension of none.
        array = np.asarray(array, order="C")
        if self.is_packed:
            return _pack(array.reshape(-1).view(np.uint8), self.bits)
        return array.reshape(-1).view(target).reshape(self.storage_shape(shape))

    def from_storage(self, storage: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """The held array of logical ``shape``; for keys, their uint32 key data.

        Args:
          storage: of ``storage_numpy`` and ``storage_shape(shape)``.
          shape: the logical shape.

        Returns:
          A view of ``storage`` if :attr:`is_direct` and it is C-contiguous, else a new array. Read-only if
          ``storage`` is.

        Raises:
          CorruptPackageError: if the storage's dtype or shape is another.
          LeafError: for float0.
        """
        if storage.dtype != self.storage_numpy:
            raise CorruptPackageError(
                f"the tensor's storage is not that of {self.short}",
                field="dtype",
                expected=self.storage_numpy,
                found=storage.dtype,
            )
        if storage.shape != self.storage_shape(shape):
            raise CorruptPackageError(
                f"the tensor's storage is not that of {self.short}{list(shape)}",
                field="shape",
                expected=self.storage_shape(shape),
                found=storage.shape,
            )
        contiguous = np.asarray(storage, order="C")
        if self.is_packed:
            array = self.unpack(contiguous, 0, math.prod(shape)).reshape(shape)
        elif self.is_key:
            array = contiguous.view()
        else:
            array = contiguous.reshape(-1).view(self.numpy).reshape(shape)
        # Also for what was copied: whether a result can be written to shall not depend on its dtype.
        if not storage.flags.writeable:
            array.flags.writeable = False
        return array

    def packed_range(self, first: int, count: int) -> tuple[int, int]:
        """The half-open range of a packed tensor's bytes that holds its elements ``[first, first + count)``."""
        self._require_packed()
        if count == 0:
            return first * self.bits // 8, first * self.bits // 8
        return first * self.bits // 8, -(-(first + count) * self.bits // 8)

    def unpack(self, data: np.ndarray[Any, Any], first: int, count: int) -> np.ndarray[Any, Any]:
        """Elements ``[first, first + count)`` of a packed tensor, from only the bytes that hold them.

        Args:
          data: flat uint8, exactly the bytes ``packed_range(first, count)`` of the storage.
          first: index of the first element in row-major order.
          count: number of elements.

        Returns:
          A new flat held array, bits above an element's own zero, as ml_dtypes keeps them.

        Raises:
          CorruptPackageError: if ``data`` is not of that length.
        """
        start, stop = self.packed_range(first, count)
        if data.shape != (stop - start,):
            raise CorruptPackageError(
                f"the bytes are not those of {count} elements of {self.short}",
                field="shape",
                expected=(stop - start,),
                found=data.shape,
            )
        return _unpack(data, self.bits, first * self.bits - start * 8, count).view(self.numpy)

    def _held(self, array: np.ndarray[Any, Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Logical shape of a held array, and the dtype that it has to have."""
        if not self.is_key:
            return array.shape, self.numpy
        tail = self.key_data_shape
        rank = array.ndim - len(tail)
        if rank < 0 or array.shape[rank:] != tail:
            raise LeafError(f"the array is no key data of {self.short}", expected=(..., *tail), found=array.shape)
        return array.shape[:rank], self.storage_numpy

    def _known_tail(self) -> tuple[int, ...]:
        if self.tail is None:
            raise self._unknown_impl()
        return self.tail

    def _unknown_impl(self) -> RestoreError:
        return RestoreError(
            f"this JAX ({jax.__version__}) has no PRNG implementation of that name",
            field="dtype",
            found=self.impl,
            fix="use a JAX that has it",
        )

    def _require_packed(self) -> None:
        if not self.is_packed:
            raise LeafError("elements of a byte or more are not packed", found=self.short)


def of(value: Any) -> DType:
    """The dtype of a leaf, or the one that a dtype object names.

    Args:
      value: an array, ``jax.ShapeDtypeStruct`` or anything with such a ``dtype``; a numpy, ml_dtypes or JAX dtype
        or scalar type; a Python bool, int, float or complex or its type, which give what JAX makes of them, with
        ``jax_enable_x64`` or without. Byte order makes no difference.

    Raises:
      LeafError: for anything else: object, text, dates, structures, float128, int1 (which JAX names, and
        takes for bool when it computes), texts that name a dtype (see :func:`parse`), masked arrays.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise LeafError("a masked array cannot be stored", found=type(value).__name__, fix="fill it first")
    if isinstance(value, np.dtype):
        return _of_numpy(value)
    if isinstance(value, type):
        return _of_type(value)
    dtype = getattr(value, "dtype", None)  # before Python's numbers: np.float64 is a float, np.complex128 a complex
    if isinstance(dtype, np.dtype):
        return _of_numpy(dtype)
    if isinstance(value, (bool, int, float, complex)):
        return _of_python(value)
    extended = value if dtype is None else dtype
    if _is_key_dtype(extended):
        return _of_key(extended)
    raise LeafError("this has no dtype that JAX has", found=type(value).__qualname__ if dtype is None else dtype)


def by_code(code: int, impl: str | None = None) -> DType:
    """The dtype that a manifest names.

    Keys of a PRNG implementation that this JAX does not know are named too, so that they can be listed; what
    needs to know more of them raises :class:`RestoreError`.

    Args:
      code: the number.
      impl: the PRNG implementation; for other dtypes than keys None or the empty text.

    Raises:
      CorruptPackageError: for an unknown number, a key without an implementation, an implementation without a key.
    """
    if code == KEY:
        if impl is None or _IMPL.fullmatch(impl) is None:
            raise CorruptPackageError(
                "a key's dtype names no PRNG implementation", field="dtype", found=f"{impl!r:.80}"
            )
        return _key(impl)
    dtype = _BY_CODE.get(code)
    if dtype is None:
        raise CorruptPackageError("there is no dtype of that number", field="dtype", found=code)
    if impl:
        raise CorruptPackageError(
            f"a PRNG implementation stands beside {dtype.name}", field="dtype", found=f"{impl!r:.80}"
        )
    return dtype


def parse(text: str) -> DType:
    """The dtype that a user names: ``"f32"``, ``"float32"``, ``"key<threefry2x32>"`` or JAX's ``"key<fry>"``.

    Raises:
      ExportError: if there is none of that name, or the PRNG implementation is not one of this JAX's.
    """
    dtype = _BY_TEXT.get(text)
    if dtype is not None:
        return dtype
    if text.startswith("key<") and text.endswith(">"):
        impl = _TAGS.get(text[4:-1], text[4:-1])
        if _IMPL.fullmatch(impl) is not None and (key := _key(impl)).tail is not None:
            return key
    raise ExportError(
        "there is no dtype of that name",
        field="dtype",
        found=f"{text!r:.80}",
        fix="write it as f32, float32, bf16, i4, bool or key<threefry2x32>",
    )


# ---- the table -----------------------------------------------------------------------------------------------


def _plain(code: int, name: str, storage: str, tail: tuple[int, ...] = ()) -> DType:
    short = name
    for word, letter in (("uint", "u"), ("int", "i"), ("bfloat", "bf"), ("complex", "c"), ("float", "f")):
        if name.startswith(word) and name != "float0":
            short = letter + name.removeprefix(word)
            break
    held = _held_dtype(name)
    digits = re.match(r"[a-z]+(\d+)", name)
    return DType(code, name, short, int(digits[1]) if digits else held.itemsize * 8, storage, None, tail)


def _held_dtype(name: str) -> np.dtype[Any]:
    if name == "float0":
        float0: np.dtype[Any] = np.dtype(jax.dtypes.float0)
        return float0
    # ml_dtypes first: the names are its own until numpy has types of the same name, which would be others.
    held: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name, name))
    return held


ALL: Final[tuple[DType, ...]] = (
    _plain(1, "bool", "BOOL"),
    _plain(2, "int2", "U8"),
    _plain(3, "int4", "U8"),
    _plain(4, "int8", "I8"),
    _plain(5, "int16", "I16"),
    _plain(6, "int32", "I32"),
    _plain(7, "int64", "I64"),
    _plain(8, "uint2", "U8"),
    _plain(9, "uint4", "U8"),
    _plain(10, "uint8", "U8"),
    _plain(11, "uint16", "U16"),
    _plain(12, "uint32", "U32"),
    _plain(13, "uint64", "U64"),
    _plain(14, "float4_e2m1fn", "U8"),
    _plain(15, "float8_e3m4", "U8"),
    _plain(16, "float8_e4m3", "U8"),
    _plain(17, "float8_e4m3b11fnuz", "U8"),
    _plain(18, "float8_e4m3fn", "F8_E4M3"),
    _plain(19, "float8_e4m3fnuz", "F8_E4M3FNUZ"),
    _plain(20, "float8_e5m2", "F8_E5M2"),
    _plain(21, "float8_e5m2fnuz", "F8_E5M2FNUZ"),
    _plain(22, "float8_e8m0fnu", "F8_E8M0"),
    _plain(23, "float16", "F16"),
    _plain(24, "bfloat16", "BF16"),
    _plain(25, "float32", "F32"),
    _plain(26, "float64", "F64"),
    _plain(27, "complex64", "C64"),
    _plain(28, "complex128", "F64", (2,)),
    _plain(29, "float0", ""),
    # 30 is KEY. Arrays of the next two exist on a device since JAX 0.12; jax.numpy names them since 0.10.
    _plain(31, "float6_e2m3fn", "U8"),
    _plain(32, "float6_e3m2fn", "U8"),
)
"""All dtypes except keys', of which there is one for each PRNG implementation."""

_BY_CODE: Final = {dtype.code: dtype for dtype in ALL}
_NUMPY: Final = {dtype.code: _held_dtype(dtype.name) for dtype in ALL}
_BY_NUMPY: Final = {_NUMPY[dtype.code]: dtype for dtype in ALL}
_BY_TEXT: Final = {text: dtype for dtype in ALL for text in (dtype.name, dtype.short)}

# JAX's own implementations, so that listing a package does not ask JAX, and an older JAX lists newer ones:
# name, the tag that JAX prints in a key's dtype, shape of the key data.
_IMPLS: Final = (
    ("threefry2x32", "fry", (2,)),
    ("rbg", "rbg", (4,)),
    ("unsafe_rbg", "urbg", (4,)),
    ("philox2x32", "phx2", (1,)),
    ("philox4x32", "phx4", (2,)),
    ("threefry4x32", "fry4", (4,)),
)
_TAGS: Final = {tag: name for name, tag, _ in _IMPLS}
_KEY_DATA: Final = {name: shape for name, _, shape in _IMPLS}
# A manifest's text goes to terminals and into dtype texts: nothing that could end those early.
_IMPL: Final = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


def _of_numpy(dtype: np.dtype[Any]) -> DType:
    found = _BY_NUMPY.get(dtype) or _BY_NUMPY.get(dtype.newbyteorder("="))
    if found is None:
        raise LeafError("arrays of this dtype cannot be stored", found=f"dtype {dtype}")
    return found


def _of_type(value: type) -> DType:
    if value in (bool, int, float, complex):
        return _of_python(value())
    dtype = getattr(value, "dtype", None)  # jnp.float32 is a class that carries its dtype
    if isinstance(dtype, np.dtype):
        return _of_numpy(dtype)
    if issubclass(value, np.generic):
        try:
            return _of_numpy(np.dtype(value))
        except TypeError as error:  # np.floating and other abstract ones; LeafError is one too
            raise LeafError("this type names no dtype that can be stored", found=value.__qualname__) from error
    raise LeafError("this type names no dtype", found=value.__qualname__)


def _of_python(value: complex) -> DType:
    found = _of_numpy(np.dtype(jax.dtypes.result_type(value)))
    # JAX names int32 for any int and refuses a large one only when it makes an array of it.
    if type(value) is not bool and isinstance(value, int):
        limits = np.iinfo(found.numpy)
        if not limits.min <= value <= limits.max:
            raise LeafError(
                "the integer does not fit the dtype that JAX gives to Python integers",
                expected=f"{found.name}, {limits.min} to {limits.max}",
                found=f"an int of {value.bit_length()} bits",
                fix="make it an array of the dtype that you mean",
            )
    return found


def _is_key_dtype(value: Any) -> bool:
    try:
        return bool(jnp.issubdtype(value, jax.dtypes.prng_key))
    except TypeError:  # not a dtype at all
        return False


@functools.lru_cache(maxsize=64)
def _of_key(dtype: Any) -> DType:
    found: list[Any] = []

    def look(keys: Any) -> Any:
        found.append(jax.random.key_impl(keys))
        return keys

    # Public JAX tells the implementation of an array, not of a dtype; an abstract array will do.
    jax.eval_shape(look, jax.ShapeDtypeStruct((), dtype))
    impl = found[0]
    # A PRNG of the user's own is known by an object or by a name that no other process has.
    if not isinstance(impl, str) or impl not in _KEY_DATA:
        raise LeafError(
            "keys of a PRNG implementation that JAX does not know by name cannot be stored",
            found=f"dtype {dtype}",
            fix="store jax.random.key_data(keys)",
        )
    return _key(impl)


def _key(impl: str) -> DType:
    shape: tuple[int, ...] | None = _KEY_DATA.get(impl)
    bits = 0 if shape is None else 32 * math.prod(shape)
    return DType(KEY, "key", f"key<{impl}>", bits, "U32", impl, shape)


@functools.lru_cache(maxsize=64)
def _key_dtype(impl: str) -> Any:
    """JAX's dtype of the implementation's keys; ValueError if it knows none."""
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype


# ---- less than a byte ----------------------------------------------------------------------------------------
#
# Elements whose indices are the same modulo `group` start at the same bit of a byte, so one strided operation
# moves them all: 4 operations for 2 bits, 2 for 4, and 4 for 6, where an element may cross into the next byte.


def _group(bits: int) -> tuple[int, int]:
    """Smallest number of elements that fills whole bytes, and of how many."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _pack(elements: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    group, stride = _group(bits)
    out = np.zeros(-(-len(elements) * bits // 8), np.uint8)
    for i in range(min(group, len(elements))):
        byte, shift = divmod(i * bits, 8)
        part = elements[i::group] & np.uint8((1 << bits) - 1)
        out[byte::stride][: len(part)] |= part << np.uint8(shift)
        if shift + bits > 8:
            out[byte + 1 :: stride][: len(part)] |= part >> np.uint8(8 - shift)
    return out


def _unpack(data: np.ndarray[Any, Any], bits: int, offset: int, count: int) -> np.ndarray[Any, Any]:
    """Elements as bytes, the first starting at bit ``offset`` of ``data``."""
    group, stride = _group(bits)
    out = np.empty(count, np.uint8)
    for i in range(min(group, count)):
        byte, shift = divmod(offset + i * bits, 8)
        length = len(out[i::group])
        part = data[byte::stride][:length] >> np.uint8(shift)
        if shift + bits > 8:
            part |= data[byte + 1 :: stride][:length] << np.uint8(8 - shift)
        np.bitwise_and(part, np.uint8((1 << bits) - 1), out=out[i::group])
    return out
