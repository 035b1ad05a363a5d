"""The Python API: `load` a model, then generate, stream, chat, or take its logits."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edgellm import __version__, backends, cache_file, catalog, store
from edgellm.arrays import F32, I32, Array
from edgellm.backends import Backend
from edgellm.breakers import breakers
from edgellm.errors import ArgumentError, EdgeError, OutOfMemoryError
from edgellm.footprint import Footprint, available_memory
from edgellm.generate import Slot, check_room, generate
from edgellm.loading import open_model, open_tokenizer
from edgellm.lookup import Lookup
from edgellm.overflow import check_policy, fits, most_left, without_oldest
from edgellm.prefix_cache import PrefixCache
from edgellm.sampling import Chooser, Sampler, SamplingParams
from edgellm.scheduler import Progress, Scheduler
from edgellm.sequence import Sequence as Tokens
from edgellm.step import Step
from edgellm.structured.constraint import Constraint, GuidedSampler, LogitsProcessor, Vocabulary, grammar_for
from edgellm.structured.json_schema import JsonSchema
from edgellm.text_stream import StopStrings, TextStream

if TYPE_CHECKING:
    from edgellm.chat import Chat
    from edgellm.tools import ToolCall

MAX_DEFAULT_CONTEXT = 8192
"""A context that nobody asked for is not larger: its cache would be the largest thing in memory."""


@dataclass
class Timings:
    """Where the time of one answer went, in tokens and seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's tokens, those that the cache held already."""
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    """The one that ended the answer included."""
    generate_seconds: float = 0.0
    drafted_tokens: int = 0
    """With `speculate`: tokens that were proposed, and below those of them that were right."""
    accepted_tokens: int = 0

    @property
    def prompt_per_second(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generated_per_second(self) -> float:
        """The first token comes out of the prompt's evaluation, so it does not count."""
        return max(0, self.generated_tokens - 1) / self.generate_seconds if self.generate_seconds else 0.0


@dataclass
class Completion:
    """What a model answered."""

    text: str
    ids: list[int]
    """Tokens generated, without the one that ended the answer; with a stop string, `text` is shorter than they are."""
    finish_reason: str
    """"stop": the model ended, the answer is complete, or a stop string came; "length": max_tokens or the context is
    used up; "tool_calls": the model ended after calls; "cancelled"."""
    prompt_ids: list[int]
    timings: Timings
    tool_calls: list[ToolCall] = field(default_factory=list)
    """What the model asks for, in a chat with `tools`; `text` is without them."""
    dropped_tokens: int = 0
    """With overflow="shift": the oldest tokens of the prompt, for which there was no room; `prompt_ids` is without."""
    dropped_messages: Sequence[Mapping[str, Any]] = ()
    """With overflow="shift", in a chat: the oldest messages, without which the answer was made."""


@dataclass(frozen=True)
class Piece:
    """Some more text of an answer; the text may be empty while a character or a stop string is incomplete."""

    text: str
    id: int | None
    """The token it came with; None for what is left at the end."""
    tool_calls: Sequence[ToolCall] = ()
    """Calls that are complete."""


class Stream(Iterator[Piece]):
    """An answer while it is generated. Iterate for the pieces; `completion` has all that came so far.

    Closing it early (`close`, or leaving a with-statement) stops the answer and keeps what was said.
    """

    def __init__(self, pieces: Iterator[Piece], completion: Completion) -> None:
        self._pieces, self.completion = pieces, completion

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        self._pieces.close()  # type: ignore[attr-defined]

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    model: str | os.PathLike[str] = catalog.DEFAULT,
    *,
    backend: str | None = None,
    context_length: int | None = None,
    n_threads: int | None = None,
    cache_bytes: int | None = None,
) -> Model:
    """Load a model: a catalog name (fetched if it must be), a .edge or .gguf file, or a Hugging Face folder.

    `context_length` is the most tokens of a prompt with its answer; by default the model's, at most 8192. `n_threads`
    is by default all there are. What recent prompts and answers left in memory is used by those that begin alike: at
    most `cache_bytes` of it, by default what one full context takes, besides what open chats hold. Raises an EdgeError
    that says what is wrong and what to do.
    """
    return Model(
        store.resolve(os.fspath(model)), backend=backend, context_length=context_length, n_threads=n_threads,
        cache_bytes=cache_bytes,
    )  # fmt: skip


