"""Which documents of a corpus have equal keys, by sorting a part of the keys at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .signing import Signatures

PART = 1 << 21  # keys sorted at once: about 200 MB


class Groups(NamedTuple):
    """Documents of equal keys: group i is documents[starts[i]:ends[i]], ascending, of two or more."""

    documents: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def members(self) -> np.ndarray:
        """All documents that are in a group."""
        counts = self.ends - self.starts
        before = np.concatenate([[0], np.cumsum(counts)[:-1]]) if counts.size else counts
        return self.documents[np.arange(counts.sum()) + np.repeat(self.starts - before, counts)]

    def __iter__(self) -> Iterator[np.ndarray]:
        for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True):
            yield self.documents[start:end]


def equal_keys(signatures: Signatures, column: int, picked: np.ndarray) -> Iterator[Groups]:
    """The groups of one column, in a fixed order, in parts of about `PART` keys each, as the keys are hashes.

    A key that more documents have is in one part nevertheless. Documents whose key is 0 have none.

    Args:
        picked: for each document whether it is looked at, bool.
    """
    parts = np.uint64(max(1, -(-int(picked.sum()) // PART)))
    for part in range(int(parts)):
        keys, documents = _part(signatures, column, picked, part, parts)
        order = np.argsort(keys, kind="stable")
        keys, documents = keys[order], documents[order]
        bounds = np.concatenate([[0], np.flatnonzero(keys[1:] != keys[:-1]) + 1, [keys.size]])
        several = np.flatnonzero(np.diff(bounds) > 1)
        yield Groups(documents, bounds[several], bounds[several + 1])


def _part(
    signatures: Signatures, column: int, picked: np.ndarray, part: int, parts: np.uint64
) -> tuple[np.ndarray, np.ndarray]:
    first, keys, documents = 0, [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for values in signatures.column(column):
        here = picked[first : first + values.size] & (values != 0)
        if parts > 1:
            here &= (values >> np.uint64(32)) * parts >> np.uint64(32) == np.uint64(part)
        keys.append(values[here])
        documents.append(np.flatnonzero(here) + first)
        first += values.size
    return np.concatenate(keys), np.concatenate(documents)
