"""The wire format: bytes of a request -> what it asks. Pure: no network, no engine; `answers` is the way back.

Unknown fields are ignored. Known fields this server has no use for are refused when set (`REFUSED`), never dropped
silently. Messages name the field and the rule; they never repeat what the client sent.
"""

import json
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from nanozhchat.conversation import Conversation, Message, make_conversation
from nanozhchat.sampling import SamplingParams

MAX_MESSAGES = 256
MAX_MESSAGE_CHARS = 1 << 16
MAX_JSON_DEPTH = 32
MAX_TOKENS = 1 << 24  # far above any context; the room the prompt leaves decides
SEED_LIMIT = 1 << 63
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
ERROR_TYPE = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
              500: "server_error", 503: "server_error"}  # fmt: skip

# Field -> values that ask for nothing, so that clients which always send defaults keep working.
REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "tool_calls": ([],), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "prediction": (), "web_search_options": (), "best_of": (1,), "echo": (False,), "suffix": ("",),
}  # fmt: skip


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


Text = Annotated[str, StringConstraints(max_length=MAX_MESSAGE_CHARS)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Ids = Annotated[list[int], Field(max_length=MAX_MESSAGE_CHARS)]


class Body(BaseModel):
    """What every request may say."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    model: str | None = None


class Part(Body):
    """A piece of a message's content."""

    type: Literal["text"]
    text: Text


class Turn(Body):
    """A message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]


class StreamOptions(Body):
    """Wishes for a stream."""

    include_usage: bool = False


class Completion(Body):
    """What both kinds of completion take."""

    temperature: float = Field(SamplingParams().temperature, ge=0, le=2)
    top_k: int = Field(SamplingParams().top_k, ge=0, le=1000)
    top_p: float = Field(SamplingParams().top_p, gt=0, le=1)
    min_p: float = Field(SamplingParams().min_p, ge=0, le=1)
    repetition_penalty: float = Field(SamplingParams().repetition_penalty, ge=0.5, le=2)
    presence_penalty: float = Field(SamplingParams().presence_penalty, ge=-2, le=2)
    frequency_penalty: float = Field(SamplingParams().frequency_penalty, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] = {}
    max_tokens: int = Field(SamplingParams().max_tokens, ge=1, lt=SEED_LIMIT)
    max_completion_tokens: int | None = Field(None, ge=1, lt=SEED_LIMIT)
    seed: int | None = Field(None, ge=-SEED_LIMIT, lt=SEED_LIMIT)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    n: int = Field(1, ge=1, le=8)
    stream: bool = False
    stream_options: StreamOptions | None = None


class ChatBody(Completion):
    """POST /v1/chat/completions."""

    messages: list[Turn] = Field(min_length=1, max_length=MAX_MESSAGES)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


class TextBody(Completion):
    """POST /v1/completions."""

    prompt: Text | Ids | Annotated[list[Text | Ids], Field(min_length=1, max_length=1)]
    logprobs: int | None = Field(None, ge=0, le=20)


class TokenizeBody(Body):
    """POST /tokenize."""

    text: Text


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: Ids


class RenderBody(Body):
    """POST /ui/render."""

    texts: list[Text] = Field(max_length=2 * MAX_MESSAGES)


AnyBody = TypeVar("AnyBody", bound=Body)
KINDS = (Part, Turn, StreamOptions, ChatBody, TextBody, TokenizeBody, DetokenizeBody, RenderBody)
FIELDS = {name for kind in KINDS for name in kind.model_fields}  # the other parts of an error's place are types


def _bad(param: str | None, message: str, code: str = "invalid_value") -> NoReturn:
    raise ApiError(400, message, code=code, param=param)


def _too_deep(value: Any) -> bool:
    level, depth = [value], 0
    while level and depth <= MAX_JSON_DEPTH:
        level = [v for x in level if isinstance(x, (list, dict)) for v in (x.values() if isinstance(x, dict) else x)]
        depth += 1
    return bool(level)


def read(body: bytes, kind: type[AnyBody]) -> AnyBody:
    """Decode and check a request body. Raises ApiError 400 that names the first field that is wrong."""
    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=int)  # which refuses NaN and Infinity
    except (ValueError, RecursionError):  # covers bad UTF-8, bad JSON, integers with thousands of digits
        _bad(None, "the body is not valid JSON in UTF-8", "invalid_json")
    if not isinstance(fields, dict) or _too_deep(fields):
        _bad(None, f"the body must be a JSON object, nested at most {MAX_JSON_DEPTH} levels deep", "invalid_json")
    fields = {name: value for name, value in fields.items() if value is not None}
    turns = fields.get("messages")
    for turn in [fields, *(t for t in (turns if isinstance(turns, list) else ()) if isinstance(t, dict))]:
        for name in REFUSED.keys() & turn.keys():
            if turn[name] not in (None, *REFUSED[name]):
                _bad(name, f"{name} is not supported by this server; leave it out", "unsupported_parameter")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        deepest = max(found, key=lambda e: (e["type"] == "too_long", len(e["loc"])))  # of a union, what fits best
        where = ".".join(str(part) for part in deepest["loc"] if isinstance(part, int) or part in FIELDS)
        is_part = "list[Part]" in deepest["loc"] and deepest["loc"][-1] == "type"
        _bad(where or None, f"{where}: {deepest['msg']}", "unsupported_content" if is_part else "invalid_value")


def parse_request(body: bytes, *, chat: bool) -> tuple[Completion, Conversation | str | list[int], SamplingParams]:
    """Check a chat completion request, or one to continue text; raises ApiError 400.

    Returns what was asked, the prompt (a conversation, text to continue, or ids) and how to sample; `max_tokens` is
    still to be clamped to the room the prompt leaves.
    """
    asked: Any = read(body, ChatBody if chat else TextBody)
    if asked.stream_options is not None and not asked.stream:
        _bad("stream_options", "stream_options is only allowed when stream is true")
    if chat:
        if asked.top_logprobs and not asked.logprobs:
            _bad("top_logprobs", "top_logprobs needs logprobs to be true")
        prompt = _conversation(asked.messages)
        top = asked.top_logprobs if asked.logprobs else None
    else:
        listed = isinstance(asked.prompt, list) and asked.prompt and not isinstance(asked.prompt[0], int)
        prompt = asked.prompt[0] if listed else asked.prompt
        top = asked.logprobs
    stop = () if asked.stop is None else (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    sampling = SamplingParams(
        **{name: getattr(asked, name) for name in SAMPLING}, max_tokens=min(most, MAX_TOKENS), stop=stop,
        seed=None if asked.seed is None else asked.seed % SEED_LIMIT, logprobs=top,
        logit_bias={int(token): bias for token, bias in asked.logit_bias.items()},
    )  # fmt: skip
    return asked, prompt, sampling


def _conversation(turns: list[Turn]) -> Conversation:
    """Join text parts and check the order of the turns; `developer` is the newer name of `system`."""
    messages = []
    for turn in turns:
        content = turn.content if isinstance(turn.content, str) else "".join(part.text for part in turn.content)
        messages.append(Message("system" if turn.role == "developer" else turn.role, content))
    if any(len(message.content) > MAX_MESSAGE_CHARS for message in messages):
        _bad("messages", f"a message is longer than {MAX_MESSAGE_CHARS} characters", "message_too_long")
    try:
        conversation = make_conversation(messages)
    except ValueError as error:  # names turn numbers and roles, both checked above; no client text
        _bad("messages", str(error), "invalid_turn_order")
    if conversation[-1].role != "user":
        _bad("messages", "the last message must come from the user", "invalid_turn_order")
    return conversation


def ranges(context: int) -> dict[str, dict[str, float]]:
    """Return limits and defaults of the sampling fields, for clients that show controls."""
    found = {}
    for name in (*SAMPLING, "max_tokens"):
        field = Completion.model_fields[name]
        bounds = {k: getattr(rule, k) for rule in field.metadata for k in ("ge", "gt", "le") if hasattr(rule, k)}
        high = bounds.get("le", context)
        found[name] = {"min": bounds.get("ge", bounds.get("gt")), "max": high, "default": min(field.default, high)}
    return found


def to_json(value: Any) -> bytes:
    """Encode an object on one line, UTF-8, characters as themselves."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8")
