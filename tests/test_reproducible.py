"""The same model gives the same bytes, and they name nothing of the machine or the moment that made them."""

import getpass
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import pytest

import obmlite

SOURCE = '''\
"""A model with something of everything that could carry a path, an address or an order."""

import collections
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import obmlite


@jax.jit
def inner(x):
    return jnp.where(x > 0, x, jnp.expm1(x))


@jax.custom_jvp
def clipped(x):
    return jnp.clip(x, -1, 1)


clipped.defjvp(lambda primals, tangents: (clipped(*primals), tangents[0]))


def apply(params, x, *, train=False, scale=2.0):
    """Nested jits, a scan, a cond, a custom rule, named scopes, a pure reduction, random numbers."""

    def step(carry, layer):
        with jax.named_scope("layer"):
            return inner(carry @ layer["w"] + layer["b"]), carry.sum()

    x, sums = jax.lax.scan(step, x, params["layers"])
    x = jax.lax.cond(x.sum() > 0, lambda v: v * scale, functools.partial(jnp.add, 1.0), x)
    keep = jax.random.bernoulli(params["key"], 0.5, x.shape)
    return {"out": jax.nn.softmax(clipped(jnp.where(keep, x, 0.0))), "sums": sums, "set": [x.max(), x.min()]}


def norm(x):
    return x / jnp.linalg.norm(x)


def make():
    random = np.random.default_rng(0)
    params = {
        "layers": {"w": random.normal(size=(3, 4, 4)).astype("f4"), "b": np.zeros((3, 4), "f4")},
        "key": jax.random.key(0),
    }
    other = collections.defaultdict(list, {name: np.ones(3, "f4") for name in {"one", "two", "three", "four"}})
    other["bf16"] = jnp.arange(5, dtype=jnp.bfloat16)
    other["i4"] = np.arange(5).astype(ml_dtypes.int4)
    other["tied"] = [other["one"], other["one"]]
    x = obmlite.spec("f32[b,4]")
    return obmlite.Model(
        {
            "apply": obmlite.export(apply, params, x, kwargs={"train": True}, static=("train",), constraints="b <= 16"),
            "norm": obmlite.export(norm, obmlite.spec("f32[7]")),
            "params": obmlite.Weights(params),
            "other": obmlite.Weights(other, metadata={"z": 1, "a": [2, {"y": 3, "b": 4}]}),
        },
        pipelines={"serving_default": obmlite.Pipeline(function="apply", weights={"params": "params"})},
        metadata={"license": "none", "authors": ["a", "b"]},
    )
'''

SCRIPT = """\
import sys
sys.path.insert(0, sys.argv[1])
import network
for n, path in enumerate(sys.argv[2:]):
    if n:
        # What was traced and compiled before, and what was allocated, must leave no mark.
        import jax, jax.numpy as jnp
        garbage = [object() for _ in range(1000 * n)]
        jax.jit(lambda x: network.inner(x) + jnp.where(x > 1, x, 0))(jnp.ones(3)).block_until_ready()
        jax.grad(lambda x: network.clipped(x).sum())(jnp.ones((2, 4)))
    network.make().save(path, max_file_bytes=64)
"""


def environment():
    """For a process that is to import this very obmlite."""
    return {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(obmlite.__file__))}


def files(path):
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(pathlib.Path(path).rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The same model saved by two processes, from two source directories, twice in each."""
    top = tmp_path_factory.mktemp("reproducible-top")
    sources, targets, running = [], [], []
    for n, (source, seed) in enumerate((("first source", "1"), ("a/second/and deeper/source", "4321"))):
        folder = top / source
        folder.mkdir(parents=True)
        # The second time a few lines further down, for what holds line numbers.
        (folder / "network.py").write_text("\n" * 7 * n + SOURCE)
        (top / f"cwd{n}").mkdir()
        sources.append(folder)
        targets.append([top / f"target{n}-{i}.obm" for i in range(3)])
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(folder), *map(str, targets[-1])],
                env={**environment(), "PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1"},
                cwd=top / f"cwd{n}",
            )
        )
    for process in running:
        assert process.wait(120) == 0
    return top, sources, targets


def test_two_processes_write_the_same_bytes(packages):
    _, _, (first, second) = packages
    found = files(first[0])
    assert len(found) > 6
    assert files(second[0]) == found


def test_one_process_writes_the_same_bytes_again_whatever_it_did_between(packages):
    _, _, targets = packages
    for one in targets:
        assert files(one[1]) == files(one[0])
        assert files(one[2]) == files(one[0])


def test_saved_again_after_loading_in_this_process_too(packages, tmp_path):
    _, _, targets = packages
    obmlite.load(targets[0][0]).save(tmp_path / "again.obm", max_file_bytes=64)
    assert files(tmp_path / "again.obm") == files(targets[0][0])


def test_no_path_of_the_machine(packages):
    top, sources, targets = packages
    home = os.path.expanduser("~")
    secrets = {
        str(top),
        top.name,
        *map(str, sources),
        "second/and deeper",
        "network.py",
        "site-packages",
        "obmlite/",
        "jax/_src",
        os.getcwd(),
        sys.prefix,
        sys.base_prefix,
        os.path.dirname(obmlite.__file__),
        os.path.dirname(jax.__file__),
        "/usr/",
        "/home/",
        "/Users/",
        "/tmp/",
        ".py",
        " at 0x",
        home if len(home) > 1 else "",
        socket.gethostname(),
    }
    user = getpass.getuser()
    if len(user) > 5:  # a short one may be a word
        secrets.add(user)
    secrets.discard("")
    for one in (*targets[0], *targets[1]):
        for name, data in files(one).items():
            for secret in secrets:
                assert secret.encode() not in data, (name, secret)
                assert secret not in name


def test_it_still_runs_without_its_source(packages, tmp_path):
    _, _, targets = packages
    shutil.copytree(targets[0][2], tmp_path / "moved.obm")
    script = """if True:
        import importlib.util, sys, numpy as np, obmlite
        assert importlib.util.find_spec("network") is None
        y = obmlite.load(sys.argv[1])(np.ones((2, 4), "f4"))
        assert y["out"].shape == (2, 4) and abs(float(y["out"].sum()) - 2) < 1e-5
    """
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "moved.obm")], check=True, cwd=tmp_path, env=environment()
    )
