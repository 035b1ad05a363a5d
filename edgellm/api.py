"""The Python API: `load` a model, then generate, stream, chat, or take its logits."""

from __future__ import annotations

import math
import os
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from edgellm import __version__, backends, cache_file, catalog, store
from edgellm.adapter import Adapter, combined
from edgellm.answer import Answer, Completion, Piece, Stream, Timings, Turn
from edgellm.arrays import F32
from edgellm.backends import Backend
from edgellm.backends._locked import Locked
from edgellm.beams import Beam, beam_search
from edgellm.cache import check_kind
from edgellm.embedding import Steps, check_pooling, embeddings, groups
from edgellm.engine import Engine, Job, Listener
from edgellm.errors import ArgumentError, EdgeError, OutOfMemoryError
from edgellm.footprint import Footprint, available_memory
from edgellm.generate import Slot, check_room, most_new
from edgellm.loading import open_model, open_tokenizer
from edgellm.logprobs import Logprob
from edgellm.prefix_cache import PrefixCache
from edgellm.ranking import Following, likelihoods
from edgellm.request import Answers, Request
from edgellm.scheduler import AT_ONCE, Scheduler
from edgellm.text_stream import TextStream

if TYPE_CHECKING:
    from edgellm.answer_cache import AnswerCache
    from edgellm.async_stream import AsyncStream
    from edgellm.chat import Chat
    from edgellm.structured.constraint import LogitsProcessor
    from edgellm.structured.json_schema import JsonSchema

T = TypeVar("T")
MAX_DEFAULT_CONTEXT = 8192
"""The default context is not longer than this: its cache would be the largest thing in memory."""


def load(
    model: str | os.PathLike[str] = catalog.DEFAULT,
    *,
    backend: str | None = None,
    context_length: int | None = None,
    n_threads: int | None = None,
    at_once: int = AT_ONCE,
    cache_bytes: int | None = None,
    answer_cache: AnswerCache | None = None,
    kv: str = "f16",
    adapters: Sequence[tuple[str | os.PathLike[str], float]] = (),
) -> Model:
    """Load a model: a catalog name (downloaded if it is not here yet), a .edge or .gguf file, or a Hugging Face folder.

    - `backend`: "cpu" or "reference"; by default the best one that runs here.
    - `context_length`: the most tokens that a prompt and its answer may have together; by default the model's own
      limit, but at most 8192.
    - `n_threads`: by default one per available core.
    - `at_once`: how many answers of `submit_ids`, `astream` and `agenerate` are batched in one step. Each has a KV
      cache of its own.
    - `cache_bytes`: how much memory the KV caches of finished prompts and answers may keep, so that prompts with the
      same beginning are evaluated faster. By default as much as one full context, not counting open chats.
    - `answer_cache`: returns answers that were made before; see edgellm.AnswerCache.
    - `kv`: "f16", or "q8" to keep keys and values in 8 bits, which takes half the memory.
    - `adapters`: (path, scale) of low-rank adapters, added to the model's weights in every answer that does not name an
      adapter of its own; see `load_adapter`.

    Raises an EdgeError that says what is wrong and what to do.
    """
    made = Model(
        store.resolve(os.fspath(model)),
        backend=backend,
        context_length=context_length,
        n_threads=n_threads,
        at_once=at_once,
        cache_bytes=cache_bytes,
        answer_cache=answer_cache,
        kv=kv,
    )
    try:
        if adapters:
            made.adapter = combined([made._read_adapter(path, scale) for path, scale in adapters])
            made._backend.adapt(made.adapter)
            # What is free now is what they leave.
            replace(made.footprint, adapters=0).check(available_memory(), made.context_length)
    except BaseException:
        made.close()
        raise
    return made


