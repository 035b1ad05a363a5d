"""Drafts change how many tokens a step gives, and never which: on tiny models, stories260K and SmolLM2."""

from functools import cache

import pytest
import tiny
from conftest import BUNDLED
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.api import Model
from edgellm.errors import ArgumentError
from edgellm.generate import Slot, generate
from edgellm.lookup import NGRAMS, Lookup
from edgellm.sampling import Sampler, SamplingParams

GREEDY = SamplingParams(temperature=0)
PARAMS = [
    GREEDY,
    SamplingParams(temperature=0, repeat_penalty=1.3),
    SamplingParams(temperature=0.5, seed=1),
    SamplingParams(temperature=1.2, seed=2, repeat_penalty=1.1, top_k=0),
    SamplingParams(temperature=0.7, seed=3, mirostat=2, mirostat_tau=2),
    SamplingParams(temperature=0.5, seed=4, xtc_probability=0.5, dry_multiplier=0.8, dynatemp_range=0.3, typical_p=0.9),
]


# Drafts.


def slow_draft(ids, most):
    """As Lookup.draft, by looking at every place."""
    for n in NGRAMS:
        places = [at for at in range(n, len(ids)) if ids[at - n : at] == ids[len(ids) - n :]]
        if places:
            agreeing = next(k for k in range(len(ids)) if k == places[-1] or ids[places[-1] - 1 - k] != ids[-1 - k])
            text = list(ids)
            while len(text) < len(ids) + agreeing:
                text.append(text[places[-1] + len(text) - len(ids)])
            return text[len(ids) :][: min(most, agreeing - 1)]
    return []


@pytest.mark.parametrize(
    ("ids", "most", "expected"),
    [
        ([], 4, []),
        ([1], 4, []),
        ([1, 1], 4, []),
        ([1, 2, 3, 4], 4, []),
        ([5, 1, 9, 1], 4, []),
        ([1, 2, 7, 8, 1, 2], 4, [7]),
        ([5, 1, 2, 7, 8, 5, 1, 2], 4, [7, 8]),
        ([5, 1, 2, 7, 8, 5, 1, 2], 1, [7]),
        ([5, 1, 2, 7, 8, 5, 1, 2], 0, []),
        ([5, 1, 2, 7, 6, 1, 2, 8, 5, 1, 2], 4, [7, 6]),
        ([1, 2, 7, 1, 2, 8, 1, 2], 4, [8]),
        ([1, 2, 1, 2, 1, 2, 1, 2, 1], 9, [2, 1, 2, 1, 2, 1]),
        ([3] * 6, 9, [3] * 4),
    ],
)
def test_drafts(ids, most, expected):
    assert Lookup(9).draft(ids, most) == expected
    assert slow_draft(ids, most) == expected


def test_no_draft_is_longer_than_was_asked_for():
    assert Lookup(3).draft([1, 2] * 10, 9) == [1, 2, 1]


@given(
    st.lists(st.integers(0, 3), max_size=60), st.integers(0, 9), st.lists(st.integers(1, 9), min_size=1, max_size=60)
)
def test_a_growing_text_gives_the_drafts_of_a_whole_one(ids, most, steps):
    lookup, length = Lookup(9), 0
    for step in steps:
        length = min(length + step, len(ids))
        assert lookup.draft(ids[:length], most) == slow_draft(ids[:length], most)


# Tiny models.


@cache
def backend(name, kind, max_rows=None):
    made = tiny.backend(name, "q8" if kind == "cpu" else "f32", kind, context_length=256, max_rows=max_rows)
    MADE.append(made)
    return made


MADE = []


@pytest.fixture(scope="module", autouse=True)
def threads_end():
    yield
    while MADE:
        MADE.pop().close()


def answer(model, prompt, params=GREEDY, max_tokens=40, lookup=None):
    slot = Slot(model, 256)
    try:
        return list(generate(slot, prompt, Sampler(params), max_tokens, lookup))
    finally:
        slot.close()


PROMPTS = [[1, 2, 3] * 5, [7, 8, 9, 7, 8, 9, 7], list(range(20)) * 2, [5]]


@pytest.mark.parametrize("params", PARAMS, ids=["greedy", "penalty", "cool", "hot", "mirostat", "many"])
@pytest.mark.parametrize("kind", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_same_tokens(name, kind, params):
    """Through mistral's window of 5, too."""
    for prompt in PROMPTS:
        expected = answer(backend(name, kind), prompt, params, 100)
        for most in range(1, 9):
            assert answer(backend(name, kind), prompt, params, 100, Lookup(most)) == expected


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["llama", "mistral"]),
    st.lists(st.integers(0, 4), min_size=1, max_size=30),
    st.integers(1, 8),
    st.integers(0, 40),
    st.sampled_from(PARAMS),
)
def test_the_same_tokens_of_any_prompt(name, prompt, most, max_tokens, params):
    expected = answer(backend(name, "cpu"), prompt, params, max_tokens)
    assert answer(backend(name, "cpu"), prompt, params, max_tokens, Lookup(most)) == expected


