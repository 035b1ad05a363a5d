"""The figures that compare.py keeps -> tables: for a terminal, and the one in the README.

python benchmarks/report.py FILE.json              print all figures
python benchmarks/report.py FILE.json --readme     write the README's table
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
KEYS = "machine", "versions", "threads", "model", "tests"
LOWER_IS_BETTER = "s", "MB"
COLUMNS = "llama.cpp", "llama.cpp Q4_0", "xllamacpp", "OpenVINO GenAI"
BLOCK = re.compile(r"<!-- figures of (?P<file>[^ ]*) -->\n(?P<table>.*?)<!-- end of figures -->\n", re.DOTALL)


class ReportError(Exception):
    """A file is not what compare.py writes, or a document has no place for a table."""


@dataclass(frozen=True)
class Cell:
    """One figure of one contender: the best of its variants."""

    name: str
    variant: str
    values: list[float]
    ratio: float
    """How many times better edgellm's figure is: the median of the rounds' ratios."""
    foreign: float | None
    """CPUs that others kept busy in the worst of the samples."""
    target: float | None

    @property
    def median(self) -> float:
        return median(self.values)


@dataclass(frozen=True)
class Row:
    """One figure of all contenders, edgellm the first."""

    title: str
    unit: str
    cells: dict[str, Cell]
    missing: dict[str, str]


# ---- figures


def rows(found: dict[str, Any]) -> list[Row]:
    return [
        Row(test["title"], unit, cells(test, unit), test["missing"])
        for test in found["tests"].values()
        for unit in units(test)
    ]


def units(test: dict[str, Any]) -> list[str]:
    (ours,) = test["figures"]["edgellm"].values()
    return [unit for unit in ours if unit != "foreign"]


def cells(test: dict[str, Any], unit: str) -> dict[str, Cell]:
    (ours,) = test["figures"]["edgellm"].values()
    made = {}
    for name, variants in test["figures"].items():
        variant = best(variants, unit)
        kept = variants[variant]
        foreign = max(kept["foreign"]) if "foreign" in kept else None
        target = test["targets"].get(f"{name} {unit}", test["targets"].get(name))
        made[name] = Cell(name, variant, kept[unit], ratio(ours[unit], kept[unit], unit), foreign, target)
    return made


def best(variants: dict[str, dict[str, list[float]]], unit: str) -> str:
    """The variant with the best median."""
    pick = min if unit in LOWER_IS_BETTER else max
    return pick(variants, key=lambda variant: median(variants[variant][unit]))


def ratio(ours: Sequence[float], theirs: Sequence[float], unit: str) -> float:
    """The median over the rounds of ours / theirs, or theirs / ours where lower is better: above 1, ours is better."""
    pairs = list(zip(ours, theirs, strict=False))
    return median(b / a if unit in LOWER_IS_BETTER else a / b for a, b in pairs)


# ---- tables


def text(found: dict[str, Any]) -> str:
    """Every figure: median, range, ratio, target, foreign load."""
    lines = [f"{where(found)}; {found['threads']} threads; {found['model']}", versions(found)]
    for row in rows(found):
        lines += ["", f"{row.title} ({row.unit})"]
        lines += [_line(cell) for cell in row.cells.values()]
        lines += [f"  {name:<16}missing: {why}" for name, why in row.missing.items()]
    return "\n".join(lines)


def _line(cell: Cell) -> str:
    span = f"[{min(cell.values):.4g}-{max(cell.values):.4g}]"
    foreign = "" if cell.foreign is None else f"foreign {cell.foreign:.2f}"
    name = f"  {cell.name:<16}{cell.variant:<18}"
    return f"{name}{cell.median:>8.4g}  {span:<18}{_against(cell):<34}{foreign}".rstrip()


def _against(cell: Cell) -> str:
    if cell.name == "edgellm":
        return ""
    shown = f"{100 * cell.ratio:.0f} % of it" if cell.name == "limit" else f"{cell.ratio:.2f} times"
    if cell.target is None:
        return shown
    goal = f"{100 * cell.target:.0f} %" if cell.name == "limit" else f"{cell.target:.3g}"
    return f"{shown}, target {goal}: {'met' if cell.ratio >= cell.target else 'missed'}"


def markdown(found: dict[str, Any]) -> str:
    """The table of the README, and what must be known to read it."""
    columns = [name for name in COLUMNS if any(name in row.cells or name in row.missing for row in rows(found))]
    lines = ["| | edgellm | " + " | ".join([*columns, "of the limit"]) + " |", "|---" * (len(columns) + 3) + "|"]
    for row in rows(found):
        shown = [f"{row.title}, {row.unit}", f"**{figure(row.cells['edgellm'].median)}**"]
        shown += [_cell(row, name) for name in columns]
        limit = row.cells.get("limit")
        shown += [f"{100 * limit.ratio:.0f} %" if limit else "-"]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", *_circumstances(found), ""])


def _circumstances(found: dict[str, Any]) -> list[str]:
    rounds = sorted({test["rounds"] for test in found["tests"].values()})
    dates = sorted({test["date"][:10] for test in found["tests"].values()})
    loads = [cell.foreign for row in rows(found) for cell in row.cells.values() if cell.foreign is not None]
    times = " to ".join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))
    command = f"python benchmarks/compare.py --llama-bench PATH --rounds {rounds[-1]} --threads {found['threads']}"
    return [
        f"{where(found)}, {found['threads']} threads, {' and '.join(dates)}; {found['model']};",
        f"{versions(found)}.",
        f"Rounds: {times}. Other programs kept at most {max(loads):.2f} CPUs busy meanwhile." if loads else "",
        f"To repeat it: `{command}`",
    ]


def _cell(row: Row, name: str) -> str:
    if name in row.cells:
        return f"{figure(row.cells[name].median)} ({row.cells[name].ratio:.2f})"
    return "missing" if name in row.missing else "-"


def figure(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}"


def where(found: dict[str, Any]) -> str:
    machine = found["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['kernel']}, Python {machine['python']}"


def versions(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found["versions"].items())


# ---- files


def load(path: Path) -> dict[str, Any]:
    """Raises ReportError for a file that compare.py has not written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict) or any(key not in found for key in KEYS):
        raise ReportError(f"{path} has no figures of compare.py; expected an object with {', '.join(KEYS)}")
    return found


