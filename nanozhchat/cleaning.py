"""Cleaning of documents in named, countable steps: `data_fetch --clean=unicode,lines,…` or `--clean=default`.

A step passes a document on, changes it, or drops it with a reason; `Cleaner.report` counts both and keeps the first
samples. Thresholds follow published filters (C4, arXiv 1910.10683; Gopher, 2112.11446; FineWeb, 2406.17557), carried
over from words to characters: a Chinese word is about 1.7 characters, sentences have no spaces, marks are full-width.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from nanozhchat.dedup import ExactDuplicates, NearDuplicates, ngram_hashes, repeats

SAMPLES, SAMPLE_CHARS = 3, 120  # kept of every reason
MIN_CHARS, MAX_CHARS = 80, 200_000  # Gopher: 50 to 100,000 words
MIN_HAN, MAX_FOREIGN = 0.3, 0.05  # of the characters that are not blank; foreign: kana and hangul
TOP_GRAM, REPEATS = (4, 0.16), ((9, 0.15), (17, 0.10))  # Gopher: top 2-gram, repeated 5- and 10-grams of words
DUPLICATE_LINES, DUPLICATE_LINE_CHARS = 0.30, 0.20  # Gopher
END_MARKS = tuple('。！？；：…”’」』）】》.!?;:")')
STOP_WORDS = tuple("的是了在不有和人这我他也就都着与之其为")  # Gopher asks for two common words


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
DISPLAYED = re.compile(f"[{re.escape(''.join(DISPLAY))}]")
MARGINS = re.compile(r"[ \t\u3000\xa0]+$|^[\u3000\xa0]+", re.MULTILINE)  # line ends, indented paragraphs
BOILERPLATE = re.compile(
    r"(?:版权所有|copyright\b|©|all rights reserved|未经.{0,12}(?:许可|授权)|"
    r"(?:转载|引用)(?:请|时|须).{0,8}(?:注明|联系)|"
    r".{0,12}icp[备证]|.{0,8}公网安备|责任编辑|责编|编辑[:：]|来源[:：]|作者[:：]|上一[篇页章]|下一[篇页章]|返回(?:首页|顶部|列表)|"
    r"分享(?:到|至)|点击(?:这里|进入|查看|下载|关注)|扫(?:一扫|码|描).{0,12}(?:关注|二维码)|关注.{0,10}公众号|微信公众号|"
    r"相关(?:阅读|文章|推荐|新闻|链接)|推荐阅读|延伸阅读|热门(?:文章|推荐)|更多(?:精彩|内容|资讯)|(?:首页|登录|注册|搜索|导航|收藏)(?:[\s|>/»·]|$)|"
    r"您(?:的位置|现在的位置|当前的位置)|当前位置|阅读全文|查看更多|发表评论|网友评论|浏览次数|阅读(?:量|数|\(\d)|字[体号][:：]|"
    r"打印本?页|关闭(?:本页|窗口)|客服(?:热线|电话)|联系我们|关于我们|免责声明|友情链接|网站地图|.*(?:javascript|cookie)|"
    r"(?:请)?(?:启用|开启|升级).{0,10}(?:浏览器|脚本)|loading)",
    re.IGNORECASE,
)
BOILERPLATE_CHARS = 60  # longer lines are sentences that happen to begin like that
EMAIL = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}", re.ASCII)
MOBILE = re.compile(r"(?<!\d)(?:(?:\+|00)?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}(?!\d)|(?<!\d)0\d{2,3}-\d{7,8}(?!\d)")
IDENTITY = re.compile(r"(?<!\d)[1-8]\d{5}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\d)")
ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # GB 11643-1999
HAN, KANA_HANGUL = re.compile(r"[\u3400-\u9fff\U00020000-\U0003ffff]+"), re.compile(r"[\u3041-\u30ff\uac00-\ud7a3]+")
WORDS = re.compile(r"[^\W_]+")
BULLET = re.compile(r"[-*•●■◆▪·○►]")


def _count(pattern: re.Pattern[str], text: str) -> int:
    return sum(map(len, pattern.findall(text)))


def _lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.split("\n")) if line]


def unicode_display(text: str) -> str:
    """Remove what only concerns display: invisible and private characters, odd blanks and line ends, wide letters."""
    text = unicodedata.normalize("NFC", MARGINS.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))
    return DISPLAYED.sub(lambda m: DISPLAY[m[0]], text).strip("\n")


def boilerplate_lines(text: str) -> str:
    """Remove lines of navigation, copyright, sharing and the like."""
    kept = [x for x in text.split("\n") if len(x) > BOILERPLATE_CHARS or not BOILERPLATE.match(x.strip())]
    return "\n".join(kept).strip()


def chinese(text: str) -> str | Dropped:
    """Keep what is mostly Chinese."""
    size = len("".join(text.split())) or 1
    if _count(KANA_HANGUL, text) > MAX_FOREIGN * size:
        return Dropped("Japanese or Korean")
    return text if _count(HAN, text) >= MIN_HAN * size else Dropped("too little Chinese")


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
    if repeats(ngram_hashes(text, n))[1] * n > most * len(text) + n:
        return Dropped("gopher: top n-gram")
    for n, most in REPEATS:
        if repeats(ngram_hashes(text, n))[0] > most * len(text):
            return Dropped("gopher: repeated n-grams")
    return text


def quality(text: str) -> str | Dropped:
    """Heuristics of Gopher, C4 and FineWeb that need no model."""
    lines, size = _lines(text), len("".join(text.split())) or 1
    if "lorem ipsum" in text.lower() or text.count("{") > 0.005 * size:
        return Dropped("c4: filler or code")
    if text.count("#") + text.count("…") + text.count("...") > 0.06 * size:
        return Dropped("gopher: symbols")
    if _count(WORDS, text) < 0.6 * size:
        return Dropped("gopher: few letters")
    if sum(1 for line in lines if BULLET.match(line)) > 0.9 * len(lines):
        return Dropped("gopher: bullets")
    if sum(line.endswith(("…", "...")) for line in lines) > 0.3 * len(lines):
        return Dropped("gopher: ellipses")
    if sum(word in text for word in STOP_WORDS) < 2:
        return Dropped("gopher: no common words")
    if sum(line.endswith(END_MARKS) for line in lines) <= 0.12 * len(lines):
        return Dropped("fineweb: lines without end marks")
    if len(lines) > 3 and sum(len(line) <= 15 for line in lines) > 0.67 * len(lines):
        return Dropped("fineweb: short lines")
    return text


def _is_identity(match: re.Match[str]) -> bool:
    number = match[0].upper()
    total = sum(w * int(d) for w, d in zip(ID_WEIGHTS, number, strict=False))
    return "10X98765432"[total % 11] == number[17]


def pii(text: str) -> str:
    """Mask identity numbers (with a right check digit), telephone numbers and e-mail addresses."""
    if re.search(r"\d{4}", text):
        text = IDENTITY.sub(lambda m: "【身份证号】" if _is_identity(m) else m[0], text)
        text = MOBILE.sub("【电话】", text)
    return EMAIL.sub("【邮箱】", text) if "@" in text else text


def _simplifier() -> Step:
    try:
        from opencc import OpenCC
    except ImportError as error:
        raise ValueError("--clean=simplify needs OpenCC: uv sync --extra data") from error
    return OpenCC("t2s").convert


def _drop_seen(seen: Callable[[str], bool], reason: str, text: str) -> str | Dropped:
    return Dropped(reason) if seen(text) else text


PER_DOCUMENT: dict[str, Step] = {
    "unicode": unicode_display, "lines": boilerplate_lines, "simplify": lambda text: text, "chinese": chinese,
    "length": length, "repetition": repetition, "quality": quality, "pii": pii,
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


class Cleaner:
    """Runs steps over documents, counting. folder: where the duplicates' memory lies, None = in memory only."""

    def __init__(self, steps: Sequence[str], folder: Path | None = None, state: dict[str, Any] | None = None) -> None:
        """Start, or go on where `save` returned this state."""
        self.names = tuple(steps)
        self.counts: dict[str, Any] = {"documents": 0, "kept": 0, "bytes": 0, "kept_bytes": 0}
        self.steps: dict[str, Any] = {name: {"changed": 0, "dropped": {}, "samples": {}} for name in self.names}
        self.memories: dict[str, ExactDuplicates | NearDuplicates] = {}
        for name, kind in (("exact", ExactDuplicates), ("near", NearDuplicates)):
            if name in self.names:
                self.memories[name] = kind(folder, state["memories"][name] if state else 0)
        if state:
            self.counts.update({name: state["report"][name] for name in self.counts})
            self.steps.update(state["report"]["steps"])
        run = {**PER_DOCUMENT, **{k: partial(_drop_seen, m.seen, f"{k} duplicate") for k, m in self.memories.items()}}
        if "simplify" in self.names:
            run["simplify"] = _simplifier()
        self._run = [(self.steps[name], run[name]) for name in self.names]

    def __call__(self, text: str) -> str | None:
        """Return the cleaned text (valid UTF-8, as the one given), None if a step dropped the document."""
        counts = self.counts
        counts["documents"] += 1
        counts["bytes"] += len(text.encode())
        for entry, step in self._run:
            result = step(text)
            if isinstance(result, Dropped) or not result:
                reason = result.reason if isinstance(result, Dropped) else "nothing left"
                entry["dropped"][reason] = entry["dropped"].get(reason, 0) + 1
                _sample(entry, reason, text)
                return None
            if result is not text and result != text:
                entry["changed"] += 1
                _sample(entry, "changed", _difference(text, result))
                text = result
        counts["kept"] += 1
        counts["kept_bytes"] += len(text.encode())
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


def _sample(entry: dict[str, Any], reason: str, text: str) -> None:
    kept = entry["samples"].setdefault(reason, [])
    if len(kept) < SAMPLES:
        kept.append(text[:SAMPLE_CHARS])


def _difference(before: str, after: str) -> str:
    """Show where a text was changed first."""
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
    start, width = max(0, at - 10), SAMPLE_CHARS // 2 - 5
    return f"{before[start : start + width]!r} -> {after[start : start + width]!r}"
