"""Hidden states: logits are computed from them, in every architecture and on every backend; and what is pooled."""

from functools import partial

import every_op
import numpy as np
import pytest
import tiny
from conftest import BUNDLED

from edgellm import architectures
from edgellm.api import Model
from edgellm.backends import reference
from edgellm.backends.reference import capped, matrix
from edgellm.errors import ArgumentError, ContextOverflowError
from edgellm.generate import Slot

IDS = [1, 5, 3, 2, 7, 7, 4, 0, 6, 1]


@pytest.fixture(scope="module", params=["cpu", "reference"])
def stories(request):
    with Model(BUNDLED, backend=request.param) as model:
        yield model


def hidden(backend):
    """In two chunks, beside another slot."""
    other, slot = Slot(backend, 32), Slot(backend, 32)
    other.extend(IDS)
    return np.concatenate([slot.hidden(IDS[:4]), slot.hidden(IDS[4:])])


@pytest.mark.parametrize("name", [*architectures.names(), "every_op"])
def test_logits_are_computed_from_them(name, monkeypatch):
    """By a matrix, a factor and a bound, which the reference is seen to use."""
    used, compute = [], reference._Ops.logits

    def noted(self, x, table, scale=1.0, softcap=0.0):
        used.append((matrix(table), np.float32(scale), softcap))
        return compute(self, x, table, scale, softcap)

    monkeypatch.setattr(reference._Ops, "logits", noted)
    make = every_op.backend if name == "every_op" else partial(tiny.backend, name)
    for kind in ("reference", "cpu"):
        backend = make("f32", kind, context_length=32)
        logits, found = Slot(backend, 32).extend(IDS, wanted=range(len(IDS))), hidden(backend)
        backend.close()
        table, scale, softcap = used[0]
        np.testing.assert_allclose(capped(scale * (found @ table.T), softcap), logits, atol=1e-4)


def test_they_leave_the_cache_as_running_does(stories):
    slots = [stories.open_slot() for _ in range(2)]
    ids = stories.tokenize("Once upon a time there was")
    slots[0].hidden(ids)
    slots[1].extend(ids)
    assert (slots[0].extend([5]) == slots[1].extend([5])).all()
    for slot in slots:
        slot.close()


def test_texts_are_pooled(stories):
    slot = stories.open_slot()
    rows = slot.hidden(stories.tokenize("Once upon a time")).astype(np.float64)
    slot.close()
    for pooling, pooled in [("mean", rows.mean(axis=0)), ("last", rows[-1])]:
        found = stories.embed("Once upon a time", pooling=pooling)
        assert (found.dtype, found.shape) == (np.float32, (stories.config.hidden_size,))
        np.testing.assert_allclose(found, pooled / np.linalg.norm(pooled), atol=1e-6)
    assert (stories.embed("Once upon a time") == stories.embed("Once upon a time", pooling="mean")).all()


def test_similar_texts_are_nearer(stories):
    texts = ["The dog ran to the park.", "A dog was running in a park.", "Lily ate a red apple."]
    vectors = [stories.embed(text) for text in texts]
    assert vectors[0] @ vectors[1] > max(vectors[0] @ vectors[2], vectors[1] @ vectors[2])


def test_what_has_no_embedding(stories):
    with pytest.raises(ArgumentError, match="pooling is 'max'; expected mean or last"):
        stories.embed("Once", pooling="max")
    with pytest.raises(ContextOverflowError):
        stories.embed("Once upon a time " * 500)
