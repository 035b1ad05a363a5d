"""Many sequences in each step, and each as it would be alone: on tiny models, stories260K and SmolLM2."""

import gc
from functools import cache

import pytest
import tiny
from conftest import BUNDLED
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.api import Model
from edgellm.errors import ArgumentError, BackendError, ContextOverflowError, EdgeError
from edgellm.generate import Slot, generate
from edgellm.lookup import Lookup
from edgellm.sampling import Sampler, SamplingParams
from edgellm.scheduler import Scheduler

GREEDY = SamplingParams(temperature=0)
PARAMS = [
    GREEDY,
    SamplingParams(temperature=1.2, seed=2, top_k=0),
    SamplingParams(temperature=0.7, seed=3, mirostat=2, mirostat_tau=2),
    SamplingParams(temperature=0, repeat_penalty=1.3, dry_multiplier=0.5),
]
CONTEXT = 256
MADE = []


@cache
def backend(name="llama", kind="reference", max_rows=None):
    made = tiny.backend(name, "q8" if kind == "cpu" else "f32", kind, context_length=CONTEXT, max_rows=max_rows)
    MADE.append(made)
    return made


@pytest.fixture(scope="module", autouse=True)
def threads_end():
    yield
    while MADE:
        MADE.pop().close()


def alone(model, prompt, params=GREEDY, max_tokens=20):
    slot = Slot(model, CONTEXT)
    try:
        return list(generate(slot, prompt, Sampler(params), max_tokens))
    finally:
        slot.close()


def finish(scheduler, said=None):
    """{sequence: (ids, reason)} when nothing is left to do."""
    said = {} if said is None else said
    while scheduler.is_busy:
        for progress in scheduler.step():
            said.setdefault(progress.sequence, []).extend(progress.ids)
    return said


REQUESTS = st.lists(
    st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 30), st.integers(0, 3),
              st.integers(0, 4), st.integers(0, 12)),
    min_size=1, max_size=9,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["llama", "mistral"]), st.sampled_from([3, 8, None]), st.integers(1, 3), REQUESTS)
@pytest.mark.parametrize("kind", ["cpu", "reference"])
def test_each_is_as_it_would_be_alone(kind, name, max_rows, at_once, requests):
    """Prompts of any length with common beginnings, that come in any step; few rows, few places, windows, drafts."""
    model = backend(name, kind, max_rows)
    scheduler, said, made = Scheduler(model, CONTEXT, at_once), {}, []
    for prompt, max_tokens, which, most_drafted, steps_before in requests:
        for _ in range(steps_before):
            for progress in scheduler.step():
                said.setdefault(progress.sequence, []).extend(progress.ids)
        lookup = Lookup(most_drafted) if most_drafted else None
        made.append(scheduler.submit(prompt, Sampler(PARAMS[which]), max_tokens, lookup=lookup))
    finish(scheduler, said)
    scheduler.close()
    assert not model._slots
    for sequence, (prompt, max_tokens, which, *_) in zip(made, requests, strict=True):
        assert said.get(sequence, []) == alone(model, prompt, PARAMS[which], max_tokens)
        assert sequence.ids == prompt + said.get(sequence, [])
        assert sequence.finish_reason == "length"


def test_what_is_alike_is_evaluated_once(monkeypatch):
    model, rows = backend(max_rows=16), []
    run = model.best
    monkeypatch.setattr(model, "best", lambda step: rows.append(len(step.tokens)) or run(step))
    scheduler = Scheduler(model, CONTEXT)
    prompt = list(range(60))
    first = [scheduler.submit(prompt, Sampler(GREEDY), 5) for _ in range(6)]
    others = [scheduler.submit([*prompt[:50], 90 + i], Sampler(GREEDY), 5) for i in range(3)]
    said = finish(scheduler)
    assert sum(rows) < 60 + 9 * 5 + 3 * 12
    assert [each.n_cached for each in first] == [0] + [59] * 5
    assert {each.n_cached for each in others} == {50}
    assert all(said[each] == said[first[0]] for each in first)
    later = scheduler.submit([*prompt, 7], Sampler(GREEDY), 1)
    finish(scheduler)
    assert later.n_cached == 60
    scheduler.close()


def test_a_long_prompt_stalls_nobody():
    model = backend(max_rows=16)
    scheduler = Scheduler(model, CONTEXT)
    short = [scheduler.submit([i, i + 1], Sampler(GREEDY), 30) for i in range(3)]
    scheduler.step()
    long = scheduler.submit(list(range(90)) * 2, Sampler(GREEDY), 5)
    late = scheduler.submit([50, 60, 70], Sampler(GREEDY), 5)
    for _ in range(10):
        new = {progress.sequence: progress.ids for progress in scheduler.step()}
        assert all(len(new[each]) == 1 for each in short)
        assert long not in new
    assert late.finish_reason == "length"
    assert len(finish(scheduler)[long]) == 5
    scheduler.close()


def test_sequences_can_be_cancelled_at_any_token():
    model = backend()
    scheduler = Scheduler(model, CONTEXT, 2)
    first, second, third = (scheduler.submit([i, 2, 3], Sampler(GREEDY), 10) for i in range(3))
    scheduler.step()
    scheduler.step()
    scheduler.cancel(first)
    scheduler.cancel(third)
    said = finish(scheduler)
    assert (first.finish_reason, second.finish_reason, third.finish_reason) == ("cancelled", "length", "cancelled")
    assert [*first.ids[3:5], *second.ids[3:]] == [*alone(model, [0, 2, 3])[:2], *alone(model, [1, 2, 3])[:10]]
    assert said.keys() == {second}
    scheduler.cancel(second)
    assert second.finish_reason == "length"
    scheduler.close()


