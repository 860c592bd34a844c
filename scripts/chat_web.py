"""Serve the web page and the OpenAI-style API for one model."""

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from nanozhchat import cli

WILDCARDS = ("0.0.0.0", "::", "")


@dataclass(frozen=True, kw_only=True)
class ChatWebArgs(cli.ModelFlags):
    host: str = cli.opt("127.0.0.1", "address to listen on; beyond this machine an API key is needed", group="server")
    port: int = cli.opt(8000, "port to listen on", group="server")
    api_key: str | None = cli.opt(None, "clients must send it; none = $NANOZHCHAT_API_KEY", group="server")
    generate_key: bool = cli.opt(False, "make an API key for this run and print it", group="server")
    allowed_hosts: tuple[str, ...] = cli.opt((), "further names this server is reached by", group="server")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port={self.port} is not a port; use 1 to 65535, or 0 for any free one")
        if self.api_key is not None and self.generate_key:
            raise ValueError("--api-key and --generate-key exclude each other; pass one of them")


def resolve_key(args: ChatWebArgs) -> str | None:
    """Return the API key to ask for; raises ValueError if there is none and the server would be reachable."""
    from nanozhchat.server.guard import is_loopback

    key = secrets.token_urlsafe(24) if args.generate_key else args.api_key
    if key is None:
        key = os.environ.get("NANOZHCHAT_API_KEY") or None
    if key is None and not is_loopback(args.host):
        raise ValueError(f"--host={args.host} is reachable from other machines, so an API key is needed; "
                         "pass --generate-key or --api-key=…, or leave --host out")  # fmt: skip
    if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
        raise ValueError("the API key must be ASCII letters, digits and signs, without spaces, not empty")
    return key


def main(argv: Sequence[str] | None = None) -> None:
    """Take the port, load the model, serve until stopped."""
    args = cli.parse(ChatWebArgs, argv)
    from nanozhchat.server.serve import bind, serve

    key = resolve_key(args)
    with bind(args.host, args.port) as listener:
        from nanozhchat.chat import load
        from nanozhchat.server.app import Settings, create_app
        from nanozhchat.server.guard import is_loopback
        from nanozhchat.server.library import Library, list_checkpoints

        chat = load(**args.where())
        library = Library(chat, lambda: list_checkpoints(chat),
                          lambda i: load(**args.where(tag=i.tag, source=i.source, step=i.step)))  # fmt: skip
        print(f"model {chat.name}, {chat.source}, step {chat.step}; {len(library.listed) - 1} more to choose from")
        if key is not None:
            print("API key:", key if args.generate_key else "as given")
            print("traffic is plain HTTP: use it on a network you trust, or behind a TLS proxy")
        anywhere, port = args.host in WILDCARDS, listener.getsockname()[1]
        shown = "localhost" if anywhere else f"[{args.host}]" if ":" in args.host else args.host
        print(f"open http://{shown}:{port} in a browser; Ctrl-C stops", flush=True)
        hosts = args.allowed_hosts if anywhere else (*args.allowed_hosts, args.host)
        settings = Settings(api_key=key, hosts=hosts, any_address=not is_loopback(args.host))
        serve(create_app(library, settings), listener)


if __name__ == "__main__":
    cli.run(main)
