"""Tables give the ids of the `tokenizers` library, and damaged ones an error."""

import json
from unicodedata import normalize

import numpy as np
import pytest
from conftest import shared
from fresh import rng
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_level, sentencepiece, tokenizer

from edgellm import bpe
from edgellm.api import Model
from edgellm.bpe import BPE
from edgellm.converters import convert
from edgellm.converters.gguf import GGUFFile
from edgellm.converters.gguf_tokenizer import tokenizer_from_gguf
from edgellm.errors import ArgumentError, ContextOverflowError, EdgeError, EdgeFileError
from edgellm.tokenizer import MOST_REMEMBERED, Tokenizer, _Tabled

VECTORS = ["gpt-2", "llama-spm", "qwen2", "phi-3"]
REAL = [*VECTORS, "smollm2", "gemma3"]


def mapped(tables):
    return BPE(np.frombuffer(tables, np.uint8))


def both(source, bos_id=None, eos_ids=()):
    """A tokenizer with tables, and the same as the library runs it alone."""
    return Tokenizer(mapped(bpe.tables(source)), bos_id, eos_ids), Tokenizer(source, bos_id, eos_ids)


@pytest.fixture(scope="module")
def real(request):
    """The tokenizers of `both` by the name of their vocabulary, each made once."""
    made = {}

    def get(name):
        if name not in made:
            path = (
                shared(f"data/tokenizer-vectors/ggml-vocab-{name}.gguf")
                if name in VECTORS
                else request.getfixturevalue(f"{name}_gguf")
            )
            source = tokenizer_from_gguf(GGUFFile(path).metadata)
            made[name] = both(source.json, source.bos_id, source.eos_ids)
        return made[name]

    return get


def assert_equal(pair, text, add_special=True, parse_special=True):
    ours, theirs = pair
    ids = ours.encode(text, add_special, parse_special)
    assert ids == theirs.encode(text, add_special, parse_special), text
    assert ours._vocabulary.least(text) <= len(ours.encode(text, False, parse_special)), text
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids, skip_special=False)


@pytest.mark.parametrize("name", VECTORS)
def test_the_vectors_of_llama_cpp(real, name):
    texts = shared(f"data/tokenizer-vectors/ggml-vocab-{name}.gguf.inp").read_bytes().decode()
    for text in texts.split("\n__ggml_vocab_test__\n"):
        assert_equal(real(name), text)


@pytest.mark.parametrize("name", REAL)
def test_the_golden_texts(real, name):
    for model in json.loads(shared("golden/tokens.json").read_text())["models"].values():
        for entry in model.values():
            assert_equal(real(name), entry["text"])


@pytest.mark.parametrize(
    ("name", "model"), [("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"), ("gemma3", "gemma-3-270m-q4_k_m.gguf")]
)
def test_the_ids_are_those_of_llama_cpp(real, name, model):
    ours, _ = real(name)
    for name, entry in json.loads(shared("golden/tokens.json").read_text())["models"][model].items():
        assert ours.encode(entry["text"], add_special=False) == entry["ids"], name


@pytest.mark.parametrize("name", REAL)
def test_texts_in_many_languages_and_code(real, name):
    random = rng("texts", name)
    for path in sorted(shared("data/text").rglob("*.txt")):
        text = path.read_bytes().decode()
        begin = int(random.integers(0, len(text)))
        assert_equal(real(name), text[begin : begin + 4000])


@pytest.mark.parametrize("name", REAL)
def test_every_token_is_spelled_and_encodes_the_same(real, name):
    ours, theirs = real(name)
    assert ours.n_tokens == theirs.n_tokens
    assert ours.special_tokens == theirs.special_tokens
    assert (ours.adds_bos, ours.drops_space) == (theirs.adds_bos, theirs.drops_space)
    ids = range(0, ours.n_tokens, 7)
    assert [ours.id_to_token(id) for id in ids] == [theirs.id_to_token(id) for id in ids]
    assert [ours.token_bytes(id) for id in ids] == [theirs.token_bytes(id) for id in ids]
    for id in ids:
        token = theirs.id_to_token(id)
        assert ours.encode(token) == theirs.encode(token), token


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("text", ["a", "\u4e16", "=-", " ", "\u2581", "ab" * 7 + ">\u2581</"])
def test_a_word_of_thousands_of_characters(real, name, text):
    assert_equal(real(name), text * 3000)


FRAGMENTS = [
    *(" ", "  ", "   ", "\n", "\n\n\n", "\r\n", "\t\t", "\x00", "\x04", "\x85", "\ufeff", "\U000f0000", "\u0120"),
    *("\u2581", "\u2581\u2581", ">\u2581</", " > </", "<0x41>", "<s", "'s", "'LL", "1234567", "hello", "hell"),
    *("e\u0301", "\u1112\u1161", "\U0001f468\u200d\U0001f469", "\u0e17\u0e31\u0e49\u0e07", "\u4e16\u754c"),
]


