"""Gopher's rules on quality and repetition (Rae et al. 2021, arXiv:2112.11446, appendix A1.1 and table A1).

The thresholds are the paper's. It leaves open what a word and a character are, so it is said here: words are split as
`Words` does, with their punctuation; characters are those of words, for n-grams, and of lines without blanks around
them. What repeats is what occurs again after its first time.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import filterfalse

import numpy as np

from ..document import Document, Dropped
from .registry import Count, Share, step
from .words import SEGMENTERS, Segmenter, Words, lines_of, words_of

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_BULLETS = (
    "\u2022",
    "\u2023",
    "\u25b6",
    "\u25c0",
    "\u25e6",
    "\u25a0",
    "\u25a1",
    "\u25aa",
    "\u25ab",
    "-",
    "*",
    "\u00b7",
)
_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_ELLIPSES = ("...", "\u2026")
_PUNCTUATION = "\"'.,;:!?()[]{}*_-\u2018\u2019\u201c\u201d"


def _check_quality(*, min_words: int, max_words: int, min_word_length: float, max_word_length: float, **_: object):
    if min_words > max_words:
        raise ValueError(f"min_words is {min_words}, expected at most max_words, {max_words}")
    if min_word_length > max_word_length:
        raise ValueError(f"min_word_length is {min_word_length}, expected at most max_word_length, {max_word_length}")


@step(
    "few_words", "many_words", "short_words", "long_words", "symbols", "bullets", "ellipses", "no_letters",
    "stop_words", needs=SEGMENTERS, check=_check_quality,
)  # fmt: skip
def gopher_quality(
    document: Document,
    *,
    min_words: Count = 50,
    max_words: Count = 100_000,
    min_word_length: float = 3.0,
    max_word_length: float = 10.0,
    max_symbols: float = 0.1,
    max_bullets: Share = 0.9,
    max_ellipses: Share = 0.3,
    min_letters: Share = 0.8,
    min_stop_words: Count = 2,
    stop_words: tuple[str, ...] = STOP_WORDS,
    chinese: Segmenter = "characters",
) -> Document | Dropped:
    """Drop what Gopher's rules on quality call no prose.

    50 to 100,000 words; a mean of 3 to 10 characters a word; at most 0.1 of "#" and of ellipses a word; at most 90 % of
    lines that begin with a bullet and 30 % that end with an ellipsis; 80 % of words with a letter; two of eight English
    stop words. Of text in a script without blanks between words the length of words and the stop words say nothing, and
    are left out.
    """
    text = document.text
    words = words_of(text, chinese)
    if words.count < min_words:
        return Dropped("few_words")
    if words.count > max_words:
        return Dropped("many_words")
    if not words.unspaced and words.count:
        mean = len("".join(words.words)) / len(words.words)
        if mean < min_word_length:
            return Dropped("short_words")
        if mean > max_word_length:
            return Dropped("long_words")
    most = max_symbols * words.count
    if text.count("#") > most or sum(map(text.count, _ELLIPSES)) > most:
        return Dropped("symbols")
    lines = lines_of(text)
    if sum(line.startswith(_BULLETS) for line in lines) > max_bullets * len(lines):
        return Dropped("bullets")
    if sum(line.endswith(_ELLIPSES) for line in lines) > max_ellipses * len(lines):
        return Dropped("ellipses")
    if not _have_letters(words.words, min_letters):
        return Dropped("no_letters")
    if not words.unspaced and not _have_stop_words(words.words, stop_words, min_stop_words):
        return Dropped("stop_words")
    return document


def _have_letters(words: list[str], share: float) -> bool:
    """Whether that share of words holds a letter."""
    least = share * len(words)
    others = list(filterfalse(str.isalpha, words))  # with punctuation, most of them
    with_letters = len(words) - len(others)
    return with_letters >= least or with_letters + sum(any(map(str.isalpha, word)) for word in others) >= least


def _have_stop_words(words: list[str], stop_words: tuple[str, ...], least: int) -> bool:
    found = set(stop_words).intersection(words)
    if len(found) >= least:
        return True
    return len(set(stop_words).intersection(word.strip(_PUNCTUATION).lower() for word in words)) >= least


@step(
    "duplicate_lines", "duplicate_paragraphs", "duplicate_line_characters", "duplicate_paragraph_characters",
    *(f"top_{n}_gram" for n in (2, 3, 4)), *(f"duplicate_{n}_grams" for n in range(5, 11)),
    needs=SEGMENTERS,
)  # fmt: skip
def gopher_repetition(
    document: Document,
    *,
    max_duplicate_lines: Share = 0.30,
    max_duplicate_paragraphs: Share = 0.30,
    max_duplicate_line_characters: Share = 0.20,
    max_duplicate_paragraph_characters: Share = 0.20,
    max_top_2_gram: Share = 0.20,
    max_top_3_gram: Share = 0.18,
    max_top_4_gram: Share = 0.16,
    max_duplicate_5_grams: Share = 0.15,
    max_duplicate_6_grams: Share = 0.14,
    max_duplicate_7_grams: Share = 0.13,
    max_duplicate_8_grams: Share = 0.12,
    max_duplicate_9_grams: Share = 0.11,
    max_duplicate_10_grams: Share = 0.10,
    chinese: Segmenter = "characters",
) -> Document | Dropped:
    """Drop what repeats itself beyond the thresholds of Gopher's table A1.

    Shares of lines and paragraphs that occurred before, and of their characters; the share of characters in the most
    frequent n-gram of 2 to 4 words; the share of characters in n-grams of 5 to 10 words that occurred before, each
    character once. Where most of the text is in a script without blanks between words and `chinese` is "characters",
    an n-gram is 1.5 n characters, rounded up, for n characters of Chinese say less than n words do.
    """
    text = document.text
    lines = lines_of(text)
    count, characters = duplicate_shares(lines)
    if count > max_duplicate_lines:
        return Dropped("duplicate_lines")
    if characters > max_duplicate_line_characters:
        return Dropped("duplicate_line_characters")
    count, characters = duplicate_shares(paragraphs_of(text))
    if count > max_duplicate_paragraphs:
        return Dropped("duplicate_paragraphs")
    if characters > max_duplicate_paragraph_characters:
        return Dropped("duplicate_paragraph_characters")
    words = words_of(text, chinese)
    most = {2: max_top_2_gram, 3: max_top_3_gram, 4: max_top_4_gram}
    if len(words.words) < 2:
        return document
    grams = _Grams(words.words)
    if (n := _first_top(words, grams, most)) is not None:
        return Dropped(f"top_{n}_gram")
    most = {
        5: max_duplicate_5_grams, 6: max_duplicate_6_grams, 7: max_duplicate_7_grams,
        8: max_duplicate_8_grams, 9: max_duplicate_9_grams, 10: max_duplicate_10_grams,
    }  # fmt: skip
    if (n := _first_duplicate(words, grams, most)) is not None:
        return Dropped(f"duplicate_{n}_grams")
    return document


def paragraphs_of(text: str) -> list[str]:
    """What lies between blank lines, without blanks around it."""
    return [part for part in map(str.strip, _BLANK_LINES.split(text)) if part] if "\n" in text else [text]


def duplicate_shares(parts: Sequence[str]) -> tuple[float, float]:
    """(share of parts that occurred before, share of characters in them)."""
    seen = Counter(parts)
    if len(seen) == len(parts):
        return 0.0, 0.0
    characters = sum(map(len, parts))
    return 1 - len(seen) / len(parts), 1 - sum(map(len, seen)) / characters


def top_gram_share(words: Sequence[str], size: int) -> float:
    """Share of the words' characters in the n-gram of `size` words that occurs most often, if it occurs twice."""
    counts = Counter(zip(*(words[i:] for i in range(size)), strict=False))
    most = max(counts.values(), default=0)
    if most < 2:
        return 0.0
    longest = max(sum(map(len, gram)) for gram, count in counts.items() if count == most)
    return most * longest / sum(map(len, words))


