import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import byte_level, sentencepiece, tokenizer

from edgellm.errors import ArgumentError
from edgellm.text_stream import StopStrings, TextStream

TOKENIZERS = [tokenizer(byte_level()), tokenizer(sentencepiece()), tokenizer(sentencepiece(add_space_prefix=False))]
any_tokenizer = st.sampled_from(TOKENIZERS)
ids = st.lists(st.integers(0, 250), max_size=30)


def streamed(tokenizer, context, ids):
    stream = TextStream(tokenizer, context)
    return [stream.push(id) for id in ids] + [stream.flush()]


@given(any_tokenizer, st.text(max_size=20), ids)
def test_pieces_are_what_decode_adds(tokenizer, text, ids):
    context = tokenizer.encode(text)
    assert tokenizer.decode(context) + "".join(streamed(tokenizer, context, ids)) == tokenizer.decode(context + ids)


@given(any_tokenizer, ids, ids)
def test_after_any_context_the_pieces_are_those_after_having_pushed_it(tokenizer, context, ids):
    stream = TextStream(tokenizer)
    for id in context:
        stream.push(id)
    assert streamed(tokenizer, context, ids) == [*map(stream.push, ids), stream.flush()]


@given(any_tokenizer, ids)
def test_without_context_the_pieces_are_decode(tokenizer, ids):
    assert "".join(streamed(tokenizer, [], ids)) == tokenizer.decode(ids)


@given(any_tokenizer, st.text(max_size=20), st.text(max_size=20))
def test_text_comes_out_whole_character_by_character(tokenizer, before, text):
    context, ids = tokenizer.encode(before), tokenizer.encode(text, add_special=False)
    pieces = streamed(tokenizer, context, ids)
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text
    assert pieces[-1] == ""


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("\U0001f600!", ["", "", "", "\U0001f600", "!", ""]),
        ("\u4e16", ["", "", "\u4e16", ""]),
    ],
)
def test_a_character_comes_with_its_last_byte(text, pieces):
    ours = TOKENIZERS[0]
    assert streamed(ours, [], ours.encode(text)) == pieces
    assert streamed(ours, [], ours.encode(text)[:2])[-1] == "\ufffd"


def test_the_space_of_sentencepiece_is_kept_within_a_text_and_dropped_before_it():
    ours = TOKENIZERS[1]
    hello = ours.encode("hello", add_special=False)
    assert streamed(ours, [], hello) == ["hello", ""]
    assert streamed(ours, hello, hello) == [" hello", ""]
    assert streamed(ours, [ours.bos_id], hello) == ["hello", ""]


def fed(stops, pieces):
    """All that is shown, and whether a stop string was found."""
    stream, shown, found = StopStrings(stops), "", False
    for piece in pieces:
        text, found = stream.push(piece)
        shown += text
    return shown + stream.flush(), found


@given(st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.lists(st.text("abc", max_size=6), max_size=8))
def test_stop_strings_end_the_text_however_it_is_cut(stops, pieces):
    text = "".join(pieces)
    ends = [(end, -len(stop)) for stop in stops for end in range(len(text) + 1) if text[:end].endswith(stop)]
    expected = text[: sum(min(ends))] if ends else text
    assert fed(stops, pieces) == (expected, bool(ends))
    stream, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += stream.push(piece)[0]
        assert expected.startswith(shown)


def test_what_cannot_become_a_stop_string_is_shown_at_once():
    stream = StopStrings(["<end>", "\n\n"])
    assert [stream.push(text) for text in ("a<", "en", "e", "b\n", "c<end", ">d", "e")] == [
        ("a", False),
        ("", False),
        ("<ene", False),
        ("b", False),
        ("\nc", False),
        ("", True),
        ("", True),
    ]
    assert stream.flush() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ArgumentError, match="stop string is empty"):
        StopStrings(["a", ""])
