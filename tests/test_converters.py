"""Whole conversions: every source to every format, what the report says, what is left after a failure."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import gguf
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece_models
import torch_pickles
from conftest import shared

from edgellm import quant
from edgellm.api import Model
from edgellm.backends.reference import matrix
from edgellm.converters import FORMATS, convert, read
from edgellm.converters.blocks import decode_rows
from edgellm.converters.gguf import GGUFFile
from edgellm.errors import ArgumentError, CheckpointError, EdgeError, ModelNotFoundError, UnsupportedError
from edgellm.loading import open_model

SOURCES = [
    "stories260K.bin", "hf", "gguf/stories260K-F32.gguf", "hf/model.safetensors", "weights.npz", "weights.pt",
    "old.pth", "shards", "tokenizer.model",
]  # fmt: skip


@pytest.fixture(scope="session")
def stories_source(tmp_path_factory):
    """The same model as other programs keep it: what is not in the test data is made of its Hugging Face folder."""
    made = tmp_path_factory.mktemp("stories260K")

    def source(name):
        there = shared("data/stories260K")
        return there / name if (there / name).exists() else _made(there, made, name)

    return source


def _made(there, folder, name):
    if (folder / name).exists():
        return folder / name
    for target in (folder, folder / "shards", folder / "tokenizer.model"):
        target.mkdir(exist_ok=True)
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copyfile(there / "hf" / file, target / file)
    tensors = safetensors.numpy.load_file(there / "hf" / "model.safetensors")
    shutil.copyfile(there / "stories260K.npz", folder / "weights.npz")
    torch_pickles.save(folder / "weights.pt", tensors)
    torch_pickles.save(folder / "old.pth", tensors, legacy=True)
    names = list(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[:20], "pytorch_model-00002-of-00002.bin": names[20:]}
    for file, part in shards.items():
        torch_pickles.save(folder / "shards" / file, {key: tensors[key] for key in part}, legacy="00001" in file)
    places = {key: file for file, part in shards.items() for key in part}
    (folder / "shards" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    spm = folder / "tokenizer.model"
    (spm / "tokenizer.json").unlink()
    metadata = GGUFFile(there / "gguf" / "stories260K-F32.gguf").metadata
    (spm / "tokenizer.model").write_bytes(sentencepiece_models.of_gguf(metadata))
    shutil.copyfile(there / "hf" / "model.safetensors", spm / "model.safetensors")
    return folder / name


@pytest.mark.parametrize("source", SOURCES)
def test_greedy_text_from_every_source(stories_source, tmp_path, source):
    golden = json.loads(shared("data/stories260K/golden.json").read_text())
    convert(stories_source(source), tmp_path / "s.edge", format="f32", progress=False)
    with Model(tmp_path / "s.edge", backend="reference") as model:
        done = model.generate("", temperature=0, max_tokens=256, ignore_eos=True)
        assert done.prompt_ids + done.ids == golden["greedy_ids"]
        assert done.text.startswith(golden["text"][:300])
        np.testing.assert_allclose(model.logits([1])[0, :8], golden["logits_after_bos_first8"], atol=1e-4)


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_file(stories_source, tmp_path, source):
    """Up to names: the same weights are stored, whatever they were read from."""
    first, other = tmp_path / "first.edge", tmp_path / "other.edge"
    convert(stories_source(SOURCES[0]), first, format="q8", progress=False)
    convert(stories_source(source), other, format="q8", progress=False)
    files = [open_model(path).file for path in (first, other)]
    for name, tensor in files[0].tensors.items():
        np.testing.assert_array_equal(tensor.data, files[1].tensors[name].data, err_msg=name)
    for file in files:
        file.close()


def test_q8_gives_the_first_60_tokens(stories_source, tmp_path):
    golden = json.loads(shared("data/stories260K/golden.json").read_text())
    convert(stories_source("hf"), tmp_path / "s.edge", format="q8", progress=False)
    with Model(tmp_path / "s.edge", backend="reference") as model:
        done = model.generate("", temperature=0, max_tokens=60, ignore_eos=True)
        assert (done.prompt_ids + done.ids)[:60] == golden["greedy_ids"][:60]


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_stores_what_the_report_says(stories_source, tmp_path, fmt):
    report = convert(stories_source("hf"), tmp_path / "s.edge", format=fmt, progress=False)
    exact = convert(stories_source("hf"), tmp_path / "exact.edge", format="f32", progress=False)
    stored, true = (open_model(tmp_path / name).file for name in ("s.edge", "exact.edge"))
    squares = errors = 0.0
    for name, tensor in true.tensors.items():
        if len(tensor.shape) == 2:
            values = matrix(tensor)
            squares += float((values**2).sum())
            errors += float(((matrix(stored.tensors[name]) - values) ** 2).sum())
    matrices = report.rows.get(fmt, report.rows["f32"])
    if fmt in ("q8", "f16", "f32"):
        assert matrices.relative_rms == pytest.approx((errors / squares) ** 0.5, abs=1e-6)
    assert report.total.weights == exact.total.weights
    assert report.n_bytes == (tmp_path / "s.edge").stat().st_size
    expected = {"keep": "f32"}.get(fmt, fmt)
    assert stored.tensors["layers.0.down"].format == expected
    assert stored.tensors["embed"].format == ("q8" if fmt in ("q2t", "q4", "q4m") else expected)
    for file in (stored, true):
        file.close()


def test_the_default_is_q4m_for_floats_and_keep_for_quantized(stories_source, tmp_path):
    assert convert(stories_source("hf"), tmp_path / "a.edge", progress=False).recipe == "q4m"
    for name, kept in (("Q4_0", "q4"), ("Q8_0", "q8")):
        source = stories_source(f"gguf/stories260K-{name}.gguf")
        report = convert(source, tmp_path / "b.edge", progress=False)
        assert report.recipe == "keep"
        assert kept in report.rows
        assert report.total.max_error == 0


def test_quantized_values_are_kept_exactly(smollm2_gguf, smollm2_path):
    """Every weight of SmolLM2 as the .edge file has it is what the gguf package reads from the Q4_1 file."""
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_gguf).tensors}
    file = open_model(smollm2_path).file
    for ours, names in {"layers.3.down": ["blk.3.ffn_down.weight"], "embed": ["token_embd.weight"],
                        "layers.7.gate_up": ["blk.7.ffn_gate.weight", "blk.7.ffn_up.weight"]}.items():  # fmt: skip
        expected = [gguf.dequantize(theirs[name].data, theirs[name].tensor_type) for name in names]
        np.testing.assert_array_equal(matrix(file.tensors[ours]), np.concatenate(expected))
    q = gguf.dequantize(theirs["blk.0.attn_q.weight"].data, theirs["blk.0.attn_q.weight"].tensor_type)
    half_apart = q.reshape(9, 32, 2, 576).swapaxes(1, 2).reshape(576, 576)
    np.testing.assert_array_equal(matrix(file.tensors["layers.0.q"]), half_apart)
    assert (file.tensors["layers.0.q"].pair, file.tensors["layers.7.gate_up"].pair) == (32, 1536)
    file.close()


MEMORY = """
import sys
from edgellm.converters import convert
convert(sys.argv[1], sys.argv[2], format=sys.argv[3], progress=False)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("fmt", ["keep", "q4m", "f32"])
def test_memory_is_bounded_by_the_largest_tensor(smollm2_gguf, tmp_path, fmt):
    run = subprocess.run([sys.executable, "-c", MEMORY, smollm2_gguf, tmp_path / "s.edge", fmt],
                         capture_output=True, text=True, check=True)  # fmt: skip
    largest = 49152 * 576 * 4
    assert int(run.stdout) * 1024 < 1.2 * largest + 150e6


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
def test_kill_leaves_the_target_as_it_was(smollm2_gguf, tmp_path):
    target = tmp_path / "s.edge"
    target.write_bytes(b"before")
    code = "import sys; from edgellm.converters import convert; convert(*sys.argv[1:3], format='q4m', progress=False)"
    process = subprocess.Popen([sys.executable, "-c", code, smollm2_gguf, target])
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 1 << 20 for path in tmp_path.glob(".*.part")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert target.read_bytes() == b"before"
    assert len(list(tmp_path.glob(".*.part"))) == 1


