"""The CPU backend: a recorded plan, compiled kernels, and a team of threads that runs it step by step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from edgellm import isa
from edgellm.adapter import Adapter
from edgellm.architectures import Architecture
from edgellm.arrays import F32, I32, Array, address
from edgellm.backends._cpu_cache import Slot, block, slot_bytes
from edgellm.backends._cpu_lowering import Lowering, cells
from edgellm.backends._cpu_memory import Memory
from edgellm.cache import Slots
from edgellm.footprint import Footprint
from edgellm.kernels import Body, Kernel, compiler, dots, layout
from edgellm.kernels.attention import attention, attention_merge
from edgellm.kernels.best import best
from edgellm.kernels.experts import combine, expert_matmul, expert_prepare, route
from edgellm.kernels.matmul import matmul
from edgellm.kernels.prepare import prepare
from edgellm.kernels.rows import apply, embed, rope_angles, rope_append, short_conv
from edgellm.kernels.run import run, serve
from edgellm.kernels.team import Team
from edgellm.plan import (
    Activated,
    Angles,
    Apply,
    Attention,
    Buffer,
    Combine,
    ExpertMatmul,
    Matmul,
    Op,
    Plan,
    RopeAppend,
    Route,
    ShortConv,
    Source,
    adapted,
    buffer_of,
    record,
)
from edgellm.step import Step
from edgellm.tensor import Tensor

OF_STEP = [cell // layout.CELL for cell in (
    layout.STEP_ROWS, layout.STEP_N_WANTED, layout.STEP_CACHES, layout.STEP_LOGITS, layout.STEP_BEST,
)]  # fmt: skip
SCRATCH = [cell // layout.CELL for cell in (layout.STEP_SCRATCH, layout.STEP_SCRATCH_BYTES, layout.STEP_PACKED)]
BEST = np.dtype([("logit", np.float32), ("token", np.int32)])
"""What a thread finds for a row; see kernels.best."""
NOTHING = np.array((-np.inf, 0), BEST)
WORTH_MORE_KERNELS = 16
"""Rows of a first step that are worth compiling the dot kernels for several rows; until then it is done row by row."""


ALWAYS = run, serve, embed, prepare, matmul, best
OPS: dict[type[Op], tuple[Body, ...]] = {
    Angles: (rope_angles,),
    RopeAppend: (rope_append,),
    Attention: (attention, attention_merge),
    Apply: (apply,),
    ShortConv: (short_conv,),
    Route: (route,),
    ExpertMatmul: (expert_prepare, expert_matmul),
    Combine: (combine,),
}
"""What is compiled for ops besides ALWAYS."""


OF_CACHES = rope_append, attention
"""Of these, what depends on the kind of the cache."""


def needed(
    formats: Iterable[str], most_rows: int, ops: Iterable[type[Op]] = tuple(OPS), kv: str = "f16"
) -> list[Kernel]:
    """The kernels of any model of these ops with matrices in these formats, for up to `most_rows` rows at once."""
    wanted = set(ops)
    bodies: list[Body] = [*ALWAYS, *(body for op, of_op in OPS.items() if op in wanted for body in of_op)]
    rows = sorted({1, min(4, most_rows), most_rows})
    products = [Kernel(getattr(dots, fmt), n) for fmt in sorted(set(formats)) for n in rows]
    return [*(Kernel(body, cache=kv if body in OF_CACHES else "f16") for body in bodies), *products]


class Backend(Slots[Slot]):
    MAX_ROWS = 128  # so that what ops leave for each other stays in the caches

    def __init__(
        self,
        architecture: Architecture,
        config: Any,
        tensors: dict[str, Tensor],
        context_length: int,
        n_threads: int | None = None,
        kv: str = "f16",
    ) -> None:
        self.CACHE_LAYOUT, self._kv = ("float16 1" if kv == "f16" else f"{kv} 1"), kv
        self._vocab_size = config.vocab_size
        self._kernels, plan = compiler(isa.detect()), record(architecture, config, tensors)
        self._plan = plan  # whose arrays the records point into
        most_rows = self._kernels.isa.ROWS if self._kernels.load(_needed(plan, self._kernels.isa.ROWS, kv)) else 1
        self._kernels.get(_needed(plan, most_rows, kv))
        self._team = Team(self._kernels, n_threads)
        self._memory = Memory(plan, context_length, self.MAX_ROWS, self._team.n_threads, kv)
        self._adapted: WeakKeyDictionary[Adapter, _Program] = WeakKeyDictionary()
        self._lower(most_rows)
        # A step's numbers always stand in the same memory: after each step Python is slow, as weights have taken the
        # place of all that it needs in the caches, so there is little for it to do.
        self._rows = np.zeros((4, self.MAX_ROWS), np.int32)
        self._caches = np.zeros(1, np.int64)
        self._found = np.zeros(self._team.n_threads * self.MAX_ROWS, BEST)
        self._found_address = address(self._found)
        tokens, positions, slots, wanted = (address(row) for row in self._rows)
        self._step = cells(layout.STEP_CELLS, "STEP_", {
            "TOKENS": tokens, "POSITIONS": positions, "SLOTS": slots, "WANTED": wanted,
        })  # fmt: skip
        self._place_scratch()
        super().__init__(context_length)
        self._weight_bytes = sum(tensor.data.nbytes for tensor in tensors.values())

    @property
    def footprint(self) -> Footprint:
        return Footprint(
            weights=self._weight_bytes,
            cache=slot_bytes(self._memory.layers),
            arena=self._memory.n_bytes + self._scratch.nbytes,
            adapters=sum(self._bytes_of_adapter(*each) for each in self._adapted.items()),
        )

    def _bytes_of_adapter(self, adapter: Adapter, program: _Program) -> int:
        """Its values, and the same in the order in which kernels read them."""
        return adapter.n_bytes + program.plan.bytes_read() - self._plan.bytes_read()

    def _lower(self, most_rows: int) -> None:
        self._program = self._program_of(self._plan, most_rows)
        for adapter, program in self._adapted.items():
            self._adapted[adapter] = self._program_of(program.plan, most_rows)
        self._most_rows = most_rows

    def _program_of(self, plan: Plan, most_rows: int) -> _Program:
        self._kernels.get(_needed(plan, most_rows, self._kv))
        return _Program(plan, Lowering(self._kernels, plan, self._memory, most_rows).records())

    def adapt(self, adapter: Adapter) -> None:
        if adapter not in self._adapted:
            plan = adapted(self._plan, adapter.pairs)
            self._team.finish()
            self._memory.cover(plan)
            self._place_scratch()
            self._adapted[adapter] = self._program_of(plan, self._most_rows)

    def _place_scratch(self) -> None:
        self._scratch = block(self._team.n_threads * self._memory.scratch_bytes)
        self._step[SCRATCH] = address(self._scratch), self._memory.scratch_bytes, address(self._memory.packed)

    def bytes_of(self, n_tokens: int) -> int:
        return sum(layer.bytes_of(n_tokens) for layer in self._memory.layers)

    def _new_slot(self) -> Slot:
        return Slot(self._memory.layers)

    def _recorded(self) -> Plan:
        return self._plan

    def _rings(self) -> list[tuple[int, int]]:
        return [layer.ring for layer in self._memory.layers]

    def drop(self, slot: int, first: int, count: int) -> None:
        self._team.finish()
        super().drop(slot, first, count)

    def open_slot(self) -> int:
        slot = super().open_slot()
        self._place_caches()
        return slot

    def close_slot(self, slot: int) -> None:
        self._team.finish()
        super().close_slot(slot)
        self._place_caches()

    def _place_caches(self) -> None:
        self._team.finish()
        self._caches = np.zeros(max(self._slots, default=0) + 1, np.int64)
        for slot, held in self._slots.items():
            self._caches[slot] = held.address
        self._caches_address = address(self._caches)

    def run(self, step: Step) -> F32:
        logits = np.empty((len(step.wanted), -(-self._vocab_size // 16) * 16), np.float32)
        self._run(step, logits=address(logits), out=logits)
        return logits[:, : self._vocab_size]

    def best(self, step: Step) -> I32:
        found = self._found[: self._team.n_threads * len(step.wanted)]
        self._team.finish()
        found[:] = NOTHING
        self._run(step, best=self._found_address)
        of_threads = found.tolist()
        n = len(step.wanted)
        return np.array([_best_of(of_threads[row::n]) for row in range(n)], np.int32)

    def hidden(self, step: Step) -> F32:
        none_wanted = Step(step.tokens, step.slots, step.positions, step.wanted[:0])
        self._run(none_wanted, best=self._found_address)
        last = self._plan.ops[-1]
        assert isinstance(last, Matmul)
        source = last.source
        return _normed(source, self._memory.rows(buffer_of(source), len(step.tokens)))

    def _run(self, step: Step, logits: int = 0, best: int = 0, out: Array | None = None) -> None:
        if self._most_rows == 1 and len(step.tokens) >= WORTH_MORE_KERNELS:
            self._lower(self._kernels.isa.ROWS)
        if step.adapter:
            self.adapt(step.adapter)
        self._begin(step)
        self._team.finish()
        self._running = self._adapted[step.adapter] if step.adapter else self._program
        n_rows, n_wanted, rows = len(step.tokens), len(step.wanted), self._rows
        rows[0, :n_rows], rows[1, :n_rows], rows[2, :n_rows] = step.tokens, step.positions, step.slots
        rows[3, :n_wanted] = step.wanted
        self._step[OF_STEP] = n_rows, n_wanted, self._caches_address, logits, best
        self._team.run(self._running.records, self._step, out)
        self._end(step)

    def close(self) -> None:
        self._team.close()
        self._adapted.clear()
        self._slots, self._plan = {}, Plan()
        self._program = self._running = _Program(self._plan, self._program.records[:0])


@dataclass(frozen=True, eq=False)
class _Program:
    plan: Plan
    """Whose arrays the records point into."""
    records: Array


def _needed(plan: Plan, most_rows: int, kv: str) -> list[Kernel]:
    return needed((weight.format for weight in plan.matrices()), most_rows, {type(op) for op in plan.ops}, kv)


def _best_of(pairs: list[tuple[float, int]]) -> int:
    """The token of the largest logit of all threads, the first of equals; -1 if one is not a number."""
    return -1 if any(token < 0 for _, token in pairs) else -max((logit, -token) for logit, token in pairs)[1]


def _normed(source: Source, x: F32) -> F32:
    """What a matmul reads of some rows, if it is not activated."""
    assert not isinstance(source, Activated)
    if isinstance(source, Buffer):
        return x
    if source.centred:
        x = x - x.mean(axis=1, keepdims=True)
    weight, bias = source.weight.data[: x.shape[1]], source.bias
    y: F32 = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + np.float32(source.eps)) * weight
    return y if bias is None else y + bias.data[: x.shape[1]]
