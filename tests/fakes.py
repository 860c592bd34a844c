"""A stand-in for a loaded model: the same shape as `nanozhchat.chat.Chat`, instant, deterministic, no training."""

import socket
import threading
import time
from dataclasses import dataclass

import uvicorn

from nanozhchat.conversation import make_conversation
from nanozhchat.sampling import SamplingParams
from nanozhchat.server.app import create_app
from nanozhchat.server.serve import DeadlineProtocol

STORY = "从前有一只小猫😺,名叫花花。它住在山脚下,每天早上都去河边看鱼。👨‍👩‍👧 一家人都很喜欢它。"
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script><a href='https://example.com/x'>点我</a>"


@dataclass(frozen=True)
class Delta:
    """Fakes `nanozhchat.batching.Delta`; n_tokens counts from the start of the answer."""

    text: str
    n_tokens: int
    finish_reason: str | None = None
    choices: tuple = ()


class FakeEngine:
    """One token a character. delay_s: time per token. answer: text that is repeated up to max_tokens."""

    def __init__(self, answer=STORY, *, context=1024, delay_s=0.0, repeat=1):
        self.answer, self.context, self.delay_s = answer * repeat, context, delay_s
        self.gate = None  # when set, generation waits for it
        self.active = 0

    def stream(self, prompt_ids, params, *, cancel=None):
        if len(prompt_ids) + 1 > self.context:
            raise ValueError("prompt too long")
        self.active += 1
        try:
            yield from self._generate(params, cancel or threading.Event())
        finally:
            self.active -= 1

    def _generate(self, params, cancel):
        text = self.answer
        ends = [place for s in params.stop if (place := text.find(s)) >= 0]
        text = text[: min(ends)] if ends else text
        n = 0
        for char in text[: params.max_tokens]:
            while self.gate is not None and not self.gate.wait(0.01) and not cancel.is_set():
                pass
            time.sleep(self.delay_s)
            if cancel.is_set():
                yield Delta("", n, "cancelled")
                return
            n += 1
            yield Delta(char, n)
        yield Delta("", n, "length" if len(text) > params.max_tokens else "stop")


class FakeChat:
    """Fakes `Chat`: a token per character of the prompt plus one per turn."""

    def __init__(self, engine=None, *, name="d4", source="sft"):
        self.engine = engine or FakeEngine()
        self.name, self.source, self.step = name, source, 1200
        self.prompts = []

    def prompt_ids(self, prompt):
        self.prompts.append(prompt)
        if isinstance(prompt, str):
            return [0, *map(ord, prompt)]
        return [i for m in make_conversation(prompt) for i in (0, *map(ord, m.content))]

    def stream(self, prompt, *, cancel=None, **sampling):
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and self.source != "base" else prompt
        for delta in self.engine.stream(self.prompt_ids(asked), SamplingParams(**sampling), cancel=cancel):
            if delta.text:
                yield delta.text

    def __call__(self, prompt, **sampling):
        return "".join(self.stream(prompt, **sampling))


class LiveServer:
    """A uvicorn server on a free port in a thread; use as a context manager."""

    def __init__(self, chat, settings=None, app=None):
        self.chat = chat
        self.app = app or create_app(chat, settings)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            self.app, http=DeadlineProtocol, log_level="error", ws="none", timeout_graceful_shutdown=2
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self):
        self.thread.start()
        assert until(lambda: self.server.started, 10)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(10)


def until(condition, timeout_s):
    """Wait for a condition; tell whether it came true in time."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return bool(condition())