def hf_copy(stories_source, folder):
    shutil.copytree(stories_source("hf"), folder)
    for path in [folder, *folder.iterdir()]:
        os.chmod(path, 0o755 if path.is_dir() else 0o644)
    return folder


def poison(folder, value):
    """Put a value into a matrix."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][5, 7] = value
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("value", "fmt", "words"),
    [(float("nan"), "q8", "not finite"), (float("inf"), "f32", "not finite"), (1e9, "f16", "too large for f16"),
     (1e9, "q8", "too large for q8"), (-1e9, "q4m", "too large for q4m"), (1e9, "q4", "too large for q4")],
)  # fmt: skip
def test_weights_that_cannot_be_stored(stories_source, tmp_path, value, fmt, words):
    folder = hf_copy(stories_source, tmp_path / "model")
    poison(folder, value)
    with pytest.raises(CheckpointError, match=words):
        convert(folder, tmp_path / "s.edge", format=fmt, progress=False)
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16"])
def test_values_of_gguf_that_are_not_finite(tmp_path, kind):
    """The scale of a block, or a number."""
    path, name = tmp_path / "m.gguf", "blk.0.attn_v.weight"
    write_gguf(path, np.random.default_rng(0), {name: kind})
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    data = bytearray(path.read_bytes())
    data[tensor.data_offset : tensor.data_offset + 2] = b"\xff\x7f"  # no number in float16 and bfloat16
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"tensor '{name}' has weights that are not finite"):
        convert(path, tmp_path / "m.edge", progress=False)


def test_mixed_formats_of_a_stack_take_the_finer(stories_source, tmp_path):
    """Gate in Q4_0 and up in Q8_0, of 32 columns each, become q8; the values of both are kept."""
    rng = np.random.default_rng(0)
    path = tmp_path / "mixed.gguf"
    values = write_gguf(path, rng, {"blk.0.ffn_gate.weight": "Q4_0", "blk.0.ffn_up.weight": "Q8_0"})
    report = convert(path, tmp_path / "m.edge", progress=False)
    file = open_model(tmp_path / "m.edge").file
    tensor = file.tensors["layers.0.gate_up"]
    assert (tensor.format, tensor.pair, report.recipe) == ("q8", 48, "keep")
    expected = np.concatenate([values["blk.0.ffn_gate.weight"], values["blk.0.ffn_up.weight"]])
    np.testing.assert_allclose(matrix(tensor), expected, atol=np.abs(expected).max() / 200)
    np.testing.assert_array_equal(matrix(tensor)[48:], expected[48:])
    file.close()


def write_gguf(path, rng, types):
    """A model of one layer with the gguf package; {name: values} as they are stored."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"block_count": 1, "context_length": 64, "embedding_length": 64, "feed_forward_length": 48,
                       "attention.head_count": 2, "attention.head_count_kv": 1}.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * len(pieces))
    writer.add_token_types([2, 3, 3, *[6] * 256, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (260, 64), "output_norm": (64,), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,),
              "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64),
              "blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (48, 64), "blk.0.ffn_up": (48, 64)}  # fmt: skip
    shapes["blk.0.ffn_down"] = (64, 48)
    values = {}
    for name, shape in shapes.items():
        name, value = f"{name}.weight", rng.standard_normal(shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType[types.get(name, "F32")]
        data = gguf.quantize(value, kind)
        values[name] = value if kind == gguf.GGMLQuantizationType.F32 else gguf.dequantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_pairing_round_trips_through_a_file(tmp_path):
    """Queries of 32 to a head are paired by 16, and read back in their order."""
    path = tmp_path / "m.gguf"
    values = write_gguf(path, np.random.default_rng(1), {})
    convert(path, tmp_path / "m.edge", format="f32", progress=False)
    file, source = open_model(tmp_path / "m.edge").file, read(path)
    assert file.tensors["layers.0.q"].pair == 16
    q = matrix(file.tensors["layers.0.q"])
    half_apart = values["blk.0.attn_q.weight"].reshape(2, 16, 2, 64).swapaxes(1, 2).reshape(64, 64)
    np.testing.assert_array_equal(q, half_apart)
    np.testing.assert_array_equal(decode_rows(source.tensors["layers.0.q"][0].type,
                                              source.tensors["layers.0.q"][0].read(0, 64)),
                                  values["blk.0.attn_q.weight"])  # fmt: skip
    stored = quant.get("f32").unpack(file.tensors["layers.0.q"].data, 64, 64).codes
    np.testing.assert_array_equal(stored[:16], half_apart[:16])
    np.testing.assert_array_equal(stored[16:32], half_apart[16:32])
    np.testing.assert_array_equal(stored, half_apart[quant.paired(64, 16)])
    file.close()


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "x.pt").write_bytes(b"PK\3\4")
    (tmp_path / "x.bin").write_bytes(b"PK\3\4")
    (tmp_path / "x.pickle").write_bytes(pickle.dumps(7))
    (tmp_path / "empty.gguf").write_bytes(b"")
    for name, kind, words in [
        ("x.safetensors", CheckpointError, "has no config.json; expected one beside the weights"),
        ("x.pt", CheckpointError, r"x\.pt is a zip archive that cannot be read"),
        ("x.bin", CheckpointError, r"x\.bin is a zip archive that cannot be read"),
        ("x.pickle", UnsupportedError, "reads GGUF files, Hugging Face folders, llama2.c .bin files, and safetensors"),
        ("empty.gguf", UnsupportedError, "not a checkpoint"),
        ("none", ModelNotFoundError, "no such file"),
        (".", CheckpointError, r"config\.json"),
    ]:
        with pytest.raises(kind, match=words):
            convert(tmp_path / name, tmp_path / "t.edge", progress=False)
    with pytest.raises(ArgumentError, match=r"'q5'.*keep, f16"):
        convert(tmp_path, tmp_path / "t.edge", format="q5")


def test_a_tokenizer_that_the_library_cannot_read(stories_source, tmp_path):
    folder = hf_copy(stories_source, tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"decoder": {"type": "Nonsense"}}))
    with pytest.raises(
        CheckpointError, match=r"the tokenizer of .*model cannot be read: .*; expected a tokenizer\.json"
    ):
        convert(folder, tmp_path / "s.edge", progress=False)
    assert not (tmp_path / "s.edge").exists()


