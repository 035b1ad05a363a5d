"""SentencePiece models: the same ids as the sentencepiece package, and what a file may not say."""

import io
import json
import re
import shutil
import tracemalloc
import unicodedata
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from conftest import shared
from mutations import mutations
from sentencepiece_models import field, message, model, of_gguf

from edgellm.api import Model
from edgellm.converters import convert
from edgellm.converters import sentencepiece as sentencepiece_reader
from edgellm.converters.gguf import GGUFFile
from edgellm.converters.huggingface_tokenizer import read_tokenizer
from edgellm.converters.sentencepiece import read_sentencepiece, tokenizer_from_sentencepiece
from edgellm.download import fetch
from edgellm.errors import CheckpointError, DownloadError, UnsupportedError
from edgellm.home import home
from edgellm.tokenizer import Tokenizer

LETTERS = "".join(map(chr, range(33, 127)))
LINES = [
    *("the quick brown fox jumps over the lazy dog", "she sells sea shells by the sea shore", LETTERS),
    *("pack my box with five dozen liquor jugs", "how much wood would a woodchuck chuck"),
    *("caf\xe9 cr\xe8me br\xfbl\xe9e na\xefve fa\xe7ade", "\u4e16\u754c \u4f60\u597d", "\u043f\u0440\u0438"),
    *(f"{i} bottles of beer on the wall, {i + 1} bottles of beer; for(int i = {i}; i < n; ++i)" for i in range(40)),
]  # fmt: skip
TEXTS = [
    *("", " ", "  ", "a", " a", "a ", "  a  b   c  ", "\n", "\n\n a\tb\r\n", "the quick brown fox", "bottles  of beer"),
    *(
        "caf\xe9",
        "na\xefve \U0001f600 x",
        "\u4e16\u754c\u4eba",
        "\ufb01ne \u2460 \uff71 \u338f \u3000 x\u00a0y",
        "a" * 300,
    ),
    *(
        "</s> <unk> <s>",
        "<0x41>",
        "\u2581a \u2581",
        "\u200b\u0000x",
        "for(int i = 0; i < n; ++i)",
        "THE QUICK",
        "\u00a8x",
    ),
    *LINES,
]
KINDS = ("bpe", "unigram")


