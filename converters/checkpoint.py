"""What every reader of trained weights gives: a config, tensors that are read a few rows at a time, a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edgellm.arrays import U8

from .blocks import BlockType


@dataclass(frozen=True)
class SourceTensor:
    """A tensor in its source, under the source's name."""

    name: str
    shape: tuple[int, ...]
    """As NumPy has it: (rows, cols) of a matrix, (size,) of a vector."""
    type: BlockType
    read: Callable[[int, int], U8]
    """read(first, stop) -> (stop - first, bytes a row) uint8; a vector is one row."""


@dataclass(frozen=True)
class TokenizerSource:
    """A tokenizer as the `tokenizers` library reads it, and the ids that mean something to a runtime."""

    json: bytes
    """The bytes of a tokenizer.json."""
    n_tokens: int
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    """Every id that ends an answer: end of text, end of turn."""


@dataclass(frozen=True)
class Checkpoint:
    """Trained weights as some reader found them. Nothing is loaded until a tensor is read."""

    path: str
    architecture: str
    """A name of edgellm.architectures."""
    config: Any
    """Its Config."""
    tensors: dict[str, SourceTensor]
    """By the name the .edge file gives them."""
    tokenizer: TokenizerSource
    quantized: bool
    """Whether the source's matrices are quantized already."""
    interleaved: tuple[str, ...] = ()
    """Tensors whose rows have RoPE pairs adjacent (2i, 2i+1): put half a head apart on conversion."""
    chat_template: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    """Of name, license, source: what the source says of itself."""
