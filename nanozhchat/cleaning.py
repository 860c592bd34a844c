"""Cleaning of documents in named, countable steps: `data_fetch --clean=unicode,lines,…` or `--clean=default`.

A step passes a document on, changes it, or drops it with a reason; `Cleaner.report` counts both and keeps the first
samples. Thresholds follow published filters (C4, arXiv 1910.10683; Gopher, 2112.11446; FineWeb, 2406.17557), carried
over from words to characters: a Chinese word is about 1.7 characters, sentences have no spaces, marks are full-width.
"""

import multiprocessing
import os
import re
import signal
import threading
import unicodedata
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanozhchat.dedup import LETTERS, Array, ExactDuplicates, NearDuplicates, marked, ngram_hashes, repeats, units

Pair = tuple["str | None", Any]

SAMPLES, SAMPLE_CHARS = 3, 120  # kept of every reason
MIN_CHARS, MAX_CHARS = 80, 200_000  # Gopher: 50 to 100,000 words
MIN_HAN, MAX_FOREIGN = 0.3, 0.05  # of the characters that are not blank; foreign: kana and hangul
TOP_GRAM, REPEATS = (4, 0.16), ((9, 0.15), (17, 0.10))  # Gopher: top 2-gram, repeated 5- and 10-grams of words
DUPLICATE_LINES, DUPLICATE_LINE_CHARS = 0.30, 0.20  # Gopher
END_MARKS = frozenset('。！？；：…”’」』）】》.!?;:")')
STOP_WORDS = "的是了在不有和人这我他也就都着与之其为"  # Gopher asks for two common words
BATCH_CHARS, WORKERS = 1 << 18, 16  # handed to a process at once; more processes than this, the reader cannot feed


class Dropped(NamedTuple):
    """What a step returns instead of text."""

    reason: str


Step = Callable[[str], "str | Dropped"]

INVISIBLE = [*range(0x00, 0x09), *range(0x0E, 0x20), *range(0x7F, 0x85), *range(0x86, 0xA0), 0xAD, 0x061C, 0x180E,
             0x200B, 0x200C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF,
             *range(0xFFF9, 0xFFFE), *range(0xE000, 0xF900)]  # fmt: skip
DISPLAY = {
    **dict.fromkeys(map(chr, INVISIBLE), ""),
    **dict.fromkeys(map(chr, [0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000]), " "),
    **dict.fromkeys(map(chr, [0x0B, 0x0C, 0x85, 0x2028, 0x2029]), "\n"),
    **{chr(c + 0xFEE0): chr(c) for c in range(0x30, 0x7B) if chr(c).isalnum()},  # full-width letters and digits
    **{chr(c): unicodedata.normalize("NFKC", chr(c)) for c in [*range(0x2F00, 0x2FD6), 0x2E9F, 0x2EF3]},  # radicals
}
BOILERPLATE = re.compile(
    r"(?:版权所有|copyright\b|©|all rights reserved|未经.{0,12}(?:许可|授权)|"
    r"(?:转载|引用)(?:请|时|须).{0,8}(?:注明|联系)|"
    r"责任编辑|责编|编辑[:：]|来源[:：]|作者[:：]|上一[篇页章]|下一[篇页章]|返回(?:首页|顶部|列表)|"
    r"分享(?:到|至)|点击(?:这里|进入|查看|下载|关注)|扫(?:一扫|码|描).{0,12}(?:关注|二维码)|关注.{0,10}公众号|微信公众号|"
    r"相关(?:阅读|文章|推荐|新闻|链接)|推荐阅读|延伸阅读|热门(?:文章|推荐)|更多(?:精彩|内容|资讯)|(?:首页|登录|注册|搜索|导航|收藏)(?:[\s|>/»·]|$)|"
    r"您(?:的位置|现在的位置|当前的位置)|当前位置|阅读全文|查看更多|发表评论|网友评论|浏览次数|阅读(?:量|数|\(\d)|字[体号][:：]|"
    r"打印本?页|关闭(?:本页|窗口)|客服(?:热线|电话)|联系我们|关于我们|免责声明|友情链接|网站地图|"
    r"(?:请)?(?:启用|开启|升级).{0,10}(?:浏览器|脚本)|loading)",
    re.IGNORECASE,
)
BEGINNINGS = frozenset(BOILERPLATE.pattern + BOILERPLATE.pattern.upper())  # any such line begins with one of these
TECHNICAL = re.compile(r".{0,12}icp[备证]|.{0,8}公网安备|.*(?:javascript|cookie)", re.IGNORECASE)
BOILERPLATE_CHARS = 60  # longer lines are sentences that happen to begin like that
EMAIL = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}", re.ASCII)
MOBILE = re.compile(r"(?<!\d)(?:(?:\+|00)?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}(?!\d)|(?<!\d)0\d{2,3}-\d{7,8}(?!\d)")
IDENTITY = re.compile(r"(?<!\d)[1-8]\d{5}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\d)")
ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # GB 11643-1999
NUMBER = re.compile(r"\d\d\d\d[- ]?\d\d\d")  # every identity and telephone number has this in it
BULLETS = frozenset("-*•●■◆▪·○►")
KINDS = {
    "han": r"[\u3400-\u9fff\U00020000-\U0003ffff]", "foreign": r"[\u3041-\u30ff\uac00-\ud7a3]", "letters": LETTERS,
    "blanks": r"\s", "digits": r"\d", "displayed": f"[{re.escape(''.join(DISPLAY))}]",
}  # fmt: skip


