"""What all benchmarks share: a `Spec` says where a data set is published and how a row becomes an `Item`.

A data set is read from a folder (`--task-data`), in the layout in which it is published, or from the Hugging Face hub.
To add one: a function from row to items and an entry in the table of `choosing.py` or `answering.py`, 40 lines at most.
"""

import contextlib
import csv
import gzip
import io
import json
import random
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanozhchat.conversation import Message
from nanozhchat.errors import DamagedError, DiskError
from nanozhchat.zh_text import LETTERS, chosen

PROBE_TIMEOUT_S = 10.0  # for the first answer of the hub; its own retries take minutes
LEAD = {"zh": "\n答案：", "en": "\nAnswer:"}
ASK_LETTER = {"zh": "\n请只回答正确选项的字母。", "en": "\nAnswer with the letter of the right choice only."}


@dataclass(frozen=True)
class Item:
    """One question.

    choices: () = the answer is free text. gold: index of the right choice. answers: accepted free answers; worked: one
    with its steps, for examples. fill: what stands before and after the answer in running text, for models that
    continue text; None = question, then "答案：". test: code that judges code. group: a subject; examples share it.
    """

    question: str
    choices: tuple[str, ...] = ()
    gold: int = 0
    answers: tuple[str, ...] = ()
    worked: str = ""
    fill: tuple[str, str] | None = None
    test: str = ""
    group: str = ""


def judge_choice(item: Item, answer: str) -> float:
    """1 if the right choice is named, by letter or by its text."""
    return float(chosen(answer, item.choices) == item.gold)


@dataclass(frozen=True)
class Spec:
    """One data set: `items` makes items of a row (a JSON object, a list, a CSV row as a mapping).

    files, examples: globs below the folder, of what is asked and of what is shown before it. hub: "id config split
    split-of-examples", "-" = none; or a file of the data set in place of the config, and files in it if it is a .zip.
    letters: models that continue text choose among letters, after the choices were listed; otherwise among the texts.
    per_char: log-likelihoods are divided by the length of the choice. shots: examples shown to such models.
    """

    items: Callable[[Any], Iterator[Item]]
    licence: str
    page: str
    files: str
    examples: str = ""
    hub: str = ""
    revision: str = "main"
    lang: str = "zh"
    letters: bool = False
    per_char: bool = False
    shots: int = 0
    judge: Callable[[Item, str], float] = judge_choice
    ask: str = ""
    stop: tuple[str, ...] = ("\n",)
    max_tokens: int = 48


