"""Attention's bodies against their definition, and against themselves: the same bits however work is split."""

from types import SimpleNamespace

import fresh
import numpy as np
import pytest
from test_kernels import U

from edgellm import isa
from edgellm.kernels import attention as bodies
from edgellm.kernels import attention_block, attention_q8, compiler, layout
from edgellm.kernels.primitives import quantize_64

pytest.importorskip("numba")

ISAS = isa.runnable()
EXP = 2e-7
"""The relative error of exp; test_isa holds it."""


def bound(name, kv="f16"):
    """The bodies that others call, for an ISA and a kind of cache."""
    kernels, of_caches = compiler(isa.get(name)), (attention_q8 if kv == "q8" else bodies)
    both = {body: kernels.function(getattr(bodies, body)) for body in ("attention_merge", "splits_keys")}
    appends = {body: kernels.function(getattr(of_caches, body), kv) for body in ("append_key", "append_value")}
    return SimpleNamespace(**both, **appends, attention=kernels.function(bodies.attention, kv))


class Layer:
    """One layer's cache in some slots, with keys and values of known positions; NaN where nothing was ever stored."""

    def __init__(self, n_kv_heads, head_dim, capacity, contexts):
        rng = fresh.rng(head_dim, contexts)
        self.n_kv_heads, self.head_dim, self.capacity = n_kv_heads, head_dim, capacity
        n_bytes, self.values = self._sizes()
        self.k, self.v = (
            [rng.standard_normal((n, n_kv_heads, head_dim)).astype(np.float16).astype(np.float32) for n in contexts]
            for _ in "kv"
        )
        # In front of the keys, as another layer would be, something that must not be touched. All ones are NaN.
        self.memory = np.full((len(contexts), 128 + n_bytes + bodies.SLACK_BYTES), 255, np.uint8)
        for slot in range(len(contexts)):
            self._fill(slot)

    def _sizes(self):
        """Bytes of keys and values, and where values begin."""
        half = 2 * self.n_kv_heads * self.capacity * self.head_dim
        return 2 * half, half

    def _fill(self, slot):
        k, v = np.split(self.memory[slot, 128 : 128 + 2 * self.values].view(np.float16), 2)
        k = k.reshape(self.n_kv_heads, self.capacity // 16, self.head_dim, 16)
        v = v.reshape(self.n_kv_heads, self.capacity, self.head_dim)
        for position in range(max(0, len(self.k[slot]) - self.capacity), len(self.k[slot])):
            at = position % self.capacity
            k[:, at // 16, :, at % 16], v[:, at] = self.k[slot][position], self.v[slot][position]

    def stored(self, slot, begin, end):
        """What the cache has of some positions: keys and values, float64 (positions, n_kv_heads, head_dim)."""
        return (x[slot][begin:end].astype(np.float64) for x in (self.k, self.v))

    def query(self, q):
        """What keys are multiplied with."""
        return q.astype(np.float64)


class LayerOfCodes(Layer):
    """The same of int8, written down as kernels.layout has it."""

    def _sizes(self):
        width, groups = -(-self.head_dim // 16) * 16, -(-self.head_dim // 32)
        self.block = np.dtype([
            ("k", np.uint8, (8, width // 4, 16, 4)), ("k_scales", np.float16, (groups, 128)),
            ("v", np.int8, (128, width)), ("v_scales", np.float16, 128),
        ])  # fmt: skip
        n_bytes = self.n_kv_heads * self.capacity // 128 * self.block.itemsize
        return n_bytes, self.block.fields["v"][1]

    def _fill(self, slot):
        width, n_bytes = self.block["v"].shape[1], self._sizes()[0]
        blocks = self.memory[slot, 128 : 128 + n_bytes].view(self.block).reshape(self.n_kv_heads, -1)
        k, v, k_scales, v_scales = self._codes(slot, 0, len(self.k[slot]))
        pad = [(0, 0), (0, 0), (0, width - self.head_dim)]
        k, v = (np.pad(codes, pad) for codes in (k, v))
        for position in range(max(0, len(k) - self.capacity), len(k)):
            for head, block in enumerate(blocks[:, position % self.capacity // 128]):
                at = position % 128
                block["k"][at // 16, :, at % 16] = k[position, head].reshape(-1, 4) + 128
                block["k_scales"][:, at], block["v_scales"][at] = k_scales[position, head], v_scales[position, head]
                block["v"][at] = v[position, head]

    def _codes(self, slot, begin, end):
        """Codes of keys and of values, scales of keys for each 32 dimensions, and of values."""
        k, v = (x[slot][begin:end] for x in (self.k, self.v))
        starts = range(0, self.head_dim, 32)
        with np.errstate(invalid="ignore", divide="ignore"):  # what is divided by 0 becomes 0
            k_scales = np.stack([np.abs(k[..., d : d + 32]).max(-1) / np.float32(127) for d in starts], -1)
            k_scales, v_scales = (x.astype(np.float16) for x in (k_scales, np.abs(v).max(-1) / np.float32(127)))
            k = k / np.repeat(k_scales.astype(np.float32), 32, axis=-1)[..., : self.head_dim]
            v = v / v_scales.astype(np.float32)[..., None]
            codes = (np.where(np.isfinite(x), np.clip(np.rint(x), -127, 127), 0).astype(int) for x in (k, v))
        return *codes, k_scales, v_scales

    def stored(self, slot, begin, end):
        k, v, k_scales, v_scales = self._codes(slot, begin, end)
        per_dim = np.repeat(k_scales.astype(np.float64), 32, axis=-1)[..., : self.head_dim]
        return k * per_dim, v * v_scales.astype(np.float64)[..., None]

    def query(self, q):
        """As int8 with a scale for 16."""
        q = q.reshape(-1, self.head_dim)
        padded = np.pad(q, [(0, 0), (0, -self.head_dim % 64)]).reshape(-1, 64)
        made = np.zeros((len(padded), 120), np.uint8)
        for source, target in zip(padded, made, strict=True):
            quantize_64(source.ctypes.data, target.ctypes.data)
        codes, scales = made[:, :64].view(np.int8), made[:, 64:80].copy().view(np.float32).astype(np.float64)
        return (codes * np.repeat(scales, 16, axis=1)).reshape(len(q), -1)[:, : self.head_dim].copy()


LAYERS = {"f16": Layer, "q8": LayerOfCodes}
caches = pytest.mark.parametrize("kv", LAYERS)


class Call:
    """A record and a step for attention over rows (slot, position)."""

    def __init__(self, layer, group, window, rows, n_threads=1, queries=None):
        n_heads = layer.n_kv_heads * group
        self.layer, self.window, self.n_threads = layer, window, n_threads
        self.slots, self.positions = (np.array(column, np.int32) for column in zip(*rows, strict=True))
        shape = len(rows), n_heads * layer.head_dim
        self.queries = fresh.rng("queries").standard_normal(shape, np.float32) if queries is None else queries
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
            "CAPACITY": layer.capacity, "KV_OFFSET": 128, "V_OFFSET": 128 + layer.values,
        }.items():  # fmt: skip
            self.record[getattr(layout, name) // 8] = value
        self.record[layout.SCALE // 8 :].view(np.float32)[0] = self.scale
        self.step[layout.STEP_ROWS // 8] = len(rows)
        for at, array in ((layout.STEP_POSITIONS, self.positions), (layout.STEP_SLOTS, self.slots)):
            self.step[at // 8] = array.ctypes.data
        self.step[layout.STEP_CACHES // 8] = self.caches.ctypes.data
        self.arrivals = np.zeros((n_threads, layout.ARRIVAL_BYTES // 8), np.int64)
        self.step[layout.STEP_ARRIVALS // 8] = self.arrivals.ctypes.data

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

    def definition(self):
        """Each row in float64, and how far off a kernel may be: both as `queries`."""
        results = []
        for row, (slot, position) in enumerate(zip(self.slots, self.positions, strict=True)):
            begin = max(0, position - self.window + 1) if self.window else 0
            k, v = (x.swapaxes(0, 1) for x in self.layer.stored(slot, begin, position + 1))
            q = self.layer.query(self.queries[row]).reshape(self.layer.n_kv_heads, -1, self.layer.head_dim)
            results.append([attend_1(*head, begin, float(self.scale)) for head in zip(q, k, v, strict=True)])
        exact, off = np.array(results).transpose(2, 0, 1, 3, 4)
        return exact.reshape(self.queries.shape), off.reshape(self.queries.shape)


def attend_1(q, k, v, first, scale):
    """q (group, head_dim) over keys and values (keys, head_dim) from position `first` on: the result in float64, and a
    bound of what roundings make of it; see test_kernels.

    Of a score: those of its partial sums, its own, and its distance from the peak, in parts; of a weight: exp's at its
    key and at each merge of blocks. Of sums: of the partial ones, in each block and then at each merge.
    """
    partial = (q[:, None] * k).cumsum(2)
    scores = partial[..., -1] * scale
    peak = scores.max(1, keepdims=True)
    weights = np.exp(scores - peak)
    blocks = np.arange(first, first + len(k)) // layout.KEY_BLOCK
    merges = blocks[-1] - blocks[0] + 1
    relative = U * (np.abs(partial).sum(2) * scale + np.abs(scores) + np.abs(scores - peak)) + (1 + merges) * EXP
    terms = weights[..., None] * v
    slips = (relative[..., None] + 3 * merges * U) * np.abs(terms)
    in_blocks = [np.abs(terms[:, blocks == block].cumsum(1)).sum(1) for block in np.unique(blocks)]
    total, off = weights.sum(1)[:, None], slips.sum(1) + U * np.sum(in_blocks, axis=0)
    total_off = ((relative + (12 + 3 * merges) * U) * weights).sum(1)[:, None]  # 8 vectors of a block, and a fold
    exact = terms.sum(1) / total
    return exact, (off + np.abs(exact) * total_off) / total + U * np.abs(exact)


def rows_of(slot, first, end):
    return [(slot, position) for position in range(first, end)]


@pytest.mark.parametrize(("kv", "head_dim", "group", "window"), [
    *(("f16", *case) for case in (
        (2, 2, 0), (8, 1, 0), (8, 8, 200), (12, 3, 5), (40, 16, 127), (64, 3, 0), (64, 4, 200), (64, 1, 5),
        (64, 7, 128), (80, 4, 0), (96, 8, 0), (100, 5, 129), (128, 1, 200), (128, 4, 0), (128, 9, 0), (256, 3, 5),
        (256, 1, 0),
    )),
    *(("q8", *case) for case in (
        (2, 2, 0), (8, 8, 200), (12, 3, 5), (40, 16, 127), (64, 3, 0), (64, 1, 5), (80, 4, 0), (100, 5, 129),
        (128, 1, 200), (128, 9, 0), (256, 3, 5),
    )),
])  # fmt: skip
def test_equals_the_definition(kv, head_dim, group, window):
    """On the best ISA; the others have the same bits."""
    contexts = [700, 131, 17, 1, 2, 126, 127, 128, 129, 130, 255, 256, 257, 384, 385, 16, 15, 500]
    layer = LAYERS[kv](2, head_dim, 768, contexts)
    steps = [
        rows_of(0, 0, 140),
        rows_of(0, 699, 700),
        rows_of(1, 128, 129),
        rows_of(0, 680, 700) + rows_of(2, 0, 17) + rows_of(1, 125, 131),
        rows_of(2, 16, 17) + rows_of(1, 130, 131) + rows_of(0, 640, 641),
        [(slot, length - 1) for slot, length in enumerate(contexts)],
    ]
    for n_threads, rows in zip((1, 2, 3, 2, 3, 2), steps, strict=True):
        call = Call(layer, group, window, rows, n_threads)
        found = call.run(bound(ISAS[0], kv)).copy()
        exact, off = call.definition()
        assert (np.abs(found - exact) <= off).all()
        for name in ISAS[1:]:
            np.testing.assert_array_equal(call.run(bound(name, kv)).view(np.int32), found.view(np.int32), err_msg=name)


@pytest.mark.parametrize("change", ["a key left out", "a scale off by a thousandth", "a number of a query by a tenth"])
def test_the_bound_notices(change):
    call = Call(Layer(1, 64, 768, [600]), 4, 0, rows_of(0, 599, 600))
    exact, off = call.definition()
    if change == "a key left out":
        call.record[layout.WINDOW // 8] = 599
    elif change == "a scale off by a thousandth":
        call.record[layout.SCALE // 8 :].view(np.float32)[0] *= 1.001
    else:
        call.queries[:, 5::64] += 0.1
    off_by_head = (np.abs(call.run(bound(ISAS[0])) - exact) > off).reshape(4, 64)
    assert off_by_head.any(1).all()


@pytest.mark.parametrize("name", ISAS)
@caches
@pytest.mark.parametrize(("head_dim", "group", "window"), [(8, 4, 0), (64, 3, 0), (64, 3, 200), (80, 1, 5), (96, 8, 0)])
def test_the_same_bits_however_the_work_is_split(name, kv, head_dim, group, window):
    layer, kernels = LAYERS[kv](2, head_dim, 768, [700, 300, 120]), bound(name, kv)
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
@caches
def test_a_later_key_does_not_reach_earlier_queries(name, kv):
    """Not even if it is infinite or NaN, and they are computed together."""
    layer, rows = LAYERS[kv](2, 64, 256, [140]), rows_of(0, 124, 140)
    expected = Call(layer, 3, 0, rows).run(bound(name, kv))
    for bad in (np.inf, np.nan):
        layer.k[0][137], layer.v[0][137] = bad, bad
        layer._fill(0)
        out = Call(layer, 3, 0, rows).run(bound(name, kv))
        np.testing.assert_array_equal(out[:13].view(np.int32), expected[:13].view(np.int32))
        assert not np.isfinite(out[13:]).any()


@pytest.mark.parametrize("name", ISAS)
@caches
@pytest.mark.parametrize("at", [0, 5, 15, 127, 128, 200, 271])
def test_nan_is_not_hidden(name, kv, at):
    """A key or a value that is NaN shows in every query that sees it: in its one block, and merged with others."""
    for part in "kv":
        layer = LAYERS[kv](1, 64, 384, [272])
        getattr(layer, part)[0][at, 0, 3] = np.nan
        layer._fill(0)
        for n_threads, rows in ((1, rows_of(0, 0, 272)), (3, rows_of(0, 271, 272))):
            out = Call(layer, 3, 0, rows, n_threads).run(bound(name, kv))
            shows = np.isnan(out.reshape(-1, 3, 64)[..., 3]).all(1)
            np.testing.assert_array_equal(shows, [position >= at for _, position in rows])


@pytest.mark.parametrize("name", ISAS)
def test_a_key_that_overflowed_downwards_weighs_nothing(name):
    """Even if it is alone in its block."""
    layer, rows = Layer(1, 64, 256, [129]), rows_of(0, 127, 129)
    layer.k[0][128] = -np.inf
    layer._fill(0)
    queries = np.tile(np.abs(Call(layer, 3, 0, rows).queries[:1]), (2, 1))
    for n_threads in (1, 3):
        before, after = Call(layer, 3, 0, rows, n_threads, queries).run(bound(name))
        assert np.isfinite(before).all()
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("name", ISAS)
@caches
@pytest.mark.parametrize("head_dim", [8, 12, 40, 64, 80])
def test_append_writes_the_layout(name, kv, head_dim):
    """Nothing else; of zeros and of the smallest numbers too."""
    layer, kernels = LAYERS[kv](2, head_dim, 128, [200]), bound(name, kv)
    for x in (layer.k[0], layer.v[0]):
        x[100], x[101] = 0, x[101] * 2.0**-20
        x[101] = x[101].astype(np.float16)
    layer._fill(0)
    written = LAYERS[kv](2, head_dim, 128, [0])
    keys = written.memory.ctypes.data + 128
    for position in range(200):
        for kv_head in range(2):
            for append, base, source in (
                (kernels.append_key, keys, layer.k),
                (kernels.append_value, keys + layer.values, layer.v),
            ):
                row = source[0][position, kv_head]
                append(base, kv_head, head_dim, layer.capacity, position, row.ctypes.data)
    np.testing.assert_array_equal(written.memory, layer.memory)


@caches
@pytest.mark.parametrize("few", [attention_block.FEW, 4])
def test_the_bodies_run_undecorated(kv, few, monkeypatch):
    from edgellm.kernels._numba import stand_ins

    layer = LAYERS[kv](1, 12, 256, [140])
    for name, body in stand_ins(kv).items():
        for module in (bodies, attention_block):
            monkeypatch.setattr(module, name, body, raising=False)
    monkeypatch.setattr(attention_block, "FEW", few)
    call = Call(layer, 3, 100, rows_of(0, 126, 129), n_threads=2)
    exact, off = call.definition()
    assert (np.abs(call.run(bodies) - exact) <= off).all()
