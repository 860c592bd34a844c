"""Markdown -> one HTML page that loads nothing and runs nothing; its content policy forbids both.

Raw HTML in the Markdown stays text, except `<br>`, which table cells need. Pictures are put into the page itself.
"""

import base64
import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

CSS = Path(__file__).with_name("report.css")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
HAN = re.compile(r"[\u3400-\u9fff]")


def page(title: str, markdown: str, pictures: Mapping[str, bytes]) -> str:
    """Render Markdown whose image sources are names in `pictures`."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.inline.ruler.before("autolink", "line_end", _line_end)
    tokens = parser.parse(markdown)
    for opening, token in zip(tokens, tokens[1:], strict=False):
        if token.type == "inline" and HAN.search(token.content):
            opening.attrSet("lang", "zh")
        for image in (t for t in token.children or () if t.type == "image"):
            data = base64.b64encode(pictures[str(image.attrs["src"])]).decode()
            image.attrSet("src", f"data:image/png;base64,{data}")
            opening.attrSet("class", "pictures")
    css = CSS.read_text(encoding="utf-8")
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="scroll" tabindex="0"><table>').replace("</table>", "</table></div>")
    return ('<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(title)}</title>\n<style>\n{css}</style>\n</head>\n"
            f"<body>\n<main>\n{body}</main>\n</body>\n</html>\n")  # fmt: skip


def _line_end(state: Any, silent: bool) -> bool:
    """Read `<br>` as the end of a line: a rule for markdown-it's inline parser."""
    if not state.src.startswith("<br>", state.pos):
        return False
    if not silent:
        state.push("hardbreak", "br", 0)
    state.pos += len("<br>")
    return True
