"""Documents that are the same: by a hash, and where hashes agree by the texts themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .grouping import Groups, equal_keys
from .signing import CHARS, HIGH, LOW, ExactOptions, Signatures, Texts

COMPARED = 1 << 25  # characters held at once: up to 128 MB


class Pairs(NamedTuple):
    """Documents dropped, ascending, and what they are like.

    Attributes:
        dropped: their numbers in the corpus.
        kept: for each the one that stays in its place.
        like: for each the one that it was compared with: the one that stays, or another that is dropped too.
        similarity: of the dropped one and the one it was compared with.
    """

    dropped: np.ndarray
    kept: np.ndarray
    like: np.ndarray
    similarity: np.ndarray


def find_exact(
    signatures: Signatures, options: ExactOptions, picked: np.ndarray, texts: Texts | None = None
) -> Iterator[Pairs]:
    """Find documents equal to an earlier one, in parts; the first in corpus order stays.

    Memory is 200 MB, and for texts another 128 MB or the longest two.

    Args:
        signatures: of the corpus, made with these options.
        picked: for each document whether it is looked at.
        texts: reads documents again, so that those of equal hashes are compared; None to take equal 128-bit hashes
            for equal texts: the chance that any two of 10^8 documents agree by accident is 10^-23.
    """
    if texts is None and options.bits < 128:
        raise ValueError(f"texts: got None, expected a reader of texts, which {options.bits}-bit hashes need")
    for groups in equal_keys(signatures, HIGH, picked):
        kept, dropped = _same_hash(signatures, groups)
        if texts is not None:
            kept, dropped = _same_text(signatures, options, texts, kept, dropped)
        order = np.argsort(dropped)
        yield Pairs(dropped[order], kept[order], kept[order], np.ones(order.size))


def _same_hash(signatures: Signatures, groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """The first of each hash, and the others of it."""
    members = groups.members()
    high = np.repeat(np.arange(groups.starts.size), groups.ends - groups.starts)
    low = signatures.gather(LOW, members)
    order = np.lexsort((members, low, high))
    members, high, low = members[order], high[order], low[order]
    return _with_first(members, (high[1:] != high[:-1]) | (low[1:] != low[:-1]))


def _with_first(documents: np.ndarray, changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted documents as pairs: the first of each run, and each other one of it."""
    new = np.ones(documents.size, bool)
    new[1:] = changes
    first = documents[new][np.cumsum(new) - 1] if documents.size else documents
    return first[~new], documents[~new]


def _same_text(
    signatures: Signatures, options: ExactOptions, texts: Texts, kept: np.ndarray, dropped: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs whose texts are equal; those that differ are paired anew, the first of them with the rest."""
    same = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    while kept.size:
        order = np.lexsort((dropped, kept))
        kept, dropped = kept[order], dropped[order]
        equal = np.zeros(kept.size, bool)
        for batch in _batches(signatures, kept, dropped):
            wanted = np.unique(np.concatenate([kept[batch], dropped[batch]]))
            found = dict(zip(wanted.tolist(), map(options.normalized, texts(wanted)), strict=True))
            pairs = zip(kept[batch].tolist(), dropped[batch].tolist(), strict=True)
            equal[batch] = [found[one] == found[other] for one, other in pairs]
        same.append((kept[equal], dropped[equal]))
        groups, others = kept[~equal], dropped[~equal]
        kept, dropped = _with_first(others, groups[1:] != groups[:-1])
    return np.concatenate([pair[0] for pair in same]), np.concatenate([pair[1] for pair in same])


def _batches(signatures: Signatures, kept: np.ndarray, dropped: np.ndarray) -> Iterator[slice]:
    """Pairs whose texts may be held at once."""
    chars = signatures.gather(CHARS, kept) + signatures.gather(CHARS, dropped)
    ends = np.cumsum(chars).astype(np.int64)
    start = 0
    while start < kept.size:
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + COMPARED, "right")))
        yield slice(start, end)
        start = end
