"""The API over HTTP, with a fake model: wire format, refusals, cancelling, limits."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from nanozhchat.chat import Chat
from nanozhchat.engine import Engine
from nanozhchat.sampling import SamplingParams
from nanozhchat.server import serve
from nanozhchat.server.app import Settings, create_app
from nanozhchat.server.guard import is_loopback
from nanozhchat.server.scheduler import Limits
from nanozhchat.tokenizer import Tokenizer
from tests.conftest import make_config, make_model
from tests.fakes import STORY, Delta, FakeChat, FakeEngine, LiveServer, until

CHAT = "/v1/chat/completions"
ASK = {"model": "d4", "messages": [{"role": "user", "content": "讲个故事"}]}


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with LiveServer(FakeChat()) as server:
        yield server


@pytest.fixture
def http(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=10) as client:
        yield client


def ask(**extra: Any) -> dict[str, Any]:
    return {**ASK, **extra}


def turn(content: Any, role: Any = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}]}


def events(body: str) -> list[Any]:
    """Parse a stream strictly: one data line an event, [DONE] last."""
    blocks = body.split("\n\n")
    assert blocks.pop() == ""
    assert all(b.startswith("data: ") and "\n" not in b for b in blocks)
    return [b[6:] if b == "data: [DONE]" else json.loads(b[6:]) for b in blocks]


def test_fake_delta_has_the_fields_of_the_real_one():
    from nanozhchat.engine import Delta as RealDelta

    assert Delta.__dataclass_fields__.keys() == RealDelta.__dataclass_fields__.keys()


# --- wire format -----------------------------------------------------------------------------------------------------


def test_streamed_text_equals_the_whole_answer(http):
    whole = http.post(CHAT, json=ASK).json()
    chunks = events(http.post(CHAT, json=ask(stream=True)).text)
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert text == whole["choices"][0]["message"]["content"] == STORY


def test_stream_has_role_first_one_finish_reason_and_done_last(http):
    response = http.post(CHAT, json=ask(stream=True))
    *chunks, done = events(response.text)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1


def test_usage_comes_only_when_asked_for_and_equals_the_token_counts(http):
    plain = events(http.post(CHAT, json=ask(stream=True)).text)
    asked = events(http.post(CHAT, json=ask(stream=True, stream_options={"include_usage": True})).text)
    assert all("usage" not in c for c in plain[:-1])
    last = asked[-2]
    prompt = 1 + len(ASK["messages"][0]["content"])
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": len(STORY),
        "total_tokens": prompt + len(STORY),
    }
    assert all(c["usage"] is None for c in asked[:-2])


def test_last_chunk_and_whole_answer_carry_timings(http):
    chunks = events(http.post(CHAT, json=ask(stream=True)).text)
    for timings in (chunks[-2]["timings"], http.post(CHAT, json=ASK).json()["timings"]):
        assert timings["ttft_ms"] >= 0
        assert timings["tokens_per_s"] > 0


def test_max_tokens_ends_with_length_and_the_newer_name_wins(http):
    answer = http.post(CHAT, json=ask(max_tokens=9, max_completion_tokens=5)).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("stop", ["小猫", ["没有的词", "小猫"]])
def test_stop_strings_end_the_answer_and_are_not_part_of_it(http, stop):
    answer = http.post(CHAT, json=ask(stop=stop)).json()
    assert answer["choices"][0]["message"]["content"] == "从前有一只"
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_content_may_be_a_list_of_text_parts(live, http):
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    assert http.post(CHAT, json=turn(parts)).status_code == 200
    assert live.chat.prompts[-1][-1].content == "你好"


def test_defaults_and_unknown_fields_are_accepted(http):
    harmless = {"n": 1, "tools": [], "user": "x", "logprobs": False, "presence_penalty": 0, "seed": None, "stop": None}
    assert http.post(CHAT, json=ask(**harmless, some_new_field={"a": 1})).status_code == 200


def test_base_model_gets_the_text_of_all_turns_to_continue():
    chat = FakeChat(source="base")
    with LiveServer(chat) as live:
        turns = [{"role": "user", "content": "从前"}, {"role": "assistant", "content": "有"}]
        httpx.post(live.url + CHAT, json={"messages": [*turns, {"role": "user", "content": "山"}]})
    assert chat.prompts == ["从前有山"]


def test_official_client_works_unchanged(live):
    with openai.OpenAI(base_url=live.url + "/v1", api_key="unused", max_retries=0) as client:
        assert [m.id for m in client.models.list()] == ["d4"]
        assert client.models.retrieve("d4").id == "d4"
        whole = client.chat.completions.create(**ASK, temperature=0, seed=1)
        options = {"include_usage": True}
        chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options=options))
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(**ASK, n=2)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content == STORY
    assert chunks[-1].usage == whole.usage
    assert error.value.code == "unsupported_parameter"


def test_models_name_context_and_sampling_ranges(http):
    model = http.get("/v1/models").json()["data"][0]
    assert (model["id"], model["source"], model["step"], model["context_length"]) == ("d4", "sft", 1200, 1024)
    assert {"temperature", "top_p", "top_k", "max_tokens"} <= model["sampling"].keys()
    assert all(r["min"] <= r["default"] <= r["max"] for r in model["sampling"].values())


# --- refusals --------------------------------------------------------------------------------------------------------

MALFORMED: dict[str, Any] = {
    "empty": b"",
    "not json": b"{",
    "not utf-8": b'{"messages": "\xff\xfe"}',
    "array": [],
    "string": "hi",
    "nan": b'{"messages":[{"role":"user","content":"a"}],"temperature":NaN}',
    "infinity": b'{"messages":[{"role":"user","content":"a"}],"top_p":Infinity}',
    "huge float": b'{"messages":[{"role":"user","content":"a"}],"temperature":1e999}',
    "huge integer": b'{"messages":[{"role":"user","content":"a"}],"seed":' + b"9" * 6000 + b"}",
    "seed out of range": ask(seed=2**64),
    "deep": b'{"a":' + b"[" * 100 + b"]" * 100 + b"}",
    "very deep": b'{"a":' + b"[" * 200_000,
    "no messages": {"model": "d4"},
    "messages null": {"messages": None},
    "messages empty": {"messages": []},
    "messages object": {"messages": {"role": "user"}},
    "message string": {"messages": ["hi"]},
    "role missing": {"messages": [{"content": "a"}]},
    "role unknown": turn("a", "wizard"),
    "role list": turn("a", ["user"]),
    "role tool": turn("a", "tool"),
    "content missing": {"messages": [{"role": "user"}]},
    "content number": turn(5),
    "content object": turn({"text": "a"}),
    "lone surrogate": b'{"messages":[{"role":"user","content":"\\ud800"}]}',
    "content too long": turn("字" * 65_537),
    "image part": turn([{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]),
    "text part without text": turn([{"type": "text"}]),
    "two user turns": {"messages": ASK["messages"] * 2},
    "assistant last": {"messages": [*ASK["messages"], {"role": "assistant", "content": "a"}]},
    "system only": turn("a", "system"),
    "system late": {"messages": [*ASK["messages"], {"role": "system", "content": "a"}]},
    "too many messages": {"messages": ASK["messages"] * 257},
    "temperature high": ask(temperature=2.1),
    "temperature string": ask(temperature="1"),
    "temperature bool": ask(temperature=True),
    "top_p zero": ask(top_p=0),
    "top_p high": ask(top_p=1.5),
    "top_k negative": ask(top_k=-1),
    "top_k float": ask(top_k=1.5),
    "repetition penalty": ask(repetition_penalty=0),
    "max_tokens zero": ask(max_tokens=0),
    "max_tokens string": ask(max_tokens="9"),
    "max_tokens huge": ask(max_tokens=10**30),
    "stop too many": ask(stop=["a"] * 5),
    "stop empty": ask(stop=""),
    "stop long": ask(stop="a" * 65),
    "stop numbers": ask(stop=[1]),
    "stream string": ask(stream="yes"),
    "stream_options alone": ask(stream_options={"include_usage": True}),
    "stream_options list": ask(stream=True, stream_options=[]),
    "include_usage number": ask(stream=True, stream_options={"include_usage": 1}),
    "n two": ask(n=2),
    "tools": ask(tools=[{"type": "function"}]),
    "logprobs": ask(logprobs=True),
    "json mode": ask(response_format={"type": "json_object"}),
    "model number": {**ASK, "model": 4},
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_body_gives_400_and_an_error_object(http, body):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = http.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_error_messages_never_repeat_the_input(http):
    secret = "机密词语"
    for body in (turn("a", secret), ask(temperature=secret), {**ASK, "model": secret}, ask(stop=[secret * 40])):
        assert secret not in http.post(CHAT, json=body).text


def test_too_long_conversation_is_refused_before_any_work(live, http):
    response = http.post(CHAT, json=turn("字" * 1024))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert live.chat.engine.active == 0


def test_unknown_model_path_method_and_media_type_have_their_own_status(http):
    cases = [
        (http.post(CHAT, json={**ASK, "model": "../d5"}), 404),
        (http.get("/v1/models/other"), 404),
        (http.get("/v1/nothing"), 404),
        (http.get("/static/../app.py"), 404),
        (http.get("/static/%2e%2e%2fapp.py"), 404),
        (http.get(CHAT), 405),
        (http.post(CHAT, content=json.dumps(ASK), headers={"content-type": "text/plain"}), 415),
        (http.post(CHAT, json=ASK, headers={"content-encoding": "gzip"}), 415),
    ]
    assert [(r.status_code, set(r.json())) for r, _ in cases] == [(status, {"error"}) for _, status in cases]


def test_body_over_the_limit_gives_413_with_and_without_a_length(http):
    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 65_536

    headers = {"content-type": "application/json"}
    for content in (b" " * (2**20 + 1), pieces()):
        response = http.post(CHAT, content=content, headers=headers)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "localhost.evil.example:8000"},
        {"host": "192.168.1.5"},
        {"host": "user@localhost"},
        {"host": "localhost:port"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
    ],
    ids=str,
)
def test_foreign_host_origin_or_site_gives_403(http, headers):
    for response in (http.post(CHAT, json=ASK, headers=headers), http.get("/v1/models", headers=headers)):
        assert response.status_code == 403
        assert response.json()["error"]["type"] == "permission_error"


def test_own_origin_and_a_link_from_another_site_are_welcome(live, http):
    assert http.post(CHAT, json=ASK, headers={"origin": live.url}).status_code == 200
    visit = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert http.get("/", headers=visit).status_code == 200


def test_configured_names_and_on_public_addresses_any_ip_are_accepted():
    with LiveServer(FakeChat(), Settings(hosts=("Chat.Example",), any_address=True)) as live:
        hosts = ("chat.example:80", "192.168.1.5:8000", "[fe80::1]:8000", "other.example")
        status = [httpx.get(live.url + "/health", headers={"host": h}).status_code for h in hosts]
    assert status == [200, 200, 200, 403]


def test_key_covers_the_api_but_not_the_page_and_health():
    with LiveServer(FakeChat(), Settings(api_key="s3cret")) as live, httpx.Client(base_url=live.url) as http:
        wrong = [{}, {"authorization": "Bearer s3cre"}, {"authorization": "Basic s3cret"}, {"authorization": "s3cret"}]
        refused = [http.post(CHAT, json=ASK, headers=h) for h in wrong] + [http.get("/v1/models"), http.get("/other")]
        good = {"authorization": "Bearer s3cret"}
        assert {r.status_code for r in refused} == {401}
        assert {r.json()["error"]["code"] for r in refused} == {"invalid_api_key"}
        assert http.post(CHAT, json=ASK, headers=good).status_code == 200
        assert [http.get(p).status_code for p in ("/", "/health", "/static/main.js")] == [200, 200, 200]


def test_every_response_carries_the_security_headers(http):
    for response in (http.get("/"), http.get("/nothing"), http.get("/", headers={"host": "evil.example"})):
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "unsafe" not in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"


def test_page_files_have_types_and_are_revalidated(http):
    page = http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert http.get("/static/main.js").headers["content-type"].startswith("text/javascript")
    assert http.get("/", headers={"if-none-match": page.headers["etag"]}).status_code == 304


# --- work ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow() -> Iterator[LiveServer]:
    """A server whose answers take ten seconds."""
    with LiveServer(FakeChat(FakeEngine(repeat=20, delay_s=0.01)), Settings(limits=Limits(waiting=2))) as server:
        yield server


def test_leaving_a_stream_frees_the_slot_within_a_second(slow):
    with httpx.stream("POST", slow.url + CHAT, json=ask(stream=True, max_tokens=900)) as response:
        next(response.iter_bytes())
        assert until(lambda: slow.chat.engine.active == 1, 1)
    assert until(lambda: slow.chat.engine.active == 0, 1)


def test_leaving_frees_the_slot_even_when_deltas_come_fast():
    engine = FakeEngine(repeat=2000, context=200_000, delay_s=0.0002)
    with LiveServer(FakeChat(engine)) as live:
        for _ in range(5):
            with httpx.stream("POST", live.url + CHAT, json=ask(stream=True, max_tokens=90_000)) as response:
                next(response.iter_bytes())
            assert until(lambda: engine.active == 0, 1)


def test_leaving_a_whole_answer_frees_the_slot_within_a_second(slow):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(slow.url + CHAT, json=ask(max_tokens=900), timeout=0.3)
    assert until(lambda: slow.chat.engine.active == 0, 1)


def test_leaving_while_waiting_frees_the_place_in_line(slow):
    scheduler = slow.app.state.scheduler
    body = ask(stream=True, max_tokens=900)
    with httpx.stream("POST", slow.url + CHAT, json=body):
        assert until(lambda: scheduler.running == 1, 1)
        with httpx.stream("POST", slow.url + CHAT, json=body):
            assert until(lambda: scheduler.queued == 1, 1)
        assert until(lambda: scheduler.queued == 0, 1)
        assert scheduler.running == 1


def test_full_line_gives_429_with_retry_after_and_health_still_answers(slow):
    body = ask(stream=True, max_tokens=900)

    async def crowd() -> tuple[httpx.Response, httpx.Response]:
        async with httpx.AsyncClient(base_url=slow.url, timeout=10) as client:
            held = [asyncio.ensure_future(client.post(CHAT, json=body)) for _ in range(3)]
            await asyncio.to_thread(until, lambda: slow.app.state.scheduler.queued == 2, 2)
            answers = await client.post(CHAT, json=body), await client.get("/health")
            for task in held:
                task.cancel()
            return answers

    refused, health = asyncio.run(crowd())
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) > 0
    assert {k: health.json()[k] for k in ("status", "running", "queued")} == {"status": "ok", "running": 1, "queued": 2}


def test_two_streams_at_once_never_mix(live):
    def read(mark: int, into: list[str]) -> None:
        into.append(httpx.post(live.url + CHAT, json=ask(stream=True, max_tokens=mark)).text)

    results: list[list[str]] = [[] for _ in range(6)]
    threads = [threading.Thread(target=read, args=(10 + i, results[i])) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, result in enumerate(results):
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in events(result[0])[:-1])
        assert text == STORY[: 10 + i]


def test_waiting_too_long_ends_with_an_error_event():
    engine = FakeEngine()
    engine.gate = threading.Event()
    with LiveServer(FakeChat(engine), Settings(limits=Limits(queue_wait_s=0.3))) as live:
        with httpx.stream("POST", live.url + CHAT, json=ask(stream=True)):
            assert until(lambda: engine.active == 1, 1)
            body = httpx.post(live.url + CHAT, json=ask(stream=True)).text
            status = httpx.post(live.url + CHAT, json=ASK).status_code
        engine.gate.set()
    assert events(body)[-1]["error"]["code"] == "queue_timeout"
    assert status == 503


def test_silent_stream_sends_comments_to_keep_the_connection():
    engine = FakeEngine()
    engine.gate = threading.Event()
    with LiveServer(FakeChat(engine), Settings(ping_s=0.05)) as live:
        threading.Timer(0.4, engine.gate.set).start()
        body = httpx.post(live.url + CHAT, json=ask(stream=True)).text
    assert ": ping\n\n" in body
    assert body.endswith("data: [DONE]\n\n")


def test_answer_over_the_time_limit_is_cut_with_length():
    settings = Settings(limits=Limits(generation_s=0.2))
    with LiveServer(FakeChat(FakeEngine(delay_s=0.01, repeat=20)), settings) as live:
        answer = httpx.post(live.url + CHAT, json=ask(max_tokens=900)).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert 0 < len(answer["choices"][0]["message"]["content"]) < 100


class BrokenEngine(FakeEngine):
    """Fails after three characters."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Delta]:
        for n, char in enumerate("从前有"):
            yield Delta(char, n + 1)
        raise self.error


