"""Benchmarks of language understanding: a data file -> what a model is asked, and how its answers count.

Worded and counted as lm-evaluation-harness does it, without examples before a question. A task is an entry of `TASKS`.
Knows no model and no tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from edgellm.errors import ArgumentError


@dataclass(frozen=True)
class Question:
    answers: tuple[tuple[str, str], ...]
    """(context, continuation) of each answer; a space stands between the two."""
    gold: int = 0
    """Which of them is right."""


class Answer(NamedTuple):
    """What a model says of a continuation after its context."""

    log_likelihood: float
    greedy: bool
    """Whether it is what greedy decoding gives."""


class Result(NamedTuple):
    value: float
    error: float
    """One standard error of the value."""


@dataclass(frozen=True)
class Metric:
    of: Callable[[Question, Sequence[Answer]], float]
    """A number for each question."""
    summary: Callable[[Sequence[float]], Result]
    """The result for all of them."""


@dataclass(frozen=True)
class Task:
    file: str
    """The usual name of its data file."""
    source: str
    """Where to get it."""
    metrics: Mapping[str, Metric]
    forms: Mapping[tuple[str, ...], Callable[[_Record], Question]]
    """Fields that a record has -> what makes a question of it; more fields do not matter."""


def get(name: str) -> Task:
    """The task of that name; raises ArgumentError with the names there are."""
    if name not in TASKS:
        raise ArgumentError(f"there is no task {name!r}; expected one of {', '.join(TASKS)}")
    return TASKS[name]


def data_file(name: str, given: Path | None) -> Path:
    """The file with a task's data: the one given, or the one of the usual name in a folder.

    Raises ArgumentError, which says where to get it, if there is none.
    """
    task = get(name)
    path = given / task.file if given and given.is_dir() else given
    if path is None or not path.is_file():
        raise ArgumentError(
            f"{f'{path}: no such file' if path else f'{name} needs a data file, and none was given'}; fetch "
            f"{task.file} from {task.source} and give it, or a folder that holds it, with --data"
        )
    return path


def questions(name: str, text: str, limit: int | None = None) -> list[Question]:
    """The questions of a data file, or the first ones.

    The file has a JSON object a line, or is text as llama.cpp reads it: a line with the context, one with the number of
    the right ending, and four with the endings. Raises ArgumentError with the line that makes no question, and for a
    single question, which has no standard error.
    """
    found = list(islice(_questions(name, text), limit))
    if len(found) < 2:
        raise ArgumentError(f"{len(found)} question of {name}; expected at least 2, for a standard error")
    return found


def _questions(name: str, text: str) -> Iterator[Question]:
    task, lines = get(name), text.removesuffix("\n").split("\n")
    size, parse = (1, _from_json) if text.lstrip().startswith("{") else (6, _from_text)
    for first in range(0, len(lines), size):
        try:
            yield _question(task, parse(lines[first : first + size]))
        except _MalformedError as error:
            raise ArgumentError(f"the data of {name}, line {first + 1}: {error}") from None


def results(task: Task, questions: Sequence[Question], answers: Mapping[int, Sequence[Answer]]) -> dict[str, Result]:
    """Each metric of the task; `answers` are what the model says of each question, by its number."""
    return {
        name: metric.summary([metric.of(question, answers[i]) for i, question in enumerate(questions)])
        for name, metric in task.metrics.items()
    }


class _MalformedError(Exception):
    """What is wrong with a record."""


class _Record:
    """A record whose fields are of the type that is asked for, or raise."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields

    def text(self, field: str) -> str:
        value = self.fields[field]
        if not isinstance(value, str) or not value.strip():
            raise self._unexpected(field, "some text")
        return value

    def texts(self, field: str) -> list[str]:
        values = self.fields[field]
        if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
            raise self._unexpected(field, "a list of texts")
        return values

    def index(self, field: str, count: int) -> int:
        """A number below `count`, which may be written as text."""
        value = str(self.fields[field])
        if not re.fullmatch("[0-9]{1,9}", value) or int(value) >= count:
            raise self._unexpected(field, f"a number from 0 to {count - 1}")
        return int(value)

    def _unexpected(self, field: str, expected: str) -> _MalformedError:
        return _MalformedError(f"{field} is {str(self.fields[field])[:80]!r}; expected {expected}")


def _from_json(lines: Sequence[str]) -> _Record:
    try:
        fields = json.loads(lines[0])
    except (ValueError, RecursionError) as error:
        raise _MalformedError(f"no JSON ({error}); expected an object a line") from None
    if not isinstance(fields, dict):
        raise _MalformedError(f"a JSON {type(fields).__name__}; expected an object")
    return _Record(fields)


def _from_text(lines: Sequence[str]) -> _Record:
    if len(lines) < 6:
        raise _MalformedError(
            f"{len(lines)} of 6 lines; expected a context, the right ending's number and 4 endings, or JSON lines"
        )
    query, gold, *choices = (line.strip() for line in lines)
    return _Record({"query": query, "gold": gold, "choices": choices})