def texts(tokenizer):
    """Text of any characters, with what tokenizers make distinctions of, and added tokens in the middle."""
    added = sorted(tokenizer.special_tokens) or ["<s>"]
    parts = st.one_of(st.text(max_size=6), st.sampled_from(FRAGMENTS), st.sampled_from(added))
    return st.lists(parts, max_size=10).map("".join)


@pytest.mark.parametrize(("name", "longest"), [("gpt-2", 128), ("llama-spm", 16), ("qwen2", 128), ("smollm2", 81)])
def test_text_that_must_have_too_many_tokens(real, name, longest):
    ours, theirs = real(name)
    ours.check_size("a" * 10 * longest, 10)
    message = rf"^{10 * longest + 1} characters, which are 11 tokens or more, do not fit: the context holds 10; "
    with pytest.raises(ContextOverflowError, match=message):
        ours.check_size("a" * (10 * longest + 1), 10)
    theirs.check_size("a" * 1_000_000, 10)  # nothing is known of it


def test_text_that_is_left_out_does_not_count(real):
    ours, _ = real("smollm2")
    assert ours.encode("\x04" * 1000) == []
    ours.check_size("\x04" * 1_000_000, 10)
    assert tokenizer(byte_level())._vocabulary.least("a" * 1000) > 0


def test_no_character_is_composed_of_more_than_four():
    assert max(len(normalize("NFD", chr(code))) for code in range(0x110000)) == 4


@pytest.mark.parametrize("name", REAL)
def test_any_text(real, name):
    pair = real(name)

    @given(texts(pair[0]), st.booleans(), st.booleans())
    @settings(deadline=None, max_examples=300)
    def check(text, add_special, parse_special):
        assert_equal(pair, text, add_special, parse_special)

    check()


def changed(metadata, change):
    """A tokenizer.json of tiny_tokenizers with something changed."""
    whole = json.loads(tokenizer_from_gguf(metadata).json)
    change(whole)
    return json.dumps(whole).encode()


def put(*keys, value):
    def change(whole):
        for key in keys[:-1]:
            whole = whole[key]
        whole[keys[-1]] = value

    return change


def respell(whole, token):
    """Takes a token out of a vocabulary, and puts one that nothing becomes in its place."""
    vocab = whole["model"]["vocab"]
    vocab["hello hello"] = vocab.pop(token)


def spaced(whole):
    """Of a byte-level tokenizer: no word has the character that the token has."""
    whole["model"]["vocab"]["<a\u2581b>"] = whole["model"]["vocab"].pop("<think>")


def added(**options):
    """Gives the added tokens options, all but the first two."""
    return lambda whole: [token.update(options) for token in whole["added_tokens"][2:]]


METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
}
TABLED = {
    "bytes": (byte_level(), lambda whole: None),
    "sentencepiece": (sentencepiece(), lambda whole: None),
    "no space before": (sentencepiece(add_space_prefix=False, add_eos_token=True), lambda whole: None),
    "whole words": (byte_level(pre="llama-bpe"), lambda whole: None),
    "words made otherwise": (byte_level(), put("model", "ignore_merges", value=True)),
    "NFC": (byte_level(), put("normalizer", value={"type": "NFC"})),
    "space before each text": (byte_level(), put("pre_tokenizer", value=BYTE_LEVEL)),
    "places trimmed": (
        byte_level(),
        put("post_processor", value={"type": "Sequence", "processors": [BYTE_LEVEL, TEMPLATE]}),
    ),
    "tokens found after normalizing": (byte_level(), added(normalized=True)),
    "space around tokens": (byte_level(), added(lstrip=True, rstrip=True)),
    "space around tokens of sentencepiece": (sentencepiece(), added(lstrip=True, rstrip=True)),
    "words of sentencepiece": (sentencepiece(), put("pre_tokenizer", value=METASPACE)),
    "a byte missing": (byte_level(), lambda whole: respell(whole, "\u0120")),
    "a token with a space": (byte_level(), spaced),
    "unknown, but there is none": (byte_level(), put("model", "unk_token", value="he")),
}


@pytest.mark.parametrize("case", TABLED)
def test_options_that_tables_keep(case):
    pair = both(changed(*TABLED[case]))

    @given(texts(pair[0]), st.booleans(), st.booleans())
    @settings(deadline=None, max_examples=200)
    def check(text, add_special, parse_special):
        assert_equal(pair, text, add_special, parse_special)

    check()


