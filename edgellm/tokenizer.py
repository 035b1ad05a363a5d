"""Text to ids and back. Knows one tokenizer.json, or the tables made of it; knows no model and no chat."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from edgellm import bpe
from edgellm.bpe import BPE, WORD
from edgellm.errors import ArgumentError, ContextOverflowError, EdgeFileError, UnsupportedError

if TYPE_CHECKING:
    import tokenizers

REMEMBERED = range(256, 65_536)
"""Characters of texts between special tokens whose ids are remembered: those of messages come again at each turn."""
MOST_REMEMBERED = 64


class Tokenizer:
    """A tokenizer and the ids that mean something to a runtime. Threads may share one."""

    def __init__(self, source: bytes | BPE, bos_id: int | None, eos_ids: Sequence[int], vocab_size: int = 0) -> None:
        """`source` is a tokenizer.json, or its tables, with which a start is quick. `vocab_size` is the model's: where
        it is padded, and greater than n_tokens, the ids from n_tokens on are sound, and stand for no text.

        Raises EdgeFileError if it is damaged, UnsupportedError if it decodes in a way that is not known here.
        """
        self._vocabulary = _Tabled(source) if isinstance(source, BPE) else _Vocabulary(source)
        self.n_tokens, self._added = self._vocabulary.n_tokens, self._vocabulary.added
        self.vocab_size = max(self.n_tokens, vocab_size)
        self._is_special = {id for id, token in self._added.items() if token.special}
        self._bytes: list[bytes | None] = [None] * self.n_tokens
        self._to_bytes, self.drops_space = _decoding(self._vocabulary.library, self._added)
        self.bos_id, self.eos_ids = bos_id, tuple(eos_ids)
        for id in (*self.eos_ids, *(() if bos_id is None else (bos_id,))):
            if not 0 <= id < self.n_tokens:
                raise EdgeFileError(
                    f"the id {id} begins or ends a text, but the tokenizer has {self.n_tokens} tokens: "
                    "the file is damaged"
                )
        self.adds_bos = bos_id is not None and self.encode("")[:1] == [bos_id]

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """`add_special` adds BOS and EOS where the model wants them; without `parse_special` the text of a special
        token is plain text.
        """
        try:
            return self._vocabulary.encode(text, add_special, parse_special)
        except TypeError as error:
            raise ArgumentError(f"{text[:80]!r} cannot be encoded; expected text without lone surrogates") from error

    def check_size(self, text: str, most: int) -> None:
        """Raise ContextOverflowError for text that is so long that it has more than `most` tokens, whatever it says."""
        if len(text) > most and (least := self._vocabulary.least(text)) > most:
            raise ContextOverflowError(
                f"{len(text)} characters, which are {least} tokens or more, do not fit: the context holds {most}; "
                "shorten the text, or load the model with a larger context"
            )

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Bytes that are no UTF-8 come out as U+FFFD."""
        raw = b"".join(self.token_bytes(id) for id in ids if not (skip_special and id in self._is_special))
        return self.without_space(raw.decode(errors="replace"))

    def token_bytes(self, id: int) -> bytes:
        """What a token stands for; not always whole characters."""
        if not 0 <= id < self.vocab_size:
            raise ArgumentError(f"{id} is no token id; expected 0 to {self.vocab_size - 1}")
        if id >= self.n_tokens:
            return b""
        cached = self._bytes[id]
        if cached is None:
            cached = self._bytes[id] = self._to_bytes(id, self._vocabulary.token(id))
        return cached

    def without_space(self, text: str) -> str:
        """Decoded text without the space that encoding put before it."""
        return text.removeprefix(" ") if self.drops_space else text

    def id_to_token(self, id: int) -> str:
        """A token as the vocabulary spells it; "" for an id of padding."""
        self.token_bytes(id)
        return self._vocabulary.token(id) if id < self.n_tokens else ""

    def is_special(self, id: int) -> bool:
        return id in self._is_special

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        return {self._added[id].content: id for id in sorted(self._is_special)}

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches a special token in text, of several at one place the longest."""
        texts = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) if texts else "(?!)")

    def split_special(self, text: str) -> list[str | int]:
        """Text cut at its special tokens: their ids, and the text between them."""
        parts: list[str | int] = []
        begin = 0
        for match in self.special_pattern.finditer(text):
            id = self.special_tokens[match[0]]
            before, begin = text[begin : match.start()], match.end()
            parts += [before.rstrip() if self._added[id].lstrip else before, id]
            if self._added[id].rstrip:
                begin = len(text) - len(text[begin:].lstrip())
        return [part for part in (*parts, text[begin:]) if part != ""]


class _Vocabulary:
    """A tokenizer.json, as the library runs it."""

    def __init__(self, json: bytes) -> None:
        self.library, self._lock = _open(json), threading.Lock()
        self.added = self.library.get_added_tokens_decoder()
        self.n_tokens = max(self.library.get_vocab_size(), *(id + 1 for id in self.added), 0)

    def token(self, id: int) -> str:
        return self.library.id_to_token(id) or ""

    def least(self, text: str) -> int:
        """No text of that length has fewer tokens: known without encoding it, or 0."""
        return 0

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Raises TypeError for text with lone surrogates."""
        return self._encoding(text, add_special, parse_special).ids

    def _encoding(self, text: str, add_special: bool, parse_special: bool) -> tokenizers.Encoding:
        # The library has one switch for all threads.
        with self._lock:
            self.library.encode_special_tokens = not parse_special
            return self.library.encode(text, add_special_tokens=add_special)


