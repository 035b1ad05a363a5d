"""A conversation at a terminal: messages, and commands that begin with a slash."""

from __future__ import annotations

import difflib
import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from edgellm import session
from edgellm.adapter import Adapter, combined
from edgellm.errors import ArgumentError, EdgeError
from edgellm.footprint import resident_memory
from edgellm.home import home
from edgellm.sampling import SamplingParams
from edgellm.screen import Screen, is_rich_terminal
from edgellm.store import path_and_scale

if TYPE_CHECKING:
    from edgellm.answer import Completion, Piece, Timings
    from edgellm.api import Model
    from edgellm.chat import Chat

PROMPT, CONTINUED, QUOTES = ">>> ", "... ", '"""'


class Repl:
    def __init__(
        self,
        model: Model,
        chat: Chat,
        screen: Screen,
        settings: dict[str, Any],
        saved: Path | None = None,
        saves_cache: bool = False,
    ) -> None:
        """`settings` are options of Chat.stream; with `saved`, the conversation goes on from that file and into it;
        with `saves_cache`, files have beside them what the model remembers."""
        self._model, self._chat, self._screen, self._settings = model, chat, screen, settings
        self._saved, self._saves_cache, self._last, self._read = saved, saves_cache, None, list[str]()
        self._line: Reader | None = None
        self._status = ""
        if saved is not None and saved.exists():
            self._load(saved)

    _last: Completion | None

    def run(self) -> None:
        """Until the person leaves."""
        self._screen.note(f"{self._model.info.name}. /help shows commands; Ctrl-C stops an answer, Ctrl-D leaves.")
        while True:
            try:
                self._do(self._message())
            except EOFError:
                return
            except KeyboardInterrupt:
                self._screen.note("\n(stopped; Ctrl-D or /bye leaves)")
            except EdgeError as error:
                self._screen.error(error)

    def _message(self) -> str:
        """What is typed, or what stands between three quotes on several lines."""
        text = self._typed(PROMPT, "").strip()
        if not text.startswith(QUOTES):
            return text
        text = text[len(QUOTES) :]
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + self._typed(CONTINUED, "")
        return text.rstrip()[: -len(QUOTES)].strip()

    def _typed(self, prompt: str, default: str) -> str:
        """A line; what reads it is made when it is needed, so that one answer does not wait for it."""
        self._line = self._line or reader(lambda: self._status)
        self._status = self.status()
        with preparing(self._chat):
            return self._line(prompt, default)

    def _do(self, text: str) -> None:
        if text.startswith("/"):
            name, _, rest = text[1:].partition(" ")
            command(name)(self, rest.strip())
        elif text:
            self.say(text)

    def say(self, text: str) -> None:
        """Send a message, under what /read has brought, and show the answer."""
        before = len(self._chat.messages)
        try:
            self._answer("\n\n".join([*self._read, text]))
        finally:
            if len(self._chat.messages) > before:
                self._read = []

    def _answer(self, text: str, **settings: Any) -> None:
        before = len(self._last.dropped_messages) if self._last else 0
        with self._chat.stream(text, **{**self._settings, **settings}) as stream:
            self._last = stream.completion
            if (n := len(self._last.dropped_messages)) > before:
                self._screen.note(
                    f"(the context is too short: the model does not see the oldest {n} messages any more)"
                )
            with interruptions() as interrupted:
                self._screen.answer(until(interrupted, stream), self._chat.is_thinking)
        if n := self._last.dropped_tokens:
            self._screen.note(f"(the context was full: {n} tokens between the first and the latest ones were left out)")
        if self._saved is not None:
            self._write(self._saved)

    def leave(self) -> None:
        """Write what the model remembers of a conversation that has a file: not after each answer, as it is large."""
        if self._saved is not None:
            self._write_cache(self._saved)

    @property
    def timings(self) -> Timings | None:
        """Of the last answer."""
        return self._last.timings if self._last else None

    def status(self) -> str:
        """A line: speed of the last answer, context used and left, memory."""
        parts = []
        if self._last:
            parts.append(f"{self._last.timings.generated_per_second:.1f} tokens/s")
        used, most = self._chat.n_tokens, self._model.context_length
        parts.append(f"context {used} of {most}, {most - used} left")
        if memory := resident_memory():
            parts.append(f"{memory / 1e6:.0f} MB")
        return " | ".join(parts)

    # Commands: a method with a line of help is one, by its name in COMMANDS.

    def help(self, rest: str) -> None:
        """[COMMAND]: these lines."""
        names = [rest.removeprefix("/")] if rest else list(COMMANDS)
        for name in names:
            self._screen.note(f"/{name} {command(name).__doc__}")
        if not rest:
            self._screen.note(f"{QUOTES} begins and ends a message of several lines. Tab completes, arrows go back.")

    def set(self, rest: str) -> None:
        """[NAME VALUE]: how answers are made: /set temperature 0.2, /set adapter PATH[:SCALE]; alone, what is set."""
        name, _, value = rest.partition(" ")
        if not rest:
            others = {"think": self._screen.shows_thoughts, "adapter": self._chat.adapter and self._chat.adapter.name}
            for key, current in {**self._settings, **others}.items():
                self._screen.note(f"{key} {json.dumps(current, ensure_ascii=False)}")
        elif name == "adapter":
            self._chat.adapter = self._adapter(value.strip())
        elif name == "think":
            self._screen.shows_thoughts = _switch(value)
        else:
            self._settings = checked({**self._settings, name: parsed(name, value)})

    def _adapter(self, value: str) -> Adapter | None:
        """What answers are made with from now on: the sum of the adapters that are named; "none": the model alone."""
        if value == "none":
            return None
        named = [path_and_scale(word) for word in words(value, "/set adapter")]
        return combined([self._model.load_adapter(Path(path).expanduser(), scale) for path, scale in named])

    def show(self, rest: str) -> None:
        """the model, and the messages so far."""
        info, config = self._model.info, self._model.config
        self._screen.note(f"{info.name}: {info.architecture}, {config.n_layers} layers, {info.recipe}, {info.license}")
        for message in self._chat.messages:
            self._screen.note(f"{message['role']}: {message['content']}")

    def system(self, rest: str) -> None:
        """[TEXT]: what the model is told before the first message; alone, show it. - for nothing."""
        told = [message for message in self._chat.messages if message["role"] == "system"]
        if not rest:
            self._screen.note(told[0]["content"] if told else "(no system message)")
            return
        others = self._chat.messages[len(told) :]
        self._chat.messages = ([] if rest == "-" else [{"role": "system", "content": rest}]) + others

    def clear(self, rest: str) -> None:
        """forget the conversation, but for the system message."""
        self._chat.messages = [message for message in self._chat.messages if message["role"] == "system"]
        self._read, self._last = [], None

    def undo(self, rest: str) -> None:
        """take the last message and its answer back."""
        self._screen.note(f"(taken back: {self._taken_back()})")

    def regen(self, rest: str) -> None:
        """another answer to the last message."""
        with self._kept_if_nothing_comes():
            self._answer(self._taken_back(), seed=None)

    def edit(self, rest: str) -> None:
        """change the last message, and send it again."""
        with self._kept_if_nothing_comes():
            text = self._typed(PROMPT, self._taken_back()).strip()
            if not text:
                raise ArgumentError("an empty message cannot be sent; /undo takes the last one back")
            self._answer(text)

    def read(self, rest: str) -> None:
        """FILE...: put text files above the next message."""
        for name in words(rest, "/read"):
            try:
                text = Path(name).expanduser().read_text(encoding="utf-8")
            except OSError as error:
                raise ArgumentError(f"{name} cannot be read: {error.strerror or error}; give a text file") from error
            except UnicodeDecodeError as error:
                raise ArgumentError(f"{name} is not UTF-8 text: byte {error.start}; give a text file") from error
            self._read.append(text.strip())
            n_tokens = len(self._model.tokenize(text, add_special=False, parse_special=False))
            self._screen.note(f"({name}: {n_tokens} tokens go with your next message)")

    def save(self, rest: str) -> None:
        """FILE: keep the conversation and what is set."""
        (name,) = words(rest, "/save", most=1)
        path = Path(name).expanduser()
        self._write(path)
        self._write_cache(path)
        self._screen.note(f"(saved {len(self._chat.messages)} messages to {name})")

    def load(self, rest: str) -> None:
        """FILE: go on with a conversation that was saved."""
        (name,) = words(rest, "/load", most=1)
        self._load(Path(name).expanduser())

    def stats(self, rest: str) -> None:
        """tokens and speed of the last answer, context, memory."""
        if self._last:
            for key, value in asdict(self._last.timings).items():
                self._screen.note(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}")
        self._screen.note(self.status())

    def bye(self, rest: str) -> None:
        """leave; so does Ctrl-D."""
        raise EOFError

    def _write(self, path: Path) -> None:
        info, messages = self._model.info, self._chat.messages
        session.Session(info.name, self._model.fingerprint, messages, self._settings).write(path)

    def _write_cache(self, path: Path) -> None:
        if self._saves_cache and self._chat.n_tokens:
            self._chat.save_cache(session.cache_path(path))

    def _load(self, path: Path) -> None:
        found = session.read(path, self._model.fingerprint)
        self._settings = checked({**self._settings, **restored(found.settings)})
        self._chat.messages = found.messages
        self._screen.note(f"(loaded {len(found.messages)} messages from {path})")
        if session.cache_path(path).exists():
            self._load_cache(session.cache_path(path))

    def _load_cache(self, path: Path) -> None:
        """A conversation goes on without it too."""
        try:
            self._chat.load_cache(path)
        except EdgeError as error:
            self._screen.note(f"({error}. The conversation is evaluated again.)")

    @contextmanager
    def _kept_if_nothing_comes(self) -> Iterator[None]:
        """Put back what was taken back, unless an answer has taken its place."""
        before = self._chat.messages
        try:
            yield
        except BaseException:
            if len(self._chat.messages) < len(before):
                self._chat.messages = before
            raise

    def _taken_back(self) -> str:
        """The last message that was sent, which is no part of the conversation any more, nor what followed it."""
        sent = [i for i, message in enumerate(self._chat.messages) if message["role"] == "user"]
        if not sent:
            raise ArgumentError("there is no message yet; say something first")
        text: str = self._chat.messages[sent[-1]]["content"]
        self._chat.messages = self._chat.messages[: sent[-1]]
        return text


