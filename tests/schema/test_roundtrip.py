"""Records → bytes → records, and the same bytes read by flatbuffers' own generated code."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from obmlite.errors import UnsupportedFormatError
from obmlite.schema import decode, records, trailer
from obmlite.schema._flat import Buffer
from obmlite.schema._generated import manifest_generated as generated
from obmlite.schema.encode import encode
from tests.schema import flat, samples

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


# Shrinking takes minutes on manifests, and is of little use where a whole one is the example.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
QUICK = settings(deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES)


@settings(QUICK, max_examples=40)
@given(samples.manifests())
def test_what_is_read_is_what_was_written(manifest):
    encoded = encode(manifest)
    read = decode.decode(encoded)
    assert samples.undigested(read) == samples.undigested(manifest)
    samples.touch(read)
    assert encode(manifest) == encoded
    # What was read is written as it was: the pools are filled in the order of first use.
    assert encode(read) == encoded
    # The tests' own reader and writer agree, also where defaults are written out.
    assert samples.undigested(decode.decode(flat.changed(encoded, lambda d: None))) == samples.undigested(manifest)


def test_the_sample_comes_back_and_holds_every_field():
    encoded = encode(samples.sample())
    read = decode.decode(encoded)
    assert samples.undigested(read) == samples.undigested(samples.sample())
    assert read.digest == hashlib.sha256(encoded[: -trailer.SIZE]).digest()
    there = {p.label for p in flat.walk(encoded[: -trailer.SIZE]) if p.what in ("scalar", "offset")}
    missing = {f"{t}.{f.name}" for t, fields in flat.TABLES.items() for f in fields} - there
    # Only what no reader accepts is not there.
    objects = ("Manifest", "Function", "PolymorphicFunction", "Weights", "Pipeline", "Supplemental")
    assert missing == {f"{table}.required" for table in objects}


def test_an_empty_manifest_comes_back():
    empty = records.ManifestRecord(producer="", files={}, reader="")
    assert samples.undigested(decode.decode(encode(empty))) == samples.undigested(empty)


def test_the_same_bytes_in_every_process():
    code = (
        "import hashlib; from tests.schema import samples; from obmlite.schema.encode import encode; "
        "print(hashlib.sha256(encode(samples.sample())).hexdigest())"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    found = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert found == {hashlib.sha256(encode(samples.sample())).hexdigest()}


def test_metadata_that_is_read_is_not_shared():
    shared = {"a": 1}
    manifest = dataclasses.replace(
        samples.sample(),
        pipelines={
            name: dataclasses.replace(samples.sample().pipelines["default"], name=name, metadata=shared)
            for name in ("one", "two")
        },
        metadata=shared,
    )
    read = decode.decode(encode(manifest))
    read.metadata["a"] = 2
    read.pipelines["one"].metadata["a"] = 3
    assert read.pipelines["two"].metadata == shared


# --- the generated reader


def compare(ours, theirs, table):
    """Compares one table, field by field, as our reader and flatbuffers' own see it."""
    for field in flat.TABLES[table]:
        name = flat.camel(field.name)
        get = getattr(theirs, name)
        if field.type == "bool":
            assert ours.boolean(field.name) == get()
        elif field.type in flat.FORMS:
            assert ours.integer(field.name, flat.FORMS[field.type]) == get()
        elif field.type == "string":
            assert ours.string(field.name) == (get() or b"").decode()
        elif field.type == "[string]":
            found = [get(n).decode() for n in range(getattr(theirs, f"{name}Length")())]
            assert list(ours.strings(field.name)) == found
        elif field.type in flat.TABLES:
            assert ours.has(field.name) == (get() is not None)
            if get() is not None:
                compare(ours.table(field.name, field.type), get(), field.type)
        elif field.type[1:-1] in flat.TABLES:
            rows = ours.tables(field.name, field.type[1:-1])
            assert len(rows) == getattr(theirs, f"{name}Length")()
            for n, row in enumerate(rows):
                compare(row, get(n), field.type[1:-1])
        else:
            dtype = flat.FORMS[field.type[1:-1]]
            column = ours.vector(field.name, np.dtype(dtype).type)
            assert column.tolist() == [get(n) for n in range(getattr(theirs, f"{name}Length")())]
            assert not column.flags.writeable


