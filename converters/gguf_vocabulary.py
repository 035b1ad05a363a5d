"""A tokenizer.json -> GGUF metadata from which llama.cpp makes the same ids: the inverse of gguf_tokenizer.

What GGUF cannot say is not looked for piece by piece: the metadata is read back, and must give the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellm.errors import CheckpointError, UnsupportedError

from .gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    pre_tokenizer_name,
    tokenizer_from_gguf,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROBES = (
    "Hello, World! It's 12345678 o'clock; we'LL see: I'VE 3.14159, won't, DON'T",
    "camelCase HTTPServer snake_case __init__(self): return a[i] += b//2  # ok?\n\n\tx = y**2 != `z`;\r\n/end//\n",
    "  two  spaces   three\n \n\n   \t tabs\t\t  ",
    "Gr\u00f6\u00dfe, na\u00efve caf\u00e9, \u00c5NGSTR\u00d6M; \u041f\u0440\u0438\u0432\u0435\u0442",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0662\u0663 \u0645\u0631\u062d\u0628\u0627 \u0e2a\u0e27\u0e31",
    "\u4f60\u597d\uff0c\u4e16\u3002\u65e5\u672c\u306e\u3001\ud55c\uad6d\uc5b4 \ubb38\uc7a5 \u2460\u2461 \u00bd",
    "\U0001f469\u200d\U0001f4bb \u2194 \u2211\u221e \u20ac5 \u201cso\u201d \u2026 \u2014 \u2022",
    "https://example.com/a/b?c=d&e=f#g a@b.co $100.50 50% <|tag|> [INST] \\n \x01\x7f",
)
"""Texts of which each way to cut text into words makes something else."""


def vocabulary_to_gguf(text: bytes, bos_id: int | None, eos_ids: Sequence[int], size: int) -> dict[str, Any]:
    """The tokenizer.ggml entries for a tokenizer.json, with unused tokens up to the model's `size`.

    Raises UnsupportedError for a tokenizer that GGUF, or this version, has no words for.
    """
    from tokenizers import Tokenizer

    spec, library = json.loads(text), Tokenizer.from_buffer(text)
    library.no_truncation()
    library.no_padding()
    model = spec["model"]
    if model["type"] != "BPE":
        raise UnsupportedError(f"a tokenizer of the kind {model['type']} cannot be exported; this version exports BPE")
    byte_level = "ByteLevel" in json.dumps([spec["pre_tokenizer"], spec["decoder"]])
    said = _byte_level(library, model) if byte_level else _sentencepiece(library, model, size)
    said |= _pieces(library, model, size) | _special(library, bos_id, eos_ids)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in said.items()}
    _check(metadata, library, bos_id, eos_ids)
    return metadata


def _byte_level(library: Tokenizer, model: Mapping[str, Any]) -> dict[str, Any]:
    pre = pre_tokenizer_name(library.pre_tokenizer, bool(model.get("ignore_merges")), PROBES)
    if pre is None:
        raise UnsupportedError("the tokenizer cuts text into words in a way that GGUF has no name for")
    return {"model": "gpt2", "pre": pre, "merges": [" ".join(pair) for pair in _merges(model)]}


def _sentencepiece(library: Tokenizer, model: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The better a piece, the sooner it is merged."""
    ids, merges = model["vocab"], _merges(model)
    scores = np.arange(-len(merges), -len(merges) - size, -1, dtype=np.float32)
    for rank, (left, right) in reversed([*enumerate(merges)]):
        scores[ids[left + right]] = -rank
    prefixed = library.encode("a", add_special_tokens=False).tokens[0].startswith("\u2581")
    return {"model": "llama", "scores": scores, "add_space_prefix": prefixed}


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Older files have them as text, "left right"."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return [(left, right) for left, right in pairs]


def _pieces(library: Tokenizer, model: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The tokens, and what each is."""
    tokens, types = [f"[PAD{id}]" for id in range(size)], np.full(size, UNUSED, np.int32)
    for token, id in library.get_vocab(with_added_tokens=False).items():
        tokens[id], types[id] = token, NORMAL
    if model.get("byte_fallback"):
        for byte in range(256):
            if (id := model["vocab"].get(f"<0x{byte:02X}>")) is not None:
                types[id] = BYTE
    for id, added in library.get_added_tokens_decoder().items():
        tokens[id], types[id] = added.content, CONTROL if added.special else USER_DEFINED
    unknown = model["vocab"].get(model.get("unk_token"))
    if unknown is None:
        return {"tokens": tokens, "token_type": types}
    types[unknown] = UNKNOWN
    return {"tokens": tokens, "token_type": types, "unknown_token_id": unknown}


def _special(library: Tokenizer, bos_id: int | None, eos_ids: Sequence[int]) -> dict[str, Any]:
    around = library.encode("").ids
    begins = around[:1] == [bos_id]
    ends = len(around) > begins and around[-1] in eos_ids
    known = {"bos": bos_id, **dict(zip(("eos", "eot", "eom"), eos_ids, strict=False))}
    ids = {f"{name}_token_id": id for name, id in known.items() if id is not None}
    return {**ids, "add_bos_token": begins, "add_eos_token": ends}


def _check(metadata: Mapping[str, Any], library: Tokenizer, bos_id: int | None, eos_ids: Sequence[int]) -> None:
    """Raise UnsupportedError unless the metadata gives the same ids."""
    from tokenizers import Tokenizer

    try:
        source = tokenizer_from_gguf(metadata)
    except CheckpointError as error:
        raise UnsupportedError(f"the tokenizer cannot be written to GGUF: {error}") from error
    if source.bos_id != bos_id or not set(eos_ids) <= set(source.eos_ids):
        raise UnsupportedError(
            f"the model has BOS {bos_id} and ends answers with {list(eos_ids)}; as GGUF it would have {source.bos_id} "
            f"and {list(source.eos_ids)}"
        )
    again = Tokenizer.from_buffer(source.json)
    for text in _texts(library):
        expected, found = library.encode(text).ids, again.encode(text).ids
        if found != expected:
            at = next(i for i, (a, b) in enumerate(zip([*expected, None], [*found, None], strict=False)) if a != b)
            raise UnsupportedError(
                f"GGUF has no words for this tokenizer: the ids of {text[:40]!r} would differ from number {at} on, "
                f"{found[at : at + 4]} instead of {expected[at : at + 4]}"
            )


def _texts(library: Tokenizer) -> Iterator[str]:
    yield from PROBES
    yield from (f"a {token.content} b{token.content}c" for token in library.get_added_tokens_decoder().values())
    yield "\n".join(library.get_vocab(with_added_tokens=False))
