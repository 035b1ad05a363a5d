"""docs/format.md is enough to read a file: a reader that knows nothing else, one value at a time."""

import hashlib
import json
import struct
import zlib
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from conftest import BUNDLED, shared
from test_file import SPECS, write
from tiny_tokenizers import byte_level, sentencepiece

from edgellm import bpe
from edgellm.backends.reference import matrix
from edgellm.converters import convert
from edgellm.converters.gguf_tokenizer import tokenizer_from_gguf
from edgellm.loading import open_model


class Reader:
    """Written from the document alone; imports nothing of edgellm."""

    def __init__(self, path):
        self.bytes = path.read_bytes()
        (n,) = struct.unpack_from("<Q", self.bytes)
        header = self.bytes[8 : 8 + n]
        assert (8 + n) % 4096 == 0
        self.entries = json.loads(header)
        self.metadata = self.entries.pop("__metadata__")
        digits = self.metadata["header_sha256"].encode()
        assert hashlib.sha256(header.replace(digits, b"0" * 64, 1)).hexdigest().encode() == digits
        self.tensors, self.data = json.loads(self.metadata["tensors"]), 8 + n

    def stored(self, name):
        begin, end = self.entries[name]["data_offsets"]
        assert begin % 64 == end % 64 == 0
        return self.bytes[self.data + begin : self.data + end]

    def value(self, name, row, col):
        """One weight of a matrix."""
        spec, raw = self.tensors[name], self.stored(name)
        (_, cols), fmt = spec["shape"], spec["format"]
        tile_bytes = {"f32": 4096, "f16": 2048, "q8": 1088, "q4": 576, "q4m": 640, "q2t": 320}[fmt]
        stored_row = next(s for s in range(len(raw)) if self.row_of(s, spec["pair"]) == row)
        tile = (stored_row // 16 * -(-cols // 64) + col // 64) * tile_bytes
        r, c = stored_row % 16, col % 64
        g = c // 32

        def f16(at):
            return struct.unpack_from("<e", raw, tile + at)[0]

        if fmt == "f32":
            return struct.unpack_from("<f", raw, tile + 4 * (c * 16 + r))[0]
        if fmt == "f16":
            return f16(2 * (c * 16 + r))
        if fmt == "q8":
            return (raw[tile + c // 4 * 64 + r * 4 + c % 4] - 128) * f16(1024 + g * 32 + r * 2)
        if fmt == "q2t":
            code = raw[tile + c // 16 * 64 + r * 4 + c % 4] >> 2 * (c % 16 // 4) & 3
            return (code - 1) * f16(256 + g * 32 + r * 2)
        j, b = c % 32 // 8, c % 4
        byte = raw[tile + g * 256 + j * 64 + r * 4 + b]
        code = byte & 15 if c % 8 < 4 else byte >> 4
        scale = f16(512 + g * 32 + r * 2)
        return (code - 8) * scale if fmt == "q4" else code * scale + f16(576 + g * 32 + r * 2)

    @staticmethod
    def row_of(s, pair):
        if not pair:
            return s
        u = s % (2 * pair)
        return s - u + (u // 16 % 2) * pair + (u // 32) * 16 + u % 16


class Tables:
    """The tokenizer's tables, from the document alone."""

    def __init__(self, raw):
        names = ("json", "text", "ends", "word_sums", "word_ids", "pairs", "ranks", "merged", "bytes", "joints")
        at = 64
        for name, count in zip((*names, "before", "after"), struct.unpack_from("<12I", raw), strict=True):
            code = {"json": "B", "text": "B", "pairs": "Q"}.get(name, "I")
            setattr(self, name, struct.unpack_from(f"<{count}{code}", raw, at))
            size = count * struct.calcsize(code)
            assert not any(raw[at + size : at + -(-size // 64) * 64])
            at += -(-size // 64) * 64
        assert at == len(raw)
        begins = [0, *self.ends]
        self.tokens = [bytes(self.text[a:b]).decode() for a, b in zip(begins, self.ends, strict=False)]
        self.words = {self.tokens[id]: id for id in self.word_ids}
        assert list(self.word_sums) == sorted(self.word_sums)
        assert [zlib.crc32(self.tokens[id].encode()) for id in self.word_ids] == list(self.word_sums)
        assert list(self.pairs) == sorted(self.pairs)
        self.rank = {(pair >> 32, pair % 2**32): rank for pair, rank in zip(self.pairs, self.ranks, strict=True)}

    def encode(self, text):
        """Added tokens are found by the library, and so is where words begin."""
        found = tokenizers.Tokenizer.from_str(bytes(self.json).decode())
        normalizer, pre_tokenizer = found.normalizer, found.pre_tokenizer
        found.normalizer = found.pre_tokenizer = None
        encoding, ids = found.encode(text), list(self.before)
        for id, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if id != len(self.tokens):
                ids.append(id)
                continue
            part = normalizer.normalize_str(text[begin:end]) if normalizer else text[begin:end]
            words = [word for word, _ in pre_tokenizer.pre_tokenize_str(part)] if pre_tokenizer else [part]
            for word in words:
                for smaller in self.cut(word):
                    ids += self.word(smaller)
        return ids + list(self.after)

    def cut(self, word):
        parts = [""]
        for before, char in zip(" " + word, word, strict=False):
            if parts[-1] and char == "\u2581" != before and ord(before) not in self.joints:
                parts.append("")
            parts[-1] += char
        return parts

    def word(self, word):
        if word in self.words:
            return [self.words[word]]
        ids = [id for char in word for id in self.char(char)]
        while True:
            ranks = [(self.rank[pair], at) for at, pair in enumerate(pairwise(ids)) if pair in self.rank]
            if not ranks:
                return ids
            rank, at = min(ranks)
            ids[at : at + 2] = [self.merged[rank]]

    def char(self, char):
        if char in self.words:
            return [self.words[char]]
        return [self.bytes[byte] for byte in char.encode()] if self.bytes else []


def check(path, values, name):
    reader, rng = Reader(path), np.random.default_rng(0)
    rows, cols = reader.tensors[name]["shape"]
    assert values.shape == (rows, cols)
    for row, col in zip(rng.integers(0, rows, 40), rng.integers(0, cols, 40), strict=True):
        assert reader.value(name, int(row), int(col)) == pytest.approx(values[row, col], rel=1e-6, abs=1e-9)
    assert hashlib.sha256(reader.stored(name)).hexdigest() == reader.tensors[name]["sha256"]


@pytest.mark.parametrize("name", ["layers.3.gate_up", "layers.0.q", "embed"])
def test_the_bundled_model(name):
    file = open_model(BUNDLED).file
    check(BUNDLED, matrix(file.tensors[name]), name)
    file.close()


@pytest.mark.parametrize("name", ["layers.2.q", "layers.9.gate_up", "embed"])
def test_smollm2(smollm2_path, name):
    file = open_model(smollm2_path).file
    check(smollm2_path, matrix(file.tensors[name]), name)
    file.close()


def test_every_format(tmp_path):
    from edgellm.file import EdgeFile, TensorSpec

    specs = {fmt: TensorSpec((70, 90), fmt) for fmt in ("f32", "f16", "q8", "q4", "q4m", "q2t")}
    specs["paired"] = SPECS["gate_up"]
    write(tmp_path / "all.edge", specs)
    file = EdgeFile(tmp_path / "all.edge")
    for name, tensor in file.tensors.items():
        check(tmp_path / "all.edge", matrix(tensor), name)
    file.close()


def test_vectors_and_the_tokenizer():
    reader, file = Reader(BUNDLED), open_model(BUNDLED).file
    norm = np.frombuffer(reader.stored("norm"), "<f4")[:64]
    np.testing.assert_array_equal(norm, file.tensors["norm"].data[:64])
    assert json.loads(reader.stored("tokenizer.json")) == json.loads(file.tokenizer_json)
    assert hashlib.sha256(reader.stored("tokenizer.json")).hexdigest() == reader.metadata["tokenizer_sha256"]
    assert set(reader.metadata) == {
        "header_sha256", "format", "version", "tensors", "tokenizer_sha256", "architecture", "config", "recipe",
        "bos_id", "eos_ids", "chat_template", "name", "license", "origin",
    }  # fmt: skip
    file.close()


TEXTS = ["hello hell w\xe9", "", "  a\u2581\u2581b \u2581[INST] he\tll<think>", "\n\U0001f600 hello</s>"]


@pytest.mark.parametrize("metadata", [byte_level(add_eos_token=True), sentencepiece(), byte_level(pre="llama-bpe")])
def test_the_tables_of_a_tokenizer(tmp_path, metadata):
    source = tokenizer_from_gguf(metadata)
    write(tmp_path / "tables.edge", tables=bpe.tables(source.json))
    reader = Reader(tmp_path / "tables.edge")
    raw = reader.stored("tokenizer.tables")
    assert hashlib.sha256(raw).hexdigest() == reader.metadata["tokenizer_tables_sha256"]
    assert (reader.metadata["version"], "tokenizer.tables" in reader.tensors) == ("2", False)
    tables, library = Tables(raw), tokenizers.Tokenizer.from_str(source.json.decode())
    assert tables.tokens == [library.id_to_token(id) for id in range(library.get_vocab_size())]
    for text in TEXTS:
        assert tables.encode(text) == library.encode(text).ids, text


def test_the_tables_of_a_converted_model(tmp_path):
    convert(shared("data/stories260K/gguf/stories260K-F32.gguf"), tmp_path / "stories.edge", progress=False)
    reader = Reader(tmp_path / "stories.edge")
    tables = Tables(reader.stored("tokenizer.tables"))
    library = tokenizers.Tokenizer.from_str(reader.stored("tokenizer.json").decode())
    for text in (*TEXTS, "Once upon a time, there was a little girl named Lily. She loved to play outside."):
        assert tables.encode(text) == library.encode(text).ids, text
