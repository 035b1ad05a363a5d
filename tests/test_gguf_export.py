"""GGUF files that are written: against the gguf package, llama.cpp's converter, and what was read before."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import gguf
import numpy as np
import pytest
import tiny
from conftest import BUNDLED, shared
from gguf_cases import checksum
from test_gguf_models import EXPECTED, write_gguf
from tiny_tokenizers import byte_level, sentencepiece

from edgellm import architectures, quant
from edgellm.api import Model
from edgellm.backends.reference import matrix
from edgellm.converters import convert, export
from edgellm.converters.blocks import TYPES, decode_rows, encode_rows, repack_rows, type_of
from edgellm.converters.gguf import GGUFFile
from edgellm.converters.gguf_tokenizer import _GROUPS, tokenizer_from_gguf
from edgellm.converters.gguf_vocabulary import vocabulary_to_gguf
from edgellm.converters.gguf_writer import GGUFWriter, TensorInfo
from edgellm.errors import EdgeError, EdgeFileError, UnsupportedError
from edgellm.file import ModelInfo, TensorSpec, Writer
from edgellm.loading import open_model
from edgellm.rope import frequencies, rope_from_gguf, rope_to_gguf

EXPORTED = [name for name in architectures.names() if hasattr(architectures.get(name), "to_gguf")]
PLAIN = {
    "mistral": {"sliding_window": None},
    "ministral": {"sliding_window": None, "layer_types": None},
    "smollm3": {"rope_layers": [1, 1]},
    "phi3": {"partial_rotary_factor": 0.5},
    "qwen3_moe": {"normalize": True},
    "gemma2": {"query_pre_attn_scalar": 32.0, "tie_embeddings": True},
    "gemma3_text": {"query_pre_attn_scalar": 32.0, "layer_types": ["sliding_attention"] * 2, "attention_softcap": None},
}
"""What of a tiny config GGUF cannot say, made plain."""
WHOLE_BLOCKS = {"hidden_size": 64, "ffn_size": 96, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32}


# Blocks and bytes.


@pytest.mark.parametrize("name", ["F32", "F16", "Q4_0", "Q4_1", "Q8_0", "TQ2_0"])
def test_blocks_are_what_the_gguf_package_makes(name):
    """Read as codes and written again, they are the same bytes; the codes are those of the format."""
    values = np.random.default_rng(0).standard_normal((5, 512)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[name]
    raw = np.ascontiguousarray(gguf.quantize(values, kind)).view(np.uint8)
    quantized = repack_rows(TYPES[name], raw)
    np.testing.assert_array_equal(encode_rows(TYPES[name], quantized), raw)
    np.testing.assert_array_equal(quant.get(TYPES[name].keep).dequantize(quantized), gguf.dequantize(raw, kind))


CODES = {"q2t": 3, "q4": 16, "q4m": 16, "q8": 256}
KEPT = {"f32": "F32", "f16": "F16", "q8": "Q8_0", "q4": "Q4_0", "q4m": "Q4_1", "q2t": "TQ2_0"}


def some_of(fmt, cols):
    """Any codes, in rows of so many columns."""
    rng, groups = np.random.default_rng(1), -(-cols // quant.GROUP)
    if fmt not in CODES:
        return quant.get(fmt).quantize(rng.standard_normal((32, cols)).astype(np.float32))
    codes = rng.integers(0, CODES[fmt], (32, cols), np.uint8)
    if fmt == "q2t":
        return quant.Quantized(codes, np.repeat(rng.standard_normal((32, 1)).astype(np.float16), groups, axis=1))
    scale, minimum = rng.standard_normal((2, 32, groups)).astype(np.float16)
    return quant.Quantized(codes, scale, minimum if fmt == "q4m" else None)


@pytest.mark.parametrize("fmt", quant.names())
@pytest.mark.parametrize("cols", [256, 64, 40])
def test_every_value_of_a_format_has_a_type(fmt, cols):
    quantized, kind = some_of(fmt, cols), type_of(fmt, cols)
    values = quant.get(fmt).dequantize(quantized)
    kept = quantized if kind.keep == fmt else quant.Quantized(values)
    np.testing.assert_array_equal(decode_rows(kind, encode_rows(kind, kept)), values)
    assert kind.name == (KEPT[fmt] if cols % kind.block_size == 0 and kind.keep == fmt else "F32")
    assert cols % 256 or kind.keep == fmt


SOME = {
    "general.architecture": "llama", "some.truth": True, "some.number": 7, "some.float": 0.1, "some.text": "\u00e9",
    "some.texts": ["a", "", "\u2581"], "some.truths": np.array([True, False]), "some.ids": np.array([1, -1], np.int32),
    "some.integers": [0, 2, -1],
    "some.scores": np.array([0.5, -2], np.float32),
}  # fmt: skip


def test_the_gguf_package_reads_what_is_written(tmp_path):
    path, values = tmp_path / "a.gguf", np.arange(6, dtype=np.float32).reshape(2, 3)
    infos = {"matrix": TensorInfo((2, 3), TYPES["F32"]), "vector": TensorInfo((5,), TYPES["F32"])}
    with GGUFWriter(path, SOME, infos) as writer:
        for row in values:
            writer.write("matrix", row.view(np.uint8))
        writer.write("vector", np.arange(5, dtype=np.float32).view(np.uint8))
    reader = gguf.GGUFReader(path)
    for key, value in SOME.items():
        expected = np.float32(value) if isinstance(value, float) else value
        np.testing.assert_array_equal(reader.fields[key].contents(), expected, key)
    assert reader.fields["some.number"].types == [gguf.GGUFValueType.UINT32]
    assert [tensor.name for tensor in reader.tensors] == ["matrix", "vector"]
    np.testing.assert_array_equal(reader.tensors[0].data, values)
    np.testing.assert_array_equal(reader.tensors[1].data, np.arange(5))
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)
    assert GGUFFile(path).metadata["some.text"] == "\u00e9"


def test_a_file_that_is_not_finished_does_not_appear(tmp_path):
    path, infos = tmp_path / "a.gguf", {name: TensorInfo((4,), TYPES["F32"]) for name in ("first", "second")}
    path.write_bytes(b"before")
    for name, data in (("second", bytes(16)), ("first", bytes(20)), ("first", bytes(16))):
        with (
            pytest.raises(ValueError, match=r"the next tensor is 'first'|not written: second"),
            GGUFWriter(path, {}, infos) as writer,
        ):
            writer.write(name, np.frombuffer(data, np.uint8))
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a.gguf"]


# Whole models.


def edge_file(path, name, fmt="f32", tokenizer=None, **changes):
    """A tiny random model in a .edge file, with numbers that a float32 holds."""
    architecture = architectures.get(name)
    source = tokenizer_from_gguf(tokenizer or sentencepiece())
    config = replace(architecture.Config.tiny(), vocab_size=source.n_tokens + 3, **{**PLAIN.get(name, {}), **changes})
    floats = {key: float(np.float32(value)) for key, value in asdict(config).items() if isinstance(value, float)}
    config = replace(config, **floats)
    tensors, pairs = tiny.tensors(architecture, config, fmt), architecture.pairs(config)
    specs = {key: TensorSpec(t.shape, t.format, _pair(key, t, pairs)) for key, t in tensors.items()}
    info = ModelInfo(name, asdict(config), fmt, source.bos_id, source.eos_ids, "{{ messages }}", "Tiny", "MIT", "here")
    with Writer(path, info, source.json, specs) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor.data)
    return path


def _pair(name, tensor, pairs):
    pair = pairs.get(name.split(".")[-1], 0)
    return 0 if len(tensor.shape) == 1 or pair % quant.TILE_ROWS else pair


def assert_same_model(first, second):
    """Config, tokenizer and every value, whatever the format that holds it."""
    a, b = (open_model(path) for path in (first, second))
    for key, value in asdict(a.config).items():  # GGUF has float32
        assert getattr(b.config, key) == (float(np.float32(value)) if isinstance(value, float) else value), key
    assert a.file.tensors.keys() == b.file.tensors.keys()
    for name, tensor in a.file.tensors.items():
        other = b.file.tensors[name]
        assert (other.shape, other.pair) == (tensor.shape, tensor.pair)
        values = (matrix(tensor), matrix(other)) if len(tensor.shape) == 2 else (tensor.data, other.data)
        np.testing.assert_array_equal(*values, err_msg=name)
    for key in ("bos_id", "eos_ids", "chat_template", "name", "license", "origin"):
        assert getattr(a.file.info, key) == getattr(b.file.info, key), key
    a.file.close()
    b.file.close()


@pytest.mark.parametrize("sizes", [{}, WHOLE_BLOCKS], ids=["odd", "blocks"])
@pytest.mark.parametrize("name", EXPORTED)
def test_every_architecture_round_trips(tmp_path, name, sizes):
    sizes = {**sizes, **({} if sizes or "query_pre_attn_scalar" not in PLAIN.get(name, {}) else {"head_dim": 32})}
    first = edge_file(tmp_path / "1.edge", name, **sizes)
    assert export(first, tmp_path / "1.gguf", progress=False).total.max_error == 0
    convert(tmp_path / "1.gguf", tmp_path / "2.edge", format="keep", progress=False)
    assert_same_model(first, tmp_path / "2.edge")


@pytest.mark.parametrize("fmt", quant.names())
def test_every_format_round_trips(tmp_path, fmt):
    """Of whole blocks, stays what it is; the others are kept as float32."""
    first = edge_file(tmp_path / "1.edge", "llama", fmt, **WHOLE_BLOCKS)
    report = export(first, tmp_path / "1.gguf", progress=False)
    assert report.total.max_error == 0
    convert(tmp_path / "1.gguf", tmp_path / "2.edge", format="keep", progress=False)
    assert_same_model(first, tmp_path / "2.edge")
    kept, reader = type_of(fmt, 64).name, gguf.GGUFReader(tmp_path / "1.gguf")
    assert {t.tensor_type.name for t in reader.tensors if len(t.shape) == 2} == {kept}
    assert set(report.rows) == {"F32", kept}


def test_ternary_matrices_with_one_scale_for_256_weights(tmp_path):
    """As BitNet's have; those with a scale for 32 are refused."""
    sizes = {**WHOLE_BLOCKS, "hidden_size": 256, "ffn_size": 256, "head_dim": 64}
    path = edge_file(tmp_path / "1.edge", "llama", "f32", **sizes)
    loaded, q2t = open_model(path), quant.get("q2t")
    tensors = {name: ternary(t) if len(t.shape) == 2 else t for name, t in loaded.file.tensors.items()}
    save(tmp_path / "2.edge", loaded, tensors)
    export(tmp_path / "2.edge", tmp_path / "2.gguf", progress=False)
    reader = gguf.GGUFReader(tmp_path / "2.gguf")
    assert {t.tensor_type.name for t in reader.tensors if len(t.shape) == 2} == {"TQ2_0"}
    convert(tmp_path / "2.gguf", tmp_path / "3.edge", format="keep", progress=False)
    assert_same_model(tmp_path / "2.edge", tmp_path / "3.edge")
    tensors["layers.0.o"] = replace(
        tensors["layers.0.o"], data=q2t.pack(q2t.quantize(matrix(loaded.file.tensors["layers.0.o"])))
    )
    save(tmp_path / "4.edge", loaded, tensors)
    with pytest.raises(UnsupportedError, match="scales of 32 weights each, which TQ2_0 has of 256"):
        export(tmp_path / "4.edge", tmp_path / "4.gguf", progress=False)


