"""Slots at rest: prompts that begin alike are evaluated once, give the same tokens, and take no more than allowed."""

import gc
from dataclasses import replace
from functools import cache
from itertools import islice

import pytest
import tiny
from conftest import BUNDLED
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.api import Model
from edgellm.errors import ArgumentError, EdgeError
from edgellm.generate import Slot, common, generate
from edgellm.prefix_cache import MOST_SLOTS, SHORT, PrefixCache
from edgellm.ranking import Following
from edgellm.sampling import Sampler, SamplingParams
from edgellm.scheduler import Scheduler

CONTEXT = 512
GREEDY = SamplingParams(temperature=0)
DOCUMENT = "Once upon a time there was a little girl named Lily. She liked to play in the park with her dog. " * 6
QUESTIONS = ["What did Lily like", "The dog", "One day, Lily"]
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


MADE = []


@cache
def backend(name="llama", kind="reference"):
    MADE.append(tiny.backend(name, "q8" if kind == "cpu" else "f32", kind, context_length=CONTEXT))
    return MADE[-1]


@pytest.fixture(scope="module", autouse=True)
def threads_end():
    yield
    while MADE:
        MADE.pop().close()


def alone(model, prompt, max_tokens):
    slot = Slot(model, CONTEXT)
    try:
        return list(generate(slot, prompt, Sampler(GREEDY), max_tokens))
    finally:
        slot.close()


class Keeper:
    """What may be referred to weakly."""


PROMPTS = st.tuples(st.integers(0, 2), st.integers(0, 300), st.integers(0, 40), st.integers(0, 5))
ANSWERS = st.lists(st.tuples(PROMPTS, st.integers(0, 60), st.integers(0, 3)), min_size=2, max_size=12)


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2), max_size=5), st.lists(st.integers(0, 2), max_size=5))
def test_common_counts_up_to_the_first_difference(begun, some, others):
    some, others = [*begun, *some], (*begun, *others)
    differ = [at for at, (one, other) in enumerate(zip(some, others, strict=False)) if one != other]
    assert common(some, others) == min([*differ, len(some), len(others)])


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["llama", "mistral", "lfm2"]), st.sampled_from([0, 200, 400, 512]), ANSWERS)
@pytest.mark.parametrize("kind", ["cpu", "reference"])
def test_answers_are_those_without_a_cache(kind, name, most_tokens, answers):
    """Prompts of common beginnings, for nobody or for one of three keepers; any bound, windows that lose tokens."""
    model, keepers = backend(name, kind), [None, Keeper(), Keeper(), Keeper()]
    held = PrefixCache(model, CONTEXT, model.bytes_of(most_tokens))
    for (document, length, other, number), max_tokens, who in answers:
        prompt = [10 + document] * length + [20 + number] * other + [1]
        n_known = held.known(prompt)
        slot = held.take(prompt, keepers[who])
        assert slot.ids == prompt[: len(slot.ids)]
        assert len(slot.ids) == n_known < len(prompt)
        assert list(generate(slot, prompt, Sampler(GREEDY), max_tokens)) == alone(model, prompt, max_tokens)
        held.put(slot, keepers[who])
        if who:
            assert held.tokens_of(keepers[who]) == slot.ids
        free = [entry.slot for entry in held._entries if entry.is_free]
        assert sum(slot.n_bytes for slot in free) <= model.bytes_of(most_tokens)
        assert len(free) <= MOST_SLOTS
        assert len({id(entry.slot) for entry in held._entries}) == len(held._entries) == len(model._slots)
    del keepers[1:]
    gc.collect()
    held.close()
    assert not model._slots


def filled(held, ids, keeper=None):
    slot = held.take(ids, keeper)
    slot.extend(ids[len(slot.ids) :])
    held.put(slot, keeper)
    return slot


def test_what_others_need_stays():
    model = backend()
    held = PrefixCache(model, CONTEXT, 3 * model.bytes_of(CONTEXT))
    first = filled(held, [5] * 20 + [6] * 280)
    other = filled(held, [5] * 20 + [7] * 200)  # a twentieth of the first goes on: it is copied
    assert other is not first
    assert held.known([5] * 20 + [6] * 280 + [1]) == 300
    assert filled(held, [5] * 20 + [6] * 180 + [8] * 10) is first  # most of it goes on
    chat = Keeper()
    own = filled(held, [5] * 20 + [7] * 190 + [9], chat)
    assert own is other
    copy = filled(held, [5] * 20 + [7] * 190 + [3])  # a keeper's slot is copied, whatever is shared
    assert copy is not own
    assert held.tokens_of(chat) == [5] * 20 + [7] * 190 + [9]
    assert filled(held, [1] * 10, chat) is own
    assert held.tokens_of(chat) == [1] * 10
    held.close()


