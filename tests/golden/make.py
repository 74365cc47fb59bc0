"""Makes the golden packages of this format version with the JAX that is installed: the cases that it added.

Run by ``make golden``, and with every supported JAX by ``make golden-all``. What is there is never made again: a
package that was released must open for ever, in whatever form it was written. Each package stands beside its leaves as
``.npy`` files and a ``leaves.json`` that names them (dtypes that ``.npy`` cannot hold as the bits of unsigned
integers), and beside calls of its functions with their results and gradients (``calls.py`` says how they are written).

The layout is ``<format>/jax-<version>/<case>/{package.obm,leaves,leaves.json,calls.npz,calls.json}``.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import calls
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import obmlite
from obmlite import dtypes
from obmlite.device_assignment import device
from obmlite.schema import records
from obmlite.specs import Partition

DEVICES = 8
HERE = pathlib.Path(__file__).parent
FORMAT = f"{records.FORMAT_MAJOR}.{records.FORMAT_MINOR}"


@dataclasses.dataclass
class Call:
    """A call that a golden package has the results of.

    Attributes:
      args: of the call; ``{"weights": name}`` stands for weights of the package.
      function: the function that is called; the default pipeline if none.
      pipeline: the pipeline, if another one.
      order: up to which order there are gradients.
      mesh: sizes of the axes of the mesh that it is called on.
    """

    args: list[Any]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    function: str | None = None
    pipeline: str = "serving_default"
    order: int = 0
    mesh: dict[str, int] | None = None


@dataclasses.dataclass
class Case:
    """A golden package: a model, how to save it, and calls."""

    model: obmlite.Model
    calls: list[Call] = dataclasses.field(default_factory=list)
    max_file_bytes: int | None = None


CASES: dict[str, Callable[[], Case]] = {}
ON_DEVICES: dict[str, Callable[[], Case]] = {}


def since(version: str, *, devices: bool = False) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """A case of the format version that added what is in it; made, and called, in a process with 8 devices or one."""

    def decorate(make: Callable[[], Case]) -> Callable[[], Case]:
        if version == FORMAT:
            (ON_DEVICES if devices else CASES)[make.__name__] = make
        return make

    return decorate


case = since("1.0")
case_on_devices = since("1.0", devices=True)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype("f4")


# --- weights


class Stats(NamedTuple):
    mean: Any
    var: Any


class Layer:
    """A container that JAX and obmlite are told of."""

    def __init__(self, kernel: Any, bias: Any, activation: str) -> None:
        self.kernel, self.bias, self.activation = kernel, bias, activation


jax.tree_util.register_pytree_with_keys(
    Layer,
    lambda own: (
        ((jax.tree_util.GetAttrKey("kernel"), own.kernel), (jax.tree_util.GetAttrKey("bias"), own.bias)),
        own.activation,
    ),
    lambda activation, children: Layer(*children, activation),
)
obmlite.register_node(
    Layer,
    "golden.Layer",
    flatten=lambda own: ({"kernel": own.kernel, "bias": own.bias}, {"activation": own.activation}),
    unflatten=lambda static, children: Layer(children["kernel"], children["bias"], static["activation"]),
)
Moments = collections.namedtuple("Moments", ["mean", "var"])
obmlite.register_node(Moments, "golden.Moments")


def values(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Every bit pattern in turn, so that no value is special."""
    count = int(np.prod(shape))
    if dtype == np.bool_:
        return (np.arange(count) % 3 == 0).reshape(shape)
    bits = dtypes.of(dtype).bits
    if bits < 8:
        return (np.arange(count) % (1 << bits)).astype("u1").view(dtype).reshape(shape)
    raw = (np.arange(count * dtype.itemsize) * 37 + 11) % 256
    return raw.astype("u1").view(dtype).reshape(shape)


@case
def every_dtype() -> Case:
    tree: dict[str, Any] = {}
    for kind in dtypes.ALL:
        if kind.name == "float0":
            tree[kind.name] = np.zeros((2, 3), jax.dtypes.float0)
        elif kind.bits != 6:  # no JAX before 0.12 holds these on a device
            tree[kind.name] = values(kind.numpy, (3, 5))
    tree["key"] = jax.random.key(7)
    tree["keys"] = jax.random.split(jax.random.key(8, impl="rbg"), 3)
    return Case(obmlite.Model({"all": obmlite.Weights(tree)}))


