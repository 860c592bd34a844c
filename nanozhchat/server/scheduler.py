"""Requests -> one running batch: a worker thread a model, a bounded waiting line, deltas handed to the event loop.

Requests join the batch at any step and leave it when they end or are cancelled. An answer is bounded by the model's
context, so a slow reader costs a few kilobytes and never holds back the others. A job ends in exactly one of: the
last delta of each of its answers, an ApiError, or cancellation.
"""

import asyncio
import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from nanozhchat.batching import Batch, Delta, Request
from nanozhchat.sampling import SamplingParams
from nanozhchat.server.schemas import ApiError

log = logging.getLogger(__name__)

STOP_S = 5.0  # for a worker to end its step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on work. Times in seconds. running: answers generated together."""

    running: int = 16
    waiting: int = 16
    queue_wait_s: float = 60.0
    generation_s: float = 300.0
    stalled_reader_s: float = 60.0


class Job:
    """One request for n answers to one prompt. Made by `Scheduler.submit`, read by one coroutine."""

    def __init__(self, prompt_ids: Sequence[int], params: SamplingParams, n: int) -> None:
        """Call from the event loop that will read it."""
        self.prompt_ids, self.params, self.n, self.loop = prompt_ids, params, n, asyncio.get_running_loop()
        self.cancel = threading.Event()
        self.n_tokens = [0] * n
        self.unfinished = set(range(n))
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.first: float | None = None
        self.last = 0.0
        self._n_first = 0  # tokens that came with the first
        self._items: collections.deque[tuple[int, Delta] | ApiError] = collections.deque()
        self._ready = asyncio.Event()

    def timings(self) -> dict[str, float | None]:
        """Return queue_ms, ttft_ms (arrival to first token) and tokens_per_s (after the first token)."""
        if self.first is None or self.started is None:
            return {"queue_ms": None, "ttft_ms": None, "tokens_per_s": None}
        elapsed_s, n = self.last - self.first, sum(self.n_tokens) - self._n_first
        if n < 1 or elapsed_s <= 0:
            elapsed_s, n = self.last - self.started, sum(self.n_tokens)
        return {"queue_ms": round((self.started - self.submitted) * 1000, 1),
                "ttft_ms": round((self.first - self.submitted) * 1000, 1),
                "tokens_per_s": round(n / elapsed_s, 2) if elapsed_s > 0 else None}  # fmt: skip

    async def next_delta(self, timeout_s: float | None = None) -> tuple[int, Delta] | None:
        """Return (which answer, delta), or None when timeout_s passed without one; raises ApiError on failure.

        Each answer ends with the delta that has a finish_reason. To give up earlier, set `cancel`.
        """
        if not self._items:
            self._ready.clear()
            # Not asyncio.wait_for: before Python 3.12 it can swallow a cancellation that races with a delta.
            timer = None if timeout_s is None else self.loop.call_later(timeout_s, self._ready.set)
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
        return item

    def put(self, item: tuple[int, Delta] | ApiError) -> None:
        """Hand over an item; called in the event loop. Deltas that the reader has not taken yet become one."""
        last = self._items[-1] if self._items else None
        if isinstance(last, tuple) and isinstance(item, tuple) and last[0] == item[0] and not last[1].finish_reason:
            self._items[-1] = item[0], last[1] + item[1]
        else:
            self._items.append(item)
        self._ready.set()

    def note(self, index: int, delta: Delta) -> int:
        """Take the time of a delta and return how many tokens it adds; called in the worker."""
        new = max(0, delta.n_tokens - self.n_tokens[index])
        if new:
            self.n_tokens[index], self.last = delta.n_tokens, time.perf_counter()
            if self.first is None:
                self.first, self._n_first = self.last, new
        if delta.finish_reason is not None:
            self.unfinished.discard(index)
        return new


