"""Banned strings: an answer goes back to where one began, and on as if that token had been excluded there."""

import numpy as np
import pytest
from conftest import BUNDLED
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm import banned
from edgellm.api import Model
from edgellm.banned import Banned
from edgellm.errors import ArgumentError
from edgellm.sampling import Sampler, SamplingParams

PIECES = [b"a", b"b", b"ab", b"c", b"", b"\xc3", b"\xa9"]  # 4 is special; 5 and 6 together are one letter


class Pieces:
    """A tokenizer of a few tokens."""

    n_tokens = len(PIECES)

    def is_special(self, id):
        return id == 4

    def token_bytes(self, id):
        return PIECES[id]


def test_review_goes_back_to_the_token_in_which_a_string_began():
    found = Banned(Pieces(), ["bc"])
    assert found.review([0, 2]) == 2
    assert found.settled() == 1  # the b may be a beginning
    assert found.review([0, 2, 4, 3]) == 1  # special tokens say nothing
    assert (found.excluded(1), found.excluded(0)) == ({2}, set())
    assert found.review([0, 0, 1, 3]) == 2
    assert (found.excluded(1), found.excluded(2)) == ({2}, {1})
    assert found.review([0, 0, 3]) == found.settled() == 3


def test_what_is_excluded_later_is_forgotten_when_an_earlier_token_changes():
    found = Banned(Pieces(), ["bc", "aaa"])
    assert found.review([0, 0, 1, 3]) == 2
    assert found.review([0, 0, 0]) == 0
    assert (found.excluded(0), found.excluded(2)) == ({0}, set())


def test_what_was_no_beginning_may_be_one_after_all():
    """The b stays while the a after it does; that may go, and then the b may be the beginning of "bb"."""
    found = Banned(Pieces(), ["bb", "ac"])
    assert found.review([3, 1, 0]) == 3
    assert found.settled() == 1
    assert found.review([3, 1, 0, 3]) == 2
    assert found.review([3, 1, 1]) == 1
    assert found.settled() == 1


def test_tokens_that_have_a_banned_string_are_all_excluded_at_once():
    found = Banned(Pieces(), ["b"])
    assert found.review([0, 1]) == 1
    assert found.excluded(1) == {1, 2}


def test_a_string_within_characters():
    found = Banned(Pieces(), ["é"])
    assert found.review([5]) == 1
    assert found.settled() == 0
    assert found.review([5, 6]) == 0


def test_what_cannot_be_said_otherwise_ends_in_an_error(monkeypatch):
    monkeypatch.setattr(banned, "MOST_REWINDS", 1)
    found = Banned(Pieces(), ["ac"])
    assert found.review([0, 3]) == 0
    with pytest.raises(ArgumentError, match="banned strings came 1 times in one answer"):
        found.review([0, 3])
    with pytest.raises(ArgumentError, match="banned string is empty"):
        Banned(Pieces(), ["a", ""])


@pytest.fixture(scope="module", params=["cpu", "reference"])
def stories(request):
    with Model(BUNDLED, backend=request.param) as model:
        yield model


def searched(model, prompt, texts, max_tokens):
    """The greedy answer, by trying again from the start with what is excluded after which tokens."""
    excluded, ids = {}, []
    while len(ids) < max_tokens:
        logits = model.logits([*prompt, *ids])[-1].copy()
        logits[list(excluded.get(tuple(ids), ()))] = -np.inf
        ids.append(int(logits.argmax()))
        said = [model.tokenizer.token_bytes(id) for id in ids]
        whole = b"".join(said)
        if at := [whole.find(text.encode()) for text in texts if text.encode() in whole]:
            ends = np.cumsum([len(piece) for piece in said])
            place = int(np.searchsorted(ends, min(at), side="right"))
            excluded.setdefault(tuple(ids[:place]), set()).add(ids[place])
            del ids[place:]
    return ids


@pytest.mark.parametrize(
    "texts", [["little girl"], [" there was", "Lily"], ["named Lily. She", "e lov"], ["xyz"]], ids=str
)
def test_greedy_is_what_searching_finds(stories, texts):
    prompt = "Once upon a time"
    done = stories.generate(prompt, max_tokens=24, temperature=0, ignore_eos=True, banned_strings=texts)
    assert done.ids == searched(stories, done.prompt_ids, texts, 24)
    assert not any(text in done.text for text in texts)
    assert done.finish_reason == "length"


def test_nothing_is_shown_that_is_taken_back(stories):
    options = {"max_tokens": 40, "temperature": 0, "banned_strings": [" girl named", "She loved", " was a"]}
    with stories.stream("Once upon a time", **options) as stream:
        pieces = list(stream)
    done = stream.completion
    assert "".join(piece.text for piece in pieces) == done.text
    assert [piece.id for piece in pieces if piece.id is not None] == done.ids
    assert done.text != stories.generate("Once upon a time", max_tokens=40, temperature=0).text
    assert done.text == stories.generate_batch(["Once upon a time"] * 2, **options)[1].text


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from(["the", " a", "e", "Lily", ". ", "day", "he was"]), min_size=1, max_size=3),
    st.integers(0, 99),
    st.sampled_from([0, 5]),
)
@pytest.mark.parametrize(
    "sampling", [{"temperature": 1.2}, {"mirostat": 2}, {"temperature": 0, "repeat_penalty": 1.2}], ids=str
)
def test_no_answer_has_them(stories, sampling, texts, seed, speculate):
    """Nor do drafts, or other sequences beside it, change anything."""
    options = {"max_tokens": 30, "seed": seed, "ignore_eos": True, "banned_strings": texts, **sampling}
    done = stories.generate("Once upon", **options)
    again = stories.generate_batch(["One", "Once upon"], speculate=speculate, **options)[1]
    assert not any(text in done.text for text in texts)
    assert len(done.ids) == 30
    assert again.ids == done.ids


def test_drafts_change_nothing(stories):
    prompt = "Lily and Tom went to the park. Lily and Tom"
    for texts in ([" went to"], [" were", " the park", "e"]):
        options = {"max_tokens": 60, "temperature": 0, "ignore_eos": True, "banned_strings": texts}
        assert stories.generate(prompt, speculate=6, **options).ids == stories.generate(prompt, **options).ids


def test_a_string_that_does_not_come_changes_nothing(stories):
    for options in ({"temperature": 0}, {"seed": 3}):
        expected = stories.generate("Once", max_tokens=100, **options)
        done = stories.generate("Once", max_tokens=100, banned_strings=["zebra", expected.text[-4:] + "#"], **options)
        assert (done.ids, done.text, done.finish_reason) == (expected.ids, expected.text, expected.finish_reason)


def test_with_logits_processors_but_not_with_a_grammar(stories):
    options = {"max_tokens": 20, "temperature": 0, "banned_strings": ["little girl"]}
    expected = stories.generate("Once upon a time", **options)
    assert stories.generate("Once upon a time", logits_processors=[lambda ids, x: x], **options).ids == expected.ids
    with pytest.raises(ArgumentError, match="regex and banned strings are both given"):
        stories.generate("Once", regex="[a-z]+", **options)


def test_mirostat_goes_back_too():
    sampler = Sampler(SamplingParams(mirostat=2, seed=0))
    logits, bounds = np.zeros(8, np.float32), []
    for _ in range(4):
        bounds.append(sampler._most_surprise[-1])
        sampler(logits, [])
    sampler.rewind(3)
    assert sampler._most_surprise[-1] == bounds[1]
