"""Generation through the Python API, on the bundled model."""

import gc
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import BUNDLED, shared

import edgellm
from edgellm.api import Model
from edgellm.errors import (
    ArgumentError,
    BackendError,
    ChatTemplateError,
    ContextOverflowError,
    EdgeError,
    ModelNotFoundError,
)

GREEDY = {"temperature": 0, "max_tokens": 40}


def text_of(stream):
    return "".join(piece.text for piece in stream)


def test_greedy_text_is_the_golden_one(stories):
    golden = json.loads(shared("data/stories260K/golden.json").read_text())
    done = stories.generate("", temperature=0, max_tokens=60)
    assert [*done.prompt_ids, *done.ids][:60] == golden["greedy_ids"][:60]
    assert golden["text"].startswith(done.text)


def test_a_continuation_keeps_its_first_space(stories):
    done = stories.generate("Once upon a time", **GREEDY)
    assert done.text.startswith(", there was a little girl named Lily.")
    assert stories.generate("Once upon a time, there", max_tokens=1, temperature=0).text == " was"


def test_stream_gives_the_same_text_piece_by_piece(stories):
    done = stories.generate("Once", **GREEDY)
    with stories.stream("Once", **GREEDY) as stream:
        pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == done.text == stream.completion.text
    assert [piece.id for piece in pieces] == [*done.ids, None]
    assert len(pieces) > 30


def test_timings_count_tokens_and_cache(stories):
    prompt = "The little dog was very happy because"
    first, again = (stories.generate(prompt, **GREEDY) for _ in range(2))
    assert again.ids == first.ids
    assert again.timings.prompt_tokens == len(first.prompt_ids)
    assert again.timings.cached_tokens == len(first.prompt_ids) - 1
    assert first.timings.generated_tokens == 40
    assert first.timings.prompt_seconds > 0
    assert first.timings.generated_per_second > 0


@pytest.mark.parametrize("stop", [["little girl"], ["zzz", "a little"], "there was"])
def test_stop_strings_never_show(stories, stop):
    whole = stories.generate("Once upon a time", **GREEDY).text
    stopped = stories.generate("Once upon a time", stop=stop, **GREEDY)
    ends = [whole.index(text) for text in ([stop] if isinstance(stop, str) else stop) if text in whole]
    assert stopped.text == whole[: min(ends)]
    assert stopped.finish_reason == "stop"


def test_a_stop_string_that_does_not_come_loses_nothing(stories):
    whole = stories.generate("Once upon a time", **GREEDY)
    assert stories.generate("Once upon a time", stop=[whole.text[-5:] + "!"], **GREEDY).text == whole.text


def test_max_tokens_and_context_end_by_length(stories):
    assert stories.generate("Once", temperature=0, max_tokens=3).finish_reason == "length"
    empty = stories.generate("Once", max_tokens=0)
    assert (empty.text, empty.ids, empty.finish_reason) == ("", [], "length")
    with Model(BUNDLED, context_length=30) as model:
        done = model.generate("Once upon a time", temperature=0, ignore_eos=True)
        assert done.finish_reason == "length"
        assert len(done.prompt_ids) + len(done.ids) == 30


def test_overflow_is_an_error_with_the_numbers(stories):
    with Model(BUNDLED, context_length=30) as model:
        with pytest.raises(ContextOverflowError, match="5 tokens and 26 more do not fit: the context holds 30"):
            model.generate("Once upon a time", max_tokens=26)
        with pytest.raises(ContextOverflowError, match="holds 30"):
            model.generate("Once upon a time " * 20)
        with pytest.raises(ContextOverflowError, match="31 tokens"):
            model.logits([1] * 31)
        assert len(model.generate("Once upon a time", max_tokens=25, ignore_eos=True).ids) == 25


