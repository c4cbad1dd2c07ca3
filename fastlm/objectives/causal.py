"""Causal language modelling: each token is predicted from those before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.packing import Segments
from ..ops.cross_entropy import IGNORE_INDEX
from .base import Batch, Evaluation, Objective
from .common.setup import Setup
from .common.task import Task
from .common.text import PreparedText
from .registry import objective


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

    Examples are windows of ids with one more at the end, the last target, or `fastlm.data.packing.Segments`. A window
    that is shorter than others of its batch is filled up with token 0 and ignored targets; where documents are separate
    a batch is one row without any filling, and "cu_seqlens" says where each begins.

    Args:
        tokens_per_byte, tokens_per_char: of the whole held-out split, from its manifest.
        separate_documents: whether tokens attend to their own document alone; examples are then `Segments`.
    """

    name = "causal"
    units = "nats per token"
    metrics = ("loss", "bits_per_byte", "bits_per_char")

    def __init__(
        self, tokens_per_byte: float = math.nan, tokens_per_char: float = math.nan, separate_documents: bool = False
    ):
        self.tokens_per_byte, self.tokens_per_char = tokens_per_byte, tokens_per_char
        self.separate_documents = separate_documents

    def collate(self, examples: Sequence[np.ndarray | Segments], positions: Sequence[int] = ()) -> Batch:
        """Windows of up to T + 1 ids to int64 "tokens" and "targets", (B, T) each.

        Where documents are separate: (1, N), the tokens of all windows, and int32 "cu_seqlens" (documents + 1,).
        """
        pairs = [(x.tokens, x.targets) if isinstance(x, Segments) else (x[:-1], x[1:]) for x in examples]
        if self.separate_documents:
            return _in_a_row(pairs, [x.lengths for x in examples])  # type: ignore[union-attr]
        length = max(len(tokens) for tokens, _ in pairs)
        tokens = np.zeros((len(examples), length), dtype=np.int64)
        targets = np.full((len(examples), length), IGNORE_INDEX, dtype=np.int64)
        for row, (inputs, following) in enumerate(pairs):
            tokens[row, : len(inputs)] = inputs
            targets[row, : len(inputs)] = following
        tensors = {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
        return Batch(tensors, sum(len(inputs) for inputs, _ in pairs))

    def loss(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """`model(tokens, targets)`, which is the mean cross-entropy in nats."""
        if "cu_seqlens" in batch.tensors:
            return model(batch["tokens"], batch["targets"], cu_seqlens=batch["cu_seqlens"])
        return model(batch["tokens"], batch["targets"])

    def evaluation(self, totals: dict[str, Any], targets: int) -> TextEvaluation:
        loss = totals["loss"] / targets
        bits = loss / math.log(2)
        return TextEvaluation(loss, bits * self.tokens_per_byte, bits * self.tokens_per_char, targets)


def _in_a_row(pairs: list[tuple[np.ndarray, np.ndarray]], lengths: list[np.ndarray]) -> Batch:
    tokens, targets = (np.concatenate(part).astype(np.int64)[None] for part in zip(*pairs, strict=True))
    bounds = np.cumsum(np.concatenate([[0], *lengths])).astype(np.int32)
    tensors = {"tokens": tokens, "targets": targets, "cu_seqlens": bounds}
    return Batch({name: torch.from_numpy(x) for name, x in tensors.items()}, tokens.size)


@objective("causal", summary="predict each token from those before it", models=("gpt", "llama"))
def causal(setup: Setup) -> Task:
    """On prepared text, of one corpus or of several."""
    config, text = setup.config, PreparedText(setup)
    examples, held_out = text.examples(config.context_length, config.eval_tokens)
    goal = Causal(text.tokens_per_byte, text.tokens_per_char, config.separate_documents)
    return text.task(setup.model(text.vocab_size), goal, examples, held_out)
