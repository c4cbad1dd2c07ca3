"""Lines or paragraphs that occur over and over in a corpus: menus, notices, headers.

Three steps, of which the first and the last are done by any number of processes:

    found = line_hashes(texts, options)                                  of each shard, kept with `save`
    count = repeated_lines(files, documents, options, path)              over all shards
    text = LineFilter(path, options).filter(number, text)                of each document, by its number in the corpus
"""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from .signing import check_names, library
from .stored import Stored, save

REPEATED_LINES = "repeated lines"  # the reason of a document of which nothing else is left
PART = 1 << 21  # lines of all shards that are merged at once: about 200 MB
_BREAKS = {"line": re.compile(r"(\n)"), "paragraph": re.compile(r"(\n[^\S\n]*\n\s*)")}


@dataclass(frozen=True)
class LineOptions:
    """Which lines are too many.

    Attributes:
        unit: "line", or "paragraph", which blank lines part.
        most: how often one may occur in the corpus. Case and whitespace make no difference.
        keep: of one that occurs more often, the "first" stays, by the order of the corpus, or "none".
    """

    unit: str = "line"
    most: int = 10
    keep: str = "first"

    def __post_init__(self) -> None:
        check_names("unit", [self.unit], _BREAKS)
        check_names("keep", [self.keep], ("first", "none"))
        if self.most < 1:
            raise ValueError(f"most: got {self.most}, expected 1 or more occurrences")


def line_hashes(texts: Iterable[str], options: LineOptions) -> np.ndarray:
    """The lines of one shard: (3, different lines) of uint64, by ascending hash.

    The rows are the hash, how often it occurs, and the number in the shard of the first document that has it.
    Blank lines count for nothing.
    """
    hashes, documents = array("Q"), array("Q")
    for number, text in enumerate(texts):
        for unit in _BREAKS[options.unit].split(text)[::2]:
            if value := _hash(unit):
                hashes.append(value)
                documents.append(number)
    found, first, counts = np.unique(np.array(hashes), return_index=True, return_counts=True)
    return np.stack([found, counts.astype(np.uint64), np.array(documents)[first]])


def repeated_lines(
    files: Sequence[str | os.PathLike[str]],
    documents: Sequence[int],
    options: LineOptions,
    path: str | os.PathLike[str],
) -> int:
    """Find the lines that occur more than `most` times over all shards.

    Args:
        files: what `line_hashes` gave of each shard, in the order of the corpus.
        documents: how many documents each shard has.
        path: where they are written, (2, lines) of uint64: hash, and the first document that has it.

    Returns:
        How many different ones there are.
    """
    shards = [Stored(file, 3) for file in files]
    firsts = [0, *accumulate(documents)]
    parts = max(1, -(-sum(shard.count for shard in shards) // PART))
    bounds = [(1 << 64) * part // parts for part in range(parts + 1)]
    found = [np.zeros((2, 0), np.uint64)]
    at = [0] * len(shards)
    for bound in bounds[1:]:
        pieces = []
        for number, shard in enumerate(shards):
            end = shard.count if bound == 1 << 64 else shard.search(0, bound)
            piece = np.stack([shard.read(row, at[number], end) for row in range(3)])
            piece[2] += np.uint64(firsts[number])
            pieces.append(piece)
            at[number] = end
        found.append(_too_many(np.concatenate(pieces, axis=1), options.most))
    repeated = np.concatenate(found, axis=1)
    save(path, repeated)
    return repeated.shape[1]


class LineFilter:
    """Takes lines that occur too often out of documents."""

    def __init__(self, path: str | os.PathLike[str], options: LineOptions) -> None:
        self._hashes, self._first = np.load(path, mmap_mode="r")  # mapped, so that processes share the pages
        self._options = options

    def filter(self, number: int, text: str) -> str | None:
        """The text without them; None where nothing is left but blanks. A text that has none of them is as it was.

        Args:
            number: of the document in the corpus, from 0 on.
        """
        parts = _BREAKS[self._options.unit].split(text)
        units = parts[::2]
        drop = self._too_often(number, units)
        if not drop:
            return text
        kept = "".join(
            unit + mark
            for place, (unit, mark) in enumerate(zip(units, [*parts[1::2], ""], strict=True))
            if place not in drop
        )
        return kept if kept.strip() else None

    def _too_often(self, number: int, units: list[str]) -> set[int]:
        """The places of those to take out."""
        values = np.array([_hash(unit) for unit in units], np.uint64)
        if not self._hashes.size:
            return set()
        places = np.minimum(np.searchsorted(self._hashes, values), self._hashes.size - 1)
        repeated = np.flatnonzero((self._hashes[places] == values) & (values != 0))
        if self._options.keep == "none":
            return set(repeated.tolist())
        seen: Counter[int] = Counter()
        drop = set()
        for unit in repeated.tolist():
            value = int(values[unit])
            if seen[value] or int(self._first[places[unit]]) != number:
                drop.add(unit)
            seen[value] += 1
        return drop


def _hash(unit: str) -> int:
    """A line's hash, never 0, or 0 for a blank one."""
    normal = " ".join(unit.split()).casefold()
    return (library("xxhash").xxh3_64_intdigest(normal.encode("utf-8", "surrogatepass")) or 1) if normal else 0


def _too_many(lines: np.ndarray, most: int) -> np.ndarray:
    """Of lines from several shards, (hash, first document) of those that occur more often in all."""
    order = np.lexsort((lines[2], lines[0]))
    hashes, counts, documents = lines[:, order]
    new = np.ones(hashes.size, bool)
    new[1:] = hashes[1:] != hashes[:-1]
    starts = np.flatnonzero(new)
    if not starts.size:
        return np.zeros((2, 0), np.uint64)
    often = starts[np.add.reduceat(counts, starts) > most]
    return np.stack([hashes[often], documents[often]])
