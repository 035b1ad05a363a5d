import json
import struct

import numpy as np
import pytest
from conftest import shared

from edgellm import architectures
from edgellm.architectures import llama
from edgellm.converters import read
from edgellm.converters.blocks import decode_rows
from edgellm.converters.gguf import read_gguf
from edgellm.converters.huggingface import read_huggingface
from edgellm.converters.llama2c import read_llama2c
from edgellm.converters.naming import parts
from edgellm.errors import CheckpointError, UnsupportedError

CONFIG = llama.Config(
    vocab_size=7,
    hidden_size=8,
    ffn_size=6,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    head_dim=4,
    context_length=5,
    norm_eps=1e-5,
    rope_theta=10000.0,
)
NUMBERS = (8, 6, 2, 2, 1, 7, 5)
PIECES = ["<unk>", "\n<s>\n", "\n</s>\n", "<0x0A>", " ", "a", " a"]
LAYER = "layers.{}."
V0 = (
    "embed",
    LAYER + "attn_norm",
    LAYER + "q",
    LAYER + "k",
    LAYER + "v",
    LAYER + "o",
    LAYER + "ffn_norm",
    LAYER + "gate",
    LAYER + "down",
    LAYER + "up",
    "norm",
    "tables",
    "output",
)
V1 = (
    LAYER + "attn_norm",
    LAYER + "ffn_norm",
    "norm",
    "embed",
    LAYER + "q",
    LAYER + "k",
    LAYER + "v",
    LAYER + "o",
    LAYER + "gate",
    LAYER + "down",
    LAYER + "up",
    "output",
)


def weights(tied: bool) -> dict[str, np.ndarray]:
    rng, made_of = np.random.default_rng(3), parts(architectures.get("llama"), CONFIG).values()
    shapes = {name: shape for part in made_of for name, shape in part.items()}
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    values["tables"] = np.zeros(CONFIG.context_length * CONFIG.head_dim, np.float32)
    if tied:
        values.pop("output")
    return values


def data(order: tuple[str, ...], tied: bool) -> bytes:
    values = weights(tied)
    names = [name.format(i) for name in order for i in range(CONFIG.n_layers if "{}" in name else 1)]
    return b"".join(values[name].tobytes() for name in names if name in values)


def v0(tied: bool = True, numbers: tuple[int, ...] = NUMBERS) -> bytes:
    header = [*numbers[:5], numbers[5] if tied else -numbers[5], numbers[6]]
    return struct.pack("<7i", *header) + data(V0, tied)


def v1(tied: bool = True, version: int = 1) -> bytes:
    header = struct.pack("<Ii7iB", 0x616B3432, version, *NUMBERS, tied)
    return header.ljust(256, b"\0") + data(V1, tied)


def tokenizer(pieces: list[str] = PIECES, longest: int = 6, score: float = 0.0) -> bytes:
    entries = [struct.pack("<fi", score, len(piece.encode())) + piece.encode() for piece in pieces]
    return struct.pack("<i", longest) + b"".join(entries)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "tokenizer.bin").write_bytes(tokenizer())
    path = tmp_path / "model.bin"
    path.write_bytes(v0())
    return path


def read_all(checkpoint) -> dict[str, np.ndarray]:
    """Every tensor with RoPE pairs half a head apart."""
    return {
        name: half_apart(checkpoint, name, np.concatenate([values_of(source) for source in sources]))
        for name, sources in checkpoint.tensors.items()
    }


def values_of(source) -> np.ndarray:
    rows = int(np.prod(source.shape[:-1]))
    return decode_rows(source.type, source.read(0, rows)).reshape(source.shape)


