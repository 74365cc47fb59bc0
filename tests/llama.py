"""Checkpoints in the form of Hugging Face's Llama: real names, Linear kernels as (out, in), two files and an index."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

NAMES = {
    "model.embed_tokens.weight": "embed.embedding",
    "model.layers.{layer}.self_attn.{projection}_proj.weight": "layers.attention.{projection}.kernel",
    "model.layers.{layer}.mlp.{projection}_proj.weight": "layers.mlp.{projection}.kernel",
    "model.layers.{layer}.input_layernorm.weight": "layers.attention_norm.scale",
    "model.layers.{layer}.post_attention_layernorm.weight": "layers.mlp_norm.scale",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "head.kernel",
    "model.layers.{layer}.self_attn.rotary_emb.inv_freq": None,
}
TRANSFORM = {"*_proj.weight": "transpose", "lm_head.weight": "transpose"}


def tensors(layers: int, hidden: int, vocabulary: int) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a model, with grouped query attention, in the order in which they are saved."""
    random = np.random.default_rng(0)

    def of(*shape: int) -> np.ndarray[Any, Any]:
        # Distinct finite values, cheaply made: any bits but those of infinities and NaNs.
        return (random.integers(0, 1 << 16, shape, np.uint16) & 0xBFFF).view(BFLOAT16)

    found = {"model.embed_tokens.weight": of(vocabulary, hidden)}
    for n in range(layers):
        at = f"model.layers.{n}"
        for name, size in (("q", hidden), ("k", hidden // 4), ("v", hidden // 4), ("o", hidden)):
            found[f"{at}.self_attn.{name}_proj.weight"] = of(size, hidden)
        for name, shape in (("gate", (2, 1)), ("up", (2, 1)), ("down", (1, 2))):
            found[f"{at}.mlp.{name}_proj.weight"] = of(shape[0] * hidden, shape[1] * hidden)
        for name in ("input", "post_attention"):
            found[f"{at}.{name}_layernorm.weight"] = of(hidden)
        found[f"{at}.self_attn.rotary_emb.inv_freq"] = np.arange(32, dtype=np.float32)
    return found | {"model.norm.weight": of(hidden), "lm_head.weight": of(vocabulary, hidden)}


def save(folder: pathlib.Path, found: dict[str, np.ndarray[Any, Any]]) -> None:
    """Writes two files and their index; a layer is partly in each."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(found)
    half = len(names) // 2 + 3
    weight_map = {}
    for number, own in enumerate((names[:half], names[half:])):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: found[name] for name in own}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    total = sum(value.nbytes for value in found.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def converted(found: dict[str, np.ndarray[Any, Any]], layers: int) -> dict[str, Any]:
    """What a plain conversion makes of it."""

    def stacked(name: str) -> np.ndarray[Any, Any]:
        return np.stack([found[f"model.layers.{n}.{name}.weight"] for n in range(layers)])

    def kernels(module: str, names: str) -> dict[str, Any]:
        return {n: {"kernel": stacked(f"{module}.{n}_proj").transpose(0, 2, 1)} for n in names.split()}

    return {
        "embed": {"embedding": found["model.embed_tokens.weight"]},
        "layers": {
            "attention": kernels("self_attn", "q k v o"),
            "mlp": kernels("mlp", "gate up down"),
            "attention_norm": {"scale": stacked("input_layernorm")},
            "mlp_norm": {"scale": stacked("post_attention_layernorm")},
        },
        "norm": {"scale": found["model.norm.weight"]},
        "head": {"kernel": found["lm_head.weight"].T},
    }
