"""One version of a model: its states, its signatures, its warm-up, and its end after the last request."""

import gc
import threading
import weakref

import jax.monitoring
import numpy as np
import pytest

import obmlite
from obmlite.serving import BatchingConfig, Code, Servable, ServingError, State
from obmlite.serving.observer import Silent
from tests.serving.packages import WIDTH, file_of, fixed, flip, model, rows


class Seen(Silent):
    """Notes what it is told."""

    def __init__(self):
        self.told = []

    def request(self, model, version, signature, code, seconds, rows):
        assert seconds >= 0
        self.told.append(("request", model, version, signature, code, rows))

    def loaded(self, model, version, seconds, error):
        self.told.append(("loaded", version, error and error.code))

    def warmed(self, model, version, seconds, calls):
        self.told.append(("warmed", version, calls))

    def state(self, model, version, state):
        self.told.append(("state", version, state))


def servable(made, observer=None, **options):
    own = Servable("half", 3, observer)
    own.load(lambda: made, **options)
    own.show()
    return own


def test_states_in_their_order():
    seen = Seen()
    own = Servable("half", 3, seen)
    assert own.state is State.START
    assert not own.acquire()
    own.load(lambda: model(2.0))
    assert own.state is State.LOADING
    assert not own.acquire()
    own.show()
    assert own.acquire()
    assert own.acquire()
    assert own.predict({"x": rows(2)})["output_0"].shape == (2, WIDTH)
    own.retire()
    assert own.state is State.UNLOADING
    assert not own.acquire()
    own.release()
    assert own.state is State.UNLOADING
    assert own.predict({"x": rows(2)})["output_0"][0, 0] == 2  # the request that it has goes on
    own.release()
    assert own.state is State.END
    assert (own.model, own.interfaces) == (None, {})
    assert seen.told == [
        ("state", 3, State.LOADING),
        ("warmed", 3, 1),
        ("loaded", 3, None),
        ("state", 3, State.AVAILABLE),
        ("request", "half", 3, "serving_default", Code.OK, 2),
        ("state", 3, State.UNLOADING),
        ("request", "half", 3, "serving_default", Code.OK, 2),
        ("state", 3, State.END),
    ]


def test_nothing_of_the_model_is_left():
    before = set(threading.enumerate())
    own = servable(model(2.0), batching=BatchingConfig())
    assert "batches of serving_default" in {thread.name for thread in set(threading.enumerate()) - before}
    own.acquire()
    own.predict({"x": rows(2)})
    references = [weakref.ref(own.model), weakref.ref(own.model.pipeline), weakref.ref(own.interface())]
    own.release()
    own.retire()
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("batches of")]


def test_a_model_that_fails_has_a_reason_and_leaves_nothing(tmp_path):
    model().save(tmp_path / "1")
    flip(file_of(tmp_path / "1", "functions"))
    seen, made = Seen(), []

    def load():
        broken = obmlite.load(tmp_path / "1")
        made.extend(map(weakref.ref, (broken, broken.pipeline)))
        return broken

    own = Servable("half", 3, seen)
    with pytest.raises(ServingError, match="changed"):
        own.load(load)
    assert (own.state, own.error.code, own.model) == (State.END, Code.DATA_LOSS, None)
    assert ("loaded", 3, Code.DATA_LOSS) in seen.told
    gc.collect()
    assert [reference() for reference in made] == [None, None]


def two(default):
    """Two public pipelines and one that is not."""
    parts = model(2.0)
    steps = {"function": "scaled", "weights": {"params": "params"}}
    return obmlite.Model(
        dict(parts.objects),
        pipelines={
            "one": obmlite.Pipeline(**steps),
            "two": obmlite.Pipeline(**steps),
            "hidden": obmlite.Pipeline(**steps, visibility="private"),
        },
        default_pipeline=default,
    )


def test_public_pipelines_are_signatures():
    own = servable(two("two"))
    assert set(own.interfaces) == {"one", "two", "serving_default"}
    assert own.default == "two"
    assert own.interface() is own.interface("two") is own.interface("serving_default")
    with pytest.raises(ServingError, match='Serving signature name: "hidden" not found in signature def') as caught:
        own.predict({"x": rows(1)}, "hidden")
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert "one, two" in str(caught.value)


def test_without_a_default_a_signature_is_named():
    own = servable(two(None))
    assert own.default == ""
    assert own.predict({"x": rows(1)}, "one")["output_0"][0, 0] == 2
    with pytest.raises(ServingError, match='"serving_default" not found'):
        own.predict({"x": rows(1)})


def test_a_pipeline_may_have_the_name_of_the_default_one():
    parts = model(2.0)
    both = obmlite.Model(
        {**parts.objects, "params3": obmlite.Weights({"scale": np.float32(3)})},
        pipelines={
            "two": obmlite.Pipeline(function="scaled", weights={"params": "params"}),
            "serving_default": obmlite.Pipeline(function="scaled", weights={"params": "params3"}),
        },
        default_pipeline="two",
    )
    own = servable(both, batching=BatchingConfig(batch_timeout_micros=0))
    asked = {name: own.predict({"x": rows(1)}, name)["output_0"][0, 0] for name in ("", "two", "serving_default")}
    assert asked == {"": 2, "two": 2, "serving_default": 3}
    own.retire()


def test_a_model_without_public_pipelines_is_not_served():
    made = model()
    empty = obmlite.Model(dict(made.objects))
    with pytest.raises(ServingError, match="no public pipeline") as caught:
        servable(empty)
    assert caught.value.code is Code.FAILED_PRECONDITION


def calls(made, **options):
    seen = Seen()
    servable(made, seen, **options)
    return [told[2] for told in seen.told if told[0] == "warmed"]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: model(), 1),  # zeros, of one row
        (lambda: model(constraints=("b >= 3",)), 1),
        (lambda: fixed((1, 4, 16)), 3),  # zeros of each size
        (lambda: fixed((1, 4, 16)).with_examples(rows(1), rows(4)), 6),  # each as each size
        (lambda: model().with_examples(rows(3), rows(5)), 2),  # as they are
    ],
)
def test_warm_up(make, expected):
    assert calls(make()) == [expected]


def test_warm_up_with_the_sizes_that_will_come():
    batching = BatchingConfig(max_batch_size=8, allowed_batch_sizes=(2, 4, 8))
    assert calls(model().with_examples(rows(3)), batching=batching) == [3]
    assert calls(model(), batching=batching) == [3]
    assert calls(model(constraints=("b <= 4",)), batching=batching) == [2]
    assert calls(model(), warmup=False) == []


def test_what_was_warmed_up_is_not_compiled_again():
    compiled = []

    def note(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    own = servable(fixed((1, 4)).with_examples(rows(1)))
    jax.monitoring.register_event_duration_secs_listener(note)
    own.predict({"x": rows(3)})
    own.predict({"x": rows(1)})
    own.predict({"x": rows(9)})
    assert not compiled
    servable(fixed((1, 4)), warmup=False).predict({"x": rows(1)})
    assert compiled  # so this would have seen it


def test_errors_are_observed():
    seen = Seen()
    own = servable(model(), seen)
    with pytest.raises(ServingError):
        own.predict({"y": rows(1)})
    assert seen.told[-1] == ("request", "half", 3, "serving_default", Code.INVALID_ARGUMENT, None)
    assert own.predict({"x": rows(1)}, output_filter=["output_0"]).keys() == {"output_0"}
    np.testing.assert_array_equal(own.predict({"x": rows(1)})["output_0"], rows(1))
