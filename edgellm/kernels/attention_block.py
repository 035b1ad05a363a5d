"""One block of keys, for some queries of a key/value head: scores, weights and what they make of the values.

A thread keeps its queries side by side, `stride` bytes apart, and leaves a partial in each; see attention. Several are
computed at once, as many as the registers hold sums of: functions that end with _1, _4 or _8 are for so many.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgellm.kernels.layout import KEY_BLOCK
from edgellm.kernels.prepare import capped
from edgellm.kernels.primitives import (
    add,
    exp2,
    fill,
    first,
    fma,
    fma_f32_n,
    fma_n,
    get_i64,
    lanes_max,
    lanes_sum,
    load_f16,
    load_f32,
    load_n,
    maximum,
    most_queries,
    mul,
    prefetch,
    store_f32,
    store_n,
    sub,
    vectors_4,
    vectors_n,
    zero,
    zeros_n,
)  # fmt: skip
from edgellm.kernels.queries import for_each_number

MOST_QUERIES, MOST_PIECE = 64, 32
FEW = 32  # queries, for which pieces do not pay
HIDDEN, LOWEST = np.float32(-np.inf), np.float32(-1e30)  # a maximum starts from a number: -inf less -inf is NaN
LOG2E = np.float32(1.4426950408889634)
START: int = np.int64(0)  # for a literal 0, Numba would compile what it is passed to once more

# What a thread keeps of a query while it works on a task: cells, its scores in a block, its partial, its state, itself.
SEES_FROM, SEES_TO, RESULT, SCORES = 0, 8, 16, 64
MADE = SCORES + 4 * KEY_BLOCK
SUM, ACC = 64, 128  # of a state or partial


def partial_bytes(head_dim: int) -> int:
    return ACC + padded_bytes(head_dim)


def padded_bytes(head_dim: int) -> int:
    """Of a head's float32, with room for what vectors take together with it."""
    return 4 * ((head_dim + 63) // 64 * 64)


def query_bytes(head_dim: int) -> int:
    return query_at(head_dim) + padded_bytes(head_dim)


def state_at(head_dim: int) -> int:
    return MADE + partial_bytes(head_dim)


def query_at(head_dim: int) -> int:
    return MADE + 2 * partial_bytes(head_dim)


def make_partials(
    kept: int, stride: int, n: int, block: int, keys: int, values: int, ahead: int, head_dim: int, scale: float,
    softcap: float, whole: bool, room: int,
) -> None:  # fmt: skip
    """The partials of n queries of ascending positions for a block of keys; of those that see none of it, nothing.

    `ahead`: from this block to the next, which comes closer meanwhile: the CPU's own prefetching stops at each page,
    and a block takes long enough that memory need never be waited for. `room` is for a piece of keys or values.
    """
    score(kept, stride, n, block, keys, ahead, head_dim, room)
    for i in range(n):  # apart from what follows, so that while one query's peak is found others are worked on
        query = kept + i * stride
        begin, end = seen(query, block, whole)
        if begin < end:
            find_peak(query, begin, end, scale, softcap)
    for i in range(n):
        query = kept + i * stride
        begin, end = seen(query, block, whole)
        if begin < end:
            start_partial(query, values, head_dim, begin, end, exponent(scale, softcap))
    weigh(kept, stride, n, block, values, ahead, head_dim, whole, room)


# Which keys are seen.


def all_seen(kept: int, stride: int, n: int, block: int) -> bool:
    """Whether n queries of ascending positions see all keys of a block."""
    return seen_by_all(kept, stride, n, block) == (0, KEY_BLOCK)


def seen_in(query: int, block: int) -> int:
    """The first key of a block that a query sees, 0..KEY_BLOCK."""
    return min(max(get_i64(query + SEES_FROM) - block * KEY_BLOCK, 0), KEY_BLOCK)


def end_in(query: int, block: int) -> int:
    """One after the last key of a block that a query sees."""
    return min(max(get_i64(query + SEES_TO) - block * KEY_BLOCK, 0), KEY_BLOCK)


def seen(query: int, block: int, whole: bool) -> tuple[int, int]:
    """Which keys of a block a query sees: `whole` if all queries of the task see all of them."""
    if whole:
        return START, KEY_BLOCK
    return seen_in(query, block), end_in(query, block)


def seen_by_any(query: int, stride: int, n: int, block: int) -> tuple[int, int]:
    """From the first to the last key of a block that any of n queries sees."""
    return seen_in(query, block), end_in(query + (n - 1) * stride, block)


def seen_by_all(query: int, stride: int, n: int, block: int) -> tuple[int, int]:
    """Keys of a block that each of n queries sees; the end comes before the begin, or with it, if there are none."""
    return seen_in(query + (n - 1) * stride, block), end_in(query, block)


# Scores and weights.


def score(kept: int, stride: int, n: int, block: int, keys: int, ahead: int, head_dim: int, room: int) -> None:
    """q . k of n queries with the keys of a block that they see, and some around them."""
    if not in_pieces(n):
        for i in range(0, n, most_queries()):
            query, left = kept + i * stride, min(n - i, most_queries())
            begin, end = seen_by_any(query, stride, left, block)
            if left == 1:
                score_1(keys, ahead, head_dim, begin, end, query, stride)
            elif left <= 4:
                score_4(keys, ahead, head_dim, begin, end, query, stride)
            else:
                score_8(keys, ahead, head_dim, begin, end, query, stride)
        return
    begin, end = seen_by_any(kept, stride, n, block)
    for key in range(begin // piece() * piece(), end, piece()):
        wide = widen_keys(keys, head_dim, key, room)
        for i in range(0, n, most_queries()):
            query, left = kept + i * stride, min(n - i, most_queries())
            own, own_end = seen_by_any(query, stride, left, block)
            if own < key + piece() and own_end > key:
                bring(keys + ahead, 2 * KEY_BLOCK * head_dim, key // piece() * n + i, KEY_BLOCK // piece() * n)
                if left <= 4:
                    score_piece_4(wide, head_dim, key, query, stride)
                else:
                    score_piece_8(wide, head_dim, key, query, stride)


def find_peak(query: int, begin: int, end: int, scale: float, softcap: float) -> None:
    """Keep the largest score of keys begin..end. What stands beyond them may be anything, NaN too: it becomes -inf."""
    scores, start, last = query + SCORES, begin // 16 * 16, (end - 1) // 16 * 16
    if softcap != 0:
        for key in range(start, end, 16):
            store_f32(scores + 4 * key, capped(mul(load_f32(scores + 4 * key), fill(scale)), softcap))
    store_f32(scores + 4 * start, first(begin - start, fill(HIDDEN), load_f32(scores + 4 * start)))
    store_f32(scores + 4 * last, first(end - last, load_f32(scores + 4 * last), fill(HIDDEN)))
    highest = fill(LOWEST)
    for key in range(start, end, 16):
        highest = maximum(highest, load_f32(scores + 4 * key))
    store_f32(query + MADE, fill(lanes_max(highest) * exponent(scale, softcap)))


def exponent(scale: float, softcap: float) -> float:
    """What a score is multiplied by to be an exponent of 2."""
    factor: float = LOG2E if softcap != 0 else scale * LOG2E
    return factor


def start_partial(query: int, values: int, head_dim: int, begin: int, end: int, factor: float) -> None:
    """Turn the scores of keys begin..end of a block into weights, and start the partial with their sum."""
    partial, scores = query + MADE, query + SCORES
    down, total = sub(zero(), load_f32(partial)), zero()
    for key in range(begin // 16 * 16, end, 16):
        weight = exp2(fma(load_f32(scores + 4 * key), fill(factor), down))
        store_f32(scores + 4 * key, of_value(weight, values, head_dim, key))
        total = add(total, weight)
    store_f32(partial + SUM, fill(lanes_sum(total)))
    for d in range(0, head_dim, 16):
        store_f32(partial + ACC + 4 * d, zero())


def of_value(weight: Any, values: int, head_dim: int, key: int) -> Any:
    """What 16 values, from this one on, are multiplied by: the weights, of float16."""
    return weight


def weigh(
    kept: int, stride: int, n: int, block: int, values: int, ahead: int, head_dim: int, whole: bool, room: int
) -> None:
    """Add weight * value to the partials of n queries, for the keys that they see, in their order.

    Keys that not all queries at once see are added to just those that see them: a weight of 0 times infinity is NaN.
    """
    if not whole:
        weigh_others(kept, stride, n, block, values, ahead, head_dim, True)
    if not in_pieces(n):
        for i in range(0, n, most_queries()):
            query, left = kept + i * stride, min(n - i, most_queries())
            begin, end = seen_by_all(query, stride, left, block)
            if begin < end:
                if left == 1:
                    weigh_1(values, ahead, head_dim, begin, end, query, stride)
                elif left <= 4:
                    weigh_4(values, ahead, head_dim, begin, end, query, stride)
                else:
                    weigh_8(values, ahead, head_dim, begin, end, query, stride)
    else:
        weigh_pieces(kept, stride, n, block, values, ahead, head_dim, room)
    if not whole:
        weigh_others(kept, stride, n, block, values, ahead, head_dim, False)


def weigh_pieces(kept: int, stride: int, n: int, block: int, values: int, ahead: int, head_dim: int, room: int) -> None:
    first, last = seen_by_any(kept, stride, n, block)
    pieces = (head_dim + piece() - 1) // piece()
    for d in range(0, head_dim, piece()):
        widen_values(values, head_dim, d, first, last, room)
        for i in range(0, n, most_queries()):
            query, left = kept + i * stride, min(n - i, most_queries())
            begin, end = seen_by_all(query, stride, left, block)
            if begin < end:
                bring(values + ahead, 2 * KEY_BLOCK * head_dim, d // piece() * n + i, pieces * n)
                if left <= 4:
                    weigh_piece_4(room, d, begin, end, query, stride)
                else:
                    weigh_piece_8(room, d, begin, end, query, stride)


def weigh_others(
    kept: int, stride: int, n: int, block: int, values: int, ahead: int, head_dim: int, before: bool
) -> None:
    """What each query sees before, or after, the keys that all queries at once see."""
    for i in range(n):
        at, one = i // most_queries() * most_queries(), kept + i * stride
        shared, shared_end = seen_by_all(kept + at * stride, stride, min(n - at, most_queries()), block)
        begin, end = seen_in(one, block), end_in(one, block)
        if before:
            end = min(end, shared)
        else:
            begin = max(shared, shared_end)
        if begin < end:
            weigh_1(values, ahead, head_dim, begin, end, one, stride)


# Some queries at once.


def score_n(keys: int, ahead: int, head_dim: int, begin: int, end: int, query: int, stride: int) -> None:
    """q . k of some queries with keys begin..end, and some around them."""
    q, n, step = query + query_at(head_dim), 16 * vectors_n(), 32 * head_dim
    for key in range(begin // n * n, end, n):
        k, s = keys + 2 * key * head_dim, zeros_n()
        for d in range(head_dim):
            for i in range(vectors_n()):
                prefetch(k + ahead + 32 * d + i * step)
            s = fma_n(s, k + 32 * d, step, q + 4 * d, stride)
        store_n(query + SCORES + 4 * key, stride, s)


def weigh_n(values: int, ahead: int, head_dim: int, begin: int, end: int, query: int, stride: int) -> None:
    """Add weight * value for keys begin..end of a block to the partials of some queries.

    Each pass over the keys fetches its share of the next block, as much as it takes of this one.
    """
    weights, n = query + SCORES, 16 * vectors_n()
    for d in range(0, head_dim, n):
        acc = query + MADE + ACC + 4 * d
        s = load_n(acc, stride)
        for key in range(begin, end):
            for i in range(vectors_n()):
                prefetch(values + ahead + 2 * KEY_BLOCK * (d + 16 * i) + 32 * key)
            s = fma_n(s, values + 2 * (key * head_dim + d), 32, weights + 4 * key, stride)
        store_n(acc, stride, s)


score_1, score_4, score_8 = for_each_number(score_n)
weigh_1, weigh_4, weigh_8 = for_each_number(weigh_n)


# Many queries take a block in pieces, made float32 once for all of them: piece() keys in all dimensions, or so many
# dimensions of all values.


def task_queries() -> int:
    """How many meet a block of keys one after the other."""
    return MOST_QUERIES


def in_pieces(n: int) -> bool:
    """Whether that pays for n queries."""
    return n > FEW


def piece() -> int:
    """How many keys, or dimensions of values."""
    return 16 * vectors_4()


def widen_keys(keys: int, head_dim: int, key: int, room: int) -> int:
    """Make a piece of keys, from this one on, float32 [head_dim][piece]. Where it is."""
    k, step, n = keys + 2 * key * head_dim, 32 * head_dim, 4 * piece()
    for d in range(head_dim):
        for i in range(vectors_4()):
            store_f32(room + d * n + 64 * i, load_f16(k + 32 * d + i * step))
    return room


def widen_values(values: int, head_dim: int, d: int, begin: int, end: int, room: int) -> None:
    """Make a piece of the values of keys begin..end, from this dimension on, float32 [key][piece]."""
    n = 4 * piece()
    for key in range(begin, end):
        for i in range(vectors_4()):
            store_f32(room + key * n + 64 * i, load_f16(values + 2 * (key * head_dim + d + 16 * i)))


def score_piece_n(keys: int, head_dim: int, key: int, query: int, stride: int) -> None:
    """As score_n, with a piece of keys."""
    q, s = query + query_at(head_dim), zeros_n()
    for d in range(head_dim):
        s = fma_f32_n(s, keys + 4 * piece() * d, 64, q + 4 * d, stride)
    store_n(query + SCORES + 4 * key, stride, s)


def weigh_piece_n(values: int, d: int, begin: int, end: int, query: int, stride: int) -> None:
    """As weigh_n, with a piece of values."""
    acc, weights = query + MADE + ACC + 4 * d, query + SCORES
    s = load_n(acc, stride)
    for key in range(begin, end):
        s = fma_f32_n(s, values + 4 * piece() * key, 64, weights + 4 * key, stride)
    store_n(acc, stride, s)


_, score_piece_4, score_piece_8 = for_each_number(score_piece_n)
_, weigh_piece_4, weigh_piece_8 = for_each_number(weigh_piece_n)


def bring(start: int, size: int, done: int, of: int) -> None:
    """Have the next part of what begins there come closer, when so much of this block's work is done: a core waits for
    few lines at once."""
    for at in range(size * done // of, size * min(done + most_queries(), of) // of, 64):
        prefetch(start + at)
