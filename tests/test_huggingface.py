import json
import struct

import numpy as np
import pytest
import safetensors.numpy
import torch_pickles

from edgellm.converters.blocks import decode_rows
from edgellm.converters.huggingface import read_huggingface
from edgellm.errors import CheckpointError, UnsupportedError

CONFIG = {
    "model_type": "llama",
    "vocab_size": 6,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8,
    "eos_token_id": [2, 3],
}
VOCABULARY = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "<|im_end|>": 4}
TOKENIZER = {
    "model": {"type": "BPE", "vocab": VOCABULARY, "merges": []},
    "added_tokens": [{"id": 5, "content": "<|eot_id|>", "special": True}],
}
LAYER = {
    "input_layernorm": (4,),
    "self_attn.q_proj": (4, 4),
    "self_attn.k_proj": (2, 4),
    "self_attn.v_proj": (2, 4),
    "self_attn.o_proj": (4, 4),
    "post_attention_layernorm": (4,),
    "mlp.gate_proj": (6, 4),
    "mlp.up_proj": (6, 4),
    "mlp.down_proj": (4, 6),
}
SHAPES = {
    "model.embed_tokens.weight": (6, 4),
    **{f"model.layers.0.{name}.weight": shape for name, shape in LAYER.items()},
    "model.norm.weight": (4,),
    "lm_head.weight": (6, 4),
}


def weights(shapes=SHAPES, dtype=np.float32):
    return {
        name: (np.arange(np.prod(shape)) + len(name)).reshape(shape).astype(dtype) for name, shape in shapes.items()
    }


@pytest.fixture
def folder(tmp_path):
    write(tmp_path)
    return tmp_path


def write(folder, config=CONFIG, tokenizer=TOKENIZER, tensors=None, **others):
    """A model folder; `others` are further JSON files by name, or text."""
    files = {
        "config.json": config,
        "tokenizer.json": tokenizer,
        **{f"{name}.json": content for name, content in others.items()},
    }
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    safetensors.numpy.save_file(weights() if tensors is None else tensors, folder / "model.safetensors")


def test_model(folder):
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    write(
        folder,
        {**CONFIG, "_name_or_path": "someone/tiny"},
        tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}"},
        generation_config={"eos_token_id": 2},
    )
    checkpoint = read_huggingface(folder)
    assert (checkpoint.architecture, checkpoint.interleaved, checkpoint.quantized) == ("llama", (), False)
    assert not checkpoint.config.tie_embeddings
    assert checkpoint.tokenizer.json == (folder / "tokenizer.json").read_bytes()
    assert (checkpoint.tokenizer.n_tokens, checkpoint.tokenizer.bos_id) == (6, 1)
    assert checkpoint.tokenizer.eos_ids == (2, 3, 4, 5)
    assert checkpoint.chat_template == "{{ messages }}"
    assert checkpoint.metadata == {"name": folder.name, "source": "someone/tiny", "license": "apache-2.0"}
    (down,) = checkpoint.tensors["layers.0.down"]
    expected = weights()["model.layers.0.mlp.down_proj.weight"]
    np.testing.assert_array_equal(decode_rows(down.type, down.read(1, 4)), expected[1:])
    (norm,) = checkpoint.tensors["norm"]
    np.testing.assert_array_equal(decode_rows(norm.type, norm.read(0, 1)), weights()["model.norm.weight"][None])


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision(folder, dtype):
    header, data = {}, b""
    for name, values in weights().items():
        # The upper half of a float32 is a bfloat16; these whole numbers need no more.
        stored = values.astype(np.float16) if dtype == "F16" else values.view(np.uint16).reshape(-1, 2)[:, 1]
        header[name] = tensor(len(data), len(data) + stored.nbytes, values.shape, dtype)
        data += stored.tobytes()
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (source,) = read_huggingface(folder).tensors["layers.0.q"]
    assert source.type.name == dtype
    expected = weights()["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(decode_rows(source.type, source.read(0, 4)), expected)


@pytest.mark.parametrize(
    ("config", "output"), [({"tie_word_embeddings": True}, True), ({"tie_word_embeddings": True}, False), ({}, False)]
)
def test_tied_embeddings(folder, config, output):
    shapes = {name: shape for name, shape in SHAPES.items() if output or name != "lm_head.weight"}
    write(folder, {**CONFIG, **config}, tensors=weights(shapes))
    checkpoint = read_huggingface(folder)
    assert checkpoint.config.tie_embeddings
    assert "output" not in checkpoint.tensors


def test_tensors_that_follow_from_the_config_are_ignored(folder):
    write(folder, tensors=weights({**SHAPES, "model.layers.0.self_attn.rotary_emb.inv_freq": (1,)}))
    assert len(read_huggingface(folder).tensors) == len(SHAPES) - 1  # gate and up are one
    masks = {f"model.layers.0.self_attn.attn.{name}": np.ones((1, 3), np.bool_) for name in ("bias", "masked_bias")}
    write(folder, tensors=weights() | masks)
    assert len(read_huggingface(folder).tensors) == len(SHAPES) - 1


def test_a_model_that_was_saved_without_its_head(folder):
    """As GPT-2's files are: no prefix, no output."""
    write(folder, tensors={name.removeprefix("model."): w for name, w in weights().items() if name != "lm_head.weight"})
    checkpoint = read_huggingface(folder)
    assert checkpoint.config.tie_embeddings
    (source,) = checkpoint.tensors["norm"]
    np.testing.assert_array_equal(decode_rows(source.type, source.read(0, 1)), weights()["model.norm.weight"][None])


def test_a_file_of_weights_beside_its_config(folder):
    (folder / "model.safetensors").rename(folder / "tiny v2.safetensors")
    checkpoint = read_huggingface(folder / "tiny v2.safetensors")
    assert (checkpoint.kind, checkpoint.metadata["name"]) == ("safetensors file", "tiny v2")
    assert checkpoint.described() == (
        "safetensors file: llama, 12 tensors with 0.00 M weights in F32, BPE tokenizer with 6 tokens"
    )


# Text.


@pytest.mark.parametrize(
    ("tokenizer_config", "bos_id"),
    [({}, 3), ({"bos_token": None}, None), ({"bos_token": "<s>"}, 1), ({"bos_token": {"content": "<s>"}}, 1)],
)
def test_bos_comes_from_the_tokenizer_before_the_config(folder, tokenizer_config, bos_id):
    write(folder, {**CONFIG, "bos_token_id": 3}, tokenizer_config=tokenizer_config)
    assert read_huggingface(folder).tokenizer.bos_id == bos_id


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, None),
        ("x", "x"),
        ([], None),
        ([{"name": "tool_use", "template": "y"}, {"name": "default", "template": "x"}], "x"),
    ],
)
def test_chat_template(folder, template, expected):
    write(folder, tokenizer_config={"chat_template": template})
    assert read_huggingface(folder).chat_template == expected
    (folder / "chat_template.jinja").write_text("a file goes first")
    assert read_huggingface(folder).chat_template == "a file goes first"


