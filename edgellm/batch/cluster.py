"""The same on the workers of a Dask cluster: each loads the model once, and is handed chunks of lines."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

from distributed import Client, KilledWorker, TimeoutError, as_completed
from distributed.comm import get_address_host_port

from edgellm.batch.files import Answered, Line
from edgellm.batch.replica import Replica
from edgellm.errors import ArgumentError, EdgeError, UnsupportedError
from edgellm.options import load_with_slots, short_name

CHUNK = 32
"""Lines that are handed out together, and again if their worker is lost."""
AHEAD = 2
"""Chunks under way for each thread of a worker: the next is there when one is answered."""
SECONDS = 60
"""For the scheduler, and for a first worker, to be there."""


class Load(NamedTuple):
    """How a worker loads its model."""

    model: str
    options: tuple[tuple[str, Any], ...]
    slots: int | None


class Cluster:
    """A model on the workers of a cluster; what becomes of lost workers' chunks is Dask's part: others get them."""

    def __init__(self, client: Client, load: Load) -> None:
        self._client, self._load = client, load
        self.fingerprint: str = client.submit(_fingerprint, load, pure=False).result()

    def answer_all(self, lines: Iterator[Line], tell: Callable[[Answered], object]) -> None:
        chunks = iter(lambda: list(islice(lines, CHUNK)), [])
        under_way = as_completed(loop=self._client.loop)
        self._hand_out(chunks, under_way)
        for future in under_way:
            for answered in self._result(future):
                tell(answered)
            self._hand_out(chunks, under_way)

    def _hand_out(self, chunks: Iterator[list[Line]], under_way: Any) -> None:
        """Workers may come and go meanwhile."""
        most = max(1, AHEAD * sum(self._client.nthreads().values()))
        for chunk in islice(chunks, max(0, most - under_way.count())):
            under_way.add(self._client.submit(_answer, self._load, self.fingerprint, chunk, pure=False))

    @staticmethod
    def _result(future: Any) -> list[Answered]:
        try:
            found: list[Answered] = future.result()
        except KilledWorker as error:
            raise EdgeError(
                f"{error.allowed_failures + 1} workers ended with the same {CHUNK} requests; their logs say why: give "
                "them more memory, or ask for fewer --slots or a smaller --ctx"
            ) from error
        return found


@contextmanager
def connected(address: str, load: Load) -> Iterator[Cluster]:
    """Raises ArgumentError where there is no cluster, and what workers raise that cannot load the model."""
    _check_there(address)
    with Client(address, timeout=SECONDS, set_as_default=False) as client:
        try:
            client.wait_for_workers(1, timeout=SECONDS)
        except TimeoutError:
            raise EdgeError(
                f"the scheduler at {address} had no worker for {SECONDS} seconds; start some: dask worker {address}"
            ) from None
        try:
            cluster = Cluster(client, load)
        except ModuleNotFoundError as error:
            raise UnsupportedError(
                f"the cluster's workers miss the package {error.name}; run pip install 'edgellm[cluster]' on each"
            ) from error
        yield cluster


def _check_there(address: str) -> None:
    """Dask itself would try again and again."""
    try:
        socket.create_connection(get_address_host_port(address), SECONDS).close()
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"there is no Dask scheduler at {address} ({error}); expected the address that `dask scheduler` tells: "
            "tcp://10.0.0.1:8786, say"
        ) from error


# On a worker.


class _Loaded:
    """A replica with an event loop of its own: a worker's threads may all have chunks for it."""

    def __init__(self, load: Load) -> None:
        name = short_name(load.model)
        self.replica = Replica(name, load_with_slots(load.model, dict(load.options), load.slots))
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="edgellm-batch", daemon=True).start()

    def answer(self, lines: list[Line]) -> list[Answered]:
        return asyncio.run_coroutine_threadsafe(self._collected(lines), self._loop).result()

    async def _collected(self, lines: list[Line]) -> list[Answered]:
        return [answered async for answered in self.replica.answers(lines)]


_loading = threading.Lock()
_replicas: dict[Load, _Loaded] = {}


def _replica(load: Load) -> _Loaded:
    with _loading:
        if load not in _replicas:
            _replicas[load] = _Loaded(load)
        return _replicas[load]


def _fingerprint(load: Load) -> str:
    return _replica(load).replica.fingerprint


def _answer(load: Load, fingerprint: str, lines: list[Line]) -> list[Answered]:
    loaded = _replica(load)
    if loaded.replica.fingerprint != fingerprint:
        raise ArgumentError(f"the workers have different models called {load.model}; expected the same file on each")
    return loaded.answer(lines)