@case
def names() -> Case:
    shared = np.arange(12, dtype="f4").reshape(3, 4)
    odd = {
        "a.b": [shared, (np.float32(1.5), None)],
        "back\\slash": {"": np.arange(3, dtype="i4"), "é": np.arange(2, dtype="i8")},
        "__metadata__": collections.OrderedDict(z=shared, a=np.zeros((0, 4), "f4")),
        "ints": {10: np.ones(2, "f4"), 9: np.full(2, 9, "f4")},
        "tuples": {("x", 1): np.arange(5, dtype="u1"), ("x", 2): np.arange(7, dtype="u1")},
        "stats": Stats(np.arange(4, dtype="f4"), np.ones(4, "f4")),
        "numbers": [True, 3, 2.5, 1j],
        "empty": {},
        "bf16": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    }
    return Case(obmlite.Model({"odd": obmlite.Weights(odd)}))


@case
def metadata() -> Case:
    def double(x: Any) -> Any:
        return 2 * x

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
    x = normal(3)
    objects = {
        "double": obmlite.export(double, obmlite.spec("f32[n]"), metadata={"function": kinds}),
        "w": obmlite.Weights([x], metadata={"weights": kinds}),
    }
    return Case(
        obmlite.Model(objects, metadata={"model": kinds, "license": "Apache-2.0"}), [Call([x], function="double")]
    )


@case
def files() -> Case:
    """Several weights files, and a tie across them."""
    first = normal(64, 8)
    params = {"a": first, **{f"w{n}": normal(16, 8, seed=n) for n in range(1, 6)}, "z": first}

    def apply(params: Any, x: Any) -> Any:
        return sum(x @ leaf.T for leaf in params.values() if leaf.shape == (16, 8)) + (x @ params["z"].T).sum()

    x = normal(2, 8, seed=9)
    return Case(obmlite.Model.from_function(apply, params, x), [Call([x])], max_file_bytes=1024)


# --- functions


@case
def symbolic() -> Case:
    def digits(params: Any, x: Any) -> Any:
        hidden = jnp.tanh(x.reshape(x.shape[0], -1) @ params["dense"]["kernel"] + params["dense"]["bias"])
        return {"logits": hidden @ params["head"], "argmax": jnp.argmax(hidden @ params["head"], -1)}

    params = {"dense": {"kernel": normal(64, 16, scale=0.2), "bias": np.zeros(16, "f4")}, "head": normal(16, 10)}
    model = obmlite.Model.from_function(
        digits,
        params,
        obmlite.spec("f32[b,8,8]"),
        constraints="b <= 16",
        vjp_order=2,
        metadata={"license": "Apache-2.0"},
    )
    x = normal(5, 8, 8, seed=1)
    return Case(model, [Call([x]), Call([x[:1]]), Call([{"weights": "params"}, x[:3]], function="digits", order=2)])


@case
def captures() -> Case:
    """Arrays that a function closed over: at the top, in a nested jit, and in a nested jit in a loop."""
    table, low = jnp.asarray(normal(40, 8)), jnp.asarray(normal(8, 80), "bfloat16")
    inner_table = jnp.asarray(normal(8, 60, seed=2, scale=0.1))

    @jax.jit
    def inner(x: Any) -> Any:
        return jnp.maximum(x @ inner_table @ inner_table.T, x)

    def lookup(scale: Any, i: Any, x: Any) -> Any:
        carry, _ = jax.lax.scan(lambda c, _: (inner(c), None), table[i] * scale, None, length=2)
        return inner(carry) + x, (x @ low.astype("f4")).sum()

    model = obmlite.Model.from_function(
        lookup, np.float32(0.5), *obmlite.spec(("i32[b]", "f32[b,8]")), vjp_order=1, weights=0
    )
    i, x = np.array([3, 39, 0], "i4"), normal(3, 8, seed=3)
    return Case(model, [Call([i, x]), Call([{"weights": "scale"}, i, x], function="lookup", order=1)])


@case
def donated() -> Case:
    @functools.partial(jax.jit, donate_argnames=("cache",))
    def step(params: Any, cache: Any, x: Any, at: Any) -> Any:
        cache = jax.lax.dynamic_update_slice(cache, (x @ params["w"])[None], (at, 0, 0))
        return cache.sum(0), cache

    cache, x = np.zeros((4, 2, 8), "f4"), normal(2, 8)
    model = obmlite.Model.from_function(step, {"w": normal(8, 8, seed=1)}, cache, x, np.int32(0))
    return Case(model, [Call([cache, x, np.int32(2)]), Call([normal(4, 2, 8), x, 1])])


