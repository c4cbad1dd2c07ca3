"""Masked language modelling: hidden tokens are predicted from those around them.

Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"; whole words as
in its later release, and Cui et al. 2021, "Pre-Training with Whole Word Masking for Chinese BERT"; drawn anew in every
epoch as in Liu et al. 2019, "RoBERTa".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..data import Tokenizer
from ..data.framing import padded, special_token_ids
from ..data.packing import Segments
from ..data.words import word_ids
from ..errors import ConfigError
from ..ops.cross_entropy import IGNORE_INDEX, cross_entropy
from .base import Batch, Evaluation, Objective
from .common.setup import Setup
from .common.task import Task
from .common.text import PreparedText
from .registry import Settings, objective

DRAWS = 0x6D61736B  # of this objective, apart from those of the loader


@dataclass(frozen=True)
class MaskedSettings(Settings):
    """Masked language modelling."""

    probability: float = 0.15  # with which a token is to be predicted
    mask: float = 0.8  # share of these that become the mask token
    random: float = 0.1  # share of these that become another token; the rest stay as they are
    whole_word: Literal["none", "pretokens", "jieba"] = "none"  # draw words, not tokens: by blanks, or Chinese ones

    def check(self) -> None:
        self.require("probability", 0 < self.probability <= 1, "above 0 and at most 1")
        self.require("mask", 0 <= self.mask <= 1, "from 0 to 1")
        self.require("random", 0 <= self.random <= 1 - self.mask + 1e-9, f"from 0 to {1 - self.mask:.3g}")


@dataclass(frozen=True)
class MaskedEvaluation(Evaluation):
    """How well hidden tokens are found.

    Attributes:
        loss: nats a hidden token.
        accuracy: share of them of which the likeliest token is the right one.
        tokens: how many there were.
    """

    accuracy: float
    tokens: int

    def describe(self) -> str:
        return f"loss {self.loss:.4f} nats/token, accuracy {self.accuracy:.4f}"


class Masked(Objective):
    """Some tokens of a text, from all others.

    Examples are windows of ids with one more at the end, which is not used, or `Segments`, of which each document is a
    sequence of its own where documents are separate. A sequence is framed by the start and the end token.

    A token is drawn by itself, or a word, and what becomes of a token: all from the seed and the example's position in
    the stream alone. Special tokens are never drawn, nor put in a token's place.

    Args:
        tokenizer: with the special tokens of "masked".
        settings: rates.
        seed: of the draws.
        separate_documents: whether a window's documents are sequences of their own.

    Raises:
        DataError: the tokenizer lacks a special token.
    """

    name = "masked"
    units = "nats per token"
    metrics = ("loss", "accuracy")

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: MaskedSettings = MaskedSettings(),
        seed: int = 0,
        separate_documents: bool = False,
    ):
        self.tokenizer, self.settings, self.seed = tokenizer, settings, seed
        self.separate_documents = separate_documents
        self.ids = tokenizer.special_ids("masked")
        self.special = special_token_ids(tokenizer)
        self.ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), self.special)

    def collate(self, examples: Sequence[np.ndarray | Segments], positions: Sequence[int]) -> Batch:
        """Windows to int64 "tokens" and "targets", (rows, T) each, and, if rows differ in length, "mask" (rows, T)."""
        tokens, targets = [], []
        for example, position in zip(examples, positions, strict=True):
            for row, hidden in self._hide(self._sequences(example), position):
                tokens.append(row)
                targets.append(hidden)
        tensors = {"tokens": padded(tokens, self.ids["pad"]), "targets": padded(targets, IGNORE_INDEX)}
        if any(len(row) < tensors["tokens"].shape[1] for row in tokens):
            tensors["mask"] = padded([np.ones(len(row), np.int64) for row in tokens])
        count = int((tensors["targets"] != IGNORE_INDEX).sum())
        return Batch({name: torch.from_numpy(x) for name, x in tensors.items()}, count)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """`model.loss(tokens, targets, mask)`: the vocabulary is reached by hidden tokens only."""
        return model.loss(batch["tokens"], batch["targets"], batch.tensors.get("mask"))

    def score(self, model: Any, batch: Batch) -> dict[str, Any]:
        logits, targets = model.masked_logits(batch["tokens"], batch["targets"], batch.tensors.get("mask"))
        loss = cross_entropy(logits.float(), targets, reduction="sum").item() if len(targets) else 0.0
        return {"loss": loss, "right": (logits.argmax(1) == targets).sum().item()}

    def evaluation(self, totals: dict[str, Any], targets: int) -> MaskedEvaluation:
        return MaskedEvaluation(totals["loss"] / targets, totals["right"] / targets, targets)

    def _sequences(self, example: np.ndarray | Segments) -> list[np.ndarray]:
        """Of an example, framed."""
        ids = example.tokens if isinstance(example, Segments) else example[:-1]
        parts = [ids]
        if self.separate_documents and isinstance(example, Segments):
            parts = np.split(ids, np.cumsum(example.lengths)[:-1])
        start, end = self.ids["start"], self.ids["end"]
        # The end of the document before is the first token of a document, and needs no second one after it.
        inner = [_without_ends(part, end) for part in parts if len(part)]
        rows = [np.concatenate([[start], part, [end]]).astype(np.int64) for part in inner if len(part)]
        return rows or [np.array([start, end], np.int64)]

    def _hide(self, rows: list[np.ndarray], position: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids with some hidden, targets) of each row of an example."""
        random = np.random.default_rng((self.seed, DRAWS, position))
        return [self._hide_row(row, random) for row in rows]

    def _hide_row(self, row: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        settings = self.settings
        chance, fate = random.random((2, len(row)))
        others = self.ordinary[random.integers(len(self.ordinary), size=len(row))]
        if settings.whole_word != "none":
            words = word_ids(self.tokenizer, row, "jieba" if settings.whole_word == "jieba" else "none")
            _, first, number = np.unique(words, return_index=True, return_inverse=True)
            chance = chance[first][number]  # each word has its first token's
        drawn = (chance < settings.probability) & ~np.isin(row, self.special)
        hidden = np.where(drawn & (fate < settings.mask), self.ids["mask"], row)
        swapped = drawn & (fate >= settings.mask) & (fate < settings.mask + settings.random)
        return np.where(swapped, others, hidden), np.where(drawn, row, IGNORE_INDEX)


def _without_ends(part: np.ndarray, end: int) -> np.ndarray:
    """A sequence without an end token at its beginning and at its end."""
    first = int(part[0] == end)
    return part[first : len(part) - int(len(part) > first and part[-1] == end)]


@objective("masked", summary="predict hidden tokens from those around them", models=("bert",), settings=MaskedSettings)
def masked(setup: Setup) -> Task:
    """On prepared text, of one corpus or of several; windows leave room for the start and the end token."""
    config, text = setup.config, PreparedText(setup)
    if config.context_length < 3:
        raise ConfigError(f"context_length is {config.context_length}, expected at least 3: two tokens are special")
    examples, held_out = text.examples(config.context_length - 2, config.eval_tokens)
    goal = Masked(text.tokenizer, setup.settings, config.seed, config.separate_documents)
    model = setup.model(text.vocab_size, head="masked-lm", pooler=False)
    return text.task(model, goal, examples, held_out)
