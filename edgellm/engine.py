"""Answers of any threads side by side on one model: a thread of its own makes them, in steps that they share.

Knows no event loop, and no model: answers go in, and what becomes of them goes to those who listen.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from edgellm.answer import Answer, Completion, Piece
from edgellm.errors import EdgeError
from edgellm.scheduler import Progress, Scheduler
from edgellm.sequence import Sequence

IDLE = 0.05
"""Seconds without an answer to make, after which there is time for what is not asked for."""
Event = Piece | Completion | Exception
"""Of one answer: its pieces, and as the last event the completion, or what was raised."""
Listener = Callable[[Event], object]
"""Called in the engine's thread, or in the one that cancels. Everybody waits for it: it puts the event into a queue,
say, and returns. If it raises, its answer is cancelled."""


Later = Callable[[Callable[[], bool]], object]
"""Called with what says whether it is to stop, as soon as it can."""


class Job:
    """An answer that an engine has been given."""

    def __init__(self, engine: Engine, answer: Answer, listener: Listener) -> None:
        self._engine, self.answer, self._listener = engine, answer, listener
        self.sequence: Sequence | None = None
        self.is_over = False

    def cancel(self) -> None:
        """Stop the answer, at any token, or do nothing if it is over. Any thread may; it waits for no step.

        The last event is a completion with what came so far, and the reason "cancelled". It grows no more.
        """
        self._engine._cancel(self)

    def replay(self) -> None:
        """For the engine: tell of an answer that is known."""
        for piece in self.answer.replay():
            self.tell(piece)
        self.tell(self.answer.completion)

    def tell(self, event: Event) -> None:
        """For the engine, which holds its lock. Nothing is told after the last event."""
        if self.is_over:
            return
        self.is_over = not isinstance(event, Piece)
        try:
            self._listener(event)
        except Exception:
            # Nobody listens any more, as when an event loop is closed.
            self._engine._cancel(self)


class Engine:
    """Its thread starts with the first answer, sleeps when there is none to make, and ends with `close`."""

    def __init__(self, new_scheduler: Callable[[], Scheduler]) -> None:
        self._new_scheduler = new_scheduler
        self._changed = threading.Condition()
        """Its lock guards what follows, and every answer that is not over."""
        self._coming: deque[Job] = deque()
        self._going: deque[Job] = deque()
        self._under_way: dict[Sequence, Job] = {}
        self._later: Later | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, answer: Answer, listener: Listener) -> Job:
        """Make an answer, as soon as there is room: with the tokens that it would have alone. Returns at once.

        Any thread may call it. Raises EdgeError after `close`, and where no thread can be started.
        """
        job = Job(self, answer, listener)
        with self._changed:
            if self._closed:
                raise EdgeError("the model is closed; load it again")
            self._thread = self._thread or self._started()
            self._coming.append(job)
            self._changed.notify()
        return job

    def when_idle(self, later: Later) -> None:
        """Have this done in the engine's thread, once there has been no answer to make for IDLE seconds. Of several
        only the last is done, and nobody hears of what it raises."""
        with self._changed:
            self._later = later
            self._changed.notify()

    def _started(self) -> threading.Thread:
        thread = threading.Thread(target=self._work, name="edgellm-engine", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise EdgeError(
                f"no thread can be started to make the answer: {error}; expected room for one more: end other "
                "programs, or allow more threads (ulimit -u)"
            ) from error
        return thread

    def under_way(self) -> list[Answer]:
        """Answers that are made, and after them those that wait for a slot; others go on with them meanwhile."""
        with self._changed:
            return [job.answer for job in (*self._under_way.values(), *self._coming)]

    def close(self) -> None:
        """Stop all answers, which end with an EdgeError; the thread has ended when it returns."""
        with self._changed:
            self._closed = True
            self._end_all(EdgeError("the model was closed before the answer was complete"))
            self._changed.notify()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join()

    def _cancel(self, job: Job) -> None:
        with self._changed:
            if not job.is_over:
                self._going.append(job)
                job.tell(job.answer.completion)
                self._changed.notify()

    def _work(self) -> None:
        try:
            self._make()
        except Exception as error:
            # Of beginning anew, or of giving slots back: the next answer gets another thread, and may have more luck.
            with self._changed:
                self._thread = None
                self._end_all(error)

    def _make(self) -> None:
        while not self._closed:
            scheduler = self._new_scheduler()
            try:
                while self._admit(scheduler):
                    if scheduler.is_busy:
                        self._tell(scheduler.step(), scheduler)
                    else:
                        scheduler.settle()
                        self._wait()
            except Exception as error:
                # Whatever it is, those who wait must hear of it; what comes later begins anew.
                self._end_all(error)
            finally:
                scheduler.close()

    def _admit(self, scheduler: Scheduler) -> bool:
        """Take in what has come and what has gone; False after `close`."""
        with self._changed:
            while self._coming:
                job = self._coming.popleft()
                if job.is_over:
                    continue
                if job.answer.known:
                    job.replay()
                else:
                    job.sequence = job.answer.submit(scheduler)
                    self._under_way[job.sequence] = job
            while self._going:
                self._forget(self._going.popleft(), scheduler)
            return not self._closed

    def _is_wanted(self) -> bool:
        return bool(self._closed or self._coming or self._going)

    def _wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_wanted() or self._later)
            if self._is_wanted() or self._changed.wait_for(self._is_wanted, IDLE):
                return
            later, self._later = self._later, None
        assert later, "that is what was waited for"
        with suppress(Exception):
            later(self._is_wanted)

    def _tell(self, progresses: list[Progress], scheduler: Scheduler) -> None:
        for progress in progresses:
            with self._changed:
                job = self._under_way.get(progress.sequence)
                if job is None or job.is_over:
                    continue
                try:
                    pieces = job.answer.follow(progress, scheduler)
                except Exception as error:
                    job.tell(error)
                else:
                    for piece in pieces:
                        job.tell(piece)
                    if job.answer.is_over:
                        job.tell(job.answer.completion)
                if job.is_over:
                    self._forget(job, scheduler)

    def _forget(self, job: Job, scheduler: Scheduler) -> None:
        if job.sequence and job.sequence in self._under_way:
            del self._under_way[job.sequence]
            scheduler.cancel(job.sequence)

    def _end_all(self, error: Exception) -> None:
        with self._changed:
            for job in (*self._under_way.values(), *self._coming):
                job.tell(error)
            self._under_way.clear()
            self._coming.clear()
            self._going.clear()
