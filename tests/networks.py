"""Small networks of the kinds that people export, in JAX alone, so that they run on every release of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import obmlite

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A function, what to export it with, and what to call it with.

    Attributes:
      fn: the function.
      weights: its first arguments, by name in their order.
      inputs: its other positional arguments, likewise.
      symbolic: those of the inputs whose leaves all begin with the batch.
      static: keyword arguments that only decide what is computed.
      donated: inputs that the function's own jit donates.
      options: what else to export with.
    """

    fn: Callable[..., Any]
    weights: Mapping[str, Tree] = dataclasses.field(default_factory=dict)
    inputs: Mapping[str, Tree]
    symbolic: tuple[str, ...] = ()
    static: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    donated: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def model(self, **options: Any) -> obmlite.Model:
        """The network as a model, with its first derivative."""
        specs = [
            jax.tree.map(_with_symbolic_batch, value) if name in self.symbolic else value
            for name, value in self.inputs.items()
        ]
        return obmlite.Model.from_function(
            self.fn,
            *self.weights.values(),
            *specs,
            kwargs=self.static,
            static=tuple(self.static),
            weights=tuple(self.weights) or None,
            **{"vjp_order": 1, **self.options, **options},
        )


def _with_symbolic_batch(leaf: Any) -> Any:
    dtype = str(obmlite.TensorSpec.of(leaf)).partition("[")[0]
    return obmlite.spec(f"{dtype}[{','.join(['b', *map(str, leaf.shape[1:])])}]")


