"""Data specs -> one stream of documents, split into training and validation by the content of each document.

A spec is `builtin`, `builtin:<part>`, a path, glob or directory, `hf:<dataset>[:<config>[:<split>]]`, or a preset's
name; `SPEC@WEIGHT` mixes by bytes of text. Without weights everything is read; with weights the ratio is kept and
the stream ends when one source ends. Built-in text is endless, and made for its split by the generator itself.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from nanozhchat import records
from nanozhchat.errors import DiskError
from nanozhchat.presets import presets
from nanozhchat.records import MAX_DOCUMENT_BYTES, ReadStats, Record

T = TypeVar("T")
VAL_FRAC = 0.01  # of documents, by hash
BUILTIN_VAL_FRAC = 1 / 49  # of bytes: one part validation to 48 parts training
TEXT_FIELDS = ("text", "content")
PROBE_TIMEOUT_S = 10.0  # for the first answer of the hub; its own retries take minutes
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

    @property
    def endless(self) -> bool:
        """Whether the source never runs out."""
        return self.kind == "builtin"


class Document(NamedTuple):
    """A document and where it belongs. key: 64-bit hash of the content."""

    split: str
    text: str
    n_bytes: int
    key: int


def resolve_specs(specs: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the specs given, else those of $DATA_PATH (split at blanks unless it is one path), else ("builtin",)."""
    if specs:
        return tuple(specs)
    value = os.environ.get("DATA_PATH", "").strip()
    if not value:
        return ("builtin",)
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
    if preset := presets().get(name):
        return Source(spec, "hub", preset.hub_id, weight, preset.config, preset.split, preset.files, preset.columns)
    return Source(spec, "files", name, weight)


def content_key(data: bytes) -> int:
    """Hash a document's UTF-8 bytes to 64 bits; the same on every machine and in every version."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def mix(streams: Sequence[tuple[Source, Iterator[T]]], size: Callable[[T], int]) -> Iterator[T]:
    """Merge streams so that sizes follow the weights, deterministically; see the module's docstring for the end."""
    weighted = any(source.weight is not None for source, _ in streams)
    finite_left = sum(not source.endless for source, _ in streams)
    ends = finite_left > 0
    queue = [(0.0, i) for i in range(len(streams))]  # (bytes so far / weight, stream)
    while queue and not (ends and finite_left == 0):
        used, i = queue[0]
        source, stream = streams[i]
        item = next(stream, None)
        if item is None:
            heapq.heappop(queue)
            finite_left -= not source.endless
            if weighted:
                return
            continue
        yield item
        heapq.heapreplace(queue, (used + size(item) / (source.weight or 1.0), i))


def balance(documents: Iterator[Document]) -> Iterator[Document]:
    """Pass documents on, but give an otherwise empty split one: the smallest hash to val, or the largest to train.

    Holds back one document (and its copies) until the other split has been seen. A single document stays alone.
    """
    held: list[Document] = []
    passed = 0
    for doc in documents:
        if held and doc.split != held[0].split:
            yield from held
            yield doc
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


def file_records(source: Source, *, stats: ReadStats, skip_bad: bool = False) -> Iterator[Record]:
    """Read the records of a "files" or "hub" source."""
    if source.kind == "hub":
        yield from _hub_records(source)
        return
    for path in records.expand(source.name):
        yield from records.read_file(path, stats=stats, skip_bad=skip_bad)


def _hub_records(source: Source) -> Iterator[Record]:
    """Stream a data set of the hub; one-line errors for an unknown name, an unreachable hub, a broken connection."""
    rows = iter(_open_hub(source))
    number = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # the library lets through errors of a dozen others: network, parsers, codecs
            raise DiskError(
                f"{source.spec}: reading stopped after {number:,} rows ({_first_line(error)}); run the command again"
            ) from error
        if row is None:
            return
        number += 1
        yield Record(row, source.spec, number)


