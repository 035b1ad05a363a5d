"""What a slot remembers, in a file: the same logits, on every architecture; and nothing that is damaged or foreign."""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace

import every_op
import fresh
import numpy as np
import pytest
import tiny
from conftest import BUNDLED
from test_repl import TEMPLATE, Shown, said, typed

from edgellm import architectures, cache_file, session
from edgellm.api import Model
from edgellm.cache_file import DIGEST, MAGIC, START
from edgellm.errors import ArgumentError
from edgellm.generate import Slot
from edgellm.repl import Repl

CONTEXT, LENGTH = 320, 300
BOUND_TO = {
    "fingerprint": "f",
    "backend": "b",
    "layout": "l",
    "edgellm": "0",
    "context_length": CONTEXT,
    "adapter": None,
}
GREEDY = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
TEXT = "Once upon a time there was a little girl named Lily. She liked to play in the park. " * 3


@pytest.mark.parametrize("kind", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("name", "kv"), [*((name, "f16") for name in [*architectures.names(), "every_op"]), ("every_op", "q8")]
)
def test_a_slot_goes_on_with_the_same_bits(name, kv, kind, tmp_path):
    """In another process' place: another backend of the same model, a slot that has held other tokens."""
    made = [
        every_op.backend("f32", kind, kv=kv) if name == "every_op" else tiny.backend(name, "f32", kind, CONTEXT)
        for _ in "12"
    ]
    rng = fresh.rng("files", name, kind)
    ids = [int(id) for id in rng.integers(0, 97, LENGTH)]
    slot, other, path = Slot(made[0], CONTEXT), Slot(made[1], CONTEXT), tmp_path / "cache"
    for length in (1, 127, 128, int(rng.integers(129, 290)), 290):
        if slot.reuse([*ids[:length], -1]) < length:
            slot.extend(ids[len(slot.ids) : length])
        other.extend([int(id) for id in rng.integers(0, 97, CONTEXT - len(other.ids))])
        cache_file.write(path, BOUND_TO, slot, {"of": name})
        saved = cache_file.read(path, BOUND_TO, 97)
        assert (saved.ids, saved.extra) == (ids[:length], {"of": name})
        cache_file.restore(path, saved, other)
        assert other.ids == slot.ids
        expected = slot.extend(ids[length:], wanted=range(LENGTH - length))
        np.testing.assert_array_equal(other.extend(ids[length:], wanted=range(LENGTH - length)), expected)
        kept = min(length, 200)
        assert other.known([*ids[:kept], -1]) == slot.known([*ids[:kept], -1])
        other.trim(0)
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def model():
    with Model(BUNDLED, backend="reference") as model:
        model.info = replace(model.info, chat_template=TEMPLATE)
        yield model


def reopened(backend="reference", **options):
    other = Model(BUNDLED, backend=backend, **options)
    other.info = replace(other.info, chat_template=TEMPLATE)
    return other


def test_a_file_saves_the_work(model, tmp_path):
    path = tmp_path / "lily.cache"
    first = model.generate(TEXT, **GREEDY)
    assert model.save_cache(path) == len(first.prompt_ids) + 19
    with reopened() as other:
        assert other.load_cache(path).ids == first.prompt_ids + first.ids[:-1]
        again = other.generate(TEXT, **GREEDY)
        batch = other.generate_batch([TEXT, TEXT + "The"], **GREEDY)
    assert again.ids == batch[0].ids == first.ids
    assert again.timings.cached_tokens == len(first.prompt_ids) - 1
    assert batch[1].timings.cached_tokens >= len(first.prompt_ids) - 1
    assert [file.name for file in tmp_path.iterdir()] == ["lily.cache"]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_file_is_of_one_kind_of_cache(backend, tmp_path):
    path = tmp_path / "cache"
    with reopened(backend, kv="q8") as model:
        first = model.generate(TEXT, **GREEDY)
        model.save_cache(path)
    with reopened(backend, kv="q8") as model:
        model.load_cache(path)
        again = model.generate(TEXT, **GREEDY)
    assert again.ids == first.ids
    assert again.timings.cached_tokens == len(first.prompt_ids) - 1
    with reopened(backend) as model, pytest.raises(ArgumentError, match="was made with another layout of the cache"):
        model.load_cache(path)
    with pytest.raises(ArgumentError, match="kv is 'q4'; expected f16 or q8"):
        reopened(backend, kv="q4")