def _question(task: Task, record: _Record) -> Question:
    for fields, question in task.forms.items():
        if set(fields) <= set(record.fields):
            return question(record)
    expected = ", or ".join(" and ".join(fields) for fields in task.forms)
    raise _MalformedError(f"fields {', '.join(record.fields)[:200] or 'none'}; expected {expected}")


# How records are worded.


def _choice(context: str, record: _Record) -> Question:
    choices = record.texts("choices")
    return Question(tuple((context, choice) for choice in choices), record.index("gold", len(choices)))


def _plain(record: _Record) -> Question:
    return _choice(record.text("query"), record)


def _asked(record: _Record) -> Question:
    question = record.text("query").removeprefix("Question: ").removesuffix("\n")
    return _choice(f"Question: {question}\nAnswer:", record)


def _of_passage(record: _Record) -> Question:
    """The query is "Passage: ...", a line end, "Question: ...?"."""
    return _choice(f"{record.text('query').removeprefix('Passage: ')}\nAnswer:", record)


def _partial(record: _Record) -> Question:
    """What follows the blank is the same for each way to fill it (arXiv:1806.02847)."""
    contexts, continuation = record.texts("context_options"), record.text("continuation")
    return Question(tuple((context, continuation) for context in contexts), record.index("gold", len(contexts)))


def _last_word(record: _Record) -> Question:
    context, _, word = record.text("text").rpartition(" ")
    return Question(((context, word),))


def _continued(record: _Record) -> Question:
    return Question(((record.text("context"), record.text("continuation")),))


def _activity(record: _Record) -> Question:
    endings = [_without_markup(ending) for ending in record.texts("endings")]
    context = f"{record.text('activity_label')}: {record.text('ctx_a')} {record.fields['ctx_b'].capitalize()}"
    answers = tuple((_without_markup(context), ending) for ending in endings)
    return Question(answers, record.index("label", len(endings)))


def _without_markup(text: str) -> str:
    """What WikiHow's headings left: "[header] How to ... [title] Do ..."."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


# How answers count.


def _likeliest(question: Question, answers: Sequence[Answer]) -> float:
    return _is_largest([answer.log_likelihood for answer in answers], question.gold)


def _likeliest_by_length(question: Question, answers: Sequence[Answer]) -> float:
    """Log-likelihood a character."""
    pairs = zip(answers, question.answers, strict=True)
    return _is_largest([answer.log_likelihood / len(text) for answer, (_, text) in pairs], question.gold)


def _is_largest(values: Sequence[float], at: int) -> float:
    return float(values.index(max(values)) == at)


def _greedy(question: Question, answers: Sequence[Answer]) -> float:
    return float(answers[question.gold].greedy)


def _log_likelihood(question: Question, answers: Sequence[Answer]) -> float:
    return answers[question.gold].log_likelihood


def _mean(values: Sequence[float]) -> Result:
    return Result(fmean(values), stdev(values) / math.sqrt(len(values)))


def _perplexity(log_likelihoods: Sequence[float]) -> Result:
    """Of whole continuations, not of their tokens."""
    mean = _mean(log_likelihoods)
    return Result(math.exp(-mean.value), math.exp(-mean.value) * mean.error)


ACCURACY = {"acc": Metric(_likeliest, _mean)}
BY_LENGTH = {**ACCURACY, "acc_norm": Metric(_likeliest_by_length, _mean)}
LAST_WORD = {"acc": Metric(_greedy, _mean), "perplexity": Metric(_log_likelihood, _perplexity)}

_CHOICE = ("query", "choices", "gold")
_FOUNDRY = "https://github.com/mosaicml/llm-foundry/tree/main/scripts/eval/local_data"

TASKS = {
    "arc_challenge": Task("arc_challenge.jsonl", f"{_FOUNDRY}/world_knowledge", BY_LENGTH, {_CHOICE: _asked}),
    "arc_easy": Task("arc_easy.jsonl", f"{_FOUNDRY}/world_knowledge", BY_LENGTH, {_CHOICE: _asked}),
    "boolq": Task("boolq.jsonl", f"{_FOUNDRY}/reading_comprehension", ACCURACY, {_CHOICE: _of_passage}),
    "hellaswag": Task(
        "hellaswag_val_full.txt",
        "https://github.com/klosax/hellaswag_text_data",
        BY_LENGTH,
        {_CHOICE: _plain, ("activity_label", "ctx_a", "ctx_b", "endings", "label"): _activity},
    ),
    "lambada": Task(
        "lambada_openai.jsonl",
        f"{_FOUNDRY}/language_understanding",
        LAST_WORD,
        {("text",): _last_word, ("context", "continuation"): _continued},
    ),
    "openbookqa": Task("openbook_qa.jsonl", f"{_FOUNDRY}/commonsense_reasoning", BY_LENGTH, {_CHOICE: _plain}),
    "piqa": Task("piqa.jsonl", f"{_FOUNDRY}/commonsense_reasoning", BY_LENGTH, {_CHOICE: _asked}),
    "winogrande": Task(
        "winogrande.jsonl",
        f"{_FOUNDRY}/language_understanding",
        ACCURACY,
        {("context_options", "continuation", "gold"): _partial},
    ),
}
