"""Models by name under load: versions that come and go, readiness, and memory that does not grow."""

import gc
import pathlib
import re
import shutil
import threading
import time
import weakref

import numpy as np
import pytest

import obmlite
from obmlite.serving import All, BatchingConfig, Code, Latest, ModelConfig, Repository, ServingError, State, read_config
from obmlite.serving.observer import Silent
from tests.serving.packages import rows, save, threads


@pytest.fixture
def bases(tmp_path):
    """Two models: ``half`` in versions 1 and 2, ``third`` in version 3."""
    for name, numbers in (("half", (1, 2)), ("third", (3,))):
        (tmp_path / name).mkdir()
        for number in numbers:
            save(tmp_path / name, number)
    return tmp_path


@pytest.fixture
def serve():
    """Makes repositories, and stops them."""
    made = []

    def serve(*configs, **options):
        options.setdefault("poll_seconds", 0.02)
        made.append(Repository(configs, **options))
        return made[-1]

    yield serve
    for repository in made:
        repository.stop()


def answer(repository, name, version=None, label=None):
    with repository.acquire(name, version, label) as servable:
        return float(servable.predict({"x": rows(1)})["output_0"][0, 0])


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_models_by_name_version_and_label(bases, serve):
    repository = serve(
        ModelConfig("half", bases / "half", All(), labels={"stable": 1, "later": 9}),
        ModelConfig("third", bases / "third"),
    )
    assert not repository.ready()
    repository.scan()
    assert repository.ready()
    assert repository.names() == ["half", "third"]
    assert answer(repository, "half") == 2
    assert answer(repository, "half", 1) == 1
    assert answer(repository, "half", label="stable") == 1
    assert answer(repository, "third", 3) == 3
    assert repository.labels("half") == {"stable": 1}
    repository.assign("half", "stable", 2)
    assert answer(repository, "half", label="stable") == 2
    assert [status.version for status in repository.status("half")] == [2, 1]
    assert [status.version for status in repository.status("half", 1)] == [1]
    assert [status.version for status in repository.status("half", label="stable")] == [2]
    assert repository.model_ready("half")
    assert repository.model_ready("half", 1)
    assert not repository.model_ready("half", 7)
    assert repository.problem("half") is None


@pytest.mark.parametrize(
    ("ask", "code", "text"),
    [
        (lambda r: answer(r, "no"), Code.NOT_FOUND, "Servable not found for request: Latest(no)"),
        (lambda r: answer(r, "no", 7), Code.NOT_FOUND, "Servable not found for request: Specific(no, 7)"),
        (lambda r: answer(r, "half", 7), Code.NOT_FOUND, "Servable not found for request: Specific(half, 7)"),
        (lambda r: answer(r, "half", label="x"), Code.INVALID_ARGUMENT, "Unrecognized servable version label: x"),
        (lambda r: answer(r, "half", 1, "x"), Code.INVALID_ARGUMENT, "Both a version and a version label are given."),
        (lambda r: r.status("no"), Code.NOT_FOUND, "Servable not found for request: Latest(no)"),
        (lambda r: r.status("half", 7), Code.NOT_FOUND, "Servable not found for request: Specific(half, 7)"),
        (lambda r: r.model_ready("no"), Code.NOT_FOUND, "Servable not found for request: Latest(no)"),
        (lambda r: r.load("no"), Code.NOT_FOUND, "Servable not found for request: Latest(no)"),
        (lambda r: r.unload("no"), Code.NOT_FOUND, "Servable not found for request: Latest(no)"),
        (lambda r: r.labels("no"), Code.NOT_FOUND, "Servable not found for request: Latest(no)"),
    ],
)
def test_what_is_not_there(bases, serve, ask, code, text):
    repository = serve(ModelConfig("half", bases / "half"))  # never looked at, and so the same as with nothing there
    with pytest.raises(ServingError) as caught:
        ask(repository)
    assert (caught.value.code, str(caught.value)) == (code, text)


def test_two_models_of_one_name_are_refused(tmp_path):
    with pytest.raises(obmlite.ArgumentError, match="Two models have one name"):
        Repository([ModelConfig("a", tmp_path), ModelConfig("a", tmp_path)])


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_times_that_cannot_be_waited_for_are_refused(tmp_path, seconds):
    with pytest.raises(obmlite.ArgumentError, match="poll_seconds"):
        Repository([ModelConfig("half", tmp_path)], poll_seconds=seconds)


def test_what_was_stopped_does_not_start_again(bases, serve):
    repository = serve(ModelConfig("half", bases / "half"))
    repository.stop()
    with pytest.raises(obmlite.ArgumentError, match="does not start again"):
        repository.start()


def test_start_looks_until_it_is_stopped(bases, serve):
    before = set(threading.enumerate())
    repository = serve(ModelConfig("half", bases / "half"), ModelConfig("third", bases / "third"), load_threads=2)
    assert repository.start(wait=60)
    assert {thread.name for thread in set(threading.enumerate()) - before} >= {"obmlite repository", "obmlite load_0"}
    assert answer(repository, "half") == 2
    save(bases / "third", 4)
    wait_for(lambda: answer(repository, "third") == 4)
    repository.stop()
    assert not repository.ready()
    assert [status.state for status in repository.status("half")] == [State.END]
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("obmlite")]


