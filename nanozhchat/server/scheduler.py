"""Requests -> engine: one worker thread, a bounded waiting line, one bounded queue of deltas per request.

The event loop never waits for the engine and the worker never waits for a lock held across a yield. A job ends in
exactly one of: last delta, ApiError, or cancellation; its slot is free when the worker turns to the next job.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from nanozhchat.sampling import SamplingParams
from nanozhchat.server.schemas import ApiError

log = logging.getLogger(__name__)

DELTA_QUEUE = 64
POLL_S = 0.1  # how often a paused worker looks at its cancel event


class DeltaLike(Protocol):
    """`nanozhchat.engine.Delta`: a piece of text, the tokens so far, why the answer ended (last one only)."""

    @property
    def text(self) -> str:
        """Complete characters."""
        ...

    @property
    def n_tokens(self) -> int:
        """Tokens of the answer so far."""
        ...

    @property
    def finish_reason(self) -> str | None:
        """`stop`, `length`, `cancelled`; None before the end."""
        ...


class EngineLike(Protocol):
    """The part of `nanozhchat.engine.Engine` that serving needs."""

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, cancel: threading.Event | None = None
    ) -> Iterator[DeltaLike]:
        """Generate; checks `cancel` at every token."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on work. Times in seconds."""

    waiting: int = 16
    queue_wait_s: float = 60.0
    generation_s: float = 300.0
    stalled_reader_s: float = 60.0


class Job:
    """One request on its way through the worker. Made by `Scheduler.submit`, read by one coroutine."""

    def __init__(self, prompt_ids: Sequence[int], params: SamplingParams, loop: asyncio.AbstractEventLoop) -> None:
        """loop: the event loop that reads `deltas`."""
        self.prompt_ids, self.params = prompt_ids, params
        self.cancel = threading.Event()
        self.n_tokens = 0
        self.n_first = 0  # tokens of the first delta that carried any
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.first: float | None = None
        self.last: float | None = None
        self._loop = loop
        self._items: collections.deque[DeltaLike | ApiError] = collections.deque()
        self._ready = asyncio.Event()
        self._room = threading.BoundedSemaphore(DELTA_QUEUE)

    def timings(self) -> dict[str, float | None]:
        """Return ttft_ms (arrival to first token, waiting included) and tokens_per_s (after the first token)."""
        if self.first is None or self.last is None or self.started is None:
            return {"ttft_ms": None, "tokens_per_s": None}
        elapsed_s, n = self.last - self.first, self.n_tokens - self.n_first
        if n < 1 or elapsed_s <= 0:
            elapsed_s, n = self.last - self.started, self.n_tokens
        speed = round(n / elapsed_s, 2) if elapsed_s > 0 else None
        return {"ttft_ms": round((self.first - self.submitted) * 1000, 1), "tokens_per_s": speed}

    async def next_delta(self, timeout_s: float | None = None) -> DeltaLike | None:
        """Return the next delta, or None when timeout_s passed without one; raises ApiError if the answer failed.

        Stop after the delta that has a finish_reason. To give up earlier, set `cancel`.
        """
        if not self._items:
            self._ready.clear()
            # Not asyncio.wait_for: before Python 3.12 it can swallow a cancellation that races with a delta.
            timer = None if timeout_s is None else self._loop.call_later(timeout_s, self._ready.set)
            try:
                await self._ready.wait()
            finally:
                if timer is not None:
                    timer.cancel()
            if not self._items:
                return None
        item = self._items.popleft()
        if isinstance(item, ApiError):
            raise item
        self._room.release()
        return item

    def _publish(self, item: DeltaLike | ApiError) -> None:
        """Hand an item to the reader; called from any thread."""

        def deliver() -> None:
            self._items.append(item)
            self._ready.set()

        try:
            self._loop.call_soon_threadsafe(deliver)
        except RuntimeError:  # the loop is closed: nobody reads any more
            self.cancel.set()

    def _wait_for_room(self, limit_s: float) -> bool:
        """Wait until the reader has taken a delta; False when cancelled or the reader stalls."""
        deadline = time.perf_counter() + limit_s
        while not self.cancel.is_set() and time.perf_counter() < deadline:
            if self._room.acquire(timeout=POLL_S):
                return True
        return False

    def _note(self, delta: DeltaLike) -> None:
        if delta.n_tokens > self.n_tokens:
            self.n_tokens, self.last = delta.n_tokens, time.perf_counter()
            if self.first is None:
                self.first, self.n_first = self.last, delta.n_tokens


