"""The routes: `create_app(library, settings)`. Pages at `/` and `/runs`, the API under `/v1`, `/health`, `/metrics`."""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nanozhchat.server import metrics, rich_text, runs, schemas
from nanozhchat.server.answers import Answer, EventStream, collect, until_disconnect
from nanozhchat.server.guard import Guard, error_response
from nanozhchat.server.library import Library, Loaded
from nanozhchat.server.scheduler import Limits
from nanozhchat.server.schemas import ApiError, to_json

PUBLIC_PATHS = ("/", "/runs", "/health", "/static/", "/favicon.ico")
STATIC = Path(__file__).parent / "static"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PAGES = {"/": "index.html", "/runs": "runs.html", "/favicon.ico": "icon.svg"}
HTTP_ERRORS = {404: ("not_found", "there is nothing at this address"),
               405: ("method_not_allowed", "this address does not take that method")}  # fmt: skip
BODIES = {"/v1/chat/completions": schemas.ChatBody, "/v1/completions": schemas.TextBody,
          "/tokenize": schemas.TokenizeBody, "/detokenize": schemas.DetokenizeBody}  # fmt: skip
STATUSES = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)


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


def create_app(library: Library, settings: Settings = Settings()) -> FastAPI:
    """Build the application around a library; its workers start and stop with the app."""
    born, statuses = time.time(), collections.Counter[int]()

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        library.start(settings.limits)
        yield
        await asyncio.to_thread(library.stop)

    app = FastAPI(title="nanozhchat", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.state.library = library
    guard = {"hosts": settings.hosts, "any_address": settings.any_address, "api_key": settings.api_key}
    app.add_middleware(Guard, public=PUBLIC_PATHS, statuses=statuses, **guard)  # type: ignore[arg-type]
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    _add_pages(app)
    _add_state(app, library, statuses, born)
    _add_text(app, library, settings)

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [library.model_object(item) for item in library.refresh().values()]})

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> Response:
        return _json(library.model_object(library.find(name)))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(request, library, settings, chat=True)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(request, library, settings, chat=False)

    app.openapi = functools.partial(_describe, app)  # type: ignore[method-assign]
    return app


def _add_pages(app: FastAPI) -> None:
    """The files of `static/`: read once at start, found by name in a table, never by joining a path."""
    files = {p.name: (p.read_bytes(), MEDIA_TYPES[p.suffix]) for p in STATIC.iterdir() if p.suffix in MEDIA_TYPES}
    etags = {name: f'"{hashlib.sha256(content).hexdigest()[:16]}"' for name, (content, _) in files.items()}

    async def page(request: Request) -> Response:
        name = PAGES.get(request.url.path) or request.path_params["name"]
        if name not in files:
            raise HTTPException(404)
        headers = {"Cache-Control": "no-cache", "ETag": etags[name]}
        if request.headers.get("if-none-match") == etags[name]:
            return Response(status_code=304, headers=headers)
        content, kind = files[name]
        return Response(content, headers=headers, media_type=kind)

    for path in (*PAGES, "/static/{name}"):
        app.add_api_route(path, page, include_in_schema=False)


def _add_state(app: FastAPI, library: Library, statuses: collections.Counter[int], born: float) -> None:
    """What the server is doing, and what trainings have written: read from the event loop or a thread of its own."""

    @app.get("/health")
    async def health() -> Response:
        schedulers = [model.scheduler for model in library.loaded.values()]
        load = {"running": sum(s.running for s in schedulers), "queued": sum(s.queued for s in schedulers)}
        uptime = {"model": library.default, "uptime_s": round(time.time() - born, 1)}
        return _json({"status": "stopping" if library.draining else "ok", **load, **uptime})

    @app.get("/metrics", include_in_schema=False)
    async def prometheus() -> Response:
        return Response(metrics.render(library, statuses), media_type=metrics.MEDIA_TYPE)

    @app.get("/ui/runs", include_in_schema=False)
    async def all_runs() -> Response:
        return _json({"runs": await asyncio.to_thread(runs.list_runs)})

    @app.get("/ui/runs/{stage}/{tag}", include_in_schema=False)
    async def one_run(stage: str, tag: str) -> Response:
        run = await asyncio.to_thread(runs.read_run, stage, tag)
        if run is None:
            raise HTTPException(404)
        return _json(run)


