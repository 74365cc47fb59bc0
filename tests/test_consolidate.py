"""Packages in pieces, rewritten whole."""

import dataclasses
import math
import os
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

import obmlite
from obmlite import _writing, cli
from obmlite import consolidate as module
from obmlite.consolidate import consolidate
from obmlite.io import digest
from obmlite.io.commit import MANIFEST, Transaction
from obmlite.schema import records as r
from obmlite.schema.decode import decode
from obmlite.schema.encode import encode
from obmlite.verify import verify


def save_in_pieces(path, tree, cuts, **extra):
    """Saves weights as several processes do: for each leaf how many pieces along each dimension, dealt to two files."""
    weights = obmlite.Weights(tree)
    tensors = _writing.Tensors.of(weights)
    files = [[], []]
    for part in tensors.parts(weights):
        counts = cuts.get(part.name, ())
        grid = counts + (1,) * (len(part.shape) - len(counts))
        for n, at in enumerate(np.ndindex(*grid)):
            box = tuple(
                (size * a // count, size * (a + 1) // count)
                for size, a, count in zip(part.shape, at, grid, strict=True)
            )
            name = f"{part.name}@{n}" if math.prod(grid) > 1 else part.name
            files[n % 2].append(dataclasses.replace(part, name=name, box=box))
    with Transaction(path, named=lambda _: ()) as transaction, _writing.Writer(transaction, int) as writer:
        made = [
            writer.write(f"params-p{n}", weights.tree.names, parts, _writing.at_once(weights))
            for n, parts in enumerate(files)
        ]
        record = _writing.record("params", weights, tensors, zip(files, made, strict=True))
        manifest = r.ManifestRecord(
            producer="a test", files={w.record.path: w.record for w in made}, weights={"params": record}, **extra
        )
        transaction.commit(encode(manifest))


def tree():
    draw = np.random.default_rng(0)
    return {
        "w": draw.normal(size=(37, 12)).astype(np.float32),
        "b": draw.normal(size=(64,)).astype(ml_dtypes.bfloat16),
        "odd": draw.integers(-8, 8, (7, 9)).astype(ml_dtypes.int4),
        "two": draw.integers(-2, 2, (3, 5, 7)).astype(ml_dtypes.int2),
        "key": jax.random.split(jax.random.key(1), 6),
        "complex": draw.normal(size=(4, 6)).astype(np.complex128),
        "scalar": np.float32(3),
        "empty": np.zeros((3, 0), np.float32),
        "none": np.zeros((4,), jax.dtypes.float0),
        "number": 5,
    }


CUTS = {"w": (3, 2), "b": (5,), "odd": (2, 3), "two": (3, 2, 2), "key": (4,), "complex": (2, 2)}


@pytest.mark.parametrize("slab", [1, 7, 100, module._SLAB])
def test_the_same_bytes_as_from_one_process(tmp_path, monkeypatch, slab):
    monkeypatch.setattr(module, "_SLAB", slab)
    values = tree()
    values["tied"] = values["w"]
    save_in_pieces(tmp_path / "pieces.obm", values, CUTS)
    assert len(list((tmp_path / "pieces.obm/weights").iterdir())) == 2
    obmlite.Model({"params": obmlite.Weights(values)}).save(tmp_path / "whole.obm")
    consolidate(tmp_path / "pieces.obm", tmp_path / "out.obm")
    assert verify(tmp_path / "out.obm").good
    assert contents(tmp_path / "out.obm") == contents(tmp_path / "whole.obm")


def contents(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_files_of_limited_size(tmp_path):
    values = {f"w{n}": np.arange(3_000_000, dtype=np.float32) * n for n in range(3)}  # more than one chunk each
    save_in_pieces(tmp_path / "pieces.obm", values, dict.fromkeys(values, (3,)))
    assert cli.main(["consolidate", *map(str, (tmp_path / "pieces.obm", tmp_path / "out.obm")),
                     "--max-file-bytes", "24000000"]) == 0  # fmt: skip
    assert len(list((tmp_path / "out.obm/weights").glob("*.safetensors"))) == 2
    assert verify(tmp_path / "out.obm").good
    found = obmlite.load(tmp_path / "out.obm").weights["params"]
    for name, value in values.items():
        np.testing.assert_array_equal(np.asarray(found[name]), value)


def test_everything_else_is_kept(tmp_path):
    """What this obmlite doesn't run yet too: pipelines with processors, supplementals."""
    function = obmlite.export(lambda p, x: p["w"] * x, {"w": obmlite.spec("f32[3]")}, obmlite.spec("f32[3]"), name="f")
    source, out = tmp_path / "source.obm", tmp_path / "out.obm"
    obmlite.Model(
        {"f": function, "params": obmlite.Weights({"w": np.ones(3, np.float32)}, metadata={"of": "w"})},
        metadata={"license": "none"},
    ).save(source)
    before = decode((source / MANIFEST).read_bytes())
    attached = b"attached" * 2_000_000
    name = f"data-{digest.sha256(attached).hex()[:16]}"
    files = {}
    for below in ("x/y.bin", "z"):
        path = source / "supplementals" / name / below
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(attached)
        own = f"supplementals/{name}/{below}"
        files[own] = r.FileRecord(own, len(attached), r.FileKind.SUPPLEMENTAL, digest.sha256(attached))
    steps = [
        r.StepRecord(role, "f", (r.Binding("p", "params", ""),))
        for role in (r.StepRole.PRE_PROCESSOR, r.StepRole.MODEL)
    ]
    (source / MANIFEST).write_bytes(
        encode(
            dataclasses.replace(
                before,
                files=dict(sorted({**before.files, **files}.items())),
                pipelines={"p": r.PipelineRecord(name="p", steps=tuple(steps), pass_through=True)},
                supplementals={
                    "data": r.SupplementalRecord(
                        name="data",
                        form=r.SupplementalForm.DIRECTORY,
                        entries={"x/y.bin": min(files), "z": max(files)},
                        mime_type="application/x",
                    )
                },
                default_pipeline="p",
            )
        )
    )
    consolidate(source, out)
    assert not verify(out).extra
    assert contents(out) == contents(source)  # it was whole already, and by this obmlite


def test_bytes_that_were_changed_are_not_vouched_for(tmp_path):
    save_in_pieces(tmp_path / "pieces.obm", tree(), CUTS)
    [file, _] = sorted((tmp_path / "pieces.obm/weights").iterdir())
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(obmlite.CorruptPackageError, match="bytes were changed"):
        consolidate(tmp_path / "pieces.obm", tmp_path / "out.obm")
    assert not (tmp_path / "out.obm").exists()


def test_refusals(tmp_path):
    save_in_pieces(tmp_path / "pieces.obm", {"w": np.zeros(4)}, {})
    with pytest.raises(obmlite.PackageExistsError):
        consolidate(tmp_path / "pieces.obm", tmp_path / "pieces.obm")
    with pytest.raises(obmlite.PackageNotFoundError):
        consolidate(tmp_path / "nothing.obm", tmp_path / "out.obm")
    assert cli.main(["consolidate", str(tmp_path / "nothing.obm"), str(tmp_path / "out.obm")]) == 1
    save_in_pieces(tmp_path / "newer.obm", {"w": np.zeros(4)}, {}, format=(r.FORMAT_MAJOR, r.FORMAT_MINOR + 1))
    with pytest.raises(obmlite.UnsupportedFormatError, match="may hold more"):
        consolidate(tmp_path / "newer.obm", tmp_path / "out.obm")
    assert not (tmp_path / "out.obm").exists()


MEASURE = """
import pathlib, re, sys
from obmlite.consolidate import consolidate

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) >> 10

before = peak()
consolidate(sys.argv[1], sys.argv[2], progress=False)
print(peak() - before)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_a_package_over_itself(tmp_path, capsys):
    save_in_pieces(tmp_path / "a", tree(), {"w": (3, 2)})
    before = obmlite.load(tmp_path / "a")
    assert cli.main(["consolidate", str(tmp_path / "a"), str(tmp_path / "a")]) == 1
    assert "overwrite" in capsys.readouterr().err
    assert cli.main(["consolidate", str(tmp_path / "a"), str(tmp_path / "a"), "--overwrite"]) == 0
    after = obmlite.load(tmp_path / "a")
    for name, leaf in after.weights["params"].flat.items():
        assert np.asarray(leaf).tobytes() == np.asarray(before.weights["params"].flat[name]).tobytes()
    pieces = decode((tmp_path / "a" / MANIFEST).read_bytes()).weights["params"].pieces
    assert {len(own) for own in pieces} == {1}
    assert verify(tmp_path / "a").good


def test_memory_does_not_grow_with_the_tensors(tmp_path):
    value = np.arange(128 << 20, dtype=np.int32).reshape(1 << 14, 1 << 13)  # 512 MiB
    save_in_pieces(tmp_path / "pieces.obm", {"w": value}, {"w": (2, 4)})
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    done = subprocess.run(
        [sys.executable, script, tmp_path / "pieces.obm", tmp_path / "out.obm"],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(obmlite.__file__).parent.parent)},
    )
    assert int(done.stdout) < 128
    found = np.asarray(obmlite.load(tmp_path / "out.obm").weights["params"]["w"])
    np.testing.assert_array_equal(found[::1111], value[::1111])
    print(done.stdout)


def test_slabs_follow_on_each_other():
    for shape, most in (((), 1), ((5,), 2), ((3, 4, 5), 7), ((3, 4, 5), 1), ((3, 4, 5), 100), ((0, 3), 2), ((7, 1), 3)):
        order = np.arange(math.prod(shape)).reshape(shape)
        found = [order[tuple(slice(a, b) for a, b in box)] for box in module._slabs(shape, most)]
        assert all(part.size <= most for part in found)
        assert np.array_equal(np.concatenate([np.zeros(0, int), *map(np.ravel, found)]), order.ravel())
