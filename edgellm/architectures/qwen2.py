"""Qwen 2 and 2.5: Llama whose queries, keys and values have biases (arXiv:2407.10671)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgellm.architectures import llama
from edgellm.architectures.llama import (
    FULL,
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
from edgellm.config import integer, truth

if TYPE_CHECKING:
    from typing_extensions import Self

MODELS = "Qwen 2, Qwen 2.5"

__all__ = ["GGUF_NAMES", "HF_NAMES", "STACKED", "Config", "caches", "forward", "pairs", "shapes", "to_gguf"]

GGUF_INTERLEAVED = ()


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        made = super().from_hf(config)
        return replace(made, qkv_bias=True, **windows_of_last_layers(config, made.n_layers))

    @classmethod
    def tiny(cls) -> Self:
        return replace(super().tiny(), qkv_bias=True)


def windows_of_last_layers(config: Mapping[str, Any], n_layers: int) -> dict[str, Any]:
    """Fields of a Config: with `use_sliding_window`, the layers from `max_window_layers` on have a window."""
    used = truth(config, "use_sliding_window", False)
    first = integer(config, "max_window_layers", n_layers) if used else n_layers
    return windows_from_hf(config, [FULL if i < first else SLIDING for i in range(n_layers)])