class Model:
    """A model ready to run. Close it, or use it in a with-statement, to unmap its file.

    Any number of threads may use it: their steps run one after the other.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        backend: str | None = None,
        context_length: int | None = None,
        n_threads: int | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        path = Path(path)
        if n_threads is not None and n_threads < 1:
            raise ArgumentError(f"n_threads is {n_threads}; expected 1 or more")
        if cache_bytes is not None and cache_bytes < 0:
            raise ArgumentError(f"cache_bytes is {cache_bytes}; expected 0 or more")
        name = backend or backends.best()
        backend_class = backends.get(name)
        loaded = open_model(path)
        self._file, self.config = loaded.file, loaded.config
        try:
            if not store.verified(path):
                self._file.verify()
                store.mark_verified(path)
            self.context_length = allowed_context(context_length, self.config.context_length)
            info = self._file.info
            self.tokenizer = open_tokenizer(self._file)
        except BaseException:
            self._file.close()
            raise
        self.info, self.path, self.backend_name = info, path, name
        config = replace(self.config, context_length=self.context_length)
        self._backend: Backend = _Locked(
            backend_class(loaded.architecture, config, self._file.tensors, self.context_length, n_threads)
        )
        self.prefix_cache = PrefixCache(self._backend, self.context_length, cache_bytes)
        self._closed = False
        self._breakers = lru_cache(8)(partial(breakers, self.tokenizer))
        try:
            self.footprint.check(available_memory(), self.context_length)
        except OutOfMemoryError:
            self.close()
            raise

    @property
    def fingerprint(self) -> str:
        """Of the model's file: another one for other weights, tokenizer or config."""
        return self._file.fingerprint

    @property
    def footprint(self) -> Footprint:
        """The memory that the model takes."""
        return self._backend.footprint

    def generate(self, prompt: str, **options: Any) -> Completion:
        """Continue a text. Takes what `stream` takes; returns when the answer is complete."""
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        return stream.completion

    def stream(
        self,
        prompt: str,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        overflow: str = "error",
        speculate: int = 0,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        grammar: str | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        **sampling: Any,
    ) -> Stream:
        """Continue a text, piece by piece. `sampling` are the fields of SamplingParams: temperature, top_k...

        Special tokens written in the prompt count as such. Without `max_tokens` the answer goes on until the model
        ends it or the context is full. With `speculate`, up to so many tokens that followed the last ones before, in
        prompt or answer, are checked in one step: the same answer, sooner where texts repeat themselves.

        Raises ContextOverflowError before the first piece when prompt and `max_tokens` do not fit the context, unless
        `overflow` is "shift": then the prompt's oldest tokens are left out, and the completion's `dropped_tokens` says
        how many; three quarters of the context stay, or less for a longer answer, and BOS.

        At most one of `json_schema` (a schema, or its text), `regex` (matched as a whole), `choices` and `grammar`
        (GBNF) says what an answer must be: one that ends by itself is, one that is cut is the beginning of such a one.
        Raises UnsupportedError, before the first piece, for what cannot be kept to. A logits processor is called with
        the ids so far and the (vocab_size,) logits of the next token, and returns logits; they are called in order.
        """
        return self.stream_ids(
            self.tokenize(prompt),
            max_tokens=max_tokens,
            stop=stop,
            ignore_eos=ignore_eos,
            overflow=overflow,
            speculate=speculate,
            json_schema=json_schema,
            regex=regex,
            choices=choices,
            grammar=grammar,
            logits_processors=logits_processors,
            **sampling,
        )

    def stream_ids(self, prompt_ids: Sequence[int], *, keeper: object = None, **options: Any) -> Stream:
        """As `stream`, from at least one token id; what the answer leaves in memory stays there for a `keeper`, until
        that object is gone or released (`prefix_cache.release`)."""
        request = self._request(prompt_ids, _wish(options))
        return Stream(self._answer(request, keeper), request.completion)

    def generate_batch(self, prompts: Sequence[str], *, at_once: int = 16, **options: Any) -> list[Completion]:
        """Continue many texts, up to `at_once` of them in each step of the model: what `generate` gives for each.

        Takes what `stream` takes, for all alike. A place that becomes free goes to the next prompt; what prompts begin
        with alike is evaluated once. Each sequence under way takes the memory of its own cache. Raises
        ContextOverflowError before it begins when one does not fit.
        """
        wish, ids = _wish(options), [self.tokenize(prompt) for prompt in prompts]
        return self._batch([self._request(each, wish) for each in ids], at_once)

    def generate_many(self, prompt: str, n: int, *, at_once: int = 16, **options: Any) -> list[Completion]:
        """`n` answers to one prompt, which is evaluated once; with a seed, that of the i-th is seed + i from 0 on."""
        wish, ids = _wish(options), self.tokenize(prompt)
        if n < 1:
            raise ArgumentError(f"n is {n}; expected 1 answer or more")
        seed = wish.params.seed
        each = [wish.params if seed is None else replace(wish.params, seed=seed + i) for i in range(n)]
        return self._batch([self._request(ids, replace(wish, params=params)) for params in each], at_once)

    def _batch(self, requests: list[_Request], at_once: int) -> list[Completion]:
        self._check_open()
        scheduler = Scheduler(self._backend, self.context_length, at_once, self.prefix_cache)
        try:
            under_way = {request.submit(scheduler): request for request in requests}
            while scheduler.is_busy:
                for progress in scheduler.step():
                    under_way[progress.sequence].follow(progress, scheduler)
        finally:
            scheduler.close()
        return [request.completion for request in requests]

    def _request(self, prompt_ids: Sequence[int], wish: _Wish) -> _Request:
        self._check_ids(prompt_ids)
        n_given, prompt_ids = len(prompt_ids), self._fitted(prompt_ids, wish)
        check_room(len(prompt_ids), wish.max_tokens or 0, self.context_length)
        if wish.speculate < 0:
            raise ArgumentError(f"speculate is {wish.speculate}; expected 0 or more tokens")
        return _Request(
            Completion(
                "",
                [],
                "cancelled",
                prompt_ids,
                Timings(prompt_tokens=len(prompt_ids)),
                dropped_tokens=n_given - len(prompt_ids),
            ),
            self._chooser(wish),
            StopStrings([wish.stop] if isinstance(wish.stop, str) else list(wish.stop)),
            TextStream(self.tokenizer, prompt_ids),
            wish.max_tokens,
            () if wish.ignore_eos else self.info.eos_ids,
            Lookup(wish.speculate) if wish.speculate else None,
        )

    def _fitted(self, ids: Sequence[int], wish: _Wish) -> list[int]:
        check_policy(wish.overflow)
        if wish.overflow == "error" or fits(len(ids), wish.max_tokens, self.context_length):
            return list(ids)
        return without_oldest(ids, int(ids[0] == self.info.bos_id), most_left(wish.max_tokens, self.context_length))

    def _answer(self, request: _Request, keeper: object) -> Iterator[Piece]:
        self._check_open()
        slot = self.prefix_cache.take(request.completion.prompt_ids, keeper)
        try:
            yield from request.pieces(slot)
        finally:
            self.prefix_cache.put(slot, keeper)

    def _chooser(self, wish: _Wish) -> Chooser:
        sampler = self._sampler(wish.params)
        wanted = grammar_for(json_schema=wish.json_schema, regex=wish.regex, choices=wish.choices, grammar=wish.grammar)
        if wanted and wish.ignore_eos:
            raise ArgumentError(f"{wanted.kind} and ignore_eos are both given; an answer ends where it is complete")
        if not wish.logits_processors and wanted is None:
            return sampler
        constraint = Constraint(self._vocabulary, wanted) if wanted else None
        return GuidedSampler(sampler, wish.logits_processors, constraint)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer)

    def _sampler(self, params: SamplingParams) -> Sampler:
        if bad := [id for id in params.logit_bias if not 0 <= id < self.config.vocab_size]:
            raise ArgumentError(f"logit_bias has token id {bad[0]}; expected 0 to {self.config.vocab_size - 1}")
        return Sampler(params, self._breakers(tuple(params.dry_sequence_breakers)) if params.dry_multiplier else None)

    def save_cache(
        self, path: str | os.PathLike[str], *, keeper: object = None, extra: Mapping[str, Any] | None = None
    ) -> int:
        """Write what the last answer, or that of a `keeper`, left in memory, to a file for `load_cache`: those tokens
        need not be evaluated again. Returns how many there are.

        `extra`, which JSON can hold, is kept too. Raises ArgumentError if there is nothing, or it cannot be written.
        """
        with self.prefix_cache.latest(keeper) as slot:
            if slot is None or not slot.ids:
                raise ArgumentError(f"nothing is there that {path} could keep; make an answer first")
            cache_file.write(Path(path), self._bound_to, slot, extra or {})
            return len(slot.ids)

    def load_cache(self, path: str | os.PathLike[str], *, keeper: object = None) -> cache_file.Saved:
        """Read what `save_cache` wrote, for prompts that begin so.

        Raises ArgumentError for a file that is damaged, or was written with another model, backend or context length.
        """
        saved = cache_file.read(Path(path), self._bound_to, self.config.vocab_size)
        slot = self.open_slot()
        try:
            cache_file.restore(Path(path), saved, slot)
        except BaseException:
            slot.close()
            raise
        self.prefix_cache.put(slot, keeper)
        return saved

    @cached_property
    def _bound_to(self) -> dict[str, Any]:
        """What a cache is good for."""
        return {
            "fingerprint": self.fingerprint, "backend": self.backend_name, "layout": self._backend.CACHE_LAYOUT,
            "edgellm": __version__, "context_length": self.context_length,
        }  # fmt: skip

    def open_slot(self) -> Slot:
        """A slot of one's own; raises EdgeError after `close`."""
        self._check_open()
        return Slot(self._backend, self.context_length)

    def chat(self, system: str | None = None) -> Chat:
        """A conversation; raises ChatTemplateError if the model has no chat template."""
        from edgellm.chat import Chat

        return Chat(self, system)

    def logits(self, ids: Sequence[int]) -> F32:
        """(n, vocab_size) float32: after each of the n tokens, the logits of the next."""
        self._check_ids(ids)
        slot = self.open_slot()
        try:
            return slot.extend(list(ids), wanted=range(len(ids)))
        finally:
            slot.close()

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Text -> ids. `add_special` puts the model's BOS or EOS, `parse_special` reads special tokens in the text."""
        return self.tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Ids -> text, special tokens left out."""
        return self.tokenizer.decode(ids)

    def close(self) -> None:
        self._closed = True
        self.prefix_cache.close()
        self._backend.close()
        self._file.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EdgeError(f"the model {self.info.name} is closed; load it again")

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not len(ids):
            raise ArgumentError("there are no tokens to begin with, and this model adds none; give some text")
        if not all(0 <= id < self.config.vocab_size for id in ids):
            raise ArgumentError(f"token ids from {min(ids)} to {max(ids)}; expected 0 to {self.config.vocab_size - 1}")


@dataclass(frozen=True)
class _Wish:
    """What is asked of an answer: the options of `Model.stream`."""

    params: SamplingParams
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    overflow: str = "error"
    speculate: int = 0
    json_schema: JsonSchema | None = None
    regex: str | None = None
    choices: Sequence[str] | None = None
    grammar: str | None = None
    logits_processors: Sequence[LogitsProcessor] = ()


def _wish(options: dict[str, Any]) -> _Wish:
    own = _Wish.__dataclass_fields__.keys() - {"params"}
    sampling = {name: value for name, value in options.items() if name not in own}
    return _Wish(_params(sampling), **{name: value for name, value in options.items() if name in own})


@dataclass
class _Request:
    """One answer in the making."""

    completion: Completion
    sampler: Chooser
    stops: StopStrings
    text: TextStream
    max_tokens: int | None
    ends: Sequence[int]
    lookup: Lookup | None
    started: float = field(default_factory=time.perf_counter)

    def pieces(self, slot: Slot) -> Iterator[Piece]:
        """The answer, made in a slot of its own."""
        done = self.completion
        self.started, done.timings.cached_tokens = time.perf_counter(), slot.common(done.prompt_ids)
        for id in generate(slot, done.prompt_ids, self.sampler, self.max_tokens, self.lookup):
            shown = self._push(id)
            if shown is None:
                break
            yield Piece(shown, id)
            if done.finish_reason == "stop":
                return
        else:
            done.finish_reason = "stop" if self.sampler.is_done else "length"
        yield Piece(self._rest(), None)

    def submit(self, scheduler: Scheduler) -> Tokens:
        """The answer's sequence, made beside others; it is to be followed."""
        return scheduler.submit(
            self.completion.prompt_ids, self.sampler, self.max_tokens, ends=self.ends, lookup=self.lookup
        )

    def follow(self, progress: Progress, scheduler: Scheduler) -> None:
        """Take in what a step brought; raises what the sampler did."""
        done, sequence = self.completion, progress.sequence
        done.timings.cached_tokens = sequence.n_cached
        if sequence.error:
            raise sequence.error
        for id in progress.ids:
            if done.finish_reason != "stop":
                self._push(id)
        if done.finish_reason == "stop" and not progress.finish_reason:
            scheduler.cancel(sequence)
        elif progress.finish_reason:
            done.finish_reason = "stop" if done.finish_reason == "stop" else progress.finish_reason
            self._rest()

    def _push(self, id: int) -> str | None:
        """The text that a token makes certain; None for one that ends the answer."""
        self._clock()
        done = self.completion
        if id in self.ends:
            done.finish_reason = "stop"
            return None
        done.ids.append(id)
        shown, stopped = self.stops.push(self.text.push(id))
        done.text += shown
        if stopped:
            done.finish_reason = "stop"
        return shown

    def _rest(self) -> str:
        """What was held back; nothing after a stop string."""
        rest, _ = self.stops.push(self.text.flush())
        rest += self.stops.flush()
        self.completion.text += rest
        return rest

    def _clock(self) -> None:
        timings, now = self.completion.timings, time.perf_counter()
        if not timings.generated_tokens:
            timings.prompt_seconds, self.started = now - self.started, now
        timings.generated_tokens += 1
        timings.generate_seconds = now - self.started
        if self.lookup:
            timings.drafted_tokens, timings.accepted_tokens = self.lookup.drafted, self.lookup.accepted


