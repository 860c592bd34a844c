"""Markdown -> safe HTML, block by block, so that a page can show finished blocks while the rest still streams.

Raw HTML in the text is text. Code is coloured by Pygments, maths becomes MathML by latex2mathml, both on this machine,
and nh3 lets only what is listed here through. Images become links: nothing is fetched before somebody clicks.
"""

import contextlib
import html
import itertools
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import nh3
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters.html import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

MAX_CODE_CHARS = 20_000  # longer code stays plain
MAX_MATH_CHARS = 1_000
INLINE_MATH = re.compile(r"\$(?![\s$])([^$\n]{1,1000}?)(?<![\s\\])\$(?!\d)|\\\((.{1,1000}?)\\\)")
BLOCK_MATH = re.compile(r"\s*(?:\$\$(.+?)\$\$|\\\[(.+?)\\\])\s*", re.DOTALL)
HAN = re.compile(r"[\u3400-\u9fff\uff00-\uffef]")
MATHML = set(re.findall(
    r"\w+", "math mrow mi mn mo ms mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mtable mtr "
    "mtd mstyle menclose mpadded mphantom mmultiscripts"))  # fmt: skip
TAGS = MATHML | set(re.findall(
    r"\w+", "p br hr h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code em strong s a table thead tbody tr th td div span "
    "figure figcaption"))  # fmt: skip
MATH_ATTRIBUTES = {"display", "mathvariant", "stretchy", "fence", "form", "separator", "linethickness", "columnalign"}
ATTRIBUTES = {tag: MATH_ATTRIBUTES for tag in MATHML} | {
    "a": {"href", "title", "class"},
    "ol": {"start"},
    **dict.fromkeys(("span", "div", "pre", "code", "figure", "th", "td"), {"class"}),
}
SCHEMES = {"http", "https", "mailto"}
ALIGNED = re.compile(r'style="text-align:(left|center|right)"')


def render_blocks(text: str) -> list[dict[str, Any]]:
    """Return the top-level blocks of a Markdown text as {"html", "end"}; end: UTF-16 units of text up to there.

    Text that is appended later changes the last block at most.
    """
    tokens = _markdown.parse(text)
    starts = [i for i, t in enumerate(tokens) if t.level == 0 and t.nesting >= 0]
    sizes = (len(line.encode("utf-16-le")) // 2 + 1 for line in text.split("\n"))
    lines = list(itertools.accumulate(sizes, initial=0))
    total = lines[-1] - 1
    blocks = []
    for here, after in zip(starts, [*starts[1:], len(tokens)]):
        area = tokens[after].map if after < len(tokens) else None
        page = ALIGNED.sub(r'class="\1"', _markdown.renderer.render(tokens[here:after], _markdown.options, {}))
        safe = nh3.clean(page, tags=TAGS, attributes=ATTRIBUTES, url_schemes=SCHEMES,
                         link_rel="noopener noreferrer nofollow", set_tag_attribute_values={"a": {"target": "_blank"}},
                         generic_attribute_prefixes=set(), attribute_filter=_checked)  # fmt: skip
        blocks.append({"html": safe, "end": min(lines[area[0]], total) if area else total})
    return blocks


def _checked(_tag: str, name: str, value: str) -> str | None:
    """Links lead to a full address, never to one relative to this server or its protocol."""
    return value if name != "href" or urlsplit(value).scheme in SCHEMES else None


def _code(tokens: Sequence[Token], index: int, _options: Any, _env: Any) -> str:
    """Code with its language named."""
    token = tokens[index]
    language = token.info.split()[0][:30] if token.info.strip() else ""
    body = html.escape(token.content)
    if language and len(token.content) <= MAX_CODE_CHARS:
        with contextlib.suppress(ClassNotFound):
            body = highlight(token.content, get_lexer_by_name(language, stripnl=False), HtmlFormatter(nowrap=True))
    caption = f"<figcaption>{html.escape(language)}</figcaption>"
    return f'<figure class="code">{caption}<pre><code>{body}</code></pre></figure>'


def _image(tokens: Sequence[Token], index: int, _options: Any, _env: Any) -> str:
    """A link that says where the picture is."""
    token = tokens[index]
    address = str(token.attrGet("src") or "")
    host, label = urlsplit(address).netloc, html.escape(token.content or "image")
    return f'<a class="image" href="{html.escape(address)}">{label} ({html.escape(host)})</a>'


def _math(tokens: Sequence[Token], index: int, _options: Any, _env: Any) -> str:
    """MathML, or the source where it is not LaTeX that the library knows."""
    token, display = tokens[index], tokens[index].type == "math_block"
    try:
        page = convert(token.content, display="block" if display else "inline")
    except Exception:  # the library raises many kinds, IndexError and RecursionError among them
        page = f'<code class="math-source">{html.escape(token.markup)}</code>'
    return f'<div class="math">{page}</div>' if display else page


def _inline_math(state: StateInline, silent: bool) -> bool:
    """`$x$` and `\\(x\\)`; not money: no space inside the dollars, no digit after, no Chinese between."""
    if state.src[state.pos] not in "$\\" or not (found := INLINE_MATH.match(state.src, state.pos)):
        return False
    content = found[1] or found[2] or ""
    if found[1] and HAN.search(content):
        return False
    if not silent:
        token = state.push("math_inline", "math", 0)
        token.content, token.markup = content, found[0]
    state.pos = found.end()
    return True


def _block_math(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """`$$x$$` and `\\[x\\]` on lines of their own."""
    first = state.src[state.bMarks[start] + state.tShift[start] :][:2]
    if first not in ("$$", "\\["):
        return False
    close = "$$" if first == "$$" else "\\]"
    for line in range(start, end):
        source = state.getLines(start, line + 1, state.blkIndent, False)
        if len(source) > MAX_MATH_CHARS:
            return False
        if source.rstrip().endswith(close) and (found := BLOCK_MATH.fullmatch(source)):
            if not silent:
                token = state.push("math_block", "math", 0)
                token.content, token.markup, token.map = (found[1] or found[2]).strip(), source, [start, line + 1]
                state.line = line + 1
            return True
    return False


_markdown = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
_markdown.inline.ruler.before("escape", "math_inline", _inline_math)
_markdown.block.ruler.before("fence", "math_block", _block_math, {"alt": ["paragraph", "blockquote", "list"]})
_rules = {"fence": _code, "code_block": _code, "image": _image, "math_inline": _math, "math_block": _math}
_markdown.renderer.rules.update(_rules)  # type: ignore[attr-defined]
