"""A stand-in for a loaded model: the same shape as `nanozhchat.chat.Chat`, instant, deterministic, no training."""

import threading
import time

import httpx
import uvicorn

from nanozhchat.batching import Delta, first_stop
from nanozhchat.chat import Chat
from nanozhchat.conversation import Message, make_conversation
from nanozhchat.engine import Engine
from nanozhchat.sampling import Choice
from nanozhchat.server.app import Settings, create_app
from nanozhchat.server.library import Library
from nanozhchat.server.serve import DeadlineProtocol, bind
from nanozhchat.tokenizer import Tokenizer
from tests.conftest import make_config, make_model

STORY = "从前有一只小猫😺,名叫花花。它住在山脚下,每天早上都去河边看鱼。👨‍👩‍👧 一家人都很喜欢它。"


class FakeTokenizer:
    """An id a character."""

    bos_id, vocab_size = 0, 0x110000

    def encode(self, text):
        return [*map(ord, text)]

    def decode_bytes(self, ids, *, show_special=False):
        return "".join(map(chr, ids)).encode("utf-8", "replace")

    def decode(self, ids, *, show_special=False):
        return self.decode_bytes(ids).decode()


class FakeBatch:
    """Fakes `nanozhchat.batching.Batch`: a token of each request a step, from the engine's `stream`."""

    def __init__(self, chat, rows):
        self.chat, self.streams = chat, {}

    def add(self, prompt_ids, params, *, cancel=None, index=0):
        request = object()
        self.streams[request] = self.chat.engine.stream(prompt_ids, params, cancel=cancel)
        return request

    def step(self):
        made = [(request, next(stream)) for request, stream in self.streams.items()]
        for request, delta in made:
            if delta.finish_reason is not None:
                self.streams.pop(request).close()
        return made


class ToyTask:
    """Questions and their answers. right(given, expected): what counts as one."""

    name, chance = "toy", 0.1

    def __init__(self, pairs, right=lambda given, expected: given.strip() == expected):
        self.pairs, self.right = pairs, right

    def __len__(self):
        return len(self.pairs)

    def prompt(self, index):
        return [Message("user", self.pairs[index][0])]

    def expected(self, index):
        return self.pairs[index][1]

    def check(self, index, answer):
        return self.right(answer, self.expected(index))


class FakeEngine:
    """One token a character. delay_s: time per token. answer: text that is repeated up to max_tokens."""

    def __init__(self, answer=STORY, *, context=1024, delay_s=0.0, repeat=1):
        self.answer, self.context, self.delay_s = answer * repeat, context, delay_s
        self.gate, self.free = None, 0  # when the gate is set, generation waits for it after so many tokens
        self.first = None  # when the last answer's first token was made, Unix time
        self.active = 0

    def stream(self, prompt_ids, params, *, cancel=None):
        if len(prompt_ids) + 1 > self.context:
            raise ValueError("prompt too long")
        self.active += 1
        text, n, cancel = self.answer[: first_stop(self.answer, params.stop)], 0, cancel or threading.Event()
        try:
            for n, char in enumerate(text[: params.max_tokens], start=1):
                while self.gate is not None and n > self.free and not self.gate.wait(0.01) and not cancel.is_set():
                    pass
                time.sleep(self.delay_s)
                if cancel.is_set():
                    yield Delta("", n - 1, "cancelled")
                    return
                self.first = time.time() if n == 1 else self.first
                sure = -0.02 if n % 3 else -1.6
                yield Delta(char, n, None, (Choice(ord(char), sure, ((ord(char), sure), (ord("么"), -2.5))),))
            yield Delta("", n, "length" if len(text) > params.max_tokens else "stop")
        finally:
            self.active -= 1


class FakeChat(Chat):
    """A token per character of the prompt plus one per turn."""

    def __init__(self, engine=None, *, name="d4", source="sft"):
        super().__init__(engine or FakeEngine(), FakeTokenizer(), name=name, source=source, step=1200)
        self.prompts = []

    def prompt_ids(self, prompt):
        self.prompts.append(prompt)
        if isinstance(prompt, str):
            return [0, *map(ord, prompt)]
        return [i for m in make_conversation(prompt) for i in (0, *map(ord, m.content))]


class LiveServer:
    """A uvicorn server on a free port in a thread; use as a context manager."""

    def __init__(self, chat, settings=None, listed=None, load=None, batch=FakeBatch, port=0, wrap=lambda app: app):
        self.chat, self.library = chat, Library(chat, listed and (lambda: listed), load, batch=batch)
        self.socket = bind("127.0.0.1", port)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=10)
        options = {"log_level": "error", "ws": "none", "http": DeadlineProtocol, "timeout_graceful_shutdown": 2}
        app = wrap(create_app(self.library, settings or Settings()))
        self.server = uvicorn.Server(uvicorn.Config(app, **options))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)

    @property
    def scheduler(self):
        return self.library.loaded[self.library.default].scheduler

    def __enter__(self):
        self.thread.start()
        assert until(lambda: self.server.started, 10)
        return self

    def __exit__(self, *_):
        self.http.close()
        self.server.should_exit = True
        self.thread.join(10)

    def die(self):
        """Close every socket at once, as the system does for a process that is killed."""

        def close():
            self.server.servers[0].close()
            for connection in self.server.server_state.connections:
                connection.transport.abort()

        self.server.servers[0].get_loop().call_soon_threadsafe(close)


def one_byte_pieces(app):
    """Wrap an app so that its streams leave one byte at a time."""

    async def wrapped(scope, receive, send):
        async def drip(message):
            for i in range(len(message["body"]) if message.get("more_body") else 0):
                await send({**message, "body": message["body"][i : i + 1]})
            if not message.get("more_body"):
                await send(message)

        await app(scope, receive, drip)

    return wrapped


def until(condition, timeout_s):
    """Wait for a condition; tell whether it came true in time."""
    end = time.monotonic() + timeout_s
    while not (true := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return bool(true)


def real_chat(tokenizer=None, kind="native", **changes):
    """A random model with the real engine; its tokenizer knows single bytes unless one is given."""
    tokenizer = tokenizer or Tokenizer.train(["只有字节"], 263)
    config = make_config(**{"vocab_size": tokenizer.vocab_size, "sequence_len": 96, **changes})
    engine = Engine(make_model(config, seed=3, perturb=True).eval(), tokenizer, kind=kind)
    return Chat(engine, tokenizer, name="d4", source="sft", step=7)
