"""The CPU backend against itself: the bits of a row's logits depend on the model and on the tokens up to it alone."""

from functools import cache

import every_op
import fresh
import numpy as np
import pytest
import tiny
from conftest import BUNDLED

pytest.importorskip("numba")

from edgellm import architectures, isa, quant
from edgellm.backends import get
from edgellm.backends.reference import matrix
from edgellm.generate import Slot
from edgellm.loading import open_model
from edgellm.step import Step
from edgellm.tensor import Tensor

NAMES, ISAS = [*architectures.names(), "every_op", "stories260k"], isa.runnable()
LENGTH = 300  # some blocks of keys
CONTEXT = 320

IN_ALL_FORMATS = "every_op", "llama", "stories260k"
models = pytest.mark.parametrize(
    ("name", "fmt", "kv"),
    [
        *((name, fmt, "f16") for name in NAMES for fmt in (quant.names() if name in IN_ALL_FORMATS else ["q4m"])),
        *((name, "q4m", "q8") for name in ("every_op", "gemma3_text", "mistral", "stories260k")),
    ],
)


def backend(name, fmt, kv="f16", n_threads=2):
    """The CPU backend with a tiny random model, or with the trained one in another format."""
    if name == "every_op":
        return every_op.backend(fmt, context_length=CONTEXT, n_threads=n_threads, kv=kv)
    if name != "stories260k":
        return tiny.backend(name, fmt, "cpu", CONTEXT, n_threads=n_threads, kv=kv)
    loaded = open_model(BUNDLED)
    tensors = {tensor.name: converted(tensor, fmt) for tensor in loaded.file.tensors.values()}
    made = get("cpu")(loaded.architecture, loaded.config, tensors, CONTEXT, n_threads, kv)
    loaded.file.close()
    return made


def converted(tensor, fmt):
    if len(tensor.shape) == 1:
        return Tensor(tensor.name, tensor.shape, "f32", tensor.data.copy())
    order = quant.paired(tensor.shape[0], tensor.pair) if tensor.pair else np.arange(tensor.shape[0])
    tiles = quant.get(fmt).pack(quant.get(fmt).quantize(matrix(tensor)[order]))
    return Tensor(tensor.name, tensor.shape, fmt, tiles, tensor.pair)


@cache
def ids(sequence=0):
    return [int(id) for id in fresh.rng("ids", sequence).integers(0, 97, LENGTH)]


@cache
def expected(name, fmt, kv="f16", sequence=0):
    """Logits after each token of a sequence: of one chunk, on one thread."""
    made = backend(name, fmt, kv, n_threads=1)
    logits = Slot(made, CONTEXT).extend(ids(sequence), wanted=range(LENGTH))
    made.close()
    assert np.isfinite(logits).all()
    return logits


@models
def test_chunks_and_threads(name, fmt, kv):
    drawn = np.diff([0, *np.sort(fresh.rng("chunks", name, fmt).integers(0, LENGTH + 1, 5)), LENGTH])
    for n_threads in (1, 2, 3):
        made = backend(name, fmt, kv, n_threads)
        for sizes in ([LENGTH], [127, 1, 1, 171], [128, 129, 43], [120, *[1] * 16, 164], [int(n) for n in drawn if n]):
            slot, at, found = Slot(made, CONTEXT), 0, []
            for size in sizes:
                found.append(slot.extend(ids()[at : at + size], wanted=range(size)))
                at += size
            np.testing.assert_array_equal(
                np.concatenate(found), expected(name, fmt, kv), err_msg=f"{n_threads} threads, {sizes}"
            )
            slot.close()
        made.close()


