"""Ministral 8B: Llama whose layers have a sliding window each, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgellm.architectures import llama
from edgellm.architectures.llama import (
    FULL,
    GGUF_INTERLEAVED,
    GGUF_NAMES,
    HF_NAMES,
    SLIDING,
    STACKED,
    caches,
    forward,
    pairs,
    shapes,
    to_gguf,
    windows_from_hf,
)

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "Ministral 8B"
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
        made = super().from_hf(config)
        kind = SLIDING if config.get("sliding_window") else FULL
        return replace(made, **windows_from_hf(config, [kind] * made.n_layers))

    @classmethod
    def tiny(cls) -> Self:
        return replace(super().tiny(), sliding_window=5, layer_types=[SLIDING, FULL])
