import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import shared
from tiny_tokenizers import byte_level, metadata, sentencepiece, tokenizer

from edgellm import bpe
from edgellm.bpe import BPE
from edgellm.converters.gguf import GGUFFile
from edgellm.converters.gguf_tokenizer import _PRE, tokenizer_from_gguf
from edgellm.errors import ArgumentError, CheckpointError, EdgeFileError, UnsupportedError
from edgellm.tokenizer import Tokenizer


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "qwen2", "phi-3"])
def test_the_ids_are_those_of_llama_cpp(name):
    vocabulary = shared(f"data/tokenizer-vectors/ggml-vocab-{name}.gguf")
    texts = (vocabulary.parent / f"{vocabulary.name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (vocabulary.parent / f"{vocabulary.name}.out").read_text().split("\n")
    ours = tokenizer(GGUFFile(vocabulary).metadata)
    for text, line in zip(texts, lines, strict=True):
        ids = ours.encode(text, add_special=False)
        assert ids == [int(id) for id in line.split()], text
        assert ours.decode(ids) == text


def test_the_ids_of_smollm2_are_those_of_llama_cpp(smollm2_gguf):
    golden = json.loads(shared("golden/tokens.json").read_text())["models"]["SmolLM2-135M-Instruct.Q4_1.gguf"]
    ours = tokenizer(GGUFFile(smollm2_gguf).metadata)
    for name, entry in golden.items():
        assert ours.encode(entry["text"], add_special=False) == entry["ids"], name
    assert not ours.adds_bos
    assert ours.eos_ids == (2, 0)


def test_the_ids_of_stories260k_are_those_of_its_own_tokenizer():
    folder = shared("data/stories260K")
    ours = tokenizer(GGUFFile(folder / "gguf" / "stories260K-F32.gguf").metadata)
    theirs = Tokenizer((folder / "hf" / "tokenizer.json").read_bytes(), 1, [2])
    for text in ("Once upon a time", "", " two  spaces ", "\n\ttabs", "caf\xe9 \U0001f600", "</s> after", "a" * 300):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text), skip_special=False) == theirs.decode(theirs.encode(text), False)


@pytest.mark.parametrize("name", _PRE)
def test_every_known_way_to_cut_words_runs(name):
    ours = tokenizer(byte_level(pre=name))
    text = "Hello, I'LL  pay 1234\u20ac\r\n\n na\xefve \u4e16\u754c!"
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize(
    ("data", "bos", "eos"),
    [
        (byte_level(), [], []),
        (byte_level(pre="llama-bpe"), [0], []),
        (byte_level(pre="tekken", add_bos_token=False, add_eos_token=True), [], [1]),
        (byte_level(add_bos_token=True), [0], []),
        (sentencepiece(), [1], []),
        (sentencepiece(add_bos_token=False), [], []),
        (sentencepiece(add_eos_token=True), [1], [2]),
    ],
)
def test_bos_and_eos_are_added_as_llama_cpp_does(data, bos, eos):
    ours = tokenizer(data)
    assert ours.encode("") == bos + eos
    assert ours.encode("hello") == bos + ours.encode("hello", add_special=False) + eos
    assert ours.adds_bos is bool(bos)


@pytest.mark.parametrize("data", [byte_level(), sentencepiece()])
def test_special_tokens_are_parsed_only_if_asked_for(data):
    ours = tokenizer(data)
    end = ours.special_tokens["<|im_end|>"]
    assert ours.encode("a<|im_end|>", add_special=False)[-1] == end
    plain = ours.encode("a<|im_end|>", add_special=False, parse_special=False)
    assert not set(plain) & set(ours.special_tokens.values())
    assert ours.decode(plain) == "a<|im_end|>"
    assert ours.decode([end]) == ""
    assert ours.decode([end], skip_special=False) == "<|im_end|>"
    assert end in ours.eos_ids
    # One switch in the library, two threads that want it otherwise.
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: end in ours.encode("a<|im_end|>", parse_special=n % 2 == 0), range(400)))
    assert found == [n % 2 == 0 for n in range(400)]


def test_user_defined_tokens_are_always_parsed():
    ours = tokenizer(byte_level())
    assert ours.encode("<think>", parse_special=False) == [6]
    assert ours.decode([6]) == "<think>"


def test_white_space_after_the_special_tokens_of_phi_3_is_dropped():
    data = sentencepiece() | {"general.name": "Phi-3 mini"}
    ours = tokenizer(data)
    assert ours.encode("[INST] \n hello") == ours.encode("[INST]hello")
    assert ours.split_special("a [INST] \n hello") == ["a ", ours.special_tokens["[INST]"], "hello"]


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes():
    ours = tokenizer(sentencepiece())
    assert [ours.id_to_token(id) for id in ours.encode("hello w\xe9")] == [
        "<s>",
        "\u2581hello",
        "\u2581w",
        "<0xC3>",
        "<0xA9>",
    ]
    assert ours.decode(ours.encode("hello w\xe9")) == "hello w\xe9"
    assert tokenizer(sentencepiece(add_space_prefix=False)).decode(ours.encode("hello")) == " hello"