def _add_text(app: FastAPI, library: Library, settings: Settings) -> None:
    """Text to tokens and back, and Markdown to what the page shows."""

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        asked = schemas.read(await _read_json(request, settings), schemas.TokenizeBody)
        async with library.use(asked.model) as model:
            tokenizer = model.chat.tokenizer
            ids = await asyncio.to_thread(tokenizer.encode, asked.text)
            pieces = [list(tokenizer.decode_bytes([i])) for i in ids]
        return _json({"tokens": ids, "pieces": pieces, "count": len(ids), "max_model_len": model.chat.engine.context})

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        asked = schemas.read(await _read_json(request, settings), schemas.DetokenizeBody)
        async with library.use(asked.model) as model:
            _check_ids(asked.tokens, model, "tokens")
            return _json({"text": model.chat.tokenizer.decode(asked.tokens, show_special=True)})

    @app.post("/ui/render", include_in_schema=False)
    async def render(request: Request) -> Response:
        asked = schemas.read(await _read_json(request, settings), schemas.RenderBody)
        blocks = await asyncio.to_thread(lambda: [rich_text.render_blocks(text) for text in asked.texts])
        return _json({"blocks": blocks})


async def _answer(request: Request, library: Library, settings: Settings, *, chat: bool) -> Response:
    """Check a request, put it in line, and return the response that reads it."""
    asked, prompt, sampling = schemas.parse_request(await _read_json(request, settings), chat=chat)
    async with library.use(asked.model) as model:
        prompt_ids = await _prompt_ids(prompt, model)
        _check_ids([*sampling.logit_bias], model, "logit_bias")
        room = model.chat.engine.context - len(prompt_ids)
        if room < 1:
            size = f"{len(prompt_ids)} tokens; this model reads {model.chat.engine.context} at most, answer included"
            where = "messages" if chat else "prompt"
            raise ApiError(400, f"the conversation has {size}", code="context_length_exceeded", param=where)
        sampling = dataclasses.replace(sampling, max_tokens=min(sampling.max_tokens, room))
        job = model.scheduler.submit(prompt_ids, sampling, asked.n)
    piece = functools.partial(model.chat.tokenizer.decode_bytes, show_special=True)
    answer = Answer(job, library.find(asked.model).name, chat=chat, piece=piece)
    if asked.stream:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        bounds = {"ping_s": settings.ping_s, "stalled_s": settings.limits.stalled_reader_s}
        return EventStream(answer, include_usage=usage, place=model.scheduler.place, **bounds)
    whole = await until_disconnect(request.receive, job, collect(answer))
    return _json(whole) if whole is not None else Response(status_code=499)  # nobody is there to read it


async def _prompt_ids(prompt: Any, model: Loaded) -> list[int]:
    """Ids of a conversation or a text. A base model knows no turns: it continues the text of all of them."""
    tokenizer = model.chat.tokenizer
    if isinstance(prompt, str):
        return [tokenizer.bos_id, *await asyncio.to_thread(tokenizer.encode, prompt)]
    if isinstance(prompt, list):
        _check_ids(prompt, model, "prompt")
        return prompt or [tokenizer.bos_id]
    text = "".join(m.content for m in prompt) if model.chat.source == "base" else prompt
    return await asyncio.to_thread(model.chat.prompt_ids, text)


def _check_ids(ids: list[int], model: Loaded, name: str) -> None:
    last = model.chat.tokenizer.vocab_size - 1
    if any(not 0 <= i <= last for i in ids):
        raise ApiError(400, f"{name} holds an id outside this model's 0 to {last}", code="invalid_value", param=name)


async def _read_json(request: Request, settings: Settings) -> bytes:
    """Read at most `max_body_bytes`, counted as they arrive, of a body that says it is JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send the body as Content-Type: application/json", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "send the body without Content-Encoding", code="unsupported_media_type")

    async def read() -> bytes:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > (most := settings.max_body_bytes):
                raise ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), settings.receive_s)
    except asyncio.TimeoutError:
        raise ApiError(408, "the body took too long to arrive", code="receive_timeout") from None


def _json(value: dict[str, Any]) -> Response:
    return Response(to_json(value), headers={"Cache-Control": "no-store"}, media_type="application/json")


async def _on_api_error(_request: Request, error: Any) -> Response:
    return error_response(error)


async def _on_http_error(_request: Request, error: Any) -> Response:
    code, message = HTTP_ERRORS.get(error.status_code, ("invalid_request", "the request is not valid"))
    return error_response(ApiError(error.status_code, message, code=code), dict(error.headers or {}))


def _describe(app: FastAPI) -> dict[str, Any]:
    """Describe all public routes: FastAPI's OpenAPI, with the bodies that `schemas` checks by itself."""
    page = FastAPI.openapi(app)
    shared = page.setdefault("components", {}).setdefault("schemas", {})
    for path, kind in BODIES.items():
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        shared.update(schema.pop("$defs", {}))
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        page["paths"][path]["post"]["requestBody"] = body
    for operation in (o for operations in page["paths"].values() for o in operations.values()):
        operation["responses"].pop("422", None)
        operation["responses"] |= {str(status): {"description": "an error object"} for status in STATUSES}
    return page
