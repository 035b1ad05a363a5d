"""Granite 3: Llama with a multiplier at each place where values are of different sizes (arXiv:2405.04324)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgellm.architectures import llama
from edgellm.architectures.llama import GGUF_INTERLEAVED, GGUF_NAMES, HF_NAMES, STACKED, caches, pairs, shapes
from edgellm.config import number, require
from edgellm.ops import Ops, X
from edgellm.rope import attention_factor, frequencies
from edgellm.tensor import Weights

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "Granite 3"

__all__ = ["GGUF_INTERLEAVED", "GGUF_NAMES", "HF_NAMES", "STACKED", "Config", "caches", "pairs", "shapes"]


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    """What logits are divided by."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        return replace(
            super().from_hf(config),
            embedding_multiplier=number(config, "embedding_multiplier", 1.0),
            attention_multiplier=number(config, "attention_multiplier", 1.0),
            residual_multiplier=number(config, "residual_multiplier", 1.0),
            logits_scaling=number(config, "logits_scaling", 1.0),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        require(metadata, "rope.scaling.finetuned", True)  # false: no RoPE
        made = super().from_gguf(metadata)
        return replace(
            made,
            embedding_multiplier=number(metadata, "embedding_scale", 1.0),
            attention_multiplier=number(metadata, "attention.scale", made.head_dim**-0.5),
            residual_multiplier=number(metadata, "residual_scale", 1.0),
            logits_scaling=number(metadata, "logit_scale"),
        )

    @classmethod
    def tiny(cls) -> Self:
        return replace(
            super().tiny(),
            embedding_multiplier=12.0,
            attention_multiplier=0.0625,
            residual_multiplier=0.25,
            logits_scaling=0.5,
        )


def to_gguf(config: Config) -> dict[str, Any]:
    """GGUF metadata, of which from_gguf makes this config again."""
    return {
        **llama.to_gguf(config),
        "embedding_scale": config.embedding_multiplier,
        "attention.scale": config.attention_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


def forward(config: Config, weights: Weights, ops: Ops[X]) -> X:
    """The step's rows -> logits of those that want them, (wanted rows, vocab_size)."""
    angles = frequencies(config.head_dim, config.rope_theta, config.rope_scaling, config.context_length)
    scale = config.attention_multiplier * attention_factor(config.rope_scaling) ** 2
    x = ops.embed(weights.embed, config.embedding_multiplier)
    for i in range(config.n_layers):
        layer = weights.layer(i)
        h = ops.rms_norm(x, layer.attn_norm, config.norm_eps)
        q = ops.rope(ops.linear(h, layer.q, layer.get("q_bias")), config.head_dim, angles)
        k = ops.rope(ops.linear(h, layer.k, layer.get("k_bias")), config.head_dim, angles)
        v = ops.linear(h, layer.v, layer.get("v_bias"))
        h = ops.attention(q, k, v, i, scale=scale)
        x = ops.add(x, ops.linear(h, layer.o, layer.get("o_bias")), config.residual_multiplier)
        h = ops.rms_norm(x, layer.ffn_norm, config.norm_eps)
        h = ops.glu(ops.linear(h, layer.gate_up, layer.get("gate_up_bias")), "silu")
        x = ops.add(x, ops.linear(h, layer.down, layer.get("down_bias")), config.residual_multiplier)
    x = ops.rms_norm(x, weights.norm, config.norm_eps)
    head = weights.embed if config.tie_embeddings else weights.output
    return ops.logits(x, head, 1 / config.logits_scaling)