@cache
def _tables() -> tuple[Array, Array, Array]:
    """(65536,) uint8: KINDS as bits, (64, 6): those of each sum, and (65536,) uint16: what DISPLAY makes of a unit."""
    kinds = sum(marked(pattern).astype(np.uint8) << bit for bit, pattern in enumerate(KINDS.values()))
    shown = np.arange(0x10000, dtype=np.uint16)
    for old, new in DISPLAY.items():
        shown[ord(old)] = ord(new or "\0")
    return np.asarray(kinds), np.arange(1 << len(KINDS))[:, None] >> np.arange(len(KINDS)) & 1, shown


@lru_cache(maxsize=2)
def _counts(text: str) -> dict[str, int]:
    """Return how many characters of a text are of which of KINDS."""
    kinds, of_sum, _ = _tables()
    found = np.bincount(kinds.take(units(text)), minlength=len(of_sum)) @ of_sum
    return dict(zip(KINDS, found.tolist(), strict=True))


@lru_cache(maxsize=2)
def _lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.split("\n")) if line]


def unicode_display(text: str) -> str:
    """Remove what only concerns display: invisible and private characters, odd blanks and line ends, wide letters."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    text = "\n".join([line.rstrip(" \t\u3000\xa0").lstrip("\u3000\xa0") for line in lines])  # ends, indented paragraphs
    text = unicodedata.normalize("NFC", text)
    if _counts(text)["displayed"]:
        shown = _tables()[2].take(units(text))
        text = shown[shown > 0].tobytes().decode("utf-16-le", "surrogatepass")
    return text.strip("\n")


def boilerplate_lines(text: str) -> str:
    """Remove lines of navigation, copyright, sharing and the like."""
    lower = text.encode("utf-8", "surrogatepass").lower()
    technical = any(word in lower for word in (b"icp", "公网安备".encode(), b"javascript", b"cookie"))

    def is_boilerplate(bare: str) -> Any:
        return (bare[:1] in BEGINNINGS and BOILERPLATE.match(bare)) or (technical and TECHNICAL.match(bare))

    kept = [x for x in text.split("\n") if len(x) > BOILERPLATE_CHARS or not is_boilerplate(x.strip())]
    return "\n".join(kept).strip()


def chinese(text: str) -> str | Dropped:
    """Keep what is mostly Chinese."""
    counts = _counts(text)
    size = len(text) - counts["blanks"] or 1
    if counts["foreign"] > MAX_FOREIGN * size:
        return Dropped("Japanese or Korean")
    return text if counts["han"] >= MIN_HAN * size else Dropped("too little Chinese")


def length(text: str) -> str | Dropped:
    """Keep what is neither a snippet nor a whole book."""
    size = len(text)
    return text if MIN_CHARS <= size <= MAX_CHARS else Dropped("too short" if size < MIN_CHARS else "too long")


def repetition(text: str) -> str | Dropped:
    """Gopher's repetition filters: equal lines, one n-gram everywhere, the same n-grams again and again."""
    lines = _lines(text)
    seen: set[str] = set()
    again = [line for line in lines if line in seen or seen.add(line)]  # type: ignore[func-returns-value]
    if len(again) > DUPLICATE_LINES * len(lines) or sum(map(len, again)) > DUPLICATE_LINE_CHARS * len(text):
        return Dropped("gopher: duplicate lines")
    n, most = TOP_GRAM
    repeated, often = repeats(ngram_hashes(units(text), n), int((most * len(text) + n) / n))
    if often:
        return Dropped("gopher: top n-gram")
    for n, most in REPEATS:
        if repeated > most * len(text):  # of the longer ones there are no more than of the shorter
            repeated, _ = repeats(ngram_hashes(units(text), n), 1)
        if repeated > most * len(text):
            return Dropped("gopher: repeated n-grams")
    return text


