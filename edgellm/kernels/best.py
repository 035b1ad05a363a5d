"""The head of a model: logits for the wanted rows or, where the step asks for them, only the best token of each.

For the best tokens nothing of the vocabulary's size is written: each thread keeps, for every wanted row, the largest of
its own logits and the token it belongs to, the first of equals. The logits are those that `matmul` writes, bit by bit.
"""

from __future__ import annotations

import math
from typing import Any

from edgellm.kernels.layout import (
    LOGITS_OP,
    ROWS_N,
    STEP_BEST,
    STEP_N_WANTED,
    STEP_SCRATCH,
    STEP_SCRATCH_BYTES,
    VOCAB_SIZE,
    WEIGHT,
)  # fmt: skip
from edgellm.kernels.matmul import block_bytes, fetches_to, multiply, prepared
from edgellm.kernels.prepare import packed_bytes, rows_together
from edgellm.kernels.primitives import (
    call_op,
    fill,
    first,
    get_f32,
    get_i32,
    get_i64,
    lanes_max,
    lanes_sum,
    load_f32,
    maximum,
    set_f32,
    set_i32,
    store_f32,
)  # fmt: skip
from edgellm.kernels.share import NONE, take_first, take_next

PAIR_BYTES = 8
"""Of a largest logit, float32, and its token, int32. STEP_BEST has [thread][wanted row] of them, which begin as -inf
and 0; a row with a logit that is not a number ends as NaN and -1."""


def best(record: int, step: int, thread: int, n_threads: int) -> None:
    """The op: blocks of 16 tokens are shared out, for all wanted rows."""
    if get_i64(step + STEP_BEST) == 0:
        call_op(get_i64(record + LOGITS_OP), record, step, thread, n_threads)
        return
    rows = get_i64(step + STEP_N_WANTED)
    outputs = get_i64(step + STEP_SCRATCH) + thread * get_i64(step + STEP_SCRATCH_BYTES)
    packed, found = prepared(record, step, thread, rows), get_i64(step + STEP_BEST) + thread * rows * PAIR_BYTES
    block, owner = take_first(record, step, thread, n_threads)
    while block != NONE:
        after, owner = take_next(record, step, thread, n_threads, owner, block)
        ahead, row = fetches_to(record, block, after, thread, n_threads), 0
        weight = get_i64(record + WEIGHT) + block * block_bytes(record)
        while row < rows:
            count = rows_together(rows - row, get_i64(record + ROWS_N))
            multiply(record, weight, ahead, packed + row * packed_bytes(record), count, outputs)
            for i in range(count):
                keep_better(found + PAIR_BYTES * (row + i), outputs + 64 * i, 16 * block, get_i64(record + VOCAB_SIZE))
            row += count
        block = after


def keep_better(found: int, logits: int, token: int, vocab_size: int) -> None:
    """Compare the logits of 16 tokens from `token` on, as far as there are tokens. NaN, once kept, stays."""
    y = first(vocab_size - token, load_f32(logits), fill(-math.inf))
    if math.isnan(lanes_sum(maximum(fill(math.inf), y))):
        set_f32(found, math.nan)
        set_i32(found + 4, -1)
    elif lanes_max(y) >= get_f32(found):
        store_f32(logits, y)
        for i in range(16):
            if is_better(get_f32(logits + 4 * i), token + i, found):
                set_f32(found, get_f32(logits + 4 * i))
                set_i32(found + 4, token + i)


def is_better(logit: Any, token: int, found: int) -> bool:
    """A thread may come to a token after later ones."""
    best_yet = get_f32(found)
    return logit > best_yet or (logit == best_yet and token < get_i32(found + 4))
