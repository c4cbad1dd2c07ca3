"""Causal language modelling: each token is predicted from those before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.cross_entropy import IGNORE_INDEX
from .base import Batch, Evaluation, Objective


@dataclass(frozen=True)
class TextEvaluation(Evaluation):
    """Mean loss on held-out text, also in units that do not depend on the tokenizer.

    Attributes:
        loss: nats a token.
        bits_per_byte: the same over the UTF-8 bytes that the tokens encode.
        bits_per_char: over its characters; comparable between tokenizers.
        tokens: how many targets were predicted.
    """

    bits_per_byte: float
    bits_per_char: float
    tokens: int

    def describe(self) -> str:
        return (
            f"loss {self.loss:.4f} nats/token, {self.bits_per_byte:.3f} bits/byte, "
            f"{self.bits_per_char:.3f} bits/character"
        )


class Causal(Objective):
    """The next token, at every position of a window.

    Examples are windows of ids with one more at the end, the last target. A window that is shorter than others of its
    batch is filled up with token 0 and ignored targets.

    Args:
        tokens_per_byte, tokens_per_char: of the whole held-out split, from its manifest.
    """

    name = "causal"
    units = "nats per token"

    def __init__(self, tokens_per_byte: float = math.nan, tokens_per_char: float = math.nan):
        self.tokens_per_byte, self.tokens_per_char = tokens_per_byte, tokens_per_char

    def collate(self, examples: Sequence[np.ndarray], positions: Sequence[int] = ()) -> Batch:
        """Windows of up to T + 1 ids to int64 "tokens" and "targets", (B, T) each."""
        length = max(len(window) for window in examples) - 1
        tokens = np.zeros((len(examples), length), dtype=np.int64)
        targets = np.full((len(examples), length), IGNORE_INDEX, dtype=np.int64)
        for row, window in enumerate(examples):
            tokens[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        tensors = {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
        return Batch(tensors, sum(len(window) - 1 for window in examples))

    def loss(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """`model(tokens, targets)`, which is the mean cross-entropy in nats."""
        return model(batch["tokens"], batch["targets"])

    def evaluation(self, totals: dict[str, float], targets: int) -> TextEvaluation:
        loss = totals["loss"] / targets
        bits = loss / math.log(2)
        return TextEvaluation(loss, bits * self.tokens_per_byte, bits * self.tokens_per_char, targets)
