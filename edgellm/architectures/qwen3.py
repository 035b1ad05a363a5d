"""Qwen 3: Llama whose queries and keys are normed, each head by itself (arXiv:2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgellm.architectures import llama
from edgellm.architectures.llama import STACKED, caches, pairs, to_gguf
from edgellm.architectures.qwen2 import windows_of_last_layers
from edgellm.ops import Ops, X
from edgellm.rope import attention_factor, frequencies
from edgellm.tensor import Weights

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "Qwen 3"

__all__ = ["STACKED", "Config", "caches", "pairs", "to_gguf"]

HF_NAMES = {
    **llama.HF_NAMES,
    "layers.{}.q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers.{}.k_norm": "model.layers.{}.self_attn.k_norm.weight",
}

GGUF_NAMES = {
    **llama.GGUF_NAMES,
    "layers.{}.q_norm": "blk.{}.attn_q_norm.weight",
    "layers.{}.k_norm": "blk.{}.attn_k_norm.weight",
}

GGUF_INTERLEAVED = ()


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        made = super().from_hf({"head_dim": 128, **config})
        return replace(made, **windows_of_last_layers(config, made.n_layers))


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    norms = {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    return llama.model_shapes(config, {**llama.layer_shapes(config), **norms})


def forward(config: Config, weights: Weights, ops: Ops[X]) -> X:
    """The step's rows -> logits of those that want them, (wanted rows, vocab_size)."""
    angles = frequencies(config.head_dim, config.rope_theta, config.rope_scaling, config.context_length)
    scale = config.head_dim**-0.5 * attention_factor(config.rope_scaling) ** 2
    x = ops.embed(weights.embed)
    for i in range(config.n_layers):
        layer = weights.layer(i)
        h = ops.rms_norm(x, layer.attn_norm, config.norm_eps)
        q = ops.rms_norm(ops.linear(h, layer.q, layer.get("q_bias")), layer.q_norm, config.norm_eps)
        k = ops.rms_norm(ops.linear(h, layer.k, layer.get("k_bias")), layer.k_norm, config.norm_eps)
        v = ops.linear(h, layer.v, layer.get("v_bias"))
        q, k = ops.rope(q, config.head_dim, angles), ops.rope(k, config.head_dim, angles)
        h = ops.attention(q, k, v, i, scale=scale)
        x = ops.add(x, ops.linear(h, layer.o, layer.get("o_bias")))
        h = ops.rms_norm(x, layer.ffn_norm, config.norm_eps)
        h = ops.glu(ops.linear(h, layer.gate_up), "silu")
        x = ops.add(x, ops.linear(h, layer.down))
    x = ops.rms_norm(x, weights.norm, config.norm_eps)
    return ops.logits(x, weights.embed if config.tie_embeddings else weights.output)