class Scheduler:
    """Owns the worker thread. All methods are safe to call from any thread."""

    def __init__(self, engine: EngineLike, limits: Limits | None = None) -> None:
        """engine: used from the worker thread only."""
        self.engine, self.limits = engine, limits or Limits()
        self._changed = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: Job | None = None
        self._draining = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the worker; call once."""
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Jobs the engine works on now."""
        return int(self._running is not None)

    @property
    def queued(self) -> int:
        """Jobs waiting that nobody has cancelled."""
        with self._changed:
            return sum(not job.cancel.is_set() for job in self._waiting)

    @property
    def draining(self) -> bool:
        """Whether new jobs are refused because the server is stopping."""
        return self._draining

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> Job:
        """Put a request in line; call from the event loop that will read it.

        Raises ApiError 429 when the line is full, 503 while stopping.
        """
        job = Job(prompt_ids, params, asyncio.get_running_loop())
        with self._changed:
            if self._draining:
                raise ApiError(503, "the server is stopping", code="server_stopping", retry_after_s=5)
            self._waiting = collections.deque(j for j in self._waiting if not j.cancel.is_set())
            if len(self._waiting) >= self.limits.waiting + (self._running is None):  # one goes to the free slot
                message = f"{len(self._waiting)} requests are waiting already; try again shortly"
                raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=2)
            self._waiting.append(job)
            self._changed.notify()
        asyncio.get_running_loop().call_later(self.limits.queue_wait_s, self._expire, job)
        return job

    def _expire(self, job: Job) -> None:
        with self._changed:
            waiting = job in self._waiting and not job.cancel.is_set()
        if waiting:
            job.cancel.set()
            job._publish(ApiError(503, "waited too long for a free slot", code="queue_timeout", retry_after_s=5))

    def drain(self) -> None:
        """Refuse new jobs; those accepted go on."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def abort(self) -> None:
        """Refuse new jobs and end all others with an error event."""
        self.drain()
        with self._changed:
            jobs = [*self._waiting, *([self._running] if self._running else [])]
            self._waiting.clear()
        for job in jobs:
            job._publish(ApiError(503, "the server stopped before the answer was complete", code="server_stopping"))
            job.cancel.set()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Abort what is left and wait for the worker to end."""
        self.abort()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _next(self) -> Job | None:
        with self._changed:
            self._running = None
            while not self._waiting and not self._draining:
                self._changed.wait()
            self._running = self._waiting.popleft() if self._waiting else None
            return self._running

    def _work(self) -> None:
        while (job := self._next()) is not None:
            if job.cancel.is_set():
                continue
            job.started = time.perf_counter()
            try:
                self._generate(job)
            except Exception as error:
                log.exception("generation failed")
                job._publish(_as_api_error(error))

    def _generate(self, job: Job) -> None:
        """Run one job; every path ends with a last delta or an error for the reader."""
        assert job.started is not None
        deadline = job.started + self.limits.generation_s
        for delta in self.engine.stream(job.prompt_ids, job.params, cancel=job.cancel):
            job._note(delta)
            if delta.finish_reason is None and time.perf_counter() > deadline:
                delta = CutDelta(delta.text, delta.n_tokens)
            if not (delta.text or delta.finish_reason):
                continue
            if not job._wait_for_room(self.limits.stalled_reader_s):
                break
            job._publish(delta)
            if delta.finish_reason is not None:
                return
        job.cancel.set()
        job._publish(ApiError(503, "the answer was cut off", code="cut_off"))


@dataclasses.dataclass(frozen=True)
class CutDelta:
    """The last delta of an answer that ran into the time limit."""

    text: str
    n_tokens: int
    finish_reason: str | None = "length"


def _as_api_error(error: Exception) -> ApiError:
    """Translate what an engine can raise. Out of memory frees this request only; the server goes on."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ApiError(503, "not enough memory for this request", code="out_of_memory", retry_after_s=5)
    return ApiError(500, "generation failed; the server's log has the reason", code="generation_failed")
