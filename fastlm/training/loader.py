"""Batches of windows from memory-mapped tokens, each a pure function of (seed, index)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError


class WindowLoader:
    """Shuffled epochs of windows: every window of `context_length` tokens comes once an epoch.

    An epoch cuts the tokens from a random offset on into windows that do not overlap, in random order, so
    that the cuts differ between epochs. Nothing is remembered between batches: batch k is the same
    whenever it is asked for, so a resumed run needs only its number.

    Args:
        tokens: (N,) integers, usually a memory map; only the windows asked for are read.
        batch_size: sequences a batch.
        context_length: tokens a sequence; a window has one more, the last target.
        seed: decides offsets and orders.
        device: where batches go; on CUDA through pinned memory, without waiting.
        split: named in the error message.
        vocab_size: what every id must be below; 0 does not look.

    Raises:
        DataError: if there are fewer than `context_length + 1` tokens; from `batch`, for an id beyond the vocabulary.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        batch_size: int,
        context_length: int,
        seed: int,
        device: torch.device | str = "cpu",
        split: str = "train",
        vocab_size: int = 0,
    ):
        if len(tokens) < context_length + 1:
            raise DataError(
                f"the {split} split has {len(tokens)} tokens, a window of context_length = {context_length} "
                f"needs {context_length + 1}: use more text or a shorter context"
            )
        self.tokens = tokens
        self.batch_size = batch_size
        self.context_length = context_length
        self.seed = seed
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        # One window less than would fit leaves room for the offset, which so reaches every phase.
        self.windows_per_epoch = max(1, (len(tokens) - context_length) // context_length)
        slack = len(tokens) - 1 - self.windows_per_epoch * context_length
        self.max_offset = min(slack, context_length - 1)
        self._epoch: tuple[int, int, np.ndarray] | None = None

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Batch number `index`: (B, T) int64 tokens and the (B, T) int64 tokens that follow them."""
        first = index * self.batch_size
        starts = [self._start(sample) for sample in range(first, first + self.batch_size)]
        windows = np.stack([self.tokens[start : start + self.context_length + 1] for start in starts])
        if self.vocab_size and windows.max() >= self.vocab_size:
            for start, window in zip(starts, windows, strict=True):
                check_ids(window, self.vocab_size, self.tokens, start)
        return _to_device(torch.from_numpy(windows.astype(np.int64)), self.device)

    def _start(self, sample: int) -> int:
        epoch, position = divmod(sample, self.windows_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            # One generator an epoch: reaching epoch 1000 costs no more than reaching epoch 0.
            random = np.random.default_rng((self.seed, epoch))
            offset = int(random.integers(self.max_offset + 1))
            self._epoch = (epoch, offset, random.permutation(self.windows_per_epoch))
        _, offset, order = self._epoch
        return offset + int(order[position]) * self.context_length


def evaluation_batches(
    tokens: np.ndarray, batch_size: int, context_length: int, max_tokens: int = 0, vocab_size: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The split from its start, each token predicted once: yields (B, T) tokens and (B, T) targets.

    The last window is filled up with token 0 and targets of -100, which the loss ignores.

    Args:
        tokens: (N,) integers, at least 2.
        max_tokens: how many targets at most; 0 for all N - 1.
        vocab_size: what every id must be below; 0 does not look.

    Raises:
        DataError: for fewer tokens, or an id beyond the vocabulary.
    """
    if len(tokens) < 2:
        raise DataError(f"the validation split has {len(tokens)} tokens, an evaluation needs at least 2")
    count = len(tokens) - 1 if max_tokens == 0 else min(max_tokens, len(tokens) - 1)
    # A split shorter than a window is read at its own length, without filling.
    length = min(context_length, count)
    starts = range(0, count, length)
    for i in range(0, len(starts), batch_size):
        rows = starts[i : i + batch_size]
        x = np.zeros((len(rows), length), dtype=np.int64)
        y = np.full((len(rows), length), -100, dtype=np.int64)
        for row, start in enumerate(rows):
            end = min(start + length, count)
            ids = tokens[start : end + 1]
            check_ids(ids, vocab_size, tokens, start)
            x[row, : end - start] = ids[:-1]
            y[row, : end - start] = ids[1:]
        yield torch.from_numpy(x), torch.from_numpy(y)


def check_ids(ids: np.ndarray, vocab_size: int, tokens: np.ndarray, start: int) -> None:
    """Raise DataError if one of `ids`, those from `start` on in `tokens`, is beyond a vocabulary of `vocab_size`."""
    if vocab_size and ids.max() >= vocab_size:
        at = int((ids >= vocab_size).argmax())
        file = getattr(tokens, "filename", None) or "tokens"  # of a memory map
        raise DataError(f"{file}: the id at {start + at} is {ids[at]}, expected below the vocabulary of {vocab_size}")


def _to_device(windows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    if device.type == "cuda":
        windows = windows.pin_memory().to(device, non_blocking=True)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
