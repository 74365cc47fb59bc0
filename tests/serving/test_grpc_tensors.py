"""Tensors of both protocols to arrays and back: every dtype, every field, and what is refused."""

import importlib.resources
import math
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from obmlite.serving import ServingError, TensorInfo
from obmlite.serving._elements import to_bytes
from obmlite.serving._inference import datatype
from obmlite.serving.grpc import _infer_tensor, _tensor_proto, array, tensor_proto
from obmlite.serving.grpc.messages import inference
from obmlite.serving.grpc.messages import tensorflow_serving as tfs

LIMIT = 1 << 20


def shape(*sizes):
    return tfs.TensorShapeProto(dim=[tfs.TensorShapeProto.Dim(size=size) for size in sizes])


def refused(call, *parts):
    """The call is refused as an invalid argument, in words that name all of these."""
    with pytest.raises(ServingError) as caught:
        call()
    assert caught.value.code.name == "INVALID_ARGUMENT"
    for part in ("'x'", *parts):
        assert part in str(caught.value)


# --- the descriptors


def test_the_descriptors_are_protocs(tmp_path):
    pytest.importorskip("grpc_tools")
    folder = importlib.resources.files("obmlite.serving.grpc")
    out = tmp_path / "descriptors.binpb"
    command = [sys.executable, "-W", "ignore", "-m", "grpc_tools.protoc", f"-I{folder}", f"--descriptor_set_out={out}"]
    subprocess.run([*command, "tensorflow_serving.proto", "inference.proto"], check=True)
    # Compared as messages: versions of protoc may differ in the order of what they write.
    made, held = (descriptor_pb2.FileDescriptorSet.FromString(p.read_bytes()) for p in (out, folder / out.name))
    assert made == held


def test_the_messages_are_in_no_pool_that_others_use():
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName(tfs.TensorProto.DESCRIPTOR.full_name)
    assert tfs.TensorProto.DESCRIPTOR.full_name == "obmlite.tensorflow_serving.TensorProto"


# --- tensorflow.TensorProto


DTYPES = [row.dtype for row in _tensor_proto._ROWS.values()]


def sample(dtype, *sizes):
    """Small numbers, which every dtype holds."""
    numbers = np.arange(math.prod(sizes)).reshape(sizes) % 2
    return numbers.astype(np.float32).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(), (3,), (2, 0, 3), (2, 3)], ids=str)
def test_content(dtype, sizes):
    values = sample(dtype, *sizes)
    proto = tensor_proto(values)
    assert proto.tensor_content == values.tobytes()
    found = array("x", tfs.TensorProto.FromString(proto.SerializeToString()), LIMIT)
    assert (found.dtype, found.shape, found.tobytes()) == (values.dtype, values.shape, values.tobytes())


def typed(values, **more):
    """The TensorProto that has values in the field of their dtype."""
    row = _tensor_proto._ROWS[_tensor_proto.data_type(values.dtype)]
    flat = values.ravel()
    if row.field == "float8_val":
        field = flat.tobytes()
    elif row.field == "half_val":
        field = flat.view(np.uint16).tolist()
    elif values.dtype.kind == "c":
        field = flat.view(row.held).tolist()
    else:
        field = flat.astype(row.held).tolist()
    proto = {"dtype": _tensor_proto.data_type(values.dtype), "tensor_shape": shape(*values.shape), row.field: field}
    return tfs.TensorProto(**(proto | more))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_in_their_field(dtype):
    values = sample(dtype, 2, 3)
    found = array("x", typed(values), LIMIT)
    assert (found.dtype, found.shape, found.tobytes()) == (values.dtype, values.shape, values.tobytes())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_last_value_is_repeated_and_none_is_zero(dtype):
    one = np.ones(1, np.float32).astype(dtype)
    found = array("x", typed(one, tensor_shape=shape(2, 2)), LIMIT)
    assert found.tobytes() == np.repeat(one, 4).tobytes()
    found = array("x", typed(one[:0], tensor_shape=shape(2)), LIMIT)
    assert found.tobytes() == bytes(2 * one.itemsize)
    two = array("x", typed(sample(dtype, 2), tensor_shape=shape(4)), LIMIT)
    assert two.tobytes() == np.array([0, 1, 1, 1], np.float32).astype(dtype).tobytes()