class Scheduler:
    """Owns the worker thread. All methods are safe to call from any thread."""

    def __init__(self, new_batch: Callable[[], Batch], limits: Limits) -> None:
        """new_batch: makes the batch, and a fresh one after a failure; used from the worker thread only."""
        self.limits = limits
        self.totals = collections.Counter[str]()  # prompt_tokens, completion_tokens, jobs; for /metrics
        self.first_token_s = collections.deque[float](maxlen=1000)  # of the last jobs; for /metrics
        self._new_batch = new_batch
        self._changed = threading.Condition()
        self._waiting: collections.deque[tuple[Job, int]] = collections.deque()
        self._running: dict[Request, tuple[Job, int]] = {}
        self._draining = False  # new jobs are refused because the server is stopping
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Answers being generated now."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """Answers waiting that nobody has cancelled."""
        with self._changed:
            return sum(not job.cancel.is_set() for job, _ in self._waiting)

    def place(self, job: Job) -> int:
        """Return the job's place in line, 1 = next; 0 = being worked on."""
        with self._changed:
            line = [waiting for waiting, _ in self._waiting if not waiting.cancel.is_set()]
        return line.index(job) + 1 if job.started is None and job in line else 0

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, n: int = 1) -> Job:
        """Put a request in line; call from the event loop that will read it.

        Raises ApiError 429 when the line is full, 503 while stopping.
        """
        job = Job(prompt_ids, params, n)
        with self._changed:
            if self._draining:
                raise ApiError(503, "the server is stopping", code="server_stopping", retry_after_s=5)
            self._waiting = collections.deque(item for item in self._waiting if not item[0].cancel.is_set())
            free = max(0, self.limits.running - len(self._running))
            if len(self._waiting) + n > self.limits.waiting + free:
                message = f"{len(self._waiting)} requests are waiting already; try again shortly"
                raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=2)
            self._waiting.extend((job, i) for i in range(n))
            self.totals.update(jobs=1, prompt_tokens=len(prompt_ids))
            self._changed.notify()
        job.loop.call_later(self.limits.queue_wait_s, self._expire, job)
        return job

    def _expire(self, job: Job) -> None:
        if job.started is None and not job.cancel.is_set():
            job.cancel.set()
            job.put(ApiError(503, "waited too long for a free slot", code="queue_timeout", retry_after_s=5))

    def drain(self) -> None:
        """Refuse new jobs; those accepted go on."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def abort(self) -> None:
        """Refuse new jobs and end all others with an error event."""
        self.drain()
        with self._changed:
            jobs = {job for job, _ in [*self._waiting, *self._running.values()]}
            self._waiting.clear()
        self._fail(jobs, ApiError(503, "the server stopped before the answer was complete", code="server_stopping"))

    def stop(self) -> None:
        """Abort what is left and wait for the worker to end."""
        self.abort()
        self._thread.join(STOP_S)

    # --- in the worker

    def _work(self) -> None:
        batch = self._new_batch()
        while self._admit(batch):
            try:
                self._take(batch.step())
            except Exception as error:
                log.exception("generation failed")
                with self._changed:
                    jobs = {job for job, _ in self._running.values()}
                    self._running.clear()
                self._fail(jobs, _as_api_error(error))
                batch = self._new_batch()

    def _admit(self, batch: Batch) -> bool:
        """Let waiting requests join while there is room; wait when there is nothing to do. False = the end."""
        with self._changed:
            while not self._waiting and not self._running:
                if self._draining:
                    return False
                self._changed.wait()
            while self._waiting and len(self._running) < self.limits.running:
                job, index = self._waiting.popleft()
                if job.cancel.is_set():
                    continue
                job.started = job.started or time.perf_counter()
                try:
                    request = batch.add(job.prompt_ids, job.params, cancel=job.cancel, index=index)
                except Exception as error:
                    log.exception("a request could not start")
                    self._fail({job}, _as_api_error(error))
                else:
                    self._running[request] = job, index
        return True

    def _take(self, results: Sequence[tuple[Request, Delta]]) -> None:
        """Pass on what a step made, and end what has run out of time."""
        ready: list[tuple[Job, tuple[int, Delta]]] = []
        jobs, now = {job for job, _ in self._running.values()}, time.perf_counter()
        with self._changed:
            for request, delta in results:
                job, index = self._running[request]
                waited = job.first is None
                self.totals["completion_tokens"] += job.note(index, delta)
                if waited and job.first is not None:
                    self.first_token_s.append(job.first - job.submitted)
                if delta.finish_reason is not None:
                    del self._running[request]
                if delta.finish_reason == "error":
                    log.error("generation failed: %s", request.error)
                    self._fail({job}, _as_api_error(request.error))
                elif delta.text or delta.finish_reason or delta.choices:
                    ready.append((job, (index, delta)))
        for job in jobs:
            if job.started is not None and now > job.started + self.limits.generation_s and not job.cancel.is_set():
                ready += [(job, (i, Delta("", job.n_tokens[i], "length"))) for i in sorted(job.unfinished)]
                job.cancel.set()
        if ready:
            self._hand_over(ready[0][0].loop, ready)

    def _fail(self, jobs: set[Job], error: ApiError) -> None:
        for job in jobs:
            self._hand_over(job.loop, [(job, error)])
            job.cancel.set()

    def _hand_over(self, loop: asyncio.AbstractEventLoop, items: Sequence[tuple[Job, Any]]) -> None:
        def deliver() -> None:
            for job, item in items:
                job.put(item)

        try:
            loop.call_soon_threadsafe(deliver)
        except RuntimeError:  # the loop is closed: nobody reads any more
            for job, _ in items:
                job.cancel.set()


def _as_api_error(error: Exception | None) -> ApiError:
    """Translate what an engine can raise. Out of memory ends what was running; the server goes on."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ApiError(503, "not enough memory for this request", code="out_of_memory", retry_after_s=5)
    return ApiError(500, "generation failed; the server's log has the reason", code="generation_failed")