def test_unigram_vocabulary(folder):
    vocabulary = [[token, -1.0] for token in VOCABULARY]
    write(folder, tokenizer={"model": {"type": "Unigram", "vocab": vocabulary}, "added_tokens": []})
    tokenizer = read_huggingface(folder).tokenizer
    assert (tokenizer.n_tokens, tokenizer.eos_ids) == (5, (2, 3, 4))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"config": "{"}, CheckpointError, "config.json is not sound JSON"),
        ({"config": "[" * 100_000}, CheckpointError, "config.json is JSON nested too deep"),
        ({"config": "[]"}, CheckpointError, "config.json holds a JSON list; expected an object"),
        ({"config": '{"a": 1, "a": 2}'}, CheckpointError, "the key 'a' stands there twice"),
        ({"config": {**CONFIG, "hidden_size": 10**4000}}, CheckpointError, "hidden_size = inf"),
        ({"config": {**CONFIG, "rms_norm_eps": 10**400}}, CheckpointError, "rms_norm_eps = inf"),
        ({"tokenizer": {"model": {"vocab": {"a": 10**4000}}}}, CheckpointError, "ids that are no positive integers"),
        ({"config": {}}, CheckpointError, "model_type = None; expected an architecture's name"),
        ({"config": {"model_type": "gpt5"}}, UnsupportedError, "'gpt5' is not supported"),
        ({"config": {**CONFIG, "quantization_config": {"quant_method": "awq"}}}, UnsupportedError, "quantized weights"),
        (
            {"config": {**CONFIG, "rope_scaling": "linear"}},
            CheckpointError,
            "rope_scaling = 'linear'; expected a JSON obj",
        ),
        ({"config": {**CONFIG, "rope_scaling": {"rope_type": "factors"}}}, UnsupportedError, "'factors'"),
        ({"config": {**CONFIG, "num_hidden_layers": 1e9}}, CheckpointError, "num_hidden_layers = 1000000000.0"),
        ({"config": {**CONFIG, "num_hidden_layers": 2**24}}, CheckpointError, "16777216 layers, but holds 12 tensors"),
        ({"config": {**CONFIG, "eos_token_id": 6}}, CheckpointError, r"name the token ids \[6\]; expected ids below 6"),
        ({"config": {**CONFIG, "vocab_size": 5}}, CheckpointError, r"embed_tokens.weight has the shape \(6, 4\)"),
        ({"tokenizer": {**TOKENIZER, "added_tokens": [{"id": 6, "content": "x"}]}}, CheckpointError, "with 7 tokens"),
        ({"tokenizer": "x"}, CheckpointError, "tokenizer.json is not sound JSON"),
        ({"tokenizer": {"model": {"vocab": None}}}, CheckpointError, "has no vocabulary"),
        ({"tokenizer": {"model": {"vocab": {"a": "b"}}}}, CheckpointError, "ids that are no positive integers"),
        (
            {"tokenizer": {**TOKENIZER, "added_tokens": [{"id": 6}]}},
            CheckpointError,
            "has no vocabulary that can be read",
        ),
        ({"tokenizer_config": "?"}, CheckpointError, "tokenizer_config.json is not sound JSON"),
        ({"tokenizer_config": {"chat_template": 7}}, CheckpointError, "chat_template that is a int; expected text"),
        ({"generation_config": "1"}, CheckpointError, "generation_config.json holds a JSON int"),
        (
            {"tensors": weights({**SHAPES, "w": (1,), "model.norm.weight": (5,)})},
            CheckpointError,
            r"w is not a tensor of this architecture; model.norm.weight has the shape \(5,\), expected \(4,\)",
        ),
        *(
            (
                {"tensors": {"w": np.zeros(1, dtype)}},
                UnsupportedError,
                f"stored as {name}; this version reads F32, F16, BF16",
            )
            for name, dtype in {
                "F64": np.float64,
                "I8": np.int8,
                "I64": np.int64,
                "BOOL": np.bool_,
                "U16": np.uint16,
            }.items()
        ),
        ({"config": {"model_type": "lama"}}, UnsupportedError, "'lama' is not supported; .*: the nearest is llama"),
    ],
)
def test_bad_folder(folder, changes, error, words):
    write(folder, **changes)
    with pytest.raises(error, match=words):
        read_huggingface(folder)


