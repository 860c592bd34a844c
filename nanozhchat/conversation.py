"""Conversations: the message types, the control tokens, and the one chat template.

The template, for any number of turns (system optional, first only; a call and its result as often as needed):

    <|bos|><|system|>..<|end|><|user|>..<|end|><|assistant|>..<|tool_call|>3+5<|end|><|tool_result|>8<|end|>
    <|assistant|>..<|end|>

Control tokens are placed by `Tokenizer.render` only; text that looks like one is encoded as ordinary bytes.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

BOS = "<|bos|>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
TOOL_CALL, TOOL_RESULT = "<|tool_call|>", "<|tool_result|>"
SPECIAL_TOKENS: tuple[str, ...] = (BOS, SYSTEM, USER, ASSISTANT, END, TOOL_CALL, TOOL_RESULT)

ROLE_TOKEN = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": TOOL_RESULT}
CALCULATOR, EXPRESSION = "calculator", "expression"  # the tool whose calls are written as the bare expression
CHAT_TEMPLATE = (  # the same in Jinja, for other software; arguments as objects, as transformers hands them over
    "{{ '<|bos|>' }}{% for m in messages %}"
    "{% if m['role'] != 'tool' %}{{ '<|' + m['role'] + '|>' }}"
    "{% elif loop.previtem['role'] == 'tool' %}{{ '\n' }}{% else %}{{ '<|tool_result|>' }}{% endif %}"
    "{{ m['content'] or '' }}"
    "{% if m['tool_calls'] %}{{ '<|tool_call|>' }}{% for c in m['tool_calls'] %}{{ '\n' if not loop.first else '' }}"
    "{% if c['function']['name'] == 'calculator' %}{{ c['function']['arguments']['expression'] }}"
    "{% else %}{{ {'name': c['function']['name'], 'arguments': c['function']['arguments']} | tojson }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if m['role'] != 'tool' or not loop.nextitem or loop.nextitem['role'] != 'tool' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. role: "system", "user", "assistant" or "tool"; content: plain text, never parsed for control tokens.

    tool_call: what an assistant asks a tool after its words, "" = nothing: an expression for the calculator, else JSON
    with name and arguments. The next turn, of role "tool", is the result.
    """

    role: str
    content: str
    tool_call: str = ""


Conversation = tuple[Message, ...]


def call_text(calls: Iterable[Mapping[str, Any]]) -> str:
    """Write OpenAI's `tool_calls` the way a model does: one line each; raises ValueError if they are none."""
    lines = []
    for call in calls:
        try:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            whole = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
            lines.append(arguments[EXPRESSION] if name == CALCULATOR else whole)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"tool call {len(lines)} is not a function with a name and arguments in JSON") from error
    return "\n".join(map(str, lines))


def _message(i: int, turn: Mapping[str, Any] | Message) -> Message:
    if isinstance(turn, Message):
        turn = {"role": turn.role, "content": turn.content, "tool_call": turn.tool_call}
    if not isinstance(turn, Mapping):
        raise ValueError(f"message {i} is {type(turn).__name__}, expected an object with role and content")
    role, content, call = turn.get("role"), turn.get("content"), turn.get("tool_call", "")
    if calls := turn.get("tool_calls"):
        content, call = content or "", call_text(calls)
    if role not in ROLE_TOKEN:
        raise ValueError(f"message {i} has role {role!r}; roles are {', '.join(ROLE_TOKEN)}")
    if not isinstance(content, str) or not isinstance(call, str):
        odd = call if isinstance(content, str) else content
        raise ValueError(f"message {i} ({role}) has content of type {type(odd).__name__}, expected a string")
    if call and role != "assistant":
        raise ValueError(f"message {i} ({role}) calls a tool, which only the assistant does")
    return Message(role, content, call)


def make_conversation(turns: Iterable[Mapping[str, Any] | Message]) -> Conversation:
    """Check and freeze a list of turns given as {"role", "content"} mappings or Messages.

    An assistant's mapping may have `tool_calls` as in OpenAI's API; the results of several calls become one turn.
    Raises ValueError unless: at least one turn; system only first; then user and assistant strictly alternate,
    starting with user, and after each tool call comes a tool's turn, then the assistant's; every content is a string.
    """
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        message = _message(i, turn)
        if message.role == "tool" and messages and messages[-1].role == "tool":
            message = Message("tool", f"{messages.pop().content}\n{message.content}")
        messages.append(message)
    if not messages:
        raise ValueError("a conversation needs at least one message")
    turns_only = messages[1:] if messages[0].role == "system" else messages
    want = "user"
    for i, message in enumerate(turns_only):
        if message.role != want:
            raise ValueError(f"turn {i + 1} is {message.role!r}, expected {want!r}: user and assistant must alternate")
        want = "tool" if message.tool_call else "user" if want == "assistant" else "assistant"
    if not turns_only:
        raise ValueError("a conversation needs a user message")
    return tuple(messages)


class Task(Protocol):
    """What evaluation needs from a task: questions one can ask and a judge for the answers."""

    name: str
    chance: float  # score of blind guessing, 0-1

    def __len__(self) -> int:
        """Count the questions."""

    def prompt(self, index: int) -> Sequence[Message]:
        """Return the conversation that ends with the user's question."""

    def expected(self, index: int) -> str:
        """Return a reference answer, for display."""

    def check(self, index: int, answer: str) -> float:
        """Judge the model's answer: 1 (or True) is right, 0 wrong, between is part of it."""
