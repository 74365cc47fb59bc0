"""What a pipeline's interface takes, refuses and gives: names, dtypes, shapes, and batches of odd sizes."""

import jax
import ml_dtypes
import numpy as np
import pytest

import obmlite
from obmlite.errors import SignatureError
from obmlite.interop.tensorflow_steps import Handle
from obmlite.pipeline import HOST_STEPS, HostStep
from obmlite.serving import Code, Interface, ServingError
from tests.serving.packages import WIDTH, fixed, model, rows


def interface(fn, *specs, pipeline=None, **options):
    made = obmlite.Model.from_function(
        fn, *map(obmlite.spec, specs), name="f", platforms="cpu", weights=None, **options
    )
    return Interface(made.pipeline)


@pytest.fixture(scope="module")
def open_batch():
    return Interface(model(2.0, constraints=("b <= 64",)).pipeline)


@pytest.fixture(scope="module")
def sizes():
    return Interface(fixed((1, 4, 16), 2.0).pipeline)


def refused(own, /, output_filter=(), **inputs):
    with pytest.raises(ServingError) as caught:
        own.run(inputs, output_filter)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tensors_have_names_dtypes_and_shapes(open_batch):
    [x], [out] = open_batch.inputs.values(), open_batch.outputs.values()
    assert (x.name, x.dtype, x.shape, x.text, x.kind) == ("x", np.float32, (None, WIDTH), "f32[b,4]", "tensor")
    assert (out.name, out.shape, out.text) == ("output_0", (None, WIDTH), "f32[b,4]")
    assert open_batch.batched
    assert open_batch.divisible
    assert open_batch.batch_sizes is None
    np.testing.assert_array_equal(open_batch.run({"x": rows(3)})["output_0"], rows(3) * 2)


def test_leaves_are_named_by_their_paths():
    def fn(batch, temperature):
        return {"logits": batch["a"] + temperature, "both": (batch["b"], batch["a"])}

    own = interface(fn, {"a": "f32[2]", "b": "i32[3]"}, "f32[]")
    assert list(own.inputs) == ["batch.a", "batch.b", "temperature"]
    assert list(own.outputs) == ["both.0", "both.1", "logits"]
    inputs = {
        "temperature": np.array(1, np.float32),
        "batch.b": np.arange(3, dtype=np.int32),
        "batch.a": np.ones(2, np.float32),
    }
    found = own.run(inputs)
    assert {name: array.tolist() for name, array in found.items()} == {
        "both.0": [0, 1, 2],
        "both.1": [1, 1],
        "logits": [2, 2],
    }
    assert not own.batched
    assert list(own.run(inputs, ["logits"])) == ["logits"]


def test_positions_are_outputs():
    own = interface(lambda x: (x + 1, [x, {"k": x}]), "f32[2]")
    assert list(own.outputs) == ["output_0", "output_1.0", "output_1.1.k"]


def test_dtypes_beyond_numpys_own():
    own = interface(lambda x, k: (x * 2, jax.random.split(k)), "bf16[2]", "key<threefry2x32>[]")
    assert own.inputs["x"].dtype == ml_dtypes.bfloat16
    assert own.inputs["k"].text == "u32[2]"
    data = np.array([1, 2], np.uint32)
    found = own.run({"x": np.ones(2, ml_dtypes.bfloat16), "k": data})
    assert found["output_0"].dtype == ml_dtypes.bfloat16
    expected = jax.random.key_data(jax.random.split(jax.random.wrap_key_data(data)))
    np.testing.assert_array_equal(found["output_1"], expected)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (
            {"y": rows(1), "z": rows(1)},
            "input size does not match signature: 2!=1 len({y,z}) != len({x}). Sent extra: {y,z}. Missing but",
        ),
        ({}, "Sent extra: {}. Missing but required: {x}."),
        ({"x": rows(3).astype(np.float64)}, "'x' has another dtype: expected f32[b,4], found f64[3,4]."),
        ({"x": np.array([[b"a"]])}, "'x' has another dtype: expected f32[b,4], found string[1,1]."),
        ({"x": rows(3)[0]}, "'x' has another rank: expected f32[b,4], found f32[4]."),
        ({"x": rows(3)[:, :3]}, "'x' has another shape: expected f32[b,4], found f32[3,3]."),
        ({"x": rows(0)}, "'x', dimension 0, expected b, for an integer b of at least 1, found 0; expected x: f32[b,4]"),
        ({"x": rows(65)}, "The sizes break b <= 64: found b = 65; expected x: f32[b,4], found x: f32[65,4]."),
    ],
)
def test_what_is_wrong_with_inputs_is_said(open_batch, inputs, text):
    assert text in refused(open_batch, **inputs)


