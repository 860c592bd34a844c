"""Markdown -> one HTML page that loads nothing and runs nothing; its content policy forbids both.

Raw HTML in the Markdown stays text, except `<br>`, which table cells need. Pictures are put into the page itself.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping
from typing import Any

from markdown_it import MarkdownIt

CSS = """
:root{color-scheme:light dark;--bg:#fff;--ink:#24292f;--faint:#5f6973;--line:#e3e6ea;--soft:#f6f7f9}
@media(prefers-color-scheme:dark){:root{--bg:#161b22;--ink:#e6edf3;--faint:#98a2ad;--line:#2f3742;--soft:#1e252e}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.65 system-ui,Roboto,
"PingFang SC","Noto Sans CJK SC","Microsoft YaHei","WenQuanYi Micro Hei",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:52rem;margin:0 auto;padding:2rem 1.1rem 4rem}h1{font-size:1.6rem;line-height:1.25;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.75rem 0 .75rem;padding-top:1.25rem;border-top:1px solid var(--line)}
p{margin:.6rem 0;overflow-wrap:anywhere}p>em:only-child{font-style:normal;font-size:.875rem;color:var(--faint)}
code{font:.875em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--soft);border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem;overflow-x:auto}
ul{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;padding:0;list-style:none}
li{background:var(--soft);border:1px solid var(--line);border-radius:10px;padding:.7rem .9rem;color:var(--faint);
font-size:.8125rem;line-height:1.4}
li strong{display:block;font-size:1.35rem;line-height:1.35;color:var(--ink)}
.scroll{overflow-x:auto;margin:1rem 0;border:1px solid var(--line);border-radius:10px;padding:.3rem .9rem}
table{border-collapse:collapse;width:100%;font-size:.9rem;line-height:1.55}
th,td{text-align:left;vertical-align:top;padding:.4rem 1rem .4rem 0;border-bottom:1px solid var(--line)}
tr>:last-child{padding-right:0;overflow-wrap:anywhere}tbody tr:last-child td{border-bottom:0}
tr>:first-child{white-space:nowrap;color:var(--faint);width:6.5rem;font-weight:400}
[style]{white-space:nowrap;font-variant-numeric:tabular-nums}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem;margin:1rem 0}
img{width:100%;background:#fff;border:1px solid var(--line);border-radius:10px;padding:.6rem}
img:first-child:nth-last-child(odd){grid-column:1/-1}
@media(max-width:30rem){body{font-size:15px}ul{grid-template-columns:1fr 1fr}tr>:first-child{width:auto}}
"""
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
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="scroll" tabindex="0"><table>').replace("</table>", "</table></div>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _line_end(state: Any, silent: bool) -> bool:
    """Read `<br>` as the end of a line: a rule for markdown-it's inline parser."""
    if not state.src.startswith("<br>", state.pos):
        return False
    if not silent:
        state.push("hardbreak", "br", 0)
    state.pos += len("<br>")
    return True
