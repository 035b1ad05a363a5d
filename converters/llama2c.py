"""Models of llama2.c (github.com/karpathy/llama2.c): a header of seven numbers, then float32 weights in a fixed order.

    version 0    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len as int32; a negative vocab_size
                 says that the logits have a matrix of their own
    version 1    0x616b3432, 1, the seven numbers, a byte that is 1 if the embedding computes the logits; zeros up to
                 byte 256

The tokenizer is a file beside it: int32 longest token, then for each token a float32 score, an int32 length, UTF-8.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgellm import architectures
from edgellm.architectures import llama
from edgellm.errors import CheckpointError, UnsupportedError

from .blocks import TYPES, row_bytes
from .checkpoint import Checkpoint, SourceTensor, TokenizerSource, row_reader, unreadable
from .gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, tokenizer_from_pieces
from .naming import parts, stack

MAX_TOKENIZER = 1 << 26
_MAGIC = 0x616B3432
_HEADER_V1 = 256
_FREQUENCIES = "frequencies"
"""Tables of RoPE's sines and cosines, which version 0 stores and nobody needs."""
_ORDER_V0 = (
    "embed",
    "layers.{}.attn_norm",
    "layers.{}.q",
    "layers.{}.k",
    "layers.{}.v",
    "layers.{}.o",
    "layers.{}.ffn_norm",
    "layers.{}.gate",
    "layers.{}.down",
    "layers.{}.up",
    "norm",
    _FREQUENCIES,
    "output",
)
_ORDER_V1 = (
    "layers.{}.attn_norm",
    "layers.{}.ffn_norm",
    "norm",
    "embed",
    "layers.{}.q",
    "layers.{}.k",
    "layers.{}.v",
    "layers.{}.o",
    "layers.{}.gate",
    "layers.{}.down",
    "layers.{}.up",
    "output",
)

# Ids that run.c has written into the program, and the names under which its tokenizer files list two of them.
_UNK, _BOS, _EOS = 0, 1, 2
_MARKERS = {"\n<s>\n": "<s>", "\n</s>\n": "</s>"}


def read_llama2c(path: Path, tokenizer: Path | None = None) -> Checkpoint:
    """Open a model; its tokenizer is looked for beside it if none is given.

    Raises CheckpointError for a damaged file or a missing tokenizer, UnsupportedError for int8 weights.
    """
    header = _header(path)
    tensors = _tensors(path, header)
    source = tokenizer or _find_tokenizer(path, header.config.vocab_size)
    return Checkpoint(
        path=str(path),
        architecture="llama",
        config=header.config,
        tensors=tensors,
        tokenizer=_tokenizer(source, header.config.vocab_size),
        quantized=False,
        kind="llama2.c file",
        interleaved=llama.GGUF_INTERLEAVED,
        metadata={"name": path.stem, "source": path.name},
    )


class _Header(NamedTuple):
    config: llama.Config
    order: tuple[str, ...]
    start: int
    """Where the weights begin."""
    file_size: int


def _header(path: Path) -> _Header:
    try:
        with open(path, "rb") as file:
            start, size = file.read(_HEADER_V1), file.seek(0, 2)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(start) < _HEADER_V1:
        raise CheckpointError(f"{path} has {len(start)} bytes; expected a llama2.c model: it is damaged or incomplete")
    magic, version, *numbers = struct.unpack_from("<9i", start)
    if magic != _MAGIC:
        numbers = [magic, version, *numbers[:5]]
        return _Header(_config(path, numbers, numbers[5] > 0), _ORDER_V0, 28, size)
    if version != 1:
        raise UnsupportedError(
            f"{path} is llama2.c version {version}{' (int8 weights)' if version == 2 else ''}; this "
            "version of edgellm reads 0 and 1: export the model as one of these"
        )
    return _Header(_config(path, numbers, start[36] != 0), _ORDER_V1, _HEADER_V1, size)


def _config(path: Path, numbers: list[int], tied: bool) -> llama.Config:
    hidden_size, ffn_size, n_layers, n_heads, n_kv_heads, vocab_size, context_length = numbers
    if min(hidden_size, n_heads, n_kv_heads) < 1 or hidden_size % n_heads:
        raise CheckpointError(
            f"{path} starts with the numbers {numbers}; expected a llama2.c header, with a size that "
            "is a multiple of the number of heads: it is damaged or another kind of file"
        )
    return llama.Config(
        vocab_size=abs(vocab_size),
        hidden_size=hidden_size,
        ffn_size=ffn_size,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=hidden_size // n_heads,
        context_length=context_length,
        norm_eps=1e-5,
        rope_theta=10000.0,
        tie_embeddings=tied,
    )


