"""Where things stand in the memory that kernels share: cells of a plan record, of a step, and of a slot's cache.

A record (one op of a plan) and a step are arrays of 8-byte cells: addresses, sizes, or a float32 in the cell's first
half. Kernels read them as get_i64(record + NAME) or get_f32(record + NAME): the names below are byte offsets.

Caches. A slot has one piece of memory. In it each layer has float16 keys, then float16 values, `capacity` positions of
each, a multiple of KEY_BLOCK; position p stands at p % capacity. For each key/value head in turn
    keys    [capacity / 16][head_dim][16]
    values  [capacity][head_dim]
With kv = "q8", keys and values take turns: for each key/value head and each KEY_BLOCK positions, with head_dim rounded
up to whole 16 in codes and to whole 32 in scales, float16
    keys    uint8, code + 128 [KEY_BLOCK / 16][head_dim / 4][16][4]    scales [head_dim / 32][KEY_BLOCK]
    values  int8 [KEY_BLOCK][head_dim]                                  scales [KEY_BLOCK]
A convolution's layer has float32 [capacity][channels] in the same place.
"""

from __future__ import annotations

KEY_BLOCK = 128
"""Keys that are attended to together, from multiples of it on. Part of the numerics: see attention."""

CELL = 8
RECORD_CELLS = 72

# Every record.
OP, BARRIER, NEXT_WEIGHT, NEXT_BLOCKS, NEXT_BLOCK_BYTES = (CELL * i for i in range(5))
"""BARRIER is 0 for no wait after the op, 1 for one, 2 for one unless it works on a single row, 3 for one if keys were
split, 4 for one unless it works on a single row whose keys are not split. NEXT: the matrix of the next matmul, or after
the last of the next step's first; see fetch."""

# Matmul: the matrix, the activations' rows, and where the outputs go.
(
    WEIGHT, N_BLOCKS, N_TILES, TILE_BYTES, PAIR, DOT_1, DOT_4, DOT_N, ROWS_N, ADDS, GATHERS, SAME_INPUT, PROLOGUE,
    SOURCE, SOURCE_STRIDE, COLS, NORM, NORM_EPS, CODE_BYTES, TARGET, TARGET_STRIDE, TABLE_FORMAT, ANGLES,
    ANGLES_STRIDE, KEYS, VALUES,
) = (CELL * (5 + i) for i in range(26))  # fmt: skip
"""ROWS_N are the rows that DOT_N takes, or 1 where there is no other kernel than DOT_1. ADDS: 0, or what outputs are
multiplied by (float32) and added. PROLOGUE: what becomes of a row first. GATHERS: only the step's wanted rows.
CODE_BYTES: 1 for int8 activations, 4 for float32."""

# Attention.
(
    QUERIES, OUT, PARTIALS, N_HEADS, N_KV_HEADS, WINDOW, SCALE, V_OFFSET, HEAD_DIM, KV_OFFSET, CAPACITY,
) = (CELL * (31 + i) for i in range(11))  # fmt: skip

# The head, besides a matmul's: see best.
LOGITS_OP, VOCAB_SIZE = (CELL * (42 + i) for i in range(2))

# What an op may have besides, 0 if it has not. Of a head, SCALE is what logits are multiplied by, 0 for 1.
NORM_BIAS, BIAS, ACTIVATION, SOFTCAP, Q_NORM, K_NORM, K_NORM_EPS, N_ANGLES = (CELL * (44 + i) for i in range(8))

# Experts: see experts. WEIGHT is the address of their matrices' addresses.
ROUTES, N_EXPERTS, N_USED, NORMALIZES, SPREADS = (CELL * (52 + i) for i in range(5))

# A convolution: NORM is its matrix.
N_TAPS = CELL * 57

# Norms of heads that RoPE has turned, with the same eps.
Q_TURNED_NORM, K_TURNED_NORM = (CELL * (58 + i) for i in range(2))

# What an adapter adds to a matmul's outputs: LOW_RANK columns of the rows at LOW, LOW_STRIDE bytes apart, times LOW_B.
LOW_RANK, LOW, LOW_STRIDE, LOW_B = (CELL * (60 + i) for i in range(4))
"""LOW_B is float32 [outputs / 16][LOW_RANK][16]. LOW_RANK is 0 where there is no adapter."""

# Values of PROLOGUE and ACTIVATION.
PLAIN, RMS_NORM, LAYER_NORM, GATED, ACTIVATED = range(5)
SILU, GELU, GELU_TANH, RELU2 = range(4)

# A matmul's shares: see share.
CLAIM = CELL * 64

# A step.
STEP_ROWS, STEP_TOKENS, STEP_POSITIONS, STEP_SLOTS, STEP_CACHES, STEP_WANTED, STEP_N_WANTED = (
    CELL * i for i in range(7)
)
STEP_SCRATCH, STEP_SCRATCH_BYTES, STEP_PACKED, STEP_LOGITS, STEP_BEST, STEP_ARRIVALS, STEP_ARRIVED = (
    CELL * (7 + i) for i in range(7)
)
STEP_CELLS = 16
"""Tokens, positions, slots, wanted rows are int32 arrays; STEP_CACHES is an int64 array, slot -> address. STEP_SCRATCH
has STEP_SCRATCH_BYTES for each thread; STEP_PACKED is shared. A step has one of STEP_LOGITS and STEP_BEST; the other is
0. STEP_ARRIVALS is where each thread counts the barriers that it came to, STEP_ARRIVED what the first one had counted
before the step."""

MOST_THREADS = 256
"""A generation is a count times this, plus the number of threads that are in its step."""

# What a team of threads shares. The generation stands alone in its cache line, as all of them watch it.
CONTROL_GENERATION = 0
CONTROL_RECORDS, CONTROL_N_RECORDS, CONTROL_STEP, CONTROL_STOP = (CELL * (16 + i) for i in range(4))
CONTROL_CELLS = 32
ARRIVAL_BYTES = 384
"""Between the arrivals of two threads. Behind them stand, each in a pair of cache lines of its own,"""
FETCHED, FETCH_END = 128, 136
"""what the thread may fetch ahead (see fetch), and"""
CLAIMS = 256
"""what is taken of its shares (see share)."""
