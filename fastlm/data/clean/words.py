"""Words and lines, which rules on quality count, of scripts with blanks between words and of those without."""

from __future__ import annotations

import functools
import logging
import re
import warnings
from typing import Any, Literal

import numpy as np

# Thai and Lao, Burmese, Khmer, Han, Kana: no blanks between words.
_RANGES = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x2FDF), (0x3005, 0x3005), (0x3007, 0x3007),
    (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF),
)  # fmt: skip
_UNSPACED = "".join(f"{chr(first)}-{chr(last)}" for first, last in _RANGES)
_ONE_UNSPACED = re.compile(f"[{_UNSPACED}]")
# Punctuation belongs to the character before it, as it belongs to the word before it where there are blanks.
_WORD = re.compile(rf"[{_UNSPACED}][^\w\s]*|[^\s{_UNSPACED}]+")

_SURROGATE = re.compile("[\ud800-\udfff]")
CHARACTERS_A_WORD = 1.5

Segmenter = Literal["characters", "jieba"]
SEGMENTERS = {"jieba": ("chinese", "jieba")}  # for `needs` of a step with an option `chinese`


def has_unspaced(text: str) -> bool:
    """Whether a script without blanks between words occurs."""
    return not text.isascii() and _ONE_UNSPACED.search(text) is not None


def count_unspaced(text: str) -> int:
    """How many characters are of scripts without blanks between words."""
    if not has_unspaced(text):
        return 0
    units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), np.uint16)
    return int(_unspaced_units()[units].sum())


def unspaced(codes: np.ndarray) -> np.ndarray:
    """For each code point of an array whether it is of a script without blanks between words."""
    bounds = np.array(_RANGES, np.uint32) + np.array([0, 1], np.uint32)
    return np.searchsorted(bounds.reshape(-1), codes, side="right") % 2 == 1


@functools.cache
def _unspaced_units() -> np.ndarray:
    """For each unit of UTF-16 whether it is one of them, or the first of the two of one beyond the first plane."""
    table = np.zeros(1 << 16, np.bool_)
    for first, last in _RANGES:
        if last > 0xFFFF:
            first, last = (0xD800 + (code - 0x10000 >> 10) for code in (first, last))
        table[first : last + 1] = True
    return table


class Words:
    """The words of a text.

    Attributes:
        words: what lies between blanks. Of a script without blanks each character with the punctuation that follows,
            or each word that jieba finds.
        count: how many words that is. Characters of a script without blanks count as 1/CHARACTERS_A_WORD of a word.
        unspaced: whether most of it is in a script without blanks, so that rules on the form of English words say
            nothing.
        scale: how many of `words` take the place of one word in the rules: 1, or CHARACTERS_A_WORD.
    """

    __slots__ = ("count", "scale", "unspaced", "words")

    def __init__(self, text: str, chinese: Segmenter = "characters"):
        self.scale = 1.0
        self.unspaced = False
        if not has_unspaced(text):
            self.words = text.split()
            self.count: float = len(self.words)
            return
        characters = count_unspaced(text)
        if chinese == "jieba":
            self.words = _cut(text)
            self.count = len(self.words)
            self.unspaced = characters > self.count * CHARACTERS_A_WORD / 2
            return
        self.words = _WORD.findall(text)
        self.count = len(self.words) - characters + characters / CHARACTERS_A_WORD
        self.unspaced = characters / CHARACTERS_A_WORD > self.count / 2
        self.scale = CHARACTERS_A_WORD if self.unspaced else 1.0


def _cut(text: str) -> list[str]:
    """What jieba finds, with the punctuation that follows a word."""
    words: list[str] = []
    blank = True
    for word in jieba_tokenizer().cut(text):
        if word.isspace():
            blank = True
        elif blank or any(map(str.isalnum, word)):
            words.append(word)
            blank = False
        else:
            words[-1] += word
    return words


def words_of(text: str, chinese: Segmenter = "characters") -> Words:
    """`Words` of a text, kept for the next step that asks for those of the same; not to be written to."""
    return _kept(text, chinese) if len(text) <= _KEPT_CHARACTERS else Words(text, chinese)


_KEPT_CHARACTERS = 1 << 18


@functools.lru_cache(maxsize=1)
def _kept(text: str, chinese: Segmenter) -> Words:
    return Words(text, chinese)


@functools.cache
def jieba_tokenizer() -> Any:
    """jieba with its own dictionary, loaded once (a second), and quietly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its source holds invalid escapes, which are said when it is compiled
        import jieba

    jieba.setLogLevel(logging.WARNING)
    tokenizer = jieba.Tokenizer()
    tokenizer.initialize()
    return tokenizer


def encodable(text: str) -> str:
    """With U+FFFD for lone surrogates, which JSON can hold and libraries in C cannot read."""
    return text if text.isascii() or _SURROGATE.search(text) is None else _SURROGATE.sub("\ufffd", text)


def lines_of(text: str) -> list[str]:
    """The lines that are not blank, without blanks around them."""
    return [line for line in map(str.strip, text.split("\n")) if line]
