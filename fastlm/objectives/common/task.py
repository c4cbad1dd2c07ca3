"""What a run trains: a model, on examples, for an objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ...data import Tokenizer
from ...data.loader import Examples
from ...errors import DataError
from ..base import Objective


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
        tokenizer: what the run folder gets a copy of, or the file of it; None for a model without one.
        fingerprint: of that tokenizer; "" without one.
        hashes: {what was read: its sha256}, which a resumed run must find again.
        source: names the data in errors.
        notes: what a person should know of the data, a line each.
    """

    model: nn.Module
    objective: Objective
    examples: Examples
    held_out: Sequence[Any]
    amount: str
    tokens_per_example: int
    tokenizer: Path | Tokenizer | None
    fingerprint: str
    hashes: dict[str, str]
    source: str
    notes: Sequence[str] = field(default=())

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
        if isinstance(self.tokenizer, (str, Path)) and not Path(self.tokenizer).is_file():
            raise DataError(f"{self.tokenizer}: no such tokenizer")