@pytest.mark.parametrize(("error", "status"), [(FloatingPointError("机密"), 500), (MemoryError(), 503)])
def test_failing_engine_gives_an_error_event_without_done_and_the_server_lives(error, status):
    with LiveServer(FakeChat(BrokenEngine(error))) as live:
        stream = events(httpx.post(live.url + CHAT, json=ask(stream=True)).text)
        whole = httpx.post(live.url + CHAT, json=ASK)
        assert httpx.get(live.url + "/health").json()["running"] == 0
    assert "机密" not in json.dumps(stream, ensure_ascii=False)
    assert stream[-1]["error"]["type"] == "server_error"
    assert whole.status_code == status


def test_unexpected_exception_gives_a_plain_500_error_object():
    chat = FakeChat()
    chat.prompt_ids = lambda _prompt: 1 / 0  # type: ignore[assignment]
    with LiveServer(chat) as live:
        response = httpx.post(live.url + CHAT, json=ASK)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "division" not in response.text


def test_slow_body_gives_408():
    with (
        LiveServer(FakeChat(), Settings(receive_s=0.2)) as live,
        socket.create_connection(("127.0.0.1", live.port)) as raw,
    ):
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
        raw.sendall(head.encode() + b"{")
        raw.settimeout(3)
        assert b" 408 " in raw.recv(4096)


