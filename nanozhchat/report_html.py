"""Building blocks of a report, and how they look in Markdown and in one self-contained HTML page.

Text that is a plain `str` is always escaped; markup comes only from `Code`. The page loads nothing, runs nothing,
and its content policy forbids both.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass


class Code(str):
    """Text set as code: names, flags, commands."""


Span = str  # a Code is set as code, any other string as plain text


@dataclass(frozen=True)
class Heading:
    """A section title."""

    text: str


@dataclass(frozen=True)
class Para:
    """A paragraph. lang: of its text. note: set smaller."""

    spans: Sequence[Span]
    lang: str = "en"
    note: bool = False


@dataclass(frozen=True)
class Tiles:
    """Key figures: (value, what it is)."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table. numeric: columns set to the right. fold: hidden behind this title until opened."""

    header: Sequence[str]
    rows: Sequence[Sequence[Span]]
    numeric: frozenset[int] = frozenset()
    fold: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture. png: on white, kept as a file; dark: shown where the reader prefers dark."""

    name: str
    alt: str
    png: bytes
    dark: bytes


@dataclass(frozen=True)
class Figures:
    """Pictures side by side where there is room."""

    items: Sequence[Figure]


@dataclass(frozen=True)
class Card:
    """A text by or for the model with texts that belong to it; good: right, wrong or neither. tag: its kind."""

    title: str
    texts: Sequence[str]
    good: bool | None = None
    tag: str = ""


@dataclass(frozen=True)
class Cards:
    """Cards of one kind; labels: what each of their texts is. title: what their titles are."""

    title: str
    labels: Sequence[str]
    cards: Sequence[Card]


@dataclass(frozen=True)
class Commands:
    """Shell commands."""

    lines: Sequence[str]


Block = Heading | Para | Tiles | Table | Figures | Cards | Commands
MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]~$|#])")
MARKS = {True: "✓", False: "✗", None: ""}


# --- Markdown


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """Render as GitHub-flavoured Markdown; pictures are the PNG files beside it."""
    return "\n\n".join([f"# {md_text(title)}", *(_md_block(b) for b in blocks)]) + "\n"


def md_text(span: Span) -> str:
    """Escape for one line or table cell: nothing in it is markup, line ends become <br>."""
    if isinstance(span, Code):
        text = re.sub(r"\s+", " ", span).replace("|", "\\|")
        ticks = "`" * (max([0, *map(len, re.findall(r"`+", text))]) + 1)
        pad = " " if text[:1] == "`" or text[-1:] == "`" else ""
        return f"{ticks}{pad}{text}{pad}{ticks}"
    text = html.escape(span, quote=False)
    return MARKDOWN_SPECIAL.sub(r"\\\1", text).replace("\r", "").strip("\n").replace("\n", "<br>")


def _md_table(header: Sequence[str], rows: Sequence[Sequence[Span]], numeric: frozenset[int] = frozenset()) -> str:
    rule = ["---:" if i in numeric else "---" for i in range(len(header))]
    lines = [[md_text(h) for h in header], rule, *([md_text(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _md_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"## {md_text(block.text)}"
    if isinstance(block, Para):
        return "".join(md_text(s) for s in block.spans)
    if isinstance(block, Tiles):
        return "\n".join(f"- {md_text(what)}: {md_text(value)}" for value, what in block.items)
    if isinstance(block, Table):
        return _md_table(block.header, block.rows, block.numeric)
    if isinstance(block, Figures):
        return "\n\n".join(f"![{md_text(f.alt)}]({f.name}.png)" for f in block.items)
    if isinstance(block, Cards):
        marked = any(c.good is not None for c in block.cards)
        tagged = any(c.tag for c in block.cards)
        header = [*([""] if marked else []), *(["skill"] if tagged else []), block.title, *block.labels]
        rows = [
            [*([MARKS[c.good]] if marked else []), *([Code(c.tag)] if tagged else []), c.title, *c.texts]
            for c in block.cards
        ]
        return _md_table(header, rows)
    return "```bash\n" + "\n".join(block.lines) + "\n```"


# --- HTML


CSS = """
:root{color-scheme:light dark;--bg:#fff;--ink:#24292f;--faint:#5f6973;--line:#e3e6ea;--soft:#f6f7f9;--blue:#0067a3;
--good:#00704f;--bad:#b04a00}
@media(prefers-color-scheme:dark){:root{--bg:#161b22;--ink:#e6edf3;--faint:#98a2ad;--line:#2f3742;--soft:#1e252e;
--blue:#6cbcf0;--good:#45cfa5;--bad:#f0a030}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.65 system-ui,-apple-system,"Segoe UI",Roboto,
"PingFang SC","Noto Sans CJK SC","Source Han Sans SC","Microsoft YaHei","WenQuanYi Micro Hei",sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 1.25rem;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.75rem 0 .75rem;padding-top:1.25rem;border-top:1px solid var(--line)}
p{margin:.6rem 0;max-width:46rem}
.note{color:var(--faint);font-size:.875rem}
code{font:.875em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--soft);border-radius:4px;
padding:.1em .3em;overflow-wrap:anywhere}
pre{background:var(--soft);border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem;overflow-x:auto}
pre code{background:none;padding:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.75rem;margin:1.5rem 0;padding:0;
list-style:none}
.tiles li{background:var(--soft);border:1px solid var(--line);border-radius:10px;padding:.8rem 1rem}
.tiles b{display:block;font-size:1.4rem;line-height:1.3;font-weight:650;font-variant-numeric:tabular-nums}
.tiles span{color:var(--faint);font-size:.8125rem;line-height:1.4;display:block}
.scroll{overflow-x:auto;margin:.9rem 0}
table{border-collapse:collapse;min-width:min(100%,26rem);font-size:.875rem;line-height:1.5}
th,td{text-align:left;vertical-align:top;padding:.4rem .75rem .4rem 0;border-bottom:1px solid var(--line)}
th{color:var(--faint);font-weight:500;white-space:nowrap}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
th.n:not(:last-child),td.n:not(:last-child){padding-right:1.5rem}
td:first-child,td:first-child code{white-space:nowrap}
details{border:1px solid var(--line);border-radius:8px;padding:.6rem 1rem;margin:.9rem 0}
summary{cursor:pointer;font-weight:500}
summary:focus-visible,.scroll:focus-visible,pre:focus-visible{outline:2px solid var(--blue);outline-offset:2px}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1.25rem;margin:1rem 0}
figure{margin:0}
figure:first-child:nth-last-child(odd){grid-column:1/-1;max-width:46rem}
img{display:block;width:100%;height:auto}
.cards{display:grid;gap:.9rem;margin:1rem 0}
.cards.pair{grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}
.card{border:1px solid var(--line);border-radius:10px;padding:.8rem 1rem;min-width:0}
.card h3{font-size:1rem;line-height:1.5;margin:0 0 .4rem;font-weight:600;white-space:pre-wrap;overflow-wrap:anywhere}
.card .tag{float:right;color:var(--faint);font-size:.8125rem;margin-left:.75rem}
dl{margin:0;display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.3rem .9rem}
dt{color:var(--faint);font-size:.8125rem;line-height:1.85}
dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
.good dd:last-child{color:var(--good)}.bad dd:last-child{color:var(--bad)}
@media(max-width:30rem){body{font-size:15px}main{padding:1.5rem 1rem 3rem}h1{font-size:1.4rem}
.tiles{grid-template-columns:1fr 1fr}.tiles b{font-size:1.2rem}.tiles li{padding:.65rem .8rem}dl{gap:.2rem .7rem}
th,td{padding-right:.6rem}th.n:not(:last-child),td.n:not(:last-child){padding-right:.8rem}}
@media print{.card,figure{break-inside:avoid}}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, blocks: Sequence[Block]) -> str:
    """Render as one HTML page that needs no other file."""
    body = "\n".join(_html_block(b) for b in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{html.escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _span(span: Span) -> str:
    text = html.escape(span).replace(" %", "\u00a0%")  # a number and its sign stay on one line
    return f"<code>{text}</code>" if isinstance(span, Code) else text


def _html_table(block: Table) -> str:
    def cells(row: Sequence[Span], kind: str) -> str:
        right = [' class="n"' if i in block.numeric else "" for i in range(len(row))]
        return "<tr>" + "".join(f"<{kind}{c}>{_span(s)}</{kind}>" for c, s in zip(right, row, strict=True)) + "</tr>"

    label = html.escape(block.fold or block.header[0] or "table")
    rows = "\n".join(cells(row, "td") for row in block.rows)
    table = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>\n'
        f"<thead>{cells(block.header, 'th')}</thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )
    return f"<details><summary>{html.escape(block.fold)}</summary>{table}</details>" if block.fold else table


def _html_figure(figure: Figure) -> str:
    light, dark = (base64.b64encode(data).decode() for data in (figure.png, figure.dark))
    source = f'<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">'
    image = f'<img alt="{html.escape(figure.alt)}" src="data:image/png;base64,{light}">'
    return f"<figure><picture>{source}{image}</picture></figure>"


def _html_card(card: Card, labels: Sequence[str]) -> str:
    tone = {True: " good", False: " bad", None: ""}[card.good]
    texts = [f"{text} {MARKS[card.good]}" if i == len(labels) - 1 else text for i, text in enumerate(card.texts)]
    pairs = "".join(
        f'<dt>{html.escape(label)}</dt><dd lang="zh">{html.escape(text.strip())}</dd>'
        for label, text in zip(labels, texts, strict=True)
    )
    tag = f'<span class="tag">{html.escape(card.tag)}</span>' if card.tag else ""
    return f'<div class="card{tone}">{tag}<h3 lang="zh">{html.escape(card.title.strip())}</h3><dl>{pairs}</dl></div>'


def _html_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{html.escape(block.text)}</h2>"
    if isinstance(block, Para):
        kind = ' class="note"' if block.note else ""
        return f'<p lang="{block.lang}"{kind}>{"".join(map(_span, block.spans))}</p>'
    if isinstance(block, Tiles):
        items = "".join(f"<li><b>{html.escape(v)}</b><span>{html.escape(what)}</span></li>" for v, what in block.items)
        return f'<ul class="tiles">{items}</ul>'
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Figures):
        return f'<div class="figures">{"".join(map(_html_figure, block.items))}</div>'
    if isinstance(block, Cards):
        pair = " pair" if any(c.good is not None for c in block.cards) else ""
        return f'<div class="cards{pair}">' + "\n".join(_html_card(c, block.labels) for c in block.cards) + "</div>"
    lines = "\n".join(html.escape(line) for line in block.lines)
    return f'<pre tabindex="0"><code>{lines}</code></pre>'
