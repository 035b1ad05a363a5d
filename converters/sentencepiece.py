"""SentencePiece models (tokenizer.model): a tokenizer.json with the same ids.

A model is a protobuf message: pieces with scores, and what is done to text before it is cut into pieces. Protobuf is
fields one after another: a varint of 8 * number + type, then by type a varint (0), 8 bytes (1), a length as varint and
as many bytes (2), or 4 bytes (5). A file is not trusted.

Two things differ. Text after a special or, in BPE, a user-defined piece counts as a text of its own, as in llama.cpp.
And the tokenizers library, which applies tables of characters, handles some sequences of combining marks otherwise.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from edgellm.arrays import I32
from edgellm.errors import CheckpointError, UnsupportedError

from .checkpoint import TokenizerSource, errors_about, listed
from .gguf_tokenizer import BYTE, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, tokenizer_from_pieces
from .json_file import read_whole

if TYPE_CHECKING:
    from tokenizers.models import Unigram
    from tokenizers.normalizers import Normalizer

T = TypeVar("T")

MAX_BYTES = 1 << 24
"""Of a file; the largest vocabularies take a third of it."""
MAX_PIECES = 1 << 20
_UNIGRAM, _BPE = 1, 2
_SIZES = {1: 8, 5: 4}
"""Bytes of a value, by the type of field."""
_NEVER = -1e6
"""Score of pieces that text must not become: below that of any way to spell them out."""
_BLOCK = 256
"""Units of a trie that the bytes after one prefix lead to."""


@dataclass(frozen=True)
class Piece:
    text: str
    score: float = 0.0
    type: int = NORMAL
    """As GGUF has it, which took SentencePiece's numbers."""


