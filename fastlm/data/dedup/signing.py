"""What is kept of each document to find its duplicates: made of its text alone, in any process, and kept on disk."""

from __future__ import annotations

import functools
import importlib
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from ..compression import needs
from .shingles import batches, constants, mixed, shingles
from .stored import Stored

# Gives the texts of documents by their numbers in the corpus, which ascend.
Texts = Callable[[np.ndarray], Iterable[str]]

HIGH, LOW, CHARS, FIRST_BAND = range(4)  # columns: the halves of the exact hash, the length, then a key for each band
HASHES = 128  # the most that `bands` takes, where so many are enough
_PUNCTUATION = re.compile(r"[^\w\s]|_")


@dataclass(frozen=True)
class ExactOptions:
    """Which documents are the same.

    Attributes:
        bits: of the hash that documents are compared by first, 64 or 128.
        ignore: what makes no difference: any of "case", "whitespace", "punctuation".
    """

    bits: int = 128
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bits not in (64, 128):
            raise ValueError(f"bits: got {self.bits!r}, expected 64 or 128")
        check_names("ignore", self.ignore, ("case", "whitespace", "punctuation"))

    def normalized(self, text: str) -> str:
        """The text without what makes no difference."""
        if "case" in self.ignore:
            text = text.casefold()
        if "punctuation" in self.ignore:
            text = _PUNCTUATION.sub("", text)
        return " ".join(text.split()) if "whitespace" in self.ignore else text


@dataclass(frozen=True)
class NearOptions:
    """Which documents are nearly the same.

    Attributes:
        threshold: the Jaccard similarity of their n-grams from which on two documents are duplicates.
        recall: the share of pairs at the threshold that are to be found; of more similar ones more are.
        ngram: words of an n-gram, characters in scripts without blanks between words (see `shingles`).
        keep: which one of a group stays: the "first" in the corpus, or the "longest" (of those the first).
        seed: another seed, other pairs among those missed.
    """

    threshold: float = 0.8
    recall: float = 0.99
    ngram: int = 5
    keep: str = "first"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold: got {self.threshold}, expected a similarity in (0, 1]")
        if not 0 < self.recall < 1:
            raise ValueError(f"recall: got {self.recall}, expected a share in (0, 1)")
        if self.ngram < 1:
            raise ValueError(f"ngram: got {self.ngram}, expected 1 or more words")
        if self.keep not in ("first", "longest"):
            raise ValueError(f'keep: got {self.keep!r}, expected "first" or "longest"')


def bands(threshold: float, recall: float) -> tuple[int, int]:
    """Bands and rows of a MinHash that finds this share of the pairs at the threshold, by `collision_probability`.

    Of all that do, those of the most rows, which offers the fewest pairs below the threshold for comparison,
    within `HASHES` hashes; where that takes more, one row a band.
    """
    choices = [(_bands_for(threshold**rows, recall), rows) for rows in range(1, 65)]
    return max((choice for choice in choices if math.prod(choice) <= HASHES), key=lambda c: c[1], default=choices[0])


def collision_probability(similarity: float, bands: int, rows: int) -> float:
    """The chance that two documents agree in all rows of at least one band."""
    return 1 - (1 - similarity**rows) ** bands


def _bands_for(same: float, recall: float) -> int:
    return 1 if same >= 1 else math.ceil(math.log(1 - recall) / math.log1p(-same))


def signatures(texts: Iterable[str], exact: ExactOptions | None, near: NearOptions | None) -> np.ndarray:
    """The signatures of documents: (columns, documents) of uint64.

    Pure: a document's is the same whatever the others are, so shards may be done by any number of processes.
    """
    columns = _columns(near)
    blocks = [np.zeros((columns, 0), np.uint64)]
    for batch in batches(texts):
        block = np.zeros((columns, len(batch)), np.uint64)
        block[CHARS] = [len(text) for text in batch]
        if exact:
            block[HIGH], block[LOW] = zip(*(_exact_hash(text, exact) for text in batch), strict=True)
        if near:
            block[FIRST_BAND:] = _band_keys(batch, near)
        blocks.append(block)
    return np.concatenate(blocks, axis=1)


