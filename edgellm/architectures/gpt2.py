"""GPT-2, Cerebras-GPT: learned positions, LayerNorm and biases throughout, an MLP without a gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from edgellm.architectures import LayerCache, Stored
from edgellm.architectures.llama import model_shapes
from edgellm.config import DecoderConfig, integer, number, one_of, require, sizes_from_gguf, sizes_to_gguf, truth
from edgellm.ops import Activation, Ops, X, activation_from_hf
from edgellm.tensor import Weights

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "GPT-2, Cerebras-GPT"

QKV = ("layers.{}.q", "layers.{}.k", "layers.{}.v")
QKV_BIAS = ("layers.{}.q_bias", "layers.{}.k_bias", "layers.{}.v_bias")

HF_NAMES: dict[str, str | Stored] = {
    "embed": "transformer.wte.weight",
    "positions": "transformer.wpe.weight",
    "layers.{}.attn_norm": "transformer.h.{}.ln_1.weight",
    "layers.{}.attn_norm_bias": "transformer.h.{}.ln_1.bias",
    **dict.fromkeys(QKV, Stored("transformer.h.{}.attn.c_attn.weight", of=QKV, transposed=True)),
    **dict.fromkeys(QKV_BIAS, Stored("transformer.h.{}.attn.c_attn.bias", of=QKV_BIAS)),
    "layers.{}.o": Stored("transformer.h.{}.attn.c_proj.weight", transposed=True),
    "layers.{}.o_bias": "transformer.h.{}.attn.c_proj.bias",
    "layers.{}.ffn_norm": "transformer.h.{}.ln_2.weight",
    "layers.{}.ffn_norm_bias": "transformer.h.{}.ln_2.bias",
    "layers.{}.up": Stored("transformer.h.{}.mlp.c_fc.weight", transposed=True),
    "layers.{}.up_bias": "transformer.h.{}.mlp.c_fc.bias",
    "layers.{}.down": Stored("transformer.h.{}.mlp.c_proj.weight", transposed=True),
    "layers.{}.down_bias": "transformer.h.{}.mlp.c_proj.bias",
    "norm": "transformer.ln_f.weight",
    "norm_bias": "transformer.ln_f.bias",
    "output": "lm_head.weight",
}

GGUF_NAMES: dict[str, str | Stored] = {
    "embed": "token_embd.weight",
    "positions": "position_embd.weight",
    "layers.{}.attn_norm": "blk.{}.attn_norm.weight",
    "layers.{}.attn_norm_bias": "blk.{}.attn_norm.bias",
    **dict.fromkeys(QKV, Stored("blk.{}.attn_qkv.weight", of=QKV)),
    **dict.fromkeys(QKV_BIAS, Stored("blk.{}.attn_qkv.bias", of=QKV_BIAS)),
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
    activation: Activation

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(vars(self), "activation", get_args(Activation))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        require(config, "scale_attn_weights", True)
        require(config, "scale_attn_by_inverse_layer_idx", False)
        require(config, "add_cross_attention", False)
        hidden_size, n_heads = integer(config, "n_embd"), integer(config, "n_head")
        return cls(
            vocab_size=integer(config, "vocab_size"),
            hidden_size=hidden_size,
            ffn_size=integer(config, "n_inner", 4 * hidden_size),
            n_layers=integer(config, "n_layer"),
            n_heads=n_heads,
            n_kv_heads=n_heads,
            head_dim=hidden_size // n_heads,
            context_length=integer(config, "n_positions", 1024),
            norm_eps=number(config, "layer_norm_epsilon", 1e-5),
            tie_embeddings=truth(config, "tie_word_embeddings", True),
            activation=activation_from_hf(config, "activation_function", "gelu_new"),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        return cls(**sizes_from_gguf(metadata, "attention.layer_norm_epsilon"), activation="gelu_tanh")

    @classmethod
    def tiny(cls) -> Self:
        return cls(
            vocab_size=97,
            hidden_size=60,
            ffn_size=104,
            n_layers=2,
            n_heads=5,
            n_kv_heads=5,
            head_dim=12,
            context_length=64,
            norm_eps=1e-5,
            activation="gelu_tanh",
        )


def to_gguf(config: Config) -> dict[str, Any]:
    """GGUF metadata, of which from_gguf makes this config again if its activation is GPT-2's."""
    return sizes_to_gguf(config, "attention.layer_norm_epsilon")


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    return {**biased_shapes(config), "positions": (config.context_length, config.hidden_size)}


def biased_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Those of a decoder in which every norm and every linear layer has a bias, and the MLP no gate."""
    hidden, ffn = config.hidden_size, config.ffn_size
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "q": (q, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "o": (hidden, q),
        "ffn_norm": (hidden,),
        "up": (ffn, hidden),
        "down": (hidden, ffn),
    }
    with_biases = {
        key: size for name, shape in layer.items() for key, size in ((name, shape), (f"{name}_bias", shape[:1]))
    }
    return {**model_shapes(config, with_biases), "norm_bias": (hidden,)}


def pairs(config: Config) -> dict[str, int]:
    return {}


def caches(config: Config) -> list[LayerCache]:
    return [LayerCache(config.n_kv_heads, config.head_dim)] * config.n_layers


def forward(config: Config, weights: Weights, ops: Ops[X]) -> X:
    """The step's rows -> logits of those that want them, (wanted rows, vocab_size)."""
    x = ops.add_positions(ops.embed(weights.embed), weights.positions)
    for i in range(config.n_layers):
        layer = weights.layer(i)
        h = ops.layer_norm(x, layer.attn_norm, layer.attn_norm_bias, config.norm_eps)
        q, k = ops.linear(h, layer.q, layer.q_bias), ops.linear(h, layer.k, layer.k_bias)
        v = ops.linear(h, layer.v, layer.v_bias)
        h = ops.attention(q, k, v, i, scale=config.head_dim**-0.5)
        x = ops.add(x, ops.linear(h, layer.o, layer.o_bias))
        h = ops.layer_norm(x, layer.ffn_norm, layer.ffn_norm_bias, config.norm_eps)
        h = ops.activate(ops.linear(h, layer.up, layer.up_bias), config.activation)
        x = ops.add(x, ops.linear(h, layer.down, layer.down_bias))
    x = ops.layer_norm(x, weights.norm, weights.norm_bias, config.norm_eps)
    return ops.logits(x, weights.embed if config.tie_embeddings else weights.output)