@case
def arguments() -> Case:
    """Static, defaults, keyword-only, positional-only, Python numbers, of which some are not used."""

    def apply(x: Any, /, scale: Any, factor: Any = 2.0, *, train: bool, shift: Any, unused: Any) -> Any:
        return (x * scale + shift if train else x * scale - shift) * factor

    x = normal(4)
    function = obmlite.export(
        apply, x, 1.0, kwargs={"train": False, "shift": x, "unused": np.int32(3)}, static="train", vjp_order=1
    )
    model = obmlite.Model({"apply": function})
    kwargs = {"shift": normal(4, seed=1), "unused": np.int32(1)}
    return Case(
        model,
        [
            Call([x, 3], kwargs, "apply"),
            Call([x], {**kwargs, "scale": np.float32(0.3), "train": False, "factor": 2.0}, "apply"),
            Call([x, np.float32(0.7)], kwargs, "apply", order=1),
        ],
    )


@case
def keys() -> Case:
    def dropout(params: Any, key: Any, x: Any) -> Any:
        this, following = jax.random.split(key)
        return jnp.where(jax.random.bernoulli(this, 0.8, x.shape), x @ params, 0.0), following

    x = normal(3, 4)
    model = obmlite.Model.from_function(dropout, normal(4, 4), jax.random.key(0), x, vjp_order=1)
    key = jax.random.key(42)
    return Case(model, [Call([key, x]), Call([{"weights": "params"}, key, x], function="dropout", order=1)])


@case
def integers() -> Case:
    """Results and arguments that have no gradients, among some that have."""

    def choose(x: Any, index: Any, mask: Any) -> Any:
        picked = jnp.where(mask, x[index], 0.0)
        return {"order": jnp.argsort(x), "picked": picked, "any": mask.any(), "byte": (x * 10).astype("i1")}

    x, index, mask = normal(6), np.array([5, 0, 5], "i4"), np.array([True, False, True])
    function = obmlite.export(choose, x, index, mask, vjp_order=2)
    return Case(obmlite.Model({"choose": function}), [Call([x, index, mask], function="choose", order=2)])


@case
def no_tangents() -> Case:
    """Arguments and results of dtype float0, and an integer dtype that jax.export cannot serialize."""

    nothing, small = np.zeros((2,), jax.dtypes.float0), np.array([-2, -1, 0, 1], ml_dtypes.int2)
    objects = {
        "floats": obmlite.export(lambda nothing, x: (nothing, x + 1), nothing, np.ones(2, "f4"), name="floats"),
        "pair": obmlite.export(lambda small: small.astype("i4") * 3, small, name="pair"),
    }
    return Case(
        obmlite.Model(objects), [Call([nothing, np.ones(2, "f4")], function="floats"), Call([small], function="pair")]
    )


@case
def lapack() -> Case:
    def solve(a: Any, b: Any) -> Any:
        half = jnp.linalg.cholesky(a)
        return jax.scipy.linalg.cho_solve((half, True), b), jnp.linalg.svd(a, compute_uv=False), jnp.linalg.eigvalsh(a)

    root = normal(4, 4)
    a, b = root @ root.T + 4 * np.eye(4, dtype="f4"), normal(4, seed=1)
    model = obmlite.Model({"solve": obmlite.export(solve, a, b, vjp_order=1)})
    return Case(model, [Call([a, b], function="solve", order=1)])


@case
def operations() -> Case:
    """Many operations of StableHLO and CHLO, in a network of no use."""

    def network(params: Any, image: Any, tokens: Any) -> Any:
        x = jax.lax.conv_general_dilated(
            image, params["conv"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.gelu(jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"))
        e = params["embedding"][tokens]
        scores = jnp.einsum("bqd,bkd->bqk", e, e, preferred_element_type="float32")
        scores = jnp.where(jnp.tri(tokens.shape[1], dtype=bool), scores, -jnp.inf)
        attended = jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), e.astype("f4"))
        best, where = jax.lax.top_k(attended.sum(1), 2)
        spectrum = jnp.fft.rfft(attended[:, :, 0])
        smooth = jnp.cumsum(jax.nn.logsumexp(attended, -1), -1) + jax.scipy.special.erf(best).sum()
        counted = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1]) * 2), (0, smooth))[1]
        branch = jax.lax.cond(counted.sum() > 0, lambda v: v.sort(), lambda v: -v, counted)
        return {"x": x.mean((1, 2)), "best": best, "where": where, "spectrum": spectrum, "branch": branch}

    params = {"conv": normal(3, 3, 1, 4, scale=0.3), "embedding": normal(11, 8, scale=0.5).astype(ml_dtypes.bfloat16)}
    image, tokens = normal(2, 8, 8, 1), np.array([[1, 5, 10, 0], [3, 3, 2, 7]], "i4")
    model = obmlite.Model.from_function(network, params, image, tokens)
    return Case(model, [Call([image, tokens])])


