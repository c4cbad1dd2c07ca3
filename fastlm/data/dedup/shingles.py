"""Words of texts as 64-bit numbers, and n-grams of them, which near duplicates and contamination are found by.

A word is a run of letters, marks, digits and underscores; case, full-width forms and punctuation count for nothing.
Scripts that put no blanks between words (Han, kana, Bopomofo, Thai, Lao, Tibetan, Burmese, Khmer) go by the
character: each is a word of its own, so that five words are five words of English and five characters of Chinese.

A word's number is a polynomial in random values of its characters, modulo 2^64, and depends on the word alone: array
operations find those of many texts at once, several times as fast as a call of a hash function for each.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

BLOCK = 1 << 17  # characters worked on at once: its arrays fit in a core's cache
_LAST = 0x323B0  # beyond it no letters are assigned
_LETTER, _ALONE = 1, 2
_UNSPACED = (
    (0x0E00, 0x1000), (0x1000, 0x10A0), (0x1780, 0x1800), (0x2E80, 0x2FE0), (0x3005, 0x3008), (0x3040, 0x3130),
    (0x31F0, 0x3200), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0xFF66, 0xFF9E), (0x20000, _LAST),
)  # fmt: skip


class Grams(NamedTuple):
    """N-grams of several texts: those of text i are hashes[offsets[i]:offsets[i + 1]], uint64, in their order."""

    hashes: np.ndarray
    offsets: np.ndarray

    def of(self, text: int) -> np.ndarray:
        """Those of one text."""
        return self.hashes[self.offsets[text] : self.offsets[text + 1]]


def batches(texts: Iterable[str], chars: int = BLOCK) -> Iterator[list[str]]:
    """Texts in lists of about `chars` characters in all; a longer text is alone."""
    batch: list[str] = []
    room = chars
    for text in texts:
        if len(text) > room and batch:
            yield batch
            batch, room = [], chars
        batch.append(text)
        room -= len(text) + 1
    if batch:
        yield batch


def words(texts: list[str]) -> Grams:
    """The words of each text, each as a number that depends on it alone."""
    if sum(map(len, texts)) + len(texts) <= BLOCK:
        return _block_words(_code_points("\n".join(texts)), _ends(texts))
    parts = [_long_words(text) for text in texts]
    return Grams(np.concatenate(parts), _offsets([part.size for part in parts]))


def grams(numbers: Grams, n: int, short: bool = True) -> Grams:
    """The n-grams of each text's words.

    Args:
        numbers: what `words` gave.
        n: words a gram.
        short: a text with fewer words than n has one gram, of all of them; otherwise it has none.
    """
    found, offsets = numbers
    counts, starts, ends = np.diff(offsets), offsets[:-1], offsets[1:]
    hashes = np.zeros(found.size, np.uint64)
    for start in range(0, found.size, BLOCK):
        for place, weight in enumerate(_weights(n)):
            part = found[start + place : min(start + BLOCK, found.size) + place] * weight
            hashes[start : start + part.size] += part
    whole = np.ones(found.size, bool)
    for place in range(1, n):
        whole[np.maximum(ends - place, starts)[counts > 0]] = False
    few = np.flatnonzero((counts > 0) & (counts < n) & short)
    for start, end in zip(starts[few].tolist(), ends[few].tolist(), strict=True):
        hashes[start] = (found[start:end] * _weights(n)[: end - start]).sum(dtype=np.uint64)
    whole[starts[few]] = True
    sizes = np.where(counts >= n, counts - n + 1, (counts > 0) & short)
    return Grams(mixed(hashes[whole]), _offsets(sizes))


def shingles(texts: list[str], n: int) -> Grams:
    """The n-grams of each text, with repeats; a text with fewer words has one gram, one without words none."""
    return grams(words(texts), n)


def mixed(numbers: np.ndarray) -> np.ndarray:
    """Numbers whose every bit depends on all bits of those given, one to one: the finalizer of SplitMix64."""
    numbers = numbers.astype(np.uint64)
    numbers ^= numbers >> np.uint64(30)
    numbers *= np.uint64(0xBF58476D1CE4E5B9)
    numbers ^= numbers >> np.uint64(27)
    numbers *= np.uint64(0x94D049BB133111EB)
    numbers ^= numbers >> np.uint64(31)
    return numbers


def constants(count: int, seed: int) -> np.ndarray:
    """Odd 64-bit numbers without a pattern, the same on every machine."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return mixed(steps + mixed(np.array([seed], np.uint64))) | np.uint64(1)


def _long_words(text: str) -> np.ndarray:
    """The words of one text of any length, block by block; a word longer than a block counts as several."""
    parts = []
    at = 0
    while at < len(text):
        piece = text[at : at + BLOCK]
        codes = _code_points(piece)
        if at + len(piece) < len(text):
            breaks = np.flatnonzero(_characters().kinds[codes] != _LETTER)
            codes = codes[: breaks[-1] + 1] if breaks.size else codes
        parts.append(_block_words(codes, [codes.size]).hashes)
        at += codes.size
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)


def _block_words(codes: np.ndarray, ends: list[int]) -> Grams:
    table, powers, inverses = _characters(), *_powers()
    kinds = table.kinds[codes]
    letter, alone = kinds == _LETTER, kinds == _ALONE
    follows = np.zeros(codes.size + 1, bool)  # whether the character and the one before are of one run
    np.logical_and(letter[1:], letter[:-1], out=follows[1:-1])
    either = letter | alone
    first = np.flatnonzero(either & ~follows[:-1])
    last = np.flatnonzero(either & ~follows[1:])
    terms = table.values[codes]
    terms *= powers[: codes.size]
    sums = np.cumsum(terms, dtype=np.uint64)
    numbers = (sums[last] - sums[first] + terms[first]) * inverses[first]
    return Grams(mixed(numbers), np.concatenate([[0], np.searchsorted(first, ends)]))


def _code_points(text: str) -> np.ndarray:
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return np.minimum(codes, _LAST)


def _ends(texts: list[str]) -> list[int]:
    return (np.cumsum([len(text) + 1 for text in texts]) - 1).tolist()


def _offsets(counts: list[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


class _Characters(NamedTuple):
    kinds: np.ndarray
    values: np.ndarray


@functools.cache
def _characters() -> _Characters:
    """For each code point whether it is a letter, a word or neither, and its random value; 20 ms, once a process."""
    kinds = np.zeros(_LAST + 1, np.uint8)
    lower = np.arange(_LAST + 1, dtype=np.uint64)
    for code in range(_LAST):
        character = chr(code)
        if unicodedata.category(character)[0] in "LMN" or character == "_":
            kinds[code] = _LETTER
            lower[code] = ord(character.lower()[0])
    for first, end in _UNSPACED:
        kinds[first:end] *= _ALONE
    wide = slice(0xFF01, 0xFF5F)  # the full-width forms of ASCII
    kinds[wide], lower[wide] = kinds[0x21:0x7F], lower[0x21:0x7F]
    return _Characters(kinds, mixed(lower + np.uint64(0x9E3779B97F4A7C15)))


@functools.cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """The powers of an odd number modulo 2^64, and their inverses."""
    base = 0x5851F42D4C957F2D
    steps = np.ones((2, BLOCK), np.uint64)
    steps[0, 1:], steps[1, 1:] = base, pow(base, -1, 1 << 64)
    powers, inverses = np.cumprod(steps, axis=1, dtype=np.uint64)
    return powers, inverses


@functools.cache
def _weights(n: int) -> np.ndarray:
    return constants(n, seed=1)
