"""Batches by number: each a pure function of the examples, the seed and its number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch


class OnDevice(Protocol):
    """What `collate` makes."""

    def to(self, device: torch.device) -> Any: ...


class Examples(Protocol):
    """What a model is trained on. A sequence that is the same in every epoch is one as `Fixed(sequence)`."""

    def __len__(self) -> int:
        """Examples in an epoch."""

    def epoch(self, random: np.random.Generator) -> Sequence[Any]:
        """The examples of an epoch, in order; what differs between epochs is drawn from `random`."""


class Fixed:
    """The examples of a sequence, the same in every epoch."""

    def __init__(self, examples: Sequence[Any]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def epoch(self, random: np.random.Generator) -> Sequence[Any]:
        return self.examples


class Loader:
    """Shuffled epochs of examples in batches.

    Nothing is remembered between batches: batch k is the same whenever it is asked for, so a resumed run needs only its
    number. A batch may hold the end of an epoch and the beginning of the next one.

    Args:
        examples: at least one.
        batch_size: examples a batch.
        seed: decides orders, and what the examples themselves draw.
        collate: makes a batch on the CPU of examples and their positions in the stream.
        device: where batches go.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        seed: int,
        collate: Callable[[Sequence[Any], Sequence[int]], OnDevice],
        device: torch.device | str = "cpu",
    ):
        self.examples, self.batch_size, self.seed, self.collate = examples, batch_size, seed, collate
        self.device = torch.device(device)
        self._epoch: tuple[int, Sequence[Any], np.ndarray] | None = None

    def batch(self, index: int) -> Any:
        """Batch number `index`."""
        positions = range(index * self.batch_size, (index + 1) * self.batch_size)
        return self.collate([self._example(position) for position in positions], positions).to(self.device)

    def _example(self, position: int) -> Any:
        number, place = divmod(position, len(self.examples))
        if self._epoch is None or self._epoch[0] != number:
            # One generator an epoch: reaching epoch 1000 costs no more than reaching epoch 0.
            random = np.random.default_rng((self.seed, number))
            found = self.examples.epoch(random)
            self._epoch = (number, found, random.permutation(len(self.examples)))
        _, found, order = self._epoch
        return found[int(order[place])]


def in_order(
    examples: Sequence[Any],
    batch_size: int,
    collate: Callable[[Sequence[Any], Sequence[int]], OnDevice],
    device: torch.device | str = "cpu",
) -> Iterator[Any]:
    """Every example once, from the first on, in batches of which the last may be smaller."""
    device = torch.device(device)
    for first in range(0, len(examples), batch_size):
        positions = range(first, min(first + batch_size, len(examples)))
        yield collate([examples[i] for i in positions], positions).to(device)
