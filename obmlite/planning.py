"""What restoring weights onto a mesh would read, host by host, without any of its devices."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from obmlite.errors import ArgumentError, UnknownNameError, context
from obmlite.io.store import LocalDirectory
from obmlite.loading import open_manifest
from obmlite.placement import UNFIT, Problems, Rules, Unfit, check_rules, partition_on
from obmlite.plan import CHUNK, GAP, Box, Request, plan
from obmlite.plan import boxes as box_math
from obmlite.plan.topology import Entry, Topology, boxes
from obmlite.schema import records as r
from obmlite.schema.decode import decode
from obmlite.specs import MeshSpec, Partition, TensorSpec
from obmlite.weights import size

GIB = 1 << 30

Counts = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """A tensor, and how it is to be split over a mesh. Those that are equal are planned once.

    Attributes:
      shape: of the tensor.
      bits: of an element.
      entries: for each dimension the mesh axes, or None; may be fewer than there are dimensions.
      pieces: the boxes that the tensor is saved in.
    """

    shape: tuple[int, ...]
    bits: int
    entries: tuple[Entry, ...]
    pieces: tuple[Box, ...]

    @staticmethod
    def whole(shape: tuple[int, ...], bits: int, entries: tuple[Entry, ...]) -> Split:
        """A tensor that is saved in one piece."""
        return Split(shape, bits, entries, (box_math.whole(shape),))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return _nbytes(box_math.whole(self.shape), self.bits)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What hosts read; each attribute but the first is an array with a number for each host.

    Attributes:
      nbytes: bytes of the tensors.
      needed: bytes that a host's devices hold, what several of them hold once.
      read: bytes that the host reads.
      reads: number of ranges that it reads.
    """

    nbytes: int
    needed: Counts
    read: Counts
    reads: Counts

    @property
    def amplification(self) -> float:
        """Bytes that all hosts read for each byte that they need; less than one where they tell each other."""
        needed = int(self.needed.sum())
        return int(self.read.sum()) / needed if needed else 1.0

    @property
    def replication(self) -> float:
        """Bytes that all hosts read together for each byte of the tensors."""
        return int(self.read.sum()) / self.nbytes if self.nbytes else 1.0

    def seconds(self, bandwidth: float) -> float:
        """How long the host that reads most takes.

        Args:
          bandwidth: bytes per second that each host reads.
        """
        return int(self.read.max()) / bandwidth

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.nbytes + other.nbytes,
            self.needed + other.needed,
            self.read + other.read,
            self.reads + other.reads,
        )


