"""A server that many use at once: some leave, some find no room, and then it is killed."""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from serving import Server, until

import edgellm

sys.path.insert(0, str(Path(edgellm.__file__).parents[1] / "benchmarks"))
load = __import__("load")

MODEL = "stories260k"
STORY = {"prompt": "Once upon a time", "max_tokens": 60, "temperature": 0, "ignore_eos": True}


def text(server):
    status, found = server.post("/v1/completions", STORY)
    assert status == 200
    return found["choices"][0]["text"]


def test_those_who_stay_get_their_answers_when_others_leave():
    with Server(MODEL, "--slots", 4, "--queue", 60) as server:
        before = text(server)
        told = asyncio.run(load.leaving(server.port, [STORY] * 40))
        assert [(each.status, each.error, each.n_tokens) for each in told[::2]] == [(200, None, 60)] * 20
        assert all(1 <= len(each.times) < 60 for each in told[1::2])
        until(lambda: server.metric("edgellm_answers") == 0)
        assert text(server) == before
        assert "error" not in {line["level"] for line in server.log()}


COUNTS_ANSWERS = """\
import gc
from edgellm.answer import Answer
from edgellm.server.service import Service
gauges = Service.gauges
def with_answers(self):
    return {**gauges(self), 'answers_in_memory': ('', sum(type(each) is Answer for each in gc.get_objects()))}
Service.gauges = with_answers
gc.disable()"""


def test_nothing_of_an_answer_stays_in_memory():
    """Nor waits for Python to look for circles."""
    with Server(MODEL, "--slots", 2, "--queue", 20, before=COUNTS_ANSWERS) as server:
        told = asyncio.run(load.leaving(server.port, [STORY] * 20))
        assert all(each.status == 200 for each in told)
        assert text(server)
        until(lambda: server.metric("edgellm_answers") == 0)
        until(lambda: server.metric("answers_in_memory") == 0)


def test_who_finds_no_room_hears_when_to_ask_again():
    with Server(MODEL, "--backend", "reference", "--slots", 2, "--queue", 2) as server:
        told = asyncio.run(load.closed(server.port, 20, [STORY] * 20, load.COMPLETIONS))
        assert {each.status for each in told} == {200, 503}
        for each in told:
            assert each.n_tokens == (60 if each.status == 200 else 0)
            assert ("retry-after: 2" in each.headers) == (each.status == 503)
        until(lambda: server.metric("edgellm_answers") == 0)
        assert text(server)


def test_a_server_that_was_killed_under_load_starts_again():
    with Server(MODEL) as server:
        expected, told = text(server), []
        many = threading.Thread(
            target=lambda: told.extend(asyncio.run(load.closed(server.port, 8, [STORY] * 5000, load.COMPLETIONS)))
        )
        many.start()
        until(lambda: server.metric("edgellm_answers") > 0)
        server.process.kill()
        many.join(60)
        assert any(each.error for each in told)
    with Server(MODEL) as server:
        assert text(server) == expected


@pytest.mark.parametrize("n_files", [1, 5])
def test_a_server_that_was_killed_while_it_compiled_starts_again(tmp_path, n_files):
    """With the kernels that were complete."""
    environment = {**os.environ, "EDGELLM_HOME": str(tmp_path)}
    first = subprocess.Popen(
        [sys.executable, "-m", "edgellm", "serve", MODEL, "--port", "0"], env=environment, stdout=subprocess.DEVNULL
    )
    until(lambda: len(list(tmp_path.rglob("*.kernel"))) >= n_files, 60)
    first.kill()
    first.wait()
    with Server(MODEL, before=f"import os; os.environ['EDGELLM_HOME'] = {str(tmp_path)!r}") as server:
        assert text(server)