def test_all_tensors_that_are_missing_or_not_of_the_model_are_named(folder):
    write(folder, tensors=weights({f"x{i}": (1,) for i in range(30)}))
    with pytest.raises(CheckpointError) as error:
        read_huggingface(folder)
    missing = {f"{name} is missing" for name in SHAPES if name != "lm_head.weight"}
    others = {f"x{i} is not a tensor of this architecture" for i in range(30)}
    assert set(str(error.value).partition("asks for: ")[2].split("; ")) == missing | others


@pytest.mark.parametrize(
    ("missing", "other", "error", "words"),
    [
        ("config.json", None, CheckpointError, "has no config.json; expected one beside the weights"),
        ("tokenizer.json", None, CheckpointError, "has no tokenizer.json and no tokenizer.model; expected one of them"),
        (
            "model.safetensors",
            None,
            CheckpointError,
            "has none of model.safetensors, .* and no index of one; fetch the",
        ),
        ("model.safetensors", "weights.npz", CheckpointError, "for the weights in weights.npz give the file itself"),
        (
            "model.safetensors",
            "pytorch_model.bin",
            CheckpointError,
            "pytorch_model.bin is a zip archive that cannot be",
        ),
    ],
)
def test_missing_files(folder, missing, other, error, words):
    (folder / missing).unlink()
    if other:
        (folder / other).touch()
    with pytest.raises(error, match=words):
        read_huggingface(folder)


# Safetensors.


def tensor(begin=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "size", "words"),
    [
        ({"w": tensor()}, 3, "has 3 bytes of data; expected 4"),
        ({"w": tensor()}, 5, "has 5 bytes of data; expected 4"),
        ({"w": tensor(4, 8)}, 8, "'w' starts at byte 4 of the data; expected 0"),
        ({"v": tensor(), "w": tensor(8, 12)}, 12, "'w' starts at byte 8 of the data; expected 4"),
        ({"v": tensor(), "w": tensor(0, 4)}, 8, "'w' starts at byte 0 of the data; expected 4"),
        ({"w": tensor(4, 0)}, 4, "has the bytes 4 to 0; expected 4"),
        ({"w": tensor(0, 4, (2,))}, 4, r"expected 8 bytes for F32 of shape \(2,\)"),
        ({"w": tensor(0, 4, (2**32, 2**32 + 1))}, 4, "expected 73786976312018075648 bytes"),
        ({"w": tensor(0, 4, (-1, -1))}, 4, "expected its dtype, its shape"),
        ({"w": tensor(0, 4, (10**4000,))}, 4, "expected its dtype, its shape"),
        ({"w": tensor(0, 4, (1,) * 9)}, 4, "expected its dtype, its shape"),
        ({"w": tensor(0, 4, (True,))}, 4, "expected its dtype, its shape"),
        ({"w": tensor(0.0, 4)}, 4, "expected its dtype, its shape"),
        ({"w": {**tensor(), "data_offsets": [0]}}, 4, "expected its dtype, its shape"),
        ({"w": {**tensor(), "shape": 1}}, 4, "expected its dtype, its shape"),
        ({"w": {**tensor(), "dtype": None}}, 4, "expected its dtype, its shape"),
        ({"w": []}, 4, "expected its dtype, its shape"),
        (b'{"w": 1, "w": 2}', 4, "the key 'w' stands there twice"),
        (b"[]", 0, "holds a JSON list"),
        (b"\xff", 0, "not sound JSON"),
        (b"", 0, "not sound JSON"),
    ],
)
def test_bad_safetensors(folder, header, size, words):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(CheckpointError, match=words):
        read_huggingface(folder)


