"""The routes: `create_app(chat, settings)`. Page at `/`, API under `/v1`, `/health` from the event loop alone."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanozhchat.conversation import Message
from nanozhchat.sampling import SamplingParams
from nanozhchat.server import schemas
from nanozhchat.server.guard import Guard, error_response
from nanozhchat.server.scheduler import EngineLike, Job, Limits, Scheduler
from nanozhchat.server.schemas import Answer, ApiError, ChatRequest, to_json

T = TypeVar("T")

STATIC = Path(__file__).parent / "static"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PUBLIC_PATHS = ("/", "/health", "/static/", "/favicon.ico")


class ChatLike(Protocol):
    """The part of `nanozhchat.chat.Chat` that serving needs."""

    @property
    def engine(self) -> EngineLike:
        """Generates."""
        ...

    @property
    def name(self) -> str:
        """Model tag."""
        ...

    @property
    def source(self) -> str:
        """`base`, `sft` or `rl`."""
        ...

    @property
    def step(self) -> int:
        """Training step of the checkpoint."""
        ...

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """Turn a conversation, or for a base model the text to continue, into ids."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to serve. Times in seconds, sizes in bytes."""

    api_key: str | None = None
    hosts: tuple[str, ...] = ()
    any_address: bool = False
    max_body_bytes: int = 1 << 20
    receive_s: float = 15.0
    ping_s: float = 15.0
    limits: Limits = Limits()


def create_app(chat: ChatLike, settings: Settings | None = None) -> FastAPI:
    """Build the application around one loaded model; `app.state.scheduler` is its worker, started with the app."""
    settings = settings or Settings()
    scheduler = Scheduler(chat.engine, settings.limits)
    born = time.time()

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        await asyncio.to_thread(scheduler.stop)

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.state.scheduler = scheduler
    guard = {"hosts": settings.hosts, "any_address": settings.any_address, "api_key": settings.api_key}
    app.add_middleware(Guard, public=PUBLIC_PATHS, **guard)  # type: ignore[arg-type]
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    _add_page(app)
    model = schemas.model_object(
        chat.name, source=chat.source, step=chat.step, context=chat.engine.context, created=int(born)
    )

    @app.get("/health")
    async def health() -> Response:
        status = "stopping" if scheduler.draining else "ok"
        load = {"running": scheduler.running, "queued": scheduler.queued}
        return _json({"status": status, **load, "model": chat.name, "uptime_s": round(time.time() - born, 1)})

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [model]})

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> Response:
        _check_model(name, chat)
        return _json(model)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        _require_json(request)
        body = await _read_body(request, settings)
        return await _answer(request, body, chat, scheduler, settings)

    return app


async def _answer(request: Request, body: bytes, chat: ChatLike, scheduler: Scheduler, settings: Settings) -> Response:
    """Check a request, put it in line, and return the response that reads it."""
    wanted = schemas.parse_chat_request(body, max_tokens=SamplingParams().max_tokens)
    _check_model(wanted.model, chat)
    # A base model knows no turns: it continues the text of all of them.
    prompt = "".join(m.content for m in wanted.messages) if chat.source == "base" else wanted.messages
    prompt_ids = await asyncio.to_thread(chat.prompt_ids, prompt)
    room = chat.engine.context - len(prompt_ids)
    if room < 1:
        size = f"{len(prompt_ids)} tokens; this model reads {chat.engine.context} at most, answer included"
        raise ApiError(400, f"the conversation has {size}", code="context_length_exceeded", param="messages")
    params = dataclasses.replace(wanted.sampling, max_tokens=min(wanted.sampling.max_tokens, room))
    job = scheduler.submit(prompt_ids, params)
    answer = Answer(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), chat.name)
    if wanted.stream:
        return EventStream(job, answer, wanted, settings)
    whole = await _until_disconnect(request.receive, job, _collect(job, answer))
    return _json(whole) if whole is not None else Response(status_code=499)  # nobody is there to read it


async def _collect(job: Job, answer: Answer) -> dict[str, Any]:
    """Read a job to its end and return the completion object."""
    pieces = []
    while True:
        delta = await job.next_delta()
        if delta is None:
            continue
        pieces.append(delta.text)
        if delta.finish_reason is not None:
            break
    _refuse_cancelled(delta.finish_reason)
    used = schemas.usage(len(job.prompt_ids), job.n_tokens)
    return answer.completion("".join(pieces), delta.finish_reason, used, job.timings())


