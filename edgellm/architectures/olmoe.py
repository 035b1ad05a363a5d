"""OLMoE (arXiv:2409.02060): mixture of experts, and a norm over all queries and all keys of a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgellm.architectures import LayerCache
from edgellm.architectures.llama import model_shapes
from edgellm.config import DecoderConfig, integer, one_of, require, sizes_from_gguf, sizes_from_hf, sizes_to_gguf, truth
from edgellm.errors import CheckpointError
from edgellm.ops import Ops, X
from edgellm.rope import attention_factor, frequencies, rope_from_gguf, rope_from_hf, rope_to_gguf
from edgellm.tensor import Weights

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "OLMoE"

HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "layers.{}.attn_norm": "model.layers.{}.input_layernorm.weight",
    "layers.{}.q": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers.{}.k": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "layers.{}.v": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.o": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.router": "model.layers.{}.mlp.gate.weight",
    "layers.{}.experts.{}.gate": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
    "layers.{}.experts.{}.up": "model.layers.{}.mlp.experts.{}.up_proj.weight",
    "layers.{}.experts.{}.down": "model.layers.{}.mlp.experts.{}.down_proj.weight",
    "norm": "model.norm.weight",
    "output": "lm_head.weight",
}

GGUF_NAMES = {
    "embed": "token_embd.weight",
    "layers.{}.attn_norm": "blk.{}.attn_norm.weight",
    "layers.{}.q": "blk.{}.attn_q.weight",
    "layers.{}.q_norm": "blk.{}.attn_q_norm.weight",
    "layers.{}.k": "blk.{}.attn_k.weight",
    "layers.{}.k_norm": "blk.{}.attn_k_norm.weight",
    "layers.{}.v": "blk.{}.attn_v.weight",
    "layers.{}.o": "blk.{}.attn_output.weight",
    "layers.{}.ffn_norm": "blk.{}.ffn_norm.weight",
    "layers.{}.router": "blk.{}.ffn_gate_inp.weight",
    "layers.{}.experts.{}.gate": "blk.{}.ffn_gate_exps.weight",
    "layers.{}.experts.{}.up": "blk.{}.ffn_up_exps.weight",
    "layers.{}.experts.{}.down": "blk.{}.ffn_down_exps.weight",
    "norm": "output_norm.weight",
    "output": "output.weight",
}

GGUF_INTERLEAVED = ()

STACKED = {"layers.{}.experts.{}.gate_up": ("layers.{}.experts.{}.gate", "layers.{}.experts.{}.up")}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """ffn_size is that of one expert."""

    n_experts: int
    n_experts_used: int
    normalize: bool
    """Whether the shares of the experts used add up to 1."""
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        frequencies(self.head_dim, self.rope_theta, self.rope_scaling, self.context_length)
        attention_factor(self.rope_scaling)
        if self.n_experts_used > self.n_experts:
            raise CheckpointError(f"config has n_experts_used = {self.n_experts_used} of {self.n_experts} experts")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        one_of(config, "hidden_act", ["silu"], "silu")
        require(config, "attention_bias", False)
        require(config, "clip_qkv", None)
        return cls(
            **sizes_from_hf(config),
            **rope_from_hf(config),
            n_experts=integer(config, "num_experts", config.get("num_local_experts")),
            n_experts_used=integer(config, "num_experts_per_tok"),
            normalize=truth(config, "norm_topk_prob", False),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        require(metadata, "attention.clamp_kqv", None)
        return cls(
            **sizes_from_gguf(metadata),
            **rope_from_gguf(metadata),
            n_experts=integer(metadata, "expert_count"),
            n_experts_used=integer(metadata, "expert_used_count"),
            normalize=False,
        )

    @classmethod
    def tiny(cls) -> Self:
        return cls(
            vocab_size=97,
            hidden_size=72,
            ffn_size=40,
            n_layers=2,
            n_heads=6,
            n_kv_heads=2,
            head_dim=12,
            context_length=64,
            norm_eps=1e-5,
            n_experts=5,
            n_experts_used=2,
            normalize=False,
            rope_theta=10000.0,
        )


def to_gguf(config: Config) -> dict[str, Any]:
    """GGUF metadata, of which from_gguf makes this config again."""
    return {
        **sizes_to_gguf(config),
        **rope_to_gguf(config.head_dim, config.rope_theta, config.rope_scaling),
        "expert_count": config.n_experts,
        "expert_used_count": config.n_experts_used,
    }


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    return moe_shapes(config, q_norm=config.n_heads * config.head_dim, k_norm=config.n_kv_heads * config.head_dim)


def moe_shapes(config: Config, q_norm: int, k_norm: int) -> dict[str, tuple[int, ...]]:
    hidden, q, kv = config.hidden_size, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "q": (q, hidden),
        "q_norm": (q_norm,),
        "k": (kv, hidden),
        "k_norm": (k_norm,),
        "v": (kv, hidden),
        "o": (hidden, q),
        "ffn_norm": (hidden,),
        "router": (config.n_experts, hidden),
    }
    for e in range(config.n_experts):
        layer[f"experts.{e}.gate_up"] = (2 * config.ffn_size, hidden)
        layer[f"experts.{e}.down"] = (hidden, config.ffn_size)
    return model_shapes(config, layer)


def pairs(config: Config) -> dict[str, int]:
    return {"q": config.head_dim // 2, "k": config.head_dim // 2, "gate_up": config.ffn_size}


def caches(config: Config) -> list[LayerCache]:
    return [LayerCache(config.n_kv_heads, config.head_dim)] * config.n_layers


def forward(config: Config, weights: Weights, ops: Ops[X]) -> X:
    """The step's rows -> logits of those that want them, (wanted rows, vocab_size)."""
    angles = frequencies(config.head_dim, config.rope_theta, config.rope_scaling, config.context_length)
    scale = config.head_dim**-0.5 * attention_factor(config.rope_scaling) ** 2  # of queries and of keys
    x = ops.embed(weights.embed)
    for i in range(config.n_layers):
        layer = weights.layer(i)
        h = ops.rms_norm(x, layer.attn_norm, config.norm_eps)
        q = ops.rms_norm(ops.linear(h, layer.q), layer.q_norm, config.norm_eps)
        k = ops.rms_norm(ops.linear(h, layer.k), layer.k_norm, config.norm_eps)
        q, k = ops.rope(q, config.head_dim, angles), ops.rope(k, config.head_dim, angles)
        h = ops.attention(q, k, ops.linear(h, layer.v), i, scale=scale)
        x = ops.add(x, ops.linear(h, layer.o))
        h = ops.rms_norm(x, layer.ffn_norm, config.norm_eps)
        experts = [layer.expert(e) for e in range(config.n_experts)]
        gate_up, down = [e.gate_up for e in experts], [e.down for e in experts]
        x = ops.add(x, ops.experts(h, layer.router, gate_up, down, config.n_experts_used, "silu", config.normalize))
    x = ops.rms_norm(x, weights.norm, config.norm_eps)
    return ops.logits(x, weights.embed if config.tie_embeddings else weights.output)