def ternary(tensor):
    q2t, codes = quant.get("q2t"), np.sign(matrix(tensor)).astype(np.int8) + 1
    scale = np.full((len(codes), codes.shape[1] // quant.GROUP), 0.25, np.float16)
    return replace(tensor, format="q2t", data=q2t.pack(quant.Quantized(codes.astype(np.uint8), scale)))


def save(path, loaded, tensors):
    specs = {name: TensorSpec(t.shape, t.format, t.pair) for name, t in tensors.items()}
    with Writer(path, loaded.file.info, loaded.file.tokenizer_json, specs) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.data)


def test_parts_in_different_formats_become_float32(tmp_path):
    """Phi-3's queries, keys and values are one tensor of the GGUF file."""
    path = edge_file(tmp_path / "1.edge", "phi3", "q8", **WHOLE_BLOCKS)
    loaded = open_model(path)
    tensors = dict(loaded.file.tensors)
    key, q4 = tensors["layers.0.k"], quant.get("q4")
    stored = quant.get("q8").dequantize(quant.get("q8").unpack(key.data, *key.shape))
    tensors["layers.0.k"] = replace(key, format="q4", data=q4.pack(q4.quantize(stored)))
    save(tmp_path / "2.edge", loaded, tensors)
    export(tmp_path / "2.edge", tmp_path / "2.gguf", progress=False)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "2.gguf").tensors}
    assert (types["blk.0.attn_qkv.weight"], types["blk.1.attn_qkv.weight"]) == ("F32", "Q8_0")
    convert(tmp_path / "2.gguf", tmp_path / "3.edge", format="keep", progress=False)
    again = open_model(tmp_path / "3.edge").file.tensors
    for name in ("layers.0.q", "layers.0.k", "layers.0.v"):
        np.testing.assert_array_equal(matrix(again[name]), matrix(tensors[name]))


