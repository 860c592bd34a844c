"""Conversations: the message types, the control tokens, and the one chat template.

The template, for any number of turns (system optional, first only):

    <|bos|><|system|>..<|end|><|user|>..<|end|><|assistant|>..<|end|>

Control tokens are placed by `Tokenizer.render` only; text that looks like one is encoded as ordinary bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

BOS = "<|bos|>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
TOOL_CALL, TOOL_RESULT = "<|tool_call|>", "<|tool_result|>"
SPECIAL_TOKENS: tuple[str, ...] = (BOS, SYSTEM, USER, ASSISTANT, END, TOOL_CALL, TOOL_RESULT)

ROLE_TOKEN = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. role: "system", "user" or "assistant"; content: plain text, never parsed for control tokens."""

    role: str
    content: str


Conversation = tuple[Message, ...]


def make_conversation(turns: Iterable[Mapping[str, Any] | Message]) -> Conversation:
    """Check and freeze a list of turns given as {"role", "content"} mappings or Messages.

    Raises ValueError unless: at least one turn; system only first; then user and assistant strictly alternate,
    starting with user; every content is a string.
    """
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        if isinstance(turn, Message):
            role, content = turn.role, turn.content
        elif isinstance(turn, Mapping):
            role, content = turn.get("role"), turn.get("content")
        else:
            raise ValueError(f"message {i} is {type(turn).__name__}, expected an object with role and content")
        if role not in ROLE_TOKEN:
            raise ValueError(f"message {i} has role {role!r}; roles are system, user, assistant")
        if not isinstance(content, str):
            raise ValueError(f"message {i} ({role}) has content of type {type(content).__name__}, expected a string")
        messages.append(Message(role, content))
    if not messages:
        raise ValueError("a conversation needs at least one message")
    turns_only = messages[1:] if messages[0].role == "system" else messages
    for i, message in enumerate(turns_only):
        want = "user" if i % 2 == 0 else "assistant"
        if message.role != want:
            raise ValueError(f"turn {i + 1} is {message.role!r}, expected {want!r}: user and assistant must alternate")
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

    def check(self, index: int, answer: str) -> bool:
        """Judge the model's answer."""