# --- the real engine -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Iterator[LiveServer]:
    """A random model with the real engine and tokenizer behind the server."""
    tokenizer = Tokenizer.train(["只有字节"], 263)
    config = make_config(vocab_size=tokenizer.vocab_size, sequence_len=96)
    engine = Engine(make_model(config, seed=3, perturb=True).eval(), tokenizer)
    with LiveServer(Chat(engine, tokenizer, name="d4", source="sft", step=7)) as server:
        yield server


def test_real_engine_gives_the_same_text_streamed_and_whole_for_one_seed(real):
    body = ask(seed=5, temperature=1.5, stream_options={"include_usage": True}, stream=True)
    *chunks, _ = events(httpx.post(real.url + CHAT, json=body).text)
    del body["stream"], body["stream_options"]
    whole = httpx.post(real.url + CHAT, json=body).json()
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert text == whole["choices"][0]["message"]["content"] != ""
    assert chunks[-1]["usage"] == whole["usage"]


def test_usage_of_the_real_engine_equals_the_tokenizers_counts(real):
    chat = real.chat
    answer = httpx.post(real.url + CHAT, json=ask(seed=5, temperature=1.5, max_tokens=20)).json()
    ids = chat.prompt_ids(ASK["messages"])
    made = list(chat.engine.tokens(ids, SamplingParams(seed=5, temperature=1.5, max_tokens=20)))
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (len(ids), len(made))