def test_the_gguf_package_finds_the_values_in_ggufs_order(tmp_path):
    """RoPE's pairs next to each other, gate and up apart."""
    path = edge_file(tmp_path / "1.edge", "llama", "q8", **WHOLE_BLOCKS)
    export(path, tmp_path / "1.gguf", progress=False)
    theirs = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(tmp_path / "1.gguf").tensors}
    ours = open_model(path).file.tensors
    q = matrix(ours["layers.1.q"]).reshape(4, 2, 16, 64).swapaxes(1, 2).reshape(128, 64)
    np.testing.assert_array_equal(theirs["blk.1.attn_q.weight"], q)
    np.testing.assert_array_equal(theirs["blk.1.attn_v.weight"], matrix(ours["layers.1.v"]))
    gate, up = np.split(matrix(ours["layers.0.gate_up"]), 2)
    np.testing.assert_array_equal(theirs["blk.0.ffn_gate.weight"], gate)
    np.testing.assert_array_equal(theirs["blk.0.ffn_up.weight"], up)
    np.testing.assert_array_equal(theirs["output_norm.weight"], ours["norm"].data[:64])


LEFT_OUT = {
    *(f"hunyuan-dense.rope.scaling.{key}" for key in ("type", "factor", "original_context_length")),  # of none
    "mistral3.attention.temperature_scale",  # 1 within the context that these models have here
    "qwen3moe.feed_forward_length",  # of layers without experts, which there are not
    "starcoder2.attention.layer_norm_rms_epsilon",  # beside that of its LayerNorm
}