def quality(text: str) -> str | Dropped:
    """Heuristics of Gopher, C4 and FineWeb that need no model."""
    lines, counts = _lines(text), _counts(text)
    size = len(text) - counts["blanks"] or 1
    n, ellipses = len(lines), text.count("…") + text.count("...")
    filler = b"lorem ipsum" in text.encode("utf-8", "surrogatepass").lower()
    faults = {
        "c4: filler or code": filler or text.count("{") > 0.005 * size,
        "gopher: symbols": text.count("#") + ellipses > 0.06 * size,
        "gopher: few letters": counts["letters"] < 0.6 * size,
        "gopher: bullets": sum(line[0] in BULLETS for line in lines) > 0.9 * n,
        "gopher: ellipses": ellipses and sum(line.endswith(("…", "...")) for line in lines) > 0.3 * n,
        "gopher: no common words": len([*islice((word for word in STOP_WORDS if word in text), 2)]) < 2,
        "fineweb: lines without end marks": sum(line[-1] in END_MARKS for line in lines) <= 0.12 * n,
        "fineweb: short lines": n > 3 and sum(len(line) <= 15 for line in lines) > 0.67 * n,
    }
    return next((Dropped(reason) for reason, found in faults.items() if found), text)


def _is_identity(match: re.Match[str]) -> bool:
    number = match[0].upper()
    total = sum(w * int(d) for w, d in zip(ID_WEIGHTS, number, strict=False))
    return "10X98765432"[total % 11] == number[17]


def pii(text: str) -> str:
    """Mask identity numbers (with a right check digit), telephone numbers and e-mail addresses."""
    if _counts(text)["digits"] >= 10 and NUMBER.search(text):
        text = IDENTITY.sub(lambda m: "【身份证号】" if _is_identity(m) else m[0], text)
        text = MOBILE.sub("【电话】", text)
    return EMAIL.sub("【邮箱】", text) if "@" in text else text


@cache
def _simplifier() -> Step:
    try:
        from opencc import OpenCC
    except ImportError as error:
        raise ValueError("--clean=simplify needs OpenCC: uv sync --extra data") from error
    return OpenCC("t2s").convert


PER_DOCUMENT: dict[str, Step] = {
    "unicode": unicode_display, "lines": boilerplate_lines, "simplify": lambda text: _simplifier()(text),
    "chinese": chinese, "length": length, "repetition": repetition, "quality": quality, "pii": pii,
}  # fmt: skip
STEPS = (*PER_DOCUMENT, "exact", "near")  # in this order, whatever the order on the command line
DEFAULT = tuple(step for step in STEPS if step != "simplify")


def parse_steps(text: str | None) -> tuple[str, ...]:
    """Read `--clean`: names in any order, `default` for all but simplify; ValueError lists the known ones."""
    names = [name for part in (text or "").split(",") if (name := part.strip())]
    if unknown := [name for name in names if name not in (*STEPS, "default")]:
        raise ValueError(f"--clean: unknown step {unknown[0]!r}; steps are {', '.join(STEPS)}, and default")
    wanted = {step for name in names for step in (DEFAULT if name == "default" else (name,))}
    return tuple(step for step in STEPS if step in wanted)


MEMORIES: dict[str, type[ExactDuplicates | NearDuplicates]] = {"exact": ExactDuplicates, "near": NearDuplicates}
# text (None: dropped), its bytes before, (step, reason or "changed", sample) of what was done, key of each memory
Prepared = tuple["str | None", int, list[tuple[str, str, str]], dict[str, bytes]]


def prepare(names: tuple[str, ...], texts: Sequence[str]) -> list[Prepared]:
    """Do what can be done for each text alone, in any process."""
    steps = [(name, PER_DOCUMENT[name]) for name in names if name in PER_DOCUMENT]
    found: list[Prepared] = []
    for original in texts:
        text, events = original, []
        for name, step in steps:
            result = step(text)
            if isinstance(result, Dropped) or not result:
                reason = result.reason if isinstance(result, Dropped) else "nothing left"
                events.append((name, reason, text[:SAMPLE_CHARS]))
                text = ""
                break
            if result != text:
                events.append((name, "changed", _difference(text, result)))
                text = result
        found.append((text or None, len(original.encode()), events, {}))
    kept = [(text, keys) for text, _, _, keys in found if text]
    for name, kind in MEMORIES.items():
        if kept and name in names:
            for (_, keys), key in zip(kept, kind.keys([text for text, _ in kept]), strict=True):
                keys[name] = key
    return found


