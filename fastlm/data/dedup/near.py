"""Documents that are nearly the same: MinHash bands offer pairs, and the Jaccard similarity of n-grams decides.

A band puts documents together that agree in all its rows. In each such set the leader, the one that would stay, is
compared with the others; one that is like no leader leads too. So m documents that are alike cost m comparisons,
not m^2, and of two documents above the threshold that share a band at least one is dropped. Documents found alike
are one group, whatever the number of links between them, of which one stays.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from .exact import Pairs
from .grouping import Groups, equal_keys
from .shingles import batches, shingles
from .signing import CHARS, FIRST_BAND, NearOptions, Signatures, Texts

LEADERS = 64  # of one set: where more are unlike each other, documents are compared with the first ones alone


def find_near(
    signatures: Signatures, options: NearOptions, picked: np.ndarray, texts: Texts, folder: Path | None = None
) -> Iterator[Pairs]:
    """Find documents whose n-grams are at least `threshold` alike to another's.

    Memory is 40 bytes for each document that shares a band with another, and 200 MB. Their n-grams are written to
    a file without a name, 8 bytes for each.

    Args:
        signatures: of the corpus, made with these options.
        picked: for each document whether it is looked at.
        texts: reads documents again.
        folder: where the file is made; None for the system's folder of temporary files.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        sets = _Sets(file, _candidates(signatures, picked), texts, options.ngram)
        groups = _Alike(sets, _order(signatures, sets.documents, options.keep), options.threshold)
        for column in range(FIRST_BAND, signatures.columns):
            for sharing in equal_keys(signatures, column, picked):
                groups.compare(sharing)
        yield groups.pairs()


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """The similarity of two sets, each sorted and without repeats, and not both empty."""
    common = np.intersect1d(one, other, assume_unique=True).size
    return common / (one.size + other.size - common)


def _candidates(signatures: Signatures, picked: np.ndarray) -> np.ndarray:
    """Documents that share a band with another, ascending."""
    shared = np.zeros(picked.size, bool)
    for column in range(FIRST_BAND, signatures.columns):
        for groups in equal_keys(signatures, column, picked):
            shared[groups.members()] = True
    return np.flatnonzero(shared)


def _order(signatures: Signatures, documents: np.ndarray, keep: str) -> np.ndarray:
    """Places among documents in the order in which they would stay."""
    places = np.arange(documents.size, dtype=np.int32 if documents.size < 1 << 31 else np.int64)
    if keep == "first":
        return places
    chars = signatures.gather(CHARS, documents).astype(np.int64)
    return places[np.argsort(-chars, kind="stable")]


class _Sets:
    """The n-grams of some documents on the disk, each document's sorted and without repeats."""

    def __init__(self, file: IO[bytes], documents: np.ndarray, texts: Texts, ngram: int) -> None:
        self.documents = documents
        self._file = file
        self._ends = np.zeros(documents.size + 1, np.int64)
        done = 0
        for batch in batches(texts(documents) if documents.size else []):
            found = shingles(batch, ngram)
            for text in range(len(batch)):
                one = np.unique(found.of(text))
                file.write(one.data)
                done += 1
                self._ends[done] = self._ends[done - 1] + one.size
        if done != documents.size:
            raise ValueError(f"texts: got {done} texts, expected {documents.size}, one for each document asked for")
        file.flush()

    def read(self, place: int) -> np.ndarray:
        """The n-grams of the document at a place."""
        # Read, not mapped: mapped pages would count as the process's memory.
        self._file.seek(8 * int(self._ends[place]))
        return np.frombuffer(self._file.read(8 * int(self._ends[place + 1] - self._ends[place])), np.uint64)


class _Alike:
    """Documents in groups that grow together, a union-find.

    Documents are known by their rank: of two in a group, the one of the lower rank would stay.
    """

    def __init__(self, sets: _Sets, order: np.ndarray, threshold: float) -> None:
        self._sets, self._place, self._threshold = sets, order, threshold
        self._rank = np.empty_like(order)
        self._rank[order] = np.arange(order.size, dtype=order.dtype)
        self._parent = np.arange(order.size, dtype=order.dtype)
        self._links, self._similarity = array("q"), array("f")  # two ranks a link

    def compare(self, sharing: Groups) -> None:
        """Compare documents that share a band, set by set, where they are not all of one group yet."""
        members = sharing.members()
        if not members.size:
            return
        ranks = self._rank[np.searchsorted(self._sets.documents, members)]
        ends = np.cumsum(sharing.ends - sharing.starts)
        starts = ends - (sharing.ends - sharing.starts)
        roots = self._roots(ranks)
        apart = np.minimum.reduceat(roots, starts) != np.maximum.reduceat(roots, starts)
        for start, end in zip(starts[apart].tolist(), ends[apart].tolist(), strict=True):
            self._compare_set(np.sort(ranks[start:end]).tolist())

    def pairs(self) -> Pairs:
        """Every document but the one that stays of each group, with the first that it was found alike to."""
        roots = self._roots(np.arange(self._parent.size))
        dropped = np.flatnonzero(roots != np.arange(roots.size))
        links = np.array(self._links)
        linked, first = np.unique(links, return_index=True)
        first = first[np.searchsorted(linked, dropped)]
        like = links[first ^ 1]
        similarity = np.array(self._similarity)[first // 2]
        order = np.argsort(self._place[dropped])
        ranks = (dropped[order], roots[dropped][order], like[order])
        one, kept, other = (self._sets.documents[self._place[of]] for of in ranks)
        return Pairs(one, kept, other, similarity[order])

    def _compare_set(self, ranks: list[int]) -> None:
        leaders: list[tuple[int, np.ndarray]] = []
        for rank in ranks:
            root = self._root(rank)
            if any(self._root(leader) == root for leader, _ in leaders):
                continue
            one = self._sets.read(self._place[rank])
            for leader, other in leaders:
                least, most = sorted((one.size, other.size))
                if least >= self._threshold * most and (similarity := jaccard(one, other)) >= self._threshold:
                    self._link(leader, rank, similarity)
                    break
            else:
                if len(leaders) < LEADERS:
                    leaders.append((rank, one))

    def _link(self, one: int, other: int, similarity: float) -> None:
        self._links.extend((one, other))
        self._similarity.append(similarity)
        low, high = sorted((self._root(one), self._root(other)))
        self._parent[high] = low

    def _root(self, rank: int) -> int:
        parent = self._parent
        while (above := int(parent[rank])) != rank:
            parent[rank] = parent[above]
            rank = above
        return rank

    def _roots(self, ranks: np.ndarray) -> np.ndarray:
        roots = self._parent[ranks]
        while not np.array_equal(above := self._parent[roots], roots):
            roots = above
        return roots
