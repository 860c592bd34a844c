"""Train a tokenizer on more text than memory holds, a group of files at a time, surviving interruptions.

What a group's text is made of is counted into files under `<tokenizer>/counts/`; `state.json` there names the groups
that are done and `merges.json` the merges that are certain. Everything else in that folder is left from a run that was
cut off, and removed. The merges are those of training on all text at once.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanozhchat import files, records, sources
from nanozhchat.tokenizer import Progress, Tokenizer
from rustbpe import count_to_files

GROUP_BYTES = 1 << 30  # of files, compressed or not, where --chunk-files does not say


def groups(specs: Sequence[str], chunk_files: int | None) -> list[tuple[str, ...]]:
    """Return specs in groups: `chunk_files` files each, else about GROUP_BYTES; what is not a file stands alone.

    Raises ValueError for weights: groups are read one after the other, and each to its end.
    """
    found: list[tuple[str, ...]] = []
    for spec in specs:
        source = sources.parse(spec)
        if source.weight is not None:
            raise ValueError(f"{spec} has a weight, which training in chunks cannot keep; "
                             "leave out the weight, or --memory-limit and --chunk-files")  # fmt: skip
        if source.kind != "files":
            found.append((spec,))
            continue
        found_paths = records.expand(source.name)
        sizes = itertools.accumulate(path.stat().st_size for path in found_paths)
        numbered = zip(itertools.count(), found_paths, sizes, strict=False)
        same = itertools.groupby(numbered, lambda x: x[0] // chunk_files if chunk_files else x[2] // GROUP_BYTES)
        found += [tuple(str(path) for _, path, _ in group) for _, group in same]
    return found


def train(
    specs: Sequence[str], vocab_size: int, kind: str, folder: Path, *, memory_bytes: int, max_bytes: int | None = None,
    chunk_files: int | None = None, resume: bool = True, text_field: str | None = None, threads: int = 0,
    progress: Progress | None = None,
) -> Tokenizer:  # fmt: skip
    """Learn a tokenizer as `Tokenizer.train` does on the training documents of specs, tables within `memory_bytes`.

    folder: where counts are kept, for the caller to remove. Raises what reading and training raise.
    """
    todo = groups(specs, chunk_files)
    key = {"groups": [list(group) for group in todo], "inputs": [sources.inputs(group) for group in todo],
           "kind": kind, "max_bytes": max_bytes, "text_field": text_field}  # fmt: skip
    state = _resume(folder, key, resume)
    done: list[dict[str, Any]] = state["done"]
    for number, group in enumerate(todo[len(done) :], len(done)):
        left = None if max_bytes is None else max_bytes - sum(entry["bytes"] for entry in done)
        if left is not None and left <= 0:
            break
        documents: Iterator[str] = sources.documents(group, "train", text_field=text_field, max_bytes=left)
        names, totals = count_to_files(documents, folder, f"{number:05d}-", memory_bytes, kind, threads, progress)
        done.append({"files": names, **totals})
        files.write_json(folder / "state.json", state)
        megabytes = sum(entry["bytes"] for entry in done) / 1e6
        print(f"counted {number + 1} of {len(todo)} groups: {megabytes:,.0f} MB so far")
    totals = {name: sum(entry[name] for entry in done) for name in ("documents", "bytes", "chunks")}
    counted = [folder / name for entry in done for name in entry["files"]]
    merges_file = folder / "merges.json"
    known = files.read_json(merges_file) if merges_file.exists() else []
    return Tokenizer.train_from_files(
        counted, vocab_size, kind, totals, memory_bytes, threads=threads, merges=known[: vocab_size], progress=progress,
        saved=lambda merges: files.write_json(merges_file, merges),
    )  # fmt: skip


def _resume(folder: Path, key: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Return the state to go on from; removes whatever is not part of it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "state.json"
    state: dict[str, Any] = files.read_json(path) if resume and path.exists() else {}
    if state.get("key") != key:
        if state:
            print("the data or settings changed: counting from the start")
        state = {"key": key, "done": []}
        (folder / "merges.json").unlink(missing_ok=True)
    elif state["done"]:
        print(f"going on after {len(state['done'])} of {len(key['groups'])} groups, counted before")
    kept = {name for entry in state["done"] for name in entry["files"]}
    for found in folder.glob("*.counts"):
        if found.name not in kept:
            found.unlink()
    files.write_json(path, state)
    return state
