"""Characters: mojibake, control characters, whitespace, and the two scripts of Chinese."""

from __future__ import annotations

import functools
import operator
import re
import unicodedata
from typing import Any, Literal

from ..document import Document, Dropped
from .registry import Count, Share, step
from .words import encodable

# Of no mojibake: Han, Kana, Hangul, their punctuation and full-width forms, what lies beyond the first plane.
_INNOCENT = (
    "\u2e80-\u303f\u3040-\u30ff\u3100-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef"
    "\U00010000-\U0010ffff"
)
_QUOTES = "\u2014\u2018\u2019\u201c\u201d\u2026"
_ODD = f"[^\x00-\x7f{_QUOTES}{_INNOCENT}]"
# What every mojibake that ftfy knows holds: two characters beyond ASCII together, of which one is odd, or one that says
# enough alone. "f\u00fcr" and Chinese in quotation marks are passed over at 30 times the speed of a look at each line.
_SUSPECT = re.compile(
    f"[^\x00-\x7f{_INNOCENT}](?:(?<={_ODD})[^\x00-\x7f{_INNOCENT}]|(?<=[{_QUOTES}]){_ODD}"
    "|(?<=[\x80-\x9f\u00c2\u00c3\u0152\u0153\ud800-\udfff]))"
)

_LINE = re.compile("[^\n]*\n|[^\n]+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]{0,1000}(?:\x07|\x1b\\)|[@-Z\\^_])?")
_INVISIBLE = "\u00ad\u200b\u2060\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff"
_CONTROL = re.compile(f"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029{_INVISIBLE}]")
_BREAKS = re.compile("[\x0b\x0c\x85\u2028\u2029]")


@step(needs=("ftfy",))
def fix_unicode(
    document: Document, *, normalization: Literal["none", "NFC", "NFD", "NFKC", "NFKD"] = "none"
) -> Document | Dropped:
    """Repair mojibake, text decoded in a wrong encoding, by ftfy, line by line.

    Full-width forms and the punctuation of Chinese, ligatures, curly quotation marks, entities and line ends stay as
    they are; control characters have a step of their own. `normalization` is off: NFKC makes full-width forms and
    ligatures plain.
    """
    text = document.text
    if text.isascii():
        return document
    if _SUSPECT.search(text) is not None:
        text = "".join(map(_repaired, _LINE.findall(text)))
    if normalization != "none":
        text = unicodedata.normalize(normalization, text)
    return document if text == document.text else document._replace(text=text)


def _repaired(line: str) -> str:
    if line.isascii() or _SUSPECT.search(line) is None:
        return line
    import ftfy

    return ftfy.fix_text(line, _ftfy_config()) if ftfy.is_bad(line) or _SURROGATE.search(line) else line


@functools.cache
def _ftfy_config() -> Any:
    import ftfy

    return ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )


@step("replacement_characters")
def control_characters(document: Document, *, max_replacement: Share = 0.01) -> Document | Dropped:
    """Remove control and invisible characters and terminals' escape sequences.

    Tabs, line feeds and carriage returns stay; form feed, vertical tab, next line and Unicode's separators of lines and
    paragraphs become line feeds. Joiners and marks of direction stay, for scripts and emoji need them; soft hyphens,
    zero-width spaces, byte order marks, lone surrogates and noncharacters go. A document of which more than
    `max_replacement` is U+FFFD, left by a decoder, is dropped.
    """
    text = document.text
    if not text.isascii() and text.count("\ufffd") > max_replacement * len(text):
        return Dropped("replacement_characters")
    if _CONTROL.search(text) is None:
        return document
    if "\x1b" in text:
        text = _ESCAPES.sub("", text)
    return document._replace(text=_CONTROL.sub("", _BREAKS.sub("\n", text)))


_ODD_BLANKS = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")


@step("empty")
def whitespace(
    document: Document,
    *,
    line_ends: Literal["lf", "keep"] = "lf",
    max_blank_lines: Count = 1,
    collapse: bool = False,
) -> Document | Dropped:
    """Remove blanks at the ends of lines and surplus blank lines; drop what is blank.

    No-break and typographic blanks become plain ones; the ideographic blank U+3000 stays within and at the start of
    lines, as Chinese indents with it. `collapse` makes one blank of several within a line; indentation stays. With
    `line_ends` "lf", CR LF and CR become LF.
    """
    text = document.text
    if not text.strip():
        return Dropped("empty")
    if line_ends == "lf" and "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii():
        text = _ODD_BLANKS.sub(" ", text)
    has_returns = "\r" in text
    # Quicker than to look for a blank at the end of a line first.
    text = "\n".join(map(_trimmed if has_returns else _TRIMMED, text.split("\n")))
    if collapse:
        text = _INNER_BLANKS.sub(" ", text)
    if has_returns or "\n" * (max_blank_lines + 2) in text:
        text = _surplus(max_blank_lines, has_returns).sub(r"\1", text)
    text = text.lstrip("\r\n")
    if text.endswith(("\n\n", "\n\r\n")):
        text = text.rstrip("\r\n") + ("\r\n" if text.endswith("\r\n") else "\n")
    return document if text == document.text else document._replace(text=text)


_BLANKS = " \t\u3000"
_INNER_BLANKS = re.compile(r"(?<=[^ \t\n])[ \t]{2,}")


_TRIMMED = operator.methodcaller("rstrip", _BLANKS)


def _trimmed(line: str) -> str:
    return line.rstrip(_BLANKS + "\r") + ("\r" if line.endswith("\r") else "")


@functools.cache
def _surplus(most: int, has_returns: bool) -> re.Pattern[str]:
    end = r"(?:\r?\n)" if has_returns else r"\n"  # ten times as quick
    return re.compile(rf"({end}{{{most + 1}}}){end}+")


_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_KANA = re.compile("[\u3040-\u30ff\u31f0-\u31ff]")


@step(needs=("opencc",))
def chinese_script(
    document: Document,
    *,
    conversion: Literal["t2s", "s2t", "s2tw", "s2twp", "s2hk", "tw2s", "tw2sp", "hk2s", "t2tw", "t2hk"] = "t2s",
) -> Document | Dropped:
    """Write Chinese in the other script, by OpenCC's conversion of that name; t2s makes traditional simplified.

    Where meta["language"] names another language, or Kana say that it is Japanese, nothing changes.
    """
    text = document.text
    if document.meta.get("language", "zh") != "zh" or text.isascii() or _HAN.search(text) is None:
        return document
    if len(_KANA.findall(text)) * 20 > len(_HAN.findall(text)):
        return document
    converted = _converter(conversion).convert(encodable(text))
    return document if converted == text else document._replace(text=converted)


@functools.cache
def _converter(conversion: str) -> Any:
    import opencc

    return opencc.OpenCC(conversion)
