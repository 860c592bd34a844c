"""Conversations for fine-tuning from the built-in data, files in the usual layouts, or the hub.

Layouts, told apart by the first record of each file: {"messages": [{"role", "content"}, ..]}, {"conversations": ..}
with the same or with ShareGPT's {"from", "value"}, {"prompt", "completion"}, {"instruction", "input", "output"}.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from nanozhchat import builtin, sources
from nanozhchat.conversation import Conversation, make_conversation
from nanozhchat.records import ReadStats, Record
from nanozhchat.sources import SPLITS, Document, Source

log = logging.getLogger(__name__)

VAL_FRAC = 0.02  # of conversations, by hash
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}  # other names in use
TURN_LISTS = ("messages", "conversations", "conversation")
PAIRS = (  # (question, its optional input, answer)
    ("prompt", "", "completion"),
    ("instruction", "input", "output"),
    ("instruction_zh", "input_zh", "output_zh"),
    ("input", "", "target"),
)
LAYOUTS = "messages, conversations, prompt + completion, or instruction + output"

Reader = Callable[[Mapping[str, Any]], Conversation]


def conversations(
    specs: Sequence[str], split: str, *, limit: int | None = None, seed: int = 0, stats: ReadStats | None = None,
    skip_bad: bool = False,
) -> Iterator[Conversation]:  # fmt: skip
    """Yield the conversations of one split, "train" or "val"; built-in ones never end, so give a `limit`.

    Files and hub: about VAL_FRAC of the conversations, by content, are val, at least one if there are two or more.
    What is no proper conversation is skipped and counted in `stats`. Raises ValueError for an unknown layout,
    DamagedError for a broken file unless `skip_bad`.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; splits are {' and '.join(SPLITS)}")
    stats = stats if stats is not None else ReadStats()
    streams = []
    for source in map(sources.parse, sources.resolve_specs(specs)):
        if source.kind == "builtin":
            skills = sources.builtin_parts(source.name)
            streams.append((source, builtin.conversations(seed, split=split, skills=skills)))
        else:
            streams.append((source, _external(source, split, stats, skip_bad)))
    yield from islice(sources.mix(streams, lambda talk: sum(len(m.content.encode()) for m in talk)), limit)


def load_conversations(
    specs: Sequence[str], split: str, *, max_conversations: int, seed: int = 0
) -> list[Conversation]:
    """Return at most `max_conversations` of one split; raises ValueError if there are none."""
    stats = ReadStats()
    found = list(conversations(specs, split, limit=max_conversations, seed=seed, stats=stats))
    skipped = f" ({stats.summary()} skipped)" if stats.skipped else ""
    if not found:
        raise ValueError(
            f"--data {' '.join(specs)} has no conversation for the {split} split{skipped}; "
            "at least 2 different ones are needed, one to train on and one to validate with"
        )
    if skipped:
        log.warning("%s: %d conversations%s", " ".join(specs), len(found), skipped)
    return found


def _external(source: Source, split: str, stats: ReadStats, skip_bad: bool) -> Iterator[Conversation]:
    """Read files or a hub data set and keep one split."""
    kept: dict[int, Conversation] = {}

    def tagged() -> Iterator[Document]:
        for number, conversation in enumerate(_read(source, stats, skip_bad)):
            text = json.dumps([(m.role, m.content) for m in conversation], ensure_ascii=False)
            key = sources.content_key(text.encode())
            kept[number] = conversation
            yield Document("val" if key < VAL_FRAC * 2**64 else "train", str(number), 0, key)

    for doc in sources.balance(tagged()):
        conversation = kept.pop(int(doc.text))
        if doc.split == split:
            yield conversation


def _read(source: Source, stats: ReadStats, skip_bad: bool) -> Iterator[Conversation]:
    path, reader = None, None
    for record in sources.file_records(source, stats=stats, skip_bad=skip_bad):
        if reader is None or record.path != path:
            path, reader = record.path, choose_reader(record)
        try:
            conversation = reader(record.value)
            _check(conversation)
        except (ValueError, KeyError, TypeError):
            stats.skip("no proper conversation")
            continue
        yield conversation


def _check(conversation: Conversation) -> None:
    """Refuse what would teach nothing, or to answer with nothing."""
    answers = [message.content for message in conversation if message.role == "assistant"]
    if not answers or not all(answer.strip() for answer in answers):
        raise ValueError("without an answer")
    for message in conversation:
        message.content.encode()  # UnicodeEncodeError, a ValueError, for lone surrogates


def choose_reader(record: Record) -> Reader:
    """Return the reader for the layout of a file's first record; raises ValueError naming file, line and keys."""
    if isinstance(record.value, str):
        raise ValueError(f"{record.where} is plain text; fine-tuning needs conversations as .jsonl with {LAYOUTS}")
    keys = set(record.value)
    for name in TURN_LISTS:
        if isinstance(record.value.get(name), list):
            return lambda value: _turns(value[name], value.get("system"))
    for question, extra, answer in PAIRS:
        if {question, answer} <= keys:
            return lambda value: _pair(value, question, extra, answer)
    raise ValueError(f"{record.where} has keys {', '.join(sorted(keys)) or 'none'}; expected {LAYOUTS}")


def _turns(turns: Any, system: Any) -> Conversation:
    messages = []
    for turn in turns:
        role = turn["from"] if "from" in turn else turn["role"]
        content = turn["value"] if "value" in turn else turn["content"]
        messages.append({"role": ROLES.get(role, role), "content": content})
    if isinstance(system, str) and system.strip() and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return make_conversation(messages)


def _pair(value: Mapping[str, Any], question: str, extra: str, answer: str) -> Conversation:
    """Build one exchange, after the earlier ones of an optional `history` of [question, answer] pairs."""
    asked = value[question]
    more = value.get(extra) if extra else None
    if isinstance(more, str) and more.strip():
        asked = f"{asked}\n{more}" if asked else more
    turns = []
    if isinstance(value.get("system"), str) and value["system"].strip():
        turns.append({"role": "system", "content": value["system"]})
    for pair in [*(value.get("history") or []), (asked, value[answer])]:
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return make_conversation(turns)