COMMANDS: dict[str, Callable[[Repl, str], None]] = {
    "help": Repl.help, "set": Repl.set, "show": Repl.show, "system": Repl.system, "clear": Repl.clear,
    "regen": Repl.regen, "undo": Repl.undo, "edit": Repl.edit, "read": Repl.read, "save": Repl.save,
    "load": Repl.load, "stats": Repl.stats, "bye": Repl.bye,
}  # fmt: skip
ALIASES = {"?": "help", "exit": "bye", "quit": "bye"}


def command(name: str) -> Callable[[Repl, str], None]:
    """Raises ArgumentError for one that is not there, with the nearest that is."""
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean /{near[0]}?" if near else "/help shows them"
        raise ArgumentError(f"/{name} is no command; {hint} To say it, put a space before the slash.")
    return COMMANDS[name]


@contextmanager
def preparing(chat: Chat) -> Iterator[None]:
    """Meanwhile evaluate what the next prompt begins with. If anything is wrong with that, it shows with the answer."""
    stop = Event()

    def prepare() -> None:
        with suppress(Exception):
            chat.prepare(stopped=stop.is_set)

    thread = Thread(target=prepare, name="edgellm-prepare", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def interruptions() -> Iterator[Event]:
    """Ctrl-C sets the event, so that it cannot come amidst drawing; a second one is an exception as ever."""
    event = Event()

    def note(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def until(interrupted: Event, stream: Iterable[Piece]) -> Iterator[str]:
    """The pieces' text; raises KeyboardInterrupt once the event is set."""
    for piece in stream:
        yield piece.text
        if interrupted.is_set():
            raise KeyboardInterrupt


def words(rest: str, name: str, most: int | None = None) -> list[str]:
    """File names, quoted where they have spaces."""
    try:
        found = shlex.split(rest, posix=sys.platform != "win32")
    except ValueError as error:
        raise ArgumentError(f"{name} {rest}: {error}; close the quotation") from error
    if not found or (most and len(found) > most):
        raise ArgumentError(f"{name} was given {len(found)} names; expected {'one' if most == 1 else 'some'}")
    return found


def parsed(name: str, value: str) -> Any:
    """A setting's value: JSON, or else text."""
    try:
        return restored({name: json.loads(value)})[name]
    except ValueError:
        return value


def restored(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings out of JSON, which has no numbers as keys; raises ValueError for keys that are none."""
    bias = settings.get("logit_bias")
    if isinstance(bias, dict):
        return {**settings, "logit_bias": {int(id): value for id, value in bias.items()}}
    return settings


TEXT = (str, type(None))
OTHERS: dict[str, tuple[type, ...]] = {
    "max_tokens": (int, type(None)), "stop": (list, tuple), "ignore_eos": (bool,), "overflow": (str,),
    "speculate": (int,), "banned_strings": (list, tuple), "json_schema": (dict, bool, *TEXT), "regex": TEXT,
    "choices": (list, type(None)), "grammar": TEXT,
}  # fmt: skip
"""Settings that are not SamplingParams', and what they may be."""


def checked(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings; raises ArgumentError for one that is unknown, or has a value that it cannot have."""
    sampling = {field.name for field in fields(SamplingParams)}
    for name, value in settings.items():
        if name not in sampling | OTHERS.keys():
            near = difflib.get_close_matches(name, sampling | OTHERS.keys(), 1)
            raise ArgumentError(
                f"{name!r} is no setting; {f'did you mean {near[0]!r}?' if near else 'known: '}"
                + ("" if near else ", ".join(sorted(sampling | OTHERS.keys())))
            )
        if name in OTHERS and not isinstance(value, OTHERS[name]):
            kinds = " or ".join(kind.__name__ for kind in OTHERS[name] if kind is not type(None))
            raise ArgumentError(f"{name} is {value!r}; expected JSON of the kind {kinds}")
        if name in sampling:
            _check_sampling(name, value)
    return settings


def _check_sampling(name: str, value: Any) -> None:
    try:
        SamplingParams(**{name: value})
    except TypeError as error:
        raise ArgumentError(f"{name} is {value!r}, which is of the wrong kind; /set shows what is set") from error


def _switch(value: str) -> bool:
    if value not in ("on", "off", "true", "false", "show", "hide"):
        raise ArgumentError(f"think is {value!r}; expected on or off")
    return value in ("on", "true", "show")


Reader = Callable[[str, str], str]
"""reader(prompt, default) -> a line; raises EOFError or KeyboardInterrupt."""


def reader(status: Callable[[], str]) -> Reader:
    """Lines from the terminal: with history, completion and a status line where prompt_toolkit is there."""
    if is_rich_terminal() and find_spec("prompt_toolkit"):
        return _toolkit_reader(status)
    with suppress(ImportError):  # Windows has its keys without it
        import readline  # noqa: F401 (gives input() its editing keys and history)
    return _plain_line


def _plain_line(prompt: str, default: str) -> str:
    if default:
        click.echo(f"{default}\n(type it as it should be; nothing leaves it)", err=True)
    return input(prompt) or default


def _toolkit_reader(status: Callable[[], str]) -> Reader:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    class Commands(Completer):
        """Commands at the start of a line, files after those that take one, settings after /set."""

        def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
            text = document.text_before_cursor
            name, space, rest = text.partition(" ")
            if not space and text.startswith("/"):
                yield from (Completion(f"/{each}", -len(text)) for each in COMMANDS if f"/{each}".startswith(text))
            elif name in ("/read", "/save", "/load") or rest.startswith("adapter "):
                rest = rest.removeprefix("adapter ") if name == "/set" else rest
                yield from PathCompleter(expanduser=True).get_completions(Document(rest), event)
            elif name == "/set" and " " not in rest:
                known = sorted({field.name for field in fields(SamplingParams)} | OTHERS.keys() | {"adapter", "think"})
                yield from (Completion(each, -len(rest)) for each in known if each.startswith(rest))

    history: History = InMemoryHistory()
    with suppress(OSError):
        path = home() / "history"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        history = FileHistory(str(path))
    lines: PromptSession[str] = PromptSession(
        history=history, completer=Commands(), complete_while_typing=False, bottom_toolbar=status
    )
    return lambda prompt, default: lines.prompt(prompt, default=default)
