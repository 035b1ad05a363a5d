"""Static estimate of the q4 inner loop on Arm, from any machine: instructions, and the cycles that llvm-mca foresees.

    python benchmarks/arm.py             a table, and arm.json beside this file
    python benchmarks/arm.py --check     fails where an estimate is 3 % above that of arm.json, which it leaves alone
    python benchmarks/arm.py --assembly  the loops themselves

The loop follows edgellm.kernels.dots.q4: a tile of 16 x 64 weights (576 bytes) with 1 to 4 rows of activations.
llvm-mca knows a CPU's pipelines but no cache misses, and the A76 as its sibling Neoverse N1. It does not measure.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from llvmlite import binding, ir

from edgellm import isa
from edgellm.isa._llvm import BYTES, F32, FLOATS, HALVES, I32, I64, call, constant, load, splat, store

CPUS = {"cortex-a76": ("neon_dotprod", 2.4), "cortex-a72": ("neon", 1.8)}
"""The ISA, and the clock of a Raspberry Pi 5 and 4 in GHz."""
POINTER, NEAR = ir.IntType(8).as_pointer(), (I32(0), I32(2), I32(1))
AHEAD, FMA = 4096, "llvm.fma.v16f32"
TILE_BYTES, PIPELINES = 576, {"cortex-a76": "neoverse-n1", "cortex-a72": "cortex-a72"}
MCA = next(filter(shutil.which, [*(f"llvm-mca-{version}" for version in range(30, 17, -1)), "llvm-mca"]), None)
RESULTS = Path(__file__).with_suffix(".json")


def loop(dot4: Any, rows: int) -> str:
    """f(weight, codes, scales, starts, y, n_tiles) in LLVM's language; what belongs to rows interleaves them."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 6), "f")
    entry, body, end = (function.append_basic_block(name) for name in ("entry", "body", "end"))
    ir.IRBuilder(entry).branch(body)
    b = ir.IRBuilder(body)
    pointers, left = [b.phi(I64) for _ in range(4)], b.phi(I64)
    sums = [b.phi(FLOATS) for _ in range(rows)]
    results = tile(b, dot4, *pointers, sums)
    steps = (TILE_BYTES, 64 * rows, 16 * rows, 16 * rows)
    after = [b.add(p, I64(step)) for p, step in zip(pointers, steps, strict=True)] + [b.sub(left, I64(1))]
    b.cbranch(b.icmp_signed("!=", after[-1], I64(0)), body, end)
    first = [*function.args[:4], function.args[5], *[constant(FLOATS, 0.0)] * rows]
    for phi, start, again in zip([*pointers, left, *sums], first, [*after, *results], strict=True):
        phi.add_incoming(start, entry)
        phi.add_incoming(again, body)
    b = ir.IRBuilder(end)
    for row, result in enumerate(results):
        store(b, b.add(function.args[4], I64(64 * row)), result)
    b.ret_void()
    return str(module)


def tile(b: ir.IRBuilder, dot4: Any, weight: Any, codes: Any, scales: Any, starts: Any, sums: list[Any]) -> list[Any]:
    """The sums after one more tile."""
    rows, results = range(len(sums)), [*sums]
    for line in range(TILE_BYTES // 64):
        call(b, "llvm.prefetch.p0", ir.VoidType(), b.inttoptr(b.add(weight, I64(AHEAD + 64 * line)), POINTER), *NEAR)
    for part in range(4):  # of 16 columns, two to a group
        at = [4 * (part * len(rows) + row) for row in rows]
        dots = [splat(b, load(b, b.add(starts, I64(at[row])), I32)) for row in rows]
        for j in range(2):
            w = load(b, b.add(weight, I64(part * 128 + j * 64)), BYTES)
            for half, u in enumerate((b.and_(w, constant(BYTES, 15)), b.lshr(w, constant(BYTES, 4)))):
                first = 4 * (part * 4 + j * 2 + half) * len(rows)
                quads = [splat(b, load(b, b.add(codes, I64(first + 4 * row)), I32)) for row in rows]
                dots = [dot4(b, dots[row], u, quads[row]) for row in rows]
        factors = [splat(b, load(b, b.add(scales, I64(at[row])), F32)) for row in rows]
        numbers = [b.sitofp(dots[row], FLOATS) for row in rows]
        if part % 2 == 0:
            scaled = [b.fmul(numbers[row], factors[row]) for row in rows]
            continue
        scale = b.fpext(load(b, b.add(weight, I64(512 + part // 2 * 32)), HALVES), FLOATS)
        for row in rows:
            both = call(b, FMA, FLOATS, numbers[row], factors[row], scaled[row])
            results[row] = call(b, FMA, FLOATS, scale, both, results[row])
    return results


def assembly(source: str, cpu: str) -> str:
    """The instructions of the loop."""
    target = binding.Target.from_triple("aarch64-unknown-linux-gnu")
    machine = target.create_target_machine(cpu=cpu, opt=3)
    module = binding.parse_assembly(source)
    builder = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    text = machine.emit_assembly(module)
    (label,) = set(re.findall(r"b\.ne\s+(\.LBB0_\d+)", text))
    return text.partition(f"{label}:")[2].partition("b.ne")[0]


def cycles(code: str, cpu: str) -> int | None:
    """What llvm-mca foresees for one round of the loop; None without llvm-mca."""
    if MCA is None:
        return None
    command = [MCA, "-mtriple=aarch64", f"-mcpu={PIPELINES[cpu]}", "-iterations=200"]
    report = subprocess.run(command, input=code, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Total Cycles:\s+(\d+)", report)
    assert found
    return round(int(found[1]) / 200)


def estimate(cpu: str, rows: int) -> dict[str, Any]:
    name, clock = CPUS[cpu]
    code = assembly(loop(isa.get(name).dot4, rows), cpu)
    if "--assembly" in sys.argv:
        print(f"# {cpu}, {rows} rows", code, sep="\n")
    kinds = Counter(re.findall(r"^\t([a-z]\w*)", code, re.MULTILINE))
    result = {"cpu": cpu, "isa": name, "rows": rows, "instructions": kinds.total(), "kinds": dict(kinds.most_common())}
    if (found := cycles(code, cpu)) is not None:
        result |= {"cycles": found, "weights_gb_per_s": round(TILE_BYTES * clock / found, 1)}
        result |= {"gops": round(2 * 16 * 64 * rows * clock / found, 1)}
    return result


def check(results: list[dict[str, Any]]) -> None:
    """End with an error where an estimate is 3 % above the one that was written down."""
    for new, old in zip(results, json.loads(RESULTS.read_text(encoding="utf-8")), strict=True):
        assert (new["cpu"], new["rows"]) == (old["cpu"], old["rows"])
        for key in ("instructions", "cycles"):
            if key in new and new[key] > 1.03 * old[key]:
                sys.exit(f"{new['cpu']}, {new['rows']} rows: {new[key]} {key}, {old[key]} in {RESULTS.name}")


if __name__ == "__main__":
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    results = [estimate(cpu, rows) for cpu in CPUS for rows in (1, 2, 3, 4)]
    print("cpu         isa           rows  instructions  cycles/tile  GB/s/core  GOPS/core")
    for r in results:
        figures = [r.get(key, "-") for key in ("cycles", "weights_gb_per_s", "gops")]
        line = "{cpu:<12}{isa:<14}{rows:<6}{instructions:<14}".format(**r)
        print(line + "{:<13}{:<11}{}".format(*figures))
    if MCA is None:
        print("no llvm-mca here (in Debian's package llvm): instructions only", file=sys.stderr)
    if "--check" in sys.argv:
        check(results)
    elif MCA:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