def test_no_output_of_that_name(open_batch):
    text = refused(open_batch, ["logits"], x=rows(1))
    assert text == "output tensor alias not found in signature: logits Outputs expected to be in the set {output_0}."


def test_a_shared_symbol_is_one_size():
    own = interface(lambda x, y: x + y, "f32[b,2]", "f32[b,2]")
    text = refused(own, x=np.zeros((3, 2), np.float32), y=np.zeros((4, 2), np.float32))
    assert "input 'y', dimension 0, expected b = 3 (from input 'x', dimension 0), found 4" in text


def test_one_fixed_size_is_said_and_never_split():
    own = Interface(model(2.0, f"f32[1,{WIDTH}]").pipeline)
    assert (own.batch_sizes, own.batched, own.divisible) == ((1,), True, False)
    assert refused(own, x=rows(16)) == (
        "Input 'x': batch 16 does not match this model's fixed batch sizes [1]: expected f32[1,4], found f32[16,4]."
    )


@pytest.mark.parametrize(
    ("count", "runs"), [(1, ()), (3, (4,)), (16, ()), (17, (16, 1)), (21, (16, 16)), (35, (16, 16, 4))]
)
def test_odd_batches_are_filled_up_and_split(sizes, count, runs):
    assert sizes.batch_sizes == (1, 4, 16)
    assert sizes.inputs["x"].text == "f32[1|4|16,4]"
    plan = sizes.check({"x": rows(count)})
    assert (plan.rows, plan.sizes) == (count, runs)
    np.testing.assert_array_equal(sizes.run({"x": rows(count)})["output_0"], rows(count) * 2)


def test_batches_that_no_size_helps(sizes):
    assert "batch 0 does not match this model's fixed batch sizes [1, 4, 16]" in refused(sizes, x=rows(0))
    assert "'x' has another shape: expected f32[1|4|16,4], found f32[3,3]." in refused(sizes, x=rows(3)[:, :3])


def test_what_is_filled_in_changes_nothing_else(sizes):
    """NaNs, say, as zeros would be where a model divides."""
    own = Interface(fixed((4, 8), fn=lambda params, x: x / x * params["scale"]).pipeline)
    found = own.run({"x": rows(5)})["output_0"]
    np.testing.assert_array_equal(found, np.ones((5, WIDTH)))


def test_rows_that_know_of_one_another_are_not_divided():
    own = interface(lambda x: x @ x.T, "f32[b,4]")
    assert own.batched
    assert not own.divisible


def test_fixed_sizes_with_results_that_are_no_rows_are_not_filled_up():
    own = Interface(fixed((2, 4), fn=lambda params, x: (x * params["scale"], x.sum())).pipeline)
    assert not own.divisible
    assert "expected f32[2|4,4], found f32[3,4]" in refused(own, x=rows(3))


def test_errors_of_xla_have_their_codes():
    error = ServingError.of(RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 1 bytes."))
    assert (error.code, error.code.http) == (Code.RESOURCE_EXHAUSTED, 429)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (obmlite.ArgumentError("Bad.", leaf="x", expected="a", found="b"), Code.INVALID_ARGUMENT),
        (obmlite.PackageNotFoundError("Gone."), Code.NOT_FOUND),
        (obmlite.CorruptPackageError("Changed."), Code.DATA_LOSS),
        (obmlite.PlatformError("Elsewhere."), Code.FAILED_PRECONDITION),
        (SignatureError("Forged."), Code.FAILED_PRECONDITION),
        (obmlite.UnsupportedFormatError("New."), Code.UNIMPLEMENTED),
        (MemoryError(), Code.RESOURCE_EXHAUSTED),
        (ZeroDivisionError("by 0"), Code.INTERNAL),
    ],
)
def test_errors_as_clients_see_them(error, code):
    found = ServingError.of(error)
    assert found.code is code
    assert "\n" not in str(found)
    assert ServingError.of(found) is found


def test_a_text_has_an_end():
    assert len(str(ServingError(Code.NOT_FOUND, "x" * 100_000))) == 2000


def test_clients_do_not_learn_where_a_package_is():
    error = obmlite.ArgumentError("Bad.", package="/srv/models", leaf="x")
    assert str(ServingError.of(error)) == "Bad. (leaf: x)"