class Draw:
    """Random arrays, the same each time."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def __call__(self, *shape: int, scale: float | None = None) -> jax.Array:
        scale = scale if scale is not None else 1 / np.sqrt(shape[0] if len(shape) > 1 else 10)
        return jnp.asarray(self._rng.normal(size=shape) * scale, "float32")

    def integers(self, high: int, *shape: int) -> jax.Array:
        return jnp.asarray(self._rng.integers(0, high, shape), "int32")


# --- a CNN with batch norm


def _batch_norm(params: Tree, stats: Tree, x: jax.Array, train: bool) -> tuple[jax.Array, Tree]:
    mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if train else (stats["mean"], stats["var"])
    y = (x - mean) * lax.rsqrt(var + 1e-5) * params["scale"] + params["bias"]
    return y, {"mean": 0.9 * stats["mean"] + 0.1 * mean, "var": 0.9 * stats["var"] + 0.1 * var} if train else stats


def cnn_apply(params: Tree, state: Tree, x: jax.Array, train: bool = False) -> tuple[jax.Array, Tree]:
    new = {}
    for layer in ("conv1", "conv2"):
        p = params[layer]
        x = lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x, new[layer] = _batch_norm(p["norm"], state[layer], x, train)
        x = lax.reduce_window(jax.nn.relu(x), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"], new


@functools.cache
def _trained_cnn() -> tuple[Tree, Tree]:
    draw = Draw(0)
    channels = (1, 4, 8)
    params: dict[str, Any] = {"head": {"kernel": draw(8, 10), "bias": jnp.zeros(10)}}
    state: dict[str, Any] = {}
    for n, layer in enumerate(("conv1", "conv2")):
        out = channels[n + 1]
        params[layer] = {
            "kernel": draw(3, 3, channels[n], out, scale=0.3),
            "norm": {"scale": jnp.ones(out), "bias": jnp.zeros(out)},
        }
        state[layer] = {"mean": jnp.zeros(out), "var": jnp.ones(out)}
    x, labels = draw(16, 12, 12, 1, scale=1.0) + 0.5, draw.integers(10, 16)

    def loss(params: Tree, state: Tree) -> tuple[jax.Array, Tree]:
        logits, state = cnn_apply(params, state, x, train=True)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean(), state

    @jax.jit
    def step(params: Tree, state: Tree) -> tuple[Tree, Tree]:
        gradient, state = jax.grad(loss, has_aux=True)(params, state)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), state

    for _ in range(5):
        params, state = step(params, state)
    return params, state


def cnn() -> Network:
    draw = Draw(1)
    params, state = _trained_cnn()
    return Network(
        fn=cnn_apply,
        weights={"params": params, "state": state},
        inputs={"x": draw(6, 12, 12, 1, scale=1.0)},
        symbolic=("x",),
        static={"train": False},
    )


def cnn_in_training() -> Network:
    """The same network as it is trained: batch statistics go in and come out."""
    draw = Draw(2)
    params, state = _trained_cnn()
    return Network(
        fn=cnn_apply,
        weights={"params": params, "state": state},
        inputs={"x": draw(6, 12, 12, 1, scale=1.0)},
        symbolic=("x",),
        static={"train": True},
        options={"platforms": "cpu"},
    )


# --- a transformer that decodes one token at a time


def _layer_norm(params: Tree, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]


@functools.partial(jax.jit, donate_argnames=("cache",))
def transformer_step(params: Tree, cache: Tree, tokens: jax.Array, position: Any) -> tuple[jax.Array, Tree]:
    """(params, cache of [b, length, heads, d] per layer, tokens [b], position) → (logits [b, vocabulary], cache)."""
    x = params["embed"][tokens] + params["positions"][position]
    new = []
    for layer, old in zip(params["layers"], cache, strict=True):
        h = _layer_norm(layer["norm1"], x)
        q, k, v = (jnp.einsum("bm,mhd->bhd", h, layer[n]) for n in ("q", "k", "v"))
        keys, values = (
            lax.dynamic_update_slice_in_dim(held, now[:, None].astype(held.dtype), position, 1)
            for held, now in ((old["k"], k), (old["v"], v))
        )
        scores = jnp.einsum("bhd,bthd->bht", q, keys, preferred_element_type="float32") / np.sqrt(q.shape[-1])
        seen = jnp.arange(keys.shape[1]) <= position
        attention = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
        x = x + jnp.einsum("bht,bthd,hdm->bm", attention, values, layer["o"])
        h = _layer_norm(layer["norm2"], x)
        x = x + jax.nn.gelu(h @ layer["up"]) @ layer["down"]
        new.append({"k": keys, "v": values})
    return _layer_norm(params["norm"], x) @ params["embed"].T, new


def transformer(length: int = 12) -> Network:
    draw = Draw(3)
    model, heads, d, vocabulary, batch = 16, 2, 8, 32, 3

    def norm() -> Tree:
        return {"scale": 1 + 0.1 * draw(model), "bias": 0.1 * draw(model)}

    params = {
        "embed": draw(vocabulary, model, scale=0.5),
        "positions": draw(length, model, scale=0.5),
        "norm": norm(),
        "layers": [
            {
                **{n: draw(model, heads, d) for n in ("q", "k", "v")},
                "o": draw(heads, d, model),
                "up": draw(model, 4 * model),
                "down": draw(4 * model, model),
                "norm1": norm(),
                "norm2": norm(),
            }
            for _ in range(2)
        ],
    }
    cache = [{n: jnp.zeros((batch, length, heads, d)) for n in ("k", "v")} for _ in range(2)]
    step = jax.jit(transformer_step.__wrapped__)  # a prompt, so that the cache holds something
    for position in range(4):
        _, cache = step(params, cache, draw.integers(vocabulary, batch), position)
    return Network(
        fn=transformer_step,
        weights={"params": params},
        inputs={"cache": cache, "tokens": draw.integers(vocabulary, batch), "position": jnp.int32(4)},
        symbolic=("cache", "tokens"),
        donated=("cache",),
    )


# --- an LSTM


def lstm_apply(params: Tree, x: jax.Array) -> dict[str, Any]:
    """x: [b, time, features]."""

    def step(carry: Tree, now: jax.Array) -> tuple[Tree, jax.Array]:
        c, h = carry
        i, f, g, o = jnp.split(now @ params["input"] + h @ params["hidden"] + params["bias"], 4, axis=-1)
        c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    start = jnp.zeros((x.shape[0], params["hidden"].shape[0]))
    last, hidden = lax.scan(step, (start, start), x.swapaxes(0, 1))
    return {"last": last, "outputs": hidden.swapaxes(0, 1) @ params["head"]}


def lstm() -> Network:
    draw = Draw(4)
    params = {"input": draw(5, 32), "hidden": draw(8, 32), "bias": 0.1 * draw(32), "head": draw(8, 3)}
    return Network(fn=lstm_apply, weights={"params": params}, inputs={"x": draw(4, 9, 5)}, symbolic=("x",))


# --- a mixture of experts


def experts_apply(params: Tree, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row goes to its two best experts: (results, which experts)."""
    gates = jax.nn.softmax(x @ params["router"])
    best, which = lax.top_k(gates, 2)
    best = best / best.sum(-1, keepdims=True)
    hidden = jax.nn.silu(jnp.einsum("bm,bkmh->bkh", x, params["up"][which]))
    return jnp.einsum("bk,bkh,bkhm->bm", best, hidden, params["down"][which]), which


def mixture_of_experts() -> Network:
    draw = Draw(5)
    params = {"router": draw(6, 4), "up": draw(4, 6, 12), "down": draw(4, 12, 6)}
    return Network(fn=experts_apply, weights={"params": params}, inputs={"x": draw(7, 6, scale=1.0)}, symbolic=("x",))


