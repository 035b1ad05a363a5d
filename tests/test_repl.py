"""The conversation at a terminal: its commands, what it shows, and what it keeps."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import adapters
import pytest
from conftest import BUNDLED
from terminal import Terminal

from edgellm import session
from edgellm.api import load
from edgellm.errors import ArgumentError
from edgellm.repl import COMMANDS, Repl, checked, parsed
from edgellm.screen import MarkdownScreen, Screen, complete_blocks
from edgellm.thoughts import thoughts

ROOT = Path(__file__).parents[1]
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


class Shown(Screen):
    """A screen that remembers."""

    def __init__(self):
        super().__init__()
        self.answers, self.notes = [], []

    def answer(self, pieces, thinking=False):
        self.answers.append("".join(pieces))

    def note(self, text):
        self.notes.append(text)

    def error(self, error):
        self.notes.append(f"Error: {error}")


@pytest.fixture(scope="module")
def model():
    with load(BUNDLED, backend="reference") as model:
        model.info = replace(model.info, chat_template=TEMPLATE)
        yield model


@pytest.fixture
def repl(model):
    made = Repl(model, model.chat("Be brief."), Shown(), {"temperature": 0.0, "max_tokens": 6})
    made.screen = made._screen
    return made


def typed(repl, *lines):
    """Type lines, then leave; returns what was noted."""
    rest = iter(lines)

    def line(prompt, default):
        repl.defaults = [*getattr(repl, "defaults", []), default]
        try:
            found = next(rest)
        except StopIteration:
            raise EOFError from None
        if isinstance(found, BaseException):
            raise found
        return found

    repl._line = line
    repl.screen.notes.clear()
    repl.run()
    return repl.screen.notes[1:]


def said(repl):
    return [message["content"] for message in repl._chat.messages]


def test_messages_and_answers(repl):
    assert typed(repl, "Once upon", "", '"""a time', "there was", 'a girl"""', KeyboardInterrupt()) == [
        "\n(stopped; Ctrl-D or /bye leaves)"
    ]
    first, second = repl.screen.answers
    assert said(repl) == ["Be brief.", "Once upon", first, "a time\nthere was\na girl", second]


def test_undo_regen_edit_clear(repl):
    typed(repl, "Once upon a time", "Then")
    first, second = repl.screen.answers
    assert typed(repl, "/undo") == ["(taken back: Then)"]
    assert said(repl) == ["Be brief.", "Once upon a time", first]
    typed(repl, "/regen")
    assert said(repl) == ["Be brief.", "Once upon a time", first]
    typed(repl, "/edit", "Once there was")
    assert repl.defaults[-2] == "Once upon a time"
    assert said(repl)[:2] == ["Be brief.", "Once there was"]
    typed(repl, "/clear")
    assert said(repl) == ["Be brief."]
    for command in ("/undo", "/regen", "/edit"):
        assert typed(repl, command) == ["Error: there is no message yet; say something first"]
    assert second


def test_what_was_taken_back_returns_if_nothing_comes(repl):
    typed(repl, "Once upon a time")
    before = said(repl)
    assert "expected a number" in typed(repl, "/set temperature -1")[0]
    typed(repl, "/edit", KeyboardInterrupt())
    assert "empty message" in typed(repl, "/edit", "")[0]
    assert "do not fit" in typed(repl, "/edit", "one two " * 400)[0]
    assert said(repl) == before


def test_settings(repl):
    assert typed(repl, "/set temperature 0.5", '/set stop ["girl"]', "/set max_tokens null", "/set think off") == []
    assert {"temperature 0.5", 'stop ["girl"]', "max_tokens null", "think false"} <= set(typed(repl, "/set"))
    assert "did you mean 'temperature'?" in typed(repl, "/set temperatur 1")[0]
    assert "top_k is 2.5; expected a whole number" in typed(repl, "/set top_k 2.5")[0]
    assert "stop is 'x'" in typed(repl, "/set stop x")[0]
    assert "think is 'maybe'" in typed(repl, "/set think maybe")[0]
    assert repl._settings["temperature"] == 0.5
    assert parsed("temperature", "0.5") == 0.5
    assert parsed("regex", "a b") == "a b"
    assert parsed("logit_bias", '{"5": -1}') == {5: -1}
    with pytest.raises(ArgumentError, match="temperature"):
        checked({"temperature": [1]})


def test_adapters(repl, model, tmp_path):
    """Of one's own for the chat, with scales; none for the model alone."""
    first, second = (adapters.written(tmp_path / f"adapter {n}", model, seed=n, size=1.0) for n in (0, 1))
    typed(repl, "Once upon a time", f"/set adapter '{first}'", "/regen", f"/set adapter '{first}':-1 '{second}'")
    assert 'adapter "adapter 0 + adapter 1"' in typed(repl, "/set")
    typed(repl, "/regen", "/set adapter none", "/regen")
    assert "adapter null" in typed(repl, "/set")
    plain, one, both, again = repl.screen.answers
    assert len({plain, one, both}) == 3
    assert again == plain
    found = typed(repl, f"/set adapter {tmp_path}/none", "/set adapter", f"/set adapter '{first}':nan")
    for words, note in zip(("no such adapter", "was given 0 names", "scale of an adapter is nan"), found, strict=True):
        assert words in note
    assert repl._chat.adapter is None