def test_seeds(stories):
    draws = [stories.generate("Once", max_tokens=20, temperature=1.5, seed=seed).ids for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_logits(stories):
    ids = stories.tokenize("Once upon a time")
    logits = stories.logits(ids)
    assert logits.shape == (len(ids), 512)
    assert logits.dtype == np.float32
    assert int(logits[-1].argmax()) == stories.generate("Once upon a time", max_tokens=1, temperature=0).ids[0]


def test_tokenize_and_back(stories):
    ids = stories.tokenize("Once upon a time")
    assert ids[0] == stories.info.bos_id
    assert stories.detokenize(ids) == "Once upon a time"
    assert stories.tokenize("Once upon a time", add_special=False) == ids[1:]


def test_an_answer_can_be_stopped_and_its_slot_is_free_again(stories):
    stream = stories.stream("Once", temperature=0)
    said = next(stream).text + next(stream).text
    stream.close()
    assert stream.completion.text == said
    assert stream.completion.finish_reason == "cancelled"
    assert list(stream) == []
    assert stories.generate("Once", **GREEDY).text.startswith(said)


def test_streams_may_interleave(stories):
    prompts = ["Once upon a time", "The dog", "Lily and Tom"]
    alone = [stories.generate(prompt, **GREEDY).text for prompt in prompts]
    streams = [stories.stream(prompt, **GREEDY) for prompt in prompts]
    together = [""] * 3
    for pieces in zip(*streams, strict=True):
        together = [text + piece.text for text, piece in zip(together, pieces, strict=True)]
    assert together == alone


def test_threads_may_share_a_model(stories):
    prompts = ["Once upon a time", "The dog", "Lily and Tom", "One day"] * 3
    alone = {prompt: stories.generate(prompt, **GREEDY).text for prompt in prompts}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: stories.generate(prompt, **GREEDY).text, prompts))
    assert found == [alone[prompt] for prompt in prompts]
    assert threading.active_count() == 1


def test_slots_are_given_back():
    with Model(BUNDLED) as model:
        for prompt in ("Once", "The", "A"):
            model.generate(prompt, max_tokens=2)
            text_of(model.stream(prompt, max_tokens=2))
            next(model.stream(prompt))
        model.logits([1, 2])
        gc.collect()
        assert len(model._backend._backend._slots) == 1


def test_close_unmaps_and_later_use_says_so():
    model = Model(BUNDLED)
    model.generate("Once", max_tokens=1)
    model.close()
    model.close()
    assert model._file._map.closed
    with pytest.raises(EdgeError, match="stories260K is closed"):
        model.generate("Once", max_tokens=1)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda m: m.generate("x", max_tokens=-1), ArgumentError, "max_tokens is -1"),
        (lambda m: m.generate("x", max_tokens=2.5), ArgumentError, "max_tokens is 2.5; expected a whole number"),
        (lambda m: m.generate("x", speculate=1.5), ArgumentError, "speculate is 1.5; expected a whole number"),
        (lambda m: m.beam_search("x", 2, max_tokens=1.5), ArgumentError, "max_tokens is 1.5; expected a whole number"),
        (lambda m: m.generate("x", stop=["\ud800"]), ArgumentError, "stop has .* whole characters"),
        (lambda m: m.generate("x", stop=[b"x"]), ArgumentError, "stop has b'x'; expected text"),
        (lambda m: m.generate("x", banned_strings=["\ud800"]), ArgumentError, "banned_strings has .* whole characters"),
        (lambda m: m.generate("x", temperature=-1), ArgumentError, "temperature is -1"),
        (lambda m: m.generate("x", stop=[""]), ArgumentError, "stop string is empty"),
        (lambda m: m.generate("x", tempersture=1), TypeError, "tempersture.*known: temperature"),
        (lambda m: m.logits([]), ArgumentError, "no tokens"),
        (lambda m: m.logits([1, 512]), ArgumentError, "from 1 to 512; expected 0 to 511"),
        (lambda m: m.detokenize([-1]), ArgumentError, "-1 is no token id"),
        (lambda m: m.stream_ids([]), ArgumentError, "no tokens"),
        (lambda m: m.stream_ids([-1]), ArgumentError, "expected 0 to 511"),
        (lambda m: m.chat(), ChatTemplateError, "no chat template"),
        (lambda m: Model(BUNDLED, context_length=0), ArgumentError, "1 to 512"),
        (lambda m: Model(BUNDLED, context_length=513), ArgumentError, "1 to 512"),
        (lambda m: Model(BUNDLED, n_threads=0), ArgumentError, "n_threads is 0"),
        (lambda m: Model(BUNDLED, backend="tpu"), BackendError, "'tpu'.*reference"),
        (lambda m: edgellm.load("smolm2"), ModelNotFoundError, "did you mean 'smollm2'"),
        (lambda m: edgellm.load("nowhere/x.edge"), ModelNotFoundError, r"nowhere.x\.edge"),
    ],
)
def test_bad_arguments(stories, call, kind, words):
    with pytest.raises(kind, match=words):
        call(stories)


def test_one_thread_gives_the_same_tokens(stories):
    with Model(BUNDLED, n_threads=1) as model:
        assert model.generate("Once", **GREEDY).ids == stories.generate("Once", **GREEDY).ids
