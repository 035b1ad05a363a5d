"""The CPU backend against the reference; its threads, its start and its end. Its bits: test_bits.py."""

import threading
import time
from types import SimpleNamespace

import every_op
import numpy as np
import pytest
import tiny
from conftest import BUNDLED, shared
from test_architectures import IDS
from test_smollm2 import CASES

from edgellm import architectures, backends, quant
from edgellm.api import Model
from edgellm.backends.reference import _Ops
from edgellm.errors import BackendError
from edgellm.generate import Slot, generate
from edgellm.kernels.pace import Pace
from edgellm.kernels.team import physical_cores
from edgellm.loading import open_model
from edgellm.perplexity import perplexity
from edgellm.plan import record
from edgellm.plan_text import describe
from edgellm.sampling import Sampler, SamplingParams
from edgellm.step import Step
from edgellm.tensor import Tensor

NAMES = architectures.names()


def whole(backend, ids=IDS):
    slot = Slot(backend, 64)
    logits = slot.extend(ids, wanted=range(len(ids)))
    slot.close()
    return logits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fmt", quant.names())
def test_logits_are_the_reference_s(name, fmt):
    """As near as float16 keys and values, and with quantized weights int8 activations, allow. With experts in the
    middle row: where two are nearly equally probable, a rounding decides which one a row takes."""
    ours, reference = whole(tiny.backend(name, fmt, "cpu")), whole(tiny.backend(name, fmt))
    off = np.abs(ours - reference).max(axis=1) / np.abs(reference).max()
    has_experts = any("experts" in tensor for tensor in architectures.get(name).shapes(tiny.config(name)))
    assert (np.median(off) if has_experts else off.max()) <= (0.05 if fmt[0] == "q" else 2e-3)


@pytest.mark.parametrize("name", [*NAMES, "every_op"])
def test_logits_of_a_cache_of_8_bits_are_the_reference_s(name):
    """As near as int8 queries allow: nearer than to those of another cache. In the middle of all rows: where a code is
    between two, a rounding decides, and so it does between two experts."""

    def logits(kind, kv):
        made = every_op.backend("f32", kind, kv=kv) if name == "every_op" else tiny.backend(name, "f32", kind, kv=kv)
        return whole(made)

    ours, expected, other = logits("cpu", "q8"), logits("reference", "q8"), logits("reference", "f16")
    off = np.abs(ours - expected).max(axis=1) / np.abs(expected).max()
    assert np.median(off) <= 0.02
    assert 0 < np.median(off) < np.median(np.abs(ours - other).max(axis=1) / np.abs(expected).max())


@pytest.mark.parametrize("fmt", quant.names())
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_best_tokens_are_those_of_the_logits(fmt, n_threads):
    """Of 97 tokens, for any of the rows; what is not a number is the reference's -1 too."""
    backend = tiny.backend("llama", fmt, "cpu", n_threads=n_threads)
    expected, slot = whole(backend).argmax(axis=1).tolist(), Slot(backend, 64)
    for wanted in (range(40), range(7, 8), range(39, 40), range(5, 13), range(0)):
        slot.reuse([])
        assert slot.best(IDS, wanted) == expected[wanted.start : wanted.stop]
    slot.reuse([])
    assert [slot.best([id])[0] for id in IDS] == expected


@pytest.mark.parametrize("kind", ["cpu", "reference"])
def test_best_tokens_of_several_slots(kind):
    backend = tiny.backend("mistral", "q8", kind)
    slots, sizes = [backend.open_slot() for _ in range(3)], (3, 1, 5)
    steps = [Step.chunk(slot, 0, IDS[slot * 9 :][:size]) for slot, size in zip(slots, sizes, strict=True)]
    columns = [np.concatenate([getattr(step, key) for step in steps]) for key in ("tokens", "slots", "positions")]
    step = Step(*columns, wanted=np.array([8, 0, 3]))
    expected = backend.run(step).argmax(axis=1)
    for slot in slots:
        backend.trim(slot, 0)
    np.testing.assert_array_equal(backend.best(step), expected)


@pytest.mark.parametrize("kind", ["cpu", "reference"])
def test_logits_that_are_not_numbers_are_refused(kind):
    backend = tiny.backend("llama", "f32", kind)
    tensors = tiny.tensors(architectures.get("llama"), architectures.get("llama").Config.tiny())
    tensors["norm"].data[:] = np.nan
    broken = type(backend)(architectures.get("llama"), architectures.get("llama").Config.tiny(), tensors, 64, 1)
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=0, repeat_penalty=2), SamplingParams()):
        with pytest.raises(BackendError, match="not numbers"):
            list(generate(Slot(broken, 64), IDS[:5], Sampler(params), 3))


def test_greedy_generation_writes_no_logits(monkeypatch):
    backend = tiny.backend("llama", "q4m", "cpu")
    expected = list(generate(Slot(backend, 64), IDS[:5], Sampler(SamplingParams(temperature=0)), 20))
    found = [Slot(backend, 64).extend([*IDS[:5], *expected[:n]])[0].argmax() for n in range(20)]
    assert found == expected
    monkeypatch.setattr(backend, "run", None)
    assert list(generate(Slot(backend, 64), IDS[:5], Sampler(SamplingParams(temperature=0)), 20)) == expected


