"""Limits on the size of documents and lines."""

from __future__ import annotations

from ..document import Document, Dropped
from .registry import Count, step
from .words import SEGMENTERS, Segmenter, lines_of, words_of


def _check(**limits: object) -> None:
    for name in ("characters", "words", "lines"):
        low, high = limits[f"min_{name}"], limits[f"max_{name}"]
        if high and low > high:  # type: ignore[operator]
            raise ValueError(f"min_{name} is {low}, expected at most max_{name}, {high}")


@step(
    "short", "long", "few_words", "many_words", "few_lines", "many_lines", "long_line", needs=SEGMENTERS, check=_check
)
def length(
    document: Document,
    *,
    min_characters: Count = 1,
    max_characters: Count = 0,
    min_words: Count = 0,
    max_words: Count = 0,
    min_lines: Count = 0,
    max_lines: Count = 0,
    max_line_length: Count = 0,
    chinese: Segmenter = "characters",
) -> Document | Dropped:
    """Drop documents that are too short or too long, in characters, words or lines; 0 is no limit.

    Lines that are blank do not count. Words of scripts without blanks are counted by their characters, three to two
    words, or by jieba.
    """
    text = document.text
    if len(text) < min_characters:
        return Dropped("short")
    if max_characters and len(text) > max_characters:
        return Dropped("long")
    if min_words or max_words:
        count = words_of(text, chinese).count
        if count < min_words:
            return Dropped("few_words")
        if max_words and count > max_words:
            return Dropped("many_words")
    if min_lines or max_lines or max_line_length:
        lines = lines_of(text)
        if len(lines) < min_lines:
            return Dropped("few_lines")
        if max_lines and len(lines) > max_lines:
            return Dropped("many_lines")
        if max_line_length and max(map(len, lines), default=0) > max_line_length:
            return Dropped("long_line")
    return document
