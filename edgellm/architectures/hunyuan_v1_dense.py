"""Hunyuan's dense models: Llama whose queries and keys are normed after RoPE, each head by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgellm.architectures import llama
from edgellm.architectures.llama import STACKED, caches, pairs, to_gguf
from edgellm.architectures.qwen3 import GGUF_INTERLEAVED, GGUF_NAMES, shapes
from edgellm.config import integer, number
from edgellm.ops import Ops, X
from edgellm.rope import frequencies
from edgellm.tensor import Weights

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "Hunyuan 0.5B to 7B, Hunyuan-MT"

__all__ = ["GGUF_INTERLEAVED", "GGUF_NAMES", "STACKED", "Config", "caches", "pairs", "shapes", "to_gguf"]

HF_NAMES = {
    **llama.HF_NAMES,
    "layers.{}.q_norm": "model.layers.{}.self_attn.query_layernorm.weight",
    "layers.{}.k_norm": "model.layers.{}.self_attn.key_layernorm.weight",
}

GGUF_ARCHITECTURE = "hunyuan-dense"


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if "dynamic" in (rope.get("rope_type"), rope.get("type")) and rope.get("alpha"):
            config = {**config, "rope_parameters": with_fixed_base({**config, **rope})}
        return super().from_hf(config)


def with_fixed_base(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope parameters for what is called dynamic, but with an alpha: a larger base, whatever the context's length."""
    head_dim = integer(config, "head_dim", integer(config, "hidden_size") // integer(config, "num_attention_heads"))
    grown = number(config, "alpha") ** (head_dim / max(1, head_dim - 2))
    return {"rope_type": "default", "rope_theta": number(config, "rope_theta", 10000.0) * grown}


def forward(config: Config, weights: Weights, ops: Ops[X]) -> X:
    """The step's rows -> logits of those that want them, (wanted rows, vocab_size)."""
    angles = frequencies(config.head_dim, config.rope_theta, config.rope_scaling, config.context_length)
    x = ops.embed(weights.embed)
    for i in range(config.n_layers):
        layer = weights.layer(i)
        h = ops.rms_norm(x, layer.attn_norm, config.norm_eps)
        q = ops.rope(ops.linear(h, layer.q, layer.get("q_bias")), config.head_dim, angles)
        k = ops.rope(ops.linear(h, layer.k, layer.get("k_bias")), config.head_dim, angles)
        v = ops.linear(h, layer.v, layer.get("v_bias"))
        q = ops.rms_norm(q, layer.q_norm, config.norm_eps)
        k = ops.rms_norm(k, layer.k_norm, config.norm_eps)
        h = ops.attention(q, k, v, i, scale=config.head_dim**-0.5)
        x = ops.add(x, ops.linear(h, layer.o, layer.get("o_bias")))
        h = ops.rms_norm(x, layer.ffn_norm, config.norm_eps)
        x = ops.add(x, ops.linear(ops.glu(ops.linear(h, layer.gate_up), "silu"), layer.down))
    x = ops.rms_norm(x, weights.norm, config.norm_eps)
    return ops.logits(x, weights.embed if config.tie_embeddings else weights.output)