class _Tabled(_Vocabulary):
    """The same, its vocabulary in tables: the library finds added tokens, normalizes text and cuts it into words."""

    def __init__(self, bpe: BPE) -> None:
        from tokenizers.models import WordLevel

        super().__init__(bpe.json)
        self._bpe, self.n_tokens = bpe, bpe.n_tokens
        self._remembered = lru_cache(MOST_REMEMBERED)(self._encode_words)
        self._normalizer, self._pre_tokenizer = self.library.normalizer, self.library.pre_tokenizer
        self.library.normalizer = self.library.pre_tokenizer = None  # so that text is one token, and its place is known
        special = {id for id, token in self.added.items() if token.special}
        self._text_ids = {True: {self.n_tokens}, False: {self.n_tokens} | special}
        model, word_id = self.library.model, self.library.token_to_id(WORD)
        if not isinstance(model, WordLevel) or model.unk_token != WORD or word_id != self.n_tokens:
            raise EdgeFileError("the tokenizer's tables lack the token that stands for text; convert the model again")
        if (largest := max(self.added, default=-1)) >= self.n_tokens:
            raise EdgeFileError(
                f"the tokenizer's tables have {self.n_tokens} tokens, and an added one with the id {largest}; "
                "convert the model again"
            )

    def least(self, text: str) -> int:
        if not self._longest:
            return 0
        length = len(text.encode(errors="replace").translate(None, self._left_out)) if self._left_out else len(text)
        return -(-length // self._longest)

    @cached_property
    def _longest(self) -> int:
        """Characters of text that no token stands for more than; 0 if text may be left out, or that is not known."""
        spec = json.loads(self._bpe.json)
        normalizer = bpe.steps(spec["normalizer"], "normalizers")
        pre_tokenizer = bpe.steps(spec["pre_tokenizer"], "pretokenizers")
        has_bytes = self._bpe.falls_back or (pre_tokenizer and pre_tokenizer[-1]["type"] == "ByteLevel")
        strips = any(token.lstrip or token.rstrip for token in self.added.values())
        if strips or not has_bytes or not all(map(_keeps_text, pre_tokenizer)) or (normalizer and self._left_out):
            return 0
        return self._bpe.longest * math.prod(map(_most_made_one, normalizer))

    @cached_property
    def _left_out(self) -> bytes:
        """Bytes that this vocabulary has no token for."""
        if self._bpe.falls_back:
            return b""
        return bytes(byte for char, byte in _BYTES.items() if not self._bpe.encode(char))

    def token(self, id: int) -> str:
        return self._bpe.token(id)

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        ids = list(self._bpe.before) if add_special else []
        for part in self._parts(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
            elif len(part) in REMEMBERED:
                ids += self._remembered(part)
            else:
                ids += self._encode_words(part)
        return ids + self._bpe.after if add_special else ids

    def _encode_words(self, text: str) -> list[int]:
        return [id for word in self._words(text) for id in self._bpe.encode(word)]

    def _parts(self, text: str, parse_special: bool) -> Iterator[str | int]:
        """Added tokens, and the text between them."""
        found = self._encoding(text, False, parse_special)
        # Text that is spelled like a special token gets its id from the library even where it is not parsed as one.
        text_ids = self._text_ids[parse_special]
        for id, (begin, end) in zip(found.ids, found.offsets, strict=True):
            yield text[begin:end] if id in text_ids else id

    def _words(self, text: str) -> list[str]:
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        if self._pre_tokenizer is None:
            return [text]
        return [word for word, _ in self._pre_tokenizer.pre_tokenize_str(text)]


def _most_made_one(normalizer: Mapping[str, Any]) -> int:
    """Of how many characters it makes one; 0 if it may leave some out, or is not known here."""
    is_space = normalizer["type"] == "Replace" and normalizer["pattern"] == {"String": " "} and normalizer["content"]
    # No character is composed of more than four others.
    return {"NFC": 4, "Prepend": 1}.get(normalizer["type"], int(bool(is_space)))


def _keeps_text(pre_tokenizer: Mapping[str, Any]) -> bool:
    kind = pre_tokenizer["type"]
    return kind in ("ByteLevel", "Digits", "Metaspace") or (
        kind in ("Split", "Punctuation") and pre_tokenizer["behavior"] != "Removed"
    )


def _open(json: bytes) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        library = tokenizers.Tokenizer.from_buffer(json)
    except ValueError as error:
        raise EdgeFileError(
            f"the tokenizer cannot be read: {error}; expected a tokenizer.json: convert the model again"
        ) from error
    # Some come with the limits of the task they were trained for.
    library.no_truncation()
    library.no_padding()
    return library


def _decoding(library: tokenizers.Tokenizer, added: dict[int, Any]) -> tuple[Callable[[int, str], bytes], bool]:
    """How a token becomes bytes, and whether decoding drops the space that encoding put first."""
    if library.decoder is None:
        raise UnsupportedError("the tokenizer has no decoder; known are ByteLevel, Metaspace, and SentencePiece's")
    spec = json.loads(library.decoder.__getstate__())
    steps = {step["type"]: step for step in (spec["decoders"] if spec["type"] == "Sequence" else [spec])}
    if unknown := steps.keys() - {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        raise UnsupportedError(
            f"the tokenizer decodes by {', '.join(sorted(unknown))}; known are ByteLevel, "
            "Metaspace, and SentencePiece's"
        )
    if "ByteLevel" in steps:
        return lambda id, token: token.encode() if id in added else _unmap(token), False
    replace, metaspace = steps.get("Replace"), steps.get("Metaspace")
    old, new = (replace["pattern"].get("String", ""), replace["content"]) if replace else ("", "")
    if metaspace:
        old, new = metaspace["replacement"], " "
    drops_space = "Strip" in steps or (metaspace is not None and metaspace.get("prepend_scheme") != "never")
    is_byte = re.compile("<0x([0-9A-F]{2})>" if "ByteFallback" in steps else "(?!)")

    def to_bytes(id: int, token: str) -> bytes:
        byte = is_byte.fullmatch(token)
        return bytes.fromhex(byte[1]) if byte else (token.replace(old, new) if old else token).encode()

    return to_bytes, drops_space


def _unmap(token: str) -> bytes:
    """The bytes that a byte-level token stands for; one that is written plainly stands for itself."""
    try:
        return bytes(_BYTES[char] for char in token)
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: a visible character of Latin-1 is its own byte, the others follow one another from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()
