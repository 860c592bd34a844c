"""The way back: what the engine made -> OpenAI objects, whole or as server-sent events."""

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanozhchat.batching import Delta
from nanozhchat.server.scheduler import Job
from nanozhchat.server.schemas import ApiError, to_json

T = TypeVar("T")
PLACE_S = 0.5  # between looks at the place in line


class Answer:
    """What every object of one answer shares, and the form of chat completions or of the older text completions."""

    def __init__(self, job: Job, model: str, *, chat: bool, piece: Callable[[list[int]], bytes]) -> None:
        """piece: bytes of token ids."""
        self.job, self.chat, self.top, self._piece = job, chat, job.params.logprobs, piece
        self._head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()),
                      "model": model, "system_fingerprint": None}  # fmt: skip

    def whole(self, made: Sequence[Delta]) -> dict[str, Any]:
        """Return all answers as one object."""
        choices = [
            {"index": i, "logprobs": self._logprobs(d.choices), "finish_reason": d.finish_reason,
             **({"text": d.text} if not self.chat else
                {"message": {"role": "assistant", "content": d.text, "refusal": None}})} for i, d in enumerate(made)
        ]  # fmt: skip
        return {**self.envelope(choices, ""), **self.totals()}

    def chunk(
        self, index: int, delta: dict[str, str], reason: str | None = None, logprobs: Sequence[Any] = (), **extra: Any
    ) -> dict[str, Any]:
        """Return one piece of a streamed answer. delta: of the message; extra: further top-level fields."""
        content = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        choice = {"index": index, **content, "logprobs": self._logprobs(logprobs), "finish_reason": reason}
        return {**self.envelope([choice], ".chunk"), **extra}

    def totals(self) -> dict[str, Any]:
        """Count the tokens, and tell the times."""
        prompt, made = len(self.job.prompt_ids), sum(self.job.n_tokens)
        usage = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        return {"usage": usage, "timings": self.job.timings()}

    def envelope(self, choices: list[dict[str, Any]], kind: str) -> dict[str, Any]:
        """Return an object of this answer with its choices. kind: what the name of chat objects ends with."""
        name = f"chat.completion{kind}" if self.chat else "text_completion"
        return {**self._head, "object": name, "choices": choices}

    def _logprobs(self, tokens: Sequence[Any]) -> dict[str, Any] | None:
        if self.top is None or not tokens:
            return None
        if self.chat:
            return {"content": [{**self._token(t.token, t.logprob), "top_logprobs": self._top(t)} for t in tokens],
                    "refusal": None}  # fmt: skip
        texts = [self._token(t.token, t.logprob)["token"] for t in tokens]
        return {"tokens": texts, "token_logprobs": [t.logprob for t in tokens],
                "top_logprobs": [{row["token"]: row["logprob"] for row in self._top(t)} for t in tokens],
                "text_offset": list(itertools.accumulate(map(len, texts[:-1]), initial=0))}  # fmt: skip

    def _top(self, token: Any) -> list[dict[str, Any]]:
        return [self._token(i, logprob) for i, logprob in list(token.top)[: self.top]]

    def _token(self, i: int, logprob: float) -> dict[str, Any]:
        piece = self._piece([i])
        return {"token": piece.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(piece)}


async def collect(answer: Answer) -> dict[str, Any]:
    """Read a job to its end and return the completion object."""
    made = [Delta("", 0)] * answer.job.n
    while not all(delta.finish_reason for delta in made):
        if (item := await answer.job.next_delta()) is not None:
            _check(item[1].finish_reason)
            made[item[0]] += item[1]
    return answer.whole(made)


class EventStream(Response):
    """Server-sent events of one answer. However it ends, the slot is given back."""

    def __init__(
        self, answer: Answer, *, include_usage: bool, ping_s: float, stalled_s: float, place: Callable[[Job], int]
    ) -> None:
        """ping_s: silence before a comment; stalled_s: how long one write may take; place: the place in line."""
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream; charset=utf-8")
        del self.headers["content-length"]
        self.answer, self.include_usage, self.place = answer, include_usage, place
        self.ping_s, self.stalled_s = ping_s, stalled_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the answer ends or the client is gone."""
        await until_disconnect(receive, self.answer.job, self._write(send))

    async def _write(self, send: Send) -> None:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events():
            stalled = loop.call_later(self.stalled_s, task.cancel)
            await send({"type": "http.response.body", "body": event, "more_body": True})
            stalled.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        answer, job = self.answer, self.answer.job
        extra: dict[str, Any] = {"usage": None} if self.include_usage else {}
        if answer.chat:
            for index in range(job.n):
                yield _event(answer.chunk(index, {"content": "", "role": "assistant"}, **extra))
        left, told, silent_s, wait_s = job.n, 0, 0.0, min(PLACE_S, self.ping_s)
        try:
            while left:
                item = await job.next_delta(wait_s)
                if item is None:
                    silent_s, place = silent_s + wait_s, self.place(job)
                    wait_s = min(PLACE_S, self.ping_s) if place else self.ping_s
                    if place and place != told:  # a comment, which clients skip and the page shows
                        yield b": place %d\n\n" % place
                        told, silent_s = place, 0.0
                    elif silent_s >= self.ping_s:
                        yield b": ping\n\n"
                        silent_s = 0.0
                    continue
                silent_s = 0.0
                index, delta = item
                if delta.text or (delta.choices and answer.top is not None):
                    yield _event(answer.chunk(index, {"content": delta.text}, None, delta.choices, **extra))
                if delta.finish_reason is not None:
                    left -= 1
                    _check(delta.finish_reason)
                    yield _event(answer.chunk(index, {}, delta.finish_reason, timings=job.timings(), **extra))
        except ApiError as error:
            yield _event(error.body())
            return
        if self.include_usage:
            yield _event({**answer.envelope([], ".chunk"), **answer.totals()})
        yield b"data: [DONE]\n\n"


async def until_disconnect(receive: Receive, job: Job, work: Coroutine[Any, Any, T]) -> T | None:
    """Await `work`; when the client leaves first, return None. Either way the job's slot is given back."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() and not task.cancelled() else None
    finally:
        job.cancel.set()
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


def _check(reason: str | None) -> None:
    if reason not in (None, "stop", "length"):  # "cancelled", though nobody left: the server is stopping
        raise ApiError(503, "the answer was cut off", code="cut_off")


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"