def test_a_model_that_cannot_be_served_keeps_no_other_from_it(bases, serve):
    repository = serve(ModelConfig("half", bases / "half"), ModelConfig("none", bases / "none"))
    assert not repository.start(wait=60)
    assert answer(repository, "half") == 2
    assert "cannot be read" in str(repository.problem("none"))


def test_versions_change_under_load(tmp_path, serve):
    """No request fails, none sees a version come back, and what is dropped ends."""
    save(tmp_path, 1)
    repository = serve(ModelConfig("m", tmp_path, batching=BatchingConfig(max_batch_size=4, batch_timeout_micros=100)))
    assert repository.start(wait=60)
    done = threading.Event()

    def client(number):
        if number == 0:
            for version in (2, 3, 4):
                save(tmp_path, version)
                wait_for(lambda version=version: repository.model_ready("m", version))
            done.set()
            return []
        seen = []
        while not done.is_set() or seen[-1] != 4:
            seen.append(answer(repository, "m"))
        return seen

    for seen in threads(5, client)[1:]:
        assert seen == sorted(seen)
        assert seen[-1] == 4
    wait_for(lambda: all(s.state is State.END for s in repository.status("m") if s.version != 4))


def test_load_and_unload(bases, serve):
    repository = serve(ModelConfig("half", bases / "half"), ModelConfig("third", bases / "third"))
    repository.scan()
    repository.unload("half")
    assert not repository.model_ready("half")
    assert repository.ready()  # it is not to be served
    repository.scan()
    assert not repository.model_ready("half")
    repository.load("half")
    assert answer(repository, "half") == 2
    repository.unload("half")
    for version in (1, 2):
        (bases / "half" / str(version) / "manifest.obm").unlink()
    with pytest.raises(
        ServingError, match="failed to load 'half', version 2: The version is not complete yet"
    ) as caught:
        repository.load("half")
    assert caught.value.code is Code.UNAVAILABLE
    shutil.rmtree(bases / "half")
    with pytest.raises(ServingError, match="base path cannot be read"):
        repository.load("half")


class Seen(Silent):
    def __init__(self):
        self.told = []

    def request(self, model, version, signature, code, seconds, rows):
        self.told.append(("request", model, version, code))

    def batch(self, model, version, signature, rows, requests, waited):
        self.told.append(("batch", model, version, rows, requests))

    def state(self, model, version, state):
        self.told.append((model, version, state))


def test_observers(bases, serve):
    first, second = Seen(), Seen()
    batching = BatchingConfig(batch_timeout_micros=0)
    repository = serve(ModelConfig("third", bases / "third", batching=batching), observers=[first])
    repository.scan()
    repository.observe(second)
    answer(repository, "third")
    repository.unload("third")
    assert first.told == [("third", 3, State.LOADING), ("third", 3, State.AVAILABLE), *second.told]
    assert second.told == [
        ("batch", "third", 3, 1, 1),
        ("request", "third", 3, Code.OK),
        ("third", 3, State.UNLOADING),
        ("third", 3, State.END),
    ]


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.long
def test_memory_stays_flat_over_versions(tmp_path, serve):
    """Weights of 16 MiB, compiled programs and all: of ten versions one is left."""
    width = 2048
    references, sizes = [], []
    repository = serve(ModelConfig("m", tmp_path, Latest()))

    def matmul(params, x):
        return x @ params

    for number in range(1, 11):
        made = obmlite.Model.from_function(
            matmul, np.full((width, width), number, np.float32), obmlite.spec(f"f32[b,{width}]"), platforms="cpu"
        )
        save(tmp_path, number, made)
        del made
        if number > 1:
            shutil.rmtree(tmp_path / str(number - 1))
        repository.scan()
        with repository.acquire("m") as servable:
            found = servable.predict({"x": np.ones((1, width), np.float32)})["output_0"]
            references.append(weakref.ref(servable.model))
            del servable
        assert found[0, 0] == number * width
        sizes.append(resident())
    assert [reference() is not None for reference in references] == [False] * 9 + [True]
    assert max(sizes[4:]) - sizes[3] < 48 * 2**20, sizes  # six more versions have 96 MiB
    repository.stop()
    gc.collect()
    assert references[-1]() is None


def document():
    """The section on the core of docs/serving.md."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    return text[text.index("## The core") : text.index("## REST")]


def test_the_document_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def apply(params, x):
        return x.reshape(x.shape[0], -1) @ params

    made = obmlite.Model.from_function(
        apply, np.ones((784, 10), np.float32), obmlite.spec("f32[b,28,28,1]"), platforms="cpu"
    )
    made.save("models/mnist/1")
    [code] = re.findall(r"```python\n(.*?)```", document(), re.DOTALL)
    ran = {}
    exec(code, ran)
    assert ran["outputs"]["output_0"].shape == (3, 10)
    [table] = re.findall(r"```toml\n(.*?)```", document(), re.DOTALL)
    (tmp_path / "models.toml").write_text(table)
    [config] = read_config(tmp_path / "models.toml")
    assert (config.name, config.policy, config.labels) == ("mnist", Latest(2), {"stable": 3})
    assert config.batching == BatchingConfig(allowed_batch_sizes=(8, 16, 32))
