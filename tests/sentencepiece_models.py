"""SentencePiece models put together field by field, of a vocabulary that another file has, or hostile."""

import struct


def varint(number):
    number &= (1 << 64) - 1
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes([*data, number])


def field(number, value):
    """A field of text or a message, a whole number, or a float32."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def message(fields):
    return b"".join(field(number, value) for number, value in fields.items())


def model(pieces, trainer=None, normalizer=None):
    """`pieces` are (text, score, type); the others are fields by number: 3 of the trainer is 2 for BPE."""
    return (
        b"".join(field(1, message({1: text, 2: float(score), 3: int(type)})) for text, score, type in pieces)
        + field(2, message(trainer or {}))
        + field(3, message(normalizer or {}))
    )


def of_gguf(metadata):
    """Llama's kind of model, BPE with bytes for unknown text, from the vocabulary in a GGUF's metadata."""
    keys = ("tokens", "scores", "token_type")
    pieces = zip(*(metadata[f"tokenizer.ggml.{key}"] for key in keys), strict=True)
    return model(pieces, {3: 2, 35: 1}, {3: 1, 4: 0, 5: 1})