class EventStream(Response):
    """Server-sent events of one answer. However it ends, the slot is given back."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, answer: Answer, wanted: ChatRequest, settings: Settings) -> None:
        """job: already in line."""
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream; charset=utf-8")
        del self.headers["content-length"]
        self.job, self.answer, self.wanted, self.settings = job, answer, wanted, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the answer ends or the client is gone."""
        await _until_disconnect(receive, self.job, self._write(send))

    async def _write(self, send: Send) -> None:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events():
            stalled = loop.call_later(self.settings.limits.stalled_reader_s, task.cancel)
            await send({"type": "http.response.body", "body": event, "more_body": True})
            stalled.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        extra = {"usage": None} if self.wanted.include_usage else {}
        yield _event(self.answer.chunk({"role": "assistant", "content": ""}, **extra))
        reason: str | None = None
        try:
            while reason is None:
                delta = await self.job.next_delta(self.settings.ping_s)
                if delta is None:
                    yield b": ping\n\n"
                    continue
                reason = delta.finish_reason
                if delta.text:
                    yield _event(self.answer.chunk({"content": delta.text}, **extra))
            _refuse_cancelled(reason)
        except ApiError as error:
            yield _event(error.body())
            return
        timings = self.job.timings()
        yield _event(self.answer.chunk({}, reason, timings=timings, **extra))
        if self.wanted.include_usage:
            used = schemas.usage(len(self.job.prompt_ids), self.job.n_tokens)
            yield _event(self.answer.usage_chunk(used, timings))
        yield b"data: [DONE]\n\n"


async def _until_disconnect(receive: Receive, job: Job, work: Coroutine[Any, Any, T]) -> T | None:
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


async def _read_body(request: Request, settings: Settings) -> bytes:
    """Read at most `max_body_bytes`, counted as they arrive."""

    async def read() -> bytes:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > settings.max_body_bytes:
                message = f"the body is larger than {settings.max_body_bytes} bytes"
                raise ApiError(413, message, code="body_too_large")
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), settings.receive_s)
    except asyncio.TimeoutError:
        raise ApiError(408, "the body took too long to arrive", code="receive_timeout") from None


def _require_json(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send the body as Content-Type: application/json", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "send the body without Content-Encoding", code="unsupported_media_type")


def _check_model(name: str | None, chat: ChatLike) -> None:
    if name not in (None, chat.name):
        message = f"that model is not served here; the one that is: {chat.name}"
        raise ApiError(404, message, code="model_not_found", param="model")


def _refuse_cancelled(reason: str | None) -> None:
    if reason == "cancelled":
        raise ApiError(503, "the answer was cut off", code="cut_off")


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


def _json(value: dict[str, Any]) -> Response:
    return Response(to_json(value), headers={"Cache-Control": "no-store"}, media_type="application/json")


async def _on_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {404: "there is nothing at this address", 405: "this address does not take that method"}
    codes = {404: "not_found", 405: "method_not_allowed"}
    code = codes.get(error.status_code, "invalid_request")
    failure = ApiError(error.status_code, messages.get(error.status_code, "the request is not valid"), code=code)
    return error_response(failure, dict(error.headers or {}))


def _add_page(app: FastAPI) -> None:
    """Serve the files of `static/`: read once, found by name in a table, never by joining a path."""
    files = {
        path.name: (path.read_bytes(), MEDIA_TYPES[path.suffix])
        for path in STATIC.iterdir()
        if path.suffix in MEDIA_TYPES
    }
    etags = {name: f'"{hashlib.sha256(content).hexdigest()[:16]}"' for name, (content, _) in files.items()}

    def respond(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        headers = {"Cache-Control": "no-cache", "ETag": etags[name]}
        if request.headers.get("if-none-match") == etags[name]:
            return Response(status_code=304, headers=headers)
        content, kind = files[name]
        return Response(content, headers=headers, media_type=kind)

    @app.get("/")
    async def index(request: Request) -> Response:
        return respond(request, "index.html")

    @app.get("/favicon.ico")
    async def icon(request: Request) -> Response:
        return respond(request, "icon.svg")

    @app.get("/static/{name}")
    async def static(request: Request, name: str) -> Response:
        return respond(request, name)