def missing_with_unknown(whole):
    whole["model"]["unk_token"] = "he"
    respell(whole, "\u0120")


def bytes_merged(whole):
    whole["model"]["vocab"]["<0x41><0x42>"] = 999
    whole["model"]["merges"].append(["<0x41>", "<0x42>"])


WORDPIECE = {
    "type": "WordPiece",
    "unk_token": "he",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 9,
    "vocab": {"he": 0},
}
LIBRARY_ALONE = {
    "WordPiece": (byte_level(), put("model", value=WORDPIECE)),
    "dropout": (byte_level(), put("model", "dropout", value=0.5)),
    "a prefix": (byte_level(), lambda whole: whole["model"].update(continuing_subword_prefix="##", merges=[])),
    "a suffix": (byte_level(), lambda whole: whole["model"].update(end_of_word_suffix="</w>", merges=[])),
    "unknown characters": (byte_level(), missing_with_unknown),
    "bytes missing": (sentencepiece(), lambda whole: respell(whole, "<0x00>")),
    "bytes merged": (sentencepiece(), bytes_merged),
    "characters left out between spaces": (sentencepiece(), lambda whole: whole["model"].update(byte_fallback=False)),
    "a first word": (
        sentencepiece(),
        put(
            "pre_tokenizer",
            value={
                "type": "Sequence",
                "pretokenizers": [{"type": "Sequence", "pretokenizers": [{**METASPACE, "prepend_scheme": "first"}]}],
            },
        ),
    ),
    "single words": (byte_level(), added(single_word=True)),
    "a text twice": (byte_level(), put("post_processor", value={**TEMPLATE, "single": TEMPLATE["single"][1:] * 2})),
    "tokens found after normalizing": (sentencepiece(), added(normalized=True)),
    "a token with two spellings": (byte_level(), lambda whole: whole["model"]["vocab"].update(hello=7)),
    "a token out of range": (byte_level(), lambda whole: whole["model"]["vocab"].update(hello=999)),
}


@pytest.mark.parametrize("case", LIBRARY_ALONE)
def test_rare_options_are_left_to_the_library(case):
    assert bpe.tables(changed(*LIBRARY_ALONE[case])) is None


def test_by_hand():
    """a b c ab bc abc; bc is merged before ab, and abc only out of ab and c, so that abc is no word."""
    alphabet = {chr(code): code - 97 for code in range(97, 100)}
    whole = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {**alphabet, "ab": 3, "bc": 4, "abc": 5},
            "merges": [["b", "c"], ["a", "b"], ["ab", "c"]],
        },
    }
    ours = mapped(bpe.tables(json.dumps(whole).encode()))
    assert [ours.token(id) for id in range(6)] == ["a", "b", "c", "ab", "bc", "abc"]
    assert ours.encode("abc") == [0, 4]
    assert ours.encode("ababcbcc") == [3, 0, 4, 4, 2]
    assert ours.encode("axb") == [3]  # what is no token is left out, as the library does
    assert ours.encode("") == []


def test_a_model_has_tables_and_one_of_version_1_the_library(stories, tmp_path):
    convert(shared("data/stories260K/gguf/stories260K-F32.gguf"), tmp_path / "stories.edge", progress=False)
    with Model(tmp_path / "stories.edge", backend="reference") as model:
        assert isinstance(model.tokenizer._vocabulary, _Tabled)
        assert not isinstance(stories.tokenizer._vocabulary, _Tabled)
        for text in FRAGMENTS:
            assert_equal((model.tokenizer, stories.tokenizer), text)


@pytest.mark.parametrize("data", [byte_level(), sentencepiece()])
def test_lone_surrogates_are_refused(data):
    with pytest.raises(ArgumentError, match="lone surrogates"):
        tokenizer(data).encode("a\ud800")


def test_long_texts_come_again_as_they_were():
    pair = both(tokenizer_from_gguf(byte_level()).json)
    ours, remembered = pair[0], pair[0]._vocabulary._remembered
    texts = [f"{n} hello<|im_start|>" + "hell he " * 100 for n in range(2 * MOST_REMEMBERED)]
    for text in (*texts, *texts[-5:]):
        assert_equal(pair, text)
    known = ours.encode(texts[-1])
    known.clear()
    assert_equal(pair, texts[-1])
    assert remembered.cache_info().hits > 5
    assert remembered.cache_info().currsize <= MOST_REMEMBERED


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(bpe, "MAX_CACHED", 50)
    pair = both(tokenizer_from_gguf(byte_level()).json)
    for n in range(300):
        assert_equal(pair, f"w{n} " + chr(0x4E00 + n) * 9)
    assert len(pair[0]._vocabulary._bpe._words) <= 50


