"""Loss on held-out text, in units that do not depend on the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .loader import evaluation_batches


@dataclass(frozen=True)
class Evaluation:
    """Mean loss on held-out text.

    Attributes:
        loss: nats a token.
        bits_per_byte: the same over the UTF-8 bytes that the tokens encode.
        bits_per_char: over its characters; comparable between tokenizers.
        tokens: how many targets were predicted.
    """

    loss: float
    bits_per_byte: float
    bits_per_char: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: np.ndarray,
    *,
    tokens_per_byte: float,
    tokens_per_char: float,
    batch_size: int,
    context_length: int,
    max_tokens: int = 0,
    vocab_size: int = 0,
    autocast: Callable[[], AbstractContextManager] = torch.no_grad,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate on a split's tokens from its start, always the same ones, in eval mode.

    Every window starts with no context, so its first tokens cost more than they would in running text: the
    result is an upper bound of the model's loss on it.

    Args:
        tokens_per_byte, tokens_per_char: of the whole split, from its manifest.
        max_tokens: how many targets at most; 0 for all.
        vocab_size: what every id must be below, or DataError; 0 does not look.
        stop: asked before each batch; None is returned as soon as it is true.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for x, y in evaluation_batches(tokens, batch_size, context_length, max_tokens, vocab_size):
            if stop():
                return None
            targets = int((y != -100).sum())
            with autocast():
                total += model(x.to(device), y.to(device)).item() * targets
            count += targets
    finally:
        model.train(was_training)
    loss = total / count
    bits = loss / math.log(2)
    return Evaluation(loss, bits * tokens_per_byte, bits * tokens_per_char, count)