def _open_hub(source: Source) -> Iterable[dict[str, Any]]:
    import datasets
    from huggingface_hub import HfApi, constants

    offline = constants.HF_HUB_OFFLINE
    options: dict[str, Any] = {"split": source.split, "streaming": not offline}
    if source.files:
        options["data_files"] = source.files
    try:
        if not offline:
            HfApi().dataset_info(source.name, timeout=PROBE_TIMEOUT_S)  # fails fast, where loading retries for long
        return datasets.load_dataset(source.name, source.config, **options)
    except Exception as error:  # same reason as above
        if offline:
            remedy = "HF_HUB_OFFLINE is set and it is not in the local cache: unset it, or pass a local file or builtin"
            raise ValueError(f"{source.spec}: {remedy}") from error
        reason = f"cannot read {source.name} from {constants.ENDPOINT} ({_first_line(error)})"
        remedy = "check the name and the network, set HF_TOKEN if it is gated, HF_ENDPOINT for a mirror, or use builtin"
        raise DiskError(f"{source.spec}: {reason}; {remedy}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def choose_field(record: Record, text_field: str | None) -> str:
    """Return the field that holds the text: the one asked for, else `text`, else `content`."""
    wanted = (text_field,) if text_field else TEXT_FIELDS
    for name in wanted:
        if name in record.value:
            return name
    found = ", ".join(sorted(record.value)) or "none"
    problem = f"no field {text_field!r}" if text_field else "no field text or content"
    raise ValueError(f"{record.where} has {problem}; fields found: {found}; choose one with --text-field")


def _texts(source: Source, text_field: str | None, stats: ReadStats, skip_bad: bool) -> Iterator[Any]:
    """Yield what stands in the text field, not yet checked."""
    if source.kind == "hub":
        if source.columns and len(source.columns) > 1:
            raise ValueError(f"{source.spec} holds conversations, not plain text; use it with scripts.chat_sft --data")
        text_field = text_field or (source.columns[0] if source.columns else None)
        yield from _field_values(_hub_records(source), text_field)
        return
    for path in records.expand(source.name):
        columns = None
        if records.kind_of(path) == ".parquet":
            names = Record(dict.fromkeys(records.parquet_columns(path)), str(path), 0)
            columns = [choose_field(names, text_field)]
        rows = records.read_file(path, stats=stats, skip_bad=skip_bad, columns=columns)
        yield from _field_values(rows, text_field)


def _field_values(rows: Iterator[Record], text_field: str | None) -> Iterator[Any]:
    name = ""
    for row in rows:
        if isinstance(row.value, str):
            yield row.value
            continue
        name = name or choose_field(row, text_field)
        yield row.value.get(name)


def _checked(texts: Iterator[Any], stats: ReadStats) -> Iterator[Document]:
    """Leave out and count what is no document; give the others their split."""
    for text in texts:
        if not isinstance(text, str):
            stats.skip("null" if text is None else "not a string")
        elif not text or text.isspace():
            stats.skip("empty")
        else:
            try:
                data = text.encode()
            except UnicodeEncodeError:  # lone surrogates from JSON escapes
                stats.skip("not UTF-8")
                continue
            if len(data) > MAX_DOCUMENT_BYTES:
                stats.skip("too long")
                continue
            key = content_key(data)
            yield Document("val" if key < VAL_FRAC * 2**64 else "train", text, len(data), key)


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
        n_bytes = len(text.encode())
        totals[chosen] += n_bytes
        yield Document(chosen, text, n_bytes, 2**63)  # the key is never needed: both splits exist from the start


def tagged(
    specs: Sequence[str], *, text_field: str | None = None, stats: ReadStats | None = None, seed: int = 0,
    skip_bad: bool = False, builtin_split: str | None = None, max_bytes: int | None = None,
) -> Iterator[Document]:  # fmt: skip
    """Read all documents of the specs, each with its split: what a corpus is built from.

    max_bytes: limit on both splits together; it comes before `balance`, so that a limited reading has both splits.
    """
    stats = stats if stats is not None else ReadStats()
    streams = []
    for source in map(parse, resolve_specs(specs)):
        if source.kind == "builtin":
            streams.append((source, _builtin(source, seed, builtin_split)))
        else:
            streams.append((source, _checked(_texts(source, text_field, stats, skip_bad), stats)))
    merged = _limited(mix(streams, lambda d: d.n_bytes), max_bytes)
    # With one split of built-in text alone there is no other split to wait for.
    yield from merged if builtin_split is not None else balance(merged)


def _limited(docs: Iterator[Document], max_bytes: int | None) -> Iterator[Document]:
    """Stop before the document that would exceed the limit, but never before the first."""
    total = 0
    for doc in docs:
        total += doc.n_bytes
        if max_bytes is not None and total > max_bytes and total > doc.n_bytes:
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
    for doc in _limited((doc for doc in docs if doc.split == split), max_bytes):
        yield doc.text


def inputs(specs: Sequence[str]) -> list[dict[str, Any]]:
    """Describe what the specs stand for right now: files with size and time, the generator's version, hub ids."""
    described: list[dict[str, Any]] = []
    for source in map(parse, specs):
        if source.kind == "builtin":
            described.append({"builtin": source.name, "version": _builtin_version()})
        elif source.kind == "hub":
            where = {"config": source.config, "split": source.split, "files": source.files}
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