def test_names_of_another_project(stories_source, tmp_path):
    """Weights under Meta's names, with a tensor that nobody needs, by a map."""
    tensors, meta = np.load(stories_source("weights.npz")), {"rope.freqs": np.ones(4, np.float32)}
    meta["tok_embeddings.weight"] = tensors["model.embed_tokens.weight"]
    folder = hf_copy(stories_source, tmp_path / "model")
    names = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "rope.freqs": None,
        "norm.weight": "model.norm.weight",
    }
    layer = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
             "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
             "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
             "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
             "feed_forward.w3": "mlp.up_proj"}  # fmt: skip
    names |= {f"layers.{{}}.{theirs}.weight": f"model.layers.{{}}.{ours}.weight" for theirs, ours in layer.items()}
    meta["norm.weight"] = tensors["model.norm.weight"]
    for i in range(5):
        for theirs, ours in layer.items():
            meta[f"layers.{i}.{theirs}.weight"] = tensors[f"model.layers.{i}.{ours}.weight"]
    np.savez_compressed(folder / "meta.npz", **meta)
    (tmp_path / "names.json").write_text(json.dumps(names))
    convert(folder, tmp_path / "expected.edge", format="q8", progress=False)
    convert(folder / "meta.npz", tmp_path / "s.edge", format="q8", names=tmp_path / "names.json", progress=False)
    expected, found = (open_model(tmp_path / name).file for name in ("expected.edge", "s.edge"))
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(tensor.data, found.tensors[name].data, err_msg=name)
    for file in (expected, found):
        file.close()
    with pytest.raises(CheckpointError, match=r"asks for: model.embed_tokens.weight is missing; .*; rope.freqs is not"):
        convert(folder / "meta.npz", tmp_path / "s.edge", progress=False)
    with pytest.raises(ArgumentError, match=r"names of its format; expected no map of names"):
        convert(stories_source("gguf/stories260K-F32.gguf"), tmp_path / "s.edge", names=tmp_path / "names.json")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (
            "stories260K.bin",
            "llama2.c file: llama, 47 tensors with 0.26 M weights in F32, BPE tokenizer with 512 tokens",
        ),
        ("hf", "Hugging Face folder of safetensors: llama, 47 tensors with 0.26 M weights in F32, BPE"),
        ("shards", "Hugging Face folder of PyTorch shards: llama, 47 tensors"),
        ("weights.npz", "npz file: llama, 47 tensors with 0.26 M weights in F32, BPE tokenizer with 512 tokens"),
        ("gguf/stories260K-Q8_0.gguf", "GGUF file: llama, 47 tensors with 0.26 M weights in Q8_0, F16, F32, BPE"),
    ],
)
def test_what_was_found_is_told(stories_source, tmp_path, capsys, source, found):
    convert(stories_source(source), tmp_path / "s.edge")
    assert capsys.readouterr().err.startswith(found)


def test_a_config_error_names_the_file(stories_source, tmp_path):
    folder = hf_copy(stories_source, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 3}))
    with pytest.raises(CheckpointError, match=r"model: config has n_heads = 3, not a multiple of n_kv_heads = 4"):
        convert(folder, tmp_path / "s.edge", progress=False)


def test_an_error_names_a_file_that_was_given_without_its_folder(stories_source, tmp_path, monkeypatch):
    content = stories_source("gguf/stories260K-F32.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content.replace(b"tokenizer.ggml.scores", b"tokenizer.ggml.scorez"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"m\.gguf: the GGUF's tokenizer\.ggml\.scores is missing; expected 512"):
        read("m.gguf")


def test_a_target_that_cannot_be_written(stories_source, tmp_path):
    with pytest.raises(EdgeError, match="nothing was written"):
        convert(stories_source("hf"), tmp_path / "none" / "s.edge", progress=False)
