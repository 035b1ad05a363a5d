"""Byte pair encoding from tables that a .edge file maps, so that a start parses no vocabulary; see docs/format.md.

`tables` makes them of a tokenizer.json, `BPE` maps them and encodes words; both sides of each rule stand in this file.
How text is cut into words, and what decoding makes of a token, is for `tokenizer` to know.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

from edgellm.arrays import U8, Array
from edgellm.errors import EdgeFileError

if TYPE_CHECKING:
    import tokenizers

WORD = "\U000f0000"
"""The token that stands for text in a tokenizer.json whose vocabulary is in the tables."""
SPACE = "\u2581"
"""What SentencePiece writes for a space."""
SECTIONS = {
    "json": np.uint8,
    "text": np.uint8,
    "ends": np.uint32,
    "word_sums": np.uint32,
    "word_ids": np.uint32,
    "pairs": np.uint64,
    "ranks": np.uint32,
    "merged": np.uint32,
    "bytes": np.uint32,
    "joints": np.uint32,
    "before": np.uint32,
    "after": np.uint32,
}
"""The arrays of the tables in their order; before them stand their sizes."""
ALIGNMENT = 64
MAX_CACHED = 1 << 17
"""Words, and pairs of tokens, that are remembered; then all are forgotten."""
MAX_CACHED_WORD = 64
_UNMERGED = (1 << 32) - 1
_GONE = -1


# ---- made


def tables(tokenizer_json: bytes) -> bytes | None:
    """The tables of a tokenizer.json; None where the library itself must encode, see `_is_plain`."""
    from tokenizers import Tokenizer

    library = Tokenizer.from_buffer(tokenizer_json)
    whole, added = json.loads(library.to_str()), library.get_added_tokens_decoder()
    vocab = whole["model"]["vocab"] = library.get_vocab(with_added_tokens=False)
    n_tokens = max(library.get_vocab_size(), *(id + 1 for id in added), 0)
    if not _is_plain(whole) or any(id >= n_tokens or library.id_to_token(id) != token for token, id in vocab.items()):
        return None
    tokens = [(library.id_to_token(id) or "").encode() for id in range(n_tokens)]
    ranks = _ranks(whole["model"])
    words = sorted((crc32(tokens[id]), id) for id in _whole_words(library, whole["model"]))
    pairs = sorted(ranks)
    added_ids = {token.content: id for id, token in added.items()}
    model = {"type": "WordLevel", "vocab": added_ids | {WORD: n_tokens}, "unk_token": WORD}
    rest = whole | {"truncation": None, "padding": None, "model": model}
    before, after = _frame(rest)
    return _packed(
        json=np.frombuffer(json.dumps(rest | {"post_processor": None}, ensure_ascii=False).encode(), np.uint8),
        text=np.frombuffer(b"".join(tokens), np.uint8),
        ends=np.cumsum([len(token) for token in tokens]),
        word_sums=[checksum for checksum, _ in words],
        word_ids=[id for _, id in words],
        pairs=pairs,
        ranks=[ranks[pair][0] for pair in pairs],
        merged=[id for _, id in sorted(ranks.values())],
        bytes=[vocab[name] for name in _BYTE_NAMES] if whole["model"]["byte_fallback"] else [],
        joints=sorted({ord(char) for token in vocab for char in re.findall(f"[^{SPACE}](?={SPACE})", token)}),
        before=before,
        after=after,
    )


_BYTE_NAMES = [f"<0x{byte:02X}>" for byte in range(256)]


def _is_plain(whole: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is byte pair encoding that `BPE` does in the same way."""
    model = whole["model"]
    if model["type"] != "BPE":
        return False
    rare = any(model[option] for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    return not rare and _has_parts(whole) and _has_characters(model, steps(whole["pre_tokenizer"], "pretokenizers"))


def _has_parts(whole: Mapping[str, Any]) -> bool:
    """Whether each text between added tokens is encoded apart from the rest, and stands once in what is made of it."""
    pre_tokenizer = steps(whole["pre_tokenizer"], "pretokenizers")
    first = any(step["type"] == "Metaspace" and step["prepend_scheme"] == "first" for step in pre_tokenizer)
    added = any(
        token["single_word"] or (token["normalized"] and whole["normalizer"]) for token in whole["added_tokens"]
    )
    templates = [step["single"] for step in steps(whole["post_processor"], "processors") if "single" in step]
    return not first and not added and all(sum("Sequence" in piece for piece in single) == 1 for single in templates)


def _has_characters(model: Mapping[str, Any], pre_tokenizer: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a character that is no token is its bytes, which are not merged, or nothing."""
    vocab = model["vocab"].keys()
    if model["byte_fallback"]:
        merged = {part for merge in model["merges"] for part in merge}
        return vocab >= set(_BYTE_NAMES) and merged.isdisjoint(_BYTE_NAMES)
    if pre_tokenizer and pre_tokenizer[-1]["type"] == "ByteLevel":
        return model["unk_token"] is None or vocab >= _alphabet()
    # Around a character that is nothing, others may be merged: words could not be cut before spaces.
    return model["unk_token"] is None and not any(SPACE in token for token in vocab)


def steps(spec: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """The steps of what may be nothing, one or a sequence."""
    if spec is None:
        return []
    return [step for part in spec[name] for step in steps(part, name)] if spec["type"] == "Sequence" else [spec]


def _alphabet() -> set[str]:
    """The characters that stand for bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())


def _ranks(model: Mapping[str, Any]) -> dict[int, tuple[int, int]]:
    """left << 32 | right of two ids -> the rank of their merge, and the id of what it makes."""
    vocab = model["vocab"]
    made = {vocab[left] << 32 | vocab[right]: vocab[left + right] for left, right in model["merges"]}
    return {pair: (rank, id) for rank, (pair, id) in enumerate(made.items())}


def _whole_words(library: tokenizers.Tokenizer, model: Mapping[str, Any]) -> Iterator[int]:
    """Ids of the tokens that stay whole as words: their merges lead to them, or are not asked."""
    merge = library.model.tokenize
    for token, id in model["vocab"].items():
        if token and (model["ignore_merges"] or [part.id for part in merge(token)] == [id]):
            yield id


def _frame(rest: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The ids that are put before and after a text; `rest` makes one token of it."""
    from tokenizers import Tokenizer

    library = Tokenizer.from_buffer(json.dumps(rest | {"normalizer": None, "pre_tokenizer": None}).encode())
    framed = library.encode("a")
    at = framed.special_tokens_mask.index(0)
    return framed.ids[:at], framed.ids[at + 1 :]


def _packed(**arrays: Any) -> bytes:
    """Sizes, then the arrays, each padded to a multiple of 64 bytes."""
    parts: list[Array] = [np.asarray(arrays[name], type) for name, type in SECTIONS.items()]
    sizes = np.array([len(part) for part in parts], np.uint32)
    return b"".join(part.tobytes() + bytes(-part.nbytes % ALIGNMENT) for part in (sizes, *parts))


# ---- read


class BPE:
    """The tables of a tokenizer, in place. Threads may share them."""

    def __init__(self, data: U8) -> None:
        """Raises EdgeFileError for damaged tables: what they lead to is an id, or nothing, and never without end."""
        arrays = _unpacked(data)
        _check(arrays)
        self.json, self.n_tokens = arrays["json"].tobytes(), len(arrays["ends"])
        self._text, self._ends = arrays["text"].data, arrays["ends"].data
        self._word_sums, self._word_ids = arrays["word_sums"].data, arrays["word_ids"].data
        self._pairs, self._ranks, self._merged = (arrays[name].data for name in ("pairs", "ranks", "merged"))
        self.before, self.after = arrays["before"].tolist(), arrays["after"].tolist()
        self._byte_ids = arrays["bytes"].tolist()
        self._cut = re.compile(f"(?<=[^{re.escape(SPACE + ''.join(map(chr, arrays['joints'].tolist())))}])(?={SPACE})")
        self._words: dict[str, list[int]] = {}
        self._chars: dict[str, list[int]] = {}
        self._known_ranks: dict[int, int] = {}

    @property
    def longest(self) -> int:
        """Characters of the longest token, as the vocabulary spells it: of no fewer than it stands for."""
        begins = np.frombuffer(self._text, np.uint8) & 0xC0 != 0x80  # of characters in UTF-8
        places = np.concatenate([[0], np.cumsum(begins)])[np.frombuffer(self._ends, np.uint32)]
        return int(np.diff(places, prepend=0).max())

    @property
    def falls_back(self) -> bool:
        """Whether a character that is no token becomes tokens of its bytes."""
        return bool(self._byte_ids)

    def token(self, id: int) -> str:
        """A token as the vocabulary spells it; "" for an id that stands for none."""
        return str(self._spelled(id), errors="replace")

    def encode(self, text: str) -> list[int]:
        """The ids of a word, which is cut further where no token goes across."""
        words = self._cut.split(text) if SPACE in text else [text]
        return [id for word in words for id in self._words.get(word) or self._encode(word)]

    def _encode(self, word: str) -> list[int]:
        id = self._find(word)
        ids = self._merge([id for char in word for id in self._symbols(char)]) if id is None else [id]
        if len(word) <= MAX_CACHED_WORD:
            self._words = self._words if len(self._words) < MAX_CACHED else {}
            self._words[word] = ids
        if len(self._known_ranks) > MAX_CACHED:
            self._known_ranks = {}
        return ids

    def _symbols(self, char: str) -> list[int]:
        """The ids that a character is before anything is merged: its own, or its bytes' where bytes are tokens."""
        known = self._chars.get(char)
        if known is None:
            id, raw = self._find(char), char.encode() if self._byte_ids else b""
            known = self._chars[char] = [self._byte_ids[byte] for byte in raw] if id is None else [id]
        return known

    def _find(self, word: str) -> int | None:
        """The token that a word is as a whole."""
        spelled = word.encode()
        checksum = crc32(spelled)
        for at in range(bisect_left(self._word_sums, checksum), len(self._word_sums)):
            if self._word_sums[at] != checksum:
                break
            if self._spelled(self._word_ids[at]) == spelled:
                return self._word_ids[at]
        return None

    def _spelled(self, id: int) -> memoryview:
        return self._text[self._ends[id - 1] if id else 0 : self._ends[id]]

    def _merge(self, ids: list[int]) -> list[int]:
        """Merge the pair of the lowest rank, of several the leftmost, until none has a rank.

        A pair is known by the place of its left part. Merged away is what a neighbour has swallowed.
        """
        n, rank = len(ids), self._rank
        before, after = list(range(-1, n)), list(range(1, n + 1))
        ranks = [*map(rank, ids, ids[1:]), _UNMERGED]
        queue = [known << 32 | at for at, known in enumerate(ranks) if known != _UNMERGED]
        heapify(queue)
        while queue:
            lowest, at = divmod(heappop(queue), 1 << 32)
            if ranks[at] != lowest:  # the pair has gone since
                continue
            swallowed, ids[at] = after[at], self._merged[lowest]
            after[at] = after[swallowed]
            before[after[at]] = at
            ids[swallowed], ranks[swallowed], ranks[at] = _GONE, _UNMERGED, _UNMERGED
            for left, right in ((before[at], at), (at, after[at])):
                if left >= 0 and right < n:
                    ranks[left] = new = rank(ids[left], ids[right])
                    if new != _UNMERGED:
                        heappush(queue, new << 32 | left)
        return [id for id in ids if id != _GONE]

    def _rank(self, left: int, right: int) -> int:
        """When two tokens are merged; _UNMERGED if never."""
        pair = left << 32 | right
        rank = self._known_ranks.get(pair)
        if rank is None:
            at = bisect_left(self._pairs, pair)
            found = at < len(self._pairs) and self._pairs[at] == pair
            rank = self._known_ranks[pair] = self._ranks[at] if found else _UNMERGED
        return rank


def _unpacked(data: U8) -> dict[str, Array]:
    """The arrays, as views."""
    places, at = {}, ALIGNMENT
    sizes = data[: 4 * len(SECTIONS)].view(np.uint32).tolist() if len(data) >= ALIGNMENT else []
    for name, size in zip(SECTIONS, sizes, strict=False):
        end = at + size * np.dtype(SECTIONS[name]).itemsize
        places[name], at = slice(at, end), end + -end % ALIGNMENT
    if at != len(data) or not sizes:
        raise _damaged(f"they have {len(data)} bytes, and say that they have {at}")
    return {name: data[place].view(SECTIONS[name]) for name, place in places.items()}


def _check(arrays: Mapping[str, Array]) -> None:
    ends, n_merges, text = arrays["ends"], len(arrays["pairs"]), arrays["text"]
    if len(arrays["word_sums"]) != len(arrays["word_ids"]):
        raise _damaged("a word has no token")
    if {len(arrays["ranks"]), len(arrays["merged"])} != {n_merges} or len(arrays["bytes"]) not in (0, 256):
        raise _damaged("a merge has no rank or result, or a byte no token")
    if not len(ends) or ends[-1] != len(text) or (ends[1:] < ends[:-1]).any():
        raise _damaged("a token ends before it begins")
    limits = dict.fromkeys(("word_ids", "merged", "bytes", "before", "after"), len(ends))
    for name, limit in {**limits, "ranks": n_merges, "joints": 0x110000}.items():
        if len(arrays[name]) and (largest := arrays[name].max()) >= limit:
            raise _damaged(f"{name} has {largest}, expected less than {limit}")


def _damaged(what: str) -> EdgeFileError:
    return EdgeFileError(f"the tokenizer's tables are damaged: {what}; convert the model again")