class Model:
    """A loaded model. Close it, or use it in a with-statement, to unmap its file.

    It may be used from any number of threads; their steps run one after the other.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        backend: str | None = None,
        context_length: int | None = None,
        n_threads: int | None = None,
        at_once: int = AT_ONCE,
        cache_bytes: int | None = None,
        answer_cache: AnswerCache | None = None,
        kv: str = "f16",
    ) -> None:
        path = Path(path)
        if n_threads is not None and n_threads < 1:
            raise ArgumentError(f"n_threads is {n_threads}; expected 1 or more")
        if cache_bytes is not None and cache_bytes < 0:
            raise ArgumentError(f"cache_bytes is {cache_bytes}; expected 0 or more")
        check_kind(kv)
        name = backend or backends.best()
        backend_class = backends.get(name)
        loaded = open_model(path)
        self._file, self.config, self._architecture = loaded.file, loaded.config, loaded.architecture
        self.adapter: Adapter | None = None
        """The one that is used unless an answer asks for another."""
        try:
            if not store.verified(path):
                self._file.verify()
                store.mark_verified(path)
            self.context_length = allowed_context(context_length, self.config.context_length)
            info = self._file.info
            self.tokenizer = open_tokenizer(loaded)
        except BaseException:
            self._file.close()
            raise
        self.info, self.path, self.backend_name = info, path, name
        config = replace(self.config, context_length=self.context_length)
        self._backend: Backend = Locked(
            backend_class(loaded.architecture, config, self._file.tensors, self.context_length, n_threads, kv)
        )
        self.prefix_cache = PrefixCache(self._backend, self.context_length, cache_bytes)
        self._closed = False
        self._answers = Answers(
            self.tokenizer, config.vocab_size, self.context_length, info.eos_ids, self._backend.least_latest,
            answer_cache, self._bound_to(None),
        )  # fmt: skip
        new_scheduler = partial(Scheduler, self._backend, self.context_length, at_once, self.prefix_cache)
        new_scheduler()  # raises now for a number that is wrong
        self.at_once, self._engine = at_once, Engine(new_scheduler)
        weakref.finalize(self, self._engine.close)
        try:
            self.footprint.check(available_memory(), self.context_length)
        except OutOfMemoryError:
            self.close()
            raise

    @property
    def fingerprint(self) -> str:
        """A hash of the model's file; it changes with the weights, the tokenizer or the config."""
        return self._file.fingerprint

    @property
    def footprint(self) -> Footprint:
        """How much memory the model takes."""
        return self._backend.footprint

    def load_adapter(self, path: str | os.PathLike[str], scale: float = 1.0) -> Adapter:
        """Load a low-rank adapter (LoRA), to be used as `generate(..., adapter=a)` or `chat(adapter=a)`.

        `path` is a folder saved by PEFT, or a GGUF file of llama.cpp; what the adapter adds is multiplied by `scale`.
        The model's weights do not change, so answers with other adapters, or with none, can be made at the same time.
        Raises ModelNotFoundError if there is nothing at `path`, CheckpointError if it is damaged or made for another
        model, and UnsupportedError if it uses something that edgellm does not compute.
        """
        self._check_open()
        adapter = self._read_adapter(path, scale)
        self._backend.adapt(adapter)
        return adapter

    def _read_adapter(self, path: str | os.PathLike[str], scale: float) -> Adapter:
        if not math.isfinite(scale):
            raise ArgumentError(f"the scale of an adapter is {scale}; expected a finite number")
        read = import_module("edgellm.converters").read_adapter
        pairs = read(Path(path), self._architecture, self.config, scale)
        return Adapter(Path(path).absolute().stem, self.fingerprint, pairs)

    def generate(self, prompt: str, **options: Any) -> Completion:
        """Continue a text, and return the complete answer. Takes the same arguments as `stream`."""
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
        banned_strings: Sequence[str] = (),
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        grammar: str | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        **more: Any,
    ) -> Stream:
        """Continue a text, piece by piece. Special tokens written in the prompt are read as such.

        - `max_tokens`: by default the answer goes on until the model ends it or the context is full.
        - `stop`: the answer ends before the first of these texts.
        - `ignore_eos`: go on after the model has ended its answer.
        - `overflow`: what happens if the prompt and `max_tokens` do not fit the context. "error" raises
          ContextOverflowError before the first piece. "shift" leaves out the oldest tokens of the prompt, except BOS,
          so that three quarters of the context are used, or less if `max_tokens` needs more room; the completion's
          `dropped_tokens` says how many. "window" also lets the answer go on past a full context: whenever it is full,
          the first four tokens stay, half of the others are dropped, oldest first, and the rest move up without
          being evaluated again (arXiv:2309.17453). It raises UnsupportedError for models with learned positions.
        - `speculate`: look up what followed the last few tokens earlier in the text, and check up to this many tokens
          in one step. The answer is the same, but comes sooner where the text repeats itself.
        - `banned_strings`: texts that the answer must not contain. Where one appears, generation goes back to its
          first token and chooses another one.
        - `json_schema` (a schema, or its text), `regex` (matched as a whole), `choices` or `grammar` (GBNF), at most
          one of them: the form of the answer. An answer that ends by itself is valid; one that is cut off is the
          beginning of a valid one. Raises UnsupportedError before the first piece for what cannot be guaranteed.
        - `logits_processors`: each is called with the ids so far and the (vocab_size,) logits of the next token, and
          returns logits; they are called in order.
        - `logprobs`: add to the completion how likely each token was, and this many of the likeliest alternatives.
        - `prompt_logprobs`: the same for the prompt, all of which is then evaluated.
        - `more`: the fields of SamplingParams (temperature, top_k...), and `adapter`, from `load_adapter`, or None for
          no adapter.
        """
        return self.stream_ids(
            self.tokenize(prompt),
            max_tokens=max_tokens,
            stop=stop,
            ignore_eos=ignore_eos,
            overflow=overflow,
            speculate=speculate,
            banned_strings=banned_strings,
            json_schema=json_schema,
            regex=regex,
            choices=choices,
            grammar=grammar,
            logits_processors=logits_processors,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **more,
        )

    def stream_ids(self, prompt_ids: Sequence[int], *, keeper: object = None, **options: Any) -> Stream:
        """As `stream`, but from token ids, of which there must be at least one. With a `keeper`, the KV cache of prompt
        and answer stays in memory until that object is deleted or released (`prefix_cache.release`)."""
        answer = self._answers.begin(prompt_ids, self._request(options))
        return Stream(self._pieces(answer, keeper), answer.completion)

    async def agenerate(self, prompt: str, **options: Any) -> Completion:
        """As `generate`, but awaited. Cancelling the task stops the answer at the next token. See `astream`."""
        async with self.astream(prompt, **options) as stream:
            async for _ in stream:
                pass
        return stream.completion

    def astream(self, prompt: str, **options: Any) -> AsyncStream:
        """As `stream`, for `async for`. It never blocks the event loop, and concurrent answers are batched. Nothing is
        raised before the first piece is asked for."""
        from edgellm.async_stream import AsyncStream

        return AsyncStream(lambda: (self.begin_ids(self.tokenize(prompt), **options), Turn()), self.submit)

    def submit_ids(self, prompt_ids: Sequence[int], listener: Listener, **options: Any) -> Job:
        """As `stream_ids`, but made by the model's own thread, batched with its other answers: see edgellm.engine.
        Returns at once; `listener` is called with each piece, and finally with the Completion or the exception."""
        return self.submit(self.begin_ids(prompt_ids, **options), listener)

    def begin_ids(self, prompt_ids: Sequence[int], **options: Any) -> Answer:
        """Check and prepare an answer for `submit`."""
        return self._answers.begin(prompt_ids, self._request(options))

    def _request(self, options: Mapping[str, Any]) -> Request:
        request = Request.of({"adapter": self.adapter, **options})
        self._check_adapter(request.adapter)
        return request

    def _check_adapter(self, adapter: Adapter | None) -> None:
        if adapter is not None and (not isinstance(adapter, Adapter) or adapter.base != self.fingerprint):
            found = adapter.name if isinstance(adapter, Adapter) else repr(adapter)
            raise ArgumentError(f"the adapter {found} was not loaded for this model; load it with model.load_adapter")

    def submit(self, answer: Answer, listener: Listener) -> Job:
        """Have an answer made that `begin_ids` has prepared."""
        return self._engine.submit(answer, listener)

    def prepare_ids(
        self, ids: Sequence[int], stopped: Callable[[], bool], *, keeper: object = None, adapter: Adapter | None = None
    ) -> int:
        """Evaluate tokens that a prompt will begin with, a few at a time until `stopped`; return how many were not in
        the cache before."""
        self._check_open()
        self.check_ids(ids)
        return self.prefix_cache.hold(ids, keeper, adapter or self.adapter, stopped)

    def when_idle(self, opening: Callable[[], Sequence[int]]) -> None:
        """Once no submitted answer is under way, evaluate what the next prompt is likely to begin with."""
        self._engine.when_idle(lambda stopped: self.prepare_ids(opening(), stopped))

    def under_way(self) -> list[Answer]:
        """Answers that were submitted and are not finished, first those that have a slot. They may still change."""
        return self._engine.under_way()

    def generate_batch(self, prompts: Sequence[str], *, at_once: int = AT_ONCE, **options: Any) -> list[Completion]:
        """Continue many texts, `at_once` of them in each step of the model. Each answer is what `generate` would give.

        Takes the same arguments as `stream`, which apply to all prompts. When an answer is finished, the next prompt
        takes its place; a beginning that prompts share is evaluated once. Each sequence in progress has a KV cache of
        its own. Raises ContextOverflowError before starting if a prompt does not fit.
        """
        request, ids = self._request(options), [self.tokenize(prompt) for prompt in prompts]
        return self._batch([self._answers.begin(each, request) for each in ids], at_once)

    def generate_many(self, prompt: str, n: int, *, at_once: int = AT_ONCE, **options: Any) -> list[Completion]:
        """`n` answers to one prompt, which is evaluated once. With a seed, the i-th answer (from 0) uses seed + i."""
        request, ids = self._request(options), self.tokenize(prompt)
        if n < 1:
            raise ArgumentError(f"n is {n}; expected 1 answer or more")
        seed = request.params.seed
        each = [request.params if seed is None else replace(request.params, seed=seed + i) for i in range(n)]
        return self._batch([self._answers.begin(ids, replace(request, params=params)) for params in each], at_once)

    def beam_search(
        self,
        prompt: str,
        beams: int,
        *,
        n: int = 1,
        max_tokens: int | None = None,
        ignore_eos: bool = False,
        length_penalty: float = 1.0,
    ) -> list[Completion]:
        """The `n` best answers that a search with `beams` beams finds, the best first. The score of an answer is the
        sum of its tokens' log-probabilities, including the token that ends it, divided by their number **
        length_penalty.

        Each beam has a KV cache of its own.
        """
        ids = self.tokenize(prompt)
        self._answers.check(ids)
        left = most_new(len(ids), max_tokens, self.context_length)
        check_room(len(ids), 1, self.context_length)
        if not left:
            raise ArgumentError("max_tokens is 0; expected 1 or more for a beam search")
        if not 1 <= n <= beams <= self._backend.MAX_ROWS:
            most = self._backend.MAX_ROWS
            raise ArgumentError(f"{n} answers of {beams} beams; expected 1 to {most}, and no fewer beams than answers")
        if not -10 <= length_penalty <= 10:
            raise ArgumentError(f"length_penalty is {length_penalty}; expected -10 to 10")
        ends = () if ignore_eos else self.info.eos_ids
        found = beam_search(self.open_slot, ids, beams, left, ends=ends, length_penalty=length_penalty)
        return [self._completion(ids, beam) for beam in found[:n]]

    def _completion(self, prompt_ids: list[int], beam: Beam) -> Completion:
        ids, text = beam.ids[: len(beam.ids) - beam.is_ended], TextStream(self.tokenizer, prompt_ids)
        return Completion(
            "".join(map(text.push, ids)) + text.flush(),
            ids,
            "stop" if beam.is_ended else "length",
            prompt_ids,
            Timings(len(prompt_ids), generated_tokens=len(beam.ids)),
            logprobs=[Logprob(id, value, []) for id, value in zip(beam.ids, beam.logprobs, strict=True)],
        )

    def _batch(self, answers: list[Answer], at_once: int) -> list[Completion]:
        self._check_open()
        scheduler = Scheduler(self._backend, self.context_length, at_once, self.prefix_cache)
        try:
            under_way = {answer.submit(scheduler): answer for answer in answers if not answer.known}
            while scheduler.is_busy:
                for progress in scheduler.step():
                    under_way[progress.sequence].follow(progress, scheduler)
        finally:
            scheduler.close()
        for answer in answers:
            if answer.known:
                deque(answer.replay(), maxlen=0)
        return [answer.completion for answer in answers]

    def _pieces(self, answer: Answer, keeper: object) -> Iterator[Piece]:
        self._check_open()
        if answer.known:
            yield from answer.replay()
            return
        slot = self.prefix_cache.take(answer.completion.prompt_ids, keeper, answer.adapter)
        try:
            yield from answer.pieces(slot)
        finally:
            self.prefix_cache.put(slot, keeper)

    def save_cache(
        self, path: str | os.PathLike[str], *, keeper: object = None, extra: Mapping[str, Any] | None = None
    ) -> int:
        """Write the KV cache of the last answer, or of the one with that `keeper`, to a file for `load_cache`, so that
        its tokens need not be evaluated again. Returns their number.

        `extra` (JSON) is stored with it. Raises ArgumentError if there is nothing to save, or the file cannot be
        written.
        """
        with self.prefix_cache.latest(keeper) as slot:
            if slot is None or not slot.ids:
                raise ArgumentError(f"nothing is there that {path} could keep; make an answer first")
            cache_file.write(Path(path), self._bound_to(slot.adapter), slot, extra or {})
            return len(slot.ids)

    def load_cache(
        self, path: str | os.PathLike[str], *, keeper: object = None, adapter: Adapter | None = None
    ) -> cache_file.Saved:
        """Read a file of `save_cache`, to be used by prompts that begin with its tokens.

        Raises ArgumentError if the file is damaged, or was written with another model, adapter (by default the
        model's), backend or context length.
        """
        adapter = adapter or self.adapter
        saved = cache_file.read(Path(path), self._bound_to(adapter), self.config.vocab_size)
        slot = self._open_slot(adapter)
        try:
            cache_file.restore(Path(path), saved, slot)
        except BaseException:
            slot.close()
            raise
        self.prefix_cache.put(slot, keeper)
        return saved

    def _bound_to(self, adapter: Adapter | None) -> dict[str, Any]:
        """What must be the same for a cache to be used again."""
        return {
            "fingerprint": self.fingerprint, "backend": self.backend_name, "layout": self._backend.CACHE_LAYOUT,
            "edgellm": __version__, "context_length": self.context_length,
            "adapter": adapter and adapter.fingerprint,
        }  # fmt: skip

    def open_slot(self) -> Slot:
        """A new slot, which the caller closes. Raises EdgeError after `close`."""
        return self._open_slot(self.adapter)

    def _open_slot(self, adapter: Adapter | None) -> Slot:
        self._check_open()
        return Slot(self._backend, self.context_length, adapter)

    def chat(self, system: str | None = None, *, adapter: Adapter | None = None) -> Chat:
        """Begin a conversation; `adapter` is one of `load_adapter`, by default the model's. Raises ChatTemplateError if
        the model has no chat template."""
        from edgellm.chat import Chat

        return Chat(self, system, adapter or self.adapter)

    def logits(self, ids: Sequence[int]) -> F32:
        """For each of n tokens the logits of the token that follows: (n, vocab_size) float32."""
        self._answers.check(ids)
        slot = self.open_slot()
        try:
            return slot.extend(list(ids), wanted=range(len(ids)))
        finally:
            slot.close()

    def score(self, text: str) -> list[Logprob]:
        """How likely the model finds a text: the natural logarithm of the probability of each token except the first,
        given those before it. Their sum is the log-probability of the text. Raises ContextOverflowError if the text
        does not fit."""
        return self.generate(text, max_tokens=0, prompt_logprobs=0).prompt_logprobs

    def embed(self, text: str, *, pooling: str = "mean") -> F32:
        """An embedding: (hidden_size,) float32 of length 1, which is similar for texts of similar meaning.

        It is the mean of the last hidden states of all tokens, or with `pooling="last"` that of the last token, which
        some embedding models are trained for. Raises ContextOverflowError if the text does not fit.
        """
        check_pooling(pooling)
        ids = self.tokenize(text)
        self.check_ids(ids)
        *_, (found,) = embeddings(self.open_slot, [ids], pooling)
        return found

    def embed_groups(self, texts: Sequence[Sequence[int]], pooling: str = "mean") -> Iterator[Steps]:
        """What `embed` gives, for many texts as checked ids: in groups that are evaluated together, one step of the
        model at a time."""
        check_pooling(pooling)
        for group in groups([len(ids) for ids in texts], self._backend.MAX_ROWS):
            yield self._beside(embeddings(self.open_slot, texts[group], pooling), texts[group])

    def likelihood_groups(self, texts: Sequence[Following]) -> Iterator[Generator[list[float], None, None]]:
        """How likely each text is to follow another, both as checked ids; in groups, as in `embed_groups`."""
        for group in groups([len(each.ids) for each in texts], self._backend.MAX_ROWS):
            yield self._beside(likelihoods(self.open_slot, texts[group]), [each.ids for each in texts[group]])

    def _beside(self, steps: Generator[T, None, None], texts: Sequence[Sequence[int]]) -> Generator[T, None, None]:
        """Run steps whose slots take their memory from the share of the prefix cache."""
        with self.prefix_cache.lending(sum(self._backend.bytes_of(len(ids)) for ids in texts)), closing(steps):
            yield from steps

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise ArgumentError if there are no ids or one is not in the vocabulary, and ContextOverflowError if there
        are too many."""
        self._answers.check(ids)
        check_room(len(ids), 0, self.context_length)

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Text -> ids. `add_special` adds the model's BOS or EOS; `parse_special` reads special tokens in the text."""
        return self.tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Ids -> text, without special tokens."""
        return self.tokenizer.decode(ids)

    def close(self) -> None:
        self._closed = True
        self.prefix_cache.close()
        self._engine.close()
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


def allowed_context(asked: int | None, model: int) -> int:
    """The context length to use: the one asked for, or the default for a model with that limit. Raises ArgumentError if
    the model does not allow it."""
    if asked is None:
        return min(model, MAX_DEFAULT_CONTEXT)
    if not 1 <= asked <= model:
        raise ArgumentError(f"a context of {asked} tokens was asked for; this model allows 1 to {model}")
    return asked
