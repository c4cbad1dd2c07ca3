"""Documents that hold text of evaluation sets, found by n-grams that they share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..document import Document, Dropped
from .shingles import Grams, batches, grams, words

CONTAMINATED = "contaminated"


@dataclass(frozen=True)
class ContaminationOptions:
    """What counts as text of an evaluation set.

    Attributes:
        ngram: words that follow each other, characters in scripts without blanks between words (see `shingles`).
        shortest: an evaluation text of fewer words than `ngram` is looked for as a whole, if it has this many.
    """

    ngram: int = 13
    shortest: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.ngram:
            raise ValueError(f"shortest: got {self.shortest}, expected 1 to ngram, {self.ngram}")


class Match(NamedTuple):
    """The first n-gram of a document that an evaluation set has too.

    Attributes:
        evaluation: the name of the evaluation text.
        word: where in the document it starts, in words from 0 on.
        shared: how many n-grams of the document are in evaluation sets.
    """

    evaluation: str
    word: int
    shared: int


class Contamination:
    """The n-grams of evaluation sets: as a step of cleaning, drops documents that have one of them.

    Takes 30 bytes of memory for each word of the evaluation sets. Two different n-grams are taken for the same by
    a chance of 2^-64 each.

    Args:
        evaluations: (name, text) of each evaluation text, such as a question with its answer.
    """

    def __init__(self, evaluations: Iterable[tuple[str, str]], options: ContaminationOptions | None = None) -> None:
        self.options = options = options or ContaminationOptions()
        self._names: list[str] = []
        self._tables: dict[int, _Table] = {}
        hashes: dict[int, list[np.ndarray]] = {}
        texts: dict[int, list[np.ndarray]] = {}
        for name, text in evaluations:
            numbers = words([text])
            size = min(options.ngram, numbers.hashes.size)
            if size < options.shortest:
                continue
            found = grams(numbers, size).hashes
            hashes.setdefault(size, []).append(found)
            texts.setdefault(size, []).append(np.full(found.size, len(self._names), np.int32))
            self._names.append(name)
        self._tables = {
            size: _Table(np.concatenate(hashes[size]), np.concatenate(texts[size])) for size in sorted(hashes)
        }

    def __call__(self, document: Document) -> Document | Dropped:
        return Dropped(CONTAMINATED) if next(self.find([document.text])) else document

    def find(self, texts: Iterable[str]) -> Iterator[Match | None]:
        """For each text the first n-gram that is in an evaluation set, or None. Faster for many texts than for one."""
        for batch in batches(texts):
            yield from self._find(words(batch), len(batch))

    def _find(self, numbers: Grams, count: int) -> Iterator[Match | None]:
        first: list[Match | None] = [None] * count
        for size, table in self._tables.items():
            hashes, offsets = grams(numbers, size, short=False)
            places, names = table.look_up(hashes)
            texts = np.searchsorted(offsets, places, "right") - 1
            for text, start, shared in zip(*np.unique(texts, return_index=True, return_counts=True), strict=True):
                match = Match(self._names[names[start]], int(places[start] - offsets[text]), int(shared))
                before = first[text]
                if before is not None:
                    match = min(match, before, key=lambda m: m.word)._replace(shared=match.shared + before.shared)
                first[text] = match
        return iter(first)


class _Table:
    """Hashes of evaluation sets, and which text each is of."""

    def __init__(self, hashes: np.ndarray, texts: np.ndarray) -> None:
        self._hashes, first = np.unique(hashes, return_index=True)
        self._texts = texts[first]
        # Most of a corpus is in no evaluation set: one look at a table of bytes decides for all but one in eight.
        bits = max(10, int(8 * self._hashes.size).bit_length())
        self._shift = np.uint64(64 - bits)
        self._seen = np.zeros(1 << bits, bool)
        self._seen[(self._hashes >> self._shift).astype(np.int64)] = True

    def look_up(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in `hashes` are some that the table has, and the texts of those."""
        places = np.flatnonzero(self._seen[(hashes >> self._shift).astype(np.int64)])
        found = np.searchsorted(self._hashes, hashes[places])
        found = np.minimum(found, self._hashes.size - 1)
        same = self._hashes[found] == hashes[places]
        return places[same], self._texts[found[same]]
