"""A checkpoint in Hugging Face's layout, used by a JAX model whose layers are stacked: opened, sharded, run, packaged.

python examples/llama_from_huggingface.py --out demo

The checkpoint is a tiny one that is made here, with Llama's names, shapes and files. On a machine with one CPU,
XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight devices of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

import obmlite

LAYERS, WIDTH, HEADS, KEY_HEADS, VOCABULARY = 3, 64, 8, 4, 96
HEAD = WIDTH // HEADS

# Where each tensor goes. "{layer}" is not in the path: the layers are stacked along a new first dimension.
NAMES = {
    "model.embed_tokens.weight": "embed",
    "model.layers.{layer}.self_attn.{name}_proj.weight": "layers.attention.{name}",
    "model.layers.{layer}.mlp.{name}_proj.weight": "layers.mlp.{name}",
    "model.layers.{layer}.input_layernorm.weight": "layers.attention.norm",
    "model.layers.{layer}.post_attention_layernorm.weight": "layers.mlp.norm",
    "model.norm.weight": "norm",
    "lm_head.weight": "head",
}

# What is changed on the way: PyTorch's Linear has its weights as (out, in); attention here wants its heads apart.
TRANSFORM = {
    "*.[qkv]_proj.weight": lambda _, x: x.reshape(-1, HEAD, WIDTH).transpose(2, 0, 1),
    "*.o_proj.weight": lambda _, x: x.T.reshape(-1, HEAD, WIDTH),
    "*_proj.weight": "transpose",
    "lm_head.weight": "transpose",
}


def make_checkpoint(folder: Path) -> None:
    """Writes what the hub would have: two files and their index."""
    random = np.random.default_rng(0)

    def weight(*shape: int) -> Any:
        return (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(ml_dtypes.bfloat16)

    tensors = {"model.embed_tokens.weight": weight(VOCABULARY, WIDTH)}
    for n in range(LAYERS):
        for name, heads in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS), ("o", HEADS)):
            tensors[f"model.layers.{n}.self_attn.{name}_proj.weight"] = weight(heads * HEAD, WIDTH)
        for name, shape in (("gate", (2 * WIDTH, WIDTH)), ("up", (2 * WIDTH, WIDTH)), ("down", (WIDTH, 2 * WIDTH))):
            tensors[f"model.layers.{n}.mlp.{name}_proj.weight"] = weight(*shape)
        for name in ("input", "post_attention"):
            tensors[f"model.layers.{n}.{name}_layernorm.weight"] = 1 + weight(WIDTH)
    tensors |= {"model.norm.weight": 1 + weight(WIDTH), "lm_head.weight": weight(VOCABULARY, WIDTH)}
    folder.mkdir(parents=True, exist_ok=True)
    names, weight_map = list(tensors), {}
    for n, own in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"model-{n + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def norm(scale: jax.Array, x: jax.Array) -> jax.Array:
    return scale * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def rotary(x: jax.Array) -> jax.Array:
    """Turns pairs of dimensions of x (position, heads, size) by angles that grow with the position."""
    frequency = 10_000 ** (-jnp.arange(0, HEAD, 2) / HEAD)
    angle = jnp.arange(x.shape[0])[:, None, None] * frequency
    one, other = jnp.split(x, 2, axis=-1)
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([one * cosine - other * sine, other * cosine + one * sine], axis=-1)


def apply(params: Any, tokens: jax.Array) -> jax.Array:
    """Logits (position, vocabulary) of tokens (position)."""

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        attention, mlp = p["attention"], p["mlp"]
        h = norm(attention["norm"], x)
        q, k, v = (jnp.einsum("td,dhk->thk", h, attention[name]) for name in "qkv")
        mixed = jax.nn.dot_product_attention(rotary(q), rotary(k), v, is_causal=True)
        x = x + jnp.einsum("thk,hkd->td", mixed, attention["o"])
        h = norm(mlp["norm"], x)
        return x + (jax.nn.silu(h @ mlp["gate"]) * (h @ mlp["up"])) @ mlp["down"], None

    x, _ = jax.lax.scan(layer, params["embed"][tokens], params["layers"])
    return norm(params["norm"], x) @ params["head"]


def main(out: Path) -> int:
    make_checkpoint(out / "checkpoint")
    weights = obmlite.open_weights(out / "checkpoint", names=NAMES, transform=TRANSFORM)
    print(weights)  # names and shapes; nothing was read yet

    # Straight onto the devices: each reads its own bytes, transposed and stacked on the way, as float32.
    mesh = jax.make_mesh((len(jax.devices()),), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(name: str, spec: Any) -> NamedSharding:
        axis = {"o": 1, "down": 1, "embed": 1, "norm": None}.get(name.split(".")[-1], 2 if "layers" in name else 1)
        split = axis is not None and spec.shape[axis] % mesh.size == 0
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "model") if split else PartitionSpec())

    params = weights.restore(shardings=place, dtype="float32")
    print("q:", params["layers"]["attention"]["q"].shape, params["layers"]["attention"]["q"].sharding.spec)
    tokens = jnp.array([5, 17, 3, 88, 42, 0, 9, 64])
    logits = jax.jit(apply)(params, tokens)

    # A package of the function and the weights, which needs neither this file nor the checkpoint.
    obmlite.Model.from_function(apply, params, tokens).save(out / "llama.obm", overwrite=True)
    again = obmlite.load(out / "llama.obm")(tokens)
    good = logits.shape == (len(tokens), VOCABULARY) and np.allclose(again, logits, rtol=1e-3, atol=1e-4)
    print(f"logits {logits.shape} equal from the package: {'yes' if good else 'no'}")
    return int(not good)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"))
    sys.exit(main(parser.parse_args().out))
