"""Qwen 3 mixture of experts (arXiv:2505.09388): OLMoE with a norm for each head of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgellm.architectures import olmoe
from edgellm.architectures.olmoe import (
    GGUF_INTERLEAVED,
    GGUF_NAMES,
    HF_NAMES,
    STACKED,
    caches,
    forward,
    moe_shapes,
    pairs,
)
from edgellm.config import integer, require

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "Qwen 3 mixtures of experts"

__all__ = ["GGUF_INTERLEAVED", "GGUF_NAMES", "HF_NAMES", "STACKED", "Config", "caches", "forward", "pairs", "shapes"]

GGUF_ARCHITECTURE = "qwen3moe"


class Config(olmoe.Config):
    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        require(config, "use_sliding_window", False)
        require(config, "decoder_sparse_step", 1)
        require(config, "mlp_only_layers", [])
        return super().from_hf({**config, "intermediate_size": integer(config, "moe_intermediate_size")})

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        size = integer(metadata, "expert_feed_forward_length")
        return replace(super().from_gguf({**metadata, "feed_forward_length": size}), normalize=True)


def to_gguf(config: Config) -> dict[str, Any]:
    """GGUF metadata, of which from_gguf makes this config again."""
    return {**olmoe.to_gguf(config), "expert_feed_forward_length": config.ffn_size}


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    return moe_shapes(config, q_norm=config.head_dim, k_norm=config.head_dim)
