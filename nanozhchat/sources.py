"""Data specs -> one stream of documents, split into training and validation by the content of each document.

A spec is `builtin`, `builtin:<part>`, a path, glob or directory, `hf:<dataset>[:<config>[:<split>]]`, or a preset's
name; `SPEC@WEIGHT` mixes by bytes of text, or by tokens where a tokenizer is at hand. Without weights everything is
read; with weights the ratio is kept and the stream ends when one source ends. Built-in text is endless, and made for
its split by the generator itself.
"""

import hashlib
import heapq
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from nanozhchat import hub, records
from nanozhchat.cleaning import Cleaner
from nanozhchat.presets import presets
from nanozhchat.records import NoFieldError, ReadStats, Record, choose_field

T = TypeVar("T")
Pair = tuple[str, bytes]  # a text, and the same as UTF-8
VAL_FRAC = 0.01  # of documents, by hash
BUILTIN_VAL_FRAC = 1 / 49  # of bytes: one part validation to 48 parts training
SPLITS = ("train", "val")
WEIGHTED = re.compile(r"(.+)@(-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")


@dataclass(frozen=True)
class Source:
    """One parsed spec. kind: "builtin", "files" or "hub"; name: the parts, the pattern, or the hub id."""

    spec: str
    kind: str
    name: str
    weight: float | None = None
    config: str | None = None
    split: str = "train"
    files: str | None = None
    columns: tuple[str, ...] | None = None
    revision: str = "main"

    @property
    def endless(self) -> bool:
        """Whether the source never runs out."""
        return self.kind == "builtin"


class Document(NamedTuple):
    """A text or a conversation, and where it belongs. data: its content as UTF-8; key: 64-bit hash of that."""

    split: str
    item: Any
    data: bytes
    key: int