@cache
def trained(kind, **options):
    """A model that the package makes of a few lines."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=file, model_type=kind, minloglevel=2,
        **{"vocab_size": 500, "hard_vocab_limit": False, "normalization_rule_name": "identity", **options},
    )  # fmt: skip
    return file.getvalue()


def ours(data, path, **options):
    path.write_bytes(data)
    options = {"bos": None, "eos": None, "add_bos": False, "add_eos": False, **options}
    source = tokenizer_from_sentencepiece(read_sentencepiece(path), **options)
    return Tokenizer(source.json, source.bos_id, source.eos_ids)


def assert_same_ids(data, path, texts):
    theirs, mine = sentencepiece.SentencePieceProcessor(model_proto=data), ours(data, path)
    for text in texts:
        ids = theirs.encode(text)
        assert mine.encode(text, add_special=False, parse_special=False) == ids, text
    return theirs, mine


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokenizer.model"


def pieces_of(text, size):
    return [text[at : at + size] for at in range(0, len(text), size)]


# The same ids.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize(("prefix", "one_space"), [(True, True), (False, True), (True, False), (False, False)])
def test_trained_models(path, kind, byte_fallback, rule, prefix, one_space):
    data = trained(
        kind, byte_fallback=byte_fallback, normalization_rule_name=rule, add_dummy_prefix=prefix,
        remove_extra_whitespaces=one_space, vocab_size=700,
    )  # fmt: skip
    _, mine = assert_same_ids(data, path, TEXTS)
    assert mine.decode(mine.encode("the lazy dog")) == "the lazy dog"


@pytest.mark.parametrize("kind", KINDS)
def test_real_text(path, kind):
    """Wikipedia in the languages of the Universal Declaration, and code; the table of characters leaves marks alone
    that follow their letters, so the texts are composed."""
    texts = {p.stem: p.read_text(encoding="utf-8") for p in sorted(shared("data/text/udhr").glob("*.txt"))}
    wiki = shared("data/text/wikitext-2-raw-test.txt").read_text(encoding="utf-8")
    material = [unicodedata.normalize("NFC", text)[:3000] for text in texts.values()] + pieces_of(wiki[:200_000], 800)
    for path_of_code in sorted(shared("data/text/code-sample").glob("*")):
        material += pieces_of(path_of_code.read_text(encoding="utf-8", errors="ignore")[:20_000], 500)
    for rule in ("identity", "nmt_nfkc"):
        assert_same_ids(trained(kind, byte_fallback=True, normalization_rule_name=rule, vocab_size=700), path, material)


def llama_texts():
    inputs = [path.read_bytes().decode() for path in sorted(shared("data/tokenizer-vectors").glob("*.inp"))]
    wiki = shared("data/text/wikitext-2-raw-test.txt").read_text(encoding="utf-8")
    return [
        *TEXTS,
        *(text for content in inputs for text in content.split("\n__ggml_vocab_test__\n")),
        *(path.read_text(encoding="utf-8")[:3000] for path in sorted(shared("data/text/udhr").glob("*.txt"))),
        *pieces_of(wiki[:200_000], 800),
    ]


def test_the_vocabulary_of_llama(path):
    data = of_gguf(GGUFFile(shared("data/tokenizer-vectors/ggml-vocab-llama-spm.gguf")).metadata)
    theirs, mine = assert_same_ids(data, path, llama_texts())
    vectors = shared("data/tokenizer-vectors") / "ggml-vocab-llama-spm.gguf"
    texts = vectors.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    for text, ids in zip(texts, vectors.with_suffix(".gguf.out").read_text().split("\n"), strict=True):
        assert mine.encode(text, add_special=False, parse_special=False) == [int(id) for id in ids.split()], text
    assert theirs.vocab_size() == mine.n_tokens == 32000


MISTRAL = {
    "tokenizer.model.v1": "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    "mistral_instruct_tokenizer_240323.model.v3": "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33",
}


@pytest.mark.parametrize("name", MISTRAL)
def test_the_models_of_mistral(path, name):
    folder = home() / "tests"
    try:
        real = folder / name
        if not real.exists():
            fetch("pypi:mistral-common==1.13.1", folder, file=[f"mistral_common/data/{name}"], sha256=MISTRAL[name])
    except DownloadError as error:
        pytest.skip(f"Mistral's tokenizers cannot be fetched: {error}")
    assert_same_ids(real.read_bytes(), path, llama_texts())


# Special and user-defined pieces.


@pytest.mark.parametrize("kind", KINDS)
def test_user_defined_pieces_are_found_whole(path, kind):
    as_it_is = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
    data = trained(kind, user_defined_symbols="<sep>,[X]", control_symbols="<ctl>", **as_it_is)
    texts = ["a<sep>b", "<sep>", "[X] [X]<sep> dog", "x<sep", "a<ctl>b<sep><s>"]
    _, mine = assert_same_ids(data, path, texts)
    assert mine.id_to_token(mine.encode("[X]")[-1]) == "[X]"
    assert mine.encode("<ctl>") != mine.encode("<ctl>", parse_special=False)


def test_user_defined_pieces_of_unigram_win_over_others_and_over_shorter(path):
    pieces = [
        *PIECES,
        ("ab", -0.01, 1),
        ("abc", -9, 4),
        ("bcdefg", -9, 4),
        ("\u4e16", -0.01, 1),
        ("\u4e16\u754c", 0, 4),
    ]
    data = model(pieces, {3: 1}, {3: 0, 4: 0})
    assert_same_ids(data, path, ["ab", "abc", "abcdefg", "aabcd", "\u4e16\u4e16\u754c", "\u754c"])


def test_text_after_a_user_defined_piece_starts_anew(path):
    """As in llama.cpp, and not as in SentencePiece, where BPE has a space before text."""
    data = trained("bpe", user_defined_symbols="<sep>")
    mine, theirs = ours(data, path), sentencepiece.SentencePieceProcessor(model_proto=data)
    assert [mine.id_to_token(id) for id in mine.encode("a<sep>b")] == ["\u2581a", "<sep>", "\u2581b"]
    assert theirs.encode("a<sep>b", out_type=str) == ["\u2581a", "<sep>", "b"]
    assert_same_ids(trained("unigram", user_defined_symbols="<sep>"), path, ["a<sep>b", "<sep>b", "a <sep> b"])


@pytest.mark.parametrize("kind", KINDS)
def test_plain_text_becomes_no_reserved_piece(path, kind):
    mine = ours(trained(kind, byte_fallback=True, vocab_size=700, control_symbols="<ctl>"), path)
    for text in ("<s>", "</s>", "<unk>", "<ctl>", "<0x41>", "a<s><0x41><unk>"):
        ids = mine.encode(text, parse_special=False)
        assert not {mine.id_to_token(id) for id in ids} & {"<s>", "</s>", "<unk>", "<ctl>", "<0x41>"}


# In a folder, with configs.


def in_folder(path, settings, configs=({},), data=None, added=None):
    path.write_bytes(data or trained("bpe"))
    if added is not None:
        (path.parent / "added_tokens.json").write_text(json.dumps(added))
    return read_tokenizer(path.parent, settings, configs)


def tokenizer(source):
    return Tokenizer(source.json, source.bos_id, source.eos_ids)


def test_defaults_are_those_of_the_model(path):
    source = in_folder(path, {})
    assert (source.bos_id, source.eos_ids, source.kind) == (1, (2,), "BPE")
    assert tokenizer(source).encode("a")[0] == 1
    assert in_folder(path, {}, data=trained("unigram")).kind == "Unigram"
    own = trained("bpe", bos_piece="<begin>", eos_piece="<end>")
    source = in_folder(path, {}, data=own)
    assert tokenizer(source).id_to_token(source.bos_id) == "<begin>"
    assert tokenizer(source).id_to_token(source.eos_ids[0]) == "<end>"


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_converted_with_it(tmp_path, kind):
    """From the .edge file, which keeps BPE vocabularies as tables, the same ids as from the model."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(shared("data/stories260K/hf") / name, folder / name)
    data = trained(kind, vocab_size=200, normalization_rule_name="nmt_nfkc")
    (folder / "tokenizer.model").write_bytes(data)
    convert(folder, tmp_path / "m.edge", progress=False)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    with Model(tmp_path / "m.edge", backend="reference") as converted:
        for text in TEXTS:
            assert converted.tokenize(text, parse_special=False) == [1, *theirs.encode(text)], text