def test_nothing_to_save_and_nowhere(tmp_path):
    with reopened() as model:
        with pytest.raises(ArgumentError, match="nothing is there"):
            model.save_cache(tmp_path / "cache")
        model.generate(TEXT, **GREEDY)
        with pytest.raises(ArgumentError, match="cannot be written"):
            model.save_cache(tmp_path / "none" / "cache")
        with pytest.raises(ArgumentError, match="cannot be read: No such file"):
            model.load_cache(tmp_path / "cache")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The bytes of a good file."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    model.generate(TEXT, **GREEDY)
    model.save_cache(path)
    return path.read_bytes()


def with_header(data, **changes):
    """A file with a checksum that is right, and a header that is not."""
    end = START + int.from_bytes(data[DIGEST:START], "little")
    header = json.dumps({**json.loads(data[START:end]), **changes}).encode()
    rest = len(header).to_bytes(8, "little") + header + data[end:]
    return MAGIC + hashlib.sha256(rest).digest() + rest


BAD = {
    "empty": (lambda data: b"", "cannot be read"),
    "another kind": (lambda data: b"GGUF" + data[4:], "no cache of prompts"),
    "cut in the magic": (lambda data: data[:9], "no cache of prompts"),
    "cut in the checksum": (lambda data: data[:30], "does not match its checksum"),
    "cut": (lambda data: data[:-1], "does not match its checksum"),
    "longer": (lambda data: data + b"\0", "does not match its checksum"),
    "a bit of the header": (lambda data: data[:70] + bytes([data[70] ^ 1]) + data[71:], "does not match its checksum"),
    "a bit of the content": (lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:], "does not match its checksum"),
    "another model": (lambda data: with_header(data, fingerprint="0" * 64), "made with another model; expected"),
    "another backend": (lambda data: with_header(data, backend="cpu"), "made with another backend"),
    "another layout": (lambda data: with_header(data, layout="float32 0"), "another layout of the cache"),
    "another version": (lambda data: with_header(data, edgellm="0.0.9"), "another version of edgellm"),
    "another context": (lambda data: with_header(data, context_length=64), "another context length"),
    "no ids": (lambda data: with_header(data, ids=[]), "contradicts itself"),
    "an unknown id": (lambda data: with_header(data, ids=[512]), "contradicts itself"),
    "ids that are none": (lambda data: with_header(data, ids="12"), "contradicts itself"),
    "too many ids": (lambda data: with_header(data, ids=[1] * 513, written=513), "contradicts itself"),
    "fewer ids": (lambda data: with_header(data, ids=[1, 2]), "bytes of content"),
    "written too little": (lambda data: with_header(data, written=3), "contradicts itself"),
    "written is no number": (lambda data: with_header(data, written="3"), "contradicts itself"),
    "extra": (lambda data: with_header(data, extra=[]), "contradicts itself"),
    "no header": (lambda data: MAGIC + hashlib.sha256(b"\xff" * 99).digest() + b"\xff" * 99, "malformed header"),
    "a deep header": (lambda data: _of(b"[" * 100_000), "malformed header"),
    "a header without": (lambda data: _of(b"{}"), "malformed header"),
    "a header that is none": (lambda data: _of(b"[1]"), "malformed header"),
}


def _of(header):
    rest = len(header).to_bytes(8, "little") + header
    return MAGIC + hashlib.sha256(rest).digest() + rest


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_loaded(whole, tmp_path, case):
    path, (change, words) = tmp_path / "cache", BAD[case]
    path.write_bytes(change(whole))
    with reopened() as other:
        with pytest.raises(ArgumentError, match=words):
            other.load_cache(path)
        assert not other._backend._backend._slots
        assert other.generate(TEXT, **GREEDY).timings.cached_tokens == 0


def test_what_it_is_bound_to(whole, tmp_path, stories):
    path = tmp_path / "cache"
    path.write_bytes(whole)
    with reopened("cpu") as other, pytest.raises(ArgumentError, match="another backend and another layout"):
        other.load_cache(path)
    with reopened(context_length=100) as other, pytest.raises(ArgumentError, match="another context length"):
        other.load_cache(path)


# Chats.


def conversation(model, tmp_path, **options):
    made = Repl(model, model.chat("Be brief."), Shown(), {**GREEDY, **options}, tmp_path / "chat.json", True)
    made.screen = made._screen
    return made


