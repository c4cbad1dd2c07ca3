"""Several corpora as one, each with its share."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from ..errors import ConfigError
from .loader import Examples


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `total` and are nearest to the weights' parts of it (largest remainders).

    Raises:
        ConfigError: a weight that is not a positive finite number.
    """
    if not all(0 < weight < float("inf") for weight in weights):
        raise ConfigError(f"weights are {', '.join(map(str, weights))}, expected positive finite numbers")
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


class Chained(Sequence[Any]):
    """Sequences one after the other."""

    def __init__(self, parts: Sequence[Sequence[Any]]):
        self.parts, self._ends = parts, list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index):  # no slices
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        part = bisect_right(self._ends, index)
        return self.parts[part][index - (self._ends[part - 1] if part else 0)]


class Chosen(Sequence[Any]):
    """Some of a sequence."""

    def __init__(self, sequence: Sequence[Any], indices: np.ndarray):
        self.sequence, self.indices = sequence, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index):  # no slices
        return self.sequence[int(self.indices[index])]


class Mixture:
    """`Examples` of several corpora, as many of each as its weight says.

    An epoch has as many examples as the corpora together. Of one that gets more than it has, every example comes as
    often as every other, but for one time; of one that gets fewer, they are drawn anew each epoch. All of it follows
    from the seed and the epoch's number, in which the loader addresses batches.

    Args:
        examples: of each corpus.
        weights: of each, positive; only their ratios count. None: by their examples, so that all come once.

    Raises:
        ConfigError: a weight that is not a positive finite number, or not one for each corpus.
    """

    def __init__(self, examples: Sequence[Examples], weights: Sequence[float] | None = None):
        lengths = list(map(len, examples))
        if weights is not None and len(weights) != len(examples):
            raise ConfigError(f"{len(weights)} weights for {len(examples)} corpora, expected one for each")
        self.examples = examples
        self.counts = lengths if weights is None else shares(sum(lengths), weights)

    def __len__(self) -> int:
        return sum(self.counts)

    def epoch(self, random: np.random.Generator) -> Chained:
        parts: list[Sequence[Any]] = []
        for examples, count in zip(self.examples, self.counts, strict=True):
            while count >= len(examples):
                parts.append(examples.epoch(random))
                count -= len(examples)
            if count:
                some = random.permutation(len(examples))[:count]
                parts.append(Chosen(examples.epoch(random), some))
        return Chained(parts)