def test_a_model_without_bos(path):
    source = in_folder(path, {}, data=trained("bpe", bos_id=-1))
    assert source.bos_id is None
    assert tokenizer(source).encode("a")[0] != 1


@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": True}, [1], [2]),
        ({"bos_token": None}, [], []),
        ({"bos_token": "</s>", "add_bos_token": None}, [2], []),
        ({"bos_token": {"content": "<s>"}}, [1], []),
    ],
)
def test_what_is_put_around_a_text(path, settings, before, after):
    mine = tokenizer(in_folder(path, settings))
    assert mine.encode("dog") == before + mine.encode("dog", add_special=False) + after


ADDED = {"500": {"content": "<|im_start|>", "special": True}, "501": {"content": "<think>", "special": False},
         "502": {"content": "<|im_end|>", "special": True, "rstrip": True}}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens(path, kind):
    data = trained(kind, vocab_size=200)
    size = sentencepiece.SentencePieceProcessor(model_proto=data).vocab_size()
    decoder = {str(size + i): entry for i, entry in enumerate(ADDED.values())} | {
        "1": {"content": "<s>", "special": True}
    }
    source = in_folder(path, {"added_tokens_decoder": decoder}, data=data)
    mine = tokenizer(source)
    assert source.n_tokens == size + 3
    assert mine.special_tokens["<|im_start|>"] == size
    assert size + 2 in source.eos_ids
    assert mine.encode("<think>", add_special=False, parse_special=False) == [size + 1]
    assert mine.encode("<|im_end|> \n dog") == mine.encode("<|im_end|>dog")
    assert size not in mine.encode("<|im_start|>", parse_special=False)


