"""The files of `static/`: read once at start, found by name in a table, never by joining a path."""

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

STATIC = Path(__file__).parent / "static"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PAGES = {"/": "index.html", "/runs": "runs.html", "/favicon.ico": "icon.svg"}


def add_pages(app: FastAPI) -> None:
    """Serve the pages and what they load."""
    files = {p.name: (p.read_bytes(), MEDIA_TYPES[p.suffix]) for p in STATIC.iterdir() if p.suffix in MEDIA_TYPES}
    etags = {name: f'"{hashlib.sha256(content).hexdigest()[:16]}"' for name, (content, _) in files.items()}

    def respond(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        headers = {"Cache-Control": "no-cache", "ETag": etags[name]}
        if request.headers.get("if-none-match") == etags[name]:
            return Response(status_code=304, headers=headers)
        content, kind = files[name]
        return Response(content, headers=headers, media_type=kind)

    async def page(request: Request) -> Response:
        return respond(request, PAGES[request.url.path])

    for path in PAGES:
        app.add_api_route(path, page, include_in_schema=False)

    @app.get("/static/{name}", include_in_schema=False)
    async def static(request: Request, name: str) -> Response:
        return respond(request, name)
