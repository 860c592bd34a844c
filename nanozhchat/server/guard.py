"""What every request passes before a route sees it, and what every response carries.

Keeps other web sites from using a server on this machine through the visitor's browser: only known Host names (stops
DNS rebinding), Origin equal to Host, no cross-site fetches. Then the API key. Responses get the security headers, and
an unexpected exception becomes a plain error object.
"""

import hmac
import ipaddress
import logging
from collections import Counter
from collections.abc import Iterable
from urllib.parse import urlsplit

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanozhchat.server.schemas import ApiError, to_json

log = logging.getLogger(__name__)

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin"
}  # fmt: skip


def error_response(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    """Turn an ApiError into a response."""
    extra = {**(headers or {}), "Cache-Control": "no-store"}
    if error.retry_after_s is not None:
        extra["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    return Response(to_json(error.body()), error.status, extra, media_type="application/json")


def is_loopback(host: str) -> bool:
    """Tell whether binding to `host` reaches this machine only."""
    return ipaddress.ip_address(host).is_loopback if _is_address(host) else host == "localhost"


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _host_name(netloc: str) -> str | None:
    """Return the name in `name:port`, brackets removed, lower case; None if malformed."""
    try:
        parts = urlsplit(f"//{netloc}")
        _ = parts.port
    except ValueError:
        return None
    return parts.hostname if parts.netloc == netloc and "@" not in netloc else None


class Guard:
    """ASGI middleware; see the module's docstring.

    hosts: names accepted besides localhost. any_address: also accept any bare IP address, which DNS rebinding cannot
    forge. public: paths, or prefixes that end in `/`, that need no key. statuses: counts responses by status.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: Iterable[str], any_address: bool, api_key: str | None, public: tuple[str, ...],
        statuses: Counter[int],
    ) -> None:  # fmt: skip
        """Wrap `app`."""
        self.app = app
        self.hosts = LOCAL_HOSTS | {h.lower() for h in hosts}
        self.any_address, self.api_key, self.public, self.statuses = any_address, api_key, public, statuses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, pass on, add headers."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.statuses[message["status"]] += 1
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive, send_with_headers)
        except ApiError as error:
            await error_response(error)(scope, receive, send_with_headers)
        except h11.LocalProtocolError:  # the client broke the protocol and was cut off: nobody is there to answer
            log.debug("a client broke the protocol")
        except Exception:
            log.exception("request failed: %s", scope["path"][:64].encode("ascii", "replace").decode())
            if started:
                raise
            failure = ApiError(500, "internal error; the server's log has the reason", code="internal_error")
            await error_response(failure)(scope, receive, send_with_headers)

    def _check(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        name = _host_name(host)
        if name is None or not (name in self.hosts or (self.any_address and _is_address(name))):
            hint = "start the server with --allowed-hosts to add a name"
            raise ApiError(403, f"this Host is not served here; {hint}", code="host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise ApiError(403, "requests from other origins are refused", code="origin_not_allowed")
        is_visit = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate" and self._is_public(path)
        if headers.get("sec-fetch-site") == "cross-site" and not is_visit:
            raise ApiError(403, "cross-site requests are refused", code="cross_site")
        if self.api_key is not None and not self._is_public(path):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(key.strip().encode(), self.api_key.encode())
            if scheme.lower() != "bearer" or not right:
                message = "this server needs an API key: send `Authorization: Bearer <key>`"
                raise ApiError(401, message, code="invalid_api_key")

    def _is_public(self, path: str) -> bool:
        return any(path == p or (p.endswith("/") and p != "/" and path.startswith(p)) for p in self.public)