def test_added_tokens_of_old_folders(path):
    size = sentencepiece.SentencePieceProcessor(model_proto=trained("bpe")).vocab_size()
    settings = {"additional_special_tokens": ["<|im_start|>"]}
    mine = tokenizer(in_folder(path, settings, added={"<|im_start|>": size, "<think>": size + 1}))
    assert mine.is_special(size)
    assert mine.encode("<think>", add_special=False, parse_special=False) == [size + 1]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"added_tokens_decoder": []}, None, None),
        ({"added_tokens_decoder": [1]}, CheckpointError, "has a list as added_tokens_decoder; expected an object"),
        ({"added_tokens_decoder": {"x": ADDED["500"]}}, CheckpointError, "as 'x'; expected its text, and an id"),
        ({"added_tokens_decoder": {"9" * 4000: ADDED["500"]}}, CheckpointError, "expected its text, and an id"),
        ({"added_tokens_decoder": {"500": 1}}, CheckpointError, "adds the token 1 as '500'; expected its text"),
        ({"added_tokens_decoder": {"500": {"content": ""}}}, CheckpointError, "expected its text"),
        ({"added_tokens_decoder": {"99999": ADDED["500"]}}, CheckpointError, r"as token 99999; expected \d+, the next"),
        ({"added_tokens_decoder": {"2": ADDED["500"]}}, CheckpointError, "as token 2; expected '</s>' there"),
        ({"added_tokens_decoder": {"500": {"content": "x", "lstrip": True}}}, UnsupportedError, "with lstrip"),
        ({"add_bos_token": 1}, CheckpointError, "has add_bos_token = '1'; expected true or false"),
    ],
)
def test_bad_settings(path, settings, error, words):
    if error is None:
        assert in_folder(path, settings).bos_id == 1
        return
    with pytest.raises(error, match=words):
        in_folder(path, settings)


# What a file may not say.

PIECES = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3), *((letter, -1, 1) for letter in LETTERS)]


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", CheckpointError, "has 0 normal pieces, 0 for unknown text"),
        (b"\x0a", CheckpointError, "fields lead past its end"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", CheckpointError, "fields lead past its end"),
        (b"\x80" * 20, CheckpointError, "fields lead past its end"),
        (b"\x0b", CheckpointError, "fields lead past its end"),
        (b"\x0d\0\0", CheckpointError, "fields lead past its end"),
        (field(1, 5), CheckpointError, "fields lead past its end"),
        (field(2, 5), CheckpointError, "fields lead past its end"),
        (field(1, message({1: 5})), CheckpointError, "its field 1 is stored as another type"),
        (field(1, message({1: "a", 2: 5})), CheckpointError, "its field 2 is stored as another type"),
        (field(1, message({1: "a", 2: b"12345"})), CheckpointError, "the piece 'a' of score nan"),
        (field(1, message({1: "a", 3: b"1"})), CheckpointError, "its field 3 is stored as another type"),
        (field(1, message({1: b"\xff"})), CheckpointError, "not UTF-8 text"),
        (model([("", 0, 1)]), CheckpointError, "the piece '' of score 0.0 and type 1; expected text"),
        (model([("a", float("nan"), 1)]), CheckpointError, "score nan"),
        (model([("a", float("inf"), 1)]), CheckpointError, "score inf"),
        (model([("a", 0, 7)]), CheckpointError, "type 7; expected text, a number and a type from 1 to 6"),
        (model([("a", 0, -1)]), CheckpointError, "type 18446744073709551615"),
        (model(PIECES[1:]), CheckpointError, "0 for unknown text"),
        (model([*PIECES, ("<unk2>", 0, 2)]), CheckpointError, "2 for unknown text"),
        (model(PIECES[:3]), CheckpointError, "has 0 normal pieces"),
        (model(PIECES, {35: 1}), CheckpointError, "0 for bytes; expected some, one, and 256"),
        (model([*PIECES, ("a", 0, 1)], {3: 2}), CheckpointError, "has the token 'a' more than once"),
        (model(PIECES, {3: 3}), UnsupportedError, r"of the kind 3; this version reads 1 \(Unigram\) and 2 \(BPE\)"),
        (model(PIECES, {24: 1}), UnsupportedError, "it has spaces after words"),
        (model(PIECES, {}, {5: 0}), UnsupportedError, "it has spaces after words, or as they are"),
        (model([*PIECES, ("\u2581", 0, 3)], {3: 2}), UnsupportedError, "become the reserved pieces \u2581"),
        (model([*PIECES[:10], ("<x>", 0, 3)]), UnsupportedError, "plain text could become the reserved pieces"),
        (model([*PIECES, ("<\u2603>", 0, 5)]), UnsupportedError, "plain text could become the reserved pieces"),
    ],
)  # fmt: skip
def test_bad_models(path, data, error, words):
    with pytest.raises(error, match=words):
        ours(data, path)


