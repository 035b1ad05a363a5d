import re
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from conftest import shared
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.api import Model
from edgellm.converters import convert
from edgellm.converters.blocks import decode_rows
from edgellm.converters.gguf import GGUFFile, read_gguf
from edgellm.errors import CheckpointError, EdgeError, UnsupportedError

U8, U16, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 2, 4, 5, 6, 7, 8, 9, 10
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def u32(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def u64(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data)) + data


def value(kind: int, content: object) -> bytes:
    return text(content) if kind == STRING else struct.pack("<" + CODES[kind], content)


def entry(key: str, kind: int, content: object) -> bytes:
    return text(key) + u32(kind) + value(kind, content)


def array(key: str, kind: int, content: list) -> bytes:
    return text(key) + u32(ARRAY, kind) + u64(len(content)) + b"".join(value(kind, item) for item in content)


def info(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    return text(name) + u32(len(dims) if n_dims is None else n_dims) + u64(*dims) + u32(kind) + u64(offset)


def file(
    entries: list[bytes],
    infos: list[bytes] = (),
    data: bytes = b"",
    *,
    alignment: int = 32,
    version: int = 3,
    magic: bytes = b"GGUF",
    n_tensors: int | None = None,
    n_entries: int | None = None,
) -> bytes:
    header = (
        magic
        + u32(version)
        + u64(len(infos) if n_tensors is None else n_tensors, len(entries) if n_entries is None else n_entries)
    )
    head = header + b"".join((*entries, *infos))
    return head + b"\0" * (-len(head) % alignment) * bool(infos) + data


# A model of one layer.

TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
TYPES = [2, 3, 3, 1, 1, 1]
SIZES = {
    "context_length": 8,
    "embedding_length": 4,
    "block_count": 1,
    "feed_forward_length": 6,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
}
ENTRIES = {
    "general.architecture": entry("general.architecture", STRING, "llama"),
    **{f"llama.{key}": entry(f"llama.{key}", U32, size) for key, size in SIZES.items()},
    "llama.attention.layer_norm_rms_epsilon": entry("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
    "tokenizer.ggml.model": entry("tokenizer.ggml.model", STRING, "llama"),
    "tokenizer.ggml.tokens": array("tokenizer.ggml.tokens", STRING, TOKENS),
    "tokenizer.ggml.scores": array("tokenizer.ggml.scores", F32, [0, 0, 0, -2, -3, -1]),
    "tokenizer.ggml.token_type": array("tokenizer.ggml.token_type", I32, TYPES),
    "tokenizer.ggml.bos_token_id": entry("tokenizer.ggml.bos_token_id", U32, 1),
    "tokenizer.ggml.eos_token_id": entry("tokenizer.ggml.eos_token_id", U32, 2),
}
SHAPES = {
    "token_embd.weight": (6, 4),
    "blk.0.attn_norm.weight": (4,),
    "blk.0.attn_q.weight": (4, 4),
    "blk.0.attn_k.weight": (2, 4),
    "blk.0.attn_v.weight": (2, 4),
    "blk.0.attn_output.weight": (4, 4),
    "blk.0.ffn_norm.weight": (4,),
    "blk.0.ffn_gate.weight": (6, 4),
    "blk.0.ffn_up.weight": (6, 4),
    "blk.0.ffn_down.weight": (4, 6),
    "output_norm.weight": (4,),
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return (np.arange(np.prod(shape), dtype=np.float32) + len(name)).reshape(shape)


def model(
    changes: dict[str, bytes | None] | None = None, shapes: dict[str, tuple[int, ...] | None] | None = None
) -> bytes:
    """The model with some entries and shapes added, replaced, or (None) left out."""
    entries = [made for made in {**ENTRIES, **(changes or {})}.values() if made is not None]
    infos, data = [], b""
    for name, shape in {**SHAPES, **(shapes or {})}.items():
        if shape is not None:
            infos.append(info(name, shape[::-1], 0, len(data)))
            data += weight(name, shape).tobytes()
            data += b"\0" * (-len(data) % 32)
    return file(entries, infos, data)


def with_entry(key: str, kind: int, content: object) -> bytes:
    make = array if isinstance(content, list) else entry
    return model({key: make(key, kind, content)})


ONE = [info("w", (8,))]
DATA = bytes(32)
ARCHITECTURE = ENTRIES["general.architecture"]


def aligned(kind: int, alignment: int, **changes: int) -> bytes:
    return file([entry("general.alignment", kind, alignment)], ONE, DATA, **changes)


BAD_LAYOUTS = [
    # name, bytes, error, words of the message
    ("empty", b"", CheckpointError, "ends in the magic number: 4 bytes expected at byte 0, 0 found"),
    ("bad magic", file([], magic=b"GGML"), CheckpointError, "starts with b'GGML'; expected b'GGUF'"),
    ("version 0", file([], version=0), UnsupportedError, "GGUF version 0; this version reads 2 and 3"),
    ("version 1", file([], version=1), UnsupportedError, "GGUF version 1; this version reads 2 and 3"),
    ("future version", file([], version=4), UnsupportedError, "GGUF version 4; .* newer edgellm"),
    ("big-endian", b"GGUF\0\0\0\3" + bytes(16), UnsupportedError, "big-endian"),
    ("too many tensors", file([], n_tensors=2**64 - 1), CheckpointError, "announces 18446744073709551615 tensors"),
    ("too many entries", file([], n_entries=2**61), CheckpointError, "announces 2305843009213693952 metadata entries"),
    ("more tensors than bytes", file([], n_tensors=9), CheckpointError, "288 bytes expected at byte 24, 0 found"),
    ("more entries than bytes", file([], n_entries=9), CheckpointError, "117 bytes expected at byte 24, 0 found"),
    ("missing entries", file([ARCHITECTURE], n_entries=2), CheckpointError, "ends in the key of metadata entry 1"),
    # Metadata.
    ("key of 2^63 bytes", file([u64(2**63) + bytes(99)]), CheckpointError, "is 9223372036854775808 bytes long"),
    ("key longer than the file", file([u64(999) + bytes(9)]), CheckpointError, "999 bytes expected"),
    ("key not UTF-8", file([text(b"\xff\xfe") + u32(U8) + b"1"]), CheckpointError, "entry 0 is not UTF-8"),
    ("unknown value type", file([text("k") + u32(13, 0)]), CheckpointError, "value of type 13; expected 0 to 12"),
    ("duplicate key", file([entry("k", U8, 1)] * 2), CheckpointError, "'k' stands there twice"),
    ("truth value 2", file([text("k") + u32(BOOL) + b"\2"]), CheckpointError, "truth value 2"),
    (
        "truth value 7 in an array",
        file([text("k") + u32(ARRAY, BOOL) + u64(2) + b"\1\7"]),
        CheckpointError,
        "truth value 7",
    ),
    (
        "string of 2^64 - 1 bytes",
        file([text("k") + u32(STRING) + u64(2**64 - 1) + bytes(9)]),
        CheckpointError,
        "is 18446744073709551615 bytes long",
    ),
    ("value not UTF-8", file([entry("k", STRING, b"\xc3")]), CheckpointError, "'k' is not UTF-8"),
    (
        "array of 2^63 strings, 49 bytes",
        b"GGUF" + u32(3) + u64(0, 1) + text("k") + u32(ARRAY, STRING) + u64(2**63),
        CheckpointError,
        "ends in metadata 'k'",
    ),
    (
        "array of 2^63 numbers",
        file([text("k") + u32(ARRAY, U64) + u64(2**63) + bytes(9)]),
        CheckpointError,
        "ends in metadata 'k'",
    ),
    (
        "array whose size wraps to 0",
        file([text("k") + u32(ARRAY, U64) + u64(2**61) + bytes(9)]),
        CheckpointError,
        "ends in metadata 'k'",
    ),
    ("array of unknown type", file([text("k") + u32(ARRAY, 99) + u64(1, 1)]), CheckpointError, "value of type 99"),
    (
        "nested arrays, 36 KB",
        file([text("k") + u32(ARRAY) + (u32(ARRAY) + u64(1)) * 3000]),
        UnsupportedError,
        "array of arrays",
    ),
    (
        "string in an array too long",
        file([text("k") + u32(ARRAY, STRING) + u64(1, 2**40)]),
        CheckpointError,
        "'k' is 1099511627776 bytes long",
    ),
    ("alignment 0", aligned(U32, 0), CheckpointError, "general.alignment is 0; expected a power of two"),
    ("alignment 3", aligned(U32, 3), CheckpointError, "general.alignment is 3; expected a power of two"),
    ("alignment 2^31", aligned(U32, 2**31), CheckpointError, "general.alignment is 2147483648; .* up to 65536"),
    ("alignment of another type", aligned(I32, 32), CheckpointError, "stored as INT32; expected UINT32"),
    (
        "alignment as an array",
        file([array("general.alignment", U32, [32])], ONE, DATA),
        CheckpointError,
        "stored as ARRAY of UINT32; expected UINT32",
    ),
    # Tensors.
    (
        "name of 2^63 bytes",
        file([], [u64(2**63) + bytes(64)]),
        CheckpointError,
        "tensor 0 is 9223372036854775808 bytes",
    ),
    ("name too long", file([], [info("w" * 65, (8,))], DATA), CheckpointError, "is 65 bytes long; expected at most 64"),
    ("name twice", file([], ONE * 2, DATA), CheckpointError, "tensor 'w' stands there twice"),
    ("no dimensions", file([], [info("w", ()) + bytes(8)], DATA), CheckpointError, "has 0 dimensions"),
    ("five dimensions", file([], [info("w", (1,) * 5)], DATA), CheckpointError, "has 5 dimensions; expected 1 to 4"),
    ("2^32 - 1 dimensions", file([], [info("w", (8,), n_dims=2**32 - 1)]), CheckpointError, "4294967295 dimensions"),
    (
        "dimension 0",
        file([], [info("w", (8, 0))], DATA),
        CheckpointError,
        r"dimensions \(8, 0\); expected each to be 1",
    ),
    ("columns 0", file([], [info("w", (0, 8))], DATA), CheckpointError, "expected each to be 1 or more"),
    ("columns 2^62", file([], [info("w", (2**62,))], DATA), CheckpointError, "bytes 64 to 18446744073709551680, but"),
    ("columns 2^63 - 3", file([], [info("w", (2**63 - 3, 4))], DATA), CheckpointError, "the file ends at"),
    ("columns 2^64 / 4", file([], [info("w", (2**62 - 1, 4))], DATA), CheckpointError, "the file ends at"),
    ("product wraps", file([], [info("w", (2, 2**63 + 500))], DATA), CheckpointError, "the file ends at"),
    ("product wraps to 0", file([], [info("w", (2**32, 2**32))], DATA), CheckpointError, "the file ends at"),
    ("unknown type", file([], [info("w", (8,), 42)], DATA), CheckpointError, "has the type 42; expected .* up to 41"),
    ("type 2^32 - 1", file([], [info("w", (8,), 2**32 - 1)], DATA), CheckpointError, "has the type 4294967295"),
    *(
        (f"type {name}", file([], [info("w", (256,), kind)], DATA), UnsupportedError, f"stored as {name}; this version")
        for kind, name in (
            (4, "Q4_2"),
            (9, "Q8_1"),
            (23, "IQ4_XS"),
            (28, "F64"),
            (31, "Q4_0_4_4"),
            (39, "MXFP4"),
        )
    ),
    (
        "rows not of whole blocks",
        file([], [info("w", (33,), 2)], DATA),
        CheckpointError,
        "33 values; .* multiple of 32",
    ),
    (
        "offset not aligned",
        file([], [info("w", (4,), offset=16)], DATA),
        CheckpointError,
        "offset 16; .* alignment, 32",
    ),
    ("offset 2^32", file([], [info("w", (8,), offset=2**32)], DATA), CheckpointError, "the file ends at"),
    ("offset + size wraps", file([], [info("w", (8,), offset=2**64 - 32)], DATA), CheckpointError, "the file ends at"),
    (
        "padded sizes wrap",
        file([], [info("v", (2**62 - 1,)), info("w", (8,), offset=2**64 - 32)], DATA),
        CheckpointError,
        "the file ends at",
    ),
    (
        "overlap",
        file([], [info("v", (16,)), info("w", (8,), offset=32)], DATA * 2),
        CheckpointError,
        "'v' and 'w' overlap",
    ),
    # Data.
    ("not enough data", file([], ONE, DATA[:-1]), CheckpointError, "damaged or incomplete"),
    ("no data", file([], ONE), CheckpointError, "damaged or incomplete"),
    ("data at another alignment", aligned(U32, 128), CheckpointError, "damaged or incomplete"),
    (
        "offset at another alignment",
        file([entry("general.alignment", U32, 64)], [info("w", (8,), offset=32)], DATA * 4, alignment=64),
        CheckpointError,
        "multiple of the alignment, 64",
    ),
]

BAD_MODELS = [
    ("vocabulary only", file(list(ENTRIES.values())), CheckpointError, "vocabulary and no weights"),
    ("no architecture", model({"general.architecture": None}), CheckpointError, "does not say its architecture"),
    ("architecture a number", with_entry("general.architecture", U32, 1), CheckpointError, "expected STRING"),
    ("unknown architecture", with_entry("general.architecture", STRING, "llama5"), UnsupportedError, "'llama5'"),
    ("architecture a path", with_entry("general.architecture", STRING, "../llama"), UnsupportedError, "'../llama'"),
    ("architecture too long", with_entry("general.architecture", STRING, "l" * 1000), CheckpointError, "does not say"),
    ("layers a string", with_entry("llama.block_count", STRING, "1"), CheckpointError, "block_count = '1'"),
    ("layers an array", with_entry("llama.block_count", U32, [1]), CheckpointError, r"block_count = \[1\]"),
    ("layers 0", with_entry("llama.block_count", U32, 0), CheckpointError, "block_count = 0"),
    (
        "layers 2^24",
        with_entry("llama.block_count", U32, 2**24),
        CheckpointError,
        "16777216 layers, but holds 11 tensors",
    ),
    ("layers too many", with_entry("llama.block_count", U32, 2), CheckpointError, "blk.1.attn_q.weight is missing"),
    ("heads 0", with_entry("llama.attention.head_count", U32, 0), CheckpointError, "head_count = 0"),
    ("heads not a multiple", with_entry("llama.attention.head_count_kv", U32, 3), CheckpointError, "n_kv_heads = 3"),
    ("huge hyperparameter", with_entry("llama.rope.scaling.type", U32, [0] * 2000), CheckpointError, "length of 2000"),
    ("experts", with_entry("llama.expert_count", U32, [8, 8]), UnsupportedError, "experts"),
    ("rope scaling factors", with_entry("llama.rope.scaling.type", STRING, "factors"), UnsupportedError, "'factors'"),
    (
        "rope scaling a list",
        with_entry("llama.rope.scaling.type", STRING, ["yarn"]),
        CheckpointError,
        "of the type",
    ),
    (
        "epsilon not a number",
        with_entry("llama.attention.layer_norm_rms_epsilon", F32, float("nan")),
        CheckpointError,
        "= nan; expected a positive number",
    ),
    ("tensor missing", model(shapes={"blk.0.ffn_up.weight": None}), CheckpointError, "blk.0.ffn_up.weight is missing"),
    (
        "layer out of range",
        model(shapes={"blk.999999999.attn_q.weight": (4, 4)}),
        CheckpointError,
        "blk.999999999.attn_q.weight is not a tensor of this architecture",
    ),
    (
        "everything wrong at once",
        model(shapes={"blk.0.attn_q.weight": (2, 4), "output_norm.weight": None, "w": (4,)}),
        CheckpointError,
        r"output_norm.weight is missing; w is not .*; blk.0.attn_q.weight has the shape \(2, 4\), "
        r"expected \(4, 4\)",
    ),
    ("rope factors of another size", model(shapes={"rope_freqs.weight": (3,)}), CheckpointError, "a list of 1 numbers"),
    ("no tokens", model({"tokenizer.ggml.tokens": None}), CheckpointError, "tokenizer.ggml.tokens is missing"),
    ("tokens not UTF-8", with_entry("tokenizer.ggml.tokens", STRING, [b"\xff"]), CheckpointError, "not UTF-8"),
    ("tokens as numbers", with_entry("tokenizer.ggml.tokens", U32, [1]), CheckpointError, "expected ARRAY of STRING"),
    (
        "scores as INT8",
        with_entry("tokenizer.ggml.scores", 1, [0] * 6),
        CheckpointError,
        "stored as ARRAY of INT8; expected ARRAY of FLOAT32",
    ),
    (
        "types as INT8",
        with_entry("tokenizer.ggml.token_type", 1, TYPES),
        CheckpointError,
        "stored as ARRAY of INT8; expected ARRAY of INT32",
    ),
    ("fewer scores than tokens", with_entry("tokenizer.ggml.scores", F32, [0]), CheckpointError, "expected 6 numbers"),
    (
        "more tokens than rows",
        model(shapes={"token_embd.weight": (5, 4)}),
        CheckpointError,
        "with 6 tokens, .* knows 5",
    ),
    ("BOS out of range", with_entry("tokenizer.ggml.bos_token_id", U32, 6), CheckpointError, "bos_token_id is 6"),
    ("EOS out of range", with_entry("tokenizer.ggml.eos_token_id", U32, 2**32 - 1), CheckpointError, "eos_token_id"),
    ("template a number", with_entry("tokenizer.chat_template", U32, 1), CheckpointError, "expected STRING"),
]


def table(rows: list[tuple]) -> list:
    return [pytest.param(*row[1:], id=row[0]) for row in rows]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf") / "model.gguf"


def check_bad(path, opener, data, error, words):
    """The error is the one expected, says so in one sentence, and takes little memory."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(error, match=words) as caught:
            opener(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert type(caught.value) is error
    assert str(path) in str(caught.value) or opener is read_gguf
    assert peak < 20e6


@pytest.mark.parametrize(("data", "error", "words"), table(BAD_LAYOUTS))
def test_bad_layout(path, data, error, words):
    check_bad(path, GGUFFile, data, error, words)


@pytest.mark.parametrize(("data", "error", "words"), table(BAD_MODELS))
def test_bad_model(path, data, error, words):
    check_bad(path, read_gguf, data, error, words)


def test_large_file_of_empty_texts_takes_bounded_memory(path):
    with open(path, "wb") as sparse:
        sparse.write(file([text("k") + u32(ARRAY, STRING) + u64(2**27)]))
        sparse.truncate(2**31)
    check_bad_large(path, "leads past byte")
    with open(path, "r+b") as sparse:
        sparse.write(file([text("k") + u32(ARRAY, STRING) + u64(2**22)]))
    check_bad_large(path, "4194304 texts; expected at most 2097152")


def check_bad_large(path, words):
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=words):
            GGUFFile(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_every_truncation_is_an_error(path):
    whole = model()
    path.write_bytes(whole)
    read_gguf(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        # The padding after the last tensor belongs to none.
        if length < len(whole) - 16:
            with pytest.raises(EdgeError):
                read_gguf(path)


@settings(max_examples=300, deadline=None)
@given(flips=st.lists(st.integers(0, 8 * len(model()) - 1), min_size=1, max_size=4))
def test_flipped_bits_open_or_give_an_error(path, flips):
    data = bytearray(model())
    for flip in flips:
        data[flip // 8] ^= 1 << flip % 8
    path.write_bytes(data)
    try:
        checkpoint = read_gguf(path)
    except EdgeError:
        return
    for tensor in (part for parts in checkpoint.tensors.values() for part in parts):
        decode_rows(tensor.type, tensor.read(0, 1))


# Sound files.


@pytest.mark.parametrize("version", [2, 3])
def test_values_of_every_type(path, version):
    numbers = [entry(f"n{kind}", kind, 1) for kind in CODES]
    arrays = [array(f"a{kind}", kind, [0, 1]) for kind in CODES]
    path.write_bytes(
        file(
            [*numbers, *arrays, entry("s", STRING, "ü"), array("as", STRING, ["", "ü"]), array("empty", F32, [])],
            version=version,
        )
    )
    metadata = GGUFFile(path).metadata
    assert [metadata[f"n{kind}"] for kind in CODES] == [1] * len(CODES)
    assert metadata["n7"] is True
    for kind in CODES:
        assert metadata[f"a{kind}"].tolist() == [0, 1]
    assert metadata["a7"].dtype == bool
    assert (metadata["s"], metadata["as"], metadata["empty"].size) == ("ü", ["", "ü"], 0)


def test_tensors_are_read_by_rows(path):
    path.write_bytes(
        file(
            [entry("general.alignment", U32, 64)],
            [info("m", (4, 3)), info("v", (4,), offset=64)],
            np.arange(20, dtype=np.float32).tobytes(),
            alignment=64,
        )
    )
    matrix, vector = GGUFFile(path).tensors.values()
    assert (matrix.shape, vector.shape, matrix.type.name) == ((3, 4), (4,), "F32")
    assert matrix.read(1, 3).view(np.float32).tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert vector.read(0, 1).view(np.float32).tolist() == [[16, 17, 18, 19]]
    assert matrix.read(2, 2).shape == (0, 16)


def test_model(path):
    path.write_bytes(
        model(
            {
                "tokenizer.chat_template": entry("tokenizer.chat_template", STRING, "{{ messages }}"),
                "general.name": entry("general.name", STRING, "Tiny"),
                "general.license": entry("general.license", STRING, "mit"),
                "general.source.url": entry("general.source.url", STRING, "https://example.org/tiny"),
            },
            {"output.weight": (6, 4), "rope_freqs.weight": (1,)},
        )
    )
    checkpoint = read_gguf(path)
    assert (checkpoint.architecture, checkpoint.interleaved, checkpoint.quantized) == ("llama", ("q", "k"), False)
    assert checkpoint.config.rope_scaling == {"type": "factors", "factors": [len("rope_freqs.weight")]}
    assert (checkpoint.config.vocab_size, checkpoint.config.tie_embeddings) == (6, False)
    assert checkpoint.metadata == {"name": "Tiny", "license": "mit", "source": "https://example.org/tiny"}
    assert checkpoint.chat_template == "{{ messages }}"
    assert (checkpoint.tokenizer.bos_id, checkpoint.tokenizer.eos_ids, checkpoint.tokenizer.n_tokens) == (1, (2,), 6)
    (q,) = checkpoint.tensors["layers.0.q"]
    np.testing.assert_array_equal(decode_rows(q.type, q.read(0, 4)), weight("blk.0.attn_q.weight", (4, 4)))


def test_embedding_computes_the_logits_if_there_is_no_output(path):
    path.write_bytes(model())
    checkpoint = read_gguf(path)
    assert checkpoint.config.tie_embeddings
    assert "output" not in checkpoint.tensors
    assert checkpoint.metadata == {"source": "model.gguf"}


def test_embedding_may_have_more_rows_than_there_are_tokens(path):
    path.write_bytes(model(shapes={"token_embd.weight": (8, 4)}))
    checkpoint = read_gguf(path)
    assert (checkpoint.config.vocab_size, checkpoint.tokenizer.n_tokens) == (8, 6)


def test_an_answer_may_hold_ids_of_padding(path, tmp_path):
    path.write_bytes(model(shapes={"token_embd.weight": (8, 4)}))
    convert(path, tmp_path / "m.edge", progress=False)
    with Model(tmp_path / "m.edge", backend="reference") as padded:
        done = padded.generate("", max_tokens=3, temperature=0, logit_bias={7: 1e6}, banned_strings=["x"])
        assert (done.ids, done.text, done.finish_reason) == ([7, 7, 7], "", "length")
        assert padded.detokenize(done.ids) == ""


def test_missing_file_and_file_that_shrinks(path, tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.gguf cannot be read: No such file"):
        GGUFFile(tmp_path / "nothing.gguf")
    path.write_bytes(model())
    tensor = GGUFFile(path).tensors["output_norm.weight"]
    path.write_bytes(model()[:200])
    with pytest.raises(CheckpointError, match="ended while it was being read"):
        tensor.read(0, 1)


# Shards.


def shards(folder, *, numbers=(0, 1), count=2, total=2, names=("v", "w")):
    paths = []
    for i, (number, name) in enumerate(zip(numbers, names, strict=True)):
        entries = [
            entry("split.no", U16, number),
            entry("split.count", U16, count),
            entry("split.tensors.count", I32, total),
            *([entry("general.name", STRING, "x")] if i == 0 else []),
        ]
        paths.append(folder / f"m-{i + 1:05}-of-00002.gguf")
        paths[-1].write_bytes(file(entries, [info(name, (8,))], bytes([i]) * 32))
    return paths


@pytest.mark.parametrize("given", [0, 1])
def test_shards_are_found_from_any_of_them(tmp_path, given):
    whole = GGUFFile(shards(tmp_path)[given])
    assert whole.metadata["general.name"] == "x"
    assert [tensor.read(0, 1)[0, 0] for tensor in whole.tensors.values()] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"numbers": (0, 0)}, "is shard 0 of 2, counted from 0; expected 1 of 2"),
        ({"total": 3}, "hold 2 tensors; expected 3, from split.tensors.count"),
        ({"names": ("w", "w")}, "holds tensors that an earlier shard has: w"),
        ({"count": 3}, "expected a name that ends in -00001-of-00003.gguf"),
    ],
)
def test_shards_that_do_not_belong_together(tmp_path, changes, words):
    with pytest.raises(CheckpointError, match=words):
        GGUFFile(shards(tmp_path, **changes)[1])


@pytest.mark.parametrize("shard", [0, 1])
def test_a_shard_that_is_incomplete(tmp_path, shard):
    paths = shards(tmp_path)
    data = paths[shard].read_bytes()
    paths[shard].write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=rf"m-0000{shard + 1}-of-00002\.gguf.* the file ends at"):
        GGUFFile(paths[0])


def test_missing_and_renamed_shards(tmp_path):
    first, second = shards(tmp_path)
    first.unlink()
    with pytest.raises(CheckpointError, match=r"missing: m-00001-of-00002\.gguf$"):
        GGUFFile(second)
    with pytest.raises(CheckpointError, match="its name does not say which"):
        GGUFFile(second.rename(tmp_path / "renamed.gguf"))


# Files that others made.


@pytest.mark.parametrize("name", ["F32", "F16", "Q4_0", "Q8_0"])
def test_real_model_is_read_as_an_independent_package_reads_it(name):
    path = shared(f"data/stories260K/gguf/stories260K-{name}.gguf")
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    assert {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")} == {
        key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in ours.metadata.items()
    }
    assert [tensor.name for tensor in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        read = ours.tensors[tensor.name].read(0, int(np.prod(tensor.shape[1:])))
        assert read.tobytes() == tensor.data.tobytes()
    assert read_gguf(path).quantized == name.startswith("Q")


@pytest.mark.parametrize(("name", "n_tokens"), [("llama-spm", 32000), ("qwen2", 151936)])
def test_real_vocabulary(name, n_tokens):
    file = GGUFFile(shared(f"data/tokenizer-vectors/ggml-vocab-{name}.gguf"))
    assert not file.tensors
    assert len(file.metadata["tokenizer.ggml.tokens"]) == len(file.metadata["tokenizer.ggml.token_type"]) == n_tokens


def test_messages_are_one_sentence_without_line_breaks(path):
    for name, data, error, _ in BAD_LAYOUTS:
        path.write_bytes(data)
        with pytest.raises(error) as caught:
            GGUFFile(path)
        assert re.fullmatch(r"[^\n]{20,600}", str(caught.value)), name
