"""Llama 1 to 3, SmolLM2, TinyLlama: pre-norm transformer with grouped-query attention, RoPE and SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgellm.architectures import LayerCache
from edgellm.config import integer, number
from edgellm.errors import CheckpointError, UnsupportedError
from edgellm.ops import Ops, X
from edgellm.rope import check_scaling, frequencies
from edgellm.tensor import Weights

if TYPE_CHECKING:
    from typing_extensions import Self

HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "layers.{}.attn_norm": "model.layers.{}.input_layernorm.weight",
    "layers.{}.q": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.k": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.v": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.o": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.up": "model.layers.{}.mlp.up_proj.weight",
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
    "layers.{}.o": "blk.{}.attn_output.weight",
    "layers.{}.ffn_norm": "blk.{}.ffn_norm.weight",
    "layers.{}.gate": "blk.{}.ffn_gate.weight",
    "layers.{}.up": "blk.{}.ffn_up.weight",
    "layers.{}.down": "blk.{}.ffn_down.weight",
    "norm": "output_norm.weight",
    "output": "output.weight",
}

GGUF_INTERLEAVED = ("q", "k")

STACKED = {"layers.{}.gate_up": ("layers.{}.gate", "layers.{}.up")}


@dataclass(frozen=True)
class Config:
    vocab_size: int
    hidden_size: int
    ffn_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    context_length: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = None
    sliding_window: int | None = None
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        sizes = vars(self)
        for key in (
            "vocab_size",
            "hidden_size",
            "ffn_size",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "context_length",
        ):
            integer(sizes, key)
        for key in ("norm_eps", "rope_theta"):
            number(sizes, key)
        if self.sliding_window is not None:
            integer(sizes, "sliding_window")
        if self.n_heads % self.n_kv_heads:
            raise CheckpointError(
                f"config has n_heads = {self.n_heads}, not a multiple of n_kv_heads = {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"config has head_dim = {self.head_dim}; RoPE needs an even number")
        check_scaling(self.rope_scaling, self.head_dim)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise UnsupportedError(f"config has hidden_act = {activation!r}; this architecture supports 'silu'")
        for key in ("attention_bias", "mlp_bias"):
            if config.get(key):
                raise UnsupportedError(f"config has {key} = true; this architecture supports no biases")
        n_heads, hidden_size = integer(config, "num_attention_heads"), integer(config, "hidden_size")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        scaling = {**rope, "type": rope.get("rope_type", rope.get("type", "default"))}
        return cls(
            vocab_size=integer(config, "vocab_size"),
            hidden_size=hidden_size,
            ffn_size=integer(config, "intermediate_size"),
            n_layers=integer(config, "num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=integer(config, "num_key_value_heads", n_heads),
            head_dim=integer(config, "head_dim", hidden_size // n_heads),
            context_length=integer(config, "max_position_embeddings", 2048),
            norm_eps=number(config, "rms_norm_eps", 1e-6),
            rope_theta=number({**config, **rope}, "rope_theta", 10000.0),
            rope_scaling=None if scaling["type"] == "default" else scaling,
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """`metadata` without the architecture's prefix: "block_count", not "llama.block_count"."""
        n_heads, hidden_size = integer(metadata, "attention.head_count"), integer(metadata, "embedding_length")
        head_dim = integer(metadata, "attention.key_length", hidden_size // n_heads)
        for key in ("rope.dimension_count", "attention.value_length"):
            if integer(metadata, key, head_dim) != head_dim:
                raise UnsupportedError(
                    f"config has {key} = {metadata[key]}; this architecture needs head_dim = {head_dim}"
                )
        scaling = {"type": metadata.get("rope.scaling.type", "none")}
        if scaling["type"] != "none":
            scaling["factor"] = number(metadata, "rope.scaling.factor")
        if metadata.get("expert_count"):
            raise UnsupportedError("config has experts; this architecture supports dense models")
        return cls(
            vocab_size=integer(metadata, "vocab_size"),
            hidden_size=hidden_size,
            ffn_size=integer(metadata, "feed_forward_length"),
            n_layers=integer(metadata, "block_count"),
            n_heads=n_heads,
            n_kv_heads=integer(metadata, "attention.head_count_kv", n_heads),
            head_dim=head_dim,
            context_length=integer(metadata, "context_length"),
            norm_eps=number(metadata, "attention.layer_norm_rms_epsilon"),
            rope_theta=number(metadata, "rope.freq_base", 10000.0),
            rope_scaling=None if scaling["type"] == "none" else scaling,
        )

    @classmethod
    def tiny(cls) -> Self:
        """A few thousand weights with odd sizes, for tests."""
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
        )


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model; (rows, cols) = (outputs, inputs)."""
    hidden, ffn = config.hidden_size, config.ffn_size
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "q": (q, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "o": (hidden, q),
        "ffn_norm": (hidden,),
        "gate_up": (2 * ffn, hidden),
        "down": (hidden, ffn),
    }
    result: dict[str, tuple[int, ...]] = {"embed": (config.vocab_size, hidden)}
    for i in range(config.n_layers):
        result |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    result["norm"] = (hidden,)
    if not config.tie_embeddings:
        result["output"] = (config.vocab_size, hidden)
    return result


def pairs(config: Config) -> dict[str, int]:
    return {"q": config.head_dim // 2, "k": config.head_dim // 2, "gate_up": config.ffn_size}


def caches(config: Config) -> list[LayerCache]:
    return [LayerCache(config.n_kv_heads, config.head_dim, config.sliding_window)] * config.n_layers


def forward(config: Config, weights: Weights, ops: Ops[X]) -> X:
    """The step's rows -> logits of those that want them, (wanted rows, vocab_size)."""
    angles = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    x = ops.embed(weights.embed)
    for i in range(config.n_layers):
        layer = weights.layer(i)
        h = ops.rms_norm(x, layer.attn_norm, config.norm_eps)
        q = ops.rope(ops.linear(h, layer.q), config.head_dim, angles)
        k = ops.rope(ops.linear(h, layer.k), config.head_dim, angles)
        v = ops.linear(h, layer.v)
        h = ops.attention(q, k, v, i, scale=config.head_dim**-0.5)
        x = ops.add(x, ops.linear(h, layer.o))
        h = ops.rms_norm(x, layer.ffn_norm, config.norm_eps)
        h = ops.glu(ops.linear(h, layer.gate_up), "silu")
        x = ops.add(x, ops.linear(h, layer.down))
    x = ops.rms_norm(x, weights.norm, config.norm_eps)
    return ops.logits(x, weights.embed if config.tie_embeddings else weights.output)