def _tensors(path: Path, header: _Header) -> dict[str, tuple[SourceTensor, ...]]:
    """Names are ours: the file has none."""
    config, f32 = header.config, TYPES["F32"]
    # The size of one layer tells whether the number of layers can be true, before anything is made for each.
    one = llama.shapes(replace(config, n_layers=1))
    layer = sum(math.prod(shape) for name, shape in one.items() if name.startswith("layers."))
    rest = sum(math.prod(shape) for name, shape in one.items() if not name.startswith("layers."))
    frequencies = config.context_length * config.head_dim if _FREQUENCIES in header.order else 0
    expected = header.start + 4 * (config.n_layers * layer + rest + frequencies)
    if header.file_size != expected:
        raise CheckpointError(
            f"{path} has {header.file_size} bytes; expected {expected}, from the sizes in its "
            "header: it is damaged, incomplete or another kind of file"
        )
    tensors, at = dict[str, SourceTensor](), header.start
    architecture = architectures.get("llama")
    shapes = {part: shape for made_of in parts(architecture, config).values() for part, shape in made_of.items()}
    shapes[_FREQUENCIES] = (frequencies,)
    order = [name.format(i) for name in header.order for i in range(config.n_layers if "{}" in name else 1)]
    for name in order:
        if name not in shapes:
            continue
        rows, size = math.prod(shapes[name][:-1]), row_bytes(f32, shapes[name][-1])
        tensors[name] = SourceTensor(name, shapes[name], f32, row_reader(path, at, rows, size))
        at += rows * size
    return stack(architecture, config, tensors)


def _find_tokenizer(path: Path, vocab_size: int) -> Path:
    """tokenizer.bin, or the only tok*.bin, that has the model's number of tokens."""
    candidates = sorted(file for file in path.parent.glob("tok*.bin") if file.is_file() and file != path)
    fitting = [file for file in candidates if _count(file) == vocab_size]
    preferred = [file for file in fitting if file.name == "tokenizer.bin"] or fitting
    if len(preferred) != 1:
        found = ", ".join(file.name for file in fitting) or "none"
        raise CheckpointError(
            f"{path} has {vocab_size} tokens, and of the tok*.bin beside it as many have {found}; "
            "expected one: name the tokenizer to use"
        )
    return preferred[0]


def _count(path: Path) -> int | None:
    """Tokens of a tokenizer file, None if it is not one."""
    try:
        return len(_entries(path))
    except CheckpointError:
        return None


def _tokenizer(path: Path, vocab_size: int) -> TokenizerSource:
    entries = _entries(path)
    if len(entries) != vocab_size:
        raise CheckpointError(
            f"{path} has {len(entries)} tokens, but the model {vocab_size}; expected as many: give "
            "the tokenizer that it was trained with"
        )
    if vocab_size <= _EOS:
        raise CheckpointError(f"{path} has {vocab_size} tokens; expected at least those for unknown text, start, end")
    # llama2.c writes a plain space where SentencePiece has U+2581.
    pieces = [_MARKERS.get(piece) or piece.replace(" ", "\u2581") for _, piece in entries]
    types = np.array([BYTE if re.fullmatch("<0x[0-9A-F]{2}>", piece) else NORMAL for piece in pieces], np.int32)
    types[[_UNK, _BOS, _EOS]] = UNKNOWN, CONTROL, CONTROL
    scores = np.array([score for score, _ in entries], np.float32)
    return tokenizer_from_pieces(
        pieces, scores, types, bos_id=_BOS, eos_id=_EOS, unk_id=_UNK, add_bos=True, add_eos=False, add_space_prefix=True
    )


def _entries(path: Path) -> list[tuple[float, str]]:
    """Score and text of every token."""
    try:
        data = path.read_bytes() if path.stat().st_size <= MAX_TOKENIZER else b""
    except OSError as error:
        raise unreadable(path, error) from error
    damaged = f"{path} is not a tokenizer of llama2.c"
    if len(data) < 4:
        raise CheckpointError(f"{damaged}: expected 4 bytes to {MAX_TOKENIZER}")
    longest, at, entries = struct.unpack_from("<i", data)[0], 4, list[tuple[float, str]]()
    while at < len(data):
        if len(data) - at < 8:
            raise CheckpointError(f"{damaged}: it ends in token {len(entries)}; fetch it again")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= length <= min(longest, len(data) - at) or not math.isfinite(score):
            raise CheckpointError(
                f"{damaged}: token {len(entries)} has the length {length} and the score {score}; "
                f"expected up to {min(longest, len(data) - at)} bytes, and a number"
            )
        try:
            entries.append((score, data[at : at + length].decode()))
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{damaged}: token {len(entries)} is not UTF-8 text") from error
        at += length
    return entries
