"""What the tests of duplicates share: texts whose similarity is known, and a corpus cut into shards."""

from __future__ import annotations

import io
import json
import random
import re
from itertools import pairwise

from fastlm.data.dedup import Shards, resolve, save, signatures

# Spelled out anew for the tests: what a word is, in texts of these scripts alone.
WORD = re.compile(r"[\u4e00-\u9fff\u3040-\u30ff]|[a-z0-9_]+")


def n_grams(text: str, n: int) -> set[tuple[str, ...]]:
    """The n-grams of a text's words; where it has fewer, all of them are one."""
    words = WORD.findall(text.lower())
    if 0 < len(words) < n:
        return {tuple(words)}
    return {tuple(words[at : at + n]) for at in range(len(words) - n + 1)}


def similarity(one: str, other: str, n: int) -> float:
    """The Jaccard similarity of two texts by Python's sets."""
    a, b = n_grams(one, n), n_grams(other, n)
    return len(a & b) / len(a | b) if a or b else 0.0


def pair_of_similarity(rng: random.Random, shared: int, own: int, n: int, word) -> tuple[str, str]:
    """Two texts with `shared` n-grams in common and `own` each besides: their similarity is exact."""
    common = [word(rng) for _ in range(shared + n - 1)]
    tails = [[word(rng) for _ in range(own)] for _ in range(2)]
    return tuple(" ".join(common + tail) for tail in tails)


def english(rng: random.Random) -> str:
    """A word that hardly occurs twice."""
    return f"w{rng.randrange(10**9)}"


class Run:
    """A corpus resolved, with what it was resolved from."""

    def __init__(self, texts, folder, exact=None, near=None, shards=1):
        folder.mkdir(parents=True, exist_ok=True)
        bounds = [len(texts) * number // shards for number in range(shards + 1)]
        cut = [texts[start:end] for start, end in pairwise(bounds)]
        files = [folder / f"{number}.npy" for number in range(shards)]
        for file, shard in zip(files, cut, strict=True):
            save(file, signatures(shard, exact, near))
        out = io.StringIO()
        read = Shards(lambda number: cut[number], [len(shard) for shard in cut])
        self.reasons, self.counts = resolve(files, read, exact, near, folder=folder, pairs=out)
        self.dropped = set(self.reasons.nonzero()[0].tolist())
        self.pairs = [json.loads(line) for line in out.getvalue().splitlines()]

    def __eq__(self, other):
        return (self.reasons == other.reasons).all() and self.pairs == other.pairs