@pytest.mark.parametrize("case", EXPECTED)
def test_what_is_read_of_llama_cpps_file_is_written_as_llama_cpp_does(tmp_path, case):
    """Every tensor bit for bit, every number."""
    write_gguf(tmp_path / "1.gguf", case)
    convert(tmp_path / "1.gguf", tmp_path / "1.edge", format="f32", progress=False)
    export(tmp_path / "1.edge", tmp_path / "2.gguf", progress=False)
    written = gguf.GGUFReader(tmp_path / "2.gguf")
    tensors = {t.name: t.data for t in written.tensors}
    assert {n: checksum(v) for n, v in tensors.items() if not n.startswith("rope_")} == EXPECTED[case]["tensors"]
    for name, values in EXPECTED[case]["made_of_the_config"].items():
        np.testing.assert_array_equal(tensors[name], np.array(values, np.float32))
    left_out = LEFT_OUT
    if "rope_factors_long.weight" not in tensors:
        left_out = {*LEFT_OUT, "phi3.rope.scaling.original_context_length"}  # which says when these are to be used
    said = EXPECTED[case]["metadata"].items()
    assert {key: written.fields[key].contents() for key, _ in said if key not in left_out} == {
        key: value for key, value in said if key not in left_out
    }


def test_smollm2_is_the_file_that_it_was_made_of(smollm2_gguf, smollm2_path, tmp_path):
    """Bit for bit, tensors and vocabulary; and read again it is the same model."""
    export(smollm2_path, tmp_path / "1.gguf", progress=False)
    first, second = gguf.GGUFReader(smollm2_gguf), gguf.GGUFReader(tmp_path / "1.gguf")
    theirs, ours = ({t.name: t for t in reader.tensors} for reader in (first, second))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.tensor_type == ours[name].tensor_type
        np.testing.assert_array_equal(tensor.data, ours[name].data, err_msg=name)
    for key in ("model", "pre", "tokens", "merges", "token_type", "bos_token_id", "eos_token_id", "add_bos_token"):
        key = f"tokenizer.ggml.{key}"
        assert first.fields[key].contents() == second.fields[key].contents(), key
    for key in first.fields:
        if key.startswith("llama.") or key == "tokenizer.chat_template":
            assert first.fields[key].contents() == second.fields[key].contents(), key
    convert(tmp_path / "1.gguf", tmp_path / "2.edge", format="keep", progress=False)
    assert_same_model(smollm2_path, tmp_path / "2.edge")


