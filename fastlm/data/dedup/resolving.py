"""The global step over the signatures of a corpus: which documents stay."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from .exact import Pairs, find_exact
from .near import find_near
from .signing import ExactOptions, NearOptions, Signatures, Texts

REASONS = ("", "exact duplicate", "near duplicate")


class Resolution(NamedTuple):
    """Which documents stay.

    Attributes:
        reasons: for each document the number of its reason in `REASONS`, uint8; 0 stays.
        counts: how many documents were dropped for each reason that was looked for.
    """

    reasons: np.ndarray
    counts: dict[str, int]


class Shards:
    """Reads documents of a corpus again, from shards that can be read from their start alone.

    Args:
        read: gives the texts of a shard, known by its number.
        counts: how many documents each shard has.
    """

    def __init__(self, read: Callable[[int], Iterable[str]], counts: Sequence[int]) -> None:
        self._read, self._firsts = read, [0, *accumulate(counts)]

    def __call__(self, documents: np.ndarray) -> Iterator[str]:
        """The texts of documents, whose numbers in the corpus ascend. Shards with none of them are not read."""
        bounds = np.searchsorted(documents, self._firsts)
        for shard, (start, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            wanted = iter((documents[start:end] - self._firsts[shard]).tolist())
            after = next(wanted, None)
            if after is None:
                continue
            for number, text in enumerate(self._read(shard)):
                if number == after:
                    yield text
                    after = next(wanted, None)
                    if after is None:
                        break


def resolve(
    files: Sequence[str | os.PathLike[str]],
    texts: Texts,
    exact: ExactOptions | None = None,
    near: NearOptions | None = None,
    *,
    folder: Path | None = None,
    pairs: IO[str] | None = None,
) -> Resolution:
    """Decide which documents of a corpus stay: of equal ones the first, then of those nearly the same one.

    The result depends on the documents and their order alone. Memory: see `find_exact` and `find_near`, and 2 bytes
    a document.

    Args:
        files: what `signatures` gave of each shard, in the order of the corpus, made with these options.
        texts: reads documents again; `Shards` makes one.
        exact: None to leave equal documents to `near`.
        near: None for exact ones alone.
        folder: for what is kept on the disk meanwhile; None for the system's folder of temporary files.
        pairs: where a line of JSON is written for each document dropped: {"reason", "dropped", "kept", "like",
            "similarity"}, documents by their numbers in the corpus. It was compared with "like", which is "kept", the
            one that stays, or was itself found to be like that, directly or through others.
    """
    signatures = Signatures(files, near)
    reasons = np.zeros(len(signatures), np.uint8)
    for reason, search in (
        (1, lambda picked: find_exact(signatures, exact, picked, texts) if exact else ()),
        (2, lambda picked: find_near(signatures, near, picked, texts, folder) if near else ()),
    ):
        for found in search(reasons == 0):
            reasons[found.dropped] = reason
            if pairs is not None:
                _write(pairs, REASONS[reason], found)
    asked = (False, exact is not None, near is not None)
    counts = {name: int((reasons == reason).sum()) for reason, name in enumerate(REASONS) if asked[reason]}
    return Resolution(reasons, counts)


def _write(file: IO[str], reason: str, pairs: Pairs) -> None:
    for dropped, kept, like, similarity in zip(*(part.tolist() for part in pairs), strict=True):
        line = {"reason": reason, "dropped": dropped, "kept": kept, "like": like, "similarity": round(similarity, 4)}
        file.write(json.dumps(line) + "\n")
