"""Packages of every format version, made by every supported JAX, under the JAX at hand (see ``golden/make.py``)."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import obmlite
from obmlite.listing import listing, text
from obmlite.schema.records import ModuleFormat
from obmlite.verify import verify
from tests.golden import calls

HERE = pathlib.Path(__file__).parent / "golden"
FOLDERS = sorted(path.parent for path in HERE.glob("*/jax-*/*/package.obm"))
WITH_DEVICES = [f for f in FOLDERS if f.name == "devices"]
CALLED = [f for f in FOLDERS if f not in WITH_DEVICES and calls.read(f)["calls"]]


def name(folder):
    return "-".join(folder.parts[-3:])


def version(text):
    return tuple(int(part) for part in text.split("."))


golden = pytest.mark.parametrize("folder", FOLDERS, ids=name)


def current_stablehlo():
    from jax.extend.mlir.dialects import stablehlo

    return stablehlo.get_current_version()


def check(folder, engine, outcome):
    """That a package gives the stored numbers, or that its StableHLO is newer than that of this JAX and it says so."""
    if "differences" in outcome:
        assert outcome["differences"] == []
        return
    maker, facts = calls.read(folder)["made_with"], outcome["facts"]
    assert outcome["error"] == "UnsupportedFormatError", facts
    assert f"saved with jax {maker['jax']}" in facts["found"]
    assert maker["jax"] in facts["fix"]
    assert {"package", "object", "problem", "expected"} <= set(facts)
    modules = [module for f in obmlite.load(folder / "package.obm").functions.values() for module in f.program.modules]
    if engine == "export" and any(m.format is ModuleFormat.PORTABLE_ARTIFACT for m in modules):
        return  # it has none of its own
    assert version(maker["jax"]) > version(jax.__version__), facts
    newer = [m for m in modules if version(m.stablehlo_version) > version(current_stablehlo())]
    # jax.export's own serialization may be newer than this JAX while the module in it is not.
    assert newer or engine == "export", facts


def test_there_are_some_of_each_jax():
    """Every case from every JAX, by which alone a change of a format or of a JAX is seen."""
    makers = {folder.parent for folder in FOLDERS}
    assert {"jax-0.9.2", "jax-0.10.2"} <= {maker.name for maker in makers}
    assert len({maker.name for maker in makers}) >= 3
    for maker in makers:
        assert {f.name for f in FOLDERS if f.parent == maker} >= {
            f.name for f in FOLDERS if f.parent.parent == maker.parent
        }
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()) < 2 << 20


@pytest.mark.parametrize("engine", calls.ENGINES)
@pytest.mark.parametrize("folder", CALLED, ids=name)
def test_calls(folder, engine):
    check(folder, engine, calls.outcome(folder, engine))


def test_calls_on_several_devices():
    assert WITH_DEVICES
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, HERE / "calls.py", *WITH_DEVICES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    for folder in WITH_DEVICES:
        for engine in calls.ENGINES:
            check(folder, engine, outcomes[str(folder)][engine])


@golden
def test_leaves(folder):
    model = obmlite.load(folder / "package.obm")
    listed = json.loads((folder / "leaves.json").read_text(encoding="utf-8"))
    found = [(own, leaf) for own, weights in model.weights.items() for leaf in weights.flat.values()]
    assert [(own, leaf.name) for own, leaf in found] == [(row["weights"], row["leaf"]) for row in listed]
    for (_, leaf), row in zip(found, listed, strict=True):
        spec = leaf.spec
        assert (spec.kind.name, list(spec.shape)) == (row["dtype"], row["shape"])
        for fact in ("partition", "memory_kind", "logical_axes"):
            assert str(getattr(spec, fact)) == row.get(fact, "None")
        if "file" in row:
            expected = np.load(folder / "leaves" / row["file"], allow_pickle=False)
            value = calls.plain(np.asarray(leaf))
            assert (value.dtype, value.shape, value.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


@golden
def test_nothing_is_wrong_and_all_is_listed(folder):
    report = verify(folder / "package.obm")
    assert report.good, report.problems
    assert not [name for name in report.extra if not name.endswith(".index.json")]
    model = obmlite.load(folder / "package.obm")
    lines = "\n".join(text(listing(folder / "package.obm")))
    for own in model.objects:
        assert own in lines
    assert repr(model)


def test_metadata_of_every_kind():
    kinds = {
        "none": None,
        "bool": True,
        "int": -(2**40),
        "float": 0.1,
        "text": "“é” \0",
        "bytes": bytes(range(256)),
        "list": [1, [2.5, [None]], {"deep": []}],
        "dict": {"": {}, "1": b""},
    }
    for folder in FOLDERS:
        if folder.name == "metadata":
            model = obmlite.load(folder / "package.obm")
            assert model.metadata == {"model": kinds, "license": "Apache-2.0"}
            assert model.functions["double"].metadata == {"function": kinds}
            assert model.weights["w"].metadata == {"weights": kinds}


def test_several_files_and_a_tie():
    for folder in FOLDERS:
        if folder.name == "files":
            assert len(list((folder / "package.obm" / "weights").glob("*.safetensors"))) > 2
            params = obmlite.load(folder / "package.obm").weights["params"].restore()
            assert params["a"] is params["z"]


def test_donated_and_fixed_arguments():
    for folder in FOLDERS:
        functions = obmlite.load(folder / "package.obm").functions
        if folder.name == "donated":
            assert functions["step"].donated_names == {"cache"}
        if folder.name == "arguments":
            assert [fixed.name for fixed in functions["apply"].signature.fixed] == ["train", "factor"]