@models
def test_batches(name, fmt, kv):
    """Slots that advance together, each step by any number of rows of any of them, of which some are wanted."""
    rng, made = fresh.rng("batches", name, fmt), backend(name, fmt, kv, n_threads=3)
    slots, held = [made.open_slot() for _ in range(4)], np.zeros(4, int)
    while (held < LENGTH).any():
        sizes = np.minimum(rng.choice([0, 0, 1, 1, 5, 20, 32], 4), LENGTH - held)
        chosen = [i for i in rng.permutation(4) if sizes[i]]
        if not chosen:
            continue
        assert sum(sizes) <= made.MAX_ROWS
        steps = [Step.chunk(slots[i], held[i], ids(i)[held[i] : held[i] + sizes[i]]) for i in chosen]
        columns = (np.concatenate([getattr(step, key) for step in steps]) for key in ("tokens", "slots", "positions"))
        wanted = np.flatnonzero(rng.random(sizes.sum()) < 0.7)
        found = made.run(Step(*columns, wanted=wanted))
        alone = np.concatenate([expected(name, fmt, kv, i)[held[i] : held[i] + sizes[i]] for i in chosen])
        np.testing.assert_array_equal(found, alone[wanted], err_msg=f"{held} + {sizes}, in order {chosen}")
        held += sizes
    made.close()


@models
def test_a_slot_that_goes_on_from_an_earlier_token(name, fmt, kv):
    """What was computed for tokens that are gone leaves nothing behind."""
    rng, made = fresh.rng("trims", name, fmt), backend(name, fmt, kv)
    slot = Slot(made, CONTEXT)
    for length in (0, 127, 128, 129, 299, *(int(n) for n in rng.integers(1, LENGTH, 3))):
        others = [int(id) for id in rng.integers(0, 97, CONTEXT - length)]
        assert slot.reuse([*ids()[:length], -1]) <= length
        assert len(slot.extend([*ids()[:length], *others][len(slot.ids) :], wanted=range(0))) == 0
        assert slot.reuse([*ids()[:length], -1]) == length
        found = slot.extend(ids()[length:], wanted=range(LENGTH - length))
        np.testing.assert_array_equal(found, expected(name, fmt, kv)[length:], err_msg=f"from {length}")
    made.close()


@models
def test_a_copy_of_a_slot(name, fmt, kv):
    """Whatever stood in it before, it goes on as the other would, and both by themselves."""
    rng, made = fresh.rng("copies", name, fmt), backend(name, fmt, kv)
    slot, other = Slot(made, CONTEXT), Slot(made, CONTEXT)
    for length in (0, 1, 127, 128, 129, 299, *(int(n) for n in rng.integers(1, LENGTH, 3))):
        slot.extend([*ids()[:length], 3], wanted=range(0))
        other.extend([1] * int(rng.integers(1, CONTEXT - len(other.ids) + 1)), wanted=range(0))
        assert other.copy(slot, length) == length
        assert other.ids == ids()[:length]
        slot.extend([2] * min(9, CONTEXT - length), wanted=range(0))
        found = other.extend(ids()[length:], wanted=range(LENGTH - length))
        np.testing.assert_array_equal(found, expected(name, fmt, kv)[length:], err_msg=f"from {length}")
        other.trim(0)
        slot.trim(0)
    made.close()


@pytest.mark.parametrize("which", ISAS[1:])
@models
def test_instruction_sets(which, name, fmt, kv, monkeypatch):
    monkeypatch.setenv("EDGELLM_ISA", which)
    made = backend(name, fmt, kv)
    slot = Slot(made, CONTEXT)
    found = [slot.extend(ids()[at:end], wanted=range(end - at)) for at, end in ((0, 290), (290, 299), (299, 300))]
    monkeypatch.delenv("EDGELLM_ISA")
    np.testing.assert_array_equal(np.concatenate(found), expected(name, fmt, kv))
    made.close()


def test_any_mixture_of_thread_counts(monkeypatch):
    made = backend("llama", "q4m", n_threads=3)
    counts = iter([1, 3, 2] * LENGTH)
    monkeypatch.setattr(made._team._pace, "next", lambda: next(counts))
    slot = Slot(made, CONTEXT)
    found = [slot.extend([id]) for id in ids()]
    np.testing.assert_array_equal(np.concatenate(found), expected("llama", "q4m"))
    made.close()