def estimate(
    splits: Iterable[Split], topology: Topology, *, broadcast: bool = False, gap: int = GAP, chunk: int = CHUNK
) -> Traffic:
    """What each host reads to restore tensors.

    Args:
      splits: the tensors.
      topology: the mesh and its hosts.
      broadcast: whether hosts that need the same bytes share out the reading, evenly, and tell each other.
      gap: bytes between rows up to which both are read at once.
      chunk: bytes that are read at one time at most.

    Raises:
      ArgumentError: a tensor does not fit on the mesh.
    """
    nbytes = 0
    needed, read, reads = ([Fraction(0)] * topology.hosts for _ in range(3))
    for split, times in collections.Counter(splits).items():
        nbytes += times * split.nbytes
        for host, (own, load, calls, share) in enumerate(_hosts(split, topology, gap, chunk)):
            part = share if broadcast else 1
            needed[host] += times * own
            read[host] += times * load * part
            reads[host] += times * calls * part
    return Traffic(nbytes, *(np.array([-(-n // 1) for n in counts], np.int64) for counts in (needed, read, reads)))


def _hosts(split: Split, topology: Topology, gap: int, chunk: int) -> Iterator[tuple[int, int, int, Fraction]]:
    """For each host the bytes that it needs of a tensor, the bytes and the ranges that it would read, and its share.

    The share is what is left for it when hosts that need the same box read equal parts of it.
    """
    every = boxes(split.shape, split.entries, topology)
    wanted = [frozenset(every[device] for device in topology.local(host)) for host in range(topology.hosts)]
    holders = collections.Counter(box for own in wanted for box in own)
    known: dict[Any, tuple[int, int, int]] = {}
    shares: dict[Any, Fraction] = {}
    for own in wanted:
        shape = _moved(own) if len(split.pieces) == 1 and split.bits % 8 == 0 else own
        if shape not in known:
            request = Request(split.shape, split.bits, split.pieces, tuple(sorted(shape)))
            found = plan([request], gap=gap, chunk=chunk)
            known[shape] = (found.needed, found.read, found.reads)
        if own not in shares:
            total = sum(_nbytes(box, split.bits) for box in own)
            part = sum((Fraction(_nbytes(box, split.bits), holders[box]) for box in own), Fraction(0))
            shares[own] = part / total if total else Fraction(1)
        yield (*known[shape], shares[own])


def _moved(own: frozenset[Box]) -> frozenset[Box]:
    """Boxes moved to the tensor's first corner: within one piece, what is read does not depend on where they are."""
    origin = [min(start for start, _ in column) for column in zip(*own, strict=True)]
    return frozenset(tuple((start - o, stop - o) for (start, stop), o in zip(box, origin, strict=True)) for box in own)


def _nbytes(box: Box, bits: int) -> int:
    return -(-box_math.size_of(box) * bits // 8)


# --- a package


def package_traffic(
    path: str | os.PathLike[str],
    topology: Topology,
    *,
    weights: str | None = None,
    rules: Rules | None = None,
    partitions: Mapping[str, Sequence[Entry]] | None = None,
    broadcast: bool = False,
) -> dict[str, Traffic]:
    """What each host reads to restore a package's weights, by name; only the manifest is read.

    Args:
      path: the package's directory.
      topology: the mesh and its hosts.
      weights: the only weights object to look at; all of them if not given.
      rules: from logical axes, and from saved mesh axes that the mesh lacks, to its axes.
      partitions: from globs over leaves' names to partitions, instead of what was saved; the last that matches
        counts.
      broadcast: whether hosts that need the same bytes share out the reading.

    Raises:
      PackageNotFoundError: there is no package at the path.
      CorruptPackageError: the manifest is not what was saved.
      UnknownNameError: there are no such weights.
      ArgumentError: a glob matches no leaf, or the rules are of a wrong form.
      RestoreError: leaves do not fit on the mesh; lists them all.
    """
    check_rules(rules)
    store = LocalDirectory(path)
    with context(package=store.name):
        manifest = decode(open_manifest(store))
        if weights is not None and weights not in manifest.weights:
            known = ", ".join(manifest.weights) or "none"
            raise UnknownNameError("There are no such weights.", object=weights, expected=known)
        chosen = [manifest.weights[name] for name in manifest.weights if weights in (None, name)]
        for glob in partitions or {}:
            if not any(fnmatch.fnmatchcase(name, glob) for record in chosen for name in record.tree.names):
                raise ArgumentError("A glob matches no leaf of the weights.", field="partition", found=repr(glob))
        found = {}
        for record in chosen:
            with context(object=record.name):
                splits = _splits(record, topology, rules, partitions or {})
            found[record.name] = estimate(splits, topology, broadcast=broadcast)
        return found


def _splits(
    record: r.WeightsRecord, topology: Topology, rules: Rules | None, partitions: Mapping[str, Sequence[Entry]]
) -> list[Split]:
    """A weights object's tensors; one that tied leaves split differently is there once for each way."""
    mesh = MeshSpec(tuple(topology.axes), tuple(topology.axes.values()), (1,) * len(topology.axes))
    problems = Problems()
    found: dict[tuple[int, tuple[Entry, ...]], Split] = {}
    for name, spec, tensor in zip(record.tree.names, record.specs, record.leaf_tensor.tolist(), strict=True):
        if tensor < 0:
            continue
        for glob, entries in partitions.items():
            if fnmatch.fnmatchcase(name, glob):
                spec = dataclasses.replace(spec, partition=Partition(tuple(entries), mesh))
        try:
            entries = partition_on(spec, topology.axes, rules)
        except Unfit as unfit:
            problems.add(name, str(unfit))
            continue
        if (tensor, entries) not in found:
            pieces = tuple(box_math.of_piece(piece.begin, piece.shape) for piece in record.pieces[tensor])
            found[tensor, entries] = Split(_shape(spec), spec.kind.bits, entries, pieces)
    problems.check(
        UNFIT,
        field="mesh",
        expected=f"what fits the mesh ({topology})",
        fix="--rules AXIS=MESH_AXIS,… (None: not split), another --mesh, or --partition GLOB=… for these leaves",
    )
    return list(found.values())


def _shape(spec: TensorSpec) -> tuple[int, ...]:
    return spec.shape  # type: ignore[return-value]  # those of weights have no symbols


# --- arguments as text


def parse_rules(text: str) -> Rules:
    """Rules from text such as ``embed=model,mlp=None,batch=data+fsdp``; a sequence where a name is there twice.

    Raises:
      ArgumentError: the text is malformed.
    """
    pairs = []
    for item in text.split(","):
        name, equals, axes = (part.strip() for part in item.partition("="))
        if not (name and equals and axes):
            raise ArgumentError(
                "Rules are malformed.", field="rules", expected="such as embed=model,mlp=None", found=repr(text)
            )
        pairs.append((name, _entry(axes)))
    return pairs if len({name for name, _ in pairs}) < len(pairs) else dict(pairs)


def parse_partition(text: str) -> tuple[str, tuple[Entry, ...]]:
    """A glob and a partition from text such as ``*.kernel=data,None,fsdp+model``.

    Raises:
      ArgumentError: the text is malformed.
    """
    glob, _, partition = text.rpartition("=")
    axes = [axis.strip() for axis in partition.split(",")]
    if not glob or not all(axes):
        raise ArgumentError(
            "A partition is malformed.", field="partition", expected="such as *.kernel=data,None", found=repr(text)
        )
    return glob, tuple(_entry(axis) for axis in axes)


def _entry(text: str) -> Entry:
    return None if text == "None" else tuple(text.split("+"))


# --- what it says


def listing(found: Mapping[str, Traffic], topology: Topology, bandwidths: Sequence[float]) -> dict[str, Any]:
    """Traffic by name, and all of it, as plain data for JSON.

    Args:
      found: at least one.
      topology: the mesh and its hosts.
      bandwidths: bytes per second that each host reads.
    """
    return {
        "mesh": dict(topology.axes),
        "devices": topology.devices,
        "hosts": topology.hosts,
        "weights": {name: _plain(traffic, bandwidths) for name, traffic in found.items()},
        "total": _plain(total(found.values()), bandwidths),
    }


def total(traffic: Iterable[Traffic]) -> Traffic:
    """All of it together; there must be some."""
    first, *others = traffic
    for other in others:
        first += other
    return first


def _plain(traffic: Traffic, bandwidths: Sequence[float]) -> dict[str, Any]:
    each = {
        name: {"min": int(counts.min()), "max": int(counts.max()), "all": int(counts.sum())}
        for name, counts in (("needed", traffic.needed), ("read", traffic.read), ("reads", traffic.reads))
    }
    return {
        "nbytes": traffic.nbytes,
        **each,
        "amplification": traffic.amplification,
        "replication": traffic.replication,
        "seconds": [{"bandwidth": bandwidth, "seconds": traffic.seconds(bandwidth)} for bandwidth in bandwidths],
    }


def text(found: Mapping[str, Any]) -> Iterator[str]:
    """A listing for people, as lines of text."""
    axes = ", ".join(f"{name}={length}" for name, length in found["mesh"].items())
    each = found["devices"] // found["hosts"]
    hosts = f"{found['hosts']} {'host' if found['hosts'] == 1 else 'hosts'} of {each}"
    yield f"mesh {axes}: {found['devices']} devices, {hosts}"
    entries = {**found["weights"], **({"total": found["total"]} if len(found["weights"]) > 1 else {})}
    for name, entry in entries.items():
        yield ""
        yield f"{name}: {size(entry['nbytes'])}"
        yield f"  a host needs  {_range(entry['needed'], size)}"
        yield f"  a host reads  {_range(entry['read'], size)}, in {_range(entry['reads'], '{:,}'.format)} reads"
        yield f"  read / needed {entry['amplification']:.3f}"
        yield f"  all hosts     {size(entry['read']['all'])}, {entry['replication']:.2f} times the weights"
        for speed in entry["seconds"]:
            yield f"  at {size(speed['bandwidth'])}/s per host: {speed['seconds']:,.2f} s"


def _range(entry: Mapping[str, int], show: Any) -> str:
    low, high = show(entry["min"]), show(entry["max"])
    return str(low) if low == high else f"{low} to {high}"
