"""What every reader of trained weights gives: a config, tensors that are read a few rows at a time, a tokenizer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.arrays import U8
from edgellm.errors import CheckpointError, UnsupportedError

from .blocks import BYTE, TYPES, BlockType

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

DTYPES = {name: TYPES[name] for name in ("F32", "F16", "BF16")}
"""Of numbers in files of tensors by name."""
STORED_DTYPES = {**DTYPES, BYTE.name: BYTE}
_COMPUTED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
MAX_DIMS = 8
"""Of a tensor in a file of tensors by name."""
MAX_LISTED = 10
"""Names in an error's message."""


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
    kind: str = "unknown"
    """What the tokenizers library calls its model."""


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
    kind: str
    """What the source is, to be shown."""
    ternary: bool = False
    """Whether they are ternary, but for the embedding and the output."""
    interleaved: tuple[str, ...] = ()
    """Matrices, and their biases, whose rows have RoPE pairs adjacent (2i, 2i+1): put half a head apart here."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Parts of the checkpoint that are no text model, and how many tensors each has."""
    chat_template: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    """Of name, license, source: what the source says of itself."""

    def described(self) -> str:
        """What was found, in a line."""
        names, weights = set[str](), Counter[str]()
        for part in (part for parts in self.tensors.values() for part in parts):
            names.add(part.name)  # of which a part may be some rows
            weights[part.type.name] += math.prod(part.shape)
        formats = ", ".join(name for name, _ in weights.most_common())
        return (
            f"{self.kind}: {self.architecture}, {len(names)} tensors with {weights.total() / 1e6:,.2f} M weights in "
            f"{formats}, {self.tokenizer.kind} tokenizer with {self.tokenizer.n_tokens:,} tokens"
        )


def is_computed(name: str) -> bool:
    """Whether a tensor follows from the config: old checkpoints store frequencies of RoPE, and masks of attention."""
    return name.endswith(_COMPUTED)


def read_bytes(path: Path, offset: int, begin: int, count: int) -> U8:
    """(count,) bytes of a file, from byte `begin` of what starts at `offset`, which were there when it was opened.

    Reads and not a map: what was converted already must not stay in memory, and a file that shrinks meanwhile must give
    an error, not a signal. Raises CheckpointError.
    """
    try:
        raw = np.fromfile(path, np.uint8, count, offset=offset + begin)
    except OSError as error:
        raise unreadable(path, error) from error
    if raw.size != count:
        raise CheckpointError(
            f"{path} ended while it was being read; expected the length it had when opened: "
            "wait until it is complete and try again"
        )
    return raw


def row_reader(path: Path, offset: int, rows: int, row_bytes: int) -> Callable[[int, int], U8]:
    """SourceTensor.read for rows that lie one after another from `offset` on."""

    def read(first: int, stop: int) -> U8:
        assert 0 <= first <= stop <= rows
        return read_bytes(path, offset, first * row_bytes, (stop - first) * row_bytes).reshape(stop - first, row_bytes)

    return read


def listed(names: Iterable[object], separator: str = ", ") -> str:
    """The first few of what may be thousands, and how many more there are."""
    texts = [str(name)[:200] for name in names]
    more = len(texts) - MAX_LISTED
    return separator.join(texts[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def errors_about(path: Path) -> Iterator[None]:
    """Puts the path before errors that name neither it nor a file beside it."""
    try:
        yield
    except (CheckpointError, UnsupportedError) as error:
        if str(path.parent.absolute()) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


def unsupported_type(path: Path, name: str, dtype: str) -> UnsupportedError:
    return UnsupportedError(
        f"{path}: tensor {name!r} is stored as {dtype[:20]}; this version reads {', '.join(DTYPES)}: use the original "
        "model, or a GGUF file of it"
    )


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
