"""Windows of a long text's ids, as examples for a language model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import DataError


class Windows(Sequence[np.ndarray]):
    """Windows that follow one another: each holds `length` tokens and the one after them, the last window fewer.

    So each token of the range but its first is a target once.

    Args:
        tokens: (N,) integers, usually a memory map; only the windows asked for are read.
        length: tokens a window, without the last target. A range with fewer targets is one window.
        targets: how many at most; 0 for all.
        offset: where the range begins.
        vocab_size: what every id must be below; 0 does not look.
        split: named in the error message.

    Raises:
        DataError: for a range without a target; from an index, for an id beyond the vocabulary.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        length: int,
        targets: int = 0,
        offset: int = 0,
        vocab_size: int = 0,
        split: str = "validation",
    ):
        if len(tokens) < offset + 2:
            raise DataError(f"the {split} split has {len(tokens)} tokens, an evaluation needs at least 2")
        there = len(tokens) - 1 - offset
        self.tokens, self.offset, self.vocab_size = tokens, offset, vocab_size
        self.targets = min(targets, there) if targets else there
        self.length = min(length, self.targets)

    def __len__(self) -> int:
        return -(-self.targets // self.length)

    def __getitem__(self, index):  # no slices
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        first = index * self.length
        start, end = self.offset + first, self.offset + min(first + self.length, self.targets)
        window = self.tokens[start : end + 1]
        check_vocabulary(self.tokens, window, start, self.vocab_size)
        return window


def check_vocabulary(tokens: np.ndarray, window: np.ndarray, start: int, vocab_size: int) -> None:
    """Raise DataError for an id of the window of `tokens` from `start` on that is beyond the vocabulary; 0 is none."""
    if vocab_size and window.max() >= vocab_size:
        at = int((window >= vocab_size).argmax())
        file = getattr(tokens, "filename", None) or "tokens"  # of a memory map
        raise DataError(
            f"{file}: the id at {start + at} is {window[at]}, expected below the vocabulary of {vocab_size}"
        )


class ShiftedWindows:
    """Windows for training: every one comes once an epoch.

    An epoch cuts the tokens from a random offset on into windows that do not overlap, so that the cuts differ between
    epochs.

    Args:
        tokens, vocab_size, split: as of `Windows`.
        length: tokens a window; a window has one more, the last target.

    Raises:
        DataError: if there are fewer than `length + 1` tokens; from a window, for an id beyond the vocabulary.
    """

    def __init__(self, tokens: np.ndarray, length: int, vocab_size: int = 0, split: str = "train"):
        if len(tokens) < length + 1:
            raise DataError(
                f"the {split} split has {len(tokens)} tokens, a window of context_length = {length} "
                f"needs {length + 1}: use more text or a shorter context"
            )
        self.tokens, self.length, self.vocab_size, self.split = tokens, length, vocab_size, split
        # One window less than would fit leaves room for the offset, which so reaches every phase.
        self._count = max(1, (len(tokens) - length) // length)
        self._max_offset = min(len(tokens) - 1 - self._count * length, length - 1)

    def __len__(self) -> int:
        return self._count

    def epoch(self, random: np.random.Generator) -> Windows:
        offset = int(random.integers(self._max_offset + 1))
        return Windows(self.tokens, self.length, self._count * self.length, offset, self.vocab_size, self.split)