def test_real_context_bounds_prompt_and_answer_together(real):
    answer = httpx.post(real.url + CHAT, json=ask(max_tokens=10**6)).json()
    assert answer["usage"]["total_tokens"] <= 96
    refused = httpx.post(real.url + CHAT, json=turn("字" * 31))
    assert refused.json()["error"]["code"] == "context_length_exceeded"


# --- process life ----------------------------------------------------------------------------------------------------


def stopped_while_streaming(monkeypatch: pytest.MonkeyPatch, *, number: int, grace_s: float, max_tokens: int) -> str:
    """Serve in this thread, send ourselves a signal during a stream, return the stream once `serve` has returned."""
    monkeypatch.setattr(serve, "GRACE_S", grace_s)
    listener, bodies = serve.bind("127.0.0.1", 0), []
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def visit() -> None:
        with httpx.stream("POST", url + CHAT, json=ask(stream=True, max_tokens=max_tokens), timeout=10) as response:
            pieces = response.iter_text()
            first = next(pieces)
            os.kill(os.getpid(), number)
            bodies.append(first + "".join(pieces))

    visitor = threading.Thread(target=visit)
    visitor.start()
    serve.serve(create_app(FakeChat(FakeEngine(delay_s=0.02, repeat=9))), listener)
    visitor.join(5)
    return bodies[0]


