"""Text to ids and back. Knows one tokenizer.json; knows no model and no chat."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgellm.errors import ArgumentError, EdgeFileError, UnsupportedError

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """A tokenizer.json and the ids that mean something to a runtime. Threads may share one."""

    def __init__(self, json: bytes, bos_id: int | None, eos_ids: Sequence[int]) -> None:
        """Raises EdgeFileError if `json` is damaged, UnsupportedError if it decodes in a way that is not known here."""
        self._library = _open(json)
        self._lock = threading.Lock()
        self._added = self._library.get_added_tokens_decoder()
        self.n_tokens = max(self._library.get_vocab_size(), *(id + 1 for id in self._added), 0)
        self._is_special = {id for id, token in self._added.items() if token.special}
        self._bytes: list[bytes | None] = [None] * self.n_tokens
        self._to_bytes, self.drops_space = _decoding(self._library, self._added)
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
            # The library has one switch for all threads.
            with self._lock:
                self._library.encode_special_tokens = not parse_special
                return self._library.encode(text, add_special_tokens=add_special).ids
        except TypeError as error:
            raise ArgumentError(f"{text[:80]!r} cannot be encoded; expected text without lone surrogates") from error

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Bytes that are no UTF-8 come out as U+FFFD."""
        raw = b"".join(self.token_bytes(id) for id in ids if not (skip_special and id in self._is_special))
        return self.without_space(raw.decode(errors="replace"))

    def token_bytes(self, id: int) -> bytes:
        """What a token stands for; not always whole characters."""
        if not 0 <= id < self.n_tokens:
            raise ArgumentError(f"{id} is no token id; expected 0 to {self.n_tokens - 1}")
        cached = self._bytes[id]
        if cached is None:
            cached = self._bytes[id] = self._to_bytes(id, self._library.id_to_token(id) or "")
        return cached

    def without_space(self, text: str) -> str:
        """Decoded text without the space that encoding put before it."""
        return text.removeprefix(" ") if self.drops_space else text

    def id_to_token(self, id: int) -> str:
        """A token as the vocabulary spells it."""
        self.token_bytes(id)
        return self._library.id_to_token(id) or ""

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
