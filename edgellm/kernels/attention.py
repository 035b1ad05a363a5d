"""Attention: softmax(q k^T * scale) v over the float16 cache, a block of KEY_BLOCK keys at a time.

Each query and head meets each block of keys that it sees any of, at absolute multiples of KEY_BLOCK, and gets a partial
    max [16 equal lanes]   sum [16 equal lanes]   acc [head_dim]   float32, acc = sum of exp(score - max) * value
The partials are merged from the first block to the last. A partial depends on its query, keys and values alone, so the
result has the same bits for any number of threads, any chunks of a prompt and any other slots in the step. Blocks that
a query does not see at all are left out.

A vector takes the last dimensions of a head that are no whole 16 together with what stands behind them, and its
further lanes are dropped: a slot's memory must go on for SLACK_BYTES after its last value. In a step, the rows of a
slot stand together and their positions ascend; their keys and values are in the cache before attention runs.
"""

from __future__ import annotations

import numpy as np

from edgellm.kernels.layout import (
    CAPACITY,
    HEAD_DIM,
    KEY_BLOCK,
    KV_OFFSET,
    N_HEADS,
    N_KV_HEADS,
    OUT,
    PARTIALS,
    QUERIES,
    SCALE,
    SOFTCAP,
    SOURCE_STRIDE,
    STEP_CACHES,
    STEP_POSITIONS,
    STEP_ROWS,
    STEP_SLOTS,
    TARGET_STRIDE,
    V_OFFSET,
    WINDOW,
)  # fmt: skip
from edgellm.kernels.prepare import capped
from edgellm.kernels.primitives import (
    add,
    div,
    exp,
    fill,
    first,
    fma,
    get_f32,
    get_i32,
    get_i64,
    lanes_max,
    lanes_sum,
    load_f16,
    load_f32,
    maximum,
    mul,
    prefetch,
    set_f16,
    set_f32,
    set_i64,
    splat_f32,
    store_f32,
    sub,
    zero,
)  # fmt: skip

SLACK_BYTES = 32
QUERIES_AT_ONCE = 4  # that share loads of keys and values; of 16 lanes each, their sums fit into the registers of AVX2
TASK_QUERIES = 16  # that meet a block of keys while it is in the CPU's nearest cache
HIDDEN, LOWEST = np.float32(-np.inf), np.float32(-3e38)  # a maximum starts from a number: -inf less -inf is NaN
START: int = np.int64(0)  # for a literal 0, Numba would compile what it is passed to once more

# What a thread keeps of a query while it works on a task: cells, its scores in a block, its state and partial.
QUERY, SEES_FROM, SEES_TO, PARTIAL, RESULT, SCORES = 0, 8, 16, 24, 32, 64
STATE = SCORES + 4 * KEY_BLOCK
SUM, ACC = 64, 128  # of a state or partial


