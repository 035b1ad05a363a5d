"""edgellm batch"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.errors import UnsupportedError
from edgellm.options import Grouped, load_with_slots, model_option, runtime_options, short_name, slots_option

if TYPE_CHECKING:
    from edgellm.batch.files import Answered, Line, Requests

AnswerAll = Callable[["Iterator[Line]", "Callable[[Answered], object]"], None]


@click.command(cls=Grouped)
@click.argument("source", type=click.Path(path_type=Path, dir_okay=False, exists=True), metavar="REQUESTS")
@click.argument("target", type=click.Path(path_type=Path, dir_okay=False), metavar="RESULTS")
@model_option
@slots_option
@click.option("--cluster", metavar="ADDRESS", help="Run on the workers of the Dask scheduler at this address.")
@runtime_options
def command(
    source: Path, target: Path, model: str, slots: int | None, cluster: str | None, **options: Any
) -> None:  # fmt: skip
    """Answer a file of REQUESTS into a file of RESULTS.

    Both are in OpenAI's batch format: one JSON object per line. If interrupted, run the same command
    again to resume. Exits with 1 if requests were refused; their results say why.
    """
    try:
        from edgellm.batch.files import Requests
        from edgellm.batch.replica import Replica
    except ModuleNotFoundError as error:
        raise _missing(error, "serve") from error
    requests = Requests(source)
    if cluster is None:
        with load_with_slots(model, options, slots) as loaded:
            replica = Replica(short_name(model), loaded)
            _answer(requests, target, replica.fingerprint, replica.answer_all)
        return
    try:
        from edgellm.batch.cluster import Load, connected
    except ModuleNotFoundError as error:
        raise _missing(error, "cluster") from error
    with connected(cluster, Load(model, tuple(options.items()), slots)) as workers:
        _answer(requests, target, workers.fingerprint, workers.answer_all)


def _missing(error: ModuleNotFoundError, extra: str) -> UnsupportedError:
    return UnsupportedError(f"batches need the package {error.name}; run pip install 'edgellm[{extra}]' and try again")


def _answer(requests: Requests, target: Path, fingerprint: str, answer_all: AnswerAll) -> None:
    from edgellm.batch.files import Results

    with Results(target, requests.ids(fingerprint), requests.path) as results:
        n_left, pace = len(requests) - len(results.done), _Pace()

        def shown(answered: Answered | None) -> str:
            return pace.text

        with click.progressbar(
            length=n_left, label=f"Answering {n_left} of {len(requests)}", file=sys.stderr, show_pos=True,
            item_show_func=shown,
        ) as bar:  # fmt: skip

            def tell(answered: Answered) -> None:
                results.add(answered)
                pace.add(answered)
                bar.update(1, answered)

            answer_all(requests.without(results.done), tell)
    n_refused = sum(status >= 400 for status in results.done.values())
    click.echo(f"{len(requests)} requests, {n_refused} refused{pace.text and f'; {pace.text}'}")
    if n_refused:
        click.get_current_context().exit(1)


class _Pace:
    """Tokens generated per second since the start."""

    def __init__(self) -> None:
        self._started, self._n = time.perf_counter(), 0

    def add(self, answered: Answered) -> None:
        self._n += answered.generated_tokens

    @property
    def text(self) -> str:
        seconds = time.perf_counter() - self._started
        return f"{self._n / seconds:.0f} tokens/s"
