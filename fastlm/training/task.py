"""What a run trains: a model, on examples, for an objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import Tokenizer, load_manifest, load_tokens
from ..data.loader import Examples
from ..data.windows import ShiftedWindows, Windows
from ..errors import ConfigError, DataError
from ..models.gpt import GPT, GPTConfig
from ..objectives import Causal, Objective
from .config import TrainConfig, check_memory


@dataclass
class Task:
    """A model with a `config`, and what it is trained on and for.

    Attributes:
        model: on the CPU; what was drawn for it came from torch's generator.
        objective: makes batches of the examples, and a loss of the model's outputs.
        examples: of training.
        held_out: examples that it is evaluated on, in order.
        amount: how much there is to be trained on, for people.
        tokens_per_example: of which speed and metrics tell.
        tokenizer: the file that the run folder gets a copy of; None for a model without one.
        fingerprint: of that tokenizer; "" without one.
        hashes: {what was read: its sha256}, which a resumed run must find again.
        source: names the data in errors.
    """

    model: nn.Module
    objective: Objective
    examples: Examples
    held_out: Sequence[Any]
    amount: str
    tokens_per_example: int
    tokenizer: Path | None
    fingerprint: str
    hashes: dict[str, str]
    source: str

    def check(self) -> None:
        """Raise for what a run would stumble over, at its first step or at its first evaluation.

        Raises:
            TypeError: for a part that is not of its kind.
            DataError: for no examples, or a missing tokenizer.
        """
        if not hasattr(getattr(self.model, "config", None), "to_dict"):
            raise TypeError(f"Task: model is a {type(self.model).__name__} without a config that has to_dict()")
        if not isinstance(self.objective, Objective):
            raise TypeError(f"Task: objective is a {type(self.objective).__name__}, expected an Objective")
        if not hasattr(self.examples, "epoch"):
            raise TypeError(f"Task: examples is a {type(self.examples).__name__}, expected e.g. Fixed(sequence)")
        for name in ("examples", "held_out"):
            if not len(getattr(self, name)):
                raise DataError(f"{self.source}: {name} has no example, expected at least one")
        if self.tokenizer is not None and not Path(self.tokenizer).is_file():
            raise DataError(f"{self.tokenizer}: no such tokenizer")


def causal_gpt(config: TrainConfig, device: torch.device) -> Task:
    """A GPT that predicts the next token of prepared text.

    Raises:
        ConfigError: if the sizes need more memory than the device has.
        DataError: if the prepared data are missing, damaged or too short.
    """
    if not config.data:
        raise ConfigError("data names no folder; give one that `fastlm prepare` wrote")
    folder = Path(config.data)
    manifest = load_manifest(folder, verify="changed")
    vocab_size = Tokenizer.load(folder / "tokenizer.json").vocab_size
    if manifest.vocab_size != vocab_size:
        raise DataError(f"{folder}: manifest.json says vocab_size {manifest.vocab_size}, its tokenizer {vocab_size}")
    check_memory(config, vocab_size, device)
    examples = ShiftedWindows(load_tokens(folder, "train"), config.context_length, vocab_size)
    validation = load_tokens(folder, "val")
    if len(validation) < 2:
        raise DataError(f"{folder}: the val split has {len(validation)} tokens, expected 2 or more")
    split = manifest.splits["val"]
    sizes = ("context_length", "n_layer", "n_head", "n_embd", "dropout")
    return Task(
        model=GPT(GPTConfig(vocab_size=vocab_size, **{name: getattr(config, name) for name in sizes})),
        objective=Causal(split["tokens"] / split["bytes"], split["tokens"] / split["chars"]),
        examples=examples,
        held_out=Windows(validation, config.context_length, config.eval_tokens, vocab_size=vocab_size),
        amount=f"{len(examples.tokens):,} training tokens",
        tokens_per_example=config.context_length,
        tokenizer=folder / "tokenizer.json",
        fingerprint=manifest.tokenizer_fingerprint,
        hashes=manifest.hashes(),
        source=config.data,
    )
