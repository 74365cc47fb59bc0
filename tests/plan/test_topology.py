"""Boxes of a mesh without devices, compared with JAX's own of a mesh with eight."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obmlite.errors import ArgumentError
from obmlite.plan import topology as topologies
from obmlite.plan.topology import Topology, boxes, misfit, parse_axes
from tests.on_devices import on_devices


def test_against_jax_on_eight_devices() -> None:
    assert on_devices(__file__).split() == ["agree", "disagree"]


MESHES = [(8,), (4, 2), (2, 4), (1, 8), (2, 2, 2), (2, 1, 2), (1,), (3,), (2, 3), (2, 1, 3)]


@st.composite
def splits(draw):
    """A mesh, a shape, and a partition that may or may not fit; axes are used once and exist, as JAX's type demands."""
    sizes = draw(st.sampled_from(MESHES))
    axes = dict(zip("xyz", sizes, strict=False))
    free = draw(st.permutations(list(axes)))
    entries = []
    for _ in range(draw(st.integers(0, 3))):
        count = draw(st.integers(0, len(free)))
        taken, free = tuple(free[:count]), free[count:]
        entries.append(taken[0] if count == 1 and draw(st.booleans()) else taken or None)
    rank = len(entries) + draw(st.integers(0, 2))
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 4, 6, 8, 12, 24]), min_size=rank, max_size=rank)))
    return axes, shape, entries


def main() -> None:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    seen = set()

    @settings(max_examples=300, deadline=None, database=None)
    @given(splits())
    def compare(split):
        axes, shape, entries = split
        topology = Topology(axes)
        devices = jax.devices()[: topology.devices]
        mesh = Mesh(np.array(devices).reshape(tuple(axes.values())), tuple(axes))
        sharding = NamedSharding(mesh, PartitionSpec(*entries))
        try:
            sharding.shard_shape(shape)
        except ValueError:
            seen.add("disagree")
            assert misfit(shape, entries, axes)
            with pytest.raises(ArgumentError):
                boxes(shape, entries, topology)
            return
        seen.add("agree")
        theirs = sharding.devices_indices_map(shape)
        expected = [
            tuple(part.indices(size)[:2] for part, size in zip(theirs[device], shape, strict=True))
            for device in devices
        ]
        assert boxes(shape, entries, topology) == expected

    compare()
    print(*sorted(seen))


@pytest.mark.parametrize(
    ("shape", "entries", "problem"),
    [
        ((8, 4), ("x", ("y",)), None),
        ((8,), (("x", "y"),), None),
        ((0,), ("x",), None),
        ((8,), ("z",), "no axis 'z'"),
        ((8, 8), ("x", ("y", "x")), "'x' is used twice"),
        ((6,), ("x",), "dimension 0 has 6 elements, which do not divide over x=4"),
        ((8, 4), (None, ("x", "y")), "dimension 1 has 4 elements, which do not divide over x=4 x y=2"),
        ((), (None,), "the partition has 1 entries, for 0 dimensions"),
    ],
)
def test_misfits(shape, entries, problem):
    found = misfit(shape, entries, {"x": 4, "y": 2})
    assert found is None if problem is None else problem in found


def test_hosts_have_contiguous_blocks():
    topology = Topology({"data": 2, "model": 4}, hosts=2)
    assert (topology.devices, topology.per_host, str(topology)) == (8, 4, "data=2, model=4")
    assert [list(topology.local(host)) for host in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    found = boxes((4, 8), ["data", "model"], topology)
    assert {box[0] for box in found[:4]} == {(0, 2)}
    assert [box[1] for box in found[4:]] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert boxes((), [], topology) == [()] * 8


@pytest.mark.parametrize(("axes", "hosts"), [({"x": 8}, 3), ({"x": 8}, 0), ({"x": 8}, 16), ({"x": 0}, 1)])
def test_uneven_hosts_are_refused(axes, hosts):
    with pytest.raises(ArgumentError):
        Topology(axes, hosts)


def test_parse_axes():
    assert list(parse_axes("data=4, model=8").items()) == [("data", 4), ("model", 8)]
    for text in ("", "data", "data=", "=4", "data=0", "data=-1", "data=4,", "data=٤", "data=4,data=2"):
        with pytest.raises(ArgumentError) as raised:
            parse_axes(text)
        assert raised.value.field == "mesh"


def test_a_large_mesh_is_no_work():
    topology = Topology({"data": 8, "fsdp": 64, "model": 8}, hosts=512)
    found = boxes((16384, 53248), [("fsdp", "data"), "model"], topology)
    assert len(found) == len(set(found)) == topologies.Topology({"all": 4096}).devices


if __name__ == "__main__":
    main()