@case
def methods() -> Case:
    """Several functions over shared weights."""

    def encode(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["w"])

    def decode(params: Any, z: Any) -> Any:
        return z @ params["w"].T + params["b"]

    params = {"w": normal(6, 3), "b": normal(6, seed=1)}
    model = obmlite.Model.from_functions(
        {"encode": (encode, params, obmlite.spec("f32[b,6]")), "decode": (decode, params, obmlite.spec("f32[b,3]"))},
        vjp_order=1,
    )
    x, z = normal(2, 6, seed=2), normal(4, 3, seed=3)
    return Case(
        model,
        [
            Call([x], pipeline="encode", order=1),
            Call([z], pipeline="decode"),
            Call([{"weights": "params"}, z], function="decode", order=1),
        ],
    )


@case
def containers() -> Case:
    def apply(params: Any, moments: Any) -> Any:
        layer = params["layer"]
        hidden = jax.nn.relu(moments.mean @ layer.kernel + layer.bias)
        return Moments(hidden, collections.OrderedDict(z=moments.var, a=[hidden.sum(), None, ()])), {
            (1, "b"): params[7]
        }

    groups = collections.defaultdict(list, {"two": [normal(2), normal(2, seed=1)]})
    params = {"layer": Layer(normal(4, 3), np.zeros(3, "f4"), "relu")}, groups
    moments = Moments(normal(2, 4), np.ones(2, "f4"))

    def apply_all(params: Any, moments: Any) -> Any:
        first, rest = params
        return apply({**first, 7: rest["two"][1]}, moments)

    model = obmlite.Model.from_function(apply_all, params, moments)
    return Case(model, [Call([moments._asdict()])])


# --- devices


def mesh() -> Any:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@case_on_devices
def placed() -> Case:
    """Weights that record where they lay: partition specs, memory kinds, logical axes."""
    kernel = jax.device_put(normal(8, 4), NamedSharding(mesh(), PartitionSpec(("data", "model"))))
    tree = {
        "both": kernel,
        "columns": jax.device_put(normal(4, 8), NamedSharding(mesh(), PartitionSpec(None, "model"))),
        "whole": jax.device_put(normal(3), NamedSharding(mesh(), PartitionSpec())),
        "host": jax.device_put(normal(4), NamedSharding(mesh(), PartitionSpec("data"), memory_kind="pinned_host")),
        "named": normal(4, 4),
        "one": jnp.ones(2),
    }
    weights = obmlite.Weights(tree)
    logical = Partition((("embed",), ("heads", "kv")))
    specs = [
        dataclasses.replace(spec, logical_axes=logical) if name == "named" else spec
        for name, spec in zip(weights.names, weights.specs, strict=True)
    ]
    return Case(
        obmlite.Model({"w": obmlite.Weights.from_source(weights.tree, specs, weights.source, weights.metadata)})
    )


@case_on_devices
def devices() -> Case:
    """A function that fixes its mesh, and one that does not."""
    on = mesh()

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=on,
        in_specs=(PartitionSpec(None, "model"), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
    )
    def fixed(w: Any, x: Any) -> Any:
        return jax.lax.psum(jnp.tanh(x[:, :4] @ w), "model")

    w, x = normal(4, 8), normal(8, 4, seed=1)
    free = obmlite.export(lambda w, x: jnp.tanh(x @ w), w, obmlite.spec("f32[b,4]"), name="free", vjp_order=1)
    objects = {"fixed": obmlite.export(fixed, w, x, name="fixed", vjp_order=1), "free": free}
    sizes = {"data": 4, "model": 2}
    return Case(
        obmlite.Model(objects),
        [
            Call([w, x], function="fixed", order=1, mesh=sizes),
            Call([w, x], function="free", order=1),
            Call([w, x], function="free", mesh=sizes),
        ],
    )


