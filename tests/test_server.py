"""The API over HTTP, with a fake model: wire format, refusals, cancelling, limits."""

import json
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from nanozhchat import files, paths
from nanozhchat.sampling import SamplingParams
from nanozhchat.server import runs, serve
from nanozhchat.server.app import Settings
from nanozhchat.server.library import Library, Listed, list_checkpoints
from nanozhchat.server.scheduler import Limits
from scripts import chat_web
from tests.conftest import pack, refused
from tests.fakes import STORY, Delta, FakeBatch, FakeChat, FakeEngine, LiveServer, real_chat, until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK = {"model": "d4", "messages": [{"role": "user", "content": "讲个故事"}]}
BASE = Listed(name="d4:base:7", tag="d4", source="base", step=7, created=1)
JSON = {"content-type": "application/json"}
SFT = Listed(name="d4", tag="d4", source="sft", step=1200, created=1)


@pytest.fixture(scope="module")
def live():
    base = FakeChat(source="base", name=BASE.name)
    with LiveServer(FakeChat(), listed=[SFT, BASE], load=lambda _item: base) as server:
        server.base = base
        yield server


def ask(**extra):
    return {**ASK, **extra}


def turn(content, role="user"):
    return {"messages": [{"role": role, "content": content}]}


def post(live, path=CHAT, headers=None, **extra):
    return live.http.post(path, json=ask(**extra), headers=headers)


def events(body):
    """Parse a stream strictly: one data line an event, [DONE] last."""
    blocks = body.split("\n\n")
    assert blocks.pop() == ""
    blocks = [b for b in blocks if not b.startswith(":")]
    assert all(b.startswith("data: ") and "\n" not in b for b in blocks)
    return [b[6:] if b == "data: [DONE]" else json.loads(b[6:]) for b in blocks]


def streamed(live, path=CHAT, **extra):
    return events(post(live, path, stream=True, **extra).text)