def duplicate_gram_shares(words: Sequence[str], sizes: Sequence[int], starts: Sequence[int]) -> list[float]:
    """For each size, in rising order, the share of characters in n-grams that occurred before, each character once.

    `starts` are where n-grams of the first size begin that may occur more than once.
    """
    shares = [0.0] * len(sizes)
    for number, size in enumerate(sizes):
        grams = [tuple(words[start : start + size]) for start in starts if start + size <= len(words)]
        if len(set(grams)) == len(grams):
            break
        counts = Counter(grams)
        seen: set[tuple[str, ...]] = set()
        again = []
        for start, gram in zip(starts, grams, strict=False):
            if gram in seen:
                again.append(start)
            seen.add(gram)
        shares[number] = _covered(words, again, size)
        # Only where this one is repeated can a longer one be.
        starts = [start for start, gram in zip(starts, grams, strict=False) if counts[gram] > 1]
    return shares


def _covered(words: Sequence[str], starts: Sequence[int], size: int) -> float:
    places = {place for start in starts for place in range(start, start + size)}
    return sum(len(words[place]) for place in places) / len("".join(words))


def _size(words: Words, n: int) -> int:
    return math.ceil(n * words.scale)


_LENGTH_BITS = 10  # of a number give way to the n-gram's length where characters are counted
_LENGTH_MASK = np.uint32((1 << _LENGTH_BITS) - 1)
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_BASE = 0x2C1B3C6D
_UTF16 = np.dtype("<u2")