@since("1.1")
def pipelines() -> Case:
    """Processors, a value passed by, polymorphic functions, attachments, options, who is private, and devices."""

    def pre(stats: Any, image: Any) -> Any:
        return (image.astype(jnp.float32) - stats["mean"]) / stats["std"], image.shape[0] + image[:, 0]

    def apply(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["w"])

    def post(y: Any, passed: Any) -> Any:
        return {"label": y.argmax(-1), "passed": passed}

    params, stats = {"w": normal(6, 3)}, {"mean": np.float32(0.5), "std": np.float32(2)}
    own = {f"apply.{b}": obmlite.export(apply, params, obmlite.spec(f"f32[{b},6]")) for b in ("2", "b")}
    model = obmlite.Model(
        {
            "pre": obmlite.export(pre, stats, obmlite.spec("u8[n,6]")),
            "post": obmlite.export(post, obmlite.spec("f32[m,3]"), obmlite.spec("u8[m]")),
            **own,
            "apply": obmlite.Polymorphic(list(own)),
            "options": obmlite.export(
                lambda x: x * 2, obmlite.spec("f32[b]"), compile_options={"cpu": {"xla_cpu_enable_fast_min_max": True}}
            ),
            "params": obmlite.Weights(params),
            "stats": obmlite.Weights(stats),
        },
        pipelines={
            "serving_default": obmlite.Pipeline(
                pre=[obmlite.Step("pre", weights={"stats": "stats"})],
                function="apply",
                weights={"params": "params"},
                post=["post"],
                pass_through=True,
            ),
            "plain": obmlite.Pipeline(function="apply", weights={"params": "params"}),
        },
        supplementals={
            "note": obmlite.Supplemental.from_bytes("“é”".encode(), mime_type="text/plain", version="2"),
            "large": obmlite.Supplemental.from_bytes(bytes(range(256)) * 64, mime_type="application/octet-stream"),
        },
        private=["pre", "post"],
        device_assignment=[device(0, (0, 1, 2), 1)],
    )
    image = np.arange(12, dtype=np.uint8).reshape(2, 6)
    return Case(
        model,
        [
            Call([image]),
            Call([image[:1]]),
            Call([normal(2, 6, seed=1)], pipeline="plain"),
            Call([normal(3, 6, seed=2)], pipeline="plain"),
            Call([normal(4, seed=3)], function="options"),
        ],
    )


# --- writing


def write(name: str, made: Case, folder: pathlib.Path) -> None:
    """Saves a case, and what comes of its calls once the package is loaded."""
    (folder / "leaves").mkdir(parents=True)
    made.model.save(folder / "package.obm", progress=False, max_file_bytes=made.max_file_bytes)
    listing = []
    for own, weights in made.model.weights.items():
        for leaf, lazy in weights.flat.items():
            spec = lazy.spec
            entry = {"weights": own, "leaf": leaf, "dtype": spec.kind.name, "shape": list(lazy.shape)}
            for fact in ("partition", "memory_kind", "logical_axes"):
                if getattr(spec, fact) is not None:
                    entry[fact] = str(getattr(spec, fact))
            if spec.kind.storage:
                entry["file"] = f"{len(listing):03d}.npy"
                np.save(folder / "leaves" / entry["file"], calls.plain(np.asarray(lazy)), allow_pickle=False)
            listing.append(entry)
    (folder / "leaves.json").write_text(json.dumps(listing, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if not listing:
        (folder / "leaves").rmdir()
    inputs: dict[str, np.ndarray] = {}
    content: dict[str, Any] = {"made_with": calls.made_with(), "calls": []}
    for n, call in enumerate(made.calls):
        target = {"function": call.function} if call.function else {"pipeline": call.pipeline}
        args = [calls.encode(value, f"in.{n}.{m}", inputs) for m, value in enumerate(call.args)]
        kwargs = {key: calls.encode(value, f"in.{n}.{key}", inputs) for key, value in call.kwargs.items()}
        own = {**target, "args": args, "kwargs": kwargs, "order": call.order, "mesh": call.mesh}
        content["calls"].append(own)
    told = folder / "calls.json"
    told.write_text(json.dumps(content), encoding="utf-8")
    results, entries = calls.run(folder, "auto", inputs)
    for own, entry in zip(content["calls"], entries, strict=True):
        own["results"] = entry
    told.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if inputs:
        np.savez_compressed(folder / "calls.npz", **inputs, **results)


def main() -> None:
    here = "--devices" in sys.argv
    for name, make in (ON_DEVICES if here else CASES).items():
        folder = HERE / FORMAT / f"jax-{jax.__version__}" / name
        if folder.exists():
            print(f"{folder.relative_to(HERE)} is there and stays as it is")
            continue
        try:
            write(name, make(), folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        print(f"made {folder.relative_to(HERE)}", flush=True)
    if not here:
        flags = f"--xla_force_host_platform_device_count={DEVICES}"
        command = [sys.executable, __file__, "--devices"]
        subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, check=True)


if __name__ == "__main__":
    main()
