"""Questions as lm-evaluation-harness words them, metrics by hand, and what is no question."""

import json
import math
from pathlib import Path

import pytest
from conftest import shared

from edgellm import tasks
from edgellm.errors import ArgumentError
from edgellm.tasks import Answer, Question

CHOICE = {"query": "Why?", "choices": ["This.", "That."], "gold": 1}


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def first(name, record):
    return tasks.questions(name, lines(record, record))[0]


def test_choices_after_a_question():
    for name in ("arc_easy", "arc_challenge", "piqa"):
        for query in ("Question: How?", "Question: How?\n", "How?"):
            question = first(name, {**CHOICE, "query": query})
            context = "Question: How?\nAnswer:"
            assert question == Question(((context, "This."), (context, "That.")), 1)


def test_choices_after_a_statement():
    for name in ("openbookqa", "hellaswag"):
        assert first(name, CHOICE) == Question((("Why?", "This."), ("Why?", "That.")), 1)


def test_boolq_puts_the_passage_first():
    record = {"query": "Passage: Ice is cold.\nQuestion: is ice cold?", "choices": ["no", "yes"], "gold": 1}
    context = "Ice is cold.\nQuestion: is ice cold?\nAnswer:"
    assert first("boolq", record) == Question(((context, "no"), (context, "yes")), 1)


def test_winogrande_scores_what_follows_the_blank():
    record = {"context_options": ["The cup held tea so the cup", "The cup held tea so the tea"], "gold": 1}
    assert first("winogrande", {**record, "continuation": "was hot."}) == Question(
        (("The cup held tea so the cup", "was hot."), ("The cup held tea so the tea", "was hot.")), 1
    )


def test_lambada_scores_the_last_word():
    expected = Question((("Ann saw Bob and greeted", "Bob"),))
    assert first("lambada", {"text": "Ann saw Bob and greeted Bob"}) == expected
    assert first("lambada", {"context": "Ann saw Bob and greeted", "continuation": "Bob"}) == expected
    assert first("lambada", {"text": "Ann"}) == Question((("", "Ann"),))


def test_hellaswag_as_text_and_as_published():
    text = "Tea: A man boils water. he\n2\npours it.\nsings.\ndrinks it.\nleaves.\n" * 2
    question = tasks.questions("hellaswag", text)[0]
    endings = ["pours it.", "sings.", "drinks it.", "leaves."]
    assert question == Question(tuple(("Tea: A man boils water. he", ending) for ending in endings), 2)
    published = {"ind": 4, "activity_label": "Tea", "ctx_a": "A man boils water.", "ctx_b": "he", "endings": endings}
    question = first("hellaswag", {**published, "label": 2, "split": "val"})
    assert question == Question(tuple(("Tea: A man boils water. He", ending) for ending in endings), 2)
    wiki = {"activity_label": "Home", "ctx_a": "[header] How to rest [title] Sit down. [step] Sit.", "ctx_b": "",
            "endings": ["[substeps] Sleep. [title] Eat.", "Rest.", "Go.", "Sing."], "label": "1"}  # fmt: skip
    question = first("hellaswag", wiki)
    assert question.answers[0] == ("Home: How to rest. Sit down. Sit.", " Sleep.. Eat.")
    assert question.gold == 1


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [("arc_challenge", "llm-foundry", 1172), ("arc_easy", "llm-foundry", 2376), ("boolq", "llm-foundry", 3270),
     ("hellaswag", "hellaswag", 10042), ("lambada", "llm-foundry", 5153), ("openbookqa", "llm-foundry", 500),
     ("piqa", "llm-foundry", 1838), ("winogrande", "llm-foundry", 1267)],
)  # fmt: skip
def test_whole_data_files(name, file, count):
    path = tasks.data_file(name, shared(f"data/eval/{file}"))
    text = path.read_text(encoding="utf-8")
    assert len(tasks.questions(name, text)) == count
    assert tasks.questions(name, text, 3) == tasks.questions(name, text)[:3]


