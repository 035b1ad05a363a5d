"""simonw's llm, unmodified, with its models of OpenAI's kind, against a server process on real weights."""

import json
import os
import subprocess
import sys

import jsonschema
import pytest
from serving import Server

QUESTION = "Name the capital of France."
GREEDY = ("-o", "temperature", "0", "-o", "max_tokens", "30")


@pytest.fixture(scope="module")
def llm(smollm2_path, tmp_path_factory):
    """Calls it as a command, with a folder of its own that knows the server."""
    folder = tmp_path_factory.mktemp("llm")
    with Server(smollm2_path) as server:
        known = {"model_name": smollm2_path.stem, "api_base": server.url, "supports_schema": True,
                 "supports_tools": True}  # fmt: skip
        models = [
            {"model_id": "chat", **known},
            {"model_id": "whole", **known, "can_stream": False},
            {"model_id": "text", "model_name": smollm2_path.stem, "api_base": server.url, "completion": True},
        ]
        # JSON is YAML too.
        (folder / "extra-openai-models.yaml").write_text(json.dumps(models))
        environment = {**os.environ, "LLM_USER_PATH": str(folder), "OPENAI_API_KEY": "none"}

        def run(*arguments, code=0):
            done = subprocess.run(
                [sys.executable, "-m", "llm", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                env=environment, timeout=120,
            )  # fmt: skip
            assert done.returncode == code, done.stderr
            return done.stdout if code == 0 else done.stderr

        yield run
        assert "error" not in {line["level"] for line in server.log()}


def test_a_chat_that_goes_on(llm, smollm2_cpu):
    chat = smollm2_cpu.chat("You are terse.")
    first, second = (chat.send(text, temperature=0, max_tokens=30).text for text in (QUESTION, "And of Italy?"))
    assert llm("-m", "chat", "-s", "You are terse.", *GREEDY, QUESTION) == first + "\n"
    assert llm("-c", *GREEDY, "And of Italy?") == second + "\n"
    (*_, last) = json.loads(llm("logs", "-n", "0", "--json"))
    assert last["response"] == second
    assert last["output_tokens"] > 1


def test_an_answer_as_a_whole_and_a_text(llm, smollm2_cpu):
    expected = smollm2_cpu.chat().send(QUESTION, temperature=0, max_tokens=30).text
    assert llm("-m", "whole", *GREEDY, QUESTION) == expected + "\n"
    assert llm("-m", "text", *GREEDY, "Once upon a time") == (
        smollm2_cpu.generate("Once upon a time", temperature=0, max_tokens=30).text + "\n"
    )


def test_an_answer_after_a_schema(llm):
    question = "Rex is a dog of 3 years. What is his name, and his age?"
    found = json.loads(llm("-m", "chat", "--schema", "name, age int", "-o", "temperature", "0", question))
    jsonschema.validate(found, {"required": ["name", "age"], "properties": {"age": {"type": "integer"}}})


def test_tools(llm):
    assert llm("-m", "chat", *GREEDY, "--functions", "def clock() -> str:\n    return '12'", QUESTION).strip()


def test_what_is_refused(llm):
    refused = llm("-m", "chat", "-o", "logit_bias", '{"99999": 1}', QUESTION, code=1)
    assert "logit_bias has token id 99999; expected 0 to 49151" in refused
