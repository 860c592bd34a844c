"""Data files of any supported kind -> records: JSON objects, or blocks of plain text, one at a time.

Kinds: .txt, .jsonl and .json (lines or one array), each plain, .gz or .zst; .parquet. Reading streams: memory is
bounded by the largest single record. What is broken raises DamagedError naming file and line, or is counted
when the caller asked to skip it.
"""

import glob
import io
import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanozhchat.errors import DamagedError

log = logging.getLogger(__name__)

MAX_DOCUMENT_BYTES = 32 << 20
MAX_LINE_BYTES = 3 * MAX_DOCUMENT_BYTES  # a Han character takes 3 bytes, its JSON escape 6; plus the other fields
BLOCK_CHARS = 1_000  # blank-line separated blocks of .txt are joined up to this size
BLOCK_MAX_CHARS = 4_000  # a .txt without blank lines is cut at the line end after so many
READ_BYTES = 1 << 20
ODD_LINES = 10  # so many lines that are not UTF-8 for a good record: the file as a whole is something else
KINDS = (".txt", ".jsonl", ".json", ".parquet")
TEXT_FIELDS = ("text", "content")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # what Arrow calls them
OWN_FILES = ("manifest.json", "building.json")  # beside the shards of our own corpora, which can be read like others
KINDS_TEXT = ".txt, .jsonl or .json (each plain, .gz or .zst), or .parquet"


@dataclass
class ReadStats:
    """What was left out, by reason; filled while reading."""

    skipped: Counter[str] = field(default_factory=Counter)

    def skip(self, reason: str) -> None:
        """Count one skipped document, line or file."""
        self.skipped[reason] += 1

    def summary(self) -> str:
        """Describe the skipped ones, such as "2 empty, 1 not UTF-8"; "" if there were none."""
        return ", ".join(f"{n:,} {reason}" for reason, n in sorted(self.skipped.items()))


@dataclass(frozen=True, slots=True)
class Record:
    """One record and where it stands. value: a JSON object, or a string for plain text; number: line or row, from 1."""

    value: Any
    path: str
    number: int

    @property
    def where(self) -> str:
        """Name the place for an error message."""
        return f"{self.path}:{self.number}"


def kind_of(path: Path) -> str:
    """Return ".txt", ".jsonl", ".json" or ".parquet"; "" when the name is of no supported kind."""
    packed = path.suffix.lower() in COMPRESSIONS
    kind = (path.with_suffix("") if packed else path).suffix.lower()
    return kind if kind in (KINDS[:3] if packed else KINDS) else ""


def expand(pattern: str) -> list[Path]:
    """Return the supported files that a path, a directory or a glob (`**` allowed) names, sorted.

    Raises ValueError when there are none. Hidden files and unsupported kinds inside directories are left out.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        if not kind_of(path):
            raise ValueError(f"{pattern} is of no supported kind; rename or convert it to {KINDS_TEXT}")
        return [path]
    if path.is_dir():
        found = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    elif glob.has_magic(str(path)):
        found = [*map(Path, glob.iglob(str(path), recursive=True))]
    else:
        raise ValueError(f"{pattern} does not exist: no such file, directory, preset or source in {Path.cwd()}")
    files = sorted(p for p in found if kind_of(p) and p.name not in OWN_FILES and p.is_file())
    if not files:
        raise ValueError(f"{pattern} matches no data file in {Path.cwd()}; expected {KINDS_TEXT}")
    return files


def read_file(
    path: Path, *, stats: ReadStats, skip_bad: bool = False, choose: Callable[[Record], str] | None = None
) -> Iterator[Record]:
    """Read one file record by record. choose: names the only column needed of a parquet file (all when None).

    Raises DamagedError for a torn or broken file or line; with `skip_bad` these are counted in `stats` instead.
    """
    readers = {".txt": _read_text, ".jsonl": _read_lines, ".json": _read_json}
    try:
        if kind_of(path) == ".parquet":
            yield from _read_parquet(path, choose)
            return
        try:
            before, kept = stats.skipped["not UTF-8"], 0
            with open_bytes(path) as handle:
                for record in readers[kind_of(path)](handle, path, stats, skip_bad):
                    kept += 1
                    yield record
            if (lines := stats.skipped["not UTF-8"] - before) > ODD_LINES * kept:
                names = map(shlex.quote, (str(path), f"utf8-{path.name}"))
                log.warning("%s: %d lines left out, which are not UTF-8; if the file is GBK, convert it: "
                            "iconv -f GB18030 -t UTF-8 %s > %s", path, lines, *names)  # fmt: skip
        except OSError as error:
            if error.errno is not None:  # of the operating system, not of the decompressor
                raise
            raise _damaged(path, None, f"not a whole {path.suffix} file: {error}") from error
    except DamagedError:
        if not skip_bad:
            raise
        stats.skip("damaged file")


def open_bytes(path: Path) -> io.BufferedReader:
    """Open a plain, .gz or .zst file for reading its uncompressed bytes; reading a torn one raises OSError."""
    codec = COMPRESSIONS.get(path.suffix.lower())
    if codec is None:
        return open(path, "rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=codec), READ_BYTES)


def _damaged(path: Path, number: int | None, reason: str) -> DamagedError:
    place = f"{path}:{number}" if number else str(path)
    return DamagedError(f"{place} is damaged ({reason}); mend the file; data_fetch --skip-bad leaves out such text")


def _lines(handle: io.BufferedReader, stats: ReadStats) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line without its ending); lines over the limit are skipped and counted."""
    number = 0
    while line := handle.readline(MAX_LINE_BYTES):
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) >= MAX_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = handle.readline(READ_BYTES)
            stats.skip("too long")
            continue
        yield number, line.rstrip(b"\r\n")


