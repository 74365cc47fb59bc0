"""What hosts would read to restore a large model: ``python -m benchmarks.scaling``; no device and no file is needed.

The model has the shape of Llama 3.1 405B: https://huggingface.co/meta-llama/Llama-3.1-405B/blob/main/config.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping

import obmlite
from obmlite.placement import partition_on
from obmlite.plan.topology import Topology
from obmlite.planning import GIB, Split, Traffic, estimate
from obmlite.specs import Partition, TensorSpec
from obmlite.weights import size

LAYERS, EMBED, MLP, HEADS, KV_HEADS, HEAD, VOCAB = 126, 16384, 53248, 128, 8, 128, 128256

DEVICES_PER_HOST = 8

BANDWIDTHS = (1, 5, 20)
"""GiB per second that each host reads."""

BEGIN, END = "<!-- figures: written by `python -m benchmarks.scaling --write` -->", "<!-- end of figures -->"

DOCUMENT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "docs", "scaling.md")

_SIZES = {"embed": EMBED, "mlp": MLP, "heads": HEADS * HEAD, "kv": KV_HEADS * HEAD, "vocab": VOCAB, "norm": EMBED}

_LAYER = {
    "attention.q": ("embed", "heads"),
    "attention.k": ("embed", "kv"),
    "attention.v": ("embed", "kv"),
    "attention.o": ("heads", "embed"),
    "mlp.gate": ("embed", "mlp"),
    "mlp.up": ("embed", "mlp"),
    "mlp.down": ("mlp", "embed"),
    "attention_norm": ("norm",),
    "mlp_norm": ("norm",),
}


def specs() -> dict[str, TensorSpec]:
    """The model's leaves: kernels as (in, out), layer by layer, each dimension with its logical name."""
    axes = {f"layers.{n}.{name}": own for n in range(LAYERS) for name, own in _LAYER.items()}
    axes |= {"embedding": ("vocab", "embed"), "norm": ("norm",), "head": ("embed", "vocab")}
    return {name: _spec(own) for name, own in axes.items()}


def _spec(axes: tuple[str, ...]) -> TensorSpec:
    spec = obmlite.spec(f"bf16[{','.join(str(_SIZES[axis]) for axis in axes)}]")
    return dataclasses.replace(spec, logical_axes=Partition(tuple((axis,) for axis in axes)))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way to split the model over a pod.

    Attributes:
      title: for people.
      mesh: hosts → mesh axes.
      rules: from logical axes to mesh axes.
      by_rows: whether kernels are split over fsdp along the first dimension and over model along the second, whatever
        their logical axes.
    """

    title: str
    mesh: Callable[[int], Mapping[str, int]]
    rules: Mapping[str, str | None]
    by_rows: bool = False

    def splits(self, axes: Mapping[str, int]) -> list[Split]:
        """The model's tensors, each saved whole."""
        found = []
        for spec in specs().values():
            if self.by_rows and spec.ndim == 2:
                spec = dataclasses.replace(spec, logical_axes=Partition((("fsdp",), ("model",))))
            entries = partition_on(spec, axes, self.rules)
            found.append(Split.whole(tuple(int(str(d)) for d in spec.shape), spec.kind.bits, entries))
        return found


def _training(hosts: int) -> Mapping[str, int]:
    fsdp = min(hosts, 64)
    return {"data": hosts // fsdp, "fsdp": fsdp, "model": DEVICES_PER_HOST}


def _serving(hosts: int) -> Mapping[str, int]:
    return {"data": hosts * DEVICES_PER_HOST // 64, "model": 64}


_MODEL = {"mlp": "model", "heads": "model", "kv": "model", "vocab": "model", "norm": None}

LAYOUTS = (
    Layout("Training: fsdp between hosts, model within", _training, {**_MODEL, "embed": "fsdp"}),
    Layout("The same mesh, fsdp on the first dimension of every kernel", _training, {"norm": None}, by_rows=True),
    Layout("Serving: replicas of 64 devices", _serving, {**_MODEL, "embed": None}),
)

HOSTS = (8, 64, 512)


def figures() -> str:
    """A table for each layout."""
    return "\n\n".join("\n".join(_table(layout)) for layout in LAYOUTS)


def _table(layout: Layout) -> Iterator[str]:
    yield f"### {layout.title}"
    yield ""
    columns = ["hosts", "mesh", "reading", "a host needs", "reads", "in ranges", "bytes of a range", "read / needed"]
    columns += ["all hosts read", *(f"{speed} GiB/s" for speed in BANDWIDTHS)]
    yield f"| {' | '.join(columns)} |"
    yield f"| ---: | --- | --- |{' ---: |' * (len(columns) - 3)}"
    for hosts in HOSTS:
        axes = layout.mesh(hosts)
        topology, splits = Topology(axes, hosts), layout.splits(axes)
        for broadcast in (False, True):
            yield _row(topology, "shared" if broadcast else "each", estimate(splits, topology, broadcast=broadcast))


def _row(topology: Topology, reading: str, traffic: Traffic) -> str:
    # Mesh and model divide evenly here, so that all hosts do the same.
    ((needed,), (read,), (reads,)) = (
        {int(n) for n in counts} for counts in (traffic.needed, traffic.read, traffic.reads)
    )
    cells = [
        f"{topology.hosts}",
        str(topology),
        reading,
        size(needed),
        size(read),
        f"{reads:,}",
        size(read / reads),
        f"{traffic.amplification:.3f}",
        f"{traffic.replication:.2f} × model",
        *(_seconds(traffic.seconds(speed * GIB)) for speed in BANDWIDTHS),
    ]
    return f"| {' | '.join(cells)} |"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"


def replace(document: str) -> str:
    """A document with the figures between its markers."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n\n{figures()}\n\n{END}", document)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the figures into docs/scaling.md")
    if not parser.parse_args().write:
        print(figures())
        return
    with open(DOCUMENT, encoding="utf-8") as file:
        document = file.read()
    with open(DOCUMENT, "w", encoding="utf-8") as file:
        file.write(replace(document))


if __name__ == "__main__":
    main()