def test_system(repl):
    assert typed(repl, "/system") == ["Be brief."]
    assert typed(repl, "/system Be long.", "/system") == ["Be long."]
    assert typed(repl, "/system -", "/system") == ["(no system message)"]
    assert said(repl) == []


def test_read(repl, tmp_path):
    (tmp_path / "my notes.txt").write_text("Lily has a cat.\n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    (note,) = typed(repl, f"/read '{tmp_path}/my notes.txt'")
    assert "tokens go with your next message" in note
    assert "do not fit" in typed(repl, "one two " * 400)[0]
    typed(repl, "What has Lily?")
    assert said(repl)[1] == "Lily has a cat.\n\nWhat has Lily?"
    typed(repl, "And?")
    assert said(repl)[3] == "And?"
    assert "not UTF-8" in typed(repl, f"/read {tmp_path}/image.png")[0]
    assert "cannot be read" in typed(repl, f"/read {tmp_path}/none")[0]
    assert "close the quotation" in typed(repl, "/read 'a")[0]
    assert "was given 0 names" in typed(repl, "/read")[0]


def test_save_and_load(repl, model, tmp_path):
    path = tmp_path / "chat.json"
    typed(repl, "Once upon a time", f"/save {path}", "/set temperature 1")
    before = said(repl)
    assert typed(repl, "/clear", f"/load {path}") == [f"(loaded 3 messages from {path})"]
    assert said(repl) == before
    assert repl._settings["temperature"] == 0
    other = Repl(model, model.chat(), Shown(), {}, saved=path)
    assert said(other) == before
    other.screen = other._screen
    typed(other, "Then")
    assert len(session.read(path, model.fingerprint).messages) == 5
    assert "was given 2 names" in typed(repl, "/save a b")[0]
    assert "cannot be written" in typed(repl, f"/save {tmp_path}/none/chat.json")[0]
    assert [file.name for file in tmp_path.iterdir()] == ["chat.json"]


BAD_SESSIONS = {
    "not JSON": (lambda text: text[:40], "no session"),
    "another kind": (lambda text: "[1]", "JSON list"),
    "another version": (lambda text: text.replace('"edgellm_session": 1', '"edgellm_session": 9'), "format 9"),
    "a part is missing": (lambda text: text.replace('"settings"', '"sets"'), "no 'settings'"),
    "another model": (lambda text: text.replace('"fingerprint": "', '"fingerprint": "0'), "another|not the one"),
    "an unknown role": (lambda text: text.replace('"user"', '"tutor"'), "message 2"),
    "no list": (lambda text: json.dumps({**json.loads(text), "messages": "hi"}), "expected a list"),
    "deep": (lambda text: "[" * 100_000, "no session"),
}


@pytest.mark.parametrize("case", BAD_SESSIONS)
def test_sessions_that_cannot_be_loaded(repl, tmp_path, case):
    path, (change, words) = tmp_path / "chat.json", BAD_SESSIONS[case]
    typed(repl, "Once upon a time", f"/save {path}")
    before, text = said(repl), path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text
    with pytest.raises(ArgumentError, match=words):
        repl._load(path)
    assert said(repl) == before


def test_help_and_unknown_commands(repl):
    shown = typed(repl, "/help")
    assert [line.split()[0] for line in shown[:-1]] == [f"/{name}" for name in COMMANDS]
    assert typed(repl, "/? set") == [f"/set {Repl.set.__doc__}"]
    assert "did you mean /regen?" in typed(repl, "/regenn")[0]
    assert typed(repl, "/quit", "never said") == []


def test_show_and_stats(repl):
    typed(repl, "Once upon a time")
    assert "stories260K" in typed(repl, "/show")[0]
    shown = typed(repl, "/stats")
    assert "generated_tokens 6" in shown
    assert "context" in shown[-1]


def test_thoughts_are_told_apart_however_they_are_cut():
    text, expected = "a<think>b<c</think>d</x", [(False, "a"), (True, "b<c"), (False, "d</x")]
    for size in range(1, len(text) + 1):
        found = []
        for thought, part in thoughts(text[i : i + size] for i in range(0, len(text), size)):
            if found and found[-1][0] == thought:
                found[-1] = thought, found[-1][1] + part
            else:
                found.append((thought, part))
        assert found == expected
    assert list(thoughts(["b</think>d"], thinking=True)) == [(True, "b"), (False, "d")]


def test_blocks_that_are_complete():
    assert complete_blocks("one\n\ntwo") == ("one\n\n", "two")
    assert complete_blocks("one\ntwo") == ("", "one\ntwo")
    assert complete_blocks("```\na\n\nb\n") == ("", "```\na\n\nb\n")
    assert complete_blocks("```\na\n\nb\n```\n\nc\n") == ("```\na\n\nb\n```\n\n", "c\n")


def test_plain_and_markdown_screens(capsys):
    for screen in (Screen(), MarkdownScreen()):
        screen.answer(iter(["<think>hm", "m</think>**Par", "is** it\n\nis", ".\n"]))
        assert "hmm" in capsys.readouterr().out
        screen.shows_thoughts = False
        screen.answer(iter(["hm", "m</think>**Par", "is** it\n\nis", ".\n"]), thinking=True)
        shown = capsys.readouterr().out
        assert "hmm" not in shown
        assert ("**Paris** it" if type(screen) is Screen else "Paris it") in shown


terminals = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals on Windows")


@terminals
@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_every_command_in_a_terminal(smollm2_path, smollm2, tmp_path, terminal):
    (tmp_path / "notes.txt").write_text("The password of the day is swordfish.")
    adapter = adapters.written(tmp_path / "loud", smollm2, size=2.0)
    home = {"TERM": terminal, "XDG_CACHE_HOME": str(tmp_path)} if terminal == "dumb" else {"TERM": terminal}
    with Terminal("chat", "-m", str(smollm2_path), "--temp", "0", "-n", "40", **home) as person:
        assert "/help shows commands" in person.until_ready()
        assert "Paris" in person.say("What is the capital of France? Answer in one word.")
        assert "/regen" in person.say("/help")
        assert "temperature 0.0" in person.say("/set")
        person.say("/set max_tokens 30")
        assert "user: What is the capital of France?" in person.say("/show")
        person.say(f"/set adapter {adapter}")
        assert 'adapter "loud"' in person.say("/set")
        assert "Paris" not in person.say("/regen")
        person.say("/set adapter none")
        assert "(no system message)" in person.say("/system")
        person.say("/system You answer in one word.")
        assert "Paris" in person.say("/regen")
        assert "tokens/s" in person.say("/stats")
        assert "(saved 3 messages" in person.say(f"/save {tmp_path}/chat.json")
        person.type("/edit\r")
        person.until("in one word." if terminal == "xterm" else ">>> ")
        assert "Rome" in person.say("\x15What is the capital of Italy? One word.")
        assert "(taken back: What is the capital of Italy?" in person.say("/undo")
        assert "tokens go with" in person.say(f"/read {tmp_path}/notes.txt")
        assert "wordfish" in person.say("What is the password of the day?")
        person.say("/clear")
        assert "(loaded 3 messages" in person.say(f"/load {tmp_path}/chat.json")
        assert "did you mean /load?" in person.say("/lod x")
        person.type('"""What is the capital of Spain?\r')
        person.until("...")  # and the space, which prompt_toolkit makes by moving the cursor
        assert "Madrid" in person.say('Answer in one word."""')
        person.type("/bye\r")
        assert person.process.wait(20) == 0


@terminals
def test_ctrl_c_and_ctrl_d_in_a_terminal(smollm2_path):
    with Terminal("chat", "-m", str(smollm2_path), "--temp", "0", "--stats") as person:
        person.until_ready()
        person.type("Write a long story about a dog and a cat.\r")
        person.until("Once")
        person.type("\x03")
        assert "(stopped;" in person.until_ready()
        assert "Rome" in person.say("What is the capital of Italy? Answer in one word.")
        person.type("\x04")
        assert person.process.wait(20) == 0


def texts(path):
    """The lines that an SVG shows at last."""
    groups = ElementTree.parse(path).getroot().findall("{*}g")
    last = [group for group in groups if group.get("display") != "none"]
    return ["".join(group.itertext()).replace("\xa0", " ") for group in last]


def test_the_recording(smollm2_path, tmp_path):
    """It is what the program shows, and the one in the README is of commands that there are."""
    subprocess.run(
        [sys.executable, "-W", "error", ROOT / "docs" / "record.py", tmp_path / "chat.svg", "/show"], check=True
    )
    shown = texts(tmp_path / "chat.svg")
    assert shown[1] == ">>> /show"
    assert shown[2].startswith("smollm2: llama, 30 layers, ")
    committed = ROOT / "docs" / "chat.svg"
    assert f"]({committed.relative_to(ROOT).as_posix()})" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert committed.stat().st_size < 60_000
    said = [line.removeprefix(">>> ") for line in texts(committed) if line.startswith(">>> ")]
    assert {line[1:].split()[0] for line in said if line.startswith("/")} <= COMMANDS.keys()
    assert "What is the capital of France?" in said
    assert "The capital of France is Paris." in texts(committed)