def n_partial_floats(rows: int, n_heads: int, head_dim: int, capacity: int, n_threads: int) -> int:
    """The size of PARTIALS for steps of up to `rows` rows and up to `n_threads` threads."""
    partial = ACC + 4 * -(-head_dim // 16) * 16
    per_thread = TASK_QUERIES * (STATE + 2 * partial)
    queries = min(rows * n_heads, 2 * n_threads * TASK_QUERIES)
    return (n_threads * per_thread + queries * (capacity // KEY_BLOCK + 1) * partial) // 4


def partial_bytes(head_dim: int) -> int:
    return ACC + 4 * ((head_dim + 15) // 16 * 16)


def query_bytes(head_dim: int) -> int:
    return STATE + 2 * partial_bytes(head_dim)


def partials_of(record: int, query: int, n_threads: int) -> int:
    """Where the partials of a query are in PARTIALS when keys are split: after what the threads keep there."""
    head_dim = get_i64(record + HEAD_DIM)
    blocks = get_i64(record + CAPACITY) // KEY_BLOCK + 1
    start = get_i64(record + PARTIALS) + n_threads * TASK_QUERIES * query_bytes(head_dim)
    return start + query * blocks * partial_bytes(head_dim)


# Which keys a query sees, and which queries are taken together.


def position_of(step: int, row: int) -> int:
    return int(get_i32(get_i64(step + STEP_POSITIONS) + 4 * row))


def sees_from(record: int, position: int) -> int:
    window = get_i64(record + WINDOW)
    return max(0, position - window + 1) if window > 0 else 0


def first_block(record: int, step: int, row: int) -> int:
    return sees_from(record, position_of(step, row)) // KEY_BLOCK


def end_block(step: int, row: int) -> int:
    return position_of(step, row) // KEY_BLOCK + 1


def rows_of_slot(step: int, row: int) -> int:
    """How many rows from this one on belong to the same slot."""
    slots = get_i64(step + STEP_SLOTS)
    end = row + 1
    while end < get_i64(step + STEP_ROWS) and get_i32(slots + 4 * end) == get_i32(slots + 4 * row):
        end += 1
    return end - row


def splits_keys(record: int, step: int, n_threads: int) -> bool:
    """Whether there are too few tasks for the threads, but enough blocks of keys: then the threads share those."""
    group = get_i64(record + N_HEADS) // get_i64(record + N_KV_HEADS)
    row = tasks = START
    several_blocks = False
    while row < get_i64(step + STEP_ROWS):
        n_rows = rows_of_slot(step, row)
        tasks += get_i64(record + N_KV_HEADS) * ((n_rows * group + TASK_QUERIES - 1) // TASK_QUERIES)
        row += n_rows
        several_blocks |= end_block(step, row - 1) - first_block(record, step, row - 1) > 1
    return n_threads > 1 and tasks < 2 * n_threads and several_blocks


# One block of keys.


def score_4(keys: int, ahead: int, head_dim: int, query: int, stride: int, scores: int) -> None:
    """q . k of four queries, `stride` bytes apart in what the thread keeps, with 16 keys: [head_dim][16].

    Meanwhile the same keys of the next block come closer, `ahead` bytes from here: the CPU's own prefetching stops at
    each page, and a block takes long enough that memory need never be waited for.
    """
    q0, q1 = get_i64(query), get_i64(query + stride)
    q2, q3 = get_i64(query + 2 * stride), get_i64(query + 3 * stride)
    s0, s1, s2, s3 = zero(), zero(), zero(), zero()
    for d in range(head_dim):
        k = load_f16(keys + 32 * d)
        prefetch(keys + ahead + 32 * d)
        s0 = fma(k, splat_f32(q0 + 4 * d), s0)
        s1 = fma(k, splat_f32(q1 + 4 * d), s1)
        s2 = fma(k, splat_f32(q2 + 4 * d), s2)
        s3 = fma(k, splat_f32(q3 + 4 * d), s3)
    store_f32(scores, s0)
    store_f32(scores + stride, s1)
    store_f32(scores + 2 * stride, s2)
    store_f32(scores + 3 * stride, s3)


def score_1(keys: int, ahead: int, head_dim: int, query: int, scores: int) -> None:
    """As score_4, the same bits, for one query."""
    q = get_i64(query)
    s = zero()
    for d in range(head_dim):
        prefetch(keys + ahead + 32 * d)
        s = fma(load_f16(keys + 32 * d), splat_f32(q + 4 * d), s)
    store_f32(scores, s)


def weigh_4(values: int, ahead: int, head_dim: int, begin: int, end: int, query: int, stride: int) -> None:
    """Add weight * value for keys begin..end of a block to the partials of four queries.

    Each pass over the keys fetches its share of the next block, as much as it takes of this one.
    """
    weights = query + SCORES
    a0, a1 = get_i64(query + PARTIAL) + ACC, get_i64(query + stride + PARTIAL) + ACC
    a2, a3 = get_i64(query + 2 * stride + PARTIAL) + ACC, get_i64(query + 3 * stride + PARTIAL) + ACC
    for d in range(0, head_dim, 16):
        s0, s1 = load_f32(a0 + 4 * d), load_f32(a1 + 4 * d)
        s2, s3 = load_f32(a2 + 4 * d), load_f32(a3 + 4 * d)
        for key in range(begin, end):
            v = load_f16(values + 2 * (key * head_dim + d))
            prefetch(values + ahead + 2 * KEY_BLOCK * d + 32 * key)
            weight = weights + 4 * key
            s0 = fma(v, splat_f32(weight), s0)
            s1 = fma(v, splat_f32(weight + stride), s1)
            s2 = fma(v, splat_f32(weight + 2 * stride), s2)
            s3 = fma(v, splat_f32(weight + 3 * stride), s3)
        store_f32(a0 + 4 * d, s0)
        store_f32(a1 + 4 * d, s1)
        store_f32(a2 + 4 * d, s2)
        store_f32(a3 + 4 * d, s3)


def weigh_1(values: int, ahead: int, head_dim: int, begin: int, end: int, query: int) -> None:
    """As weigh_4, the same bits, for one query."""
    weights, acc = query + SCORES, get_i64(query + PARTIAL) + ACC
    for d in range(0, head_dim, 16):
        s = load_f32(acc + 4 * d)
        for key in range(begin, end):
            prefetch(values + ahead + 2 * KEY_BLOCK * d + 32 * key)
            s = fma(load_f16(values + 2 * (key * head_dim + d)), splat_f32(weights + 4 * key), s)
        store_f32(acc + 4 * d, s)


def softmax(query: int, begin: int, end: int, scale: float, softcap: float, head_dim: int) -> None:
    """Turn the scores of keys begin..end of a block into weights, and start the partial with their max and sum."""
    partial, scores, hidden = get_i64(query + PARTIAL), query + SCORES, fill(HIDDEN)
    highest = fill(LOWEST)
    for key in range(begin // 16 * 16, end, 16):
        x = capped(mul(load_f32(scores + 4 * key), fill(scale)), softcap)
        # What stands beyond the keys that are seen may be anything, NaN too.
        x = first(begin - key, hidden, first(end - key, x, hidden))
        store_f32(scores + 4 * key, x)
        highest = maximum(highest, x)
    peak, total = fill(lanes_max(highest)), zero()
    for key in range(begin // 16 * 16, end, 16):
        weight = exp(sub(load_f32(scores + 4 * key), peak))
        store_f32(scores + 4 * key, weight)
        total = add(total, weight)
    store_f32(partial, peak)
    store_f32(partial + SUM, fill(lanes_sum(total)))
    for d in range(0, head_dim, 16):
        store_f32(partial + ACC + 4 * d, zero())


def attend_1(
    query: int, block: int, keys: int, values: int, ahead: int, head_dim: int, scale: float, softcap: float
) -> None:
    """The partial of one query for a block of keys."""
    begin, end = seen_in(query, block), end_in(query, block)
    if begin < end:
        for key in range(begin // 16 * 16, end, 16):
            score_1(keys + 2 * key * head_dim, ahead, head_dim, query, query + SCORES + 4 * key)
        softmax(query, begin, end, scale, softcap, head_dim)
        weigh_1(values, ahead, head_dim, begin, end, query)


def seen_in(query: int, block: int) -> int:
    """The first key of a block that a query sees, 0..KEY_BLOCK."""
    return min(max(get_i64(query + SEES_FROM) - block * KEY_BLOCK, 0), KEY_BLOCK)


def end_in(query: int, block: int) -> int:
    """One after the last key of a block that a query sees."""
    return min(max(get_i64(query + SEES_TO) - block * KEY_BLOCK, 0), KEY_BLOCK)


def attend_4(
    query: int, stride: int, n: int, block: int, keys: int, values: int, ahead: int, head_dim: int, scale: float,
    softcap: float,
) -> None:  # fmt: skip
    """The partials of n <= 4 queries of ascending positions for a block of keys."""
    last = query + (n - 1) * stride
    begin, end = seen_in(query, block), end_in(last, block)
    # The keys that all of them see. Others are added to just those that see them: a weight of 0 times infinity is NaN.
    shared = seen_in(last, block)
    shared_end = max(shared, end_in(query, block))
    for key in range(begin // 16 * 16, end, 16):
        score_4(keys + 2 * key * head_dim, ahead, head_dim, query, stride, query + SCORES + 4 * key)
    for i in range(n):
        one = query + i * stride
        own, own_end = seen_in(one, block), end_in(one, block)
        if own < own_end:
            softmax(one, own, own_end, scale, softcap, head_dim)
            weigh_1(values, ahead, head_dim, own, min(shared, own_end), one)
    if shared < shared_end:
        weigh_4(values, ahead, head_dim, shared, shared_end, query, stride)
    for i in range(n):
        one = query + i * stride
        weigh_1(values, ahead, head_dim, shared_end, end_in(one, block), one)


# Merging.


def start_merge(state: int, head_dim: int) -> None:
    store_f32(state, fill(LOWEST))
    store_f32(state + SUM, zero())
    for d in range(0, head_dim, 16):
        store_f32(state + ACC + 4 * d, zero())


def merge(state: int, partial: int, head_dim: int) -> None:
    """Add a block's partial to a state: both sums become relative to the higher maximum."""
    peak = maximum(load_f32(state), load_f32(partial))
    old, new = exp(sub(load_f32(state), peak)), exp(sub(load_f32(partial), peak))
    store_f32(state, peak)
    for at in range(SUM, ACC + 4 * head_dim, 64):
        store_f32(state + at, fma(load_f32(state + at), old, mul(load_f32(partial + at), new)))


def finish_merge(state: int, result: int, head_dim: int) -> None:
    """Write acc / sum as head_dim float32."""
    total = load_f32(state + SUM)
    for d in range(0, head_dim, 16):
        y = div(load_f32(state + ACC + 4 * d), total)
        if d + 16 <= head_dim:
            store_f32(result + 4 * d, y)
        else:  # behind the last dimensions stands another thread's head
            store_f32(state + ACC, y)
            for i in range(head_dim - d):
                set_f32(result + 4 * (d + i), get_f32(state + ACC + 4 * i))


# Tasks.


def attend_task(
    record: int, step: int, kept: int, row: int, kv_head: int, begin: int, end: int,
    block: int, block_end: int, n_threads: int, split: bool,
) -> None:  # fmt: skip
    """Some blocks of keys for queries begin..end (row from `row` on * group + head) of a key/value head.

    Queries stand in `kept`, padded to four with copies of the last one.
    """
    head_dim, scale, softcap = get_i64(record + HEAD_DIM), get_f32(record + SCALE), get_f32(record + SOFTCAP)
    n = end - begin
    padded = 1 if n == 1 else (n + QUERIES_AT_ONCE - 1) // QUERIES_AT_ONCE * QUERIES_AT_ONCE
    stride = query_bytes(head_dim)
    for i in range(padded):
        keep_query(record, step, kept + i * stride, row, kv_head, min(begin + i, end - 1))
    while block < block_end:
        keys, values = block_address(record, step, row, kv_head, block)
        ahead = next_block(record, step, row, kv_head, block, block_end) - keys
        if split:
            for i in range(n):
                aim_partial(record, step, kept + i * stride, row, kv_head, begin + i, block, n_threads)
        if padded == 1:
            attend_1(kept, block, keys, values, ahead, head_dim, scale, softcap)
        else:
            for i in range(0, padded, QUERIES_AT_ONCE):
                four = min(n - i, QUERIES_AT_ONCE)
                attend_4(kept + i * stride, stride, four, block, keys, values, ahead, head_dim, scale, softcap)
        if not split:
            for i in range(n):
                query = kept + i * stride
                if seen_in(query, block) < end_in(query, block):
                    merge(query + STATE, get_i64(query + PARTIAL), head_dim)
        block += 1
    if not split:
        for i in range(n):
            finish_merge(kept + i * stride + STATE, get_i64(kept + i * stride + RESULT), head_dim)


def keep_query(record: int, step: int, query: int, row: int, kv_head: int, index: int) -> None:
    """Prepare what the thread keeps of a query: where it is, what it sees, an empty state."""
    head_dim, group = get_i64(record + HEAD_DIM), get_i64(record + N_HEADS) // get_i64(record + N_KV_HEADS)
    row = row + index // group
    at = 4 * head_dim * (kv_head * group + index % group)
    position = position_of(step, row)
    set_i64(query + QUERY, get_i64(record + QUERIES) + row * get_i64(record + SOURCE_STRIDE) + at)
    set_i64(query + RESULT, get_i64(record + OUT) + row * get_i64(record + TARGET_STRIDE) + at)
    set_i64(query + SEES_FROM, sees_from(record, position))
    set_i64(query + SEES_TO, position + 1)
    set_i64(query + PARTIAL, query + STATE + partial_bytes(head_dim))
    start_merge(query + STATE, head_dim)


def aim_partial(
    record: int, step: int, query: int, row: int, kv_head: int, index: int, block: int, n_threads: int
) -> None:
    """Let a query's partial for a block go where attention_merge finds it."""
    head_dim, group = get_i64(record + HEAD_DIM), get_i64(record + N_HEADS) // get_i64(record + N_KV_HEADS)
    row = row + index // group
    if first_block(record, step, row) <= block < end_block(step, row):
        head = row * get_i64(record + N_HEADS) + kv_head * group + index % group
        number = block - first_block(record, step, row)
        set_i64(query + PARTIAL, partials_of(record, head, n_threads) + number * partial_bytes(head_dim))


def block_address(record: int, step: int, row: int, kv_head: int, block: int) -> tuple[int, int]:
    """Addresses of a block's keys and values of a key/value head, in the memory of a row's slot."""
    head_dim, capacity = get_i64(record + HEAD_DIM), get_i64(record + CAPACITY)
    slot = int(get_i32(get_i64(step + STEP_SLOTS) + 4 * row))
    cache = get_i64(get_i64(step + STEP_CACHES) + 8 * slot)
    at = cache + 2 * head_dim * (kv_head * capacity + block * KEY_BLOCK % capacity)
    return at + get_i64(record + KV_OFFSET), at + get_i64(record + V_OFFSET)


def next_block(record: int, step: int, row: int, kv_head: int, block: int, block_end: int) -> int:
    """Where the keys begin that are needed after those of a block: in decode, the next head's follow a head's last."""
    if block + 1 == block_end:
        kv_head = min(kv_head + 1, get_i64(record + N_KV_HEADS) - 1)
        block = first_block(record, step, row) - 1
    return block_address(record, step, row, kv_head, block + 1)[0]


# Ops.


def attention(record: int, step: int, thread: int, n_threads: int) -> None:
    """Attend all rows of a step: OUT is final, or if splits_keys(record, step, n_threads), once attention_merge ran."""
    rows, n_kv_heads = get_i64(step + STEP_ROWS), get_i64(record + N_KV_HEADS)
    group = get_i64(record + N_HEADS) // n_kv_heads
    kept = get_i64(record + PARTIALS) + thread * TASK_QUERIES * query_bytes(get_i64(record + HEAD_DIM))
    split = splits_keys(record, step, n_threads)
    units = n_units(record, step) if split else 0
    first_unit, end_unit = units * thread // n_threads, units * (thread + 1) // n_threads
    row = task = unit = START
    while row < rows:
        n_rows = rows_of_slot(step, row)
        for kv_head in range(n_kv_heads):
            for begin in range(0, n_rows * group, TASK_QUERIES):
                end = min(begin + TASK_QUERIES, n_rows * group)
                block = start = first_block(record, step, row + begin // group)
                block_end = end_block(step, row + (end - 1) // group)
                if split:  # runs of blocks, so that a thread reads on where it is
                    unit_end = unit + block_end - start
                    block, block_end = max(start, start + first_unit - unit), min(block_end, start + end_unit - unit)
                    unit = unit_end
                elif task % n_threads != thread:  # in turn, as later rows see more
                    block_end = block
                if block < block_end:
                    attend_task(record, step, kept, row, kv_head, begin, end, block, block_end, n_threads, split)
                task += 1
        row += n_rows


def n_units(record: int, step: int) -> int:
    """Blocks of keys, summed over the tasks of a step."""
    n_kv_heads = get_i64(record + N_KV_HEADS)
    group = get_i64(record + N_HEADS) // n_kv_heads
    row = units = START
    while row < get_i64(step + STEP_ROWS):
        n_rows = rows_of_slot(step, row)
        for begin in range(0, n_rows * group, TASK_QUERIES):
            end = min(begin + TASK_QUERIES, n_rows * group)
            blocks = end_block(step, row + (end - 1) // group) - first_block(record, step, row + begin // group)
            units += n_kv_heads * blocks
        row += n_rows
    return units


def merge_heads(record: int, step: int, thread: int, n_threads: int, begin: int, end: int) -> None:
    """Merge the partials of heads begin..end, counted as row * n_heads + head, into OUT. Only if splits_keys."""
    head_dim, n_heads = get_i64(record + HEAD_DIM), get_i64(record + N_HEADS)
    state = get_i64(record + PARTIALS) + thread * TASK_QUERIES * query_bytes(head_dim) + STATE
    for head in range(begin, end):
        row = head // n_heads
        partial = partials_of(record, head, n_threads)
        start_merge(state, head_dim)
        for _ in range(end_block(step, row) - first_block(record, step, row)):
            merge(state, partial, head_dim)
            partial += partial_bytes(head_dim)
        out = get_i64(record + OUT) + row * get_i64(record + TARGET_STRIDE)
        finish_merge(state, out + 4 * head_dim * (head % n_heads), head_dim)


def attention_merge(record: int, step: int, thread: int, n_threads: int) -> None:
    """After attention and a barrier: write what attention left in partials, if it did."""
    if splits_keys(record, step, n_threads):
        heads = get_i64(step + STEP_ROWS) * get_i64(record + N_HEADS)
        merge_heads(record, step, thread, n_threads, heads * thread // n_threads, heads * (thread + 1) // n_threads)


# The cache.


def append_key(keys: int, kv_head: int, head_dim: int, capacity: int, position: int, source: int) -> None:
    """Store head_dim float32 as a key of a layer's keys, which start at `keys`."""
    at = position % capacity
    target = keys + 2 * (head_dim * (kv_head * capacity + at // 16 * 16) + at % 16)
    for d in range(head_dim):
        set_f16(target + 32 * d, get_f32(source + 4 * d))


def append_value(values: int, kv_head: int, head_dim: int, capacity: int, position: int, source: int) -> None:
    target = values + 2 * head_dim * (kv_head * capacity + position % capacity)
    for d in range(head_dim):
        set_f16(target + 2 * d, get_f32(source + 4 * d))