def half_apart(checkpoint, name, values):
    if name.split(".")[-1] not in checkpoint.interleaved:
        return values
    pairs = values.reshape(-1, checkpoint.config.head_dim // 2, 2, values.shape[1])
    return pairs.swapaxes(1, 2).reshape(values.shape)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("write", [v0, v1])
def test_model(model, write, tied):
    model.write_bytes(write(tied))
    checkpoint = read_llama2c(model)
    assert vars(checkpoint.config) == {**vars(CONFIG), "tie_embeddings": tied}
    assert checkpoint.interleaved == ("q", "k")
    assert checkpoint.metadata == {"name": "model", "source": "model.bin"}
    assert list(checkpoint.tensors) == list(llama.shapes(checkpoint.config))
    for source in (source for sources in checkpoint.tensors.values() for source in sources):
        np.testing.assert_array_equal(values_of(source), weights(tied)[source.name])
    assert [source.name for source in checkpoint.tensors["layers.1.gate_up"]] == ["layers.1.gate", "layers.1.up"]


def test_tokenizer(model):
    source = read_llama2c(model).tokenizer
    assert (source.n_tokens, source.bos_id, source.eos_ids) == (7, 1, (2,))
    vocabulary = json.loads(source.json)["model"]["vocab"]
    assert vocabulary == {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "▁": 4, "a": 5, "▁a": 6}


def test_tokenizer_is_chosen_by_its_number_of_tokens(model):
    folder = model.parent
    (folder / "tokenizer.bin").write_bytes(tokenizer([*PIECES, "b"]))
    with pytest.raises(CheckpointError, match=r"has 7 tokens, and of the tok\*.bin beside it as many have none"):
        read_llama2c(model)
    (folder / "tok7.bin").write_bytes(tokenizer())
    assert read_llama2c(model).tokenizer.n_tokens == 7
    (folder / "tok8.bin").write_bytes(tokenizer())
    with pytest.raises(CheckpointError, match=r"have tok7.bin, tok8.bin; expected one: name the tokenizer to use"):
        read_llama2c(model)
    assert read_llama2c(model, folder / "tok8.bin").tokenizer.n_tokens == 7
    with pytest.raises(CheckpointError, match="has 8 tokens, but the model 7; expected as many"):
        read_llama2c(model, folder / "tokenizer.bin")


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"", CheckpointError, "has 0 bytes; expected a llama2.c model"),
        (bytes(300), CheckpointError, "starts with the numbers"),
        (v0()[:-1], CheckpointError, r"has \d+ bytes; expected \d+, from the sizes in its header"),
        (v0() + b"\0", CheckpointError, "damaged, incomplete or another kind"),
        (v0(numbers=(8, 6, 2, 3, 1, 7, 5)), CheckpointError, "a multiple of the number of heads"),
        (v0(numbers=(8, 6, 2, 0, 1, 7, 5)), CheckpointError, "a multiple of the number of heads"),
        (v0(numbers=(8, 6, 2**24, 2, 1, 7, 5)), CheckpointError, "from the sizes in its header"),
        (v0(numbers=(8, 6, 2**31 - 1, 2, 1, 7, 5)), CheckpointError, "n_layers = 2147483647"),
        (v0(numbers=(8, 6, 2, 2, 1, 0, 5)), CheckpointError, "vocab_size = 0"),
        (v0(numbers=(8, 6, 2, 2, 1, -(2**31), 5)), CheckpointError, "vocab_size = 2147483648"),
        (v1(version=2), UnsupportedError, r"llama2.c version 2 \(int8 weights\)"),
        (v1(version=3), UnsupportedError, "llama2.c version 3; this version of edgellm reads 0 and 1"),
        (v1()[:-4], CheckpointError, "from the sizes in its header"),
    ],
)
def test_bad_model(model, content, error, words):
    model.write_bytes(content)
    with pytest.raises(error, match=words):
        read_llama2c(model)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected 4 bytes to"),
        (tokenizer()[:-1], "token 6 has the length 2 and the score 0.0; expected up to 1 bytes"),
        (tokenizer() + b"\0", "ends in token 7"),
        (tokenizer(longest=5), "token 2 has the length 6 .* expected up to 5 bytes"),
        (tokenizer(score=float("nan")), "token 0 has the length 5 and the score nan"),
        (struct.pack("<ifi", 9, 0, -1), "token 0 has the length -1"),
        (struct.pack("<ifi", 9, 0, 1) + b"\xff", "token 0 is not UTF-8 text"),
        (tokenizer(PIECES[:2]), "has 2 tokens, but the model 7"),
    ],
)
def test_bad_tokenizer(model, content, words):
    path = model.with_name("given.bin")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_llama2c(model, path)


@pytest.mark.parametrize("size", [640, 128])
def test_it_is_told_from_pytorch(model, size):
    """Whose pickles start with the same bytes as widths of 640 and 128."""
    model.write_bytes(v0(numbers=(size, *NUMBERS[1:])))
    with pytest.raises(CheckpointError, match="from the sizes in its header"):
        read(model)


def test_missing_files(model):
    with pytest.raises(CheckpointError, match=r"other.bin cannot be read: No such file"):
        read_llama2c(model.with_name("other.bin"))
    with pytest.raises(CheckpointError, match=r"other.bin cannot be read: No such file"):
        read_llama2c(model, model.with_name("other.bin"))


def test_real_model_is_the_same_from_every_source():
    folder = shared("data/stories260K")
    checkpoints = [
        read_llama2c(folder / "stories260K.bin"),
        read_huggingface(folder / "hf"),
        read_gguf(folder / "gguf" / "stories260K-F32.gguf"),
    ]
    first, *others = [read_all(checkpoint) for checkpoint in checkpoints]
    for other in others:
        assert list(other) == list(first)
        for name, values in other.items():
            np.testing.assert_array_equal(values, first[name], err_msg=name)
    sizes = [{**vars(checkpoint.config), "norm_eps": None} for checkpoint in checkpoints]
    assert sizes[0] == sizes[1] == sizes[2]
    assert len({checkpoint.tokenizer.n_tokens for checkpoint in checkpoints}) == 1
