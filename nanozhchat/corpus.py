"""Text shards: any data specs -> `corpus/<name>/` of parquet files, split into train and val, and a manifest.

The manifest is written last and removed first: a folder without one holds no corpus. The same specs over the same
inputs are reused, a build that was cut off goes on after its last whole shard; anything else is built again.
"""

import hashlib
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nanozhchat import files, paths, sources
from nanozhchat.cleaning import Cleaner
from nanozhchat.errors import DamagedError
from nanozhchat.records import ReadStats

FORMAT_VERSION = 1
SHARD_BYTES = 64 << 20  # of text
ROW_GROUP_BYTES = 4 << 20  # of text: what a reader holds at once
READ_ROWS = 1024  # documents handed on at once
BUILTIN_BYTES = 49_000_000  # how much endless text is made when no limit is given: 48 MB train, 1 MB val
REPORT_BYTES = 50_000_000  # between two lines of progress
MANIFEST = "manifest.json"
STATE, MEMORY = "building.json", "dedup"  # of a build that goes on: after which shard, and the texts seen
COLUMN = "text"
# no two documents are equal: a dictionary or the least and greatest of them only cost time
WRITE_OPTIONS = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_statistics": False}

Progress = Callable[[str], None]
Weigh = tuple[str, Callable[[str], int]]


@dataclass(frozen=True)
class Corpus:
    """A finished corpus. hash: identity of its content, whatever it was made from."""

    name: str
    directory: Path
    manifest: dict[str, Any]

    @property
    def hash(self) -> str:
        """SHA-256 over the shards' own hashes."""
        return self.manifest["hash"]

    def n_bytes(self, split: str) -> int:
        """UTF-8 bytes of text in a split."""
        return self.manifest["totals"][split]["bytes"]

    def documents(self, split: str, skip: int = 0) -> Iterator[str]:
        """Read a split back, in the order it was written, after the first `skip` documents.

        DamagedError names the shard that is missing or torn.
        """
        for array in self._arrays(split, skip):
            yield from array.to_pylist()

    def joined(self, split: str, skip: int = 0) -> Iterator[tuple[bytes, np.ndarray]]:
        """Read the same a few MB at a time: documents end to end as UTF-8, and int64 offsets between them, (n + 1,)."""
        for array in self._arrays(split, skip):
            _, ends, data = array.buffers()
            offsets = np.frombuffer(ends, np.int64)[array.offset : array.offset + len(array) + 1]
            yield data.slice(offsets[0], offsets[-1] - offsets[0]).to_pybytes(), offsets - offsets[0]

    def _arrays(self, split: str, skip: int) -> Iterator[Any]:
        import pyarrow
        import pyarrow.parquet as pq

        remedy = f"delete its folder and run python -m scripts.data_fetch --name={self.name} again"
        for shard in (shard for shard in self.manifest["shards"] if shard["split"] == split):
            if skip >= shard["rows"]:
                skip -= shard["rows"]
                continue
            path = self.directory / shard["name"]
            rows = 0
            try:
                with pq.ParquetFile(path) as table:
                    for batch in table.iter_batches(batch_size=READ_ROWS, columns=[COLUMN]):
                        rows += batch.num_rows
                        if skip < batch.num_rows:
                            yield batch.column(0)[skip:].cast(pyarrow.large_string())
                        skip = max(0, skip - batch.num_rows)
            except (pyarrow.ArrowException, OSError) as error:
                raise DamagedError(f"{path} is damaged ({str(error).splitlines()[0]}); {remedy}") from error
            if rows != shard["rows"]:
                raise DamagedError(f"{path} has {rows:,} rows instead of {shard['rows']:,}; {remedy}")