def test_the_bundled_model_says_the_same_again(stories, tmp_path):
    export(BUNDLED, tmp_path / "s.gguf", progress=False)
    convert(tmp_path / "s.gguf", tmp_path / "s.edge", format="keep", progress=False)
    assert_same_model(BUNDLED, tmp_path / "s.edge")
    with Model(tmp_path / "s.edge", backend="reference") as model:
        for text in ("Once upon a time", "  a\n\tcaf\xe9 \U0001f600"):
            assert model.tokenize(text) == stories.tokenize(text)
        options = {"max_tokens": 30, "temperature": 0}
        assert model.generate("Once", **options).ids == stories.generate("Once", **options).ids


MEMORY = """
import sys
from edgellm.converters import export
export(sys.argv[1], sys.argv[2], progress=False)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded(smollm2_path, tmp_path):
    """The file's own pages, which the system can take back, and little more."""
    run = subprocess.run([sys.executable, "-c", MEMORY, smollm2_path, tmp_path / "s.gguf"],
                         capture_output=True, text=True, check=True)  # fmt: skip
    most = int(run.stdout.splitlines()[1]) * 1024
    assert most < smollm2_path.stat().st_size + 250e6


def test_a_damaged_file_is_not_exported(tmp_path):
    content = bytearray(BUNDLED.read_bytes())
    content[-1000] ^= 1
    (tmp_path / "bad.edge").write_bytes(content)
    (tmp_path / "s.gguf").write_bytes(b"before")
    with pytest.raises(EdgeFileError, match="does not match its checksum"):
        export(tmp_path / "bad.edge", tmp_path / "s.gguf", progress=False)
    assert (tmp_path / "s.gguf").read_bytes() == b"before"
    with pytest.raises(EdgeError, match="nothing was written"):
        export(BUNDLED, tmp_path / "none" / "s.gguf", progress=False)


def test_an_architecture_without_to_gguf(tmp_path):
    path = edge_file(tmp_path / "1.edge", "bitnet")
    with pytest.raises(UnsupportedError, match=r"'bitnet' cannot be exported; this version exports exaone4, .*llama"):
        export(path, tmp_path / "1.gguf", progress=False)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mistral", {"sliding_window": 5}, r"windows = \[5, 5\]"),
        ("smollm3", {"rope_layers": [1, 0]}, r"rope_layers = \[1, 0\]"),
        ("gemma2", {"query_pre_attn_scalar": 20.0}, r"query_pre_attn_scalar = 20\.0"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16.0,
                                    "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "attention_factor": 1.0}},
         "rope_scaling = "),
    ],
)  # fmt: skip
def test_what_gguf_cannot_say(tmp_path, name, changes, words):
    path = edge_file(tmp_path / "1.edge", name, **changes)
    with pytest.raises(UnsupportedError, match=f"the model has {words}.*, which a GGUF file of it cannot say"):
        export(path, tmp_path / "1.gguf", progress=False)
    assert not (tmp_path / "1.gguf").exists()


LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192.0}  # fmt: skip


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 4.0}, LLAMA3])
def test_angles_round_trip(scaling):
    again = rope_from_gguf(rope_to_gguf(64, 5e5, scaling))
    found = frequencies(64, again["rope_theta"], again["rope_scaling"], 8192)
    np.testing.assert_allclose(found, frequencies(64, 5e5, scaling, 8192), rtol=1e-6)


def test_llama3s_scaling_becomes_divisors(tmp_path):
    path = edge_file(tmp_path / "1.edge", "llama", rope_scaling=LLAMA3, head_dim=32)
    export(path, tmp_path / "1.gguf", progress=False)
    (tensor,) = (t for t in gguf.GGUFReader(tmp_path / "1.gguf").tensors if t.name == "rope_freqs.weight")
    ratio = frequencies(32, 10000.0, None, 64) / frequencies(32, 10000.0, LLAMA3, 64)
    np.testing.assert_allclose(tensor.data, ratio, rtol=1e-6)
    convert(tmp_path / "1.gguf", tmp_path / "2.edge", format="keep", progress=False)
    assert open_model(tmp_path / "2.edge").config.rope_scaling["type"] == "factors"


# Vocabularies.