def test_short_slots_are_taken_over_and_the_last_is_enough():
    model = backend()
    held = PrefixCache(model, CONTEXT)
    assert filled(held, [1] * 50) is filled(held, [2] * 60)
    slots = [held.take([3]) for _ in range(3)]
    for slot in slots:
        slot.extend([4] * (SHORT - 1))
        held.put(slot)
    assert len(model._slots) == 3
    held.settle()
    assert len(model._slots) == 1
    assert held.known([4] * SHORT) == SHORT - 1
    held.close()


def test_the_oldest_goes_first_and_a_keeper_s_stays():
    model, chat = backend(), Keeper()
    held = PrefixCache(model, CONTEXT, model.bytes_of(450))
    filled(held, [1] * 200, chat)
    filled(held, [2] * 200)
    filled(held, [3] * 200)
    assert [held.known([n] * 201) for n in (1, 2, 3)] == [200, 200, 200]
    filled(held, [4] * 200)
    assert [held.known([n] * 201) for n in (1, 2, 3, 4)] == [200, 0, 200, 200]
    filled(held, [3] * 210)
    held.release(chat)
    assert [held.known([n] * 201) for n in (1, 3, 4)] == [0, 200, 200]
    filled(held, [5] * 200, chat)
    del chat
    gc.collect()
    filled(held, [6] * 200)
    assert [held.known([n] * 201) for n in (5, 6)] == [200, 200]
    filled(held, [6] * 440)
    assert [held.known([n] * 201) for n in (5, 6)] == [0, 200]
    held.close()
    filled(held, [1] * 9)
    chat = Keeper()
    filled(held, [1] * 9, chat)
    assert not model._slots


def test_a_slot_that_grows_makes_room_as_a_new_one_does():
    model = backend()
    held = PrefixCache(model, CONTEXT, model.bytes_of(450))
    filled(held, [1] * 400)
    filled(held, [2] * 20)
    slot = held.take([2] * 20 + [3] * 200)
    assert slot.ids == [2] * 20
    assert held.known([1] * 401) == 0
    held.put(slot)
    held.close()


@pytest.mark.parametrize("fails", ["trim", "copy"])
def test_an_interruption_loses_no_slot(monkeypatch, fails):
    def interrupted(*_):
        raise KeyboardInterrupt

    model, chat = backend(), Keeper()
    held = PrefixCache(model, CONTEXT)
    filled(held, [1] * 200, chat)
    scheduler = Scheduler(model, CONTEXT, 4, held)
    made = scheduler.submit([2 if fails == "trim" else 1] * 201, Sampler(GREEDY), 1)
    monkeypatch.setattr(model, fails, interrupted)
    with pytest.raises(KeyboardInterrupt):
        scheduler.step()
    monkeypatch.undo()
    assert len(model._slots) == 1
    while scheduler.is_busy:
        scheduler.step()
    assert made.finish_reason == "length"
    scheduler.close()
    held.close()


@pytest.mark.parametrize(("name", "kind"), [("llama", "cpu"), ("llama", "reference"), ("mistral", "reference")])
def test_bytes_are_those_that_are_there(name, kind):
    """Of a full context what the footprint says, but for a page that is never written; of less, what was written."""
    model = backend(name, kind)
    slot = Slot(model, CONTEXT)
    assert slot.n_bytes == 0
    slot.extend([1] * 300)
    slot.trim(10)
    assert slot.n_bytes == model.bytes_of(300) == sum(part.nbytes for part in model._slots[slot.number].parts(300))
    assert 0 <= model.footprint.cache - model.bytes_of(CONTEXT) <= 4096
    slot.close()


def test_a_scheduler_leaves_what_it_held_and_takes_what_is_there():
    model = backend()
    held = PrefixCache(model, CONTEXT, 3 * model.bytes_of(CONTEXT))
    filled(held, [1] * 200)
    scheduler = Scheduler(model, CONTEXT, 4, held)
    made = [scheduler.submit([1] * 200 + [n], Sampler(GREEDY), 5) for n in range(3)]
    left = scheduler.submit([2] * 300, Sampler(GREEDY), 50)
    while any(each.finish_reason is None for each in made):
        scheduler.step()
    assert [each.n_cached for each in made] == [200] * 3
    scheduler.close()
    assert left.finish_reason is None
    assert held.known([2] * 400) == 300
    held.close()
    assert not model._slots


# The Python API.


@pytest.fixture(scope="module", params=["cpu", "reference"])
def model(request):
    with Model(BUNDLED, backend=request.param) as model:
        model.info = replace(model.info, chat_template=TEMPLATE)
        yield model