def charsmap():
    return dict(_fields(dict(_fields(trained("bpe", normalization_rule_name="nmt_nfkc")))[3]))[2]


def _fields(data):
    from edgellm.converters.sentencepiece import _fields

    return _fields(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: b"x",
        lambda table: table[:4],
        lambda table: b"\0\0\0\0" + table[4:],
        lambda table: b"\xff\xff\xff\xff" + table[4:],
        lambda table: (int.from_bytes(table[:4], "little") + 4).to_bytes(4, "little") + table[4:],
        lambda table: table[:-1] + b"x",
        lambda table: table[:-2] + b"\xff\0",
        lambda table: table[:4] + b"\x00\xfc\xff\x7f" + table[8:],  # the root leads far away
        lambda table: table[: 4 + int.from_bytes(table[:4], "little")] + b"\0",  # no texts where leaves lead
    ],
)
def test_bad_tables_of_characters(path, change):
    table = charsmap()
    ours(model(PIECES, {3: 2}, {2: table}), path)
    with pytest.raises(CheckpointError, match="the SentencePiece table of characters"):
        ours(model(PIECES, {3: 2}, {2: change(table)}), path)


def test_a_file_of_another_kind(path):
    path.write_bytes(Path(__file__).read_bytes())
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: it is no SentencePiece model, or damaged")):
        read_sentencepiece(path)


def test_more_pieces_than_there_can_be(path, monkeypatch):
    monkeypatch.setattr(sentencepiece_reader, "MAX_PIECES", len(PIECES) - 1)
    with pytest.raises(CheckpointError, match=r"it has more than \d+ pieces; expected fewer"):
        ours(model(PIECES), path)
    monkeypatch.setattr(sentencepiece_reader, "MAX_BYTES", 100)
    with pytest.raises(CheckpointError, match="expected at most 100: it is damaged"):
        ours(model(PIECES), path)


def test_unused_pieces_are_never_found(path):
    """A merge would make it; SentencePiece takes it apart again."""
    data = model([*PIECES, ("ab", 5, 5), ("cd", 4, 1)], {3: 2}, {3: 0, 4: 0})
    theirs, mine = assert_same_ids(data, path, ["ab", "abcd", "cdab"])
    assert mine.encode("ab") == theirs.encode("a") + theirs.encode("b")


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_models_give_a_tokenizer_or_a_named_error(path, kind):
    """And take no memory to speak of."""
    tracemalloc.start()
    for data in mutations(trained(kind, vocab_size=200), 300):
        with suppress(CheckpointError, UnsupportedError):
            ours(data, path).encode("the quick <s> brown \u2460 fox")
    for data in mutations(charsmap(), 100):
        with suppress(CheckpointError, UnsupportedError):
            ours(model(PIECES, {3: 2}, {2: data}), path).encode("\ufb01ne \u2460 \uff71 \u338f \u3000 e\u0301")
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()
