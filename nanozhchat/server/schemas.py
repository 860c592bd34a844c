"""The wire format: bytes of a request -> ChatRequest, results -> OpenAI objects. Pure: no network, no engine.

Unknown fields are ignored. Known fields this server has no use for are refused when set (`REFUSED`), never dropped
silently. Messages name the field and the rule; they never repeat what the client sent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from nanozhchat.conversation import Conversation, make_conversation
from nanozhchat.sampling import SamplingParams

MAX_MESSAGES = 256
MAX_MESSAGE_CHARS = 1 << 16
MAX_JSON_DEPTH = 32
MAX_STOPS = 4
MAX_STOP_CHARS = 64
SEED_LIMIT = 1 << 63
MAX_TOKENS = 1 << 24  # far above any context; the room the prompt leaves decides

RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_k": (0, 1000),
    "top_p": (0.0, 1.0),  # 0 itself is refused: it would keep no token
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.5, 2.0),
}
INTEGERS = ("top_k",)
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

# Field -> whether a value asks for nothing, so that clients which always send defaults keep working.
REFUSED: dict[str, Callable[[Any], bool]] = {
    "n": lambda v: type(v) is int and v == 1,
    "tools": lambda v: v == [],
    "functions": lambda v: v == [],
    "tool_choice": lambda v: v in ("none", "auto"),
    "function_call": lambda v: v in ("none", "auto"),
    "logprobs": lambda v: v is False,
    "top_logprobs": lambda v: v == 0,
    "logit_bias": lambda v: v == {},
    "presence_penalty": lambda v: v == 0,
    "frequency_penalty": lambda v: v == 0,
    "response_format": lambda v: v == {"type": "text"},
    "modalities": lambda v: v == ["text"],
    "audio": lambda v: False,
    "prediction": lambda v: False,
    "web_search_options": lambda v: False,
}

ERROR_TYPE = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """A failure as the client sees it: status and the OpenAI error object."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        """status: HTTP status. retry_after_s: sent as Retry-After when given."""
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """Return `{"error": {"message", "type", "param", "code"}}`."""
        kind = ERROR_TYPE.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """One checked request. `max_tokens` of `sampling` is still to be clamped to the room the prompt leaves."""

    messages: Conversation
    model: str | None
    sampling: SamplingParams
    stream: bool
    include_usage: bool


def _bad(param: str | None, message: str, code: str = "invalid_value") -> NoReturn:
    raise ApiError(400, message, code=code, param=param)


def _too_deep(value: Any) -> bool:
    level, depth = [value], 0
    while level and depth <= MAX_JSON_DEPTH:
        level = [v for x in level if isinstance(x, (list, dict)) for v in (x.values() if isinstance(x, dict) else x)]
        depth += 1
    return bool(level)


def _refuse_constant(_name: str) -> NoReturn:
    raise ValueError


def parse_json(body: bytes) -> dict[str, Any]:
    """Decode a request body into an object; NaN, Infinity, deep nesting and broken text are ApiError 400."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # covers bad UTF-8, bad JSON, integers with thousands of digits
        _bad(None, "the body is not valid JSON in UTF-8", "invalid_json")
    if not isinstance(value, dict):
        _bad(None, "the body must be a JSON object", "invalid_json")
    if _too_deep(value):
        _bad(None, f"the body is nested more than {MAX_JSON_DEPTH} levels deep", "invalid_json")
    return value


def parse_chat_request(body: bytes, *, max_tokens: int) -> ChatRequest:
    """Check a chat completion request; max_tokens is the answer length when the client names none.

    Raises ApiError 400 naming the first field that is wrong.
    """
    fields = {k: v for k, v in parse_json(body).items() if v is not None}
    for name, harmless in REFUSED.items():
        if name in fields and not harmless(fields[name]):
            _bad(name, f"{name} is not supported by this server; leave it out", "unsupported_parameter")
    options = fields.get("stream_options", {})
    if not isinstance(options, dict):
        _bad("stream_options", "stream_options must be an object")
    stream = _flag(fields, "stream", "stream")
    if "stream_options" in fields and not stream:
        _bad("stream_options", "stream_options is only allowed when stream is true")
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        _bad("model", "model must be a string")
    return ChatRequest(
        messages=_messages(fields.get("messages")),
        model=model,
        sampling=_sampling(fields, max_tokens),
        stream=stream,
        include_usage=_flag(options, "include_usage", "stream_options.include_usage"),
    )


