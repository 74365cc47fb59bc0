"""One model, used by many threads at once, first use included."""

import os
import sys
import threading
import time

import jax
import numpy as np
import pytest

import obmlite
from obmlite import Model, Pipeline, Weights
from obmlite.verify import verify
from tests.generations import FUNCTIONS, X, asset_texts, expected, model, params, write_assets


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "m.obm"


def at_once(count, action):
    """What each of so many threads gets from ``action(number)``, which all begin together; none may wait for ever."""
    barrier = threading.Barrier(count)
    results = [None] * count

    def run(n):
        barrier.wait(30)
        try:
            results[n] = action(n)
        except BaseException as error:  # noqa: BLE001 - the main thread must hear of it
            results[n] = error

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(count)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that they get in each other's way
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a deadlock"
    finally:
        sys.setswitchinterval(interval)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_a_pipelines_weights_are_restored_once(path, monkeypatch):
    model(0).save(path)
    restored: list = []
    real = Weights.restore_leaves

    def counted(self, **options):
        restored.append(threading.get_ident())
        time.sleep(0.05)  # so that the others come while the first is at it
        return real(self, **options)

    monkeypatch.setattr(Weights, "restore_leaves", counted)
    loaded = obmlite.load(path)
    results = at_once(8, lambda n: np.asarray(loaded(X)))
    assert len(restored) == 1
    assert all(np.array_equal(result, expected(0)) for result in results)


@pytest.mark.parametrize("mmap", [True, False])
def test_each_file_is_opened_once(path, monkeypatch, mmap):
    model(0).save(path, max_file_bytes=8)
    opened: list = []
    real = os.open

    def counted(name, *args, **kwargs):
        opened.append(name)
        return real(name, *args, **kwargs)

    for _ in range(10):  # which thread comes first to what is chance
        loaded = obmlite.load(path, mmap=mmap)
        opened.clear()

        def use(n, loaded=loaded):
            if n % 4 == 3:
                return np.asarray(loaded.weights["params"]["w"]) * 3 + params(0)["b"]
            if n % 4 == 2:
                return loaded.functions["apply"](loaded.weights["params"].restore(), X)
            return loaded(X)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", counted)
            results = at_once(8, use)
        for n, result in enumerate(results):
            if n % 4 != 3:
                assert np.array_equal(result, expected(0))
        data = [name for name in opened if str(name).endswith((".safetensors", ".jaxexport"))]
        assert len(data) == len(set(data)) == 3


def several(engine, tmp_path):
    """A package with a saved gradient, a captured array, a polymorphic function and supplementals."""
    table = np.arange(3000, dtype=np.float32).reshape(1000, 3)

    def apply(p, x):
        return (x @ p["w"] + p["b"]).sum() + (table * p["b"][0]).sum()

    specs = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in params(3).items()}
    loss = obmlite.export(apply, specs, X, name="loss", platforms="cpu", vjp_order=1)
    double = [
        obmlite.export(lambda x: 2 * x, obmlite.spec(text), name=f"double{n}", platforms="cpu")
        for n, text in enumerate(("f32[2,3]", "i32[b]"))
    ]
    Model(
        {"loss": loss, "params": Weights(params(3)), "double": obmlite.PolymorphicFunction("double", double)},
        pipelines={"serving_default": Pipeline(function="loss", weights={"p": "params"})},
        supplementals={"assets": obmlite.Supplemental.from_directory(write_assets(tmp_path / "assets", 3))},
    ).save(tmp_path / "m.obm", max_file_bytes=8)
    return lambda: obmlite.load(tmp_path / "m.obm", engine=engine), lambda p: apply(p, X)


@pytest.mark.parametrize("engine", ["auto", "rebuild", "replay"])
def test_everything_is_first_used_at_once(tmp_path, engine):
    load, reference = several(engine, tmp_path)
    value, gradient = jax.value_and_grad(reference)(params(3))
    value = np.asarray(value)
    batched = np.asarray([reference({**params(3), "b": params(3)["b"] * n}) for n in range(4)])
    stacked = np.stack([params(3)["b"] * n for n in range(4)])

    def same(found, wanted):
        np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=1e-5)

    for _ in range(2):
        loaded = load()

        def use(n, loaded=loaded):
            function = loaded.functions["loss"]
            match n % 9:
                case 0:
                    same(loaded(X), value)
                case 1:
                    same(function(loaded.weights["params"].restore(), X), value)
                case 2:
                    found = jax.grad(lambda p: function(p, X))(params(3))
                    same(found["w"], gradient["w"])
                    same(found["b"], gradient["b"])
                case 3:
                    same(jax.vmap(lambda b: function({**params(3), "b": b}, X))(stacked), batched)
                case 4:
                    assert {m: loaded.supplementals["assets"].read(m).decode() for m in asset_texts(3)} == asset_texts(
                        3
                    )
                case 5:
                    assert function.jaxpr()
                    assert function.replayable
                    assert function.operations
                case 6:
                    same(loaded.polymorphic["double"](np.arange(4, dtype=np.int32)), [0, 2, 4, 6])
                case 7:
                    same(jax.jit(lambda p: loaded.functions["loss"](p, X) * 2)(params(3)), value * 2)
                case 8:
                    restored = loaded.restore()
                    same(restored.weights["params"]["w"], params(3)["w"])
                    same(restored(X), value)
            return loaded.functions["loss"], loaded.weights["params"], loaded.pipelines["serving_default"]

        results = at_once(18, use)
        for found in zip(*results, strict=True):
            assert len(set(map(id, found))) == 1  # what is made when first asked for is one and the same for all


def test_one_model_is_saved_by_all(path):
    weights = {f"w{n}": Weights(params(n)) for n in range(8)}
    shared = Model({"apply": FUNCTIONS[0], **weights})
    at_once(8, lambda n: shared.save(path if n % 2 else path.with_name(f"{n}.obm"), overwrite=True))
    for name in ("m.obm", "0.obm", "2.obm", "4.obm", "6.obm"):
        assert verify(path.with_name(name)).good
        for n in range(8):
            loaded = obmlite.load(path.with_name(name)).weights[f"w{n}"]
            assert np.array_equal(np.asarray(loaded["w"]), params(n)["w"])