@pytest.mark.parametrize("fmt", quant.names())
def test_every_op_is_the_reference_s(fmt):
    """In the middle of all rows: where two experts are nearly equal, float16 keys can choose the other."""
    ours, reference = whole(every_op.backend(fmt)), whole(every_op.backend(fmt, "reference"))
    bound = 0.05 if fmt[0] == "q" else 1e-3
    assert np.median(np.abs(ours - reference).max(axis=1)) <= bound * np.abs(reference).max()


def test_best_tokens_of_capped_logits():
    backend = every_op.backend("q8")
    expected, slot = whole(backend).argmax(axis=1).tolist(), Slot(backend, 64)
    assert slot.best(IDS, range(40)) == expected


def test_a_value_that_an_op_has_changed_is_refused():
    config = every_op.Config()

    def forward(config, weights, ops):
        x = ops.embed(weights.embed)
        ops.add(x, ops.linear(x, weights.layer(0).o))
        return ops.logits(x, weights.embed)

    changed = SimpleNamespace(caches=every_op.caches, forward=forward)
    with pytest.raises(BackendError, match="'x' is used after an op has changed it"):
        record(changed, config, every_op.tensors("f32"))


@pytest.mark.parametrize(
    ("of_q", "of_k"),
    [
        (None, ([1.0, 0.1], 1.0)),
        (([1.0, 0.1], 1.0), None),
        (([1.0, 0.1], 1.0), ([1.0, 0.2], 1.0)),
        (([1.0, 0.1], 1.0), ([1.0], 1.0)),
        (([1.0, 0.1], 1.0), ([1.0, 0.1], 1.2)),
    ],
)
def test_queries_and_keys_that_are_turned_by_different_angles_are_refused(of_q, of_k):
    def heads(ops, x, turn):
        return x if turn is None else ops.rope(x, every_op.HEAD_DIM, np.array(turn[0], np.float32), turn[1])

    def forward(config, weights, ops):
        layer, x = weights.layer(0), ops.embed(weights.embed)
        q, k = heads(ops, ops.linear(x, layer.q), of_q), heads(ops, ops.linear(x, layer.k), of_k)
        return ops.logits(ops.attention(q, k, ops.linear(x, layer.v), 0, 1.0), weights.embed)

    turned = SimpleNamespace(caches=every_op.caches, forward=forward)
    with pytest.raises(BackendError, match=r"'q' and 'k' are turned by different angles; .*: use --backend reference"):
        record(turned, every_op.Config(), every_op.tensors("f32"))


def test_layer_norm():
    x = np.array([[3, 5, 7, 9]], np.float32)
    weight, beta = (Tensor("", (4,), "f32", np.array(values, np.float32)) for values in ([1, 2, 1, 1], [0, 0, 5, 0]))
    found = _Ops(Step.chunk(0, 0, [1]), {}, {}).layer_norm(x, weight, beta, 0.0)
    np.testing.assert_allclose(found, [[-3 / 5**0.5, -2 / 5**0.5, 1 / 5**0.5 + 5, 3 / 5**0.5]], rtol=1e-6)


@pytest.mark.parametrize("kind", ["cpu", "reference"])
@pytest.mark.parametrize("matrix", ["q", "k", "v", "o", "gate_up", "down"])
def test_a_weight_that_is_nan_shows(kind, matrix):
    """In every row of logits, wherever in a matrix it is."""
    architecture = architectures.get("llama")
    config = architecture.Config.tiny()
    for row in range(16):
        tensors = tiny.tensors(architecture, config, "q4")
        tensor = next(tensor for name, tensor in tensors.items() if name == f"layers.0.{matrix}")
        tensor.data[0, 0, 512:544].view(np.float16)[row] = np.nan
        made = backends.get(kind)(architecture, config, tensors, 64, 2)
        assert np.isnan(whole(made)).all()
        made.close()


def test_a_wrapped_ring_is_the_reference_s():
    """900 tokens through a window of 5, in chunks of 100, in a ring of 768 positions."""
    ids = [int(id) for id in np.random.default_rng(2).integers(0, 97, 900)]
    found = []
    for kind in ("cpu", "reference"):
        backend = tiny.backend("mistral", "f32", kind, context_length=1024, max_rows=100)
        found.append(Slot(backend, 1024).extend(ids, wanted=range(900)))
    assert np.abs(found[0] - found[1]).max() < 2e-3 * np.abs(found[1]).max()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["prompt"][:20])
def test_golden_tokens_given_the_ones_before(smollm2_cpu, case):
    """Equal where llama.cpp's float32 has a gap of 0.5 between its two likeliest tokens."""
    ids = case["prompt_ids"] + case["greedy_ids"]
    found = smollm2_cpu.logits(ids[:-1])[len(case["prompt_ids"]) - 1 :].argmax(axis=1)
    clear = np.array(case["top2_gaps"]) >= 0.5
    np.testing.assert_array_equal(found[clear], np.array(case["greedy_ids"])[clear])


