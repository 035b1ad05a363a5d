"""Every example, as its reader runs it: on real weights, with what it should say."""

import asyncio
import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving import Server

FOLDER = Path(__file__).parents[1] / "examples"
BOAT = """The Kestrel is a small electric boat. It was designed in 2019 by Maria Lund in Bergen. It carries six people.

The battery takes three hours to charge. The hull is made of recycled aluminium. The top speed is 12 knots.
"""
pytestmark = pytest.mark.usefixtures("smollm2_path")


def run(name, *arguments, stdin="", **environment):
    """Lines of what it says."""
    done = subprocess.run(
        [sys.executable, "-W", "error", FOLDER / name, *map(str, arguments)], input=stdin, capture_output=True,
        text=True, timeout=120, env={**os.environ, **environment}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_terminal_bot():
    first, second, _ = run("terminal_bot.py", stdin="What is the capital of France?\nAnd of Italy?\n")
    assert "Paris" in first
    assert "Rome" in second


def test_document_questions(tmp_path):
    (tmp_path / "boat.txt").write_text(BOAT)
    asked = ("Who designed the Kestrel?", "What is the hull made of?")
    _, first, read_first, _, second, read_second = run("document_questions.py", tmp_path / "boat.txt", *asked)
    assert "Maria Lund" in first
    assert "aluminium" in second
    assert "(0 of " in read_first
    n_cached, n_tokens = map(int, re.findall(r"\d+", read_second))
    assert n_tokens - n_cached < 20


def test_questions_about_a_long_document(tmp_path):
    weather = "On day {} it rained in the harbour, and the wind came from the sea. Nobody went out with a ship.\n\n"
    days = [weather.format(day) for day in range(200)]
    (tmp_path / "long.txt").write_text("".join([*days[:150], BOAT, *days[150:]]))
    _, answer, read = run("document_questions.py", tmp_path / "long.txt", "Who designed the Kestrel?")
    assert "Maria Lund" in answer
    assert int(re.findall(r"\d+", read)[1]) < 700


def test_extract():
    (line,) = run("extract.py", stdin="Anna Schmidt, 34, moved to Berlin last year.\n")
    assert line == "Person(name='Anna Schmidt', age=34, city='Berlin')"


def test_gpio_assistant():
    lines = run("gpio_assistant.py", stdin="Turn the heater on.\nPlease switch the fan off.\n")
    assert lines == ["Turn the heater on. -> heater on", "pin 22: high", "Please switch the fan off. -> fan off",
                     "pin 27: low"]  # fmt: skip


def test_label_csv_goes_on_where_it_ended(tmp_path):
    texts = ["Where is my order?", "How do I change my password?", "The package was left at the wrong door,\ntwice."]
    source, target = tmp_path / "tickets.csv", tmp_path / "labelled.csv"

    def write(texts):
        with open(source, "w", newline="") as file:
            csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
        return run("label_csv.py", source, target, "--column", "text")

    assert write(texts[:2]) == ["2 rows"]
    before = target.read_text()
    assert write(texts) == ["3 rows"]
    assert write(texts) == []
    assert target.read_text().startswith(before)
    with open(target, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["delivery", "account", "delivery"]
    assert [row["text"] for row in rows] == texts


def test_support_bot_knows_what_it_said_before_a_restart(tmp_path):
    def asked():
        return run("support_bot.py", tmp_path / "answers.db", stdin="When are you open?\nwhere is it roasted?\n")[1::2]

    answers = asked()
    assert "Monday to Saturday" in answers[0]
    assert "Bremen" in answers[1]
    assert asked() == [f"{answer} (asked before)" for answer in answers]


def test_langchain_through_the_server():
    with Server("smollm2") as server:
        answer, person = run("langchain_server.py", server.url)
    assert "Paris" in answer
    assert person == "name='Anna Schmidt' age=34 city='Berlin'"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """The command with the plugin, installed as pip does it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("llm")
    shutil.copytree(FOLDER / "llm-edgellm", folder / "source")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-build-isolation", "--no-deps",
         "--disable-pip-version-check", "--target", folder / "site", folder / "source"],
        check=True,
    )  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "LLM_USER_PATH": str(folder)}

    def command(*arguments, code=0):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "llm", *arguments], stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=120, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    return command


def test_the_llm_plugin(llm):
    options = ["-o", "temperature", "0", "-o", "max_tokens", "40"]
    assert "edgellm/stories260k" in llm("models", "-q", "edgellm")
    told = ["-s", "Answer in one short sentence."]
    assert "Paris" in llm("-m", "edgellm/smollm2", *told, *options, "What is the capital of France?")
    assert "Rome" in llm("-c", *options, "And of Italy?")
    dog = llm("-m", "edgellm/smollm2", *options, "--schema", "name, age int", "Make up a dog.")
    assert re.match(r'\{"name": "\w+", "age": \d+', dog)
    assert "the regex cannot be used" in llm("-m", "edgellm/smollm2", "-o", "regex", "(", "Hi", code=1)


def test_the_llm_plugin_in_python():
    """In pieces, and for event loops too."""
    spec = importlib.util.spec_from_file_location("llm_edgellm", FOLDER / "llm-edgellm" / "llm_edgellm.py")
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)
    options = {"temperature": 0, "max_tokens": 12, "system": "Answer in one short sentence."}

    async def pieces():
        response = plugin.AsyncEdgeModel("smollm2").prompt("What is the capital of France?", **options)
        return [piece async for piece in response]

    try:
        response = plugin.EdgeModel("smollm2").prompt("What is the capital of France?", **options)
        told = list(response)
        assert len(told) > 4
        assert "Paris" in "".join(told)
        assert (response.usage().input, response.usage().output) == (27, 8)
        assert "".join(asyncio.run(pieces())) == "".join(told)
    finally:
        plugin.loaded("smollm2").close()


def test_every_example_is_told_of_and_run():
    there = {path.name for path in FOLDER.iterdir() if path.name not in ("README.md", "__pycache__")}
    told = re.findall(r"^\| \[([\w.-]+)/?\]\(", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(told) == sorted(there)
    tests = Path(__file__).read_text(encoding="utf-8")
    tests += Path(__file__).with_name("test_serving_examples.py").read_text(encoding="utf-8")
    assert all(f'"{name}"' in tests for name in there)