def test_stop_signal_lets_a_stream_finish(monkeypatch):
    body = stopped_while_streaming(monkeypatch, number=signal.SIGTERM, grace_s=5, max_tokens=30)
    assert body.endswith("data: [DONE]\n\n")


def test_stream_longer_than_the_grace_time_ends_with_an_error_event(monkeypatch):
    body = stopped_while_streaming(monkeypatch, number=signal.SIGINT, grace_s=0.3, max_tokens=400)
    assert events(body)[-1]["error"]["code"] == "server_stopping"


@pytest.mark.parametrize(
    "start", [b"", b"GET / HT", b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\na"]
)
def test_connection_that_never_completes_a_request_is_closed(live, monkeypatch, start):
    monkeypatch.setattr(serve, "RECEIVE_S", 0.3)
    with socket.create_connection(("127.0.0.1", live.port)) as raw:
        raw.settimeout(3)
        raw.sendall(start)
        while raw.recv(4096):
            pass


def test_port_in_use_is_one_line_with_the_next_step():
    with serve.bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} is in use; .* --port=\d+") as error:
            serve.bind("127.0.0.1", port)
    assert "\n" not in str(error.value)


def test_loopback_is_recognised():
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "10.0.0.1", "example.org")] == [
        *[True] * 3,
        *[False] * 3,
    ]


def test_chat_web_prints_its_address_answers_there_and_stops_on_a_signal(monkeypatch, capsys):
    from scripts import chat_web

    with serve.bind("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    answers: list[str] = []

    def visit() -> None:
        assert until(lambda: httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200, 5)
        answers.append(httpx.post(f"http://127.0.0.1:{port}{CHAT}", json=ASK).text)
        os.kill(os.getpid(), signal.SIGTERM)

    def load(*_args: Any, **_where: Any) -> FakeChat:
        threading.Thread(target=visit).start()  # the port listens already: this waits until the model is there
        return FakeChat()

    monkeypatch.setattr("nanozhchat.chat.load", load)
    chat_web.main([f"--port={port}"])
    assert f"http://127.0.0.1:{port} " in capsys.readouterr().out
    assert STORY in answers[0]


def test_binding_beyond_loopback_needs_a_key(monkeypatch):
    from scripts import chat_web

    monkeypatch.delenv("NANOZHCHAT_API_KEY", raising=False)
    with pytest.raises(ValueError, match="API key"):
        chat_web.main(["--host=0.0.0.0", "--port=0"])
    assert len(chat_web.resolve_key(chat_web.ChatWebArgs(host="0.0.0.0", generate_key=True)) or "") >= 24
