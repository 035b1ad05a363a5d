"""Vocabularies of a few hundred tokens, as GGUF metadata and as tokenizers."""

import numpy as np

from edgellm import bpe
from edgellm.bpe import BPE
from edgellm.converters.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, tokenizer_from_gguf
from edgellm.tokenizer import _BYTES, Tokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
WORDS = ["he", "ll", "hell", "hello", "\u2581hello", "\u2581w", "\u2581\u2581"]


def metadata(kind, tokens, types, **more):
    return entries({"model": kind, "tokens": tokens, "token_type": np.array(types, np.int32)} | more)


def entries(values):
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def byte_level(**more):
    """Every byte is a token, and a few are merged."""
    alphabet = sorted(_BYTES, key=_BYTES.__getitem__)
    tokens = [*SPECIAL, "<think>", *alphabet, "he", "ll", "hell"]
    types = [CONTROL] * len(SPECIAL) + [USER_DEFINED] + [NORMAL] * (len(tokens) - len(SPECIAL) - 1)
    return metadata(
        "gpt2", tokens, types, pre="smollm", merges=["h e", "l l", "he ll"], bos_token_id=0, eos_token_id=1
    ) | entries(more)


def sentencepiece(**more):
    letters = sorted({*"abcdefghijklmnopqrstuvwxyz\u2581,.!"})
    tokens = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *WORDS]
    types = [UNKNOWN] + [CONTROL] * len(SPECIAL) + [BYTE] * 256 + [NORMAL] * (len(letters) + len(WORDS))
    scores = np.array([-float(id) for id in range(len(tokens))], np.float32)
    return metadata("llama", tokens, types, scores=scores, bos_token_id=1, eos_token_id=2) | entries(more)


def tokenizer(metadata):
    """As a converted model has it: with tables where there are any."""
    source = tokenizer_from_gguf(metadata)
    tables = bpe.tables(source.json)
    vocabulary = source.json if tables is None else BPE(np.frombuffer(tables, np.uint8))
    return Tokenizer(vocabulary, source.bos_id, source.eos_ids)