def test_perplexity_and_divergence(smollm2, smollm2_cpu):
    """At most 0.3 % above the reference's on 40 chunks; KL divergence from it at most 0.003, on the first chunk."""
    text = shared("data/text/wikitext-2-raw-test.txt").read_bytes()[:100_000].decode()
    *_, result = perplexity(smollm2_cpu, text, context=512, chunks=40)
    assert result.value <= 23.5115 * 1.003
    ids = smollm2.tokenize(text)[:512]
    p, q = (model.logits(ids)[256:].astype(np.float64) for model in (smollm2, smollm2_cpu))
    p, q = (x - x.max(1, keepdims=True) - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))
            for x in (p, q))  # fmt: skip
    assert (np.exp(p) * (p - q)).sum(1).mean() <= 0.003


def test_perplexity_with_a_cache_of_8_bits(smollm2_path, smollm2_cpu):
    """Within 0.2 % of that with float16, on 12 chunks: half of the memory, of which the model tells."""
    text = shared("data/text/wikitext-2-raw-test.txt").read_bytes()[:30_000].decode()
    with Model(smollm2_path, backend="cpu", context_length=8192, kv="q8") as model:
        assert model.footprint.cache < 0.53 * smollm2_cpu.footprint.cache
        found, expected = (list(perplexity(each, text, chunks=12))[-1].value for each in (model, smollm2_cpu))
    assert found == pytest.approx(expected, rel=0.002)
    assert found != expected


def test_real_weights_change_no_bit_with_chunks_or_threads(smollm2_path):
    ids = [int(id) for id in np.random.default_rng(0).integers(0, 49152, 300)]
    found = []
    for n_threads, sizes in ((1, [300]), (2, [300]), (2, [256, 44]), (3, [299, 1]), (2, [5, 100, 7, 188])):
        with Model(smollm2_path, backend="cpu", n_threads=n_threads) as model:
            slot, at = model.open_slot(), 0
            for size in sizes:
                logits = slot.extend(ids[at : at + size])
                at += size
            found.append(logits)
    for logits in found[1:]:
        np.testing.assert_array_equal(logits, found[0])


def test_an_idle_model_uses_no_cpu():
    with Model(BUNDLED, backend="cpu", n_threads=3) as model:
        model.generate("Once", max_tokens=5)
        time.sleep(0.2)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.02
        assert model.generate("Once", temperature=0, max_tokens=3).text == " upon a time"


def test_threads_end_with_their_model():
    before = threading.active_count()
    with Model(BUNDLED, backend="cpu", n_threads=4) as model:
        model.generate("Once", max_tokens=1)
        assert threading.active_count() == before + 3
    assert threading.active_count() == before


def test_physical_cores():
    assert physical_cores() >= 1


def test_the_plan_reads_well(smollm2_path):
    loaded = open_model(smollm2_path)
    lines = describe(record(loaded.architecture, loaded.config, loaded.file.tensors))
    loaded.file.close()
    assert lines[0].startswith("x = row of embed for each token")
    assert lines[2] == "layers 0 to 29, each"
    assert lines[-2].endswith("wanted rows, or the best token of each")
    assert any("gate_up = rms_norm(x) @ gate_up.T" in line for line in lines)
    assert lines[-1] == "243 ops; 96.4 MB of weights are read for each step"
    assert len(lines) < 20


def test_a_step_that_ctrl_c_interrupted(monkeypatch):
    """The workers have begun it, the caller has not: the next step, or closing, finds them ready."""
    backend = tiny.backend("llama", "q8", "cpu", n_threads=3)
    expected, leader = whole(backend), backend._team._leader
    slot = Slot(backend, 64)
    slot.extend(IDS[:10])

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(leader, "_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            slot.extend(IDS[10:20])
    assert slot.ids == IDS[:10]
    np.testing.assert_array_equal(slot.extend(IDS[10:])[0], expected[-1])
    with monkeypatch.context() as patch:
        patch.setattr(leader, "_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            slot.extend([1])
    backend.close()


def test_kernels_need_no_cache(tmp_path, monkeypatch):
    """Where the cache folder cannot be made, kernels are compiled for this process alone."""
    from edgellm import isa, kernels
    from edgellm.kernels.matmul import block_place

    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "file" / "home"))
    assert kernels.Compiler(isa.get("generic")).function(block_place)(3, 32) == 3


def times(pace, seconds, steps):
    """The numbers of threads that a pace chooses while steps take seconds[n]."""
    chosen = []
    for _ in range(steps):
        chosen.append(pace.next())
        pace.took(chosen[-1], seconds[chosen[-1]])
    return chosen


def test_the_number_of_threads_follows_what_is_fastest():
    pace = Pace(4)
    quiet, busy = {4: 1.0, 3: 1.3, 1: 3.0}, {4: 9.0, 3: 1.4, 1: 3.1}
    assert times(pace, quiet, 400).count(4) >= 380
    assert times(pace, busy, 400)[20:].count(3) >= 350
    assert times(pace, quiet, 400)[100:].count(4) >= 280
    assert set(times(Pace(1), {1: 1.0}, 100)) == {1}