def without(data, key):
    return {name: value for name, value in data.items() if name != f"tokenizer.ggml.{key}"}


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({}, CheckpointError, "names no tokenizer"),
        (metadata("bert", ["a"], [1]), UnsupportedError, "'bert'; known are gpt2, llama"),
        (metadata(7, ["a"], [1]), CheckpointError, "model is 7; expected str"),
        (without(byte_level(), "tokens"), CheckpointError, "tokens is missing"),
        (byte_level(tokens=np.arange(9)), CheckpointError, "tokens is an array of 9 x int64"),
        (byte_level(tokens=["a", 5]), CheckpointError, "tokens is a list of 2"),
        (
            byte_level(token_type=np.ones(3, np.int32)),
            CheckpointError,
            "token_type is an array of 3 x int32; expected 266",
        ),
        (byte_level(token_type=np.ones(266, np.float32)), CheckpointError, "266 x float32"),
        (byte_level(token_type="x"), CheckpointError, "token_type is 'x'"),
        (metadata("gpt2", ["a", "b", "a"], [1] * 3, merges=["a b"]), CheckpointError, "'a' more than once"),
        (metadata("gpt2", ["a", "\udc80", "c"], [1] * 3, merges=["a b"]), CheckpointError, "not UTF-8"),
        (without(byte_level(), "merges"), CheckpointError, "merges is missing"),
        (byte_level(merges=["he"]), CheckpointError, "merge 0 of the tokenizer is 'he'"),
        (byte_level(merges=["h e", "h x y"]), CheckpointError, "merge 1 of the tokenizer is 'h x y'"),
        (byte_level(merges=["h l"]), CheckpointError, "make a third"),
        (byte_level(pre="klingon"), UnsupportedError, "'klingon'; known are .*llama-bpe"),
        (byte_level(bos_token_id=266), CheckpointError, "bos_token_id is 266; expected the id of one of its 266"),
        (byte_level(eos_token_id=-1), CheckpointError, "eos_token_id is -1"),
        (byte_level(eot_token_id=999), CheckpointError, "eot_token_id is 999"),
        (byte_level(eos_token_id="2"), CheckpointError, "eos_token_id is '2'; expected int"),
        (byte_level(eos_token_id=True), CheckpointError, "eos_token_id is True; expected int"),
        (byte_level(add_bos_token=1), CheckpointError, "add_bos_token is 1; expected bool"),
        (without(byte_level(add_bos_token=True), "bos_token_id"), CheckpointError, "adds BOS to every text"),
        (without(sentencepiece(), "scores"), CheckpointError, "scores is missing"),
        (sentencepiece(scores=np.zeros(4, np.float32)), CheckpointError, "scores is an array of 4 x float32"),
        (sentencepiece(scores=["a"] * 300), CheckpointError, "scores is a list of 300"),
        (sentencepiece(scores=np.full(300, np.nan, np.float32)), CheckpointError, "not a number"),
    ],
)
def test_bad_metadata_gives_one_sentence(data, error, message):
    with pytest.raises(error, match=message):
        tokenizer_from_gguf(data)


@pytest.mark.parametrize(
    "vocabulary",
    [
        metadata("gpt2", ["a", "b", "ab"], [1, 1, 1], merges=["a b"]),
        without(metadata("gpt2", ["a", "b", "ab"], [], merges=["a b"]), "token_type"),
        metadata("gpt2", ["a", "b", "ab"], [1, 1, 1], merges=["a b"]) | {"tokenizer.ggml.token_type": [1, 1, 1]},
        metadata("gpt2", ["a", "b", "ab", ""], [1, 1, 1, 1], merges=["a b"]),
    ],
)
def test_what_a_vocabulary_may_leave_out(vocabulary):
    source = tokenizer_from_gguf(vocabulary)
    assert (source.bos_id, source.eos_ids) == (None, ())
    assert Tokenizer(source.json, None, ()).encode("aba") == [2, 0]


@pytest.mark.parametrize(
    ("json", "error"),
    [
        (b"", EdgeFileError),
        (b"{", EdgeFileError),
        (b"\xff\xfe", EdgeFileError),
        (b'{"version": "1.0"}', EdgeFileError),
        (
            b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}',
            UnsupportedError,
        ),
        (
            b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []},'
            b'"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true}}',
            UnsupportedError,
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(json, error):
    with pytest.raises(error, match="the tokenizer"):
        Tokenizer(json, None, ())


def test_arguments_out_of_range_are_refused():
    source = tokenizer_from_gguf(byte_level())
    ours = Tokenizer(source.json + b"  ", 0, (1,))
    for id in (-1, ours.n_tokens, 1 << 40):
        with pytest.raises(ArgumentError, match=f"{id} is no token id; expected 0 to 265"):
            ours.decode([id])
        with pytest.raises(ArgumentError, match="is no token id"):
            ours.id_to_token(id)
    with pytest.raises(ArgumentError, match="lone surrogates"):
        ours.encode("a\ud800")
    with pytest.raises(EdgeFileError, match="the id 266"):
        Tokenizer(source.json, 266, (), vocab_size=300)


@pytest.mark.parametrize("has_tables", [False, True])
def test_ids_of_padding_stand_for_no_text(has_tables):
    source = tokenizer_from_gguf(byte_level())
    vocabulary = BPE(np.frombuffer(bpe.tables(source.json), np.uint8)) if has_tables else source.json
    ours = Tokenizer(vocabulary, 0, (1,), vocab_size=272)
    first, hell = ours.n_tokens, ours.encode("hell", add_special=False)
    assert (first, ours.vocab_size) == (266, 272)
    assert ours.decode([first, *hell, 271, *hell]) == "hellhell"
    assert [ours.id_to_token(id) for id in (first, 271)] == ["", ""]
    assert not ours.is_special(271)
    with pytest.raises(ArgumentError, match="272 is no token id; expected 0 to 271"):
        ours.decode([272])
