"""Process life: take the port early, serve, stop gracefully. Uses uvicorn and adds the deadlines it lacks."""

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import Generator

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

RECEIVE_S = 20.0  # first byte of a request to its last
KEEP_ALIVE_S = 5
GRACE_S = 30  # for streams in flight when asked to stop
CONNECTIONS = 1024
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; raises ValueError in one line with the next step if that can't be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host={host} is not an address of this machine ({error}); try --host=127.0.0.1") from error
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(CONNECTIONS)
    except (OSError, OverflowError) as error:
        listener.close()
        code = getattr(error, "errno", None)
        if code == errno.EADDRINUSE:
            with bind(host, 0) as other:
                free = other.getsockname()[1]
            raise ValueError(f"port {port} is in use; stop what uses it or pass --port={free}") from error
        if code in (errno.EACCES, errno.EPERM):
            raise ValueError(f"port {port} needs privileges; pass a --port above 1023, such as 8000") from error
        raise ValueError(f"cannot listen on {host}:{port} ({error}); pass another --host or --port") from error
    return listener


class DeadlineProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection whose request has not fully arrived RECEIVE_S after it began."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock with the connection: silence counts too."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(RECEIVE_S, transport.close)

    def data_received(self, data: bytes) -> None:
        """Stop the clock when a request is complete; start it when the next one is not."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Keep the clock for a body that is still being sent after its answer."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_clock()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_clock()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(RECEIVE_S, self.transport.close)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):
    """Stops on SIGINT or SIGTERM: no new work, streams finish within GRACE_S, the rest ends with an error event."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle the stop signals without raising them again afterwards: a graceful stop exits with 0."""
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then close."""
        library = self.config.app.state.library  # type: ignore[union-attr]
        library.drain()
        timer = asyncio.get_running_loop().call_later(GRACE_S, library.abort)
        await super().shutdown(sockets)
        timer.cancel()


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve until a stop signal. listener: from `bind`. Call in the main thread."""
    config = uvicorn.Config(
        app, http=DeadlineProtocol, ws="none", loop="asyncio", log_level="warning", access_log=False,
        server_header=False, limit_concurrency=CONNECTIONS, timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S + 2,
    )  # fmt: skip
    Server(config).run(sockets=[listener])
