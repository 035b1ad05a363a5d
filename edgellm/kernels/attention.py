"""Attention: softmax(q k^T * scale) v over the cache, a block of KEY_BLOCK keys at a time.

Each query and head meets each block of keys that it sees any of, at absolute multiples of KEY_BLOCK, and gets a partial
    max [16 equal lanes]   sum [16 equal lanes]   acc [head_dim]   float32, acc = sum of 2^(score - max) * value
where scores are exponents of 2: those of e, times log2(e). The partials are merged from the first block to the last. A
partial depends on its query, keys and values alone, so the result has the same bits for any number of threads, any
chunks of a prompt and any other slots in the step. Blocks that a query does not see at all are left out.

A vector takes the last dimensions of a head that are no whole 16 together with what stands behind them, and its
further lanes are dropped: a slot's memory must go on for SLACK_BYTES after its last value. In a step, the rows of a
slot stand together and their positions ascend; their keys and values are in the cache before attention runs.

What is said here of keys and values is of float16. For a cache of another kind, the functions of attention_KIND.py take
the place of those here and in attention_block.py that have their names: see Kernel.
"""

from __future__ import annotations

from edgellm.kernels.attention_block import (
    ACC,
    LOWEST,
    MADE,
    MOST_PIECE,
    MOST_QUERIES,
    RESULT,
    SEES_FROM,
    SEES_TO,
    START,
    SUM,
    all_seen,
    make_partials,
    partial_bytes,
    query_at,
    query_bytes,
    seen,
    state_at,
    task_queries,
)  # fmt: skip
from edgellm.kernels.fetch import fetch_more, fetching
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
from edgellm.kernels.primitives import (
    div,
    exp2,
    fill,
    fma,
    get_f32,
    get_i32,
    get_i64,
    load_f32,
    maximum,
    mul,
    scatter_f16,
    set_f16,
    set_f32,
    set_i64,
    store_f16,
    store_f32,
    sub,
    zero,
)  # fmt: skip

SLACK_BYTES = 128
UNIT = 8  # queries: work is shared in these


