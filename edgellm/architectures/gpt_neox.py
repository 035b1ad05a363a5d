"""GPT-NeoX (arXiv:2204.06745), Pythia: attention and MLP side by side, RoPE for a part of each head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from edgellm.architectures import LayerCache, Stored, gpt2
from edgellm.architectures.gpt2 import QKV, QKV_BIAS, biased_shapes
from edgellm.config import (
    DecoderConfig,
    integer,
    number,
    one_of,
    require,
    sizes_from_gguf,
    sizes_from_hf,
    sizes_to_gguf,
    truth,
)
from edgellm.errors import CheckpointError
from edgellm.ops import Activation, Ops, X, activation_from_hf
from edgellm.rope import attention_factor, frequencies, rope_from_gguf, rope_from_hf, rope_to_gguf
from edgellm.tensor import Weights

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "GPT-NeoX, Pythia"

HF_NAMES: dict[str, str | Stored] = {
    "embed": "gpt_neox.embed_in.weight",
    "layers.{}.attn_norm": "gpt_neox.layers.{}.input_layernorm.weight",
    "layers.{}.attn_norm_bias": "gpt_neox.layers.{}.input_layernorm.bias",
    **{name: Stored("gpt_neox.layers.{}.attention.query_key_value.weight", of=QKV, by_head=True) for name in QKV},
    **{
        name: Stored("gpt_neox.layers.{}.attention.query_key_value.bias", of=QKV_BIAS, by_head=True)
        for name in QKV_BIAS
    },
    "layers.{}.o": "gpt_neox.layers.{}.attention.dense.weight",
    "layers.{}.o_bias": "gpt_neox.layers.{}.attention.dense.bias",
    "layers.{}.ffn_norm": "gpt_neox.layers.{}.post_attention_layernorm.weight",
    "layers.{}.ffn_norm_bias": "gpt_neox.layers.{}.post_attention_layernorm.bias",
    "layers.{}.up": "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight",
    "layers.{}.up_bias": "gpt_neox.layers.{}.mlp.dense_h_to_4h.bias",
    "layers.{}.down": "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight",
    "layers.{}.down_bias": "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias",
    "norm": "gpt_neox.final_layer_norm.weight",
    "norm_bias": "gpt_neox.final_layer_norm.bias",
    "output": "embed_out.weight",
}

GGUF_NAMES = {name: stored for name, stored in gpt2.GGUF_NAMES.items() if name != "positions"}

GGUF_INTERLEAVED = ()

GGUF_ARCHITECTURE = "gptneox"

STACKED: dict[str, tuple[str, ...]] = {}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    activation: Activation
    parallel_residual: bool
    rotary_dim: int
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(vars(self), "activation", get_args(Activation))
        if self.rotary_dim > self.head_dim:
            raise CheckpointError(f"config has rotary_dim = {self.rotary_dim} in heads of {self.head_dim}")
        frequencies(self.rotary_dim, self.rope_theta, self.rope_scaling, self.context_length)
        attention_factor(self.rope_scaling)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        require(config, "attention_bias", True)
        sizes = sizes_from_hf({**config, "num_key_value_heads": None, "head_dim": None}, "layer_norm_eps")
        rope = config.get("rope_parameters") or {}
        part = number({**config, **rope}, "partial_rotary_factor", number(config, "rotary_pct", 0.25))
        return cls(
            **sizes,
            **rope_from_hf(config, number(config, "rotary_emb_base", 10000.0)),
            activation=activation_from_hf(config, "hidden_act", "gelu"),
            parallel_residual=truth(config, "use_parallel_residual", True),
            rotary_dim=int(sizes["head_dim"] * part),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        return cls(
            **sizes_from_gguf(metadata, "attention.layer_norm_epsilon"),
            **rope_from_gguf(metadata),
            activation="gelu",
            parallel_residual=truth(metadata, "use_parallel_residual", True),
            rotary_dim=integer(metadata, "rope.dimension_count"),
        )

    @classmethod
    def tiny(cls) -> Self:
        return cls(
            vocab_size=97,
            hidden_size=72,
            ffn_size=104,
            n_layers=2,
            n_heads=6,
            n_kv_heads=6,
            head_dim=12,
            context_length=64,
            norm_eps=1e-5,
            activation="gelu",
            parallel_residual=True,
            rotary_dim=6,
            rope_theta=10000.0,
        )


def to_gguf(config: Config) -> dict[str, Any]:
    """GGUF metadata, of which from_gguf makes this config again if its activation is GPT-NeoX's."""
    return {
        **sizes_to_gguf(config, "attention.layer_norm_epsilon"),
        **rope_to_gguf(config.rotary_dim, config.rope_theta, config.rope_scaling),
        "use_parallel_residual": config.parallel_residual,
    }


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    return biased_shapes(config)


def pairs(config: Config) -> dict[str, int]:
    return {}


def caches(config: Config) -> list[LayerCache]:
    return [LayerCache(config.n_kv_heads, config.head_dim)] * config.n_layers


def forward(config: Config, weights: Weights, ops: Ops[X]) -> X:
    """The step's rows -> logits of those that want them, (wanted rows, vocab_size)."""
    angles = frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling, config.context_length)
    factor = attention_factor(config.rope_scaling)
    x = ops.embed(weights.embed)
    for i in range(config.n_layers):
        layer = weights.layer(i)
        h = ops.layer_norm(x, layer.attn_norm, layer.attn_norm_bias, config.norm_eps)
        q = ops.rope(ops.linear(h, layer.q, layer.q_bias), config.head_dim, angles, factor)
        k = ops.rope(ops.linear(h, layer.k, layer.k_bias), config.head_dim, angles, factor)
        v = ops.linear(h, layer.v, layer.v_bias)
        h = ops.attention(q, k, v, i, scale=config.head_dim**-0.5)
        if config.parallel_residual:  # the MLP reads what attention has read
            inner = mlp_inner(config, layer, x, ops)
            x = ops.add(x, ops.linear(h, layer.o, layer.o_bias))
        else:
            x = ops.add(x, ops.linear(h, layer.o, layer.o_bias))
            inner = mlp_inner(config, layer, x, ops)
        x = ops.add(x, ops.linear(inner, layer.down, layer.down_bias))
    x = ops.layer_norm(x, weights.norm, weights.norm_bias, config.norm_eps)
    return ops.logits(x, weights.embed if config.tie_embeddings else weights.output)


def mlp_inner(config: Config, layer: Weights, x: X, ops: Ops[X]) -> X:
    """-> (rows, ffn_size)."""
    h = ops.layer_norm(x, layer.ffn_norm, layer.ffn_norm_bias, config.norm_eps)
    return ops.activate(ops.linear(h, layer.up, layer.up_bias), config.activation)