@pytest.mark.parametrize("data", [b"", b"\0", bytes(7), struct.pack("<Q", 3) + b"{}", struct.pack("<Q", 2**63) + b"{}"])
def test_header_longer_than_the_file(folder, data):
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="announces a header"):
        read_huggingface(folder)


# Shards.


def write_shards(folder, places=None):
    """The model in two files; `places` overrides the index."""
    (folder / "model.safetensors").unlink()
    tensors, names = weights(), list(SHAPES)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / file)
    index = {name: file for file, part in parts.items() for name in part} | (places or {})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_shards(folder):
    write_shards(folder)
    checkpoint = read_huggingface(folder)
    for name, place in (("embed", "model.embed_tokens.weight"), ("output", "lm_head.weight")):
        (source,) = checkpoint.tensors[name]
        np.testing.assert_array_equal(decode_rows(source.type, source.read(0, 6)), weights()[place])


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({"x": "c.safetensors", "y": "d.safetensors"}, "not beside it: c.safetensors, d.safetensors"),
        ({"x": "a.safetensors"}, "tensors are that are not there: x in a.safetensors"),
        ({"x": "../a.safetensors"}, "'../a.safetensors'; expected the name of a .safetensors file beside it"),
        ({"x": "/etc/passwd"}, "'/etc/passwd'"),
        ({"x": "sub\\a.safetensors"}, "expected the name of a .safetensors file"),
        ({"x": 1}, "refers to 1; expected"),
    ],
)
def test_bad_index(folder, places, words):
    write_shards(folder, places)
    with pytest.raises(CheckpointError, match=words):
        read_huggingface(folder)


@pytest.mark.parametrize("bytes_left", [0, 7, 100, -1])
def test_a_shard_that_is_incomplete(folder, bytes_left):
    write_shards(folder)
    shard = folder / "b.safetensors"
    shard.write_bytes(shard.read_bytes()[:bytes_left])
    with pytest.raises(CheckpointError, match=r"b.safetensors .* it is damaged or incomplete"):
        read_huggingface(folder)


def write_pytorch_shards(folder, places=None):
    (folder / "model.safetensors").unlink()
    tensors, names = weights(), list(SHAPES)
    for file, part in {"pytorch_model-1.bin": names[:5], "pytorch_model-2.bin": names[5:]}.items():
        torch_pickles.save(folder / file, {name: tensors[name] for name in part})
    index = {name: f"pytorch_model-{1 if name in names[:5] else 2}.bin" for name in names} | (places or {})
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


def test_shards_of_pytorch(folder):
    write_pytorch_shards(folder)
    checkpoint = read_huggingface(folder)
    assert checkpoint.kind == "Hugging Face folder of PyTorch shards"
    (source,) = checkpoint.tensors["output"]
    np.testing.assert_array_equal(decode_rows(source.type, source.read(0, 6)), weights()["lm_head.weight"])


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({"x": "pytorch_model-3.bin"}, "not beside it: pytorch_model-3.bin; fetch them"),
        ({"x": "pytorch_model-1.bin"}, "tensors are that are not there: x in pytorch_model-1.bin"),
        ({"x": "a.safetensors"}, "'a.safetensors'; expected the name of a .bin file beside it"),
        ({"x": "../pytorch_model-1.bin"}, "expected the name of a .bin file beside it"),
    ],
)
def test_bad_index_of_pytorch(folder, places, words):
    write_pytorch_shards(folder, places)
    with pytest.raises(CheckpointError, match=words):
        read_huggingface(folder)


def test_a_shard_of_pytorch_that_is_incomplete(folder):
    write_pytorch_shards(folder)
    shard = folder / "pytorch_model-2.bin"
    shard.write_bytes(shard.read_bytes()[:-30])
    with pytest.raises(
        CheckpointError, match=r"pytorch_model-2.bin is a zip archive that cannot be read: .*; fetch it"
    ):
        read_huggingface(folder)


def test_index_without_map_and_tensor_in_two_shards(folder):
    write_shards(folder)
    safetensors.numpy.save_file(weights(), folder / "b.safetensors")
    with pytest.raises(CheckpointError, match="hold a tensor twice"):
        read_huggingface(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        read_huggingface(folder)