def dump(found: dict[str, Any]) -> str:
    """JSON with a list of numbers on one line."""
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", _one_line, json.dumps(found, indent=1)) + "\n"


def _one_line(numbers: re.Match[str]) -> str:
    return "[" + re.sub(r"\s+", " ", numbers[1]) + "]"


def with_table(readme: str, name: str, found: dict[str, Any]) -> str:
    """The README with the table of a file of that name. Raises ReportError if it has no place for one."""
    return with_block(readme, name, markdown(found))


def with_block(document: str, name: str, figures: str) -> str:
    """A document with the figures of a file of that name, in Markdown, in place of those that it has. Raises
    ReportError unless it has exactly one place for them."""
    block = f"<!-- figures of {name} -->\n{figures}<!-- end of figures -->\n"
    changed, n = BLOCK.subn(lambda _: block, document)
    if n != 1:
        raise ReportError(
            f"{'several places' if n else 'no place'} for the table of {name}; expected once the lines "
            "<!-- figures of FILE --> and <!-- end of figures -->"
        )
    return changed


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Tables of the figures that compare.py kept.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--readme", action="store_true", help="write the README's table")
    options = parser.parse_args(arguments)
    try:
        found = load(options.file)
        if not options.readme:
            print(text(found))
            return
        readme, name = ROOT / "README.md", Path(os.path.relpath(options.file.resolve(), ROOT)).as_posix()
        readme.write_text(with_table(readme.read_text(encoding="utf-8"), name, found), encoding="utf-8")
    except ReportError as error:
        sys.exit(f"report.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
