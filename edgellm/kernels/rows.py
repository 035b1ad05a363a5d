"""Ops on rows that are no matrix products: embedding, norms and sums, RoPE and the append to the cache, convolution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgellm.kernels.attention import append_key, append_value, owner
from edgellm.kernels.fetch import fetching
from edgellm.kernels.layout import (
    ADDS,
    ANGLES,
    ANGLES_STRIDE,
    CAPACITY,
    COLS,
    HEAD_DIM,
    K_NORM,
    K_NORM_EPS,
    K_TURNED_NORM,
    KEYS,
    KV_OFFSET,
    N_ANGLES,
    N_HEADS,
    N_KV_HEADS,
    N_TAPS,
    N_TILES,
    NORM,
    NORM_EPS,
    Q_NORM,
    Q_TURNED_NORM,
    QUERIES,
    SCALE,
    SOURCE,
    SOURCE_STRIDE,
    STEP_CACHES,
    STEP_POSITIONS,
    STEP_ROWS,
    STEP_SCRATCH,
    STEP_SCRATCH_BYTES,
    STEP_SLOTS,
    STEP_TOKENS,
    TABLE_FORMAT,
    TARGET,
    TARGET_STRIDE,
    TILE_BYTES,
    V_OFFSET,
    VALUES,
    WEIGHT,
)  # fmt: skip
from edgellm.kernels.prepare import inverse_rms, transform
from edgellm.kernels.primitives import (
    add,
    fill,
    fma,
    get_f16,
    get_f32,
    get_i32,
    get_i64,
    get_u8,
    load_f32,
    mul,
    set_f32,
    store_f32,
    sub,
    zero,
)  # fmt: skip

FORMATS = ("f32", "f16", "q8", "q4", "q4m", "q2t")
"""TABLE_FORMAT is a place in this list."""


def embed(record: int, step: int, thread: int, n_threads: int) -> None:
    """Rows of a table in any format for the step's tokens, or added, for its positions."""
    n_tiles, tile_bytes = get_i64(record + N_TILES), get_i64(record + TILE_BYTES)
    adds, scale = get_f32(record + ADDS), get_f32(record + SCALE)
    indices = get_i64(step + STEP_POSITIONS) if adds != 0 else get_i64(step + STEP_TOKENS)
    for row in range(thread, get_i64(step + STEP_ROWS), n_threads):
        index = int(get_i32(indices + 4 * row))
        block = get_i64(record + WEIGHT) + (index // 16) * n_tiles * tile_bytes
        target = get_i64(record + TARGET) + row * get_i64(record + TARGET_STRIDE)
        for column in range(get_i64(record + COLS)):
            tile = block + (column // 64) * tile_bytes
            y = np.float32(value(tile, index % 16, column % 64, get_i64(record + TABLE_FORMAT))) * scale
            set_f32(target + 4 * column, y + get_f32(target + 4 * column) if adds != 0 else y)


def value(tile: int, r: int, c: int, fmt: int) -> Any:
    """One value of a tile, as docs/format.md has it."""
    if fmt == 0:
        return get_f32(tile + 4 * (c * 16 + r))
    if fmt == 1:
        return get_f16(tile + 2 * (c * 16 + r))
    group = c // 32
    if fmt == 2:
        return (get_u8(tile + (c // 4) * 64 + r * 4 + c % 4) - 128) * get_f16(tile + 1024 + group * 32 + r * 2)
    if fmt == 5:
        code = get_u8(tile + (c // 16) * 64 + r * 4 + c % 4) >> (2 * (c % 16 // 4)) & 3
        return (code - 1) * get_f16(tile + 256 + group * 32 + r * 2)
    byte = get_u8(tile + group * 256 + ((c % 32) // 8) * 64 + r * 4 + c % 4)
    code = (byte & 15) if c % 8 < 4 else (byte >> 4)
    scale = get_f16(tile + 512 + group * 32 + r * 2)
    if fmt == 3:
        return (code - 8) * scale
    return code * scale + get_f16(tile + 576 + group * 32 + r * 2)


def apply(record: int, step: int, thread: int, n_threads: int) -> None:
    """A prologue by itself: rows, transformed, are stored or added. N_HEADS parts of a row, of COLS each, by
    themselves."""
    cols, adds = get_i64(record + COLS), get_f32(record + ADDS)
    buffer = get_i64(step + STEP_SCRATCH) + thread * get_i64(step + STEP_SCRATCH_BYTES)
    for row in range(thread, get_i64(step + STEP_ROWS), n_threads):
        source = get_i64(record + SOURCE) + row * get_i64(record + SOURCE_STRIDE)
        target = get_i64(record + TARGET) + row * get_i64(record + TARGET_STRIDE)
        for _ in range(get_i64(record + N_HEADS)):
            transform(record, source, buffer, fetching(step, thread))
            store_row(buffer, target, cols, adds)
            source += 4 * cols
            target += 4 * cols


def store_row(row: int, target: int, cols: int, adds: float) -> None:
    """Store `cols` values, or times `adds` add them, and leave what stands behind them."""
    whole = cols - cols % 16
    for column in range(0, whole, 16):
        y = load_f32(row + 4 * column)
        if adds != 0:
            y = add(load_f32(target + 4 * column), mul(y, fill(adds)))
        store_f32(target + 4 * column, y)
    for column in range(whole, cols):
        one = get_f32(row + 4 * column)
        if adds != 0:
            one = get_f32(target + 4 * column) + one * adds
        set_f32(target + 4 * column, one)


def rope_angles(record: int, step: int, thread: int, n_threads: int) -> None:
    """The cosines, then the sines, of every row's angles, times SCALE: TARGET [row][2][N_ANGLES], for all layers."""
    n, scale = get_i64(record + N_ANGLES), get_f32(record + SCALE)
    for row in range(thread, get_i64(step + STEP_ROWS), n_threads):
        position = get_i32(get_i64(step + STEP_POSITIONS) + 4 * row)
        target = get_i64(record + TARGET) + row * get_i64(record + TARGET_STRIDE)
        for i in range(n):
            set_f32(target + 4 * i, position)
            angle = get_f32(target + 4 * i) * get_f32(get_i64(record + ANGLES) + 4 * i)
            set_f32(target + 4 * i, math.cos(angle) * scale)
            set_f32(target + 4 * (n + i), math.sin(angle) * scale)


def rope_append(record: int, step: int, thread: int, n_threads: int) -> None:
    """Norm the step's queries and keys, before or after they are turned by their positions; put keys and values into
    the caches. Each thread takes the heads that it attends to, if there is one row and its keys are not split."""
    n_heads, n_kv_heads, head_dim = get_i64(record + N_HEADS), get_i64(record + N_KV_HEADS), get_i64(record + HEAD_DIM)
    capacity, n_angles = get_i64(record + CAPACITY), get_i64(record + N_ANGLES)
    q_norm, k_norm = get_i64(record + Q_NORM), get_i64(record + K_NORM)
    group = n_heads // n_kv_heads
    tasks = get_i64(step + STEP_ROWS) * n_kv_heads
    for task in range(tasks):
        if owner(task, 1, tasks, n_threads) != thread:
            continue
        row, kv_head = task // n_kv_heads, task % n_kv_heads
        angles = get_i64(record + ANGLES) + row * get_i64(record + ANGLES_STRIDE)
        for head in range(kv_head * group, (kv_head + 1) * group):
            query = get_i64(record + QUERIES) + row * get_i64(record + SOURCE_STRIDE) + 4 * head_dim * head
            norm_head(query, q_norm, head_dim, get_f32(record + NORM_EPS))
            turn(query, angles, n_angles)
            norm_head(query, get_i64(record + Q_TURNED_NORM), head_dim, get_f32(record + NORM_EPS))
        at = row * get_i64(record + TARGET_STRIDE) + 4 * head_dim * kv_head
        key = get_i64(record + KEYS) + at
        norm_head(key, k_norm, head_dim, get_f32(record + K_NORM_EPS))
        turn(key, angles, n_angles)
        norm_head(key, get_i64(record + K_TURNED_NORM), head_dim, get_f32(record + K_NORM_EPS))
        position, cache = place_of(step, row)
        keys, values = cache + get_i64(record + KV_OFFSET), cache + get_i64(record + V_OFFSET)
        append_key(keys, kv_head, head_dim, capacity, position, key)
        append_value(values, kv_head, head_dim, capacity, position, get_i64(record + VALUES) + at)


def place_of(step: int, row: int) -> tuple[int, int]:
    """A row's position, and the memory of its slot."""
    slot = int(get_i32(get_i64(step + STEP_SLOTS) + 4 * row))
    return int(get_i32(get_i64(step + STEP_POSITIONS) + 4 * row)), get_i64(get_i64(step + STEP_CACHES) + 8 * slot)


def norm_head(head: int, weight: int, head_dim: int, eps: float) -> None:
    """RMSNorm of one head, in place; none for a weight of 0."""
    if weight == 0:
        return
    factor, whole = np.float32(inverse_rms(head_dim, head, zero(), eps)), head_dim - head_dim % 16
    for i in range(0, whole, 16):
        store_f32(head + 4 * i, mul(mul(load_f32(head + 4 * i), fill(factor)), load_f32(weight + 4 * i)))
    for i in range(whole, head_dim):
        set_f32(head + 4 * i, get_f32(head + 4 * i) * factor * get_f32(weight + 4 * i))


def turn(head: int, angles: int, n: int) -> None:
    """RoPE on the pairs (i, i + n) of one head, in place; angles are [2][n]."""
    for i in range(0, n - n % 16, 16):
        low, high = head + 4 * i, head + 4 * (n + i)
        x, y, cos, sin = load_f32(low), load_f32(high), load_f32(angles + 4 * i), load_f32(angles + 4 * (n + i))
        store_f32(low, sub(mul(x, cos), mul(y, sin)))
        store_f32(high, add(mul(y, cos), mul(x, sin)))
    for i in range(n - n % 16, n):
        low, high = head + 4 * i, head + 4 * (n + i)
        a, b, c, s = get_f32(low), get_f32(high), get_f32(angles + 4 * i), get_f32(angles + 4 * (n + i))
        set_f32(low, a * c - b * s)
        set_f32(high, b * c + a * s)


def short_conv(record: int, step: int, thread: int, n_threads: int) -> None:
    """Gated causal convolution of the rows' channels: each thread takes some, and goes through the rows in turn."""
    channels, capacity, n_taps = get_i64(record + COLS), get_i64(record + CAPACITY), get_i64(record + N_TAPS)
    n_blocks = (channels + 15) // 16
    for block in range(n_blocks * thread // n_threads, n_blocks * (thread + 1) // n_threads):
        taps = get_i64(record + NORM) + block * get_i64(record + TILE_BYTES)
        for row in range(get_i64(step + STEP_ROWS)):
            source = get_i64(record + SOURCE) + row * get_i64(record + SOURCE_STRIDE) + 64 * block
            target = get_i64(record + TARGET) + row * get_i64(record + TARGET_STRIDE) + 64 * block
            position, cache = place_of(step, row)
            ring, size = cache + get_i64(record + KV_OFFSET) + 64 * block, 64 * n_blocks
            gated = mul(load_f32(source), load_f32(source + 8 * channels))
            store_f32(ring + position % capacity * size, gated)
            total = zero()
            for back in range(min(n_taps, position + 1)):
                earlier = load_f32(ring + (position - back) % capacity * size)
                total = fma(earlier, load_f32(taps + 64 * (n_taps - 1 - back)), total)
            store_f32(target, mul(total, load_f32(source + 4 * channels)))