BAD = {
    "not JSON": ("piqa", lines(CHOICE) + "{", "line 2: no JSON .* an object a line"),
    "nested too deep": ("piqa", lines(CHOICE) + "[" * 10**6, "line 2: no JSON"),
    "a list": ("piqa", lines(CHOICE) + "[1]\n", "line 2: a JSON list; expected an object"),
    "an empty line": ("piqa", lines(CHOICE) + "\n" + lines(CHOICE), "line 2: no JSON"),
    "unknown fields": ("piqa", lines({"goal": "a", "sol1": "b"}), "line 1: fields goal, sol1; expected query and choi"),
    "no fields": ("lambada", lines({}), "fields none; expected text, or context and continuation"),
    "text that is a number": ("piqa", lines({**CHOICE, "query": 1}), "line 1: query is '1'; expected some text"),
    "empty text": ("lambada", lines({"text": " "}), "text is ' '; expected some text"),
    "choices that are text": ("piqa", lines({**CHOICE, "choices": "ab"}), "choices is 'ab'; expected a list of texts"),
    "an empty choice": ("piqa", lines({**CHOICE, "choices": ["a", ""]}), "choices is .*; expected a list of texts"),
    "no choices": ("piqa", lines({**CHOICE, "choices": []}), "gold is '1'; expected a number from 0 to -1"),
    "gold too large": ("piqa", lines(CHOICE, {**CHOICE, "gold": 2}), "line 2: gold is '2'; .* from 0 to 1"),
    "gold negative": ("piqa", lines({**CHOICE, "gold": -1}), "gold is '-1'"),
    "gold true": ("piqa", lines({**CHOICE, "gold": True}), "gold is 'True'"),
    "half a question": ("hellaswag", "a\n0\nb\nc\nd\ne\nf\n", "line 7: 1 of 6 lines"),
    "text where the number is": ("hellaswag", "a\nb\nc\nd\ne\nf\n", "line 1: gold is 'b'"),
    "nothing": ("hellaswag", "", "line 1: 1 of 6 lines"),
    "a single question": ("piqa", lines(CHOICE), "1 question of piqa; expected at least 2"),
    "unknown task": ("mmlu", lines(CHOICE), "no task 'mmlu'; expected one of arc_challenge, arc_easy, boolq"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_question(case):
    name, text, words = BAD[case]
    with pytest.raises(ArgumentError, match=words):
        tasks.questions(name, text)


def test_where_the_data_is(tmp_path):
    (tmp_path / "piqa.jsonl").write_text("")
    assert tasks.data_file("piqa", tmp_path) == tasks.data_file("piqa", tmp_path / "piqa.jsonl")
    with pytest.raises(ArgumentError, match=r"^boolq needs a data file, .* fetch boolq.jsonl from http"):
        tasks.data_file("boolq", None)
    for given in (tmp_path, tmp_path / "boolq.jsonl"):
        with pytest.raises(ArgumentError, match=r"boolq.jsonl: no such file; fetch .* with --data$"):
            tasks.data_file("boolq", given)


def results(name, questions, *answers):
    return tasks.results(tasks.get(name), questions, dict(enumerate(answers)))


def test_accuracy_by_hand():
    """Of three questions the likeliest answer is right twice, a character's likelihood once."""
    question = Question((("Q", "four"), ("Q", "fourfour")), 0)
    said = [Answer(-4.0, False), Answer(-6.0, False)], [Answer(-4.0, False), Answer(-9.0, False)]
    wrong = [Answer(-4.0, True), Answer(-3.0, True)]
    found = results("piqa", [question] * 3, *said, wrong)
    assert set(found) == {"acc", "acc_norm"}
    # The sample variance of two ones and a zero, or of one and two, is 1/3.
    assert found["acc"] == pytest.approx((2 / 3, math.sqrt(1 / 3 / 3)))
    assert found["acc_norm"] == pytest.approx((1 / 3, math.sqrt(1 / 3 / 3)))


def test_the_first_of_equals_is_chosen():
    question, said = Question((("Q", "a"), ("Q", "b")), 0), [Answer(-1.0, False)] * 2
    assert results("boolq", [question] * 2, said, said) == {"acc": (1.0, 0.0)}


def test_last_words_by_hand():
    """Probabilities of 1/2 and 1/8: the perplexity is 4. Both are ln 2 off the mean, whose standard error that is."""
    said = [Answer(math.log(1 / 2), True)], [Answer(math.log(1 / 8), False)]
    found = results("lambada", [Question((("a", "b"),))] * 2, *said)
    assert found["acc"] == pytest.approx((0.5, 0.5))
    assert found["perplexity"] == pytest.approx((4.0, 4 * math.log(2)))


def test_every_task_says_where_its_data_is():
    for name, task in tasks.TASKS.items():
        assert task.source.startswith("https://github.com/")
        assert Path(task.file).suffix in (".jsonl", ".txt"), name