def _exact_hash(text: str, options: ExactOptions) -> tuple[int, int]:
    data = options.normalized(text).encode("utf-8", "surrogatepass")
    whole = library("xxhash").xxh3_128_intdigest(data)
    return (whole >> 64) or 1, whole & 0xFFFFFFFFFFFFFFFF if options.bits == 128 else 0


def _band_keys(batch: list[str], options: NearOptions) -> np.ndarray:
    """For each band and text, a hash of its rows; 0 for texts without words, which are like no other."""
    count, rows = bands(options.threshold, options.recall)
    hashes, offsets = shingles(batch, options.ngram)
    digests = minhash(hashes, offsets, count * rows, options.seed).reshape(len(batch), count, rows)
    keys = mixed((digests * constants(rows, seed=2)).sum(axis=2, dtype=np.uint64).T)
    keys[keys == 0] = 1
    keys[:, np.diff(offsets) == 0] = 0
    return keys


def minhash(hashes: np.ndarray, offsets: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The MinHash of each set of hashes: (sets, count) of uint64, each below 2^32."""
    found = library("rensa").RMinHash.digest_matrix_from_flat_token_hashes(
        hashes, offsets.astype(np.uint64), count, seed
    )
    return np.array(found.to_rows(), np.uint64).reshape(-1, count)


def fingerprint(exact: ExactOptions | None, near: NearOptions | None) -> str:
    """Tells signatures that cannot be compared apart: of other options, or of a Python or libraries that differ.

    rensa's hashes have changed between versions, and each Python knows letters that the one before did not.
    """
    probe = "One text in 2 scripts, 两种文字, ΣΊΣΥΦΟΣ and नमस्ते."
    digest = library("xxhash").xxh3_64_hexdigest(signatures([probe], exact, near).tobytes())
    return f"{exact} {near} {digest} {unicodedata.unidata_version}"


class Signatures:
    """The signatures of a corpus, shard by shard in its order, of which a column at a time is read.

    Args:
        files: what `signatures` gave of each shard, kept with `save`.
        near: the options they were made with.

    Raises:
        DataError: a file is missing, damaged, or of other options.
    """

    def __init__(self, files: Sequence[str | os.PathLike[str]], near: NearOptions | None) -> None:
        self.columns = _columns(near)
        self._shards = [Stored(file, self.columns) for file in files]
        self._firsts = [0, *accumulate(shard.count for shard in self._shards)]

    def __len__(self) -> int:
        return self._firsts[-1]

    def column(self, number: int) -> Iterator[np.ndarray]:
        """One column, a shard at a time."""
        for shard in self._shards:
            yield shard.read(number)

    def gather(self, number: int, documents: np.ndarray) -> np.ndarray:
        """One column of some documents, in any order."""
        order = np.argsort(documents, kind="stable")
        bounds = np.searchsorted(documents[order], self._firsts)
        values = np.zeros(documents.size, np.uint64)
        for shard, first, start, end in zip(self._shards, self._firsts[:-1], bounds[:-1], bounds[1:], strict=True):
            if start < end:
                values[order[start:end]] = shard.read(number)[documents[order[start:end]] - first]
        return values


def _columns(near: NearOptions | None) -> int:
    return FIRST_BAND + (bands(near.threshold, near.recall)[0] if near else 0)


def check_names(name: str, got: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ValueError if one got is not known."""
    for value in got:
        if value not in known:
            raise ValueError(f"{name}: got {value!r}, expected {' or '.join(map(repr, known))}")


@functools.cache
def library(name: str) -> Any:
    """A module of the extra for data."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise needs(name, "to find duplicates") from None