def _flag(fields: Mapping[str, Any], name: str, param: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        _bad(param, f"{param} must be true or false")
    return bool(value)


def _sampling(fields: Mapping[str, Any], max_tokens: int) -> SamplingParams:
    values: dict[str, Any] = {name: _number(fields[name], name) for name in RANGES if name in fields}
    if values.get("top_p") == 0:
        _bad("top_p", "top_p must be greater than 0")
    if "seed" in fields:
        values["seed"] = _integer(fields["seed"], "seed", -SEED_LIMIT, SEED_LIMIT - 1) % SEED_LIMIT
    for name in ("max_tokens", "max_completion_tokens"):  # the second is the newer name and wins
        if name in fields:
            max_tokens = min(_integer(fields[name], name, 1, SEED_LIMIT), MAX_TOKENS)
    try:
        return SamplingParams(**values, max_tokens=max_tokens, stop=_stops(fields.get("stop")))
    except ValueError as error:
        _bad(None, str(error))


def _number(value: Any, name: str) -> float:
    low, high = RANGES[name]
    if name in INTEGERS:
        return _integer(value, name, int(low), int(high))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or math.isnan(value):
        _bad(name, f"{name} must be a number between {low:g} and {high:g}")
    return float(value)


def _integer(value: Any, name: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        limit = f" between {low} and {high}" if high < SEED_LIMIT - 1 else f" of at least {low}" if low > 0 else ""
        _bad(name, f"{name} must be a whole number{limit}")
    return value


def _is_text(value: Any) -> bool:
    """Tell whether a value is a string that UTF-8 can carry (no lone surrogates)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        _bad("stop", f"stop must be a string or a list of at most {MAX_STOPS} strings")
    if not all(_is_text(s) and 0 < len(s) <= MAX_STOP_CHARS for s in stops):
        _bad("stop", f"each stop string must have 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _messages(value: Any) -> Conversation:
    if not isinstance(value, list) or not value:
        _bad("messages", "messages must be a list with at least one message")
    if len(value) > MAX_MESSAGES:
        _bad("messages", f"messages may hold at most {MAX_MESSAGES} entries", "too_many_messages")
    turns = []
    for i, turn in enumerate(value):
        where = f"messages[{i}]"
        if not isinstance(turn, dict):
            _bad(where, f"{where} must be an object with role and content")
        role = turn.get("role")
        if not isinstance(role, str) or role not in ROLES:
            _bad(f"{where}.role", f"{where}.role must be one of system, user, assistant")
        if turn.get("tool_calls") or turn.get("function_call"):
            _bad(where, "tool calls are not supported by this server", "unsupported_parameter")
        turns.append({"role": ROLES[role], "content": _content(turn.get("content"), f"{where}.content")})
    try:
        conversation = make_conversation(turns)
    except ValueError as error:  # names turn numbers and roles, both checked above; no client text
        _bad("messages", str(error), "invalid_turn_order")
    if conversation[-1].role != "user":
        _bad("messages", "the last message must come from the user", "invalid_turn_order")
    return conversation


def _content(value: Any, where: str) -> str:
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text":
                _bad(where, f"{where} has a part that is not text; this model reads text only", "unsupported_content")
            if not isinstance(part.get("text"), str):
                _bad(where, f"{where} has a text part without text")
        value = "".join(part["text"] for part in value)
    if not _is_text(value):
        _bad(where, f"{where} must be valid text or a list of text parts")
    if len(value) > MAX_MESSAGE_CHARS:
        _bad(where, f"{where} is longer than {MAX_MESSAGE_CHARS} characters", "message_too_long")
    return value


# --- results -> wire -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What every object of one answer shares. id: `chatcmpl-…`; created: Unix seconds; model: its name."""

    id: str
    created: int
    model: str

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": None, "choices": choices}

    def completion(self, text: str, finish_reason: str, usage: dict[str, Any], timings: dict[str, Any]) -> dict:
        """Return the whole answer as one object."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {**self._envelope("chat.completion", [choice]), "usage": usage, "timings": timings}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None, **extra: Any) -> dict[str, Any]:
        """Return one piece of a streamed answer; extra: further top-level fields."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._envelope("chat.completion.chunk", [choice]), **extra}

    def usage_chunk(self, usage: dict[str, Any], timings: dict[str, Any]) -> dict[str, Any]:
        """Return the chunk without choices that `include_usage` asks for."""
        return {**self._envelope("chat.completion.chunk", []), "usage": usage, "timings": timings}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the usage object."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def model_object(name: str, *, source: str, step: int, context: int, created: int) -> dict[str, Any]:
    """Describe a model: the OpenAI fields, then context length in tokens and sampling ranges with defaults."""
    defaults = SamplingParams()
    sampling: dict[str, dict[str, float]] = {
        field: {"min": low, "max": high, "default": getattr(defaults, field)} for field, (low, high) in RANGES.items()
    }
    sampling["max_tokens"] = {"min": 1, "max": context, "default": min(defaults.max_tokens, context)}
    head = {"id": name, "object": "model", "created": created, "owned_by": "nanozhchat"}
    return {**head, "source": source, "step": step, "context_length": context, "sampling": sampling}


def to_json(value: Any) -> bytes:
    """Encode an object on one line, UTF-8, characters as themselves."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8")
