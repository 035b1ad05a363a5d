"""Tokens that go from the middle of a context, while the later ones move up: their keys, and the answers made so."""

import subprocess
import sys

import every_op
import fresh
import numpy as np
import pytest
import tiny
from conftest import BUNDLED, shared

from edgellm import architectures
from edgellm.api import Model
from edgellm.errors import ArgumentError, ContextOverflowError, UnsupportedError
from edgellm.generate import Slot
from edgellm.moves import rotated
from edgellm.overflow import Window
from edgellm.perplexity import token_losses

GREEDY = {"temperature": 0, "ignore_eos": True, "overflow": "window"}
CONTEXT = 100
LONG = "Once upon a time there was a little girl named Lily. She liked to play in the park. " * 6
WITH_ROPE = [name for name in architectures.names() if name != "gpt2"]


@pytest.fixture(scope="module", params=["cpu", "reference"])
def model(request):
    with Model(BUNDLED, backend=request.param, context_length=CONTEXT) as model:
        yield model


def content(backend, slot, length):
    """What the first layer remembers of a slot's tokens."""
    return backend._slots[slot.number].read(0, np.arange(length))


@pytest.mark.parametrize("kind", ["cpu", "reference"])
@pytest.mark.parametrize("kv", ["f16", "q8"])
@pytest.mark.parametrize("name", WITH_ROPE)
def test_keys_are_those_of_their_new_positions(name, kv, kind):
    """The first layer's depend on a token and its position alone: they are what an evaluation of the tokens that are
    left gives, within a rounding; values, and what a convolution reads, have the same bits."""
    backend = tiny.backend(name, "f32", kind, kv=kv)
    slot, other = Slot(backend, 64), Slot(backend, 64)
    ids = [int(id) for id in fresh.rng("moves", name).integers(0, 97, 60)]
    slot.extend(ids)
    slot.drop(4, 25)
    assert slot.ids == [*ids[:4], *ids[29:]]
    other.extend(slot.ids)
    found, expected = (content(backend, each, 35) for each in (slot, other))
    if len(found) == 2:
        off = np.abs(found[0] - expected[0]) / np.abs(expected[0]).max(axis=-1, keepdims=True)
        assert off.max() < (0.02 if kv == "q8" else 2e-3 if kind == "cpu" else 1e-5)
    if kind == "reference":  # NumPy's products round otherwise for another number of rows
        np.testing.assert_allclose(found[-1], expected[-1], rtol=1e-5, atol=0.02 if kv == "q8" else 1e-5)
    else:
        np.testing.assert_array_equal(found[-1], expected[-1])
        np.testing.assert_array_equal(found[0][:4], expected[0][:4])
    backend.close()


def test_a_turn_is_undone_by_another():
    keys = fresh.rng("turns").standard_normal((5, 2, 12)).astype(np.float32)
    turned = rotated(keys, every_op.SOME, 7)
    np.testing.assert_allclose(rotated(turned, every_op.SOME, -7), keys, atol=1e-5)
    np.testing.assert_array_equal(turned[..., 8:], keys[..., 8:])
    assert np.abs(turned[..., :8] - keys[..., :8]).max() > 0.5


@pytest.mark.parametrize("kv", ["f16", "q8"])
@pytest.mark.parametrize("kind", ["cpu", "reference"])
def test_where_only_a_window_is_seen_nothing_changes(kind, kv):
    """All layers of this model see 5 tokens, in rings that have begun anew: after tokens long ago are gone, logits are
    those that they would have been, twice; and a draft can be taken back."""
    backend = tiny.backend("mistral", "f32", kind, context_length=1024, kv=kv)
    ids = [int(id) for id in fresh.rng("rings").integers(0, 97, 960)]
    slot, other = Slot(backend, 1024), Slot(backend, 1024)
    expected = other.extend(ids, wanted=range(900, 960))
    assert backend.least_latest() == 5
    slot.extend(ids[:900])
    slot.drop(4, 400)
    found = [slot.extend(ids[900:930], wanted=range(30))]
    slot.drop(4, 500)
    slot.extend([1, 2, 3])
    assert slot.trim(30) == 30
    found.append(slot.extend(ids[930:], wanted=range(30)))
    scale = np.abs(expected).max()
    assert np.abs(np.concatenate(found) - expected).max() < (0.05 if kv == "q8" else 2e-3) * scale
    assert slot.trim(4) == 0
    backend.close()