def build(
    specs: Sequence[str], name: str, *, max_bytes: int | None = None, text_field: str | None = None, seed: int = 0,
    skip_bad: bool = False, clean: Sequence[str] = (), part: tuple[int, int] | None = None, weigh: Weigh | None = None,
    progress: Progress = print,
) -> Corpus:  # fmt: skip
    """Build, go on building, or reuse, the corpus `name`. max_bytes: limit on the text of both splits together.

    clean: steps of `cleaning`, applied to all but built-in text. part: see `sources.tagged`. weigh: what weights go
    by, and a name for it; bytes without it.
    Raises ValueError when there is nothing to split, DamagedError for a broken input, LockedError when another
    process builds the same corpus.
    """
    specs = sources.resolve_specs(specs)
    if max_bytes is not None and max_bytes <= 0:
        raise ValueError(f"--max-bytes={max_bytes} must be above 0")
    if max_bytes is None and all(sources.parse(spec).endless for spec in specs):
        max_bytes = BUILTIN_BYTES
    settings = {
        "format_version": FORMAT_VERSION, "specs": list(specs), "text_field": text_field, "max_bytes": max_bytes,
        "seed": seed, "skip_bad": skip_bad, "inputs": sources.inputs(specs),
        **({"clean": list(clean)} if clean else {}), **({"part": list(part)} if part else {}),
        **({"weigh": weigh[0]} if weigh else {}),
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    directory = paths.corpus_dir(name)
    reason = _why_build(directory, key, settings)
    if not reason:  # without the lock: many processes may read at once
        corpus = load(name)
        progress(f"corpus {name}: reused, {_totals_text(corpus.manifest['totals'])}")
        return corpus
    with files.lock(directory):
        state = _unfinished(directory, key)
        n_shards = sum(map(len, state["shards"].values()))
        progress(f"corpus {name}: {f'going on after {n_shards} shards' if n_shards else reason}")
        stats = ReadStats(Counter(state["skipped"]))
        cleaner = Cleaner(clean, directory / MEMORY, state["cleaning"]) if clean else None
        stream = sources.tagged(
            specs, text_field=text_field, stats=stats, seed=seed, skip_bad=skip_bad, max_bytes=max_bytes, clean=cleaner,
            part=part, state=state["reading"], weigh=weigh[1] if weigh else None,
        )  # fmt: skip
        first = next(stream, None)  # a source that gives nothing at all must not cost the corpus that stands there
        if first is not None:
            _clear(directory, state)
        writers = {split: _Writer(directory, split, state) for split in sources.SPLITS}
        total = 0
        for doc in itertools.chain([first] if first else [], stream):
            full = writers[doc.split].add(doc.data)
            before, total = total, total + len(doc.data)
            if before // REPORT_BYTES != total // REPORT_BYTES:
                progress(f"  {total / 1e6:,.0f} MB of text")
            if full and state["reading"].get("balanced"):
                state.update(skipped=dict(stats.skipped), cleaning=cleaner.save() if cleaner else None)
                state["pending"] = {split: writer.pending() for split, writer in writers.items()}
                files.write_json(directory / STATE, state)
        shards = [shard for writer in writers.values() for shard in writer.close()]
        return _finish(name, directory, shards, stats, cleaner, {"key": key, **settings}, progress)


def _unfinished(directory: Path, key: str) -> dict[str, Any]:
    """Return the state of a build with this key that was cut off, if all its shards are there; else a fresh one."""
    lists = {what: {split: [] for split in sources.SPLITS} for what in ("shards", "pending")}
    fresh: dict[str, Any] = {"key": key, **lists, "reading": {}, "skipped": {}, "cleaning": None}
    state = files.read_json(directory / STATE) if (directory / STATE).exists() else {}
    found = [shard for shards in state["shards"].values() for shard in shards] if state.get("key") == key else []
    return state if found and not any(_problem(directory, shard) for shard in found) else fresh


def _problem(directory: Path, shard: dict[str, Any], *, whole: bool = False) -> str:
    """Return what is wrong with a shard, "" = nothing. whole: read it, instead of looking at its size only."""
    path = directory / shard["name"]
    if not path.exists():
        return "missing"
    if (size := path.stat().st_size) != shard["size"]:
        return f"{size} bytes instead of {shard['size']}"
    return "its sha256 differs from the manifest's" if whole and files.sha256(path) != shard["sha256"] else ""


def _why_build(directory: Path, key: str, settings: dict[str, Any]) -> str:
    """Return why the corpus must be built, "" if what stands there can be used."""
    if not (directory / MANIFEST).exists():
        return "building"
    manifest = files.read_json(directory / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        return "made by another version, building again"
    if manifest.get("key") != key:
        changed = [k for k, value in settings.items() if manifest.get(k) != value]
        return f"{' and '.join(changed) or 'settings'} changed, building again"
    for shard in manifest["shards"]:
        if _problem(directory, shard):
            return f"{shard['name']} is missing or cut short, building again"
    return ""


def _clear(directory: Path, state: dict[str, Any] | None = None) -> None:
    """Remove what stands there, except the shards of a build's state."""
    (directory / MANIFEST).unlink(missing_ok=True)
    files.remove_temporaries(directory)
    kept = {shard["name"] for shards in state["shards"].values() for shard in shards} if state else set()
    for path in directory.glob("*.parquet"):
        if path.name not in kept:
            path.unlink()
    if not kept:
        (directory / STATE).unlink(missing_ok=True)


class _Writer:
    """Collects the documents of a split and writes a shard when enough have come."""

    def __init__(self, directory: Path, split: str, state: dict[str, Any]) -> None:
        """Go on where the state of a build stands; its list of shards grows with ours."""
        self.directory, self.split = directory, split
        self.shards: list[dict[str, Any]] = state["shards"][split]
        self.rows: list[bytes] = []
        self.groups: list[Any] = []
        self.group_bytes = self.shard_bytes = 0
        for text in state["pending"][split]:
            self.add(text.encode())

    def add(self, row: bytes) -> bool:
        """Take a document; returns whether a shard was written."""
        self.rows.append(row)
        self.group_bytes += len(row)
        if self.group_bytes >= ROW_GROUP_BYTES:
            self._close_group()
        if full := self.shard_bytes >= SHARD_BYTES:
            self._close_shard()
        return full

    def pending(self) -> list[str]:
        """Return the texts that are in no shard yet."""
        texts = [text for group in self.groups for text in group.column(0).to_pylist()]
        return texts + [row.decode() for row in self.rows]

    def close(self) -> list[dict[str, Any]]:
        """Write what is left; returns what the manifest says of the shards."""
        self._close_group()
        self._close_shard()
        return self.shards

    def _close_group(self) -> None:
        """Move rows from Python objects to an Arrow batch, which is smaller."""
        import pyarrow as pa

        if self.rows:
            ends = np.cumsum([0, *map(len, self.rows)], dtype=np.int64)
            array = pa.LargeStringArray.from_buffers(len(self.rows), *map(pa.py_buffer, (ends, b"".join(self.rows))))
            self.groups.append(pa.table({COLUMN: array}))
            self.shard_bytes += self.group_bytes
            self.rows, self.group_bytes = [], 0

    def _close_shard(self) -> None:
        import pyarrow.parquet as pq

        groups = self.groups
        if not groups:
            return
        path = self.directory / f"{self.split}-{len(self.shards):05d}.parquet"

        def write(handle: BinaryIO) -> None:
            with pq.ParquetWriter(handle, groups[0].schema, **WRITE_OPTIONS) as out:
                for group in groups:
                    out.write_table(group)

        files.atomic_write(path, write)
        self.shards.append({
            "name": path.name, "split": self.split, "rows": sum(g.num_rows for g in groups),
            "bytes": self.shard_bytes, "size": path.stat().st_size, "sha256": files.sha256(path),
        })  # fmt: skip
        self.groups, self.shard_bytes = [], 0


def _finish(name: str, directory: Path, shards: list[dict[str, Any]], stats: ReadStats, cleaner: Cleaner | None,
            settings: dict[str, Any], progress: Progress) -> Corpus:  # fmt: skip
    totals = {
        split: {field: sum(s[field] for s in shards if s["split"] == split) for field in ("rows", "bytes")}
        for split in sources.SPLITS
    }
    enough = any if "part" in settings else all  # a share is split again by the command that joins them
    if not enough(total["rows"] for total in totals.values()):
        if shards:
            _clear(directory)
        raise ValueError(_too_few(settings["specs"], totals, stats))
    shards = sorted(shards, key=lambda s: s["name"])
    identity = hashlib.sha256("".join(s["name"] + s["sha256"] for s in shards).encode()).hexdigest()
    manifest = {
        **settings, "hash": identity, "column": COLUMN, "totals": totals, "skipped": dict(stats.skipped),
        "shards": shards, **({"cleaning": cleaner.report()} if cleaner else {}),
    }  # fmt: skip
    files.write_json(directory / MANIFEST, manifest)
    (directory / STATE).unlink(missing_ok=True)
    shutil.rmtree(directory / MEMORY, ignore_errors=True)
    skipped = f"; skipped {stats.summary()}" if stats.skipped else ""
    progress(f"corpus {name}: {_totals_text(totals)}{skipped}" + (f"\n{cleaner.describe()}" if cleaner else ""))
    return Corpus(name, directory, manifest)


def _too_few(specs: list[str], totals: dict[str, dict[str, int]], stats: ReadStats) -> str:
    n = sum(total["rows"] for total in totals.values())
    distinct = "" if n < 2 else ", all the same"
    skipped = f" ({stats.summary()} skipped)" if stats.skipped else ""
    return (f"the data has {n} document{'s' * (n != 1)}{distinct}{skipped}; at least 2 are needed, one to train on and "
            f"one to validate with: give more text than --data {' '.join(specs)}, or lines; "
            ".txt is cut where they end")  # fmt: skip


def _totals_text(totals: dict[str, dict[str, int]]) -> str:
    train, val = totals["train"], totals["val"]
    return (f"{train['rows']:,} documents, {train['bytes'] / 1e6:,.1f} MB to train on; "
            f"{val['rows']:,} documents, {val['bytes'] / 1e6:,.2f} MB to validate with")  # fmt: skip


def name_of(specs: Sequence[str]) -> str:
    """Name a corpus after its data: `builtin` as it is, else the last words of the specs and a short hash."""
    if list(specs) == ["builtin"]:
        return "builtin"
    words = re.findall(r"[A-Za-z0-9]+", " ".join(Path(s).name for s in specs)) or ["data"]
    digest = hashlib.blake2b("\n".join(specs).encode(), digest_size=4).hexdigest()
    return f"{'-'.join(words)[:32].strip('-')}-{digest}"


def tokenizer_name(specs: Sequence[str], vocab_size: int) -> str:
    """Name the tokenizer that is trained by default on this data with this vocabulary."""
    return f"{name_of(specs)}-{vocab_size}"


def load(name: str) -> Corpus:
    """Open a corpus that was built before; raises ValueError if there is none, DamagedError for a bad manifest."""
    directory = paths.corpus_dir(name)
    if not (directory / MANIFEST).exists():
        remedy = f"make it: python -m scripts.data_fetch --data=... --name={name}"
        raise ValueError(f"no corpus {name!r} in {directory.parent}; {remedy}")
    manifest = files.read_json(directory / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise DamagedError(f"{directory / MANIFEST} is no corpus manifest of version {FORMAT_VERSION}; build it again")
    return Corpus(name, directory, manifest)


def verify(name: str) -> dict[str, Any]:
    """Check every shard against the manifest: {"name", "ok", "hash", "shards", "problems"}."""
    corpus = load(name)
    shards = corpus.manifest["shards"]
    found = ((corpus.directory / s["name"], _problem(corpus.directory, s, whole=True)) for s in shards)
    problems = [{"file": str(path), "problem": problem} for path, problem in found if problem]
    return {"name": name, "ok": not problems, "hash": corpus.hash, "shards": len(shards),
            "totals": corpus.manifest["totals"], "problems": problems}  # fmt: skip
