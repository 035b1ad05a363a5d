"""The models that a server has: loaded when they are asked for, unloaded when they rest or when others need the room.

All of it is for the thread of the event loop; files are opened and closed in others.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from edgellm import __version__, store
from edgellm.api import Model, allowed_context
from edgellm.chat import chat_template
from edgellm.chat_template import ChatPrompt, ChatTemplate
from edgellm.errors import EdgeError, ModelNotFoundError, OutOfMemoryError
from edgellm.footprint import Footprint, Share
from edgellm.loading import open_model
from edgellm.scheduler import AT_ONCE
from edgellm.server.errors import RequestError
from edgellm.server.metrics import Metrics

logger = logging.getLogger("edgellm.server")

FEWEST = 4
"""Slots of a model, if nobody says how many, for which no other one is unloaded."""


@dataclass(frozen=True)
class Terms:
    """How models are loaded, and for how long."""

    open: Callable[..., Model]
    """Path, and the arguments `at_once` and `cache_bytes` of edgellm.load -> the model."""
    slots: int | None = None
    """Of each model; None: 16, or as many as memory holds."""
    memory: int | None = None
    """Bytes that all models may take together, weights included; None: nobody has said."""
    available: int | None = None
    """Bytes that are free before any is loaded; None: nobody knows."""
    keep_alive: float = math.inf
    """Seconds that a model stays loaded which nobody uses."""
    context_length: int | None = None


class Served:
    """A model that is loaded, by the name that clients know it by."""

    def __init__(self, name: str, model: Model, share: Share, keep_alive: float) -> None:
        self.name, self.model, self.keep_alive = name, model, keep_alive
        self.fingerprint = f"edgellm-{__version__}-{model.fingerprint[:12]}"
        self.n_bytes = model.footprint.held(share)
        """Memory that it may come to take."""
        self.users = 0
        """Requests that are being answered with it."""
        self.used = time.monotonic()
        """When the last of them began or ended."""
        self.is_leaving = False
        """Whether it is to make room: who asks for it from now on waits for that."""
        self.timer: asyncio.TimerHandle | None = None
        self.grouped = asyncio.Lock()
        """Held while a group of texts is evaluated, which takes slots of its own."""

    @cached_property
    def template(self) -> ChatTemplate:
        """Raises ChatTemplateError if the model has none."""
        return chat_template(self.model)

    def prompt(self) -> ChatPrompt:
        return ChatPrompt(self.model.tokenizer, self.template)

    @property
    def seconds_left(self) -> float:
        """Until it is unloaded if nobody asks for it; infinity: not before another one needs the room."""
        return self.keep_alive - (0 if self.users else time.monotonic() - self.used)


class Models:
    def __init__(self, named: Mapping[str, Path], terms: Terms, metrics: Metrics) -> None:
        """`named`: those that may be asked for, the first for requests that name none; without any all that are in the
        store, now or later."""
        self._named, self.terms = dict(named), terms
        self.loaded: dict[str, Served] = {}
        self._metrics = metrics
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._expiring: set[asyncio.Task[None]] = set()
        self._alone = asyncio.Lock()
        """Held while a model is loaded or unloaded."""
        self._freed = asyncio.Event()

    def known(self) -> dict[str, Path]:
        """Every model that may be asked for, by its name."""
        return self._named or store.here()

    def name_of(self, asked: str | None) -> str:
        """The name of a model that there is, of the first if none is asked for; raises ModelNotFoundError."""
        known = self.known()
        name = next(iter(known), None) if asked is None else asked
        if name is None or name not in known:
            there = f"one of {', '.join(known)}" if known else "one that is pulled: run edgellm pull NAME"
            raise ModelNotFoundError(f"there is no model {str(name)[:100]!r}; expected {there}")
        return name

    def status(self, name: str) -> str:
        return "loaded" if name in self.loaded else "loading" if name in self._loading else "unloaded"

    def changed(self, name: str) -> int:
        """When its file was made, in seconds of the clock; 0 if it is gone."""
        try:
            return int(self.known()[name].stat().st_mtime)
        except (OSError, KeyError):
            return 0

    def context_length(self, name: str) -> int | None:
        """Most tokens of a prompt with its answer; None for a model that cannot be loaded. It may read the file."""
        if served := self.loaded.get(name):
            return served.model.context_length
        try:
            path = self.known()[name]
            return allowed_context(self.terms.context_length, _trained_context(path, path.stat().st_mtime_ns))
        except (EdgeError, OSError, KeyError):
            return None

    @property
    def slots(self) -> int:
        """Answers that are made at once; of none that are loaded, those of the first that will be."""
        return sum(served.model.at_once for served in self.loaded.values()) or self.terms.slots or AT_ONCE

    @property
    def n_bytes(self) -> int:
        """Memory that those which are loaded may come to take."""
        return sum(served.n_bytes for served in self.loaded.values())

    @property
    def n_cached_bytes(self) -> int:
        """Memory of tokens that are kept for prompts which begin with them."""
        return sum(served.model.prefix_cache.n_bytes for served in self.loaded.values())

    def is_at_hand(self, name: str) -> bool:
        return name in self.loaded and not self.loaded[name].is_leaving

    async def take(self, name: str, keep_alive: float | None = None, seconds: float = math.inf) -> Served:
        """A model that there is, loaded first if it must be. It stays until `release`, and then for `keep_alive`
        seconds, or those that were last asked for.

        Raises what loading it does, and RequestError if that takes more than so many seconds.
        """
        deadline = time.monotonic() + seconds
        while not self.is_at_hand(name):
            await self._load(name, deadline)
        served = self.loaded[name]
        served.users += 1
        self._touch(served)
        if keep_alive is not None:
            served.keep_alive = keep_alive
        return served

    def release(self, served: Served) -> None:
        served.users -= 1
        self._rest(served)

    def adopt(self, name: str, model: Model) -> None:
        """Have a model that is loaded already, for good; whoever loaded it closes it."""
        self.loaded[name] = Served(name, model, Share(model.at_once, model.footprint.cache), math.inf)

    async def preload(self) -> None:
        """Load the first model, and those that were named besides as long as there is room.

        Raises what loading the first one does.
        """
        for name in self._named or [self.name_of(None)]:
            try:
                await self._make(name, may_unload=False)
            except OutOfMemoryError:
                if not self.loaded:
                    raise

    def start(self) -> None:
        """Count the time from now on; in the loop that answers."""
        for served in self.loaded.values():
            self._rest(served)

    async def close(self) -> None:
        """Unload all; nobody is to be answered any more."""
        for task in (*self._loading.values(), *self._expiring):
            task.cancel()
        async with self._alone:
            for served in list(self.loaded.values()):
                await self._unload(served)

    async def _load(self, name: str, deadline: float) -> None:
        """Those who ask for the same model wait for one load, which goes on if they leave."""
        if name not in self._loading:
            self._loading[name] = asyncio.create_task(self._load_alone(name))
            self._loading[name].add_done_callback(lambda task: self._has_loaded(name, task))
        task = self._loading[name]
        await asyncio.wait([task], timeout=None if math.isinf(deadline) else deadline - time.monotonic())
        if not task.done():
            raise RequestError(
                f"the model {name} was not loaded in time, or others were answering and left it no room; expected less "
                "waiting: ask again later, or start the server with a longer --timeout or more --memory",
                status=504,
            )
        task.result()

    def _has_loaded(self, name: str, task: asyncio.Task[None]) -> None:
        del self._loading[name]
        if not task.cancelled() and (error := task.exception()):
            logger.error({"message": f"the model {name} could not be loaded", "model": name}, exc_info=error)

    async def _load_alone(self, name: str) -> None:
        async with self._alone:
            if name not in self.loaded:
                try:
                    self._rest(await self._make(name))
                except (EdgeError, OSError, MemoryError) as error:
                    raise self._not_loaded(name, error) from error

    def _not_loaded(self, name: str, error: Exception) -> RequestError:
        """What clients hear: nothing of folders."""
        folder = self.known().get(name, Path(name)).parent
        return RequestError(
            f"the model {name} could not be loaded: {str(error).replace(f'{folder}{os.sep}', '')}",
            status=503, code="model_not_loaded", headers={"x-should-retry": "false"},
        )  # fmt: skip

    async def _make(self, name: str, may_unload: bool = True) -> Served:
        begun, path = time.monotonic(), self.known()[self.name_of(name)]
        model, share = await self._opened(name, path, may_unload)
        served = self.loaded[name] = Served(name, model, share, self.terms.keep_alive)
        self._metrics.model_loads.add(model=name)
        seconds = round(time.monotonic() - begun, 3)
        logger.info({"message": "loaded", "model": name, "slots": share.slots, "seconds": seconds})
        return served

    async def _opened(self, name: str, path: Path, may_unload: bool) -> tuple[Model, Share]:
        """The model, with what it gets of the memory; others are unloaded for it."""
        wanted = self.terms.slots or AT_ONCE
        model = await self._open(path, may_unload, at_once=wanted)
        try:
            footprint = model.footprint
            while (share := self._share(footprint)) is None:
                if not may_unload or not await self._make_room():
                    raise self._too_large(name, footprint)
            if share == footprint.share(None, wanted):
                return model, share
        except BaseException:
            model.close()
            raise
        await asyncio.to_thread(model.close)
        return await self._open(path, may_unload, at_once=share.slots, cache_bytes=share.cache_bytes), share

    async def _open(self, path: Path, may_unload: bool, **arguments: int) -> Model:
        while True:
            try:
                return await asyncio.to_thread(self.terms.open, path, **arguments)
            except OutOfMemoryError:
                if not may_unload or not await self._make_room():
                    raise

    def _share(self, footprint: Footprint) -> Share | None:
        """What a model gets of the memory that others leave; None: too little."""
        terms, room = self.terms, self._memory
        if room is not None:
            # What is said counts; if nothing is, a model alone may be larger than memory, and is read again and again.
            is_counted = self.loaded or terms.memory is not None
            room -= self.n_bytes + (footprint.weights if is_counted else 0)
        return footprint.share(room, terms.slots or AT_ONCE, terms.slots or (FEWEST if self.loaded else 1))

    @property
    def _memory(self) -> int | None:
        return self.terms.available if self.terms.memory is None else self.terms.memory

    def _too_large(self, name: str, footprint: Footprint) -> OutOfMemoryError:
        slots, memory = self.terms.slots or 1, self._memory or 0
        needed = footprint.held(Share(slots, 0)) - (0 if self.terms.memory is not None else footprint.weights)
        return OutOfMemoryError(
            f"{name} takes {needed / 1e6:.0f} MB with {slots} slot{'s' * (slots > 1)}, and models may take "
            f"{max(0, memory - self.n_bytes) / 1e6:.0f} MB; start the server with more memory (--memory), fewer slots "
            "(--slots) or a smaller context (--ctx)"
        )

    async def _make_room(self) -> bool:
        """Unload the model that was used longest ago, once it answers nobody; False if none is loaded."""
        if not self.loaded:
            return False
        oldest = min(self.loaded.values(), key=_used)
        # Others may not keep it for ever.
        oldest.is_leaving = True
        try:
            while not (idle := [served for served in self.loaded.values() if not served.users]):
                self._freed.clear()
                await self._freed.wait()
        finally:
            oldest.is_leaving = False
        await self._unload(min(idle, key=_used))
        return True

    async def _unload(self, served: Served) -> None:
        del self.loaded[served.name]
        self._touch(served)
        self._metrics.model_unloads.add(model=served.name)
        await asyncio.to_thread(served.model.close)
        logger.info({"message": "unloaded", "model": served.name})

    def _rest(self, served: Served) -> None:
        """Nobody may be asking for it: it is unloaded if that stays so."""
        if served.users:
            return
        self._touch(served)
        self._freed.set()
        if not math.isinf(served.keep_alive):
            served.timer = asyncio.get_running_loop().call_later(served.keep_alive, self._expire, served)

    def _touch(self, served: Served) -> None:
        served.used = time.monotonic()
        if served.timer:
            served.timer.cancel()
            served.timer = None

    def _expire(self, served: Served) -> None:
        task = asyncio.create_task(self._expire_alone(served, served.timer))
        self._expiring.add(task)
        task.add_done_callback(self._expiring.discard)

    async def _expire_alone(self, served: Served, timer: asyncio.TimerHandle | None) -> None:
        async with self._alone:
            if served.timer is timer and self.loaded.get(served.name) is served:
                await self._unload(served)


def _used(served: Served) -> float:
    return served.used


@lru_cache(256)
def _trained_context(path: Path, changed: int) -> int:
    """Of a file that was last changed then."""
    opened = open_model(path)
    opened.file.close()
    return int(opened.config.context_length)
