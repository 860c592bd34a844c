"""Conversations for fine-tuning from the built-in data, files in the usual layouts, or the hub.

Layouts, told apart record by record: {"messages": [{"role", "content"}, ..]}, {"conversations": ..} with the same,
ShareGPT's {"from", "value"} or {"human", "assistant"}, {"prompt", "completion"}, {"instruction", "input", "output"};
for preferences any of their questions with {"chosen", "rejected"}.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any, TypeVar

from nanozhchat import builtin, sources
from nanozhchat.conversation import Conversation, make_conversation
from nanozhchat.errors import DamagedError
from nanozhchat.records import ReadStats, Record
from nanozhchat.sources import SPLITS, Source

log = logging.getLogger(__name__)

VAL_FRAC = 0.02  # of conversations, by hash
ROLES = {  # other names in use
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function": "tool",
}  # fmt: skip
TURN_LISTS = ("messages", "conversations", "conversation")
PAIRS = (  # (question, its optional input, answer)
    ("prompt", "", "completion"), ("instruction", "input", "output"), ("instruction_zh", "input_zh", "output_zh"),
    ("instruction", "context", "response"), ("prompt", "", "response"), ("query", "", "response"),
    ("question", "", "answer"), ("input", "", "target"),
)  # fmt: skip
LAYOUTS = "messages, conversations, prompt + completion, question + answer, or instruction + output"
PREFERENCES = "chosen + rejected, with messages, prompt or instruction unless they hold the whole conversations"

Preference = tuple[Conversation, Conversation]  # equal but for the last answer: the better one, the worse one
T = TypeVar("T")


def conversations(
    specs: Sequence[str], split: str, *, limit: int | None = None, seed: int = 0, stats: ReadStats | None = None
) -> Iterator[Conversation]:
    """Yield the conversations of one split, "train" or "val"; built-in ones never end, so give a `limit`.

    Files and hub: about VAL_FRAC of the conversations, by content, are val, at least one if there are two or more.
    Where built-in ones take part by weight, those to train on come again and again, to keep their share.
    What is no proper conversation is skipped and counted in `stats`. Raises ValueError for an unknown layout,
    DamagedError for a broken file.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; splits are {' and '.join(SPLITS)}")
    stats = stats if stats is not None else ReadStats()
    streams: list[tuple[Source, Iterator[Conversation]]] = []
    parsed = [sources.parse(spec) for spec in sources.resolve_specs(specs)]
    again = split == "train" and any(s.endless for s in parsed) and any(s.weight is not None for s in parsed)
    for source in parsed:
        if source.kind == "builtin":
            skills = sources.builtin_parts(source.name)
            streams.append((source, builtin.conversations(seed, split=split, skills=skills)))
        else:
            found = _external(source, split, stats, read_one)
            streams.append((source, cycle(found) if again else found))
    mixed = sources.mix(streams, lambda talk: sum(len(f"{m.content}{m.tool_call}".encode()) for m in talk), {})
    yield from islice(mixed, limit)


def load_conversations(
    specs: Sequence[str], split: str, *, max_conversations: int, seed: int = 0
) -> list[Conversation]:
    """Return at most `max_conversations` of one split; raises ValueError if there are none."""
    stats = ReadStats()
    found = list(conversations(specs, split, limit=max_conversations, seed=seed, stats=stats))
    skipped = f" ({stats.summary()} skipped)" if stats.skipped else ""
    if not found:
        raise ValueError(f"--data {' '.join(specs)} has no conversation for the {split} split{skipped}; "
                         "at least 2 different ones are needed, one to train on and one to validate with")  # fmt: skip
    if skipped:
        log.warning("%s: %d conversations%s", " ".join(specs), len(found), skipped)
    return found


def preferences(specs: Sequence[str], split: str, *, stats: ReadStats | None = None) -> Iterator[Preference]:
    """Yield the pairs of a better and a worse answer of files or the hub; split and errors as in `conversations`."""
    for source in map(sources.parse, sources.resolve_specs(specs)):
        if source.kind == "builtin":
            raise ValueError(f"--data={source.spec} has no preferences; give files with {PREFERENCES}")
        yield from _external(source, split, stats if stats is not None else ReadStats(), _preference)


def _external(
    source: Source, split: str, stats: ReadStats, reader: Callable[[Mapping[str, Any]], T | None]
) -> Iterator[T]:
    """Read files or a hub data set and keep one split. reader: record -> what is yielded, None = of no known layout."""
    items = ((item, _content(item).encode()) for item in _read(source, stats, reader))
    tagged = sources.balance(sources.with_split(items, VAL_FRAC), {})
    return (doc.item for doc in tagged if doc.split == split)


def _content(item: Any) -> str:
    """Write what an item holds as JSON; a call only where there is one, so that the split of others stays as it was."""
    if isinstance(item[0], tuple):
        return json.dumps([_content(side) for side in item])
    return json.dumps([(m.role, m.content, *([m.tool_call] if m.tool_call else [])) for m in item], ensure_ascii=False)