class Told(Lookup):
    """Drafts that are what it was told, from the token that is next."""

    def __init__(self, most, told):
        super().__init__(most)
        self.told = told

    def draft(self, ids, most):
        return self.told[len(ids) :][: min(most, self.most)]


@pytest.mark.parametrize("kind", ["cpu", "reference"])
@pytest.mark.parametrize("max_rows", [None, 4])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_right_and_wrong_drafts(name, max_rows, kind, monkeypatch):
    """How many steps there are, what is counted, and that a window's cache is never lost."""
    model = backend(name, kind, max_rows)
    prompt, kept, steps = [3, 1, 4, 1, 5, 9], [], []
    expected = answer(model, prompt, max_tokens=100)
    trim, best = model.trim, model.best
    monkeypatch.setattr(model, "trim", lambda slot, n: kept.append((n, trim(slot, n))) or kept[-1][1])
    monkeypatch.setattr(model, "best", lambda step: steps.append(len(step.tokens)) or best(step))
    rows = min(max_rows or 8, 8)
    right = Told(7, prompt + expected)
    assert answer(model, prompt, max_tokens=100, lookup=right) == expected
    assert right.drafted == right.accepted
    assert max(steps) <= rows
    prefill = -(-len(prompt) // (max_rows or 512))
    assert len(steps) == prefill + -(-99 // rows)
    wrong = Told(7, [(id + 1) % 97 for id in prompt + expected])
    assert answer(model, prompt, max_tokens=100, lookup=wrong) == expected
    assert wrong.accepted == 0
    assert wrong.drafted >= 90 * (rows - 1)
    half = Told(2, [id if i % 2 else (id + 1) % 97 for i, id in enumerate(prompt + expected)])
    assert answer(model, prompt, max_tokens=100, lookup=half) == expected
    assert 0 < half.accepted < half.drafted
    assert all(asked == left for asked, left in kept)


def test_a_cache_that_cannot_be_taken_back_is_filled_again(monkeypatch):
    model = backend("llama", "cpu")
    prompt = [3, 1, 4, 1, 5]
    expected, trim = answer(model, prompt), model.trim
    monkeypatch.setattr(model, "trim", lambda slot, n: trim(slot, 0))
    assert answer(model, prompt, lookup=Told(4, [0] * 99)) == expected


@pytest.mark.parametrize("max_tokens", [0, 1, 2, 3, 17])
def test_no_step_goes_beyond_max_tokens(max_tokens, monkeypatch):
    model, prompt = backend("llama", "cpu"), [3, 1, 4]
    told, best, steps = prompt + answer(model, prompt, max_tokens=40), model.best, []
    monkeypatch.setattr(model, "best", lambda step: steps.append(step) or best(step))
    assert answer(model, prompt, max_tokens=max_tokens, lookup=Told(8, told)) == told[3 : 3 + max_tokens]
    assert all(step.positions[-1] + 1 <= max(3, 3 + max_tokens - 1) for step in steps)


@pytest.mark.parametrize("most", range(1, 9))
def test_the_context_is_filled_to_its_end(most):
    with Model(BUNDLED, backend="cpu", context_length=60) as model:
        whole, found = (
            model.generate("Once upon a time", temperature=0, ignore_eos=True, speculate=n) for n in (0, most)
        )
        assert found.ids == whole.ids
        assert len(found.prompt_ids) + len(found.ids) == 60


def test_ctrl_c_in_a_step_with_a_draft(monkeypatch):
    model, prompt = backend("mistral", "cpu"), [3, 1, 4, 1, 5]
    expected, best = answer(model, prompt), model.best
    slot, lookup = Slot(model, 256), Told(8, [0] * 99)

    def interrupted(step):
        tokens = best(step)
        if step.positions[0] > 12:
            raise KeyboardInterrupt
        return tokens

    with monkeypatch.context() as patch:
        patch.setattr(model, "best", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(generate(slot, prompt, Sampler(GREEDY), 40, lookup))
    assert len(slot.ids) == 13
    assert slot.ids == (prompt + expected)[: len(slot.ids)]
    assert list(generate(slot, prompt + expected[:10], Sampler(GREEDY), 30, lookup)) == expected[10:]


# Trained models.


@pytest.fixture(scope="module", params=["cpu", "reference"])
def stories(request):
    with Model(BUNDLED, backend=request.param) as model:
        yield model


TEXTS = ["Once upon a time", "Lily and Tom went to the park. Lily and Tom", "The dog ran. The dog ran. The", ""]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 3}, {"seed": 4, "repeat_penalty": 1.2}], ids=str)
def test_stories(stories, sampling):
    for text in TEXTS:
        expected = stories.generate(text, max_tokens=200, ignore_eos=True, **sampling)
        for most in (1, 2, 3, 5, 8):
            found = stories.generate(text, max_tokens=200, ignore_eos=True, speculate=most, **sampling)
            assert (found.ids, found.text) == (expected.ids, expected.text)
            timings = found.timings
            assert 0 < timings.accepted_tokens <= timings.drafted_tokens
            assert timings.generated_tokens == 200