def resolve_specs(specs: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the specs given, else those of $DATA_PATH (split at blanks unless it is one path), else ("builtin",)."""
    if specs:
        return tuple(specs)
    value = os.environ.get("DATA_PATH", "").strip() or "builtin"
    return (value,) if Path(value).expanduser().exists() else tuple(value.split())


def parse(spec: str) -> Source:
    """Parse one spec; raises ValueError for an empty one, a weight that is not positive, or a malformed `hf:`."""
    weight = None
    name = spec.strip()
    match = WEIGHTED.fullmatch(name)
    if match and not Path(name).exists():
        name, weight = match[1], float(match[2])
        if not 0 < weight < float("inf"):
            raise ValueError(f"--data={spec}: the weight after @ must be above 0")
    if not name:
        raise ValueError("--data is empty; name a file, a directory, hf:<dataset>, a preset or builtin")
    if name == "builtin" or name.startswith("builtin:"):
        return Source(spec, "builtin", name.partition(":")[2], weight)
    if name.startswith("hf:"):
        hub_id, config, split, *rest = [*name[3:].split(":"), "", ""]
        if not hub_id or any(rest):
            raise ValueError(f"--data={spec}: expected hf:<dataset>[:<config>[:<split>]]")
        return Source(spec, "hub", hub_id, weight, config or None, split or "train")
    if p := presets().get(name):
        return Source(spec, "hub", p.hub_id, weight, p.config, p.split, p.files, p.columns, p.revision)
    return Source(spec, "files", name, weight)


def content_key(data: bytes) -> int:
    """Hash a document's UTF-8 bytes to 64 bits; the same on every machine and in every version."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def mix(streams: Sequence[tuple[Source, Iterator[T]]], size: Callable[[T], int], state: dict[str, Any]) -> Iterator[T]:
    """Merge streams so that sizes follow the weights, deterministically; see the module's docstring for the end.

    state: kept up to date with what was given out; with that of an earlier reading it goes on from there.
    """
    weighted = any(source.weight is not None for source, _ in streams)
    ends = any(not source.endless for source, _ in streams)
    state.setdefault("finite_left", sum(not source.endless for source, _ in streams))
    # [bytes so far / weight, stream]
    queue: list[list[Any]] = state.setdefault("queue", [[0.0, i] for i in range(len(streams))])
    while queue and not (ends and state["finite_left"] == 0):
        used, i = queue[0]
        source, stream = streams[i]
        item = next(stream, None)
        if item is None:
            heapq.heappop(queue)
            state["finite_left"] -= not source.endless
            if weighted:
                return
            continue
        heapq.heapreplace(queue, [used + size(item) / (source.weight or 1.0), i])
        yield item


def balance(documents: Iterator[Document], state: dict[str, Any]) -> Iterator[Document]:
    """Pass documents on, but give an otherwise empty split one: the smallest hash to val, or the largest to train.

    Holds back one document (and its copies) until the other split has been seen; from then on `state["balanced"]`
    is true. A single document stays alone.
    """
    held: list[Document] = []
    passed = 0
    for doc in documents:
        if state.get("balanced") or (held and doc.split != held[0].split):
            yield from held
            yield doc
            state["balanced"] = True
            yield from documents
            return
        if held and doc.key == held[0].key:
            held.append(doc)
        elif not held or (doc.key < held[0].key) == (doc.split == "train"):
            passed += len(held)
            yield from held
            held = [doc]
        else:
            passed += 1
            yield doc
    for doc in held:
        other = "val" if doc.split == "train" else "train"
        yield doc._replace(split=other) if passed else doc


def data_set(source: Source) -> hub.DataSet:
    """Return the hub's data set that a "hub" source names."""
    return hub.DataSet(source.name, source.config, source.split, source.files, source.revision, source.spec)


def _readers(
    source: Source, part: tuple[int, int] | None = None, **options: Any
) -> list[Callable[[], Iterator[Record]]]:
    """Return what reads each file of a source, or all rows of a data set that must be streamed."""
    paths: list[Callable[[], Path]]
    if source.kind == "files":
        paths = [partial(Path, path) for path in records.expand(source.name)]
    elif (remote := data_set(source)).readable():
        paths = [partial(remote.fetch, name) for name in remote.listing()["files"]]
    elif part is None:
        return [lambda: (Record(row, source.spec, number) for number, row in enumerate(remote.rows(), 1))]
    else:
        raise ValueError(f"--shard-of shares out files, and {source.spec} is streamed; fetch it without --shard-of")
    k, n = part or (1, 1)
    if not 1 <= k <= n:
        raise ValueError(f"--shard-of={k}/{n}: expected K/N with K from 1 to N")
    if n > len(paths):
        raise ValueError(f"--shard-of={k}/{n}: {source.spec} has only {len(paths)} files to share; use fewer shares")
    share = paths[len(paths) * (k - 1) // n : len(paths) * k // n]  # one after the other, the shares are the whole
    return [lambda path=path: records.read_file(path(), **options) for path in share]


def file_records(source: Source, stats: ReadStats) -> Iterator[Record]:
    """Read the records of a "files" or "hub" source."""
    for read in _readers(source, stats=stats):
        yield from read()


def _go_on(rows: Iterator[T], place: dict[str, Any], stats: ReadStats) -> Iterator[T]:
    """Count rows in `place`; those counted there already are read once more, unseen."""
    before = stats.skipped.copy()
    if done := place.setdefault("row", 0):
        next(itertools.islice(rows, done - 1, done), None)
        stats.skipped = before
    for row in rows:
        place["row"] += 1
        yield row


def _texts(
    source: Source, text_field: str | None, stats: ReadStats, skip_bad: bool, place: dict[str, Any],
    part: tuple[int, int] | None,
) -> Iterator[Any]:  # fmt: skip
    """Yield what stands in the text field, not yet checked. place: where to begin; it moves with the reading."""
    if source.kind == "hub":
        if source.columns and len(source.columns) > 1:
            raise ValueError(f"{source.spec} holds conversations, not plain text; use it with scripts.chat_sft --data")
        text_field = text_field or (source.columns[0] if source.columns else None)
    choose = partial(choose_field, text_field)
    readers = _readers(source, part, stats=stats, skip_bad=skip_bad, choose=choose)
    for number in range(place.get("file", 0), len(readers)):
        before = stats.skipped.copy()
        if place.get("file", 0) != number:
            place.clear()
        place["file"] = number
        try:
            for row in _go_on(readers[number](), place, stats):
                if isinstance(row.value, dict) and "field" not in place:
                    place["field"] = choose(row)
                yield row.value.get(place["field"]) if isinstance(row.value, dict) else row.value
        except NoFieldError:
            if not skip_bad or len(readers) == 1:
                raise
            stats.skip("file without the field")
        else:
            if not place["row"] and stats.skipped == before:
                stats.skip("empty file")


def with_split(items: Iterable[tuple[T, bytes]], val_frac: float = VAL_FRAC) -> Iterator[Document]:
    """Give items their split by their content, the bytes."""
    for item, data in items:
        key = content_key(data)
        yield Document("val" if key < val_frac * 2**64 else "train", item, data, key)


def _cleaned(
    read: Callable[[ReadStats, dict[str, Any]], Iterator[Pair]], clean: Cleaner, stats: ReadStats, place: dict[str, Any]
) -> Iterator[Pair]:
    """Clean texts that are read ahead; stats and place follow what comes out."""
    ahead, ahead_place = ReadStats(), dict(place)

    def pairs() -> Iterator[tuple[str | None, tuple[dict[str, Any], Counter[str]]]]:
        for text in itertools.chain((text for text, _ in read(ahead, ahead_place)), [None]):
            skipped, ahead.skipped = ahead.skipped, Counter()
            yield text, (dict(ahead_place), skipped)

    for text, (now, skipped) in clean.run(pairs()):
        place.clear()
        place.update(now)
        stats.skipped.update(skipped)
        if text:
            yield text, text.encode()


def builtin_parts(name: str) -> tuple[str, ...] | None:
    """Split the `a,b` of `builtin:a,b`; None means all. The generator refuses names it does not know."""
    return tuple(part for part in name.split(",") if part) or None


def _builtin(source: Source, seed: int, split: str | None) -> Iterator[Document]:
    """Generate documents of one split, or of both in the proportion BUILTIN_VAL_FRAC."""
    from nanozhchat import builtin

    parts = builtin_parts(source.name)
    streams = {s: builtin.documents(seed, split=s, parts=parts) for s in SPLITS if split in (None, s)}
    totals = dict.fromkeys(SPLITS, 0)
    while True:
        due = totals["val"] < BUILTIN_VAL_FRAC * (totals["train"] + totals["val"])
        chosen = split or ("val" if due else "train")
        text = next(streams[chosen])
        data = text.encode()
        totals[chosen] += len(data)
        yield Document(chosen, text, data, 2**63)  # the key is never needed: both splits exist from the start


def tagged(
    specs: Sequence[str], *, text_field: str | None = None, stats: ReadStats | None = None, seed: int = 0,
    skip_bad: bool = False, builtin_split: str | None = None, max_bytes: int | None = None,
    clean: Cleaner | None = None, part: tuple[int, int] | None = None, state: dict[str, Any] | None = None,
    weigh: Callable[[str], int] | None = None,
) -> Iterator[Document]:  # fmt: skip
    """Read all documents of the specs, each with its split: what a corpus is built from.

    max_bytes: limit on both splits together; it comes before `balance`, so that a limited reading has both splits.
    clean: changes a text of files or hub, or drops it (None). part: (k, n) = the k-th of n shares of the files.
    state: plain types that follow the reading; given those of an earlier one (once "balanced"), it goes on from there.
    weigh: what weights go by, such as tokens; bytes without it.
    """
    stats = stats if stats is not None else ReadStats()
    state = {} if state is None else state
    streams = []

    def read(source: Source, stats: ReadStats, place: dict[str, Any]) -> Iterator[Pair]:
        return records.documents(_texts(source, text_field, stats, skip_bad, place, part), stats)

    for number, source in enumerate(map(parse, resolve_specs(specs))):
        place = state.setdefault("places", {}).setdefault(str(number), {})
        if source.kind == "builtin":
            streams.append((source, _go_on(_builtin(source, seed, builtin_split), place, stats)))
        else:
            texts = _cleaned(partial(read, source), clean, stats, place) if clean else read(source, stats, place)
            streams.append((source, with_split(texts)))
    merged = mix(streams, lambda d: weigh(d.item) if weigh else len(d.data), state)
    merged = _limited(merged, max_bytes, state)
    if builtin_split is not None or part is not None:  # one split of built-in text alone, or a share of the files
        state["balanced"] = True
        yield from merged
    else:
        yield from balance(merged, state)


def _limited(docs: Iterator[Document], max_bytes: int | None, state: dict[str, Any]) -> Iterator[Document]:
    """Stop before the document that would exceed the limit, but never before the first."""
    for doc in docs:
        total = state["bytes"] = state.get("bytes", 0) + len(doc.data)
        if max_bytes is not None and total > max_bytes and total > len(doc.data):
            return
        yield doc


def documents(
    specs: Sequence[str], split: str, *, text_field: str | None = None, max_bytes: int | None = None
) -> Iterator[str]:
    """Read the documents of one split ("train" or "val"), at most `max_bytes` of them (but at least one)."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; splits are train and val")
    resolved = resolve_specs(specs)
    only = split if all(parse(spec).endless for spec in resolved) else None
    docs = tagged(resolved, text_field=text_field, builtin_split=only)
    for doc in _limited((doc for doc in docs if doc.split == split), max_bytes, {}):
        yield doc.item


def inputs(specs: Sequence[str]) -> list[dict[str, Any]]:
    """Describe what the specs stand for right now: files with size and time, the generator's version, hub ids."""
    described: list[dict[str, Any]] = []
    for source in map(parse, specs):
        if source.kind == "builtin":
            described.append({"builtin": source.name, "version": _builtin_version()})
        elif source.kind == "hub":
            where = {"config": source.config, "split": source.split, "files": source.files, "revision": source.revision}
            described.append({"hub": source.name, **where})
        else:
            for path in records.expand(source.name):
                stat = path.stat()
                described.append({"file": str(path.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns})
    return described


def _builtin_version() -> str:
    """Hash the generator's sources and word lists: other code makes other text."""
    from nanozhchat import builtin

    root = Path(str(builtin.__file__)).parent
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()
