"""The official JSON Schema suite, draft 2020-12, against our masks; writes the table of docs/json-schema.md.

    python tests/json_schema_suite.py SUITE --write docs/json-schema.md

SUITE is a checkout of github.com/json-schema-org/JSON-Schema-Test-Suite.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, permutations, product
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.errors import ArgumentError, UnsupportedError
from edgellm.structured.constraint import Constraint, Grammar, Vocabulary, grammar_for

END = 256
BEGIN_MARK, END_MARK = "<!-- written by tests/json_schema_suite.py -->", "<!-- end -->"


class ByteTokenizer:
    """A vocabulary of the 256 bytes: a mask over it is the mask of a grammar itself."""

    n_tokens, eos_ids, drops_space = 257, (END,), False

    def token_bytes(self, id: int) -> bytes:
        return bytes([id]) if id < END else b"<end>"

    def is_special(self, id: int) -> bool:
        return id == END

    def encode(self, text: str, **options: bool) -> list[int]:
        return list(text.encode())


BYTES = Vocabulary(ByteTokenizer())  # type: ignore[arg-type]


def accepts(grammar: Grammar, text: str, vocabulary: Vocabulary = BYTES, ids: list[int] | None = None) -> bool:
    """Whether the masks let a text through, token by token, and let it end there."""
    constraint = Constraint(vocabulary, grammar)
    logits = np.zeros(vocabulary.n_tokens, np.float32)
    for id in list(text.encode()) if ids is None else ids:
        if constraint.is_done or constraint.mask(logits)[id] < 0:
            return False
        constraint.accept(id)
    return constraint.is_done or any(constraint.mask(logits)[end] == 0 for end in vocabulary.ends)


def written(value: Any) -> Iterator[str]:
    """A value as JSON in the ways that our grammars may write it: with its properties in this or that order."""
    yield from {json.dumps(form, ensure_ascii=False) for form in _forms(value)}


def _forms(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for names in islice(permutations(value), 24):
            for items in islice(product(*(list(_forms(value[name])) for name in names)), 48):
                yield dict(zip(names, items, strict=True))
    elif isinstance(value, list):
        yield from map(list, islice(product(*(list(_forms(item)) for item in value)), 48))
    else:  # 1.0 is the number 1
        yield int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass
class Result:
    """What became of one file of the suite."""

    name: str
    supported: int = 0
    """Schemas."""
    refused: list[str] = field(default_factory=list)
    """Messages."""
    impossible: list[tuple[str, bool]] = field(default_factory=list)
    """Schemas that are refused as no value is in them: message, and whether the suite has a valid value."""
    n_valid: int = 0
    n_invalid: int = 0
    rejected: list[str] = field(default_factory=list)
    """Valid values that our masks do not let through."""
    accepted: list[str] = field(default_factory=list)
    """Invalid ones that they do."""


def run(path: Path) -> Result:
    result = Result(path.stem)
    for group in json.loads(path.read_text(encoding="utf-8")):
        try:
            grammar = grammar_for(json_schema=group["schema"])
            assert grammar
            Constraint(BYTES, grammar)
        except UnsupportedError as error:
            result.refused.append(str(error))
        except ArgumentError as error:
            result.impossible.append((str(error), any(test["valid"] for test in group["tests"])))
        else:
            result.supported += 1
            for test in group["tests"]:
                _judge(result, grammar, test, f"{group['description']}: {test['description']}")
    return result


def _judge(result: Result, grammar: Grammar, test: dict[str, Any], name: str) -> None:
    passes = any(accepts(grammar, text) for text in written(test["data"]))
    if test["valid"]:
        result.n_valid += 1
        result.rejected += [] if passes else [name]
    else:
        result.n_invalid += 1
        result.accepted += [name] if passes else []


def files(suite: Path) -> list[Path]:
    folder = suite / "tests" / "draft2020-12"
    return [*sorted(folder.glob("*.json")), *sorted((folder / "optional" / "format").glob("*.json"))]


def table(results: list[Result]) -> str:
    lines = [
        "| file of the suite | schemas kept to | refused | valid: let through | invalid: kept out |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        valid = f"{result.n_valid - len(result.rejected)} of {result.n_valid}" if result.n_valid else ""
        invalid = f"{result.n_invalid - len(result.accepted)} of {result.n_invalid}" if result.n_invalid else ""
        n_refused = len(result.refused) + len(result.impossible)
        lines.append(f"| {result.name} | {result.supported} | {n_refused or ''} | {valid} | {invalid} |")
    return "\n".join(lines)


def document(old: str, results: list[Result]) -> str:
    before, rest = old.split(BEGIN_MARK)
    return f"{before}{BEGIN_MARK}\n{table(results)}\n{END_MARK}{rest.split(END_MARK)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--write", type=Path, help="The document whose table is written anew.")
    options = parser.parse_args()
    results = [run(path) for path in files(options.suite)]
    if options.write:
        options.write.write_text(document(options.write.read_text(encoding="utf-8"), results), encoding="utf-8")
    else:
        print(table(results))
        for result in results:
            for kind in ("refused", "impossible", "rejected", "accepted"):
                for item in getattr(result, kind):
                    print(f"{result.name} {kind}: {str(item)[:200]}")


if __name__ == "__main__":
    main()
