"""Where things stand in the memory that kernels share: cells of a plan record, of a step, and of a slot's cache.

A record (one op of a plan) and a step are arrays of 8-byte cells: addresses, sizes, or a float32 in the cell's first
half. Kernels read them as get_i64(record + NAME) or get_f32(record + NAME): the names below are byte offsets.

Caches. A slot has one piece of memory. In it each layer has float16 keys, then float16 values, `capacity` positions of
each, a multiple of KEY_BLOCK; position p stands at p % capacity. For each key/value head in turn
    keys    [capacity / 16][head_dim][16]
    values  [capacity][head_dim]
"""

from __future__ import annotations

KEY_BLOCK = 128
"""Keys that are attended to together, from multiples of it on. Part of the numerics: see attention."""

CELL = 8
RECORD_CELLS = 45

# Every record.
OP, BARRIER, NEXT_WEIGHT, NEXT_BLOCKS, NEXT_BLOCK_BYTES = (CELL * i for i in range(5))
"""BARRIER is 0 for no wait after the op, 1 for one, 2 for one unless it works on a single row. NEXT: the matrix of the
next matmul, or after the last of the next step's first; see fetch."""

# Matmul: the matrix, the activations' rows, and where the outputs go.
(
    WEIGHT, N_BLOCKS, N_TILES, TILE_BYTES, PAIR, DOT_1, DOT_4, DOT_N, ROWS_N, ADDS, GATHERS, SAME_INPUT, PROLOGUE,
    SOURCE, SOURCE_STRIDE, COLS, NORM, NORM_EPS, CODE_BYTES, TARGET, TARGET_STRIDE, TABLE_FORMAT, ANGLES,
    ANGLES_STRIDE, KEYS, VALUES,
) = (CELL * (5 + i) for i in range(26))  # fmt: skip
"""ROWS_N are the rows that DOT_N takes, or 1 where there is no other kernel than DOT_1. PROLOGUE is 0 for rows as they
are, 1 for RMSNorm, 2 for SiLU(first half) * second half, 3 for GELU's, 4 for LayerNorm. GATHERS: only the step's wanted
rows. CODE_BYTES: 1 for int8 activations, 4 for float32."""

# Attention.
(
    QUERIES, OUT, PARTIALS, N_HEADS, N_KV_HEADS, WINDOW, SCALE, V_OFFSET, HEAD_DIM, KV_OFFSET, CAPACITY,
) = (CELL * (31 + i) for i in range(11))  # fmt: skip

# The head, besides a matmul's: see best.
LOGITS_OP, VOCAB_SIZE = (CELL * (42 + i) for i in range(2))

# A layer norm's bias.
NORM_BIAS = CELL * 44

# A step.
STEP_ROWS, STEP_TOKENS, STEP_POSITIONS, STEP_SLOTS, STEP_CACHES, STEP_WANTED, STEP_N_WANTED = (
    CELL * i for i in range(7)
)
STEP_SCRATCH, STEP_SCRATCH_BYTES, STEP_PACKED, STEP_LOGITS, STEP_BEST, STEP_BARRIER, STEP_ARRIVED = (
    CELL * (7 + i) for i in range(7)
)
STEP_CELLS = 16
"""Tokens, positions, slots, wanted rows are int32 arrays; STEP_CACHES is an int64 array, slot -> address. STEP_SCRATCH
has STEP_SCRATCH_BYTES for each thread; STEP_PACKED is shared. A step has one of STEP_LOGITS and STEP_BEST; the other is
0. STEP_BARRIER is the address of the barrier's counter, STEP_ARRIVED what stood there before the step."""

MOST_THREADS = 256
"""A generation is a count times this, plus the number of threads that are in its step."""

# What a team of threads shares. The generation stands alone in its cache line, as all of them watch it.
CONTROL_GENERATION = 0
CONTROL_RECORDS, CONTROL_N_RECORDS, CONTROL_STEP, CONTROL_STOP = (CELL * (16 + i) for i in range(4))
CONTROL_COUNTER = CELL * 32
CONTROL_CELLS = 64