@pytest.fixture(scope="module", params=[byte_level, sentencepiece])
def tiny(request):
    return bpe.tables(tokenizer_from_gguf(request.param()).json)


def opened(tables):
    return Tokenizer(BPE(np.frombuffer(tables, np.uint8)), None, ())


DAMAGE = {
    "ends": (lambda a: a["ends"].__setitem__(3, 1 << 31), "ends before it begins"),
    "last end": (lambda a: a["ends"].__setitem__(-1, a["ends"][-2]), "ends before it begins"),
    "a word's token": (lambda a: a["word_ids"].__setitem__(0, 1 << 20), "word_ids has 1048576, expected less than"),
    "a merge's token": (lambda a: a["merged"].__setitem__(0, len(a["ends"])), "merged has"),
    "a rank": (lambda a: a["ranks"].__setitem__(0, (1 << 32) - 1), "ranks has 4294967295"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_arrays_are_named(tiny, case):
    data = np.frombuffer(bytearray(tiny), np.uint8)
    change, words = DAMAGE[case]
    change(bpe._unpacked(data))
    with pytest.raises(EdgeFileError, match=f"tables are damaged: .*{words}.*; convert the model again"):
        BPE(data)


@pytest.mark.parametrize("at", range(len(bpe.SECTIONS)))
def test_wrong_sizes_are_named(tiny, at):
    data = np.frombuffer(bytearray(tiny), np.uint8)
    data[: 4 * len(bpe.SECTIONS)].view(np.uint32)[at] += 1 << 20
    with pytest.raises(EdgeFileError, match=r"they have \d+ bytes, and say that they have"):
        BPE(data)


def resized(tables, name, size):
    """The tables with an array cut to some elements."""
    arrays = {key: array.copy() for key, array in bpe._unpacked(np.frombuffer(tables, np.uint8)).items()}
    return bpe._packed(**arrays | {name: arrays[name][:size]})


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("word_sums", 1, "a word has no token"),
        ("ranks", 1, "a merge has no rank"),
        ("pairs", 1, "a merge has no rank"),
        ("merged", 0, "a merge has no rank"),
        ("ends", 0, "a token ends"),
        ("text", 9, "a token ends"),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_named(tiny, name, size, words):
    with pytest.raises(EdgeFileError, match=words):
        BPE(np.frombuffer(resized(tiny, name, size), np.uint8))


def test_what_is_out_of_range_is_named(tiny):
    arrays = {key: array.copy() for key, array in bpe._unpacked(np.frombuffer(tiny, np.uint8)).items()}
    wrong = {"bytes": np.full(256, 1 << 30), "joints": [0x110000], "before": [1 << 20], "after": [0, 1 << 20]}
    for name, values in [("bytes", np.zeros(3)), *wrong.items()]:
        with pytest.raises(EdgeFileError, match="tables are damaged"):
            BPE(np.frombuffer(bpe._packed(**arrays | {name: values}), np.uint8))


def with_json(tables, change):
    arrays = {key: array.copy() for key, array in bpe._unpacked(np.frombuffer(tables, np.uint8)).items()}
    whole = json.loads(arrays["json"].tobytes())
    change(whole)
    return bpe._packed(**arrays | {"json": np.frombuffer(json.dumps(whole).encode(), np.uint8)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("model", "unk_token", value="x"), "lack the token that stands for text"),
        (put("model", "vocab", bpe.WORD, value=5), "lack the token that stands for text"),
        (put("model", value=WORDPIECE), "lack the token that stands for text"),
        (put("added_tokens", 0, "id", value="x"), "cannot be read"),
    ],
)
def test_a_damaged_json_is_named(tiny, change, words):
    with pytest.raises(EdgeFileError, match=words):
        opened(with_json(tiny, change))


def test_an_added_token_out_of_range_is_named(tiny):
    def change(whole):
        whole["added_tokens"][0]["id"] = whole["model"]["vocab"]["<s>"] = 1 << 20

    with pytest.raises(EdgeFileError, match="an added one with the id 1048576"):
        opened(with_json(tiny, change))


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_flipped_bytes_give_an_error_or_other_ids(tiny, data):
    """Behind a checksum that an attacker has made to fit."""
    begin = bpe._unpacked(np.frombuffer(tiny, np.uint8))["json"].nbytes + bpe.ALIGNMENT
    content = bytearray(tiny)
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(begin, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        ours = opened(content)
        ids = ours.encode("hello w\xe9 hell\u2581\u4e16 aaaaaaaaaa [INST]")
    except EdgeError:
        return
    assert all(0 <= id < ours.n_tokens for id in ids)
    assert isinstance(ours.decode(ids), str)
