"""What every reader of trained weights gives: a config, tensors that are read a few rows at a time, a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.arrays import U8
from edgellm.errors import CheckpointError, UnsupportedError

from .blocks import BlockType

END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<|endoftext|>",
    "<|end_of_text|>",
)
"""Tokens that end an answer wherever they are in a vocabulary, even where the checkpoint forgets to say so."""


@dataclass(frozen=True)
class SourceTensor:
    """A tensor in its source, under the source's name."""

    name: str
    shape: tuple[int, ...]
    """As NumPy has it: (rows, cols) of a matrix, (size,) of a vector."""
    type: BlockType
    read: Callable[[int, int], U8]
    """read(first, stop) -> (stop - first, bytes a row) uint8; a vector is one row."""
    plus: float = 0.0
    """What is to be added to its values."""


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
    tensors: dict[str, tuple[SourceTensor, ...]]
    """By the name the .edge file gives them; of several, the rows of one follow those of another."""
    tokenizer: TokenizerSource
    quantized: bool
    """Whether the source's matrices are quantized already."""
    ternary: bool = False
    """Whether they are ternary, but for the embedding and the output."""
    interleaved: tuple[str, ...] = ()
    """Matrices, and their biases, whose rows have RoPE pairs adjacent (2i, 2i+1): put half a head apart here."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Parts of the checkpoint that are no text model, and how many tensors each has."""
    chat_template: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    """Of name, license, source: what the source says of itself."""


def row_reader(path: Path, offset: int, rows: int, row_bytes: int) -> Callable[[int, int], U8]:
    """SourceTensor.read for rows that lie one after another from `offset` on.

    Reads and not a map: what was converted already must not stay in memory, and a file that shrinks meanwhile must give
    an error, not a signal. Raises CheckpointError.
    """

    def read(first: int, stop: int) -> U8:
        assert 0 <= first <= stop <= rows
        count = (stop - first) * row_bytes
        try:
            raw = np.fromfile(path, np.uint8, count, offset=offset + first * row_bytes)
        except OSError as error:
            raise unreadable(path, error) from error
        if raw.size != count:
            raise CheckpointError(
                f"{path} ended while it was being read; expected the length it had when opened: "
                "wait until it is complete and try again"
            )
        return raw.reshape(stop - first, row_bytes)

    return read


def unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}")


def check_rope_type(path: Path, kind: object) -> None:
    """Raise UnsupportedError for "factors", our own name for divisors that come as a tensor and not in a config."""
    if kind == "factors":
        raise UnsupportedError(f"{path} has the rope scaling {kind!r}; expected a kind that checkpoints use")


def check_vocabulary(path: Path, n_tokens: int, vocab_size: int) -> None:
    """Raise CheckpointError if the tokenizer can give an id that the model has no row for.

    Fewer tokens than rows are common: embeddings are padded to a round number for the machines they are trained on.
    """
    if n_tokens > vocab_size:
        raise CheckpointError(
            f"{path} has a tokenizer with {n_tokens} tokens, but a model that knows {vocab_size}; "
            "expected at most as many: is the tokenizer another model's?"
        )