# --- FFT, Cholesky and SVD


def spectral_apply(params: Tree, x: jax.Array) -> dict[str, jax.Array]:
    """x: [b, 8, 16]."""
    spectrum = jnp.fft.rfft(x, axis=-1) * params["filter"]
    y = jnp.fft.irfft(spectrum, n=x.shape[-1], axis=-1)
    gram = jnp.einsum("bij,bkj->bik", y, y) + 0.5 * jnp.eye(x.shape[1])
    factor = jnp.linalg.cholesky(gram)
    # Of x: XLA on CPU cannot lay out what both its FFT and LAPACK want.
    whitened = jax.scipy.linalg.solve_triangular(factor, x, lower=True)
    singular = jnp.linalg.svd(y @ params["mix"], compute_uv=False)
    return {"spectrum": spectrum, "whitened": whitened, "singular": singular}


def spectral() -> Network:
    draw = Draw(6)
    params = {"filter": (1 + draw(9)) * jnp.exp(1j * draw(9, scale=1.0)), "mix": draw(16, 4)}
    return Network(
        fn=spectral_apply,
        weights={"params": params},
        inputs={"x": draw(3, 8, 16, scale=1.0)},
        symbolic=("x",),
        options={"platforms": "cpu"},
    )


# --- dropout


def dropout_apply(params: Tree, x: jax.Array, key: jax.Array, *, rate: float) -> jax.Array:
    for n, layer in enumerate(params):
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
        keep = jax.random.bernoulli(jax.random.fold_in(key, n), 1 - rate, x.shape)
        x = jnp.where(keep, x / (1 - rate), 0)
    return x


def dropout() -> Network:
    draw = Draw(7)
    params = [{"w": draw(8, 8), "b": draw(8)} for _ in range(3)]
    return Network(
        fn=dropout_apply,
        weights={"params": params},
        inputs={"x": draw(5, 8, scale=1.0), "key": jax.random.key(42)},
        symbolic=("x",),
        static={"rate": 0.25},
    )


# --- two towers over one embedding


def two_tower_apply(params: Tree, query: jax.Array, document: jax.Array) -> jax.Array:
    def tower(own: Tree, tokens: jax.Array) -> jax.Array:
        pooled = own["embed"][tokens].mean(1)
        out = jnp.tanh(pooled @ own["w"])
        return out / jnp.linalg.norm(out, axis=-1, keepdims=True)

    return tower(params["query"], query) @ tower(params["document"], document).T


def two_tower() -> Network:
    draw = Draw(8)
    embed = draw(40, 12, scale=1.0)  # one array, twice in the parameters
    params = {name: {"embed": embed, "w": draw(12, 6)} for name in ("query", "document")}
    inputs = {"query": draw.integers(40, 4, 5), "document": draw.integers(40, 4, 7)}
    return Network(fn=two_tower_apply, weights={"params": params}, inputs=inputs, symbolic=("query", "document"))


# --- a network that holds its weights itself


class Recurrent:
    """Closes over everything: weights, a table that a scan looks up, and one that only an inner jit sees."""

    def __init__(self, draw: Draw) -> None:
        self.embed = draw(64, 16, scale=1.0)
        self.mix = draw(16, 32)
        self.table = draw(32, 16, scale=1.0)
        self.head = draw(16, 32)

        @jax.jit
        def classify(x: jax.Array) -> jax.Array:
            return jnp.tanh(x @ self.head) @ self.head.T

        self.classify = classify

    def __call__(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        def step(carry: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
            scores = (carry + self.embed[token]) @ self.mix
            carry = jnp.tanh(carry + self.table[jnp.argmax(scores, -1)])
            return carry, scores.max(-1)

        last, scores = lax.scan(step, x, tokens.T)
        return self.classify(last) + scores.mean(0)[:, None]


def closure() -> Network:
    draw = Draw(9)
    network = Recurrent(draw)

    def recur(tokens: jax.Array, x: jax.Array) -> jax.Array:
        return network(tokens, x)

    inputs = {"tokens": draw.integers(64, 4, 6), "x": draw(4, 16, scale=1.0)}
    return Network(fn=recur, inputs=inputs, symbolic=("tokens", "x"))


ALL: Mapping[str, Callable[[], Network]] = {
    f.__name__: f
    for f in (
        cnn,
        cnn_in_training,
        transformer,
        lstm,
        mixture_of_experts,
        spectral,
        dropout,
        two_tower,
        closure,
    )
}