class _Locked:
    """A backend that several threads may call: one call at a time."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self._lock = backend, threading.RLock()
        self.MAX_ROWS, self.footprint = backend.MAX_ROWS, backend.footprint
        self.CACHE_LAYOUT, self.bytes_of = backend.CACHE_LAYOUT, backend.bytes_of

    def run(self, step: Step) -> F32:
        with self._lock:
            return self._backend.run(step)

    def best(self, step: Step) -> I32:
        with self._lock:
            return self._backend.best(step)

    def open_slot(self) -> int:
        with self._lock:
            return self._backend.open_slot()

    def close_slot(self, slot: int) -> None:
        with self._lock:
            self._backend.close_slot(slot)

    def trim(self, slot: int, length: int) -> int:
        with self._lock:
            return self._backend.trim(slot, length)

    def kept(self, slot: int, length: int) -> int:
        with self._lock:
            return self._backend.kept(slot, length)

    def copy(self, source: int, target: int, length: int) -> int:
        with self._lock:
            return self._backend.copy(source, target, length)

    def content(self, slot: int) -> tuple[int, list[Array]]:
        with self._lock:
            return self._backend.content(slot)

    def restore(self, slot: int, length: int, written: int) -> list[Array]:
        with self._lock:
            return self._backend.restore(slot, length, written)

    def close(self) -> None:
        with self._lock:
            self._backend.close()


def allowed_context(asked: int | None, model: int) -> int:
    """The context that was asked for, or the default of a model that allows that many tokens; raises ArgumentError."""
    if asked is None:
        return min(model, MAX_DEFAULT_CONTEXT)
    if not 1 <= asked <= model:
        raise ArgumentError(f"a context of {asked} tokens was asked for; this model allows 1 to {model}")
    return asked


def _params(sampling: dict[str, Any]) -> SamplingParams:
    try:
        return SamplingParams(**sampling)
    except TypeError as error:
        if isinstance(error, EdgeError):
            raise
        known = ", ".join(SamplingParams.__dataclass_fields__)
        raise TypeError(f"unknown or mistyped sampling option in {sampling}; known: {known}") from error
