"""What a process answers at a time, and what waits: the model's threads on one side, the event loop on the other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from .activity import Activity, Record
from .answer import Answer
from .errors import ApiError
from .text import Text

log = logging.getLogger("uvicorn.error")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer."""

    text: str
    finish: Literal["stop", "length"] | None = None
    """Why it is the last one; None if it is not."""


class Job:
    """An answer that is computed in a thread, and read in the event loop that made it.

    Args:
        answer: makes the tokens.
        text: makes text of them.
        record: of the request; it is kept up to date.
        report: is called when it has changed.
    """

    def __init__(self, answer: Answer, text: Text, record: Record, report: Callable[[Record], None]) -> None:
        self.answer = answer
        self.record = record
        self._text = text
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._unwanted = threading.Event()
        self._arrived = time.monotonic()

    def cancel(self) -> None:
        """Stop computing before the next step."""
        self._unwanted.set()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the answer as it is computed. Whoever stops reading cancels it.

        Raises:
            Exception: what computing it raised.
        """
        try:
            while True:
                piece = await self._queue.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish is not None:
                    return
        finally:
            self.cancel()

    def run(self) -> None:
        """Compute the answer, in a thread of its own."""
        record = self.record
        try:
            if self._unwanted.is_set():
                record.state = "aborted"
                return
            record.state = "computing"
            self._report(record)
            finish = self._compute()
            record.state = "done" if finish else "aborted"
            self._put(Piece(self._text.end(), finish or "stop"))
        except Exception as error:
            record.state = "failed"
            log.exception("an answer failed")
            self._put(error)
        finally:
            record.total = time.monotonic() - self._arrived
            self._note()
            self._report(record)

    def _compute(self) -> Literal["stop", "length"] | None:
        """Pass on the answer token by token; return why it ended, None if it is not wanted any more."""
        with contextlib.closing(self.answer.steps(lambda: not self._unwanted.is_set())) as steps:
            for token in steps:
                if self.record.first is None:
                    self.record.first = time.monotonic() - self._arrived
                    self.record.state = "answering"
                    self._note()
                    self._report(self.record)
                if text := self._text.add(token):
                    self._put(Piece(text))
                if self._text.stopped:
                    return "stop"
        if not self.answer.complete:
            return None
        return "stop" if self.answer.ended else "length"

    def _note(self) -> None:
        self.record.cached = self.answer.reused
        self.record.stored = self.answer.stored
        self.record.generated = len(self.answer.tokens)

    def _put(self, piece: Piece | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)


class Engine:
    """The jobs of a process.

    Args:
        parallel: jobs that are computed at a time.
        waiting: jobs that may wait.
        activity: where they are written down.
    """

    def __init__(self, parallel: int, waiting: int, activity: Activity) -> None:
        self._most = parallel + waiting
        self._activity = activity
        self._threads = ThreadPoolExecutor(parallel, thread_name_prefix="answer")
        self._lock = threading.Lock()
        self._jobs: set[Job] = set()

    def submit(self, answer: Answer, text: Text, record: Record) -> Job:
        """Begin an answer as soon as a thread is free. Call it in the event loop.

        Raises:
            ApiError: too many wait already.
        """
        job = Job(answer, text, record, self._activity.update)
        with self._lock:
            if len(self._jobs) >= self._most:
                raise ApiError(429, f"{self._most} requests are being answered or wait: try again", code="overloaded")
            self._jobs.add(job)
        self._activity.update(record)
        self._threads.submit(self._run, job)
        return job

    def _run(self, job: Job) -> None:
        try:
            job.run()
        finally:
            with self._lock:
                self._jobs.discard(job)

    def close(self) -> None:
        """Cancel what is left, and wait until the library has what was computed."""
        with self._lock:
            left = list(self._jobs)
        for job in left:
            job.cancel()
        self._threads.shutdown()


async def unless_gone(receive: Callable[[], Any], work: Any) -> Any:
    """Await some work, and cancel it when the client goes away; return its result, or None then.

    Args:
        receive: of ASGI; the request's body was read.
        work: a coroutine.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Callable[[], Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