def test_an_error_survives_a_process():
    import multiprocessing.reduction as reduction

    error = ServingError(Code.NOT_FOUND, "Not here.", leaf="x")
    again = reduction.ForkingPickler.loads(reduction.ForkingPickler.dumps(error))
    assert (again.code, again.problem, again.leaf) == (Code.NOT_FOUND, "Not here.", "x")


def test_examples_as_named_arrays(open_batch):
    found = open_batch.named({"x": rows(2)})
    np.testing.assert_array_equal(open_batch.run(found)["output_0"], rows(2) * 2)
    with pytest.raises(ServingError, match="other leaves: expected x, found y"):
        open_batch.named({"y": rows(2)})


def test_many_shapes_keep_no_memory(open_batch):
    for count in range(1, 65):
        for _ in range(2):
            assert open_batch.check({"x": rows(count)}).rows == count
    own = interface(lambda x: x, "f32[b]")
    for count in range(1, 1000):
        own.check({"x": np.zeros(count, np.float32)})
    assert len(own._inputs._plans) <= 256


class Lengths(HostStep):
    """A step of the host: texts to their lengths."""

    def __init__(self, name):
        self.name = name
        handle = Handle("f", "saved_model", {"texts": "string[b]"}, "i32[b]", ("texts",), ("lengths",))
        self.signature = handle.signature()

    def run(self, arguments):
        [texts] = self.signature.match(arguments)
        return np.array([len(text) for text in texts], np.int32)


class Signs(HostStep):
    """The other way: numbers to texts."""

    def __init__(self, name):
        self.name = name
        handle = Handle("f", "saved_model", {"numbers": "i32[b]"}, {"text": "string[b]"}, ("numbers",), ("texts",))
        self.signature = handle.signature()

    def run(self, arguments):
        [numbers] = self.signature.match(arguments)
        return {"text": np.array([b"odd" if n % 2 else b"even" for n in np.asarray(numbers)], object)}


@pytest.fixture
def texts(monkeypatch):
    monkeypatch.setitem(HOST_STEPS, "application/x.lengths", lambda name, supplementals: Lengths(name))
    double = obmlite.export(lambda n: n * 2, obmlite.spec("i32[b]"), name="double", platforms="cpu")
    made = obmlite.Model(
        {"double": double},
        pipelines={"main": obmlite.Pipeline(pre=["lengths"], function="double")},
        supplementals={"lengths": obmlite.Supplemental.from_bytes(b"", mime_type="application/x.lengths", version="1")},
    )
    return Interface(made.pipeline)


def test_texts(texts):
    [info] = texts.inputs.values()
    assert (info.name, info.kind, info.dtype, info.shape) == ("texts", "text", np.dtype(object), (None,))
    assert info.text == "string[b]"
    for given in (np.array([b"a", b"bcd"]), np.array(["a", b"bcd"], object), np.array(["a", "bcd"])):
        assert texts.run({"texts": given})["output_0"].tolist() == [2, 6]
    assert "expected string[b], found f32[1]" in refused(texts, texts=np.zeros(1, np.float32))
    assert "expected string[b], found string[1,1]" in refused(texts, texts=np.array([[b"a"]]))
    assert "no text" in refused(texts, texts=np.array([1], object))
    assert list(texts.zeros()) == []


def test_keyword_only_arguments():
    def fn(x, *, shift):
        return x - shift["by"]

    own = obmlite.Model.from_function(
        fn, obmlite.spec("f32[2]"), kwargs={"shift": {"by": obmlite.spec("f32[]")}}, weights=None, platforms="cpu"
    )
    found = Interface(own.pipeline).run({"shift.by": np.array(1, np.float32), "x": np.ones(2, np.float32)})
    assert found["output_0"].tolist() == [0, 0]


def test_texts_come_back(monkeypatch):
    monkeypatch.setitem(HOST_STEPS, "application/x.signs", lambda name, supplementals: Signs(name))
    add = obmlite.export(lambda n: n + 1, obmlite.spec("i32[b]"), name="add", platforms="cpu")
    made = obmlite.Model(
        {"add": add},
        pipelines={"main": obmlite.Pipeline(function="add", post=["signs"])},
        supplementals={"signs": obmlite.Supplemental.from_bytes(b"", mime_type="application/x.signs", version="1")},
    )
    own = Interface(made.pipeline)
    [info] = own.outputs.values()
    assert (info.name, info.kind, info.text) == ("text", "text", "string[b]")
    found = own.run({"n": np.arange(3, dtype=np.int32)})["text"]
    assert (found.dtype, found.tolist()) == (object, [b"odd", b"even", b"odd"])
    assert own.divisible