def test_a_session_goes_on_as_if_it_had_not_ended(model, tmp_path):
    """Its ids are those that were said, which is not how the text would be encoded anew."""
    repl = conversation(model, tmp_path)
    typed(repl, TEXT, "Then")
    repl.leave()
    typed(repl, "And then?")
    expected, cached = said(repl), repl.timings.cached_tokens
    assert cached > 100
    with reopened() as other:
        path = tmp_path / "chat.json"
        stored = session.read(path, other.fingerprint)
        replace(stored, messages=stored.messages[:-2]).write(path)
        repl = conversation(other, tmp_path)
        assert repl.screen.notes == [f"(loaded 5 messages from {path})"]
        typed(repl, "And then?")
        assert said(repl) == expected
        assert repl.timings.cached_tokens == cached
        plain = other.chat()
        plain.load_cache(session.cache_path(path))
        assert plain.n_tokens > 100


def test_a_session_with_a_cache_that_is_damaged_or_of_other_words(model, tmp_path):
    repl, path = conversation(model, tmp_path), tmp_path / "chat.json.cache"
    typed(repl, TEXT, f"/save {tmp_path}/chat.json")
    expected = said(repl)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with reopened() as other:
        repl = conversation(other, tmp_path)
        assert "does not match its checksum" in repl.screen.notes[1]
        assert "evaluated again" in repl.screen.notes[1]
        assert said(repl) == expected
        path.write_bytes(with_header(data, extra={"text": 1, "ids": [1]}))
        assert "has the text 1" in conversation(other, tmp_path).screen.notes[1]
        path.write_bytes(with_header(data, extra={"text": "", "ids": [512]}))
        assert "ids [512]" in conversation(other, tmp_path).screen.notes[1]
        path.write_bytes(data)
        repl = conversation(other, tmp_path)
        repl._chat.messages[1]["content"] = "The dog was very happy"
        answer = repl._chat.send("Then", **GREEDY)
        assert answer.timings.cached_tokens < 40
        assert other.detokenize(answer.prompt_ids).startswith("Be brief.\nThe dog was very happy\n")


def test_smollm2_goes_on_with_a_session(smollm2_path, tmp_path):
    options = {"temperature": 0, "max_tokens": 24}
    with Model(smollm2_path, backend="cpu", context_length=1024) as model:
        chat = model.chat("You are a helpful assistant.")
        chat.send("Tell me about Paris.", **options)
        chat.save_cache(tmp_path / "cache")
        messages = chat.messages
        expected = chat.send("And about Rome?", **options)
    with Model(smollm2_path, backend="cpu", context_length=1024) as model:
        chat = model.chat()
        chat.messages = messages
        assert chat.load_cache(tmp_path / "cache") == chat.n_tokens
        answer = chat.send("And about Rome?", **options)
    assert (answer.text, answer.ids, answer.prompt_ids) == (expected.text, expected.ids, expected.prompt_ids)
    assert answer.timings.cached_tokens == expected.timings.cached_tokens > 40


def edgellm(*arguments, stdin=None):
    return subprocess.run(
        [sys.executable, "-m", "edgellm", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_prompt_cache_of_the_command_line(tmp_path):
    path = tmp_path / "lily.cache"
    command = ("generate", TEXT, "-m", "stories260k", "--temp", "0", "-n", "10", "--json", "--prompt-cache", path)
    first, written = json.loads(edgellm(*command).stdout), path.read_bytes()
    again = json.loads(edgellm(*command).stdout)
    assert again["ids"] == first["ids"]
    assert first["timings"]["cached_tokens"] == 0
    assert again["timings"]["cached_tokens"] == len(first["prompt_ids"]) - 1
    assert path.read_bytes() == written
    assert edgellm("generate", "The dog", *command[2:]).returncode == 0
    assert path.read_bytes() != written
    path.write_bytes(written[:-1])
    run = edgellm(*command)
    assert (run.returncode, run.stdout) == (2, "")
    assert "does not match its checksum" in run.stderr
    assert path.read_bytes() == written[:-1]


def test_chat_keeps_its_cache_from_the_command_line(smollm2_path, tmp_path):
    command = ("chat", "-m", smollm2_path, "--ctx", 1024, "--temp", 0, "-n", 12, "--stats", "--save-cache", "--session",
               tmp_path / "chat.json")  # fmt: skip
    assert edgellm(*command, "What is the capital of France?").returncode == 0
    assert {file.name for file in tmp_path.iterdir()} == {"chat.json", "chat.json.cache"}
    run = edgellm(*command, "And of Italy?")
    assert int(re.search(r"\((\d+) cached\)", run.stderr)[1]) > 40