def text_of(chunks, index=0):
    choices = [choice for c in chunks for choice in c["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def error_of(response):
    return response.status_code, response.json()["error"]["code"]


def test_a_stream_is_the_whole_answer_with_role_first_one_finish_reason_and_done_last(live):
    whole, response = post(live).json(), post(live, stream=True)
    *chunks, done = events(response.text)
    assert text_of(chunks) == whole["choices"][0]["message"]["content"] == STORY
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert (done, chunks[0]["choices"][0]["delta"]["role"]) == ("[DONE]", "assistant")
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert all(t["ttft_ms"] >= 0 and t["tokens_per_s"] > 0 for t in (chunks[-1]["timings"], whole["timings"]))


def test_usage_comes_only_when_asked_for_and_equals_the_token_counts(live):
    plain, asked = streamed(live), streamed(live, stream_options={"include_usage": True})
    prompt, made = 1 + len(ASK["messages"][0]["content"]), len(STORY)
    usage = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
    assert all("usage" not in c for c in plain[:-1])
    assert (asked[-2]["choices"], asked[-2]["usage"]) == ([], usage)
    assert all(c["usage"] is None for c in asked[:-2])


@pytest.mark.parametrize(("extra", "reason"), [
    ({"stop": "小猫"}, "stop"), ({"stop": ["没有的词", "小猫"]}, "stop"),
    ({"max_tokens": 9, "max_completion_tokens": 5}, "length"),
])  # fmt: skip
def test_the_answer_ends_where_asked_and_says_why(live, extra, reason):
    answer = post(live, **extra).json()["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == ("从前有一只", reason)


def test_text_parts_defaults_and_unknown_fields_are_accepted(live):
    harmless = {"n": 1, "tools": [], "user": "x", "logprobs": False, "seed": None, "stop": None, "some_new": {"a": 1}}
    parts = turn([{"type": "text", "text": "你"}, {"type": "text", "text": "好"}])
    assert live.http.post(CHAT, json={**harmless, **parts}).status_code == 200
    assert live.chat.prompts[-1][-1].content == "你好"


def test_several_answers_come_whole_and_streamed_by_index(live):
    whole, (*chunks, _) = post(live, n=3).json(), streamed(live, n=3)
    assert [c["message"]["content"] for c in whole["choices"]] == [STORY] * 3 == [text_of(chunks, i) for i in range(3)]
    assert whole["usage"]["completion_tokens"] == 3 * len(STORY)


def test_logprobs_name_each_token_its_bytes_and_its_rivals(live):
    body = {"logprobs": True, "top_logprobs": 1, "max_tokens": 3}
    whole, (*chunks, _) = post(live, **body).json()["choices"][0]["logprobs"]["content"], streamed(live, **body)
    assert [row["token"] for row in whole] == ["从", "前", "有"]
    first = {"token": "从", "logprob": -0.02, "bytes": [*"从".encode()]}
    assert whole[0] == {**first, "top_logprobs": [first]}
    assert whole == [row for c in chunks for row in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    text = post(live, TEXT, prompt="从", logprobs=2, max_tokens=2).json()["choices"][0]["logprobs"]
    assert (text["tokens"], text["text_offset"], text["top_logprobs"][0]["么"]) == (["从", "前"], [0, 1], -2.5)


def test_text_completion_takes_text_or_ids_and_any_checkpoint(live):
    for prompt in ("从前", ["从前"], [1, 2], [[1, 2]]):
        answer = post(live, TEXT, prompt=prompt, model=BASE.name).json()
        assert (answer["object"], answer["choices"][0]["text"]) == ("text_completion", STORY)
    *chunks, done = streamed(live, TEXT, prompt="从")
    assert ("".join(c["choices"][0]["text"] for c in chunks), done) == (STORY, "[DONE]")


def test_a_base_model_gets_the_text_of_all_turns_to_continue(live):
    turns = [{"role": role, "content": text} for role, text in (("user", "从前"), ("assistant", "有"), ("user", "山"))]
    post(live, model=BASE.name, messages=turns)
    assert live.base.prompts[-1] == "从前有山"


def test_tokens_go_there_and_back(live):
    found = live.http.post("/tokenize", json={"text": "你好"}).json()
    assert found["pieces"] == [[*"你".encode()], [*"好".encode()]]
    back = [live.http.post("/detokenize", json={"tokens": tokens}) for tokens in (found["tokens"], [-1])]
    assert (back[0].json(), back[1].status_code) == ({"text": "你好"}, 400)


def test_official_client_works_unchanged(live):
    with openai.OpenAI(base_url=live.url + "/v1", api_key="unused", max_retries=0) as client:
        assert [m.id for m in client.models.list()] == ["d4", BASE.name]
        assert client.models.retrieve(BASE.name).id == BASE.name
        whole = client.chat.completions.create(**ASK, temperature=0, seed=1, logprobs=True, n=2)
        chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
        text = client.completions.create(model="d4", prompt="从前").choices[0].text
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(**ASK, tools=[{"type": "function", "function": {"name": "x"}}])
    pieces = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert pieces == text == whole.choices[1].message.content == STORY
    assert error.value.code == "unsupported_parameter"


def test_models_name_their_checkpoint_context_and_sampling_ranges(live):
    model, base = live.http.get("/v1/models").json()["data"]
    assert (model["source"], model["step"], model["context_length"], model["loaded"]) == ("sft", 1200, 1024, True)
    assert all(r["min"] <= r["default"] <= r["max"] for r in model["sampling"].values())
    assert (base["id"], base["source"], base["step"]) == (BASE.name, "base", 7)


def test_metrics_count_requests_and_tokens(live):
    post(live)
    text = live.http.get("/metrics").text
    assert all(len(line.rsplit(" ", 1)) == 2 for line in text.splitlines())
    assert 'nanozhchat_running{model="d4"} 0' in text
    assert float(text.split('completion_tokens_total{model="d4"} ')[1].split("\n")[0]) >= len(STORY)
    assert 'nanozhchat_requests_total{status="200"}' in text


A = b'{"messages":[{"role":"user","content":"a"}],'
IMAGE = [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]
USER, SYSTEM, ASSISTANT = ({"role": role, "content": "a"} for role in ("user", "system", "assistant"))
BAD_BODIES = [
    b"", b"{", b'{"messages": "\xff\xfe"}', b"[]", b'"hi"', b'{"model":"d4"}',
    b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", b'{"a":' + b"[" * 200_000, A + b'"temperature":NaN}',
    A + b'"top_p":Infinity}', A + b'"temperature":1e999}', A + b'"seed":' + b"9" * 6000 + b"}",
    b'{"messages":[{"role":"user","content":"\\ud800"}]}',
]  # fmt: skip
BAD_MESSAGES = [
    None, [], USER, ["hi"], [{"content": "a"}], [{"role": "user"}], [USER] * 2, [USER, ASSISTANT], [SYSTEM],
    [USER, SYSTEM], [USER, ASSISTANT] * 128 + [USER], [{**USER, "tool_calls": [{}]}],
    *([{"role": role, "content": "a"}] for role in ("wizard", ["user"], "tool")),
    *([{"role": "user", "content": content}]
      for content in (5, {"text": "a"}, "字" * 65_537, [{"type": "text"}], IMAGE)),
]  # fmt: skip
BAD_FIELDS = {
    "temperature": [2.1, "1", True], "top_p": [0, 1.5], "top_k": [-1, 1.5], "repetition_penalty": [0],
    "max_tokens": [0, "9", 10**30], "stop": [["a"] * 5, "", "a" * 65, [1]], "seed": [2**64], "stream": ["yes"],
    "stream_options": [{"include_usage": True}], "n": [0, 9], "tools": [[{"type": "function"}]], "logprobs": [3],
    "response_format": [{"type": "json_object"}], "model": [4], "top_logprobs": [2, 21],
}  # fmt: skip
MALFORMED = [
    *BAD_BODIES,
    *({"messages": messages} for messages in BAD_MESSAGES),
    *(ask(**{name: value}) for name, values in BAD_FIELDS.items() for value in values),
    *(ask(stream=True, stream_options=options) for options in ([], {"include_usage": 1})),
]


def test_sixty_malformed_bodies_give_400_and_an_error_object_that_never_repeats_the_input(live):
    assert len(MALFORMED) >= 60
    for body in MALFORMED:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = live.http.post(CHAT, content=content, headers=JSON)
        assert response.status_code == 400, body
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}
        assert response.json()["error"]["type"] == "invalid_request_error"
    secret = "机密词语"
    for body in (turn("a", secret), ask(temperature=secret), {**ASK, "model": secret}, ask(stop=[secret * 40])):
        assert secret not in live.http.post(CHAT, json=body).text
    for prompt in (None, 5, [], ["a", "b"], [[1], "a"], [1, "a"], [-1], [10**9]):
        status = live.http.post(TEXT, json={"prompt": prompt}).status_code
        assert status == (200 if prompt == [] else 400), prompt  # nothing: a text from the start


def test_schemathesis_finds_no_server_error(live):
    bounded = settings(max_examples=15, derandomize=True, suppress_health_check=list(HealthCheck))
    for operation in schemathesis.openapi.from_url(live.url + "/openapi.json").get_all_operations():

        @bounded
        @given(case=operation.ok().as_strategy())
        def check(case):
            response = case.call(base_url=live.url)
            assert response.status_code < 500, (case, response.text)

        check()


def test_what_cannot_be_served_has_its_own_status_and_code(live):
    cases = [
        (post(live, model="../d5"), 404), (live.http.get(CHAT), 405),
        *((live.http.get(path), 404) for path in ("/v1/models/other", "/v1/nothing", "/static/../app.py",
                                                  "/ui/runs/base/..%2f", "/static/%2e%2e%2fapp.py")),
        (live.http.post(CHAT, content=json.dumps(ASK), headers={"content-type": "text/plain"}), 415),
        (post(live, headers={"content-encoding": "gzip"}), 415),
        *((live.http.post(CHAT, content=content, headers=JSON), 413)  # with and without a length
          for content in (b" " * (2**20 + 1), iter([b" " * 65_536] * 20))),
    ]  # fmt: skip
    assert [(r.status_code, set(r.json())) for r, _ in cases] == [(status, {"error"}) for _, status in cases]
    codes = {"context_length_exceeded": turn("字" * 1024), "unsupported_content": turn(IMAGE),
             "invalid_turn_order": {"messages": [USER] * 2}}  # fmt: skip
    answers = [live.http.post(CHAT, json=body) for body in codes.values()]
    assert [error_of(answer) for answer in answers] == [(400, code) for code in codes]
    assert answers[1].json()["error"]["param"] == "messages.0.content.0.type"
    assert live.chat.engine.active == 0


@pytest.mark.parametrize(("name", "value"), [
    ("host", "evil.example"), ("host", "localhost.evil.example:8000"), ("host", "192.168.1.5"),
    ("host", "user@localhost"), ("host", "localhost:port"), ("origin", "https://evil.example"), ("origin", "null"),
    ("origin", "http://127.0.0.1:1"), ("sec-fetch-site", "cross-site"),
])  # fmt: skip
def test_foreign_host_origin_or_site_gives_403(live, name, value):
    for response in (post(live, headers={name: value}), live.http.get("/v1/models", headers={name: value})):
        assert (response.status_code, response.json()["error"]["type"]) == (403, "permission_error")


def test_own_origin_a_link_from_elsewhere_configured_names_and_any_ip_if_told_are_welcome(live):
    assert post(live, headers={"origin": live.url}).status_code == 200
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert live.http.get("/", headers=link).status_code == 200
    with LiveServer(FakeChat(), Settings(hosts=("Chat.Example",), any_address=True)) as open_one:
        hosts = ("chat.example:80", "192.168.1.5:8000", "[fe80::1]:8000", "other.example")
        status = [open_one.http.get("/health", headers={"host": h}).status_code for h in hosts]
    assert status == [200, 200, 200, 403]


def test_key_covers_the_api_but_not_the_page_and_health():
    with LiveServer(FakeChat(), Settings(api_key="s3cret")) as live:
        wrong = [{}, *({"authorization": key} for key in ("Bearer s3cre", "Basic s3cret", "s3cret"))]
        private = ("/v1/models", "/other", "/metrics", "/ui/runs", "/openapi.json")
        refused = [post(live, headers=h) for h in wrong] + [live.http.get(path) for path in private]
        assert {error_of(r) for r in refused} == {(401, "invalid_api_key")}
        assert post(live, headers={"authorization": "Bearer s3cret"}).status_code == 200
        assert [live.http.get(p).status_code for p in ("/", "/runs", "/health", "/static/main.js")] == [200] * 4


def test_every_response_carries_the_security_headers(live):
    for path, headers in (("/", {}), ("/nothing", {}), ("/", {"host": "evil.example"})):
        given = live.http.get(path, headers=headers).headers
        assert "default-src 'none'" in given["content-security-policy"]
        assert "unsafe" not in given["content-security-policy"]
        assert (given["x-content-type-options"], given["referrer-policy"]) == ("nosniff", "no-referrer")


@pytest.fixture
def slow():
    """A server with one slot whose answers take ten seconds."""
    limits = Limits(running=1, waiting=2)
    with LiveServer(FakeChat(FakeEngine(repeat=20, delay_s=0.01)), Settings(limits=limits)) as server:
        yield server


def streaming(live, max_tokens=900):
    return live.http.stream("POST", CHAT, json=ask(stream=True, max_tokens=max_tokens))


@pytest.mark.parametrize(("repeat", "delay_s"), [(20, 0.01), (2000, 0.0002)], ids=["slow", "fast"])
def test_leaving_a_stream_frees_the_slot_within_a_second(repeat, delay_s):
    engine = FakeEngine(repeat=repeat, context=200_000, delay_s=delay_s)
    with LiveServer(FakeChat(engine)) as live:
        for _ in range(3):
            with streaming(live, 90_000) as response:
                pieces = response.iter_bytes()  # kept: a dropped iterator closes the connection
                next(pieces)
                assert until(lambda: engine.active == 1, 1)
            assert until(lambda: engine.active == 0, 1)


def test_leaving_a_whole_answer_or_the_line_frees_the_place_within_a_second(slow):
    refused(None, lambda: slow.http.post(CHAT, json=ask(max_tokens=900), timeout=0.3), error=httpx.ReadTimeout)
    assert until(lambda: slow.chat.engine.active == 0, 1)
    with streaming(slow):
        assert until(lambda: slow.scheduler.running == 1, 1)
        with streaming(slow):
            assert until(lambda: slow.scheduler.queued == 1, 1)
        assert until(lambda: slow.scheduler.queued == 0, 1)
        assert slow.scheduler.running == 1


def test_full_line_gives_429_with_retry_after_and_health_still_answers(slow):
    with streaming(slow), streaming(slow), streaming(slow):
        assert until(lambda: slow.scheduler.queued == 2, 2)
        refused, health = post(slow, stream=True), slow.http.get("/health").json()
    assert error_of(refused) == (429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) > 0
    assert (health["status"], health["running"], health["queued"]) == ("ok", 1, 2)


def test_streams_at_once_never_mix(live):
    with ThreadPoolExecutor(6) as pool:
        texts = [text_of(e[:-1]) for e in pool.map(lambda n: streamed(live, max_tokens=n), range(10, 16))]
    assert texts == [STORY[:n] for n in range(10, 16)]


def test_models_are_loaded_when_asked_for_and_the_idle_one_used_longest_ago_leaves():
    listed = [Listed(name=name, tag=name, source="sft", step=1, created=1) for name in ("d4", "a", "b")]
    loads = []

    def load(item):
        loads.append(item.name)
        if item.name == "b" and loads.count("b") == 1:
            raise OSError("机密")
        return FakeChat(name=item.name)

    with LiveServer(FakeChat(), listed=listed, load=load) as live, ThreadPoolExecutor(4) as pool:
        assert {r.status_code for r in pool.map(lambda name: post(live, model=name), ["a"] * 4)} == {200}
        assert loads == ["a"]
        refused = post(live, model="b")
        assert (error_of(refused), "机密" in refused.text) == ((503, "model_unavailable"), False)
        assert post(live, model="b").json()["model"] == "b"
        assert set(live.library.loaded) == {"d4", "b"}


def test_the_list_holds_every_checkpoint_but_none_outside_the_base_directory(base_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("nanozhchat.checkpoint.list_steps", lambda folder: [1, 2])
    for folder in (base_dir / "base" / "d4", base_dir / "base" / "d6", tmp_path / "elsewhere"):
        for step in (1, 2):
            pack(folder / f"step_{step:08d}" / "manifest.json", "")
    (base_dir / "base" / "link").symlink_to(tmp_path / "elsewhere")
    library = Library(FakeChat(), lambda: list_checkpoints(FakeChat()))
    assert list(library.listed) == ["d4", "d4:base:2", "d4:base:1", "d6:base:2", "d6:base:1"]
    (base_dir / "base" / "d6").rename(base_dir / "base" / "new")
    assert library.find("new").name == "new:base:2"  # there since; a tag alone: its newest


@pytest.fixture
def stuck():
    """An engine that waits for its gate."""
    engine = FakeEngine()
    engine.gate = threading.Event()
    yield engine
    engine.gate.set()


def test_waiting_too_long_ends_with_an_error_event(stuck):
    with LiveServer(FakeChat(stuck), Settings(limits=Limits(running=1, queue_wait_s=1.0))) as live:
        with streaming(live):
            assert until(lambda: stuck.active == 1, 1)
            body, status = post(live, stream=True).text, post(live).status_code
        stuck.gate.set()
    assert ": place 1\n\n" in body
    assert (events(body)[-1]["error"]["code"], status) == ("queue_timeout", 503)


def test_silent_stream_sends_comments_to_keep_the_connection(stuck):
    with LiveServer(FakeChat(stuck), Settings(ping_s=0.05)) as live, streaming(live) as response:
        lines = response.iter_lines()
        assert ": ping" in lines
        stuck.gate.set()
        assert "data: [DONE]" in lines


def test_answer_over_the_time_limit_is_cut_with_length():
    limits = Limits(generation_s=0.2)
    with LiveServer(FakeChat(FakeEngine(delay_s=0.01, repeat=20)), Settings(limits=limits)) as live:
        answer = post(live, max_tokens=900).json()["choices"][0]
    assert answer["finish_reason"] == "length"
    assert 0 < len(answer["message"]["content"]) < 100


@pytest.mark.parametrize(("error", "status"), [(FloatingPointError("机密"), 500), (MemoryError("机密"), 503)])
def test_failing_engine_gives_an_error_event_without_done_and_the_server_lives(error, status):
    class Broken(FakeEngine):
        def stream(self, *args, **kwargs):
            yield Delta("从", 1)
            raise error

    with LiveServer(FakeChat(Broken())) as live:
        stream, whole = post(live, stream=True).text, post(live)
        assert live.http.get("/health").json()["running"] == 0
        live.chat.prompt_ids = lambda _prompt: 1 / 0
        unexpected = post(live)
    assert events(stream)[-1]["error"]["type"] == "server_error"
    assert (whole.status_code, error_of(unexpected)) == (status, (500, "internal_error"))
    assert not any(secret in body for secret in ("机密", "division") for body in (stream, whole.text, unexpected.text))


def test_slow_body_gives_408_and_a_connection_that_never_completes_a_request_is_closed(monkeypatch):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    with LiveServer(FakeChat(), Settings(receive_s=0.2)) as live:
        with socket.create_connection(("127.0.0.1", live.port), 3) as raw:
            raw.sendall(head.encode() + b"{")
            assert b" 408 " in raw.recv(4096)
        monkeypatch.setattr(serve, "RECEIVE_S", 0.3)
        for start in (b"", b"GET / HT", head.encode() + b"{"):
            with socket.create_connection(("127.0.0.1", live.port), 3) as raw:
                raw.sendall(start)
                while raw.recv(4096):
                    pass


@pytest.fixture(scope="module")
def real():
    """A random model with the real engine and tokenizer behind the server."""
    with LiveServer(real_chat(), batch=None) as server:
        yield server


def test_two_hundred_answers_streamed_and_read_byte_by_byte_equal_the_whole_ones(real):
    """The random model makes bytes of any kind, broken characters among them."""
    for seed in range(200):
        body = ask(seed=seed, temperature=1.2, max_tokens=10)
        with real.http.stream("POST", CHAT, json={**body, "stream": True}) as response:
            text = b"".join(response.iter_bytes(1)).decode()
        assert text_of(events(text)[:-1]) == real.http.post(CHAT, json=body).json()["choices"][0]["message"]["content"]


def test_real_counts_seeds_and_context_hold(real):
    answer = post(real, seed=5, temperature=1.5, max_tokens=20, n=2, logprobs=True).json()
    ids = real.chat.prompt_ids(ASK["messages"])
    made = list(real.chat.engine.tokens(ids, SamplingParams(seed=5, temperature=1.5, max_tokens=20)))
    pieces = [real.chat.tokenizer.decode_bytes([i], show_special=True) for i in made]
    assert [bytes(row["bytes"]) for row in answer["choices"][0]["logprobs"]["content"]] == pieces
    assert answer["choices"][0]["message"] != answer["choices"][1]["message"]
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert post(real, max_tokens=10**6).json()["usage"]["total_tokens"] <= 96
    assert error_of(real.http.post(CHAT, json=turn("字" * 31)))[1] == "context_length_exceeded"
    control = real.http.post("/tokenize", json={"text": "<|end|>"}).json()
    assert control["count"] > 1  # a name of a control token is ordinary text


def stopped_while_streaming(monkeypatch, number, grace_s, max_tokens):
    """Run chat_web in this thread, send ourselves a signal during a stream; returns the stream and the port."""
    with serve.bind("127.0.0.1", 0) as probe:
        port, bodies = probe.getsockname()[1], []

    def visit():
        body = ask(stream=True, max_tokens=max_tokens)
        with httpx.stream("POST", f"http://127.0.0.1:{port}{CHAT}", json=body, timeout=20) as response:
            pieces = response.iter_text()
            first = next(pieces)
            os.kill(os.getpid(), number)
            bodies.append(first + "".join(pieces))

    visitor = threading.Thread(target=visit)

    def load(*_args, **_where):
        visitor.start()  # the port listens already: this waits until the model is there
        return FakeChat(FakeEngine(delay_s=0.02, repeat=9))

    monkeypatch.setattr(serve, "GRACE_S", grace_s)
    monkeypatch.setattr("nanozhchat.chat.load", load)
    monkeypatch.setattr("nanozhchat.server.library.new_batch", FakeBatch)
    chat_web.main([f"--port={port}"])
    visitor.join(5)
    return bodies[0], port


def test_chat_web_prints_its_address_and_a_stop_signal_lets_a_stream_finish_within_the_grace_time(monkeypatch, capsys):
    body, port = stopped_while_streaming(monkeypatch, signal.SIGTERM, grace_s=5, max_tokens=30)
    assert f"http://127.0.0.1:{port} " in capsys.readouterr().out
    assert (text_of(events(body)[:-1]), body.endswith("data: [DONE]\n\n")) == (STORY[:30], True)
    body, _ = stopped_while_streaming(monkeypatch, signal.SIGINT, grace_s=0.3, max_tokens=400)
    assert events(body)[-1]["error"]["code"] == "server_stopping"


def test_port_in_use_is_one_line_with_the_next_step():
    with serve.bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        error = refused(rf"port {port} is in use; .* --port=\d+", serve.bind, "127.0.0.1", port)
    assert "\n" not in str(error)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "example.org", "::"])
def test_binding_beyond_loopback_needs_a_key(host):
    refused("API key", chat_web.main, [f"--host={host}", "--port=0"])
    assert len(chat_web.resolve_key(chat_web.ChatWebArgs(host=host, generate_key=True)) or "") >= 24


def test_a_run_is_going_on_from_its_first_step_or_its_resumption_until_it_stops_or_is_done(base_dir):
    folder = paths.run_dir("base", "mine")
    files.append_jsonl(folder / "metrics.jsonl", {"step": 1})
    for event, active in (("start", True), ("stop", False), ("resume", True), ("save", True), ("done", False)):
        files.append_jsonl(folder / "events.jsonl", {"event": event})
        assert [run["active"] for run in runs.list_runs()] == [active], event
