"""Windows that know their documents: cut from the stream of tokens, or packed of whole documents, and none is lost.

A document's end-of-text token is its last target and the first token of the next one, so that every token of a file but
the first is predicted once an epoch, from those before it in its own document at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import DataError
from .loader import Examples
from .windows import check_vocabulary

_CHUNK = 1 << 24  # tokens looked at at once


class Segments(NamedTuple):
    """A window of one or several documents, or parts of them.

    Attributes:
        tokens: (T,) ids.
        targets: (T,) the id after each.
        lengths: how many tokens each document has here, in order; T in all.
    """

    tokens: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray


def document_starts(tokens: np.ndarray, end_id: int) -> np.ndarray:
    """Where each document begins among the tokens that have one after them: at 0, and at each end-of-text token."""
    found = [
        first + np.flatnonzero(tokens[first : min(first + _CHUNK, len(tokens) - 1)] == end_id)
        for first in range(0, len(tokens) - 1, _CHUNK)
    ]
    starts = np.concatenate([np.zeros(1, np.int64), *found])
    return starts[1:] if len(starts) > 1 and starts[1] == 0 else starts


class PackedWindows(Sequence[Segments]):
    """Documents in as few windows as best fit gives: the longest first, each where it leaves the least room.

    A document longer than a window fills as many as it can, and its rest is packed with the others. A window may hold
    fewer than `length` tokens, and is not filled up.

    Args:
        tokens: (N,) ids, usually a memory map; only the windows asked for are read, but for one look at all.
        length: the most tokens of a window.
        end_id: the token that ends a document.
        vocab_size: what every id must be below; 0 does not look.
        split: named in the error message.

    Raises:
        DataError: for fewer than two tokens; from an index, for an id beyond the vocabulary.

    Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (best-fit-decreasing packing).
    """

    def __init__(self, tokens: np.ndarray, length: int, end_id: int, vocab_size: int = 0, split: str = "train"):
        if len(tokens) < 2:
            raise DataError(f"the {split} split has {len(tokens)} tokens, a window needs at least 2")
        self.tokens, self.length, self.vocab_size = tokens, length, vocab_size
        starts = document_starts(tokens, end_id)
        lengths = np.diff(starts, append=len(tokens) - 1)
        whole, rest = lengths // length, lengths % length
        # Each document's full windows in order, then what is left of it.
        full = np.repeat(starts, whole) + length * _counting(whole)
        left = np.flatnonzero(rest)
        self._starts = np.concatenate([full, (starts + whole * length)[left]])
        self._lengths = np.concatenate([np.full(len(full), length), rest[left]])
        window = np.concatenate([np.arange(len(full)), len(full) + best_fit(rest[left], length)])
        self._order = np.argsort(window, kind="stable")
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(window))])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index):  # no slices
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        parts = self._order[self._bounds[index] : self._bounds[index + 1]]
        lengths = self._lengths[parts]
        windows = [self.tokens[start : start + n + 1] for start, n in zip(self._starts[parts], lengths, strict=True)]
        for start, window in zip(self._starts[parts], windows, strict=True):
            check_vocabulary(self.tokens, window, int(start), self.vocab_size)
        tokens = np.concatenate([window[:-1] for window in windows])
        return Segments(tokens, np.concatenate([window[1:] for window in windows]), lengths)


def best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """Number of the bin of each item, (items,), by best fit in decreasing order of length; each is at most `room`."""
    bins = np.empty(len(lengths), np.int64)
    free: list[list[int]] = [[] for _ in range(room + 1)]  # bins by the room they have left
    there = 0  # bit r: there are bins with room r
    count = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[item])
        fitting = there >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            number = free[left].pop()
            if not free[left]:
                there ^= 1 << left
        else:
            left, number, count = room, count, count + 1
        bins[item] = number
        if left > size:
            free[left - size].append(number)
            there |= 1 << (left - size)
    return bins


def _counting(counts: np.ndarray) -> np.ndarray:
    """0 to n - 1 for each of the counts n, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


class CutWindows(Sequence[Segments]):
    """Windows of a stream, with the places where documents begin in them.

    Args:
        windows: of ids with the last target, as `Windows` gives them.
        end_id: the token that ends a document.
    """

    def __init__(self, windows: Sequence[np.ndarray], end_id: int):
        self.windows, self.end_id = windows, end_id

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index):  # no slices
        window = self.windows[index]
        starts = document_starts(window, self.end_id)
        return Segments(window[:-1], window[1:], np.diff(starts, append=len(window) - 1))


class CutExamples:
    """`Examples` whose windows are given as `CutWindows` gives them."""

    def __init__(self, examples: Examples, end_id: int):
        self.examples, self.end_id = examples, end_id

    def __len__(self) -> int:
        return len(self.examples)

    def epoch(self, random: np.random.Generator) -> CutWindows:
        return CutWindows(self.examples.epoch(random), self.end_id)
