"""Plans of restoring without devices: compared with element-by-element sets, and as the command line shows them."""

from __future__ import annotations

import json
import math
import pathlib
import random

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import obmlite
from obmlite import cli, planning
from obmlite.errors import ArgumentError, RestoreError, UnknownNameError
from obmlite.plan.topology import Topology, boxes
from obmlite.planning import Split, estimate


def elements(split: Split, topology: Topology) -> list[set[int]]:
    """For each host the elements that it needs, by their numbers in the tensor."""
    numbers = np.arange(math.prod(split.shape)).reshape(split.shape)
    every = boxes(split.shape, split.entries, topology)
    return [
        {
            int(n)
            for device in topology.local(host)
            for n in numbers[tuple(slice(*bounds) for bounds in every[device])].flat
        }
        for host in range(topology.hosts)
    ]


def runs(numbers: set[int]) -> int:
    return sum(n - 1 not in numbers for n in numbers)


def some_splits() -> list[tuple[Split, Topology]]:
    found = []
    for axes, hosts in (
        ({"x": 4, "y": 2}, 1),
        ({"x": 4, "y": 2}, 4),
        ({"x": 2, "y": 4}, 4),
        ({"x": 2, "y": 3}, 3),  # hosts that have some, but not all, boxes in common
        ({"x": 8}, 8),
        ({"x": 2, "y": 2, "z": 2}, 2),
    ):
        names = [*axes, None, None]
        for seed in range(6):
            entries = tuple(random.Random(seed).sample(names, 2))
            found.append((Split.whole((24, 48), 16, entries), Topology(axes, hosts)))
    return found


@pytest.mark.parametrize(("split", "topology"), some_splits())
def test_bytes_are_those_of_the_elements(split: Split, topology: Topology) -> None:
    wanted = elements(split, topology)
    found = estimate([split], topology, gap=0)
    assert found.nbytes == 24 * 48 * 2
    assert found.needed.tolist() == found.read.tolist() == [2 * len(own) for own in wanted]
    assert all(calls >= runs(own) for calls, own in zip(found.reads.tolist(), wanted, strict=True))
    shared = estimate([split], topology, gap=0, broadcast=True)
    assert found.needed.tolist() == shared.needed.tolist()
    assert found.nbytes <= shared.read.sum() < found.nbytes + topology.hosts, "each byte once; hosts round up"
    again = estimate([split] * 3, topology, gap=0)
    assert again.read.tolist() == (3 * found.read).tolist()


def test_rows_and_columns() -> None:
    topology = Topology({"x": 4, "y": 2}, 4)
    rows = estimate([Split.whole((64, 1024), 32, ("x", "y"))], topology)
    assert rows.reads.tolist() == [1] * 4, "the axis within a host is joined"
    columns = estimate([Split.whole((64, 8192), 32, ("y", "x"))], topology)
    assert columns.reads.tolist() == [64] * 4
    near = estimate([Split.whole((64, 1024), 32, ("y", "x"))], topology)
    assert near.reads.tolist() == [1] * 4, "3 KiB between rows are read, too"
    assert near.amplification == pytest.approx(64 * 1024 * 4 / near.needed[0], rel=0.02)
    large = estimate([Split.whole((64, 1024), 32, ())], topology, chunk=1 << 16)
    assert large.reads.tolist() == [4] * 4


def test_small_dtypes_and_several_pieces() -> None:
    topology = Topology({"x": 4}, 4)
    packed = estimate([Split.whole((8, 5), 4, ("x",))], topology)
    assert (packed.nbytes, packed.needed.tolist()) == (20, [5] * 4)
    halves = (((0, 8), (0, 4)), ((0, 8), (4, 8)))
    found = estimate([Split((8, 8), 32, ("x",), halves)], topology, gap=0)
    assert found.needed.tolist() == found.read.tolist() == [64] * 4
    assert found.reads.tolist() == [2] * 4
    assert estimate([], topology).replication == 1
    scalar = estimate([Split.whole((), 32, ())], topology, broadcast=True)
    assert (scalar.nbytes, scalar.read.tolist()) == (4, [1] * 4)


# --- packages