def _mendable(records: Iterator[Record]) -> Iterator[Record]:
    """Pass records on; damage is to be mended, as no command leaves out broken conversations."""
    try:
        yield from records
    except DamagedError as error:
        raise DamagedError(str(error).partition("; data_fetch")[0]) from error


def _read(source: Source, stats: ReadStats, reader: Callable[[Mapping[str, Any]], T | None]) -> Iterator[T]:
    """Yield what `reader` makes of the records; the first record of a file must have a known layout."""
    path = None
    for record in _mendable(sources.file_records(source, stats)):
        if isinstance(record.value, str):
            raise ValueError(f"{record.where} is plain text; fine-tuning needs conversations as .jsonl with {LAYOUTS}")
        try:
            item = reader(record.value)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            if not stats.skipped["no proper conversation"]:
                why = f"no key {error}" if isinstance(error, KeyError) else error
                log.warning("%s is no proper conversation: %s", record.where, why)
            stats.skip("no proper conversation")
        else:
            if item is not None:
                yield item
            elif record.path != path:
                keys, wanted = ", ".join(sorted(record.value)) or "none", LAYOUTS if reader is read_one else PREFERENCES
                raise ValueError(f"{record.where} has keys {keys}; expected {wanted}")
            else:
                stats.skip("of no known layout")
        path = record.path


def read_one(value: Mapping[str, Any]) -> Conversation | None:
    """Read a record of any layout, None if it is of none; raises ValueError and the like if it is broken."""
    found = _listed(value)
    pair = next((p for p in PAIRS if {p[0], p[2]} <= value.keys()), None)
    if found is not None:
        conversation = make_conversation(_system(value) + _turns(found))
    elif pair is not None:
        conversation = make_conversation(_question(value, *pair[:2]) + _turns(value[pair[2]]))
    elif any(name in value for name in TURN_LISTS):
        raise ValueError("the turns are no list")
    else:
        return None
    if not any(m.role == "assistant" for m in conversation):
        raise ValueError("without an answer")
    for message in conversation:
        if message.role == "assistant" and not (message.content.strip() or message.tool_call):
            raise ValueError("it would teach to answer with nothing")
        f"{message.content}{message.tool_call}".encode()  # UnicodeEncodeError, a ValueError, for lone surrogates
    return conversation


def _preference(value: Mapping[str, Any]) -> Preference | None:
    if not {"chosen", "rejected"} <= value.keys():
        return None
    asked = _system(value) + _turns(turns) if (turns := _listed(value)) is not None else []
    question = next((p for p in PAIRS if p[0] in value), None)
    if not asked and question:
        asked = _question(value, *question[:2])
    sides = []
    for name in ("chosen", "rejected"):
        turns = _turns(value[name])
        whole = read_one({"messages": turns if turns[0]["role"] != "assistant" else asked + turns})
        assert whole is not None
        sides.append(whole)
    better, worse = sides
    if better[:-1] != worse[:-1] or better[-1] == worse[-1] or better[-1].role != "assistant":
        raise ValueError("the two conversations must differ in the last answer, and in nothing else")
    return better, worse


def _listed(value: Mapping[str, Any]) -> list[Any] | None:
    return next((value[name] for name in TURN_LISTS if isinstance(value.get(name), list)), None)


def _turns(turns: Any) -> list[dict[str, Any]]:
    """Bring a list of turns, one turn, or the text of an answer to {"role", "content"}."""
    if isinstance(turns, str):
        return [{"role": "assistant", "content": turns}]
    found = []
    for turn in [turns] if isinstance(turns, Mapping) else turns:
        if {"human", "assistant"} <= turn.keys():
            found += [{"role": "user", "content": turn["human"]}, {"role": "assistant", "content": turn["assistant"]}]
            continue
        role, content = (turn["from"], turn["value"]) if "from" in turn else (turn["role"], turn.get("content"))
        made = {**turn, "role": ROLES.get(role, role), "content": content}
        if isinstance(turn.get("tool_calls"), str):
            made["tool_calls"] = json.loads(turn["tool_calls"] or "[]")
        if role == "function_call":
            made |= {"content": "", "tool_calls": [{"function": json.loads(str(content))}]}
        found.append(made)
    return found


def _system(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the system prompt that stands beside the turns, unless they have their own."""
    text, turns = value.get("system"), _listed(value)
    own = turns and turns[0].get("role", turns[0].get("from")) == "system"
    return [{"role": "system", "content": text}] if isinstance(text, str) and text.strip() and not own else []


def _question(value: Mapping[str, Any], question: str, extra: str) -> list[dict[str, Any]]:
    """Build what comes before an answer: system prompt, `history` of [question, answer] pairs, question and input."""
    asked, more = value[question], value.get(extra) if extra else None
    if isinstance(asked, list):
        return _system(value) + _turns(asked)
    if isinstance(more, str) and more.strip():
        asked = f"{asked}\n{more}" if asked else more
    turns = _system(value)
    for before in value.get("history") or []:
        turns += [{"role": "user", "content": before[0]}, {"role": "assistant", "content": before[1]}]
    return [*turns, {"role": "user", "content": asked}]