@dataclass(frozen=True)
class SentencePieceModel:
    pieces: tuple[Piece, ...]
    unigram: bool
    """Whether it is a Unigram model; otherwise it is BPE."""
    byte_fallback: bool
    charsmap: bytes
    """A compiled table of characters and what they are replaced with; empty for none."""
    add_space: bool
    """Whether text gets a space before it."""
    one_space: bool
    """Whether of several spaces one is kept, and none at the ends."""
    bos: str
    eos: str


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Raises CheckpointError for a damaged file, UnsupportedError for a kind of model that is not known here."""
    with errors_about(path):
        return _model(read_whole(path, MAX_BYTES))


def tokenizer_from_sentencepiece(
    model: SentencePieceModel,
    added: Sequence[Piece] = (),
    *,
    bos: str | None,
    eos: str | None,
    add_bos: bool,
    add_eos: bool,
    rstrip: Collection[str] = (),
) -> TokenizerSource:
    """The model's ids, then those of `added` pieces; special tokens in `rstrip` swallow the white space after them.

    Raises CheckpointError for a model that contradicts itself, UnsupportedError for one that would have other ids here.
    """
    _check(model)
    pieces = [*model.pieces, *added]
    ids = {piece.text: id for id, piece in enumerate(pieces)}
    return tokenizer_from_pieces(
        [piece.text for piece in pieces],
        np.array([piece.score for piece in pieces], np.float32),
        _types(model, pieces),
        bos_id=ids.get(bos or ""),
        eos_id=ids.get(eos or ""),
        unk_id=_unknown(model),
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=model.add_space,
        rstrip=rstrip,
        byte_fallback=model.byte_fallback,
        model=_unigram(model) if model.unigram else None,
        cleaning=_cleaning(model),
    )


def _types(model: SentencePieceModel, pieces: Sequence[Piece]) -> I32:
    types = np.array([piece.type for piece in pieces], np.int32)
    types[types == UNUSED] = BYTE  # what text never becomes by merges
    if model.unigram:
        own = types[: len(model.pieces)]
        own[own == USER_DEFINED] = NORMAL  # found by their scores, see _unigram
    return types


def _unknown(model: SentencePieceModel) -> int:
    return next(id for id, piece in enumerate(model.pieces) if piece.type == UNKNOWN)


def _unigram(model: SentencePieceModel) -> Unigram:
    from tokenizers.models import Unigram

    scored = [(piece.text, _score(piece)) for piece in model.pieces]
    return Unigram(scored, unk_id=_unknown(model), byte_fallback=model.byte_fallback)


def _score(piece: Piece) -> float:
    if piece.type == USER_DEFINED:  # as SentencePiece scores them, so that they win, and longer ones over shorter
        return 0.1 * (len(piece.text.encode()) - 1)
    return piece.score if piece.type == NORMAL else _NEVER


def _cleaning(model: SentencePieceModel) -> list[Normalizer]:
    from tokenizers import Regex
    from tokenizers.normalizers import Precompiled, Replace

    steps: list[Normalizer] = []
    if model.charsmap:
        table = Precompiled(model.charsmap)
        # The library takes the two for one character, and drops the second.
        steps += [Replace("\r\n", table.normalize_str("\r") + table.normalize_str("\n")), table]
    if model.one_space:
        steps += [Replace(Regex(r"\A +|[ \u2581]+\z"), ""), Replace(Regex(" {2,}"), " ")]
    return steps


# What a file may say.


def _check(model: SentencePieceModel) -> None:
    """Raise unless the pieces are ones that `tokenizer_from_sentencepiece` gives the meaning that they have."""
    counts = Counter(piece.type for piece in model.pieces)
    if counts[UNKNOWN] != 1 or not counts[NORMAL] or (model.byte_fallback and counts[BYTE] != 256):
        raise CheckpointError(
            f"the SentencePiece model has {counts[NORMAL]} normal pieces, {counts[UNKNOWN]} for unknown text, "
            f"{counts[BYTE]} for bytes; expected some, one, and 256 if bytes stand for unknown text: fetch it again"
        )
    letters = {piece.text for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED)}
    reserved = [piece.text for piece in model.pieces if piece.type not in (NORMAL, USER_DEFINED)]
    reached = [text for text in reserved if len(text) == 1 or (model.unigram and not letters.issuperset(text))]
    if reached:
        raise UnsupportedError(
            f"plain text could become the reserved pieces {listed(reached)}; this version needs them to have several "
            "letters, which are pieces themselves in a Unigram model"
        )
    _check_charsmap(model.charsmap)


def _check_charsmap(charsmap: bytes) -> None:
    """Raise CheckpointError unless every way through the trie stays in it, and leads to text.

    The table is a length, a trie of uint32 units (github.com/s-yata/darts-clone), and texts that end with a zero.
    """
    if not charsmap:
        return
    size = int.from_bytes(charsmap[:4], "little")
    texts = charsmap[4 + size :]
    if not size or size % (4 * _BLOCK) or not texts.endswith(b"\0"):
        raise CheckpointError(
            f"the SentencePiece table of characters has {len(charsmap)} bytes, {size} of them a trie; expected whole "
            "blocks of it, and texts after it: fetch it again"
        )
    units = np.frombuffer(charsmap, "<u4", size // 4, offset=4).astype(np.int64)
    nodes = np.flatnonzero(units >> 31 == 0)
    children = nodes ^ (units[nodes] >> 10 << (units[nodes] >> 6 & 8))
    if not (children < len(units)).all():
        raise CheckpointError("the SentencePiece table of characters leads out of the file; fetch it again")
    starts = units[children[units[nodes] >> 8 & 1 == 1]] & 0x7FFFFFFF
    is_start = np.frombuffer(texts, np.uint8) & 0xC0 != 0x80
    if not (starts < len(texts)).all() or not is_start[starts].all() or not _is_utf8(texts):
        raise CheckpointError("the SentencePiece table of characters leads to no text; fetch it again")


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


# Protobuf.


def _model(data: bytes) -> SentencePieceModel:
    pieces, parts = list[Piece](), dict[int, Mapping[int, Any]]()
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_message(value)))
            if len(pieces) > MAX_PIECES:
                raise CheckpointError(f"it has more than {MAX_PIECES} pieces; expected fewer: it is damaged")
        elif number in (2, 3):  # the trainer's settings, the normalizer's
            parts[number] = _message(value)
    trainer, normalizer = parts.get(2, {}), parts.get(3, {})
    kind = _get(trainer, 3, int, 1)
    if kind not in (_UNIGRAM, _BPE):
        raise UnsupportedError(f"it is a model of the kind {kind}; this version reads 1 (Unigram) and 2 (BPE)")
    if _get(trainer, 24, int, 0) or not _get(normalizer, 5, int, 1):
        raise UnsupportedError("it has spaces after words, or as they are; this version reads U+2581 before words")
    return SentencePieceModel(
        pieces=tuple(pieces),
        unigram=kind == _UNIGRAM,
        byte_fallback=_get(trainer, 35, int, 0) != 0,
        charsmap=_get(normalizer, 2, bytes, b""),
        add_space=_get(normalizer, 3, int, 1) != 0,
        one_space=_get(normalizer, 4, int, 1) != 0,
        bos=_text(trainer, 46, b"<s>"),
        eos=_text(trainer, 47, b"</s>"),
    )


def _piece(fields: Mapping[int, Any]) -> Piece:
    text, raw, type = _text(fields, 1, b""), _get(fields, 2, bytes, bytes(4)), _get(fields, 3, int, NORMAL)
    score = struct.unpack("<f", raw)[0] if len(raw) == 4 else math.nan
    if not text or not math.isfinite(score) or type not in range(NORMAL, BYTE + 1):
        raise CheckpointError(
            f"it has the piece {text[:80]!r} of score {score} and type {type}; expected text, a number and a type from "
            f"{NORMAL} to {BYTE}: it is damaged"
        )
    return Piece(text, score, type)


def _text(fields: Mapping[int, Any], number: int, default: bytes) -> str:
    try:
        return _get(fields, number, bytes, default).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError("it has a piece that is not UTF-8 text; it is damaged") from error


def _get(fields: Mapping[int, Any], number: int, type: type[T], default: T) -> T:
    value = fields.get(number, default)
    if not isinstance(value, type):
        raise CheckpointError(f"its field {number} is stored as another type; it is damaged, or no SentencePiece model")
    return value


def _message(data: Any) -> dict[int, Any]:
    return dict(_fields(data))


def _fields(data: Any) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message; a field that stands there again follows."""
    if not isinstance(data, bytes):
        raise _damaged()
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size, at = _varint(data, at) if key & 7 == 2 else (_SIZES.get(key & 7, len(data)), at)
        if size > len(data) - at:
            raise _damaged()
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at a position, and the position after it."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise _damaged()


def _damaged() -> CheckpointError:
    return CheckpointError("it is no SentencePiece model, or damaged: its fields lead past its end; fetch it again")