def test_an_end_ends_a_sequence():
    model = backend()
    expected = alone(model, [1, 2, 3])
    scheduler = Scheduler(model, CONTEXT)
    sequence = scheduler.submit([1, 2, 3], Sampler(GREEDY), ends=[expected[4]])
    said = finish(scheduler)
    assert said[sequence] == expected[: expected.index(expected[4]) + 1]
    assert sequence.finish_reason == "stop"
    until_full = scheduler.submit([1, 2, 3], Sampler(GREEDY))
    assert len(finish(scheduler)[until_full]) == CONTEXT - 3
    scheduler.close()


def test_one_that_fails_leaves_the_others_alone():
    def failing(logits, ids):
        raise BackendError("not numbers")

    model = backend()
    bad = Sampler(SamplingParams())
    bad.__class__ = type("Failing", (Sampler,), {"__call__": lambda self, logits, ids: failing(logits, ids)})
    scheduler = Scheduler(model, CONTEXT)
    one, other = scheduler.submit([1], bad, 5), scheduler.submit([2], Sampler(GREEDY), 5)
    said = finish(scheduler)
    assert (one.finish_reason, str(one.error)) == ("error", "not numbers")
    assert said[other] == alone(model, [2], max_tokens=5)
    scheduler.close()


def test_ctrl_c_in_a_step_loses_nothing(monkeypatch):
    model = backend("mistral")
    scheduler = Scheduler(model, CONTEXT)
    made = [scheduler.submit([i, 5, 6, 7, 8, 9], Sampler(GREEDY), 20) for i in range(3)]
    run, steps = model.best, []

    def interrupted(step):
        found = run(step)
        steps.append(step)
        if len(steps) in (1, 7):
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        patch.setattr(model, "best", interrupted)
        said = {}
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                finish(scheduler, said)
    finish(scheduler, said)
    for i, sequence in enumerate(made):
        assert said[sequence] == alone(model, [i, 5, 6, 7, 8, 9])
    scheduler.close()


def test_what_does_not_fit_is_refused():
    scheduler = Scheduler(backend(), CONTEXT)
    with pytest.raises(ContextOverflowError, match="250 tokens and 7 more do not fit"):
        scheduler.submit([1] * 250, Sampler(GREEDY), 7)
    with pytest.raises(ArgumentError, match="max_tokens is -1"):
        scheduler.submit([1], Sampler(GREEDY), -1)
    with pytest.raises(ArgumentError, match="0 sequences at once; expected 1 to"):
        Scheduler(backend(), CONTEXT, 0)
    assert not scheduler.is_busy


# The Python API.


PROMPTS = ["Once upon a time", "The dog", "Lily and Tom went to the park. Lily and Tom", "", "Once upon a hill"]


@pytest.fixture(scope="module", params=["cpu", "reference"])
def stories(request):
    with Model(BUNDLED, backend=request.param) as model:
        yield model


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"seed": 3, "temperature": 1.2}, {"temperature": 0, "speculate": 4},
     {"seed": 1, "stop": [" the", "little"]}, {"seed": 1, "ignore_eos": True, "at_once": 2}],
    ids=str,
)  # fmt: skip
def test_a_batch_gives_what_each_prompt_gives(stories, options):
    found = stories.generate_batch(PROMPTS, max_tokens=50, **options)
    options.pop("at_once", None)
    for prompt, done in zip(PROMPTS, found, strict=True):
        expected = stories.generate(prompt, max_tokens=50, **options)
        assert (done.text, done.ids, done.finish_reason) == (expected.text, expected.ids, expected.finish_reason)
        assert done.prompt_ids == expected.prompt_ids
        assert done.timings.generated_tokens == expected.timings.generated_tokens
    gc.collect()
    assert len(stories._backend._backend._slots) <= 1


def test_many_answers_have_a_seed_each(stories):
    found = stories.generate_many("Once", 3, max_tokens=20, temperature=1.5, seed=7)
    expected = [stories.generate("Once", max_tokens=20, temperature=1.5, seed=seed).ids for seed in (7, 8, 9)]
    assert [done.ids for done in found] == expected
    assert len({tuple(done.ids) for done in stories.generate_many("Once", 4, max_tokens=20, temperature=1.5)}) > 1
    with pytest.raises(ArgumentError, match="n is 0"):
        stories.generate_many("Once", 0)


def test_a_batch_is_refused_as_a_whole(stories):
    with pytest.raises(ContextOverflowError):
        stories.generate_batch(["Once", "Once upon a time " * 300])
    with pytest.raises(TypeError, match="tempersture"):
        stories.generate_batch(["Once"], tempersture=1)
    assert stories.generate_batch([]) == []
    model = Model(BUNDLED, backend="reference")
    model.close()
    with pytest.raises(EdgeError, match="is closed"):
        model.generate_batch(["Once"])


def test_smollm2_in_a_batch(smollm2_path):
    words = ("Paris", "Water", "A cat", "The moon", "Bread", "Rain", "Music", "Iron", "Snow", "Wood", "Gold", "Salt")
    prompts = [f"{word} {verb}" for word in words for verb in ("is", "has")][:16]
    with Model(smollm2_path, backend="cpu", context_length=512) as model:
        for sampling in ({"temperature": 0}, {"seed": 5, "temperature": 0.8}):
            options = {"max_tokens": 16, "ignore_eos": True, **sampling}
            found = [done.ids for done in model.generate_batch(prompts, **options)]
            assert found == [model.generate(prompt, **options).ids for prompt in prompts]
