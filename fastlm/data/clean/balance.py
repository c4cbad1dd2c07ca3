"""What a corpus consists of, counted as documents pass: in any order, on any number of workers, the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..document import Document

KEYS = ("source", "language", "label")
UNKNOWN = "(none)"


class Balance:
    """Documents, characters and bytes by source, by language and by label, and a histogram of lengths.

    `merge` is associative and commutative and `to_dict` sorts, so that the counts of shards, merged in any order, give
    equal JSON.

    Args:
        keys: what to count by: "source", or a key of the documents' meta.
    """

    def __init__(self, keys: Sequence[str] = KEYS):
        self._counts: dict[str, dict[str, Counter[str]]] = {key: {} for key in keys}
        self._lengths: Counter[int] = Counter()

    def add(self, document: Document) -> None:
        """Count a document."""
        size = {
            "documents": 1,
            "characters": len(document.text),
            "bytes": len(document.text.encode("utf-8", "replace")),
        }
        for key, table in self._counts.items():
            value = document.source if key == "source" else document.meta.get(key)
            table.setdefault(UNKNOWN if value is None else str(value), Counter()).update(size)
        self._lengths[len(document.text).bit_length()] += 1

    def add_all(self, documents: Iterable[Document]) -> Balance:
        """Count documents; returns itself."""
        for document in documents:
            self.add(document)
        return self

    def merge(self, other: Balance) -> Balance:
        """Add another's counts; returns itself.

        Raises:
            ValueError: the other counts by other keys.
        """
        if set(other._counts) != set(self._counts):
            raise ValueError(f"Balance.merge: other counts by {list(other._counts)}, expected {list(self._counts)}")
        for key, table in other._counts.items():
            for value, size in table.items():
                self._counts[key].setdefault(value, Counter()).update(size)
        self._lengths.update(other._lengths)
        return self

    def to_dict(self) -> dict[str, Any]:
        """For JSON: {"by": {key: {value: {"documents", "characters", "bytes"}}}, "lengths": {bits: documents}}.

        Of n bits are the documents with 2**(n - 1) to 2**n - 1 characters.
        """
        by = {key: {v: dict(table[v]) for v in sorted(table)} for key, table in self._counts.items()}
        return {"by": by, "lengths": {str(bits): self._lengths[bits] for bits in sorted(self._lengths)}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Balance:
        """What `to_dict` gave."""
        balance = cls(tuple(data["by"]))
        balance._counts = {k: {v: Counter(size) for v, size in table.items()} for k, table in data["by"].items()}
        balance._lengths = Counter({int(bits): count for bits, count in data["lengths"].items()})
        return balance


def evenness(counts: Iterable[int]) -> float:
    """Shannon's entropy of shares over its largest value: 1 where all are equal, 0 where one has everything."""
    positive = [count for count in counts if count > 0]
    if len(positive) < 2:
        return 1.0 if positive else 0.0
    total = sum(positive)
    return -sum(count / total * math.log(count / total) for count in positive) / math.log(len(positive))