@pytest.fixture(scope="module", params=["cpu", "reference"])
def smollm2_either(request, smollm2, smollm2_path):
    if request.param == "reference":
        yield smollm2
    else:
        with Model(smollm2_path, backend="cpu") as model:
            yield model


def test_smollm2_repeats_a_text(smollm2_either):
    text = "A tokenizer cuts the text into pieces, and the model learns which piece follows the ones before it."
    prompt = f"Text:\n{text}\n\nThe same text again:\nA tokenizer cuts"
    for sampling in ({"temperature": 0}, {"temperature": 0.3, "seed": 2}):
        options = {"max_tokens": 24, "ignore_eos": True, **sampling}
        expected = smollm2_either.generate(prompt, **options)
        assert expected.timings.drafted_tokens == 0
        found = smollm2_either.generate(prompt, speculate=8, **options)
        assert found.ids == expected.ids
        assert found.timings.accepted_tokens > 5


def test_a_chat_of_several_turns(smollm2_either):
    turns = ["Repeat: the cat sat on the mat, the cat sat on the mat.", "Once more, please.", "And again."]
    chats = [smollm2_either.chat(system="You repeat what you are told.") for _ in range(2)]
    for turn in turns:
        plain, drafted = (
            chat.send(turn, temperature=0, max_tokens=16, speculate=most)
            for chat, most in zip(chats, (0, 6), strict=True)
        )
        assert drafted.ids == plain.ids
        assert drafted.prompt_ids == plain.prompt_ids
        assert drafted.timings.cached_tokens >= plain.timings.cached_tokens
        assert drafted.timings.generated_tokens == plain.timings.generated_tokens
    assert chats[0].messages == chats[1].messages


# The ends of an answer.


@pytest.mark.parametrize("stop", ["little girl", "named", " was"])
def test_stop_strings(stories, stop):
    options = {"temperature": 0, "max_tokens": 60, "stop": stop}
    plain = stories.generate("Once upon a time", **options)
    found = stories.generate("Once upon a time", speculate=5, **options)
    assert (found.text, found.ids, found.finish_reason) == (plain.text, plain.ids, plain.finish_reason)


def test_an_answer_that_is_stopped_leaves_a_good_cache(stories):
    text = "The dog ran. The dog ran. The"
    whole = stories.generate(text, temperature=0, max_tokens=80, ignore_eos=True)
    for n in (1, 2, 3, 5, 8, 13, 30):
        with stories.stream(text, temperature=0, max_tokens=80, ignore_eos=True, speculate=6) as stream:
            ids = [next(stream).id for _ in range(n)]
        assert stream.completion.finish_reason == "cancelled"
        assert ids == stream.completion.ids == whole.ids[:n]
        again = stories.generate(text, temperature=0, max_tokens=80, ignore_eos=True)
        assert again.ids == whole.ids
        assert again.timings.cached_tokens == len(again.prompt_ids) - 1


def test_the_end_of_an_answer_in_a_draft():
    """The model's end comes among accepted tokens: what follows it is not said."""
    with Model(BUNDLED, backend="cpu") as model:
        prompt = model.tokenize("Once upon a time")
        ids = model.generate("Once upon a time", temperature=0, max_tokens=40, ignore_eos=True).ids
        model._answers._ends = (ids[20],)
        for start in ([], ids, [*ids, *ids]):  # what is said has been in the prompt
            plain, found = (
                model.stream_ids([*prompt, *start, *prompt], temperature=0, max_tokens=40, speculate=most)
                for most in (0, 8)
            )
            assert [piece.id for piece in found] == [piece.id for piece in plain]
            assert found.completion.finish_reason == plain.completion.finish_reason == "stop"
        assert found.completion.timings.accepted_tokens > 0


def test_fewer_than_no_drafts_are_refused(stories):
    with pytest.raises(ArgumentError, match="speculate is -1; expected a whole number"):
        stories.generate("Once", speculate=-1)


def test_a_long_text_is_indexed_once():
    """An n-gram is noted once, however many drafts are asked for."""
    ids, lookup = list(range(500)), Lookup(4)
    lookup.draft(ids, 4)
    lookup._follows.clear()
    lookup.draft([*ids, 7], 4)
    assert lookup._follows == {tuple(ids[-n:]): 500 for n in NGRAMS}