def test_text_is_parsed() -> None:
    assert planning.parse_rules("embed=model, mlp=None,b=x+y") == {"embed": ("model",), "mlp": None, "b": ("x", "y")}
    assert planning.parse_rules("a=x,a=y") == [("a", ("x",)), ("a", ("y",))]
    assert planning.parse_partition("a=b*=data,None,x+y") == ("a=b*", (("data",), None, ("x", "y")))
    for text in ("", "a", "a=", "=x", "a=x,"):
        with pytest.raises(ArgumentError):
            planning.parse_rules(text)
    for text in ("", "a", "a=", "=x", "a=x,"):
        with pytest.raises(ArgumentError):
            planning.parse_partition(text)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("planning") / "m.obm"
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    kernel = jax.device_put(np.ones((64, 32), "f4"), NamedSharding(mesh, P("fsdp", None)))
    shared = np.ones(16, "f4")
    params = {"a": {"kernel": kernel, "bias": np.ones(7, "f4")}, "tied": [shared, shared], "key": jax.random.key(0)}
    ema = obmlite.Weights({"kernel": np.ones((64, 32), "f2")})
    obmlite.Model({"params": obmlite.Weights(params), "ema": ema}).save(path)
    return path


def test_a_package(package: pathlib.Path) -> None:
    topology = Topology({"data": 2, "fsdp": 4}, hosts=4)
    found = planning.package_traffic(package, topology)
    whole = 64 * 32 * 4
    rest = 7 * 4 + 16 * 4 + 8
    assert found["params"].nbytes == whole + rest, "tied leaves once"
    assert found["params"].needed.tolist() == [whole // 2 + rest] * 4, "two of four parts of the kernel"
    assert found["ema"].needed.tolist() == [64 * 32 * 2] * 4, "nothing was saved of how it is split"
    other = planning.package_traffic(
        package,
        topology,
        weights="ema",
        partitions={"*": ["data", "fsdp"], "kern*": [("data", "fsdp")]},
        broadcast=True,
    )
    assert list(other) == ["ema"]
    assert other["ema"].read.tolist() == [64 * 32 * 2 // 4] * 4
    mapped = planning.package_traffic(package, Topology({"x": 8}, 8), weights="params", rules={"fsdp": "x"})
    assert mapped["params"].needed.tolist() == [whole // 8 + rest] * 8


def test_what_does_not_fit_is_refused(package: pathlib.Path) -> None:
    topology = Topology({"x": 8})
    with pytest.raises(RestoreError) as raised:
        planning.package_traffic(package, topology, weights="params", partitions={"*bias": ["x"]})
    text = str(raised.value)
    assert "a.bias: f32[7] as P(x): dimension 0 has 7 elements, which do not divide over x=8" in text
    assert "a.kernel: f32[64,32] as P(fsdp, None): the axis 'fsdp' is not on the mesh, and no rule maps it" in text
    assert (raised.value.object, raised.value.package) == ("params", str(package))
    with pytest.raises(UnknownNameError, match="params"):
        planning.package_traffic(package, topology, weights="nothing")
    with pytest.raises(ArgumentError, match="nothing"):
        planning.package_traffic(package, topology, partitions={"nothing": ["x"]})


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_command(package: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    mesh = ("plan", package, "--mesh", "data=2,fsdp=4", "--hosts", "4")
    code, out, err = run(capsys, *mesh, "--bandwidth", "1", "--bandwidth", "0.5")
    assert (code, err) == (0, "")
    for text in (
        "mesh data=2, fsdp=4: 8 devices, 4 hosts of 2\n",
        "\nparams: 8.1 KiB\n",
        "  a host needs  4.1 KiB\n",
        "  all hosts     16.4 KiB, 2.02 times the weights\n",
        "\ntotal: 12.1 KiB\n",
        "  at 512.0 MiB/s per host: 0.00 s\n",
    ):
        assert text in out
    code, out, _ = run(capsys, *mesh, "--json", "--broadcast", "--weights", "ema", "--partition", "*=fsdp")
    listed = json.loads(out)
    assert list(listed["weights"]) == ["ema"]
    assert listed["total"]["needed"] == {"min": 2048, "max": 2048, "all": 8192}
    assert listed["total"]["read"]["all"] == listed["total"]["nbytes"] == 4096
    assert listed["total"]["seconds"] == [{"bandwidth": 1 << 30, "seconds": 1024 / (1 << 30)}]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--mesh", "x"], 2, "such as data=4,model=8"),
        (["--mesh", "x=8", "--rules", "x"], 2, "Rules are malformed."),
        (["--mesh", "x=8", "--bandwidth", "0"], 2, "must be positive"),
        (["--mesh", "x=8", "--hosts", "3"], 1, "a divisor of 8"),
        (["--mesh", "x=8"], 1, "no rule maps it"),
        ([], 2, "--mesh"),
    ],
)
def test_wrong_usage(
    package: pathlib.Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, text: str
) -> None:
    found, out, err = run(capsys, "plan", package, *arguments)
    assert (found, out) == (code, "")
    assert text in err