@pytest.mark.parametrize("fmt", ["f32", "q4m"])
def test_both_backends_move_alike(fmt):
    """Of every op that keys can go through: logits of what follows."""
    found = []
    ids = [int(id) for id in fresh.rng("alike").integers(0, 97, 300)]
    for kind in ("cpu", "reference"):
        backend = tiny.backend("lfm2", fmt, kind, context_length=320)
        slot = Slot(backend, 320)
        slot.extend(ids[:250])
        slot.drop(4, 150)
        found.append(slot.extend(ids[250:], wanted=range(50)))
        backend.close()
    assert np.abs(found[0] - found[1]).max() < (0.05 if fmt[0] == "q" else 2e-3) * np.abs(found[1]).max()


@pytest.mark.parametrize("kind", ["cpu", "reference"])
def test_learned_positions_are_refused(kind):
    backend = tiny.backend("gpt2", "f32", kind)
    with pytest.raises(UnsupportedError, match=r"has learned positions.* use 'shift'"):
        backend.least_latest()
    slot = Slot(backend, 64)
    slot.extend([1, 2, 3])
    with pytest.raises(UnsupportedError):
        slot.drop(1, 1)
    assert slot.ids == []


def test_what_goes():
    window = Window(n_first=4, n_latest=1)
    assert [window.surplus(held) for held in (100, 101, 6)] == [48, 49, 1]
    assert Window(4, 70).surplus(100) == 26
    for first, latest in ((51, 1), (40, 60)):
        with pytest.raises(ContextOverflowError, match=f"the first {first} and the latest .* must stay"):
            Window(first, latest).check(100)
    Window(50, 49).check(100)


def test_an_answer_is_longer_than_the_context(model):
    """Until it is full the answer is that of a larger one; what a step makes of several answers is each one's own."""
    done = model.generate("Once upon a time", max_tokens=260, **GREEDY)
    assert len(done.ids) == 260
    assert done.finish_reason == "length"
    assert done.dropped_tokens == 48 * 4
    assert done.prompt_ids == model.tokenize("Once upon a time")
    short = model.generate("Once upon a time", max_tokens=95, temperature=0, ignore_eos=True)
    assert short.ids == done.ids[:95]
    assert short.dropped_tokens == 0
    options = {**GREEDY, "max_tokens": 150}
    alone = [model.generate(text, **options) for text in ("Once upon a time", "The dog", LONG)]
    together = model.generate_batch(["Once upon a time", "The dog", LONG], **options)
    assert [each.ids for each in together] == [each.ids for each in alone]
    assert [each.dropped_tokens for each in together] == [each.dropped_tokens for each in alone]
    assert alone[0].ids == done.ids[:150]
    drafted = model.generate("Once upon a time", speculate=8, max_tokens=260, **GREEDY)
    assert (drafted.ids, drafted.dropped_tokens) == (done.ids, done.dropped_tokens)


def test_a_prompt_that_does_not_fit_keeps_its_first_tokens(model):
    ids = model.tokenize(LONG)
    done = model.generate(LONG, max_tokens=10, **GREEDY)
    assert done.prompt_ids == [*ids[:4], *ids[len(ids) - 71 :]]
    assert done.dropped_tokens == len(ids) - 75


