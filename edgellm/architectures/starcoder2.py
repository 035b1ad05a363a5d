"""StarCoder 2 (arXiv:2402.19173): LayerNorm and biases throughout, an MLP without a gate, a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgellm.architectures import LayerCache
from edgellm.architectures.gpt2 import biased_shapes
from edgellm.config import DecoderConfig, one_of, require, sizes_from_gguf, sizes_from_hf, sizes_to_gguf
from edgellm.ops import Ops, X
from edgellm.rope import attention_factor, frequencies, rope_from_gguf, rope_from_hf, rope_to_gguf
from edgellm.tensor import Weights

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "StarCoder 2"

HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "layers.{}.attn_norm": "model.layers.{}.input_layernorm.weight",
    "layers.{}.attn_norm_bias": "model.layers.{}.input_layernorm.bias",
    "layers.{}.q": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers.{}.k": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers.{}.v": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers.{}.o": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.o_bias": "model.layers.{}.self_attn.o_proj.bias",
    "layers.{}.ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.ffn_norm_bias": "model.layers.{}.post_attention_layernorm.bias",
    "layers.{}.up": "model.layers.{}.mlp.c_fc.weight",
    "layers.{}.up_bias": "model.layers.{}.mlp.c_fc.bias",
    "layers.{}.down": "model.layers.{}.mlp.c_proj.weight",
    "layers.{}.down_bias": "model.layers.{}.mlp.c_proj.bias",
    "norm": "model.norm.weight",
    "norm_bias": "model.norm.bias",
    "output": "lm_head.weight",
}

GGUF_NAMES = {
    "embed": "token_embd.weight",
    "layers.{}.attn_norm": "blk.{}.attn_norm.weight",
    "layers.{}.attn_norm_bias": "blk.{}.attn_norm.bias",
    "layers.{}.q": "blk.{}.attn_q.weight",
    "layers.{}.q_bias": "blk.{}.attn_q.bias",
    "layers.{}.k": "blk.{}.attn_k.weight",
    "layers.{}.k_bias": "blk.{}.attn_k.bias",
    "layers.{}.v": "blk.{}.attn_v.weight",
    "layers.{}.v_bias": "blk.{}.attn_v.bias",
    "layers.{}.o": "blk.{}.attn_output.weight",
    "layers.{}.o_bias": "blk.{}.attn_output.bias",
    "layers.{}.ffn_norm": "blk.{}.ffn_norm.weight",
    "layers.{}.ffn_norm_bias": "blk.{}.ffn_norm.bias",
    "layers.{}.up": "blk.{}.ffn_up.weight",
    "layers.{}.up_bias": "blk.{}.ffn_up.bias",
    "layers.{}.down": "blk.{}.ffn_down.weight",
    "layers.{}.down_bias": "blk.{}.ffn_down.bias",
    "norm": "output_norm.weight",
    "norm_bias": "output_norm.bias",
    "output": "output.weight",
}

GGUF_INTERLEAVED = ()

STACKED: dict[str, tuple[str, ...]] = {}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = None
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        frequencies(self.head_dim, self.rope_theta, self.rope_scaling, self.context_length)
        attention_factor(self.rope_scaling)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        one_of(config, "hidden_act", ["gelu_pytorch_tanh"], "gelu_pytorch_tanh")
        require(config, "use_bias", True)
        return cls(
            **sizes_from_hf({"tie_word_embeddings": True, **config}, "norm_epsilon"),
            **rope_from_hf(config),
            sliding_window=config.get("sliding_window"),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        return cls(
            **sizes_from_gguf(metadata, "attention.layer_norm_epsilon"),
            **rope_from_gguf(metadata),
            sliding_window=metadata.get("attention.sliding_window"),
        )

    @classmethod
    def tiny(cls) -> Self:
        return cls(
            vocab_size=97,
            hidden_size=72,
            ffn_size=104,
            n_layers=2,
            n_heads=6,
            n_kv_heads=2,
            head_dim=12,
            context_length=64,
            norm_eps=1e-5,
            rope_theta=10000.0,
            sliding_window=11,
        )


def to_gguf(config: Config) -> dict[str, Any]:
    """GGUF metadata, of which from_gguf makes this config again."""
    window = {} if config.sliding_window is None else {"attention.sliding_window": config.sliding_window}
    return {
        **sizes_to_gguf(config, "attention.layer_norm_epsilon"),
        **rope_to_gguf(config.head_dim, config.rope_theta, config.rope_scaling),
        **window,
    }


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    return biased_shapes(config)


def pairs(config: Config) -> dict[str, int]:
    return {"q": config.head_dim // 2, "k": config.head_dim // 2}


def caches(config: Config) -> list[LayerCache]:
    return [LayerCache(config.n_kv_heads, config.head_dim, config.sliding_window)] * config.n_layers


def forward(config: Config, weights: Weights, ops: Ops[X]) -> X:
    """The step's rows -> logits of those that want them, (wanted rows, vocab_size)."""
    angles = frequencies(config.head_dim, config.rope_theta, config.rope_scaling, config.context_length)
    scale = config.head_dim**-0.5 * attention_factor(config.rope_scaling) ** 2  # of queries and of keys
    x = ops.embed(weights.embed)
    for i in range(config.n_layers):
        layer = weights.layer(i)
        h = ops.layer_norm(x, layer.attn_norm, layer.attn_norm_bias, config.norm_eps)
        q = ops.rope(ops.linear(h, layer.q, layer.q_bias), config.head_dim, angles)
        k = ops.rope(ops.linear(h, layer.k, layer.k_bias), config.head_dim, angles)
        v = ops.linear(h, layer.v, layer.v_bias)
        h = ops.attention(q, k, v, i, scale=scale)
        x = ops.add(x, ops.linear(h, layer.o, layer.o_bias))
        h = ops.layer_norm(x, layer.ffn_norm, layer.ffn_norm_bias, config.norm_eps)
        h = ops.activate(ops.linear(h, layer.up, layer.up_bias), "gelu_tanh")
        x = ops.add(x, ops.linear(h, layer.down, layer.down_bias))
    x = ops.layer_norm(x, weights.norm, weights.norm_bias, config.norm_eps)
    return ops.logits(x, weights.embed if config.tie_embeddings else weights.output)