def test_texts():
    for values in (["a", "ü", ""], [b"a", b"\xff", b""]):
        proto = tensor_proto(np.array(values, object))
        assert array("x", proto, LIMIT).tolist() == [v.encode() if isinstance(v, str) else v for v in values]
    assert tensor_proto(np.array(["ab"])).string_val == [b"ab"]
    repeated = tfs.TensorProto(dtype=7, tensor_shape=shape(2, 2), string_val=[b"a", b"b"])
    assert array("x", repeated, LIMIT).tolist() == [[b"a", b"b"], [b"b", b"b"]]
    assert array("x", tfs.TensorProto(dtype=7, tensor_shape=shape(2)), LIMIT).tolist() == [b"", b""]


def test_any_byte_is_a_bool():
    proto = tfs.TensorProto(dtype=10, tensor_shape=shape(3), tensor_content=b"\0\1\7")
    assert array("x", proto, LIMIT).view(np.uint8).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("proto", "parts"),
    [
        ({"dtype": 1, "tensor_shape": shape(2), "tensor_content": bytes(7)}, ("8 bytes", "found 7", "float32[2]")),
        ({"dtype": 1, "tensor_shape": shape(-1), "float_val": [1]}, ("[-1]",)),
        ({"dtype": 1, "tensor_shape": shape(1 << 62, 1 << 62), "float_val": [1]}, (f"at most {LIMIT} bytes",)),
        ({"dtype": 1, "tensor_shape": shape(0, 1 << 62), "tensor_content": b""}, (f"at most {LIMIT} bytes",)),
        ({"dtype": 1, "tensor_shape": shape(LIMIT), "float_val": [1]}, (f"at most {LIMIT} bytes",)),
        ({"dtype": 7, "tensor_shape": shape(LIMIT // 8), "string_val": [b"12345678901"]}, (f"at most {LIMIT} bytes",)),
        ({"dtype": 1, "tensor_shape": shape(*[1] * 65), "float_val": [1]}, ("at most 64", "found 65")),
        ({"dtype": 1, "tensor_shape": shape(2), "float_val": [1, 2, 3]}, ("expected 2", "found 3")),
        ({"dtype": 1, "tensor_shape": shape(1), "double_val": [1]}, ("float_val", "double_val")),
        ({"dtype": 1, "tensor_shape": shape(1), "float_val": [1], "tensor_content": bytes(4)}, ("both",)),
        ({"dtype": 7, "tensor_shape": shape(1), "tensor_content": b"a"}, ("string_val",)),
        ({"dtype": 7, "tensor_shape": shape(1), "string_val": [b"a", b"b"]}, ("expected 1", "found 2")),
        ({"dtype": 4, "tensor_shape": shape(2), "int_val": [0, 256]}, ("uint8", "0 to 255", "256")),
        ({"dtype": 14, "tensor_shape": shape(1), "half_val": [1 << 16]}, ("0 to 65535",)),
        ({"dtype": 29, "tensor_shape": shape(1), "tensor_content": b"\x08"}, ("int4", "-8 to 7")),
        ({"dtype": 8, "tensor_shape": shape(1), "scomplex_val": [1]}, ("imaginary",)),
        ({"dtype": 20, "tensor_shape": shape(1)}, ("20 of tensorflow.DataType",)),
        ({"tensor_shape": shape(1)}, ("0 of tensorflow.DataType",)),
        ({"dtype": 1, "tensor_shape": tfs.TensorShapeProto(unknown_rank=True)}, ("unknown rank",)),
    ],
    ids=lambda value: "",
)
def test_what_is_no_tensor(proto, parts):
    refused(lambda: array("x", tfs.TensorProto(**proto), LIMIT), *parts)


def test_a_dtype_that_tensorflow_lacks():
    with pytest.raises(ServingError, match="float4_e2m1fn") as caught:
        tensor_proto(np.zeros(2, ml_dtypes.float4_e2m1fn))
    assert caught.value.code.name == "UNIMPLEMENTED"


# --- the Open Inference Protocol


DATATYPES = {
    datatype(np.dtype(dtype)): np.dtype(dtype)
    for dtype in (
        *(np.bool_, np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int16, np.int32, np.int64),
        *(np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ml_dtypes.int4, ml_dtypes.float8_e4m3fn),
    )
}


def tensor(datatype, sizes, **contents):
    return inference.ModelInferRequest.InferInputTensor(
        name="x", datatype=datatype, shape=sizes, contents=inference.InferTensorContents(**contents)
    )


def read(given, content, datatype=""):
    """The array of an input where the signature has this datatype."""
    dtype = DATATYPES.get(datatype or given.datatype, np.dtype(object))
    return _infer_tensor.array(given, content, TensorInfo("x", dtype, (), "x[]"), LIMIT)


@pytest.mark.parametrize("name", DATATYPES)
def test_raw(name):
    values = sample(DATATYPES[name], 2, 3)
    found = read(tensor(name, values.shape), to_bytes(values))
    assert (found.dtype, found.shape, found.tobytes()) == (values.dtype, values.shape, values.tobytes())


@pytest.mark.parametrize("name", [name for name, dtype in DATATYPES.items() if _infer_tensor.field(dtype)])
def test_contents(name):
    values = sample(DATATYPES[name], 2, 3)
    given = tensor(name, values.shape)
    given.contents.CopyFrom(_infer_tensor.contents(values))
    assert len(given.contents.ListFields()[0][1]) == 6
    found = read(given, None)
    assert (found.dtype, found.shape, found.tobytes()) == (values.dtype, values.shape, values.tobytes())


def test_which_datatypes_have_a_field():
    assert {name for name, dtype in DATATYPES.items() if not _infer_tensor.field(dtype)} == {
        *("FP16", "BF16", "INT4", "FLOAT8_E4M3FN")
    }


def test_bytes():
    values = np.array([[b"a", b""], ["ü", b"\0" * 300]], object)
    expected = [[b"a", b""], ["ü".encode(), b"\0" * 300]]
    assert read(tensor("BYTES", (2, 2)), to_bytes(values)).tolist() == expected
    given = tensor("BYTES", (2, 2), bytes_contents=_infer_tensor.contents(values).bytes_contents)
    assert read(given, None).tolist() == expected


@pytest.mark.parametrize(
    ("given", "content", "parts"),
    [
        (tensor("FP32", (2,)), bytes(9), ("8 bytes", "found 9")),
        (tensor("FP32", (2,), fp32_contents=[1]), None, ("expected 2", "found 1")),
        (tensor("FP32", (2,), fp32_contents=[1, 2]), bytes(8), ("both", "fp32_contents")),
        (tensor("FP32", (1,), fp64_contents=[1]), None, ("fp32_contents", "fp64_contents")),
        (tensor("FP16", (1,), fp32_contents=[1]), None, ("raw_input_contents only",)),
        (tensor("INT8", (1,), int_contents=[128]), None, ("int8", "-128 to 127")),
        (tensor("FP8", (1,)), bytes(1), ("expected datatype BYTES (x[])", 'got "FP8"')),
        (tensor("FP32", (-1,)), bytes(4), ("[-1]",)),
        (tensor("FP32", (1 << 40,)), bytes(4), (f"at most {LIMIT} bytes",)),
        (tensor("BYTES", (1,)), struct.pack("<I", 5) + b"abcd", ("inside of text 0",)),
        (tensor("BYTES", (2,)), struct.pack("<I", 1) + b"a\0\0", ("inside of text 1",)),
        (tensor("BYTES", (2,)), struct.pack("<I", 1) + b"a", ("expected 2", "found 1")),
        (tensor("BYTES", (1,)), struct.pack("<II", 0, 0), ("expected 1", "found 2")),
    ],
    ids=lambda value: "",
)
def test_what_is_no_infer_tensor(given, content, parts):
    refused(lambda: read(given, content), *parts)