def _read_text(handle: io.BufferedReader, path: Path, stats: ReadStats, skip_bad: bool) -> Iterator[Record]:
    """Blocks between blank lines, joined up to BLOCK_CHARS: a novel's chapters, or pages of short paragraphs."""
    parts: list[str] = []
    size = first = 0
    for number, raw in _lines(handle, stats):
        try:
            line = raw.decode()
        except UnicodeDecodeError:
            stats.skip("not UTF-8")
            continue
        if size >= (BLOCK_MAX_CHARS if line.strip() else BLOCK_CHARS):
            yield Record("\n".join(parts).removesuffix("\n"), str(path), first)
            parts, size = [], 0
        if line.strip():
            first = first if parts else number
            parts.append(line)
            size += len(line)
        elif parts and parts[-1]:
            parts.append("")
    if parts:
        yield Record("\n".join(parts).removesuffix("\n"), str(path), first)


def _read_lines(handle: io.BufferedReader, path: Path, stats: ReadStats, skip_bad: bool) -> Iterator[Record]:
    for number, line in _lines(handle, stats):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode())
            if not isinstance(value, dict):
                raise ValueError(f"expected a JSON object, found {type(value).__name__}")
        except UnicodeDecodeError:
            stats.skip("not UTF-8")
        except (ValueError, RecursionError) as error:
            if not skip_bad:
                raise _damaged(path, number, f"not a JSON object: {error}") from error
            stats.skip("broken line")
        else:
            yield Record(value, str(path), number)


def _read_json(handle: io.BufferedReader, path: Path, stats: ReadStats, skip_bad: bool) -> Iterator[Record]:
    """Read lines, or one array of objects, told apart by the first character."""
    if handle.peek(READ_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"[":
        yield from _read_lines(handle, path, stats, skip_bad)
        return
    text = io.TextIOWrapper(handle, encoding="utf-8-sig")
    number = 0
    try:
        for number, value in enumerate(_array_items(text), start=1):
            if not isinstance(value, dict):
                raise ValueError(f"expected a JSON object, found {type(value).__name__}")
            yield Record(value, str(path), number)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise _damaged(path, number + 1, f"in the array: {error}") from error


def _array_items(text: io.TextIOBase) -> Iterator[Any]:
    """Decode a JSON array item by item, so that a file of gigabytes needs the memory of one item."""
    decoder = json.JSONDecoder()
    between = re.compile(r"[ \t\r\n,]*")
    buffer = text.read(READ_BYTES)
    at = buffer.index("[") + 1
    while True:
        at = between.match(buffer, at).end()  # type: ignore[union-attr]
        if buffer.startswith("]", at):
            return
        try:
            value, end = decoder.raw_decode(buffer, at)
            if end == len(buffer):  # a number may go on in the next chunk
                raise ValueError("it ends within the array")
        except ValueError:
            rest = buffer[at:]
            more = text.read(max(READ_BYTES, len(rest)))  # doubling keeps a long item linear
            if not more or len(rest) > MAX_LINE_BYTES:
                raise
            buffer, at = rest + more, 0
            continue
        yield value
        at = end


def _read_parquet(path: Path, choose: Callable[[Record], str] | None) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as table:
            names = Record(dict.fromkeys(table.schema_arrow.names), str(path), 0)
            batches = table.iter_batches(batch_size=1024, columns=[choose(names)] if choose else None)
            for number, value in enumerate((value for batch in batches for value in batch.to_pylist()), start=1):
                yield Record(value, str(path), number)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise _damaged(path, number + 1 if number else None, f"parquet: {reason}") from error
    except UnicodeDecodeError as error:
        raise _damaged(path, number + 1, "text that is not UTF-8") from error


class NoFieldError(ValueError):
    """Records without the text's field."""


def choose_field(text_field: str | None, record: Record) -> str:
    """Return the field that holds the text: the one asked for, else `text`, else `content`."""
    for name in (text_field,) if text_field else TEXT_FIELDS:
        if name in record.value:
            return name
    found = ", ".join(sorted(record.value)) or "none"
    problem = f"no field {text_field!r}" if text_field else "no field text or content"
    remedy = "conversations are for scripts.chat_sft" if "messages" in record.value else "choose one with --text-field"
    raise NoFieldError(f"{record.where} has {problem}; fields found: {found}; {remedy}")


def documents(values: Iterator[Any], stats: ReadStats) -> Iterator[tuple[str, bytes]]:
    """Yield documents, as text and as UTF-8; leave out and count what is none."""
    for text in values:
        if not isinstance(text, str):
            stats.skip("null" if text is None else "not a string")
        elif not text or text.isspace():
            stats.skip("empty")
        else:
            try:
                if len(data := text.encode()) > MAX_DOCUMENT_BYTES:
                    stats.skip("too long")
                else:
                    yield text, data
            except UnicodeEncodeError:  # lone surrogates from JSON escapes
                stats.skip("not UTF-8")