def read_rows(path: Path) -> Iterator[Any]:
    """Read a published file: .csv, .tsv, .jsonl, .json (lines, an array, or one under "data" or "example"), or .gz."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text, kind = raw.decode("utf-8-sig"), path.name.removesuffix(".gz").rpartition(".")[2]
        if kind == "tsv":
            return (line.split("\t") for line in text.splitlines() if line)
        if kind == "csv":
            rows = list(filter(None, csv.reader(io.StringIO(text))))
            titled = {"A", "B"} <= {*rows[0]}
            return iter([dict(zip(rows[0], row, strict=True)) for row in rows[1:]] if titled else rows)
        with contextlib.suppress(ValueError):  # lines are no JSON as a whole
            value = json.loads(text)
            return iter(value if isinstance(value, list) else value.get("data", value.get("example", [value])))
        return iter([json.loads(line) for line in text.splitlines() if line.strip()])
    except (ValueError, LookupError, EOFError, gzip.BadGzipFile) as error:
        raise DamagedError(f"{path} is damaged or in another layout ({error}); fetch the file again") from error


def hub_rows(name: str, spec: Spec, split: str) -> Iterator[tuple[str, Any]]:
    """Read (subject, row) from the hub; class labels become their names, as in the published files."""
    import datasets
    from huggingface_hub import HfApi, constants, hf_hub_download

    hub_id, config, *_ = spec.hub.split()
    table: Any = None
    path = Path(config)
    try:
        if not constants.HF_HUB_OFFLINE:
            HfApi().dataset_info(hub_id, timeout=PROBE_TIMEOUT_S)  # fails fast, where loading retries for long
        if path.suffix:
            path = Path(hf_hub_download(hub_id, config, repo_type="dataset", revision=spec.revision))
        else:
            config = None if config == "-" else config
            table = datasets.load_dataset(hub_id, config, split=split, revision=spec.revision)
    except Exception as error:  # the library lets through errors of a dozen others: network, parsers, codecs
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise DiskError(
            f"{name}: cannot read {hub_id} from {constants.ENDPOINT} ({type(error).__name__}: {reason}); get the files "
            f"from https://{spec.page} and pass --task-data FOLDER, or set HF_ENDPOINT, HF_TOKEN"
        ) from error
    if path.suffix == ".zip":
        with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(path) as packed:
            packed.extractall(place)
            yield from ((p.stem, row) for p in sorted(Path(place).rglob(split)) for row in read_rows(p))
    elif path.suffix:
        yield from (("", row) for row in read_rows(path))
    else:
        labels = {k: f.names for k, f in table.features.items() if isinstance(f, datasets.ClassLabel)}
        for row in table:
            named = {k: names[row[k]] if row[k] is not None and row[k] >= 0 else "" for k, names in labels.items()}
            yield row.get("subject", ""), {**row, **named}


def load(name: str, spec: Spec, folder: Path | None, *, examples: bool = False) -> list[Item]:
    """Read what is asked, or the examples ([] when there are none).

    Raises ValueError, DiskError or DamagedError naming what to fetch when there is nothing to ask.
    """
    pattern, split = (spec.examples, spec.hub.split()[3:]) if examples else (spec.files, spec.hub.split()[2:3])
    get = f"get the files from https://{spec.page}"
    paths = sorted(folder.glob(pattern)) if folder and pattern else []
    if not examples and folder and not paths:
        raise ValueError(f"{name}: no {pattern} in {folder}; {get}, or drop --task-data")
    if not examples and not folder and not spec.hub:
        raise ValueError(f"{name} is not on the hub; {get} and pass --task-data FOLDER, where {pattern} is found")
    rows: Iterable[tuple[str, Any]] = ((path.stem, row) for path in paths for row in read_rows(path))
    if not folder and (split != ["-"] or not examples):
        rows = hub_rows(name, spec, split[0]) if split else ()
    found = []
    for subject, row in rows:
        try:
            found += [replace(item, group=re.sub(r"_(dev|val|test)$", "", subject)) for item in spec.items(row)]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            text = json.dumps(row, ensure_ascii=False)[:120]
            raise DamagedError(f"{name}: not in the published layout ({error!r}): {text}; {get}") from error
    return found


class Benchmark:
    """A data set as a task for chat models (`prompt`, `check`) and for models that continue text (`text`, `options`).

    n: questions drawn with a fixed seed, None = all. shots: examples, None = the data set's own number; where no split
    gives them, the first questions do, and are not asked. split: "train" asks what otherwise gives examples, "held_out"
    the rest; where there is but one split, these are three and one of four questions, by a hash.
    """

    def __init__(self, name: str, spec: Spec, *, n: int | None = None, folder: Path | None = None,
                 shots: int | None = None, split: str = "val") -> None:  # fmt: skip
        self.name, self.spec, self.shots = name, spec, spec.shots if shots is None else shots
        self.per_char, self.stop, self.max_tokens = spec.per_char, spec.stop, spec.max_tokens
        self._examples = load(name, spec, folder, examples=True) if self.shots or split != "val" else []
        items = self._examples if split == "train" and self._examples else load(name, spec, folder)
        if split != "val" and not self._examples:
            items = [i for i in items if (zlib.crc32(i.question.encode()) % 4 > 0) is (split == "train")]
        elif not self._examples:
            self._examples, items = items[: self.shots], items[self.shots :]
        if not items:
            raise ValueError(f"{name}: no {split} question is left beside {self.shots} examples; get more data")
        self.runs_code = bool(items[0].test)
        if n is not None and n < len(items):  # in their order, so that questions of one subject share their examples
            items = [items[i] for i in sorted(random.Random(name).sample(range(len(items)), n))]
        self._items = items
        self.chance = sum(1 / len(i.choices) for i in items if i.choices) / max(1, len(items))

    def __len__(self) -> int:
        """Count the questions."""
        return len(self._items)

    def _listed(self, item: Item) -> str:
        """List the choices by letter, unless the question does."""
        if set("".join(item.choices)) <= set(LETTERS):
            return ""
        return "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices))

    def _context(self, item: Item) -> str:
        if item.fill:
            return item.fill[0]
        return item.question + (self._listed(item) if self.spec.letters else "") + LEAD[self.spec.lang]

    def _continuations(self, item: Item) -> list[str]:
        texts = LETTERS[: len(item.choices)] if self.spec.letters else item.choices
        if item.fill:
            return [choice + item.fill[1] for choice in item.choices]
        return [(" " if self.spec.lang == "en" else "") + text for text in texts]

    def text(self, index: int, shots: int) -> str:
        """Return what a model continues: `shots` answered examples, and the question."""
        item = self._items[index]
        same = [e for e in self._examples if e.group == item.group] or self._examples
        done = [self._context(e) + (self._continuations(e)[e.gold] if e.choices else e.worked) for e in same[:shots]]
        return "\n\n".join([*done, self._context(item)])

    def options(self, index: int) -> Sequence[str]:
        """Return the possible continuations of `text`; () = it is to be generated."""
        return self._continuations(self._items[index])

    def gold(self, index: int) -> int:
        """Return which option is right."""
        return self._items[index].gold

    def prompt(self, index: int) -> Sequence[Message]:
        """Return the conversation that ends with the user's question."""
        item = self._items[index]
        ask = self.spec.ask or (ASK_LETTER[self.spec.lang] if item.choices else "")
        return (Message("user", item.question + self._listed(item) + ask),)

    def expected(self, index: int) -> str:
        """Return a right answer."""
        item = self._items[index]
        return item.choices[item.gold] if item.choices else item.answers[0]

    def check(self, index: int, answer: str) -> float:
        """Judge an answer: 0 to 1."""
        return self.spec.judge(self._items[index], answer)