def test_nobody_goes_on_from_what_has_moved(model, tmp_path):
    """Prompts that begin with what a slot seems to hold are evaluated, but for the tokens that stayed."""
    prompt = model.tokenize("Once upon a time")
    with model.stream_ids(prompt, max_tokens=150, **GREEDY) as stream:
        ids = [piece.id for piece in stream if piece.id is not None]
    seen = [*prompt[:4], *[*prompt, *ids][-46:]]
    assert len(model.prefix_cache.tokens_of()) <= 4
    with Model(BUNDLED, backend=model.backend_name, context_length=CONTEXT) as other:
        options = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
        expected, found = (
            [piece.id for piece in each.stream_ids(seen, **options) if piece.id is not None] for each in (other, model)
        )
    assert found == expected


def test_an_answer_that_is_stopped_while_tokens_move(model, monkeypatch):
    """Nothing that is half moved is left."""
    backend = model._backend._backend
    expected = model.generate("Once upon a time", max_tokens=20, temperature=0).ids

    def interrupted(layer, keys, n):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(backend._moves, "turned", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.generate("Once upon a time", max_tokens=150, **GREEDY)
    assert model.generate("Once upon a time", max_tokens=20, temperature=0).ids == expected


def test_bad_wishes(model):
    with pytest.raises(ContextOverflowError, match="the first 60 and the latest"):
        model.stream_ids([1, 2], n_first=60, **GREEDY)
    with pytest.raises(ArgumentError, match="overflow is 'slide'; expected error, shift or window"):
        model.generate("Once", overflow="slide")


def test_the_command_line_tells():
    run = subprocess.run(
        [sys.executable, "-m", "edgellm", "generate", "Once", "-m", "stories260k", "--ctx", "100", "-n", "120",
         "--ignore-eos", "--overflow", "window"], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "[ the context is too short: the 48 oldest tokens but the first were left out ]" in run.stderr
    assert len(run.stdout) > 200


def test_smollm2_reads_on_in_a_short_context(smollm2_path):
    """WikiText through a context of 256: with the first tokens kept, as likely as where what is left is evaluated anew
    each time; without them, far less."""
    text = shared("data/text/wikitext-2-raw-test.txt").read_bytes()[:8000].decode()
    with Model(smollm2_path, backend="cpu", context_length=256) as model:
        ids = model.tokenize(text)[:897]
        kept, none, anew = (loss(model, ids, *case) for case in ((4, False), (0, False), (4, True)))
    with Model(smollm2_path, backend="cpu", context_length=256, kv="q8") as model:
        of_codes = loss(model, ids, 4, False)
    assert kept < anew + 0.1
    assert kept < none - 0.3
    assert of_codes == pytest.approx(kept, abs=0.05)


def loss(model, ids, n_first, evaluates):
    """The mean of -log p of every fourth token after the first 256."""
    slot, losses = model.open_slot(), []
    for at in range(0, len(ids) - 1, 64):
        if len(slot.ids) + 64 > model.context_length:
            slot.drop(n_first, 124)
            if evaluates:
                left = list(slot.ids)
                slot.trim(0)
                slot.extend(left)
        slot.extend(ids[at : at + 48])
        logits = slot.extend(ids[at + 48 : at + 64], wanted=range(16))
        losses.append(token_losses(logits, ids[at + 49 : at + 65]).mean())
    slot.close()
    return float(np.mean(losses[4:]))


def test_smollm2_goes_on_past_its_context(smollm2_path):
    """A chat whose answer is longer than the context stays a text, as a model that sees all of it finds; and the system
    message is still known in the next turn."""
    with Model(smollm2_path, backend="cpu", context_length=256) as model:
        chat = model.chat("Your name is Zorba. You answer in one sentence.")
        answer = chat.send("Tell me a long story about a ship and an island.", max_tokens=300, **GREEDY)
        assert len(answer.ids) == 300
        assert answer.dropped_tokens > 100
        said = chat.send("What is your name?", overflow="window", max_tokens=24, temperature=0)
        assert "Zorba" in said.text
    with Model(smollm2_path, backend="cpu", context_length=512) as model:
        ids = [*answer.prompt_ids, *answer.ids]
        found = token_losses(model.logits(ids)[len(answer.prompt_ids) - 1 : -1], answer.ids)
    before, after = found[:150].mean(), found[200:].mean()
    assert after < before + 0.7