@settings(QUICK, max_examples=20)
@given(samples.manifests())
def test_flatbuffers_reads_the_same(manifest):
    data = encode(manifest)[: -trailer.SIZE]
    theirs = generated.Manifest.GetRootAs(data, 0)
    assert generated.Manifest.ManifestBufferHasIdentifier(data, 0)
    compare(Buffer(data).root("Manifest"), theirs, "Manifest")


def test_flatbuffers_reads_the_sample():
    """Values, not only slots: what is in the records is where the schema says."""
    manifest = samples.sample()
    data = encode(manifest)[: -trailer.SIZE]
    root = generated.Manifest.GetRootAs(data, 0)
    compare(Buffer(data).root("Manifest"), root, "Manifest")
    pool, cuts = root.Strings().BytesAsNumpy().tobytes(), root.Strings().StartsAsNumpy()

    def string(number):
        return pool[cuts[number] : cuts[number + 1]].decode()

    assert root.ChunkSize() == 8 << 20
    assert root.Producer() == manifest.producer.encode()
    assert [string(n) for n in root.Files().PathAsNumpy()] == list(manifest.files)
    assert root.Files().LengthAsNumpy().tolist() == [f.length for f in manifest.files.values()]
    function, apply = root.Functions(0), manifest.functions["apply"]
    module = function.Primal()
    assert function.Name() == b"apply"
    assert (module.StablehloOffset(), module.StablehloLength()) == (apply.primal.offset, apply.primal.length)
    assert (module.CallingConvention(), module.NumDevices(), module.AllKept()) == (10, 1, False)
    assert module.KeptAsNumpy().tolist() == list(apply.primal.kept)
    assert [module.Dialects(n) for n in range(module.DialectsLength())] == [b"builtin", b"func"]
    assert (module.JaxVersion(), module.JaxlibVersion(), module.Name()) == (b"0.10.2", b"0.10.1", b"apply")
    assert function.Vjps(0).AllKept()
    assert root.Functions(1).VjpsIsNone()
    assert (module.Traced(), module.MeshPlus1(), function.Vjps(0).Traced()) == (apply.primal.traced, 1, 11)
    assert [string(n) for n in function.Inputs().KeyAsNumpy()][:3] == ["", "params", "__metadata__"]
    weights, params = root.Weights(0), manifest.weights["params"]
    assert weights.Specs().DtypeAsNumpy().tolist() == [s.kind.code for s in params.specs]
    assert weights.LeafTensorPlus1AsNumpy().tolist() == (params.leaf_tensor + 1).tolist()
    assert weights.PieceStartAsNumpy().tolist() == [0, 1, 3, 4, 5]
    assert weights.PieceBeginAsNumpy().tolist() == [0, 0, 1, 0]
    assert weights.PieceShapeAsNumpy().tolist() == [1, 6, 2, 6]
    digests = b"".join(p.digests for parts in params.pieces for p in parts)
    assert weights.ChunkDigestAsNumpy().tobytes() == digests
    assert root.Pipelines(0).Steps(1).Role() == generated.StepRole.MODEL
    assert root.Supplementals(0).EntryFilePlus1AsNumpy().tolist() == [0, 1]


# --- objects are decoded when they are asked for, each once


def test_an_object_that_cannot_be_read_leaves_the_others():
    data = flat.to_dict(encode(samples.sample()))
    data["functions"][0]["required"] = [b"teleportation"]
    read = decode.decode(flat.from_dict(data))
    # However often it is asked for: what it costs is paid once.
    for _ in range(20_000):
        with pytest.raises(UnsupportedFormatError) as caught:
            read.functions["apply"]
    assert (caught.value.object, caught.value.field, caught.value.found) == ("apply", "required", "teleportation")
    assert list(read.functions) == ["apply", "b"]
    assert "apply" in read.functions
    assert samples.plain(read.functions["b"]) == samples.plain(samples.sample().functions["b"])
    samples.touch(dataclasses.replace(read, functions={}))


def test_an_object_is_decoded_once_for_all_threads():
    read = decode.decode(encode(samples.sample()))
    found = []
    threads = [threading.Thread(target=lambda: found.append(read.weights["params"])) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 50
    assert len({id(record) for record in found}) == 1
    with pytest.raises(KeyError):
        read.weights["other"]
