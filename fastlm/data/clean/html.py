"""HTML to text: whole pages without what is around the article, and fragments whole."""

from __future__ import annotations

import re
from typing import Any

from ..document import Document, Dropped
from .registry import step
from .words import encodable

_BLOCKS = frozenset((
    "address", "article", "aside", "blockquote", "dd", "div", "dl", "dt", "figcaption", "figure", "footer", "form",
    "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav", "ol", "p", "pre", "section", "table", "tr",
    "ul",
))  # fmt: skip
_MARKUP = re.compile(r"<[A-Za-z/!?]|&(?:#[0-9]|#[xX][0-9A-Fa-f]|[A-Za-z][A-Za-z0-9]*;)")
_BLANKS = re.compile(r"[ \t\n\r\f]+")
_HIDDEN = frozenset(
    ("script", "style", "template", "noscript", "head", "svg", "iframe", "object", "select", "textarea")
)


@step("empty", "unreadable", needs=("resiliparse",))
def html_page(
    document: Document,
    *,
    main_content: bool = True,
    links: bool = False,
    alt_texts: bool = False,
    comments: bool = False,
) -> Document | Dropped:
    """Turn a whole page into its text, without navigation, headers and footers unless `main_content` is false.

    Bulleted lists near the top of the page's tree are taken for navigation too, even within <main>: where they matter,
    as in recipes of dishes, set `main_content` to false and let boilerplate take the menus out.
    Text without a tag or an entity stays as it is. By resiliparse: against the sources of 89 pages of Python's
    documentation its words had a precision of 0.96 and a recall of 0.86, at 6.2 MB/s, and no page kept its navigation;
    trafilatura's had 0.94 and 0.87, at 0.4 MB/s, and 5 pages did.
    """
    if _MARKUP.search(document.text) is None:
        return document
    from resiliparse.extract.html2text import extract_plain_text

    try:
        text = extract_plain_text(
            encodable(document.text), main_content=main_content, links=links, alt_texts=alt_texts, comments=comments
        )
    except Exception:  # whatever a parser says of what it can't read
        return Dropped("unreadable")
    return document._replace(text=text) if text.strip() else Dropped("empty")


@step("empty", "unreadable", needs=("selectolax",))
def html_fragment(document: Document) -> Document | Dropped:
    """Turn a fragment of HTML into its text, all of it: blocks and <br> begin lines, entities become characters.

    Cells of a table are a tab apart. Scripts, styles and what else is not shown go. Text without a tag or an entity
    stays as it is.
    """
    if _MARKUP.search(document.text) is None:
        return document
    from selectolax.lexbor import LexborHTMLParser

    try:
        body = LexborHTMLParser(encodable(document.text)).body
    except Exception:
        return Dropped("unreadable")
    lines = map(str.rstrip, "".join(_pieces(body)).split("\n"))
    text = "\n".join(lines).strip("\n")
    return document._replace(text=text) if text.strip() else Dropped("empty")


def _pieces(body: Any) -> list[str]:
    """The text below a node, with an explicit stack: pages nest deeper than Python calls."""
    pieces: list[str] = [""]
    stack: list[tuple[Any, str]] = [(body, "")] if body is not None else []
    preformatted = 0
    while stack:
        node, leaving = stack.pop()
        if leaving:
            preformatted -= leaving == "pre"
            _break_line(pieces)
            continue
        tag = node.tag
        if tag == "-text":
            text = node.text(deep=False)
            if not preformatted:
                text = _BLANKS.sub(" ", text)
                text = text.lstrip(" ") if pieces[-1].endswith(("\n", " ")) or len(pieces) == 1 else text
            if text:
                pieces.append(text)
            continue
        if tag in _HIDDEN:
            continue
        if tag == "br":
            pieces.append("\n")
            continue
        if tag in _BLOCKS:
            _break_line(pieces)
            stack.append((node, tag))
            preformatted += tag == "pre"
        elif tag in ("td", "th") and not pieces[-1].endswith("\n"):
            pieces.append("\t")
        stack.extend((child, "") for child in reversed(list(node.iter(include_text=True))))
    return pieces


def _break_line(pieces: list[str]) -> None:
    if not pieces[-1].endswith("\n"):
        pieces.append("\n")