class _Grams:
    """A number for each n-gram of a text: equal n-grams have equal numbers, others nearly always different ones.

    So none occurs more often than its number does, which bounds every share; where that leaves a rule open, the n-grams
    themselves are counted. A word's number is made of its last eight bytes, by numpy for all words at once.

    Attributes:
        characters: of all words.
        lengths: (words,) uint32 of each, or a little more where some lie beyond the first plane.
    """

    def __init__(self, words: Sequence[str]):
        text = " ".join(words)  # no word holds a blank
        self.characters = len(text) - len(words) + 1
        encoding, unit, dtype = ("ascii", 1, np.uint8) if text.isascii() else ("utf-16-le", 2, _UTF16)
        load = 8 // unit
        data = f"{' ' * load}{text} ".encode(encoding, "surrogatepass")
        blanks: np.ndarray = (np.frombuffer(data, dtype)[load - 1 :] == ord(" ")).nonzero()[0]
        self.lengths = (blanks[1:] - blanks[:-1] - 1).astype(np.uint32)
        ends = np.ndarray(len(data) // unit - load, "<u8", data, strides=(unit,))[blanks[1:] - 1]
        ends >>= _SHIFTS[unit].take(self.lengths, mode="clip")  # what lies before a word is shifted out
        ends *= _FACTOR
        self._numbers = {1: ends.view("<u4")[1::2].copy()}

    def numbers(self, size: int) -> np.ndarray:
        """(words - size + 1,) uint32: the number of the n-gram of `size` words that begins at each word."""
        if size not in self._numbers:
            half = size // 2
            count = max(0, len(self.lengths) - size + 1)
            self._numbers[size] = self.numbers(size - half)[:count] * _power(half) + self.numbers(half)[size - half :]
        return self._numbers[size]

    def heaviest(self, size: int) -> float:
        """No n-gram of `size` words that occurs twice has more characters than that in all its occurrences."""
        if size * int(self.lengths.max()) > _LENGTH_MASK:
            return math.inf
        numbers = self.numbers(size) & ~_LENGTH_MASK
        for first in range(size):
            numbers += self.lengths[first : first + len(numbers)]
        again = _repeated(numbers)
        if not len(again):
            return 0
        lasts = np.concatenate((again[1:] != again[:-1], [True])).nonzero()[0]
        counts = lasts + 2
        counts[1:] -= lasts[:-1] + 1
        return int((counts * (again[lasts] & _LENGTH_MASK)).max())

    def again(self, size: int) -> np.ndarray:
        """Where n-grams of `size` words begin that may occur more than once."""
        numbers = self.numbers(size)
        again = _repeated(numbers)
        return (again.take(again.searchsorted(numbers), mode="clip") == numbers).nonzero()[0] if len(again) else again

    def characters_from(self, starts: np.ndarray, size: int) -> int:
        """The characters of the `size` words from each of `starts` on, some of them more than once."""
        if not len(starts):
            return 0
        before = np.zeros(len(self.lengths) + 1, np.int64)
        np.cumsum(self.lengths, out=before[1:])
        return int((before.take(starts + size, mode="clip") - before[starts]).sum())

    def duplicates(self, size: int, starts: np.ndarray) -> tuple[np.ndarray, int]:
        """(which of `starts` begin n-grams that may occur more than once, at most how many characters occurred before).

        The characters are those of n-grams of `size` words that occurred before, each once.
        """
        starts = starts[: starts.searchsorted(len(self.lengths) - size, side="right")]
        numbers = self.numbers(size)[starts]
        order = numbers.argsort(kind="stable")
        equal = np.diff(numbers[order]) == 0
        covered = np.zeros(len(self.lengths), np.bool_)
        for place in range(size):
            covered[starts[order[1:][equal]] + place] = True
        repeated = np.zeros(len(starts), np.bool_)
        repeated[order[1:][equal]] = repeated[order[:-1][equal]] = True
        return starts[repeated], int(self.lengths[covered].sum())


# By how many bits the last eight bytes of a word move, by its length in units of one byte or two.
_SHIFTS = {unit: np.arange(64, -1, -8 * unit).astype(np.uint64) for unit in (1, 2)}


@functools.cache
def _power(exponent: int) -> np.uint32:
    return np.uint32(pow(_BASE, exponent, 1 << 32))


def _repeated(numbers: np.ndarray) -> np.ndarray:
    """What occurs more than once, in rising order: k times what occurs k + 1 times."""
    numbers = np.sort(numbers)
    return numbers[1:][numbers[1:] == numbers[:-1]]


def _first_top(words: Words, grams: _Grams, most: Mapping[int, float]) -> int | None:
    """The first n whose most frequent n-gram takes more than its share; counted only where bounds leave it open.

    No n-gram occurs more often than a pair of neighbours in it: its characters are at most those in all occurrences of
    the pair that takes most, times half of n.
    """
    pair = grams.heaviest(2)
    for n, share in most.items():
        size, least = _size(words, n), share * grams.characters
        if -(-size // 2) * pair > least and grams.heaviest(size) > least and top_gram_share(words.words, size) > share:
            return n
    return None


def _first_duplicate(words: Words, grams: _Grams, most: Mapping[int, float]) -> int | None:
    """The first n whose n-grams that occurred before take more than their share; counted where bounds leave it open.

    In most texts only a few words are repeated in a few places, and all that could be is less than any share.
    """
    sizes = [_size(words, n) for n in most]
    starts = grams.again(sizes[0])
    if grams.characters_from(starts, sizes[-1]) <= min(most.values()) * grams.characters:
        return None
    for (n, share), size in zip(most.items(), sizes, strict=True):
        starts, characters = grams.duplicates(size, starts)  # only where this one is repeated can a longer one be
        if characters > share * grams.characters:
            [exact] = duplicate_gram_shares(words.words, [size], starts.tolist())
            if exact > share:
                return n
    return None