def n_partial_floats(rows: int, n_heads: int, head_dim: int, capacity: int, n_threads: int) -> int:
    """The size of PARTIALS for steps of up to `rows` rows and up to `n_threads` threads."""
    queries = min(rows * n_heads, 2 * n_threads * UNIT)
    of_queries = queries * (capacity // KEY_BLOCK + 1) * partial_bytes(head_dim)
    return (n_threads * kept_bytes(head_dim) + of_queries) // 4


def kept_bytes(head_dim: int) -> int:
    """What a thread keeps: its task's queries, and room for a piece of keys, or of values."""
    return MOST_QUERIES * query_bytes(head_dim) + 4 * MOST_PIECE * max(head_dim, KEY_BLOCK)


def block_bytes(head_dim: int) -> int:
    """Between a head's blocks of keys, and between those of values."""
    return 2 * KEY_BLOCK * head_dim


def partials_of(record: int, query: int, n_threads: int) -> int:
    """Where the partials of a query are in PARTIALS when keys are split: after what the threads keep there."""
    head_dim = get_i64(record + HEAD_DIM)
    blocks = get_i64(record + CAPACITY) // KEY_BLOCK + 1
    start = get_i64(record + PARTIALS) + n_threads * kept_bytes(head_dim)
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
        tasks += get_i64(record + N_KV_HEADS) * ((n_rows * group + UNIT - 1) // UNIT)
        row += n_rows
        several_blocks |= end_block(step, row - 1) - first_block(record, step, row - 1) > 1
    return n_threads > 1 and tasks < 2 * n_threads and several_blocks


# Merging.


def start_merge(state: int, head_dim: int) -> None:
    store_f32(state, fill(LOWEST))
    store_f32(state + SUM, zero())
    for d in range(0, head_dim, 16):
        store_f32(state + ACC + 4 * d, zero())


def merge(state: int, partial: int, head_dim: int) -> None:
    """Add a block's partial to a state: both sums become relative to the higher maximum."""
    peak = maximum(load_f32(state), load_f32(partial))
    old, new = exp2(sub(load_f32(state), peak)), exp2(sub(load_f32(partial), peak))
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
    record: int, step: int, thread: int, n_threads: int, kept: int, row: int, kv_head: int, next_head: int, begin: int,
    end: int, block: int, block_end: int, split: bool,
) -> None:  # fmt: skip
    """Some blocks of keys for queries begin..end (row from `row` on * group + head) of a key/value head.

    Queries stand in `kept`, padded to four with copies of the last one, and behind them is room for a piece.
    """
    head_dim, scale, softcap = get_i64(record + HEAD_DIM), get_f32(record + SCALE), get_f32(record + SOFTCAP)
    n = end - begin
    padded = 1 if n == 1 else (n + 3) // 4 * 4
    stride, cells = query_bytes(head_dim), fetching(step, thread)
    for i in range(padded):
        fetch_more(cells)
        keep_query(record, step, kept + i * stride, row, kv_head, min(begin + i, end - 1))
    while block < block_end:
        keys, values = block_address(record, step, row, kv_head, block)
        ahead = next_block(record, step, row, kv_head, next_head, block, block_end) - keys
        whole = all_seen(kept, stride, n, block)
        make_partials(
            kept, stride, n, block, keys, values, ahead, head_dim, scale, softcap, whole,
            kept + MOST_QUERIES * stride,
        )  # fmt: skip
        for i in range(n):
            query = kept + i * stride
            if i % UNIT == 0:
                fetch_more(cells)
            own, own_end = seen(query, block, whole)
            if own < own_end:
                if split:
                    keep_partial(record, step, query, row, kv_head, begin + i, block, n_threads)
                else:
                    merge(query + state_at(head_dim), query + MADE, head_dim)
        block += 1
    if not split:
        for i in range(n):
            query = kept + i * stride
            fetch_more(cells)
            finish_merge(query + state_at(head_dim), get_i64(query + RESULT), head_dim)


def keep_query(record: int, step: int, query: int, row: int, kv_head: int, index: int) -> None:
    """Prepare what the thread keeps of a query: itself, what it sees, where its result goes, an empty state."""
    head_dim, group = get_i64(record + HEAD_DIM), get_i64(record + N_HEADS) // get_i64(record + N_KV_HEADS)
    row = row + index // group
    at = 4 * head_dim * (kv_head * group + index % group)
    position = position_of(step, row)
    source = get_i64(record + QUERIES) + row * get_i64(record + SOURCE_STRIDE) + at
    keep_vector(query, source, head_dim)
    set_i64(query + RESULT, get_i64(record + OUT) + row * get_i64(record + TARGET_STRIDE) + at)
    set_i64(query + SEES_FROM, sees_from(record, position))
    set_i64(query + SEES_TO, position + 1)
    start_merge(query + state_at(head_dim), head_dim)


def keep_vector(query: int, source: int, head_dim: int) -> None:
    """Copy what scores are computed from."""
    for d in range(head_dim):
        set_f32(query + query_at(head_dim) + 4 * d, get_f32(source + 4 * d))


def keep_partial(
    record: int, step: int, query: int, row: int, kv_head: int, index: int, block: int, n_threads: int
) -> None:
    """Put a query's partial for a block where attention_merge finds it."""
    head_dim, group = get_i64(record + HEAD_DIM), get_i64(record + N_HEADS) // get_i64(record + N_KV_HEADS)
    row = row + index // group
    head = row * get_i64(record + N_HEADS) + kv_head * group + index % group
    number = block - first_block(record, step, row)
    target = partials_of(record, head, n_threads) + number * partial_bytes(head_dim)
    for at in range(0, ACC + 4 * head_dim, 64):
        store_f32(target + at, load_f32(query + MADE + at))


def block_address(record: int, step: int, row: int, kv_head: int, block: int) -> tuple[int, int]:
    """Addresses of a block's keys and values of a key/value head, in the memory of a row's slot."""
    head_dim, capacity = get_i64(record + HEAD_DIM), get_i64(record + CAPACITY)
    slot = int(get_i32(get_i64(step + STEP_SLOTS) + 4 * row))
    cache = get_i64(get_i64(step + STEP_CACHES) + 8 * slot)
    blocks = capacity // KEY_BLOCK
    at = cache + (kv_head * blocks + block % blocks) * block_bytes(head_dim)
    return at + get_i64(record + KV_OFFSET), at + get_i64(record + V_OFFSET)


def next_block(record: int, step: int, row: int, kv_head: int, next_head: int, block: int, block_end: int) -> int:
    """Where the keys begin that are needed after those of a block: in decode, after a head's last another head's."""
    if block + 1 < block_end:
        return block_address(record, step, row, kv_head, block + 1)[0]
    next_head = min(next_head, get_i64(record + N_KV_HEADS) - 1)
    return block_address(record, step, row, next_head, first_block(record, step, row))[0]


# Ops.


def attention(record: int, step: int, thread: int, n_threads: int) -> None:
    """Attend all rows of a step: OUT is final, or if splits_keys(record, step, n_threads), once attention_merge ran.

    Each thread has a run of units, or of blocks of keys, so that it reads on where it is, and a head's next task what
    is in the core's own cache.
    """
    n_kv_heads = get_i64(record + N_KV_HEADS)
    group = get_i64(record + N_HEADS) // n_kv_heads
    kept = get_i64(record + PARTIALS) + thread * kept_bytes(get_i64(record + HEAD_DIM))
    split = splits_keys(record, step, n_threads)
    all_work = work_of(record, step, split)
    first_work, end_work = all_work * thread // n_threads, all_work * (thread + 1) // n_threads
    row = work = START
    while row < get_i64(step + STEP_ROWS):
        n = rows_of_slot(step, row) * group
        for kv_head in range(n_kv_heads):
            begin = START
            while begin < n:
                block = start = first_block(record, step, row + begin // group)
                if split:
                    end, done = min(begin + UNIT, n), work + unit_work(record, step, row, begin, n, split)
                    block_end = min(start + done - work, start + end_work - work)
                    block = max(start, start + first_work - work)
                else:
                    end, done, whose = task_end(record, step, row, begin, n, work, all_work, n_threads)
                    block_end = end_block(step, row + (end - 1) // group) if whose == thread else start
                if block < block_end:
                    next_head = kv_head + (1 if end == n else 0)
                    attend_task(
                        record, step, thread, n_threads, kept, row, kv_head, next_head, begin, end, block, block_end,
                        split,
                    )  # fmt: skip
                begin, work = end, done
        row += n // group


def task_end(
    record: int, step: int, row: int, begin: int, n: int, work: int, all_work: int, n_threads: int
) -> tuple[int, int, int]:
    """Of the units from query `begin` of n on, as many as one thread computes as a task: their end, the work up to
    there, and the thread."""
    end, whose = begin, -1
    while end < min(begin + task_queries(), n):
        amount = unit_work(record, step, row, end, n, False)
        thread = owner(work, amount, all_work, n_threads)
        if whose >= 0 and thread != whose:
            break
        end, work, whose = min(end + UNIT, n), work + amount, thread
    return end, work, whose


def owner(begin: int, amount: int, all_work: int, n_threads: int) -> int:
    """The thread that does a unit whole: the one whose share of all work its middle is in."""
    return (2 * begin + amount) * n_threads // (2 * all_work)


def unit_work(record: int, step: int, row: int, begin: int, n: int, split: bool) -> int:
    """What threads share of the unit that begins with query `begin` of n: its work, or its blocks of keys."""
    group, end = get_i64(record + N_HEADS) // get_i64(record + N_KV_HEADS), min(begin + UNIT, n)
    blocks = end_block(step, row + (end - 1) // group) - first_block(record, step, row + begin // group)
    return blocks if split else blocks * (end - begin)


def work_of(record: int, step: int, split: bool) -> int:
    """That of all units of a step."""
    n_kv_heads = get_i64(record + N_KV_HEADS)
    group = get_i64(record + N_HEADS) // n_kv_heads
    row = work = START
    while row < get_i64(step + STEP_ROWS):
        n = rows_of_slot(step, row) * group
        for begin in range(0, n, UNIT):
            work += n_kv_heads * unit_work(record, step, row, begin, n, split)
        row += n // group
    return work


def merge_heads(record: int, step: int, thread: int, n_threads: int, begin: int, end: int) -> None:
    """Merge the partials of heads begin..end, counted as row * n_heads + head, into OUT. Only if splits_keys."""
    head_dim, n_heads = get_i64(record + HEAD_DIM), get_i64(record + N_HEADS)
    state = get_i64(record + PARTIALS) + thread * kept_bytes(head_dim) + state_at(head_dim)
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
    whole = head_dim - head_dim % 16
    for d in range(0, whole, 16):
        scatter_f16(target + 32 * d, 32, load_f32(source + 4 * d))
    for d in range(whole, head_dim):
        set_f16(target + 32 * d, get_f32(source + 4 * d))


def append_value(values: int, kv_head: int, head_dim: int, capacity: int, position: int, source: int) -> None:
    target = values + 2 * head_dim * (kv_head * capacity + position % capacity)
    whole = head_dim - head_dim % 16
    for d in range(0, whole, 16):
        store_f16(target + 2 * d, load_f32(source + 4 * d))
    for d in range(whole, head_dim):
        set_f16(target + 2 * d, get_f32(source + 4 * d))
