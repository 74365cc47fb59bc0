"""The REST application under Ray Serve: two replicas on this machine, and a change of version without a gap.

Needs an environment of its own; ``ray.init`` alone takes half a minute on two cores.
"""

import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

import obmlite
from obmlite.errors import ArgumentError
from obmlite.serving import Latest, ModelConfig, Specific

ray = pytest.importorskip("ray", reason="Ray is in an environment of its own")
serve = pytest.importorskip("ray.serve")
serving = pytest.importorskip("obmlite.serving.ray")

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, and JAX's of Ray's forks

X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Versions 1 and 2 of a model; version 3 is a directory that never becomes one."""
    found = tmp_path_factory.mktemp("models")
    w = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    for version in (1, 2):
        model = obmlite.Model.from_function(lambda w, x: x @ w, w * version, obmlite.spec("f32[b,4]"))
        model.save(found / "dense" / str(version))
    return found


@pytest.fixture(scope="module")
def port():
    """Of Ray Serve's HTTP proxy."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # else a token is written into the home directory
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        number = found.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    serve.start(http_options={"host": "127.0.0.1", "port": number})
    yield number
    serve.shutdown()
    ray.shutdown()


def ask(port, path, body=None):
    """Status and document."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def predict(port):
    status, found = ask(port, "/v1/models/dense:predict", {"instances": X.tolist()})
    assert status == 200, found
    return np.asarray(found["predictions"], np.float32)


def expected(base, version):
    return np.asarray(obmlite.load(base / "dense" / str(version))(X))


def application(base, policy, **options):
    return serving.application(
        [ModelConfig("dense", base / "dense", policy)],
        num_replicas=2,
        ray_actor_options={"num_cpus": 0.1},
        **options,
    )


def replicas():
    """The processes of the deployment's replicas that run."""
    [deployment] = serve.status().applications["dense"].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def test_two_replicas_and_a_rolling_change_of_version(base, port):

    serve.run(application(base, Specific((1,))), name="dense")
    assert replicas() == 2
    np.testing.assert_allclose(predict(port), expected(base, 1), rtol=1e-6)
    assert ask(port, "/v1/models/dense")[1]["model_version_status"][0]["version"] == "1"
    status, found = ask(port, "/v1/models/dense:predict", {"instances": [[1, 2]]})
    assert (status, list(found)) == (400, ["error"])
    assert ask(port, "/v2/health/ready")[0] == 200

    # Requests all through the change: each is answered, by the one version or by the other.
    known = {version: expected(base, version) for version in (1, 2)}
    seen, stop = [], threading.Event()

    def requests():
        while not stop.is_set():
            answer = predict(port)
            seen.append([v for v, values in known.items() if np.allclose(answer, values, rtol=1e-6)])

    thread = threading.Thread(target=requests)
    thread.start()
    try:
        serve.run(application(base, Specific((2,))), name="dense")
        time.sleep(1)
    finally:
        stop.set()
        thread.join()
    assert {tuple(versions) for versions in seen} == {(1,), (2,)}
    assert seen[0] == [1]
    assert seen[-1] == [2]
    assert ask(port, "/v1/models/dense")[1]["model_version_status"][0]["version"] == "2"


def test_replicas_take_up_new_versions_by_themselves(base, port):
    serve.run(application(base, Latest(), repository={"poll_seconds": 0.2}), name="dense")
    w = np.eye(4, 3, dtype=np.float32)
    obmlite.Model.from_function(lambda w, x: x @ w, w, obmlite.spec("f32[b,4]")).save(base / "dense" / "3")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        answers = [predict(port) for _ in range(10)]  # by both replicas
        if all(np.array_equal(answer, X[:, :3]) for answer in answers):
            return
    pytest.fail("version 3 is not served by all replicas")


def test_a_version_that_does_not_load_replaces_nothing(base, port):

    serve.run(application(base, Specific((1,))), name="dense")
    with pytest.raises(RuntimeError):
        serve.run(application(base, Specific((9,)), wait=2), name="dense")
    np.testing.assert_allclose(predict(port), expected(base, 1), rtol=1e-6)


def test_arguments_of_the_command_line(base, tmp_path):
    assert serving.build({"name": "dense", "base": os.fspath(base / "dense")}) is not None
    models = [ModelConfig("dense", base / "dense")]
    scaled = serving.application(models, autoscaling_config={"min_replicas": 1, "max_replicas": 3})
    assert scaled is not None
    (tmp_path / "models.toml").write_text(f'[[model]]\nname = "dense"\nbase_path = "{base}/dense"\n')
    assert serving.build({"config": os.fspath(tmp_path / "models.toml")}) is not None
    with pytest.raises(ArgumentError, match="needs to know its models") as caught:
        serving.build({"nmae": "dense"})
    assert caught.value.found == "nmae"
    with pytest.raises(ArgumentError, match="serves no models"):
        serving.application([])