def _batches(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    batch, size = [], 0
    for pair in pairs:
        batch.append(pair)
        size += len(pair[0] or "")
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _follow_parent() -> None:
    """End this process with the one that started it, however that ended, and not before."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class Cleaner:
    """Runs steps over documents, counting. folder: where the duplicates' memory lies, None = in memory only.

    After the first batch a process a core shares the work; what comes out is the same for any number of them.
    """

    def __init__(self, steps: Sequence[str], folder: Path | None = None, state: dict[str, Any] | None = None) -> None:
        """Start, or go on where `save` returned this state."""
        self.names = tuple(steps)
        self.counts: dict[str, Any] = {"documents": 0, "kept": 0, "bytes": 0, "kept_bytes": 0}
        self.steps: dict[str, Any] = {name: {"changed": 0, "dropped": {}, "samples": {}} for name in self.names}
        chosen = [(name, kind) for name, kind in MEMORIES.items() if name in self.names]
        self.memories = {name: kind(folder, state["memories"][name] if state else 0) for name, kind in chosen}
        if state:
            self.counts.update({name: state["report"][name] for name in self.counts})
            self.steps.update(state["report"]["steps"])
        if "simplify" in self.names:
            _simplifier()  # a missing library is better missed here
        self.workers = min(WORKERS, os.cpu_count() or 1)
        self._pool: ProcessPoolExecutor | None = None

    def run(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        """Clean the texts (valid UTF-8) of (text, anything) pairs, some batches ahead; None passes; None is dropped."""
        for batch, prepared in self._prepared(pairs):
            results = iter(prepared)
            for text, anything in batch:
                yield None if text is None else self._finish(next(results)), anything

    def _prepared(self, pairs: Iterable[Pair]) -> Iterator[tuple[list[Pair], list[Prepared]]]:
        waiting: deque[tuple[list[Pair], Callable[[], list[Prepared]]]] = deque()
        for number, batch in enumerate(_batches(pairs)):
            task = partial(prepare, self.names, [text for text, _ in batch if text is not None])
            if number and self.workers > 1 and not self._pool:  # spawned: a fork would hold our locks
                self._pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"), _follow_parent)
            waiting.append((batch, self._pool.submit(task).result if self._pool else task))
            if number == 0 or len(waiting) > 2 * self.workers:
                batch, result = waiting.popleft()
                yield batch, result()
        for batch, result in waiting:
            yield batch, result()

    def _finish(self, prepared: Prepared) -> str | None:
        """Count what was done to a text, and look whether it came before."""
        text, n_bytes, events, keys = prepared
        self.counts["documents"] += 1
        self.counts["bytes"] += n_bytes
        for name, key in keys.items():
            if text and self.memories[name].seen(key):
                events = [*events, (name, f"{name} duplicate", text[:SAMPLE_CHARS])]
                text = None
        for name, reason, sample in events:
            entry = self.steps[name]
            counts = entry if reason == "changed" else entry["dropped"]
            counts[reason] = counts.get(reason, 0) + 1
            samples = entry["samples"].setdefault(reason, [])
            if len(samples) < SAMPLES:
                samples.append(sample)
        self.counts["kept"] += bool(text)
        self.counts["kept_bytes"] += len((text or "").encode())
        return text

    def report(self) -> dict[str, Any]:
        """Counts, and for each step what it dropped and changed, with samples: what goes into the manifest."""
        return {**self.counts, "steps": self.steps}

    def save(self) -> dict[str, Any]:
        """Return a state to go on from, plain types; the duplicates' memory is on disk when this returns."""
        return {"report": self.report(), "memories": {name: m.save() for name, m in self.memories.items()}}

    def describe(self) -> str:
        """Say it for people: one line a step, and samples."""
        c = self.counts
        said = [f"cleaning: {c['kept']:,} of {c['documents']:,} documents kept, {c['kept_bytes'] / 1e6:,.1f} of "
                f"{c['bytes'] / 1e6:,.1f} MB"]  # fmt: skip
        for name, entry in self.steps.items():
            drops = ", ".join(f"{n:,} {reason}" for reason, n in sorted(entry["dropped"].items()))
            said.append(f"  {name:<11} changed {entry['changed']:,}; dropped {drops or 'none'}")
            said += [f"    {reason}: {texts[0]}" for reason, texts in entry["samples"].items()]
        return "\n".join(said)


def _difference(before: str, after: str) -> str:
    """Show where a text was changed first."""
    at = bisect_left(range(min(len(before), len(after))), True, key=lambda i: before[: i + 1] != after[: i + 1])
    start, width = max(0, at - 10), SAMPLE_CHARS // 2 - 5
    return f"{before[start : start + width]!r} -> {after[start : start + width]!r}"[:SAMPLE_CHARS]
