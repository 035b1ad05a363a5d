"""Ops on rows that are no matrix products: embedding, and RoPE with the append to the cache."""

from __future__ import annotations

import math
from typing import Any

from edgellm.kernels.attention import append_key, append_value
from edgellm.kernels.layout import (
    ANGLES,
    ANGLES_STRIDE,
    CAPACITY,
    COLS,
    HEAD_DIM,
    KEYS,
    KV_OFFSET,
    N_HEADS,
    N_KV_HEADS,
    N_TILES,
    QUERIES,
    SOURCE_STRIDE,
    STEP_CACHES,
    STEP_POSITIONS,
    STEP_ROWS,
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
from edgellm.kernels.primitives import (
    add,
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
)  # fmt: skip

FORMATS = ("f32", "f16", "q8", "q4", "q4m")
"""TABLE_FORMAT is a place in this list."""


def embed(record: int, step: int, thread: int, n_threads: int) -> None:
    """Rows of a table in any format for the step's tokens."""
    n_tiles, tile_bytes = get_i64(record + N_TILES), get_i64(record + TILE_BYTES)
    for row in range(thread, get_i64(step + STEP_ROWS), n_threads):
        token = int(get_i32(get_i64(step + STEP_TOKENS) + 4 * row))
        block = get_i64(record + WEIGHT) + (token // 16) * n_tiles * tile_bytes
        target = get_i64(record + TARGET) + row * get_i64(record + TARGET_STRIDE)
        for column in range(get_i64(record + COLS)):
            tile = block + (column // 64) * tile_bytes
            set_f32(target + 4 * column, value(tile, token % 16, column % 64, get_i64(record + TABLE_FORMAT)))


def value(tile: int, r: int, c: int, fmt: int) -> Any:
    """One value of a tile, as docs/format.md has it."""
    if fmt == 0:
        return get_f32(tile + 4 * (c * 16 + r))
    if fmt == 1:
        return get_f16(tile + 2 * (c * 16 + r))
    group = c // 32
    if fmt == 2:
        return (get_u8(tile + (c // 4) * 64 + r * 4 + c % 4) - 128) * get_f16(tile + 1024 + group * 32 + r * 2)
    byte = get_u8(tile + group * 256 + ((c % 32) // 8) * 64 + r * 4 + c % 4)
    code = (byte & 15) if c % 8 < 4 else (byte >> 4)
    scale = get_f16(tile + 512 + group * 32 + r * 2)
    if fmt == 3:
        return (code - 8) * scale
    return code * scale + get_f16(tile + 576 + group * 32 + r * 2)


def rope_angles(record: int, step: int, thread: int, n_threads: int) -> None:
    """The cosines, then the sines, of every row's angles: TARGET [row][2][half], for all layers."""
    half = get_i64(record + COLS)
    for row in range(thread, get_i64(step + STEP_ROWS), n_threads):
        position = get_i32(get_i64(step + STEP_POSITIONS) + 4 * row)
        target = get_i64(record + TARGET) + row * get_i64(record + TARGET_STRIDE)
        for i in range(half):
            set_f32(target + 4 * i, position)
            angle = get_f32(target + 4 * i) * get_f32(get_i64(record + ANGLES) + 4 * i)
            set_f32(target + 4 * i, math.cos(angle))
            set_f32(target + 4 * (half + i), math.sin(angle))


def rope_append(record: int, step: int, thread: int, n_threads: int) -> None:
    """Turn the step's queries and keys by their positions; put keys and values into the caches."""
    n_heads, n_kv_heads, head_dim = get_i64(record + N_HEADS), get_i64(record + N_KV_HEADS), get_i64(record + HEAD_DIM)
    capacity, key_offset, value_offset = (
        get_i64(record + CAPACITY),
        get_i64(record + KV_OFFSET),
        get_i64(record + V_OFFSET),
    )
    for task in range(thread, get_i64(step + STEP_ROWS) * (n_heads + n_kv_heads), n_threads):
        row, head = task // (n_heads + n_kv_heads), task % (n_heads + n_kv_heads)
        angles = get_i64(record + ANGLES) + row * get_i64(record + ANGLES_STRIDE)
        if head < n_heads:
            stride = get_i64(record + SOURCE_STRIDE)
            turn(get_i64(record + QUERIES) + row * stride + 4 * head_dim * head, angles, head_dim)
        else:
            kv_head = head - n_heads
            position = int(get_i32(get_i64(step + STEP_POSITIONS) + 4 * row))
            cache = get_i64(get_i64(step + STEP_CACHES) + 8 * int(get_i32(get_i64(step + STEP_SLOTS) + 4 * row)))
            at = row * get_i64(record + TARGET_STRIDE) + 4 * head_dim * kv_head
            turn(get_i64(record + KEYS) + at, angles, head_dim)
            append_key(cache + key_offset, kv_head, head_dim, capacity, position, get_i64(record + KEYS) + at)
            append_value(cache + value_offset, kv_head, head_dim, capacity, position, get_i64(record + VALUES) + at)


def turn(head: int, angles: int, head_dim: int) -> None:
    """RoPE on one head, in place; angles are [2][half]."""
    half = head_dim // 2
    for i in range(0, half - half % 16, 16):
        low, high = head + 4 * i, head + 4 * (half + i)
        x, y, cos, sin = load_f32(low), load_f32(high), load_f32(angles + 4 * i), load_f32(angles + 4 * (half + i))
        store_f32(low, sub(mul(x, cos), mul(y, sin)))
        store_f32(high, add(mul(y, cos), mul(x, sin)))
    for i in range(half - half % 16, half):
        low, high = head + 4 * i, head + 4 * (half + i)
        a, b, c, s = get_f32(low), get_f32(high), get_f32(angles + 4 * i), get_f32(angles + 4 * (half + i))
        set_f32(low, a * c - b * s)
        set_f32(high, b * c + a * s)
