"""Mistral 7B: Llama with a sliding window (arXiv:2310.06825)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgellm.architectures import llama
from edgellm.architectures.llama import (
    GGUF_INTERLEAVED,
    GGUF_NAMES,
    HF_NAMES,
    STACKED,
    caches,
    forward,
    pairs,
    shapes,
    to_gguf,
)
from edgellm.config import integer

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "Mistral 7B"
GGUF_ARCHITECTURE = "llama"

__all__ = [
    "GGUF_INTERLEAVED",
    "GGUF_NAMES",
    "HF_NAMES",
    "STACKED",
    "Config",
    "caches",
    "forward",
    "pairs",
    "shapes",
    "to_gguf",
]


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        window = integer(config, "sliding_window") if config.get("sliding_window") else None
        return replace(super().from_hf(config), sliding_window=window)

    @classmethod
    def tiny(cls) -> Self:
        return replace(super().tiny(), sliding_window=5)