def said(data, size=None):
    """What is written for the tokenizer that this metadata describes."""
    source = tokenizer_from_gguf(data)
    return vocabulary_to_gguf(source.json, source.bos_id, source.eos_ids, size or source.n_tokens)


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "qwen2"])
def test_vocabularies_of_llama_cpp_round_trip(name):
    data = GGUFFile(shared(f"data/tokenizer-vectors/ggml-vocab-{name}.gguf")).metadata
    written = said(data)
    for key in ("model", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"):
        np.testing.assert_array_equal(written.get(f"tokenizer.ggml.{key}"), data.get(f"tokenizer.ggml.{key}"), key)
    assert tokenizer_from_gguf(written).json == tokenizer_from_gguf(data).json


@pytest.mark.parametrize("names", _GROUPS)
def test_ways_to_cut_words_are_told_apart(names):
    name = names.split()[0]
    found = said(byte_level(pre=name))["tokenizer.ggml.pre"]
    assert found == {"glm4": "llama-bpe"}.get(name, name)  # which differ in whether BOS is added, and that is said


def test_words_are_cut_by_hugging_faces_names_too():
    """SmolLM2's own tokenizer.json cuts by Digits and ByteLevel, without a regular expression of its own."""
    source = tokenizer_from_gguf(byte_level(pre="smollm"))
    spec = json.loads(source.json)
    byte_levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_levels]}
    written = vocabulary_to_gguf(json.dumps(spec).encode(), 0, [1], source.n_tokens)
    assert written["tokenizer.ggml.pre"] == "smollm"


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("around", [(False, False), (True, False), (True, True), (False, True)])
def test_bos_and_eos_are_said(make, around):
    written = said(make(add_bos_token=around[0], add_eos_token=around[1]))
    assert (written["tokenizer.ggml.add_bos_token"], written["tokenizer.ggml.add_eos_token"]) == around
    assert (written["tokenizer.ggml.bos_token_id"], written["tokenizer.ggml.eos_token_id"]) == (
        (0, 1) if make is byte_level else (1, 2)
    )


def test_rows_without_a_token_get_unused_ones():
    data = byte_level()
    n = len(data["tokenizer.ggml.tokens"])
    written = said(data, n + 2)
    assert written["tokenizer.ggml.tokens"][n:] == [f"[PAD{n}]", f"[PAD{n + 1}]"]
    assert written["tokenizer.ggml.token_type"][n:].tolist() == [5, 5]


def test_a_space_is_put_first_only_where_it_was():
    assert said(sentencepiece())["tokenizer.ggml.add_space_prefix"] is True
    assert said(sentencepiece(add_space_prefix=False))["tokenizer.ggml.add_space_prefix"] is False


def changed(make, **changes):
    source = tokenizer_from_gguf(make())
    spec = json.loads(source.json)
    for key, value in changes.items():
        spec[key] = value(spec[key]) if callable(value) else value
    return vocabulary_to_gguf(json.dumps(spec).encode(), source.bos_id, source.eos_ids, source.n_tokens)


def test_tokenizers_that_gguf_has_no_words_for():
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": False}
    with pytest.raises(UnsupportedError, match="of the kind Unigram cannot be exported; this version exports BPE"):
        changed(sentencepiece, model=unigram, added_tokens=[], post_processor=None)
    split = {"type": "Split", "pattern": {"Regex": "e"}, "behavior": "Isolated", "invert": False}
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    with pytest.raises(UnsupportedError, match="cuts text into words in a way that GGUF has no name for"):
        changed(byte_level, pre_tokenizer={"type": "Sequence", "pretokenizers": [split, levels]})
    with pytest.raises(UnsupportedError, match=r"the ids of .Hello.* would differ from number \d+ on"):
        changed(byte_level, normalizer={"type": "Lowercase"})
    with pytest.raises(UnsupportedError, match=r"the ids of 'https.* would differ"):
        changed(byte_level, added_tokens=lambda tokens: [{**token, "lstrip": True} for token in tokens])
    source = tokenizer_from_gguf(byte_level())
    with pytest.raises(UnsupportedError, match=r"ends answers with \[1, 2, 3, 4, 9\]; as GGUF it would have"):
        vocabulary_to_gguf(source.json, 0, [1, 2, 3, 4, 9], source.n_tokens)


def test_merges_may_be_written_as_text():
    source = tokenizer_from_gguf(byte_level())
    spec = json.loads(source.json)
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    written = vocabulary_to_gguf(json.dumps(spec).encode(), 0, [1], source.n_tokens)
    assert written["tokenizer.ggml.merges"] == ["h e", "l l", "he ll"]
