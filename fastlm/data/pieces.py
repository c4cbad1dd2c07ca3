"""Cutting a long text into pieces so that working on the pieces equals working on the whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

WINDOW = 256  # characters looked at on each side of a cut
_TRIES = 64

# After a letter or digit and before anything else: there a word ends for every usual pre-tokenizer.
_WORD_END = re.compile(r"(?<=[^\W_])(?=\W)")


class PieceCutter:
    """Cuts a stream of text only where `transform(left) + transform(right) == transform(left + right)`.

    Places to cut are the ends of words. Each is checked on `WINDOW` characters to either side, which settles
    it for a transform that looks no further than that around the end of a word: every tokenizer that splits
    text into words first, and every Unicode normalisation. Where no place passes within four times `size`
    (letters without end, or a tokenizer that treats the start of a text in its own way), the text is cut
    anyway and `forced` counts it.

    Args:
        transform: from a string to a string or list.
        size: wanted length of a piece in characters.
    """

    def __init__(self, transform: Callable[[str], Any], size: int = 1 << 16) -> None:
        self.transform = transform
        self.size = size
        self.forced = 0

    def __call__(self, texts: Iterable[str]) -> Iterator[str]:
        """The pieces of one text, given as strings to be joined; at most about 4 * `size` are held."""
        buffer = ""
        for text in texts:
            buffer += text
            start = 0
            while len(buffer) - start > self.size + WINDOW:
                end = self._find_cut(buffer, start)
                if end is None:
                    break
                yield buffer[start:end]
                start = end
            buffer = buffer[start:]
        if buffer:
            yield buffer

    def _find_cut(self, text: str, start: int) -> int | None:
        """Where the piece from `start` ends; None if more text is needed to say."""
        limit = start + 4 * self.size
        high = min(len(text) - WINDOW, limit)
        usual = min(start + self.size, high)
        low = max(start + 1 + self.size // 2, usual - 16 * WINDOW)
        far = (match.end() for match in _WORD_END.finditer(text, usual, high))
        for cut in chain(islice(word_ends_before(text, low, usual), _TRIES), islice(far, _TRIES)):
            if self._is_safe(text, cut):
                return cut
        if high < limit:
            return None
        self.forced += 1
        return next((cut for cut in range(limit, limit - _TRIES, -1) if self._is_safe(text, cut)), limit)

    def _is_safe(self, text: str, cut: int) -> bool:
        left, right = text[max(0, cut - WINDOW) : cut], text[cut : cut + WINDOW]
        return self.transform(left) + self.transform(right) == self.transform(left + right)


def word_ends_before(text: str, low: int, high: int) -> Iterator[int]:
    """Places from `low` on where a word ends, the last before `high` first: one of the first is taken, as a rule."""
    while high > low:
        start = max(low, high - WINDOW)
        yield from reversed([match.end() for match in _WORD_END.finditer(text, start, high)])
        high = start
