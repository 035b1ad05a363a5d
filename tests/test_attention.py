"""Attention's bodies against the definition of correct, and against themselves: the same bits however work is split."""

from types import SimpleNamespace

import numpy as np
import pytest

from edgellm import isa
from edgellm.backends.reference import attend
from edgellm.kernels import attention as bodies
from edgellm.kernels import compiler, layout

pytest.importorskip("numba")

ISAS = isa.runnable()


def bound(name):
    """The bodies that others call, for an ISA."""
    names = ("attention", "attention_merge", "splits_keys", "append_key", "append_value")
    return SimpleNamespace(**{body: compiler(isa.get(name)).function(getattr(bodies, body)) for body in names})


class Layer:
    """One layer's cache in some slots, with keys and values of known positions; NaN where nothing was ever stored."""

    def __init__(self, n_kv_heads, head_dim, capacity, contexts, seed=0):
        rng = np.random.default_rng(seed)
        self.n_kv_heads, self.head_dim, self.capacity = n_kv_heads, head_dim, capacity
        self.halves = n_kv_heads * capacity * head_dim
        self.k, self.v = (
            [rng.standard_normal((n, n_kv_heads, head_dim)).astype(np.float16).astype(np.float32) for n in contexts]
            for _ in "kv"
        )
        # In front of the keys, as another layer would be, something that must not be touched.
        self.memory = np.full((len(contexts), 64 + 2 * self.halves + bodies.SLACK_BYTES // 2), np.nan, np.float16)
        for slot in range(len(contexts)):
            self._fill(slot)

    def _fill(self, slot):
        k, v = np.split(self.memory[slot, 64 : 64 + 2 * self.halves], 2)
        k = k.reshape(self.n_kv_heads, self.capacity // 16, self.head_dim, 16)
        v = v.reshape(self.n_kv_heads, self.capacity, self.head_dim)
        for position in range(max(0, len(self.k[slot]) - self.capacity), len(self.k[slot])):
            at = position % self.capacity
            k[:, at // 16, :, at % 16], v[:, at] = self.k[slot][position], self.v[slot][position]


class Call:
    """A record and a step for attention over rows (slot, position)."""

    def __init__(self, layer, group, window, rows, n_threads=1, queries=None):
        n_heads = layer.n_kv_heads * group
        self.layer, self.window, self.n_threads = layer, window, n_threads
        self.slots, self.positions = (np.array(column, np.int32) for column in zip(*rows, strict=True))
        shape = len(rows), n_heads * layer.head_dim
        self.queries = np.random.default_rng(9).standard_normal(shape, np.float32) if queries is None else queries
        self.out = np.full((len(rows) + 1, shape[1]), np.nan, np.float32)  # one row more, that must stay
        floats = bodies.n_partial_floats(len(rows), n_heads, layer.head_dim, layer.capacity, n_threads)
        self.partials = np.full(floats + 16, np.nan, np.float32)
        self.caches = layer.memory.ctypes.data + np.arange(len(layer.memory)) * layer.memory.strides[0]
        self.record, self.step = np.zeros(layout.RECORD_CELLS, np.int64), np.zeros(layout.STEP_CELLS, np.int64)
        self.scale = np.float32(layer.head_dim**-0.5)
        for name, value in {
            "SOURCE_STRIDE": self.queries[0].nbytes, "TARGET_STRIDE": self.out[0].nbytes,
            "QUERIES": self.queries.ctypes.data, "OUT": self.out.ctypes.data, "PARTIALS": self.partials.ctypes.data,
            "N_HEADS": n_heads, "N_KV_HEADS": layer.n_kv_heads, "HEAD_DIM": layer.head_dim, "WINDOW": window,
            "CAPACITY": layer.capacity, "KV_OFFSET": 128, "V_OFFSET": 128 + 2 * layer.halves,
        }.items():  # fmt: skip
            self.record[getattr(layout, name) // 8] = value
        self.record[layout.SCALE // 8 :].view(np.float32)[0] = self.scale
        self.step[layout.STEP_ROWS // 8] = len(rows)
        for at, array in ((layout.STEP_POSITIONS, self.positions), (layout.STEP_SLOTS, self.slots)):
            self.step[at // 8] = array.ctypes.data
        self.step[layout.STEP_CACHES // 8] = self.caches.ctypes.data

    def run(self, kernels):
        """The output, from threads that run one after another, the last one first."""
        record, step = self.record.ctypes.data, self.step.ctypes.data
        for op in (kernels.attention, kernels.attention_merge):
            for thread in reversed(range(self.n_threads)):
                op(record, step, thread, self.n_threads)
        assert np.isnan(self.out[-1]).all()
        assert np.isnan(self.partials[-16:]).all()
        return self.out[:-1]

    def splits(self, kernels):
        return kernels.splits_keys(self.record.ctypes.data, self.step.ctypes.data, self.n_threads)

    def expected(self):
        out = np.empty_like(self.queries)
        for slot in np.unique(self.slots):
            rows = np.flatnonzero(self.slots == slot)
            seen, positions = np.arange(len(self.layer.k[slot])), self.positions[rows, None]
            hidden = (seen > positions) | (seen <= positions - (self.window or len(seen)))
            out[rows] = attend(self.queries[rows], self.layer.k[slot], self.layer.v[slot], hidden, self.scale)
        return out


def rows_of(slot, first, end):
    return [(slot, position) for position in range(first, end)]


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("head_dim", "group", "window"), [
    (8, 1, 0), (8, 8, 200), (12, 3, 5), (64, 3, 0), (64, 4, 200), (64, 1, 5), (80, 4, 0), (96, 8, 0), (128, 1, 200),
    (128, 4, 0), (256, 3, 5), (256, 1, 0),
])  # fmt: skip
def test_equals_the_definition(name, head_dim, group, window):
    contexts = [700, 131, 17]
    layer = Layer(2, head_dim, 768, contexts)
    steps = [
        rows_of(0, 0, 150),
        rows_of(0, 699, 700),
        rows_of(1, 128, 129),
        rows_of(0, 680, 700) + rows_of(2, 0, 17) + rows_of(1, 125, 131),
        rows_of(2, 16, 17) + rows_of(1, 130, 131) + rows_of(0, 640, 641),
    ]
    for rows in steps:
        call = Call(layer, group, window, rows, n_threads=2)
        expected = call.expected()
        # Of sums of up to 700 products in another order; keys and values have the same float16.
        np.testing.assert_allclose(call.run(bound(name)), expected, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("window", "capacity", "n_rows"), [
    (5, 128, 30), (200, 256, 40), (130, 256, 1), (200, 384, 100),
])  # fmt: skip
def test_a_ring_that_wrapped(name, window, capacity, n_rows):
    for end in (700, 655, 641, 640):
        layer = Layer(2, 64, capacity, [end])
        call = Call(layer, 3, window, rows_of(0, end - n_rows, end), n_threads=3)
        np.testing.assert_allclose(call.run(bound(name)), call.expected(), rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("head_dim", "group", "window"), [(8, 4, 0), (64, 3, 0), (64, 3, 200), (80, 1, 5), (96, 8, 0)])
def test_the_same_bits_however_the_work_is_split(name, head_dim, group, window):
    layer, kernels = Layer(2, head_dim, 768, [700, 300, 120]), bound(name)
    rows = rows_of(0, 420, 560) + rows_of(1, 250, 300) + rows_of(2, 0, 120)
    whole = Call(layer, group, window, rows)
    expected, queries = whole.run(kernels), whole.queries
    assert not whole.splits(kernels)
    split = False
    for n_threads, size in ((2, 310), (3, 97), (2, 7), (3, 1), (1, 1), (1, 5)):
        for at in range(0, len(rows), size if size > 1 else 13):
            end = min(at + size, len(rows))
            call = Call(layer, group, window, rows[at:end], n_threads, queries[at:end].copy())
            split |= call.splits(kernels)
            np.testing.assert_array_equal(call.run(kernels).view(np.int32), expected[at:end].view(np.int32))
    assert split


@pytest.mark.parametrize("name", ISAS)
def test_a_later_key_does_not_reach_earlier_queries(name):
    """Not even if it is infinite or NaN, and they are computed together."""
    layer, rows = Layer(2, 64, 256, [140]), rows_of(0, 124, 140)
    expected = Call(layer, 3, 0, rows).run(bound(name))
    for bad in (np.inf, np.nan):
        layer.k[0][137], layer.v[0][137] = bad, bad
        layer._fill(0)
        out = Call(layer, 3, 0, rows).run(bound(name))
        np.testing.assert_array_equal(out[:13].view(np.int32), expected[:13].view(np.int32))
        assert not np.isfinite(out[13:]).any()


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("head_dim", [8, 12, 64])
def test_append_writes_the_layout(name, head_dim):
    layer, kernels = Layer(2, head_dim, 128, [200]), bound(name)
    written = Layer(2, head_dim, 128, [0])
    keys = written.memory.ctypes.data + 128
    for position in range(200):
        for kv_head in range(2):
            for append, base, source in (
                (kernels.append_key, keys, layer.k),
                (kernels.append_value, keys + 2 * layer.halves, layer.v),
            ):
                row = source[0][position, kv_head]
                append(base, kv_head, head_dim, layer.capacity, position, row.ctypes.data)
    np.testing.assert_array_equal(written.memory, layer.memory)


@pytest.mark.parametrize("name", ISAS[1:])
def test_the_same_bits_on_every_isa(name):
    layer = Layer(1, 80, 384, [300])
    outs = [Call(layer, 4, 200, rows_of(0, 280, 300)).run(bound(which)) for which in (ISAS[0], name)]
    np.testing.assert_array_equal(*(out.view(np.int32) for out in outs))


def test_the_bodies_run_undecorated():
    layer = Layer(1, 12, 256, [140])
    call = Call(layer, 3, 100, rows_of(0, 126, 129), n_threads=2)
    np.testing.assert_allclose(call.run(bodies), call.expected(), rtol=1e-5, atol=3e-6)
