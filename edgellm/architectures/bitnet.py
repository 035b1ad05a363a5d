"""BitNet b1.58 2B4T (arXiv:2504.12285): Llama with squared ReLU, and norms before the projections back.

Its matrices are ternary. The released model rounds activations to 8 bits for each token; here they are float32, which
is what those stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from edgellm.architectures import LayerCache
from edgellm.architectures.llama import model_shapes
from edgellm.config import DecoderConfig, one_of, require, sizes_from_gguf, sizes_from_hf
from edgellm.ops import Activation, Ops, X, activation_from_hf
from edgellm.rope import attention_factor, frequencies, rope_from_gguf, rope_from_hf
from edgellm.tensor import Weights

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "BitNet b1.58 2B4T"

HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "layers.{}.attn_norm": "model.layers.{}.input_layernorm.weight",
    "layers.{}.q": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.k": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.v": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attn_sub_norm": "model.layers.{}.self_attn.attn_sub_norm.weight",
    "layers.{}.o": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.up": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.ffn_sub_norm": "model.layers.{}.mlp.ffn_sub_norm.weight",
    "layers.{}.down": "model.layers.{}.mlp.down_proj.weight",
    "norm": "model.norm.weight",
    "output": "lm_head.weight",
}

GGUF_NAMES = {
    "embed": "token_embd.weight",
    "layers.{}.attn_norm": "blk.{}.attn_norm.weight",
    "layers.{}.q": "blk.{}.attn_q.weight",
    "layers.{}.k": "blk.{}.attn_k.weight",
    "layers.{}.v": "blk.{}.attn_v.weight",
    "layers.{}.attn_sub_norm": "blk.{}.attn_sub_norm.weight",
    "layers.{}.o": "blk.{}.attn_output.weight",
    "layers.{}.ffn_norm": "blk.{}.ffn_norm.weight",
    "layers.{}.gate": "blk.{}.ffn_gate.weight",
    "layers.{}.up": "blk.{}.ffn_up.weight",
    "layers.{}.ffn_sub_norm": "blk.{}.ffn_sub_norm.weight",
    "layers.{}.down": "blk.{}.ffn_down.weight",
    "norm": "output_norm.weight",
    "output": "output.weight",
}

GGUF_INTERLEAVED = ()

GGUF_ARCHITECTURE = "bitnet-b1.58"

STACKED = {"layers.{}.gate_up": ("layers.{}.gate", "layers.{}.up")}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = None
    activation: Activation = "relu2"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(vars(self), "activation", get_args(Activation))
        frequencies(self.head_dim, self.rope_theta, self.rope_scaling, self.context_length)
        attention_factor(self.rope_scaling)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        require(config, "attention_bias", False)
        return cls(
            **sizes_from_hf(config),
            **rope_from_hf(config, 500000.0),
            activation=activation_from_hf(config, "hidden_act", "relu2"),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """Files of the architecture "bitnet" hold models from before 2B4T, whose MLP is Llama's but for the norm."""
        activation: Activation = "relu2" if metadata["architecture"] == GGUF_ARCHITECTURE else "silu"
        return cls(**sizes_from_gguf(metadata), **rope_from_gguf(metadata), activation=activation)

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
            rope_theta=500000.0,
        )


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, ffn = config.hidden_size, config.ffn_size
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "q": (q, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "attn_sub_norm": (q,),
        "o": (hidden, q),
        "ffn_norm": (hidden,),
        "gate_up": (2 * ffn, hidden),
        "ffn_sub_norm": (ffn,),
        "down": (hidden, ffn),
    }
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
        q = ops.rope(ops.linear(h, layer.q), config.head_dim, angles)
        k = ops.rope(ops.linear(h, layer.k), config.head_dim, angles)
        h = ops.attention(q, k, ops.linear(h, layer.v), i, scale=scale)
        h = ops.rms_norm(h, layer.attn_sub_norm, config.norm_eps)
        x = ops.add(x, ops.linear(h, layer.o))
        h = ops.rms_norm(x, layer.ffn_norm, config.norm_eps)
        h = ops.glu(ops.linear(h, layer.gate_up), config.activation)
        h = ops.rms_norm(h, layer.ffn_sub_norm, config.norm_eps)
        x = ops.add(x, ops.linear(h, layer.down))
    x = ops.rms_norm(x, weights.norm, config.norm_eps)
    return ops.logits(x, weights.embed if config.tie_embeddings else weights.output)