@pytest.fixture(params=[{"temperature": 0}, {"temperature": 1.2, "seed": 4}], ids=str)
def options(request):
    return {"max_tokens": 30, "ignore_eos": True, **request.param}


def fresh(model, prompt_ids, options):
    """The tokens of a slot that has held nothing before."""
    slot, params = model.open_slot(), {key: options[key] for key in ("temperature", "seed") if key in options}
    try:
        return list(islice(generate(slot, prompt_ids, Sampler(SamplingParams(**params)), 30), 30))
    finally:
        slot.close()


def test_a_document_is_evaluated_once(model, options):
    """By a prompt; then generate, stream, a new chat, a batch and several answers begin with it."""
    model.generate(DOCUMENT + QUESTIONS[0], **options)
    n_document = len(model.tokenize(DOCUMENT))
    assert n_document > SHORT
    chat = model.chat()
    done = [
        model.generate(DOCUMENT + QUESTIONS[1], **options),
        chat.send(DOCUMENT + QUESTIONS[2], **options),
        model.chat().send(DOCUMENT + QUESTIONS[0], **options),
        *model.generate_batch([DOCUMENT + question for question in QUESTIONS], **options),
        *model.generate_many(DOCUMENT + QUESTIONS[1], 1, **options),
    ]
    with model.stream(DOCUMENT + QUESTIONS[0], **options) as stream:
        list(stream)
    for each in [*done, stream.completion]:
        assert each.timings.cached_tokens >= n_document - 1
        assert each.ids == fresh(model, each.prompt_ids, options)
    n_held = chat.n_tokens
    assert n_held == len(done[1].prompt_ids) + 29
    again = chat.send("And then?", **options)
    assert again.timings.cached_tokens == common(again.prompt_ids, done[1].prompt_ids + done[1].ids[:-1])
    assert again.ids == fresh(model, again.prompt_ids, options)
    chat.close()


def test_the_bound_of_a_model():
    with pytest.raises(ArgumentError, match="cache_bytes is -1"):
        Model(BUNDLED, cache_bytes=-1)
    prompts = [word * 90 for word in ("one ", "two ", "cat ", "dog ", "sun ", "sky ")]
    for cache_bytes in (0, None, 10**9):
        with Model(BUNDLED, backend="reference", cache_bytes=cache_bytes) as model:
            allowed = model.footprint.cache if cache_bytes is None else cache_bytes
            for prompt in prompts:
                model.generate(prompt, max_tokens=2)
                held = [entry.slot.n_bytes for entry in model.prefix_cache._entries]
                assert sum(held) <= allowed
            assert len(model._backend._backend._slots) == len(held)
            assert len(held) in {0: [0], None: [2, 3], 10**9: [6]}[cache_bytes]


def test_texts_that_are_embedded_have_their_memory_of_what_rests():
    with Model(BUNDLED, backend="reference") as model:
        ids, cached = [5] * 400, model.prefix_cache
        taken = model._backend.bytes_of(len(ids))
        for evaluated in (*model.embed_groups([ids]), *model.likelihood_groups([Following(ids, 390)])):
            for word in ("one ", "two "):
                model.generate(word * 90, max_tokens=1)
            assert cached.n_bytes > model.footprint.cache - taken
            next(evaluated)
            assert cached.n_bytes <= model.footprint.cache - taken
            model.generate("three " * 90, max_tokens=1)
            assert cached.n_bytes <= model.footprint.cache - taken
            evaluated.close()
        model.generate("one " * 90, max_tokens=1)
        model.generate("two " * 90, max_tokens=1)
        assert cached.n_bytes > model.footprint.cache - taken


def test_a_chat_keeps_its_tokens_until_it_is_closed():
    with Model(BUNDLED, backend="reference", cache_bytes=0) as model:
        model.info = replace(model.info, chat_template=TEMPLATE)
        chat = model.chat()
        chat.send("Once upon a time", max_tokens=5, temperature=0)
        model.generate("The dog", max_tokens=5)
        assert chat.n_tokens > 5
        chat.close()
        assert chat.n_tokens == 0
        assert not model._backend._backend._slots


@pytest.mark.parametrize("kind", ["cpu", "reference"])
def test_answers_under_way_end_with_the_model(kind):
    model = Model(BUNDLED, backend=kind)
    model.info = replace(model.info, chat_template=TEMPLATE)
    chat, slot = model.chat(), model.open_slot()
    streams = [model.stream("Once upon a time"), chat.stream("Once upon a time")]
    for stream in streams:
        next(stream)
    model.close()
    for stream in streams:
        with pytest.raises(EdgeError, match="the model is closed; load it again"):
            list(stream)
    with pytest.raises(EdgeError, match="the model is closed; load it again"):
        slot.extend([1])
    slot.close()
    assert chat.n_tokens == 0
